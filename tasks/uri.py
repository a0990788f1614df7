"""Result folders in object stores: s3://, gs:// and file:// through pyarrow, the whole of a file at a time."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNAL, DRIVER = "journal", "_driver.json"  # what a remote folder has besides the files of a local one
_ATTEMPTS = 3
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.S)
SCHEMES = ("s3", "gs", "file")


class UriError(ValueError):
    """A URI that cannot be used, or a store that cannot be reached; one sentence."""


def is_uri(text: object) -> bool:
    """Whether this names a folder in an object store and not on a mounted disk."""
    return isinstance(text, str) and _URI.match(text) is not None


def check_uri(uri: str) -> None:
    """Refuse what is no place for results; nothing is contacted."""
    match = _URI.match(uri)
    scheme, rest = match.groups() if match else ("", "")
    if scheme not in SCHEMES:
        raise UriError(f"{uri}: give a path, or a URI that begins with {', '.join(f'{name}://' for name in SCHEMES)}")
    if "@" in rest.split("/", 1)[0] or re.search(r"[?&](access_key|secret_key|token|password)=", rest):
        where = f"{scheme}://{rest.split('@', 1)[-1].split('?', 1)[0]}"
        raise UriError(
            f"{where}: no credentials in a URI, it is stored and shown; give them as the store's own variables, "
            "such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or as a profile"
        )
    if not rest.split("?", 1)[0].strip("/"):
        raise UriError(f"{uri}: names no bucket or folder")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URI. Files appear and are replaced whole, which is what object stores do by themselves."""

    uri: str
    filesystem: Any
    path: str

    @classmethod
    def open(cls, uri: str) -> RemoteFolder:
        """Raises `UriError` for what pyarrow does not know; the store itself is contacted later."""
        import pyarrow as pa
        from pyarrow import fs

        check_uri(uri)
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UriError(f"{uri}: {_text(error)}") from error
        return cls(uri.rstrip("/"), filesystem, path.rstrip("/"))

    def sizes(self) -> dict[str, int]:
        """Every file below the folder, by its path relative to it; empty when there is none."""
        from pyarrow import fs

        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        with self._spoken():
            found = self.filesystem.get_file_info(selector)
        files = (info for info in found if info.type == fs.FileType.File)
        return {info.path.removeprefix(self.path).lstrip("/"): info.size for info in files}

    def read(self, name: str) -> bytes:
        with self._spoken(), self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Replace a file as a whole: readers see the old or the new one."""
        from pyarrow import fs

        target = f"{self.path}/{name}"
        local = isinstance(self.filesystem, fs.LocalFileSystem)
        partial = f"{target.rpartition('/')[0]}/.{target.rpartition('/')[2]}.tmp" if local else target
        with self._spoken():
            if local:
                self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(partial) as stream:
                stream.write(data)
            if local:
                self.filesystem.move(partial, target)

    def delete(self, name: str) -> None:
        with self._spoken():
            self.filesystem.delete_file(f"{self.path}/{name}")

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise UriError(f"{self.uri}: {_text(error)}") from error


def journal_segments(names: Iterable[str]) -> list[str]:
    """The journal's parts in order."""
    return sorted(name for name in names if re.fullmatch(rf"{JOURNAL}/\d{{6}}\.jsonl", name))


_copies: dict[str, tempfile.TemporaryDirectory[str]] = {}


def local_folder(directory: str | Path, *wanted: str) -> Path:
    """A local folder as it is; of a URI, a fresh copy of the `wanted` files and folders that lasts as this process.

    Raises:
        UriError: it cannot be reached, or vanishes while it is read.
    """
    if not is_uri(directory):
        return Path(directory)
    remote = RemoteFolder.open(str(directory))
    if remote.uri not in _copies:
        _copies[remote.uri] = tempfile.TemporaryDirectory(prefix="benchmatrix-read-")
    copy = Path(_copies[remote.uri].name)
    for attempt in range(_ATTEMPTS):
        try:
            _refresh(remote, copy, wanted)
            break
        except UriError:  # a run may merge files while they are listed
            if attempt + 1 == _ATTEMPTS:
                raise
    return copy


def _refresh(remote: RemoteFolder, copy: Path, wanted: tuple[str, ...]) -> None:
    names = [name for name in remote.sizes() if any(name == part or name.startswith(f"{part}/") for part in wanted)]
    for old in [copy / part for part in wanted]:
        if old.is_dir():
            shutil.rmtree(old)
        old.unlink(missing_ok=True)
    for name in names:
        if "/_" not in name:  # what is not yet part of the results
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(remote.read(name))


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
