"""How well a number ranks networks, and what is left of it once their size is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from harness.statistics import Interval, bootstrap_interval


@dataclass(frozen=True)
class Rank:
    """Kendall's tau-b with its bootstrap interval over networks, and the networks behind it."""

    tau: float
    interval: Interval
    n: int

    def __str__(self) -> str:
        return f"{self.tau:+.2f} [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b; 0 where one of the two is constant and ranks nothing."""
    tau = stats.kendalltau(x, y).statistic
    return 0.0 if np.isnan(tau) else float(tau)


def partial_kendall(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float:
    """Tau of what is left of x and y once `given` is known.

    All three become normal scores of their ranks; x and y each lose their linear part in `given`;
    what is left of both is ranked. Kendall's own partial tau will not do here: it stays above 0
    where x and y have nothing in common but `given`. 0 where `given` orders x or y completely.
    """
    score_x, score_y, score_given = (normal_scores(one) for one in (x, y, given))
    square = score_given @ score_given
    if square == 0:
        return kendall(x, y)
    left, right = (
        (score - (score @ score_given) / square * score_given).round(9)
        for score in (score_x, score_y)
    )
    return kendall(left, right)


def normal_scores(values: Sequence[float]) -> np.ndarray:
    """Quantiles of a normal distribution at the values' ranks, centred; ties share a rank."""
    ranks = stats.rankdata(values) / (len(values) + 1)
    scores = stats.norm.ppf(ranks)
    return scores - scores.mean()


def rank(
    x: Sequence[float],
    y: Sequence[float],
    given: Sequence[float] | None = None,
    resamples: int = 1000,
) -> Rank:
    """Tau of x and y (N,), partial if `given` (N,) is, with a 95 % bootstrap interval.

    Raises:
        ValueError: lengths differ, or fewer than four networks.
    """
    columns = [np.asarray(one, dtype=np.float64) for one in (x, y, given) if one is not None]
    count = len(columns[0])
    if any(len(one) != count for one in columns) or count < 4:
        raise ValueError(f"a rank correlation needs at least 4 pairs, not {len(x)} and {len(y)}")
    measure: Callable[..., float] = kendall if given is None else partial_kendall

    def of_each(picks: np.ndarray, axis: int) -> np.ndarray:
        return np.array([measure(*(one[row.astype(int)] for one in columns)) for row in picks])

    interval = bootstrap_interval(np.arange(count), of_each, resamples)
    return Rank(measure(*columns), interval, count)


def percentile(value: float, among: Sequence[float]) -> float:
    """Share in % of `among` that lies below `value`; ties count half."""
    return float(stats.percentileofscore(among, value, kind="mean"))
