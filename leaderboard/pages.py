"""What the pages say, as plain dictionaries and texts; no HTML is written here."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

from harness.environment import home
from harness.record import Record, read_records
from harness.registry import Paper
from leaderboard.columns import COLUMNS, show, show_interval
from leaderboard.fronts import all_fronts
from leaderboard.lessons import picture_uri
from leaderboard.provenance import facts, record_id, remeasure_command
from leaderboard.tables import COUNTS, MEMORY, SPEEDS, Board, Cell, Row, View
from leaderboard.verdicts import Verdict

OUTCOMES = ("reproduced", "deviates", "not measured")
STATUS_WORDS = {"out_of_memory": "out of memory"}
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
    word = STATUS_WORDS.get(cell.status, cell.status)
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
        "v": None, "text": STATUS_WORDS.get(cell.status, cell.status), "interval": "",
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
    if view:
        timed = [
            (cell.value, row.name, show_interval(cell.value, cell.interval))
            for row in {row.name: row for row in board.rows}.values()
            if (cell := row.cell("latency_ratio", view)) and cell.status == "ok"
            if row.image_size == 224
        ]
        if timed:
            value, name, ends = min(timed)
            lines.append(
                f"Fastest at 224 pixels on {view.machine} ({view.setting}): {name}, "
                f"{show(value)} of the yardstick's time{f' ({ends})' if ends else ''}."
            )
    for track in board.tracks:
        scored = [
            (row.fixed["top1"].value, row.name)
            for row in board.rows
            if row.track == track and row.fixed.get("top1") and row.fixed["top1"].value is not None
        ]
        if scored:
            value, name = max(scored)
            lines.append(f"Best top-1 measured here on {track}: {name}, {value:.2f} %.")
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
        return STATUS_WORDS.get(cell.status, cell.status)
    ends = show_interval(cell.value, cell.interval)
    mark = "" if cell.status == "ok" else f" {cell.status}"
    return f"{show(cell.value)}{f' ({ends})' if ends else ''}{mark}"


# --- a paper's page --------------------------------------------------------------------------


def ledger_rows(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """The claims ledger as texts."""
    rows = []
    for one in verdicts:
        printed = one.published
        mark, _ = cell_note(one.cell) if one.cell and one.cell.value is not None else ("", "")
        rows.append(
            {
                "variant": printed.variant, "of": printed.of, "metric": printed.metric,
                "value": _any_value(printed.value), "unit": printed.unit,
                "conditions": printed.conditions, "source": printed.source, "seen": printed.seen,
                "against": one.against, "outcome": one.outcome, "reason": one.reason,
                "measured": None if one.measured is None else f"{one.measured:,.6g}",
                "interval": _interval(one), "mark": mark, "command": one.command,
                "status": one.cell.status if one.cell else "ok",
            }
        )  # fmt: skip
    return rows


def _interval(verdict: Verdict) -> str:
    return show_interval(verdict.measured, verdict.interval) if verdict.interval else ""


def _any_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{one:g}" for one in value)
    return str(value)


def experiment_sections(paper: Paper, board: Board) -> list[dict[str, Any]]:
    """Every experiment of a paper with its newest record, or a note that it has not been run."""
    newest = {
        record.variant: record for record in board.records if record.metric == "experiment"
    }  # records are in order of time
    sections = []
    for name, spec in paper.facts.experiments.items():
        full = f"{paper.key}/{name}"
        record = newest.get(full)
        section = {
            "anchor": name, "title": spec.title, "reproduces": spec.reproduces, "record": record,
            "command": remeasure_command(record) if record else f"replivit run {full}",
            "findings": [], "rows": [], "published": [], "pictures": [], "notes": "",
        }  # fmt: skip
        if record:
            detail = record.detail
            section |= {
                "scale": detail.get("scale", ""),
                "notes": str(detail.get("notes", "")),
                "findings": [
                    {key: str(row.get(key, "")) for key in ("claim", "outcome", "evidence")}
                    for row in _dictionaries(detail.get("findings"))
                ],
                "rows": [_readable(row) for row in _dictionaries(detail.get("rows"))],
                "published": [_readable(row) for row in _dictionaries(detail.get("published"))],
                "pictures": _pictures(detail.get("figures", []), spec.title),
                "facts": facts(record),
            }
        sections.append(section)
    return sections


def _dictionaries(rows: Any) -> list[dict]:
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _readable(row: dict[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return show(value, 4) if math.isfinite(value) else str(value)
        return "" if value is None else str(value)

    return {str(key): text(value) for key, value in row.items()}


def _pictures(paths: Any, title: str) -> list[dict[str, str]]:
    """An experiment's figures, inlined; SVG where both forms exist. Only files below home()."""
    chosen: dict[str, str] = {}
    for path in paths if isinstance(paths, list) else []:
        stem, _, suffix = str(path).rpartition(".")
        if stem not in chosen or suffix == "svg":
            chosen[stem] = str(path)
    found = []
    for stem, path in chosen.items():
        uri = picture_uri(home() / path, home())
        if uri:
            found.append({"uri": uri, "alt": f"{title}: {stem.rpartition('/')[2]}"})
    return found


