"""What the precision techniques share: a dtype for weights in inference, autocast in training, and its proof."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.models.runtime import RuntimeModel
from tasks.optimization import Evidence, LoadOptions, Optimization
from tasks.stacks import freezes_weights

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class Precision(Optimization):
    """`dtype` of the weights in inference; in training autocast uses it, and weights that are trained stay fp32."""

    family = "precision"
    dtype: ClassVar[str]
    tf32: ClassVar[bool] = False

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        trained = session.workload.training and not freezes_weights(session.job.cell)
        options.dtype = "float32" if trained else self.dtype

    def apply(self, technique: Technique, session: Session) -> None:
        set_tf32(self.tf32)
        if session.workload.training and self.dtype != "float32":
            session.settings.autocast = self.dtype
            session.settings.loss_scaling = self.dtype == "float16"

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        if session.model is None:
            seen = {str(session.step.output.dtype).removeprefix("torch.")}  # type: ignore[union-attr]
            return Evidence(ok=seen == {self.dtype}, facts={"output_dtypes": sorted(seen)})
        if session.settings.autocast:
            seen = autocast_dtypes(session)
            scaled, scaling = loss_scaling(session) if self.dtype == "float16" else (True, {})
            return Evidence(ok=self.dtype in seen and scaled, facts={"autocast_output_dtypes": sorted(seen), **scaling})
        stored = weight_dtypes(session.model)
        facts: dict[str, Any] = {"weight_elements": dict(stored)}
        # compressed weights are integers; whatever still is floating-point must be of this precision, scales aside
        floating = {name for name in stored if name.startswith(("float", "bfloat"))}
        quantized = any(family_of(item) == "compression" for item in session.job.cell.stack.techniques)
        ok = self.dtype in floating if quantized else floating == {self.dtype}
        if session.on_cuda and self.dtype == "float32":
            error = fp32_product_error(session)
            facts["product_relative_error"] = error
            # 10-bit mantissas of TF32 leave about 3e-4, fp32 about 1e-7 (measured on random matrices)
            ok = ok and (error > 3e-5) == self.tf32
        return Evidence(ok=ok, facts=facts)


def family_of(technique: Technique) -> str:
    from tasks.registry import optimizations

    return optimizations()[technique.name].family


def set_tf32(allowed: bool) -> None:
    """Matrix products and convolutions of fp32 tensors in TF32, or not."""
    import torch

    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def weight_dtypes(model: Any) -> Counter[str]:
    """Elements stored per dtype, over all parameters."""
    if isinstance(model, RuntimeModel):
        return Counter(model.weights.elements)
    count: Counter[str] = Counter()
    for parameter in model.parameters():
        count[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return count


def autocast_dtypes(session: Session) -> set[str]:
    """Output dtypes of the linear and convolution layers in one forward pass under the step's autocast."""
    import torch

    seen: set[str] = set()

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        seen.add(str(output.dtype).removeprefix("torch."))

    layers = [m for m in session.model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    conv1d = [m for m in session.model.modules() if type(m).__name__ == "Conv1D"]  # GPT-2's linear layer
    hooks = [layer.register_forward_hook(look) for layer in [*layers, *conv1d]]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), session.step.autocast():  # type: ignore[union-attr]
            session.step.forward_once()  # type: ignore[union-attr]
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def loss_scaling(session: Session) -> tuple[bool, dict[str, Any]]:
    """Whether one gradient scaler lives through the steps, and its scale: it must remember the step before.

    A scaler that has just been made is the same after every step; one that lives counts good steps or halves its scale.
    """
    step: Any = session.step
    states = []
    for _ in range(2):
        step.run_short()
        states.append(None if step.scaler is None else dict(step.scaler.state_dict()))
    facts = {"loss_scale": (states[-1] or {}).get("scale"), "scaler_remembers": states[0] != states[1]}
    return bool(states[-1]) and states[0] != states[1], facts


def fp32_product_error(session: Session) -> float:
    """Relative error of one fp32 matrix product on the device as it is set now, against fp64."""
    import torch

    generator = torch.Generator(session.device).manual_seed(1)
    a, b = (torch.randn(512, 512, generator=generator, device=session.device) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())
