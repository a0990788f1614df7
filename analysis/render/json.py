"""One JSON document: title, records with raw numbers, footnotes. Missing is null."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from analysis.frames import records
from analysis.render.units import is_missing
from analysis.table import Table


def to_json(table: Table) -> str:
    """The table as one line of JSON."""
    lines = [{name: _plain(value) for name, value in row.items()} for row in records(table.frame)]
    document = {"title": table.title, "records": lines, "footnotes": table.remarks()}
    return json.dumps(document, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, list | dict):
        return value
    if is_missing(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
