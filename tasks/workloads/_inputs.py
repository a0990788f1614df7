"""Seeded inputs, made on the device before anything is timed; several sets, rotated, never zeros."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tasks.models.runtime import RuntimeModel

if TYPE_CHECKING:
    import torch

    from tasks.session import Session

SETS = 8


def token_batches(session: Session, batch_size: int, length: int, count: int = SETS) -> list[torch.Tensor]:
    """`count` batches of token ids, shape (batch_size, length), int64, on the device.

    Windows of the held-out text where the model has a tokenizer, else uniform random ids of its vocabulary.
    """
    import torch

    assert session.loaded is not None
    total = count * batch_size * length
    if session.loaded.tokenizer is not None:
        ids = torch.tensor(_text_tokens(session.loaded.tokenizer, total, session.job.seed))
    else:
        generator = torch.Generator().manual_seed(session.job.seed)
        ids = torch.randint(0, vocabulary(session.loaded.config), (total,), generator=generator)
    return list(ids.view(count, batch_size, length).to(session.device))


def vocabulary(config: Any) -> int:
    """Size of a configuration's vocabulary."""
    return int(config.get_text_config().vocab_size)


def _text_tokens(tokenizer: Any, total: int, seed: int) -> list[int]:
    from tasks.models.text import heldout_text

    text, draw = heldout_text(), random.Random(seed)
    ids: list[int] = []
    while len(ids) < total:
        start = draw.randrange(len(text))
        ids += tokenizer(text[start : start + 20_000], add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:total]


def images(session: Session, batch_size: int, size: int, channels: int = 3, count: int = SETS) -> list[torch.Tensor]:
    """`count` batches of normal random images, shape (batch_size, channels, size, size), in the model's dtype."""
    import torch

    generator = torch.Generator(session.device).manual_seed(session.job.seed)
    shape, dtype = (batch_size, channels, size, size), images_dtype(session)
    return [torch.randn(shape, generator=generator, device=session.device).to(dtype) for _ in range(count)]


def images_dtype(session: Session) -> torch.dtype:
    """What the model takes images in: the type of its weights."""
    import torch

    if isinstance(session.model, RuntimeModel):
        return session.model.dtype
    return next((p.dtype for p in session.model.parameters() if p.is_floating_point()), torch.float32)


def as_weights(session: Session, inputs: Any) -> Any:
    """What a factory's `make_inputs` made, its floating-point tensors in the type that the stack gave the weights."""
    import torch
    from torch.utils._pytree import tree_map_only

    if session.load_options.dtype is None:
        return inputs
    dtype = getattr(torch, session.load_options.dtype)
    return tree_map_only(torch.Tensor, lambda item: item.to(dtype) if item.is_floating_point() else item, inputs)


def waiting_bytes(sets: list[Any]) -> int:
    """Bytes of all input sets but one; a set is a tensor, or a tuple that holds some."""
    import torch

    def size(item: Any) -> int:
        if isinstance(item, torch.Tensor):
            return item.nbytes
        return sum(map(size, item)) if isinstance(item, tuple | list) else 0

    return sum(map(size, sets[1:]))


def split(batch: Any, parts: int, size: int) -> list[Any]:
    """`batch` as `parts` equal micro-batches: views along the first dimension, which must have `size` entries.

    A batch is a tensor, or a tuple, list or mapping of batches. Raises `ValueError` for what cannot be divided.
    """
    import torch

    if isinstance(batch, torch.Tensor):
        if batch.ndim == 0 or batch.shape[0] != size:
            raise ValueError(
                f"a batch of {size} cannot be split: one of its tensors has the shape {tuple(batch.shape)}"
            )
        return list(batch.chunk(parts))
    if isinstance(batch, tuple | list):
        return [type(batch)(items) for items in zip(*(split(item, parts, size) for item in batch), strict=True)]
    if isinstance(batch, dict):
        columns = {key: split(item, parts, size) for key, item in batch.items()}
        return [{key: column[number] for key, column in columns.items()} for number in range(parts)]
    raise ValueError(f"a batch of {size} cannot be split: it holds {type(batch).__name__}")
