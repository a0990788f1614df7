"""Mistakes in sweep files: each is one sentence that names the line, the value and the nearest valid name."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.sweep import SweepError, load_sweep, parse_only

GOOD = """\
models: [pocket]
workloads:
  - {kind: prefill, batch_size: [1, 8]}
  - {kind: decode}
optimizations:
  - baseline
  - bf16+sdpa-flash
"""


# Each case: text of the file, then what the error says, line number included.
MISTAKES: dict[str, tuple[str, str]] = {
    "empty": ("", "mine.yaml:1: a sweep is a mapping with models, workloads and optimizations; this is empty"),
    "list": (
        "- a\n",
        "mine.yaml:1: a sweep is a mapping with models, workloads and optimizations; this is a list",
    ),
    "not yaml": (
        "models: [pocket\nworkloads: 3\n",
        "mine.yaml:2: not valid YAML: expected ',' or ']', but got ':'",
    ),
    "python tag": (
        "models: !!python/object:os.system x\n",
        "mine.yaml:1: not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object:os.system'",
    ),
    "duplicate key": (GOOD + "models: [pocket]\n", "mine.yaml:8: key 'models' is given twice, first on line 1"),
    "duplicate key on one line": (
        GOOD + "limits: {cell_timeout_s: 1, cell_timeout_s: 2}\n",
        "mine.yaml:8: key 'cell_timeout_s' is given twice, first on line 8",
    ),
    "unknown key": (GOOD + "profil: quick\n", "mine.yaml:8: unknown key 'profil'; did you mean 'profile'?"),
    "unknown key of limits": (
        GOOD + "limits:\n  cell_timeout: 5\n",
        "mine.yaml:9: unknown key 'cell_timeout'; did you mean 'cell_timeout_s'?",
    ),
    "unknown key of a model": (
        GOOD.replace("[pocket]", "[{id: a, hub: o/n, revison: x}]"),
        "mine.yaml:1: unknown key 'revison'; did you mean 'revision'?",
    ),
    "unknown axis": (
        GOOD.replace("{kind: decode}", "{kind: decode, new_token: 3}"),
        "mine.yaml:4: workload 'decode' has no axis 'new_token'; did you mean 'new_tokens'?",
    ),
    "no kind": (
        GOOD.replace("{kind: decode}", "{batch_size: 3}"),
        "mine.yaml:4: a workload needs its kind, one of attention, decode, forward, prefill, train_step",
    ),
    "workload as text": (
        GOOD.replace("{kind: decode}", "decode"),
        "mine.yaml:4: a workload is a mapping such as {kind: prefill, batch_size: 1}, got 'decode'",
    ),
    "misspelt workload": (
        GOOD.replace("kind: decode", "kind: decoed"),
        "mine.yaml:4: unknown workload 'decoed'; did you mean 'decode'?",
    ),
    "misspelt optimization": (
        GOOD.replace("sdpa-flash", "sdpa-flahs"),
        "mine.yaml:7: unknown optimization 'sdpa-flahs'; did you mean 'sdpa-flash'?",
    ),
    "misspelt option": (
        GOOD.replace("sdpa-flash", "compile:mod=default"),
        "mine.yaml:7: unknown option 'mod' of 'compile'; did you mean 'mode'?",
    ),
    "two of one family": (
        GOOD.replace("sdpa-flash", "fp16"),
        "mine.yaml:7: 'bf16' and 'fp16' are both of the family 'precision': choose one",
    ),
    "two of one family in a product": (
        GOOD + "  - product: [[bf16], [fp16]]\n",
        "mine.yaml:8: 'bf16' and 'fp16' are both of the family 'precision': choose one",
    ),
    "product that is no list": (
        GOOD + "  - product: [bf16]\n",
        "mine.yaml:8: must be a list of stacks, got 'bf16'",
    ),
    "number as a stack": (GOOD + "  - 8\n", "mine.yaml:8: 8 is not a stack, such as baseline or bf16+compile"),
    "misspelt baseline": (
        GOOD + "baseline: fp23\n",
        "mine.yaml:8: unknown optimization 'fp23'; did you mean 'fp32'?",
    ),
    "misspelt model": (GOOD.replace("pocket", "poket"), "mine.yaml:1: unknown model 'poket'; did you mean 'pocket'?"),
    "misspelt architecture": (
        GOOD.replace("pocket", "random:lama-3.2-1b"),
        "mine.yaml:1: unknown architecture 'lama-3.2-1b'; did you mean 'llama-3.2-1b'?",
    ),
    "misspelt profile": (
        GOOD + "profile: standart\n",
        "mine.yaml:8: unknown profile 'standart'; did you mean 'standard'?",
    ),
    "two sources": (
        GOOD.replace("[pocket]", "\n  - {id: a, hub: o/n, random: gpt2}"),
        "mine.yaml:2: model 'a' gives hub and random: choose one",
    ),
    "two sources without an id": (
        GOOD.replace("[pocket]", "[{hub: o/n, random: gpt2}]"),
        "mine.yaml:1: a model gives hub and random: choose one",
    ),
    "no source": (
        GOOD.replace("[pocket]", "[{id: a}]"),
        "mine.yaml:1: model 'a' says not where it is: give path, hub, factory or random",
    ),
    "revision of a random model": (
        GOOD.replace("[pocket]", "[{random: gpt2, revision: main}]"),
        "mine.yaml:1: revision 'main' applies to hub models only",
    ),
    "number as a revision": (
        GOOD.replace("[pocket]", "[{hub: a/b, revision: 12}]"),
        "mine.yaml:1: models.0.revision: must be a valid string, got 12",
    ),
    "zero": (
        GOOD.replace("[1, 8]", "[1, 0]"),
        "mine.yaml:3: batch_size: 0 is not a positive integer up to 2147483647",
    ),
    "negative": (
        GOOD.replace("[1, 8]", "-4"),
        "mine.yaml:3: batch_size: -4 is not a positive integer up to 2147483647",
    ),
    "text for a number": (
        GOOD.replace("[1, 8]", "many"),
        "mine.yaml:3: batch_size: 'many' is not a positive integer, such as 1",
    ),
    "bool for a number": (
        GOOD.replace("[1, 8]", "true"),
        "mine.yaml:3: batch_size: True is not a positive integer, such as 1",
    ),
    "fraction": (GOOD.replace("[1, 8]", "1.0"), "mine.yaml:3: batch_size: 1.0 is not a positive integer, such as 1"),
    "empty axis": (
        GOOD.replace("[1, 8]", "[]"),
        "mine.yaml:3: batch_size is an empty list: it needs at least one value",
    ),
    "value twice": (GOOD.replace("[1, 8]", "[8, 8]"), "mine.yaml:3: batch_size: 8 is given twice"),
    "uneven zip": (
        GOOD.replace("batch_size: [1, 8]", "zip: {batch_size: [1, 8], sequence_length: [128]}"),
        "mine.yaml:3: the lists of zip must be equally long: batch_size has 2, sequence_length has 1",
    ),
    "axis in zip and beside it": (
        GOOD.replace("batch_size: [1, 8]", "zip: {batch_size: [1, 8]}, batch_size: 1"),
        "mine.yaml:3: 'batch_size' is given both beside and inside zip: choose one",
    ),
    "zero timeout": (
        GOOD + "limits: {cell_timeout_s: 0}\n",
        "mine.yaml:8: limits.cell_timeout_s: must be greater than 0, got 0",
    ),
    "infinite timeout": (
        GOOD + "limits: {cell_timeout_s: .inf}\n",
        "mine.yaml:8: limits.cell_timeout_s: must be a finite number, got inf",
    ),
    "limits as a number": (GOOD + "limits: 5\n", "mine.yaml:8: limits must be a mapping, got 5"),
    "bool for rounds": (GOOD + "rounds: true\n", "mine.yaml:8: rounds: must be a valid integer, got True"),
    "zero rounds": (GOOD + "rounds: 0\n", "mine.yaml:8: rounds: must be greater than or equal to 1, got 0"),
    "quality as text": (GOOD + "quality: high\n", "mine.yaml:8: quality must be a mapping, got 'high'"),
    "no such questions": (
        GOOD + "quality:\n  choices_file: none.jsonl\n",
        "mine.yaml:9: choices_file: none.jsonl cannot be read (No such file or directory): give a file with one JSON "
        'object per line, such as {"ctx": "...", "endings": ["...", "..."], "label": 0}',
    ),
    "no such folder of tasks": (
        GOOD + "quality:\n  tasks: [mine]\n  tasks_path: none\n",
        "mine.yaml:10: tasks_path 'none' does not exist (none): give the folder with the tasks' YAML files",
    ),
    "tasks path without tasks": (
        GOOD + "quality:\n  tasks_limit: 3\n",
        "mine.yaml:9: tasks_limit is given without tasks: name those that are to be run",
    ),
    "unknown key of quality": (
        GOOD + "quality: {choice_file: a.jsonl}\n",
        "mine.yaml:8: unknown key 'choice_file'; did you mean 'choices_file'?",
    ),
    "stack twice": (
        GOOD + "  - sdpa-flash+bf16\n",
        "mine.yaml:8: 'sdpa-flash+bf16' is 'bf16+sdpa-flash', which is in the list already",
    ),
    "default option spelt out": (
        GOOD + "  - compile\n  - compile:mode=default\n",
        "mine.yaml:9: 'compile:mode=default' is 'compile', which is in the list already",
    ),
    "model twice": (GOOD.replace("[pocket]", "[pocket, pocket]"), "mine.yaml:1: model id 'pocket' is given twice"),
    "hardware twice": (GOOD + "hardware: [cpu, cpu]\n", "mine.yaml:8: hardware 'cpu' is given twice"),
    "no models": (
        GOOD.replace("models: [pocket]\n", ""),
        "mine.yaml:2: workload 'prefill' needs a model, and models is missing or empty",
    ),
    "no optimizations": (
        "models: [pocket]\nworkloads: [{kind: decode}]\n",
        "mine.yaml:1: optimizations is missing",
    ),
    "empty workloads": (
        "models: [pocket]\nworkloads: []\noptimizations: [bf16]\n",
        "mine.yaml:2: workloads is empty: it needs at least one entry",
    ),
    "everything excluded": (
        GOOD + "exclude:\n  - {model: pocket}\n",
        "mine.yaml:8: the matrix is empty: exclude leaves no cell",
    ),
    "exclude without effect": (
        GOOD + "exclude:\n  - {model: poket, optimization: bf16+sdpa-flash}\n",
        "mine.yaml:9: this exclude matches no cell: no model 'poket'; did you mean 'pocket'?",
    ),
    "exclude of an absent stack": (
        GOOD + "exclude:\n  - {optimization: nf4}\n",
        "mine.yaml:9: this exclude matches no cell: no optimization 'nf4'; known: baseline, bf16+sdpa-flash",
    ),
    "exclude of an absent point": (
        GOOD + "exclude:\n  - {workload: {kind: prefill, batch_size: 4}}\n",
        "mine.yaml:9: this exclude matches no cell: no workload point has kind prefill, batch_size 4",
    ),
    "exclude with an unknown axis": (
        GOOD + "exclude:\n  - workload: {batchsize: 4}\n",
        "mine.yaml:9: workload 'attention' has no axis 'batchsize'; did you mean 'batch_size'?",
    ),
    "exclude of the baseline": (
        GOOD + "exclude:\n  - {workload: decode, optimization: baseline}\n",
        "mine.yaml:9: 'baseline' is the baseline: every comparison needs it; exclude the model or the workload, "
        "or choose another baseline",
    ),
    "exclude of no kind": (
        GOOD + "exclude:\n  - workload: {kind: [], batch_size: 1}\n",
        "mine.yaml:9: kind is an empty list: it needs at least one workload",
    ),
    "model id that cannot be printed": (
        GOOD.replace("[pocket]", '[{id: "a\\nb", random: gpt2}]'),
        "mine.yaml:1: the id 'a\\nb' of a model has characters that cannot be printed",
    ),
    "exclude of nothing": (
        GOOD + "exclude:\n  - {}\n",
        "mine.yaml:9: this entry selects nothing: give one of model, workload, optimization, hardware",
    ),
    "include without effect": (
        GOOD + "include:\n  - {workload: decode, optimization: bf16+sdpa-flash}\n",
        "mine.yaml:9: this include adds no cell: the sweep has them all already",
    ),
    "include of another model under the same id": (
        GOOD + "include:\n  - {model: {id: pocket, random: gpt2}, optimization: bf16}\n",
        "mine.yaml:9: model id 'pocket' means another model in models",
    ),
    "bad tag": (
        GOOD + "hardware: [A100!]\n",
        "mine.yaml:8: hardware.0: 'A100!' must be lower-case letters, digits, '.', '_' and '-', with no mark first",
    ),
    "scales unknown": (
        GOOD + "scale: small\n",
        "mine.yaml:8: scale 'small' is chosen, but the sweep defines no scales",
    ),
    "missing folder": (GOOD.replace("[pocket]", "[{path: ./nope}]"), "checkpoint './nope' does not exist"),
    "missing configuration": (GOOD.replace("pocket", "random:./no.json"), "configuration './no.json' does not exist"),
    "factory without a colon": (
        GOOD.replace("[pocket]", "[{factory: nets.make}]"),
        "mine.yaml:1: factory 'nets.make' is not module:function, such as 'mypackage.nets:make'",
    ),
    "missing module": (
        GOOD.replace("[pocket]", "[{factory: 'no_such_module.nets:make'}]"),
        "mine.yaml:1: factory 'no_such_module.nets:make': there is no module 'no_such_module.nets': "
        "put it beside the sweep file, or install its package",
    ),
    "hub with a folder": (
        GOOD.replace("[pocket]", "[{hub: ./folder}]"),
        "mine.yaml:1: hub './folder' is not org/name; for a folder write path",
    ),
    "too many points": (
        GOOD.replace("[1, 8]", f"{list(range(1, 2000))}, sequence_length: {list(range(1, 2000))}"),
        "mine.yaml:3: its axes make 3,996,001 points: at most 1,000,000, split the sweep",
    ),
    "aliases of aliases": (
        "a0: &a0 [x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 4)}]\n" for n in range(1, 15)),
        "mine.yaml:10: with its aliases written out this has more than 1,000,000 values",
    ),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake(text: str, message: str, problems: Any) -> None:
    found = problems(text)
    assert message in found[0]
    assert found[0].startswith("mine.yaml:")


def test_workload_point_twice(problems: Any) -> None:
    text = GOOD.replace("{kind: decode}", "{kind: prefill, batch_size: 8, sequence_length: 512}")
    assert problems(text) == ["mine.yaml:4: workload point prefill[batch_size=8,sequence_length=512] is given twice"]


def test_several_mistakes_are_told_together(problems: Any) -> None:
    text = GOOD.replace("[1, 8]", "0").replace("bf16+sdpa-flash", "bf17") + "profile: fast\nseeds: 3\n"
    assert [line.split(": ")[0] for line in problems(text)] == [
        "mine.yaml:3",
        "mine.yaml:7",
        "mine.yaml:8",
        "mine.yaml:9",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "found only pytorch_model.bin, which can run code when loaded"),
        ([], "only safetensors weights are loaded, none found"),
    ],
)
def test_checkpoint_without_safetensors(
    tmp_path: Path, files: list[str], message: str, problems: Any, checkpoint: Any
) -> None:
    checkpoint(tmp_path / "ckpt", *files)
    text = GOOD.replace("[pocket]", "\n  - pocket\n  - {id: a, path: ckpt}")
    (found,) = problems(text)
    assert found.startswith("mine.yaml:3: ")
    assert message in found


def test_checkpoint_with_its_own_code_needs_trust(tmp_path: Path, problems: Any, written: Any, checkpoint: Any) -> None:
    checkpoint(tmp_path / "ckpt", "model.safetensors", config='{"auto_map": {}}')
    text = GOOD.replace("[pocket]", "[{path: ckpt}]")
    assert "trust_remote_code" in problems(text)[0]
    load_sweep(written(text.replace("ckpt}", "ckpt, trust_remote_code: true}")))


def test_configuration_that_is_none(tmp_path: Path, problems: Any) -> None:
    (tmp_path / "c.json").write_text("{")
    assert "'./c.json' cannot be used" in problems(GOOD.replace("pocket", "random:./c.json"))[0]


def test_factory_is_found_beside_the_sweep_without_being_imported(tmp_path: Path, problems: Any, written: Any) -> None:
    package = tmp_path / "nets_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "small.py").write_text("from os import path as way\nmake = lambda: None\ndef other(): ...\n")
    for name in ("make", "other", "way"):
        load_sweep(written(GOOD.replace("[pocket]", f"[{{factory: 'nets_of_test.small:{name}'}}]")))
    (found,) = problems(GOOD.replace("[pocket]", "[{factory: 'nets_of_test.small:mak'}]"))
    assert found.endswith("nets_of_test.small defines no 'mak'; did you mean 'make'?")


def test_file_not_found_names_the_shipped_sweeps(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"^quickstar: no such file.*did you mean 'quickstart'\?.*llama-1b"):
        load_sweep("quickstar")
    with pytest.raises(SweepError, match="is a folder"):
        load_sweep(str(tmp_path))


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SweepError, match="not UTF-8 text"):
        load_sweep(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("profil=quick", "--set profil=quick: unknown key 'profil'; did you mean 'profile'?"),
        ("rounds=0", "--set rounds=0: rounds: must be greater than or equal to 1, got 0"),
        ("workloads.9.kind=x", "--set workloads.9.kind=x: workloads has 2 entries, numbered from 0; there is no 9"),
        ("workloads.0.kind.x=1", "--set workloads.0.kind.x=1: workloads.0.kind is 'prefill', which has no 'x'"),
        ("models", "--set models: write key=value, such as profile=standard or limits.cell_timeout_s=60"),
        ("models=[", "--set models=[: the value is not valid YAML"),
        ("models=[poket]", "--set models=[poket]: unknown model 'poket'; did you mean 'pocket'?"),
        ("scale=small", "--set scale=small: scale 'small' is chosen, but the sweep defines no scales"),
    ],
)  # fmt: skip
def test_bad_override(override: str, message: str, problems: Any) -> None:
    (found,) = problems(GOOD, override)
    assert found.startswith(message)


def test_an_override_does_not_hide_the_lines_of_the_rest(problems: Any) -> None:
    text = GOOD.replace("kind: decode", "kind: decoed")
    assert problems(text, "workloads.0.batch_size=0") == [
        "--set workloads.0.batch_size=0: batch_size: 0 is not a positive integer up to 2147483647",
        "mine.yaml:4: unknown workload 'decoed'; did you mean 'decode'?",
    ]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("modle=pocket", "unknown key 'modle'; did you mean 'model'?"),
        ("batchsize=1", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("model", "'model' is not key=value"),
        ("", "'' is not key=value"),
        ("model=pocket,", "'' is not key=value"),
        ("model=a||b", "has an empty alternative"),
        ("optimization=bf61", "unknown optimization 'bf61'; did you mean 'bf16'?"),
        ("workload=decoed", "unknown workload 'decoed'; did you mean 'decode'?"),
    ],
)
def test_bad_only(expression: str, message: str) -> None:
    with pytest.raises(SweepError) as caught:
        parse_only(expression)
    assert str(caught.value).startswith(f"--only {expression}: ")
    assert message in str(caught.value)
