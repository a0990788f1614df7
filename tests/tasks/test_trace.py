"""The profiler's trace: who happened in whom, on which stream, and what one call of real code leaves in it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import record_function

from tasks.trace import HOST, events_of, traced


def span(name: str, start: float, end: float, *, thread: int = 1, **arguments: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": thread, "ts": start, "dur": end - start,
        "args": arguments,
    }  # fmt: skip


def parents(*spans: dict[str, Any]) -> dict[str, str | None]:
    return {
        event.name: event.parent.name if event.parent else None for event in events_of({"traceEvents": list(spans)})
    }


def test_parent_is_the_innermost_that_encloses() -> None:
    found = parents(span("c", 3, 4), span("a", 0, 10), span("b", 2, 5), span("d", 6, 7), span("e", 11, 12))
    assert found == {"a": None, "b": "a", "c": "b", "d": "a", "e": None}


def test_threads_do_not_enclose_each_other() -> None:
    assert parents(span("a", 0, 10), span("b", 2, 5, thread=2)) == {"a": None, "b": None}


def test_what_overlaps_encloses_nothing() -> None:
    assert parents(span("a", 0, 4), span("b", 2, 6), span("c", 5, 6)) == {"a": None, "b": None, "c": "b"}


def test_only_spans_with_a_category_are_events() -> None:
    instant = {"ph": "i", "name": "Record Window End", "pid": "", "tid": "", "ts": 1.0}
    thread = {"ph": "M", "name": "thread_name", "ts": 0.0, "pid": 1, "tid": 1, "args": {"name": "python"}}
    (event,) = events_of({"traceEvents": [thread, span("a", 0, 1, stream=7), instant]})
    assert (event.name, event.stream, event.parent) == ("a", 7, None)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=20),
)
def test_parents_enclose(spans: list[tuple[int, int]]) -> None:
    trace = [span(str(number), start, start + length) for number, (start, length) in enumerate(spans)]
    events = events_of({"traceEvents": trace})
    assert len(events) == len(spans)
    assert [event.start_us for event in events] == sorted(event.start_us for event in events)
    for event in events:
        if event.parent is not None:
            assert event.parent.start_us <= event.start_us
            assert event.end_us <= event.parent.end_us


def test_a_real_call() -> None:
    def call() -> None:
        with record_function("outer"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        with record_function("mark"):
            pass

    events = traced(call, device=False)
    names = [event.name for event in events if event.category in HOST]
    assert names.index("outer") < names.index("aten::matmul") < names.index("mark")
    product = next(event for event in events if event.name == "aten::mm")
    assert product.parent is not None
    assert product.parent.name == "aten::matmul"
    assert product.parent.parent is not None
    assert product.parent.parent.name == "outer"
    assert product.stream == -1
