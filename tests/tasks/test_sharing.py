"""Artifacts as streams: what is received is whole or not there, and nothing is sent while something is measured."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactSpec, find
from tasks.manifest import MANIFEST, Manifest
from tasks.sharing import CHUNK_BYTES, disturbing, machine_folder, parts, receive, undisturbed

SPEC = ArtifactSpec(maker="gptq", inputs={"bits": 4})


def store(root: Path) -> Path:
    """A node's store with one artifact: a file of several chunks, an empty one, and one in a folder."""
    import hashlib

    folder = SPEC.folder(root)
    contents = {"model.bin": b"ab" * CHUNK_BYTES, "empty": b"", "more/vocabulary.txt": b"words"}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest = Manifest(
        key=SPEC.key, maker=SPEC.maker, inputs=SPEC.inputs, base=None, made_s=1.0, peak_bytes=1, peak_host_bytes=1,
        files={name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
               for name, content in contents.items()},
        device="cpu", made_at="", made_for="", versions={},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def hidden(root: Path) -> list[str]:
    return [path.name for path in (root / SPEC.maker).iterdir() if path.name.endswith(".making")]


def test_arrives_as_it_was(tmp_path: Path) -> None:
    folder, there = store(tmp_path / "here"), tmp_path / "there"
    sent = list(parts(folder))
    assert sent[-1][0] == MANIFEST and max(len(chunk) for _, chunk in sent) == CHUNK_BYTES
    assert receive(SPEC, there, sent)
    found = find(SPEC, there, content=True)
    assert found is not None and hidden(there) == []
    for file in (path for path in folder.rglob("*") if path.is_file()):
        assert (found.folder / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_a_broken_one_is_replaced_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    sent, there = list(parts(store(tmp_path / "here"))), store(tmp_path / "there")
    assert receive(SPEC, tmp_path / "there", iter(()))  # nothing is asked of the stream
    for broken in (b"cut", b"xy" * CHUNK_BYTES):
        (there / "model.bin").write_bytes(broken)
        assert receive(SPEC, tmp_path / "there", sent)
        assert (there / "model.bin").read_bytes() == b"ab" * CHUNK_BYTES


@pytest.mark.parametrize("harm", ["cut", "changed", "nothing", "another", "more"])
def test_what_is_not_the_artifact_is_not_kept(tmp_path: Path, harm: str) -> None:
    sent = list(parts(store(tmp_path / "here")))
    if harm == "cut":
        sent.pop(1)
    elif harm == "changed":
        sent[0] = (sent[0][0], b"x" + sent[0][1][1:])
    elif harm == "nothing":
        sent = []
    elif harm == "more":
        sent.insert(0, ("model.safetensors", b"what the manifest has not"))
    spec = ArtifactSpec(maker="gptq", inputs={"bits": 3}) if harm == "another" else SPEC
    assert not receive(spec, tmp_path / "there", sent)
    assert find(spec, tmp_path / "there") is None and hidden(tmp_path / "there") == []
    assert not spec.folder(tmp_path / "there").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside", ""])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="outside its folder"):
        receive(SPEC, tmp_path, [("good", b"1"), (name, b"2")])
    assert hidden(tmp_path) == [] and not (tmp_path / "gptq" / "outside").exists()


def test_a_stream_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield "model.bin", b"12"
        raise ConnectionError("the node is gone")

    with pytest.raises(ConnectionError):
        receive(SPEC, tmp_path, broken())  # type: ignore[arg-type]
    assert hidden(tmp_path) == [] and find(SPEC, tmp_path) is None


def test_nothing_is_sent_while_something_is_measured(tmp_path: Path) -> None:
    sent, begun, order = threading.Event(), threading.Event(), list[str]()

    def send() -> None:
        begun.set()
        with disturbing(tmp_path):
            order.append("sent")
        sent.set()

    def measure_next() -> None:
        with undisturbed(tmp_path):
            order.append("measured next")

    with undisturbed(tmp_path):
        with undisturbed(tmp_path / "."):  # accelerators of one node may be measured together
            sender = threading.Thread(target=send)
            sender.start()
            begun.wait(60)
            assert not sent.wait(1.0)
            following = threading.Thread(target=measure_next)
            following.start()
            assert not sent.wait(0.3)
        assert order == []
    sender.join(60)
    following.join(60)
    assert order == ["sent", "measured next"], "whoever waits to send is not starved by those that measure"


def test_locks_that_cannot_be_had_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with undisturbed(tmp_path / "no" / "such" / "folder"), disturbing(tmp_path / "nowhere"):
        pass
    monkeypatch.setattr("tasks.sharing.fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    with undisturbed(tmp_path), undisturbed(tmp_path):
        pass


def test_locks_belong_to_the_machine() -> None:
    """Not to a store, which several machines may share, nor to a working directory."""
    before = set(Path.cwd().iterdir())
    with undisturbed():
        assert (machine_folder() / "measuring").exists()
    assert set(Path.cwd().iterdir()) == before
