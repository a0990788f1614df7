"""Checkpoints with packed weights: what their configuration says, and loading them into layers of a named kernel.

transformers would load them too, with a kernel of GPTQModel's choice, GPTQ's only beside another package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.cell import ModelSpec
from tasks.models.identity import config_of
from tasks.optimization import Unsupported

if TYPE_CHECKING:
    import torch

METHOD = "packed"  # under which transformers knows our way of loading


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a checkpoint's weights are packed; `refusal` says why it cannot be loaded here, if so."""

    method: str
    bits: int
    group: int
    symmetric: bool
    act_order: bool = False
    zeros_less_one: bool = False
    refusal: str | None = None

    @property
    def description(self) -> str:
        return f"{self.method}, {self.bits} bits in groups of {self.group}"


def packing_of(config: dict[str, Any]) -> Packing | None:
    """What the configuration of a checkpoint says; None where it is not quantized by GPTQ or AWQ."""
    data = config.get("quantization_config") or {}
    method = data.get("quant_method")
    if method not in ("gptq", "awq"):
        return None
    layout = str(data.get("checkpoint_format") or data.get("format") or data.get("version") or "").lower()
    known = {"gptq": ("gptq", "gptq_v2", ""), "awq": ("gemm", "")}[method]
    refusal = None
    if layout not in known:
        refusal = f"its layout {layout!r} is none of {', '.join(filter(None, known))}"
    elif data.get("dynamic"):
        refusal = "its layers are quantized in different ways"
    elif data.get("lm_head"):
        refusal = "its head is quantized too"
    return Packing(
        method=method,
        bits=int(data.get("bits") or data.get("w_bit") or 0),
        group=int(data.get("group_size") or data.get("q_group_size") or 0),
        symmetric=bool(data.get("sym", method == "gptq")) and not (method == "awq" and data.get("zero_point", True)),
        act_order=bool(data.get("desc_act", False)),
        zeros_less_one=method == "gptq" and layout != "gptq_v2",
        refusal=refusal,
    )


def quantized_already(model: ModelSpec) -> Packing | None:
    """How the model was published quantized, where its configuration is at hand."""
    try:
        return packing_of(config_of(model) or {})
    except (OSError, ValueError, TypeError):
        return None


# (name, inputs, outputs, has a bias) -> layer without data
LayerFactory = Callable[[str, int, int, bool], "torch.nn.Module"]


def load_packed(
    folder: Path,
    make: LayerFactory,
    finish: Callable[[Any], Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    trust_remote_code: bool = False,
) -> Any:
    """The model of a checkpoint, its packed weights in layers that `make` gives and `finish` arranges, on `device`."""
    from transformers import AutoConfig

    from tasks.models.load import auto_class

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    config.quantization_config = {"quant_method": METHOD}
    keywords = {"attn_implementation": attention} if attention else {}
    with _registered(packed_names(folder), make, finish):
        model = auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype, device_map={"": str(device)}, use_safetensors=True,
            local_files_only=True, trust_remote_code=trust_remote_code, **keywords,
        )  # fmt: skip
    return model.eval()


def packed_names(folder: Path) -> set[str]:
    """Names of the layers whose weights are packed in the checkpoint's files."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names |= {key.removesuffix(".qweight") for key in tensors.keys() if key.endswith(".qweight")}  # noqa: SIM118
    if not names:
        raise Unsupported(f"{folder} says that it is quantized and holds no packed weights")
    return names


@contextmanager
def _registered(names: set[str], make: LayerFactory, finish: Callable[[Any], Any]) -> Iterator[None]:
    """Meanwhile transformers replaces layers of these names before it loads their tensors."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CONFIGS
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as QUANTIZERS
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
        def __init__(self, quant_method: str = METHOD, **_: Any) -> None:
            self.quant_method = quant_method

    class PackedQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
        is_trainable = False

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            _replace(model, names, make)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            for name in sorted(names):
                finish(model.get_submodule(name))
            return model

    CONFIGS[METHOD], QUANTIZERS[METHOD] = PackedConfig, PackedQuantizer
    try:
        yield
    finally:
        del CONFIGS[METHOD], QUANTIZERS[METHOD]


def _replace(model: Any, names: set[str], make: LayerFactory) -> None:
    import torch

    from tasks.optimizations._gptq_kernels import linear_shape

    for name in sorted(names):
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = torch.nn.Identity()
        shape = linear_shape(module)
        if shape is None:
            raise Unsupported(f"the checkpoint packs {name}, which is no linear layer of {type(model).__name__}")
        with torch.device("meta"):
            model.set_submodule(name, make(name, *shape, module.bias is not None))


def write_packed(model: Any, tokenizer: Any, folder: Path, tensors: dict[str, dict[str, Any]], how: Any) -> None:
    """The checkpoint of `model` with the packed `tensors` of its layers, by name, in the place of their weights."""
    import torch

    from tasks.models.finetune import save_checkpoint

    for name, parts in tensors.items():
        layer, holder = model.get_submodule(name), torch.nn.Module()
        for key, value in parts.items():
            holder.register_buffer(key, value)
        if layer.bias is not None:
            holder.register_buffer("bias", layer.bias.detach())
        model.set_submodule(name, holder)
    save_checkpoint(model, tokenizer, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": how}, indent=2))
