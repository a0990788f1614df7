"""The result folder's Parquet tables: Arrow schemas from the declared columns, and plain rows into tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.metric import ColumnType
from tasks.row import Row, columns

if TYPE_CHECKING:
    import pyarrow as pa

PLAN_COLUMNS: dict[str, ColumnType] = {
    "sweep": "string",
    "cell_id": "string",
    "baseline_id": "string",
    "group_id": "string",
    "result_key": "string",
    "model": "string",
    "workload": "string",
    "workload_point": "string",
    "optimization": "string",
    "hardware": "string",
    "hardware_requested": "string",
    "rounds": "int",
    "decision": "string",
    "reason": "string",
}
_IDENTITY = ("cell_id", "result_key", "measured_in", "label")
_SERIES = ("values_ms", "ended_s", "sm_clock_mhz", "clock_s")


def _arrow_type(type_: ColumnType) -> pa.DataType:
    import pyarrow as pa

    return {
        "string": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "strings": pa.list_(pa.string()),
    }[type_]


@cache
def rows_schema() -> pa.Schema:
    """One field per declared column, in the declared order."""
    import pyarrow as pa

    return pa.schema([pa.field(name, _arrow_type(column.type)) for name, column in columns().items()])


@cache
def samples_schema() -> pa.Schema:
    """One row per cell, round, pass and label; the series in milliseconds, seconds and MHz."""
    import pyarrow as pa

    fields = [pa.field(name, pa.string()) for name in _IDENTITY]
    fields.insert(1, pa.field("round", pa.int64()))
    return pa.schema(fields + [pa.field(name, pa.list_(pa.float64())) for name in _SERIES])


@cache
def _plain_types() -> dict[str, tuple[type, ...]]:
    types: dict[ColumnType, tuple[type, ...]] = {
        "string": (str,),
        "int": (int,),
        "float": (float, int),
        "bool": (bool,),
        "strings": (list,),
    }
    return {name: types[column.type] for name, column in columns().items()}


def check_row(row: Mapping[str, Any]) -> None:
    """Raise what `tasks.row.Row` raises for a row that is not as declared; several times faster for one that is."""
    types = _plain_types()
    for name, value in row.items():
        kind = type(value)
        if (
            kind not in types.get(name, ())
            or (kind is float and not math.isfinite(value))
            or (kind is list and not all(type(item) is str for item in value))
        ):
            Row.from_dict(dict(row))
            return


def to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of `schema`: null where absent or no longer of the column's type; unknown keys are left out."""
    import pyarrow as pa

    rows = list(rows)
    present = set[str]().union(*rows)  # most columns are empty in most batches
    arrays = [
        _array([row.get(field.name) for row in rows], field.type)
        if field.name in present
        else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: list[Any], type_: pa.DataType) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values, type=type_)
    except (pa.ArrowException, OverflowError):
        pass
    kept = []
    for value in values:  # rows that an older version journaled under another type of this column
        try:
            pa.array([value], type=type_)
        except (pa.ArrowException, OverflowError):
            value = None
        kept.append(value)
    return pa.array(kept, type=type_)


def plan_table(planned: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The plan: the known columns first, then whatever else the planner gives; nested values as JSON text."""
    import pyarrow as pa

    table = to_table(planned, pa.schema([pa.field(name, _arrow_type(type_)) for name, type_ in PLAN_COLUMNS.items()]))
    for name in dict.fromkeys(name for row in planned for name in row if name not in PLAN_COLUMNS):
        values = [row.get(name) for row in planned]
        seen = {type(value) for value in values if value is not None}
        plain = len(seen) == 1 and seen <= {str, int, float, bool}
        array = pa.array(values) if plain else pa.array([_text(value) for value in values], type=pa.string())
        table = table.append_column(name, array)
    return table


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def to_parquet(table: pa.Table, metadata: Mapping[str, str] | None = None) -> memoryview:
    """The table as Parquet bytes with page checksums; `metadata` goes into the footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata(dict(metadata or {}))
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())
