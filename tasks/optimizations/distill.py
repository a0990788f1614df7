"""Distillation: a smaller student is trained on the teacher's whole distributions, for a stated budget.

The loss is alpha * T^2 * KL(teacher || student) at temperature T plus (1 - alpha) * cross entropy of the text (Hinton
et al. 2015). The student is the teacher with a share of its layers, evenly chosen, and of its MLP channels, the most
important ones by activation, or a named architecture with random weights. It is made once (`tasks.artifacts`): what
that took stands in the row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import ArtifactSpec, artifact_spec
from tasks.calibration import calibration_windows, text_content
from tasks.cell import digest
from tasks.models.identity import ModelError, random_config
from tasks.models.runtime import RuntimeModel
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization, Unsupported
from tasks.optimizations._checkpoint import holds, original_config, parameters_of, published_dtype
from tasks.optimizations._pruning import Sizes as Sizes
from tasks.optimizations._pruning import blocks_of, keep_layers, prune, sizes_of
from tasks.stacks import option

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.job import CellJob
    from tasks.session import Session

LENGTH, BATCH = 256, 8
WINDOWS_AT_MOST = 8192
CALIBRATION = 32


class Distill(Optimization):
    name = "distill"
    family = "distillation"
    summary = "a student of a share of the layers, or of another architecture, trained on the model's logits"
    needs = Needs(model_kinds=("language",), workloads=("prefill", "decode"))
    options = {
        "layers": 0.5,
        "width": 1.0,
        "student": "",
        "steps": 200,
        "seconds": 0.0,
        "temperature": 1.0,
        "alpha": 0.7,
        "learning_rate": 0.001,
        "text": "",
    }

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        for technique in cell.stack.techniques:
            if technique.name == self.name and (reason := _refused(technique)):
                return f"{self.name}: {reason}"
        return super().unsupported(cell, device)

    def resident(self, technique: Technique) -> float:
        """About what is left of the blocks, at the least; of another architecture nothing is known here."""
        return 0.0 if option(technique, "student") else _number(technique, "layers") * _number(technique, "width")

    def content(self, technique: Technique, search_path: tuple[str, ...]) -> dict[str, str]:
        student = str(option(technique, "student"))
        return text_content(technique, search_path) | ({"student": digest(random_config(student))} if student else {})

    def artifact(self, technique: Technique, job: CellJob) -> ArtifactSpec:
        return artifact_spec(technique, job, libraries=("torch", "transformers"))

    def make_artifact(self, technique: Technique, session: Session, folder: Path) -> dict[str, Any]:

        from tasks.models.finetune import finetune, save_checkpoint

        checkpoint = session.load_options.checkpoint
        dtype = published_dtype(session, self.name)
        student, kept = _student(technique, session, checkpoint)
        start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in student.named_parameters()}
        # on a CPU in fp32, which every CPU multiplies fast
        teacher_dtype = None if session.on_cuda else "float32"
        loaded = session.load(LoadOptions(checkpoint=checkpoint, dtype=teacher_dtype))
        teacher = loaded.model.requires_grad_(False)
        steps, seconds = int(_number(technique, "steps")), _number(technique, "seconds")
        # with a budget in seconds: more than will be seen, but reading text is slow beside few steps
        count = WINDOWS_AT_MOST if session.on_cuda else WINDOWS_AT_MOST // 16
        count = count if seconds else min(steps * BATCH, WINDOWS_AT_MOST)
        ids = calibration_windows(session, str(option(technique, "text")), count, LENGTH)
        temperature, alpha = _number(technique, "temperature"), _number(technique, "alpha")
        facts = finetune(
            student,
            ids,
            lambda batch: _loss(student, teacher, batch, temperature, alpha),
            steps=0 if seconds else steps,
            seconds=seconds,
            batch=BATCH,
            learning_rate=_number(technique, "learning_rate"),
            seed=session.job.seed,
        )
        changed = sum(int((p.detach().cpu() != start[name]).sum()) for name, p in student.named_parameters())
        total = sum(p.numel() for p in student.parameters())
        student.to(dtype)
        save_checkpoint(student, loaded.tokenizer, folder)
        teachers = sum(p.numel() for p in teacher.parameters())
        return {**facts, **kept, "parameters": total, "parameters_teacher": teachers, "changed": changed / total}

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """The live model is the student, smaller than the teacher, and training has changed it and its loss."""
        artifact = session.artifacts.get(self.name)
        if artifact is None:
            return Evidence(ok=False, facts={"student": "no artifact was loaded"})
        from transformers import AutoConfig

        made, spec = artifact.manifest.facts, session.job.cell.model
        config = AutoConfig.from_pretrained(artifact.folder, trust_remote_code=spec.trust_remote_code)
        total, teachers = parameters_of(config, spec), parameters_of(original_config(session, self.name), spec)
        later = [a for a in session.artifacts.values() if a.spec.base == artifact.spec.key and a.spec.checkpoint]
        live = _layers(session.model)
        same = bool(later) or live == config.num_hidden_layers
        facts = {
            "layers": live, "parameters": total, "parameters_teacher": teachers, "steps": made["steps"],
            "loss_first": made["loss_first"], "loss_last": made["loss_last"], "changed": made["changed"],
            "weights_of_the_student": holds(session, artifact.folder) if not later else "made further",
        }  # fmt: skip
        ok = same and total == made["parameters"] < teachers and made["changed"] > 0.5
        ok = ok and facts["weights_of_the_student"] is not False
        return Evidence(ok=ok and made["loss_last"] < made["loss_first"], facts=facts)


def _number(technique: Technique, key: str) -> float:
    return float(str(option(technique, key)))


def _refused(technique: Technique) -> str | None:
    for key in ("layers", "width"):
        if not 0 < _number(technique, key) <= 1:
            return f"{key} is a share of the teacher's, above 0 and at most 1"
    student = str(option(technique, "student"))
    if not student and _number(technique, "layers") == _number(technique, "width") == 1:
        return "a student needs fewer layers, less width, or another architecture"
    if not 0 <= _number(technique, "alpha") <= 1 or _number(technique, "temperature") <= 0:
        return "alpha lies between 0 and 1, the temperature above 0"
    seconds, steps = _number(technique, "seconds"), _number(technique, "steps")
    if seconds < 0 or (not seconds and steps < 2):
        return "a budget of seconds, or of at least 2 steps is needed: a loss that fell is the evidence"
    try:
        if student:
            random_config(student)  # raises where there is no such architecture or file
    except (ModelError, OSError) as error:
        return str(error)
    return None


def _student(technique: Technique, session: Session, checkpoint: str | None) -> tuple[Any, dict[str, Any]]:
    """The student before training, in fp32 on the device, and what it was made of."""
    from tasks.models.load import build_random, hf_config, torch_dtype

    named = str(option(technique, "student"))
    if named:
        teacher = original_config(session, "distill").get_text_config()
        shared = {key: getattr(teacher, key, None) for key in ("vocab_size", "bos_token_id", "eos_token_id")}
        config = hf_config({**random_config(named), **shared})
        made = build_random(config, torch_dtype("float32"), session.device, None, seed=session.job.seed)
        return made, {"student": named}
    model = session.load(LoadOptions(checkpoint=checkpoint, dtype="float32")).model
    blocks_of(model)
    before = sizes_of(model.config)
    facts: dict[str, Any] = {}
    width = _number(technique, "width")
    if width < 1:
        ids = calibration_windows(session, str(option(technique, "text")), CALIBRATION, LENGTH)
        mlp = max(8, round(before.mlp * width / 8) * 8)
        prune(model, "mlp", Sizes(mlp=mlp, heads=before.heads, layers=before.layers), "activation", ids)
        facts["mlp"] = mlp
    count = max(1, round(before.layers * _number(technique, "layers")))
    if count == before.layers and width == 1:
        raise Unsupported(f"a share of {_number(technique, 'layers'):g} of {before.layers} layers is all of them")
    kept = [round(i * (before.layers - 1) / max(count - 1, 1)) for i in range(count)]
    keep_layers(model, kept)
    return model, {**facts, "layers_kept": kept}


def _loss(student: Any, teacher: Any, ids: torch.Tensor, temperature: float, alpha: float) -> torch.Tensor:
    """Of (batch, length) ids: means over tokens, in nats."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div

    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    ours = student(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    apart = kl_div(
        (ours / temperature).log_softmax(-1), (theirs / temperature).log_softmax(-1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return alpha * temperature**2 * apart + (1 - alpha) * cross_entropy(ours, ids[:, 1:].flatten())


def _layers(model: Any) -> int | None:
    """Layers of the live model, None where its architecture names them otherwise."""
    if isinstance(model, RuntimeModel):
        return model.sizes().get("num_hidden_layers")
    return len(model.base_model.layers) if hasattr(model.base_model, "layers") else None
