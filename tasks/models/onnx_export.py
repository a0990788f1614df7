"""Export of a torch model as one ONNX graph that serves every batch and length.

A language model becomes a function of new tokens and of the keys and values before them, one flat tensor each, so that
the same graph processes a prompt (nothing before it) and decodes (one new token). `kept` names the positions whose
logits are wanted: a prompt's last one, or all. Attention is written out, as in the reference.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.optimization import Unsupported

GRAPH = "model.onnx"
INLINE_BYTES = 2**26  # larger weights lie beside the graph, mapped by the runtime; a protobuf holds 2 GiB at most
BATCH, PAST, NEW = 2, 5, 7  # of the example that is traced: none is 0 or 1, which torch.export would take for constants


def export_graph(model: Any, folder: Path, *, vision: bool) -> dict[str, Any]:
    """Write `model.onnx` into `folder`, with `model.onnx.data` beside it where the weights are large; facts.

    `model` is a transformers model in fp32 on the CPU, a causal language model with written-out attention. Raises
    `Unsupported` for caches that are not plain keys and values.
    """
    import torch

    module, arguments, shapes, names = _vision(model) if vision else _language(model)
    large = sum(parameter.nbytes for parameter in model.parameters()) > INLINE_BYTES
    with torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            module.eval(), arguments, dynamo=True, dynamic_shapes=shapes, input_names=names[0], output_names=names[1],
            verbose=False, external_data=large,
        )  # fmt: skip
    assert program is not None
    program.save(folder / GRAPH, external_data=large)
    return {"exporter": f"torch.onnx.export(dynamo=True) of torch {torch.__version__}", "external_data": large}


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the flat keys and values of so many layers: `past.0.key`, `past.0.value`, ..."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and size of a head."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, size


def _language(model: Any) -> tuple[Any, tuple[Any, ...], Any, tuple[list[str], list[str]]]:
    import torch

    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(text, "sliding_window", None):
        raise Unsupported(f"the ONNX export knows layers with full attention, not {', '.join(kinds) or 'windows'}")
    layers, heads, size = cache_shape(model.config)
    past = [torch.randn(BATCH, heads, PAST, size) for _ in range(2 * layers)]
    ids = torch.randint(0, int(text.vocab_size), (BATCH, NEW))
    batch, new, kept, before = (torch.export.Dim(name) for name in ("batch", "new", "kept", "past"))
    shapes = ({0: batch, 1: new}, {0: kept}, [{0: batch, 2: before}] * (2 * layers))
    names = (["input_ids", "kept", *cache_names(layers, "past")], ["logits", *cache_names(layers, "present")])
    return _cached_module(model), (ids, torch.arange(3, NEW), past), shapes, names


def _vision(model: Any) -> tuple[Any, tuple[Any, ...], Any, tuple[list[str], list[str]]]:
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(pixel_values).logits
            return logits

    example = torch.randn(BATCH, model.config.num_channels, 64, 96)
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")},)
    return Classifier(), (example,), shapes, (["pixel_values"], ["logits"])


def _cached_module(model: Any) -> Any:
    import torch
    from transformers import DynamicCache

    class Cached(torch.nn.Module):
        """(batch, new) ids, (kept,) positions, flat cache -> (batch, kept, vocabulary) logits, flat longer cache."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, kept: torch.Tensor, past: list[torch.Tensor]
        ) -> tuple[torch.Tensor, ...]:
            before, new = past[0].shape[2], input_ids.shape[1]
            positions = torch.arange(before, before + new)
            # made here and not by transformers, whose mask looks into the values
            hidden = torch.arange(before + new).unsqueeze(0) > positions.unsqueeze(1)
            mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
            answer = self.model(
                input_ids=input_ids,
                attention_mask=mask[None, None],
                position_ids=positions.unsqueeze(0),
                past_key_values=DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2], strict=True))),
                use_cache=True,
                logits_to_keep=kept,
            )
            held = [part for layer in answer.past_key_values.layers for part in (layer.keys, layer.values)]
            return (answer.logits, *held)

    return Cached()


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter and its libraries speak of their own deprecations and of operators that nobody uses here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
