"""Quality on a real card: floors are small, batches of questions agree with single ones, tasks run where it is."""

from __future__ import annotations

import json
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import find
from tasks.device import DeviceInfo
from tasks.job import CellJob
from tasks.models.text import TEXT_DIR, multiple_choice
from tasks.probe import host_cpu
from tasks.quality import QualityReading, judge, make_reference, reference_spec
from tasks.quality_choices import answer
from tasks.supervisor import Supervisor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


def job(bench: Any, card: DeviceInfo, folder: Path, stack: str, **changes: Any) -> CellJob:
    import torch

    from tasks.row import Row
    from tasks.session import Session

    made: CellJob = bench.job(
        bench.cell("prefill", stack, bench.POCKET), device=card, artifact_dir=str(folder), run_id=stack,
        **{"quality_tokens": 4096, "quality_choices": 200, **changes},
    )  # fmt: skip
    make_reference(Session(job=made, device=torch.device("cuda"), row=Row()))
    return made


@pytest.mark.parametrize(("stack", "most"), [("fp32", 1e-6), ("bf16", 0.01), ("fp16", 0.001)])
def test_divergence_lies_above_its_floor(
    bench: Any, card: DeviceInfo, folder: Path, stack: str, most: float, torch_settings: None
) -> None:
    with bench.live(job(bench, card, folder, stack), calls=0) as session:
        reading = judge(session)
    assert isinstance(reading, QualityReading)
    assert reading.kl_divergence is not None and reading.kl_divergence_floor is not None
    assert 0 <= reading.kl_divergence_floor < 1e-8
    assert 0 <= reading.kl_divergence < most
    if stack != "fp32":
        assert reading.kl_divergence > reading.kl_divergence_floor
    assert reading.accuracy is not None and 0.4 < reading.accuracy < 0.9
    assert reading.accuracy_floor is not None and reading.accuracy_floor <= 0.01
    assert abs(reading.accuracy_difference or 0.0) <= 0.03


def test_batches_answer_as_single_questions(bench: Any, card: DeviceInfo, folder: Path, torch_settings: None) -> None:
    asked = multiple_choice()[:100]
    with bench.live(job(bench, card, folder, "fp32"), calls=0) as session:
        together, apart = (answer(session, asked, rows) for rows in (32, 1))
    for name in ("answers", "answers_per_token"):
        assert (together[name] != apart[name]).sum() <= 1, "a tie may fall either way by rounding"


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra quality")
def test_tasks_on_the_card(bench: Any, card: DeviceInfo, folder: Path, torch_settings: None) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "lines.jsonl").write_bytes((TEXT_DIR / "choices.jsonl").read_bytes())
    (folder / "tasks" / "lines.yaml").write_text(
        "task: lines\ndataset_path: json\ndataset_kwargs: {data_files: {validation: lines.jsonl}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: '{{ctx}}'\n"
        "doc_to_target: '{{label}}'\ndoc_to_choice: '{{endings}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc_norm, aggregation: mean, higher_is_better: true}]\n"
    )
    wanted = {"quality_tasks": ("lines",), "quality_tasks_path": str(folder / "tasks"), "quality_tasks_limit": 200}
    with bench.live(job(bench, card, folder, "bf16", **wanted), calls=0) as session:
        reading = judge(session)
    assert isinstance(reading, QualityReading)
    assert reading.lm_eval is not None, reading.reasons
    figure = json.loads(reading.lm_eval)["lines"]["acc_norm"]
    assert figure["n"] == reading.choices == 200
    assert figure["value"] == pytest.approx(reading.accuracy, abs=0.011)


def test_a_full_card_leaves_the_reference_to_its_host(bench: Any, card: DeviceInfo, tmp_path: Path) -> None:
    import torch

    cell = bench.cell("prefill", "bf16", bench.POCKET)
    asked = bench.job(cell, device=card, artifact_dir=str(tmp_path / "store"), quality=True, quality_tokens=1024)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(free - 64 * 2**20, 0), dtype=torch.uint8, device="cuda")
    with closing(Supervisor(card, cpus=bench.CPUS, log_path=tmp_path / "log", work_dir=tmp_path)) as slot:
        assert slot.measure(asked).row["outcome"] != "ok"
        found = find(reference_spec(asked), tmp_path / "store")
        assert found is not None and found.manifest.device == host_cpu().name
        del taken
        torch.cuda.empty_cache()
        row = slot.measure(asked).row
    assert row["quality_reference_device"] == host_cpu().name
    assert 0 < row["kl_divergence"] < 0.01
