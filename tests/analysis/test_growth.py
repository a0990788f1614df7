"""Bytes and time of further prompt tokens, from lines whose slope is known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import FORMATS, growth_table, render
from analysis.errors import AnalysisError
from analysis.growth import growth, slope
from tasks.cell import Cell, ModelSpec, Stack, Technique, WorkloadPoint

Loaded = Callable[..., pd.DataFrame]
BATCH, KV_BYTES, WEIGHTS = 4, 32_768, 2 * 10**9


def decode(stack: str, tokens: int) -> Cell:
    parameters = (("batch_size", BATCH), ("new_tokens", 64), ("prompt_tokens", tokens))
    return Cell(
        model=ModelSpec(id="pocket", source="pocket"),
        workload=WorkloadPoint(kind="decode", parameters=parameters),
        stack=Stack(techniques=tuple(Technique(name=name) for name in stack.split("+"))),
        hardware="h200",
    )


def rows(
    build: SimpleNamespace, stack: str = "bf16", lengths: tuple[int, ...] = (512, 8192), rounds: int = 3,
    per_1000: float = 0.5, kv_bytes: float | None = KV_BYTES, noise: float = 0.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """A step of 5 ms and `per_1000` more for every 1,000 tokens of the prompt."""
    rng, found = np.random.default_rng(4), []
    for tokens in lengths:
        for round_ in range(rounds):
            step_ms = (5 + per_1000 * tokens / 1e3) * float(np.exp(noise * rng.standard_normal()))
            row = build.row(decode(stack, tokens), round_, 99.0, batch_size=BATCH, sequence_length=tokens)
            row |= {"throughput_per_s": 1e3 * BATCH / step_ms, "new_tokens": 64}
            row["kv_cache_bytes"] = None if kv_bytes is None else int(BATCH * kv_bytes * (tokens + 63))
            row["peak_allocated_bytes"] = WEIGHTS + int(2 * BATCH * KV_BYTES * tokens)
            found.append(row)
    return found


@pytest.mark.parametrize("lengths", [(512, 8192), (128, 512, 2048, 8192)])
def test_slopes_are_per_token_of_a_sequence(build: SimpleNamespace, loaded: Loaded, lengths: tuple[int, ...]) -> None:
    (line,) = growth(loaded(rows(build, lengths=lengths))).to_dict("records")
    assert line["kv_bytes_per_token"] == pytest.approx(KV_BYTES)
    assert line["memory_bytes_per_token"] == pytest.approx(2 * KV_BYTES)
    assert line["ms_per_1000_tokens"] == pytest.approx(0.5)
    assert line["ms_per_1000_tokens_lo"] == pytest.approx(0.5) == line["ms_per_1000_tokens_hi"]
    assert (line["lengths"], line["shortest"], line["longest"]) == (len(lengths), lengths[0], lengths[-1])
    assert line["call_ms_longest"] == pytest.approx(5 + 0.5 * 8.192)
    assert line["workload_point"] == "decode[batch_size=4,new_tokens=64]"
    assert pd.isna(line["off_line"]) if len(lengths) == 2 else line["off_line"] == pytest.approx(0, abs=1e-9)


def test_memory_of_a_process_has_no_slope(build: SimpleNamespace, loaded: Loaded) -> None:
    """It grows by blocks of the runtime's arenas."""
    line = growth(loaded([row | {"flags": ["memory_of_process"]} for row in rows(build)])).iloc[0]
    assert pd.isna(line["memory_bytes_per_token"]) and line["kv_bytes_per_token"] == pytest.approx(KV_BYTES)


def test_the_interval_is_over_rounds(build: SimpleNamespace, loaded: Loaded) -> None:
    line = growth(loaded(rows(build, rounds=5, noise=0.05))).iloc[0]
    assert line["ms_per_1000_tokens_lo"] < line["ms_per_1000_tokens"] < line["ms_per_1000_tokens_hi"]
    one = growth(loaded(rows(build, rounds=1), "one")).iloc[0]
    assert one["ms_per_1000_tokens"] == pytest.approx(0.5) and pd.isna(one["ms_per_1000_tokens_lo"])


