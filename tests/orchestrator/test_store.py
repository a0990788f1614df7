"""The result folder: readable at any moment, nothing acknowledged lost, nothing doubled, repaired at opening."""

import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from orchestrator import parts, store
from orchestrator.journal import read_journal
from orchestrator.schema import rows_schema, samples_schema
from orchestrator.store import Store, StoreFull, StoreLocked
from tasks.job import RunResult
from tasks.row import columns


def result(number, round_=0, samples=0, **values):
    cell_id = f"cell{number:012d}"
    row = {
        "schema_version": 1,
        "cell_id": cell_id,
        "round": round_,
        "outcome": "ok",
        "wall_s": 1.5,
        "steady": True,
        "flags": ["drift", "launch_bound"],
        "invalid_reasons": [],
        "null_reasons": "{}",
        "threads": number,
        **values,
    }
    series = {
        "cell_id": cell_id,
        "round": round_,
        "result_key": "key",
        "measured_in": "latency",
        "label": "",
        "values_ms": [random.random() for _ in range(samples)],
        "ended_s": [0.1] * samples,
    }
    return RunResult(row=row, samples=[series] if samples else [])


def seen(folder):
    """(cell_id, round) of the rows that a plain reader sees, sorted."""
    frame = pd.read_parquet(folder / "rows")
    return sorted(zip(frame["cell_id"], frame["round"], strict=True))


def expected(count):
    return [(f"cell{number:012d}", 0) for number in range(count)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def eager(monkeypatch):
    """Batches are due at once, so that a short test sees many of them."""
    monkeypatch.setattr(store, "BATCH_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(store, "BATCH_SHARE", 0.0)
    monkeypatch.setattr(store, "BATCH_ROWS", 5)
    monkeypatch.setattr(parts, "PART_ROWS", 20)


def filled(folder, count, **options):
    with Store.open(folder) as opened:
        for number in range(count):
            opened.add(result(number, **options))


def test_a_plain_reader_works_from_the_first_moment_with_the_declared_schema(folder):
    with Store.open(folder) as opened:
        frame = pd.read_parquet(folder / "rows")
        assert len(frame) == 0
        assert list(frame.columns) == list(columns())
        opened.add(result(1))
    schema = pq.read_schema(folder / "rows" / "part-000000.parquet").remove_metadata()
    assert schema.equals(rows_schema())
    types = {name: str(schema.field(name).type) for name in ("cell_id", "round", "wall_s", "steady", "flags")}
    assert types == {
        "cell_id": "string",
        "round": "int64",
        "wall_s": "double",
        "steady": "bool",
        "flags": "list<element: string>",
    }
    row = pq.read_table(folder / "rows").to_pylist()[0]
    assert (row["flags"], row["invalid_reasons"], row["reason"]) == (["drift", "launch_bound"], [], None)


def test_fifty_rows_or_ten_seconds_make_a_batch(folder, monkeypatch):
    opened = Store.open(folder)
    for number in range(50):
        assert len(seen(folder)) == 0
        opened.add(result(number))
    assert len(seen(folder)) == 50
    opened.add(result(50))
    opened.tick()
    assert len(seen(folder)) == 50
    later = time.monotonic() + 10
    monkeypatch.setattr(time, "monotonic", lambda: later)
    opened.tick()
    assert len(seen(folder)) == 51
    opened.close()


def test_parts_are_bounded_in_rows_and_number(folder, eager):
    filled(folder, 107)
    sizes = [pq.read_metadata(path).num_rows for path in sorted((folder / "rows").iterdir())]
    assert sizes == [20, 20, 20, 20, 20, 7]
    assert seen(folder) == expected(107)


def test_a_second_result_for_a_cell_and_round_stays_in_the_journal(folder):
    with Store.open(folder) as opened:
        opened.add(result(1, wall_s=1.0))
        opened.add(result(1, wall_s=2.0))
    with Store.open(folder) as opened:
        opened.add(result(1, wall_s=3.0))
    assert seen(folder) == [("cell000000000001", 0)]
    assert pd.read_parquet(folder / "rows")["wall_s"].tolist() == [1.0]
    assert [record["kind"] for record in read_journal(folder / "journal.jsonl")] == ["row", "discarded", "discarded"]


@pytest.mark.parametrize(
    "bad", [{"no_such_column": 1}, {"wall_s": float("inf")}, {"threads": "four"}, {"cell_id": "../../etc"}]
)
def test_what_is_not_a_row_is_refused_before_anything_is_written(folder, bad):
    with Store.open(folder) as opened:
        with pytest.raises((KeyError, TypeError, ValueError)):
            opened.add(result(1, **bad))
        opened.add(result(1))
    assert len(list(read_journal(folder / "journal.jsonl"))) == 1


def test_records_can_be_read_again_and_again(folder):
    with Store.open(folder) as opened:
        opened.note("run", run_id="a", version=1)
        opened.add(result(1))
        assert len(opened.records) == 0
    with Store.open(folder) as opened:
        assert len(opened.records) == 2
        opened.note("end")
        for _ in range(2):
            assert [record["kind"] for record in opened.records] == ["run", "row"]
        with pytest.raises(ValueError):
            opened.note("row")


def test_samples_are_durable_before_their_row_and_end_in_one_part(folder, eager):
    opened = Store.open(folder)
    for number in range(3):
        opened.add(result(number, samples=4))
    assert len(list((folder / "samples" / "_pending").iterdir())) == 3
    for number in range(3, 23):
        opened.add(result(number, samples=4))
        assert len(list((folder / "samples" / "_pending").iterdir())) < 5
    opened.close()
    assert [path.name for path in (folder / "samples").glob("*.parquet")] == ["part-000000.parquet"]
    table = pq.read_table(folder / "samples")
    assert table.schema.remove_metadata().equals(samples_schema())
    assert sorted(table["cell_id"].to_pylist()) == [cell for cell, _ in expected(23)]
    assert pd.read_parquet(folder / "samples")["values_ms"].str.len().tolist() == [4] * 23


def test_sample_parts_are_bounded_in_size(folder, eager, monkeypatch):
    monkeypatch.setattr(parts, "SAMPLES_PART_BYTES", 5000)
    filled(folder, 40, samples=10)
    assert len(list((folder / "samples").glob("*.parquet"))) > 1
    assert len(pd.read_parquet(folder / "samples")) == 40


def test_a_kill_between_samples_and_journal_leaves_no_samples_without_a_row(folder, eager):
    opened = Store.open(folder)
    opened.add(result(0, samples=3))
    opened.add(result(1, samples=3))
    opened.close(compact=False)
    pending = folder / "samples" / "_pending"
    shutil.copy(pending / "cell000000000000-0.parquet", pending / "cell000000000077-0.parquet")
    Store.open(folder).close()
    assert sorted(pd.read_parquet(folder / "samples")["cell_id"]) == [cell for cell, _ in expected(2)]


def test_a_kill_inside_a_merge_leaves_no_samples_doubled(folder):
    opened = Store.open(folder)
    for number in range(4):
        opened.add(result(number, samples=3))
    pending = folder / "samples" / "_pending"
    shutil.copytree(pending, folder / "copy")
    opened.close()
    shutil.copytree(folder / "copy", pending, dirs_exist_ok=True)
    Store.open(folder).close()
    assert sorted(pd.read_parquet(folder / "samples")["cell_id"]) == [cell for cell, _ in expected(4)]
    assert not list(pending.iterdir())


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)


def other_rows(path):
    pq.write_table(pq.read_table(path).slice(0, 3), path)


def older_schema(path):
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["wall_s"]), path)


