"""Text that techniques calibrate, recover and distill on: the training part of the shipped text, or a user's file.

Never the held-out part, on which quality is judged. A technique that uses it has the option `text`, empty by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.models.identity import ModelError, file_hash
from tasks.models.text import TEXT_DIR, train_text

if TYPE_CHECKING:
    import torch

    from tasks.cell import Technique
    from tasks.session import Session

CHARACTERS = 6  # read for each token wanted; where that is too few, four times as many
_SHIPPED = TEXT_DIR / "train.txt.xz"


def text_content(technique: Technique, search_path: tuple[str, ...]) -> dict[str, str]:
    """What `Optimization.content` returns for a technique with the option `text`: the hash of that text."""
    path = text_file(str(technique.option("text", "")), search_path) or _SHIPPED
    return {"text": file_hash(path, path.stat().st_mtime_ns)}


def text_file(name: str, search_path: tuple[str, ...]) -> Path | None:
    """The file that the option names, relative to the sweep file's folder; None for the shipped text."""
    if not name:
        return None
    places = [Path(folder) / name for folder in (*search_path, ".")]  # an absolute name stays what it is
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ModelError(f"calibration text {name!r} is not a file in {', '.join(search_path) or Path.cwd()}")
    return found


def calibration_windows(session: Session, text: str, count: int, length: int) -> torch.Tensor:
    """Token ids on the host, (count, length): windows spread evenly over the text; random ids without a tokenizer."""
    import torch

    from tasks.workloads._inputs import vocabulary

    assert session.loaded is not None
    config, tokenizer = session.loaded.config.get_text_config(), session.loaded.tokenizer
    length = min(length, int(config.max_position_embeddings))
    if tokenizer is None:
        generator = torch.Generator().manual_seed(session.job.seed)
        return torch.randint(0, vocabulary(config), (count, length), generator=generator)
    path = text_file(text, session.job.search_path)
    whole = path.read_text(encoding="utf-8") if path else train_text()
    for characters in (CHARACTERS * length, 4 * CHARACTERS * length):
        room = max(len(whole) - characters, 0)
        starts = [round(room * index / max(count - 1, 1)) for index in range(count)]
        pieces = [whole[start : start + characters] for start in starts]
        ids = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        if min(map(len, ids)) >= length:
            return torch.tensor([piece[:length] for piece in ids])
    raise ModelError(f"the calibration text has {len(whole)} characters: too few for windows of {length} tokens")
