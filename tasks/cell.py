"""The identity of a measurement: model x workload point x stack x hardware, frozen, with a stable id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
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
    return text_digest(canonical_json(value), length)


def text_digest(text: str, length: int = ID_LENGTH) -> str:
    """The same of a text that is canonical JSON already."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


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


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Techniques in the canonical order of their families; empty means the model as published."""

    techniques: tuple[Technique, ...] = ()

    @cached_property
    def _text(self) -> str:
        return "+".join(map(str, self.techniques)) or BASELINE

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(technique.name for technique in self.techniques)

    def names(self) -> tuple[str, ...]:
        return self._names


@dataclass(frozen=True, kw_only=True)
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

    @cached_property
    def identity_json(self) -> str:
        return canonical_json(self.identity())


NO_MODEL = ModelSpec(id="none", source="none", kind="none")


@dataclass(frozen=True, kw_only=True)
class WorkloadPoint:
    """One point of a workload's axes: every parameter a scalar, defaults filled in, sorted by name."""

    kind: str
    parameters: tuple[tuple[str, Scalar], ...] = ()

    @cached_property
    def _values(self) -> dict[str, Scalar]:
        return dict(self.parameters)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    @cached_property
    def identity_json(self) -> str:
        return canonical_json([self.kind, self._values])

    @cached_property
    def _text(self) -> str:
        return f"{self.kind}[{','.join(f'{key}={_text(value)}' for key, value in self.parameters)}]"

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the matrix. `baseline` is the stack that its ratios are taken against."""

    model: ModelSpec
    workload: WorkloadPoint
    stack: Stack
    hardware: str
    baseline: Stack = field(default_factory=Stack)

    @cached_property
    def cell_id(self) -> str:
        return self._id_with(str(self.stack))

    @cached_property
    def baseline_id(self) -> str:
        return self._id_with(str(self.baseline))

    @cached_property
    def group_id(self) -> str:
        """Equal for the cells that are compared with each other: all but the stack."""
        return self._id_with(None)

    def _id_with(self, stack: str | None) -> str:
        """`digest` of hardware, model, stack and workload, put together from parts that many cells share."""
        return text_digest(
            f'{{"hardware":{_shared_json(self.hardware)},"model":{self.model.identity_json},'
            f'"stack":{_shared_json(stack)},"workload":{self.workload.identity_json}}}'
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


@lru_cache(maxsize=4096)
def _shared_json(text: str | None) -> str:
    return canonical_json(text)


def _stack_to_list(stack: Stack) -> list[dict[str, Any]]:
    return [{"name": technique.name, "options": dict(technique.options)} for technique in stack.techniques]


def _stack_from_list(data: list[dict[str, Any]]) -> Stack:
    return Stack(
        techniques=tuple(Technique(name=item["name"], options=tuple(sorted(item["options"].items()))) for item in data)
    )


def _text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