@pytest.mark.parametrize("damage", [cut_short, flip, other_rows, older_schema, os.unlink])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_part_is_made_again_from_the_journal(folder, eager, damage, number):
    filled(folder, 50)
    original = pq.read_table(folder / "rows")
    damage(folder / "rows" / f"part-{number:06d}.parquet")
    opened = Store.open(folder)
    assert bool(opened.repairs) == (number < 2 or damage in (cut_short, flip))
    assert pq.read_table(folder / "rows").equals(original)
    opened.add(result(50))
    opened.close()
    assert seen(folder) == expected(51)
    opened = Store.open(folder)
    assert opened.repairs == []
    opened.close()


def test_a_row_that_only_the_journal_lost_is_taken_from_its_part(folder, eager):
    filled(folder, 30)
    path = folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:10], b"\xff" + lines[10][1:], *lines[11:]]))
    with Store.open(folder) as opened:
        assert any("cell000000000010" in sentence for sentence in opened.repairs)
    assert seen(folder) == expected(30)
    path.unlink()
    Store.open(folder).close()
    assert seen(folder) == expected(30)
    assert len(list(read_journal(path))) == 30


@pytest.mark.parametrize("damage", [cut_short, flip])
def test_damaged_samples_are_set_aside(folder, damage):
    filled(folder, 3, samples=5)
    damage(folder / "samples" / "part-000000.parquet")
    with Store.open(folder) as opened:
        assert "samples/part-000000.parquet is damaged" in opened.repairs[0]
        opened.add(result(3, samples=5))
    assert pd.read_parquet(folder / "samples")["cell_id"].tolist() == ["cell000000000003"]


def test_two_drivers_on_one_folder(folder):
    opened = Store.open(folder)
    with pytest.raises(StoreLocked, match=rf"process {os.getpid()} on .* choose another --out\.$"):
        Store.open(folder)
    script = "import sys; from pathlib import Path; from orchestrator.store import Store; Store.open(Path(sys.argv[1]))"
    second = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert "StoreLocked" in second.stderr
    opened.close()
    assert not (folder / ".lock").exists()
    Store.open(folder).close()


