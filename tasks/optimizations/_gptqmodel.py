"""What gptq and awq share: making the checkpoint with GPTQModel, loading it into a named kernel, and the proof."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.artifacts import ArtifactSpec, artifact_spec
from tasks.calibration import text_content
from tasks.models.identity import checkpoint_folder
from tasks.models.packed import Codes, round_to_nearest
from tasks.models.packed_checkpoint import load_packed, write_packed
from tasks.models.packing import Packing, quantized_already
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization, Unsupported
from tasks.optimizations import _gptq_kernels as kernels
from tasks.optimizations._gptq_kernels import KERNELS, Kernel
from tasks.optimizations._gptq_plan import (
    RTN,
    choose,
    no_kernel,
    number,
    rounds,
    starts_from_another,
    unfit,
    unlike,
)
from tasks.stacks import option, precision_of

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Scalar, Technique
    from tasks.device import DeviceInfo
    from tasks.job import CellJob
    from tasks.models.load import LoadedModel
    from tasks.session import Session

ARITHMETIC = 0.03  # what storage may differ from the format's arithmetic
OPTIONS: dict[str, Scalar] = {"bits": 4, "group_size": 128, "kernel": "auto", "samples": 128, "text": ""}
GROUPS = (32, 64, 128)


class GptqModel(Optimization):
    """`name` is the method too; `method=rtn` rounds to nearest into the same layout, without calibration.

    A model that was published quantized is loaded as it is. Random weights that are only rounded are made layer by
    layer in the measuring process, everything else is made once (`tasks.artifacts`).
    """

    family = "compression"
    needs = Needs(
        packages=("gptqmodel",),
        optional_packages=("triton",),
        extra="gptq",
        model_kinds=("language",),
        workloads=("prefill", "decode"),
    )
    bits: ClassVar[float] = 4.0  # for the predicted footprint
    symmetric: ClassVar[bool]

    def tensors(self, found: Codes, bits: int) -> dict[str, torch.Tensor]:
        """The layout's tensors, by their names in a checkpoint."""
        raise NotImplementedError

    def quantization_config(self, bits: int, group: int) -> dict[str, Any]:
        """What a checkpoint in this layout says in its configuration."""
        raise NotImplementedError

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if reason := super().unsupported(cell, device):
            return reason
        technique = next((item for item in cell.stack.techniques if item.name == self.name), None)
        if technique is None:
            return None
        published = quantized_already(cell.model)
        if published is not None:
            return unlike(published, technique, cell) or no_kernel(technique, published.bits, device)
        return no_kernel(technique, number(technique, "bits"), device) or unfit(technique, cell)

    def content(self, technique: Technique, search_path: tuple[str, ...]) -> dict[str, str]:
        return {} if rounds(technique) else text_content(technique, search_path)

    def artifact(self, technique: Technique, job: CellJob) -> ArtifactSpec | None:
        model = job.cell.model
        if quantized_already(model) or (rounds(technique) and _in_place(job.cell)):
            return None
        every_kernel = replace(technique, options=tuple(item for item in technique.options if item[0] != "kernel"))
        return artifact_spec(every_kernel, job, libraries=("gptqmodel", "torch", "transformers"))

    def make_artifact(self, technique: Technique, session: Session, folder: Path) -> dict[str, Any]:
        if rounds(technique):
            return self._round(technique, session, folder)
        from tasks.optimizations._gptq_calibrate import calibrate

        return calibrate(self.name, technique, session, folder)

    def kernels_to_build(self, technique: Technique, job: CellJob) -> str | None:
        wanted, cell = str(option(technique, "kernel")), job.cell
        reason = no_kernel(replace(technique, options=(("kernel", "marlin"),)), 4, job.device)
        # both methods have the same source, which is compiled for each dtype
        return None if reason or wanted not in ("auto", "marlin") else f"marlin {precision_of(cell) or cell.model.id}"

    def build_kernels(self, technique: Technique, session: Session) -> float:
        packing = quantized_already(session.job.cell.model) or self._packing(technique)
        kernel = choose(self.name, str(option(technique, "kernel")), packing, session.device)
        return kernels.build(kernel, _dtype(session.load_options, session))

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        model, artifact = session.job.cell.model, session.artifacts.get(self.name)
        packing = quantized_already(model) or self._packing(technique)
        if artifact is None and not quantized_already(model):
            build = self._layers(technique, packing, session, options)
            options.keyword_arguments["linear_factory"] = lambda name, linear: (
                linear if "lm_head" in name else build(self._packed(linear.weight.detach(), linear.bias, packing))
            )
            return
        options.loader = partial(self._bring, technique=technique, packing=packing)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Every linear layer of the blocks is one of the kernel's, packed as asked, in the bytes that the format takes.

        Layers do not tell how they were calibrated: what they were made from does.
        """
        model, head = session.model, session.model.get_output_embeddings()
        layers = [module for module in model.modules() if kernels.is_ours(module) and hasattr(module, "bits")]
        plain = [
            name
            for name, module in model.named_modules()
            if module is not head and (kernels.linear_shape(module) or _compressed_otherwise(module))
        ]
        published, artifact = quantized_already(session.job.cell.model), session.artifacts.get(self.name)
        asked = published or self._packing(technique)
        classes = Counter(type(layer).__name__ for layer in layers)
        backends = Counter(str(getattr(layer.backend, "value", layer.backend)) for layer in layers)
        kernel = _kernel_of(self.name, classes)
        wanted = str(option(technique, "kernel"))
        how = sorted({(int(layer.bits), int(layer.group_size)) for layer in layers})
        elements = sum(layer.in_features * layer.out_features for layer in layers)
        held = sum(kernels.held_bytes(layer) for layer in layers)
        expected = sum(
            kernel[1].layer_bytes(layer.in_features, layer.out_features, *how[0], act_order=asked.act_order)
            for layer in layers
        ) if kernel and len(how) == 1 else 0.0  # fmt: skip
        made = artifact.manifest.facts if artifact else {"method": "as published" if published else RTN}
        right = bool(published) or made.get("method") == str(option(technique, "method"))
        facts = {
            "layers": dict(classes), "plain": len(plain), "kernel": kernel[0] if kernel else None,
            "backend": dict(backends), "bits_and_group": how, **made,
            "bits_per_weight": 8 * held / elements if elements else None,
            "bits_per_weight_by_arithmetic": 8 * expected / elements if expected else None,
        }  # fmt: skip
        ok = expected > 0 and not plain and right and how == [(asked.bits, asked.group)]
        ok = ok and kernel is not None and wanted in ("auto", kernel[0]) and abs(held / expected - 1) < ARITHMETIC
        return Evidence(ok=ok, facts=facts)

    def _packing(self, technique: Technique) -> Packing:
        return Packing(
            method=self.name, bits=number(technique, "bits"), group=number(technique, "group_size"),
            symmetric=self.symmetric, zeros_less_one=self.name == "gptq",
        )  # fmt: skip

    def _layers(self, technique: Technique, packing: Packing, session: Session, options: LoadOptions) -> Any:
        """Makes layers of the kernel that is to run, of the tensors that a checkpoint has for each."""
        kernel = choose(self.name, str(option(technique, "kernel")), packing, session.device)
        cls, dtype = kernels.layer_class(kernel), _dtype(options, session)
        return lambda tensors: kernels.layer_of(cls, kernel, tensors, packing, dtype)

    def _packed(self, weight: torch.Tensor, bias: torch.Tensor | None, packing: Packing) -> dict[str, torch.Tensor]:
        """The tensors that stand for a weight (outputs, inputs) rounded to nearest."""
        if weight.shape[1] % packing.group:
            raise Unsupported(f"groups of {packing.group} do not divide a layer's {weight.shape[1]} inputs")
        found = round_to_nearest(weight, packing.bits, packing.group, symmetric=packing.symmetric)
        tensors = self.tensors(found, packing.bits)
        return tensors if bias is None else {**tensors, "bias": bias}

    def _round(self, technique: Technique, session: Session, folder: Path) -> dict[str, Any]:
        """The checkpoint with every linear layer of the blocks rounded to nearest."""
        options = LoadOptions(checkpoint=session.load_options.checkpoint)
        loaded = session.load(options, session.kept_on(options))
        packing, head, packed = self._packing(technique), loaded.model.get_output_embeddings(), {}
        for name, module in loaded.model.named_modules():
            shape = kernels.linear_shape(module)
            if shape is None or module is head:
                continue
            weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
            weight = weight if hasattr(module, "in_features") else weight.T
            packed[name] = {key: value.cpu() for key, value in self._packed(weight, bias, packing).items()}
        how = self.quantization_config(packing.bits, packing.group)
        write_packed(loaded.model, loaded.tokenizer, folder, packed, how)
        return {"method": RTN, "bits": packing.bits, "group_size": packing.group, "samples": 0}

    def _bring(self, session: Session, technique: Technique, packing: Packing) -> LoadedModel:
        """The loader of packed checkpoints: ours, or as published."""
        from tasks.models.identity import refuse_unsafe
        from tasks.models.load import LoadedModel, tokenizer_of

        options, spec = session.load_options, session.job.cell.model
        folder = Path(options.checkpoint) if options.checkpoint else checkpoint_folder(spec)
        assert folder is not None, "a quantized checkpoint is a folder"
        refuse_unsafe(folder, spec.trust_remote_code)
        model = load_packed(
            folder, packing, self._layers(technique, packing, session, options), dtype=_dtype(options, session),
            device=session.device, attention=options.attention, trust_remote_code=spec.trust_remote_code,
        )  # fmt: skip
        tokenizer = tokenizer_of(str(folder), trust_remote_code=spec.trust_remote_code, local_files_only=True)
        weights = "random" if spec.source == "random" else "trained"
        return LoadedModel(model=model, weights=weights, config=model.config, tokenizer=tokenizer)


def _kernel_of(method: str, classes: Counter[str]) -> tuple[str, Kernel] | None:
    """The one kernel that all layers are of."""
    return next(((key, item) for key, item in KERNELS[method].items() if set(classes) == {item.layer}), None)


def _compressed_otherwise(module: Any) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not kernels.is_ours(module)


def _in_place(cell: Cell) -> bool:
    """Random weights that nothing before this technique in the stack has changed."""
    return cell.model.source == "random" and not starts_from_another(cell)


def _dtype(options: LoadOptions, session: Session) -> torch.dtype:
    """What the model computes in: the stack's precision, or as published."""
    from tasks.models.load import torch_dtype
    from tasks.optimizations._checkpoint import published_dtype

    dtype = torch_dtype(options.dtype) if options.dtype else published_dtype(session, "")
    if dtype.itemsize != 2:
        raise Unsupported(
            f"the kernels multiply in fp16 or bf16, this cell computes in {dtype}: put bf16 into the stack"
        )
    return dtype
