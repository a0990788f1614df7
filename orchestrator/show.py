"""Prints result folders: the tables a sweep ends with, and where a sweep stands while it runs."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from orchestrator.durable import StoreError
from orchestrator.journal import GIVEN_UP, read_journal
from orchestrator.progress import duration
from tasks.row import Outcome
from tasks.uri import JOURNAL, RemoteFolder, is_uri, journal_segments, local_folder

if TYPE_CHECKING:
    import pandas as pd

    from analysis.table import Table


def print_results(directory: Path, where: str) -> None:
    """What `run` ends with: comparison, trade-off where there are several kinds of hardware, coverage, and `where`."""
    from analysis.errors import NoRows

    try:
        frame, samples = _load([directory])
    except NoRows as error:  # stopped before the first run had ended
        print(error)
        return
    _print(_comparison(frame, samples), "terminal")
    if frame["hardware"].nunique() > 1:
        print()
        _print(_tradeoff(frame), "terminal")
    print()
    _print_coverage(directory, frame, where)


def print_table(directories: Sequence[str], kind: str, format_: str, baseline: str | None = None) -> None:
    """One table of one or several result folders, in one format and nothing else; `baseline` is a stack."""
    from analysis.baseline import against
    from analysis.control import floors, with_gate
    from analysis.errors import AnalysisError
    from analysis.growth import growth_table
    from analysis.ladder import ladder_table

    frame, samples = _load(directories)
    if baseline is not None:
        try:
            frame = against(frame, baseline)
        except AnalysisError as error:
            raise AnalysisError(f"--baseline: {error}") from None
    match kind:
        case "tradeoff":
            table = _tradeoff(frame)
        case "ladder":
            table = ladder_table(with_gate(frame), floors(frame))
        case "growth":
            table = growth_table(frame)
        case _:
            table = _comparison(frame, samples)
    _print(table, format_)


def print_calibration(directory: Path) -> None:
    """The A/A gate of a result folder, and in one sentence what difference this machine can resolve."""
    from analysis.control import gate_table

    frame, _ = _load([directory])
    table = gate_table(frame)
    _print(table, "terminal")
    resolved = table.frame.loc[table.frame["passed"], "mde"].dropna()
    if len(resolved) < len(table.frame):
        print(
            "This machine is not quiet enough: a failed gate unranks its group. Close what else runs, or raise rounds."
        )
    if len(resolved):
        print(
            f"Differences above {max(resolved.max(), 0.01):.1%} can be resolved here with {frame['profile'].iloc[0]}."
        )


def print_status(directory: str) -> None:
    """Coverage, what runs now and where, and the time left per hardware tag; from the journal, so also from afar."""
    from analysis.errors import NoRows

    state = read_state(_journal(directory), directory)
    left: dict[str, float] = {}
    try:
        frame, _ = _load([directory])
    except NoRows:
        print("no rows yet")
    else:
        _print_coverage(directory, frame, directory)
        left = _seconds_left(directory, frame)
    if state.ended:
        print(f"last run {state.run_id}: ended {state.ended}")
    elif state.run_id is not None:
        print(f"run {state.run_id}: {'under way' if _is_locked(directory) else 'cut short, start it again to resume'}")
        for slot, text in sorted(state.running.items()):
            print(f"  {slot}: {text}")
    for tag, seconds in sorted(left.items()):
        print(f"  {tag}: about {duration(seconds)} of measuring left")
    for text in state.faults[-5:]:
        print(f"  fault: {text}")


@dataclass(kw_only=True)
class State:
    """A journal's last run: what its slots do, and the faults that were met."""

    run_id: str | None = None
    ended: str | None = None
    running: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def _journal(directory: str) -> Path:
    """The journal as a file here; a remote one is put together from its parts."""
    if not is_uri(directory):
        return Path(directory) / "journal.jsonl"
    copy = local_folder(directory, JOURNAL)
    parts = journal_segments(str(path.relative_to(copy)) for path in copy.rglob("*.jsonl"))
    if parts:
        (copy / "journal.jsonl").write_bytes(b"".join((copy / part).read_bytes() for part in parts))
    return copy / "journal.jsonl"


