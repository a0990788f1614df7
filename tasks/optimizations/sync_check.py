"""The naive stop check: the host reads the flag of the step that it has just issued, and waits for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimizations._stop_check import StopCheckKind
from tasks.stacks import option
from tasks.workloads._decode_checks import StopCheck, SyncCheck

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session


class SyncCheckKind(StopCheckKind):
    name = "sync-check"
    summary = "stop flag read after every step (or every n-th), waiting for the device"
    options = {"every": 1}

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        every = next(int(option(item, "every")) for item in cell.stack.techniques if item.name == self.name)
        if refusal is None and every < 1:
            return f"{self.name} needs every to be at least 1, got {every}"
        return refusal

    def make(self, technique: Technique, session: Session) -> StopCheck:
        return SyncCheck(int(option(technique, "every")))

    def expected_reads(self, technique: Technique, steps: int) -> int:
        return steps // int(option(technique, "every")) + 1
