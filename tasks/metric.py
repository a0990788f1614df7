"""What a metric is: the columns it fills, and the phases of a cell's life at which it looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from tasks.session import Session

ColumnType = Literal["string", "int", "float", "bool", "strings"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the results. `interval` also allows `<name>_lo`, `<name>_hi`, `<name>_n`."""

    name: str
    type: ColumnType
    doc: str
    interval: bool = False


class Phase(StrEnum):
    """The phases of a cell's life, in order. A metric's `begin` and `end` are called around each."""

    LOAD = "load"
    FIRST_CALL = "first_call"
    WARMUP = "warmup"
    LATENCY = "latency"
    DEVICE = "device"
    THROUGHPUT = "throughput"
    QUALITY = "quality"


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Not measured, and why: becomes null with this reason in `null_reasons`."""

    reason: str


class Metric(ABC):
    """One metric. A subclass in `tasks/metrics/` is discovered and instantiated once per cell."""

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    def begin(self, phase: Phase, session: Session) -> None:
        """Just before `phase`; outside every timed region."""
        return

    def end(self, phase: Phase, session: Session) -> None:
        """Just after `phase`, the device synchronised; outside every timed region."""
        return

    @abstractmethod
    def collect(self, session: Session) -> dict[str, Any]:
        """Column name -> value or `Missing`, for exactly the declared `columns`; intervals and `_n` may be added."""
