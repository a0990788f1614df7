"""Runs a sweep as a Ray job on a remote cluster: ships this project, follows the job's log, detaches on Ctrl-C."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("orchestrator", "tasks", "analysis")
NEEDS = "submit needs Ray's job client: pip install 'ray[default]>=2.57.1' (or this project with its extra 'cluster')"
# `ray job stop` sends SIGTERM and, without this, SIGKILL 3 s later: too soon to finish the running cells.
STOP_WAIT_S = "900"


class SubmitError(RuntimeError):
    """The job cannot be submitted; one sentence."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is to run: a sweep (a shipped name, or a file inside the folder that is shipped) and its options."""

    sweep: str
    out: str
    address: str
    options: Sequence[str] = field(default_factory=tuple)


def submit(submission: Submission, stream: TextIO) -> int:
    """Submit and follow; the exit status is 0 when the job succeeded or was left running, 1 when it failed."""
    if not Path(submission.out).is_absolute():
        raise SubmitError(
            f"--out {submission.out}: give an absolute path on the cluster's head; a job's own folder is removed"
        )
    client = _client(submission.address)
    with tempfile.TemporaryDirectory(prefix="benchmatrix-submit-") as folder:
        arguments = ["run", _stage(submission.sweep, Path(folder)), "--out", submission.out, *submission.options]
        job_id = client.submit_job(
            entrypoint=f"python -m orchestrator {shlex.join(arguments)}",
            entrypoint_num_cpus=0,
            runtime_env={
                "working_dir": folder,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_S, "PYTHONUNBUFFERED": "1"},
            },
            metadata={"benchmatrix_out": submission.out},
        )
    print(f"job {job_id} on {submission.address}; Ctrl-C detaches, the job goes on", file=stream)
    try:
        asyncio.run(_follow(client, job_id, stream))
        status = _final_status(client, job_id)
    except KeyboardInterrupt:
        print(f"detached; follow again with: ray job logs {job_id} --follow --address {submission.address}\n"
              f"stop it with: ray job stop {job_id} --address {submission.address}", file=stream)  # fmt: skip
        return 0
    print(f"job {job_id}: {status.lower()}", file=stream)
    return 0 if status == "SUCCEEDED" else 1


def available() -> bool:
    """Whether Ray's job client can be imported here."""
    return importlib.util.find_spec("aiohttp") is not None and importlib.util.find_spec("ray") is not None


def _client(address: str) -> Any:
    if not available():
        raise SubmitError(NEEDS)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise SubmitError(f"{NEEDS} ({error})") from None
    for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they set INFO for themselves when imported
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise SubmitError(f"no Ray dashboard can be reached at {address}: {type(error).__name__}: {text}") from error


def _stage(sweep: str, folder: Path) -> str:
    """Copy what the job needs: our packages, and the sweep unless it is a shipped one. Returns the sweep's name there.

    Checkpoints and model factories beside the sweep are not copied: they must lie on the nodes.
    """
    for name in PACKAGES:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    if not Path(sweep).is_file():
        return sweep
    shutil.copy(sweep, folder)
    return Path(sweep).name


async def _follow(client: Any, job_id: str, stream: TextIO) -> None:
    async for lines in client.tail_job_logs(job_id):
        stream.write(lines)
        stream.flush()


def _final_status(client: Any, job_id: str) -> str:
    """The log can end a moment before the status is final."""
    status = str(client.get_job_status(job_id).value)
    for _ in range(60):
        if status in ("SUCCEEDED", "FAILED", "STOPPED"):
            break
        time.sleep(0.5)
        status = str(client.get_job_status(job_id).value)
    return status
