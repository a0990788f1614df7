"""A store that outwaits a full disk: the sweep stands still, its results stay whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.store import Store, StoreFull
from tasks.job import RunResult

_PAUSE_S = 2.0


class PatientStore:
    """Repeats a call that found no space, after saying so once, until there is space or the person stops it."""

    def __init__(self, store: Store, *, stopping: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._store, self._stopping, self._say = store, stopping, say
        self._busy = threading.RLock()

    def note(self, kind: str, **fields: Any) -> None:
        self._patiently(lambda: self._store.note(kind, **fields))

    def add(self, result: RunResult) -> None:
        self._patiently(lambda: self._store.add(result))

    def tick(self) -> None:
        self._patiently(self._store.tick)

    def write_plan(self, planned: list[dict[str, Any]]) -> None:
        self._patiently(lambda: self._store.write_plan(planned))

    def last_flush(self, wait_s: float) -> None:
        """From another thread, just before the process ends: write what is buffered, and let nobody write after it."""
        if self._busy.acquire(timeout=wait_s):  # never released
            self._store.flush()

    def _patiently(self, call: Callable[[], None]) -> None:
        said = False
        while True:
            try:
                with self._busy:
                    return call()
            except StoreFull as error:
                if self._stopping():
                    raise
                if not said:
                    self._say(f"{error} Waiting for space.")
                    said = True
                time.sleep(_PAUSE_S)
