"""Structured pruning: the MLP channels, heads or layers that matter least are taken out: less to store and compute.

The pruned checkpoint is made once (`tasks.artifacts`), in the dtype that the model was published in. With
`recover_steps` it is then trained on the text for so many steps. The default rate suits a quarter of the MLP; where
whole layers are missing three times as much recovers more, which does harm where little is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import ArtifactSpec, artifact_spec
from tasks.calibration import calibration_windows, text_content
from tasks.models.identity import config_of, model_type
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization, Unsupported
from tasks.optimizations._checkpoint import holds, original_config, parameters_of, published_dtype
from tasks.optimizations._pruning import (
    IMPORTANCE,
    IN_CONFIG,
    WHAT,
    Sizes,
    blocks_of,
    live_sizes,
    prune,
    pruned_sizes,
    sizes_of,
)
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.job import CellJob
    from tasks.session import Session

WINDOWS, LENGTH = 64, 512  # calibration
BATCH, SEQUENCE = 8, 256  # recovery
COMPARED = ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight")
OTHERWISE_BUILT = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt", "opt", "phi3")


class Prune(Optimization):
    name = "prune"
    family = "pruning"
    summary = "MLP channels, heads or layers taken out by importance; optional recovery (Llama-type)"
    needs = Needs(model_kinds=("language",), workloads=("prefill", "decode"))
    options = {
        "what": "mlp",
        "ratio": 0.25,
        "importance": "activation",
        "recover_steps": 0,
        "learning_rate": 0.0001,
        "text": "",
    }
    choices = {"what": WHAT, "importance": IMPORTANCE}
    artifact_version = 3  # raised with the default rate: a row of the old one is not taken for one of the new

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if model_type(cell.model) in OTHERWISE_BUILT:
            return f"{self.name} knows blocks as Llama has them, {cell.model.id} is built otherwise"
        for technique in cell.stack.techniques:
            if technique.name == self.name and (reason := _refused(cell, technique)):
                return f"{self.name}: {reason}"
        return super().unsupported(cell, device)

    def resident(self, technique: Technique) -> float:
        """About what is left of the blocks, at the least."""
        return 1 - float(str(option(technique, "ratio")))

    def content(self, technique: Technique, search_path: tuple[str, ...]) -> dict[str, str]:
        return text_content(technique, search_path)

    def artifact(self, technique: Technique, job: CellJob) -> ArtifactSpec:
        return artifact_spec(technique, job, libraries=("torch", "transformers"))

    def make_artifact(self, technique: Technique, session: Session, folder: Path) -> dict[str, Any]:
        from tasks.metrics.parameters import count_parameters
        from tasks.models.finetune import finetune, next_token_loss, save_checkpoint

        steps = int(str(option(technique, "recover_steps")))
        published = LoadOptions(checkpoint=session.load_options.checkpoint, dtype="float32" if steps else None)
        loaded = session.load(published)
        model, text = loaded.model, str(option(technique, "text"))
        blocks_of(model)
        dtype, before = published_dtype(session, self.name), count_parameters(model)[0]
        sizes = sizes_of(model.config)
        what = str(option(technique, "what"))
        after = pruned_sizes(sizes, what, float(str(option(technique, "ratio"))))
        ids = calibration_windows(session, text, WINDOWS, LENGTH)
        facts = prune(model, what, after, str(option(technique, "importance")), ids)
        if steps:
            ids = calibration_windows(session, text, min(steps * BATCH, 8192), SEQUENCE)
            rate = float(str(option(technique, "learning_rate")))
            facts["recovery"] = finetune(
                model, ids, lambda batch: next_token_loss(model, batch), steps=steps, batch=BATCH, learning_rate=rate,
                seed=session.job.seed,
            )  # fmt: skip
            model.to(dtype)
        save_checkpoint(model, loaded.tokenizer, folder)
        now = count_parameters(model)[0]
        facts["importance"] = str(option(technique, "importance"))
        return {**facts, "before": vars(sizes), "after": vars(after), "parameters_before": before, "parameters": now}

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Every live block has the pruned size, the weights are those that were made so, and recovery did its steps."""
        from tasks.metrics.parameters import count_parameters

        artifact = session.artifacts.get(self.name)
        original = original_config(session, self.name)
        expected = pruned_sizes(
            sizes_of(original), str(option(technique, "what")), float(str(option(technique, "ratio")))
        )
        found = live_sizes(session.model)
        total, unpruned = count_parameters(session.model)[0], parameters_of(original, session.job.cell.model)
        facts = {"expected": vars(expected), "found": found, "parameters": total, "parameters_unpruned": unpruned}
        if artifact is None:
            return Evidence(ok=False, facts={**facts, "weights_of_the_artifact": "no artifact was loaded"})
        made = artifact.manifest.facts
        later = [a for a in session.artifacts.values() if a.spec.base == artifact.spec.key and a.spec.checkpoint]
        facts |= {
            "importance": made.get("importance"), "importance_kept": made.get("importance_kept"),
            "recovery": made.get("recovery"),
            "weights_of_the_artifact": "made further" if later else holds(session, artifact.folder, *COMPARED),
        }  # fmt: skip
        ok = found == {name: [size] for name, size in vars(expected).items()} and total < unpruned
        ok = ok and facts["weights_of_the_artifact"] is not False
        ok = ok and made.get("importance") == str(option(technique, "importance"))
        return Evidence(ok=ok and _recovered(made.get("recovery"), technique), facts=facts)


def _recovered(recovery: dict[str, Any] | None, technique: Technique) -> bool:
    """Whether recovery took as many steps as were asked for. Whether it helped is what quality says."""
    return (recovery["steps"] if recovery else 0) == int(str(option(technique, "recover_steps")))


def _refused(cell: Cell, technique: Technique) -> str | None:
    """Why these options cannot be, as far as the configuration tells without torch."""
    ratio = float(str(option(technique, "ratio")))
    if not 0 < ratio < 1:
        return f"a ratio between 0 and 1 is needed, got {ratio:g}"
    try:
        config = config_of(cell.model) or {}
        before = Sizes(**{key: config[name] for key, name in IN_CONFIG.items()})
        pruned_sizes(before, str(option(technique, "what")), ratio)
    except Unsupported as refusal:
        return str(refusal)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not at hand, or it leaves its class's defaults unsaid: loading will tell
    return None
