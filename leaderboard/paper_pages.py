"""What a paper's page says: its ledger, experiments, measurements and shipped weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from harness.environment import home
from harness.record import Record
from harness.registry import Paper
from leaderboard.columns import COLUMNS, show, show_interval, status_words
from leaderboard.lessons import picture_uri
from leaderboard.pages import cell_note
from leaderboard.provenance import facts, record_id, remeasure_command
from leaderboard.tables import ACCURACIES, COUNTS, SPEEDS, Board, Cell, Row, View
from leaderboard.verdicts import Verdict


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
    """Every experiment of a paper with its newest record of each track, or that it was not run."""
    newest: dict[str, dict[str | None, Record]] = {}
    for record in board.records:  # in order of time
        if record.metric == "experiment":
            newest.setdefault(record.variant, {})[record.conditions.track] = record
    sections = []
    for name, spec in paper.facts.experiments.items():
        full = f"{paper.key}/{name}"
        records = newest.get(full, {})
        for track, record in records.items():
            several = len(records) > 1
            section = _experiment(paper, spec.title, record)
            section["anchor"] = f"{name}-{track}" if several else name
            section["title"] += f", on {track or 'no track'}" if several else ""
            sections.append(section | {"reproduces": spec.reproduces})
        if not records:
            sections.append(
                {
                    "anchor": name, "title": spec.title, "reproduces": spec.reproduces,
                    "record": None, "command": f"replivit run {full}", "findings": [],
                }
            )  # fmt: skip
    return sections


def _experiment(paper: Paper, title: str, record: Record) -> dict[str, Any]:
    """What one record says of an experiment."""
    detail = record.detail
    findings = _dictionaries(detail.get("findings"))
    root = paper.directory if detail.get("shipped") else home()
    return {
        "title": title, "record": record, "command": remeasure_command(record),
        "scale": detail.get("scale", ""), "notes": str(detail.get("notes", "")),
        "findings": [
            {key: str(row.get(key, "")) for key in ("claim", "outcome", "evidence")}
            for row in findings
        ],
        "rows": _table(detail.get("rows")), "published": _table(detail.get("published")),
        "pictures": _pictures(detail.get("figures", []), title, root), "facts": facts(record),
    }  # fmt: skip


def _dictionaries(rows: Any) -> list[dict]:
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _table(rows: Any) -> list[dict[str, str]]:
    return _uniform([_readable(row) for row in _dictionaries(rows)])


def _uniform(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows that all have every row's keys, in the order they first appear."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in keys} for row in rows]


def _readable(row: dict[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "; ".join(f"{key} {text(one)}" for key, one in value.items())
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, float):
            return show(value, 4) if math.isfinite(value) else str(value)
        return "" if value is None else str(value)

    return {str(key).replace("_", " "): text(value) for key, value in row.items()}


def _pictures(paths: Any, title: str, root: Path) -> list[dict[str, str]]:
    """An experiment's figures, inlined; SVG where both forms exist. Only files below `root`."""
    chosen: dict[str, str] = {}
    for path in paths if isinstance(paths, list) else []:
        stem, _, suffix = str(path).rpartition(".")
        if stem not in chosen or suffix == "svg":
            chosen[stem] = str(path)
    found = []
    for stem, path in chosen.items():
        uri = picture_uri(root / path, root)
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
        number = f"{status_words(cell.status)}: {why}"
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
    where = "any machine"
    if cell.metric in SPEEDS:
        where = f"{record.environment.machine}; {View.of(record).setting}"
    elif cell.metric in ACCURACIES:
        where = row.track
    return {
        "variant": row.name,
        "metric": cell.metric,
        "value": f"{number} {unit}".strip(),
        "remark": mark if cell.value is not None else "",
        "where": where,
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
            scores = [
                record
                for record in board.records
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
    return _uniform(rows)
