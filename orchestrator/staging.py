"""The folder that `submit` ships: our packages, the sweep, and whatever the sweep takes from this machine."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.sweep import Sweep
from orchestrator.sweep_document import SweepError
from tasks.cell import digest
from tasks.models.identity import SHIPPED, SHIPPED_FOLDER

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("orchestrator", "tasks", "analysis")
LIMIT_BYTES = 100 * 10**6
_FILES_OF_QUALITY = ("choices_file", "tasks_path")
_SKIPPED = shutil.ignore_patterns("__pycache__", ".*")


@dataclass(kw_only=True)
class Staged:
    """What is to be shipped. `copies` maps a target in the shipped folder to the file or folder that becomes it."""

    document: dict[str, Any]
    name: str
    copies: dict[Path, Path] = field(default_factory=dict)

    @property
    def entry(self) -> str:
        """The sweep file as the job names it, relative to its working directory."""
        return f"{SHIPPED_FOLDER.name}/{self.name}.yaml"

    @property
    def digest(self) -> str:
        """Equal for equal sweeps, whatever machine they are submitted from."""
        return digest(self.document)

    def write(self, folder: Path) -> None:
        """Copy everything into `folder`; hidden files, and links as what they point to."""
        write_packages(folder)
        target = folder / SHIPPED_FOLDER.name
        target.mkdir()
        for relative, source in self.copies.items():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target / relative, ignore=_SKIPPED, dirs_exist_ok=True)
            else:
                shutil.copy(source, target / relative)
        (folder / self.entry).write_text(yaml.safe_dump(self.document, sort_keys=False), encoding="utf-8")


def write_packages(folder: Path) -> None:
    """Our packages alone, which is all that a job needs that runs a command of ours."""
    for name in PACKAGES:
        shutil.copytree(PROJECT / name, folder / name, ignore=_SKIPPED)


def stage(sweep: Sweep, *, checkpoints: bool = True) -> Staged:
    """What the job of `sweep` needs: checkpoints, configurations, factories with what they import, quality files.

    Without `checkpoints`, their paths are left as they are: those of the head and of the nodes.

    Raises:
        SweepError: more than `LIMIT_BYTES`.
    """
    staged = Staged(document=yaml.safe_load(sweep.to_yaml()), name=sweep.name)
    for model in _models(staged.document):
        _stage_model(model, sweep.search_path, staged, checkpoints)
    quality = staged.document.get("quality")
    for name in _FILES_OF_QUALITY:
        if isinstance(quality, dict) and isinstance(quality.get(name), str):
            source = Path(quality[name])
            quality[name] = f"quality/{source.name}"
            staged.copies[Path(quality[name])] = source
    _refuse_too_much(staged.copies)
    return staged


def _models(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [document.get("models", ()), *(entry.get("model", ()) for entry in document.get("include", ()))]
    return (model for models in lists for model in models if isinstance(model, dict))


def _stage_model(model: dict[str, Any], folders: tuple[str, ...], staged: Staged, checkpoints: bool) -> None:
    # the reference is part of a cell's id: it must not depend on where the file lies on this machine
    if "path" in model and checkpoints:
        name = f"models/{_slug(model['id'])}"
        staged.copies[Path(name)], model["path"] = Path(model["path"]), SHIPPED + name
    elif model.get("random", "").endswith(".json"):
        name = f"models/{_slug(model['id'].removesuffix('.json'))}.json"
        staged.copies[Path(name)], model["random"] = Path(model["random"]), SHIPPED + name
    elif "factory" in model:
        staged.copies |= module_files(model["factory"].partition(":")[0], [Path(folder) for folder in folders])


def _slug(text: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".")
    return slug if slug == text else f"{slug}-{digest(text)[:6]}"


def module_files(module: str, folders: list[Path]) -> dict[Path, Path]:
    """A module that lies in one of `folders`, and what it imports from there: packages whole, else single files.

    Modules that are installed, and those imported by a name that is only known when they run, are not among them.
    """
    found: dict[Path, Path] = {}
    pending, seen = [module.partition(".")[0]], {*sys.stdlib_module_names, *PACKAGES}
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        source = next((place for folder in folders for place in _places(folder, name) if place.exists()), None)
        if source is not None:
            found[Path(source.name)] = source
            for file in source.rglob("*.py") if source.is_dir() else [source]:
                pending += _imports(file)
    return found


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    package = folder / name
    holds_modules = package.is_dir() and any(package.glob("*.py"))
    return package if holds_modules else folder / f"{name}.py", folder / f"{name}.py"


def _imports(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return [name.partition(".")[0] for name in names]


def _refuse_too_much(copies: Mapping[Path, Path]) -> None:
    sizes = {source: _size(source) for source in copies.values()}
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = max(sizes, key=lambda source: sizes[source])
        raise SweepError(
            f"submit ships at most {LIMIT_BYTES / 1e6:.0f} MB and this sweep needs {total / 1e6:.0f} MB, "
            f"{sizes[largest] / 1e6:.0f} MB of it {largest}: put its checkpoints at one path on the head and every "
            "node, name that path in the sweep, and submit with --no-ship"
        )


def _size(source: Path) -> int:
    if source.is_file():
        return source.stat().st_size
    return sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
