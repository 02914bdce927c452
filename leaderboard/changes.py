"""What changed between two leaderboards, told apart from noise.

Counts change when they differ at all. A number with an interval changes when the two 95 %
intervals are disjoint, top-1 on the same images when McNemar's exact test says so at 1 % (many
models are compared at once). Memory has no interval: 5 % is its threshold. Times meet only their
own machine; a time ratio without a counterpart there may meet another machine's, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ReplivitError
from harness.record import Record, RecordStore, bits_of, read_records
from harness.registry import Paper
from harness.statistics import mcnemar
from leaderboard.columns import COLUMNS, show, status_words
from leaderboard.tables import COUNTS, Board, Cell, View, arrange

SIGNIFICANT, MEMORY_STEP = 0.01, 0.05
KINDS = ("better", "worse", "changed", "failed", "works again", "new", "gone")


@dataclass(frozen=True)
class Change:
    """One difference worth a line.

    Attributes:
        relative: (new - old) / old, where both are numbers.
        basis: what makes it more than noise.
    """

    kind: str
    variant: str
    metric: str
    where: str
    old: str
    new: str
    relative: float | None
    basis: str


@dataclass(frozen=True)
class Comparison:
    """All changes, and how many cells stayed within noise."""

    changes: list[Change]
    unchanged: int
    source: str


def load_old(path: Path, papers: list[Paper]) -> Board:
    """An old leaderboard: a `leaderboard.json`, a file of records, or a folder of records.

    Raises:
        ReplivitError: it does not exist, or is none of these.
    """
    path = Path(path)
    if path.is_dir() and (path / "leaderboard.json").is_file():
        path = path / "leaderboard.json"
    if path.is_dir():
        records = RecordStore(path).load()
    elif path.suffix == ".jsonl":
        records = list(read_records(path))
    else:
        records = list(_records_of_json(path))
    if not records:
        raise ReplivitError(f"{path} holds no records to compare with")
    return arrange(records, papers, [])


def _records_of_json(path: Path) -> Iterable[Record]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReplivitError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ReplivitError(f"{path} is not JSON") from error
    if not isinstance(data, dict) or not isinstance(data.get("records"), list):
        raise ReplivitError(f"{path} is no leaderboard.json: it has no list 'records'")
    if data.get("schema_version") != 1:
        raise ReplivitError(f"{path}: schema version {data.get('schema_version')!r} is not known")
    for number, entry in enumerate(data["records"]):
        try:
            yield Record.model_validate(entry)
        except ValueError as error:
            raise ReplivitError(f"{path}: records.{number} is not a valid record") from error


def compare_boards(old: Board, new: Board, source: str = "") -> Comparison:
    """Every significant change from `old` to `new`, the columns' metrics only."""
    before, after = _cells(old), _cells(new)
    changes, unchanged, met = [], 0, set()
    for key, cell in after.items():
        partner, elsewhere = _partner(key, before)
        met.add(partner)
        found = _difference(key, before.get(partner), cell, elsewhere)
        changes += [found] if found else []
        unchanged += found is None
    for key, cell in before.items():
        if key not in met and cell.value is not None:
            changes.append(_change("gone", key, cell, None, "no record any more"))
    changes.sort(key=lambda one: (KINDS.index(one.kind), one.variant, one.metric))
    return Comparison(changes, unchanged, source)


Key = tuple[str, str, str, View | None]  # variant, track, metric, view


def _cells(board: Board) -> dict[Key, Cell]:
    cells: dict[Key, Cell] = {}
    for row in board.rows:
        own = row.variant.track if row.variant else row.track  # counts and times of one row only
        for metric in COLUMNS:
            if metric in row.fixed:
                track = row.track if metric == "top1" else own
                cells[row.name, track, metric, None] = row.fixed[metric]
            for view, mine in row.speeds.items():
                if metric in mine:
                    cells[row.name, own, metric, view] = mine[metric]
    return cells


def _partner(key: Key, before: dict[Key, Cell]) -> tuple[Key | None, bool]:
    """The old cell to compare with, and whether it is another machine's."""
    if key in before:
        return key, False
    name, track, metric, view = key
    if metric == "latency_ratio":
        for other in before:
            if other[:3] == (name, track, metric) and other[3].setting == view.setting:
                return other, True
    return None, False


def _difference(key: Key, old: Cell | None, new: Cell, elsewhere: bool) -> Change | None:
    if old is None or (old.value is None and new.value is None):
        return _change("new", key, None, new, "no old record") if old is None else None
    if new.value is None:
        return _change("failed", key, old, new, new.reason or new.status)
    if old.value is None:
        return _change("works again", key, old, new, f"was {old.status}")
    basis = _significance(key[2], old, new)
    if basis is None:
        return None
    basis += ", another machine" if elsewhere else ""
    return _change(_direction(key[2], old, new), key, old, new, basis)


def _direction(metric: str, old: Cell, new: Cell) -> str:
    if metric in COUNTS:
        return "changed"
    return "better" if (new.value > old.value) == COLUMNS[metric].larger_is_better else "worse"


def _significance(metric: str, old: Cell, new: Cell) -> str | None:
    """What makes a difference more than noise; None where nothing does."""
    if metric in COUNTS:
        return "counts are exact" if old.value != new.value else None
    pair = _bits(old), _bits(new)
    if metric == "top1" and None not in pair and _same_images(old, new):
        test = mcnemar(*pair)
        return f"McNemar p = {test.p_value:.2g}" if test.p_value < SIGNIFICANT else None
    if old.interval and new.interval:
        apart = new.interval[0] > old.interval[1] or new.interval[1] < old.interval[0]
        return "95 % intervals are disjoint" if apart else None
    step = abs(new.value / old.value - 1) if old.value else 0
    return f"no interval; more than {MEMORY_STEP:.0%}" if step > MEMORY_STEP else None


def _bits(cell: Cell) -> Any:
    """The right/wrong bits `(N,)` of a single run, if its record keeps them; else None."""
    try:
        return tuple(bits_of(cell.record)) if len(cell.records) == 1 else None
    except ReplivitError:
        return None


def _same_images(old: Cell, new: Cell) -> bool:
    prints = [cell.record.conditions.data_fingerprint for cell in (old, new)]
    sizes = [cell.record.detail.get("n") for cell in (old, new)]
    return prints[0] is not None and prints[0] == prints[1] and sizes[0] == sizes[1]


def _change(kind: str, key: Key, old: Cell | None, new: Cell | None, basis: str) -> Change:
    name, track, metric, view = key
    where = f"{view.machine}; {view.setting}" if view else track
    both = [cell.value for cell in (old, new) if cell and cell.value is not None]
    relative = both[1] / both[0] - 1 if len(both) == 2 and both[0] else None
    texts = (_text(metric, cell) for cell in (old, new))
    return Change(kind, name, metric, where, *texts, relative, basis)


def _text(metric: str, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if cell.value is None:
        return status_words(cell.status)
    column = COLUMNS[metric]
    return f"{show(cell.value / column.scale, 4)} {column.unit}"


def describe(change: Change) -> dict[str, Any]:
    """A change as plain texts, for pages and terminals."""
    percent = "" if change.relative is None else f"{change.relative:+.1%}"
    return {**vars(change), "metric": COLUMNS[change.metric].label, "relative": percent}
