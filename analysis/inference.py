"""From paired log-ratios over rounds to intervals: variance moderated over a sweep, t, Holm, margin. Arrays only.

What is estimated is the variance of a paired difference d = ln(cell) - ln(baseline) inside one block, so it holds the
noise of both processes and no drift that the block shares. A few rounds know it badly (with 3, the ends of the 95 %
interval of the standard deviation differ by a factor of 12), while the other comparisons on the same device know its
usual size. So each variance is drawn towards what the *other* comparisons show, as strongly as these agree among
themselves (empirical Bayes on log-variances, Smyth 2004), and the t-distribution gains the degrees of freedom that
they are worth:

- comparisons of one group share their baseline's noise, so twenty of one group are not twenty witnesses: their
  log-variances are correlated by the square of the correlation of their differences, which is 1/2 where all runs are
  alike, and near 1 where the baseline is the noisy one. It is estimated over the sweep, and never taken as less than
  1/2; no cell gains more degrees of freedom than so many independent witnesses have;
- a group whose level visibly departs from the rest of the device (host-bound beside device-bound) is pooled only
  with itself: two-sided test at 10 %;
- a stack visibly noisier than its prior (F test at 10 %) keeps its own variance and its own k - 1 degrees of freedom:
  a pooled variance would be too small for it, and false differences come from the noisy stacks. Ten percent, not one:
  at 5 rounds a stack three times noisier then has 9 % false intervals instead of 16 %, and the price is only width.

Steps that wait for their launches take as long as the host's clock lets them, and a shared host's moves by a tenth and
more within minutes, also inside a block. Rows hold the time of a fixed loop on the CPU that fed the device
(`host_loop_ms`), and what such steps need is a number of those loops. So their ratio is given at one clock as well,
beside the one that verdicts are of, where that visibly helps: where the variance within the comparisons of a host,
sweep and workload, together at least six degrees of freedom, falls to half or less, and by more than chance lets it (F
test at 5 %). It is a control variate, with the slope that the mechanism gives and not one fitted to a few rounds, for
all of these comparisons, except those that visibly scatter more with it (the same test): something else limited them.
No verdict rests on it: what it takes out includes the mean difference of the loops, and a loop that is slower beside
one stack for a reason of its own (that stack's threads, a sibling of the core) would become a difference of the stacks,
which no control could see.

The fallback is the cell's own paired variance rather than Welch's unpaired one, which would count the block's drift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LEVEL = 0.95
MARGIN = 0.01
NOISIER_ALPHA = 0.10
DEPARTS_Z = 1.645
SHARED_BASELINE = 0.5  # correlation of differences to one baseline, where all runs are equally noisy
NOISE_FLOOR = 1e-4  # no clock resolves less; keeps identical rounds from claiming certainty
CLOCK_GAIN, CLOCK_ALPHA, CLOCK_DEGREES = 0.5, 0.05, 6
FOUND_IN = 0.80  # the smallest detectable effect is found in this share of sweeps


@dataclass(frozen=True, kw_only=True)
class Variance:
    """Variance of one paired difference, the degrees of freedom behind it, and whether it is the cell's own."""

    variance: Floats
    degrees: Floats
    own: Bools


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Per comparison, on the log scale: mean, interval (unadjusted, without margin), p, Holm's p, direction, MDE.

    `direction` is -1 (below), 0 (indistinguishable) or 1 (above). `equivalent`: the whole interval lies inside the
    margin. `mde`: the smallest true log-ratio that would get a direction in 80 % of sweeps like this one.
    """

    mean: Floats
    lo: Floats
    hi: Floats
    p: Floats
    p_holm: Floats
    direction: npt.NDArray[np.int64]
    equivalent: Bools
    mde: Floats


def at_one_clock(logs: Floats, brought: Floats, comparisons: npt.NDArray[np.int64]) -> tuple[Floats, Bools]:
    """Paired log-ratios (..., pairs) of `comparisons` (pairs,), of which `brought` are at one clock of the host.

    Returns those to use, and which of them are brought ones. Leading axes are independent repetitions.
    """
    from scipy.special import fdtri

    _, member, count = np.unique(comparisons, return_inverse=True, return_counts=True)
    belongs = member[:, None] == np.arange(count.size)[None, :]

    def squares(values: Floats) -> Floats:
        means = values @ (belongs / count)
        return np.asarray((values - means @ belongs.T) ** 2 @ belongs)

    before, after = squares(logs), squares(brought)
    degrees = comparisons.size - count.size
    limit = min(CLOCK_GAIN, fdtri(degrees, degrees, CLOCK_ALPHA)) if degrees >= CLOCK_DEGREES else 0.0
    helps = after.sum(axis=-1) < limit * before.sum(axis=-1)
    own = np.maximum(count - 1, 1)
    scatters = after > before * fdtri(own, own, 1 - CLOCK_ALPHA)
    used = (helps[..., None] & ~scatters) @ belongs.T.astype(np.int64) > 0
    return np.where(used, brought, logs), used


def trigamma_inverse(y: Floats) -> Floats:
    """x with trigamma(x) = y, by Newton's method on 1/trigamma (limma); infinity for 0."""
    from scipy.special import polygamma

    safe = np.clip(y, 1e-7, 1e7)
    x = 0.5 + 1 / safe
    for _ in range(12):
        value = polygamma(1, x)
        x = x + value * (1 - value / safe) / polygamma(2, x)
    return np.asarray(np.where(y <= 1e-7, np.inf, x))


