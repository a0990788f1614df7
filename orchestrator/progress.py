"""What the person sees while a sweep runs: a live view on a terminal, one plain line per run elsewhere."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.quiet import console_for
from tasks.job import CellJob

if TYPE_CHECKING:
    from orchestrator.watch import Watch

_STYLES = {"ok": "green", "oom": "yellow", "unsupported": "dim", "unplaced": "dim"}
_RECENT = 5


@dataclass(kw_only=True)
class _Lane:
    """One slot as shown: its hardware, what it does, and since when."""

    hardware: str
    doing: str = "starting"
    since: float = field(default_factory=time.monotonic)


class Progress:
    """Counts runs and shows them. Draws only when `refresh` is called, so that timed passes are left alone."""

    def __init__(self, total: int, stream: TextIO, *, live: bool | None = None) -> None:
        self._console = console_for(stream)
        self._total, self._done = total, 0
        self._outcomes: Counter[str] = Counter()
        self._lanes: dict[str, _Lane] = {}
        self._recent: deque[Text] = deque(maxlen=_RECENT)
        self._run_times: deque[float] = deque(maxlen=50)
        self._last_end: float | None = None
        use_live = self._console.is_terminal if live is None else live
        self.watch: Watch | None = None
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if use_live else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; safe to call twice."""
        if self._live is not None:
            self._live.stop()

    def expect(self, total: int) -> None:
        """The number of runs of the whole sweep, when it changes (a broken block, a late node)."""
        self._total = total

    def say(self, text: str) -> None:
        """A message for the person, kept above the live view."""
        if self.watch is not None:
            self.watch.said(text)
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def slot(self, slot_id: str, hardware: str, doing: str) -> None:
        """A slot changed its state."""
        self._lanes[slot_id] = _Lane(hardware=hardware, doing=doing)
        self.refresh()

    def gone(self, slot_id: str) -> None:
        self._lanes.pop(slot_id, None)
        self.refresh()

    def started(self, slot_id: str, job: CellJob) -> None:
        again = f" attempt {job.attempt}" if job.attempt > 1 else ""
        self.slot(slot_id, job.device.tag, f"{_cell_text(job)} round {job.round}{again}")

    def finished(self, slot_id: str | None, row: Mapping[str, Any], seconds: float | None = None) -> None:
        """A row is there; `seconds` is what the run took, None for rows that the driver wrote itself."""
        self._done += 1
        self._outcomes[row["outcome"]] += 1
        if seconds is not None:
            self._run_times.append(seconds)
        if self.watch is not None:
            self.watch.finished(row, seconds)
        if slot_id is not None:
            self._lanes.pop(slot_id, None)
        head, tail = self._line(row)
        if self._live is None:  # written as it is: laying out 10,000 lines costs more than measuring nothing
            self._console.file.write(f"{head}{row['outcome']:<4}{tail}\n")
            self._console.file.flush()
        else:
            line = Text.assemble(head, (f"{row['outcome']:<4}", _STYLES.get(row["outcome"], "red")), tail)
            self._recent.append(line)
            self.refresh()

    def refresh(self) -> None:
        if self.watch is not None:
            self.watch.refresh({name: (lane.hardware, lane.doing, lane.since) for name, lane in self._lanes.items()})
        if self._live is not None:
            self._live.update(self._view(), refresh=True)

    def _line(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """What stands before and after the outcome."""
        tail = f" {row['model']} {row['workload_point']} {row['optimization']} round {row['round']} {row['hardware']}"
        latency, reason = row.get("latency_ms_p50"), row.get("reason")
        if latency is not None:
            tail += f" {milliseconds(latency)}"
        if reason and row["outcome"] != "ok":
            tail += f": {reason}"
        return f"[{self._done:>{len(str(self._total))}}/{self._total}] ", tail

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        now = time.monotonic()
        for slot_id, lane in sorted(self._lanes.items()):
            table.add_row(Text(slot_id, style="cyan"), lane.hardware, lane.doing, f"{now - lane.since:4.0f} s")
        counts = ", ".join(f"{number} {outcome}" for outcome, number in self._outcomes.items())
        summary = f"{self._done}/{self._total} runs"
        left = self.seconds_left()
        if left is not None and left > 0:
            summary += f", about {duration(left)} left"
        return Group(*self._recent, table, Text(f"{summary}{': ' if counts else ''}{counts}", style="bold"))

    def seconds_left(self) -> float | None:
        """Estimate from the runs so far, shared by the slots at work; None before the first."""
        if not self._run_times:
            return None
        mean = sum(self._run_times) / len(self._run_times)
        return mean * max(self._total - self._done, 0) / max(len(self._lanes), 1)


def milliseconds(value: float) -> str:
    """`12.3 ms`, three significant digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} ms"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _cell_text(job: CellJob) -> str:
    return f"{job.cell.model.id} {job.cell.workload} {job.cell.stack}"
