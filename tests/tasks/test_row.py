"""The row: declared columns only, right types, finite numbers, and a reason beside every null."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.metric import Missing
from tasks.row import SCHEMA_VERSION, Outcome, Row, columns


def test_refuses_what_is_not_declared() -> None:
    with pytest.raises(KeyError, match="'latency' is not a declared column"):
        Row().set(latency=1.0)
    with pytest.raises(KeyError):
        Row()["latency"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 1.5),
        ("batch_size", True),
        ("batch_size", "1"),
        ("wall_s", "1"),
        ("wall_s", True),
        ("steady", 1),
        ("model", 5),
        ("flags", "launch_bound"),
    ],
)
def test_refuses_wrong_types(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"column {name} holds"):
        Row().set(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_no_number(value: float) -> None:
    with pytest.raises(ValueError, match="wall_s is not finite"):
        Row().set(wall_s=value)


def test_missing_is_null_with_a_reason_and_a_value_removes_it() -> None:
    row = Row()
    row.set(wall_s=1, driver=Missing(reason="cpu"))
    assert row["driver"] is None
    assert json.loads(row.to_dict()["null_reasons"]) == {"driver": "cpu"}
    assert type(row["wall_s"]) is float
    row.set(driver="580", wall_s=Missing(reason="lost"))
    assert json.loads(row.to_dict()["null_reasons"]) == {"wall_s": "lost"}
    assert "wall_s" not in row.to_dict()


@pytest.mark.parametrize("outcome", Outcome)
def test_one_reason_covers_the_rest_of_a_failed_row(outcome: Outcome) -> None:
    row = Row()
    row.set(outcome=outcome)
    reasons = json.loads(row.to_dict()["null_reasons"])
    assert reasons == ({} if outcome in ("ok", "invalid") else {"*": f"outcome {outcome}"})
    assert row.to_dict()["outcome"] == str(outcome)


def test_flags_and_invalid_reasons_are_kept_once() -> None:
    row = Row()
    row.flag("a", "b", "a")
    row.invalidate("c")
    row.invalidate("c", "d")
    assert (row["flags"], row["invalid_reasons"]) == (["a", "b"], ["c", "d"])


def test_round_trip() -> None:
    row = Row()
    row.set(wall_s=1.5, model="m", steady=False, samples=0, driver=Missing(reason="cpu"), outcome=Outcome.OK)
    row.flag("x")
    data = json.loads(json.dumps(row.to_dict()))
    assert Row.from_dict(data).to_dict() == row.to_dict() == data
    assert data["schema_version"] == SCHEMA_VERSION
    assert data["samples"] == 0, "zero means zero"
    assert data["steady"] is False


def test_columns_are_documented_and_carry_units() -> None:
    for name, column in columns().items():
        assert column.name == name
        assert column.doc
        assert name == name.lower()
    seconds = [name for name, column in columns().items() if name.endswith("_s") and column.type != "float"]
    assert seconds == []


def test_interval_columns_follow_their_metric() -> None:
    table = columns()
    for end, type_ in (("lo", "float"), ("hi", "float"), ("n", "int")):
        assert table[f"latency_ms_p50_{end}"].type == type_
    assert "latency_ms_p95_lo" not in table
