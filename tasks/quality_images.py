"""Image classifiers on the same random images: how often the first choice of the reference stays."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tasks.session import Session

IMAGES, IMAGE_BATCH = 64, 16


def image_outputs(session: Session) -> dict[str, torch.Tensor]:
    """On the host: fp32 `logits`, shape (images, classes), and a `digest` of the images."""
    import torch

    from tasks.workloads._inputs import images, images_dtype

    size, dtype = session.job.cell.workload.get("image_size", 224), images_dtype(session)
    batches = images(session, IMAGE_BATCH, size, count=IMAGES // IMAGE_BATCH, on_host=True)
    digest = hashlib.sha256(b"".join(batch.numpy().tobytes() for batch in batches)).digest()
    logits = [session.model(batch.to(session.device, dtype)).logits.float().cpu() for batch in batches]
    return {"logits": torch.cat(logits), "digest": torch.tensor(list(digest), dtype=torch.uint8)}


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
