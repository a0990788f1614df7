"""A forward pass of a vision model, or of any module that a factory made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tasks.workload import Mark, Step, Workload
from tasks.workloads._inputs import SETS, as_weights, images, waiting_bytes

if TYPE_CHECKING:
    from tasks.session import Session


class Forward(Workload):
    kind = "forward"
    summary = "one forward pass of a vision model or of a factory's module"
    axes = {"batch_size": 32, "image_size": 224}
    model_kinds = ("vision", "module")

    def prepare(self, session: Session) -> Step:
        point = session.job.cell.workload
        loaded = session.loaded
        assert loaded is not None
        batch = point["batch_size"]
        inputs: list[Any]
        if loaded.make_inputs is not None:
            made = (loaded.make_inputs(batch, session.device, session.job.seed + number) for number in range(SETS))
            inputs = [as_weights(session, item) for item in made]
        else:
            inputs = [(batch_of_images,) for batch_of_images in images(session, batch, point["image_size"])]
        model = session.model
        return ForwardStep(session.compiled(lambda *arguments: model(*arguments)), inputs, batch)


class ForwardStep(Step):
    primary = "call"
    boundaries: Mapping[str, bool] = {}
    unit = "image"

    def __init__(self, forward: Callable[..., Any], inputs: list[Any], batch_size: int) -> None:
        self._forward = forward
        self._inputs = [item if isinstance(item, tuple) else (item,) for item in inputs]
        self.units_per_call = batch_size
        self.waiting_bytes = waiting_bytes(self._inputs)
        self.output: Any = None

    def run(self, index: int, mark: Mark) -> None:
        self.output = self._forward(*self._inputs[index % len(self._inputs)])
        mark("call")

    def problems(self) -> list[str]:
        """The first output tensor must have a row for every input."""
        output = getattr(self.output, "logits", self.output)
        first = output[0] if isinstance(output, (tuple, list)) else output
        return [] if getattr(first, "shape", [0])[0] == self.units_per_call else ["wrong_output_shape"]
