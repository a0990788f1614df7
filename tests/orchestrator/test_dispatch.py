"""What is left of a sweep, and who gets it: `SweepWork` over a real store, without Ray; signals and a full disk."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.dispatch import Dispatcher
from orchestrator.execute import Finished
from orchestrator.expand import expand
from orchestrator.interrupt import Stop
from orchestrator.inventory import Inventory, Node, bench_devices
from orchestrator.journal import read_journal
from orchestrator.patience import PatientStore
from orchestrator.progress import Progress
from orchestrator.slots import DISTURBED_S, BenchSlot, Phase, limit_s, to_wire
from orchestrator.store import Store, StoreFull
from orchestrator.sweep import make_sweep
from orchestrator.work import RunSettings, SweepWork
from tasks.identity import job_columns
from tasks.job import CellJob, RunResult
from tasks.probe import probe
from tasks.row import Row

SWEEP: dict[str, Any] = {
    "name": "work",
    "models": ["pocket"],
    "workloads": [{"kind": "prefill", "batch_size": 1, "sequence_length": [16, 32]}],
    "optimizations": ["baseline", "bf16", "sdpa-cudnn"],
    "hardware": ["a100", "rtx3090"],
    "rounds": 2,
}


class Bench:
    """A store, the work over it, and slots on pretended nodes."""

    def __init__(self, folder: Path, *tags: str, only: set[str] | None = None, **changes: Any) -> None:
        self.store = Store.open(folder)
        self.sweep = make_sweep(SWEEP | changes)
        self.settled: list[dict[str, Any]] = []
        patient = PatientStore(self.store, stopping=lambda: False, say=print)
        self.work = SweepWork(
            expand(self.sweep, "cpu"), patient, self.store.records,
            RunSettings(sweep=self.sweep, run_id="run", ray_version="2.60.0"),
            settled=self.settled.append, write_plan=self.store.write_plan, only=only,
        )  # fmt: skip
        self.nodes = [self.node(f"{number}-{tag}", tag) for number, tag in enumerate(tags)]
        self.messages = self.offer()

    @staticmethod
    def node(node_id: str, tag: str) -> Node:
        return Node(node_id=node_id, address="", accelerators=1, report=probe(tag, 1, cards=[]))

    def dispatcher(self) -> Dispatcher:
        return Dispatcher(
            work=self.work, inventory=Inventory(), journal=PatientStore(self.store, stopping=lambda: False, say=print),
            progress=Progress(0, io.StringIO()), stopping=lambda: False, static=True,
        )  # fmt: skip

    def offer(self) -> list[str]:
        messages = self.work.offer(bench_devices(self.nodes))
        self.work.settle()
        return messages

    def slot(self, number: int) -> BenchSlot:
        node = self.nodes[number]
        return BenchSlot(slot_id=node.node_id, node=node, device=node.devices[0])

    def finish(self, job: CellJob, outcome: str = "ok") -> None:
        row = Row()
        row.set(**job_columns(job), outcome=outcome, reason=None if outcome == "ok" else "a reason")
        if job.quality and outcome == "ok":
            row.set(quality_reference="reference")
        self.work.done(job, RunResult(row=row.to_dict()))

    def finish_all(self, number: int) -> list[CellJob]:
        done: list[CellJob] = []
        while self.work.wants(self.slot(number)) is not None:
            for job in self.work.take(self.slot(number)):
                self.finish(job)
                done.append(job)
        return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_group_stays_on_one_machine_and_equal_machines_share_groups(folder: Path) -> None:
    bench = Bench(folder, "a100", "a100", "rtx3090")
    first, second = bench.work.take(bench.slot(0)), bench.work.take(bench.slot(1))
    assert {job.cell.group_id for job in first}.isdisjoint(job.cell.group_id for job in second)
    assert {job.cell.hardware for job in first + second} == {"a100"}
    (again,) = {job.cell.group_id for job in bench.work.take(bench.slot(0))}
    assert again == first[0].cell.group_id
    assert bench.work.wants(bench.slot(0)) is None and bench.work.wants(bench.slot(2)) is not None
    bench.store.close()


def test_every_run_once_and_rows_for_what_cannot_run(folder: Path) -> None:
    bench = Bench(folder, "a100", "rtx3090")
    assert bench.work.runs() == 4 + 4 * 2 * 2
    jobs = bench.finish_all(0) + bench.finish_all(1)
    assert len({(job.cell.cell_id, job.round) for job in jobs}) == len(jobs) == 16
    assert [row["outcome"] for row in bench.settled] == ["unsupported"] * 4
    assert all("sdpa-cudnn needs cuda" in row["reason"] for row in bench.settled)
    assert not bench.work.left() and bench.work.runs() == 20
    assert bench.work.outcomes() == {"ok": 8, "unsupported": 4}
    bench.store.close()
    again = Bench(folder, "a100", "rtx3090")
    assert not again.work.left() and again.work.runs() == 0 and not again.settled
    assert again.work.reused_runs == 16 and again.work.outcomes() == {"ok": 8, "unsupported": 4}
    again.store.close()


def test_runs_that_are_expected_hold_what_needs_no_runner(folder: Path) -> None:
    bench = Bench(folder)
    assert bench.work.runs() == 12, "one row for each cell that has no node"
    bench.nodes = [bench.node("0", "a100"), bench.node("1", "rtx3090")]
    bench.work.offer(bench_devices(bench.nodes))
    assert bench.work.runs() == 4 + 16
    bench.work.settle()
    assert bench.work.runs() == 4 + 16 and bench.work.written == 4
    bench.store.close()


def test_quality_is_measured_once_per_cell(folder: Path) -> None:
    bench = Bench(folder, "a100")
    jobs = bench.finish_all(0)
    assert sum(job.quality for job in jobs) == len({job.cell.cell_id for job in jobs})
    assert all(job.round == 0 for job in jobs if job.quality)
    bench.store.close()


@pytest.mark.parametrize(("asked", "cold"), [({}, False), ({"compile_each_round": True}, True)])
def test_a_sweep_may_compile_in_each_round(folder: Path, asked: dict[str, Any], cold: bool) -> None:
    bench = Bench(folder, "a100", **asked)
    jobs = bench.finish_all(0)
    known = {job.cell.cell_id for job in jobs}
    assert [job["compile_cold"] for job in json.loads(to_wire(jobs, known))] == [cold] * len(jobs)
    assert all(job["compile_cold"] for job in json.loads(to_wire(jobs, ())))
    bench.store.close()


def test_a_run_without_a_reading_leaves_quality_to_the_next(folder: Path) -> None:
    bench = Bench(folder, "a100")
    (job, *_) = bench.work.take(bench.slot(0))
    bench.finish(job, "invalid")
    bench.store.close()
    later = Bench(folder, "a100")
    jobs = [other for other in later.finish_all(0) if other.cell.cell_id == job.cell.cell_id]
    assert [other.quality for other in jobs] == [True] + [False] * (len(jobs) - 1)
    later.store.close()


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions and a task, where relative paths are taken from."""
    here = tmp_path / "beside"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "mine.yaml").write_text("task: mine\n")
    (here / "questions.jsonl").write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}\n')


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        ({"quality": False}, {}, 8),
        ({}, {"quality": {"tokens": 100}}, 8),
        ({}, {"quality": {"tokens": 2048}}, 0),
        ({}, {"quality": {"tasks": ["mine"], "tasks_path": "."}}, 8),
        ({"quality": {"tasks": ["mine"], "tasks_path": "."}}, {"quality": {"tasks": ["mine"], "tasks_path": "."}}, 0),
        ({}, {"quality": {"choices_file": "questions.jsonl", "choices": 100}}, 8),
        ({}, {"seed": 1}, 8),
        ({}, {"limits": {"memory_budget_gib": 1}}, 8),
        ({}, {"limits": {"cell_timeout_s": 1}}, 0),
        ({}, {"compile_each_round": True}, 0),
        ({"optimizations": ["baseline", "compile"]}, {"optimizations": ["baseline", "compile"]}, 0),
        (
            {"optimizations": ["baseline", "compile"]},
            {"optimizations": ["baseline", "compile"], "compile_each_round": True},
            8,  # the compiled ones, and their baselines beside them
        ),
    ],
)
def test_what_changes_a_result_makes_it_stale(
    folder: Path, beside: None, before: dict[str, Any], after: dict[str, Any], runs: int
) -> None:
    bench = Bench(folder, "a100", **before)
    bench.finish_all(0)
    bench.store.close()
    later = Bench(folder, "a100", **after)
    jobs = later.finish_all(0)
    assert len(jobs) == runs
    quality = after.get("quality", {})
    assert all(job.quality_tasks == tuple(quality.get("tasks", ())) for job in jobs)
    assert all(Path(job.quality_choices_file).name == quality.get("choices_file", "") for job in jobs)
    wanted = after.get("quality", {}).get("tokens", 2048)
    assert all((job.quality_tokens, job.quality_choices) == (wanted, 100) for job in jobs)
    later.store.close()


