"""Runs a sweep as a Ray job on a remote cluster: ships what it needs, follows the job's log, detaches on Ctrl-C."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from orchestrator.staging import Staged
from tasks.cell import digest
from tasks.environment import REVISION_VARIABLE, git_revision
from tasks.uri import UriError, check_uri, is_uri

NEEDS = "this needs Ray's job client: pip install 'ray[default]>=2.57.1' (or this project with its extra 'cluster')"
# `ray job stop` sends SIGTERM and, without this, SIGKILL 3 s later: too soon to finish the running cells.
STOP_WAIT_S = "900"
EXIT_FAILED, EXIT_STOPPED = 1, 130
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_PREFIX = "benchmatrix-"
_OUT, _WHAT = "benchmatrix_out", "benchmatrix_submission"
# How long the dashboard may be silent before following is given up.
_SILENCE_S = 90.0
# The job server of a head answers before its agent, which starts the jobs, is there; Ray waits for that for 10 s.
_STARTING, _STARTING_S = "No available agent", 120.0


class SubmitError(RuntimeError):
    """The job cannot be submitted or followed; one sentence."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is to run, where its results go as the cluster sees it, and the options of `run`."""

    staged: Staged
    out: str
    address: str
    options: Sequence[str] = field(default_factory=tuple)

    @property
    def digest(self) -> str:
        """Equal when the same command is given again."""
        return digest([self.staged.digest, *self.options])


def submit(submission: Submission, stream: TextIO) -> int:
    """Submit, or find the job that runs already, and follow it.

    Returns the exit status of `run`, 0 after detaching, 130 when the job was stopped.
    """
    _check_out(submission.out)
    client = job_client(submission.address)
    job_id = _running(client, submission)
    if job_id is not None:
        print(f"job {job_id} does this already: following it", file=stream)
    else:
        job_id = _start(client, submission, stream)
    print(f"job {job_id} on {submission.address}; Ctrl-C detaches, the job goes on", file=stream, flush=True)
    try:
        status = follow(client, job_id, submission.address, stream)
    except KeyboardInterrupt:
        print("detached; the same command follows the job again, or resumes once it has ended\n"
              f"stop it with: ray job stop {job_id} --address {submission.address}", file=stream)  # fmt: skip
        return 0
    print(f"job {job_id}: {status.lower()}", file=stream)
    return exit_status(client, job_id, status)


def available() -> bool:
    """Whether Ray's job client can be imported here."""
    return importlib.util.find_spec("aiohttp") is not None and importlib.util.find_spec("ray") is not None


def job_client(address: str) -> Any:
    """A client of the dashboard at `address`; raises `SubmitError`."""
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
        raise SubmitError(f"no Ray dashboard can be used at {address}: {_sentence(error)}") from error


def run_job(
    client: Any, entrypoint: str, folder: Path, stream: TextIO, *, address: str, job_id: str, metadata: dict[str, str]
) -> None:
    """Submit `entrypoint` with `folder` as its working directory, on the head, needing no CPU of it.

    A head that is still starting is waited for, two minutes at most, which `stream` is told. Raises `SubmitError` where
    it takes no job, with Ray's own exception as its cause.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_S, "PYTHONUNBUFFERED": "1"}
    if revision := git_revision():
        variables[REVISION_VARIABLE] = revision  # the copy that is shipped has no repository
    deadline, told = time.monotonic() + _STARTING_S, False
    while True:
        try:
            client.submit_job(
                entrypoint=entrypoint, submission_id=job_id, entrypoint_num_cpus=0, metadata=metadata,
                runtime_env={"working_dir": str(folder), "env_vars": variables},
            )  # fmt: skip
        except Exception as error:
            if _STARTING not in str(error) or time.monotonic() > deadline:
                raise SubmitError(f"{address} did not take the job: {_sentence(error)}") from error
            if not told:
                print(f"{address} cannot start jobs yet: waiting for it, two minutes at most", file=stream, flush=True)
            told = True
            time.sleep(1.0)
        else:
            return


def follow(client: Any, job_id: str, address: str, stream: TextIO) -> str:
    """Copy the job's log to `stream` until it ends, over broken connections; returns its final status."""
    shown, heard = 0, time.monotonic()
    while True:
        status = None
        try:
            shown = asyncio.run(_tail(client, job_id, stream, shown))
        except KeyboardInterrupt:
            raise
        except Exception as error:  # whatever the connection ended with: the status decides
            logging.getLogger(__name__).debug("tailing %s: %s", job_id, error)
        try:
            status = str(client.get_job_status(job_id).value)
            heard = time.monotonic()
        except Exception as error:
            if time.monotonic() - heard > _SILENCE_S:
                raise SubmitError(
                    f"lost the connection to {address}: {_sentence(error)}; give the same command again to follow"
                ) from error
        if status in _ENDED:
            return str(status)
        time.sleep(1.0)