def test_rounds_that_lack_a_length_make_no_line(build: SimpleNamespace, loaded: Loaded) -> None:
    given = rows(build)
    given[0] |= {"outcome": "timeout", "reason": "slow"}
    line = growth(loaded(given)).iloc[0]
    assert line["ms_per_1000_tokens"] == pytest.approx(0.5)
    assert "timeout at 512 tokens" in line["notes"]


def test_stacks_and_their_gaps(build: SimpleNamespace, loaded: Loaded) -> None:
    """One without a cache, one that fits at one length only, one that waits for the host, and one length of another."""
    failed = build.row(decode("bf16+static-cache", 8192), 0, outcome="oom", batch_size=BATCH, sequence_length=8192)
    waiting = [row | {"flags": ["launch_bound"]} for row in rows(build, "bf16+eager", per_1000=0.0)]
    frame = loaded(
        [
            *rows(build, "bf16+no-cache", kv_bytes=None, per_1000=7.0),
            *rows(build, "bf16+static-cache", (512,)),
            failed,
            *waiting,
            *build.sweep(stacks=("bf16",)),
        ]
    )
    table = growth_table(frame)
    lines = table.frame.set_index("optimization")
    assert set(lines.index) == {"bf16+no-cache", "bf16+static-cache", "bf16+eager"}, "prefill does not decode"
    assert pd.isna(lines.loc["bf16+no-cache", "kv_bytes_per_token"])
    assert lines.loc["bf16+no-cache", "ms_per_1000_tokens"] == pytest.approx(7.0)
    alone = lines.loc["bf16+static-cache"]
    assert alone["lengths"] == 1 and pd.isna(alone["ms_per_1000_tokens"]) and pd.isna(alone["kv_bytes_per_token"])
    assert alone["notes"] == ["oom at 8192 tokens", "measured at one length: no slope"]
    assert any("waits for the host at 512, 8192 tokens" in note for note in lines.loc["bf16+eager", "notes"])
    for format in FORMATS:
        assert render(table, format).isascii()
    assert max(map(len, render(table).splitlines())) <= 120
    assert "32,768" in render(table, "md") and "| 7.00 +- 0" in render(table, "md")


def test_what_may_decide_nothing_is_doubtful(build: SimpleNamespace, loaded: Loaded) -> None:
    given = rows(build, rounds=1)
    given[0]["flags"] = ["cpu_starved", "interference"]
    (line,) = growth(loaded(given)).to_dict("records")
    assert line["notes"] == [
        "doubtful: cpu_starved in some of its rounds",
        "no interval: fewer than two rounds measured every length",
    ]
    (quiet,) = growth(loaded(rows(build))).to_dict("records")
    assert quiet["notes"] == []


def test_a_bend_is_said(build: SimpleNamespace, loaded: Loaded) -> None:
    given = rows(build, lengths=(1000, 2000, 3000), per_1000=0.0)
    given = [row | ({"throughput_per_s": 400.0} if row["sequence_length"] == 3000 else {}) for row in given]
    assert growth(loaded(given)).iloc[0]["off_line"] > 0.1


def test_one_length_is_refused(build: SimpleNamespace, loaded: Loaded) -> None:
    with pytest.raises(AnalysisError, match="two or more prompt_tokens"):
        growth_table(loaded(rows(build, lengths=(512,))))
    with pytest.raises(AnalysisError, match="two or more prompt_tokens"):
        growth_table(loaded(build.sweep(), "prefill"))


@given(st.floats(-5, 5), st.floats(-50, 50), st.lists(st.integers(1, 10_000), min_size=2, max_size=8, unique=True))
def test_a_line_gives_its_own_slope(rise: float, start: float, lengths: list[int]) -> None:
    found = slope([(float(x), start + rise * x) for x in lengths])
    assert found is not None
    assert found[0] == pytest.approx(rise, rel=1e-6, abs=1e-6)


def test_no_line_through_one_point() -> None:
    assert slope([(1.0, 2.0)]) is None
    assert slope([(1.0, 2.0), (1.0, 3.0)]) is None
    assert slope([(1.0, 2.0), (2.0, float("nan"))]) is None
