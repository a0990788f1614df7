"""What `submit` takes along: everything the sweep names on this machine, nothing else, and not too much."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import staging
from orchestrator.runner import at_home
from orchestrator.staging import module_files, stage
from orchestrator.sweep import SweepError, load_sweep
from tasks.models.identity import POCKET, SHIPPED_FOLDER, located

MATRIX = "workloads: [{kind: forward, batch_size: 1}]\noptimizations: [baseline]\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in POCKET.iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)
    (folder / ".gitignore").write_text("*")  # Ray would leave out what it names
    return folder


def sweep(tmp_path: Path, models: str, **options: Any) -> Any:
    path = tmp_path / "mine.yaml"
    path.write_text(f"models: {models}\n{MATRIX}")
    return load_sweep(str(path), **options)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_and_configurations_go_along(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path / "small.json")
    loaded = sweep(tmp_path, '[{id: "my/model", path: ./checkpoint}, "random:./small.json"]')
    staged = stage(loaded)
    staged.write(tmp_path / "job")
    shipped = files(tmp_path / "job" / "shipped")
    mine, small = (model.get("path") or model["random"] for model in staged.document["models"])
    assert mine.startswith("shipped:models/my-model-") and small.startswith("shipped:models/random-")
    folder = mine.removeprefix("shipped:")
    assert {f"{folder}/config.json", f"{folder}/model.safetensors", "mine.yaml"} <= shipped
    assert small.removeprefix("shipped:") in shipped
    assert not any(".gitignore" in name for name in shipped)
    assert str(tmp_path) not in (tmp_path / "job" / "shipped" / "mine.yaml").read_text()
    assert (tmp_path / "job" / "orchestrator" / "staging.py").exists()
    assert located(mine) == SHIPPED_FOLDER / folder


def test_the_same_sweep_elsewhere_is_the_same_submission(tmp_path: Path, checkpoint: Path) -> None:
    here = stage(sweep(tmp_path, "[{id: mine, path: ./checkpoint}]"))
    (tmp_path / "other").mkdir()
    shutil.move(checkpoint, tmp_path / "other" / "checkpoint")
    there = stage(sweep(tmp_path / "other", "[{id: mine, path: ./checkpoint}]"))
    assert here.digest == there.digest


def test_models_of_an_include_go_along_too(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"models: [pocket]\n{MATRIX}include: [{{model: [{{id: mine, path: ./checkpoint}}]}}]\n")
    staged = stage(load_sweep(str(path)))
    assert list(staged.copies) == [Path("models/mine")]
    assert staged.document["include"][0]["model"][0]["path"] == "shipped:models/mine"


def test_factories_go_along_with_what_they_import(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import os, json, torch\nfrom parts.deep import x\ndef make(): import late\n")
    (tmp_path / "late.py").write_text("")
    (tmp_path / "unused.py").write_text("")
    (tmp_path / "json.py").write_text("")  # the standard library's comes first
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("from . import sibling")
    (tmp_path / "parts" / "deep.py").write_text("import helper")
    (tmp_path / "parts" / "data.txt").write_text("")
    (tmp_path / "helper.py").write_text("")
    assert {str(name) for name in module_files("nets", [tmp_path])} == {"nets.py", "late.py", "parts", "helper.py"}
    staged = stage(sweep(tmp_path, '[{id: net, factory: "nets:make"}]'))
    staged.write(tmp_path / "job")
    assert files(tmp_path / "job" / "shipped") >= {"nets.py", "parts/data.txt", "helper.py", "mine.yaml"}
    assert staged.document["models"][0]["factory"] == "nets:make"


def test_too_much_is_refused_with_the_limit_and_what_to_do(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "LIMIT_BYTES", 2_000_000)
    with pytest.raises(SweepError, match=r"at most 2 MB .* needs 9 MB, 9 MB of it .*checkpoint.*--no-ship"):
        stage(sweep(tmp_path, "[{id: mine, path: ./checkpoint}]"))


def test_checkpoints_of_the_nodes_are_not_looked_for_here(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="does not exist"):
        sweep(tmp_path, "[{id: big, path: /on/the/nodes}]")
    loaded = sweep(tmp_path, "[{id: big, path: /on/the/nodes}]", elsewhere=True)
    staged = stage(loaded, checkpoints=False)
    assert not staged.copies and staged.document["models"][0]["path"] == "/on/the/nodes"
    with pytest.raises(SweepError, match="does not exist"):
        sweep(tmp_path, "[{id: big, path: ./beside}]", elsewhere=True)


def test_a_shipped_sweep_needs_nothing(tmp_path: Path) -> None:
    staged = stage(load_sweep("quickstart"))
    assert not staged.copies
    staged.write(tmp_path)
    assert yaml.safe_load((tmp_path / staged.entry).read_text())["name"] == "quickstart"


def test_a_node_finds_shipped_paths_below_its_own_copy() -> None:
    job = {"search_path": ["/driver/shipped", "/driver", "/drivers"], "file": "/driver/shipped/x", "round": 1,
           "cell": {"model": {"reference": "/driver/x"}}}  # fmt: skip
    assert at_home(job, "/driver", "/node") == {
        "search_path": ["/node/shipped", "/node", "/drivers"], "file": "/node/shipped/x", "round": 1,
        "cell": {"model": {"reference": "/driver/x"}},
    }  # fmt: skip
