"""Whether a decode loop does what its step does when it is launched: the tokens, and the keys and values in its cache.

Tokens alone say little: rounding takes two loops apart at the first near tie, and models that repeat themselves give
the same tokens with half of their cache lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.workloads._decode_cache import held_tensors

if TYPE_CHECKING:
    from tasks.workloads.decode import DecodeStep

LOOKED_AT = 8  # sequences


@dataclass(frozen=True)
class Comparison:
    """A request of the loop, and its tokens given to launched steps one by one.

    `same`: the launched steps choose these tokens. `distance`: where they do not, how far the tokens of the first
    sequences that differ are from the greedy choice (`DecodeStep.distance`). `cache`: the greatest relative difference
    (Frobenius norm) of any layer's keys or values, of the prompt or of the new tokens. `rounding`: the same between the
    launched steps and all tokens read at once, which is what another order of the arithmetic does to this model. `eps`
    is that of the cache's dtype.
    """

    same: bool
    distance: float = 0.0
    cache: float = 0.0
    rounding: float = 0.0
    eps: float = 0.0


def compared(step: DecodeStep, otherwise: AbstractContextManager[None]) -> Comparison:
    """The first request as `step` runs it now, compared with launched steps inside `otherwise`."""
    import torch

    step.run(0, _ignore)
    tokens = step.ledger.result()
    if step.ledger.problems(0):
        return Comparison(same=False, distance=math.inf, cache=math.inf)
    lengths = torch.tensor([step.chosen(row) for row in range(len(tokens))], device=tokens.device)
    columns = torch.arange(int(lengths.max()), device=tokens.device)
    ours = _kept(step)
    with otherwise:
        chosen = torch.stack(list(_launched(step, tokens, len(columns))), dim=1)
    cache = _apart(ours, step, lengths)
    differ = ((chosen != tokens[:, : len(columns)]) & (columns < lengths[:, None])).any(1).nonzero().flatten().tolist()
    theirs = _kept(step)
    step.read_at_once(tokens, len(columns) - 1)
    rounding = _apart(theirs, step, lengths)
    distance = max((step.distance(row, tokens[row]) for row in differ[:LOOKED_AT]), default=0.0)
    step.run(0, _ignore)  # so that ledger and cache are those of a request again
    return Comparison(
        same=not differ, distance=distance, cache=cache, rounding=rounding,
        eps=max(torch.finfo(value.dtype).eps for value in theirs),
    )  # fmt: skip


def _ignore(_label: str) -> None:
    return


def _launched(step: DecodeStep, tokens: Any, columns: int) -> Iterator[Any]:
    """What the step chooses, (batch,) for each column, if it is given these tokens."""
    for token in step.forced(tokens, columns):
        yield token.clone()


def _kept(step: DecodeStep) -> list[Any]:
    """Copies of the keys and values on the host, where there is room for them."""
    return [value.to("cpu", copy=True) for value in held_tensors(step.cache)]


def _apart(before: list[Any], step: DecodeStep, lengths: Any) -> float:
    import torch

    worst = 0.0
    for kept, now in zip(before, held_tensors(step.cache), strict=True):
        # (batch, heads, positions, head size); a token is written when it is fed, the last one never is
        positions = torch.arange(now.shape[2], device=now.device)
        ends = step.prompt_tokens + lengths[:, None] - 1
        new = (positions >= step.prompt_tokens) & (positions < ends)
        old = (positions < step.prompt_tokens).expand_as(new)
        # a layer that keeps a window only has no room for all: then everything in it counts
        parts = (old, new) if now.shape[2] >= int(ends.max()) else (torch.ones_like(new),)
        apart, size = (torch.zeros(len(parts), device=now.device) for _ in range(2))
        for row in range(len(now)):  # one by one, since there may be little memory left
            here = now[row].float()
            difference = kept[row].to(now.device).float() - here
            for index, part in enumerate(parts):
                inside = part[row][None, :, None]
                apart[index] += (difference * inside).square().sum()
                size[index] += (here * inside).square().sum()
        for found, whole in zip(apart.sqrt().tolist(), size.sqrt().tolist(), strict=True):
            if not math.isfinite(found + whole) or found > 0:
                worst = max(worst, found / whole if whole > 0 and math.isfinite(found / whole) else math.inf)
    return worst
