"""What lies beside an artifact's files and tells whether they are all there, as they were made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_DIGEST = "digest"


class ArtifactError(RuntimeError):
    """An artifact that is not in the store although it should be, or that cannot be kept there."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What lies beside an artifact's files; it is written last, with a digest of itself.

    `files` maps relative names to `{"bytes", "sha256"}`. `peak_bytes` is the memory that making it took: reserved on
    the device, or, made without one, the process's resident set. `made_for` names the run that it was made for.
    `facts` is what the technique's `make_artifact` returned.
    """

    key: str
    maker: str
    inputs: dict[str, Any]
    base: str | None
    files: dict[str, dict[str, Any]]
    made_s: float
    peak_bytes: int
    peak_host_bytes: int
    device: str
    made_at: str
    made_for: str
    versions: dict[str, str | None]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        fields = json.loads(json.dumps(asdict(self)))
        return json.dumps({**fields, _DIGEST: _digest(fields)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises `ArtifactError` for what `to_json` did not write, such as manifests from before they had a digest."""
        try:
            fields = json.loads(text)
            whole = fields.pop(_DIGEST) == _digest(fields)
            manifest = cls(**fields)
            whole = whole and isinstance(manifest.facts, dict) and all(map(_is_file_entry, manifest.files.values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"no manifest of this version: {type(error).__name__}: {error}") from error
        if not whole or not manifest.files:
            raise ArtifactError("the manifest is not as it was written")
        return manifest


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _is_file_entry(entry: dict[str, Any]) -> bool:
    return type(entry["bytes"]) is int and isinstance(entry["sha256"], str)


def plain_files(folder: Path) -> dict[str, Path]:
    """What lies in an artifact's folder, the manifest left out, by relative name; raises for what is no plain file."""
    found = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    for path in found:
        if path.is_symlink() or not path.is_file():
            where = f"{folder.parent.name} wrote {path.relative_to(folder)}"
            raise ArtifactError(f"{where}, which is no plain file: artifacts are self-contained")
    return {path.relative_to(folder).as_posix(): path for path in found if path != folder / MANIFEST}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
