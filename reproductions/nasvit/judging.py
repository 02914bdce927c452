"""What several seeds say about a claim, in words, and the colours of the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from harness import Finding
from harness.statistics import mean_std, paired_means

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.6"


def judge(claim: str, better: Sequence[float], than: Sequence[float], unit: str) -> Finding:
    """Whether `better` lies above `than`, seed by seed.

    "Reproduced" needs an interval of the paired difference above zero; of one seed nothing is said.

    Args:
        better, than: a value per seed, in the same order.
    """
    if len(better) < 2:
        gap = better[0] - than[0]
        return Finding(
            claim, "not measured", f"{gap:+.2f} {unit} with one seed, which says nothing"
        )
    gap = paired_means(better, than)
    low, high = gap.interval
    evidence = (
        f"{gap.difference:+.2f} {unit} [{low:+.2f}, {high:+.2f}] over {gap.n} seeds "
        f"({_mean(better)} against {_mean(than)})"
    )
    if low > 0:
        return Finding(claim, "reproduced", evidence)
    said = "the other way round" if high < 0 else "no difference detected"
    return Finding(claim, "deviates", f"{said}: {evidence}")


def _mean(values: Sequence[float]) -> str:
    return f"{mean_std(values).mean:.2f}"
