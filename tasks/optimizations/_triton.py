"""What a generated Triton kernel works out again and again: read from the text that torch's compiler has written."""

from __future__ import annotations

import re
from collections.abc import Iterable

KERNEL = re.compile(r"^def triton_\w+\(.*?(?=^'''|^@|^def |\Z)", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"\s+(tmp\d+) = (.+)")
VALUE = re.compile(r"\btmp\d+\b")
PRODUCT = re.compile(r"(tmp\d+) \* (tmp\d+)")
ROW = re.compile(r"\b[xyz]\d+\b")  # index of which a kernel has one for each of its results
SUMMED = re.compile(r"\br\d*_\d+\b")  # index that a reduction runs over


def repeated_operations(texts: Iterable[str]) -> list[int]:
    """How many operations each kernel that multiplies a matrix with one row repeats for every block of the matrix.

    Counted are loads, casts, constants and arithmetic before the sum whose result is the same for all rows of the
    matrix: reading the vector, and what was inlined to make it. One number for each such kernel in `texts`.
    """
    kernels = {kernel for text in texts for kernel in KERNEL.findall(text)}
    counts = (_repeated(kernel.partition("tl.sum(")[0]) for kernel in sorted(kernels) if "tl.sum(" in kernel)
    return [count for count in counts if count is not None]


def _repeated(lines: str) -> int | None:
    """None where nothing is a vector times a matrix."""
    of_rows: set[str] = set()
    vectors: set[str] = set()
    count, product = 0, False
    for name, expression in ASSIGNMENT.findall(lines):
        used = set(VALUE.findall(expression))
        load = expression.startswith("tl.load(")
        index = expression.partition(",")[0] if load else ""
        if ROW.search(index) or used & of_rows:
            of_rows.add(name)
            factors: set[str] = set(*PRODUCT.findall(expression)[:1])
            product = product or bool(factors & vectors and factors & of_rows)
            continue
        if SUMMED.search(index) or used & vectors:
            vectors.add(name)
        if not load or name in vectors:  # a single number is read once
            count += 1
    return count if product else None
