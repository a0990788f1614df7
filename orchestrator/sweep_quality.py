"""What a sweep asks of quality: tokens, multiple-choice questions and tasks, all of it checked before anything runs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from orchestrator.sweep_problems import Problem, Strict, refuse
from orchestrator.sweep_workloads import LARGEST
from tasks.choices import ChoicesError, read_choices
from tasks.device import DeviceInfo
from tasks.job import CellJob
from tasks.quality_tasks import INSTALL, PACKAGE
from tasks.stacks import nearest

_NAMED = re.compile(r"""^\s*["']?(?:task|group|tag)["']?\s*:\s*["']?([^\s"'#\[{]+)["']?\s*(?:#.*)?$""", re.M)
_INLINE = re.compile(r"""^\s*["']?(?:task|tag)["']?\s*:\s*\[([^\]]*)\]""", re.M)
_LISTED = re.compile(r"""^\s*-\s*["']?([^\s"'#:\[{]+)["']?\s*(?:#.*)?$""", re.M)


class Quality(Strict):
    """Whether quality is measured, and on what.

    `tokens` of held-out text; the first `choices` questions, of `choices_file` (HellaSwag's format, all of it by
    default) or of those that ship with the project; `tasks` of lm-evaluation-harness, on `tasks_limit` documents each,
    from the folder `tasks_path` or the library's own. Relative paths are taken from the folder of the sweep file
    (`folder` in the validation context), and are absolute once validated.
    """

    enabled: bool = True
    tokens: int = Field(default=CellJob.quality_tokens, ge=1, le=LARGEST)
    choices_file: str | None = None
    choices: int = Field(default=None, validate_default=True, ge=1, le=LARGEST)
    tasks_path: str | None = None
    tasks: list[str] = Field(default_factory=list)
    tasks_limit: int | None = Field(default=None, ge=1, le=LARGEST)

    @model_validator(mode="before")
    @classmethod
    def _from_bool(cls, value: Any) -> Any:
        return {"enabled": value} if isinstance(value, bool) else value

    @field_validator("choices_file")
    @classmethod
    def _questions(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is None:
            return None
        file = _beside_sweep(text, info)
        try:
            read_choices(file)
        except ChoicesError as error:
            refuse([((), f"choices_file: {error}")])
        return str(file)

    @field_validator("choices", mode="before")
    @classmethod
    def _all_of_a_file(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        file = info.data.get("choices_file")
        return CellJob.quality_choices if file is None else len(read_choices(file))

    @field_validator("tasks_path")
    @classmethod
    def _folder(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is None:
            return None
        folder = _beside_sweep(text, info)
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            refuse([((), f"tasks_path {text!r} {what} ({folder}): give the folder with the tasks' YAML files")])
        if next(_yaml_files(folder), None) is None:
            refuse([((), f"tasks_path {text!r}: there is no YAML file in {folder}: put the tasks' files there")])
        return str(folder)

    @model_validator(mode="after")
    def _known_tasks(self, info: ValidationInfo) -> Quality:
        problems: list[Problem] = []
        if not self.tasks:
            for name in ("tasks_path", "tasks_limit"):
                if getattr(self, name) is not None:
                    problems.append(((name,), f"{name} is given without tasks: name those that are to be run"))
        known = task_names(self.tasks_path) if self.tasks else None
        if known is not None and not known.issuperset(self.tasks):
            known |= indexed_names(self.tasks_path)
        for index, name in enumerate(self.tasks):
            if name in self.tasks[:index]:
                problems.append((("tasks", index), f"task {name!r} is given twice"))
            elif known is not None and name not in known:
                where = self.tasks_path or "lm-evaluation-harness"
                problems.append((("tasks", index), f"{where} has no task {name!r}{_nearest(name, known)}"))
        if problems:
            refuse(problems)
        return self

    def job_fields(self) -> dict[str, Any]:
        """The fields of a `CellJob` that say how it is judged."""
        return {
            "quality_tokens": self.tokens,
            "quality_choices": self.choices,
            "quality_choices_file": self.choices_file or "",
            "quality_tasks": tuple(self.tasks),
            "quality_tasks_path": self.tasks_path or "",
            "quality_tasks_limit": self.tasks_limit,
        }


def task_names(folder: str | None) -> set[str] | None:
    """Names of tasks, groups and tags in the YAML files of `folder` or of the installed library; None without it.

    Read as text, in a second for the library's 14 thousand. Names that the library puts together are not seen.
    """
    if folder is None:
        spec = importlib.util.find_spec("lm_eval")
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = str(Path(spec.submodule_search_locations[0]) / "tasks")
    names: set[str] = set()
    for file in _yaml_files(Path(folder)):
        text = file.read_text(encoding="utf-8", errors="replace")
        names.update(_NAMED.findall(text), _LISTED.findall(text))
        names.update(name.strip(" \"'\n") for names in _INLINE.findall(text) for name in names.split(","))
    return names


def indexed_names(folder: str | None) -> set[str]:
    """The names as the library itself finds them, which takes it up to 12 s; none where it is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        return set()
    return set(TaskManager(include_path=folder, include_defaults=folder is None).all_tasks)


def without_harness(quality: Quality, devices: Iterable[DeviceInfo]) -> list[str]:
    """What a person should know before a sweep with tasks runs on devices that cannot run them."""
    lacking = {device.tag: None for device in devices if PACKAGE not in device.packages}
    if not quality.enabled or not quality.tasks or not lacking:
        return []
    return [f"quality.tasks: {PACKAGE} is not installed on {', '.join(lacking)}: lm_eval will be null; {INSTALL}"]


def _nearest(name: str, known: set[str]) -> str:
    """The library has thousands of names: without a near one they are not all listed."""
    text = nearest(name, sorted(known))
    return text if len(text) < 300 else "; `lm-eval ls tasks` lists them"


def _yaml_files(folder: Path) -> Iterator[Path]:
    """Also those without a suffix, `_template_yaml` and the like, that others include."""
    return (file for file in folder.rglob("*") if file.name.endswith(("yaml", "yml")) and file.is_file())


def _beside_sweep(text: str, info: ValidationInfo) -> Path:
    folder = Path((info.context or {}).get("folder", Path.cwd()))
    return (folder / Path(text).expanduser()).resolve()
