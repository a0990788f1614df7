"""Two streams: a step's flag is copied to pinned host memory beside the next step, and read while that one runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimization import Needs
from tasks.optimizations._stop_check import StopCheckKind, copies_of_the_check
from tasks.workloads._decode_checks import LateCheck, StopCheck

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class Interleaved(StopCheckKind):
    name = "interleaved"
    summary = "stop flag copied on a second stream, read while the next step runs"
    needs = Needs(devices=("cuda",), workloads=("decode",), model_kinds=("language",))

    def make(self, technique: Technique, session: Session) -> StopCheck:
        return SideStreamCheck()

    def expected_reads(self, technique: Technique, steps: int) -> int:
        return steps

    def recognizes(self, session: Session, facts: dict[str, Any]) -> bool:
        if not session.on_cuda:
            return False
        copies, kernels = copies_of_the_check(session)
        facts["flag_copies_by_stream"], facts["kernel_streams"] = dict(copies), sorted(kernels)
        return bool(copies) and not copies.keys() & kernels


class SideStreamCheck(LateCheck):
    """Events in both directions, so that neither stream nor the host ever waits for more than the one flag."""

    def flags(self, session: Session, new_tokens: int) -> Any:
        import torch

        self._device = torch.zeros(new_tokens, dtype=torch.long, device=session.device)
        self._cuda = session.on_cuda
        self._host = torch.zeros(new_tokens, dtype=torch.long, pin_memory=self._cuda)
        self._pairs = list(zip(self._host.split(1), self._device.split(1), strict=True))
        self._view = self._host.numpy()
        if self._cuda:
            self._side = torch.cuda.Stream()
            self._written = [torch.cuda.Event() for _ in range(2)]
            self._arrived = [torch.cuda.Event() for _ in range(2)]
        return self._device

    def send(self, column: int) -> None:
        import torch

        host, device = self._pairs[column]
        if not self._cuda:
            host.copy_(device)
            return
        written = self._written[column % 2]
        written.record()
        self._side.wait_event(written)
        with torch.cuda.stream(self._side):
            host.copy_(device, non_blocking=True)
            self._arrived[column % 2].record()

    def receive(self, column: int) -> int:
        if self._cuda:
            self._arrived[column % 2].synchronize()
        return int(self._view[column])
