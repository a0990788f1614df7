"""Layers that do not fit live on the CPU or on disk and come to the device for every use (accelerate's hooks)."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.optimization import Evidence, LoadOptions, Needs, Optimization
from tasks.registry import optimizations
from tasks.stacks import option
from tasks.transfers import Counted, Transfers

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, ModelSpec, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session

CONFLICTS = ("compression", "compile", "structure")  # families that want weights in place, or code without hooks


class Offload(Optimization):
    """`keep` is the fraction of the decoder layers that stays on the device: the first ones, as accelerate does it.

    Embeddings, final norm and head stay there too. On disk means in files that the operating system may cache.
    """

    name = "offload"
    family = "offload"
    summary = "a fraction of the decoder layers on the device, the others on the CPU or on disk (accelerate)"
    needs = Needs(packages=("accelerate",), model_kinds=("language",), workloads=("prefill", "decode"))
    options = {"keep": 0.5, "to": "cpu"}
    choices = {"to": ("cpu", "disk")}
    synchronises = "the host brings the weights of every layer that is away"

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        chosen = next((item for item in cell.stack.techniques if item.name == self.name), None)
        if refusal is not None or chosen is None:
            return refusal
        if not 0.0 <= float(option(chosen, "keep")) <= 1.0:
            return f"keep of {self.name} is a fraction from 0 to 1, got {option(chosen, 'keep')}"
        if device.kind == "cpu" and option(chosen, "to") == "cpu":
            return f"{self.name} to cpu needs an accelerator, {device.tag} is cpu: its layers are there already"
        families = {item.name: optimizations()[item.name].family for item in cell.stack.techniques}
        other = next((name for name, family in families.items() if family in CONFLICTS), None)
        return f"{self.name} moves whole layers through hooks, which does not go with {other}" if other else None

    def resident(self, technique: Technique) -> float:
        return float(option(technique, "keep"))

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        # one warning about parameters on the meta device per load
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
        config = _config_of(session, options.checkpoint)
        away = _Away(technique, session, config)
        session.settings.offload = away
        # an artifact made of a random model is a checkpoint as any other, with the layers that it has
        away.made_here = session.job.cell.model.source == "random" and options.checkpoint is None
        if away.made_here:
            options.keyword_arguments["linear_factory"] = away.placed
        elif away.keep < 1.0:
            options.keyword_arguments["device_map"] = away.device_map(_on_meta(config, session.job.cell.model))
            options.keyword_arguments["offload_folder"] = str(away.folder)

    def apply(self, technique: Technique, session: Session) -> None:
        away: _Away = session.settings.offload
        if away.made_here:
            away.dispatch(session.model)
        session.settings.transfers = ledger = Transfers()
        for hook in _fetching(session.model):
            hook.weights_map = Counted(hook.weights_map, ledger)

    @contextmanager
    def context(self, technique: Technique, session: Session) -> Iterator[None]:
        try:
            yield
        finally:
            session.settings.offload.clean()

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """The layers away are those asked for, have no weights on the device, and each pass fetches all of them.

        From the CPU: a weight that fetches find on the device is not away. From disk it may be read straight to it.
        """
        keep, to, model = float(option(technique, "keep")), str(option(technique, "to")), session.model
        layers = model.get_submodule(layers_of(model))
        places = Counter(str(place) for place in getattr(model, "hf_device_map", {}).values())
        gone = [layer for layer in layers if all(parameter.is_meta for parameter in layer.parameters())]
        whole = [layer for layer in layers if not any(parameter.is_meta for parameter in layer.parameters())]
        expected = len(layers) - kept_layers(len(layers), keep)
        away_bytes = sum(parameter.nbytes for layer in gone for parameter in layer.parameters())
        ledger = session.settings.transfers
        moved = ledger.bytes_per_pass if ledger is not None else 0.0
        devices = dict(ledger.devices) if ledger is not None else {}
        facts = {
            "fetched_from": devices, "layers": len(layers), "layers_away": len(gone), "device_map": dict(places),
            "hooks_that_fetch": len(_fetching(model)), "bytes_away": away_bytes, "bytes_fetched_per_pass": moved,
        }  # fmt: skip
        ok = len(gone) == expected and len(whole) == len(layers) - expected and places[to] == expected
        ok = ok and moved == away_bytes and (to == "disk" or set(devices) <= {"cpu"})
        return Evidence(ok=ok, facts=facts)


class _Away:
    """Where the layers of one model go: which, how they are written, and the folder that holds them."""

    made_here = False  # random weights, made layer by layer: nobody else puts them into their places

    def __init__(self, technique: Technique, session: Session, config: Any) -> None:
        self.keep, self.to = float(option(technique, "keep")), str(option(technique, "to"))
        # accelerate tells devices apart by number
        self._main: Any = "cpu" if session.device.type == "cpu" else session.device.index or 0
        self._index: dict[str, Any] = {}
        self._config_layers = int(config.get_text_config().num_hidden_layers)
        self.folder = _fresh_folder(session.job.artifact_dir) if self.to == "disk" else None

    def placed(self, name: str, linear: torch.nn.Linear) -> torch.nn.Module:
        """One linear layer of a random model, made on the device: there, on the CPU, or in a file and on meta."""
        number = next((int(part) for part in re.findall(r"\.(\d+)\.", name)), None)
        if number is None or number < kept_layers(self._config_layers, self.keep):
            return linear
        if self.to == "cpu":
            return linear.cpu()
        for key, parameter in linear.named_parameters():
            self._write(f"{name}.{key}", parameter)
        return linear.to("meta")

    def _write(self, name: str, parameter: torch.Tensor) -> None:
        from accelerate.utils import offload_weight

        offload_weight(parameter.detach().cpu(), name, self.folder, self._index)

    def device_map(self, model: Any) -> dict[str, Any]:
        """Every module of a block's size or outside the blocks -> its place; none holds another."""
        path = layers_of(model)
        count = len(model.get_submodule(path))
        found: dict[str, Any] = {}

        def visit(module: Any, prefix: str) -> None:
            for name, child in module.named_children():
                full = f"{prefix}{name}"
                if full == path:
                    kept = kept_layers(count, self.keep)
                    found.update({f"{full}.{i}": self._main if i < kept else self.to for i in range(count)})
                elif path.startswith(f"{full}."):
                    visit(child, f"{full}.")
                else:
                    found[full] = self._main

        visit(model, "")
        return found

    def dispatch(self, model: Any) -> None:
        """Attach accelerate's hooks to a random model whose linear layers are in their places already.

        Whatever else is in a layer (norms, GPT-2's Conv1D) is put there now: the hooks fetch weights from where they
        are, and would fetch those on the device from the device.
        """
        from accelerate import dispatch_model
        from accelerate.utils import save_offload_index

        places = self.device_map(model)
        if self.keep >= 1.0:
            model.hf_device_map = places
            return
        for name in [name for name, place in places.items() if place == self.to != self._main]:
            if self.to == "cpu":
                model.get_submodule(name).cpu()
                continue
            for key, parameter in model.get_submodule(name).named_parameters():
                if not parameter.is_meta:
                    self._write(f"{name}.{key}", parameter)
        if self.to == "disk":
            save_offload_index(self._index, self.folder)
        skipped = getattr(model, "_skip_keys_device_placement", None)
        dispatch_model(model, places, main_device=self._main, offload_dir=self.folder, skip_keys=skipped)

    def clean(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def kept_layers(count: int, keep: float) -> int:
    """How many of `count` layers stay on the device."""
    return round(count * keep)


def layers_of(model: Any) -> str:
    """Path of the list that holds a language model's decoder layers."""
    import torch

    wanted = model.config.get_text_config().num_hidden_layers
    lists = (
        name for name, item in model.named_modules() if isinstance(item, torch.nn.ModuleList) and len(item) == wanted
    )
    return str(next(lists))


def _fetching(model: Any) -> list[Any]:
    """accelerate's hooks that fetch weights before a module runs."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    return [hook for hook in hooks if getattr(hook, "offload", False)]


def _config_of(session: Session, checkpoint: str | None = None) -> Any:
    """Of what is loaded: the artifact in `checkpoint`, else the cell's model."""
    from transformers import AutoConfig

    from tasks.models.identity import checkpoint_folder, random_config
    from tasks.models.load import hf_config

    spec = session.job.cell.model
    if checkpoint is None and spec.source == "random":
        return hf_config(random_config(spec.reference))
    where = checkpoint or str(checkpoint_folder(spec) or spec.reference)
    revision = {"revision": spec.revision} if spec.revision is not None and checkpoint is None else {}
    return AutoConfig.from_pretrained(where, trust_remote_code=spec.trust_remote_code, **revision)


def _on_meta(config: Any, spec: ModelSpec) -> Any:
    import torch

    from tasks.models.load import from_config

    with torch.device("meta"):
        return from_config(config, spec)


def _fresh_folder(parent: str) -> Path:
    """A folder named after this process; those of dead processes, which could not clean up, are removed."""
    root = Path(parent or tempfile.gettempdir()) / "offloaded"
    root.mkdir(parents=True, exist_ok=True)
    for old in root.iterdir():
        pid = old.name.partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
