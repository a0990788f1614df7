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
    """The literals that the measuring core passes to `flag`, or gathers under the names `flags` and `findings`."""
    found: set[str] = set()
    for path in (ROOT / "tasks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for part in gathered(node):
                texts = (text.value for text in ast.walk(part) if isinstance(text, ast.Constant))
                found |= {text.rstrip(":") for text in texts if isinstance(text, str)}
    return found - {"flags"}


def gathered(node: ast.AST) -> list[ast.AST]:
    """What a node adds to flags: arguments of `flag` and of `flags.append`, `flags=(...)`, `row["flags"] = [...]`."""
    match node:
        case ast.Call(func=ast.Attribute(attr="flag")):
            return [text for text in node.args if isinstance(text, ast.Constant | ast.JoinedStr)]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="flags"), attr="append" | "insert")):
            return list(node.args)
        case ast.keyword(arg="flags", value=ast.Tuple() | ast.List() | ast.IfExp()):
            return [part for part in ast.walk(node.value) if isinstance(part, ast.Tuple | ast.List)]
        case ast.Assign(targets=[ast.Name(id="findings")], value=ast.Dict()):
            return [key for key in node.value.keys if key is not None]
        case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value="flags"))], value=ast.List()):
            return [node.value]
    return []


def test_what_the_core_flags() -> None:
    names = raised()
    assert {"not_steady", "interference", "several_gpus", "energy_suspect", "energy_polled", "throttled"} <= names
    assert {"executed_instead", "metric_failed"} <= names
    assert names <= FLAGS.keys()


def test_what_the_analysis_heeds() -> None:
    assert FLAGS.keys() >= BARRING_FLAGS | WIDENING_FLAGS
    barring = {name for name, meaning in FLAGS.items() if "decides no verdict" in meaning}
    assert barring == BARRING_FLAGS | {"not_steady"}, "the latter bars through the column `steady`"


@pytest.mark.parametrize("part", sorted((ROOT / "docs" / "results").rglob("rows/*.parquet")), ids=str)
def test_what_committed_rows_carry(part: Path) -> None:
    flags = pq.read_table(part, columns=["flags"])["flags"].to_pylist()
    assert {name.partition(":")[0] for found in flags for name in found or ()} <= FLAGS.keys()
