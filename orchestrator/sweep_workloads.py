"""Workloads as a sweep names them: a kind with axes, each a scalar or a list, as a product or zipped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from pydantic import Field, model_serializer, model_validator

from orchestrator.sweep_document import Location
from orchestrator.sweep_problems import Problem, Strict, refuse, shown
from tasks.cell import Scalar, WorkloadPoint
from tasks.registry import workloads
from tasks.stacks import nearest
from tasks.workload import Workload

LARGEST = 2**31 - 1
MOST_POINTS = 1_000_000
ZIP = "zip"


class WorkloadEntry(Strict):
    """One workload: `axes` vary as a product; the equally long lists of `together` (`zip` in the file) vary as one."""

    kind: str
    axes: dict[str, list[Scalar]] = Field(default_factory=dict)
    together: dict[str, list[Scalar]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if isinstance(value, WorkloadEntry):
            return value
        if not isinstance(value, dict):
            refuse([((), f"a workload is a mapping such as {{kind: prefill, batch_size: 1}}, got {shown(value)}")])
        workload = known_workload(value.get("kind"), "kind" in value)
        zipped = value.get(ZIP, {})
        if not isinstance(zipped, dict):
            refuse([((ZIP,), f"zip maps axes to equally long lists, got {shown(zipped)}")])
        problems: list[Problem] = []
        axes = {
            key: axis_values(workload, key, given, (str(key),), problems)
            for key, given in value.items()
            if key not in ("kind", ZIP)
        }
        together = {key: axis_values(workload, key, given, (ZIP, str(key)), problems) for key, given in zipped.items()}
        for key in axes.keys() & together.keys():
            problems.append(((ZIP, str(key)), f"{key!r} is given both beside and inside zip: choose one"))
        lengths = {key: len(values) for key, values in together.items()}
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            problems.append(((ZIP,), f"the lists of zip must be equally long: {text}"))
        points = math.prod(map(len, axes.values())) * max(lengths.values(), default=1)
        if points > MOST_POINTS:
            problems.append(((), f"its axes make {points:,} points: at most {MOST_POINTS:,}, split the sweep"))
        if problems:
            refuse(problems)
        return {"kind": workload.kind, "axes": axes, "together": together}

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.axes, **({ZIP: self.together} if self.together else {})}

    @property
    def needs_model(self) -> bool:
        return workloads()[self.kind].needs_model

    def points(self) -> Iterator[WorkloadPoint]:
        """Every point: the zipped rows outermost, then the product in the order in which the file names the axes."""
        workload = workloads()[self.kind]
        rows = list(zip(*self.together.values(), strict=True)) if self.together else [()]
        names = [*self.together, *self.axes]
        for row in rows:
            for values in itertools.product(*self.axes.values()):
                yield workload.point(dict(zip(names, (*row, *values), strict=True)))


def known_workload(kind: object, given: bool = True) -> Workload:
    """The workload of that kind; refuses (at `kind`) what is not one."""
    known = workloads()
    if not given:
        refuse([((), f"a workload needs its kind, one of {', '.join(known)}")])
    if not isinstance(kind, str) or kind not in known:
        refuse([(("kind",), f"unknown workload {shown(kind)}{nearest(str(kind), list(known))}")])
    return known[kind]


def axis_values(
    workload: Workload, key: object, given: object, location: Location, problems: list[Problem]
) -> list[Scalar]:
    """The values of one axis as a list, each of the axis's type; adds what is wrong to `problems`."""
    if not isinstance(key, str) or key not in workload.axes:
        names = nearest(str(key), [*workload.axes, ZIP])
        problems.append((location, f"workload {workload.kind!r} has no axis {str(key)!r}{names}"))
        return []
    values = given if isinstance(given, list) else [given]
    if not values:
        problems.append((location, f"{key} is an empty list: it needs at least one value"))
    result: list[Scalar] = []
    for index, value in enumerate(values):
        place = (*location, index) if isinstance(given, list) else location
        reason = _impossible(value, workload.axes[key], workload.choices.get(key))
        if reason is None and value in result and ZIP not in location:
            reason = "is given twice"
        if reason is not None:
            problems.append((place, f"{key}: {shown(value)} {reason}"))
        else:
            result.append(float(value) if isinstance(workload.axes[key], float) else value)
    return result


def _impossible(value: object, default: Scalar, choices: tuple[Scalar, ...] | None) -> str | None:
    wanted = type(default)
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits:
        names = {bool: "true or false", int: "a positive integer", float: "a number", str: "text"}
        return f"is not {names[wanted]}" + (f", such as {default!r}" if wanted is not bool else "")
    if choices is not None and value not in choices:
        return f"is not possible{nearest(str(value), [str(choice) for choice in choices])}"
    if wanted is int and isinstance(value, int) and not 0 < value <= LARGEST:
        return f"is not a positive integer up to {LARGEST}"
    if wanted is float and isinstance(value, int | float) and not math.isfinite(value):
        return "is not finite"
    return None
