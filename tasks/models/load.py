"""Loading: any `ModelSpec` becomes a model on the device in its dtype, without a detour through fp32 host memory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.cell import ModelSpec, digest
from tasks.models.identity import POCKET, ModelError, checkpoint_folder, random_config, refuse_unsafe
from tasks.models.packing import packing_of
from tasks.optimization import LoadOptions

if TYPE_CHECKING:
    import torch

# Makes the replacement of one linear layer: (name, the layer with its random weights) -> module, or the layer itself
LinearFactory = Callable[[str, "torch.nn.Linear"], "torch.nn.Module"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What was loaded.

    `weights` is trained or random, None where nobody can tell. `make_inputs` and `loss` come with factories only.
    """

    model: Any
    weights: str | None
    config: Any = None
    tokenizer: Any = None
    make_inputs: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None


def load(spec: ModelSpec, options: LoadOptions, device: torch.device, search_path: tuple[str, ...]) -> LoadedModel:
    """Load `spec` on `device` in inference mode; raises `ModelError` with what to do."""
    if options.checkpoint is not None:
        return _checkpoint(spec, options, device)
    if spec.source == "random":
        return _random(spec, options, device)
    if spec.source == "factory":
        return _factory(spec, options, device, search_path)
    return _pretrained(spec, options, device)


def torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def auto_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The transformers auto class that builds this configuration for its usual task, by its own code where trusted."""
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    own = _own_code(config) if trust_remote_code else {}
    classes = (AutoModelForImageClassification, AutoModelForCausalLM)
    known = (auto for auto in classes if type(config) in auto._model_mapping)
    found = next((auto for auto in classes if auto.__name__ in own), None) or next(known, None)
    if found is None:
        raise ModelError(f"model type {config.model_type!r} is neither a causal language model nor an image classifier")
    return found


def from_config(config: Any, spec: ModelSpec, **keywords: Any) -> Any:
    """A model as `config` says, one of `spec` or made from it, without its weights."""
    auto = auto_class(config, spec.trust_remote_code)
    own = _own_code(config).get(auto.__name__) if spec.trust_remote_code else None
    if own is None:
        return auto.from_config(config, **keywords)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    # the auto class would take the newest code, not that of the revision
    made = get_class_from_dynamic_module(own, config.name_or_path, revision=spec.revision)
    return made._from_config(config, **keywords)


def _own_code(config: Any) -> dict[str, str]:
    """The classes that a checkpoint brings, by the auto class that they are for."""
    return getattr(config, "auto_map", None) or {}


def hf_config(data: dict[str, Any]) -> Any:
    """The transformers configuration object of a plain dict with `model_type`."""
    from transformers import AutoConfig

    rest = {key: value for key, value in data.items() if key not in ("model_type", "dtype", "torch_dtype")}
    return AutoConfig.for_model(data["model_type"], **rest)


def _random(spec: ModelSpec, options: LoadOptions, device: torch.device) -> LoadedModel:
    data = random_config(spec.reference)
    config = hf_config(data)
    dtype = torch_dtype(options.dtype or data.get("dtype") or data.get("torch_dtype") or "float32")
    model = build_random(config, dtype, device, options.attention, options.keyword_arguments.get("linear_factory"))
    return LoadedModel(model=model, weights="random", config=config)


def build_random(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    linear_factory: LinearFactory | None = None,
    seed: int = 0,
) -> Any:
    """A model with seeded random weights, made on `device` in `dtype`.

    Linear layers are made one at a time, they and convolutions each seeded by name: every stack gets the same weights
    but for rounding, whatever its dtype or compression, and with a `linear_factory` the full-precision model never
    exists.
    """
    import torch

    torch.manual_seed(seed)
    keywords = {"attn_implementation": attention} if attention else {}
    with _linears_on_meta(), torch.device(device):
        model = auto_class(config).from_config(config, dtype=dtype, **keywords)
    spread = getattr(config, "initializer_range", 0.02)
    tied = getattr(model, "all_tied_weights_keys", {})  # made as what they are tied to
    # by name: a list of the modules would keep all that are replaced
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.Linear) and module.weight.is_meta and f"{name}.weight" not in tied:
            torch.manual_seed(int(digest([seed, name]), 16) >> 1)
            made = module.to_empty(device=device).to(dtype)
            torch.nn.init.normal_(made.weight, std=spread)
            if made.bias is not None:
                torch.nn.init.zeros_(made.bias)
            if linear_factory is not None:
                model.set_submodule(name, linear_factory(name, made))
        elif isinstance(module, torch.nn.Conv2d):
            torch.manual_seed(int(digest([seed, name]), 16) >> 1)
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.tie_weights()
    return model.eval()


class _linears_on_meta:
    """While active, `nn.Linear` takes no memory."""

    def __enter__(self) -> None:
        import torch

        self._init = original = torch.nn.Linear.__init__

        def on_meta(module: Any, *args: Any, **keywords: Any) -> None:
            original(module, *args, **{**keywords, "device": "meta"})

        torch.nn.Linear.__init__ = on_meta  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        import torch

        torch.nn.Linear.__init__ = self._init  # type: ignore[method-assign]


def _pretrained(spec: ModelSpec, options: LoadOptions, device: torch.device) -> LoadedModel:
    from transformers import AutoConfig

    folder = checkpoint_folder(spec)
    if folder is not None:
        refuse_unsafe(folder, spec.trust_remote_code)
    where = str(folder or spec.reference)
    common: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "local_files_only": folder is not None}
    if spec.revision is not None:
        common["revision"] = spec.revision
    config = AutoConfig.from_pretrained(where, **common)
    keywords: dict[str, Any] = {**common, **options.keyword_arguments, "use_safetensors": True}
    keywords["dtype"] = torch_dtype(options.dtype) if options.dtype else "auto"
    keywords.setdefault("device_map", {"": str(device)})
    if options.attention:
        keywords["attn_implementation"] = options.attention
    if options.quantization is not None:
        keywords["quantization_config"] = options.quantization
    keywords.pop("linear_factory", None)
    packing = packing_of(config.to_dict())
    if packing is not None:
        if folder is None or packing.refusal:
            raise ModelError(f"{where} is quantized ({packing.description}): {packing.refusal or 'give its folder'}")
        from tasks.models.packed_checkpoint import load_unpacked

        dtype = torch_dtype(options.dtype or str(config.dtype or "float32").removeprefix("torch."))
        how = {"dtype": dtype, "device": device, "attention": options.attention}
        model = load_unpacked(folder, packing, trust_remote_code=spec.trust_remote_code, **how)
    else:
        model = auto_class(config, spec.trust_remote_code).from_pretrained(where, config=config, **keywords).eval()
    return LoadedModel(model=model, weights="trained", config=config, tokenizer=tokenizer_of(where, **common))


def tokenizer_of(where: str, **keywords: Any) -> Any:
    """The tokenizer of a checkpoint; None where it has none, as vision models and bare checkpoints."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if Path(where).is_dir() and not any((Path(where) / name).is_file() for name in files):
        return None  # for some model types it would make an empty one
    try:
        return AutoTokenizer.from_pretrained(where, **keywords)
    except (OSError, ValueError):
        return None


