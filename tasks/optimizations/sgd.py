"""Stochastic gradient descent with momentum: one number of state per parameter, AdamW has two."""

from __future__ import annotations

from typing import Any

from tasks.optimizations._optimizer import OptimizerKind


class Sgd(OptimizerKind):
    name = "sgd"
    summary = "SGD with momentum 0.9 in AdamW's place"
    optimizer_class = "SGD"
    state_bits = 16.0  # of a model in half precision; 32 of one in fp32

    def build(self, parameters: list[Any], learning_rate: float) -> Any:
        import torch

        # not fused: a fused one is called for the steps that a gradient scaler skips too, and keeps no count of its own
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)

    def proven(self, optimizer: Any) -> bool:
        """The learning rate is AdamW's, so that momentum is what is to be seen."""
        return all(
            state.get("momentum_buffer") is not None and state["momentum_buffer"].shape == parameter.shape
            for parameter, state in optimizer.state.items()
        )
