"""A run's state for others: what cannot be published now is published later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import watch
from orchestrator.journal import GIVEN_UP
from orchestrator.show import read_state
from orchestrator.store import Store
from orchestrator.watch import FAILED_S, PUBLISH_S, Watch


def test_a_call_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now, broken, published = 100.0, True, list[float]()

    def publish(self: Watch, lanes: Any) -> None:
        if broken:
            raise ConnectionError
        published.append(now)

    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    monkeypatch.setattr(Watch, "_publish", publish)
    run = Watch({"run_id": "1", "sweep": "tiny", "out": "out"}, dict)
    run.refresh({})
    broken = False
    for seconds in (PUBLISH_S, FAILED_S, PUBLISH_S / 2, PUBLISH_S):
        now += seconds
        run.refresh({})
    assert published == [100 + PUBLISH_S + FAILED_S, 100 + 2.5 * PUBLISH_S + FAILED_S]
    assert "could not be published: ConnectionError" in run.document({})["messages"][0]


def test_a_slot_that_was_given_up_runs_nothing(tmp_path: Path) -> None:
    block = {"group_id": "g", "round": 0, "cells": 2, "group": "pocket prefill"}
    with Store.open(tmp_path / "out") as store:
        store.note("run", run_id="1")
        for slot in ("one/gpu0", "two/gpu0"):
            store.note("block", slot=slot, block_id=f"g-{slot}", **block)
        store.note("fault", slot="one/gpu0", node="one", reason="the runner was lost")
        store.note("fault", slot="one/gpu0", node="one", reason=f"{GIVEN_UP}: its node is gone")
    state = read_state(tmp_path / "out" / "journal.jsonl", "out")
    assert list(state.running) == ["two/gpu0"]
    assert len(state.faults) == 2
