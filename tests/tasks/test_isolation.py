"""Faults of an isolated process, provoked for real: each becomes its row, leaves nothing, and harms no other cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.isolation import Isolation, _base_environment
from tasks.job import CellJob
from tasks.row import Row
from tasks.supervisor import Supervisor

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import ctypes, os, re, signal, subprocess, sys, time, pathlib
import torch

class Net(torch.nn.Linear):
    def forward(self, x):
        {body}
        return super().forward(x)

def make():
    return Net(4, 4), lambda batch, device, seed: torch.ones(batch, 4, device=device)
"""
GIB = 2**30


class Fault:
    """What the forward pass does, what the job allows, and what the row must say."""

    def __init__(self, body: str, outcome: str, *said: str, error_type: str | None = None, **job: Any) -> None:
        self.body, self.outcome, self.said, self.error_type, self.job = body, outcome, said, error_type, job


FAULTS = {
    "abort": Fault("os.abort()", "crashed", "SIGABRT", "first_call", error_type="SIGABRT"),
    "segfault": Fault("ctypes.string_at(0)", "crashed", "SIGSEGV", "first_call", error_type="SIGSEGV"),
    "kills itself": Fault(
        "os.kill(os.getpid(), signal.SIGKILL)", "crashed", "SIGKILL", "first_call", error_type="SIGKILL"
    ),
    "sleeps": Fault(
        "time.sleep(1000)", "timeout", "limit of 6 s", "first_call", error_type="SIGKILL", timeout_s=6.0
    ),
    "hangs in C, busy, with the interpreter lock": Fault(
        "re.match('(a+)+$', 'a' * 50 + 'b')", "timeout", "limit of 6 s", "first_call", error_type="SIGKILL",
        timeout_s=6.0,
    ),
    "exits": Fault("sys.exit(3)", "error", "without a result", "first_call", "SystemExit"),
    "exits at once with failure": Fault("os._exit(7)", "crashed", "status 7", "without a result", "first_call"),
    "exits at once as if all were well": Fault("os._exit(0)", "crashed", "status 0", "without a result"),
    "raises": Fault("raise RuntimeError('boom')", "error", "boom", "first_call", error_type="RuntimeError"),
    "raises what no handler expects": Fault("raise KeyboardInterrupt", "error", "KeyboardInterrupt", "first_call"),
    "allocates beyond its budget": Fault(
        f"torch.ones({8 * GIB // 4})", "oom", str(8 * GIB), "first_call", error_type="RuntimeError",
        memory_budget_bytes=GIB,
    ),
    "allocates beyond its budget in Python": Fault(
        f"bytearray({8 * GIB})", "oom", "memory", "first_call", error_type="MemoryError", memory_budget_bytes=GIB
    ),
    "no kernel": Fault(
        "raise NotImplementedError('\"addmm\" not implemented for Half')", "unsupported", "not implemented for",
        error_type="NotImplementedError",
    ),
    "fails in the measuring": Fault(
        "self.n = getattr(self, 'n', 0) + 1; 1 / (0 if self.n > 30 else 1)", "error", "division by zero",
        error_type="ZeroDivisionError",
    ),
}  # fmt: skip


def job_with(bench: Any, body: str, **changes: Any) -> CellJob:
    model, path = bench.factory(MODULE.format(body=body))
    return bench.job(bench.cell("forward", model=model), search_path=path, **changes)


