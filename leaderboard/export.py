"""The leaderboard as files for other programs: CSV, Markdown and JSON."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pandas as pd

from leaderboard.columns import COLUMNS, show, show_interval, status_words
from leaderboard.provenance import record_id, remeasure_command, unit_of
from leaderboard.tables import MEMORY, Board, Cell, Row, View, is_timed

SCHEMA_VERSION = 1


def to_csv(board: Board) -> str:
    """One line per variant, track, machine and setting; numbers in the columns' units."""
    return wide_frame(board).to_csv(index=False)


def wide_frame(board: Board) -> pd.DataFrame:
    """One line per row and view, in the columns' units: what `leaderboard.csv` holds."""
    lines = []
    for row in board.rows:
        views = [view for view in board.views if is_timed(row.speeds.get(view, {}))]
        for view in views or [None]:
            line: dict[str, Any] = {
                "variant": row.name, "paper": row.paper, "family": row.family,
                "track": row.track, "image_size": row.image_size,
                "machine": view and view.machine, "device": view and view.device,
                "batch_size": view and view.batch_size, "threads": view and view.threads,
                "backend": view and view.backend, "dtype": view and view.dtype,
            }  # fmt: skip
            for key, column in COLUMNS.items():
                name = f"{key}_{_plain(column.unit)}"
                cell = row.cell(key, view)
                value = cell.value / column.scale if cell and cell.value is not None else None
                low, high = cell.interval if cell and cell.interval else (None, None)
                line[name] = value
                if column.speed or key == "top1":
                    line[f"{name}_low"] = None if low is None else low / column.scale
                    line[f"{name}_high"] = None if high is None else high / column.scale
                if key in MEMORY:
                    line[f"{key}_batch_size"] = cell and View.of(cell.record).batch_size
                line[f"{key}_status"] = cell.status if cell else "not measured"
                line[f"{key}_reason"] = cell.reason if cell else None
            top1 = row.fixed.get("top1")
            line["top1_seeds"] = top1.seeds if top1 else None
            line["top1_std"] = top1.std if top1 else None
            line["top1_published"] = row.published_top1
            lines.append(line)
    return pd.DataFrame(lines)


def _plain(unit: str) -> str:
    return {"%": "percent", "× yardstick": "x_yardstick"}.get(unit, unit)


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
        brief: without interval; a published number as "80.2 *", a disturbed one as "0.91 ~".
    """
    column, cell = COLUMNS[key], row.cell(key, view)
    if cell is None:
        printed = row.published_top1 if key == "top1" else None
        return "–" if printed is None else f"{show(printed)} {'*' if brief else 'published'}"
    if cell.value is None:
        return status_words(cell.status)
    value = cell.value / column.scale
    text = show(value)
    if cell.interval and not brief:
        ends = tuple(end / column.scale for end in cell.interval)
        text += f" ({show_interval(value, ends)})"
    return text if cell.status == "ok" else f"{text} {'~' if brief else cell.status}"
