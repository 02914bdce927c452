"""Published against measured: one verdict per printed number, with the reason.

Like is compared with like: a row's `against` names the counter that follows the paper's own rule.
Counts must round to the printed digits; top-1 of the authors' weights may differ by 0.15 points
(preprocessing), of a retrained model by 0.5. A number that cannot be tested here says why.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from decimal import Decimal

from harness.experiment import Outcome
from harness.paper import Published
from harness.record import METRICS
from harness.registry import Paper
from leaderboard.columns import Interval
from leaderboard.provenance import GROUPS, remeasure_command
from leaderboard.tables import ACCURACIES, COUNTS, SPEEDS, Board, Cell, Row

#: published metric -> (record metric, the record's value is divided by this)
COMPARED_WITH: dict[str, tuple[str, float]] = {
    "params_m": ("params", 1e6),
    "macs_g": ("macs", 1e9),
    "top1": ("top1", 1.0),
    "top5": ("top5", 1.0),
    "latency_ms": ("latency", 1e-3),
}
#: Published metrics that belong to the paper's device: compared only where `against` asks for it.
DEVICE_BOUND = ("latency_ms", "throughput", "gpu_days")
SAME_WEIGHTS, RETRAINED = 0.15, 0.5  # points of top-1 / top-5
COUNTERS = {
    "params": ("params", "params_trainable", "params_paper"),
    "macs": ("macs", "macs_fvcore", "macs_paper"),
}
COUNTER_WORDS = {
    "params": "all parameters",
    "params_trainable": "trainable parameters",
    "params_paper": "the paper's own counting of parameters",
    "macs": "convolutions and matrix products",
    "macs_fvcore": "fvcore, which adds norms and pooling",
    "macs_paper": "the paper's own counting of MACs",
}


@dataclass(frozen=True)
class Verdict:
    """One row of the claims ledger.

    Attributes:
        code: a short name of the reason: digits, convention, truncated, tolerance, device, ...
        measured, interval, allowed: in the published unit.
        against: the record metric that was compared.
        command: what measures it (again).
    """

    published: Published
    outcome: Outcome
    code: str
    reason: str
    measured: float | None = None
    interval: Interval | None = None
    allowed: Interval | None = None
    against: str | None = None
    cell: Cell | None = None
    command: str = ""


def printed_range(value: float | int, tolerance: float | None = None) -> Interval:
    """The numbers that round to a printed one: 12.3 -> (12.25, 12.35); 86 -> (85.5, 86.5).

    YAML keeps 4.60 as 4.6: a trailing zero is not known, and the wider range counts.
    """
    if tolerance is None:
        tolerance = 0.5 * 10.0 ** Decimal(repr(value)).as_tuple().exponent
    slack = 1e-9 * max(abs(value), 1)  # so that an end point survives binary fractions
    return value - tolerance - slack, value + tolerance + slack


def ledger(paper: Paper, board: Board) -> list[Verdict]:
    """A verdict for every published number of a paper, in the file's order."""
    rows = {row.name: row for row in board.rows if row.variant and row.track == row.variant.track}
    return [judge(one, rows.get(one.of or ""), paper) for one in paper.facts.published]


def judge(published: Published, row: Row | None, paper: Paper) -> Verdict:
    """Compare one published number with what was measured for its variant."""

    def untested(code: str, reason: str, command: str = "") -> Verdict:
        return Verdict(published, "not measured", code, published.reason or reason, command=command)

    if published.of is None or row is None:
        return untested("not built", "speaks of a model or training that is not built here")
    if isinstance(published.value, str | list):
        return untested("no number", "not a single number")
    metric, scale = COMPARED_WITH.get(published.metric, (None, 1.0))
    if published.metric in DEVICE_BOUND and not (metric and published.against):
        where = f": {published.conditions}" if published.conditions else ""
        return untested("device", f"belongs to a device that is not here{where}")
    metric = published.against or metric
    if metric not in METRICS:
        return untested("no metric", f"{published.metric} is not measured by this project")
    cell = _cell_of(row, metric)
    command = _command(row, metric, cell)
    if cell is None and metric in COUNTS:
        return Verdict(published, "not measured", "no record", "not counted yet", command=command)
    if cell is None:
        needs = f"needs the data of {row.track} and trained weights"
        return untested("no record", needs if metric in ACCURACIES else "not timed yet", command)
    if cell.value is None:
        reason = f"{cell.status}: {cell.reason or 'no reason given'}"
        return Verdict(published, "not measured", "failed", reason, cell=cell, command=command)
    return _compare(published, row, metric, cell, scale, command)


def _cell_of(row: Row, metric: str) -> Cell | None:
    if metric in SPEEDS:
        found = [cells[metric] for _, cells in sorted(row.speeds.items()) if metric in cells]
        return found[0] if found else None
    return row.fixed.get(metric)


def _command(row: Row, metric: str, cell: Cell | None) -> str:
    if cell is not None:
        return remeasure_command(cell.record)
    if metric in GROUPS:
        return shlex.join(["replivit", "measure", row.name, "--metrics", GROUPS[metric]])
    return shlex.join(["replivit", "evaluate", row.name, "--track", row.track])


def _compare(
    published: Published, row: Row, metric: str, cell: Cell, scale: float, command: str
) -> Verdict:
    value = cell.value / scale
    interval = tuple(end / scale for end in cell.interval) if cell.interval else None
    low, high = printed_range(published.value, _tolerance(published, row, cell))
    shared = {
        "measured": value, "interval": interval, "allowed": (low, high), "against": metric,
        "cell": cell, "command": command,
    }  # fmt: skip
    if low <= value <= high:
        code = "digits" if metric in COUNTS and published.tolerance is None else "tolerance"
        return Verdict(published, "reproduced", code, _agreement(published, code, metric), **shared)
    code, reason = _explain(published, row, metric, value, scale)
    return Verdict(published, "deviates", code, published.reason or reason, **shared)


def _tolerance(published: Published, row: Row, cell: Cell) -> float | None:
    """The row's own tolerance, else the metric's; None means: the printed digits."""
    if published.tolerance is not None:
        return published.tolerance
    if published.metric not in ACCURACIES:
        return None
    official = {
        one.sha256 for one in row.variant.paper.facts.official_weights if one.sha256 is not None
    }
    given = cell.record.conditions
    return SAME_WEIGHTS if given.weights_sha256 in official or given.seed is None else RETRAINED


def _agreement(published: Published, code: str, metric: str) -> str:
    if code == "digits":
        return f"equal to the printed digits ({COUNTER_WORDS[metric]})"
    return "within the tolerance"


def _explain(
    published: Published, row: Row, metric: str, value: float, scale: float
) -> tuple[str, str]:
    """Why a number may deviate: another convention, a truncated print, or nothing known."""
    low, high = printed_range(published.value, published.tolerance)
    for other in COUNTERS.get(metric.split("_")[0], ()):
        cell = row.fixed.get(other)
        if other == metric or cell is None or cell.value is None:
            continue
        if low <= cell.value / scale <= high:
            return "convention", f"printed by another rule: {COUNTER_WORDS[other]}"
    exact = metric in COUNTS and published.tolerance is None
    last_digit = high - low
    if exact and published.value <= value < published.value + last_digit:
        return "truncated", "the print cuts the digits off instead of rounding"
    difference = value - published.value
    relative = abs(difference) / abs(published.value) if published.value else math.inf
    return "unexplained", f"differs by {difference:+.3g} {published.unit} ({relative:.1%})"
