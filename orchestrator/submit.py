"""Runs a sweep as a Ray job on a remote cluster: ships this project, follows the job's log, detaches on Ctrl-C."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("orchestrator", "tasks", "analysis")
LEFT_OUT = [
    ".git",
    ".venv",
    "results",
    "tests",
    "docs",
    ".ruff_cache",
    ".mypy_cache",
    ".pytest_cache",
    "**/__pycache__",
]
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
    client = _client(submission.address)
    working_dir, sweep = _shipped(submission.sweep)
    arguments = ["run", sweep, "--out", submission.out, *submission.options]
    job_id = client.submit_job(
        entrypoint=f"python -m orchestrator {shlex.join(arguments)}",
        entrypoint_num_cpus=0,
        runtime_env={
            "working_dir": str(working_dir),
            "excludes": LEFT_OUT,
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
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise SubmitError(f"no Ray dashboard can be reached at {address}: {type(error).__name__}: {text}") from error


def _shipped(sweep: str) -> tuple[Path, str]:
    """The folder to ship and the sweep's name inside it. A sweep outside this project is copied into `sweeps`."""
    path = Path(sweep)
    if not path.exists():
        return PROJECT, sweep
    resolved = path.resolve()
    if resolved.is_relative_to(PROJECT):
        return PROJECT, str(resolved.relative_to(PROJECT))
    raise SubmitError(f"{sweep} lies outside {PROJECT}, which is what is shipped: move it there")


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
