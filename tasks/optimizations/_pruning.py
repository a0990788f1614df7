"""Structured pruning of Llama-type decoders: which channels, heads or layers matter least, and a model without them.

Importance of a structure, the sum in quadrature of its parts:

| structure | magnitude | activation |
|---|---|---|
| MLP channel | its rows of gate and up and its column of down | its column of down times its input's norm on the text |
| key and value head, its queries | their rows, and columns of the output | those columns times their inputs' norms |
| layer | all its weights | block influence: 1 - mean cosine between what enters and what leaves it |

The products of weights with the norms of their inputs are Wanda's measure (Sun et al. 2023), summed over a structure;
block influence is ShortGPT's (Men et al. 2024). MLP channels and heads are ranked within their layer, so that all
layers stay alike, as the configuration has one size for all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.models.runtime import RuntimeModel
from tasks.optimization import Unsupported
from tasks.stacks import option

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell

WHAT = ("mlp", "heads", "layers")
IMPORTANCE = ("activation", "magnitude")
IN_CONFIG = {"mlp": "intermediate_size", "heads": "num_key_value_heads", "layers": "num_hidden_layers"}
# MLP widths stay multiples of these where they are as large as said: odd widths are slow, and formats have blocks
WIDTH_STEPS = ((2048, 256), (512, 64))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What pruning changes of a decoder: MLP channels, key and value heads, and layers."""

    mlp: int
    heads: int
    layers: int


def sizes_of(config: Any) -> Sizes:
    """The sizes of a configuration."""
    return Sizes(**{key: getattr(config, name) for key, name in IN_CONFIG.items()})


def live_sizes(model: Any) -> dict[str, list[float]]:
    """The different sizes that a live model's blocks have, named as in `Sizes`; `layers` is how many there are.

    Read from the two layers that no other technique joins with its neighbours, or from the runtime that holds them.
    """
    if isinstance(model, RuntimeModel):
        seen = model.sizes()
        return {key: [seen[name]] for key, name in IN_CONFIG.items()}
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    layers = model.base_model.layers
    return {
        "mlp": sorted({block.mlp.down_proj.in_features for block in layers}),
        "heads": sorted({block.self_attn.o_proj.in_features / (head * group) for block in layers}),
        "layers": [len(layers)],
    }


def pruned_sizes(before: Sizes, what: str, ratio: float) -> Sizes:
    """What is left when a share `ratio` of one of them goes; raises `Unsupported` where that is nothing or all."""
    count: int = getattr(before, what)
    kept = count - round(count * ratio)
    step = next((step for least, step in WIDTH_STEPS if count >= least), 1)
    if what == "mlp":
        kept = min(round(kept / step) * step, count - step) if kept < count else kept
    if not 0 < kept < count:
        name = {"mlp": "MLP channels", "heads": "key and value heads", "layers": "layers"}[what]
        raise Unsupported(f"a ratio of {ratio:g} removes {count - kept} of {count} {name}")
    return Sizes(**{**vars(before), what: kept})


