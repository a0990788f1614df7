"""Processing a prompt: compute-bound, one forward pass over all tokens, logits of the last one, KV cache filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tasks.cell import WorkloadPoint
from tasks.workload import Mark, Step, Workload
from tasks.workloads._inputs import token_batches

if TYPE_CHECKING:
    from tasks.session import Session


class Prefill(Workload):
    kind = "prefill"
    summary = "one forward pass over a prompt, filling the KV cache"
    axes = {"batch_size": 1, "sequence_length": 512}
    model_kinds = ("language",)

    def positions(self, point: WorkloadPoint) -> int | None:
        return int(point["sequence_length"])

    def prepare(self, session: Session) -> Step:
        point = session.job.cell.workload
        inputs = token_batches(session, point["batch_size"], point["sequence_length"])
        model = session.model

        def forward(ids: Any) -> Any:
            return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

        return PrefillStep(session.compiled(forward), inputs, point["batch_size"] * point["sequence_length"])


class PrefillStep(Step):
    primary = "call"
    boundaries: Mapping[str, bool] = {}
    unit = "token"

    def __init__(self, forward: Callable[[Any], Any], inputs: list[Any], tokens: int) -> None:
        self._forward, self._inputs = forward, inputs
        self.units_per_call = tokens
        self.logits: Any = None

    def run(self, index: int, mark: Mark) -> None:
        self.logits = self._forward(self._inputs[index % len(self._inputs)])
        mark("call")

    def problems(self) -> list[str]:
        """Logits must be there for the last position of every sequence."""
        expected = (self._inputs[0].shape[0], 1)
        return [] if tuple(self.logits.shape[:2]) == expected else ["wrong_output_shape"]
