"""GPTQModel's kernels by name: where each runs, the bytes that it holds, and how a layer of it comes to life.

The library picks kernels itself if it is let, and may then fetch sources from the network; here they are named.
Importing it changes the process (allocator settings, folders, the root logger): `undisturbed` undoes that.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from tasks.metrics.parameters import storage_bytes
from tasks.models.packing import Packing
from tasks.optimization import Unsupported, out_of_memory

if TYPE_CHECKING:
    import torch

# Layers of `one_operation` by their keys, which are constants of compiled code: the same in every process that makes
# the same layers, so that what one of them compiled is found by the next.
_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_KEYS = itertools.count()
# room for reductions, and what one kernel keeps unpacked after its first call
SCRATCH = ("workspace", "_g_idx_long_cache", "_zeros_cache")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """`backend` is its name in the library, `layer` the class of its layers; `zeros` and `order` are what it keeps.

    Bytes of a layer: codes, `scale_bytes` for a group's scale and zero point beside packed ones (`zeros`), and
    `order_bytes` for each input's group or place. What is `compiled` comes as source: nvcc takes minutes at its first
    use on a node.
    """

    backend: str
    layer: str
    devices: tuple[str, ...]
    bits: tuple[int, ...] = (4,)
    groups: tuple[int, ...] = (32, 64, 128)
    compute_capability: tuple[int, int] | None = None
    package: str | None = None
    symmetric_only: bool = False
    scale_bytes: int = 2
    packed_zeros: bool = True
    order_bytes: int = 0
    compiled: bool = False

    def layer_bytes(self, inputs: int, outputs: int, bits: int, group: int, *, act_order: bool = False) -> float:
        """Storage of a layer's weight by the format's arithmetic; with `act_order` every kernel keeps the order."""
        groups = inputs / group * outputs
        zeros = groups * bits / 8 if self.packed_zeros else 0.0
        order = self.order_bytes or (8 if act_order else 0)
        return inputs * outputs * bits / 8 + groups * self.scale_bytes + zeros + order * inputs


_EVERYWHERE = ("cpu", "cuda")
# by method and kernel; `auto` takes the first that can run
KERNELS: dict[str, dict[str, Kernel]] = {
    "gptq": {
        "marlin": Kernel(
            backend="gptq_marlin", layer="MarlinLinear", devices=("cuda",), bits=(4, 8), compute_capability=(8, 0),
            symmetric_only=True, packed_zeros=False, compiled=True,
        ),
        "triton": Kernel(
            backend="gptq_triton", layer="TritonV2Linear", devices=("cuda",), bits=(4, 8), package="triton",
            order_bytes=4,
        ),
        "aten": Kernel(
            backend="gptq_torch_aten", layer="TorchAtenLinear", devices=("cpu",), scale_bytes=4, packed_zeros=False,
            order_bytes=4,
        ),
        "torch": Kernel(
            backend="gptq_torch", layer="TorchLinear", devices=_EVERYWHERE, bits=(4, 8), order_bytes=4
        ),
    },
    "awq": {
        "marlin": Kernel(
            backend="awq_marlin", layer="AwqMarlinLinear", devices=("cuda",), compute_capability=(8, 0), compiled=True
        ),
        "triton": Kernel(
            backend="awq_gemm_triton", layer="AwqGEMMTritonLinear", devices=("cuda",), package="triton"
        ),
        "aten": Kernel(
            backend="awq_torch_aten", layer="TorchAtenAwqLinear", devices=("cpu",), scale_bytes=4, packed_zeros=False
        ),
        "torch": Kernel(backend="awq_torch", layer="AwqTorchLinear", devices=_EVERYWHERE),
    },
}  # fmt: skip


@contextmanager
def undisturbed(workers: int = 2) -> Iterator[None]:
    """What importing and running the library does to the process and its folder is undone; its bars are not shown.

    With fewer than two `workers` its loader refuses to start.
    """
    environment, root = dict(os.environ), logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    with (
        tempfile.TemporaryDirectory(prefix="gptqmodel-") as folder, chdir(folder), warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere, redirect_stdout(nowhere),  # noqa: PTH123
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        # no downloads of kernels' sources; its caches of compiled ones stay where they are
        os.environ |= {"GPTQMODEL_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": str(max(2, workers))}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            root.setLevel(level)
            root.handlers[:] = handlers


def import_library() -> Any:
    """The package gptqmodel, imported without its side effects."""
    with undisturbed():
        import gptqmodel
    return gptqmodel


def build(kernel: Kernel, dtype: torch.dtype) -> float:
    """Compile a kernel that comes as source, for layers that compute in `dtype`; seconds, few where that was done."""
    if not kernel.compiled:
        return 0.0
    import_library()
    began = time.perf_counter()
    with undisturbed():
        from gptqmodel.utils.marlin import prewarm_marlin_extension

        prewarm_marlin_extension(dtype)
    return time.perf_counter() - began


def layer_class(kernel: Kernel) -> Any:
    """The library's class of the kernel's layers."""
    import_library()
    with undisturbed():
        from gptqmodel.quantization import FORMAT, METHOD
        from gptqmodel.utils.backend import BACKEND
        from gptqmodel.utils.importer import get_kernel_for_backend

        awq = kernel.backend.startswith("awq")
        method, layout = (METHOD.AWQ, FORMAT.GEMM) if awq else (METHOD.GPTQ, FORMAT.GPTQ)
        found = get_kernel_for_backend(BACKEND(kernel.backend), method, layout)
    if found.__name__ != kernel.layer:
        raise RuntimeError(f"the kernel {kernel.backend} of this gptqmodel is {found.__name__}, not {kernel.layer}")
    return found


def layer_of(cls: Any, kernel: Kernel, tensors: dict[str, torch.Tensor], packing: Packing, dtype: torch.dtype) -> Any:
    """A layer of the kernel's class that holds these tensors, as checkpoints name them, and computes in `dtype`."""
    import torch
    from gptqmodel.utils.backend import BACKEND

    outputs = tensors["scales"].shape[1]
    inputs = tensors["scales"].shape[0] * packing.group
    try:
        with torch.device("meta"):
            layer = cls(
                in_features=inputs, out_features=outputs, bias="bias" in tensors, backend=BACKEND(kernel.backend),
                bits=packing.bits, group_size=packing.group, sym=packing.symmetric, desc_act=packing.act_order,
                register_buffers=True, pack_dtype=torch.int32, adapter=None,
            ).eval()  # fmt: skip
    except (NotImplementedError, ValueError) as refusal:
        raise Unsupported(f"{kernel.layer} cannot hold {inputs} x {outputs} weights: {_short(refusal)}") from refusal
    for name, value in tensors.items():
        held = value.to(dtype) if value.is_floating_point() else value
        if name in layer._parameters:
            layer._parameters[name] = torch.nn.Parameter(held, requires_grad=False)
        else:
            layer.register_buffer(name, held)
    if hasattr(layer, "compute_dtype"):
        layer.compute_dtype = dtype
    layer = _finished(layer, zeros_less_one=packing.zeros_less_one)
    return one_operation(layer) if kernel.compiled else layer


