"""`benchmatrix train`: a checkpoint of a chosen size, trained on the shipped text in minutes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from tasks.models.identity import ModelError
from tasks.models.pocket_model import SIZES
from tasks.stacks import nearest

MINUTES = 3.0


def train_model(
    directory: Path, *, size: str, minutes: float | None, steps: int | None, device: str | None, seed: int
) -> None:
    """Train and save; prints progress, how a sweep names the model, and last its record as JSON."""
    if size not in SIZES:
        raise ModelError(f"unknown size {size!r}{nearest(size, list(SIZES))}")
    if minutes is not None and steps is not None:
        raise ModelError("give --minutes or --steps, not both")
    if device not in (None, "cpu", "cuda"):
        raise ModelError(f"device {device!r} is neither cpu nor cuda")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ModelError(f"{directory} exists and is not empty: give a new folder")
    import torch

    from tasks.models.training import default_settings, train

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("torch sees no CUDA device here: leave --device out, or say cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    directory.mkdir(parents=True, exist_ok=True)
    limit = None if steps is not None else minutes or MINUTES
    record = train(default_settings(size, device, limit, steps, seed), directory)
    print(f"in a sweep: models: [{{id: {size}-{seed}, path: {directory.resolve()}}}]")
    print(json.dumps(asdict(record)))
