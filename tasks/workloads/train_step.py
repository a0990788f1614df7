"""A whole training step: forward, loss, backward, optimizer. Weights must change, and no step may be skipped unseen.

What is trained is what requires a gradient after the techniques were applied; they may also choose the optimizer and
the number of micro-batches. Every parameter that the model trains as loaded is trained otherwise, with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from tasks.cell import WorkloadPoint
from tasks.workload import Mark, Step, Workload
from tasks.workloads._inputs import images, split, token_batches, waiting_bytes

if TYPE_CHECKING:
    from tasks.session import Session

LEARNING_RATE = 1e-4
SETS = 4  # the shortest cell makes six calls, so that some set is seen twice and its loss can be seen to fall
WATCHED_PARAMETERS, WATCHED_ELEMENTS = 16, 1024
COMPARED_CALL = 8  # its loss is of equally many steps over the same sets in every cell; the last call's is not


class TrainStep(Workload):
    kind = "train_step"
    summary = "forward, loss, backward and optimizer of a language or vision model, or of a factory's module and loss"
    axes = {"batch_size": 8, "sequence_length": 512, "image_size": 224}
    model_kinds = ("language", "vision", "module")
    training = True

    def columns(self, point: WorkloadPoint) -> dict[str, int | None]:
        return {"batch_size": point["batch_size"], "sequence_length": point["sequence_length"], "new_tokens": None}

    def positions(self, point: WorkloadPoint) -> int | None:
        return int(point["sequence_length"])

    def prepare(self, session: Session) -> Step:
        session.model.train()
        parameters = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("train_step: no parameter of this model requires a gradient, so there is nothing to train")
        batches, loss, unit, units = _task(session)
        optimizer = (session.settings.optimizer or adamw)(parameters, LEARNING_RATE)
        return TrainingStep(session, batches, session.compiled(loss), optimizer, unit, units)


def adamw(parameters: list[Any], learning_rate: float) -> Any:
    """PyTorch's AdamW, on CUDA as one fused kernel."""
    import torch

    return torch.optim.AdamW(parameters, lr=learning_rate, fused=parameters[0].is_cuda)


def _task(session: Session) -> tuple[list[Any], Callable[..., Any], str, int]:
    """Batches, the function from a batch to its mean loss, the unit and the units per step."""
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
        pictures = images(session, batch, point["image_size"], count=SETS)
        classes = int(loaded.config.num_labels)
        labels = [torch.randint(0, classes, (batch,), device=session.device) for _ in pictures]

        def vision_loss(arguments: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(arguments[0]).logits.float(), arguments[1])

        return list(zip(pictures, labels, strict=True)), vision_loss, "image", batch
    tokens = token_batches(session, batch, point["sequence_length"], count=SETS)

    def language_loss(ids: Any) -> Any:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return tokens, language_loss, "token", batch * point["sequence_length"]


