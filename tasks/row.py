"""The row: outcome of one cell in one round, every column declared once. Null means not measured and has a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Any

from tasks.metric import Column, ColumnType, Missing
from tasks.registry import metric_classes

SCHEMA_VERSION = 1
# Raised whenever the way of measuring changes: rows of different protocols are never compared or reused.
PROTOCOL_VERSION = 3


class Outcome(StrEnum):
    OK = "ok"
    OOM = "oom"
    UNSUPPORTED = "unsupported"
    TIMEOUT = "timeout"
    ERROR = "error"
    CRASHED = "crashed"
    INVALID = "invalid"
    UNPLACED = "unplaced"


def _columns(type_: ColumnType, *pairs: tuple[str, str]) -> tuple[Column, ...]:
    return tuple(Column(name=name, type=type_, doc=doc) for name, doc in pairs)


IDENTITY = (
    *_columns(
        "int",
        ("schema_version", "version of these columns"),
        ("round", "number of the isolated process of this cell, from 0"),
        ("order_in_round", "position of the run in its block, from 0"),
        ("batch_size", "sequences, images or kernels' batch"),
        ("sequence_length", "tokens of the prompt or the sequence"),
        ("new_tokens", "tokens generated per sequence"),
    ),
    *_columns(
        "string",
        ("sweep", "name of the sweep"),
        ("cell_id", "hash of model, workload point, stack and hardware tag"),
        ("baseline_id", "cell_id of the stack that ratios are taken against"),
        ("group_id", "hash of all but the stack: the cells that are compared"),
        ("result_key", "hash of everything a reusable result must agree in"),
        ("block_id", "one group run back to back once; pairs form only inside it"),
        ("model", "the model's id in the sweep"),
        ("model_source", "pocket, random, path, hub, factory or none"),
        ("weights", "trained or random"),
        ("optimization", "the stack, in canonical order"),
        ("workload", "kind of the workload"),
        ("workload_point", "kind and all parameters, as text"),
        ("hardware", "resource tag"),
        ("hardware_requested", "the tag as the sweep has it: may be local"),
    ),
    *_columns("bool", ("hardware_simulated", "the accelerator was only pretended; never ranked")),
)

OUTCOME = (
    *_columns(
        "string",
        ("outcome", "ok, oom, unsupported, timeout, error, crashed, invalid or unplaced"),
        ("reason", "one sentence, null when ok"),
        ("error_type", "class of the exception or name of the signal"),
        ("evidence", "JSON: technique -> what was seen on the live model"),
        ("null_reasons", "JSON: column -> why it is null; '*' covers the rest"),
    ),
    *_columns("strings", ("invalid_reasons", "failed validity gates"), ("flags", "findings that do not invalidate")),
    *_columns("bool", ("steady", "warm-up reached a steady state")),
)

TIME = (
    *_columns(
        "float",
        ("load_s", "loading and preparing the model and inputs"),
        ("first_call_s", "first call, without compilation"),
        ("compile_s", "time in the compiler, before measuring"),
        ("warmup_s", "warm-up after the first call"),
        ("measure_s", "all measuring passes"),
        ("quality_s", "quality passes"),
        ("idle_s", "waiting for temperature"),
        ("kernels_built_s", "compiling kernels for the stack on this node before the run; no part of wall_s"),
        ("overhead_s", "the rest of wall_s: process, evidence, bookkeeping, result"),
        ("wall_s", "from handing the job to the isolated process to its row"),
    ),
    *_columns(
        "string",
        ("compile_cache", "cold or warm, null without compilation"),
        ("stop_reason", "converged or budget"),
        ("sample_kind", "call, or block_mean where single calls are too short for the clock"),
    ),
    *_columns(
        "int",
        ("warmup_iterations", "calls before measuring"),
        ("samples", "latency samples of this run"),
        ("graphs_compiled", "graphs compiled before measuring"),
    ),
)

ENVIRONMENT = (
    *_columns(
        "string",
        ("device_name", "NVML's name, or the CPU model"),
        ("device_uuid", "NVML's UUID, null for a CPU"),
        ("device_kind", "cuda or cpu"),
        ("machine_key", "hash of stable facts of the machine"),
        ("hostname", "node name"),
        ("driver", "NVIDIA driver version"),
        ("cuda", "CUDA runtime of torch"),
        ("torch", "version"),
        ("transformers", "version"),
        ("ray", "version"),
        ("python", "version"),
        ("git_revision", "revision of this project, +dirty when changed"),
        ("affinity", "CPUs of the measuring process, as ranges"),
        ("process_kind", "fork or exec"),
        ("profile", "quick, standard or publish"),
        ("environment", "JSON: everything else of the fingerprint"),
    ),
    *_columns("int", ("threads", "intra-op threads of torch, read back")),
    *_columns(
        "float",
        ("power_limit_w", "enforced power limit"),
        ("sm_clock_mhz_median", "median SM clock while measuring"),
        ("host_loop_ms", "a fixed loop on the CPU that fed the device, median while measuring: the host's speed"),
        ("host_loop_throughput_ms", "the same over the throughput pass alone"),
        ("temperature_c_start", "device temperature when measuring began"),
        ("temperature_c_end", "device temperature when measuring ended"),
    ),
    *_columns("bool", ("throttled", "a thermal or power-brake slowdown while measuring")),
)

BOOKKEEPING = (
    *_columns("string", ("run_id", "the run that measured this"), ("started_at", "UTC, ISO 8601")),
    *_columns("int", ("attempt", "from 1; above 1 after an infrastructure fault")),
)

CORE = (*IDENTITY, *OUTCOME, *TIME, *ENVIRONMENT, *BOOKKEEPING)
_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "strings": (list,),
}


@cache
def columns() -> dict[str, Column]:
    """Every column of the table: the core, then each metric's, with the interval columns they allow."""
    table: dict[str, Column] = {column.name: column for column in CORE}
    for metric in metric_classes().values():
        for column in metric.columns:
            for name, doc, type_ in _with_interval(column):
                if name in table:
                    raise ValueError(f"{metric.__module__}: column {name!r} exists already")
                table[name] = Column(name=name, type=type_, doc=doc)
    return table