def baseline_correlation(values: Floats, groups: npt.NDArray[np.int64]) -> Floats:
    """Correlation (...,) of the differences of one group, over all groups, from paired log-ratios (..., cells, rounds).

    NaN where a cell has no pair in a round. Not below `SHARED_BASELINE`, that where no group has two cells, and near it
    where there are few pairs of cells to tell: it counts as much as two of them do.
    """
    there = ~np.isnan(values)
    count = np.maximum(there.sum(axis=-1, keepdims=True), 1)
    centred = np.where(there, values - np.nansum(values, axis=-1, keepdims=True) / count, 0.0)
    products, squares, told = (np.zeros(values.shape[:-2]) for _ in range(3))
    for group in np.unique(groups):
        part, known = centred[..., groups == group, :], there[..., groups == group, :].sum(axis=-2)
        own = (part**2).sum(axis=-2)
        products += (part.sum(axis=-2) ** 2 - own).sum(axis=-1)
        squares += (own * np.maximum(known - 1, 0)).sum(axis=-1)
        rounds = np.count_nonzero(there[..., groups == group, :].any(axis=-2), axis=-1)
        told = told + (int((groups == group).sum()) - 1) * np.maximum(rounds - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = products / squares
    found = np.clip(np.where(squares > 0, found, SHARED_BASELINE), SHARED_BASELINE, 1.0)
    return np.asarray(SHARED_BASELINE + (found - SHARED_BASELINE) * told / (told + 2))


def moderated_variance(
    variances: Floats,
    rounds: Floats,
    groups: npt.NDArray[np.int64],
    correlation: Floats | float = SHARED_BASELINE,
) -> Variance:
    """Moderate `variances` (..., cells) of paired differences with `rounds` (cells,) >= 2 of comparison `groups`.

    All cells are of one device and sweep; `correlation` (...,) is that of a group's differences. Leading axes are
    independent repetitions.
    """
    from scipy.special import fdtrc, polygamma, psi

    own_degrees = rounds - 1.0
    variances = np.maximum(variances, NOISE_FLOOR**2)
    half = own_degrees / 2
    spread = np.asarray(polygamma(1, half))  # variance of log s^2 around its own truth
    z = np.log(variances) - psi(half) + np.log(half)
    member = groups[:, None] == np.unique(groups)[None, :]
    same = groups[:, None] == groups[None, :]
    others = ~np.eye(groups.size, dtype=bool)

    shared = np.asarray(correlation, dtype=np.float64)[..., None] ** 2
    apart = _departs(z, spread, same, member, shared)
    from_group, from_all = (_prior(z, spread, use, member, shared, own_degrees) for use in (same & others, others))
    degrees, prior = (np.where(apart, group, all_) for group, all_ in zip(from_group, from_all, strict=True))

    known = degrees > 0
    p = fdtrc(own_degrees, np.where(known, degrees, 1.0), variances / prior)
    own = ~known | (p < NOISIER_ALPHA)
    pooled = (degrees * prior + own_degrees * variances) / (degrees + own_degrees)
    return Variance(
        variance=np.where(own, variances, pooled),
        degrees=np.where(own, own_degrees, degrees + own_degrees),
        own=own,
    )


def _clustered(counts: npt.NDArray[np.int64], shared: Floats) -> Floats:
    """Variance of a sum of unit variances, of which `counts` (cells, groups) are correlated by `shared` (..., 1)."""
    return np.asarray(counts.sum(axis=1) + shared * (counts * (counts - 1)).sum(axis=1))


def _prior(
    z: Floats, spread: Floats, use: Bools, member: Bools, shared: Floats, own_degrees: Floats
) -> tuple[Floats, Floats]:
    """Degrees of freedom and variance that the used others (cells, cells) lend to each cell; 0 where there are none."""
    from scipy.special import psi

    count = use.sum(axis=1)
    n = np.maximum(count, 1)
    weight = use.T / n
    centre = z @ weight
    observed = ((z**2) @ weight - centre**2) * n / np.maximum(n - 1, 1)
    expected = spread @ weight
    excess = np.maximum(observed - expected, 0.0)
    per_group = use.astype(np.int64) @ member.astype(np.int64)
    sampling = expected * _clustered(per_group, shared) / n**2
    agreement = 2 * trigamma_inverse(excess)
    location = 2 * trigamma_inverse(np.where(count > 0, sampling + excess / n, 1.0))
    half = np.minimum(agreement, 1e9) / 2
    witnesses = (count + 1) ** 2 / _clustered(per_group + member, shared)  # with the cell itself
    gained = own_degrees * np.maximum(witnesses - 1, 0.0)
    degrees = np.where(count > 0, np.minimum(np.minimum(agreement, location), gained), 0.0)
    return degrees, np.exp(centre + psi(half) - np.log(half))


def _departs(z: Floats, spread: Floats, same: Bools, member: Bools, shared: Floats) -> Bools:
    """Whether the level of a cell's group differs from that of the rest of the device."""
    in_group, in_rest = same.sum(axis=1), np.maximum((~same).sum(axis=1), 1)
    difference = z @ (same.T / in_group) - z @ ((~same).T / in_rest)
    sizes = (~same).astype(np.int64) @ member.astype(np.int64)
    noise = (spread @ (same.T / in_group)) * (1 + (in_group - 1) * shared) / in_group
    noise = noise + spread.mean() * _clustered(sizes, shared) / in_rest**2
    return np.asarray((np.abs(difference) > DEPARTS_Z * np.sqrt(noise)) & ((~same).sum(axis=1) > 0))


def holm(p: Floats) -> Floats:
    """Holm's adjusted p-values along the last axis."""
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), axis=-1)
    return adjusted


