"""The driver's loop: gives blocks to slots, one call in flight per slot, and survives what happens on the nodes."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.exchange import slot_name
from orchestrator.inventory import Inventory, Node, bench_devices, is_accelerator
from orchestrator.journal import GIVEN_UP
from orchestrator.patience import PatientStore
from orchestrator.progress import Progress
from orchestrator.slots import ANSWER_S, MAX_STARTS, BenchSlot, Phase, bind, close_all
from orchestrator.work import SweepWork
from tasks.job import CellJob, RunResult
from tasks.row import Outcome

MAX_ATTEMPTS = 3
MOST_AT_ONCE = 16
REFRESH_S = 3.0
# How long a node that was lost may take to come back when nobody else has its tag.
RETURN_S = 30.0
TICK_S = 1.0
# While the CPU of this very machine is measured, the driver wakes less often.
QUIET_TICK_S = 5.0


@dataclass(kw_only=True)
class Dispatcher:
    """Runs `work` on the slots of `inventory` until `stopping` says that only the running cells are to be finished."""

    work: SweepWork
    inventory: Inventory
    journal: PatientStore
    progress: Progress
    stopping: Callable[[], bool]
    static: bool
    parallel: bool = False
    wait_nodes_s: float = 0.0
    log_path: Callable[[str], str | None] = lambda slot_id: None
    runner: type | None = None
    exchange: Any = None
    slots: dict[str, BenchSlot] = field(default_factory=dict)
    _queues: dict[str, deque[CellJob]] = field(default_factory=dict)
    _refreshed: float = 0.0
    _waiting_since: float | None = None

    def run(self) -> None:
        """Until nothing is left, nobody can do what is left, or the person stops it."""
        self._join(self.inventory.settle().messages)
        try:
            while True:
                if not self.stopping():
                    self._refresh()
                    self._assign()
                active = [slot for slot in self.slots.values() if slot.pending is not None]
                if self.stopping() and not any(slot.phase is Phase.BUSY for slot in active):
                    return
                if not active and not self._patient():
                    return
                self._await(active)
                self.journal.tick()
                self.progress.refresh()
        finally:
            close_all(list(self.slots.values()))

    def _patient(self) -> bool:
        """Nothing runs: go on while nodes are being probed or, within the limit, awaited."""
        if any(self._startable(slot) for slot in self.slots.values()):
            return True
        if not self.work.left():
            return False
        if self.inventory.pending():
            return True
        lost = any(not slot.alive for slot in self.slots.values())
        limit_s = 0.0 if self.static else max(self.wait_nodes_s, RETURN_S if lost else 0.0)
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
            if limit_s:
                self.progress.say(f"waiting up to {limit_s:.0f} s for nodes that can run the rest")
        if time.monotonic() - self._waiting_since < limit_s:
            return True
        self.work.give_up("every runner that could measure it was lost")
        return False

    def _refresh(self) -> None:
        if self.static or time.monotonic() - self._refreshed < REFRESH_S:
            return
        self._refreshed = time.monotonic()
        changes = self.inventory.refresh()
        for slot in list(self.slots.values()):
            if slot.node.node_id in changes.lost and slot.alive:
                self._lose(slot, "its node is gone")
        if changes.joined or changes.lost or changes.messages:
            self._join(changes.messages)

    def _join(self, messages: list[str]) -> None:
        """Make slots for devices that have none yet, and let the work place what it can on all of them."""
        offered = bench_devices(self.inventory.nodes.values())
        claims: dict[str, int] = {}
        for node, device in offered:
            accelerator = is_accelerator(device)
            if accelerator:
                claims[node.node_id] = claims.get(node.node_id, 0) + 1
                if claims[node.node_id] > self._useful_accelerators(node):
                    continue
            slot_id = f"{node.report.hostname}-{node.short_id}/{f'gpu{device.index}' if accelerator else 'cpu'}"
            if slot_id not in self.slots:
                self.slots[slot_id] = BenchSlot(
                    slot_id=slot_id,
                    node=node,
                    device=device,
                    log_path=self.log_path(slot_id),
                    runner=self.runner,
                    exchange=self.exchange,
                )
                self._waiting_since = None
        for message in [*messages, *self.work.offer(offered)]:
            self.progress.say(message)
        self.progress.expect(self.work.runs())
        self.work.settle()

    def _useful_accelerators(self, node: Node) -> int:
        """Equal accelerators of one node only help when they may run at the same time."""
        tags = {device.tag for device in node.devices if is_accelerator(device)}
        return node.accelerators if self.parallel or len(tags) > 1 else min(node.accelerators, 1)

    def _assign(self) -> None:
        for slot in list(self.slots.values()):
            queue = self._queues.get(slot.slot_id)
            if slot.phase is Phase.IDLE and queue:
                self._measure(slot, queue)
        waiting = [
            (position, slot)
            for slot in self.slots.values()
            if slot.alive and slot.pending is None and (position := self.work.wants(slot)) is not None
        ]
        for _, slot in sorted(waiting, key=lambda item: item[0]):
            if self._node_is_taken(slot):
                continue
            if slot.phase is Phase.ASLEEP:
                self._start(slot)
            elif jobs := self.work.take(slot):
                self._queues[slot.slot_id] = deque(jobs)
                self._measure(slot, self._queues[slot.slot_id])

    def _startable(self, slot: BenchSlot) -> bool:
        return slot.alive and (bool(self._queues.get(slot.slot_id)) or self.work.wants(slot) is not None)

    def _node_is_taken(self, slot: BenchSlot) -> bool:
        """One run at a time per node, unless several accelerators of it were asked to run together."""
        for other in self.slots.values():
            if other is slot or other.node.node_id != slot.node.node_id:
                continue
            at_work = other.occupies_node or bool(self._queues.get(other.slot_id))
            if at_work and not (self.parallel and slot.uses_accelerator and other.uses_accelerator):
                return True
        return False

    def _start(self, slot: BenchSlot) -> None:
        slot.start()
        self.progress.slot(slot.slot_id, slot.device.tag, "starting")

    def _measure(self, slot: BenchSlot, queue: deque[CellJob]) -> None:
        jobs = [queue.popleft() for _ in range(min(len(queue), MOST_AT_ONCE if slot.quick else 1))]
        # Ray may have given the runner another accelerator than the one that they were planned for
        slot.measure([job if job.device is slot.device else replace(job, device=slot.device) for job in jobs])
        self.progress.started(slot.slot_id, slot.jobs[0])

    def _await(self, active: list[BenchSlot]) -> None:
        import ray

        by_reference = {slot.pending: slot for slot in active}
        references = [*by_reference, *self.inventory.pending()]
        if not references:
            time.sleep(TICK_S)
            return
        measuring_here = self.static and any(slot.device.kind == "cpu" and slot.job for slot in active)
        ready, _ = ray.wait(references, timeout=QUIET_TICK_S if measuring_here else TICK_S)
        if ready and len(ready) < len(references):  # whatever else is there: many slots end many runs in one turn
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            slot = by_reference.get(reference)
            if slot is not None and slot.pending is reference:
                self._answer(slot, reference)
        for slot in active:
            if slot.overdue() and slot.phase is Phase.STARTING and slot.queued():
                self._tell(slot, "its accelerator is held by something else on this cluster")
                slot.wait_on()
            elif slot.overdue():
                self._fault(slot, f"no answer after {time.monotonic() - slot.since:.0f} s while {slot.phase}")
        if any(reference not in by_reference for reference in ready):
            self._refreshed = 0.0

    def _answer(self, slot: BenchSlot, reference: Any) -> None:
        import ray

        try:
            answer = ray.get(reference)
        except ray.exceptions.TaskUnschedulableError as error:
            self._fault(slot, f"its node cannot take the runner: {_first_line(error)}")
        except ray.exceptions.ActorUnschedulableError as error:
            self._fault(slot, f"its node cannot take the runner: {_first_line(error)}")
        except ray.exceptions.RayTaskError as error:
            self._fault(slot, f"the runner failed: {_first_line(error.cause or error)}")
        except ray.exceptions.OutOfMemoryError:
            self._fault(slot, "Ray's memory monitor ended the runner: its node had no memory left", Outcome.OOM)
        except ray.exceptions.RayError as error:
            self._fault(slot, f"the runner was lost: {type(error).__name__}")
        else:
            self._heed(slot, answer)

    def _heed(self, slot: BenchSlot, answer: Any) -> None:
        """An answer of the slot's runner: a dictionary about its node, or the JSON of a finished run."""
        if slot.phase is Phase.STARTING and answer.get("taken"):
            self._tell(slot, "another run measures on this CPU")
            slot.ask()
        elif slot.phase is Phase.STARTING:
            slot.pid, slot.told = answer["pid"], False
            bind(slot, answer["accelerators"], list(self.slots.values()))
            slot.prepare()
            self.progress.slot(slot.slot_id, slot.device.tag, "importing torch, measuring ceilings")
        elif slot.phase is Phase.PREPARING:
            if slot.facts is None:
                slot.facts = answer
                self.journal.note("device", slot=slot.slot_id, device=slot.device.to_dict(), facts=answer,
                                  machine_key=slot.node.report.machine_key)  # fmt: skip
                if answer.get("error"):
                    self.progress.say(f"{slot.slot_id}: its ceilings could not be measured: {answer['error']}")
            else:
                slot.facts = {**slot.facts, "cpus": answer["cpus"]}
            slot.idle()
            self.progress.gone(slot.slot_id)
        else:
            try:
                self._finish(slot, json.loads(answer))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                self._fault(slot, f"the runner's answer is no row of its run: {_first_line(error)}")
            else:
                slot.starts = 0
                self._queues.setdefault(slot.slot_id, deque()).extendleft(reversed(slot.jobs))
                slot.idle()

    def _tell(self, slot: BenchSlot, why: str) -> None:
        if not slot.told:
            slot.told = True
            self.progress.say(f"{slot.slot_id}: {why}: waiting for it")

    def _finish(self, slot: BenchSlot, results: list[dict[str, Any]]) -> None:
        """Store the results of the first of the slot's jobs; what is not answered stays in `jobs`."""
        taken_s = time.monotonic() - slot.since
        slot.quick = taken_s < len(results) * ANSWER_S
        if not results:
            raise ValueError("it is empty")
        for data in results:
            result = RunResult(**data)
            self.work.done(slot.jobs[0], result)
            slot.answered()
            self.progress.finished(slot.slot_id, result.row, taken_s / len(results))

    def _fault(self, slot: BenchSlot, reason: str, outcome: Outcome | None = None) -> None:
        """A fault of the infrastructure: note it, kill the runner, and try its run again on a new one.

        With `outcome` it was the run's own fault: that is its result.
        """
        job, unanswered = slot.job, slot.jobs[1:]
        self._note_fault(slot, reason)
        self.progress.say(f"{slot.slot_id}: {reason}")
        if slot.node.node_id not in self._alive():
            self._lose(slot, "its node is gone")
            return
        since, queue = slot.since, self._queues.setdefault(slot.slot_id, deque())
        slot.kill()
        queue.extendleft(reversed(unanswered))
        if job is not None and outcome is not None:
            self._bury(slot, job, reason, time.monotonic() - since, outcome)
            slot.starts = 0
        elif job is not None and job.attempt < MAX_ATTEMPTS:
            queue.appendleft(replace(job, attempt=job.attempt + 1))
        elif job is not None:
            self._bury(slot, job, _gave_up(job, reason), time.monotonic() - since)
        if slot.starts >= MAX_STARTS:
            self._lose(slot, f"{slot.starts} runners were lost in a row")
        elif queue:
            self._start(slot)

    def _note_fault(self, slot: BenchSlot, reason: str) -> None:
        job = slot.job
        run = {"cell_id": job.cell.cell_id, "round": job.round, "attempt": job.attempt} if job else {}
        self.journal.note("fault", slot=slot.slot_id, node=slot.node.node_id, reason=reason, **run)
        if self.exchange is not None and slot.pid is not None:
            # what it was making is anybody's now
            self.exchange.forget.remote(slot_name(slot.node.node_id, slot.pid))

    def _lose(self, slot: BenchSlot, reason: str) -> None:
        """The slot will not come back: its block is broken, its groups are free for others."""
        self._note_fault(slot, f"{GIVEN_UP}: {reason}")
        self.progress.say(f"{slot.slot_id} is out: {reason}")
        running, queued = slot.job, (*slot.jobs[1:], *self._queues.pop(slot.slot_id, ()))
        slot.give_up()
        if running is not None and running.attempt >= MAX_ATTEMPTS:
            self._bury(slot, running, _gave_up(running, reason), time.monotonic() - slot.since)
            running = None
        self.work.broken(slot, running, queued)
        self.progress.gone(slot.slot_id)
        self.progress.expect(self.work.runs())

    def _bury(
        self, slot: BenchSlot, job: CellJob, reason: str, seconds: float, outcome: Outcome = Outcome.CRASHED
    ) -> None:
        result = self.work.obituary(slot, job, reason, outcome)
        self.work.done(job, result)
        self.progress.finished(slot.slot_id, result.row, seconds)

    def _alive(self) -> set[str]:
        import ray

        return {entry["NodeID"] for entry in ray.nodes() if entry["Alive"]}


def _gave_up(job: CellJob, reason: str) -> str:
    return f"{reason}; gave up after {job.attempt} attempts"


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:300] if lines else ''}"
