"""What a generated Triton kernel works out again and again: read from the text that torch's compiler has written."""

from __future__ import annotations

import re
from collections.abc import Iterable

KERNEL = re.compile(r"^def triton_\w+\(.*?(?=^'''|^@|^def |\Z)", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"^\s+(_?tmp\d+) = (.+)$", re.MULTILINE)
VALUE = re.compile(r"\b_?tmp\d+\b")
INDEX = re.compile(r"\b(?:[xyz]\d+|r\d*_\d+)\b")
FACTORS = re.compile(r"(tmp\d+) \* (tmp\d+)$")
HANDED_ON = re.compile(r"tmp\d+\.to\(|tl\.broadcast_to\(|tl\.where\(|_tmp\d+ \+ ")


def repeated_operations(texts: Iterable[str]) -> list[int]:
    """How many operations each kernel that adds up vector times matrix repeats for every row of the matrix.

    A vector has fewer of the result's indices than the matrix, and none of its values depends on the row: loading it,
    casts, and the arithmetic that was inlined to make it. One number for each such kernel in `texts`.
    """
    kernels = {kernel for text in texts for kernel in KERNEL.findall(text)}
    counts = (_repeated(kernel) for kernel in sorted(kernels) if "tl.sum(" in kernel)
    return [count for count in counts if count is not None]


def _repeated(kernel: str) -> int | None:
    """None where nothing that is added up is a vector times a matrix."""
    indices: dict[str, frozenset[str]] = {}  # that a value depends on
    products: dict[str, frozenset[str]] = {}  # vector times matrix, and what has that value: the matrix' rows
    found: frozenset[str] = frozenset()
    for name, expression in ASSIGNMENT.findall(kernel):
        used = VALUE.findall(expression)
        written = expression.partition(",")[0] if expression.startswith("tl.load(") else expression
        indices[name] = frozenset(INDEX.findall(written)).union(*(indices.get(value, ()) for value in used))
        before = next((products[value] for value in used if value in products), None)
        if "tl.sum(" in expression:
            found = max(found, before or frozenset(), key=len)
            indices[name] = _rows(indices[name])
        elif factors := FACTORS.match(expression):
            vector, matrix = sorted((indices.get(value, frozenset()) for value in factors.groups()), key=len)
            if vector - _rows(vector) and vector < matrix and _rows(vector) < _rows(matrix):
                products[name] = _rows(matrix)
        elif before is not None and HANDED_ON.match(expression):
            products[name] = before
    if not found:
        return None
    return sum(bool(seen - _rows(seen)) and _rows(seen) < found for seen in indices.values())


def _rows(indices: frozenset[str]) -> frozenset[str]:
    """Those of the result, without those that a sum runs over."""
    return frozenset(index for index in indices if not index.startswith("r"))
