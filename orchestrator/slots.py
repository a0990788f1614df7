"""A bench slot as the driver sees it: its actor on the node, what that actor is doing, and until when it may."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.inventory import NODE_ID_LABEL, Node, is_accelerator
from tasks.artifacts import builders, makers
from tasks.device import DeviceInfo
from tasks.job import CellJob
from tasks.quality import reference_s

STARTING_S = 120.0
PREPARING_S = 480.0
# Beyond a cell's own limit: the supervisor needs a moment to kill it, read its remains and answer.
GRACE_S = 45.0
# What it may have to wait while its node sends an artifact; longer where a reference may be made on its CPU.
DISTURBED_S = 600.0
CLOSING_S = 10.0
# Actors that died in a row without one finished run; then the slot is given up. More than one cell may take with it.
MAX_STARTS = 4


# A slot whose runs end this soon (they need no process) is sent several at once: the way there takes longer.
ANSWER_S = 0.02
_OF_THE_SLOT = frozenset({"device", "cpus", "ceilings", "idle_power_w", "idle_power_missing"})


class Phase(StrEnum):
    ASLEEP = "asleep"
    STARTING = "starting"
    PREPARING = "preparing"
    IDLE = "idle"
    BUSY = "busy"
    GONE = "gone"


@dataclass(kw_only=True, eq=False)
class BenchSlot:
    """One accelerator or the CPU of one node. `device` may change once, when Ray says which accelerator it gave.

    `jobs` were sent and have not come back. After a `quick` answer several may be sent at once.

    `runner` is the actor's class, `orchestrator.runner.Runner` unless a benchmark puts its own in its place. `exchange`
    is the actor through which nodes share artifacts.
    """

    slot_id: str
    node: Node
    device: DeviceInfo
    cpus: tuple[int, ...] = ()
    log_path: str | None = None
    runner: type | None = None
    exchange: Any = None
    phase: Phase = Phase.ASLEEP
    actor: Any = None
    pid: int | None = None
    pending: Any = None
    deadline: float = 0.0
    since: float = 0.0
    jobs: tuple[CellJob, ...] = ()
    quick: bool = False
    starts: int = 0
    facts: dict[str, Any] | None = None
    told: bool = False  # the person knows that it waits for others
    compiled: set[str] = field(default_factory=set)

    @property
    def uses_accelerator(self) -> bool:
        """Whether Ray holds an accelerator (real or pretended) for this slot."""
        return is_accelerator(self.device)

    @property
    def occupies_node(self) -> bool:
        """Starting a runner and measuring facts disturb a neighbour as much as a run does."""
        return self.phase in (Phase.STARTING, Phase.PREPARING, Phase.BUSY)

    @property
    def job(self) -> CellJob | None:
        """The run that is under way, the first of those that were sent."""
        return self.jobs[0] if self.jobs else None

    @property
    def alive(self) -> bool:
        return self.phase is not Phase.GONE

    def start(self) -> None:
        """Create the actor; it is refused at once when the node cannot take it."""
        import ray

        from orchestrator.runner import HOME, Runner

        self.starts += 1
        self.compiled.clear()
        self.actor = (
            ray.remote(self.runner or Runner)
            .options(
                label_selector={NODE_ID_LABEL: self.node.node_id},
                num_gpus=1 if self.uses_accelerator else 0,
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(self.log_path, HOME, self.exchange)
        )
        self.ask()

    def ask(self) -> None:
        """Ask the actor where it is; that of a CPU also whether another driver's runner measures there."""
        claim = None if self.uses_accelerator else f"benchmatrix-cpu-{self.node.node_id}"
        self._await(self.actor.where.remote(claim), Phase.STARTING, STARTING_S)

    def queued(self) -> bool:
        """Whether Ray has not created the actor because something else holds the node's accelerators."""
        try:
            from ray._private import state  # no public interface tells this without the dashboard

            free = state.available_resources_per_node().get(self.node.node_id, {})
            pending = state.actors(self.actor._actor_id.hex())["State"] == "PENDING_CREATION"
        except Exception:  # another version of Ray, whose insides differ: then it is overdue like any other
            return False
        return self.uses_accelerator and pending and free.get("GPU", 0) < 1

    def wait_on(self) -> None:
        """What it waits for belongs to others: as long again."""
        self.deadline = time.monotonic() + STARTING_S

    def prepare(self) -> None:
        """Start the supervisor for `device`; measures the device's facts unless they are known."""
        call = self.actor.prepare.remote(self.device.to_dict(), list(self.cpus), self.facts)
        self._await(call, Phase.PREPARING, PREPARING_S)

    def measure(self, jobs: Sequence[CellJob]) -> None:
        """Send runs; the runner answers after the first, with what it knows of the others at once."""
        self.jobs = tuple(jobs)
        allowed_s = max(limit_s(job, shared=self.exchange is not None) for job in jobs) + GRACE_S
        self._await(self.actor.measure.remote(to_wire(jobs, self.compiled)), Phase.BUSY, allowed_s)

    def answered(self) -> None:
        """The first of the jobs has its row."""
        self.compiled.add(self.jobs[0].cell.cell_id)
        self.jobs = self.jobs[1:]

    def idle(self) -> None:
        self.pending, self.jobs, self.phase = None, (), Phase.IDLE

    def overdue(self) -> bool:
        return self.pending is not None and time.monotonic() > self.deadline

    def kill(self) -> None:
        """Kill the actor with everything below it; what it may still return is never looked at."""
        import ray

        actor, self.actor, self.pending, self.jobs, self.quick = self.actor, None, None, (), False
        if self.phase is not Phase.GONE:
            self.phase = Phase.ASLEEP
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def give_up(self) -> None:
        self.kill()
        self.phase = Phase.GONE

    def close(self) -> Any:
        """Ask an idle actor to end its processes; returns the reference to wait for, if any."""
        return self.actor.close.remote() if self.actor is not None and self.phase is Phase.IDLE else None

    def _await(self, reference: Any, phase: Phase, limit_s: float) -> None:
        self.pending, self.phase, self.since = reference, phase, time.monotonic()
        self.deadline = self.since + limit_s


