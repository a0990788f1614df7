"""Results behind a URI: complete there, continued from there by another machine, never written by two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import load, load_plan, load_samples
from orchestrator import mirror as module
from orchestrator.durable import StoreError, StoreLocked
from orchestrator.journal import read_journal
from orchestrator.mirror import Mirror
from orchestrator.store import Store
from tasks.job import RunResult
from tasks.uri import DRIVER, RemoteFolder, UriError, check_uri

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-1"


def result(number: int, samples: bool = True) -> RunResult:
    row = {"schema_version": 1, "cell_id": f"cell{number:04d}", "round": 0, "outcome": "ok", "result_key": KEY,
           "profile": "quick", "machine_key": "m", "started_at": f"2026-01-01T00:00:{number:02d}"}  # fmt: skip
    series = {"cell_id": row["cell_id"], "round": 0, "result_key": KEY, "measured_in": "latency", "label": "",
              "values_ms": [1.0, 2.0], "ended_s": [0.1, 0.2]}  # fmt: skip
    return RunResult(row=row, samples=[series] if samples else [])


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'bucket' / 'results'}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Become the machine of that name: it has a disk of its own."""

    def become(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    become("one")
    return become


def run(uri: str, numbers: range) -> Mirror:
    """A driver that records these rows and ends."""
    with Mirror(uri, interval_s=1000) as opened, Store.open(opened.directory) as store:
        store.write_sweep("name: x\n")
        for number in numbers:
            store.add(result(number))
    return opened


def contents(uri: str) -> dict[str, bytes]:
    remote = RemoteFolder.open(uri)
    return {name: remote.read(name) for name in remote.sizes()}


def broken(*arguments: object) -> bytes:
    raise UriError("no route")


def test_everything_is_there_in_the_end(uri: str, machine: Any) -> None:
    opened = run(uri, range(5))
    names = set(RemoteFolder.open(uri).sizes())  # the claim is gone, and samples are merged
    assert names == {"journal/000000.jsonl", "rows/part-000000.parquet", "samples/part-000000.parquet", "sweep.yaml"}
    rows = load(uri)
    assert len(rows) == 5 and set(rows["result_dir"]) == {uri}
    assert len(load_samples(uri)) == 5 and load_plan(uri) is None
    assert RemoteFolder.open(uri).read("journal/000000.jsonl") == (opened.directory / "journal.jsonl").read_bytes()


def test_another_machine_goes_on(uri: str, machine: Any) -> None:
    run(uri, range(3))
    machine("two")
    second = run(uri, range(3, 6))
    assert any("Continuing from" in text for text in second.repairs)
    assert [record["row"]["cell_id"] for record in read_journal(second.directory / "journal.jsonl")] == [
        f"cell{number:04d}" for number in range(6)
    ]
    assert len(load(uri)) == 6 and len(load_samples(uri)) == 6


def test_the_same_machine_goes_on_with_what_was_not_copied(uri: str, machine: Any) -> None:
    first = run(uri, range(2))
    with Store.open(first.directory) as store:  # as if the driver had been killed before it could copy
        store.add(result(2))
    second = run(uri, range(3, 4))
    assert not second.repairs
    assert len(load(uri)) == 4


def test_working_copies_that_differ_are_both_kept(uri: str, machine: Any) -> None:
    first = run(uri, range(2))
    with Store.open(first.directory) as store:
        store.add(result(2))
    machine("two")
    run(uri, range(5, 7))
    machine("one")
    again = run(uri, range(8, 9))
    assert any("it was kept as" in text for text in again.repairs)
    (aside,) = [path for path in again.directory.parent.iterdir() if path != again.directory]
    assert len(load(aside)) == 3
    assert set(load(uri)["cell_id"]) == {"cell0000", "cell0001", "cell0005", "cell0006", "cell0008"}


def test_the_journal_goes_over_in_segments(uri: str, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1000)
    written: list[str] = []
    write = RemoteFolder.write
    monkeypatch.setattr(RemoteFolder, "write", lambda self, name, data: (written.append(name), write(self, name, data)))
    with Mirror(uri, interval_s=1000) as opened, Store.open(opened.directory) as store:
        for number in range(20):
            store.add(result(number, samples=False))
            opened.copy()
    segments = [name for name in RemoteFolder.open(uri).sizes() if name.startswith("journal/")]
    assert len(segments) >= 5
    # a full segment is never sent again: every row sends the last one, and one more when it is filled
    assert len([name for name in written if name.startswith("journal/")]) <= 20 + len(segments)
    machine("two")
    assert len(list(read_journal(run(uri, range(20, 21)).directory / "journal.jsonl"))) == 21


def test_a_record_that_is_being_written_is_left_for_the_next_time(uri: str, machine: Any) -> None:
    with Mirror(uri, interval_s=1000) as opened:
        opened.directory.mkdir(parents=True, exist_ok=True)
        journal = opened.directory / "journal.jsonl"
        journal.write_bytes(b'{"kind":"a"}\n{"kind":')
        opened.copy()
        assert RemoteFolder.open(uri).read("journal/000000.jsonl") == b'{"kind":"a"}\n'
        with journal.open("ab") as file:
            file.write(b'"b"}\n')
        opened.copy()
        assert RemoteFolder.open(uri).read("journal/000000.jsonl") == b'{"kind":"a"}\n{"kind":"b"}\n'


class TestClaim:
    def test_two_drivers(self, uri: str, machine: Any) -> None:
        with Mirror(uri, interval_s=1000):
            machine("two")
            with pytest.raises(StoreLocked, match="is being written by process"):
                Mirror(uri)
        Mirror(uri).close()

    def claim(self, uri: str, **changes: Any) -> None:
        from orchestrator.durable import utc_now

        claim = {"token": "x", "pid": 1, "host": "elsewhere", "seen": utc_now(), **changes}
        RemoteFolder.open(uri).write(DRIVER, json.dumps(claim).encode())

    def test_of_a_driver_that_died_here_or_long_ago(self, uri: str, machine: Any) -> None:
        import socket

        with subprocess.Popen([sys.executable, "-c", ""]) as dead:
            dead.wait()
        self.claim(uri, host=socket.gethostname(), pid=dead.pid)
        Mirror(uri).close()
        self.claim(uri, seen="2026-01-01T00:00:00+00:00")
        Mirror(uri).close()
        self.claim(uri)
        with pytest.raises(StoreLocked, match="on elsewhere"):
            Mirror(uri)

    def test_taken_over_while_silent(self, uri: str, machine: Any) -> None:
        opened = Mirror(uri, interval_s=1000)
        self.claim(uri)
        with pytest.raises(StoreLocked, match="was taken over"):
            opened.close()

    def test_taken_over_and_given_back_while_silent(self, uri: str, machine: Any) -> None:
        said: list[str] = []
        silent = Mirror(uri, say=said.append, interval_s=1000)
        with Store.open(silent.directory) as store:
            store.add(result(0))
            silent.copy()
            self.claim(uri, seen="2026-01-01T00:00:00+00:00")
            machine("two")
            run(uri, range(1, 5))
            theirs = contents(uri)
            store.add(result(9))
        with pytest.raises(StoreLocked, match="a driver that has ended since") as caught:
            silent.close()
        assert str(silent.directory) in str(caught.value)
        assert contents(uri) == theirs
        assert set(load(silent.directory)["cell_id"]) == {"cell0000", "cell0009"}

    def test_the_journal_grew_under_a_claim_that_looks_like_ours(self, uri: str, machine: Any) -> None:
        opened = Mirror(uri, interval_s=1000)
        with Store.open(opened.directory) as store:
            store.add(result(0))
            opened.copy()
            remote = RemoteFolder.open(uri)
            remote.write("journal/000000.jsonl", remote.read("journal/000000.jsonl") + b'{"kind":"theirs"}\n')
            theirs = contents(uri)
            store.add(result(1))
        with pytest.raises(StoreLocked, match="has changed its journal"):
            opened.close()
        assert contents(uri) == theirs

    def test_the_copier_gives_up_what_was_taken_over(self, uri: str, machine: Any) -> None:
        said: list[str] = []
        opened = Mirror(uri, say=said.append, interval_s=0.05)
        with opened._copying:  # not between its look at the claim and its own
            RemoteFolder.open(uri).delete(DRIVER)
        opened._thread.join(60.0)
        assert not opened._thread.is_alive() and len(said) == 1 and "nothing more is copied" in said[0]
        with pytest.raises(StoreLocked):
            opened.close()
        assert DRIVER not in RemoteFolder.open(uri).sizes()

    @pytest.mark.parametrize("content", [b"", b"{}", None])
    def test_one_that_cannot_be_read_now_is_no_takeover(
        self, uri: str, machine: Any, content: bytes | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = Mirror(uri, interval_s=1000)
        remote = RemoteFolder.open(uri)
        claim = remote.read(DRIVER)
        with monkeypatch.context() as patched:
            if content is None:
                patched.setattr(RemoteFolder, "read", broken)
            else:
                remote.write(DRIVER, content)
            with pytest.raises(UriError):
                opened.copy()
            if content is None:
                machine("two")
                with pytest.raises(UriError, match="no route"):
                    Mirror(uri)
        remote.write(DRIVER, claim)
        opened.close()
        assert DRIVER not in remote.sizes()

    def test_what_was_carried_out_though_reported_as_failed(
        self, uri: str, machine: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
        opened = Mirror(uri, interval_s=1000)
        with Store.open(opened.directory) as store:
            store.add(result(0))
        failed: set[tuple[str, str]] = set()

        def reported_as_failed(call: Any) -> Any:
            def wrapped(self: RemoteFolder, name: str, *data: bytes) -> None:
                call(self, name, *data)
                if name in ("journal/000000.jsonl", DRIVER) and (call.__name__, name) not in failed:
                    failed.add((call.__name__, name))
                    raise UriError("timeout")

            return wrapped

        for name in ("write", "delete"):
            monkeypatch.setattr(RemoteFolder, name, reported_as_failed(getattr(RemoteFolder, name)))
        monkeypatch.setattr(module, "_CLOSING_TRIES", 5)
        opened.close()
        assert len(failed) == 3 and len(load(uri)) == 1 and DRIVER not in RemoteFolder.open(uri).sizes()


def test_a_store_that_cannot_be_reached_is_waited_for(uri: str, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    opened = Mirror(uri, say=said.append, interval_s=0.05)
    broken = True
    write = RemoteFolder.write

    def flaky(self: RemoteFolder, name: str, data: bytes) -> None:
        if broken:
            raise UriError("no route")
        write(self, name, data)

    monkeypatch.setattr(RemoteFolder, "write", flaky)
    with Store.open(opened.directory) as store:
        store.add(result(0))
        heard, deadline = threading.Event(), time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            heard.wait(0.05)
        heard.wait(0.3)  # it goes on trying, and says it once
    assert len(said) == 1 and "no route" in said[0] and str(opened.directory) in said[0]
    with pytest.raises(StoreError, match="The results are whole in") as caught:
        opened.close()
    assert "run the same command again" in str(caught.value)
    broken = False
    RemoteFolder.open(uri).delete(DRIVER)
    run(uri, range(1, 2))
    assert len(load(uri)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/x", "begins with s3://, gs://, file://"),
        ("s3://", "names no bucket"),
        ("s3://key:secret@bucket/x", "no credentials in a URI"),
        ("s3://bucket/x?secret_key=secret", "no credentials in a URI"),
    ],
)  # fmt: skip
def test_bad_uris(text: str, message: str) -> None:
    with pytest.raises(UriError, match=message) as caught:
        check_uri(text)
    assert "secret@" not in str(caught.value) and "=secret" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_from_two_machines(uri: str, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "models: [pocket]\nworkloads: [{kind: prefill, batch_size: 1, sequence_length: [16, 32]}]\n"
        "optimizations: [baseline]\nrounds: 1\nquality: false\n"
    )

    def benchmatrix(disk: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
            timeout=400, check=False, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / disk)},
        )  # fmt: skip

    first = benchmatrix("one", "run", sweep, "--out", uri, "--only", "sequence_length=16")
    assert first.returncode == 0, first.stderr
    assert f"results: {uri}" in first.stdout
    status = benchmatrix("two", "status", uri)
    assert "1 ok, 1 missing" in status.stdout and "ended" in status.stdout, status.stdout + status.stderr
    second = benchmatrix("two", "run", sweep, "--out", uri, "--json")
    document = json.loads(second.stdout.splitlines()[-1])
    assert (document["runs"], document["outcomes"], document["out"]) == (1, {"ok": 2}, uri), second.stderr
    table = benchmatrix("three", "table", uri, "--format", "csv")
    assert table.returncode == 0 and len(table.stdout.splitlines()) >= 3, table.stderr
