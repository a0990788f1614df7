"""The artifact store: whole or not there, made once, made again when broken, another one for every other input."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import MANIFEST, ArtifactError, ArtifactSpec, clear_interrupted, find, make
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


@pytest.mark.parametrize("damage", ["shorter", "same size", "missing file", "manifest", "foreign key"])
def test_a_broken_one_is_made_again(session: Session, root: Path, damage: str) -> None:
    made, _ = make(SPEC, session, writes())
    file, manifest = made.folder / "part" / "one.bin", made.folder / MANIFEST
    if damage == "shorter":
        file.write_text("weight")
    elif damage == "same size":
        file.write_text("WEIGHTS")
        assert find(SPEC, root) is not None, "only the content tells"
    elif damage == "missing file":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "key": "another"}))
    assert find(SPEC, root, content=True) is None
    again, now = make(SPEC, session, writes())
    assert now
    assert file.read_text() == "weights"
    assert find(SPEC, root, content=True) == again
    assert visible(root) == [SPEC.key]


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
