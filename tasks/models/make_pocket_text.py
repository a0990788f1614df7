"""Make the text that pocket is trained and judged on, and the multiple-choice questions from its held-out part.

`python -m tasks.models.train_pocket --make-text LIB --make-choices` runs both; `tasks.models.text` reads the result.
"""

import hashlib
import json
import lzma
import random
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tasks.models.text import SEPARATOR, TEXT_DIR, heldout_documents, heldout_text, train_text, write_sums

SEED = 20261119
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "ensurepip", "__pycache__"}
GENERATED = ("decoding_table = (", "decoding_map = ", "# system configuration generated and used by")
HELDOUT_FRACTION = 0.05
HELDOUT_LARGEST_CHARS = 60_000
DUPLICATE_FRACTION = 0.1
CHOICES = 1000


def make_text(library: Path, directory: Path = TEXT_DIR) -> None:
    """Write train.txt.xz and heldout.txt.xz from the `.py` files under a CPython 3.11.7 `lib/python3.11`."""
    documents = dict(_library_files(library))
    heldout = _choose_heldout(documents)
    directory.mkdir(parents=True, exist_ok=True)
    for name, names in (("train", documents.keys() - heldout), ("heldout", heldout)):
        text = SEPARATOR.join(documents[path] for path in sorted(names))
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (directory / f"{name}.txt.xz").write_bytes(packed)
        print(f"{name}: {len(names)} files, {len(text.encode())} bytes, {len(packed)} compressed")
    write_sums(directory)


def _library_files(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            with tokenize.open(path) as file:
                text = file.read()
            if text.strip() and not any(mark in text for mark in GENERATED):
                yield relative.as_posix(), text


def _choose_heldout(documents: dict[str, str]) -> set[str]:
    """Files in the order of a hash of their path, until they hold 5 percent; never one that repeats another file."""
    shingles = {path: _shingles(text) for path, text in documents.items()}
    occurrences = Counter(shingle for found in shingles.values() for shingle in found)
    wanted = HELDOUT_FRACTION * sum(map(len, documents.values()))
    chosen: set[str] = set()
    for path in sorted(documents, key=lambda path: hashlib.sha256(f"{SEED} {path}".encode()).hexdigest()):
        repeated = sum(occurrences[shingle] > 1 for shingle in shingles[path])
        original = repeated <= DUPLICATE_FRACTION * len(shingles[path])
        if original and len(documents[path]) <= HELDOUT_LARGEST_CHARS:
            chosen.add(path)
        if sum(len(documents[path]) for path in chosen) >= wanted:
            break
    return chosen


def _shingles(text: str) -> set[str]:
    """Every run of three non-blank lines, stripped, that is long enough to say something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    runs = ("\n".join(lines[i : i + 3]) for i in range(len(lines) - 2))
    return {run for run in runs if len(run) >= 60}


def make_choices(directory: Path = TEXT_DIR) -> None:
    """Write choices.jsonl: the true next line against three from other held-out files, alike in length and indent."""
    draw = random.Random(SEED)
    train, heldout = train_text(), heldout_text()
    contexts: dict[str, tuple[int, str]] = {}
    for number, document in enumerate(heldout_documents()):
        lines = [line.rstrip() for line in document.splitlines()]
        for at in range(4, len(lines)):
            context, ending = _question(lines, at)
            if ending and heldout.count(context) == 1 and context + ending in heldout and context not in train:
                contexts[context] = (number, ending)
    pool = list(contexts.values())
    rows: list[str] = []
    for context, (number, ending) in draw.sample(sorted(contexts.items()), len(contexts)):
        alike = sorted({other for source, other in pool if source != number and _alike(ending, other)})
        if len(alike) >= 3 and len(rows) < CHOICES:
            endings = [ending, *draw.sample(alike, 3)]
            draw.shuffle(endings)
            rows.append(json.dumps({"ctx": context, "endings": endings, "label": endings.index(ending)}) + "\n")
    (directory / "choices.jsonl").write_text("".join(rows), encoding="ascii")
    write_sums(directory)
    print(f"{len(rows)} choices of {len(contexts)} candidates, {sum(map(len, rows))} bytes")


def _question(lines: list[str], at: int) -> tuple[str, str]:
    """The 120 to 240 characters of whole lines before line `at`, and that line; empty strings where it is unfit."""
    context = lines[at - 1]
    for line in reversed(lines[max(0, at - 8) : at - 1]):
        if len(context) >= 120:
            break
        context = f"{line}\n{context}"
    context = context.lstrip("\n")
    fit = 120 <= len(context) <= 240 and lines[at - 1] and 24 <= len(lines[at].lstrip()) <= 79
    return (context, "\n" + lines[at]) if fit else ("", "")


def _alike(ending: str, other: str) -> bool:
    same_indent = len(ending) - len(ending.lstrip()) == len(other) - len(other.lstrip())
    return same_indent and ending != other and abs(len(ending) - len(other)) <= 0.3 * min(len(ending), len(other))
