"""`status --address`: what runs on a cluster now, asked from anywhere that reaches its head or its dashboard."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from orchestrator.progress import duration

# A driver publishes every few seconds, but its loop may be held up by a slow disk or a slow object store.
SILENT_S = 120.0
STALE_S = 15.0  # from here on the age of what is shown is said
SHOWN_ENDED = 3


def print_live(address: str, stream: TextIO) -> None:
    """The runs of the cluster at `address`: a head (`HOST:6379`, `auto`) or a dashboard (`http://HOST:8265`)."""
    if address.startswith(("http://", "https://")):
        _through_a_job(address, stream)
        return
    from orchestrator.connection import connect
    from orchestrator.quiet import quiet
    from orchestrator.watch import read_states

    with quiet(Path(os.devnull)), connect(address):
        states = read_states()
    under_way = [state for state in states if not state.get("ended")]
    ended = [state for state in states if state.get("ended")][-SHOWN_ENDED:]
    if not states:
        print(f"no run of benchmatrix is known at {address}", file=stream)
    for state in [*ended, *under_way]:
        for line in describe(state):
            print(line, file=stream)


def describe(state: Mapping[str, Any]) -> list[str]:
    """One run in plain lines: done, failed, running where, time left per hardware tag, last messages."""
    silent_s = (datetime.now(UTC) - datetime.fromisoformat(state["updated_at"])).total_seconds()
    ended = state.get("ended")
    if ended:
        how = f"ended {ended['at']}, status {ended['status']}"
    elif silent_s > SILENT_S:
        how = f"silent for {duration(silent_s)}: its driver was lost, start it again to resume"
    elif silent_s > STALE_S:
        how = f"under way {duration(silent_s)} ago"
    else:
        how = "under way"
    lines = [f"run {state['run_id']} of {state['sweep']}: {how}; results {state['out']} on {state['host']}"]
    total: Counter[str] = Counter()
    for counts in state["outcomes"].values():
        total.update(counts)
    lines.append(f"  {sum(total.values())} runs done{_counts(total)}, {sum(state['left'].values())} left")
    for slot, lane in sorted(state["running"].items()):
        lines.append(f"  {slot} ({lane['hardware']}): {lane['doing']}, {duration(lane['seconds'] + silent_s)}")
    for tag in sorted({*state["outcomes"], *state["left"]}):
        left, seconds = state["left"].get(tag, 0), state["seconds_left"].get(tag)
        time_left = f", about {duration(seconds)}" if left and seconds is not None else ""
        lines.append(f"  {tag}{_counts(state['outcomes'].get(tag, {}))}; {left} left{time_left}")
    return [*lines, *(f"  {text}" for text in state["messages"])]


def _counts(counts: Mapping[str, int]) -> str:
    return ": " + ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) if counts else ""


def _through_a_job(address: str, stream: TextIO) -> None:
    """A dashboard cannot read the state itself: a job of a second asks on the head and is removed again."""
    from orchestrator.staging import write_packages
    from orchestrator.submit import SubmitError, follow, job_client, run_job

    client = job_client(address)
    job_id = f"benchmatrix-status-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="benchmatrix-status-") as folder:
        write_packages(Path(folder))
        command = "python -m orchestrator status --address auto"
        run_job(client, command, Path(folder), stream, address=address, job_id=job_id, metadata={})
    status = follow(client, job_id, address, stream)
    if status != "SUCCEEDED":
        raise SubmitError(f"the cluster at {address} could not say what runs there: job {job_id} {status.lower()}")
    client.delete_job(job_id)
