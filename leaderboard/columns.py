"""The leaderboard's columns: which record metric each shows, in which unit, and what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class Column:
    """One column, and one axis of the plot.

    Attributes:
        key: the record metric it shows.
        scale: the record's value is divided by it (records keep base units).
        speed: whether it belongs to one machine and setting.
    """

    key: str
    label: str
    unit: str
    scale: float
    meaning: str
    larger_is_better: bool = False
    speed: bool = False

    @property
    def heading(self) -> str:
        """Label with unit, for axes: "MACs (G)"."""
        return f"{self.label} ({self.unit})"


COLUMNS: dict[str, Column] = {
    column.key: column
    for column in (
        Column(
            "params", "Params", "M", 1e6,
            "All parameters of the model, in millions.",
        ),
        Column(
            "macs", "MACs", "G", 1e9,
            "Multiply-adds of convolutions and matrix products for one image, in billions "
            "(half of what FlopCounterMode counts). The papers' “FLOPs” are multiply-adds too.",
        ),
        Column(
            "top1", "Top-1", "%", 1.0,
            "Share of the track's whole test split that is classified right. Interval: 95 %, "
            "Wilson for one run, t over seeds for several. A number in italics is the paper's own, "
            "not measured here.",
            larger_is_better=True,
        ),
        Column(
            "latency_ratio", "Time ratio", "× yardstick", 1.0,
            "Time of one batch divided by the yardstick's (DeiT-Ti, eager, float32), measured in "
            "alternation in the same process. Below 1 is faster than the yardstick. This is the "
            "number that travels between machines.",
            speed=True,
        ),
        Column(
            "latency", "Latency", "ms", 1e-3,
            "Median time of one batch on the machine and in the setting chosen above, in "
            "milliseconds, with its 95 % interval. Compare within one machine only.",
            speed=True,
        ),
        Column(
            "memory_inference", "Memory", "MiB", 2.0**20,
            "Peak memory of inference above the idle process, weights included, in MiB.",
            speed=True,
        ),
        Column(
            "memory_training", "Train mem.", "MiB", 2.0**20,
            "Peak memory of one training step above the idle process, weights included, in MiB.",
            speed=True,
        ),
    )
}  # fmt: skip


def status_words(status: str) -> str:
    """A record's status as people write it: "out of memory"."""
    return status.replace("_", " ")


def decimals_for(value: float, digits: int = 3) -> int:
    """Decimals that show `digits` significant digits of `value`, but never cut an integer part."""
    if value == 0:
        return 0
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 8)


def show(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits: 0.0153, 1.25, 86.6, 1,240; tiny ones 5.5e-15."""
    if 0 < abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    return f"{value:,.{decimals_for(value, digits)}f}"


def show_interval(value: float, interval: Interval | None, digits: int = 3) -> str:
    """The interval with the decimals of its value: "1.21–1.28"; "" if there is none.

    Ends that would read the same get more decimals.
    """
    if interval is None:
        return ""
    places = decimals_for(value, digits)
    low, high = (f"{end:,.{places}f}" for end in interval)
    if low == high and interval[0] != interval[1]:
        low, high = (f"{end:,.{places + 2}f}" for end in interval)
    return f"{low}–{high}"
