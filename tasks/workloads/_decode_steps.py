"""How a decode loop gets its next token: through a KV cache, or by running the whole sequence again; and how it is
chosen from the logits.

Random numbers are drawn by an eager kernel, never by compiled code: before the compiled part of a step, and inside the
graph of a captured one, which advances the same generator. So every loop sees the same ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.workloads._inputs import vocabulary

if TYPE_CHECKING:
    from tasks.session import Session


class Chooser:
    """Greedy: the most probable token. `banned` is a token that it never chooses, None for none."""

    noise: Any = None
    generator: Any = None

    def __init__(self, banned: int | None = None) -> None:
        self.banned = banned

    def begin(self, index: int) -> None:
        """Before request `index`: the same request draws the same numbers."""

    def draw(self) -> None:
        """Before every token."""

    def __call__(self, logits: Any, noise: Any) -> Any:
        """Token ids, shape (batch,), of logits, shape (batch, vocabulary)."""
        return self._allowed(logits).argmax(-1)

    def scores(self, logits: Any, noise: Any) -> Any:
        """Scores in fp32, shape (batch, vocabulary): the greatest that is not banned is chosen."""
        return logits.float()

    def _allowed(self, logits: Any) -> Any:
        if self.banned is not None:
            logits.select(-1, self.banned).fill_(float("-inf"))
        return logits


class Sampler(Chooser):
    """Multinomial sampling: the greatest of probability over an exponential variable, which needs no synchronisation.

    That is how `torch.multinomial` draws one sample, without its check of the probabilities on the host.
    """

    def __init__(self, session: Session, batch: int, temperature: float, banned: int | None = None) -> None:
        import torch

        super().__init__(banned)
        assert session.loaded is not None
        self._temperature, self._seed = temperature, session.job.seed
        self.generator = torch.Generator(session.device)
        self.noise = torch.ones(batch, vocabulary(session.loaded.config), device=session.device)

    def begin(self, index: int) -> None:
        self.generator.manual_seed(self._seed * 1_000_003 + index)

    def draw(self) -> None:
        self.noise.exponential_(generator=self.generator)

    def __call__(self, logits: Any, noise: Any) -> Any:
        probabilities = (self._allowed(logits).float() / self._temperature).softmax(-1)
        return (probabilities / noise).argmax(-1)

    def scores(self, logits: Any, noise: Any) -> Any:
        return (logits.float() / self._temperature).log_softmax(-1) - noise.log()


class Judge:
    """In the place of a chooser: how far given `tokens`, shape (batch, columns), are from what it chooses.

    `distances` gets one tensor of shape (batch,) for every column. A distance is how far the token's score (its logit;
    where it is sampled, with the noise of its draw) lies below the best one, as a share of what the best one is above
    the mean: 0 for the best one, infinite where there is no token, or no number.
    """

    def __init__(self, choose: Chooser, tokens: Any) -> None:
        self._choose, self._tokens, self.noise = choose, tokens, choose.noise
        self.distances: list[Any] = []

    def __call__(self, logits: Any, noise: Any) -> Any:
        tokens = self._tokens[:, len(self.distances)]
        scores = self._choose.scores(logits, noise).clone()
        known = scores.isfinite().all(-1) & (tokens >= 0)
        mean = scores.mean(-1)
        if self._choose.banned is not None:
            scores[:, self._choose.banned] = float("-inf")
        best, score = scores.amax(-1), scores.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
        self.distances.append(((best - score) / (best - mean)).where(known, float("inf")))
        return self._choose(logits, noise)


class TokenStep(ABC):
    """`first` takes the prompt, `next` the tokens that came out last; both return token ids, shape (batch,)."""

    cache: Any = None  # the live KV cache, None if there is none
    fixed: bool = False  # whether `next` always reads and writes the same addresses

    def __init__(self, session: Session, choose: Chooser) -> None:
        self._model = session.model
        self._choose: Chooser | Judge = choose
        self._step = session.compiled(self._one_step)

    @contextmanager
    def judged(self, judge: Judge) -> Iterator[None]:
        """Steps that are not compiled, for `judge`."""
        before = self._step, self._choose
        self._step, self._choose = self._one_step, judge
        try:
            yield
        finally:
            self._step, self._choose = before

    @abstractmethod
    def begin(self) -> None:
        """Make ready for a request; outside of what is timed."""

    @abstractmethod
    def first(self, prompt: Any) -> Any:
        """The whole prompt, shape (batch, prompt_tokens)."""

    @abstractmethod
    def next(self, ids: Any) -> Any:
        """One more token for each sequence; `ids` (batch, 1) are the last ones."""

    @abstractmethod
    def _one_step(self, ids: Any, cache: Any, noise: Any) -> Any:
        """What may be compiled: the next token ids, shape (batch,), after `ids`, shape (batch, positions)."""


StepFactory = Callable[["Session", Chooser, int], TokenStep]  # session, chooser, positions that a request needs


class CachedStep(TokenStep):
    """Prompt eagerly through the model, then one token at a time through the (possibly compiled) step.

    As in transformers' own `generate`, only the one-token step is compiled: its shape never changes. `make` gives a
    cache; a `fixed` one is made once and reset for every further request.
    """

    def __init__(self, session: Session, choose: Chooser, *, make: Callable[[], Any], fixed: bool) -> None:
        super().__init__(session, choose)
        self._make, self.fixed = make, fixed
        self._marks_step = session.settings.compile is not None and session.on_cuda

    def begin(self) -> None:
        if self.cache is None or not self.fixed:
            self.cache = self._make()
        else:
            self.cache.reset()

    def first(self, prompt: Any) -> Any:
        return self._one_step(prompt, self.cache, self._choose.noise)

    def next(self, ids: Any) -> Any:
        import torch

        if self._marks_step:
            # CUDA graphs may reuse the last step's output: token ids, which have been copied, and never keys and
            # values (with caches that keep a step's outputs such modes are refused)
            torch.compiler.cudagraph_mark_step_begin()
        return self._step(ids, self.cache, self._choose.noise)

    def _one_step(self, ids: Any, cache: Any, noise: Any) -> Any:
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return self._choose(logits, noise)


class RecomputedStep(TokenStep):
    """Runs the whole sequence again for every token: what the KV cache is measured against."""

    def __init__(self, session: Session, choose: Chooser, _positions: int = 0) -> None:
        super().__init__(session, choose)
        self._sequence: Any = None

    @property
    def longest(self) -> int:
        """Tokens of the longest input so far in this request."""
        return 0 if self._sequence is None else int(self._sequence.shape[1])

    def begin(self) -> None:
        self._sequence = None

    def first(self, prompt: Any) -> Any:
        self._sequence = prompt
        return self._step(prompt, None, self._choose.noise)

    def next(self, ids: Any) -> Any:
        import torch

        self._sequence = torch.cat([self._sequence, ids], dim=1)
        return self._step(self._sequence, None, self._choose.noise)

    def _one_step(self, ids: Any, cache: Any, noise: Any) -> Any:
        return self._choose(self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1], noise)
