"""Linear layers of one input as one product, each of them taking its part of the result."""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253 - classes of modules; this file is imported when a model is changed, not by `plan`


class JoinedLinear(torch.nn.Module):
    """The layers' weights, one below the other: shape (sum of their outputs, inputs)."""

    def __init__(self, layers: list[torch.nn.Linear]) -> None:
        super().__init__()
        if any(layer.weight.is_meta for layer in layers):
            raise ValueError("weights that are elsewhere cannot be joined")
        with torch.no_grad():
            self.weight = torch.nn.Parameter(torch.cat([layer.weight.data for layer in layers]), requires_grad=False)
            biases = [layer.bias.data for layer in layers if layer.bias is not None]
            if biases and len(biases) != len(layers):
                raise ValueError("some of the layers have a bias and some have none")
            self.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self._input: Any = None
        self._output: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def once(self, x: torch.Tensor) -> torch.Tensor:
        """The product with `x`, computed when this input is seen first."""
        if self._input is not x:
            self._input, self._output = x, self(x)
        return self._output  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Let go of the last product, which would stay alive until the next pass."""
        self._input = self._output = None


class Part(torch.nn.Module):
    """In the place of one of the layers: the columns `start` to `stop` of the joined product."""

    def __init__(self, joined: JoinedLinear, start: int, stop: int, *, last: bool) -> None:
        super().__init__()
        self._joined = [joined]  # in a list: the weights are registered once, beside the parts
        self._columns, self._last = slice(start, stop), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (joined,) = self._joined
        part = joined.once(x)[..., self._columns]
        if self._last:
            joined.forget()
        return part
