"""Parquet folders that may be read at any moment: a part only grows, each time replaced whole under its own name.

Small parts that are merged later leave a moment in which a reader that has listed the folder finds its files gone, or
rows twice. A part that is rewritten with more rows has neither, and needs no compaction at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.durable import sync_folder, write_atomically
from orchestrator.schema import rows_schema, samples_schema, to_parquet, to_table
from tasks.job import SampleSeries

if TYPE_CHECKING:
    import pyarrow as pa

PART_ROWS = 2000  # rewriting such a part takes some 30 ms; a million rows are 500 files
SAMPLES_PART_BYTES = 16 * 2**20
_RANGE = "benchmatrix.sequences"

Key = tuple[str, int]  # cell_id, round
Entry = tuple[int, dict[str, Any]]  # sequence in the journal, row


def read_part(path: Path) -> pa.Table | None:
    """A part with its page checksums verified, or None if it is missing, cut short or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return None


def _part_name(index: int) -> str:
    return f"part-{index:06d}.parquet"


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-??????.parquet"))


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".*.tmp"):
        path.unlink()


class RowParts:
    """`DIR/rows`: part k holds the journal's rows from k x `PART_ROWS` on, so that every part can be made again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = 0
        self._first = 0
        self._table = to_table([], rows_schema())
        folder.mkdir(exist_ok=True)
        _remove_leftovers(folder)

    def unexplained(self, known: set[Key]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows in readable parts that are not `known`, with their part's name: the journal lost them."""
        for path in _parts(self._folder):
            table = read_part(path)
            if table is None or not {"cell_id", "round"} <= set(table.column_names):
                continue
            keys = zip(table["cell_id"].to_pylist(), table["round"].to_pylist(), strict=True)
            for position, key in enumerate(keys):
                if key not in known:
                    row = table.slice(position, 1).to_pylist()[0]
                    yield path.name, {name: value for name, value in row.items() if value is not None}

    def recover(self, sequences: Sequence[int], entries: Callable[[], Iterable[Entry]]) -> list[str]:
        """Make the parts hold exactly the journal's rows.

        Args:
            sequences: of every row in the journal, ascending.
            entries: reads the journal's rows again, in that order; called only when a part must be made.

        Returns:
            Names of full parts, or of any damaged one, that were made again. The last part being behind the journal
            is what every kill leaves, and not worth a word.
        """
        count = max(1, -(-len(sequences) // PART_ROWS))
        wrong: list[int] = []
        damaged: list[str] = []
        for index in range(count):
            expected = sequences[index * PART_ROWS : (index + 1) * PART_ROWS]
            path = self._folder / _part_name(index)
            existed = path.exists()
            table = read_part(path)
            if table is None or not _holds(table, expected):
                wrong.append(index)
                if (existed and table is None) or (index < count - 1):
                    damaged.append(path.name)
            elif index == count - 1:
                self._resume(index, expected, table)
        if wrong:
            self._make(wrong, count, entries)
        for path in _parts(self._folder)[count:]:
            path.unlink()
        return damaged

    def _make(self, wrong: list[int], count: int, entries: Callable[[], Iterable[Entry]]) -> None:
        chosen: dict[int, list[Entry]] = {index: [] for index in wrong}
        for position, entry in enumerate(entries()):
            index = position // PART_ROWS
            if index in chosen:
                chosen[index].append(entry)
                if len(chosen[index]) == PART_ROWS:
                    self._make_one(index, chosen.pop(index), count)
        for index, rest in chosen.items():
            self._make_one(index, rest, count)

    def _make_one(self, index: int, entries: list[Entry], count: int) -> None:
        sequences = [sequence for sequence, _ in entries]
        table = to_table((row for _, row in entries), rows_schema())
        self._write(index, table, sequences[0] if sequences else 0, sequences[-1] if sequences else 0)
        if index == count - 1:
            self._resume(index, sequences, table)

    def _resume(self, index: int, sequences: Sequence[int], table: pa.Table) -> None:
        self._index, self._table = index, table.replace_schema_metadata(None)
        self._first = sequences[0] if sequences else 0

    def append(self, entries: Sequence[Entry]) -> int:
        """Add as many of `entries` as the current part still takes; returns how many. On an error, none is added."""
        import pyarrow as pa

        if self._table.num_rows >= PART_ROWS:
            self._index, self._first, self._table = self._index + 1, 0, to_table([], rows_schema())
        taken = entries[: PART_ROWS - self._table.num_rows]
        table = pa.concat_tables([self._table, to_table((row for _, row in taken), rows_schema())]).combine_chunks()
        first = self._first or taken[0][0]
        self._write(self._index, table, first, taken[-1][0])
        self._first, self._table = first, table
        return len(taken)

    def _write(self, index: int, table: pa.Table, first: int, last: int) -> None:
        write_atomically(self._folder / _part_name(index), to_parquet(table, {_RANGE: json.dumps([first, last])}))


def _holds(table: pa.Table, sequences: Sequence[int]) -> bool:
    if table.num_rows != len(sequences) or not table.schema.remove_metadata().equals(rows_schema()):
        return False
    stored = (table.schema.metadata or {}).get(_RANGE.encode(), b"[]")
    return bool(json.loads(stored) == ([sequences[0], sequences[-1]] if sequences else [0, 0]))


class SampleParts:
    """`DIR/samples`: a run's samples become a small file of their own at once, and join a part 50 at a time.

    The small files lie in `_pending`, which readers of a Parquet folder skip, so merging never shows samples twice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending = folder / "_pending"
        folder.mkdir(exist_ok=True)
        self._pending.mkdir(exist_ok=True)
        _remove_leftovers(folder)
        _remove_leftovers(self._pending)
        self.waiting = len(list(self._pending.glob("*.parquet")))

    def put(self, key: Key, series: Sequence[SampleSeries]) -> None:
        """Store one run's samples durably; again for the same run replaces them."""
        path = self._pending / f"{key[0]}-{key[1]}.parquet"
        self.waiting += not path.exists()
        write_atomically(path, to_parquet(to_table([asdict(item) for item in series], samples_schema())))

    def recover(self, known: set[Key]) -> list[str]:
        """Drop samples of runs that the journal does not know, move damaged parts to `_damaged`; returns those.

        Every part is read, some 50 ms each: nothing else notices a flipped byte before an analysis does.
        """
        moved: list[str] = []
        for path in _parts(self._folder):
            if read_part(path) is None:
                (self._folder / "_damaged").mkdir(exist_ok=True)
                path.replace(self._folder / "_damaged" / path.name)
                moved.append(path.name)
        for path in self._pending.glob("*.parquet"):
            cell_id, _, round_ = path.stem.rpartition("-")
            if (cell_id, int(round_)) not in known:
                path.unlink()
        self.merge()
        return moved

    def merge(self) -> None:
        """Move what is pending into the last part, or a new one once that is large."""
        import pyarrow as pa
        import pyarrow.compute as pc

        files = sorted(self._pending.glob("*.parquet"))
        tables = [table for table in map(read_part, files) if table is not None]
        if tables:
            path, current = self._current_part()
            fresh = pa.concat_tables(tables)
            if current is not None:  # a kill between writing the part and removing the small files leaves both
                ids = [f"{cell}-{round_}" for cell, round_ in _keys(current)]
                stays = pc.invert(pc.is_in(pa.array(ids, pa.string()), pa.array([file.stem for file in files])))
                fresh = pa.concat_tables([current.filter(stays), fresh])
            write_atomically(path, to_parquet(fresh.combine_chunks()))
        for file in files:
            file.unlink()
        if files:
            sync_folder(self._pending)
        self.waiting = 0

    def _current_part(self) -> tuple[Path, pa.Table | None]:
        parts = _parts(self._folder)
        if not parts:
            return self._folder / _part_name(0), None
        last = parts[-1]
        table = read_part(last) if last.stat().st_size < SAMPLES_PART_BYTES else None
        if table is None or not table.schema.remove_metadata().equals(samples_schema()):
            return self._folder / _part_name(int(last.stem[-6:]) + 1), None
        return last, table.replace_schema_metadata(None)


def _keys(table: pa.Table) -> Iterator[Key]:
    yield from zip(table["cell_id"].to_pylist(), table["round"].to_pylist(), strict=True)
