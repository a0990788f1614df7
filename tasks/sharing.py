"""Artifacts between nodes: the files of one as a stream, how such a stream is received, and quiet while one is sent.

What carries the stream is the orchestrator's matter (`orchestrator.exchange`); a supervisor that nobody connects to
others is `Alone`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath

from tasks.artifacts import ArtifactSpec, find, locked, making_folder
from tasks.manifest import MANIFEST

CHUNK_BYTES = 8 * 2**20
# (name of the file relative to the artifact's folder, some of its bytes); chunks of a file come in order
Part = tuple[str, bytes]


class Alone:
    """How a supervisor gets artifacts from elsewhere: it does not. Also the interface of those that do."""

    def obtain(self, spec: ArtifactSpec, root: Path, limit_s: float, *, able: bool = True) -> None:
        """Return when the artifact lies in `root`, or when it is up to this slot to make it.

        One that is not `able` to make it only waits while another is making it.
        """

    def made(self, spec: ArtifactSpec) -> None:
        """The artifact lies whole in this node's store."""

    def failed(self, spec: ArtifactSpec) -> None:
        """This slot could not make it: the others need not wait for each other any more."""


def parts(folder: Path) -> Iterator[Part]:
    """Everything in an artifact's folder, the manifest last; nothing where it is not there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path == folder / MANIFEST):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            yield name, file.read(CHUNK_BYTES)
            while chunk := file.read(CHUNK_BYTES):
                yield name, chunk


def receive(spec: ArtifactSpec, root: Path, stream: Iterable[Part]) -> bool:
    """Write a stream into the store, whole or not at all, and compare every file with the manifest that came along.

    False if what came is not the artifact. Raises `ValueError` for a name that leaves the folder, and whatever
    `stream` raises; nothing stays then.
    """
    folder, making = spec.folder(root), making_folder(spec, root)
    with locked(spec, root):
        if find(spec, root, content=True) is not None:  # who asks has perhaps found it broken inside
            return True
        for leftover in (making, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            for name, chunk in stream:
                with _inside(making, name).open("ab") as file:
                    file.write(chunk)
            making.rename(folder)
            if find(spec, root, content=True) is not None:
                return True
            shutil.rmtree(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return False


def _inside(folder: Path, name: str) -> Path:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"an artifact may not contain {name!r}, which lies outside its folder")
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def machine_folder() -> Path:
    """Where this user's processes on this machine find each other's locks: the store may be shared by machines."""
    folder = Path(tempfile.gettempdir()) / f"benchmatrix-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def undisturbed(folder: Path | None = None) -> Iterator[None]:
    """Held while something is measured on this machine; several may hold it, but not while one is `disturbing`.

    `folder` holds the locks, `machine_folder` unless a test has its own. Where it cannot be locked, nothing is.
    """
    folder = folder or machine_folder()
    with ExitStack() as held:
        with ExitStack() as queue:
            # who waits to disturb stands in the queue: who would measure next waits behind it
            queue.enter_context(_flock(folder / "queue", fcntl.LOCK_EX))
            held.enter_context(_flock(folder / "measuring", fcntl.LOCK_SH))
        yield


@contextmanager
def disturbing(folder: Path | None = None) -> Iterator[None]:
    """Held to send something, or to keep the host busy: waits for the measurements that run on this machine to end, and
    none begins meanwhile."""
    folder = folder or machine_folder()
    with _flock(folder / "queue", fcntl.LOCK_EX), _flock(folder / "measuring", fcntl.LOCK_EX):
        yield


@contextmanager
def _flock(path: Path, kind: int) -> Iterator[None]:
    with ExitStack() as opened:
        with suppress(OSError):
            file = opened.enter_context(path.open("a+"))
            fcntl.flock(file, kind)
        yield
