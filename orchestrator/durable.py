"""Files that are whole or not there: errors, atomic replacement, and the lock of a result folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StoreError(RuntimeError):
    """A result folder cannot be used or written; the message is one sentence for the user."""


class StoreFull(StoreError):
    """No space is left. What was recorded is intact; the same call may be repeated once there is space."""


class StoreLocked(StoreError):
    """Another driver is writing this result folder."""


def store_error(error: OSError, path: Path) -> StoreError:
    """The sentence for a failed write: `StoreFull` where space or quota is what is missing."""
    if error.errno in _FULL:
        return StoreFull(
            f"No space left to write {path}: free some and run the same command again, what was recorded is kept."
        )
    return StoreError(f"Cannot write {path}: {error.strerror or error}.")


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def sync_folder(folder: Path) -> None:
    """Make names created, replaced or removed in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data` so that a reader, or a kill at any moment, sees the old or the new file, whole."""
    temporary = path.with_name(f".{path.name}.tmp")  # readers of a Parquet folder skip names with a leading dot
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise store_error(error, path) from error


class FolderLock:
    """Exclusive `flock` on `DIR/.lock`; the kernel drops it with the process, so a killed driver leaves none."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        while True:
            try:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise store_error(error, self._path) from error
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(self._descriptor, 4096, 0)
                os.close(self._descriptor)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise StoreError(f"Cannot lock {self._path}: {error.strerror}; choose another --out.") from error
                raise StoreLocked(_held_by(folder, holder)) from None
            if self._is_current():
                break
            os.close(self._descriptor)  # its holder removed it between our open and our lock
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": utc_now()})
        with suppress(OSError):  # a full disk does not stop a reader of this folder, and the lock holds without text
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)

    def _is_current(self) -> bool:
        try:
            return self._path.stat().st_ino == os.fstat(self._descriptor).st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._descriptor < 0:
            return
        self._path.unlink(missing_ok=True)  # while held: whoever opened it meanwhile sees that it is gone and retries
        os.close(self._descriptor)
        self._descriptor = -1


def _held_by(folder: Path, content: bytes) -> str:
    try:
        data = json.loads(content)
        holder = f"process {data['pid']} on {data['host']} since {data['since']}"
    except (ValueError, KeyError, TypeError):
        holder = "another process"
    return f"{folder} is being written by {holder}: wait for it to end, or choose another --out."
