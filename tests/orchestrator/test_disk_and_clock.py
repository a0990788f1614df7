"""A disk that is full and then free, and a clock that jumps, under the real command."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

SWEEP = """
name: conditions
models: [pocket]
workloads: [{kind: prefill, batch_size: 1, sequence_length: [16, 32]}]
optimizations: [baseline, bf16]
quality: false
rounds: 1
"""
DISK_BYTES = 2 * 2**20

# Every reading of the wall clock is moved by the seconds in $CLOCK_OFFSET_FILE; the monotonic clock stays true.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    char text[32] = {0};
    const char *path = getenv("CLOCK_OFFSET_FILE");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    if (clock_gettime(CLOCK_REALTIME, &precise)) return -1;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (out) *out = precise.tv_sec;
    return precise.tv_sec;
}
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True, check=False).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def clock(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A file that holds how far the wall clock is off, and the environment in which it is."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no C compiler")
    source, library, offset = tmp_path / "clock.c", tmp_path / "clock.so", tmp_path / "offset"
    source.write_text(CLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    offset.write_text("0")
    return offset, {
        **os.environ, "LD_PRELOAD": str(library), "RAY_LD_PRELOAD_ON_WORKERS": "1", "CLOCK_OFFSET_FILE": str(offset),
    }  # fmt: skip


def fill(folder: Path, keep: int = 0) -> Path:
    """Take all the space there is but `keep` bytes."""
    filler = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with suppress(OSError), filler.open("wb", buffering=0) as file:  # somebody else may take some of it meanwhile
        file.write(b"\0" * max(free - keep, 0))
    return filler


def rows(out: Path, tools: Any) -> list[dict[str, Any]]:
    return [record["row"] for record in tools.journal(out, "row")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_disk_is_full_and_then_free(
    command: Callable[..., Any], sweep_file: Callable[[str], Path], small_disk: Path, tmp_path: Path, tools: Any
) -> None:
    out, heard = small_disk / "out", tmp_path / "stderr"
    with heard.open("w") as stderr:
        process = command("run", sweep_file(SWEEP), "--out", out, stderr=stderr)
    tools.wait_for(lambda: rows(out, tools), 240, "the first row", process)
    filler = fill(small_disk)
    tools.wait_for(lambda: "Waiting for space." in heard.read_text(), 90, "the word about the disk", process)
    assert heard.read_text().count("Waiting for space.") == 1
    kept = rows(out, tools)
    assert len(kept) < 4
    filler.unlink()
    process.wait(400)
    assert process.returncode == 0, heard.read_text()
    found = rows(out, tools)
    assert found[: len(kept)] == kept
    assert Counter((row["outcome"], row["attempt"]) for row in found) == {("ok", 1): 4}
    assert len({(row["cell_id"], row["round"]) for row in found}) == 4
    import pandas as pd

    assert len(pd.read_parquet(out / "rows")) == 4
    assert not tools.journal(out, "fault")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_at_the_start_is_one_sentence(
    command: Callable[..., Any], sweep_file: Callable[[str], Path], small_disk: Path
) -> None:
    fill(small_disk)
    process = command("run", sweep_file(SWEEP), "--out", small_disk / "out")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.startswith("benchmatrix: No space left to write "), stderr
    assert len(stderr.strip().splitlines()) == 1


def years(found: list[dict[str, Any]]) -> list[int]:
    return [datetime.fromisoformat(row["started_at"]).astimezone(UTC).year for row in found]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_clock_jumps(
    command: Callable[..., Any], sweep_file: Callable[[str], Path], clock: tuple[Path, dict[str, str]], tmp_path: Path,
    tools: Any,
) -> None:  # fmt: skip
    offset, environment = clock
    out, sweep = tmp_path / "out", sweep_file(SWEEP.replace("[16, 32]", "[16, 32, 48, 64, 80]"))
    first = command("run", sweep, "--out", out, env=environment)
    tools.wait_for(lambda: rows(out, tools), 240, "the first row", first)
    offset.write_text(str(-40 * 86400))
    tools.wait_for(lambda: len(rows(out, tools)) >= 2, 240, "the second row", first)
    offset.write_text(str(3 * 365 * 86400))
    # the next row may have begun before the jump
    tools.wait_for(lambda: max(years(rows(out, tools))) - min(years(rows(out, tools))) >= 3, 240, "a late row", first)
    first.kill()
    first.wait()
    kept = rows(out, tools)
    offset.write_text(str(-365 * 86400))
    again = command("run", sweep, "--out", out, env=environment)
    _, stderr = again.communicate(timeout=400)
    assert again.returncode == 0, stderr
    found = rows(out, tools)
    assert max(years(found)) - min(years(found)) >= 3, "the clock did not jump"
    assert all(0 < row["wall_s"] < 120 for row in found), [row["wall_s"] for row in found]
    assert all(row["outcome"] == "ok" and row["attempt"] == 1 for row in found)
    # what was there counts although it is from the future, and its block, whole or not, is not measured twice
    assert found[: len(kept)] == kept
    assert len({(row["cell_id"], row["round"]) for row in found}) == len(found)
    whole = [row for row in kept if sum(other["block_id"] == row["block_id"] for other in kept) == 2]
    assert len(whole) >= 2
    assert not {row["group_id"] for row in whole} & {row["group_id"] for row in found[len(kept) :]}
