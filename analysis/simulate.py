"""What the verdicts do when the truth is known: `python -m analysis.simulate [repetitions]` prints the figures.

A sweep is simulated down to the process: block by block, cells in random order, the baseline among them, each process
with its own speed, the device drifting linearly over the whole sweep, and each process's figure the median of
autocorrelated samples of which only the process is a replicate.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from analysis.inference import Floats, Judgement, baseline_correlation, judge, moderated_variance


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One way a sweep can be. Noise is the coefficient of variation between processes; `sizes` the cells per group."""

    name: str
    rounds: int = 5
    sizes: tuple[int, ...] = (4, 4, 4, 4, 4)
    noise: float = 0.01
    effect: float = 0.0  # true difference of the first cell, as a fraction
    noisy_factor: float = 1.0  # how much noisier the first cell is
    noisy_baseline: float = 1.0  # how much noisier the baselines are
    group_noise_range: float = 1.0  # noise of groups is log-uniform over this factor, around `noise`
    drift: float = 0.0  # over the whole sweep
    samples: int = 0  # per process; 0 takes the process's figure as known exactly
    correlation: float = 0.0  # AR(1) between samples
    sample_noise: float = 0.05
    host_clock: float = 0.0  # that all steps wait for, and that differs by this much between processes
    first_follows: float = 1.0  # how much of the clock the first cell follows, as the others do in full


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Rates over repetitions. `first_*` are of the cell with the effect or the noise."""

    false_interval: float
    error: float  # Monte-Carlo standard error of `false_interval`, over independent sweeps
    first_false_interval: float
    false_verdicts: float
    false_family: float
    first_found: float
    half_width: float
    own_variance: float


def differences(scenario: Scenario, repetitions: int, rng: np.random.Generator) -> Floats:
    """Paired log-ratios, shape (repetitions, cells, rounds)."""
    runs = sum(size + 1 for size in scenario.sizes) * scenario.rounds
    spread = np.log(scenario.group_noise_range) / 2
    parts = []
    for group, size in enumerate(scenario.sizes):
        level = scenario.noise * np.exp(rng.uniform(-spread, spread, (repetitions, 1, 1)))
        noise = np.broadcast_to(level, (repetitions, size + 1, 1)).copy()
        truth = np.zeros(size + 1)
        if group == 0:
            noise[:, 1] *= scenario.noisy_factor
            truth[1] = np.log1p(scenario.effect)
        noise[:, 0] *= scenario.noisy_baseline
        shape = (repetitions, size + 1, scenario.rounds)
        times = truth[None, :, None] + noise * rng.standard_normal(shape)
        order = rng.random(shape).argsort(axis=1)
        before = np.arange(scenario.rounds) * runs / scenario.rounds + sum(scenario.sizes[:group]) + group
        times += scenario.drift * (before[None, None, :] + order) / runs
        if scenario.samples:
            times += _median_error(scenario, shape, rng)
        if scenario.host_clock:
            follows = np.ones((size + 1, 1))
            follows[1] = scenario.first_follows if group == 0 else 1.0
            times += follows * scenario.host_clock * rng.standard_normal(shape)
        parts.append(times[:, 1:] - times[:, :1])
    return np.concatenate(parts, axis=1)


def _median_error(scenario: Scenario, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Error of the median of one process's AR(1) samples."""
    state = rng.standard_normal(shape, dtype=np.float32)
    series = np.empty((*shape, scenario.samples), dtype=np.float32)
    innovation = np.float32(np.sqrt(1 - scenario.correlation**2))
    for step in range(scenario.samples):
        series[..., step] = state
        state = np.float32(scenario.correlation) * state + innovation * rng.standard_normal(shape, dtype=np.float32)
    medians: Floats = np.median(series, axis=-1).astype(np.float64)
    return scenario.sample_noise * medians


def verdicts_of(scenario: Scenario, repetitions: int, rng: np.random.Generator) -> tuple[Judgement, float]:
    """The judgement of every repetition, and the share of cells that kept their own variance."""
    values = differences(scenario, repetitions, rng)
    rounds = np.full(values.shape[1], float(scenario.rounds))
    groups = np.repeat(np.arange(len(scenario.sizes)), scenario.sizes)
    correlation = baseline_correlation(values, groups)
    variance = moderated_variance(values.var(axis=-1, ddof=1), rounds, groups, correlation)
    return judge(values.mean(axis=-1), variance, rounds), float(variance.own.mean())


