"""Checkpoints with packed weights: writing them, and loading them into layers of a named kernel or as plain ones.

transformers would load them too, with a kernel of GPTQModel's choice, GPTQ's only beside another package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.models.packed import WORD, awq_weight, gptq_weight
from tasks.models.packing import Packing
from tasks.optimization import Unsupported

if TYPE_CHECKING:
    import torch

METHOD = "packed"  # under which transformers knows our way of loading


# tensors of a packed layer, by their names in a checkpoint -> the layer that takes their place in the model
LayerFactory = Callable[[dict[str, "torch.Tensor"]], "torch.nn.Module"]


def load_packed(
    folder: Path,
    packing: Packing,
    build: LayerFactory,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    trust_remote_code: bool = False,
) -> Any:
    """The model of a checkpoint on `device`, with what `build` makes of the tensors of each packed layer."""
    from transformers import AutoConfig

    from tasks.models.load import auto_class

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    config.quantization_config = {"quant_method": METHOD}
    keywords = {"attn_implementation": attention} if attention else {}
    with _registered(packed_names(folder), packing, build):
        model = auto_class(config, trust_remote_code).from_pretrained(
            folder, config=config, dtype=dtype, device_map={"": str(device)}, use_safetensors=True,
            local_files_only=True, trust_remote_code=trust_remote_code, **keywords,
        )  # fmt: skip
    return model.eval()


def load_unpacked(folder: Path, packing: Packing, **how: Any) -> Any:
    """The model of a packed checkpoint with plain linear layers that hold what the packed weights stand for.

    For the fp32 reference of a model that was published quantized; `how` as in `load_packed`.
    """
    return load_packed(folder, packing, partial(_plain, packing, how["dtype"]), **how)


def _room(packing: Packing, inputs: int, outputs: int, bias: bool) -> torch.nn.Module:
    """Somewhere to load the tensors of one packed layer to."""
    import torch

    holder, each, groups = torch.nn.Module(), WORD // packing.bits, inputs // packing.group
    words = (inputs // each, outputs) if packing.method == "gptq" else (inputs, outputs // each)
    holder.register_buffer("qweight", torch.empty(words, dtype=torch.int32))
    holder.register_buffer("qzeros", torch.empty((groups, outputs // each), dtype=torch.int32))
    holder.register_buffer("scales", torch.empty((groups, outputs), dtype=torch.float16))
    if packing.method == "gptq":
        holder.register_buffer("g_idx", torch.empty(inputs, dtype=torch.int32))
    if bias:
        holder.register_buffer("bias", torch.empty(outputs, dtype=torch.float16))
    # some models initialise their layers' weights by name; what is marked so is left alone
    initialised: Any = torch.empty(0)
    initialised._is_hf_initialized = True
    holder.weight = initialised
    return holder


def _plain(packing: Packing, dtype: torch.dtype, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    import torch

    bias = tensors.pop("bias", None)
    if packing.method == "gptq":
        weight = gptq_weight(tensors, packing.bits, zeros_less_one=packing.zeros_less_one)
    else:
        weight = awq_weight(tensors, packing.bits)
    with torch.device("meta"):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


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
def _registered(names: set[str], packing: Packing, build: LayerFactory) -> Iterator[None]:
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
            _replace(model, names, packing)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            for name in sorted(names):
                model.set_submodule(name, build(dict(model.get_submodule(name).named_buffers())))
            return model

    CONFIGS[METHOD], QUANTIZERS[METHOD] = PackedConfig, PackedQuantizer
    try:
        yield
    finally:
        del CONFIGS[METHOD], QUANTIZERS[METHOD]


def _replace(model: Any, names: set[str], packing: Packing) -> None:
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
            model.set_submodule(name, _room(packing, *shape, module.bias is not None))


def write_packed(model: Any, tokenizer: Any, folder: Path, tensors: dict[str, dict[str, Any]], how: Any) -> None:
    """The checkpoint of `model` with the packed `tensors` of its layers, by name, in the place of their weights."""
    import torch

    from tasks.models.finetune import save_checkpoint

    for name, parts in tensors.items():
        holder = torch.nn.Module()
        for key, value in parts.items():
            holder.register_buffer(key, value)
        model.set_submodule(name, holder)
    save_checkpoint(model, tokenizer, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": how}, indent=2))
