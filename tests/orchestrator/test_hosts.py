"""Several hosts for real: network namespaces on this machine, four kinds of node, the real command beside the head."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.hosts import Host, Hosts, allowed

TAGS = ("a100", "rtx3090", "rtx4060", "cpu")
SWEEP = """
name: hosts
models: [pocket]
workloads: [{kind: prefill, batch_size: 1, sequence_length: [%s]}]
optimizations: [baseline, bf16]
hardware: [%s]
quality: false
rounds: 1
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not allowed(), reason="network namespaces are not allowed here"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        for tag in TAGS[:3]:
            made.add(tag)
        yield made
    finally:
        made.close()


@pytest.fixture
def run(hosts: Hosts, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(sweep: str) -> subprocess.Popen[str]:
        (tmp_path / "sweep.yaml").write_text(sweep)
        process = hosts.inside(
            sys.executable, "-m", "orchestrator", "run", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"),
            "--address", hosts.address, "--wait-nodes", "5m", "--json",
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def rows(out: Path, tools: Any) -> list[dict[str, Any]]:
    return [record["row"] for record in tools.journal(out, "row")]


def isolated(host: Host) -> list[psutil.Process]:
    """Runners, fork servers and isolated processes of a host: whoever holds an accelerator is one of them."""
    found = []
    for process in host.processes():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "ray::Runner" in line or "tasks.forkserver" in line or "tasks.child" in line:
            found.append(process)
    return found


def test_four_kinds_of_node(hosts: Hosts, run: Any, tmp_path: Path, tools: Any) -> None:
    process = run(SWEEP % ("16", ", ".join(TAGS)))
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["outcomes"] == {"ok": 8}
    found = rows(tmp_path / "out", tools)
    assert Counter(row["hardware"] for row in found) == dict.fromkeys(TAGS, 2)
    slots = {record["block_id"]: record["slot"] for record in tools.journal(tmp_path / "out", "block")}
    assert len({slots[row["block_id"]] for row in found}) == 4
    assert all(row["attempt"] == 1 for row in found)


def test_a_host_is_cut_off_and_returns(hosts: Hosts, run: Any, tmp_path: Path, tools: Any) -> None:
    out, host = tmp_path / "out", hosts.hosts[1]
    process = run(SWEEP % ("16, 32, 48", "rtx3090"))
    tools.wait_for(lambda: rows(out, tools), 300, "the first row", process)
    assert isolated(host)
    host.cut_off()
    tools.wait_for(lambda: tools.journal(out, "fault"), 120, "the loss of the host", process)
    kept = rows(out, tools)
    host.come_back()
    # what it was doing must not hold the accelerator when the host is back: its old raylet learns that it was given up
    tools.wait_for(lambda: not isolated(host), 120, "the end of the old runner")
    host.start()
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    found = rows(out, tools)
    assert found[: len(kept)] == kept
    assert max(Counter((row["cell_id"], row["round"]) for row in found).values()) == 1
    assert Counter(row["outcome"] for row in found) == {"ok": len(found)} and len({r["cell_id"] for r in found}) == 6
    assert any("its node is gone" in record["reason"] for record in tools.journal(out, "fault"))
    assert len({record["slot"] for record in tools.journal(out, "block")}) == 2


def test_the_head_is_lost_and_the_same_command_goes_on(hosts: Hosts, run: Any, tmp_path: Path, tools: Any) -> None:
    out, host, sweep = tmp_path / "out", hosts.hosts[0], SWEEP % ("16, 32, 48", "a100")
    first = run(sweep)
    tools.wait_for(lambda: rows(out, tools), 300, "the first row", first)
    hosts.lose_head()
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 2, stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(f"benchmatrix: the head of the Ray cluster at {hosts.address} is gone: "), stderr
    assert "Traceback" not in stderr
    kept = rows(out, tools)
    assert 0 < len(kept) < 6
    tools.wait_for(lambda: not isolated(host), 150, "the end of the runner that lost its head")
    host.crash()
    hosts.start_head()
    host.start()
    again = run(sweep)
    stdout, stderr = again.communicate(timeout=600)
    assert again.returncode == 0, stderr
    found = rows(out, tools)
    assert found[: len(kept)] == kept
    assert max(Counter((row["cell_id"], row["round"]) for row in found).values()) == 1
    assert json.loads(stdout)["outcomes"] == {"ok": 6}
