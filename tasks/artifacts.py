"""The artifact store: what is made once on a node and used by many cells and later sweeps.

A quantized, exported, pruned or distilled model and the quality reference are artifacts. Each is a folder of plain
files, `<artifact_dir>/<maker>/<key>/`, named after the hash of all that it depends on, with a manifest beside them. It
is written in a temporary folder and renamed, under a lock, so that it is there whole or not at all, and nobody makes
it twice. Nothing in it points outside. `docs/artifacts.md` says how a technique makes one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.cell import Stack, Technique, digest
from tasks.environment import version
from tasks.manifest import MANIFEST, ArtifactError, Manifest, plain_files, sha256_of
from tasks.models.identity import job_checkpoint
from tasks.optimization import Optimization
from tasks.registry import optimizations
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.job import CellJob
    from tasks.session import Session

FORMAT = 1  # raised when the layout of the store changes: older artifacts are not found


@dataclass(frozen=True, kw_only=True)
class ArtifactSpec:
    """Everything an artifact depends on, as plain data, found without torch.

    `maker` is the technique's name and the folder in the store. `inputs` must be JSON. With `checkpoint`, the folder
    is a transformers checkpoint that is loaded in the place of the model's own, and the techniques after it in the
    stack start from it. `base` is the key of the checkpoint that this one starts from, filled in by `wanted`.
    """

    maker: str
    inputs: dict[str, Any]
    checkpoint: bool = True
    base: str | None = None

    @property
    def key(self) -> str:
        return digest([FORMAT, self.maker, self.inputs, self.checkpoint, self.base], length=24)

    def folder(self, root: Path) -> Path:
        return root / self.maker / self.key


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact that lies in the store, as it was found whole."""

    spec: ArtifactSpec
    folder: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An artifact that a technique of a stack asks for."""

    technique: Technique
    spec: ArtifactSpec


def artifact_spec(
    technique: Technique, job: CellJob, *, libraries: Iterable[str] = (), checkpoint: bool = True, **more: Any
) -> ArtifactSpec:
    """What an artifact of a technique usually depends on: the model, all options with their files, seed, `libraries`,
    and the technique's `artifact_version`.

    `libraries` are distributions whose version changes what is made. `more` is whatever else decides.
    """
    made_by, model = optimizations()[technique.name], job.cell.model
    # random weights are drawn by the device's own generator: another device has another model
    drawn = {"drawn_on": [job.device.tag, job.device.name]} if model.source == "random" else {}
    inputs = {
        "model": {
            "source": model.source,
            "checkpoint": job_checkpoint(job),
            "trust_remote_code": model.trust_remote_code,
            **drawn,
        },
        "options": {key: option(technique, key) for key in sorted(made_by.options)},
        "content": made_by.content(technique, job.search_path),
        "seed": job.seed,
        "versions": {name: version(name) for name in sorted(libraries)},
        "version": made_by.artifact_version,
        **more,
    }
    return ArtifactSpec(maker=technique.name, inputs=inputs, checkpoint=checkpoint)


def wanted(job: CellJob) -> list[Wanted]:
    """The artifacts that the job's stack needs, in the order in which they are made; needs no torch."""
    known = optimizations()
    found: list[Wanted] = []
    base: str | None = None
    for technique in job.cell.stack.techniques:
        spec = known[technique.name].artifact(technique, job)
        if spec is None:
            continue
        spec = replace(spec, base=base)
        found.append(Wanted(technique=technique, spec=spec))
        base = spec.key if spec.checkpoint else base
    return found


def run_name(job: CellJob) -> str:
    """The run of a cell, as manifests name it."""
    return f"{job.run_id}/{job.cell.cell_id}/{job.round}/{job.attempt}"


def find(spec: ArtifactSpec, root: Path, *, content: bool = False) -> Artifact | None:
    """The artifact if it is there and whole: the manifest's digest, names and sizes are always compared, with `content`
    every file's SHA-256 too."""
    folder = spec.folder(root)
    try:
        manifest = Manifest.from_json((folder / MANIFEST).read_text())
        files = plain_files(folder)
        # the names in the folder are those of the manifest: none lies outside, and nothing is loaded that it has not
        whole = (
            manifest.key == spec.key
            and files.keys() == manifest.files.keys()
            and all(
                path.stat().st_size == manifest.files[name]["bytes"]
                and (not content or sha256_of(path) == manifest.files[name]["sha256"])
                for name, path in files.items()
            )
        )
    except (OSError, ValueError, ArtifactError):  # text that is no UTF-8 is a ValueError
        return None
    return Artifact(spec=spec, folder=folder, manifest=manifest) if whole else None


