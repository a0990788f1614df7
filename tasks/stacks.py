"""Parsing of stacks: `bf16+compile:mode=max-autotune` in any order becomes one canonical `Stack`."""

from __future__ import annotations

import difflib

from tasks.cell import BASELINE, Cell, Scalar, Stack, Technique
from tasks.device import DeviceInfo
from tasks.models.packing import quantized_already
from tasks.optimization import BESIDE_A_RUNTIME, FAMILIES
from tasks.registry import optimizations, workloads


class StackError(ValueError):
    """A stack that cannot be: unknown technique or option, or two of one family. The message names the nearest."""


def nearest(word: str, known: list[str], *, else_all: bool = True, cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the closest known word, else the list of known words (or nothing)."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if else_all else ""


def parse_stack(text: str) -> Stack:
    """Parse `name[:key=value,...]` joined by `+`; raises `StackError`. Default option values are dropped."""
    if text.strip() == BASELINE:
        return Stack()
    techniques = [_parse_technique(part.strip()) for part in text.split("+")]
    known = optimizations()
    by_family: dict[str, str] = {}
    for technique in techniques:
        family = known[technique.name].family
        if family in by_family:
            raise StackError(
                f"{by_family[family]!r} and {technique.name!r} are both of the family {family!r}: choose one"
            )
        by_family[family] = technique.name
    return Stack(techniques=tuple(sorted(techniques, key=lambda item: FAMILIES.index(known[item.name].family))))


def _parse_technique(text: str) -> Technique:
    name, _, tail = text.partition(":")
    known = optimizations()
    if name == BASELINE:
        raise StackError(f"{BASELINE!r} is the empty stack and cannot be combined")
    if name not in known:
        raise StackError(f"unknown optimization {name!r}{nearest(name, [BASELINE, *known])}")
    technique, options = known[name], {}
    for pair in filter(None, tail.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise StackError(f"option {pair!r} of {name!r} is not key=value")
        if key not in technique.options:
            if not technique.options:
                raise StackError(f"{name!r} takes no options, got {key!r}")
            raise StackError(f"unknown option {key!r} of {name!r}{nearest(key, list(technique.options))}")
        if key in options:
            raise StackError(f"option {key!r} of {name!r} is given twice")
        options[key] = _convert(name, key, value, technique.options[key], technique.choices.get(key))
    chosen = {key: value for key, value in options.items() if value != technique.options[key]}
    return Technique(name=name, options=tuple(sorted(chosen.items())))


def _convert(name: str, key: str, value: str, default: Scalar, choices: tuple[Scalar, ...] | None) -> Scalar:
    read = {"true": True, "false": False}.__getitem__ if isinstance(default, bool) else type(default)
    try:
        converted: Scalar = read(value.lower() if isinstance(default, bool) else value)
    except (KeyError, ValueError):
        raise StackError(
            f"option {key!r} of {name!r} must be {type(default).__name__}, such as {default!r}; got {value!r}"
        ) from None
    if choices is not None and converted not in choices:
        raise StackError(f"option {key!r} of {name!r} cannot be {value!r}, it is one of {', '.join(map(str, choices))}")
    return converted


def option(technique: Technique, key: str) -> Scalar:
    """The option's value in the stack, or the technique's default."""
    value = technique.option(key)
    return optimizations()[technique.name].options[key] if value is None else value


def unsupported(cell: Cell, device: DeviceInfo) -> str | None:
    """The first reason why this cell cannot work on `device`, or None."""
    reason = workloads()[cell.workload.kind].unsupported(cell, device)
    if reason:
        return reason
    published = quantized_already(cell.model)
    if published is not None and published.method not in cell.stack.names():
        return f"{cell.model.id} is quantized already: its stack must have {published.method}, which loads it as it is"
    known = optimizations()
    for technique in cell.stack.techniques:
        reason = known[technique.name].unsupported(cell, device)
        if reason:
            return reason
    return _beside_a_runtime(cell)


def _beside_a_runtime(cell: Cell) -> str | None:
    """Why a technique cannot change a model that does not run in torch, or None."""
    stack = [optimizations()[technique.name] for technique in cell.stack.techniques]
    for brought in (technique for technique in stack if technique.runtime):
        for other in stack:
            allowed = other.family in BESIDE_A_RUNTIME or other.name in brought.runtime_takes or other is brought
            if not allowed:
                why = f"that runs in {other.runtime}" if other.runtime else "that changes a model in torch"
                return f"{brought.name} runs the model in {brought.runtime}: no {other.name} ({other.family}), {why}"
    return None


def freezes_weights(cell: Cell) -> bool:
    """Whether training changes none of the model's own weights, but an adapter's."""
    known = optimizations()
    return any(known[technique.name].freezes_weights for technique in cell.stack.techniques)


def precision_of(cell: Cell) -> str | None:
    """Name of the stack's precision technique, or None when the model keeps its published dtype."""
    known = optimizations()
    names = (technique.name for technique in cell.stack.techniques if known[technique.name].family == "precision")
    return next(names, None)
