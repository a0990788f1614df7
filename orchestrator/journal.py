"""The journal of a result folder: one JSON record per line, one writer, durable in groups.

A record is handed to the OS at once (it survives a kill of the driver) and synced with its group: at the latest 64
records or 100 ms later it survives a power failure too. One fsync per record would cost 2 ms each. Until then it stays
in memory: where a sync finds no space (a quota, NFS), the kernel may have dropped it, and it is written again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.durable import StoreError, StoreFull, store_error, sync_folder, utc_now

GROUP_RECORDS = 64
GROUP_SECONDS = 0.08  # leaves 20 ms of the 100 for the fsync itself
FULL_SECONDS = 1.0
GIVEN_UP = "slot given up"  # how the reason of a fault begins that ends its slot

Record = dict[str, Any]
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class Journal:
    """Appends to `path`; opening cuts a torn tail (kept in `journal.torn`) and finds corrupt lines.

    Args:
        path: the JSONL file; created if missing.
        on_record: called with every good record during the opening scan, so that opening parses the file only once.

    Attributes:
        corrupt_lines: numbers, from 1, of lines in the middle that are no JSON object. They stay and are skipped.
        torn_bytes: length of the tail that was cut.
        last_sequence: `sequence` of the newest record, 0 when there is none.
        size: bytes of the journal.
    """

    def __init__(self, path: Path, on_record: Callable[[Record], None] | None = None) -> None:
        self.path = path
        self.corrupt_lines: tuple[int, ...] = ()
        self.torn_bytes = 0
        self.last_sequence = 0
        self.size = 0
        self._synced = 0  # bytes
        self._unsynced: list[bytes] = []
        self._failure: OSError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._syncing = threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise store_error(error, path) from error
        try:
            self._scan(on_record)
            os.fsync(self._descriptor)
            sync_folder(path.parent)
            self._synced = self.size
        except OSError as error:
            os.close(self._descriptor)
            raise store_error(error, path) from error
        except BaseException:
            os.close(self._descriptor)
            raise
        self._timer = threading.Thread(target=self._sync_in_groups, name="journal-sync", daemon=True)
        self._timer.start()

    def _scan(self, on_record: Callable[[Record], None] | None) -> None:
        corrupt: list[int] = []
        suspects: list[int] = []  # bad lines with no good one after them yet: a torn tail unless one follows
        with self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                offset += len(line)
                record = _parse(line)
                if record is None:
                    suspects.append(number)
                    continue
                corrupt += suspects
                suspects = []
                self.size = offset
                sequence = record.get("sequence")
                if isinstance(sequence, int):
                    self.last_sequence = max(self.last_sequence, sequence)
                if on_record is not None:
                    on_record(record)
        self.corrupt_lines = tuple(corrupt)
        if offset > self.size:
            self._cut(offset)

    def _cut(self, end: int) -> None:
        with self.path.with_name("journal.torn").open("ab") as torn:
            torn.write(os.pread(self._descriptor, end - self.size, self.size) + b"\n")
            torn.flush()
            os.fsync(torn.fileno())
        os.ftruncate(self._descriptor, self.size)
        self.torn_bytes = end - self.size

    def append(self, record: Record) -> None:
        """Hand `record` to the OS, with `sequence` and `written_at` added; a record is whole or not there.

        Raises:
            StoreFull: no space, for this record or for syncing earlier ones; it was not appended and the call may be
                repeated.
            StoreError: the file cannot be written, or an earlier group could not be synced.
        """
        if self._failure is not None:
            with self._syncing:
                self._write_again()
        with self._changed:
            self._check()
            sequence = self.last_sequence + 1
            text = _ENCODER.encode({**record, "sequence": sequence, "written_at": utc_now()})
            data = text.encode() + b"\n"
            self._write(data)
            self.last_sequence = sequence
            self._unsynced.append(data)
            group_is_full = len(self._unsynced) >= GROUP_RECORDS
            if len(self._unsynced) == 1:
                self._changed.notify()
        if group_is_full:
            with suppress(StoreFull):  # this record is appended: the next call says it
                self.flush()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        before = os.fstat(self._descriptor).st_size
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            try:
                os.ftruncate(self._descriptor, before)  # half a record would be taken for a torn tail
            except OSError as worse:
                self._failure = worse
            raise store_error(error, self.path) from error
        self.size = before + len(data)

    def flush(self) -> None:
        """Return when everything appended so far has been synced."""
        with self._syncing:
            self._write_again()
            with self._changed:
                self._check()
                covered = len(self._unsynced)
            if not covered:
                return
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._failure = error
                raise store_error(error, self.path) from error
            with self._changed:
                self._forget(covered)

    def _forget(self, count: int) -> None:
        self._synced += sum(map(len, self._unsynced[:count]))
        del self._unsynced[:count]

    def _write_again(self) -> None:
        """After a failure for want of space, with `_syncing` held: make the file end with what is not synced yet.

        After a failed fsync the kernel may have dropped the pages, and a later one reports success all the same. What
        is there still is overwritten by the same bytes, so that readers see no record go.
        """
        with self._changed:
            if (
                self._failure is None
                or self._closed
                or not isinstance(store_error(self._failure, self.path), StoreFull)
            ):
                return
            data = b"".join(self._unsynced)
            try:
                descriptor = os.open(self.path, os.O_WRONLY)  # the other one appends wherever it is told to write
                try:
                    done = 0
                    while done < len(data):
                        done += os.pwrite(descriptor, data[done:], self._synced + done)
                    os.ftruncate(descriptor, self._synced + len(data))
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                self._failure = error
                raise store_error(error, self.path) from error
            self._forget(len(self._unsynced))
            self.size, self._failure = self._synced, None

    def close(self) -> None:
        """Sync and close; further calls do nothing."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._timer.join()
            os.close(self._descriptor)

    def _check(self) -> None:
        if self._closed:
            raise StoreError(f"{self.path} is closed.")
        if self._failure is not None:
            raise store_error(self._failure, self.path) from self._failure

    def _sync_in_groups(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._unsynced)
                pause_s = GROUP_SECONDS if self._failure is None else FULL_SECONDS
                if self._closed or self._changed.wait_for(lambda: self._closed, timeout=pause_s):
                    return
            try:
                self.flush()
            except StoreFull:
                continue
            except StoreError:
                return  # remembered: the next append or flush raises it


def read_journal(path: Path, size: int | None = None) -> Iterator[Record]:
    """The good records of a journal, oldest first, up to `size` bytes; works while another process writes it."""
    with path.open("rb") as file:
        offset = 0
        for line in file:
            offset += len(line)
            if size is not None and offset > size:
                return
            record = _parse(line)
            if record is not None:
                yield record


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
