"""Whether a decode loop does what its step does when it is launched: the tokens, and the keys and values in its cache.

Tokens alone say little: rounding takes two loops apart at the first near tie, and models that repeat themselves give
the same tokens with half of their cache lost.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.workloads._decode_cache import held_tensors

if TYPE_CHECKING:
    from tasks.workloads.decode import DecodeStep

BLOCK = 64  # positions
TIE = 0.1  # of what the best score is above the mean: what is further below it is no tie, whatever rounds


@dataclass(frozen=True)
class Comparison:
    """A request of the loop, and its tokens given to launched steps one by one.

    `same`: the launched steps choose these tokens. `distance`: where they do not, how far the tokens that differ are at
    most from what steps that are not compiled would choose (`DecodeStep.distances`). `cache`: the greatest relative
    difference (Frobenius norm) of keys or values, over layers, sequences and blocks of positions. `rounding`: the same
    between the launched steps and all tokens read at once, which is what another order of the arithmetic does to this
    model, and more where its kernels for many tokens round otherwise; None where nothing differs, or the model cannot
    read so much at once. `eps` is that of the cache's dtype.
    """

    same: bool
    distance: float = 0.0
    cache: float = 0.0
    rounding: float | None = None
    eps: float = 0.0


def compared(step: DecodeStep) -> Comparison:
    """The first request as `step` runs it now, compared with launched steps; leaves the state after a request."""
    import torch

    step.run(0, _ignore)
    fed, tokens = step.steps, step.ledger.result()
    ours = _on_the_host(step)
    if step.ledger.problems(0) or not ours:
        return Comparison(same=False, distance=math.inf, cache=math.inf)
    lengths = step.chosen_lengths()
    launched = torch.stack([chosen.clone() for chosen in step.forced(tokens, fed + 1)], dim=1)
    differ = (launched != tokens[:, : fed + 1]) & step.chosen(fed + 1)
    cache = _apart(ours, step, lengths)
    del ours
    same = not bool(differ.any())
    rounding = None if same and cache == 0 else _rounding(step, tokens, fed, lengths)
    distance = 0.0 if same else float(step.distances(tokens, fed + 1)[differ].max())
    step.run(0, _ignore)
    eps = max(torch.finfo(value.dtype).eps for value in held_tensors(step.cache))
    return Comparison(same=same, distance=distance, cache=cache, rounding=rounding, eps=eps)


def furthest(step: DecodeStep, inside: AbstractContextManager[None]) -> float:
    """How far a token of the first request, as `step` runs it now, is at most from what single steps `inside` choose.

    Those are not compiled; 0 where they choose all of these tokens (`DecodeStep.distances`).
    """
    step.run(0, _ignore)
    columns, tokens = step.steps + 1, step.ledger.result()
    with inside:
        return float(step.distances(tokens, columns)[step.chosen(columns)].max())


def _ignore(_label: str) -> None:
    return


def _on_the_host(step: DecodeStep) -> list[Any]:
    """Copies of keys and values: they may be most of what the device holds."""
    return [value.to("cpu", copy=True) for value in held_tensors(step.cache)]


def _rounding(step: DecodeStep, tokens: Any, fed: int, lengths: Any) -> float | None:
    launched = _on_the_host(step)
    try:
        step.read_at_once(tokens, fed)
    except RuntimeError:  # out of memory too: shapes that no request has, and that not every kernel takes
        return None
    return _apart(launched, step, lengths)


def _apart(before: list[Any], step: DecodeStep, lengths: Any) -> float:
    """The greatest relative difference of keys or values from what they were `before`; infinite where one is none.

    Looked at are the prompt and the tokens that were fed before a sequence ended.
    """
    import torch

    worst = 0.0
    for kept, now in zip(before, held_tensors(step.cache), strict=True):  # (batch, heads, positions, head size)
        ends = (step.prompt_tokens + lengths - 1).tolist()
        whole = now.shape[2] >= max(ends)  # a layer that keeps a window only has no room for all: it is full then
        for row, end in enumerate(ends):  # one by one, since there may be little memory left
            until = end if whole else now.shape[2]
            here = now[row, :, :until].float()
            difference = kept[row, :, :until].to(now.device).float() - here
            squares = [_blocks(value.square().sum((0, 2)), step.prompt_tokens) for value in (difference, here)]
            ratio = (squares[0] / squares[1]).sqrt()
            ratio = torch.where(squares[0] == 0, 0.0, ratio)
            worst = max(worst, *(value if math.isfinite(value) else math.inf for value in ratio.tolist()))
    return worst


def _blocks(values: Any, prompt_tokens: int) -> Any:
    """Sums over blocks of positions, none of which holds both prompt and new tokens."""
    import torch

    parts = [
        part for half in (values[:prompt_tokens], values[prompt_tokens:]) for part in half.split(BLOCK) if len(part)
    ]
    return torch.stack([part.sum() for part in parts])
