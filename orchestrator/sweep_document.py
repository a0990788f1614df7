"""The sweep file as text: YAML with the line of every key and value, `--set` overrides and named scales."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from tasks.stacks import nearest

Location = tuple[int | str, ...]
SCALE, SCALES = "scale", "scales"


class SweepError(ValueError):
    """Bad input of a sweep. The text is `FILE:LINE: message`, one line for each problem."""


MOST_VALUES = 1_000_000


@dataclass(kw_only=True)
class Document:
    """A parsed YAML mapping that remembers where each of its parts came from: a line, or an override's text."""

    source: str
    data: dict[str, Any]
    node: yaml.MappingNode | None = None
    origins: dict[Location, str | Location] = field(default_factory=dict)

    def prefix(self, location: Location) -> str:
        """`FILE:LINE` of the part at `location` or of its nearest ancestor, or the `--set` that put it there."""
        ancestors = [location[:length] for length in range(len(location), 0, -1)]
        for ancestor in ancestors:
            if (origin := self.origins.get(ancestor)) is not None:
                return origin if isinstance(origin, str) else self.prefix(origin + location[len(ancestor) :])
        for ancestor in ancestors:
            if (line := self._line(ancestor)) is not None:
                return f"{self.source}:{line}"
        return self.source if self.node is None else f"{self.source}:{self.node.start_mark.line + 1}"

    def _line(self, location: Location) -> int | None:
        node: yaml.Node | None = self.node
        line = None
        for step in location:
            if isinstance(node, yaml.MappingNode):
                matching = [(key, value) for key, value in node.value if key.value == str(step)]
                if not matching:
                    return None
                key, node = matching[-1]
                line = key.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line + 1
            else:
                return None
        return line

    def error(self, problems: Sequence[tuple[Location, str]]) -> SweepError:
        return SweepError("\n".join(f"{self.prefix(location)}: {message}" for location, message in problems))


def parse(text: str, source: str) -> Document:
    """Parse YAML text; refuses what is not one mapping, and keys that are given twice."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _refuse_duplicate_keys(node, source)
        _refuse_expansion(node, source)
        data = None if node is None else _unshared(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise SweepError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise SweepError(f"{source}:1: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, SweepError):
            raise
        raise SweepError(f"{source}:1: not valid YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(data, dict):
        what = "empty" if data is None else f"a {type(data).__name__}"
        raise SweepError(f"{source}:1: a sweep is a mapping with models, workloads and optimizations; this is {what}")
    return Document(source=source, data=data, node=node)


def _refuse_duplicate_keys(root: yaml.Node | None, source: str) -> None:
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if key.value in first:
                        known = first[key.value]
                        raise SweepError(f"{source}:{line}: key {key.value!r} is given twice, first on line {known}")
                    first[key.value] = line
                pending.append(value)


def _refuse_expansion(root: yaml.Node | None, source: str) -> None:
    """A few lines of aliases of aliases are billions of values once each has its own copy."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            scalar = isinstance(node, yaml.ScalarNode)
            sizes[id(node)] = 1 if scalar else 1 + sum(size(part) for part in parts)
            if sizes[id(node)] > MOST_VALUES:
                raise SweepError(
                    f"{source}:{node.start_mark.line + 1}: with its aliases written out this has more than "
                    f"{MOST_VALUES:,} values"
                )
        return sizes[id(node)]

    if root is not None:
        size(root)


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Choose the scale, merge its block, then apply each `key=value`; `scale` and `scales` leave the data."""
    parsed = [_parse_override(text) for text in overrides]
    scales = document.data.pop(SCALES, None)
    scale: tuple[str | Location, Any] | None = None
    if SCALE in document.data:
        scale = (SCALE,), document.data.pop(SCALE)
    for text, path, value in parsed:
        if path == (SCALE,):
            scale = text, value
    if scale is not None:
        _merge_scale(document, scales, *scale)
    for text, path, value in parsed:
        if path != (SCALE,):
            _set(document, path, value, origin=text, text=text)


def _parse_override(override: str) -> tuple[str, Location, Any]:
    key, equals, value = override.partition("=")
    text = f"--set {override}"
    if not equals or not all(key.strip().split(".")):
        raise SweepError(f"{text}: write key=value, such as profile=standard or limits.cell_timeout_s=60")
    try:
        return text, _path(key.strip()), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SweepError(f"{text}: the value is not valid YAML: {' '.join(str(error).split())}") from None


def _path(key: str) -> Location:
    return tuple(int(part) if re.fullmatch(r"\d+", part) else part for part in key.split("."))


def _merge_scale(document: Document, scales: Any, origin: str | Location, name: Any) -> None:
    where = origin if isinstance(origin, str) else document.prefix(origin)
    if not isinstance(scales, dict) or not all(isinstance(block, dict) for block in scales.values()):
        if scales is None:
            raise SweepError(f"{where}: scale {name!r} is chosen, but the sweep defines no scales")
        raise SweepError(f"{document.prefix((SCALES,))}: scales maps each name to a mapping of settings")
    if name not in scales:
        raise SweepError(f"{where}: unknown scale {name!r}{nearest(str(name), [str(known) for known in scales])}")
    for key, value in scales[name].items():
        place = (SCALES, name, key)
        _set(document, _path(str(key)), value, origin=place, text=document.prefix(place))


def _set(document: Document, path: Location, value: Any, *, origin: str | Location, text: str) -> None:
    """Put `value` at `path`; mappings merge, everything else is replaced. `text` names it in errors."""
    target: Any = document.data
    for depth, step in enumerate(path[:-1]):
        target = _child(target, step, path[:depth], text, create=True)
    old = _child(target, path[-1], path[:-1], text, create=False)
    if isinstance(old, dict) and isinstance(value, dict) and isinstance(origin, tuple):
        for key, part in value.items():
            _set(document, (*path, key), part, origin=(*origin, key), text=text)
        return
    target[path[-1] if isinstance(target, list) else str(path[-1])] = value
    kept = {place: source for place, source in document.origins.items() if place[: len(path)] != path}
    document.origins = {**kept, path: origin}


def _child(target: Any, step: int | str, parent: Location, text: str, *, create: bool) -> Any:
    shown = ".".join(map(str, parent)) or "the sweep"
    if isinstance(target, list):
        if not isinstance(step, int) or step >= len(target):
            raise SweepError(f"{text}: {shown} has {len(target)} entries, numbered from 0; there is no {step!r}")
        return target[step]
    if not isinstance(target, dict):
        raise SweepError(f"{text}: {shown} is {target!r}, which has no {step!r}")
    return target.setdefault(str(step), {}) if create else target.get(str(step))


def _unshared(value: Any) -> Any:
    """A copy without aliases, so that an override changes one place only."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value
