"""2:4 sparsity: of every four weights in a row the two that matter least are zero, and the tensor cores skip them.

Half of the values and two bits for each kept one are stored: 9 bits a weight in half precision. The checkpoint with
its zeros is made once, on any device (`tasks.artifacts`); compressing it for the sparse tensor cores (Ampere and
later) belongs to loading. Importance is |weight| times the norm of its input on the text (Wanda, Sun et al. 2023), or
|weight| alone.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import ArtifactSpec, artifact_spec
from tasks.calibration import calibration_windows, text_content
from tasks.models.identity import config_of, model_type
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization, Unsupported
from tasks.optimizations._checkpoint import same_as_kept
from tasks.stacks import option, precision_of

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.job import CellJob
    from tasks.session import Session

WINDOWS, LENGTH = 64, 512
LOOKED_AT = 6  # layers
HALF = {"fp16", "bf16", "float16", "bfloat16"}


class Sparse24(Optimization):
    name = "sparse-2-4"
    family = "compression"
    summary = "two of every four weights zero, multiplied by the sparse tensor cores (fp16, bf16)"
    needs = Needs(
        devices=("cuda",), compute_capability=(8, 0), model_kinds=("language",), workloads=("prefill", "decode")
    )
    options = {"importance": "activation", "text": ""}
    choices = {"importance": ("activation", "magnitude")}
    bits = 9.0
    multiplies = "2:4 sparse"  # twice the rate of dense products, at the best

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        reason = super().unsupported(cell, device)
        if reason is None and model_type(cell.model) == "gpt2":
            return f"{self.name} compresses linear layers, {cell.model.id} has Conv1D layers in their place"
        dtype = precision_of(cell) or _published(cell)
        if reason is None and dtype is not None and dtype not in HALF:
            return f"{self.name} is multiplied in fp16 or bf16, this cell computes in {dtype}: add bf16 to the stack"
        return reason

    def content(self, technique: Technique, search_path: tuple[str, ...]) -> dict[str, str]:
        return text_content(technique, search_path)

    def artifact(self, technique: Technique, job: CellJob) -> ArtifactSpec:
        return artifact_spec(technique, job, libraries=("torch", "transformers"))

    def make_artifact(self, technique: Technique, session: Session, folder: Path) -> dict[str, Any]:

        from tasks.models.finetune import save_checkpoint

        loaded = session.load(LoadOptions(checkpoint=session.load_options.checkpoint))
        layers = block_linears(loaded.model)
        norms: dict[str, torch.Tensor] = {}
        if option(technique, "importance") == "activation":
            ids = calibration_windows(session, str(option(technique, "text")), WINDOWS, LENGTH)
            norms = _input_norms(loaded.model, layers, ids)
        kept = 0.0
        for name, layer in layers.items():
            weight = layer.weight.data
            importance = weight.float().abs() * norms.get(name, 1.0)
            mask = two_of_four(importance)
            kept += float((importance * mask).sum() / importance.sum())
            layer.weight.data = weight * mask
        save_checkpoint(loaded.model, loaded.tokenizer, folder)
        return {"layers": len(layers), "importance_kept": kept / len(layers)}

    def apply(self, technique: Technique, session: Session) -> None:
        import torch

        for name, layer in block_linears(session.model).items():
            weight = layer.weight.detach()
            if weight.dtype not in (torch.float16, torch.bfloat16):
                raise Unsupported(f"{self.name} is multiplied in fp16 or bf16, {name} is {weight.dtype}")
            try:
                sparse = torch.sparse.to_sparse_semi_structured(weight.contiguous())
                layer.weight = torch.nn.Parameter(sparse, requires_grad=False)
                with torch.inference_mode():
                    layer(torch.zeros(1, 8, layer.in_features, dtype=weight.dtype, device=weight.device))
            except (RuntimeError, NotImplementedError) as error:
                if "out of memory" in str(error):
                    raise
                raise Unsupported(f"{self.name} has no kernel for {name} {tuple(weight.shape)}: {error}") from error
        torch.cuda.empty_cache()

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Every linear layer in the blocks holds compressed values, half of them, at about nine bits a weight."""
        import torch

        layers = block_linears(session.model)
        sparse = {
            name: layer.weight
            for name, layer in layers.items()
            if isinstance(getattr(layer, "weight", None), torch.sparse.SparseSemiStructuredTensor)
        }
        facts: dict[str, Any] = {"layers": len(layers), "sparse": len(sparse)}
        if not sparse:
            return Evidence(ok=False, facts=facts)
        elements = sum(weight.numel() for weight in sparse.values())
        stored = sum(
            getattr(weight, name).untyped_storage().nbytes()
            for weight in sparse.values()
            for name in weight.__tensor_flatten__()[0]
        )
        first = next(iter(sparse.values()))
        with torch.inference_mode():
            dense = first.to_dense()
        artifact = session.artifacts.get(self.name)
        facts["bits_per_weight"] = 8 * stored / elements
        facts["non_zero"] = float((dense != 0).float().mean())
        facts["kernel"] = type(first).__name__
        if artifact is None:
            return Evidence(ok=False, facts={**facts, "artifact": "no artifact was loaded"})
        # the same values in the same places, in layers all over the model
        looked_at = list(sparse)[:: max(1, len(sparse) // LOOKED_AT)]
        with torch.inference_mode():
            same = [same_as_kept(artifact.folder, f"{name}.weight", sparse[name].to_dense()) for name in looked_at]
        facts["compared"] = sum(found is not None for found in same)
        facts["of_the_artifact"] = sum(found is True for found in same)
        # cuSPARSELt pads what it stores
        stored_well = self.bits * 0.97 <= facts["bits_per_weight"] <= self.bits * 1.15
        ok = len(sparse) == len(layers) and stored_well and 0.45 < facts["non_zero"] <= 0.5
        return Evidence(ok=ok and facts["of_the_artifact"] == facts["compared"] > 0, facts=facts)


def block_linears(model: Any) -> dict[str, Any]:
    """Name -> linear layer inside the decoder's blocks; the head and whatever joins layers stays out."""
    import torch

    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not found:
        raise Unsupported(f"{type(model).__name__} has no linear layers to compress")
    return found


def two_of_four(importance: torch.Tensor) -> torch.Tensor:
    """Mask of (rows, columns) that keeps the two greatest of every four neighbours in a row; columns must be fours."""
    import torch

    rows, columns = importance.shape
    if columns % 4:
        raise Unsupported(f"2:4 sparsity needs rows of fours, a layer has {columns} inputs")
    fours = importance.view(rows, columns // 4, 4)
    mask = torch.zeros_like(fours, dtype=torch.bool)
    mask.scatter_(-1, fours.topk(2, dim=-1).indices, True)
    return mask.view(rows, columns)


def _input_norms(model: Any, layers: dict[str, Any], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each layer, the norm of every input over the text; sums in fp32 on the device."""
    import torch

    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def add(_module: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].float().square().flatten(0, -2).sum(0)

        return add

    with ExitStack() as hooks, torch.inference_mode():
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(hook(name)).remove)
        for window in ids:
            model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    return {name: total.sqrt() for name, total in sums.items()}


def _published(cell: Cell) -> str | None:
    try:
        config = config_of(cell.model) or {}
    except (OSError, ValueError):
        return None
    return config.get("dtype") or config.get("torch_dtype")
