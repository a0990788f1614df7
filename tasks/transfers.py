"""Weights that live elsewhere and are fetched for every use: a ledger of what was really moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Transfers:
    """Bytes fetched so far, how often each weight was, and the kind of device on which each fetch found it."""

    fetched_bytes: int = 0
    fetches: Counter[tuple[int, str]] = field(default_factory=Counter)
    devices: Counter[str] = field(default_factory=Counter)

    @property
    def passes(self) -> int:
        """Forward passes: times that the weight fetched most often was fetched."""
        return max(self.fetches.values(), default=0)

    @property
    def bytes_per_pass(self) -> float:
        return self.fetched_bytes / self.passes if self.passes else 0.0


class Counted(Mapping[str, "torch.Tensor"]):
    """A mapping of weights that writes every fetch into a ledger."""

    def __init__(self, weights: Mapping[str, torch.Tensor], ledger: Transfers) -> None:
        self._weights, self._ledger = weights, ledger

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        self._ledger.fetched_bytes += weight.nbytes
        self._ledger.fetches[id(self), name] += 1
        self._ledger.devices[weight.device.type] += 1
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
