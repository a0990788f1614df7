"""A result folder behind a URI: written on local disk as always, and copied there part by part while it grows.

Object stores cannot append, lock or rename. So the journal, which is the truth, is written to a working copy on this
machine's disk; the mirror carries it over as segments of fixed length, of which only the last changes, and every other
file whole. Another machine that is given the same URI restores its working copy from there and goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import psutil

from orchestrator.durable import StoreError, StoreLocked, utc_now, write_atomically
from orchestrator.runner import cache_folder
from tasks.cell import digest
from tasks.uri import DRIVER, JOURNAL, RemoteFolder, UriError, journal_segments

SEGMENT_BYTES = 4 * 2**20
INTERVAL_S = 10.0
# A driver that has not renewed its claim for so long is taken for dead: it renews at every copy.
CLAIM_S = 180.0
_STATE = ".mirror.json"
_CLOSING_TRIES = 3
_BLOCK_BYTES = 64 * 1024
_Stamp = tuple[int, int]  # modification time in ns, bytes


class Mirror:
    """The remote side of one result folder while a driver writes it. Use as a context manager.

    Attributes:
        directory: the working copy, a result folder of its own.
        repairs: what was found at opening and is worth a word.
    """

    def __init__(self, uri: str, *, say: Callable[[str], None] | None = None, interval_s: float = INTERVAL_S) -> None:
        """Claim the URI and make the working copy hold at least what it holds.

        Raises:
            StoreLocked: another driver writes there.
            UriError: it cannot be reached or used.
        """
        self._remote = RemoteFolder.open(uri)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self._remote.path.rpartition("/")[2]) or "results"
        self.directory = cache_folder("results") / f"{name}-{digest(self._remote.uri)[:12]}"
        self.repairs: list[str] = []
        self.say = say
        self._interval_s = interval_s
        self._token = uuid.uuid4().hex
        self._stamps: dict[str, _Stamp] = {}
        self._journal_bytes = 0  # of the remote journal, as this driver wrote it
        self._journal_tried = 0  # as much may be there when a write was carried out but reported as failed
        self._failed: str | None = None
        self._copying, self._closing = threading.Lock(), threading.Event()
        self._claim()
        self._restore()
        self._thread = threading.Thread(target=self._copy_now_and_then, name="mirror", daemon=True)
        self._thread.start()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Copy what is left and give the URI back; raises `StoreError` when that fails, with where the results are."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        copied = False
        for attempt in range(_CLOSING_TRIES):
            try:
                if not copied:
                    self.copy()
                copied = True
                if DRIVER in self._remote.sizes():  # a deletion that was reported as failed may have been carried out
                    self._remote.delete(DRIVER)
                return
            except UriError as error:
                if attempt + 1 == _CLOSING_TRIES:
                    raise StoreError(
                        f"The results are whole in {self.directory} but could not all be copied ({error}): "
                        "run the same command again here."
                    ) from error
                time.sleep(2.0**attempt)

    def copy(self) -> None:
        """Carry over what has changed: the journal first, since the rest can be made from it.

        Raises:
            StoreLocked: another driver has taken the URI over; nothing was written, and nothing will be.
            UriError: it cannot be reached now.
        """
        with self._copying:
            self._renew()
            self._copy_journal()
            names = set(self._local_files())
            for name in sorted(names, key=lambda name: (name.count("/"), name), reverse=True):
                self._copy_file(name)
            for gone in [name for name in self._stamps if name not in names]:
                with suppress(UriError):
                    self._remote.delete(gone)
                del self._stamps[gone]
            write_atomically(self.directory / _STATE, json.dumps(self._stamps).encode())

    def _copy_now_and_then(self) -> None:
        while not self._closing.wait(self._interval_s):
            try:
                self.copy()
            except StoreLocked as error:
                if self.say is not None:
                    self.say(str(error))
                return
            except (UriError, StoreError) as error:
                if self._failed is None and self.say is not None:
                    self.say(f"{error} The results are whole in {self.directory}; copying is tried again.")
                self._failed = str(error)
            else:
                self._failed = None

    def _copy_journal(self) -> None:
        path = self.directory / "journal.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            end = _end_of_records(file)
            while self._journal_bytes < end:
                start = self._journal_bytes - self._journal_bytes % SEGMENT_BYTES
                file.seek(start)
                data = file.read(min(SEGMENT_BYTES, end - start))
                self._journal_tried = max(self._journal_tried, start + len(data))
                self._remote.write(f"{JOURNAL}/{start // SEGMENT_BYTES:06d}.jsonl", data)
                self._journal_bytes = start + len(data)

    def _copy_file(self, name: str) -> None:
        path = self.directory / name
        try:
            stamp = _stamp(path)
            if self._stamps.get(name) == stamp:
                return
            data = path.read_bytes()
        except FileNotFoundError:
            return  # merged into another meanwhile
        self._remote.write(name, data)
        self._stamps[name] = stamp

    def _local_files(self) -> list[str]:
        kept = [path for path in self.directory.glob("*") if path.suffix in (".parquet", ".yaml") and path.is_file()]
        kept += [path for part in ("rows", "samples") for path in (self.directory / part).rglob("*.parquet")]
        return [str(path.relative_to(self.directory)) for path in kept if not path.name.startswith(".")]

    def _claim(self) -> None:
        """Best effort: stores have no lock. Two that claim within the same second are told apart by reading back."""
        holder = read_claim(self._remote)
        if holder is not None and not _is_dead(holder):
            raise StoreLocked(
                f"{self._remote.uri} is being written by process {holder['pid']} on {holder['host']}, last seen "
                f"{holder['seen']}: wait for it to end ({CLAIM_S:.0f} s after its last sign of life), or choose "
                "another --out."
            )
        self._write_claim()
        if holder is not None:
            time.sleep(1.0)
        if (other := self._other_driver(self._remote.sizes())) is not None:
            raise StoreLocked(f"{self._remote.uri} was taken over by {other}.")

    def _renew(self) -> None:
        sizes = self._remote.sizes()
        other = self._other_driver(sizes)
        total = sum(sizes[name] for name in journal_segments(sizes))
        if other is None and not self._journal_bytes <= total <= self._journal_tried:
            other = "a driver that has changed its journal"
        if other is not None:
            raise StoreLocked(
                f"{self._remote.uri} was taken over by {other}: nothing more is copied there. All that this driver "
                f"recorded is whole in {self.directory}; `benchmatrix table` reads both together, and the same command "
                "goes on from the URI and keeps this folder aside."
            )
        self._write_claim()

    def _other_driver(self, sizes: dict[str, int]) -> str | None:
        """Who has the URI in this driver's place. Whoever takes it over replaces the claim and in the end deletes it.

        Raises:
            UriError: that cannot be told now.
        """
        if DRIVER not in sizes:
            return "a driver that has ended since"
        holder = _parsed(self._remote.read(DRIVER))
        if holder is None:
            raise UriError(f"{self._remote.uri}: {DRIVER} cannot be understood")
        return None if holder["token"] == self._token else f"process {holder['pid']} on {holder['host']}"

    def _write_claim(self) -> None:
        claim = {"token": self._token, "pid": os.getpid(), "host": socket.gethostname(), "seen": utc_now()}
        self._remote.write(DRIVER, json.dumps(claim).encode())

    def _restore(self) -> None:
        """Afterwards the working copy's journal begins with the remote one."""
        sizes = self._remote.sizes()
        segments = journal_segments(sizes)
        total = sum(sizes[name] for name in segments)
        local = self.directory / "journal.jsonl"
        if local.exists() and not self._begins_with(local, segments):
            aside = self.directory.with_name(f"{self.directory.name}.{datetime.now(UTC):%Y%m%dT%H%M%S}")
            self.directory.rename(aside)
            self.repairs.append(f"The working copy had other results than {self._remote.uri}: it was kept as {aside}.")
        if not local.exists() or local.stat().st_size < total:
            self._download(sizes, segments)
        elif (self.directory / _STATE).exists():
            known = json.loads((self.directory / _STATE).read_text())
            self._stamps = {name: (stamp[0], stamp[1]) for name, stamp in known.items() if sizes.get(name) == stamp[1]}
        self._journal_bytes = self._journal_tried = total

    def _begins_with(self, local: Path, segments: list[str]) -> bool:
        """Whether one of the two journals is the beginning of the other."""
        with local.open("rb") as file:
            for name in segments:
                theirs = self._remote.read(name)
                ours = file.read(len(theirs))
                if len(ours) < len(theirs):
                    return theirs.startswith(ours)
                if ours != theirs:
                    return False
        return True

    def _download(self, sizes: dict[str, int], segments: list[str]) -> None:
        fresh = self.directory.with_name(f"{self.directory.name}.restoring")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        with (fresh / "journal.jsonl").open("wb") as file:
            for name in segments:
                file.write(self._remote.read(name))
        for name in sizes:
            if name.startswith(("rows/", "samples/")) or ("/" not in name and name.endswith((".parquet", ".yaml"))):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                (fresh / name).write_bytes(self._remote.read(name))
                self._stamps[name] = _stamp(fresh / name)
        shutil.rmtree(self.directory, ignore_errors=True)
        fresh.rename(self.directory)
        if segments:
            self.repairs.append(f"Continuing from {self._remote.uri}; the working copy is {self.directory}.")


def read_claim(remote: RemoteFolder) -> dict[str, str] | None:
    """Who writes a URI now, if anybody: `token`, `pid`, `host`, `seen`. A claim that says nothing is nobody's."""
    if DRIVER not in remote.sizes():
        return None
    try:
        return _parsed(remote.read(DRIVER))
    except UriError:
        if DRIVER in remote.sizes():
            raise
        return None  # given back meanwhile


def _parsed(data: bytes) -> dict[str, str] | None:
    try:
        claim = json.loads(data)
    except ValueError:
        return None
    return claim if isinstance(claim, dict) and {"token", "pid", "host", "seen"} <= set(claim) else None


def _is_dead(holder: dict[str, str]) -> bool:
    if holder["host"] == socket.gethostname() and not psutil.pid_exists(int(holder["pid"])):
        return True
    return (datetime.now(UTC) - datetime.fromisoformat(holder["seen"])).total_seconds() > CLAIM_S


def is_claimed(remote: RemoteFolder) -> bool:
    """Whether a driver that lives writes there."""
    holder = read_claim(remote)
    return holder is not None and not _is_dead(holder)


def _end_of_records(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole record: one that is being written now comes next time."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - _BLOCK_BYTES, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
