"""The one writer of a result folder: samples, then the journal, then Parquet rows, each step safe against a kill."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.durable import FolderLock, StoreError, StoreFull, StoreLocked, store_error, write_atomically
from orchestrator.journal import Journal, Record, read_journal
from orchestrator.parts import Entry, Key, RowParts, SampleParts
from orchestrator.schema import check_row, plan_table, to_parquet
from tasks.job import RunResult, SampleSeries

__all__ = ["Records", "Store", "StoreError", "StoreFull", "StoreLocked"]

BATCH_ROWS = 50
BATCH_SECONDS = 10.0
# Runs that finish hundreds a second (the scale benchmark) gather for this long instead of filling a batch in 50 ms.
BATCH_PAUSE_SECONDS = 1.0
BATCH_LIMIT_ROWS = 1000
# Where writing a part is slow, the pause is this many times as long, so that writing takes 2 % of the time; but readers
# of the folder wait no longer than for a part that fills slowly.
BATCH_SHARE = 50.0


class Records:
    """The journal as it was at opening; reads the file each time it is iterated, so that it holds no memory."""

    def __init__(self, path: Path, size: int, count: int) -> None:
        self._path, self._size, self._count = path, size, count

    def __iter__(self) -> Iterator[Record]:
        return read_journal(self._path, self._size)

    def __len__(self) -> int:
        return self._count


class Store:
    """A result folder opened for writing: `DIR/journal.jsonl` is the truth, the Parquet files are made from it.

    Attributes:
        directory: the folder.
        records: the journal's records as they were at opening.
        repairs: what was repaired at opening, and what a person should know of the folder, one sentence each.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.repairs: list[str] = []
        self._keys: set[Key] = set()
        self._buffer: list[Entry] = []
        self._buffered_since = 0.0
        self._tried_at = -BATCH_PAUSE_SECONDS
        self._write_s = 0.0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "log").mkdir(exist_ok=True)
        except OSError as error:
            raise store_error(error, directory) from error
        self._lock = FolderLock(directory)
        try:
            self._recover()
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def open(cls, directory: Path) -> Store:
        """Open or make a result folder, and repair what an earlier run's end left.

        Raises:
            StoreLocked: another driver writes it.
            StoreFull: no space to repair.
        """
        return cls(directory)

    def _recover(self) -> None:
        sequences: list[int] = []
        count = 0

        def visit(record: Record) -> None:
            nonlocal count
            count += 1
            entry = _entry(record)
            if entry is not None and _key(entry[1]) not in self._keys:
                self._keys.add(_key(entry[1]))
                sequences.append(entry[0])

        self._journal = Journal(self.directory / "journal.jsonl", visit)
        try:
            if self._journal.torn_bytes:
                self.repairs.append(
                    f"The journal's last {self._journal.torn_bytes} bytes were cut short; they are in journal.torn."
                )
            if self._journal.corrupt_lines:
                lines = ", ".join(map(str, self._journal.corrupt_lines[:10]))
                self.repairs.append(f"The journal has lines that are no records and were skipped: {lines}.")
            self._rows = RowParts(self.directory / "rows")
            for name, row in self._rows.unexplained(self._keys):
                self._journal.append({"kind": "row", "recovered_from": name, "row": row})
                self._keys.add(_key(row))
                sequences.append(self._journal.last_sequence)
                count += 1
                self.repairs.append(f"Cell {row['cell_id']} round {row['round']} was only in {name}: journaled again.")
            self._journal.flush()
            for name in self._rows.recover(sequences, self._entries):
                self.repairs.append(f"rows/{name} was missing or damaged and was made again from the journal.")
            self._samples = SampleParts(self.directory / "samples")
            for name in self._samples.recover(self._keys):
                self.repairs.append(f"samples/{name} is damaged and was moved to samples/_damaged.")
            self.records = Records(self._journal.path, self._journal.size, count)
        except OSError as error:
            self._journal.close()
            raise store_error(error, self.directory) from error
        except BaseException:
            with suppress(StoreError):
                self._journal.close()
            raise

    def _entries(self) -> Iterator[Entry]:
        seen: set[Key] = set()
        for record in read_journal(self._journal.path):
            entry = _entry(record)
            if entry is not None and _key(entry[1]) not in seen:
                seen.add(_key(entry[1]))
                yield entry

    def write_plan(self, planned: Sequence[dict[str, Any]]) -> None:
        """Replace `DIR/plan.parquet`, the denominator of every coverage figure."""
        write_atomically(self.directory / "plan.parquet", to_parquet(plan_table(planned)))

    def write_sweep(self, text: str) -> None:
        """Write `DIR/sweep.yaml`; an earlier, different one stays as `sweep-1.yaml`, `sweep-2.yaml` and so on.

        Where that one has another name, `repairs` says what becomes of its rows.
        """
        path = self.directory / "sweep.yaml"
        if path.exists():
            earlier = path.read_text(encoding="utf-8")
            if earlier == text:
                return
            if (name := _sweep_name(earlier)) != _sweep_name(text):
                self.repairs.append(
                    f"{self.directory} holds the sweep {name} as well: its rows are kept; those that are not of this "
                    f"sweep are shown again when that one is run there. Another --out keeps them apart."
                )
            number = 1
            while (kept := self.directory / f"sweep-{number}.yaml").exists():
                number += 1
            try:
                os.link(path, kept)  # both names exist until the replacement: no moment without a sweep.yaml
            except OSError:
                write_atomically(kept, path.read_bytes())
        write_atomically(path, text.encode())

    def note(self, kind: str, **fields: Any) -> None:
        """Journal anything that is not a finished row: run, attempt, device, block, end."""
        if kind == "row":
            raise ValueError("rows are journaled by add")
        self._journal.append({"kind": kind, **fields})

    def add(self, result: RunResult) -> None:
        """Record one finished run. A second result for its cell and round is journaled as `discarded` only.

        Raises:
            StoreFull: nothing was recorded; call again once there is space. (A part that cannot be written does not
                raise here: the row is safe in the journal, and `tick` tries again.)
            KeyError, TypeError, ValueError: not a row as declared in `tasks.row`; nothing was recorded.
        """
        row = dict(result.row)
        check_row(row)
        key = _key(row)
        if re.fullmatch(r"[0-9A-Za-z_.-]+", key[0]) is None or not isinstance(key[1], int):
            raise ValueError(f"{key[0]!r} round {key[1]!r} does not identify a run")
        if key in self._keys:
            self.note("discarded", reason="this cell and round has a row already", row=row)
            return
        series = [SampleSeries(**item) for item in result.samples]
        if any((item.cell_id, item.round) != key for item in series):
            raise ValueError(f"samples of another run came with cell {key[0]} round {key[1]}")
        if series:
            self._samples.put(key, series)
        self._journal.append({"kind": "row", "row": row})
        self._keys.add(key)
        if not self._buffer:
            self._buffered_since = time.monotonic()
        self._buffer.append((self._journal.last_sequence, row))
        with suppress(StoreFull):
            self.tick()

    def tick(self) -> None:
        """Write the Parquet batches that are due; call it often. On `StoreFull` nothing is lost: wait, call again."""
        now = time.monotonic()
        pause_s = max(BATCH_PAUSE_SECONDS, min(BATCH_SHARE * self._write_s, BATCH_SECONDS))
        if now - self._tried_at < pause_s and len(self._buffer) < BATCH_LIMIT_ROWS:
            return
        rows_due = self._buffer and (len(self._buffer) >= BATCH_ROWS or now - self._buffered_since >= BATCH_SECONDS)
        samples_due = self._samples.waiting >= BATCH_ROWS
        if not rows_due and not samples_due:
            return
        self._tried_at = now
        if rows_due:
            self._write_rows()
        if samples_due:
            self._samples.merge()
        self._write_s = time.monotonic() - now

    def flush(self) -> None:
        """Sync the journal and write every buffered row to its part."""
        self._journal.flush()
        self._write_rows()

    def _write_rows(self) -> None:
        self._journal.flush()  # a part never holds what the journal could still lose
        while self._buffer:
            del self._buffer[: self._rows.append(self._buffer)]

    def close(self, compact: bool = True) -> None:
        """Write what is buffered and give the folder back; without `compact`, samples stay in their small files."""
        try:
            self.flush()
            if compact:
                self._samples.merge()
        finally:
            try:
                self._journal.close()
            finally:
                self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(compact=type_ is None)


def _sweep_name(text: str) -> str:
    import yaml

    try:
        return str(yaml.safe_load(text)["name"])
    except (yaml.YAMLError, KeyError, TypeError):
        return "of an unknown name"


def _entry(record: Record) -> Entry | None:
    row = record.get("row")
    if record.get("kind") != "row" or not isinstance(row, dict) or "cell_id" not in row or "round" not in row:
        return None
    return int(record["sequence"]), row


def _key(row: dict[str, Any]) -> Key:
    return row["cell_id"], row["round"]