def _finished(layer: Any, *, zeros_less_one: bool) -> Any:
    """Arrange a loaded layer's tensors as its kernel wants them; what the kernel does not read is freed.

    `zeros_less_one`: zero points are as GPTQ's first format has them.
    """
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    layer.optimized = True  # else some compile their unpacking, unasked
    try:
        with undisturbed():
            if zeros_less_one and layer.REQUIRES_FORMAT_V2:
                convert_gptq_v1_to_v2_format_module(layer, bits=layer.bits, pack_dtype=layer.pack_dtype)
            layer.post_init()
    except (ImportError, NotImplementedError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise Unsupported(f"the kernel of {type(layer).__name__} cannot be had here: {_short(error)}") from error
    if hasattr(layer, "transform_cpu"):
        layer.transform_cpu()
        layer.linear_mode = "inference"
        layer.scales = layer.qzeros = None
        if hasattr(layer, "g_idx"):
            layer.g_idx = None
    for name, value in list(vars(layer).items()):
        if _is_tensor(value):  # as a buffer it moves with the layer, and is counted
            delattr(layer, name)
            layer.register_buffer(name, value, persistent=False)
    return layer


def one_operation(layer: Any) -> Any:
    """Make a layer one operation for `torch.compile`, which cannot look into an extension that was compiled apart.

    The library's operators say of themselves that they change their arguments and return one of them, and how they are
    found breaks the graph at every layer. Run eagerly the layer is as it was. Returns the layer.
    """
    _packed_linear()
    layer.operation_key = next(_KEYS)
    _LAYERS[layer.operation_key] = layer
    layer.forward = MethodType(_forward, layer)
    return layer


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    import torch

    if torch.compiler.is_compiling():
        return torch.ops.benchmatrix.packed_linear(x, layer.operation_key, layer.out_features)  # type: ignore[no-any-return]
    return type(layer).forward(layer, x)  # type: ignore[no-any-return]


@functools.cache
def _packed_linear() -> None:
    """Make the operator known: (..., inputs) to (..., outputs) by the layer that has a key."""
    import torch

    schema = "(Tensor x, int layer, int outputs) -> Tensor"

    @torch.library.custom_op("benchmatrix::packed_linear", mutates_args=(), schema=schema)
    def packed_linear(x: torch.Tensor, layer: int, outputs: int) -> torch.Tensor:
        found = _LAYERS[layer]
        return type(found).forward(found, x).contiguous()  # type: ignore[no-any-return]

    @packed_linear.register_fake
    def shape_of(x: torch.Tensor, layer: int, outputs: int) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], outputs))


def held_bytes(layer: Any) -> int:
    """What a layer's weight really takes: every tensor that it keeps, but the bias and the kernel's scratch room."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    tensors |= {name: value for name, value in vars(layer).items() if _is_tensor(value)}
    return storage_bytes(value for name, value in tensors.items() if name not in ("bias", *SCRATCH))


def is_ours(module: Any) -> bool:
    return type(module).__module__.startswith("gptqmodel.")


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, or of GPT-2's transposed kind; None for what is neither."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None
