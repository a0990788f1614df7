"""Generation of tokens after a prompt, one at a time: bandwidth-bound, weights and cache are read for every token.

Without a stop condition every sequence gets `new_tokens`. With `stop: eos` the sequences of a batch end at different
lengths, from `shortest` to `longest` as shares of `new_tokens`, with a stop token that is looked for on the device;
finished ones are padded, and only real tokens count as units. Whether the loop looks, and how, is the stack's
`decode-loop`: the plain loop never looks and runs to the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from tasks.cell import Cell, WorkloadPoint
from tasks.device import DeviceInfo
from tasks.workload import END, SETUP, Mark, Step, Workload
from tasks.workloads._decode_cache import growing_cache, stored_bytes
from tasks.workloads._decode_checks import NoCheck, StopCheck
from tasks.workloads._decode_compared import Comparison, compared
from tasks.workloads._decode_costs import check_costs
from tasks.workloads._decode_ledger import Ledger, stop_lengths, stop_token
from tasks.workloads._decode_steps import Chooser, Judge, Sampler, TokenStep
from tasks.workloads._inputs import token_batches, vocabulary

if TYPE_CHECKING:
    from tasks.session import Session


class Decode(Workload):
    kind = "decode"
    summary = "generation of new_tokens after a prompt; time to first token and per token apart"
    axes = {
        "batch_size": 1,
        "prompt_tokens": 512,
        "new_tokens": 128,
        "sampling": "greedy",
        "temperature": 1.0,
        "stop": "none",
        "shortest": 0.5,
        "longest": 0.9,
    }
    choices = {"sampling": ("greedy", "multinomial"), "stop": ("none", "eos")}
    modifiers = ("sampling", "temperature", "stop", "shortest", "longest")
    model_kinds = ("language",)

    def columns(self, point: WorkloadPoint) -> dict[str, int | None]:
        return {
            "batch_size": point["batch_size"],
            "sequence_length": point["prompt_tokens"],
            "new_tokens": point["new_tokens"],
        }

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        point = self.values(cell.workload)
        if point["new_tokens"] < 2:
            return "decode needs at least 2 new tokens: the first one belongs to the prompt"
        if not 0 < point["shortest"] <= point["longest"] <= 1:
            return "decode needs 0 < shortest <= longest <= 1: they are shares of new_tokens"
        if point["temperature"] <= 0:
            return "decode needs a temperature above 0; sampling: greedy is the limit of 0"
        return super().unsupported(cell, device)

    def positions(self, point: WorkloadPoint) -> int | None:
        return int(point["prompt_tokens"]) + int(point["new_tokens"])

    def prepare(self, session: Session) -> Step:
        point = self.values(session.job.cell.workload)
        return DecodeStep(session, point, token_batches(session, point["batch_size"], point["prompt_tokens"]))


class DecodeStep(Step):
    """One call is one request. Segments: `setup` (cache reset), `first_token`, then `token` for each further one."""

    primary = "token"
    boundaries: Mapping[str, bool] = {SETUP: False, "first_token": False, END: True}
    unit = "token"

    def __init__(self, session: Session, point: dict[str, Any], prompts: list[Any]) -> None:
        settings = session.settings
        batch, self.prompt_tokens = prompts[0].shape
        self._session, self._prompts, self._new = session, prompts, point["new_tokens"]
        self.check: StopCheck = settings.stop_check() if settings.stop_check else NoCheck()
        self._scheduled = point["stop"] == "eos"
        self.ledger = self._make_ledger(batch, point)
        banned = self.ledger.stop if self._scheduled else None
        self.choose = (
            Chooser(banned)
            if point["sampling"] == "greedy"
            else Sampler(session, batch, point["temperature"], banned=banned)
        )
        factory = settings.token_step or growing_cache
        self.source: TokenStep = factory(session, self.choose, self.prompt_tokens + self._new)
        self._captured: Callable[[], None] | None = None
        self._uncaptured = False
        self._index = 0
        self.steps = 0  # of the last request, after its first token
        self.check_costs: dict[str, Any] | None = None  # columns of the stop check, once measured
        real = sum(self.ledger.lengths[0])
        self.units_per_call = real - batch
        self.energy_units_per_call = real  # a request's energy holds its prompt and its first token
        self.steps_per_call = self._steps_of(self.check)

    def _make_ledger(self, batch: int, point: dict[str, Any]) -> Ledger:
        session = self._session
        assert session.loaded is not None
        shared: dict[str, Any] = {"watched": self._scheduled or self.check.watches}
        shared["flags"] = self.check.flags(session, self._new)
        if self._scheduled:
            shared["stop"] = stop_token(session.loaded.config, vocabulary(session.loaded.config))
            shared["lengths"] = stop_lengths(
                batch, self._new, point["shortest"], point["longest"], sets=len(self._prompts), seed=session.job.seed
            )
        return Ledger(session.device, batch, self._new, **shared)

    @property
    def tokens(self) -> Any:
        """Tokens of the last request as generated, shape (batch, new_tokens)."""
        return self.ledger.tokens

    @property
    def cache(self) -> Any:
        return self.source.cache

    def run(self, index: int, mark: Mark) -> None:
        self._index = index % len(self._prompts)
        advance = self._advance_or_replay()
        self._begin()
        mark(SETUP)
        self._first()
        over, column = self.check.issued(0), 0
        mark("first_token")
        while not over and column < self._new - 1:
            column += 1
            advance()
            # the token is issued; what looking at its flag costs is the next one's time, and the last one's the end's
            mark("token")
            over = self.check.issued(column)
        self.steps = column
        mark(END)

    def _begin(self) -> None:
        self.source.begin()
        self.choose.begin(self._index)
        self.ledger.begin(self._index)
        self.check.begin(self.ledger)

    def _first(self) -> None:
        self.choose.draw()
        self.ledger.accept(self.source.first(self._prompts[self._index]))

    def _advance(self) -> None:
        """One further token for every sequence, without a word from the host: all it reads and writes is on the device.

        Calls inside it must not depend on the column, so that a graph of one step is a graph of every step.
        """
        self.choose.draw()
        self.ledger.accept(self.source.next(self.ledger.input))

    def _advance_or_replay(self) -> Callable[[], None]:
        capture = self._session.settings.capture
        if capture is None or self._uncaptured or _listened_to():
            return self._advance
        if self._captured is None:
            generators = [] if self.choose.generator is None else [self.choose.generator]
            self._captured = capture(self._restart, self._advance, generators)
        return self._captured

    def _restart(self) -> None:
        """The state in which one further token can be asked for."""
        self._begin()
        self._first()

    def run_short(self, mark: Mark = lambda _label: None, segments: int = 2) -> None:
        whole, self._new = self._new, min(self._new, 1 + segments)
        try:
            super().run_short(mark, segments)
        finally:
            self._new = whole

    @contextmanager
    def checking(self, check: StopCheck, limit: int | None = None) -> Iterator[None]:
        """Requests with another check, or with a limit of tokens; the flags stay those of the stack's own check."""
        before = self.check, self._new
        self.check, self._new = check, limit or self._new
        try:
            yield
        finally:
            self.check, self._new = before

    def _steps_of(self, check: StopCheck) -> int:
        last = check.last_column(self.ledger.longest - 1) if self._scheduled else self._new - 1
        return int(min(self._new - 1, last))

    @property
    def superfluous(self) -> int:
        """Steps of a whole request beyond the last one that any sequence needs, until the check has noticed."""
        return self.steps_per_call - (self.ledger.longest - 1)

    def ended_after(self, column: int) -> tuple[int, int]:
        """Steps of a request all of whose sequences end after `column` on the device, and how many the check needs.

        The host only says so to the device: what the loop then does, it has learnt from the check.
        """
        marked = 0

        def mark(label: str) -> None:
            nonlocal marked
            marked += label == self.primary
            if marked == column and label == self.primary:
                self.ledger.end_all()

        self.run(0, mark)
        return self.steps, int(min(self._new - 1, self.check.last_column(column + 1)))

    @contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Requests whose steps are launched one kernel at a time, also where a graph of them exists."""
        self._uncaptured = True
        try:
            yield
        finally:
            self._uncaptured = False

    def same_tokens(self, otherwise: AbstractContextManager[None]) -> bool:
        """Whether one request gives the same tokens inside `otherwise`, sequence by sequence."""
        ours = self._tokens()
        with otherwise:
            return bool(ours.equal(self._tokens()))

    def compared(self) -> Comparison:
        """A request as it runs now, and its tokens through launched steps."""
        return compared(self)

    def chosen_lengths(self) -> Any:
        """Tokens of each sequence of the first prompts that the model chooses, (batch,): without the scheduled stop."""
        import torch

        return torch.tensor(self.ledger.lengths[0], device=self._session.device) - (1 if self._scheduled else 0)

    def chosen(self, columns: int) -> Any:
        """Which of the first `columns` tokens of the first prompts the model chooses, shape (batch, columns)."""
        import torch

        return torch.arange(columns, device=self._session.device) < self.chosen_lengths()[:, None]

    def forced(self, tokens: Any, columns: int) -> Iterator[Any]:
        """What the launched step chooses for each column, (batch,), if it is given `tokens` (batch, new_tokens).

        After the first prompts, with their draws.
        """
        self._index = 0
        self._begin()
        self.choose.draw()
        yield self.source.first(self._prompts[0])
        for column in range(1, columns):
            self.choose.draw()
            self.ledger.input.copy_(tokens[:, column - 1 : column])
            yield self.source.next(self.ledger.input)

    def read_at_once(self, tokens: Any, columns: int) -> None:
        """The first prompts and so many of `tokens` through the model at once, not compiled, into the cache."""
        import torch

        self._index = 0
        self._begin()
        self.source.first(torch.cat([self._prompts[0], tokens[:, :columns]], dim=1))

    def distances(self, tokens: Any, columns: int) -> Any:
        """How far the first `columns` of `tokens` (batch, new_tokens) are from what was to be chosen (`Judge`).

        By steps that are not compiled and are given `tokens` one by one. Shape (batch, columns).
        """
        import torch

        judge = Judge(self.choose, tokens)
        with self.source.judged(judge):
            for _ in self.forced(tokens, columns):
                pass
        return torch.stack(judge.distances, dim=1)

    def _tokens(self) -> Any:
        """Of the first request, shape (batch, new_tokens)."""
        self.run(0, lambda _label: None)
        return self.ledger.result()

    def after_latency(self) -> None:
        self.check_costs = check_costs(self._session, self)

    def problems(self) -> list[str]:
        """Every real position of the last request must hold a token, stops must be where they belong."""
        found = self.ledger.problems(self._index)
        if self._scheduled and self.steps != self.steps_per_call:
            found.append("stop_missed" if self.steps > self.steps_per_call else "stopped_early")
        return found

    def cache_bytes(self) -> int:
        """Bytes of keys and values as stored now, wherever they lie."""
        return sum(stored_bytes(self.cache).values())


def _listened_to() -> bool:
    """Whether somebody listens to every operator: nothing is heard from inside a graph."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode() is not None
