"""The cache that a decode loop has if no technique chose one, and the bytes that any cache really holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.models.runtime import RuntimeModel, RuntimeState
from tasks.workloads._decode_steps import CachedStep, Chooser, TokenStep

if TYPE_CHECKING:
    from tasks.session import Session

_HELD = ("keys", "values")  # ends of the names under which transformers' layers keep them, quantized or not


def growing_cache(session: Session, choose: Chooser, positions: int) -> TokenStep:
    """transformers' default: grown by concatenation, made anew for every request. Other runtimes have their own."""
    model = session.model
    if isinstance(model, RuntimeModel):
        batch = int(session.job.cell.workload["batch_size"])
        return CachedStep(session, choose, make=lambda: model.new_state(batch, positions), fixed=True)
    from transformers import DynamicCache

    return CachedStep(session, choose, make=lambda: DynamicCache(config=session.model.config), fixed=False)


def stored_bytes(cache: Any) -> dict[str, int]:
    """Device type -> bytes of the keys and values of a cache; quantized parts, scales and residuals included."""
    if isinstance(cache, RuntimeState):
        return cache.stored_bytes()
    return bytes_of(_held(cache))


def held_tensors(cache: Any) -> list[Any]:
    """Keys and values, layer by layer, each of shape (batch, heads, positions, head size), as they are now."""
    import torch

    return [value for value in _held(cache) if isinstance(value, torch.Tensor) and value.dim() == 4]


def _held(cache: Any) -> list[Any]:
    layers = cache.layers if cache is not None else ()
    return [value for layer in layers for name, value in vars(layer).items() if name.endswith(_HELD)]


def bytes_of(held: Any) -> dict[str, int]:
    """Device type -> bytes of the storages behind tensors, tensor subclasses, and lists and mappings of them."""
    import torch

    seen: dict[tuple[str, int], int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            parts = getattr(value, "__tensor_flatten__", None)
            if parts is not None:
                for name in parts()[0]:
                    visit(getattr(value, name))
                return
            storage = value.untyped_storage()
            if storage.nbytes():
                seen[value.device.type, storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            visit(list(value.values()))
        elif isinstance(value, tuple | list):
            for item in value:
                visit(item)

    visit(held)
    total: dict[str, int] = {}
    for (device, _), size in seen.items():
        total[device] = total.get(device, 0) + size
    return total
