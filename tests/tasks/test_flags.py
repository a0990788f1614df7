"""Every finding that a row can carry is explained."""

from __future__ import annotations

import ast
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis.pair import BARRING_FLAGS, WIDENING_FLAGS
from tasks.flags import FLAGS

ROOT = Path(__file__).resolve().parents[2]


def raised() -> set[str]:
    """The literals that the measuring core passes to `flag`, or gathers under the name `flags`."""
    found = set()
    for path in (ROOT / "tasks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of_flags = isinstance(node.func.value, ast.Name) and node.func.value.id == "flags"
                if node.func.attr == "flag" or (of_flags and node.func.attr in ("append", "insert")):
                    found |= {text.value for text in node.args if isinstance(text, ast.Constant)}
    return {str(name) for name in found if isinstance(name, str)}


def test_what_the_core_flags() -> None:
    names = raised()
    assert {"not_steady", "passes_disagree", "interference", "several_gpus"} <= names
    assert names <= FLAGS.keys()


def test_what_the_analysis_heeds() -> None:
    assert FLAGS.keys() >= BARRING_FLAGS | WIDENING_FLAGS
    assert {name for name, meaning in FLAGS.items() if "no verdict" in meaning} == BARRING_FLAGS


@pytest.mark.parametrize("part", sorted((ROOT / "docs" / "results").rglob("rows/*.parquet")), ids=str)
def test_what_committed_rows_carry(part: Path) -> None:
    flags = pq.read_table(part, columns=["flags"])["flags"].to_pylist()
    assert {name.partition(":")[0] for found in flags for name in found or ()} <= FLAGS.keys()
