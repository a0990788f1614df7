"""Ends what a local Ray instance leaves when its driver dies: run as a script beside the driver, standard library only.

The kernel kills Ray's main processes with a SIGKILLed driver, but two of Ray's agents linger for a minute after it.
This process waits for the driver's end of a pipe to close, then kills whatever carries the instance's mark.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "BENCHMATRIX_SESSION"
_SWEEP_S = 10.0


class Guard:
    """Start before Ray, inside `marked`; `close` after it. It outlives a killed driver, by milliseconds."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(folder), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the driver
        )

    def close(self) -> None:
        """Whatever is left of the instance is killed now, and its folder removed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_SWEEP_S + 5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def marked(folder: Path, driver: int) -> list[int]:
    """Processes of this instance: they inherited its mark, or hold files in its folder; not guard and driver.

    Agents write their title over their environment; they are known by their log files.
    """
    mark, prefix = f"{MARK}={folder}".encode(), f"{folder}/"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in (os.getpid(), driver):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0") or _holds(entry, prefix):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is not ours to look at
    return found


def _holds(entry: Path, prefix: str) -> bool:
    return any(str(link.readlink()).startswith(prefix) for link in (entry / "fd").iterdir())


def main(folder: Path, driver: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    deadline = time.monotonic() + _SWEEP_S
    while (left := marked(folder, driver)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
