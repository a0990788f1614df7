"""Reading sweep files: forms, defaults, paths, overrides, and what is shipped."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.sweep import SweepError, load_sweep, make_sweep, shipped

ROOT = Path(__file__).parents[2]
GOOD = """\
models: [pocket]
workloads:
  - {kind: prefill, batch_size: [1, 8]}
  - {kind: decode}
optimizations:
  - baseline
  - bf16+sdpa-flash
"""


def test_defaults(tmp_path: Path, written: Any) -> None:
    sweep = load_sweep(written(GOOD))
    assert (sweep.name, sweep.baseline, sweep.hardware, sweep.profile) == ("mine", "baseline", ["local"], "quick")
    assert (sweep.rounds_per_cell, sweep.limits.cell_timeout_s, sweep.limits.memory_budget_bytes) == (3, 600, None)
    assert sweep.quality.enabled
    assert sweep.seed == 0
    assert sweep.search_path[0] == str(tmp_path)


def test_complete_example_of_the_decisions(tmp_path: Path, written: Any, checkpoint: Any) -> None:
    checkpoint(tmp_path / "ckpt", "model.safetensors", config='{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "nets.py").write_text("def make(): ...\n")
    text = """
        name: llama-1b
        models: [pocket, "random:llama-3.2-1b", {id: mine, path: ./ckpt}, {id: hub, hub: org/name, revision: sha},
                 {id: net, factory: "nets:make"}, "random:./ckpt/config.json"]
        workloads:
          - {kind: prefill, batch_size: [1, 8], sequence_length: 512}
          - {kind: decode, batch_size: 1, prompt_tokens: 512, new_tokens: [128, 256]}
          - {kind: train_step, batch_size: 8, sequence_length: 512}
        optimizations: [baseline, bf16, bf16+sdpa-flash, "bf16+compile:mode=max-autotune", nf4]
        hardware: [a100-80gb, rtx3090, rtx4060, cpu]
        baseline: bf16
        profile: quick
        exclude: [{model: pocket, optimization: nf4}]
        limits: {cell_timeout_s: 600, memory_budget_gib: 0.5}
        quality: {tokens: 2000}
    """
    config = tmp_path / "ckpt" / "config.json"
    config.write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    sweep = load_sweep(written(text))
    specs = {model.id: model.spec for model in sweep.models}
    assert [(spec.source, spec.kind) for spec in specs.values()] == [
        ("pocket", "language"),
        ("random", "language"),
        ("path", "language"),
        ("hub", "unknown"),
        ("factory", "module"),
        ("random", "language"),
    ]
    assert specs["mine"].reference == str(tmp_path / "ckpt")
    assert specs["random:./ckpt/config.json"].reference == str(config)
    assert specs["hub"].revision == "sha"
    assert sweep.limits.memory_budget_bytes == 2**29


def test_vision_checkpoint(tmp_path: Path, written: Any, checkpoint: Any) -> None:
    folder = checkpoint(tmp_path / "c", "m.safetensors", config='{"architectures": ["ResNetForImageClassification"]}')
    sweep = load_sweep(written(GOOD.replace("[pocket]", f"[{{path: {folder}}}]")))
    assert (sweep.models[0].id, sweep.models[0].spec.kind) == ("c", "vision")


def test_paths_of_a_shipped_sweep_are_those_of_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    (model,) = load_sweep("quickstart", ["models=[{id: mine, path: ./checkpoint}]"]).models
    assert model.spec.reference == str(folder)


def test_overrides(written: Any) -> None:
    path = written(GOOD)
    sweep = load_sweep(
        path,
        [
            "profile=standard",
            "limits.cell_timeout_s=60",
            "models=[random:gpt2]",
            "workloads.0.batch_size=[2]",
            "rounds=7",
        ],
    )
    assert (sweep.profile, sweep.limits.cell_timeout_s, sweep.rounds_per_cell) == ("standard", 60, 7)
    assert [model.id for model in sweep.models] == ["random:gpt2"]
    assert [point["batch_size"] for point in sweep.workloads[0].points()] == [2]


def test_an_override_of_an_alias_changes_one_place(written: Any) -> None:
    text = (
        "models: [pocket]\noptimizations: [bf16]\nworkloads:\n"
        "  - &a {kind: decode, batch_size: 1}\n  - {<<: *a, batch_size: 2}\nlimits: &l {cell_timeout_s: 5}\n"
    )
    sweep = load_sweep(written(text), ["workloads.0.batch_size=4"])
    assert [workload.axes["batch_size"] for workload in sweep.workloads] == [[4], [2]]


SCALES = (
    GOOD
    + """\
scales:
  small:
    workloads.0.batch_size: 1
    limits: {cell_timeout_s: 30}
  headline:
    profile: publish
    models: [pocket, random:gtp2]
