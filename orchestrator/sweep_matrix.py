"""The matrix itself: which stacks are compared in which group, after includes and excludes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.cell import NO_MODEL, ModelSpec, Stack, WorkloadPoint
from tasks.stacks import parse_stack

if TYPE_CHECKING:
    from orchestrator.sweep import Sweep
    from orchestrator.sweep_selection import Exclude, Include
    from orchestrator.sweep_workloads import WorkloadEntry

Key = tuple[str, str, WorkloadPoint]  # resolved hardware, model id, workload point


@dataclass(kw_only=True, slots=True)
class Group:
    """What is compared with each other: one model, workload point and device; `stacks` has the baseline first.

    `named` has the stacks as the sweep names them, the baseline in its own place or not at all.
    """

    model: ModelSpec
    point: WorkloadPoint
    hardware: str
    hardware_requested: str
    stacks: dict[Stack, None] = field(default_factory=dict)
    named: dict[Stack, None] = field(default_factory=dict)

    def rungs(self) -> dict[Stack, int]:
        """Where each stack stands among those of the group as the sweep names them; a baseline it does not is first."""
        unnamed = [stack for stack in self.stacks if stack not in self.named]
        return {stack: number for number, stack in enumerate([*unnamed, *self.named])}


def groups(sweep: Sweep, resolve: Callable[[str], str]) -> Iterable[Group]:
    """The groups of the whole sweep in its order; `resolve` turns the word `local` into a tag.

    A group keeps its baseline as long as it keeps any other stack. Includes come after excludes.
    """
    found: dict[Key, Group] = {}
    baseline = parse_stack(sweep.baseline)
    listed = [parse_stack(text) for text in sweep.optimizations]
    excluded = [_Excluder(exclude, listed) for exclude in sweep.exclude]
    for group in _product([model.spec for model in sweep.models], sweep.workloads, sweep.hardware, resolve):
        left_out = set[Stack]().union(*(exclude.stacks_in(group) for exclude in excluded))
        kept = [stack for stack in listed if stack not in left_out]
        if kept:
            _add(found, group, baseline, kept)
    for include in sweep.include:
        for group, stacks in included(sweep, include, resolve):
            _add(found, group, baseline, stacks)
    return found.values()


def included(sweep: Sweep, include: Include, resolve: Callable[[str], str]) -> Iterator[tuple[Group, list[Stack]]]:
    """The groups that one include touches, and the stacks that it asks for in each."""
    stacks = [parse_stack(text) for text in include.optimization or sweep.optimizations]
    models = [model.spec for model in include.model or sweep.models]
    for group in _product(models, include.workload or sweep.workloads, include.hardware or sweep.hardware, resolve):
        yield group, stacks


def matches_nothing(sweep: Sweep, exclude: Exclude) -> bool:
    """Whether an exclude leaves out no cell of the product. The tag behind `local` may be any."""
    excluder = _Excluder(exclude, [parse_stack(text) for text in sweep.optimizations])
    resolve = _any_of(exclude.hardware)
    models = [model.spec for model in sweep.models]
    return not any(excluder.stacks_in(group) for group in _product(models, sweep.workloads, sweep.hardware, resolve))


def _any_of(patterns: Sequence[str]) -> Callable[[str], str]:
    return lambda word: patterns[0] if word == "local" and patterns else word


class _Excluder:
    """One exclude, with what does not depend on the workload point decided once."""

    def __init__(self, exclude: Exclude, stacks: Sequence[Stack]) -> None:
        self._exclude = exclude
        self._stacks = frozenset(stack for stack in stacks if exclude.matches_stack(stack))
        self._places: dict[tuple[str, str, str], bool] = {}

    def stacks_in(self, group: Group) -> frozenset[Stack]:
        place = (group.model.id, group.hardware_requested, group.hardware)
        if place not in self._places:
            self._places[place] = self._exclude.matches_model(place[0]) and self._exclude.matches_hardware(*place[1:])
        inside = self._places[place] and self._exclude.matches_point(group.point)
        return self._stacks if inside else frozenset()


def _product(
    models: Sequence[ModelSpec],
    workloads: Sequence[WorkloadEntry],
    hardware: Sequence[str],
    resolve: Callable[[str], str],
) -> Iterator[Group]:
    """Groups without stacks: hardware, then model, then workload; kernels once, after the models."""
    with_model = [point for workload in workloads if workload.needs_model for point in workload.points()]
    kernels = [point for workload in workloads if not workload.needs_model for point in workload.points()]
    for word in hardware:
        tag = resolve(word)
        for model, points in (*((model, with_model) for model in models), (NO_MODEL, kernels)):
            for point in points:
                yield Group(model=model, point=point, hardware=tag, hardware_requested=word)


def _add(found: dict[Key, Group], group: Group, baseline: Stack, stacks: Iterable[Stack]) -> None:
    known = found.setdefault((group.hardware, group.model.id, group.point), group)
    known.named.update(dict.fromkeys(stacks))
    known.stacks.update(dict.fromkeys([baseline, *known.named]))
