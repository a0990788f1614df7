"""The identity of a measurement: model x workload point x stack x hardware, frozen, with a stable id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Scalar = str | int | float | bool
ModelSource = Literal["pocket", "random", "path", "hub", "factory", "none"]
ModelKind = Literal["language", "vision", "module", "none", "unknown"]

BASELINE = "baseline"
ID_LENGTH = 16


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: object, length: int = ID_LENGTH) -> str:
    """Hexadecimal prefix of the SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


@dataclass(frozen=True, kw_only=True, slots=True)
class Technique:
    """One optimization with its options, as it stands in a stack: `compile:mode=max-autotune`."""

    name: str
    options: tuple[tuple[str, Scalar], ...] = ()

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}:{','.join(f'{key}={_text(value)}' for key, value in self.options)}"

    def option(self, key: str, default: Scalar | None = None) -> Scalar | None:
        return dict(self.options).get(key, default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Techniques in the canonical order of their families; empty means the model as published."""

    techniques: tuple[Technique, ...] = ()

    def __str__(self) -> str:
        return "+".join(map(str, self.techniques)) or BASELINE

    def names(self) -> tuple[str, ...]:
        return tuple(technique.name for technique in self.techniques)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which model: `id` is the name shown, `reference` what `source` needs to find it.

    `reference` is the architecture name for `random`, a directory for `path`, `org/name` for `hub`, `module:factory`
    for `factory`, and empty for `pocket` and `none`.
    """

    id: str
    source: ModelSource
    reference: str = ""
    revision: str | None = None
    trust_remote_code: bool = False
    kind: ModelKind = "unknown"

    def identity(self) -> dict[str, Any]:
        """What makes two models the same model; `kind` is derived and so not part of it."""
        return {
            "id": self.id,
            "source": self.source,
            "reference": self.reference,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }


NO_MODEL = ModelSpec(id="none", source="none", kind="none")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadPoint:
    """One point of a workload's axes: every parameter a scalar, defaults filled in, sorted by name."""

    kind: str
    parameters: tuple[tuple[str, Scalar], ...] = ()

    def __getitem__(self, key: str) -> Any:
        return dict(self.parameters)[key]

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.parameters).get(key, default)

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(f'{key}={_text(value)}' for key, value in self.parameters)}]"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the matrix. `baseline` is the stack that its ratios are taken against."""

    model: ModelSpec
    workload: WorkloadPoint
    stack: Stack
    hardware: str
    baseline: Stack = field(default_factory=Stack)

    @property
    def cell_id(self) -> str:
        return self._id_with(self.stack)

    @property
    def baseline_id(self) -> str:
        return self._id_with(self.baseline)

    @property
    def group_id(self) -> str:
        """Equal for the cells that are compared with each other: all but the stack."""
        return self._id_with(None)

    def _id_with(self, stack: Stack | None) -> str:
        return digest(
            {
                "model": self.model.identity(),
                "workload": [self.workload.kind, dict(self.workload.parameters)],
                "stack": None if stack is None else str(stack),
                "hardware": self.hardware,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `from_dict`; crosses process and node borders."""
        return {
            "model": {**self.model.identity(), "kind": self.model.kind},
            "workload": {"kind": self.workload.kind, "parameters": dict(self.workload.parameters)},
            "stack": _stack_to_list(self.stack),
            "baseline": _stack_to_list(self.baseline),
            "hardware": self.hardware,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Cell:
        return cls(
            model=ModelSpec(**data["model"]),
            workload=WorkloadPoint(
                kind=data["workload"]["kind"], parameters=tuple(sorted(data["workload"]["parameters"].items()))
            ),
            stack=_stack_from_list(data["stack"]),
            baseline=_stack_from_list(data["baseline"]),
            hardware=data["hardware"],
        )


def _stack_to_list(stack: Stack) -> list[dict[str, Any]]:
    return [{"name": technique.name, "options": dict(technique.options)} for technique in stack.techniques]


def _stack_from_list(data: list[dict[str, Any]]) -> Stack:
    return Stack(
        techniques=tuple(Technique(name=item["name"], options=tuple(sorted(item["options"].items()))) for item in data)
    )


def _text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