def exit_status(client: Any, job_id: str, status: str) -> int:
    """The exit status of the job's own command, as far as Ray knows it."""
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return EXIT_STOPPED
    code = getattr(client.get_job_info(job_id), "driver_exit_code", None)
    return code if isinstance(code, int) and code > 0 else EXIT_FAILED


async def _tail(client: Any, job_id: str, stream: TextIO, shown: int) -> int:
    """Each connection gets the whole log: the first `shown` characters are there already."""
    position = 0
    async for text in client.tail_job_logs(job_id):
        fresh = text[max(shown - position, 0) :]
        position += len(text)
        stream.write(fresh)
        stream.flush()
        shown = max(shown, position)
    return shown


def _check_out(out: str) -> None:
    if is_uri(out):
        try:
            check_uri(out)
        except UriError as error:
            raise SubmitError(f"--out {error}") from None
    elif not Path(out).is_absolute():
        raise SubmitError(
            f"--out {out}: give an absolute path on the cluster's head, or s3://..., gs://...; "
            "a job's own folder is removed"
        )


def _running(client: Any, submission: Submission) -> str | None:
    """The job that writes this result folder now; refused when it is another sweep or has other options."""
    for job in _jobs(client, submission.out):
        if str(job.status.value) in _ENDED:
            continue
        if job.metadata.get(_WHAT) != submission.digest:
            raise SubmitError(
                f"job {job.submission_id} writes {submission.out} now, with another sweep or other options: wait for "
                f"it, stop it (ray job stop {job.submission_id}), or choose another --out"
            )
        return str(job.submission_id)
    return None


def _jobs(client: Any, out: str) -> list[Any]:
    return [job for job in client.list_jobs() if (job.metadata or {}).get(_OUT) == out]


def _start(client: Any, submission: Submission, stream: TextIO) -> str:
    """Ids count up per result folder, and Ray takes each once: of two submits at the same moment one starts a job."""
    prefix = f"{_PREFIX}{digest(submission.out)[:8]}-"
    numbers = [re.fullmatch(rf"{prefix}(\d+)", job.submission_id or "") for job in client.list_jobs()]
    job_id = f"{prefix}{1 + max((int(found.group(1)) for found in numbers if found), default=0)}"
    arguments = ["run", submission.staged.entry, "--out", submission.out, *submission.options]
    metadata = {_OUT: submission.out, _WHAT: submission.digest}
    with tempfile.TemporaryDirectory(prefix="benchmatrix-submit-") as folder:
        submission.staged.write(Path(folder))
        try:
            entrypoint = f"python -m orchestrator {shlex.join(arguments)}"
            address = submission.address
            run_job(client, entrypoint, Path(folder), stream, address=address, job_id=job_id, metadata=metadata)
        except SubmitError as error:
            if "already exists" in str(error.__cause__) and (running := _running(client, submission)):
                return running
            raise
    return job_id


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