def figures(scenario: Scenario, repetitions: int, rng: np.random.Generator) -> Figures:
    """Rates of one scenario."""
    judged, own = verdicts_of(scenario, repetitions, rng)
    truth = np.zeros(judged.mean.shape[-1])
    truth[0] = np.log1p(scenario.effect)
    missed = (judged.lo > truth) | (judged.hi < truth)
    wrong = (judged.direction != 0) & ((truth == 0) | (np.sign(truth) != judged.direction))
    return Figures(
        false_interval=float(missed.mean()),
        error=float(missed.mean(axis=1).std() / np.sqrt(repetitions)),
        first_false_interval=float(missed[:, 0].mean()),
        false_verdicts=float(wrong.mean()),
        false_family=float(wrong.any(axis=1).mean()),
        first_found=float((judged.direction[:, 0] == np.sign(truth[0])).mean()) if scenario.effect else float("nan"),
        half_width=float(np.median(judged.hi - judged.lo) / 2),
        own_variance=own,
    )


def scenarios() -> list[Scenario]:
    """The table's lines: each condition for `quick`, `standard` and `publish`, 20 comparisons in 5 groups."""
    conditions: list[tuple[str, dict[str, float | int | tuple[int, ...]]]] = [
        ("no difference, 1 % noise", {}),
        ("true 3 %", {"effect": 0.03}),
        ("true 5 %", {"effect": 0.05}),
        ("5 % drift over the sweep", {"drift": 0.05}),
        ("AR(1) 0.9 samples, 5 % drift", {"drift": 0.05, "samples": 200, "correlation": 0.9, "noise": 0.01}),
        ("first stack 2 x noisier", {"noisy_factor": 2.0}),
        ("first stack 5 x noisier", {"noisy_factor": 5.0}),
        ("baselines 3 x noisier", {"noisy_baseline": 3.0}),
        ("baselines 5 x noisier", {"noisy_baseline": 5.0}),
        ("... one group of 6", {"noisy_baseline": 5.0, "sizes": (6,)}),
        ("... one group of 19", {"noisy_baseline": 5.0, "sizes": (19,)}),
        ("group noise 0.3 to 3 %", {"group_noise_range": 10.0}),
        ("one group of 19", {"sizes": (19,)}),
        ("one group of 3", {"sizes": (3,)}),
        ("one comparison", {"sizes": (1,)}),
        ("host clock moves by 5 %", {"host_clock": 0.05}),
        ("... which the first ignores", {"host_clock": 0.05, "first_follows": 0.0}),
        ("... one group of 3", {"host_clock": 0.05, "sizes": (3,)}),
    ]
    return [
        Scenario(name=name, rounds=rounds, **options)  # type: ignore[arg-type]
        for rounds in (3, 5, 10)
        for name, options in conditions
    ]


def main(repetitions: int = 2000) -> None:
    """Print one line per scenario; rates in percent with the Monte-Carlo error of the interval's rate."""
    columns = ("interval +- error", "first cell", "verdict", "family", "found", "half-width", "own var.")
    print(f"{'rounds, scenario':36}{columns[0]:>18}" + "".join(f"{name:>12}" for name in columns[1:]))
    for scenario in scenarios():
        few = min(repetitions, 500) if scenario.samples else repetitions
        found = figures(scenario, few, np.random.default_rng(20260101))
        power = "" if np.isnan(found.first_found) else f"{found.first_found:.1%}"
        print(
            f"{scenario.rounds:2}  {scenario.name:32}{f'{found.false_interval:.1%} +- {found.error:.1%}':>18}"
            f"{found.first_false_interval:>12.1%}{found.false_verdicts:>12.2%}{found.false_family:>12.1%}{power:>12}"
            f"{found.half_width:>12.2%}{found.own_variance:>12.1%}",
            flush=True,
        )
    print(
        f"\n{repetitions} sweeps each (500 with samples). interval: the 95 % interval without margin misses the truth, "
        "with Monte-Carlo error; first cell: the same for it alone; verdict: false faster or slower, per comparison; "
        "family: any in a sweep; found: the first cell's true difference; half-width: median of the interval's."
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
