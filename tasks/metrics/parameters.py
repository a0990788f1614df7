"""Parameters, and the bytes in which the model is really stored: packed weights, scales and buffers included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing, Phase
from tasks.models.runtime import RuntimeModel

if TYPE_CHECKING:
    from tasks.session import Session


class Parameters(Metric):
    name = "parameters"
    columns = (
        Column(name="parameters_total", type="int", doc="parameters of the model, packed weights counted one by one"),
        Column(name="parameters_trainable", type="int", doc="parameters that training changes; 0 in inference"),
        Column(name="model_bytes", type="int", doc="storage of parameters and buffers as loaded, each once"),
    )

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def end(self, phase: Phase, session: Session) -> None:
        if phase is Phase.WARMUP and session.model is not None:
            total, trainable = count_parameters(session.model)
            self._found = {
                "parameters_total": total,
                "parameters_trainable": trainable if session.workload.training else 0,
                "model_bytes": stored_bytes(session.model),
            }

    def collect(self, session: Session) -> dict[str, Any]:
        reason = "not loaded" if session.workload.needs_model else "kernel: no model"
        return self._found or {column.name: Missing(reason=reason) for column in self.columns}


def count_parameters(model: Any) -> tuple[int, int]:
    """Total and trainable parameters. A packed weight counts the weights that it stands for."""
    if isinstance(model, RuntimeModel):
        return model.weights.parameters, 0
    packed = {id(module.weight): module for module in model.modules() if type(module).__name__ == "Linear4bit"}
    total = trainable = 0
    for module in model.modules():
        if hasattr(module, "qweight"):  # GPTQModel's layers: words, scales and zero points, none of them a weight
            bias = module._buffers.get("bias")
            total += module.in_features * module.out_features + (0 if bias is None else bias.numel())
            packed |= {id(parameter): None for parameter in module.parameters(recurse=False)}
    for parameter in model.parameters():
        count = parameter.numel()
        if id(parameter) in packed:
            module = packed[id(parameter)]
            count = 0 if module is None else module.in_features * module.out_features
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable


def stored_bytes(model: Any) -> int:
    """Bytes of all storages reachable from parameters, buffers and quantization states, shared ones once."""
    if isinstance(model, RuntimeModel):
        return model.weights.bytes
    states = [state for module in model.modules() if (state := getattr(module, "state", None)) is not None]
    scales = [getattr(state, name, None) for state in states for name in ("SCB", "CB")]
    return storage_bytes([*model.parameters(), *model.buffers(), *scales])


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of all storages reachable from these tensors, shared ones once; what is None has none."""
    import torch

    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            inner = getattr(value, "__tensor_flatten__", None)
            if inner is not None:
                for name in inner()[0]:
                    visit(getattr(value, name))
                return
            storage = value.untyped_storage()
            # weights that live elsewhere are on the meta device, where every storage has the address 0
            seen[id(value) if value.is_meta else storage.data_ptr()] = storage.nbytes()
            visit(getattr(value, "quant_state", None))  # bitsandbytes 4-bit: scales and their own state
            for name in ("SCB", "CB"):  # bitsandbytes 8-bit: row scales; CB is the weight itself or None
                visit(getattr(value, name, None))
        elif type(value).__name__ == "QuantState":
            for item in vars(value).values():
                visit(item)

    for tensor in tensors:
        visit(tensor)
    return sum(seen.values())
