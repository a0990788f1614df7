"""Discovery of optimizations, workloads and metrics; a broken file is an error that names it, never a silence."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tasks.metric import Metric
from tasks.optimization import FAMILIES, Optimization
from tasks.workload import Workload


class RegistryError(RuntimeError):
    """A technique, workload or metric file is broken or clashes with another."""


@cache
def optimizations() -> dict[str, Optimization]:
    """Name -> technique, from `tasks/optimizations/` and the entry-point group `benchmatrix.optimizations`."""
    found = {cls.name: cls() for cls in _classes("tasks.optimizations", Optimization)}
    for point in entry_points(group="benchmatrix.optimizations"):
        try:
            technique = point.load()()
        except Exception as error:
            raise RegistryError(f"entry point {point.value} of benchmatrix.optimizations fails: {error}") from error
        if technique.name in found:
            raise RegistryError(f"optimization {technique.name!r} of {point.value} exists already: rename it")
        found[technique.name] = technique
    for technique in found.values():
        if technique.family not in FAMILIES:
            raise RegistryError(f"{type(technique).__module__}: family {technique.family!r} is none of {FAMILIES}")
    return dict(sorted(found.items(), key=lambda item: (FAMILIES.index(item[1].family), item[0])))


@cache
def workloads() -> dict[str, Workload]:
    """Kind -> workload, from `tasks/workloads/`."""
    return {cls.kind: cls() for cls in _classes("tasks.workloads", Workload)}


@cache
def metric_classes() -> dict[str, type[Metric]]:
    """Name -> metric class, from `tasks/metrics/`; metrics hold state, so each cell makes its own."""
    return {cls.name: cls for cls in _classes("tasks.metrics", Metric)}


def _classes(package: str, base: Any) -> list[Any]:
    """Concrete subclasses of `base` defined in the package's modules; `_private` modules hold shared code."""
    found: dict[str, Any] = {}
    for module_info in sorted(pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda m: m.name):
        if module_info.name.startswith("_"):
            continue
        name = f"{package}.{module_info.name}"
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise RegistryError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
        classes = [
            cls
            for _, cls in inspect.getmembers(module, inspect.isclass)
            if issubclass(cls, base) and cls.__module__ == name and not inspect.isabstract(cls)
        ]
        if not classes:
            raise RegistryError(f"{name} defines no {base.__name__}")
        for cls in classes:
            key = getattr(cls, "name", None) or getattr(cls, "kind", None)
            if key is None:
                raise RegistryError(f"{name}.{cls.__name__} has no name")
            if key in found:
                raise RegistryError(f"{name} and {found[key].__module__} both define {key!r}")
            found[key] = cls
    return list(found.values())
