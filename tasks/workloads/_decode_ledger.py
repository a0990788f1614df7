"""What one request of a batch has produced so far, on the device: tokens, and which sequences have ended.

Lengths are drawn before anything is timed, so that every stack does the same work, as serving benchmarks do that ignore
the model's own stop token: the loop puts the stop token where a sequence is to end, and keeps the model from choosing
it elsewhere. From there on the check is a real one: on the device, from the tokens, without knowing the lengths.
"""

from __future__ import annotations

import random
from typing import Any

UNWRITTEN = -1


def stop_lengths(
    batch: int, new_tokens: int, shortest: float, longest: float, *, sets: int, seed: int
) -> list[list[int]]:
    """Tokens of each sequence, its stop token included, for `sets` batches: the same lengths in another order.

    Evenly spaced between the two shares of `new_tokens`, at least 2; a single sequence has the longest.
    """
    low, high = (min(max(2, round(share * new_tokens)), new_tokens) for share in (shortest, longest))
    gaps = max(batch - 1, 1)
    lengths = [round(high - (high - low) * index / gaps) for index in range(batch)]
    draw = random.Random(seed)
    return [draw.sample(lengths, batch) for _ in range(sets)]


def stop_token(config: Any, vocabulary: int) -> int:
    """The model's own stop token where it has one inside its vocabulary, else the last token."""
    own = getattr(config.get_text_config(), "eos_token_id", None)
    first = own[0] if isinstance(own, list) and own else own
    return first if isinstance(first, int) and 0 <= first < vocabulary else vocabulary - 1


class Ledger:
    """Tensors of fixed addresses, so that a CUDA graph can hold `accept`.

    `tokens` (batch, new_tokens) int64, `UNWRITTEN` where nothing was generated; `input` (batch, 1) the last tokens;
    `position` (1,) the column that comes next. With `watched`: `status` (1,) and `flags` (new_tokens,), one slot for
    each column, hold `epoch` while a sequence goes on and `epoch + 1` once all have ended; every request has an epoch
    of its own, so that a slot never holds an older request's answer.
    """

    def __init__(
        self,
        device: Any,
        batch: int,
        new_tokens: int,
        *,
        watched: bool,
        flags: Any = None,
        lengths: list[list[int]] | None = None,
        stop: int = UNWRITTEN,
    ) -> None:
        import torch

        def integers(*shape: int) -> Any:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.tokens, self.input, self.position = integers(batch, new_tokens), integers(batch, 1), integers(1)
        self.watched, self.stop, self.pad = watched, stop, 0 if stop else 1
        self.lengths = lengths or [[new_tokens] * batch]
        self._new = new_tokens
        self.epoch = 0  # as the host counts it
        self.flags, self.status, self._epoch = flags, integers(1), integers(1)
        self._finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._scheduled = lengths is not None
        self._ends = torch.tensor(self.lengths, device=device) - 1
        self._ends_at = integers(batch)

    def begin(self, index: int) -> None:
        """Forget the last request; `index` chooses the lengths."""
        self.tokens.fill_(UNWRITTEN)
        self.position.zero_()
        if self.watched:
            self.epoch += 2
            self._epoch.fill_(self.epoch)
            self._finished.zero_()
            self._ends_at.copy_(self._ends[index % len(self.lengths)])

    def accept(self, token: Any) -> None:
        """Note one token for every sequence, shape (batch,); those that have ended are padded."""
        import torch

        if self.watched:
            if self._scheduled:
                token = token.masked_fill(self._ends_at == self.position, self.stop)
            token = token.masked_fill(self._finished, self.pad)
            self._finished.logical_or_(token == self.stop)
            torch.add(self._epoch, self._finished.all(), out=self.status)
            if self.flags is not None:
                self.flags.index_copy_(0, self.position, self.status)
        column = token.unsqueeze(1)
        self.tokens.index_copy_(1, self.position, column)
        self.input.copy_(column)
        self.position.add_(1)

    def end_all(self) -> None:
        """From the next token on every sequence has ended, as if each had chosen its stop token now."""
        self._finished.fill_(True)

    @property
    def longest(self) -> int:
        """Tokens of the sequence that ends last; the same for every request."""
        return max(self.lengths[0])

    def result(self) -> Any:
        """Tokens of the request, shape (batch, new_tokens), padded where a sequence had ended."""
        return self.tokens.masked_fill(self.tokens == UNWRITTEN, self.pad) if self.watched else self.tokens.clone()

    def problems(self, index: int) -> list[str]:
        """Findings on request `index`: tokens missing, or a stop token that is not where the sequence ended."""
        import torch

        ends = self._ends[index % len(self.lengths)].unsqueeze(1)
        columns = torch.arange(self._new, device=self.tokens.device).unsqueeze(0)
        real = columns <= ends
        found = []
        if bool((self.tokens[real] < 0).any()):
            found.append("wrong_token_count")
        if self._scheduled:
            stops = self.tokens == self.stop
            after = self.tokens[~real]
            padded = bool(((after == self.pad) | (after == UNWRITTEN)).all())
            if not (stops == (columns == ends)).all() or not padded:
                found.append("wrong_stop")
        return found
