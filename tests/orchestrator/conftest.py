"""A real Ray cluster of several raylets on this machine, and the real command as a subprocess."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STORE_BYTES = 80 * 2**20
SWEEP = """
name: tiny
models: [pocket]
workloads: [{kind: prefill, batch_size: 1, sequence_length: 16}]
optimizations: [baseline, bf16]
rounds: 1
quality: false
"""


class RayletCluster:
    """Raylets with labels; accelerators are only declared, so their cells run on the CPU as simulated ones."""

    def __init__(self) -> None:
        # Ray keeps the first token that a process has seen, so every cluster of this process has the same
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
        from ray.cluster_utils import Cluster

        # the head carries no tag of its own that a test asks for, and no test kills it
        self._cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=self._arguments("cpu", 0)))
        self.address: str = self._cluster.address

    def add(self, tag: str, accelerators: int = 1, **more: Any) -> Any:
        return patiently(lambda: self._cluster.add_node(wait=False, **self._arguments(tag, accelerators), **more))

    def kill(self, node: Any) -> None:
        """The node dies without a word: raylet first, its workers with it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()

    @staticmethod
    def _arguments(tag: str, accelerators: int) -> dict[str, Any]:
        return {
            "num_cpus": 1,
            "num_gpus": accelerators,
            "labels": {"bench/hw": tag},
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        }


def patiently(start: Callable[[], Any]) -> Any:
    """Its result, at the third attempt at the latest: Ray gives a raylet 30 s to start, its agents 15.

    Ray leaves the processes of an attempt that failed; they are ended, lest they join the cluster later.
    """
    for _ in range(2):
        before = descendants(os.getpid())
        try:
            return start()
        except Exception as error:
            print(f"a raylet did not start: {error}", file=sys.stderr)
            for process in set(descendants(os.getpid())) - set(before):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
    return start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayletCluster]:
    raylets = RayletCluster()
    yield raylets
    raylets.close()


@pytest.fixture
def command() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m orchestrator ...` in its own process group; whatever is left at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *map(str, arguments)],
            cwd=ROOT,
            text=True,
            start_new_session=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str = SWEEP) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return path

    return write


def journal(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    path = out / "journal.jsonl"
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record for record in records if kind in (None, record["kind"])]


def wait_for(
    condition: Callable[[], Any],
    timeout_s: float = 60.0,
    what: str = "it",
    process: subprocess.Popen[str] | None = None,
) -> Any:
    """The first true answer; fails at the limit, or as soon as `process` has ended without it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended = process is not None and process.poll() is not None
        found = condition()
        if found:
            return found
        if ended and process is not None:
            stdout, stderr = process.communicate()
            raise AssertionError(f"ended with {process.returncode} before {what}:\n{stdout}\n{stderr}")
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {timeout_s:.0f} s")


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def tools() -> Any:
    """`journal`, `wait_for`, `descendants`: plain functions, as a fixture since tests are no package."""
    from types import SimpleNamespace

    return SimpleNamespace(journal=journal, wait_for=wait_for, descendants=descendants, SWEEP=SWEEP)


@pytest.fixture
def checkpoint() -> Callable[..., Path]:
    """Makes a folder with `config.json` and empty files of these names."""

    def make(folder: Path, *files: str, config: str = "{}") -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config)
        for file in files:
            (folder / file).touch()
        return folder

    return make


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Writes a file and returns its path."""

    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def problems(written: Callable[..., str], tmp_path: Path) -> Callable[..., list[str]]:
    """The lines of the error that a sweep with this text is refused with, the folder cut off."""
    from orchestrator.sweep import SweepError, load_sweep

    def refused(text: str, *overrides: str) -> list[str]:
        with pytest.raises(SweepError) as caught:
            load_sweep(written(text), overrides)
        return str(caught.value).replace(f"{tmp_path}/", "").split("\n")

    return refused
