"""Renderers: units for people, raw numbers for programs, nothing lost and nothing invented."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from analysis import FORMATS, Table, comparison_table, print_table, render, tradeoff_table
from analysis.render import to_text, units

Loaded = Callable[..., pd.DataFrame]
LONG = "bf16+static-cache+compile-max-autotune+sdpa-flash"


@pytest.fixture
def table(build: SimpleNamespace, loaded: Loaded) -> Table:
    quality = {"perplexity": 6.2, "kl_divergence": 0.0013, "mbu": 0.4, "mfu": 0.1, "energy_j_per_unit": 0.01}
    rows = build.sweep(stacks=("baseline", "bf16", LONG), speed={"bf16": 1.5}, latency_ms_p95=12.0, **quality)
    rows.append(build.row(build.cell("nf4"), 0, outcome="oom", reason="50 % of_memory & more | so"))
    return comparison_table(loaded(rows))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_ascii_and_ends_with_a_newline(table: Table, format: str) -> None:
    text = render(table, format)
    assert text.isascii() and text.endswith("\n") and not text.endswith("\n\n")


def test_unknown_format(table: Table) -> None:
    with pytest.raises(ValueError, match="one of text, md"):
        render(table, "html")


@pytest.mark.parametrize("width", [100, 120])
def test_text_fits_its_width_and_names_what_is_left_out(table: Table, width: int) -> None:
    text = to_text(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "Not shown for want of width: MFU" in text
    assert "".join(LONG.split("+")[-1]) in text


@pytest.mark.parametrize("width", [60, 80])
def test_columns_that_do_not_fit_follow_below(table: Table, width: int) -> None:
    """Every line of the table is one row; the stack stands before each part of it."""
    lines = to_text(table, width).splitlines()
    assert max(map(len, lines)) <= width
    heads = [line.split() for line in lines if line.startswith("optimization")]
    shown = [word for head in heads for word in head]
    assert len(heads) > 1 and {"memory", "latency", "speed-up", "verdict", "KL"} < set(shown)
    assert len(set(shown)) == len(shown) - (len(heads) - 1), "only the stack is repeated"
    rows = [line for line in lines if line.startswith("baseline ")]
    assert len(rows) == len(heads) and sum(" base" in row for row in rows) == 1


def test_wide_terminals_show_everything(table: Table) -> None:
    text = to_text(table, 220)
    assert "Not shown" not in text and "MFU" in text and LONG in text


@pytest.mark.parametrize("width", [90, 120])
def test_hardware_that_does_not_fit_follows_below(build: SimpleNamespace, loaded: Loaded, width: int) -> None:
    tags = ("a100-80gb", "rtx3090", "rtx4060", "h200", "cpu")
    text = to_text(tradeoff_table(loaded(build.sweep(hardware=tags, kl_divergence=0.001))), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(tag in text for tag in tags)


def test_colour_only_on_a_terminal(table: Table) -> None:
    assert "\x1b[" not in to_text(table)
    stream = io.StringIO()
    print_table(table, Console(file=stream, force_terminal=True, width=120))
    assert "\x1b[32m" in stream.getvalue()


def test_json_holds_raw_numbers_and_null(table: Table) -> None:
    document = json.loads(render(table, "json"))
    by_name = {record["optimization"]: record for record in document["records"]}
    assert by_name["nf4"]["latency_ms_p50"] is None and by_name["nf4"]["outcome"] == "oom"
    assert by_name["baseline"]["memory_bytes"] == 300 * 2**20
    assert by_name["baseline"]["speedup"] is None and by_name["baseline"]["is_baseline"] is True


def test_csv_reads_back(table: Table) -> None:
    frame = pd.read_csv(io.StringIO(render(table, "csv")))
    assert frame["latency_ms_p50"].tolist()[:3] == pytest.approx(
        table.frame["latency_ms_p50"].tolist()[:3], nan_ok=True
    )
    assert frame["latency_ms_p50"].isna().sum() == 1


def test_markdown_and_latex_escape(table: Table) -> None:
    assert r"50 % of\_memory & more \| so" in render(table, "md")
    assert r"50 \% of\_memory \& more \textbar{} so" in render(table, "latex")
    lines = [line for line in render(table, "md").splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


def test_latex_rows_have_as_many_cells_as_columns(table: Table) -> None:
    text = render(table, "latex")
    columns = len(text.split(r"\begin{tabular}{")[1].split("}")[0])
    for line in text.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.replace(r"\&", "").count("&") == columns - 1


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (units.number(12.345), "12.3"),
        (units.number(0.0012345), "0.00123"),
        (units.number(12345.6), "12,346"),
        (units.number(0), "0"),
        (units.number(2e-7), "2.0e-07"),
        (units.number(None), ""),
        (units.number(float("nan")), ""),
        (units.number(pd.NA), ""),
        (units.size(300 * 2**20), "300 MiB"),
        (units.size(24.2 * 2**20), "24.2 MiB"),
        (units.size(5 * 2**30), "5.00 GiB"),
        (units.with_interval(12.34, 12.1, 12.6), "12.3 +- 0.2"),
        (units.with_interval(12.34, 12.339, 12.341), "12.3 +- 0.001"),
        (units.with_interval(12.34, None, None), "12.3"),
        (units.ratio(1.5, 1.48, 1.53), "1.50x +- 0.03"),
        (units.ratio(0.13, 0.0001, 3218.0), "0.13x +- over 100 %"),
        (units.with_interval(22.3, -48.2, 92.8), "22.3 +- over 100 %"),
        (units.ratio(15.23), "15.2x"),
        (units.percent(0.031), "3.1 %"),
        (units.percent(0.43), "43 %"),
    ],
)
def test_units(found: str, expected: str) -> None:
    assert found == expected


@given(st.floats(min_value=1e-6, max_value=1e9))
def test_numbers_are_within_half_a_percent(value: float) -> None:
    text = units.number(value)
    assert math.isclose(float(text.replace(",", "")), value, rel_tol=0.06 if value < 1e-4 else 0.0051)
