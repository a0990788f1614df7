"""What measured code can do to the driver, what leaves the machine, and what is reachable: nothing it should not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SENTINEL = "hf_sentinel_abcdef0123456789"
PASSWORD = "sentinel-correct-horse"
# Whatever unpickles a Bomb leaves a file; whatever calls str() on a Name gets one that is a Bomb as well.
NETS = """
import os, sys, torch

class Bomb(Exception):
    def __reduce__(self):
        return (open, (os.environ["BOMB_MARKER"], "w"))

class Name(str):
    def __reduce__(self):
        return (open, (os.environ["BOMB_MARKER"], "w"))

class Net(torch.nn.Linear):
    def __init__(self, fails):
        super().__init__(4, 4)
        self.fails = fails

    def forward(self, x):
        if self.fails:
            raise Bomb(Name(f"401 for {os.environ['HF_TOKEN']} at {os.environ['HTTPS_PROXY']}"))
        return super().forward(x)

def announce():
    print("out", dict(os.environ))
    print("err", dict(os.environ), file=sys.stderr)
    os.system("env 1>&2")
    return lambda batch, device, seed: torch.ones(batch, 4, device=device)

def good():
    return Net(False), announce()

def bad():
    return Net(True), announce()
"""
SWEEP = """
name: trust
models: [{id: good, factory: "nets:good"}, {id: bad, factory: "nets:bad"}]
workloads: [{kind: forward, batch_size: 1}]
optimizations: [baseline]
rounds: 1
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from types import SimpleNamespace

    folder = tmp_path_factory.mktemp("trust")
    (folder / "nets.py").write_text(NETS)
    (folder / "sweep.yaml").write_text(SWEEP)
    marker = folder / "unpickled"
    secret = {"HF_TOKEN": SENTINEL, "HTTPS_PROXY": f"http://me:{PASSWORD}@proxy.invalid:3128"}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "run", str(folder / "sweep.yaml"), "--out", str(folder / "out")],
        cwd=ROOT, text=True, capture_output=True, timeout=250, check=False,
        env={**os.environ, **secret, "BOMB_MARKER": str(marker)},
    )  # fmt: skip
    records = [json.loads(line) for line in (folder / "out" / "journal.jsonl").read_text().splitlines()]
    rows = {record["row"]["model"]: record["row"] for record in records if record["kind"] == "row"}
    return SimpleNamespace(done=done, out=folder / "out", rows=rows, marker=marker)


def test_no_object_of_the_measured_code_reaches_the_driver(finished: Any) -> None:
    assert finished.rows["good"]["outcome"] == "ok"
    bad = finished.rows["bad"]
    assert (bad["outcome"], bad["error_type"]) == ("error", "Bomb")
    assert not finished.marker.exists()


def test_the_runner_answers_with_plain_data_only(tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.runner import HOME, Runner
    from orchestrator.slots import to_wire
    from tasks.probe import probe

    monkeypatch.setattr("orchestrator.runner.undo_ray", dict)  # this process is no worker of Ray's
    for name, value in (("BOMB_MARKER", str(tmp_path / "unpickled")), ("HF_TOKEN", SENTINEL), ("HTTPS_PROXY", "x")):
        monkeypatch.setenv(name, value)
    model, search_path = bench.factory(NETS.replace("def bad", "def make"))
    runner = Runner(str(tmp_path / "slot.log"), HOME)
    try:
        runner.prepare(probe().devices[-1].to_dict(), [], {})
        job = bench.job(bench.cell("forward", model=model), search_path=search_path)
        answered = runner.measure(to_wire([job], ()))
    finally:
        runner.close()
    assert type(answered) is bytes
    (answer,) = json.loads(answered)
    assert answer["row"]["error_type"] == "Bomb"
    assert_plain(answer)


def assert_plain(value: Any) -> None:
    assert type(value) in (dict, list, str, int, float, bool, type(None)), type(value)
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            assert_plain(item)


def test_secrets_are_in_nothing_that_is_kept_or_shown(finished: Any) -> None:
    logs = [file for file in (finished.out / "log").iterdir() if "out {" in file.read_text(errors="replace")]
    assert logs, "the cells' own output was not kept, so this test shows nothing"
    assert "<HF_TOKEN>" in finished.rows["bad"]["reason"]
    kept = {str(file): file.read_bytes() for file in finished.out.rglob("*") if file.is_file()}
    assert len(kept) > 5
    shown = {"stdout": finished.done.stdout.encode(), "stderr": finished.done.stderr.encode()}
    for name, content in {**kept, **shown}.items():
        for secret in (SENTINEL, PASSWORD):
            assert secret.encode() not in content, (name, secret)


@pytest.mark.slow
class TestLocalInstance:
    """A private instance is for this process alone."""

    CODE = """
import json, os, sys
from orchestrator.connection import connect
with connect():
    import ray
    print(json.dumps({"gcs": ray._private.worker.global_worker.gcs_client.address,
                      "dashboard": ray._private.worker._global_node.webui_url}), flush=True)
    sys.stdin.read()
"""

    def test_it_starts_with_its_token_also_where_ray_was_imported_before(self, tmp_path: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        code = (
            "import ray; from ray._raylet import get_authentication_mode as mode\n"
            "from orchestrator.connection import connect\n"
            "with connect(): print(int(mode()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=200, check=False,
            env={**kept, "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.stdout.strip() == "1", done.stderr[-800:]
        assert not done.stderr and not (tmp_path / ".ray").exists()

    @pytest.fixture
    def instance(self) -> Any:
        process = subprocess.Popen(
            [sys.executable, "-c", self.CODE], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdin is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()
        process.wait(60)
        process.stdout.close()

    def test_it_has_no_dashboard_and_takes_no_stranger(self, instance: Any) -> None:
        facts = instance
        assert not facts["dashboard"]
        code = f"import ray; ray.init(address={facts['gcs']!r}, logging_level='ERROR')"
        for token in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}):
            kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            stranger = subprocess.run(
                [sys.executable, "-c", code], env={**kept, **token}, text=True, capture_output=True, timeout=120
            )
            assert stranger.returncode != 0, token
            assert "ConnectionError" in stranger.stderr or "Authentication" in stranger.stderr, stranger.stderr[-500:]
