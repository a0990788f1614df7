"""What a checkpoint is, without loading it: its hash, its configuration, and whether it may be loaded at all."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.cell import ModelSpec, digest
from tasks.models.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from tasks.job import CellJob

POCKET = Path(__file__).parent / "pocket"
# What `benchmatrix submit` ships lies beside our packages, wherever a node keeps those. A reference that begins so is
# the same on every machine, and so are the ids of its cells.
SHIPPED = "shipped:"
SHIPPED_FOLDER = Path(__file__).resolve().parents[2] / "shipped"


class ModelError(ValueError):
    """A model that cannot or must not be loaded; the message says what to do."""


def located(reference: str) -> Path:
    """Where the file or folder that a model's reference names lies on this machine."""
    return SHIPPED_FOLDER / reference.removeprefix(SHIPPED) if reference.startswith(SHIPPED) else Path(reference)


def checkpoint_folder(spec: ModelSpec) -> Path | None:
    """Folder of a local checkpoint, or None for models that have none."""
    if spec.source == "pocket":
        return POCKET
    return located(spec.reference) if spec.source == "path" else None


_CONTENT = (".safetensors", ".json", ".py", ".model", ".txt", ".jinja")


def checkpoint_hash(spec: ModelSpec, search_path: tuple[str, ...] = ()) -> str:
    """Hash of what the weights are: file contents for checkpoints, the configuration for random weights.

    Hub models are identified by name and revision, factories by name and, where it lies in `search_path`, their file.
    """
    folder = checkpoint_folder(spec)
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix in _CONTENT)
        return digest([[path.name, file_hash(path, path.stat().st_mtime_ns)] for path in files])
    if spec.source == "random":
        return digest(random_config(spec.reference))
    if spec.source == "factory":
        module = Path(*spec.reference.partition(":")[0].split("."))
        files = [Path(folder) / module.with_suffix(".py") for folder in search_path]
        found = next((file for file in files if file.is_file()), None)
        return digest([spec.identity(), file_hash(found, found.stat().st_mtime_ns) if found else None])
    return digest(spec.identity())


def job_checkpoint(job: CellJob) -> str:
    """`checkpoint_hash` of a job's model: as the job has it, else computed."""
    return job.checkpoint or checkpoint_hash(job.cell.model, job.search_path)


@cache
def file_hash(path: Path, _modified: int) -> str:
    """SHA-256 of a file, computed once for each modification time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def random_config(reference: str) -> dict[str, Any]:
    """The configuration of `random:NAME` or `random:path/to/config.json`, with `model_type` and `dtype`."""
    if reference in ARCHITECTURES:
        architecture = ARCHITECTURES[reference]
        return {"model_type": architecture.model_type, "dtype": architecture.dtype, **architecture.config}
    path = located(reference)
    if not path.is_file():
        raise ModelError(f"random:{reference} is neither a named architecture ({', '.join(ARCHITECTURES)}) nor a file")
    config = _json_object(path)
    if "model_type" not in config:
        raise ModelError(f"{path}: a configuration needs the key model_type")
    return config


def config_of(spec: ModelSpec) -> dict[str, Any] | None:
    """The configuration without torch: None for hub models and factories, which are not at hand."""
    folder = checkpoint_folder(spec)
    if folder is not None:
        return _json_object(folder / "config.json")
    return random_config(spec.reference) if spec.source == "random" else None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds {type(data).__name__}, a JSON object is needed")
    return data


@cache
def model_type(spec: ModelSpec) -> str | None:
    """The configuration's `model_type`, None where it is not at hand: loading will tell then."""
    try:
        return (config_of(spec) or {}).get("model_type")
    except (OSError, ValueError):
        return None


# models whose positions are a table of embeddings: key of its length, and what transformers takes without it
_POSITION_TABLES = {
    "gpt2": ("n_positions", 1024), "gpt_bigcode": ("n_positions", 1024), "openai-gpt": ("n_positions", 512),
    "gpt_neo": ("max_position_embeddings", 2048), "opt": ("max_position_embeddings", 2048),
}  # fmt: skip


@cache
def learned_positions(spec: ModelSpec) -> int | None:
    """Tokens of the longest sequence of a model with learned positions; None without them, or if not at hand."""
    kind = model_type(spec)
    if kind not in _POSITION_TABLES:
        return None
    key, default = _POSITION_TABLES[kind]
    length = (config_of(spec) or {}).get(key, default)
    return length if isinstance(length, int) else None


def refuse_unsafe(folder: Path, trust_remote_code: bool) -> None:
    """Raise `ModelError` for a checkpoint that is not plain safetensors inside its own folder."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give the folder of a Hugging Face checkpoint")
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in folder.glob(pattern)]
        found = f"found only {', '.join(sorted(pickles))}, which can run code when loaded" if pickles else "none found"
        raise ModelError(f"{folder}: only safetensors weights are loaded, {found}; convert with save_pretrained")
    root = folder.resolve()
    # the hub's cache is made of links into its own blobs folder, two levels up
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in folder.rglob("*"):
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ModelError(f"{path} points outside {folder}: refused")
    for index in folder.glob("*.index.json"):
        weight_map = _json_object(index).get("weight_map", {})
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index}: weight_map is not an object")
        for name in set(map(str, weight_map.values())):
            if Path(name).name != name:
                raise ModelError(f"{index}: weight file {name!r} is not inside {folder}: refused")
            if not name.endswith(".safetensors"):
                raise ModelError(f"{index}: weight file {name!r} is no safetensors file and could run code: refused")
    for file in [] if trust_remote_code else sorted(folder.glob("*.json")):
        # also of tokenizers and processors; large vocabularies are no configurations
        if file.name.endswith("config.json") and "auto_map" in _json_object(file):
            raise ModelError(
                f"{folder}: the checkpoint brings its own code ({file.name}); set trust_remote_code: true for it "
                "if you do"
            )
