"""Greedy generation of a fixed number of tokens: bandwidth-bound, weights and cache are read once per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tasks.cell import Cell, WorkloadPoint
from tasks.device import DeviceInfo
from tasks.workload import END, SETUP, Mark, Step, Workload
from tasks.workloads._inputs import token_batches

if TYPE_CHECKING:
    from tasks.session import Session


SHORT_TOKENS = 3


class Decode(Workload):
    kind = "decode"
    summary = "greedy generation of new_tokens after a prompt; time to first token and per token apart"
    axes = {"batch_size": 1, "prompt_tokens": 512, "new_tokens": 128}
    model_kinds = ("language",)

    def columns(self, point: WorkloadPoint) -> dict[str, int | None]:
        return {
            "batch_size": point["batch_size"],
            "sequence_length": point["prompt_tokens"],
            "new_tokens": point["new_tokens"],
        }

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if cell.workload["new_tokens"] < 2:
            return "decode needs at least 2 new tokens: the first one belongs to the prompt"
        return super().unsupported(cell, device)

    def prepare(self, session: Session) -> Step:
        point = session.job.cell.workload
        prompts = token_batches(session, point["batch_size"], point["prompt_tokens"])
        loop = NoCacheLoop if session.settings.cache == "none" else CachedLoop
        return loop(session, prompts, point["new_tokens"])


class _Loop(Step):
    """One call is one request. Segments: `setup` (cache reset), `first_token`, then `token` for each further one."""

    primary = "token"
    boundaries: Mapping[str, bool] = {SETUP: False, "first_token": False, END: True}
    unit = "token"

    def __init__(self, session: Session, prompts: list[Any], new_tokens: int) -> None:
        import torch

        self._session, self._model = session, session.model
        self._prompts, self._new = prompts, new_tokens
        batch, length = prompts[0].shape
        self.prompt_tokens = length
        self.units_per_call = batch * (new_tokens - 1)
        self.energy_units_per_call = batch * new_tokens  # a request's energy holds its prompt and its first token
        self.tokens = torch.full((batch, new_tokens), -1, dtype=torch.long, device=session.device)
        self._last_index = 0

    def run_short(self) -> None:
        whole, self._new = self._new, min(self._new, SHORT_TOKENS)
        try:
            super().run_short()
        finally:
            self._new = whole

    def problems(self) -> list[str]:
        """Every position of the last request must hold a token that the loop has written."""
        return ["wrong_token_count"] if bool((self.tokens < 0).any()) else []


class CachedLoop(_Loop):
    """Prompt eagerly through the model, then one token at a time through the (possibly compiled) step.

    As in transformers' own `generate`, only the one-token step is compiled: its shape never changes.
    """

    def __init__(self, session: Session, prompts: list[Any], new_tokens: int) -> None:
        import torch

        super().__init__(session, prompts, new_tokens)
        self.cache: Any = None
        self._input = torch.zeros((prompts[0].shape[0], 1), dtype=torch.long, device=session.device)
        self._step = session.compiled(self._one_token)
        self._marks_step = session.settings.compile is not None and session.on_cuda

    def _one_token(self, ids: Any, cache: Any) -> Any:
        return (
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        )

    def run(self, index: int, mark: Mark) -> None:
        import torch

        self._prepare_cache()
        self.tokens.fill_(-1)
        mark(SETUP)
        token = self._one_token(self._prompts[index % len(self._prompts)], self.cache)
        self._input.copy_(token.unsqueeze(1))
        self.tokens[:, 0] = token
        mark("first_token")
        for position in range(1, self._new):
            if self._marks_step:
                # CUDA graphs may reuse the last step's output: it has been copied, so that is fine
                torch.compiler.cudagraph_mark_step_begin()
            token = self._step(self._input, self.cache)
            self._input.copy_(token.unsqueeze(1))
            self.tokens[:, position] = token
            mark("token")
        mark(END)

    def _prepare_cache(self) -> None:
        from transformers import DynamicCache, StaticCache

        if self._session.settings.cache == "dynamic":
            self.cache = DynamicCache(config=self._model.config)
        elif self.cache is None:
            self.cache = StaticCache(config=self._model.config, max_cache_len=self.prompt_tokens + self._new)
        else:
            self.cache.reset()

    def cache_bytes(self) -> int:
        """Bytes of keys and values as allocated now."""
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class NoCacheLoop(_Loop):
    """Runs the whole sequence again for every token: what the KV cache is measured against."""

    def __init__(self, session: Session, prompts: list[Any], new_tokens: int) -> None:
        super().__init__(session, prompts, new_tokens)
        model = self._model

        def whole(ids: Any) -> Any:
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)

        self._step: Callable[[Any], Any] = session.compiled(whole)
        self.longest = 0
        self.cache = None

    def run(self, index: int, mark: Mark) -> None:
        import torch

        self.tokens.fill_(-1)
        sequence = self._prompts[index % len(self._prompts)]
        mark(SETUP)
        for position in range(self._new):
            token = self._step(sequence)
            self.tokens[:, position] = token
            sequence = torch.cat([sequence, token.unsqueeze(1)], dim=1)
            mark("token" if position else "first_token")
        self.longest = sequence.shape[1] - 1
        mark(END)

    def cache_bytes(self) -> int:
        return 0
