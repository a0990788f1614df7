"""Keeps the terminal for the person: whatever libraries write goes to a log file instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# `1` in the environment keeps library noise on the terminal, for whoever debugs Ray itself.
VERBOSE = "BENCHMATRIX_VERBOSE"


@contextmanager
def quiet(log: Path) -> Iterator[TextIO]:
    """Send file descriptor 2 (C++ libraries included) and Python's prints to `log`; yields the real standard error."""
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    if os.environ.get(VERBOSE) == "1":
        with terminal:
            yield terminal
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 2)
    os.close(sink)
    try:
        with redirect_stdout(sys.stderr):  # Ray announces a raylet's death on standard output, whatever it was told
            yield terminal
    finally:
        sys.stderr.flush()
        os.dup2(terminal.fileno(), 2)
        terminal.close()


def console_for(stream: TextIO) -> Console:
    """A console as wide as the terminal, or wide enough for a table where there is none."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=200)