def to_wire(jobs: Sequence[CellJob], compiled: Collection[str]) -> bytes:
    """Jobs for a runner, as JSON: what it knows of its slot is left out. `compiled` are ids of cells that it knows."""
    sent = []
    for job in jobs:
        own = {name: value for name, value in vars(job).items() if name not in _OF_THE_SLOT}
        cell_id = job.cell.cell_id
        cold = job.compile_cold or cell_id not in compiled
        sent.append(own | {"cell": job.cell.to_dict(), "cell_id": cell_id, "compile_cold": cold})
    return json.dumps(sent).encode()


def limit_s(job: CellJob, *, shared: bool = False) -> float:
    """The longest that a runner may take for this run: the cell, the reference, the stack's artifacts and kernels.

    With other nodes (`shared`) it may wait in vain, and as long, for what another makes.
    """
    making_s = job.artifact_timeout_s * len(makers(job.cell.stack)) + reference_s(job)
    building_s = job.artifact_timeout_s * len(builders(job.cell.stack))
    return job.timeout_s + building_s + making_s * (2 if shared else 1) + max(DISTURBED_S, job.timeout_s)


def bind(slot: BenchSlot, given: list[str], slots: Sequence[BenchSlot]) -> None:
    """On a node with unlike accelerators Ray chooses which one a runner gets; the slot that has it swaps."""
    accelerator = given[0] if given and slot.uses_accelerator else None
    if accelerator is None or _is(slot.device, accelerator):
        return
    for other in slots:
        if other.node.node_id == slot.node.node_id and _is(other.device, accelerator):
            slot.device, other.device = other.device, slot.device
            slot.facts, other.facts = other.facts, slot.facts
            return
    slot.device = next((device for device in slot.node.devices if _is(device, accelerator)), slot.device)


def _is(device: DeviceInfo, given: str) -> bool:
    """Whether Ray's id, an index or a UUID, means this accelerator."""
    if device.uuid is not None and not given.isdigit():
        return device.uuid == given
    return device.kind == "cuda" and given == str(device.index)


def close_all(slots: list[BenchSlot]) -> None:
    """Let the idle runners tidy up, then kill all."""
    import ray

    closing = [reference for slot in slots if (reference := slot.close()) is not None]
    if closing:
        ray.wait(closing, num_returns=len(closing), timeout=CLOSING_S)
    for slot in slots:
        slot.kill()
