"""Tasks of lm-evaluation-harness: what becomes of its results, and, with the extra, that it agrees with our scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks import quality_tasks
from tasks.metric import Missing
from tasks.models.text import TEXT_DIR
from tasks.quality_choices import answer, compare_answers, questions
from tasks.quality_tasks import figures, run_tasks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{endings}}}}"
{rest}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: the shipped questions as they are, and without the newline between context and ending."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (TEXT_DIR / "choices.jsonl").read_text().splitlines()[:QUESTIONS]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    rows = [json.loads(line) for line in lines]
    stripped = [{**row, "endings": [ending.strip() for ending in row["endings"]]} for row in rows]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, stripped)))
    (folder / "lines.yaml").write_text(TASK.format(name="lines", file="lines.jsonl", rest='target_delimiter: ""'))
    (folder / "words.yaml").write_text(TASK.format(name="words", file="words.jsonl", rest=""))
    return folder


def test_only_figures_are_kept() -> None:
    found = {
        "results": {
            "one": {"alias": "one", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1, "nan,none": float("nan")},
            "two": {"exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A", " ": " "},
        },
        "groups": {"both": {"alias": "both", "acc,none": 0.75, "acc_stderr,none": 0.05}},
        "n-samples": {"one": {"original": 10, "effective": 3}, "two": {"original": 4, "effective": 4}},
    }
    assert figures(found) == {
        "one": {"acc": {"value": 0.5, "stderr": 0.1, "n": 3}, "nan": {"value": None, "stderr": None, "n": 3}},
        "two": {"exact_match,strict": {"value": 1.0, "stderr": None, "n": 4}},
        "both": {"acc": {"value": 0.75, "stderr": 0.05, "n": None}},
    }


class TestWhereItCannotBe:
    def session(self, bench: Any, model: Any = None, **changes: Any) -> Any:
        job = bench.job(bench.cell("prefill", "fp32", model or bench.POCKET), **changes)
        return bench.live(job, calls=0)

    def test_not_asked(self, bench: Any) -> None:
        with self.session(bench) as session:
            found = run_tasks(session)
        assert isinstance(found, Missing)
        assert "names no tasks" in found.reason

    def test_without_the_extra(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quality_tasks, "version", lambda _: None)
        with self.session(bench, quality_tasks=("lines",)) as session:
            found = run_tasks(session)
        assert isinstance(found, Missing)
        assert found.reason == "needs lm-eval: pip install '.[quality]'"

    def test_random_weights(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quality_tasks, "version", lambda _: "0.4.13")
        with self.session(bench, bench.language, quality_tasks=("lines",)) as session:
            found = run_tasks(session)
        assert isinstance(found, Missing)
        assert "trained weights" in found.reason


# The library and what it imports warn; `datasets` leaves its files to the garbage collector.
@pytest.mark.backends
@pytest.mark.filterwarnings("default")
class TestTheLibrary:
    def live(self, bench: Any, folder: Path, stack: str = "fp32", **changes: Any) -> Any:
        wanted = {"quality_tasks": ("lines", "words"), "quality_tasks_path": str(folder), **changes}
        return bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET), **wanted), calls=0)

    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is downloaded, and nothing is left in the person's cache."""
        import datasets.config

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    @pytest.mark.parametrize("stack", ["fp32", "bf16"])
    def test_agrees_with_our_scoring(self, bench: Any, folder: Path, stack: str) -> None:
        """Its `acc_norm` is our `accuracy`, on the same file, with and without HellaSwag's space."""
        before = Path.cwd()
        with self.live(bench, folder, stack) as session:
            found = run_tasks(session)
            assert isinstance(found, str), found
            theirs = json.loads(found)
            for name in ("lines", "words"):
                job = bench.job(quality_choices_file=str(folder / f"{name}.jsonl"))
                ours = compare_answers(answer(session, questions(job)), {})
                figure = theirs[name]["acc_norm"]
                assert figure["n"] == ours["choices"] == QUESTIONS
                assert figure["value"] == pytest.approx(ours["accuracy"])
                assert figure["stderr"] == pytest.approx(ours["accuracy_stderr"] * (QUESTIONS / (QUESTIONS - 1)) ** 0.5)
                assert 0 < theirs[name]["acc"]["value"] < 1
        assert Path.cwd() == before

    def test_every_model_answers_for_itself(self, bench: Any, folder: Path) -> None:
        """No cache: the same tasks in the same process on a ruined model give other figures."""
        limited = {"quality_tasks": ("lines",), "quality_tasks_limit": 20}
        with self.live(bench, folder, **limited) as session:
            good = json.loads(str(run_tasks(session)))
            for layer in session.model.model.layers:
                layer.mlp.down_proj.weight.zero_()
            bad = json.loads(str(run_tasks(session)))
        assert good["lines"]["acc_norm"]["n"] == bad["lines"]["acc_norm"]["n"] == 20
        assert good["lines"]["acc_norm"]["value"] > bad["lines"]["acc_norm"]["value"]

    def test_a_failing_task_is_a_reason(self, bench: Any, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "broken.yaml").write_text(TASK.format(name="broken", file="none.jsonl", rest=""))
        with self.live(bench, tmp_path, quality_tasks=("broken",)) as session:
            found = run_tasks(session)
        assert isinstance(found, Missing)
        assert found.reason.startswith("lm-eval failed: ")

    def test_in_a_row(self, supervisor: Any, bench: Any, folder: Path) -> None:
        """In its own process, after everything timed, in a finished row."""
        job = bench.job(
            bench.cell("prefill", "bf16", bench.POCKET), quality=True, quality_tokens=512, quality_choices=5,
            quality_choices_file=str(folder / "words.jsonl"), quality_tasks=("words",),
            quality_tasks_path=str(folder), quality_tasks_limit=5,
        )  # fmt: skip
        row = supervisor.measure(job).row
        assert row["quality_choices"] == 5
        figure = json.loads(row["lm_eval"])["words"]["acc_norm"]
        assert figure["n"] == 5
        assert figure["value"] == pytest.approx(row["accuracy"])

    def test_names_are_checked_against_its_own_tasks(self) -> None:
        from orchestrator.sweep import SweepError, make_sweep

        content = {"models": ["pocket"], "workloads": [{"kind": "prefill"}], "optimizations": ["fp32"]}
        assert make_sweep({**content, "quality": {"tasks": ["hellaswag", "mmlu"]}}).quality.tasks
        with pytest.raises(SweepError, match="no task 'hellaswagg'; did you mean 'hellaswag"):
            make_sweep({**content, "quality": {"tasks": ["hellaswagg"]}})
