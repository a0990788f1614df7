"""Isolated processes of one bench slot: forked from a warm server or executed, with a time limit and a post-mortem.

The supervising process blocks on a pipe while the child measures; it polls nothing. What a child leaves is its result
file; exit status, signal and time limit say what happened when there is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

import tasks
from tasks.child import end_group
from tasks.secrets import Secrets

SERVER_START_S = 180.0
STDERR_TAIL = 4000


@dataclass(frozen=True, kw_only=True)
class Completed:
    """The end of one isolated process. `result` is None unless it left one; `signal` is the name that killed it."""

    result: dict[str, Any] | None
    exit_code: int | None
    signal: str | None
    timed_out: bool
    out_of_memory: bool
    phase: str
    stderr_tail: str
    wall_s: float
    kind: str


class IsolationError(RuntimeError):
    """No isolated process could be started at all."""


class Isolation:
    """Starts isolated processes one after the other. Use as a context manager, or call `close`."""

    def __init__(self, *, log_path: Path, work_dir: Path, environment: dict[str, str]) -> None:
        self.log_path = log_path
        self._secrets = Secrets()
        self._base_environment = _base_environment(environment)
        self._server: subprocess.Popen[str] | None = None
        self._ready = False
        self._work = Path(tempfile.mkdtemp(prefix="slot-", dir=_made(work_dir)))

    def start(self) -> None:
        """Start the fork server without waiting for its imports."""
        if self._server is None:
            with self._open_log() as log:
                self._server = subprocess.Popen(
                    [sys.executable, "-m", "tasks.forkserver"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    bufsize=1,
                    env=self._base_environment,
                    cwd=self._work,
                )
            self._ready = False

    def run(
        self,
        do: str,
        payload: dict[str, Any],
        *,
        timeout_s: float,
        executed: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Completed:
        """Run one duty of `tasks.run_cell.DUTIES` in a fresh process and wait for its end."""
        folder = Path(tempfile.mkdtemp(dir=self._work))
        try:
            job_path = folder / "job.json"
            job = {
                "do": do,
                "payload": payload,
                "result": str(folder / "result.json"),
                "phase": str(folder / "phase"),
                "stderr": str(folder / "stderr"),
                "environment": environment or {},
                "home": str(Path(tasks.__file__).resolve().parent),
            }
            job_path.write_text(json.dumps(job))
            before = _oom_kills()
            if not executed:
                self._await_server()
            started = time.perf_counter()
            if executed:
                exit_code, timed_out = self._execute(job_path, environment or {}, timeout_s)
            else:
                forked = self._fork(job_path, timeout_s)
                executed = forked is None
                exit_code, timed_out = forked or self._execute(job_path, environment or {}, timeout_s)
            wall_s = time.perf_counter() - started
            oom_killed, kind = _oom_kills() > before, "exec" if executed else "fork"
            return _completed(folder, exit_code, timed_out, oom_killed, wall_s, kind, self._secrets)
        finally:
            self._keep_log(folder / "stderr")
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End the server and everything below it."""
        self.close_server()
        shutil.rmtree(self._work, ignore_errors=True)

    def __enter__(self) -> Isolation:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await_server(self) -> None:
        if self._server is not None and self._server.poll() is not None:
            self.close_server()
        self.start()
        if not self._ready:
            if not self._reply(SERVER_START_S):
                self.close_server()
                raise IsolationError(
                    f"the fork server did not start within {SERVER_START_S:.0f} s: see {self.log_path}"
                )
            self._ready = True

    def close_server(self) -> None:
        if self._server is not None:
            _kill_tree(self._server.pid)
            self._server.wait()
            for pipe in (self._server.stdin, self._server.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # what a dead server has not read
                        pipe.close()
            self._server = None

    def _fork(self, job_path: Path, timeout_s: float) -> tuple[int | None, bool] | None:
        """Exit code (negative signal) and whether the limit struck; None when the server refuses to fork."""
        assert self._server is not None and self._server.stdin is not None
        try:
            self._server.stdin.write(json.dumps({"job": str(job_path)}) + "\n")
            first = self._reply(30.0)
        except BrokenPipeError:
            first = None
        if not first:
            self.close_server()
            return None
        if "refused" in first:
            self._log(f"fork refused: {first['refused']}; executing instead\n")
            return None
        reply = self._reply(timeout_s)
        timed_out = reply is None
        if timed_out:
            _kill_tree(first["pid"])
            reply = self._reply(30.0)
        if not reply:  # the server itself is gone or hangs: the next run starts a fresh one
            self.close_server()
            return (None, timed_out)
        return (os.waitstatus_to_exitcode(reply["status"]), timed_out)

    def _execute(self, job_path: Path, environment: dict[str, str], timeout_s: float) -> tuple[int | None, bool]:
        with self._open_log() as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tasks.child", str(job_path), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._base_environment, **environment},
                cwd=self._work,
            )
        try:
            return process.wait(timeout_s), False
        except subprocess.TimeoutExpired:
            _kill_tree(process.pid)
            return process.wait(), True
        finally:
            end_group(process.pid)

    def _reply(self, timeout_s: float) -> dict[str, Any] | None:
        """The server's next line; None when it is late, empty when the server has ended."""
        assert self._server is not None and self._server.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._server.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return None
        line = self._server.stdout.readline()
        return json.loads(line) if line else {}

    def _keep_log(self, stderr: Path) -> None:
        if stderr.exists() and stderr.stat().st_size:
            self._log(stderr.read_text(errors="replace"))

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError), self._open_log() as log:  # a full disk does not undo a finished run
            log.write(self._secrets.hide(text))

    def _open_log(self) -> TextIO:
        try:
            _made(self.log_path.parent)
            return self.log_path.open("a")
        except OSError:
            return Path(os.devnull).open("a")


def _completed(
    folder: Path, exit_code: int | None, timed_out: bool, oom_killed: bool, wall_s: float, kind: str, secrets: Secrets
) -> Completed:
    result_path, phase_path, stderr_path = folder / "result.json", folder / "phase", folder / "stderr"
    result = None
    if exit_code == 0 and not timed_out and result_path.exists():
        result = json.loads(secrets.hide(result_path.read_text()))
    stderr = secrets.hide(stderr_path.read_text(errors="replace")) if stderr_path.exists() else ""
    killed_by = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else None
    return Completed(
        result=result,
        exit_code=exit_code,
        signal=killed_by,
        timed_out=timed_out,
        out_of_memory=killed_by == "SIGKILL" and oom_killed and not timed_out,
        phase=phase_path.read_text() if phase_path.exists() else "start",
        stderr_tail=stderr[-STDERR_TAIL:],
        wall_s=wall_s,
        kind=kind,
    )


def _base_environment(extra: dict[str, str]) -> dict[str, str]:
    """Ray's variables dropped, threads left to the cell, our own package found whatever the working directory is."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    home = str(Path(tasks.__file__).resolve().parent.parent)
    search = [home, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(search)),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        # one thread in the server, so that it can fork; a cell sets its own number with torch.set_num_threads
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # pyarrow's own allocator would start a thread
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        **extra,
    }


def _oom_kills() -> int:
    """How many processes the kernel has killed for memory, of this cgroup or else of the machine."""
    for path, prefix in ((Path("/sys/fs/cgroup/memory.events"), "oom_kill "), (Path("/proc/vmstat"), "oom_kill ")):
        if path.exists():
            for line in path.read_text().splitlines():
                if line.startswith(prefix):
                    return int(line.split()[1])
    return 0


def _kill_tree(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
