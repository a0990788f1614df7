"""Further training of a model that exists: what pruning recovers with, and a student learns with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.models.pocket_model import autocast
from tasks.models.training import schedule

if TYPE_CHECKING:
    import torch


def finetune(
    model: Any,
    ids: torch.Tensor,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    steps: int,
    seconds: float = 0.0,
    batch: int,
    learning_rate: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Train all weights of `model` for `steps` steps, or, where that is 0, for `seconds`; facts of the run.

    `ids` (windows, length) are gone through in a seeded order, again and again, so that neighbouring batches are not
    neighbouring text; `loss_of` is given (batch, length) of them on the model's device. AdamW with a warm-up and a
    cosine to zero, in bf16 autocast on CUDA; weights must be fp32. The first and the last loss are means over up to
    five steps, which do not overlap.
    """
    import torch

    device = next(model.parameters()).device
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda")
    model.train()
    losses: list[torch.Tensor] = []
    began, done = time.perf_counter(), 0.0
    while done < 1.0:
        at = len(losses) * batch % len(ids)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(done)
        chosen = ids[at : at + batch].to(device)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device.type):
            loss = loss_of(chosen)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach().float())
        if not steps and device.type == "cuda":
            torch.cuda.synchronize()  # else the queue would run far ahead of the clock
        done = len(losses) / steps if steps else (time.perf_counter() - began) / seconds
    model.eval()
    some = max(1, min(5, len(losses) // 2))
    first, last = (torch.stack(part).mean().item() for part in (losses[:some], losses[-some:]))
    return {
        "steps": len(losses),
        "tokens": len(losses) * batch * ids.shape[1],
        "seconds": round(time.perf_counter() - began, 3),
        "loss_first": first,
        "loss_last": last,
    }


def next_token_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every next token, of (batch, length) ids."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def save_checkpoint(model: Any, tokenizer: Any, folder: Any) -> None:
    """A transformers checkpoint in `folder`: safetensors, configuration and, if there is one, the tokenizer."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