def measurement_rows(paper: Paper, board: Board) -> list[dict[str, str]]:
    """Every cell of a paper's variants as one flat table with its provenance."""
    rows, seen = [], set()
    for row in board.rows:
        if row.paper != paper.key:
            continue
        cells = list(row.fixed.values())
        cells += [one for view in sorted(row.speeds) for one in row.speeds[view].values()]
        for cell in cells:
            key = tuple(record_id(one) for one in cell.records)
            if key not in seen:
                seen.add(key)
                rows.append(_measurement(row, cell))
    return rows


def _measurement(row: Row, cell: Cell) -> dict[str, str]:
    column = COLUMNS.get(cell.metric)
    scale, unit = (column.scale, column.unit) if column else (1.0, cell.record.unit)
    mark, why = cell_note(cell)
    if cell.value is None:
        number = f"{STATUS_WORDS.get(cell.status, cell.status)}: {why}"
    elif cell.metric in COUNTS:
        number = f"{cell.value:,}"
        unit = ""
    else:
        number = show(cell.value / scale, 4)
        if cell.interval:
            ends = tuple(end / scale for end in cell.interval)
            number += f" ({show_interval(cell.value / scale, ends, 4)})"
    record = cell.record
    commit = (record.environment.commit or "–")[:10]
    bound = cell.metric in SPEEDS
    return {
        "variant": row.name,
        "metric": cell.metric,
        "value": f"{number} {unit}".strip(),
        "remark": mark if cell.value is not None else "",
        "where": f"{record.environment.machine}; {View.of(record).setting}" if bound else row.track
        if cell.metric in ("top1", "top5") else "any machine",
        "weights": (record.conditions.weights_sha256 or "–")[:12],
        "seed": ", ".join(str(one.conditions.seed) for one in cell.records if cell.seeds) or "–",
        "commit": commit + ("*" if record.environment.dirty else ""),
        "measured": f"{record.started:%Y-%m-%d}",
        "measure again": remeasure_command(record),
    }  # fmt: skip


def weight_rows(paper: Paper, board: Board) -> list[dict[str, str]]:
    """Shipped weights with size, hash and the top-1 that their own records state."""
    rows = []
    for name, spec in paper.facts.variants.items():
        for track, file in spec.weights.items():
            from harness.checkpoints import file_sha256  # imports torch: only where needed

            path = paper.directory / file
            if not path.is_file():
                rows.append({"variant": name, "track": track, "file": f"{file} is missing"})
                continue
            digest = file_sha256(path)
            shipped = path.with_suffix(".records.jsonl")
            known = [*board.records, *(read_records(shipped) if shipped.is_file() else [])]
            scores = [
                record
                for record in known
                if record.metric == "top1" and record.conditions.weights_sha256 == digest
                if record.measured and not record.conditions.options
            ]
            top1 = f"{scores[-1].value:.2f} %" if scores else "not measured yet"
            rows.append(
                {
                    "variant": name, "track": track, "file": file, "top-1": top1,
                    "size": f"{path.stat().st_size / 2**20:.2f} MiB", "SHA-256": digest,
                }
            )  # fmt: skip
    return rows
