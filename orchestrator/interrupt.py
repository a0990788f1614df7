"""SIGINT and SIGTERM while a sweep runs: the first finishes the running cells, the second ends everything now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

EXIT_INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPED = b"stopped; the same command goes on with what is missing\n"
_MESSAGE = b"\nfinishing the running cells; once more to stop now\n"


class Stop:
    """Called: whether the person has asked to stop. A thread listens, since waiting on Ray delays Python's handlers."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self, terminal: TextIO, last_words: Callable[[], None]) -> Iterator[None]:
        """Answer signals inside; enter it after `ray.init`, which installs handlers of its own.

        Outside the main thread signals are left to whoever owns it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        listener = threading.Thread(
            target=self._listen, args=(reader, terminal, last_words), name="signals", daemon=True
        )
        handlers = {number: signal.signal(number, lambda number, frame: None) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(writer)
            listener.join()
            os.close(reader)

    def _listen(self, reader: int, terminal: TextIO, last_words: Callable[[], None]) -> None:
        while byte := os.read(reader, 1):
            if byte[0] not in _SIGNALS:
                continue
            if self.asked:
                with suppress(Exception):
                    last_words()
                    os.write(terminal.fileno(), _STOPPED)
                os._exit(EXIT_INTERRUPTED)  # what belongs to us dies with this process: see `guard`
            self.asked = True
            with suppress(OSError):
                os.write(terminal.fileno(), _MESSAGE)