def test_edited_questions_and_tasks_make_a_result_stale(folder: Path, tmp_path: Path) -> None:
    questions, task = tmp_path / "questions.jsonl", tmp_path / "tasks" / "mine.yaml"
    task.parent.mkdir()
    task.write_text("task: mine\n")
    questions.write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}\n')
    quality = {"choices_file": str(questions), "tasks": ["mine"], "tasks_path": str(task.parent)}
    bench = Bench(folder, "a100", quality=quality)
    assert bench.finish_all(0)
    bench.store.close()
    for file, text in ((questions, '{"ctx": "a", "endings": ["b", "c"], "label": 1}\n'), (task, "task: mine\n#\n")):
        same = Bench(folder, "a100", quality=quality)
        assert same.finish_all(0) == []
        same.store.close()
        file.write_text(text)
        other = Bench(folder, "a100", quality=quality)
        assert other.finish_all(0)
        other.store.close()


def test_an_edited_calibration_text_makes_a_result_stale(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("calibration")
    sweep = {"optimizations": ["baseline", f"prune:text={text}"]}
    for expected in (["baseline", f"prune:text={text}"], []):
        bench = Bench(folder, "a100", **sweep)
        assert sorted({str(job.cell.stack) for job in bench.finish_all(0)}) == expected
        bench.store.close()
    text.write_text("another")
    bench = Bench(folder, "a100", **sweep)
    assert {str(job.cell.stack) for job in bench.finish_all(0)} >= {f"prune:text={text}"}
    bench.store.close()


def test_a_slot_is_given_time_for_what_has_to_be_made(folder: Path) -> None:
    limits = {"cell_timeout_s": 100, "artifact_timeout_s": 1000}
    bench = Bench(folder, "a100", optimizations=["baseline", "prune", "distill+prune"], limits=limits, rounds=1)
    given = {str(job.cell.stack): limit_s(job) - DISTURBED_S for job in bench.work.take(bench.slot(0))}
    assert given == {"baseline": 200, "prune": 1200, "distill+prune": 2200}, "the quality reference too"
    bench.store.close()


def test_switching_quality_leaves_training_alone(folder: Path) -> None:
    workloads = [{"kind": "train_step", "batch_size": 1, "sequence_length": 16}]
    bench = Bench(folder, "a100", workloads=workloads, quality=False)
    assert bench.finish_all(0)
    bench.store.close()
    later = Bench(folder, "a100", workloads=workloads)
    assert later.finish_all(0) == []
    assert any("4 runs are there already" in message for message in later.messages)
    later.store.close()


def test_only_leaves_the_rest_to_the_plan(folder: Path) -> None:
    from analysis import load_plan

    planned = [item.cell for item in expand(make_sweep(SWEEP), "cpu")]
    only = {cell.cell_id for cell in planned if cell.hardware == "a100" and str(cell.stack) == "baseline"}
    bench = Bench(folder, "a100", only=only)
    assert bench.messages == [] and not bench.settled
    assert {job.cell.cell_id for job in bench.finish_all(0)} == only
    assert not bench.work.left() and bench.work.outcomes() == {"ok": 2}
    bench.store.close()
    plan = load_plan(folder)
    assert plan is not None and plan["cell_id"].tolist() == [cell.cell_id for cell in planned]


def test_a_broken_block_is_finished_as_a_new_one_elsewhere(folder: Path) -> None:
    bench = Bench(folder, "a100", "a100")
    block = bench.work.take(bench.slot(0))
    bench.finish(block[0])
    bench.work.broken(bench.slot(0), None, block[1:])
    order = [job for job in bench.finish_all(1) if job.cell.group_id == block[0].cell.group_id]
    assert min(job.round for job in order) == 1
    assert {job.block_id for job in order}.isdisjoint({block[0].block_id})
    assert bench.work.outcomes()["ok"] == 4
    bench.store.close()


def test_a_cell_that_takes_its_node_with_it_is_not_tried_for_ever(folder: Path) -> None:
    bench = Bench(folder, "a100", "a100", "a100", hardware=["a100"], optimizations=["baseline", "bf16"])
    dispatcher = bench.dispatcher()
    first, *_ = bench.work.take(bench.slot(0))
    assert first.attempt == 1
    bench.work.broken(bench.slot(0), first, ())
    for number, attempt in ((1, 2), (2, 3)):
        slot = bench.slot(number)
        jobs = next(jobs for jobs in iter(lambda slot=slot: bench.work.take(slot), []) if first.cell in
                    [job.cell for job in jobs])  # fmt: skip
        running = next(job for job in jobs if job.cell == first.cell)
        assert running.attempt == attempt
        assert all(job.attempt == 1 for job in jobs if job is not running)
        slot.phase, slot.jobs = Phase.BUSY, (running,)
        dispatcher.slots[slot.slot_id] = slot
        dispatcher._queues[slot.slot_id] = deque(job for job in jobs if job is not running)
        dispatcher._lose(slot, "its node is gone")
    rows = [record["row"] for record in read_journal(folder / "journal.jsonl") if record["kind"] == "row"]
    assert [(row["cell_id"], row["outcome"], row["attempt"]) for row in rows] == [(first.cell.cell_id, "crashed", 3)]
    assert rows[0]["reason"] == "its node is gone; gave up after 3 attempts"
    assert rows[0]["machine_key"] == bench.nodes[2].report.machine_key
    bench.store.close()


@pytest.mark.parametrize("wrong", [{"cell_id": "another"}, {"round": 7}, {"outcome": 3}, {"no_such_column": 1}])
def test_an_answer_that_is_no_row_of_its_run_is_a_fault(folder: Path, wrong: dict[str, Any]) -> None:
    bench = Bench(folder, "a100", hardware=["a100"], optimizations=["baseline", "bf16"])
    dispatcher, slot = bench.dispatcher(), bench.slot(0)
    job, *_ = bench.work.take(slot)
    dispatcher.slots[slot.slot_id] = slot
    slot.phase, slot.jobs = Phase.BUSY, (job,)
    row = Row()
    row.set(**job_columns(job), outcome="ok")
    faults: list[str] = []
    dispatcher._fault = lambda slot, reason: faults.append(reason)  # type: ignore[method-assign]
    dispatcher._heed(slot, json.dumps([{"row": row.to_dict() | wrong, "samples": []}]))
    assert len(faults) == 1 and faults[0].startswith("the runner's answer is no row of its run: ")
    assert not [record for record in read_journal(folder / "journal.jsonl") if record["kind"] == "row"]
    dispatcher._heed(slot, "no JSON")
    dispatcher._heed(slot, object())
    dispatcher._heed(slot, "[]")
    assert len(faults) == 4
    dispatcher._heed(slot, json.dumps([{"row": row.to_dict(), "samples": []}]))
    assert len(faults) == 4 and slot.phase is Phase.IDLE and bench.work.measured == 1
    bench.store.close()


class TestSeveralAtOnce:
    """Runs that end at once are sent together: nothing is lost, doubled or blamed for another."""

    @pytest.fixture
    def busy(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """A slot whose last answer was quick, with a block of four before it; `sent` are its calls."""
        bench = Bench(folder, "a100", hardware=["a100"], optimizations=["baseline", "bf16", "fp16", "eager"])
        dispatcher, slot, sent = bench.dispatcher(), bench.slot(0), list[list[CellJob]]()

        def measure(jobs: Sequence[CellJob]) -> None:
            sent.append(list(jobs))
            slot.jobs, slot.phase, slot.pending, slot.since = tuple(jobs), Phase.BUSY, object(), time.monotonic()

        def start() -> None:
            slot.starts += 1
            slot.phase = Phase.STARTING

        monkeypatch.setattr(slot, "measure", measure)
        monkeypatch.setattr(slot, "start", start)
        monkeypatch.setattr(dispatcher, "_alive", lambda: {slot.node.node_id})
        dispatcher.slots[slot.slot_id] = slot
        block = bench.work.take(slot)
        dispatcher._queues[slot.slot_id] = deque(block)
        slot.phase, slot.quick = Phase.IDLE, True
        yield SimpleNamespace(bench=bench, dispatcher=dispatcher, slot=slot, sent=sent, block=block)
        bench.store.close()

    def answer(self, jobs: Sequence[CellJob]) -> str:
        rows = []
        for job in jobs:
            row = Row()
            row.set(**job_columns(job), outcome="ok")
            rows.append({"row": row.to_dict(), "samples": []})
        return json.dumps(rows)

    def test_what_is_not_answered_is_sent_again_in_order(self, busy: Any) -> None:
        busy.dispatcher._assign()
        assert busy.sent == [busy.block]
        busy.dispatcher._heed(busy.slot, self.answer(busy.block[:3]))
        assert busy.bench.work.measured == 3 and busy.slot.jobs == ()
        busy.dispatcher._assign()
        assert busy.sent[1] == busy.block[3:]

    def test_one_at_a_time_where_they_take_their_time(self, busy: Any) -> None:
        busy.slot.quick = False
        busy.dispatcher._assign()
        assert busy.sent == [busy.block[:1]]
        busy.slot.since -= 1.0
        busy.dispatcher._heed(busy.slot, self.answer(busy.block[:1]))
        busy.dispatcher._assign()
        assert busy.sent[1] == busy.block[1:2] and not busy.slot.quick
        busy.slot.since += 1.0
        busy.dispatcher._heed(busy.slot, self.answer(busy.block[1:2]))
        busy.dispatcher._assign()
        assert busy.sent[2] == busy.block[2:], "the last took no time"

    def test_a_lost_runner_repeats_the_first_and_then_one_by_one(self, busy: Any) -> None:
        busy.dispatcher._assign()
        busy.dispatcher._fault(busy.slot, "the runner was lost")
        queue = list(busy.dispatcher._queues[busy.slot.slot_id])
        assert [job.attempt for job in queue] == [2, 1, 1, 1]
        assert [job.cell for job in queue] == [job.cell for job in busy.block]
        busy.slot.phase = Phase.IDLE
        busy.dispatcher._assign()
        assert busy.sent[1] == queue[:1]

    def test_a_run_that_ate_the_memory_of_its_node_is_not_tried_again(
        self, busy: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray's memory monitor ends the runner with what it measures: a result, however many runs end so."""
        import ray

        def ended(reference: Any) -> None:
            raise ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")

        monkeypatch.setattr(ray, "get", ended)
        for number in range(len(busy.block)):
            busy.slot.phase = Phase.IDLE
            busy.dispatcher._assign()
            assert busy.slot.job == busy.block[number]
            busy.dispatcher._answer(busy.slot, busy.slot.pending)
        assert busy.slot.alive and busy.slot.phase is not Phase.GONE
        rows = [record["row"] for record in read_journal(busy.bench.store.directory / "journal.jsonl")
                if record["kind"] == "row"]  # fmt: skip
        assert [(row["cell_id"], row["outcome"], row["attempt"]) for row in rows] == [
            (job.cell.cell_id, "oom", 1) for job in busy.block
        ]
        assert "memory monitor" in rows[0]["reason"]

    def test_a_wrong_row_blames_its_own_run(self, busy: Any) -> None:
        busy.dispatcher._assign()
        good, bad = json.loads(self.answer(busy.block[:2]))
        busy.dispatcher._heed(busy.slot, json.dumps([good, bad | {"row": bad["row"] | {"round": 9}}]))
        assert busy.bench.work.measured == 1
        queue = busy.dispatcher._queues[busy.slot.slot_id]
        assert [(job.cell, job.attempt) for job in queue] == [
            (busy.block[1].cell, 2), (busy.block[2].cell, 1), (busy.block[3].cell, 1)
        ]  # fmt: skip

    def test_a_lost_slot_leaves_all_of_them_to_others(self, busy: Any) -> None:
        busy.dispatcher._assign()
        busy.dispatcher._heed(busy.slot, self.answer(busy.block[:1]))
        busy.dispatcher._assign()
        busy.dispatcher._lose(busy.slot, "its node is gone")
        busy.bench.nodes.append(busy.bench.node("late", "a100"))
        busy.bench.offer()
        assert {job.cell for job in busy.bench.finish_all(1)} >= {job.cell for job in busy.block[1:]}
        assert busy.bench.work.outcomes() == {"ok": 8}, "two groups of four cells, all rounds"


def test_a_tag_that_nobody_has_is_said_at_once_and_can_still_come(folder: Path) -> None:
    bench = Bench(folder, "a100")
    assert bench.messages == ["no device is tagged 'rtx3090'; tags here: a100, cpu: 6 cells unplaced"]
    bench.finish_all(0)
    assert bench.work.left()
    bench.nodes.append(bench.node("late", "rtx3090"))
    assert bench.offer() == []
    assert len(bench.finish_all(1)) == 8
    assert not bench.work.left()
    bench.store.close()


def test_giving_up_writes_what_is_missing(folder: Path) -> None:
    bench = Bench(folder, "a100")
    bench.finish_all(0)
    bench.work.give_up("nobody came")
    assert bench.work.outcomes() == {"ok": 4, "unsupported": 2, "unplaced": 6}
    bench.store.close()
    later = Bench(folder, "a100", "rtx3090")
    jobs = later.finish_all(1)
    assert {job.round for job in jobs} == {1, 2}, "the unplaced rows have taken round 0"
    assert later.work.outcomes() == {"ok": 8, "unsupported": 4}
    later.store.close()


def test_rounds_that_nobody_could_measure_are_missing(folder: Path) -> None:
    bench = Bench(folder, "a100", hardware=["a100"])
    slot = bench.slot(0)
    for job in bench.work.take(slot):
        bench.finish(job)
    bench.work.broken(slot, None, ())
    bench.work.give_up("its node is gone")
    finished = Finished(
        sweep="work", out=folder, where="out", outcomes=dict(bench.work.outcomes()), planned=6, runs=2,
        interrupted=False, seconds=1.0,
    )  # fmt: skip
    assert finished.outcomes == {"unsupported": 2, "crashed": 2}, "two cells have one round of two"
    assert finished.status == 1
    bench.store.close()
    again = Bench(folder, "a100", hardware=["a100"])
    assert {(job.cell.workload["sequence_length"], job.round) for job in again.finish_all(0)} >= {(16, 1)}
    assert again.work.outcomes()["ok"] == 4
    again.store.close()


class TestUnlikeDevicesOfOneTag:
    """A tag says neither memory nor packages: what only some of its devices can run waits for these."""

    def bench(self, folder: Path, optimizations: list[str], **changes: Any) -> Bench:
        """Two nodes of a tag, of which the second is like the first but for `changes`."""
        bench = Bench(folder, "a100", hardware=["a100"], optimizations=optimizations)
        device = replace(bench.nodes[0].devices[0], **changes)
        other = bench.node("1-other", device.tag)
        bench.nodes.append(replace(other, report=replace(other.report, machine_key="other", devices=(device,))))
        bench.offer()
        return bench

    def test_memory(self, folder: Path) -> None:
        bench = self.bench(folder, ["baseline", "bf16"], memory_bytes=2**20)
        assert bench.work.wants(bench.slot(1)) is None, "pocket is larger"
        assert bench.work.take(bench.slot(1)) == []
        assert len(bench.finish_all(0)) == 8
        bench.store.close()

    def test_packages(self, folder: Path) -> None:
        shape = {"batch_size": 1, "sequence_length": 16}
        workloads = [{"kind": "prefill", **shape}, {"kind": "train_step", **shape}]
        bench = Bench(folder, hardware=["a100"], optimizations=["baseline", "lora"], workloads=workloads)
        node = bench.node("", "a100")
        without = replace(node.devices[0], packages={"torch": "2.13.0"})
        with_peft = replace(without, packages={"torch": "2.13.0", "peft": "0.18.0"})
        bench.nodes = [
            replace(node, node_id=name, report=replace(node.report, machine_key=name, devices=(device,)))
            for name, device in (("0-without", without), ("1-with", with_peft))
        ]
        bench.offer()
        assert {job.cell.workload.kind for job in bench.finish_all(0)} == {"prefill"}
        assert {str(job.cell.stack) for job in bench.finish_all(1)} == {"baseline", "lora"}
        bench.store.close()

    def test_the_best_that_is_left(self, folder: Path) -> None:
        bench = self.bench(folder, ["baseline", "bf16"], memory_bytes=2**20)
        del bench.nodes[0]
        bench.offer()
        assert bench.work.wants(bench.slot(0)) is not None, "its row will say that it did not fit"
        bench.store.close()


def test_a_full_disk_is_waited_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.patience._PAUSE_S", 0.01)
    said: list[str] = []
    failures: Iterator[int] = iter(range(3))

    class Full(Store):
        def note(self, kind: str, **fields: Any) -> None:
            if next(failures, None) is not None:
                raise StoreFull("No space left to write x.")
            super().note(kind, **fields)

    with Full.open(folder) as store:
        PatientStore(store, stopping=lambda: False, say=said.append).note("run")
    assert said == ["No space left to write x. Waiting for space."]
    with Store.open(folder) as store:
        assert [record["kind"] for record in store.records] == ["run"]


def test_ceilings_that_could_not_be_measured_are_said(folder: Path) -> None:
    bench, terminal = Bench(folder, "a100"), io.StringIO()
    slot = bench.slot(0)
    slot.phase = Phase.PREPARING
    dispatcher = Dispatcher(
        work=bench.work, inventory=Inventory(), journal=PatientStore(bench.store, stopping=lambda: False, say=print),
        progress=Progress(0, terminal), stopping=lambda: False, static=True,
    )  # fmt: skip
    dispatcher._heed(slot, {"error": "out of memory", "cpus": [0]})
    assert f"{slot.slot_id}: its ceilings could not be measured: out of memory" in terminal.getvalue()
    bench.store.close()


def test_first_signal_is_heard_while_python_is_blocked(capfd: pytest.CaptureFixture[str]) -> None:
    import sys

    stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening(sys.__stderr__, last_words=lambda: None):  # type: ignore[arg-type]
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) == before
    assert "finishing the running cells" in capfd.readouterr().err