def _with_interval(column: Column) -> list[tuple[str, str, ColumnType]]:
    rows: list[tuple[str, str, ColumnType]] = [(column.name, column.doc, column.type)]
    if column.interval:
        rows += [
            (f"{column.name}_lo", f"lower end of the 95 % interval of {column.name}", "float"),
            (f"{column.name}_hi", f"upper end of the 95 % interval of {column.name}", "float"),
            (f"{column.name}_n", f"observations behind {column.name}", "int"),
        ]
    return rows


class Row:
    """A row under construction: refuses unknown columns, wrong types and non-finite numbers."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "flags": [], "invalid_reasons": []}
        self._null_reasons: dict[str, str] = {}

    def __getitem__(self, name: str) -> Any:
        columns()[name]
        return self._values.get(name)

    def set(self, **values: Any) -> None:
        """Set columns; `Missing(reason)` sets null with that reason, None sets null without."""
        for name, value in values.items():
            column = columns().get(name)
            if column is None:
                raise KeyError(f"{name!r} is not a declared column")
            if isinstance(value, Missing):
                self._values.pop(name, None)
                self._null_reasons[name] = value.reason
            elif value is None:
                self._values.pop(name, None)
            else:
                self._values[name] = _checked(column, value)
                self._null_reasons.pop(name, None)

    def flag(self, *names: str) -> None:
        self._append("flags", names)

    def invalidate(self, *reasons: str) -> None:
        self._append("invalid_reasons", reasons)

    def _append(self, column: str, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self._values[column]:
                self._values[column].append(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: non-null columns, with `null_reasons` as JSON text."""
        result = dict(self._values)
        outcome = result.get("outcome")
        if outcome not in (None, Outcome.OK, Outcome.INVALID):
            self._null_reasons.setdefault("*", f"outcome {outcome}")
        result["null_reasons"] = json.dumps(self._null_reasons, sort_keys=True)
        return result

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        row = cls()
        reasons = json.loads(data.get("null_reasons") or "{}")
        row.set(**{name: value for name, value in data.items() if name != "null_reasons"})
        row._null_reasons = dict(reasons)
        return row


def _checked(column: Column, value: Any) -> Any:
    fits = isinstance(value, _PYTHON[column.type]) and isinstance(value, bool) == (column.type == "bool")
    if not fits:
        raise TypeError(f"column {column.name} holds {column.type}, got {type(value).__name__}: {value!r}")
    if column.type == "float" and not math.isfinite(value):
        raise ValueError(f"column {column.name} is not finite: use Missing with a reason")
    convert: dict[str, Callable[[Any], Any]] = {"float": float, "string": str, "strings": lambda v: [str(i) for i in v]}
    return convert.get(column.type, lambda same: same)(value)