def server_of(supervisor: Supervisor) -> psutil.Process:
    assert supervisor._isolation._server is not None
    return psutil.Process(supervisor._isolation._server.pid)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(processes: list[psutil.Process], within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while any(alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class TestFaults:
    @pytest.mark.parametrize("name", FAULTS)
    def test_becomes_its_row(self, supervisor: Supervisor, bench: Any, name: str) -> None:
        fault = FAULTS[name]
        job = job_with(bench, fault.body, **fault.job)
        row = supervisor.measure(job).row
        assert (row["outcome"], row.get("error_type")) == (fault.outcome, fault.error_type), row["reason"]
        for said in fault.said:
            assert said in row["reason"]
        assert "\n" not in row["reason"]
        Row.from_dict(row)
        assert row["process_kind"] == "fork"
        assert row["cell_id"] == job.cell.cell_id
        assert row["result_key"] == job.result_key
        assert row["wall_s"] > 0
        assert json.loads(row["null_reasons"])["*"] == f"outcome {fault.outcome}"
        assert "latency_ms_p50" not in row, "nothing is reported that was not measured"
        assert server_of(supervisor).children(recursive=True) == []

    @pytest.mark.parametrize("name", ["abort", "sleeps", "allocates beyond its budget"])
    def test_next_cell_is_unharmed(self, supervisor: Supervisor, bench: Any, name: str) -> None:
        fault = FAULTS[name]
        before = server_of(supervisor).pid if supervisor._isolation._server else None
        assert supervisor.measure(job_with(bench, fault.body, **fault.job)).row["outcome"] == fault.outcome
        row = supervisor.measure(bench.job(bench.cell("attention"))).row
        assert row["outcome"] == "ok", row
        assert before in (None, server_of(supervisor).pid), "the same server serves on"

    def test_the_time_limit_is_kept(self, supervisor: Supervisor, bench: Any) -> None:
        began = time.perf_counter()
        row = supervisor.measure(job_with(bench, "time.sleep(1000)", timeout_s=1.0)).row
        assert row["outcome"] == "timeout"
        assert time.perf_counter() - began < 20

    def test_flood_of_output_is_no_fault(self, supervisor: Supervisor, bench: Any) -> None:
        """20 MB on standard output before the fault: nothing blocks on a pipe, and the last line is still told."""
        body = "[print('x' * 1000) for _ in range(20_000)]; os.write(1, b'y' * 1000); os._exit(5)"
        row = supervisor.measure(job_with(bench, body)).row
        assert (row["outcome"], len(row["reason"]) < 500) == ("crashed", True)
        assert "status 5" in row["reason"]

    def test_child_that_kills_the_server(self, supervisor: Supervisor, bench: Any) -> None:
        """The child dies with it; the row is no time-out, and the next cell gets a new server."""
        row = supervisor.measure(job_with(bench, "os.kill(os.getppid(), signal.SIGKILL); time.sleep(1000)")).row
        assert row["outcome"] == "crashed"
        assert "lost in the phase first_call" in row["reason"]
        assert supervisor._isolation.run("nothing", {}, timeout_s=30).kind == "fork"

    def test_nothing_that_the_child_started_is_left(self, supervisor: Supervisor, bench: Any, tmp_path: Path) -> None:
        """A compiler's or a loader's worker must not outlive the cell that aborted, nor hold its memory."""
        note = tmp_path / "pid"
        start = f"pathlib.Path({str(note)!r}).write_text(str(subprocess.Popen(['sleep', '1000']).pid)); "
        for end in ("os.abort()", "time.sleep(1000)"):
            supervisor.measure(job_with(bench, start + end, timeout_s=6.0))
            pid = int(note.read_text())
            with suppress(psutil.NoSuchProcess):
                assert gone([psutil.Process(pid)])

    def test_broken_factory_fails_while_loading(self, supervisor: Supervisor, bench: Any) -> None:
        model, path = bench.factory("def make():\n    raise ValueError('no weights today')\n")
        row = supervisor.measure(bench.job(bench.cell("forward", model=model), search_path=path)).row
        assert (row["outcome"], row["error_type"]) == ("error", "ValueError")
        assert "no weights today (in the phase load)" in row["reason"]

    def test_missing_factory_says_where_it_looked(self, supervisor: Supervisor, bench: Any) -> None:
        model, path = bench.factory("x = 1")
        row = supervisor.measure(bench.job(bench.cell("forward", model=model), search_path=path)).row
        assert (row["outcome"], row["error_type"]) == ("error", "ModelError")
        assert path[0] in row["reason"]


SECOND_THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"


class TestServer:
    def test_forks_are_cheap(self, supervisor: Supervisor) -> None:
        times = []
        for number in range(5):
            done = supervisor._isolation.run("nothing", {"number": number}, timeout_s=30)
            assert done.kind == "fork"
            assert done.result is not None
            assert done.result["number"] == number
            times.append(done.wall_s)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        assert min(times) < (time.perf_counter() - began) / 2

    def test_every_cell_has_its_own_process(self, supervisor: Supervisor) -> None:
        results = [supervisor._isolation.run("nothing", {}, timeout_s=30).result for _ in range(3)]
        assert len({result["pid"] for result in results if result}) == 3

    def test_killed_server_is_replaced(self, supervisor: Supervisor) -> None:
        supervisor._isolation.run("nothing", {}, timeout_s=30)
        first = server_of(supervisor)
        first.kill()
        assert gone([first])
        done = supervisor._isolation.run("nothing", {}, timeout_s=30)
        assert done.kind == "fork"
        assert server_of(supervisor).pid != first.pid

    @pytest.mark.parametrize(
        ("make_unready", "said"),
        [
            ("", "None"),
            (SECOND_THREAD, "other threads: python"),
            ("torch.cuda.is_initialized = lambda: True", "CUDA is initialised"),
        ],
    )
    def test_unready(self, make_unready: str, said: str) -> None:
        """A fork of a process with threads or a CUDA context is broken: the server must refuse."""
        ask = "from tasks.forkserver import unready\nprint(unready(), flush=True)\nos._exit(0)"
        code = f"import os, torch\n{make_unready}\n{ask}"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=_base_environment({}),
            check=True,
        )  # fmt: skip
        assert said in done.stdout

    def test_refused_fork_is_executed(self, tmp_path: Path) -> None:
        """A server with a second thread still gets its cells measured, in executed processes."""
        (tmp_path / "sitecustomize.py").write_text(
            "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
        )
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        with Isolation(
            log_path=tmp_path / "log", work_dir=tmp_path / "work", environment={"PYTHONPATH": path}
        ) as isolation:
            done = isolation.run("nothing", {}, timeout_s=240)
            assert isolation._server is not None
            server = psutil.Process(isolation._server.pid)
        assert gone([server]), "closing ends the server"
        assert list((tmp_path / "work").iterdir()) == [], "and leaves no work folder"
        assert done.kind == "exec"
        assert done.result is not None
        assert done.result["kind"] == "exec"
        assert "fork refused: the server has other threads: python" in (tmp_path / "log").read_text()

    def test_tasks_from_elsewhere_is_refused(self, tmp_path: Path) -> None:
        job = {
            "do": "nothing", "payload": {}, "result": str(tmp_path / "result"), "phase": str(tmp_path / "phase"),
            "stderr": str(tmp_path / "stderr"), "environment": {}, "home": "/somewhere/else/tasks",
        }  # fmt: skip
        (tmp_path / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-m", "tasks.child", str(tmp_path / "job.json"), str(os.getpid())],
            env=_base_environment({}), timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert not (tmp_path / "result").exists()
        assert "not from /somewhere/else/tasks: remove it from PYTHONPATH" in (tmp_path / "stderr").read_text()


RECORDER = """
import os, json, pathlib
pathlib.Path({note!r}).write_text(json.dumps([hash("benchmatrix"), dict(os.environ)]))
raise RuntimeError("seen enough")
"""


class TestExecuted:
    @pytest.fixture
    def ray_supervisor(self, tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
        """A supervisor inside what looks like a Ray worker."""
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setenv("RAY_JOB_ID", "01000000")
        slot = Supervisor(bench.device(), cpus=bench.CPUS, log_path=tmp_path / "log", work_dir=tmp_path / "work")
        yield slot
        slot.close()

    def test_environment(self, ray_supervisor: Supervisor, bench: Any, tmp_path: Path) -> None:
        """What a technique declares stands before the interpreter starts; Ray's variables do not come along."""
        note = tmp_path / "note.json"
        model, path = bench.factory(RECORDER.format(note=str(note)))
        job = bench.job(bench.cell("forward", model=model), search_path=path)
        done = ray_supervisor._isolation.run(
            "cell", job.to_dict(), timeout_s=60, executed=True, environment={"PYTHONHASHSEED": "7", "MINE": "1"}
        )
        assert done.kind == "exec"
        assert done.result is not None
        assert done.result["row"]["process_kind"] == "exec"
        assert ray_supervisor._isolation._server is None, "no server is started for it"
        seen_hash, seen = json.loads(note.read_text())
        expected = subprocess.run(
            [sys.executable, "-c", "print(hash('benchmatrix'))"], env={"PYTHONHASHSEED": "7"}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        assert seen_hash == int(expected.stdout)
        assert seen["MINE"] == "1"
        assert seen["CUDA_VISIBLE_DEVICES"] == ""
        assert seen["PYTHONSAFEPATH"] == "1"
        assert [name for name in seen if name.startswith("RAY_")] == []

    def test_ray_variables_do_not_reach_a_fork_either(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setenv("PYTHONPATH", f"/elsewhere{os.pathsep}{ROOT}")
        environment = _base_environment({"EXTRA": "1"})
        assert not [name for name in environment if name.startswith("RAY_")]
        assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), "/elsewhere"], "our tasks comes first"
        assert environment["EXTRA"] == "1"


ORPHAN = """
import json, sys
from pathlib import Path
from tasks.job import CellJob
from tasks.supervisor import Supervisor
job = CellJob.from_dict(json.loads(Path(sys.argv[1]).read_text()))
folder = Path(sys.argv[2])
Supervisor(job.device, cpus=job.cpus, log_path=folder / "log", work_dir=folder / "work").measure(job)
"""


@pytest.mark.parametrize("executed", [False, True], ids=["fork", "exec"])
def test_killed_supervisor_takes_everything_with_it(bench: Any, tmp_path: Path, executed: bool) -> None:
    """SIGKILL leaves no time to clean up: the kernel ends server and child when their parent dies."""
    note = tmp_path / "pid"
    body = f"pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(1000)"
    (tmp_path / "job.json").write_text(json.dumps(job_with(bench, body, executed=executed).to_dict()))
    owner = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path / "job.json"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        deadline = time.monotonic() + 240
        while not note.exists():
            assert owner.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(owner.pid).children(recursive=True)
        assert len(family) == (1 if executed else 2)
        assert int(note.read_text() or family[-1].pid) in {process.pid for process in family}
    finally:
        owner.kill()
        owner.wait()
    assert gone(family)
