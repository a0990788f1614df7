"""The step itself writes its flag into host memory that is mapped for the device; the host polls it, without a copy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tasks.optimization import Needs, Unsupported
from tasks.optimizations._stop_check import StopCheckKind, copies_of_the_check
from tasks.workloads._decode_checks import LateCheck, StopCheck

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session

PATIENCE_S = 60.0


class MappedFlag(StopCheckKind):
    name = "mapped-flag"
    summary = "stop flag written by the device to mapped host memory, which the host polls"
    needs = Needs(devices=("cuda",), workloads=("decode",), model_kinds=("language",))

    def make(self, technique: Technique, session: Session) -> StopCheck:
        return MappedCheck()

    def expected_reads(self, technique: Technique, steps: int) -> int:
        return steps

    def recognizes(self, session: Session, facts: dict[str, Any]) -> bool:
        if not session.on_cuda:
            return False
        copies, _ = copies_of_the_check(session)
        facts["flag_copies"] = copies.total()
        return not copies


class MappedCheck(LateCheck):
    """Pinned memory has one address for host and device (unified addressing): a tensor of either kind can lie there."""

    def flags(self, session: Session, new_tokens: int) -> Any:
        import torch

        self._host = torch.zeros(new_tokens, dtype=torch.long, pin_memory=session.on_cuda)
        self._view = self._host.numpy()
        return device_view(self._host) if session.on_cuda else self._host

    def receive(self, column: int) -> int:
        """Spin until the slot holds this request's epoch; older ones are lower."""
        epoch, view = self._ledger.epoch, self._view
        value = int(view[column])
        if value < epoch:
            deadline = time.monotonic() + PATIENCE_S
            while (value := int(view[column])) < epoch:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the stop flag of token {column} did not arrive within {PATIENCE_S:.0f} s")
        return value


class _OnDevice:
    """Pinned host memory under the CUDA array interface, version 2."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self.__cuda_array_interface__ = {
            "data": (host.data_ptr(), False), "shape": tuple(host.shape), "typestr": "<i8", "version": 2,
        }  # fmt: skip


def device_view(host: Any) -> Any:
    """The same pinned memory as a CUDA tensor, int64; raises `Unsupported` where host memory is not mapped."""
    import torch

    try:
        view = torch.as_tensor(_OnDevice(host), device="cuda")
    except RuntimeError as error:
        raise Unsupported(f"mapped-flag: this device cannot address pinned host memory: {error}") from error
    if view.data_ptr() != host.data_ptr():
        raise Unsupported("mapped-flag: host memory was copied, not mapped")
    return view
