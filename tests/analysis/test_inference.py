"""What verdicts are worth where the truth is known: seeded simulations, and properties of the arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.inference import SHARED_BASELINE, baseline_correlation, holm, judge, moderated_variance, trigamma_inverse
from analysis.simulate import Figures, Scenario, figures

REPETITIONS = 900


def simulated(repetitions: int = REPETITIONS, **options: Any) -> Figures:
    return figures(Scenario(name="test", **options), repetitions, np.random.default_rng(2026))


CONDITIONS: list[dict[str, Any]] = [
    {},
    {"drift": 0.05},
    {"drift": 0.05, "samples": 100, "correlation": 0.9},
    {"group_noise_range": 10.0},
    {"sizes": (19,)},
    {"sizes": (10, 9)},
]


@pytest.mark.parametrize("rounds", [3, 5, 10])
@pytest.mark.parametrize("condition", CONDITIONS, ids=["plain", "drift", "correlated", "groups", "one-group", "two"])
def test_equals_are_called_equal(rounds: int, condition: dict[str, Any]) -> None:
    repetitions = 250 if "samples" in condition else REPETITIONS
    found = simulated(repetitions, rounds=rounds, **condition)
    slack = 2 * found.error
    assert 0.03 - slack <= found.false_interval <= 0.07 + slack  # coverage is the rest: at least 93 %
    assert found.false_verdicts <= 0.01
    assert found.false_family <= 0.05 + 2.5 * (0.05 * 0.95 / repetitions) ** 0.5


@pytest.mark.parametrize("rounds", [3, 5, 10])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (3, 3), (1, 1, 1, 1)])
def test_few_comparisons_are_honest_too(rounds: int, sizes: tuple[int, ...]) -> None:
    found = simulated(4000, rounds=rounds, sizes=sizes)
    assert 0.03 <= found.false_interval <= 0.07
    assert found.false_family <= 0.05


@pytest.mark.parametrize("rounds", [3, 5, 10])
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 4), (19,), (6,)])
@pytest.mark.parametrize("factor", [3.0, 5.0])
def test_a_noisy_baseline_makes_no_differences(rounds: int, sizes: tuple[int, ...], factor: float) -> None:
    """All cells of a group share its noise: they are not so many witnesses of it."""
    found = simulated(rounds=rounds, sizes=sizes, noisy_baseline=factor)
    slack = 2 * found.error
    assert 0.03 - slack <= found.false_interval <= 0.07 + slack
    assert found.false_verdicts <= 0.02 + slack
    assert found.false_family <= 0.05 + slack


def test_correlation_of_differences_to_one_baseline() -> None:
    """1/2 where all runs are alike, and f^2 / (1 + f^2) where the baseline is f times noisier."""
    draw = np.random.default_rng(5)
    groups = np.repeat([0, 1, 2], 6)
    for factor, expected in ((1.0, 0.5), (3.0, 0.9)):
        times = draw.standard_normal((400, 3, 7, 5))
        times[:, :, 0] *= factor
        values = (times[:, :, 1:] - times[:, :, :1]).reshape(400, 18, 5)
        found = baseline_correlation(values, groups)
        assert found.min() >= SHARED_BASELINE
        assert found.mean() == pytest.approx(expected, abs=0.06)
        values[:, 3, 2] = np.nan  # a pair that was not measured
        assert baseline_correlation(values, groups).mean() == pytest.approx(expected, abs=0.06)
    assert baseline_correlation(draw.standard_normal((4, 3, 5)), np.arange(3)) == pytest.approx(SHARED_BASELINE)


def test_blocks_of_other_groups_tell_nothing() -> None:
    """In a sweep every group has blocks of its own: a column in which others only stand changes nothing."""
    values = np.random.default_rng(6).standard_normal((50, 6, 4))
    values[:, :3, 0] += 3 * values[:, :1, 0]
    apart = np.full((50, 6, 8), np.nan)
    apart[:, :3, :4], apart[:, 3:, 4:] = values[:, :3], values[:, 3:]
    groups = np.repeat([0, 1], 3)
    assert baseline_correlation(apart, groups) == pytest.approx(baseline_correlation(values, groups))


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 4), (19,), (10, 9)])
def test_standard_finds_three_and_five_percent(sizes: tuple[int, ...]) -> None:
    assert simulated(effect=0.03, sizes=sizes).first_found >= 0.65
    assert simulated(effect=-0.03, sizes=sizes).first_found >= 0.65
    assert simulated(effect=0.05, sizes=sizes).first_found >= 0.85


def test_more_rounds_find_more() -> None:
    powers = [simulated(effect=0.03, rounds=rounds).first_found for rounds in (3, 5, 10)]
    assert powers == sorted(powers)
    assert powers[0] >= 0.3


@pytest.mark.parametrize(("factor", "most"), [(2.0, 0.12), (3.0, 0.12), (5.0, 0.08)])
def test_a_noisier_stack_falls_back_to_its_own_variance(factor: float, most: float) -> None:
    found = simulated(noisy_factor=factor)
    assert found.first_false_interval <= most
    assert found.false_family <= 0.05


def test_pooling_narrows_the_interval() -> None:
    rng = np.random.default_rng(0)
    values = 0.014 * rng.standard_normal((500, 20, 3))
    variances, rounds = values.var(axis=2, ddof=1), np.full(20, 3.0)
    groups = np.repeat(np.arange(5), 4)
    pooled = moderated_variance(variances, rounds, groups)
    assert np.mean(pooled.own) < 0.1
    assert np.median(pooled.degrees) > 10
    alone = moderated_variance(variances[:, :1], rounds[:1], groups[:1])
    assert alone.own.all() and (alone.degrees == 2).all()


def test_effect_called_smallest_detectable_is_found_in_four_of_five() -> None:
    rng = np.random.default_rng(1)
    groups, rounds = np.repeat(np.arange(5), 4), np.full(20, 5.0)
    variance = moderated_variance(np.full(20, 2e-4), rounds, groups)
    effect = float(judge(np.zeros(20), variance, rounds).mde[0])
    truth = np.zeros(20)
    truth[0] = effect
    means = truth + np.sqrt(2e-4 / 5) * rng.standard_normal((4000, 20))
    wide = type(variance)(
        variance=np.broadcast_to(variance.variance, means.shape),
        degrees=np.broadcast_to(variance.degrees, means.shape),
        own=np.broadcast_to(variance.own, means.shape),
    )
    assert np.mean(judge(means, wide, rounds).direction[:, 0] == 1) == pytest.approx(0.8, abs=0.03)


def test_trigamma_inverse() -> None:
    from scipy.special import polygamma

    x = np.array([0.01, 0.5, 1.0, 2.0, 30.0, 1e5])
    assert trigamma_inverse(polygamma(1, x)) == pytest.approx(x, rel=1e-6)
    assert trigamma_inverse(np.array([0.0]))[0] == np.inf


def test_holm_against_the_textbook() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(min_value=0, max_value=1), min_size=1, max_size=30))
def test_holm_never_lowers_a_p_value_and_keeps_the_order(values: list[float]) -> None:
    p = np.array(values)
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= 1).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


ratios = st.lists(st.lists(st.floats(-0.5, 0.5), min_size=4, max_size=4), min_size=1, max_size=8)


@given(ratios, st.randoms(use_true_random=False))
def test_swapping_negates_and_order_does_not_matter(values: list[list[float]], random: Any) -> None:
    differences = np.array(values)
    rounds, groups = np.full(len(values), 4.0), np.arange(len(values)) // 3
    variance = moderated_variance(differences.var(axis=1, ddof=1), rounds, groups)
    judged = judge(differences.mean(axis=1), variance, rounds)
    swapped = judge(-differences.mean(axis=1), variance, rounds)
    assert (swapped.direction == -judged.direction).all()
    assert swapped.lo == pytest.approx(-judged.hi) and swapped.p_holm == pytest.approx(judged.p_holm)
    order = list(range(len(values)))
    random.shuffle(order)
    shuffled = moderated_variance(differences[order].var(axis=1, ddof=1), rounds, groups[order])
    assert shuffled.variance == pytest.approx(variance.variance[order], rel=1e-6)
    assert (judged.lo <= judged.mean).all() and (judged.mean <= judged.hi).all()


@given(ratios, st.floats(0.0, 0.1))
def test_a_larger_margin_never_adds_a_verdict(values: list[list[float]], margin: float) -> None:
    differences = np.array(values)
    rounds, groups = np.full(len(values), 4.0), np.zeros(len(values), dtype=np.int64)
    variance = moderated_variance(differences.var(axis=1, ddof=1), rounds, groups)
    small = judge(differences.mean(axis=1), variance, rounds, margin=margin)
    large = judge(differences.mean(axis=1), variance, rounds, margin=margin + 0.01)
    assert (np.abs(large.direction) <= np.abs(small.direction)).all()
    assert not (small.equivalent & (small.direction != 0)).any()