def read_state(path: Path, directory: str) -> State:
    if not path.is_file():
        default = Path("results", directory)
        hint = f"; did you mean {default}?" if (default / "journal.jsonl").is_file() else ""
        raise StoreError(f"{directory} is no result folder: it has no journal.jsonl{hint or '.'}")
    state = State()
    blocks: dict[str, dict[str, Any]] = {}
    for record in read_journal(path):
        match record["kind"]:
            case "run":
                state, blocks = State(run_id=record["run_id"]), {}
            case "block":
                blocks[record["slot"]] = record | {"done": 0}
            case "row":
                for block in blocks.values():
                    block["done"] += block["block_id"] == record["row"].get("block_id")
            case "fault":
                state.faults.append(f"{record['slot']}: {record['reason']}")
                if record["reason"].startswith(GIVEN_UP):
                    blocks.pop(record["slot"], None)
            case "end":
                state.ended = f"{record['written_at']}, status {record['status']}"
    for slot, block in blocks.items():
        if block["done"] < block["cells"]:
            since = datetime.now(UTC) - datetime.fromisoformat(block["written_at"])
            state.running[slot] = (
                f"round {block['round']} of {block['group']}, {block['done']} of {block['cells']} cells, "
                f"{duration(since.total_seconds())}"
            )
    return state


def _load(directories: Sequence[str | Path]) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    from analysis.load import load, load_samples

    frame = load(list(directories))
    return frame, load_samples(directories[0]) if len(directories) == 1 else None


def _comparison(frame: pd.DataFrame, samples: pd.DataFrame | None) -> Table:
    from analysis.control import floors, with_gate
    from analysis.tables import comparison_table

    return comparison_table(with_gate(frame), samples, floors(frame))


def _tradeoff(frame: pd.DataFrame) -> Table:
    from analysis.control import floors, with_gate
    from analysis.tradeoff import tradeoff_table

    metric = "throughput_per_s"
    return tradeoff_table(with_gate(frame, metric), floors(frame, metric))


def _print(table: Table, format_: str) -> None:
    from analysis.render import print_table, render

    if format_ == "terminal":
        print_table(table)
    else:
        sys.stdout.write(render(table, format_))


def _print_coverage(directory: str | Path, frame: pd.DataFrame, where: str) -> None:
    from analysis.coverage import coverage
    from analysis.load import load_plan

    counted = coverage(frame, load_plan(directory))
    print(counted.line())
    if counted.time_line():
        print(counted.time_line())
    print(f"results: {where}")


def _seconds_left(directory: str, frame: pd.DataFrame) -> dict[str, float]:
    """Hardware tag -> missing runs times the mean wall time of its runs so far.

    A run that found its cell unsupported stands for all its rounds.
    """
    from analysis.load import load_plan

    plan = load_plan(directory)
    if plan is None:
        return {}
    rounds = {str(cell_id): int(number) for cell_id, number in frame.groupby("cell_id")["round"].nunique().items()}
    settled = set(frame.loc[frame["outcome"] == Outcome.UNSUPPORTED, "cell_id"])
    missing: dict[str, int] = defaultdict(int)
    for cell_id, tag, wanted, decision in zip(
        plan["cell_id"], plan["hardware"], plan["rounds"], plan["decision"], strict=True
    ):
        if decision in ("run", "does_not_fit") and cell_id not in settled:
            missing[tag] += max(int(wanted) - rounds.get(cell_id, 0), 0)
    times = {
        tag: mean(values)
        for tag in missing
        if (values := frame.loc[frame["hardware"] == tag, "wall_s"].dropna().tolist())
    }
    return {tag: number * times[tag] for tag, number in missing.items() if number and tag in times}


def _is_locked(directory: str) -> bool:
    """Whether a driver holds the folder now; looks twice, since taking over a dead lock takes a moment."""
    import fcntl
    import os

    if is_uri(directory):
        from orchestrator.mirror import is_claimed

        return is_claimed(RemoteFolder.open(directory))
    for _ in range(2):
        try:
            descriptor = os.open(Path(directory) / ".lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        time.sleep(0.05)
    return False