def judge(
    mean: Floats,
    variance: Variance,
    rounds: Floats,
    *,
    margin: float | Floats = MARGIN,
    least_half_width: float | Floats = 0.0,
    level: float = LEVEL,
) -> Judgement:
    """Intervals and directions of the family along the last axis.

    A direction needs two things: Holm's p below 1 - level (the difference is real, family-wise), and an interval
    wholly beyond the margin (it is also large enough to matter, and above what the machine shows between equals).
    `least_half_width` widens the interval, as does a noisy machine.
    """
    from scipy.special import stdtr, stdtrit

    error = np.sqrt(variance.variance / rounds)
    critical = stdtrit(variance.degrees, 0.5 + level / 2)
    half = np.maximum(critical * error, np.log1p(least_half_width))
    p = 2 * stdtr(variance.degrees, -np.abs(mean) / error)
    adjusted = holm(p)
    limit = np.log1p(margin)
    beyond = np.abs(mean) - half > limit
    strictest = stdtrit(variance.degrees, 1 - (1 - level) / 2 / mean.shape[-1])
    needed = np.maximum(strictest * error, limit + half)
    return Judgement(
        mean=mean,
        lo=mean - half,
        hi=mean + half,
        p=p,
        p_holm=adjusted,
        direction=np.where(beyond & (adjusted < 1 - level), np.sign(mean), 0).astype(np.int64),
        equivalent=np.asarray(np.abs(mean) + half < limit),
        mde=needed + stdtrit(variance.degrees, FOUND_IN) * error,
    )
