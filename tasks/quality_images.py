"""Image classifiers on the same random images: how often the first choice of the reference stays."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tasks.session import Session

IMAGES, IMAGE_BATCH = 64, 16
VERSION = 2  # of the images: raised when others are drawn


def image_outputs(session: Session) -> dict[str, torch.Tensor]:
    """On the host: fp32 `logits`, shape (images, classes), and a `digest` of the images."""
    import torch

    from tasks.workloads._inputs import images_dtype

    images, dtype = (
        drawn_images(session.job.cell.workload.get("image_size", 224), session.job.seed),
        images_dtype(session),
    )
    digest = hashlib.sha256(images.numpy().tobytes()).digest()
    logits = [session.model(b.to(session.device, dtype)).logits.float().cpu() for b in images.split(IMAGE_BATCH)]
    return {"logits": torch.cat(logits), "digest": torch.tensor(list(digest), dtype=torch.uint8)}


def drawn_images(size: int, seed: int) -> torch.Tensor:
    """The same on every machine, shape (`IMAGES`, 3, size, size): uniform, of variance 1.

    Drawn on the host, where normal ones would differ with the processor's vector instructions.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((IMAGES, 3, size, size), generator=generator) - 0.5) * math.sqrt(12)


def compare_images(mine: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Fields of a reading: agreement with the reference's first choice, with binomial errors."""
    agree = (mine.argmax(-1) == reference.argmax(-1)).double()
    among = (mine.topk(5).indices == reference.argmax(-1, keepdim=True)).any(-1).double()
    share = float(agree.mean())
    return {
        "scored": len(agree),
        "top1_agreement": share,
        "top1_agreement_stderr": math.sqrt(share * (1 - share) / len(agree)),
        "top5_agreement": float(among.mean()),
    }
