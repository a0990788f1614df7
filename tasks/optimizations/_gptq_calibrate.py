"""GPTQModel makes a quantized checkpoint out of a plain one and calibration text, on the CPU or a CUDA device."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.calibration import calibration_windows
from tasks.models.finetune import save_checkpoint
from tasks.models.identity import POCKET, checkpoint_folder
from tasks.optimization import LoadOptions, Unsupported
from tasks.optimizations._gptq_kernels import import_library, undisturbed
from tasks.stacks import option

if TYPE_CHECKING:
    import torch

    from tasks.cell import Technique
    from tasks.session import Session

LENGTH = 512  # tokens of a calibration window
PACKERS = {"gptq": "gptq_torch", "awq": "awq_torch"}  # need no compiler of the device's


def calibrate(method: str, technique: Technique, session: Session, folder: Path) -> dict[str, Any]:
    """Write the checkpoint into `folder`; facts for the manifest."""
    bits, group = (int(str(option(technique, key))) for key in ("bits", "group_size"))
    import_library()
    with tempfile.TemporaryDirectory(prefix="plain-") as plain:
        source = _source(session, Path(plain))
        windows = calibration_windows(
            session, str(option(technique, "text")), int(str(option(technique, "samples"))), LENGTH
        )
        bare = session.loaded is None or session.loaded.tokenizer is None
        session.loaded = None  # never two models at once
        losses = _quantize(method, bits, group, windows, source, session, folder)
        _as_before(source, folder)
    # its log holds times: artifacts are the same whenever they are made
    for path in [*folder.glob("quant_log*"), *(folder.glob("tokenizer*") if bare else ())]:
        path.unlink()
    return {
        "method": method, "bits": bits, "group_size": group, "samples": len(windows),
        "calibration_tokens": windows.numel(), "packed_with": PACKERS[method], **losses,
    }  # fmt: skip


def _source(session: Session, plain: Path) -> Path:
    """The folder of the checkpoint that it starts from; the session then has its configuration and tokenizer."""
    from transformers import AutoConfig

    from tasks.models.load import LoadedModel, tokenizer_of

    spec, before = session.job.cell.model, session.load_options.checkpoint
    folder = Path(before) if before else checkpoint_folder(spec)
    if folder is None:  # random weights, or on the hub
        options = LoadOptions()
        loaded = session.load(options, session.kept_on(options))
        save_checkpoint(loaded.model, loaded.tokenizer, plain)
        config, tokenizer = loaded.config, loaded.tokenizer
    else:
        common = {"trust_remote_code": spec.trust_remote_code, "local_files_only": True}
        config = AutoConfig.from_pretrained(folder, **common)
        tokenizer = tokenizer_of(str(folder), **common)
    session.loaded = LoadedModel(model=None, weights=None, config=config, tokenizer=tokenizer)
    if tokenizer is not None:
        return folder or plain
    # the library wants a tokenizer, although it is given tokens: any will do
    for path in folder.iterdir() if folder else ():
        (plain / path.name).symlink_to(path.resolve())
    for path in POCKET.glob("tokenizer*"):
        shutil.copy(path, plain)
    return plain


def _quantize(
    method: str, bits: int, group: int, windows: torch.Tensor, source: Path, session: Session, folder: Path
) -> dict[str, Any]:
    """Have it done, and say what the library says of it: the mean over layers of its own loss."""
    import torch

    device = f"{session.device.type}:{torch.cuda.current_device()}" if session.on_cuda else "cpu"
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    with undisturbed(workers=torch.get_num_threads()), _failing_alive(), torch.enable_grad():
        from gptqmodel import GPTQModel, QuantizeConfig
        from gptqmodel.quantization import FORMAT, METHOD
        from gptqmodel.utils.backend import BACKEND

        kinds = {
            "gptq": {"sym": True, "desc_act": False},
            "awq": {"method": METHOD.AWQ, "format": FORMAT.GEMM, "sym": False},
        }
        config = QuantizeConfig(
            bits=bits, group_size=group, offload_to_disk=False, fallback=None,
            pack_impl="gpu" if session.on_cuda else "original", **kinds[method],
        )  # fmt: skip
        model = GPTQModel.load(
            str(source), config, device=device, trust_remote_code=session.job.cell.model.trust_remote_code
        )
        log = model.quantize(rows, batch_size=1, backend=BACKEND(PACKERS[method]))
        model.save(str(folder))
    if not (folder / "config.json").is_file():
        raise Unsupported(f"gptqmodel left no checkpoint of {session.job.cell.model.id}")
    losses = [float(item["loss"]) for items in log.values() for item in items if _is_number(item.get("loss"))]
    return {"mean_loss": sum(losses) / len(losses) if losses else None, "quantized_layers": len(losses)}


def _as_before(source: Path, folder: Path) -> None:
    """The configurations of the model that it started from: the library names tokens for padding and more."""
    written = json.loads((folder / "config.json").read_text())
    how, original = written["quantization_config"], json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**original, "quantization_config": how}, indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", folder)


@contextmanager
def _failing_alive() -> Iterator[None]:
    """Meanwhile an error in one of the library's threads is raised here; it would end the process without a word."""
    from gptqmodel.utils.threadx import _DeviceWorker

    abort = _DeviceWorker._abort_process
    _DeviceWorker._abort_process = lambda *_: None
    try:
        yield
    finally:
        _DeviceWorker._abort_process = abort


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