def test_plan_and_sweep(folder):
    planned = {"cell_id": "a", "rounds": 3, "decision": "run", "estimated_s": 1.5, "needs": ["cuda"]}
    with Store.open(folder) as opened:
        opened.write_plan([planned, {"cell_id": "b", "decision": "unsupported", "reason": "no GPU"}])
        opened.write_sweep("name: one\n")
        opened.write_sweep("name: one\n")
        opened.write_sweep("name: two\n")
        opened.write_sweep("name: three\n")
    frame = pd.read_parquet(folder / "plan.parquet")
    assert frame["cell_id"].tolist() == ["a", "b"]
    assert frame["reason"].isna().tolist() == [True, False]
    assert frame["needs"][0] == '["cuda"]'
    assert {"group_id", "workload_point", "hardware_requested", "estimated_s"} <= set(frame.columns)
    texts = {path.name: path.read_text() for path in folder.glob("sweep*.yaml")}
    assert texts == {"sweep.yaml": "name: three\n", "sweep-1.yaml": "name: one\n", "sweep-2.yaml": "name: two\n"}


def test_another_sweep_in_the_folder_is_said(folder):
    with Store.open(folder) as opened:
        opened.write_sweep("name: one\n")
        opened.write_sweep("name: one\nseed: 1\n")
        assert opened.repairs == []
        opened.write_sweep("name: two\n")
        assert len(opened.repairs) == 1 and "holds the sweep one as well: its rows are kept" in opened.repairs[0]


def test_an_empty_plan_is_a_table_too(folder):
    with Store.open(folder) as opened:
        opened.write_plan([])
    assert len(pd.read_parquet(folder / "plan.parquet")) == 0


def test_readers_never_see_a_row_missing_or_doubled(folder, eager):
    opened = Store.open(folder)
    problems: list[str] = []
    done = threading.Event()

    def read():
        while not done.is_set():
            at_least = visible
            try:
                rows = seen(folder)
            except Exception as error:
                problems.append(repr(error))
                return
            if rows != expected(len(rows)) or len(rows) < at_least:
                problems.append(f"{len(rows)} rows, {at_least} were written")

    visible = 0
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(120):
        opened.add(result(number, samples=2))
        visible = number + 1 - len(opened._buffer)
    opened.close()
    done.set()
    reader.join()
    assert problems == []
    assert seen(folder) == expected(120)


@pytest.fixture
def file_size_limit():
    """The kernel refuses to let a file grow, in the middle of a write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[1] if size is None else size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_for_a_part_keeps_the_row_and_tries_again(folder, eager, file_size_limit):
    opened = Store.open(folder)
    for number in range(4):
        opened.add(result(number))
    file_size_limit(4000)  # the journal still fits, a part does not
    opened.add(result(4))
    with pytest.raises(StoreFull, match=r"^No space left to write .*part-000000\.parquet.*\.$"):
        opened.tick()
    assert seen(folder) == []
    assert not list((folder / "rows").glob(".*"))
    file_size_limit(None)
    opened.tick()
    assert seen(folder) == expected(5)
    opened.close()


def test_no_space_for_the_journal_records_nothing_of_the_run(folder, file_size_limit):
    opened = Store.open(folder)
    opened.add(result(0))
    size = (folder / "journal.jsonl").stat().st_size
    file_size_limit(size + 20)
    with pytest.raises(StoreFull):
        opened.add(result(1))
    with pytest.raises(StoreFull):
        opened.close()
    file_size_limit(None)
    with Store.open(folder) as again:
        assert len(again.records) == 1
        assert seen(folder) == expected(1)
        again.add(result(1))
    assert seen(folder) == expected(2)


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from orchestrator import parts, store
    from tasks.job import RunResult
    store.BATCH_PAUSE_SECONDS, store.BATCH_SHARE, store.BATCH_ROWS = 0.0, 0.0, 3
    parts.PART_ROWS, parts.SAMPLES_PART_BYTES = 10, 6000
    opened = store.Store.open(Path(sys.argv[1]))
    number = sum(record["kind"] == "row" for record in opened.records)
    print("open", flush=True)
    while True:
        identity = {"cell_id": f"cell{number:012d}", "round": 0}
        series = dict(identity, result_key="", measured_in="latency", label="", values_ms=[0.1] * 9, ended_s=[0.1] * 9)
        opened.add(RunResult(row=dict(identity, outcome="ok"), samples=[series]))
        opened._journal.flush()
        number += 1
        print(number, flush=True)
""")


def test_kill_at_any_moment_loses_and_doubles_nothing(folder, monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 10)
    acknowledged = 0
    root = Path(__file__).parents[2]
    for round_ in range(40):
        if round_ >= 5 and acknowledged > 10:  # a loaded machine writes less between two kills
            break
        command = [sys.executable, "-c", WRITER, folder]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        time.sleep(0.05 + 0.017 * round_)
        writer.kill()
        rest = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait()
        acknowledged = int(rest[-1]) if rest else acknowledged
        assert len(seen(folder)) == len(set(seen(folder)))  # a reader before anything is repaired
        opened = Store.open(folder)
        rows = seen(folder)
        assert rows == expected(len(rows))
        assert len(rows) >= acknowledged
        opened.close()  # samples that still waited for their part are in it now
        if rows:
            samples = pd.read_parquet(folder / "samples")
            assert sorted(zip(samples["cell_id"], samples["round"], strict=True)) == rows
    assert acknowledged > 10
