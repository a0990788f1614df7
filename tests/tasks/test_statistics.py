"""Quantiles, intervals and counts against known truths, closed forms and seeded simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.statistics import (
    batch_median_halfwidth,
    coefficient_of_variation,
    effective_sample_size,
    minimum_samples,
    outliers,
    percentile_interval,
    percentile_or_none,
    quantile,
    standard_deviation,
    steady,
    t_interval,
    tail_counts,
)

times = st.floats(min_value=1e-3, max_value=1e6)
samples = st.lists(times, min_size=1, max_size=200)


@pytest.mark.parametrize(("p", "least"), [(50, 11), (90, 64), (95, 130), (99, 662), (99.9, 6636)])
def test_minimum_samples_are_those_of_mlperf(p: float, least: int) -> None:
    assert minimum_samples(p) == least
    beyond = 1 - p / 100

    def at_most_one(n: int) -> float:
        return (1 - beyond) ** n + n * beyond * (1 - beyond) ** (n - 1)

    assert at_most_one(least) <= 0.01 < at_most_one(least - 1)


def test_low_percentiles_need_what_their_mirror_image_needs() -> None:
    assert minimum_samples(5) == minimum_samples(95)
    with pytest.raises(ValueError, match="between 0 and 100"):
        minimum_samples(100)


def test_percentile_is_none_without_enough_samples_behind_it() -> None:
    values = np.arange(200.0)
    assert percentile_or_none(values, 95) == quantile(values, 0.95)
    assert percentile_or_none(values, 99) is None
    assert percentile_or_none(values, 95, effective=100) is None


@given(samples, st.floats(min_value=0, max_value=1))
def test_quantile_lies_among_the_samples_and_is_type_7(values: list[float], q: float) -> None:
    found = quantile(values, q)
    assert min(values) <= found <= max(values) or math.isclose(found, max(values))
    assert found == np.quantile(values, q, method="linear")


@given(samples, st.floats(min_value=0, max_value=1), st.floats(min_value=0, max_value=1))
def test_quantile_is_monotone(values: list[float], a: float, b: float) -> None:
    low, high = quantile(values, min(a, b)), quantile(values, max(a, b))
    assert low <= high or math.isclose(low, high, rel_tol=1e-12)


@given(samples, st.randoms(use_true_random=False), st.floats(min_value=0.1, max_value=100))
def test_order_does_not_matter_and_scale_scales(values: list[float], random: object, scale: float) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert quantile(shuffled, 0.3) == quantile(values, 0.3)
    assert percentile_interval(shuffled, 50) == percentile_interval(values, 50)
    assert quantile([scale * value for value in values], 0.3) == pytest.approx(scale * quantile(values, 0.3))


@given(st.lists(times, min_size=2, max_size=50), st.floats(min_value=0.5, max_value=0.98))
def test_t_interval_is_around_the_mean_and_grows_with_the_level(values: list[float], level: float) -> None:
    narrow, wide = t_interval(values, level), t_interval(values, level + 0.01)
    assert narrow is not None and wide is not None
    assert narrow.lo <= narrow.mean <= narrow.hi
    assert wide.lo <= narrow.lo and narrow.hi <= wide.hi


def test_one_value_has_no_spread_and_no_interval() -> None:
    assert t_interval([3.0]) is None
    assert standard_deviation([3.0]) is None
    assert coefficient_of_variation([3.0]) is None


def test_empty_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        quantile([], 0.5)


def test_t_interval_matches_the_textbook() -> None:
    interval = t_interval([9.0, 10.0, 11.0])
    assert interval is not None
    assert interval.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


@given(st.lists(times, min_size=1, max_size=300), st.sampled_from([50.0, 90.0, 95.0, 99.0]))
def test_percentile_interval_encloses_the_percentile_or_is_open(values: list[float], p: float) -> None:
    lo, hi = percentile_interval(values, p)
    found = float(np.quantile(values, p / 100, method="inverted_cdf"))
    assert lo is None or lo <= found
    assert hi is None or found <= hi


def test_upper_bound_of_p99_is_open_below_368_samples() -> None:
    assert percentile_interval(np.arange(367.0), 99)[1] is None
    assert percentile_interval(np.arange(368.0), 99)[1] is not None


@pytest.mark.parametrize(("p", "n"), [(50, 40), (95, 200), (99, 1000)])
def test_percentile_interval_covers_a_heavy_tail(p: float, n: int) -> None:
    rng = np.random.default_rng(7)
    truth = -math.log(1 - p / 100)
    covered = 0
    for _ in range(1000):
        lo, hi = percentile_interval(rng.exponential(size=n), p)
        covered += (lo is None or lo <= truth) and (hi is None or truth <= hi)
    assert covered >= 940


def ar1(rng: np.random.Generator, correlation: float, size: tuple[int, int]) -> np.ndarray:
    """Rows of AR(1) series with mean 1 and a standard deviation of 5 %."""
    noise = rng.standard_normal(size)
    noise[:, 1:] *= math.sqrt(1 - correlation**2)
    for step in range(1, size[1]):
        noise[:, step] += correlation * noise[:, step - 1]
    return 1 + 0.05 * noise


@pytest.mark.parametrize(("correlation", "least"), [(0.0, 0.93), (0.5, 0.88), (0.8, 0.85)])
def test_interval_of_batch_medians_withstands_correlated_samples(correlation: float, least: float) -> None:
    series = ar1(np.random.default_rng(11), correlation, (1000, 400))
    medians = np.median(series.reshape(1000, 20, 20), axis=2)
    half = np.array([batch_median_halfwidth(row) for row in series])
    assert np.mean(np.abs(medians.mean(axis=1) - 1) <= half * medians.mean(axis=1)) >= least


def test_batch_medians_need_a_sample_each() -> None:
    assert batch_median_halfwidth([1.0] * 19) is None
    assert batch_median_halfwidth([1.0] * 47) == 0


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_effective_sample_size_of_ar1(correlation: float) -> None:
    series = ar1(np.random.default_rng(3), correlation, (20, 4000))
    found = float(np.mean([effective_sample_size(row) for row in series]))
    assert found == pytest.approx(4000 * (1 - correlation) / (1 + correlation), rel=0.12)


@given(samples)
def test_effective_sample_size_is_at_most_the_number_of_samples(values: list[float]) -> None:
    assert 0 < effective_sample_size(values) <= len(values)


def test_constant_samples_count_in_full() -> None:
    assert effective_sample_size([5.1] * 50) == 50


def test_outliers_are_counted() -> None:
    values = [10.0, 10.1, 9.9, 10.05, 9.95, 10.02, 9.98, 10.01, 10.4, 30.0]
    found = outliers(values)
    assert (found.mild, found.severe) == tail_counts(values) == (2, 2)
    assert found.mad == 1


@given(samples)
def test_severe_outliers_are_mild_ones_too(values: list[float]) -> None:
    mild, severe = tail_counts(values)
    assert 0 <= severe <= mild <= len(values)


def test_steady_compares_medians() -> None:
    assert steady([1.0, 1.0, 9.0], [1.01, 1.0], 0.02)
    assert not steady([1.0], [1.1], 0.02)
    assert not steady([], [1.0], 0.02)
    assert steady([1.0, 2.0], [2.0, 1.0], 0.0)
