"""A run's state for others: what cannot be published now is published later."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import watch
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
