"""What the pages say, as plain dictionaries and texts; no HTML is written here."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from harness.record import Record
from leaderboard.columns import COLUMNS, show, show_interval, status_words
from leaderboard.fronts import all_fronts
from leaderboard.provenance import facts, record_id, remeasure_command
from leaderboard.tables import MEMORY, Board, Cell, Row, View
from leaderboard.verdicts import Verdict

OUTCOMES = ("reproduced", "deviates", "not measured")
LEAST_SEEDS = 3


class Provenance:
    """Records as label-text lists; texts that repeat are kept once."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def add(self, record: Record) -> int:
        """The number of a record in `records`."""
        name = record_id(record)
        if name not in self.records:
            self.records[name] = {
                "index": len(self.records),
                "command": remeasure_command(record),
                "facts": [
                    (label, self.texts.setdefault(text, len(self.texts)))
                    for label, text in facts(record)
                ],
            }
        return self.records[name]["index"]


def cell_note(cell: Cell) -> tuple[str, str]:
    """The mark beside a number, and the sentence behind it; two empty texts where all is well."""
    word = status_words(cell.status)
    if cell.value is None:
        return "", cell.reason or word
    notes, marks = [], []
    if cell.status != "ok":
        marks.append(word)
        notes.append(f"{word}: {cell.reason or 'no reason given'}.")
    if cell.seeds:
        spread = f" ± {cell.std:.2g}" if cell.std is not None else ""
        marks.append(f"{cell.seeds} seed{'s' if cell.seeds > 1 else ''}{spread}")
        if cell.seeds < LEAST_SEEDS:
            notes.append(f"Fewer than {LEAST_SEEDS} seeds.")
    if cell.later_failure:
        marks.append("later attempt failed")
        notes.append(f"A later attempt failed: {cell.later_failure.reason or 'no reason given'}.")
    return ", ".join(marks), " ".join(notes)


def shown_cell(row: Row, key: str, view: View | None, provenance: Provenance) -> dict | None:
    """One cell for the page: number, texts, status and the numbers of its records."""
    column, cell = COLUMNS[key], row.cell(key, view)
    if cell is None:
        printed = row.published_top1 if key == "top1" else None
        if printed is None:
            return None
        return {
            "v": printed, "text": show(printed), "interval": "", "status": "ok",
            "mark": "published", "why": "Printed by the paper, not measured here.",
            "published": True, "records": [],
        }  # fmt: skip
    mark, why = cell_note(cell)
    found: dict[str, Any] = {
        "v": None, "text": status_words(cell.status), "interval": "",
        "status": cell.status, "mark": mark, "why": why, "published": False,
        "records": [provenance.add(one) for one in (*cell.records, *cell.also)],
    }  # fmt: skip
    if cell.value is None:
        found["mark"] = textwrap.shorten(why, 60, placeholder=" …")
        return found
    value = cell.value / column.scale
    found |= {"v": value, "text": show(value)}
    if cell.interval:
        low, high = (end / column.scale for end in cell.interval)
        found |= {"lo": low, "hi": high, "interval": show_interval(value, (low, high))}
    if key in MEMORY and (batch := View.of(cell.record).batch_size) != view.batch_size:
        found["interval"] = f"batch {batch}"
    return found


def page_data(board: Board, pages: dict[str, str]) -> dict[str, Any]:
    """Everything the index's script needs; the table in the page is made from it too."""
    provenance, rows = Provenance(), []
    for index, row in enumerate(board.rows):
        fixed, speeds = (
            {key for key, one in COLUMNS.items() if one.speed is speed} for speed in (False, True)
        )
        size = f"{row.image_size} px" if row.image_size else ""
        rows.append(
            {
                "index": index, "name": row.name, "paper": row.paper, "family": row.family,
                "track": row.track, "page": pages.get(row.paper),
                "about": ", ".join(filter(None, (row.family, size, row.track))),
                "fixed": _cells(row, fixed, None, provenance),
                "speeds": [_cells(row, speeds, view, provenance) for view in board.views],
            }
        )  # fmt: skip
    fronts = [
        {pair: [_rounded(one) for one in share] for pair, share in view.items()}
        for view in all_fronts(board)
    ]
    return {
        "columns": [
            {
                "key": one.key, "label": one.label, "unit": one.unit, "heading": one.heading,
                "up": one.larger_is_better, "speed": one.speed, "meaning": one.meaning,
            }
            for one in COLUMNS.values()
        ],
        "views": [
            {"index": i, "machine": one.machine, "device": one.device, "setting": one.setting}
            for i, one in enumerate(board.views)
        ],
        "rows": rows,
        "fronts": fronts,
        "records": list(provenance.records.values()),
        "texts": list(provenance.texts),
    }  # fmt: skip


