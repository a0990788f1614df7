"""What a workload is: axes with types and defaults, and a step whose marked segments are timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.cell import Cell, Scalar, WorkloadPoint
from tasks.device import DeviceInfo
from tasks.models.identity import learned_positions

if TYPE_CHECKING:
    from tasks.session import Session

Mark = Callable[[str], None]

# Segments that belong to a call but are no samples of it: making things ready before, closing after.
SETUP = "setup"
END = "end"


class Step(ABC):
    """What is timed. `run(index, mark)` does one whole call and calls `mark(label)` at the end of every segment.

    Each pass gives its own `mark`: the latency pass synchronises and reads the clock, the device pass records an
    event, the throughput pass only synchronises where `label` is in `boundaries`, and counts the time up to there if
    the boundary says so (without boundaries all time counts). A step never synchronises itself,
    never makes inputs, and never moves data between host and device unless that belongs to the workload.
    """

    primary: str  # label whose segments are `latency_ms`
    boundaries: Mapping[str, bool]  # label -> whether the time since the boundary before counts as primary
    unit: str  # "token", "image", "step": what throughput and energy count
    units_per_call: int  # units done by the primary segments of one call
    steps_per_call: int = 1  # primary segments of one call
    energy_units_per_call: int | None = None  # units behind the energy of a whole call, if not units_per_call
    waiting_bytes: int = 0  # of input sets that only wait for their turn: no workload would hold them

    @abstractmethod
    def run(self, index: int, mark: Mark) -> None:
        """One whole call, with a mark at the end of each segment."""

    def run_short(self, mark: Mark = lambda _label: None, segments: int = 2) -> None:
        """A call that takes the same paths, for evidence; after it `problems` means nothing any more.

        Of steps with many primary segments it has no more than `segments`.
        """
        self.run(0, mark)

    def after_latency(self) -> None:
        """What the workload measures beside the passes, once, after the latency pass and in `measure_s`."""
        return

    @abstractmethod
    def problems(self) -> list[str]:
        """Validity findings after the measurement (`wrong_token_count`, `weights_unchanged`, ...)."""


class Workload(ABC):
    """One workload. A subclass in `tasks/workloads/` is discovered; nothing else has to be edited.

    `axes` names every parameter with its default; the default's type is the parameter's type, integers must be
    positive, strings must be one of `choices`. `needs_model` is False for kernels. `modifiers` are axes that stay out
    of a point at their default, as default options stay out of a stack: a new one leaves earlier points what they were.
    """

    kind: ClassVar[str]
    summary: ClassVar[str]
    axes: ClassVar[dict[str, Scalar]]
    choices: ClassVar[dict[str, tuple[Scalar, ...]]] = {}
    modifiers: ClassVar[tuple[str, ...]] = ()
    model_kinds: ClassVar[tuple[str, ...]] = ()
    needs_model: ClassVar[bool] = True
    training: ClassVar[bool] = False

    def point(self, given: Mapping[str, Scalar]) -> WorkloadPoint:
        """The point with these values of its axes, defaults filled in."""
        values = {**self.axes, **given}
        kept = {k: v for k, v in values.items() if k not in self.modifiers or v != self.axes[k]}
        return WorkloadPoint(kind=self.kind, parameters=tuple(sorted(kept.items())))

    def values(self, point: WorkloadPoint) -> dict[str, Any]:
        """Every axis with its value at the point."""
        return {**self.axes, **dict(point.parameters)}

    def columns(self, point: WorkloadPoint) -> dict[str, int | None]:
        """The identity columns `batch_size`, `sequence_length`, `new_tokens` of a point, None where meaningless."""
        return {key: point.get(key) for key in ("batch_size", "sequence_length", "new_tokens")}

    def positions(self, point: WorkloadPoint) -> int | None:
        """Tokens of the longest sequence that a language model meets at the point; None if it meets none."""
        return None

    def needs_gradients(self, point: WorkloadPoint) -> bool:
        """Whether a call at this point has a backward pass, so that it cannot run in inference mode."""
        return self.training

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        """One sentence why this workload cannot run this cell's model on `device`, or None."""
        if self.model_kinds and cell.model.kind not in (*self.model_kinds, "unknown"):
            return f"{self.kind} needs a {' or '.join(self.model_kinds)} model, {cell.model.id} is {cell.model.kind}"
        asked = self.positions(cell.workload)
        room = learned_positions(cell.model) if asked else None
        if asked and room is not None and asked > room:
            return f"{self.kind} asks for {asked} positions here, {cell.model.id} has learned {room}"
        return None

    @abstractmethod
    def prepare(self, session: Session) -> Step:
        """Make inputs on the device and the step, before anything is timed."""
