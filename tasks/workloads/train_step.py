"""A whole training step: forward, loss, backward, AdamW. Weights must change, and no step may be skipped unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from tasks.cell import WorkloadPoint
from tasks.workload import Mark, Step, Workload
from tasks.workloads._inputs import SETS, images, token_batches, waiting_bytes

if TYPE_CHECKING:
    from tasks.session import Session

LEARNING_RATE = 1e-4


class TrainStep(Workload):
    kind = "train_step"
    summary = "forward, loss, backward and AdamW of a language or vision model, or of a factory's module with a loss"
    axes = {"batch_size": 8, "sequence_length": 512, "image_size": 224}
    model_kinds = ("language", "vision", "module")
    training = True

    def columns(self, point: WorkloadPoint) -> dict[str, int | None]:
        return {"batch_size": point["batch_size"], "sequence_length": point["sequence_length"], "new_tokens": None}

    def prepare(self, session: Session) -> Step:
        import torch

        session.model.train()
        for parameter in session.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        batches, loss, unit, units = _task(session)
        parameters = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=session.on_cuda)
        return TrainingStep(session, batches, session.compiled(loss), optimizer, unit, units)


def _task(session: Session) -> tuple[list[Any], Callable[..., Any], str, int]:
    """Batches, the function from a batch to its loss, the unit and the units per step."""
    import torch

    point, loaded, model = session.job.cell.workload, session.loaded, session.model
    assert loaded is not None
    batch = point["batch_size"]
    if loaded.make_inputs is not None:
        if loaded.loss is None:
            raise ValueError("train_step needs a factory that returns (model, make_inputs, loss)")
        made = [loaded.make_inputs(batch, session.device, session.job.seed + number) for number in range(SETS)]
        user_loss = loaded.loss
        return made, lambda arguments: user_loss(model, arguments), "sample", batch
    if session.job.cell.model.kind == "vision" or hasattr(loaded.config, "num_channels"):
        pictures = images(session, batch, point["image_size"])
        classes = int(loaded.config.num_labels)
        labels = [torch.randint(0, classes, (batch,), device=session.device) for _ in pictures]

        def vision_loss(arguments: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(arguments[0]).logits.float(), arguments[1])

        return list(zip(pictures, labels, strict=True)), vision_loss, "image", batch
    tokens = token_batches(session, batch, point["sequence_length"])

    def language_loss(ids: Any) -> Any:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return tokens, language_loss, "token", batch * point["sequence_length"]


class TrainingStep(Step):
    primary = "call"
    boundaries: Mapping[str, bool] = {}

    def __init__(
        self, session: Session, batches: list[Any], loss: Callable[..., Any], optimizer: Any, unit: str, units: int
    ) -> None:
        import torch

        self._session, self._batches, self._loss, self.optimizer = session, batches, loss, optimizer
        self.unit, self.units_per_call = unit, units
        self.waiting_bytes = waiting_bytes(batches)
        self._device = session.device.type
        self._autocast_dtype = getattr(torch, session.settings.autocast) if session.settings.autocast else None
        self.scaler = torch.amp.GradScaler(self._device, enabled=True) if session.settings.loss_scaling else None
        # copies, so that the check at the end sees what training did to them
        self._watched = [p for group in optimizer.param_groups for p in group["params"]][:4]
        self._initial = [parameter.detach().clone() for parameter in self._watched]
        self._steps = torch.zeros((), device=session.device)
        self.calls = 0
        self.loss: Any = None
        self.first_loss: Any = None

    def autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._autocast_dtype)

    def forward_once(self) -> None:
        """One forward pass and its loss, without a step: for evidence."""
        self._loss(self._batches[0])

    def run(self, index: int, mark: Mark) -> None:
        self.calls += 1
        with self.autocast():
            loss = self._loss(self._batches[index % len(self._batches)])
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()
        if self.first_loss is None:
            self.first_loss = self.loss
        mark("call")

    def optimizer_steps(self) -> int:
        """Steps that the optimizer really took, from its own state: a scaler that skips leaves fewer than calls."""
        states = [self.optimizer.state.get(parameter, {}).get("step") for parameter in self._watched]
        taken = [int(step) for step in states if step is not None]
        return max(taken, default=0)

    def problems(self) -> list[str]:
        """Weights must have changed and steps been taken; skipped ones are said."""
        import torch

        found = []
        taken = self.optimizer_steps()
        if taken == 0:
            found.append("every_step_skipped")
        elif taken < self.calls:
            self._session.row.flag("steps_skipped")
        changed = any(not torch.equal(a, b) for a, b in zip(self._initial, self._watched, strict=True))
        if not changed:
            found.append("weights_unchanged")
        if not bool(torch.isfinite(self.loss)):
            found.append("loss_not_finite")
        return found
