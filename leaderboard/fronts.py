"""Pareto fronts that know how sure they are.

Each model gets the probability of being on the front of two axes when its numbers vary within
their intervals. Models between `OFF` and `ON` are ties: the measurements cannot tell whether
somebody beats them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.statistics import front_probability
from leaderboard.columns import COLUMNS
from leaderboard.tables import Board, Cell, Row, View

ON, OFF = 0.95, 0.05
#: A time measured on a disturbed machine is never ranked closer than this fraction.
CONTENDED_REACH = 0.10


def standing(probability: float) -> str:
    """The word for a probability of being on the front: "front", "tie" or "" (beaten)."""
    if probability >= ON:
        return "front"
    return "tie" if probability > OFF else ""


def point(row: Row, key: str, view: View | None) -> tuple[float, float, float] | None:
    """Value and 95 % ends of one axis; None where there is no number.

    Top-1 that was not measured here falls back to the published number, as if exact.
    """
    cell = row.cell(key, view)
    if cell is None or cell.value is None:
        printed = row.published_top1 if key == "top1" else None
        return None if printed is None else (printed, printed, printed)
    return bounds(cell, COLUMNS[key].scale)


def bounds(cell: Cell, scale: float = 1.0) -> tuple[float, float, float]:
    """Value and ends of a cell's interval, widened to ±10 % where it is contended."""
    value = cell.value / scale
    low, high = (end / scale for end in cell.interval or (cell.value, cell.value))
    if cell.status == "contended":
        low = min(low, value * (1 - CONTENDED_REACH))
        high = max(high, value * (1 + CONTENDED_REACH))
    return value, min(low, value), max(high, value)


def probabilities(
    rows: Sequence[Row], axes: tuple[str, str], view: View | None, resamples: int = 400
) -> list[float | None]:
    """Probability of being on the front of two columns, row by row; None without both numbers.

    Only rows of one track meet: a 32-pixel model does not beat a 224-pixel one.
    """
    found: list[float | None] = [None] * len(rows)
    flags = [COLUMNS[key].larger_is_better for key in axes]
    for track in {row.track for row in rows}:
        chosen, points = [], []
        for index, row in enumerate(rows):
            pair = [point(row, key, view) for key in axes]
            if row.track == track and None not in pair:
                chosen.append(index)
                points.append(pair)
        if not chosen:
            continue
        array = np.asarray(points)
        share = front_probability(array[..., 0], array[..., 1:], flags, resamples=resamples)
        for index, value in zip(chosen, share, strict=True):
            found[index] = float(value)
    return found


def axis_pairs() -> list[tuple[str, str]]:
    """Every pair of columns that can be plotted, each once."""
    keys = list(COLUMNS)
    return [(x, y) for i, x in enumerate(keys) for y in keys[i + 1 :]]


def all_fronts(board: Board) -> list[dict[str, list[float | None]]]:
    """For each of the board's views: "x|y" -> probability by row, for the page's plot."""
    shared = {
        f"{x}|{y}": probabilities(board.rows, (x, y), None)
        for x, y in axis_pairs()
        if not (COLUMNS[x].speed or COLUMNS[y].speed)
    }
    return [
        {
            f"{x}|{y}": shared.get(f"{x}|{y}") or probabilities(board.rows, (x, y), view)
            for x, y in axis_pairs()
        }
        for view in board.views or [None]
    ]