def _checkpoint(spec: ModelSpec, options: LoadOptions, device: torch.device) -> LoadedModel:
    """An artifact made from `spec`: random weights stay random whatever was done to them."""
    place = ModelSpec(
        id=spec.id, source="path", reference=str(options.checkpoint), kind=spec.kind,
        trust_remote_code=spec.trust_remote_code,
    )  # fmt: skip
    loaded = _pretrained(place, options, device)
    return replace(loaded, weights="random") if spec.source == "random" else loaded


def _factory(spec: ModelSpec, options: LoadOptions, device: torch.device, search_path: tuple[str, ...]) -> LoadedModel:
    """What the function `module:function`, called without arguments, returns: (model, make_inputs) and perhaps a loss.

    `make_inputs(batch_size, device, seed)` returns a tensor, or a tuple of the model's arguments; what is
    floating-point is cast as the weights are. `loss(model, inputs)`, for training, is the mean loss of such inputs.
    """
    module_name, _, function_name = spec.reference.partition(":")
    sys.path.extend(folder for folder in search_path if folder not in sys.path)
    try:
        made = getattr(importlib.import_module(module_name), function_name)()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"factory {spec.reference!r} cannot be found in {', '.join(search_path)}: {error}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ModelError(f"factory {spec.reference!r} must return (model, make_inputs) or (model, make_inputs, loss)")
    model, make_inputs, loss = (*made, None)[:3]
    model = model.to(device=device)
    if options.dtype:
        model = model.to(dtype=torch_dtype(options.dtype))
    return LoadedModel(model=model.eval(), weights=None, make_inputs=make_inputs, loss=loss)


__all__ = [
    "POCKET",
    "LinearFactory",
    "LoadedModel",
    "auto_class",
    "build_random",
    "from_config",
    "hf_config",
    "load",
    "tokenizer_of",
    "torch_dtype",
]
