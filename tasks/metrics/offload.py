"""How much of the model is on the device, and what a pass moves there, counted where weights are fetched.

A forward pass fetches the same weights for however many tokens: one of every sequence when decoding, whole prompts in
prefill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing, Phase

if TYPE_CHECKING:
    from tasks.session import Session


class OffloadTraffic(Metric):
    name = "offload"
    columns = (
        Column(name="device_fraction", type="float", doc="bytes of parameters that stay on the device over all"),
        Column(
            name="offload_bytes_per_pass",
            type="float",
            doc="bytes of weights fetched from CPU or disk in one forward pass",
        ),
        Column(
            name="offload_bytes_per_token",
            type="float",
            doc="offload_bytes_per_pass over the tokens of a pass: batch (decode) or batch times length (prefill)",
        ),
    )

    def __init__(self) -> None:
        self._found: dict[str, Any] | None = None

    def end(self, phase: Phase, session: Session) -> None:
        ledger = session.settings.transfers
        if phase is Phase.WARMUP and ledger is not None:
            away = sum(parameter.nbytes for parameter in session.model.parameters() if parameter.is_meta)
            total = sum(parameter.nbytes for parameter in session.model.parameters())
            self._found = {
                "device_fraction": 1 - away / total,
                "offload_bytes_per_pass": float(ledger.bytes_per_pass),
                "offload_bytes_per_token": ledger.bytes_per_pass / _tokens_of_a_pass(session),
            }

    def collect(self, session: Session) -> dict[str, Any]:
        reason = "not offloaded" if session.settings.transfers is None else "warm-up was not reached"
        return self._found or {column.name: Missing(reason=reason) for column in self.columns}


def _tokens_of_a_pass(session: Session) -> int:
    point = session.job.cell.workload
    return int(point["batch_size"]) * (1 if point.kind == "decode" else int(point["sequence_length"]))