class TrainingStep(Step):
    """One optimizer step over one batch, in as many micro-batches as the settings say.

    The loss function gives a mean over its samples, and micro-batches are equal, so the mean of their losses is the
    loss of the batch.
    """

    primary = "call"
    boundaries: Mapping[str, bool] = {}

    def __init__(
        self, session: Session, batches: list[Any], loss: Callable[..., Any], optimizer: Any, unit: str, units: int
    ) -> None:
        import torch

        settings = session.settings
        self._session, self._batches, self._loss, self.optimizer = session, batches, loss, optimizer
        self.unit, self.units_per_call = unit, units
        self.waiting_bytes = waiting_bytes(batches)
        size = session.job.cell.workload["batch_size"]
        count = settings.micro_batches
        self._parts = [split(batch, count, size) if count > 1 else [batch] for batch in batches]
        self._device = session.device.type
        self._autocast_dtype = getattr(torch, settings.autocast) if settings.autocast else None
        self.scaler = torch.amp.GradScaler(self._device, enabled=True) if settings.loss_scaling else None
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # a few numbers of a few parameters, so that the check at the end sees what training did to them
        self._watched = self.trained[:: -(-len(self.trained) // WATCHED_PARAMETERS)]
        self._initial = [_few(parameter).clone() for parameter in self._watched]
        self._hooked_steps = 0
        optimizer.register_step_post_hook(self._count_step)
        self.calls = 0
        self.loss: Any = None
        self.first_loss: Any = None
        self._compared_loss: Any = None
        self._first: dict[int, Any] = {}
        self._last: dict[int, Any] = {}

    def autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._autocast_dtype)

    def forward_once(self) -> None:
        """One forward pass of a micro-batch and its loss, without a step: for evidence."""
        self._loss(self._parts[0][0])

    def run(self, index: int, mark: Mark) -> None:
        self.calls += 1
        number = index % len(self._batches)
        self.loss = self.backward(self._parts[number])
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.first_loss is None:
            self.first_loss = self.loss
        if self.calls == COMPARED_CALL:
            self._compared_loss = self.loss  # stays on the device: reading it here would wait for the step
        self._first.setdefault(number, self.loss)
        self._last[number] = self.loss
        mark("call")

    def backward(self, parts: Sequence[Any]) -> Any:
        """Add the gradients of the mean loss over `parts`, scaled if a scaler is used; returns that loss, detached."""
        total: Any = None
        owned: set[Any] = set()
        for part in parts:
            with self.autocast():
                loss = self._loss(part)
            loss = loss / len(parts) if len(parts) > 1 else loss
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            if len(parts) > 1 and self._session.settings.replays:
                self._own_gradients(owned)  # the next replay would overwrite them before its own are added
            # a copy: the output of a CUDA graph is overwritten by its next replay
            total = loss.detach().clone() if total is None else total + loss.detach()
        return total

    def _own_gradients(self, owned: set[Any]) -> None:
        for parameter in self.trained:
            if parameter.grad is not None and parameter not in owned:
                parameter.grad = parameter.grad.clone()
                owned.add(parameter)

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Passes without autocast."""
        dtype, self._autocast_dtype = self._autocast_dtype, None
        try:
            yield
        finally:
            self._autocast_dtype = dtype

    def gradients(self, parts: Sequence[Any]) -> list[Any]:
        """Gradients of the mean loss over `parts`, for each of `trained` (None where it has none); takes no step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(parts)
        found = [parameter.grad for parameter in self.trained]
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def micro_batches(self) -> list[Any]:
        """The micro-batches of the first input set."""
        return self._parts[0]

    def one_sample(self) -> Any:
        """The first sample of the first input set, as a batch of one."""
        size = self._session.job.cell.workload["batch_size"]
        return split(self._batches[0], size, size)[0]

    def whole(self, parts: int) -> Any:
        """The first `parts` micro-batches of the first input set as one batch."""
        size, count = self._session.job.cell.workload["batch_size"], len(self._parts[0])
        return _leading(self._batches[0], size // count * parts)

    def _count_step(self, *_: Any) -> None:
        self._hooked_steps += 1

    def optimizer_steps(self) -> int:
        """Steps that the optimizer really took, from its own state: a scaler that skips leaves fewer than calls.

        The calls of one that keeps no count are counted: a scaler does not call it for a step that it skips.
        """
        states = [self.optimizer.state.get(parameter, {}).get("step") for parameter in self._watched]
        taken = [int(step) for step in states if step is not None]
        return max(taken) if taken else self._hooked_steps

    def losses(self) -> tuple[float, float] | None:
        """First and last loss, each the mean over the input sets seen twice or more; None where there is none."""
        again = [number for number, last in self._last.items() if last is not self._first[number]]
        if not again:
            return None
        first, last = (sum(float(seen[number]) for number in again) / len(again) for seen in (self._first, self._last))
        return first, last

    def loss_at_step_8(self) -> float | None:
        """Loss of the eighth call, None if there were fewer; waits for the device."""
        return None if self._compared_loss is None else float(self._compared_loss)

    def problems(self) -> list[str]:
        """Weights must have changed and steps been taken; skipped ones, and a loss that did not fall, are said."""
        import torch

        found = []
        taken = self.optimizer_steps()
        if taken == 0:
            found.append("every_step_skipped")
        elif taken < self.calls:
            self._session.row.flag("steps_skipped")
        changed = any(not torch.equal(a, _few(b)) for a, b in zip(self._initial, self._watched, strict=True))
        if not changed:
            found.append("weights_unchanged")
        if not bool(torch.isfinite(self.loss)):
            found.append("loss_not_finite")
        losses = self.losses()
        # a loss is of the weights before its step, so that some steps must lie between the first and the last
        if losses is not None and taken >= len(self._batches) and not losses[1] < losses[0]:
            self._session.row.flag("loss_did_not_fall")
        return found


def _few(parameter: Any) -> Any:
    """Some numbers of a parameter: the embedding's last rows may belong to tokens that no text has."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // WATCHED_ELEMENTS)]


def _leading(batch: Any, size: int) -> Any:
    """The first `size` samples of a batch that `split` can divide."""
    if isinstance(batch, tuple | list):
        return type(batch)(_leading(item, size) for item in batch)
    if isinstance(batch, dict):
        return {key: _leading(item, size) for key, item in batch.items()}
    return batch[:size]
