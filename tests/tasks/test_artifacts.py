"""The artifact store: whole or not there, made once, made again when broken, another one for every other input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import ArtifactSpec, clear_interrupted, find, make
from tasks.manifest import MANIFEST, ArtifactError
from tasks.row import Row
from tasks.session import Session

SPEC = ArtifactSpec(maker="weights", inputs={"bits": 4})


@pytest.fixture
def session(bench: Any, tmp_path: Path) -> Session:
    import torch

    job = bench.job(bench.cell("prefill"), artifact_dir=str(tmp_path / "store"))
    return Session(job=job, device=torch.device("cpu"), row=Row())


@pytest.fixture
def root(session: Session) -> Path:
    return Path(session.job.artifact_dir)


def writes(text: str = "weights") -> Callable[[Path], dict[str, Any]]:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "part").mkdir()
        (folder / "part" / "one.bin").write_text(text)
        (folder / "two.bin").write_bytes(bytes(100))
        return {"loss": 1.5}

    return fill


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in (root / SPEC.maker).iterdir() if path.suffix != ".lock")


def test_is_made_once_and_says_what_it_is(session: Session, root: Path) -> None:
    assert find(SPEC, root) is None
    made, now = make(SPEC, session, writes())
    assert now
    again, now = make(SPEC, session, writes("never written"))
    assert not now
    assert again == made == find(SPEC, root, content=True)
    assert (made.folder / "part" / "one.bin").read_text() == "weights"
    manifest = made.manifest
    assert {name: facts["bytes"] for name, facts in manifest.files.items()} == {"part/one.bin": 7, "two.bin": 100}
    assert manifest.facts == {"loss": 1.5}
    assert manifest.inputs == SPEC.inputs
    assert manifest.made_s > 0
    assert manifest.peak_bytes == manifest.peak_host_bytes > 2**20
    assert visible(root) == [SPEC.key]


def test_seconds_and_peak_are_those_of_making(session: Session) -> None:
    def fill(folder: Path) -> None:
        time.sleep(0.2)
        block = bytearray(300 * 2**20)
        block[:: 2**12] = bytes(len(block[:: 2**12])).replace(b"\0", b"\1")
        writes()(folder)

    before, _ = make(dataclasses.replace(SPEC, maker="small"), session, writes())
    large, _ = make(SPEC, session, fill)
    assert 0.2 <= large.manifest.made_s < 20
    assert large.manifest.peak_bytes - before.manifest.peak_bytes > 250 * 2**20


def rewritten(manifest: Path, **changes: Any) -> None:
    """Other fields under a digest that fits them, as somebody would who means it."""
    fields = {**json.loads(manifest.read_text()), **changes}
    del fields["digest"]
    text = json.dumps(fields, sort_keys=True)
    manifest.write_text(json.dumps({**fields, "digest": hashlib.sha256(text.encode()).hexdigest()}))


def no_files(folder: Path) -> None:
    shutil.rmtree(folder / "part")
    (folder / "two.bin").unlink()
    rewritten(folder / MANIFEST, files={})


def outside(folder: Path) -> None:
    (folder.parent / "x").write_text("x")
    rewritten(folder / MANIFEST, files=files_of(folder) | {"../x": {"bytes": 1, "sha256": sha256(b"x")}})


def linked(folder: Path) -> None:
    (folder.parent / "x").write_text("weights")
    (folder / "part" / "one.bin").unlink()
    (folder / "part" / "one.bin").symlink_to(folder.parent / "x")


def edited(folder: Path) -> None:
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "facts": {"loss": 0.5}}))


def without_digest(folder: Path) -> None:
    """As manifests were written before."""
    fields = json.loads((folder / MANIFEST).read_text())
    del fields["digest"]
    (folder / MANIFEST).write_text(json.dumps(fields))


def files_of(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["files"]
    return files


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "shorter": lambda folder: (folder / "part" / "one.bin").write_text("weight"),
    "same size": lambda folder: (folder / "part" / "one.bin").write_text("WEIGHTS"),
    "missing file": lambda folder: (folder / "part" / "one.bin").unlink(),
    "another file": lambda folder: (folder / "part" / "model.safetensors").write_text("x"),
    "a link": linked,
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "cut manifest": lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20]),
    "no text": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
    "foreign key": lambda folder: rewritten(folder / MANIFEST, key="another"),
    "other facts": edited,
    "no digest": without_digest,
    "no files": no_files,
    "outside": outside,
    "unlisted": lambda folder: rewritten(folder / MANIFEST, files={"two.bin": files_of(folder)["two.bin"]}),
    "files as a list": lambda folder: rewritten(folder / MANIFEST, files=list(files_of(folder))),
    "names only": lambda folder: rewritten(folder / MANIFEST, files=dict.fromkeys(files_of(folder))),
    "sizes as text": lambda folder: rewritten(
        folder / MANIFEST, files={name: {**facts, "bytes": "7"} for name, facts in files_of(folder).items()}
    ),
    "facts as a list": lambda folder: rewritten(folder / MANIFEST, facts=[]),
    "another field": lambda folder: rewritten(folder / MANIFEST, more=1),
    "a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "a number": lambda folder: (folder / MANIFEST).write_text("1"),
    "too deep": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_one_is_made_again(session: Session, root: Path, damage: str) -> None:
    made, _ = make(SPEC, session, writes())
    DAMAGES[damage](made.folder)
    assert (find(SPEC, root) is not None) == (damage == "same size"), "only the content tells"
    assert find(SPEC, root, content=True) is None
    again, now = make(SPEC, session, writes())
    assert now
    assert (made.folder / "part" / "one.bin").read_text() == "weights"
    assert find(SPEC, root, content=True) == again
    assert [name for name in visible(root) if name != "x"] == [SPEC.key]


def test_facts_are_kept_as_json_has_them(session: Session, root: Path) -> None:
    """A digest of what cannot be read back would find every one broken."""

    def fill(folder: Path) -> dict[str, Any]:
        writes()(folder)
        return {"pair": (1, 2), "by number": {3: "three"}, "loss": float("nan")}

    make(SPEC, session, fill)
    found = find(SPEC, root, content=True)
    assert found is not None
    assert found.manifest.facts["pair"] == [1, 2] and found.manifest.facts["by number"] == {"3": "three"}
    assert not make(SPEC, session, fill)[1]


def test_failing_leaves_nothing(session: Session, root: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half.bin").write_text("x")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        make(SPEC, session, fill)
    assert visible(root) == []
    assert find(SPEC, root) is None


def test_writing_nothing_or_a_link_is_refused(session: Session, root: Path) -> None:
    with pytest.raises(ArtifactError, match="wrote nothing"):
        make(SPEC, session, lambda folder: None)
    with pytest.raises(ArtifactError, match=r"link\.bin, which is no plain file"):
        make(SPEC, session, lambda folder: (folder / "link.bin").symlink_to("/etc/hostname"))
    with pytest.raises(ArtifactError, match=r"wrote manifest\.json"):
        make(SPEC, session, lambda folder: {"bytes": [(folder / name).write_text("x") for name in ("a", MANIFEST)]})
    assert visible(root) == []


def _interrupted(session: Session, began: Any) -> None:
    def fill(folder: Path) -> None:
        writes()(folder)
        began.set()
        time.sleep(60)

    make(SPEC, session, fill)


def test_a_killed_maker_leaves_nothing_that_counts(session: Session, root: Path) -> None:
    fork = multiprocessing.get_context("fork")
    began = fork.Event()
    maker = fork.Process(target=_interrupted, args=(session, began))
    maker.start()
    assert began.wait(30)
    assert find(SPEC, root) is None, "half of it is not it"
    clear_interrupted(SPEC, root)
    assert visible(root) == [f".{SPEC.key}.making"], "the maker still lives"
    assert maker.pid
    os.kill(maker.pid, signal.SIGKILL)
    maker.join()
    assert find(SPEC, root) is None
    clear_interrupted(SPEC, root)
    assert visible(root) == []
    assert make(SPEC, session, writes())[1]


def _race(session: Session, start: Any, made: Any) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        time.sleep(0.3)
        return writes()(folder)

    start.wait()
    _, now = make(SPEC, session, fill)
    made.put(now)


def test_racing_processes_make_it_once(session: Session, root: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start, made = fork.Barrier(4), fork.Queue()
    racers = [fork.Process(target=_race, args=(session, start, made)) for _ in range(4)]
    for racer in racers:
        racer.start()
    found = [made.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(found) == [False, False, False, True]
    assert find(SPEC, root, content=True) is not None
    assert visible(root) == [SPEC.key]


def test_every_part_of_a_spec_is_in_its_key() -> None:
    others = [
        dataclasses.replace(SPEC, maker="other"),
        dataclasses.replace(SPEC, inputs={"bits": 8}),
        dataclasses.replace(SPEC, checkpoint=False),
        dataclasses.replace(SPEC, base="b" * 24),
    ]
    assert len({SPEC.key, *(other.key for other in others)}) == 5
    assert SPEC.key == ArtifactSpec(maker="weights", inputs={"bits": 4}).key
    assert {field.name for field in dataclasses.fields(SPEC)} == {"maker", "inputs", "checkpoint", "base"}
