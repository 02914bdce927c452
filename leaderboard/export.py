"""The leaderboard as files for other programs: CSV, Markdown and JSON."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

from leaderboard.columns import COLUMNS, show, show_interval
from leaderboard.provenance import record_id, remeasure_command, unit_of
from leaderboard.tables import Board, Cell, Row, View, wide_frame

SCHEMA_VERSION = 1


def to_csv(board: Board) -> str:
    """One line per variant, track, machine and setting; numbers in the columns' units."""
    return wide_frame(board).to_csv(index=False)


def to_json(board: Board) -> str:
    """Every cell with the ids of its records, and those records whole.

    The file compares itself with a later one: `replivit leaderboard --against leaderboard.json`.
    """
    cells, used = [], {}
    for row in board.rows:
        found = [(None, cell) for cell in row.fixed.values()]
        found += [(view, cell) for view, mine in row.speeds.items() for cell in mine.values()]
        for view, cell in found:
            cells.append(_cell(row, view, cell))
            kept = [*cell.records, *cell.also]
            kept += [cell.later_failure] if cell.later_failure else []
            used.update({record_id(one): one for one in kept})
    data = {
        "schema_version": SCHEMA_VERSION,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cells": cells,
        "records": [one.model_dump(mode="json") for one in used.values()],
    }
    return json.dumps(data, indent=1, allow_nan=False)


def _cell(row: Row, view: View | None, cell: Cell) -> dict[str, Any]:
    return {
        "variant": row.name,
        "paper": row.paper,
        "track": row.track,
        "metric": cell.metric,
        "value": cell.value,
        "unit": unit_of(cell.metric),
        "interval": cell.interval,
        "std": cell.std,
        "seeds": cell.seeds,
        "status": cell.status,
        "reason": cell.reason,
        "machine": view.machine if view else None,
        "setting": view.setting if view else None,
        "records": [record_id(one) for one in cell.records],
        "command": remeasure_command(cell.record),
    }


def to_markdown(board: Board) -> str:
    """The default view as a table: GitHub's dialect, also readable as plain text."""
    view = board.default_view
    lines = ["# RepliViT leaderboard", ""]
    if view:
        lines += [f"Times and memory: {view.machine}; {view.setting}. Intervals are 95 %.", ""]
    heads = ["variant", "track", *(column.heading for column in COLUMNS.values())]
    lines += [_line(heads), _line(["---", "---", *("--:" for _ in COLUMNS)])]
    for row in board.rows:
        texts = [cell_text(row, key, view) for key in COLUMNS]
        lines.append(_line([row.name, row.track, *texts]))
    return "\n".join(lines) + "\n"


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"


def cell_text(row: Row, key: str, view: View | None, brief: bool = False) -> str:
    """One cell as a short text: "0.91 (0.90–0.93)", "80.2 published", "failed", "–".

    Args:
        brief: without interval, and a published number as "80.2 *".
    """
    column, cell = COLUMNS[key], row.cell(key, view)
    if cell is None:
        printed = row.published_top1 if key == "top1" else None
        return "–" if printed is None else f"{show(printed)} {'*' if brief else 'published'}"
    if cell.value is None:
        return cell.status
    value = cell.value / column.scale
    text = show(value)
    if cell.interval and not brief:
        ends = tuple(end / column.scale for end in cell.interval)
        text += f" ({show_interval(value, ends)})"
    return text if cell.status == "ok" else f"{text} {cell.status}"
