"""The sweep file: its fields, their defaults, and everything that can be wrong with them before a node is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from orchestrator.sweep_document import Document, Location, SweepError, apply_overrides, parse
from orchestrator.sweep_matrix import groups, included, matches_nothing
from orchestrator.sweep_models import ModelEntry, search_path
from orchestrator.sweep_problems import Problem, Strict, refuse, wording
from orchestrator.sweep_quality import Quality
from orchestrator.sweep_selection import Exclude, Include, Only, is_pattern, parse_only, text_matches
from orchestrator.sweep_stacks import stack, stacks
from orchestrator.sweep_workloads import LARGEST, WorkloadEntry
from tasks.cell import BASELINE, Stack
from tasks.job import PROFILES, Profile
from tasks.stacks import nearest, parse_stack

__all__ = ["Limits", "Only", "Quality", "Sweep", "SweepError", "load_sweep", "make_sweep", "parse_only", "shipped"]

LOCAL = "local"
SHIPPED = Path(__file__).parent / "sweeps"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_TAG = r"[a-z0-9][a-z0-9._-]*"


class Limits(Strict):
    """`cell_timeout_s` bounds one run of one cell, `artifact_timeout_s` the making of one artifact before it.

    `memory_budget_gib` caps a cell's memory below the device's.
    """

    cell_timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    artifact_timeout_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    memory_budget_gib: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def memory_budget_bytes(self) -> int | None:
        return None if self.memory_budget_gib is None else int(self.memory_budget_gib * 2**30)


class Sweep(Strict):
    """A validated sweep. `optimizations` and `baseline` are canonical stacks; paths of models are absolute.

    With `compile_each_round` no round finds what another one's compiler made: intervals hold how differently tuning
    turns out, and every round takes as long as the first.
    """

    name: str = Field(default="sweep", pattern=f"^{_WORD}$")
    models: list[ModelEntry] = Field(default_factory=list)
    workloads: list[WorkloadEntry] = Field(min_length=1)
    optimizations: Annotated[list[str], BeforeValidator(stacks)] = Field(min_length=1)
    hardware: list[Annotated[str, Field(pattern=f"^{_TAG}$")]] = Field(default=[LOCAL], min_length=1)
    baseline: Annotated[str, BeforeValidator(stack)] = BASELINE
    profile: str = "quick"
    rounds: int | None = Field(default=None, ge=1, le=10_000)
    compile_each_round: bool = False
    include: list[Include] = Field(default_factory=list)
    exclude: list[Exclude] = Field(default_factory=list)
    limits: Limits = Field(default_factory=Limits)
    quality: Quality = Field(default_factory=Quality)
    seed: int = Field(default=0, ge=0, le=LARGEST)
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @field_validator("profile")
    @classmethod
    def _known_profile(cls, value: str) -> str:
        if value not in PROFILES:
            refuse([((), f"unknown profile {value!r}{nearest(value, list(PROFILES))}")])
        return value

    @field_validator("include", mode="before")
    @classmethod
    def _names_of_this_sweep(cls, value: Any, info: ValidationInfo) -> Any:
        """In an include, a model's id or a workload's kind stands for what the sweep has under that name."""
        if not isinstance(value, list):
            return value
        models = {model.id: model for model in info.data.get("models", ())}
        return [_resolve_include(entry, models, info.data.get("workloads", ())) for entry in value]

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Sweep:
        self._folder = Path((info.context or {}).get("folder", Path.cwd()))
        problems = [*self._duplicates(), *self._without_model(), *self._idle_selections()]
        if not problems and not any(True for _ in groups(self, str)):
            problems.append((("exclude",), "the matrix is empty: exclude leaves no cell"))
        if problems:
            refuse(problems)
        return self

    def _duplicates(self) -> list[Problem]:
        problems = list[Problem]()
        models: dict[str, ModelEntry] = {}
        for index, model in enumerate(self.models):
            if models.setdefault(model.id, model) is not model:
                problems.append((("models", index), f"model id {model.id!r} is given twice"))
        for index, include in enumerate(self.include):
            for model in include.model:
                if models.setdefault(model.id, model) != model:
                    problems.append((("include", index), f"model id {model.id!r} means another model in models"))
        points = set()
        for index, workload in enumerate(self.workloads):
            twice = next((point for point in workload.points() if point in points or points.add(point)), None)  # type: ignore[func-returns-value]
            if twice is not None:
                problems.append((("workloads", index), f"workload point {twice} is given twice"))
        for index, word in enumerate(self.hardware):
            if word in self.hardware[:index]:
                problems.append((("hardware", index), f"hardware {word!r} is given twice"))
        return problems

    def _without_model(self) -> list[Problem]:
        if self.models:
            return []
        return [
            (("workloads", index), f"workload {workload.kind!r} needs a model, and models is missing or empty")
            for index, workload in enumerate(self.workloads)
            if workload.needs_model
        ]

    def _idle_selections(self) -> list[Problem]:
        problems = list[Problem]()
        for index, exclude in enumerate(self.exclude):
            if self.baseline in exclude.optimization:
                why = "every comparison needs it; exclude the model or the workload, or choose another baseline"
                problems.append((("exclude", index), f"{self.baseline!r} is the baseline: {why}"))
            elif matches_nothing(self, exclude):
                problems.append((("exclude", index), f"this exclude matches no cell{self._why_idle(exclude)}"))
        if self.include and not problems:
            without = self.model_copy(update={"include": []})
            known = {(group.model.id, group.point, group.hardware): group.stacks for group in groups(without, str)}
            for index, include in enumerate(self.include):
                new = 0
                for group, wanted in included(self, include, str):
                    present = known.setdefault((group.model.id, group.point, group.hardware), {})
                    new += len(set(wanted) - present.keys())
                    present.update(dict.fromkeys(wanted))
                if not new:
                    problems.append((("include", index), "this include adds no cell: the sweep has them all already"))
        return problems

    def _why_idle(self, exclude: Exclude) -> str:
        ids = [model.id for model in self.models]
        for text in exclude.model:
            if not is_pattern(text) and text not in ids:
                return f": no model {text!r}{nearest(text, ids)}"
        for text in exclude.optimization:
            if not any(text_matches(stack, [text]) for stack in self.optimizations):
                return f": no optimization {text!r}{nearest(text, self.optimizations)}"
        for text in exclude.hardware:
            if not is_pattern(text) and text not in self.hardware and LOCAL not in self.hardware:
                return f": no hardware {text!r}{nearest(text, self.hardware)}"
        if exclude.workload and not any(exclude.matches_point(p) for w in self.workloads for p in w.points()):
            asked = ", ".join(f"{key} {'|'.join(map(str, values))}" for key, values in exclude.workload.items())
            return f": no workload point has {asked}"
        return ": each part occurs, but never together"

    @property
    def measuring(self) -> Profile:
        """How one run measures: the profile behind its name."""
        return PROFILES[self.profile]

    @property
    def search_path(self) -> tuple[str, ...]:
        """Folders in which runners look for a model factory, before the installed packages."""
        return tuple(search_path(self._folder))

    @property
    def rounds_per_cell(self) -> int:
        return self.rounds if self.rounds is not None else self.measuring.rounds

    @property
    def baseline_stack(self) -> Stack:
        return parse_stack(self.baseline)

    def to_yaml(self) -> str:
        """The sweep as run: scales and overrides applied, defaults written out. Reading it gives an equal sweep."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _resolve_include(entry: Any, models: Mapping[str, ModelEntry], workloads: Sequence[WorkloadEntry]) -> Any:
    if not isinstance(entry, dict):
        return entry
    entry = dict(entry)
    if "model" in entry:
        given = entry["model"] if isinstance(entry["model"], list) else [entry["model"]]
        entry["model"] = [models.get(item, item) if isinstance(item, str) else item for item in given]
    if isinstance(entry.get("workload"), str):
        kind = entry["workload"]
        entry["workload"] = [workload for workload in workloads if workload.kind == kind] or {"kind": kind}
    return entry


