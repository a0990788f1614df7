"""The committed text that pocket is trained and judged on: the Python 3.11.7 standard library, split by file.

Both texts join whole source files with `SEPARATOR`, which the tokenizer reads as its end-of-text token.
"""

import hashlib
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

TEXT_DIR = Path(__file__).parent / "pocket" / "text"
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One question in HellaSwag's form: which of the endings continues the context?

    `context + endings[label]` is held-out text verbatim. Every ending begins with the newline, so nothing is
    put between the two, and no token spans them.
    """

    context: str
    endings: tuple[str, ...]
    label: int


def train_text() -> str:
    """Every training document, joined by `SEPARATOR`; about 10 MB. Raises ValueError if the file was altered."""
    return _decompress("train.txt.xz")


def heldout_text() -> str:
    """Every held-out document, joined by `SEPARATOR`; no file of it is in `train_text()`."""
    return _decompress("heldout.txt.xz")


def heldout_documents() -> list[str]:
    """The held-out documents, one string for each source file."""
    return heldout_text().split(SEPARATOR)


def multiple_choice() -> list[Choice]:
    """About 1000 four-way questions made from the held-out text; chance is 25 percent."""
    rows = [json.loads(line) for line in _verified("choices.jsonl").decode().splitlines()]
    return [Choice(context=row["ctx"], endings=tuple(row["endings"]), label=row["label"]) for row in rows]


def write_sums(directory: Path = TEXT_DIR) -> None:
    """Write SHA256SUMS over the data files in `directory`, in the format of `sha256sum --check`."""
    files = sorted(path for pattern in ("*.xz", "*.jsonl") for path in directory.glob(pattern))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (directory / "SHA256SUMS").write_text("".join(lines), encoding="ascii")


def _decompress(name: str) -> str:
    return lzma.decompress(_verified(name)).decode("utf-8")


def _verified(name: str) -> bytes:
    path = TEXT_DIR / name
    lines = (TEXT_DIR / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    expected = {file: digest for digest, file in (line.split() for line in lines)}
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected.get(name):
        raise ValueError(
            f"{path} has sha256 {found}, but SHA256SUMS beside it says {expected.get(name)}. Restore it with "
            f"'git checkout -- {path}', or remake it with 'python -m tasks.models.train_pocket --make-text LIB'."
        )
    return content
