"""The isolated process: takes one job file, does it, leaves one result file, and ends.

Run as `python -m tasks.child JOB` when executed; called by the fork server when forked. A job file is JSON:
`{"do", "payload", "result", "phase", "stderr", "environment", "home"}`; the result file appears atomically, and only
it counts as success.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, and check that it has not died already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_group(leader: int) -> None:
    """Kill what an ended isolated process has left running: compilers' and loaders' workers hold memory and cores."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def run_job(job_path: Path, *, parent: int, kind: str) -> NoReturn:
    """Do the job and end the process: status 0 when a result was written, 1 otherwise."""
    status = 1
    try:
        die_with_parent(parent)
        os.setsid()  # a group of its own, so that `end_group` finds all that it starts
        job = json.loads(job_path.read_text())
        log = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(job["environment"])
        result = _do(job, kind)
        target = Path(job["result"])
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(result, allow_nan=False))
        partial.rename(target)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter shutdown: destructors of CUDA libraries can hang or abort after the result is safe.
    os._exit(status)


def _do(job: dict[str, Any], kind: str) -> dict[str, Any]:
    import tasks

    home = str(Path(tasks.__file__).resolve().parent)
    if home != job["home"]:
        raise RuntimeError(f"the package tasks comes from {home}, not from {job['home']}: remove it from PYTHONPATH")
    from tasks import run_cell

    return run_cell.DUTIES[job["do"]](job["payload"], Path(job["phase"]), kind)


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), parent=int(sys.argv[2]), kind="exec")
