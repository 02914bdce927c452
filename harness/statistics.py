"""Intervals and tests: how sure a number is, and whether two numbers differ.

Everything is a pure function of arrays. Intervals are 95 % unless `confidence` says otherwise;
random draws come from a generator seeded by `seed`, so the same input gives the same interval.
scipy does the distributions; what stands here is the choice of method and its edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same images; `difference` is accuracy of a minus accuracy of b.

    Attributes:
        n: images.
        only_a, only_b: images that only a, only b gets right (the discordant pairs).
        difference, interval: fraction of images, -1 to 1.
        odds: only_a / only_b; None where only_b is 0.
        p_value: exact two-sided McNemar test of "both are equally often right".
    """

    n: int
    only_a: int
    only_b: int
    difference: float
    interval: Interval
    odds: float | None
    p_value: float


@dataclass(frozen=True)
class Estimate:
    """A value with its interval and the number of independent units behind it."""

    value: float
    interval: Interval
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width relative to the value: the stopping rule of timings."""
        return (self.interval[1] - self.interval[0]) / 2 / abs(self.value)


@dataclass(frozen=True)
class SeedSummary:
    """Mean over seeds; `std` (n - 1 in the denominator) and `interval` need two seeds."""

    mean: float
    std: float | None
    interval: Interval | None
    n: int


@dataclass(frozen=True)
class PairedMeans:
    """Mean of a - b over seeds that both have, with a t interval and the paired t test."""

    difference: float
    interval: Interval
    p_value: float
    n: int


def _numbers(values: ArrayLike, name: str = "values", least: int = 1) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or len(array) < least or array.size == 0:
        raise ValueError(f"{name}: at least {least} needed")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: all must be finite")
    return array


# --- fractions of right answers ------------------------------------------------------------


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of the fraction `successes / n`.

    Unlike the normal interval it stays inside [0, 1] and is not empty at 0 and n successes.

    Raises:
        ValueError: not 0 <= successes <= n, or n is 0.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is not a fraction")
    found = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(bits_a: ArrayLike, bits_b: ArrayLike, confidence: float = 0.95) -> PairedTest:
    """Compare two models by their right/wrong bits `(N,)` on the same images in the same order.

    The test is exact (binomial on the discordant pairs) at any count. The interval of the
    difference is Bonett and Price's adjusted Wald interval, which keeps its coverage with few
    discordant pairs, also with none.

    Raises:
        ValueError: the bits are empty or of different length.
    """
    a, b = np.asarray(bits_a, dtype=bool), np.asarray(bits_b, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"bits must be two equally long lists, got {a.shape} and {b.shape}")
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((~a & b).sum())
    discordant = only_a + only_b
    p_value = stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
    share_a, share_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    center = share_a - share_b
    error = np.sqrt((share_a + share_b - center**2) / (n + 2))
    reach = stats.norm.ppf((1 + confidence) / 2) * error
    return PairedTest(
        n=n,
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / n,
        interval=(float(max(center - reach, -1)), float(min(center + reach, 1))),
        odds=only_a / only_b if only_b else None,
        p_value=float(p_value),
    )


# --- timings: rounds are the independent unit ----------------------------------------------


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., NDArray[np.float64]] = np.median,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of `statistic` over `values`.

    Args:
        values: `(R,)`, or `(R, K)` for R rounds of K samples: rounds are drawn whole, since
            samples of one round share the state of the machine.
        statistic: reduces an array along `axis`, as numpy's `median` and `mean` do.

    Raises:
        ValueError: fewer than two rounds (one says nothing of the spread), or one not finite.
    """
    rounds = _numbers(values, "rounds", least=2)
    picks = np.random.default_rng(seed).integers(len(rounds), size=(resamples, len(rounds)))
    found = statistic(rounds[picks].reshape(resamples, -1), axis=-1)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def median_estimate(values: ArrayLike, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Median of all samples of `(R,)` or `(R, K)` values, bootstrap over the R rounds."""
    rounds = _numbers(values)
    interval = bootstrap_interval(rounds, resamples=resamples, seed=seed)
    return Estimate(float(np.median(rounds)), interval, len(rounds))


def paired_ratio(a: ArrayLike, b: ArrayLike, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Median of the ratios a / b of samples that were taken next to each other.

    Args:
        a, b: `(R,)` or `(R, K)`, the same shape; `a[r, k]` ran beside `b[r, k]`, so a slow
            moment of the machine hits both and cancels.

    Raises:
        ValueError: shapes differ, fewer than two rounds, or a value not positive and finite.
    """
    top, bottom = _numbers(a, "a", least=2), _numbers(b, "b", least=2)
    if top.shape != bottom.shape:
        raise ValueError(f"pairs need equal shapes, got {top.shape} and {bottom.shape}")
    if min(top.min(), bottom.min()) <= 0:
        raise ValueError("ratios need positive values")
    return median_estimate(top / bottom, resamples, seed)


def mann_whitney(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p-value of "a and b come from the same distribution" for unpaired samples."""
    return float(stats.mannwhitneyu(_numbers(a, "a"), _numbers(b, "b")).pvalue)


# --- seeds ---------------------------------------------------------------------------------


def mean_std(values: ArrayLike, confidence: float = 0.95) -> SeedSummary:
    """Mean, standard deviation and t interval over seeds `(S,)`."""
    seeds = _numbers(values)
    mean, n = float(seeds.mean()), len(seeds)
    if n == 1:
        return SeedSummary(mean, None, None, n)
    std = float(seeds.std(ddof=1))
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / np.sqrt(n)
    return SeedSummary(mean, std, (float(mean - reach), float(mean + reach)), n)


def paired_means(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> PairedMeans:
    """Compare a and b `(S,)` seed by seed: entry s of both was run with the same seed.

    Raises:
        ValueError: lengths differ, or there are fewer than two seeds.
    """
    left, right = _numbers(a, "a", least=2), _numbers(b, "b", least=2)
    if left.shape != right.shape:
        raise ValueError(f"pairs need equal lengths, got {len(left)} and {len(right)}")
    summary = mean_std(left - right, confidence)
    if summary.std == 0:  # every seed differs by the same amount: the t test divides by zero
        p_value = 1.0 if summary.mean == 0 else 0.0
    else:
        p_value = float(stats.ttest_rel(left, right).pvalue)
    return PairedMeans(summary.mean, summary.interval, p_value, summary.n)


# --- many comparisons, and fronts ----------------------------------------------------------


def adjust_p_values(p_values: ArrayLike) -> NDArray[np.float64]:
    """Benjamini-Hochberg: p-values `(K,)` corrected for being K comparisons at once."""
    values = np.asarray(p_values, dtype=np.float64)
    return stats.false_discovery_control(values) if values.size else values


def pareto_front(points: ArrayLike, larger_is_better: Sequence[bool]) -> NDArray[np.bool_]:
    """Which of the points `(..., M, D)` no other point beats: mask `(..., M)`.

    A point is beaten by one that is at least as good on every axis and better on one; so equal
    points are both on the front.

    Raises:
        ValueError: `larger_is_better` does not name D axes.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim < 2 or points.shape[-1] != len(larger_is_better):
        raise ValueError(f"points {points.shape} do not have {len(larger_is_better)} axes")
    costs = np.where(np.asarray(larger_is_better, dtype=bool), -points, points)
    shape = (*costs.shape[:-1], costs.shape[-2])
    no_worse, better = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for axis in range(costs.shape[-1]):  # [..., i, j]: is j no worse, is j better than i
        own, other = costs[..., :, None, axis], costs[..., None, :, axis]
        no_worse &= other <= own
        better |= other < own
    return ~(no_worse & better).any(axis=-1)


def front_probability(
    values: ArrayLike,
    intervals: ArrayLike,
    larger_is_better: Sequence[bool],
    resamples: int = 2000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """How often each model is on the Pareto front when values vary within their intervals.

    Each side of a 95 % interval is taken as 1.96 standard deviations of a normal distribution;
    models and axes vary independently.

    Args:
        values: `(M, D)`.
        intervals: `(M, D, 2)`; where a number is exact (a count), both ends are the value.
        larger_is_better: D flags, e.g. `(False, True)` for MACs and top-1.

    Returns:
        `(M,)`, each between 0 and 1.

    Raises:
        ValueError: shapes do not fit, a number is not finite, or an interval is upside down.
    """
    values, intervals = _numbers(values), _numbers(intervals, "intervals")
    if intervals.shape != (*values.shape, 2):
        raise ValueError(f"intervals {intervals.shape} do not fit values {values.shape}")
    low, high = intervals[..., 0], intervals[..., 1]
    if (low > high).any():
        raise ValueError("an interval must not end below its start")
    below, above = np.maximum(values - low, 0), np.maximum(high - values, 0)
    generator, count = np.random.default_rng(seed), np.zeros(len(values))
    for start in range(0, resamples, 100):  # in slices: a slice's comparisons take (100, M, M)
        size = min(100, resamples - start)
        noise = generator.standard_normal((size, *values.shape)) / stats.norm.ppf(0.975)
        drawn = values + np.where(noise < 0, below, above) * noise
        count += pareto_front(drawn, larger_is_better).sum(axis=0)
    return count / resamples
