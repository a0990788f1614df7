"""Models as a sweep names them: what each form means, and whether it can be found before anything is loaded."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationInfo, field_validator, model_serializer, model_validator

from orchestrator.sweep_problems import Strict, refuse
from tasks.cell import ModelKind, ModelSource, ModelSpec
from tasks.models.architectures import architectures
from tasks.models.identity import SHIPPED, located, random_config, refuse_unsafe
from tasks.stacks import nearest

FORMS = ("path", "hub", "factory", "random")
RANDOM = "random:"


class ModelEntry(Strict):
    """One model: exactly one of `path`, `hub`, `factory`, `random`, or none of them for `pocket`.

    The shorthands are `pocket`, `random:NAME` and `random:./config.json`. Relative paths are taken from the folder of
    the sweep file (`folder` in the validation context), and are absolute once validated.
    """

    id: str
    path: str | None = None
    hub: str | None = None
    factory: str | None = None
    random: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value == "pocket":
                return {"id": "pocket"}
            if value.startswith(RANDOM):
                return {"id": value, "random": value.removeprefix(RANDOM)}
            known = ["pocket", *(RANDOM + name for name in architectures())]
            refuse([((), f"unknown model {value!r}{nearest(value, known)}, or a mapping with {_one_of(FORMS)}")])
        if isinstance(value, dict) and "id" not in value:
            given = [(form, value[form]) for form in FORMS if form in value]
            if len(given) > 1:
                refuse([((given[1][0],), f"a model gives {given[0][0]} and {given[1][0]}: choose one")])
            if given and isinstance(given[0][1], str):
                form, text = given[0]
                return {**value, "id": {"path": Path(text).name, "random": RANDOM + text}.get(form, text)}
        return value

    @field_validator("path", "random", "factory", "hub")
    @classmethod
    def _can_be_found(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is None or info.field_name is None:
            return None
        if info.field_name == "path" and _is_elsewhere(text, info):
            return text
        return _FIND[info.field_name](text, Path((info.context or {}).get("folder", Path.cwd())))

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> ModelEntry:
        given = [form for form in FORMS if getattr(self, form) is not None]
        if not self.id.strip():
            refuse([(("id",), "the id of a model is empty")])
        if not self.id.isprintable():
            refuse([(("id",), f"the id {self.id!r} of a model has characters that cannot be printed")])
        if len(given) > 1:
            refuse([((given[1],), f"model {self.id!r} gives {' and '.join(given)}: choose one")])
        if not given and self.id != "pocket":
            refuse([((), f"model {self.id!r} says not where it is: give {_one_of(FORMS)}")])
        if self.revision is not None and self.hub is None:
            refuse([(("revision",), f"revision {self.revision!r} applies to hub models only")])
        if self.path is not None and not _is_elsewhere(self.path, info):
            try:
                refuse_unsafe(located(self.path), self.trust_remote_code)
            except (ValueError, OSError) as error:
                refuse([(("path",), str(error))])
        return self

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value not in (None, False)}

    @cached_property
    def spec(self) -> ModelSpec:
        """The model as cells carry it, with its kind where that can be known without loading it."""
        source = next((form for form in FORMS if getattr(self, form) is not None), "pocket")
        return ModelSpec(
            id=self.id,
            source=cast(ModelSource, source),
            reference=getattr(self, source, None) or "",
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            kind=self._kind(),
        )

    def _kind(self) -> ModelKind:
        if self.path is not None:
            return _kind_of_config(located(self.path) / "config.json")
        if self.random is not None:
            return architectures().get(self.random) or _kind_of_config(located(self.random))
        if self.factory is not None:
            return "module"
        return "unknown" if self.hub is not None else "language"


def search_path(folder: Path) -> list[str]:
    """Where factories are looked for before the installed packages: beside the sweep file, then where one stands."""
    return list(dict.fromkeys([str(folder), str(Path.cwd())]))


def _one_of(forms: tuple[str, ...]) -> str:
    return f"{', '.join(forms[:-1])} or {forms[-1]}"


def _is_elsewhere(text: str, info: ValidationInfo) -> bool:
    """Whether the checkpoint is to be found on the machines that measure, which check it themselves."""
    return bool((info.context or {}).get("elsewhere")) and Path(text).is_absolute()


def _on_this_machine(text: str, folder: Path) -> tuple[str, Path]:
    """The reference to keep, and the file or folder that it means here."""
    if text.startswith(SHIPPED):
        return text, located(text)
    found = (folder / Path(text).expanduser()).resolve()
    return str(found), found


def _checkpoint(text: str, folder: Path) -> str:
    reference, directory = _on_this_machine(text, folder)
    if not directory.is_dir():
        what = "is not a folder" if directory.exists() else "does not exist"
        refuse([((), f"checkpoint {text!r} {what} ({directory})")])
    return reference


def _random(text: str, folder: Path) -> str:
    if not text.endswith(".json"):
        if text not in architectures():
            refuse([((), f"unknown architecture {text!r}{nearest(text, list(architectures()))}")])
        return text
    reference, file = _on_this_machine(text, folder)
    if not file.is_file():
        refuse([((), f"configuration {text!r} does not exist ({file})")])
    try:
        random_config(reference)
    except (ValueError, TypeError) as error:
        refuse([((), f"configuration {text!r} cannot be used: {error}")])
    return reference


def _kind_of_config(file: Path) -> ModelKind:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unknown"
    names = " ".join(map(str, (content.get("architectures") or []) if isinstance(content, dict) else []))
    if "CausalLM" in names or "LMHead" in names:
        return "language"
    return "vision" if "ImageClassification" in names else "unknown"


def _hub(text: str, folder: Path) -> str:
    if text.count("/") > 1 or not all(text.split("/")) or text.startswith("."):
        refuse([((), f"hub {text!r} is not org/name; for a folder write path")])
    return text


def _factory(text: str, folder: Path) -> str:
    """Refuse a factory that cannot be: found without importing it, since its module may import torch."""
    module, colon, name = text.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        refuse([((), f"factory {text!r} is not module:function, such as 'mypackage.nets:make'")])
    spec = _find_module(module, folder)
    if spec is None:
        why = "put it beside the sweep file, or install its package"
        refuse([((), f"factory {text!r}: there is no module {module!r}: {why}")])
    names = _top_level_names(spec)
    if names is not None and name not in names:
        refuse([((), f"factory {text!r}: {module} defines no {name!r}{nearest(name, sorted(names))}")])
    return text


_FIND: dict[str, Callable[[str, Path], str]] = {
    "path": _checkpoint,
    "random": _random,
    "factory": _factory,
    "hub": _hub,
}


def _find_module(module: str, folder: Path) -> ModuleSpec | None:
    """The module's spec, as runners will find it; unlike `find_spec` this imports no parent package."""
    top, *rest = module.split(".")
    try:
        spec = PathFinder.find_spec(top, search_path(folder)) or importlib.util.find_spec(top)
    except ValueError:
        return None
    for index in range(len(rest)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = ".".join([top, *rest[: index + 1]])
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _top_level_names(spec: ModuleSpec) -> set[str] | None:
    """Names that the module's source binds at its top level, or None where the source does not tell."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
        elif not isinstance(statement, ast.Expr | ast.AnnAssign):
            return None  # a condition or a loop may bind anything
    return None if names & {"*", "__getattr__"} else names
