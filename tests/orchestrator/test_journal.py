"""The journal: whole records or none, whatever ends the process, and a tail that repairs itself."""

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from orchestrator import journal as module
from orchestrator.durable import StoreError, StoreFull
from orchestrator.journal import GROUP_RECORDS, GROUP_SECONDS, Journal, read_journal


def numbers(path):
    return [record["n"] for record in read_journal(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def fill(path, count):
    journal = Journal(path)
    for n in range(count):
        journal.append({"kind": "test", "n": n})
    journal.close()


def test_records_come_back_in_order_with_sequence_and_time(path):
    fill(path, 5)
    records = list(read_journal(path))
    assert [record["sequence"] for record in records] == [1, 2, 3, 4, 5]
    assert all(record["written_at"].startswith("20") for record in records)
    fill(path, 1)
    assert list(read_journal(path))[-1]["sequence"] == 6


@pytest.mark.parametrize("tail", [b'{"n": 99', b'{"n": 99}', b"\0" * 100, b"no json\n", b'[1]\n{"n"'])
def test_a_torn_tail_is_cut_and_kept_beside(path, tail):
    fill(path, 3)
    with path.open("ab") as file:
        file.write(tail)
    journal = Journal(path)
    journal.append({"n": 3})
    journal.close()
    assert numbers(path) == [0, 1, 2, 3]
    assert journal.torn_bytes == len(tail)
    assert not journal.corrupt_lines
    assert path.with_name("journal.torn").read_bytes() == tail + b"\n"
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_corrupt_line_in_the_middle_is_kept_reported_and_skipped(path):
    fill(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"#" + lines[1][1:]
    path.write_bytes(b"".join(lines))
    journal = Journal(path)
    journal.append({"n": 4})
    journal.close()
    assert journal.corrupt_lines == (2,)
    assert numbers(path) == [0, 2, 3, 4]
    assert path.read_bytes().splitlines(keepends=True)[:4] == lines


def test_what_a_reader_sees_while_it_is_written_is_whole(path):
    journal = Journal(path)
    done = threading.Event()

    def write():
        for n in range(3000):
            journal.append({"n": n, "text": "x" * (n % 500)})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        seen = numbers(path)
        assert seen == list(range(len(seen)))
    writer.join()
    journal.close()
    assert len(numbers(path)) == 3000


def test_synced_at_the_latest_after_100_ms_or_64_records(path, monkeypatch):
    synced = []
    fdatasync = os.fdatasync

    def recording(descriptor):
        fdatasync(descriptor)
        synced.append(time.monotonic())

    monkeypatch.setattr(os, "fdatasync", recording)
    journal = Journal(path)
    started = time.monotonic()
    journal.append({"n": 0})
    wait_until(lambda: synced)
    assert GROUP_SECONDS < 0.1 and synced[0] - started < 5  # with slack for a loaded machine and a busy disk
    journal.flush()
    synced.clear()
    for n in range(GROUP_RECORDS * 10):
        journal.append({"n": n})
    assert len(synced) >= 10
    journal.flush()
    synced.clear()
    journal.append({"n": 0})
    journal.flush()
    assert len(synced) == 1
    journal.flush()
    assert len(synced) == 1
    journal.close()


def test_not_finite_numbers_are_refused(path):
    journal = Journal(path)
    with pytest.raises(ValueError):
        journal.append({"n": float("nan")})
    journal.append({"n": 1})
    journal.close()
    assert numbers(path) == [1]


def test_closed_is_closed(path):
    journal = Journal(path)
    journal.close()
    journal.close()
    with pytest.raises(StoreError):
        journal.append({"n": 1})


@pytest.fixture
def file_size_limit():
    """The kernel refuses to let a file grow, in the middle of a write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[1] if size is None else size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_leaves_whole_records_and_goes_on_when_there_is_some(path, file_size_limit):
    journal = Journal(path)
    written = 0
    file_size_limit(10_000)
    with pytest.raises(StoreFull, match=r"^No space left to write .*journal\.jsonl.*\.$"):
        while True:
            journal.append({"n": written, "text": "x" * 300})
            written += 1
    assert written > 10
    assert numbers(path) == list(range(written))
    assert path.read_bytes().endswith(b"\n")
    file_size_limit(None)
    journal.append({"n": written})
    journal.close()
    assert numbers(path) == list(range(written + 1))
    assert [record["sequence"] for record in read_journal(path)] == list(range(1, written + 2))


@pytest.fixture
def quota(monkeypatch):
    """While set, a sync finds no space and drops what was written since the last one, as NFS may."""
    full = threading.Event()
    synced = {}
    fdatasync = os.fdatasync

    def limited(descriptor):
        inode = os.fstat(descriptor).st_ino
        if full.is_set():
            os.ftruncate(descriptor, synced.get(inode, 0))
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        fdatasync(descriptor)
        synced[inode] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fdatasync", limited)
    monkeypatch.setattr(module, "FULL_SECONDS", 0.05)
    return full


def test_no_space_at_a_sync_loses_nothing_and_goes_on(path, quota):
    journal = Journal(path)
    for n in range(3):
        journal.append({"n": n})
    journal.flush()
    quota.set()
    journal.append({"n": 3})
    with pytest.raises(StoreFull):
        journal.flush()
    for _ in range(2):
        with pytest.raises(StoreFull):
            journal.append({"n": 4})
    quota.clear()
    journal.append({"n": 4})
    journal.flush()
    assert numbers(path) == [0, 1, 2, 3, 4] and journal.size == path.stat().st_size
    journal.append({"n": 5})
    journal.close()
    assert [(record["sequence"], record["n"]) for record in read_journal(path)] == [(n + 1, n) for n in range(6)]


def test_no_space_at_the_sync_of_a_full_group_repeats_no_record(path, quota, monkeypatch):
    monkeypatch.setattr(module, "GROUP_SECONDS", 60.0)
    journal = Journal(path)
    quota.set()
    for n in range(GROUP_RECORDS):
        journal.append({"n": n})
    with pytest.raises(StoreFull):
        journal.append({"n": GROUP_RECORDS})
    quota.clear()
    journal.append({"n": GROUP_RECORDS})
    journal.close()
    assert numbers(path) == list(range(GROUP_RECORDS + 1))


def test_what_found_no_space_is_synced_later_without_another_call(path, quota):
    journal = Journal(path)
    quota.set()
    journal.append({"n": 0})
    wait_until(lambda: journal._failure is not None)
    quota.clear()
    wait_until(lambda: journal._failure is None)
    assert numbers(path) == [0]
    journal.append({"n": 1})
    wait_until(lambda: not journal._unsynced)
    journal.close()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_error_of_the_disk_at_a_sync_ends_it(path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    journal = Journal(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        journal.append({"n": 0})
        with pytest.raises(StoreError, match="Input/output error"):
            journal.flush()
    with pytest.raises(StoreError, match="Input/output error") as caught:
        journal.append({"n": 1})
    assert not isinstance(caught.value, StoreFull)
    with pytest.raises(StoreError):
        journal.close()


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from orchestrator.journal import Journal
    journal = Journal(Path(sys.argv[1]))
    n = journal.last_sequence
    while True:
        journal.append({"n": n, "text": "x" * 2000})
        n += 1
        if n % 7 == 0:
            journal.flush()
            print(n, flush=True)
""")


def test_kill_at_any_moment_loses_nothing_acknowledged(path):
    acknowledged = 0
    for round_ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged = int(writer.stdout.readline())
        time.sleep(0.01 + 0.013 * round_)
        writer.kill()
        rest = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait()
        acknowledged = int(rest[-1]) if rest else acknowledged
        Journal(path).close()
        seen = numbers(path)
        assert seen == list(range(len(seen)))
        assert len(seen) >= acknowledged
    assert acknowledged > 0