_LEVELS: dict[int | str, type[Strict]] = {
    "models": ModelEntry,
    "model": ModelEntry,
    "limits": Limits,
    "quality": Quality,
    "include": Include,
    "exclude": Exclude,
}


def make_sweep(
    content: Mapping[str, Any], folder: Path | None = None, source: str = "sweep", overrides: Sequence[str] = ()
) -> Sweep:
    """A sweep from plain data, as from Python; relative paths are taken from `folder`. Raises `SweepError`."""
    document = Document(source=source, data=deepcopy(dict(content)))
    apply_overrides(document, overrides)
    return _validated(document, folder or Path.cwd())


def load_sweep(path_or_shipped_name: str, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Sweep:
    """Read a sweep file, or a shipped sweep by name, and apply `--set` overrides. Raises `SweepError`.

    Relative paths are taken from the folder of the file, those of a shipped sweep from the current folder. With
    `elsewhere`, checkpoints given by absolute paths are those of other machines and not looked for here.
    """
    path = _find(path_or_shipped_name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SweepError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise SweepError(f"{path}: cannot be read: {error.strerror}") from None
    document = parse(text, str(path))
    apply_overrides(document, overrides)
    if "name" not in document.data and (name := re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")):
        document.data["name"] = name
    folder = path.resolve().parent
    return _validated(document, Path.cwd() if folder == SHIPPED.resolve() else folder, elsewhere=elsewhere)


def shipped() -> dict[str, Path]:
    """The sweeps that come with the project, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _find(text: str) -> Path:
    path, known = Path(text), shipped()
    if path.is_file():
        return path
    if text.removesuffix(".yaml") in known:
        return known[text.removesuffix(".yaml")]
    if path.is_dir():
        raise SweepError(f"{text}: is a folder, not a sweep file")
    close = nearest(path.stem, list(known), else_all=False, cutoff=0.7) if path.parent == Path() else ""
    raise SweepError(f"{text}: no such file, and no shipped sweep of that name{close} (shipped: {', '.join(known)})")


def _validated(document: Document, folder: Path, *, elsewhere: bool = False) -> Sweep:
    try:
        return Sweep.model_validate(document.data, context={"folder": folder, "elsewhere": elsewhere})
    except ValidationError as error:
        problems = [(item["loc"], wording(item, _keys_at(item["loc"]))) for item in error.errors()]
    raise document.error(problems)


def _keys_at(location: Location) -> list[str]:
    level: type[Strict] = Sweep
    for step in location[:-1]:
        level = _LEVELS.get(step, level)
    return list(level.model_fields)