def pruned_data(data: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Configuration `data` as the stack's pruning, if it has one, leaves it: with the MLP's width that is left."""
    for technique in cell.stack.techniques:
        key = IN_CONFIG.get(str(option(technique, "what"))) if technique.name == "prune" else None
        if key != IN_CONFIG["mlp"] or not all(isinstance(data.get(name), int) for name in IN_CONFIG.values()):
            continue
        before = Sizes(**{name: data[source] for name, source in IN_CONFIG.items()})
        try:
            return {**data, key: pruned_sizes(before, "mlp", float(str(option(technique, "ratio")))).mlp}
        except Unsupported:
            return data  # pruning itself says so
    return data


def pruned_config(config: Any, after: Sizes) -> Any:
    """A configuration with these sizes; raises `Unsupported` where its class refuses them."""
    data = config.to_dict()
    group = config.num_attention_heads // config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    data |= {"intermediate_size": after.mlp, "num_hidden_layers": after.layers, "head_dim": head}
    data |= {"num_key_value_heads": after.heads, "num_attention_heads": group * after.heads}
    if data.get("layer_types"):
        data["layer_types"] = data["layer_types"][: after.layers]
    try:
        return type(config).from_dict(data)
    except Exception as error:  # transformers and huggingface_hub each have errors of their own for it
        fitting = [n for n in range(1, config.num_key_value_heads) if config.hidden_size % (group * n) == 0]
        last = " ".join(str(error).split())[-150:]
        raise Unsupported(
            f"{config.model_type} cannot have {group * after.heads} attention heads ({last}); "
            f"it can keep {', '.join(map(str, fitting))} of {config.num_key_value_heads} key and value heads"
        ) from error


def blocks_of(model: Any) -> Any:
    """The decoder's layers; raises `Unsupported` where they are not built as Llama's."""
    layers = getattr(model.base_model, "layers", None)
    first = layers[0] if layers is not None and len(layers) else None
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    names = dict(first.named_modules()) if first is not None else {}
    missing = [part for part in parts if part not in names]
    if missing:
        raise Unsupported(f"pruning knows blocks as Llama has them: {type(model).__name__} has no {missing[0]}")
    return layers


def prune(model: Any, what: str, after: Sizes, importance: str, ids: torch.Tensor) -> dict[str, Any]:
    """Make `model` smaller in place, weights, modules and configuration; facts. `ids` (windows, length) calibrate."""
    import torch

    config = pruned_config(model.config, after)
    with torch.inference_mode():
        scores = _magnitudes(model, what) if importance == "magnitude" else _activations(model, what, ids)
    kept = [sorted(score.topk(getattr(after, what)).indices.tolist()) for score in scores]
    with torch.no_grad():
        if what == "layers":
            keep_layers(model, kept[0])
        else:
            for block, chosen in zip(blocks_of(model), kept, strict=True):
                if what == "mlp":
                    _keep_channels(block.mlp, chosen, after.mlp)
                else:
                    _keep_heads(block.self_attn, chosen, config.head_dim, model.config)
    for name in ("head_dim", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(model.config, name, getattr(config, name))
    share = [float(score[chosen].sum() / score.sum()) for score, chosen in zip(scores, kept, strict=True)]
    return {"importance_kept": sum(share) / len(share), **({"layers_kept": kept[0]} if what == "layers" else {})}


def _magnitudes(model: Any, what: str) -> list[torch.Tensor]:
    """Importance by weights alone, one tensor for each ranking."""
    import torch

    if what == "layers":
        norms = [torch.stack([p.float().square().sum() for p in b.parameters()]).sum() for b in blocks_of(model)]
        return [torch.stack(norms).sqrt()]
    found = []
    for block in blocks_of(model):
        if what == "mlp":
            rows = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight.T]
            found.append(torch.stack([w.float().square().sum(1) for w in rows]).sum(0).sqrt())
        else:
            attention, heads = block.self_attn, model.config.num_key_value_heads
            rows = [getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj")]
            parts = [w.float().square().sum(1).view(heads, -1).sum(1) for w in (*rows, attention.o_proj.weight.T)]
            found.append(torch.stack(parts).sum(0).sqrt())
    return found


def _activations(model: Any, what: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Importance as the text shows it; sums are kept in fp32 on the device."""
    import torch

    blocks = blocks_of(model)
    sums: dict[int, Any] = {}

    def norms(index: int) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            found = inputs[0].float().square().flatten(0, -2).sum(0)
            sums[index] = sums.get(index, 0) + found

        return hook

    def influence(index: int) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            sums[index] = sums.get(index, 0) + (1 - cosine).mean()

        return hook

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            if what == "layers":
                handle = block.register_forward_hook(influence(index))
            else:
                product = block.mlp.down_proj if what == "mlp" else block.self_attn.o_proj
                handle = product.register_forward_pre_hook(norms(index))
            hooks.callback(handle.remove)
        for window in ids:
            model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    if what == "layers":
        return [torch.stack([sums[index] for index in range(len(blocks))])]
    found = []
    for index, block in enumerate(blocks):
        product = block.mlp.down_proj if what == "mlp" else block.self_attn.o_proj
        squares = product.weight.float().square().sum(0) * sums[index]
        found.append((squares if what == "mlp" else squares.view(model.config.num_key_value_heads, -1).sum(1)).sqrt())
    return found


def _keep_channels(mlp: Any, kept: list[int], width: int) -> None:
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, _rows(getattr(mlp, name), kept))
    mlp.down_proj = _columns(mlp.down_proj, kept)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width


def _keep_heads(attention: Any, kept: list[int], head: int, config: Any) -> None:
    """Key and value heads with all queries that read them."""
    group = config.num_attention_heads // config.num_key_value_heads
    keys = [index * head + i for index in kept for i in range(head)]
    queries = [index * group * head + i for index in kept for i in range(group * head)]
    attention.q_proj = _rows(attention.q_proj, queries)
    attention.k_proj, attention.v_proj = _rows(attention.k_proj, keys), _rows(attention.v_proj, keys)
    attention.o_proj = _columns(attention.o_proj, queries)


def keep_layers(model: Any, kept: list[int]) -> None:
    """Leave these layers, in place; the configuration follows."""
    import torch

    layers = [model.base_model.layers[index] for index in kept]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.base_model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]


def _rows(linear: Any, kept: list[int]) -> Any:
    """A linear layer with these outputs only."""
    return _linear(linear.weight[kept], linear.bias[kept] if linear.bias is not None else None)


def _columns(linear: Any, kept: list[int]) -> Any:
    """A linear layer with these inputs only."""
    return _linear(linear.weight[:, kept], linear.bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    import torch

    with torch.device("meta"):
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = torch.nn.Parameter(weight.contiguous().clone())
    if bias is not None:
        made.bias = torch.nn.Parameter(bias.clone())
    return made
