"""`submit`, `status --address` and the metrics against a real head with a job server, a token and its own folders."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.backends, pytest.mark.timeout(1200)]
UNDER_WAY = r"(?s)[1-9]\d* runs done: .* left.*/cpu \(cpu\): ((mine|net) .* round \d|starting)"
ROOT = Path(__file__).resolve().parents[2]
SENTINEL = "hf_sentinel_0123456789abcdef"
NETS = """
import layers, torch

def make():
    return layers.Layer(), lambda batch, device, seed: torch.ones(batch, 8, device=device)
"""
LAYERS = """
import torch

class Layer(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
"""
SWEEP = """
name: shipped
models:
  - {id: mine, path: ./checkpoint}
  - {id: net, factory: "nets:make"}
workloads:
  - {kind: forward, batch_size: 1}
  - {kind: prefill, batch_size: 1, sequence_length: 16}
exclude:
  - {model: net, workload: {kind: prefill}}
  - {model: mine, workload: {kind: forward}}
optimizations: [baseline]
rounds: %d
quality: false
"""


def free_ports(count: int) -> list[int]:
    """Below the range that the system gives to whoever asks for any, as Ray's own processes do."""
    found: list[int] = []
    for port in random.Random(os.getpid()).sample(range(20_000, 32_000), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found[:count]


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """`ray start --head` with the job server on loopback; nothing of another Ray on this machine is touched."""
    folder = Path(tempfile.mkdtemp(prefix="bm-head-", dir="/tmp"))
    token = secrets.token_hex(32)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_metrics_report_interval_ms": "1000", "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    gcs, dashboard, metrics, agent, client = free_ports(5)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={gcs}",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
        f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
        f"--ray-client-server-port={client}", "--num-cpus=1", "--num-gpus=0", "--labels", "bench/hw=cpu",
        f"--temp-dir={folder / 'ray'}", f"--object-store-memory={80 * 2**20}", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    found = SimpleNamespace(
        url=f"http://127.0.0.1:{dashboard}", address=f"127.0.0.1:{gcs}", metrics=f"http://127.0.0.1:{metrics}/metrics",
        environment=environment, folder=folder, token=token, agent=f"http://127.0.0.1:{agent}",
        client=f"ray://127.0.0.1:{client}",
    )  # fmt: skip
    try:
        await_head(found, process)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def await_head(head: Any, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if get(f"{head.url}/api/version", head.token):
                return
        if process.poll() is not None:
            break
        time.sleep(1.0)
    raise AssertionError((head.folder / "head.log").read_text())


def get(url: str, token: str | None = None) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture
def laptop(head: Any, tmp_path: Path) -> Any:
    """A folder with a sweep, its factory and a checkpoint, and the command as it runs there."""
    (tmp_path / "sweep.yaml").write_text(SWEEP % 1)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "layers.py").write_text(LAYERS)
    pocket = ROOT / "tasks" / "models" / "pocket"
    (tmp_path / "checkpoint").mkdir()
    for file in pocket.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "checkpoint" / file.name)
    environment = {**head.environment, "HOME": os.environ["HOME"], "HF_TOKEN": SENTINEL, "PYTHONPATH": str(ROOT)}

    def start(*arguments: object, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *map(str, arguments)], cwd=tmp_path, text=True,
            env={**environment, **changes}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return SimpleNamespace(start=start, folder=tmp_path, sweep=tmp_path / "sweep.yaml")


def finish(process: subprocess.Popen[str], timeout_s: float = 300) -> str:
    output, _ = process.communicate(timeout=timeout_s)
    return output


def read_until(process: subprocess.Popen[str], pattern: str, timeout_s: float = 240) -> str:
    assert process.stdout is not None
    deadline, text = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        text += line
        if re.search(pattern, line):
            return text
        if not line and process.poll() is not None:
            break
    raise AssertionError(f"{pattern!r} did not come:\n{text}")


def status_with(laptop: Any, address: str, pattern: str, timeout_s: float = 180) -> str:
    """What `status` says of the run that is under way, once it says this."""
    deadline, state = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        state = finish(laptop.start("status", "--address", address))
        _, found, under_way = state.partition("under way")
        if found and re.search(pattern, under_way):
            return state
    raise AssertionError(f"{pattern!r} did not come:\n{state}")


def jobs(head: Any) -> list[dict[str, Any]]:
    return [job for job in json.loads(get(f"{head.url}/api/jobs/", head.token)) if job["metadata"]]


def test_a_sweep_with_its_own_files_runs_there_and_is_followed_to_the_end(head: Any, laptop: Any) -> None:
    from analysis import load

    out = head.folder / "out-files"
    output = finish(laptop.start("submit", laptop.sweep, "--address", head.url, "--out", out))
    assert ": succeeded" in output, output
    rows = load(out)
    assert dict(zip(rows["model"], rows["outcome"], strict=True)) == {"mine": "ok", "net": "ok"}
    assert set(rows["hardware"]) == {"cpu"}
    # the cells do not depend on where the files lay on the laptop or lie on the node
    assert "shipped:models/mine" in (out / "sweep.yaml").read_text()
    (job,) = [job for job in jobs(head) if job["metadata"]["benchmatrix_out"] == str(out)]
    assert job["driver_exit_code"] == 0
    files = [file.read_text(errors="replace") for file in out.rglob("*") if file.is_file()]
    for text in (json.dumps(job), output, *files):
        assert SENTINEL not in text and head.token not in text

    again = finish(laptop.start("submit", laptop.sweep, "--address", head.url, "--out", out))
    assert ": succeeded" in again, again
    assert "2 runs are there already" in again
    assert len(load(out)) == 2


def test_the_same_command_follows_the_running_job_and_another_is_refused(head: Any, laptop: Any) -> None:
    out = head.folder / "out-twice"
    laptop.sweep.write_text(SWEEP % 6)
    command = ("submit", laptop.sweep, "--address", head.url, "--out", out, "--set", "profile=standard")
    first = laptop.start(*command)
    job_id = re.search(r"job (\S+) on", read_until(first, r"^job \S+ on")).group(1)  # type: ignore[union-attr]
    read_until(first, r"\bok\b")  # the first row: the sweep is under way
    first.send_signal(signal.SIGINT)
    output = finish(first)
    assert first.returncode == 0 and "detached" in output, output

    other = laptop.start("submit", laptop.sweep, "--address", head.url, "--out", out)
    refused = finish(other)
    assert other.returncode == 2
    assert f"job {job_id} writes {out} now" in refused and len(refused.splitlines()) == 1, refused

    for address in (head.address, head.url):  # Ray's own port, and the job server's
        # published every few seconds, and later on a machine whose disk or network is busy
        state = status_with(laptop, address, UNDER_WAY)
        assert re.search(rf"run \S+ of shipped: under way.*; results {out} on", state), state
        assert re.search(r"\d+ runs done: \d+ ok, \d+ left", state), state
        assert re.search(r"^  cpu: .* left, about \d+", state, re.M), state
    counted = exported(head, "benchmatrix_runs", outcome="ok", hardware="cpu")
    assert counted >= 1
    assert exported(head, "benchmatrix_runs_left", hardware="cpu") >= 1

    second = laptop.start(*command)
    read_until(second, f"job {job_id} does this already")
    stop(head, job_id)
    output = finish(second)
    assert second.returncode == 130 and f"job {job_id}: stopped" in output, output
    assert len({job["submission_id"] for job in jobs(head) if job["metadata"]["benchmatrix_out"] == str(out)}) == 1


def test_the_exit_status_is_that_of_run(head: Any, laptop: Any) -> None:
    out = head.folder / "out-status"
    laptop.sweep.write_text(SWEEP % 1)
    missing = laptop.start("submit", laptop.sweep, "--address", head.url, "--out", out, "--set", "hardware=[h100]")
    output = finish(missing)
    assert missing.returncode == 1 and "no device is tagged 'h100'" in output, output
    bad = laptop.start("submit", "no-such-sweep", "--address", head.url, "--out", out)
    assert "no such file" in finish(bad) and bad.returncode == 2
    locked = out / "journal.jsonl"
    assert locked.exists()
    denied = laptop.start("submit", laptop.sweep, "--address", head.url, "--out", "/proc/nowhere")
    output = finish(denied)
    assert denied.returncode == 2 and "Cannot write /proc/nowhere" in output, output


def test_without_the_token_nothing_is_taken(head: Any, laptop: Any) -> None:
    for changes in ({"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}):
        process = laptop.start("submit", laptop.sweep, "--address", head.url, "--out", "/nowhere", **changes)
        output = finish(process)
        assert process.returncode == 2 and "no Ray dashboard can be used at" in output, output
        assert len(output.splitlines()) == 1, output
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"{head.url}/api/jobs/")
    job = json.dumps({"entrypoint": "touch /nowhere"}).encode()
    for url in (f"{head.url}/api/jobs/", f"{head.agent}/api/job_agent/jobs/"):
        request = urllib.request.Request(url, data=job, headers={"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=120)
    stranger = {name: value for name, value in head.environment.items() if not name.startswith("RAY_")}
    code = f"import ray; ray.init({head.client!r}); print('came in', ray.get(ray.remote(lambda: 1).remote()))"
    entered = subprocess.run(
        [sys.executable, "-c", code], env={**stranger, "RAY_AUTH_MODE": "disabled"}, text=True, capture_output=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert entered.returncode != 0 and "came in" not in entered.stdout, entered.stdout
    refused = laptop.start("nodes", "--address", head.address, RAY_AUTH_TOKEN="f" * 64)
    output = finish(refused)
    assert refused.returncode == 2 and "is RAY_AUTH_TOKEN the cluster's?" in output, output


def exported(head: Any, name: str, **labels: str) -> float:
    """The sum of a metric's series with these labels, from the node's own endpoint; waits for the next report."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found, text = [], ""
        with contextlib.suppress(OSError):
            text = get(head.metrics)
        for line in text.splitlines():
            match = re.fullmatch(rf"ray_{name}(?:_total)?\{{(.*)\}} (\S+)", line)
            if match and all(f'{key}="{value}"' in match.group(1) for key, value in labels.items()):
                found.append(float(match.group(2)))
        if found:
            return sum(found)
        time.sleep(1.0)
    raise AssertionError([line for line in get(head.metrics).splitlines() if "benchmatrix" in line])


def stop(head: Any, job_id: str) -> None:
    request = urllib.request.Request(
        f"{head.url}/api/jobs/{job_id}/stop", method="POST", headers={"Authorization": f"Bearer {head.token}"}
    )
    urllib.request.urlopen(request, timeout=120).close()