def _cells(row: Row, keys: set[str], view: View | None, provenance: Provenance) -> dict:
    found = {key: shown_cell(row, key, view, provenance) for key in COLUMNS if key in keys}
    return {key: one for key, one in found.items() if one is not None}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def headlines(board: Board, ledgers: dict[str, list[Verdict]]) -> list[str]:
    """One to three sentences that say what a hurried reader came for."""
    lines, view = [], board.default_view
    timed = {
        row.name: cell
        for row in board.rows
        if row.image_size == 224 and (cell := row.cell("latency_ratio", view))
        if cell.status == "ok"
    }
    if timed:
        where = f"Fastest at 224 pixels on {view.machine} ({view.setting})"
        lines.append(f"{where}: {_winner(timed, min)} of the yardstick's time.")
    for track in board.tracks:
        scored = {
            row.name: cell
            for row in board.rows
            if row.track == track and (cell := row.fixed.get("top1")) and cell.value is not None
        }
        if scored:
            lines.append(f"Best top-1 measured here on {track}: {_winner(scored, max)} %.")
    counts = count_outcomes(one.outcome for rows in ledgers.values() for one in rows)
    if sum(counts.values()):
        lines.append(
            f"Of {sum(counts.values())} published numbers, {counts['reproduced']} are reproduced, "
            f"{counts['deviates']} deviate and {counts['not measured']} are not measured here; "
            "each says why."
        )
    if not board.records:
        lines.append(
            "Nothing is measured yet: run replivit leaderboard, and this page fills itself."
        )
    return lines


def _winner(cells: dict[str, Cell], best: Callable) -> str:
    """The best model with its number, and who cannot be told apart from it."""
    name = best(cells, key=lambda one: cells[one].value)
    low, high = cells[name].interval or (cells[name].value, cells[name].value)
    ties = [
        other
        for other, cell in cells.items()
        if other != name and cell.interval and cell.interval[0] <= high and cell.interval[1] >= low
    ]
    tied = f" (not told apart from {', '.join(ties)})" if ties else ""
    ends = show_interval(cells[name].value, cells[name].interval)
    return f"{name}{tied}, {show(cells[name].value)}{f' ({ends})' if ends else ''}"


def count_outcomes(outcomes: Iterable[str]) -> dict[str, int]:
    """How many verdicts or findings have each outcome."""
    counts = Counter(outcomes)
    return {name: counts[name] for name in OUTCOMES}


def across_machines(board: Board) -> list[dict[str, Any]]:
    """For each setting that several machines share: the ratio of every model on each of them."""
    found = []
    settings = Counter(view.setting for view in board.views)
    for setting in sorted(one for one, count in settings.items() if count > 1):
        views = [view for view in board.views if view.setting == setting]
        rows = []
        for row in {row.name: row for row in board.rows}.values():
            cells = [row.cell("latency_ratio", view) for view in views]
            if any(cells):
                texts = [_ratio_text(cell) for cell in cells]
                names = [view.machine for view in views]
                rows.append({"variant": row.name, **dict(zip(names, texts, strict=True))})
        if rows:
            found.append({"setting": setting, "rows": rows})
    return found


def _ratio_text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if cell.value is None:
        return status_words(cell.status)
    ends = show_interval(cell.value, cell.interval)
    mark = "" if cell.status == "ok" else f" {cell.status}"
    return f"{show(cell.value)}{f' ({ends})' if ends else ''}{mark}"