"""
)


def test_scales(written: Any) -> None:
    path = written(SCALES + "limits: {memory_budget_gib: 1}\n")
    assert load_sweep(path).workloads[0].axes["batch_size"] == [1, 8]
    small = load_sweep(path, ["scale=small"])
    assert small.workloads[0].axes["batch_size"] == [1]
    assert (small.limits.cell_timeout_s, small.limits.memory_budget_gib) == (30, 1)
    assert load_sweep(path, ["limits.cell_timeout_s=7", "scale=small"]).limits.cell_timeout_s == 7


def test_mistakes_in_scales(problems: Any) -> None:
    assert problems(SCALES, "scale=headlin") == [
        "--set scale=headlin: unknown scale 'headlin'; did you mean 'headline'?"
    ]
    assert problems(SCALES, "scale=headline") == ["mine.yaml:14: unknown architecture 'gtp2'; did you mean 'gpt2'?"]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_sweeps_are_valid_and_survive_being_written(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.name == name
    again = make_sweep(yaml.safe_load(sweep.to_yaml()), folder=Path(sweep.search_path[0]))
    assert again == sweep
    assert shipped()[name].read_text().startswith("#")


def test_includes_survive_being_written(tmp_path: Path, written: Any) -> None:
    text = GOOD + (
        "include:\n  - {model: 'random:gpt2', workload: {kind: decode, batch_size: 4}, optimization: bf16}\n"
        "  - {workload: decode, optimization: [nf4, int8], hardware: cpu}\n"
        "exclude: [{workload: {kind: prefill, batch_size: 8}, optimization: 'bf16*'}]\nquality: false\n"
    )
    sweep = load_sweep(written(text))
    assert make_sweep(yaml.safe_load(sweep.to_yaml()), folder=tmp_path) == sweep


@pytest.mark.parametrize(
    ("file", "name"), [("my sweep (2).yaml", "my-sweep-2-"), ("_x.yaml", "x"), ("\u00e4.yaml", "sweep")]
)
def test_a_name_from_any_file(file: str, name: str, written: Any) -> None:
    assert load_sweep(written(GOOD, file)).name == name


def test_overrides_from_python() -> None:
    document = {"models": ["pocket"], "workloads": [{"kind": "decode"}], "optimizations": ["bf16"], "limits": {}}
    sweep = make_sweep(document, overrides=["limits.cell_timeout_s=5", "seed=3"])
    assert (sweep.limits.cell_timeout_s, sweep.seed, document["limits"]) == (5, 3, {})


def test_from_python() -> None:
    document = {"models": ["pocket"], "workloads": [{"kind": "decode"}], "optimizations": ["bf16", "bf61"]}
    with pytest.raises(SweepError, match=r"^sweep: unknown optimization 'bf61'; did you mean 'bf16'\?$"):
        make_sweep(document)


def test_nothing_heavy_is_imported(written: Any) -> None:
    path = written(GOOD.replace("sdpa-flash", "sdpa-flahs"))
    heavy = ["torch", "ray", "scipy", "pandas", "pyarrow", "transformers", "numpy"]
    code = (
        "import json, sys, orchestrator.expand, orchestrator.placement\n"
        "from orchestrator.sweep import SweepError, load_sweep\n"
        f"try: load_sweep({path!r})\nexcept SweepError: print(json.dumps(sorted(set({heavy}) & set(sys.modules))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert json.loads(result.stdout) == []


QUESTION = '{"ctx": "a", "endings": ["b", "c"], "label": 1}\n'


def test_questions_lie_beside_the_sweep(tmp_path: Path, written: Any) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "questions.jsonl").write_text(QUESTION * 3)
    text = GOOD + "quality: {choices_file: own/questions.jsonl}\n"
    sweep = load_sweep(written(text))
    assert sweep.quality.choices_file == str(tmp_path / "own" / "questions.jsonl")
    assert sweep.quality.choices == 3, "all of a file, unless the sweep says otherwise"
    assert load_sweep(written(text), ["quality.choices=2"]).quality.choices == 2
    assert load_sweep(written(GOOD)).quality.choices == 100
    assert load_sweep(written(sweep.to_yaml(), "again.yaml")) == sweep


def test_a_bad_question_is_refused_with_its_line(tmp_path: Path, problems: Any) -> None:
    (tmp_path / "questions.jsonl").write_text(QUESTION + "\n" + QUESTION.replace("1}", "2}"))
    expected = "label 2 is out of range: the 2 endings are numbered 0 to 1"
    text = GOOD + "quality:\n  tokens: 512\n  choices_file: questions.jsonl\n"
    assert problems(text) == [f"mine.yaml:10: choices_file: questions.jsonl:3: {expected}"]


def test_tasks_are_found_in_their_folder(tmp_path: Path, problems: Any, written: Any) -> None:
    folder = tmp_path / "tasks" / "deep"
    folder.mkdir(parents=True)
    assert "there is no YAML file in" in problems(GOOD + "quality: {tasks: [one], tasks_path: tasks}\n")[0]
    (folder / "one.yaml").write_text('tag: [first, second]\n"task": "one" # a name\nfun: !function utils.fun\n')
    (folder / "two.yml").write_text("group: all\ntask:\n  - one\n  - three\ntag: third\n")
    for name in ("one", "three", "all", "first", "second", "third"):
        quality = load_sweep(written(f"{GOOD}quality: {{tasks: [{name}], tasks_path: tasks}}\n")).quality
        assert (quality.tasks, quality.tasks_path) == ([name], str(tmp_path / "tasks"))
    (line,) = problems(GOOD + "quality:\n  tasks_path: tasks\n  tasks:\n    - one\n    - treee\n")
    assert line == "mine.yaml:12: tasks has no task 'treee'; did you mean 'three'?"
    (line,) = problems(GOOD + "quality:\n  tasks_path: tasks\n  tasks: [one, one]\n")
    assert line == "mine.yaml:10: task 'one' is given twice"


def test_devices_without_the_harness_are_named() -> None:
    from orchestrator.sweep_quality import Quality, without_harness
    from tasks.device import DeviceInfo

    bare = DeviceInfo(kind="cpu", name="a CPU", tag="cpu", memory_bytes=1)
    able = DeviceInfo(kind="cpu", name="a CPU", tag="other", memory_bytes=1, packages={"lm-eval": "0.4.13"})
    wanted = Quality.model_construct(tasks=["one"])
    (message,) = without_harness(wanted, [bare, bare, able])
    assert "not installed on cpu:" in message
    assert "pip install '.[quality]'" in message
    assert without_harness(wanted, [able]) == []
    assert without_harness(Quality(), [bare]) == []
