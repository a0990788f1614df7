"""Notices that the head of the cluster is gone. Ray itself stands still for a minute and then ends the process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_HEAD_LOST = 2
PERIOD_S = 2.0
REACH_S = 3.0
# A head that is restarted under its old address within this time is not missed.
PATIENCE_S = 15.0


@contextmanager
def watched(address: str, last_words: Callable[[str], None]) -> Iterator[None]:
    """While inside: when nobody has listened at `address` for `PATIENCE_S`, say the last words and end the process.

    A thread of its own, since every call of Ray may block by then; `last_words` gets the sentence for the person.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, last_words, ended), name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(REACH_S + 1.0)


def _watch(address: str, last_words: Callable[[str], None], ended: threading.Event) -> None:
    seen = time.monotonic()
    while not ended.wait(PERIOD_S):
        if _reachable(address):
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE_S:
            sentence = f"the head of the Ray cluster at {address} is gone"
            try:
                last_words(sentence)
            finally:
                os._exit(EXIT_HEAD_LOST)


def _reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError:
        return False
    return True
