"""Statistics of samples within one run, and of a few runs: pure functions, numpy only, scipy where a quantile needs it.

Samples of one process are not independent, so nothing here turns them into a claim about a cell: within-run intervals
steer stopping, and intervals that are published are over rounds (`analysis.verdicts`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Samples = Sequence[float] | npt.NDArray[np.float64]

BATCHES = 20
# MLPerf LoadGen's early stopping (results.cc): confidence 0.99, tolerance 0, one sample may be discarded.
EARLY_STOPPING_CONFIDENCE = 0.99
MAD_TO_SIGMA = 1.4826
MAD_LIMIT = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its two-sided interval, in the unit of the values."""

    mean: float
    lo: float
    hi: float

    @property
    def half_width(self) -> float:
        return (self.hi - self.lo) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Outliers:
    """How many samples lie beyond 1.5 and 3 interquartile ranges (severe is part of mild), and beyond 10 MADs."""

    mild: int
    severe: int
    mad: int


def _array(samples: Samples) -> npt.NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"expected a non-empty sequence of numbers, got shape {values.shape}")
    return values


def mean(samples: Samples) -> float:
    return float(_array(samples).mean())


def median(samples: Samples) -> float:
    return float(np.median(_array(samples)))


def standard_deviation(samples: Samples) -> float | None:
    """Sample standard deviation; None below two samples, where other tools report zero."""
    values = _array(samples)
    return float(values.std(ddof=1)) if values.size > 1 else None


def coefficient_of_variation(samples: Samples) -> float | None:
    """Standard deviation over mean; None below two samples or for a mean of zero."""
    deviation, centre = standard_deviation(samples), mean(samples)
    return None if deviation is None or centre == 0 else deviation / abs(centre)


def quantile(samples: Samples, q: float) -> float:
    """Type 7 quantile (linear interpolation, numpy's default), `q` from 0 to 1."""
    return float(np.quantile(_array(samples), q))


@lru_cache
def minimum_samples(p: float) -> int:
    """Fewest samples that can stand behind percentile `p` (50 for the median).

    MLPerf's rule: the smallest n with P(at most one of n samples beyond the percentile) <= 1 - 0.99. Low percentiles
    need what their mirror image needs.
    """
    if not 0 < p < 100:
        raise ValueError(f"a percentile lies between 0 and 100, got {p}")
    beyond = min(p, 100 - p) / 100

    def at_most_one(n: int) -> float:
        return float((1 - beyond) ** (n - 1) * (1 - beyond + n * beyond))

    low, high = 1, 2
    while at_most_one(high) > 1 - EARLY_STOPPING_CONFIDENCE:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at_most_one(middle) > 1 - EARLY_STOPPING_CONFIDENCE else (low, middle)
    return high


def percentile_or_none(samples: Samples, p: float, effective: float | None = None) -> float | None:
    """Percentile `p` (0 to 100), None where fewer samples stand behind it than `minimum_samples(p)`.

    `effective` replaces the number of samples where these are correlated (`effective_sample_size`).
    """
    count = len(samples) if effective is None else effective
    return quantile(samples, p / 100) if count >= minimum_samples(p) else None


def percentile_interval(samples: Samples, p: float, level: float = 0.95) -> tuple[float | None, float | None]:
    """Interval of percentile `p` from order statistics; a bound that the samples leave open is None.

    Distribution-free: ranks are binomial. A bootstrap of a tail covers 26 % at 30 samples where 95 % is claimed.
    """
    from scipy.special import bdtr

    values = np.sort(_array(samples))
    q, n, tail = p / 100, values.size, (1 - level) / 2
    # below[j] = P(fewer than j + 1 of n samples lie below the percentile)
    below = np.asarray(bdtr(np.arange(n, dtype=np.float64), n, q))
    lower = int(np.searchsorted(below, tail, side="right"))  # ranks 1..lower are safely below
    upper = int(np.searchsorted(below, 1 - tail, side="left"))  # rank upper + 1 is safely above
    return (
        float(values[lower - 1]) if lower >= 1 else None,
        float(values[upper]) if upper + 1 <= n and below[upper] < 1 else None,
    )


@lru_cache(maxsize=256)
def t_critical(degrees: float, level: float = 0.95) -> float:
    """Two-sided critical value of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + level / 2))


def t_interval(values: Samples, level: float = 0.95) -> Interval | None:
    """t-interval of the mean of independent values, such as one per round; None below two."""
    array = _array(values)
    if array.size < 2:
        return None
    centre = float(array.mean())
    half = t_critical(array.size - 1, level) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean=centre, lo=centre - half, hi=centre + half)


def batch_medians(samples: Samples, batches: int = BATCHES) -> npt.NDArray[np.float64] | None:
    """Medians of consecutive, nearly equal batches; None when some would be empty."""
    values = _array(samples)
    if values.size < batches:
        return None
    if values.size % batches == 0:
        return np.asarray(np.median(values.reshape(batches, -1), axis=1))
    return np.array([np.median(part) for part in np.array_split(values, batches)])


def batch_median_halfwidth(samples: Samples, batches: int = BATCHES, level: float = 0.95) -> float | None:
    """Relative half-width of the t-interval over consecutive batch medians: the stopping rule's precision.

    Batches absorb correlation between neighbours: with AR(1) = 0.5 / 0.8 / 0.95 the interval covers 92 / 89 / 83 %
    where one that takes samples as independent covers 80 / 49 / 24 %. None below `batches` samples.
    """
    medians = batch_medians(samples, batches)
    interval = None if medians is None else t_interval(medians, level)
    return None if interval is None or interval.mean == 0 else interval.half_width / abs(interval.mean)


def steady(window_a: Samples, window_b: Samples, tolerance: float) -> bool:
    """Whether two successive windows agree: medians within `tolerance` of the larger one; empty windows never do."""
    if len(window_a) == 0 or len(window_b) == 0:
        return False
    a, b = median(window_a), median(window_b)
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def effective_sample_size(samples: Samples) -> float:
    """Number of independent samples that would know the mean as well; at most the number of samples.

    Geyer's initial positive sequence: autocorrelations are summed in pairs up to the first pair below zero. A constant
    series counts in full.
    """
    values = _array(samples)
    n = values.size
    centred = values - values.mean()
    scale = float(centred @ centred)
    if n < 4 or scale <= n * (np.finfo(np.float64).eps * float(np.abs(values).max())) ** 2:
        return float(n)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    correlation = np.fft.irfft(spectrum * np.conj(spectrum), size)[:n] / scale
    pairs = correlation[: n - n % 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    kept = pairs[: negative[0]] if negative.size else pairs
    inefficiency = 2 * float(kept.sum()) - 1
    return float(min(n, n / max(inefficiency, 1.0)))


def tail_counts(samples: Samples) -> tuple[int, int]:
    """Samples beyond Tukey's fences at 1.5 and at 3 interquartile ranges; counted, never removed."""
    values = _array(samples)
    first, third = np.quantile(values, [0.25, 0.75])
    distance = np.maximum(first - values, values - third)
    spread = third - first
    return int(np.count_nonzero(distance > 1.5 * spread)), int(np.count_nonzero(distance > 3 * spread))


def outliers(samples: Samples) -> Outliers:
    """Tukey's counts and those beyond 10 scaled median absolute deviations."""
    values = _array(samples)
    mild, severe = tail_counts(values)
    deviation = np.abs(values - np.median(values))
    limit = MAD_LIMIT * MAD_TO_SIGMA * float(np.median(deviation))
    return Outliers(mild=mild, severe=severe, mad=int(np.count_nonzero(deviation > limit)))
