"""Whole cells of GGUF through the supervisor: a file made once, rows that miss nothing a torch row has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import wanted
from tasks.job import CellJob
from tasks.supervisor import Supervisor

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def job(bench: Any, store: Path) -> Any:
    def make(stack: str, kind: str = "decode", **changes: Any) -> CellJob:
        axes = {"prompt_tokens": 32, "new_tokens": 8} if kind == "decode" else {"sequence_length": 64}
        cell = bench.cell(kind, stack, bench.POCKET, batch_size=1, **axes)
        asked = {"quality": True, "quality_tokens": 1024, "quality_choices": 10, **changes}
        return bench.job(cell, artifact_dir=str(store), **asked)  # type: ignore[no-any-return]

    return make


def measured(supervisor: Supervisor, job: CellJob) -> dict[str, Any]:
    row = supervisor.measure(job).row
    # how steady this machine is at the moment is not what is tested
    assert row["outcome"] in ("ok", "invalid"), row.get("reason")
    assert not [reason for reason in row.get("invalid_reasons") or [] if "evidence" in reason]
    assert all(proof["ok"] for proof in json.loads(row["evidence"]).values()), row["evidence"]
    return row


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_its_row_has_what_a_torch_row_has(supervisor: Supervisor, job: Any, kind: str) -> None:
    plain, row = (measured(supervisor, job(stack, kind)) for stack in ("fp32", "gguf:type=Q8_0"))
    lacking = {key for key, value in plain.items() if value is not None and row.get(key) is None}
    # a percentile takes a number of samples, which the speed of the machine decides
    assert lacking <= {"reason", "invalid_reasons", "flags", "latency_ms_p95", "latency_ms_p99"}, "every metric"
    assert row["parameters_total"] == plain["parameters_total"]
    assert row["flops"] == plain["flops"]
    assert row["model_bytes"] == pytest.approx(plain["model_bytes"] * 8.5 / 32, rel=0.01)
    assert row["perplexity"] == pytest.approx(plain["perplexity"], rel=0.01)
    assert 0 < row["kl_divergence"] < 0.01
    assert row["peak_host_bytes"] > row["model_bytes"]
    assert row["artifact_bytes"] >= row["model_bytes"]
    if kind == "decode":
        assert row["time_to_first_token_ms"] > row["time_per_output_token_ms"] > 0
        assert row["kv_cache_bytes"] == 256 * 5 * 2 * 2 * 64 * 2


def test_made_once_and_again_when_broken(supervisor: Supervisor, job: Any) -> None:
    first = measured(supervisor, job("gguf:type=Q4_0", "prefill"))
    assert not first["artifact_reused"]
    assert first["artifact_made_s"] > 0
    assert measured(supervisor, job("gguf:type=Q4_0", "decode", quality=False))["artifact_reused"]
    (made,) = wanted(job("gguf:type=Q4_0"))
    file = made.spec.folder(Path(job("gguf").artifact_dir)) / "model.gguf"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert not measured(supervisor, job("gguf:type=Q4_0", "prefill", quality=False, round=1))["artifact_reused"]
    assert file.read_bytes() == content, "made anew it is the same file"


def test_one_file_for_each_type_and_checkpoint(job: Any) -> None:
    def key(stack: str) -> str:
        return wanted(job(stack))[-1].spec.key

    keys = {key(stack) for stack in ("gguf", "gguf:type=Q8_0", "prune+gguf", "prune:ratio=0.5+gguf")}
    assert len(keys) == 4
    assert key("gguf:type=Q4_K_M") == key("fp32+gguf") == key("gguf")


def test_named_tasks_take_it_as_a_model(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-evaluation-harness is given the runtime's model where it expects one of transformers."""
    from tasks.quality_tasks import run_tasks

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps({"q": f"import o{number}", "c": ["s\n", "zzz"], "a": 0}) for number in range(6)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'mine.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\n'
        "doc_to_target: a\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    cell = bench.cell("prefill", "gguf:type=F16", bench.POCKET)
    with bench.live(bench.job(cell, quality_tasks=("mine",), quality_tasks_path=str(tmp_path))) as session:
        found = run_tasks(session)
    assert isinstance(found, str), found
    assert json.loads(found)["mine"]["acc"]["value"] == 1.0
