"""The actor of one bench slot: sits on the node, owns the slot's supervisor, speaks plain data only.

It never imports torch: the measured code lives in isolated processes below it, and dies with it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.exchange import Shared
from orchestrator.guard import MARK
from orchestrator.slots import ANSWER_S
from tasks.device import DeviceInfo
from tasks.job import CellJob
from tasks.supervisor import Supervisor

HOME = str(Path(__file__).resolve().parent.parent)
CLAIMING_S = 2.0
_PREFIX = "benchmatrix-slot-"


class Runner:
    """One per slot, pinned to its node. `log_path` is a file on that node, or None for one beside the work folder.

    `home` is where the driver has the project: what lies below it, shipped with a job, lies below this node's own copy.
    `exchange` is the actor through which nodes share artifacts, if there may be other nodes.
    """

    def __init__(self, log_path: str | None, home: str, exchange: Any = None) -> None:
        self._undone = undo_ray()
        self._driver_home = home
        self._work = _work_folder()
        self._log_path = Path(log_path) if log_path else self._work / "slot.log"
        self._supervisor: Supervisor | None = None
        self._claim: socket.socket | None = None
        self._slot: dict[str, Any] = {}  # what every job of this slot has
        self._sharing = Shared(exchange, artifact_folder()) if exchange is not None else None

    def where(self, claim: str | None = None) -> dict[str, Any]:
        """Which accelerators Ray gave to this actor, and what it runs as.

        With `claim`, a name that one process of this machine can hold, `taken` says that another one has it; that is
        looked at for `CLAIMING_S`.
        """
        import ray

        began = time.monotonic()
        while claim is not None and self._claim is None:
            self._claim = claimed(claim)
            if self._claim is None and time.monotonic() - began > CLAIMING_S:
                return {"taken": True}
            time.sleep(0.0 if self._claim else 0.2)
        context = ray.get_runtime_context()
        return {"accelerators": context.get_accelerator_ids().get("GPU", []), "pid": os.getpid(), **self._undone}

    def prepare(self, device: dict[str, Any], cpus: list[int], known: dict[str, Any] | None) -> dict[str, Any]:
        """Bind the slot to `device`, start its supervisor; the device's facts, measured unless they are `known`."""
        affinity = tuple(cpus) or tuple(sorted(os.sched_getaffinity(0)))
        self._supervisor = Supervisor(
            DeviceInfo.from_dict(device), cpus=affinity, log_path=self._log_path, work_dir=self._work,
            sharing=self._sharing,
        )  # fmt: skip
        self._supervisor.start()
        facts = self._supervisor.facts() if known is None else known
        self._slot = {
            "device": device, "cpus": list(affinity), "ceilings": facts.get("ceilings") or {},
            "idle_power_w": facts.get("idle_power_w"), "idle_power_missing": facts.get("idle_power_missing") or "",
        }  # fmt: skip
        return {**facts, "cpus": list(affinity)}

    def measure(self, jobs: bytes) -> bytes:
        """Runs of cells, JSON both ways: jobs as `slots.to_wire` writes them, then `{"row", "samples"}` of the first,
        and of those after it that need no process, as far as that takes no longer than `ANSWER_S`.

        No objects, so that what a measured process left is never unpickled by the driver; bytes, which Ray sends as
        they are. Raises only when the supervisor itself cannot go on with the first.
        """
        if self._supervisor is None:
            raise RuntimeError("the runner was not prepared")
        begun, (first, *others) = time.monotonic(), json.loads(jobs)
        results = [self._supervisor.measure(self._here(first))]
        with contextlib.suppress(Exception):  # met again when it is the first
            for job in others:
                if time.monotonic() - begun > ANSWER_S or (result := self._supervisor.at_once(self._here(job))) is None:
                    break
                results.append(result)
        return json.dumps([{"row": result.row, "samples": result.samples} for result in results]).encode()

    def _here(self, job: dict[str, Any]) -> CellJob:
        """The job on this node and slot."""
        given = at_home(job, self._driver_home)
        compile_cache = self._work / "compile" / given.pop("cell_id")
        compile_cache.mkdir(parents=True, exist_ok=True)
        local = {"compile_cache_dir": str(compile_cache), "artifact_dir": str(artifact_folder())}
        return CellJob.from_dict({**given, **self._slot, **local})

    def close(self) -> None:
        """End every process of the slot and remove its files."""
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None
        shutil.rmtree(self._work, ignore_errors=True)


def claimed(name: str) -> socket.socket | None:
    """A socket that holds `name` until this process ends, None while another process holds it."""
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(f"\0{name}")  # abstract: no file is left
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return held


def undo_ray() -> dict[str, Any]:
    """Take back what Ray does to a worker and so to its children; returns what was read back.

    Lowering niceness and the out-of-memory score needs rights that a plain user lacks; nodes that were started with
    RAY_worker_niceness=0 do not need it.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    score = Path("/proc/self/oom_score_adj")
    # above 0: when host memory runs out it should be a cell that dies, not the raylet or the driver
    with contextlib.suppress(OSError):
        score.write_text("500")
    for name in ("OMP_NUM_THREADS", "RAY_LD_PRELOAD_ON_WORKERS"):
        os.environ.pop(name, None)
    return {
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": int(score.read_text()) if score.exists() else None,
    }


def at_home(job: dict[str, Any], driver_home: str, home: str = HOME) -> dict[str, Any]:
    """The job with paths below the driver's copy of the project as paths below this node's. The cell is left alone."""

    def moved(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [moved(item) for item in value]
        if isinstance(value, str) and (value == driver_home or value.startswith(f"{driver_home}{os.sep}")):
            return home + value[len(driver_home) :]
        return value

    return {name: moved(value) for name, value in job.items()}


def artifact_folder() -> Path:
    """Where this node keeps what is made once and used by many cells."""
    return cache_folder("artifacts")


def cache_folder(name: str) -> Path:
    """A folder of ours that outlives a run, below the user's cache where that can be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "benchmatrix" / name
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        base = Path(tempfile.gettempdir()) / f"benchmatrix-{name}"
        base.mkdir(parents=True, exist_ok=True)
    return base


def _work_folder() -> Path:
    """A folder named after this process; those that killed runners left are removed.

    In a local instance it lies in the instance's own folder, which goes with it.
    """
    base = Path(os.environ.get(MARK) or tempfile.gettempdir())
    for old in base.glob(f"{_PREFIX}*"):
        owner = old.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