def make(spec: ArtifactSpec, session: Session, fill: Callable[[Path], dict[str, Any] | None]) -> tuple[Artifact, bool]:
    """The artifact, and whether it was made now: `fill(folder)` writes its files and returns facts for the manifest.

    Waits while another process makes the same one. A broken one is replaced. When `fill` raises, nothing stays.
    """
    root = Path(session.job.artifact_dir)
    with locked(spec, root):
        found = find(spec, root, content=True)
        if found is not None:
            return found, False
        making, folder = making_folder(spec, root), spec.folder(root)
        for leftover in (making, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            manifest = _fill(spec, session, fill, making)
            (making / MANIFEST).write_text(manifest.to_json())
            _flush(making / MANIFEST)
            making.rename(folder)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        _flush(folder.parent)
        return Artifact(spec=spec, folder=folder, manifest=manifest), True


def clear_interrupted(spec: ArtifactSpec, root: Path) -> None:
    """Remove what a maker that was killed has left, unless somebody else is making it again."""
    if making_folder(spec, root).exists():
        with locked(spec, root, wait=False) as held:
            if held:
                shutil.rmtree(making_folder(spec, root), ignore_errors=True)


def attach(session: Session) -> None:
    """Give the session the artifacts of its stack; a checkpoint among them is what will be loaded.

    Raises `ArtifactError` where one is missing: the supervisor has it made before the cell runs.
    """
    for item in wanted(session.job):
        _take(item, session)


def make_wanted(session: Session, maker: str) -> tuple[Artifact, bool]:
    """Make the artifact that the technique `maker` of the session's stack asks for; those before it must be there."""
    technique = optimizations()[maker]
    for item in wanted(session.job):
        if item.technique.name == maker:
            fill = partial(technique.make_artifact, item.technique, session)
            return make(item.spec, session, fill)
        _take(item, session)
    raise ArtifactError(f"no technique {maker!r} with an artifact in {session.job.cell.stack}")


def makers(stack: Stack) -> list[str]:
    """Names of its techniques that may want an artifact: for forecasts and limits, where the model is not at hand."""
    return [name for name in stack.names() if type(optimizations()[name]).artifact is not Optimization.artifact]


def builders(stack: Stack) -> list[str]:
    """Names of its techniques that may have something compiled before they run."""
    ours = Optimization.kernels_to_build
    return [name for name in stack.names() if type(optimizations()[name]).kernels_to_build is not ours]


def _take(item: Wanted, session: Session) -> None:
    """Give the session what lies in the store; a checkpoint is what it will load."""
    root = Path(session.job.artifact_dir)
    found = find(item.spec, root)
    if found is None:
        raise ArtifactError(f"the artifact of {item.technique} is not whole in {item.spec.folder(root)}")
    session.artifacts[item.technique.name] = found
    if item.spec.checkpoint:
        session.load_options.checkpoint = str(found.folder)


def _fill(
    spec: ArtifactSpec, session: Session, fill: Callable[[Path], dict[str, Any] | None], folder: Path
) -> Manifest:
    from tasks.metrics.memory import peak_bytes, reset_peaks

    reset_peaks(session)
    began = time.perf_counter()
    facts = fill(folder) or {}
    session.synchronize()
    made_s = time.perf_counter() - began
    on_device, on_host = peak_bytes(session)
    written = plain_files(folder)
    if not written:
        raise ArtifactError(f"{spec.maker} wrote nothing into its folder")
    if (folder / MANIFEST).exists():
        raise ArtifactError(f"{spec.maker} wrote {MANIFEST}, which is the name of the store's own file")
    for path in written.values():
        _flush(path)
    return Manifest(
        key=spec.key, maker=spec.maker, inputs=spec.inputs, base=spec.base,
        files={name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in written.items()},
        made_s=made_s, peak_bytes=on_device or on_host, peak_host_bytes=on_host, device=session.job.device.name,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"), made_for=run_name(session.job),
        versions=dict(session.job.device.packages), facts=facts,
    )  # fmt: skip


def making_folder(spec: ArtifactSpec, root: Path) -> Path:
    return root / spec.maker / f".{spec.key}.making"


@contextmanager
def locked(spec: ArtifactSpec, root: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the artifact's lock, which the kernel frees when its holder dies; False if it is taken and not waited for.

    The lock's file stays: removing it would let a third process lock a new one beside somebody who waits on the old.
    """
    path = root / spec.maker / f".{spec.key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _flush(path: Path) -> None:
    """To the disk: a rename must not come to rest before the bytes it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
