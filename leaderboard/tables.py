"""Records -> the board: for every variant the numbers to show, and which record each came from.

The newest valid record of a cell counts. Counts and accuracies belong to a variant; times and
memory also to a machine and a setting (`View`). Only standard conditions reach the board (no
builder options, the variant's own image size): everything else stays in the records.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness.record import Record, RecordStore, read_records
from harness.registry import Paper, Variant
from harness.statistics import mean_std
from leaderboard.columns import Interval

COUNTS = ("params", "params_trainable", "params_paper", "macs", "macs_fvcore", "macs_paper")
ACCURACIES = ("top1", "top5")
TIMES = ("latency", "latency_ratio", "first_call")
MEMORY = ("memory_inference", "memory_training")
SPEEDS = (*TIMES, *MEMORY)
#: The track of a measured module that is no registered variant.
NO_TRACK = "none"


@dataclass(frozen=True, order=True)
class View:
    """One machine and one setting: what must be equal for two times to compare."""

    machine: str
    device: str
    batch_size: int
    threads: int
    backend: str
    dtype: str

    @property
    def setting(self) -> str:
        """The view without its machine: "cpu, 1 thread, batch 1, eager, float32"."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        where = f"{self.device}, {threads}" if self.device == "cpu" else self.device
        return f"{where}, batch {self.batch_size}, {self.backend}, {self.dtype}"

    @classmethod
    def of(cls, record: Record) -> View:
        """The view a record of time or memory belongs to."""
        given = record.conditions
        return cls(
            record.environment.machine, given.device, given.batch_size or 1,
            given.threads or 0, given.backend, given.dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One number of the board.

    Attributes:
        records: what the number rests on: one record, or one per seed.
        std: over seeds.
        later_failure: a newer attempt that failed, if there was one.
        also: records worth showing beside it: the shipped file's own score next to the seeds'.
    """

    metric: str
    value: float | int | None
    interval: Interval | None
    status: str
    reason: str | None
    records: tuple[Record, ...]
    std: float | None = None
    later_failure: Record | None = None
    also: tuple[Record, ...] = ()

    @property
    def record(self) -> Record:
        """The newest record behind the cell."""
        return self.records[-1]

    @property
    def seeds(self) -> int:
        """How many trained seeds stand behind the number; 0 where it is no training result."""
        return len({one.conditions.seed for one in self.records} - {None})


@dataclass
class Row:
    """One variant on one track."""

    name: str
    track: str
    variant: Variant | None
    fixed: dict[str, Cell] = field(default_factory=dict)
    speeds: dict[View, dict[str, Cell]] = field(default_factory=dict)

    @property
    def paper(self) -> str:
        return self.variant.paper.key if self.variant else ""

    @property
    def family(self) -> str:
        return self.variant.spec.family if self.variant else "unknown"

    @property
    def image_size(self) -> int | None:
        return self.variant.spec.image_size if self.variant else None

    @property
    def published_top1(self) -> float | None:
        """The first top-1 that the paper's file lists for this variant and whose source was read,
        in percent."""
        if self.variant is None or self.variant.track != self.track:
            return None
        for row in self.variant.paper.facts.published:
            found = row.of == self.name and row.metric == "top1" and row.seen
            if found and isinstance(row.value, float | int):
                return float(row.value)
        return None

    def cell(self, metric: str, view: View | None) -> Cell | None:
        """The cell of a metric; times and memory are those of `view`.

        Memory that was not measured in the view's setting is that of the nearest one on the same
        machine and device: its batch size first (`batch_of` tells it), then the eager form.
        """
        if metric not in SPEEDS:
            return self.fixed.get(metric)
        if view is None or metric in TIMES:
            return self.speeds.get(view, {}).get(metric)
        near = [
            (one.batch_size != view.batch_size, one.backend != view.backend, one, cells[metric])
            for one, cells in self.speeds.items()
            if metric in cells and (one.machine, one.device) == (view.machine, view.device)
        ]
        return min(near, key=lambda found: found[:3])[3] if near else None


@dataclass
class Board:
    """Everything the pages show.

    Attributes:
        records: all records that were read, for provenance and experiments.
        notices: what a reader must know about the input: torn lines, broken papers.
    """

    rows: list[Row]
    views: list[View]
    papers: list[Paper]
    records: list[Record]
    notices: list[str]

    @property
    def default_view(self) -> View | None:
        """The view with the most timed rows; the plainest setting where several tie."""

        def rank(view: View) -> tuple:
            timed = sum(view in row.speeds for row in self.rows)
            plain = (view.backend == "eager", -view.batch_size, -view.threads)
            return timed, plain

        return max(self.views, key=rank, default=None)

    @property
    def machines(self) -> list[str]:
        return sorted({view.machine for view in self.views})

    @property
    def tracks(self) -> list[str]:
        """Tracks, the one with most rows first; models that nobody registered come last."""
        names = [row.track for row in self.rows]
        return sorted(set(names), key=lambda name: (name == NO_TRACK, -names.count(name), name))


def read_all(store: RecordStore, papers: Iterable[Paper]) -> tuple[list[Record], list[str]]:
    """The store's records and those shipped with the papers; and what could not be read.

    Raises:
        ReplivitError: a file cannot be opened.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = store.load()
        for paper in papers:
            for folder in ("weights", "results"):
                for path in sorted((paper.directory / folder).glob("*.records.jsonl")):
                    records += read_records(path)
    unique = {record.model_dump_json(): record for record in records}
    ordered = sorted(unique.values(), key=lambda record: record.started)
    return ordered, [_without_folder(str(one.message), store.folder) for one in caught]


def _without_folder(message: str, folder: Path) -> str:
    return message.replace(f"{folder}/", "")


def pick(records: Iterable[Record]) -> Cell | None:
    """The cell of records that differ in time only: the newest sound one.

    A disturbed number (noisy, contended) counts where there is no undisturbed one, a failure
    where there is no number; a failure newer than the number is remembered.
    """
    ordered = sorted(records, key=lambda record: record.started)
    if not ordered:
        return None
    measured = [one for one in ordered if one.measured]
    sound = [one for one in measured if one.status == "ok"]
    chosen = (sound or measured or ordered)[-1]
    newest = ordered[-1]
    failure = newest if chosen.measured and not newest.measured else None
    return Cell(
        chosen.metric, chosen.value, chosen.interval, chosen.status, chosen.reason,
        (chosen,), later_failure=failure,
    )  # fmt: skip


def _recipe_of(record: Record) -> str:
    """What must be equal for two trained seeds to be averaged."""
    training = record.detail.get("training")
    training = training if isinstance(training, dict) else {}
    said = ("recipe", "objective", "starts_trained", "frozen", "held_out")
    return json.dumps([training.get(key) for key in said], sort_keys=True)


def over_seeds(records: Iterable[Record]) -> Cell | None:
    """The accuracy of one variant on one track: mean over the seeds of one recipe.

    Of several recipes the one with the most seeds counts, then the newest. Without seeds (given
    weights) the newest record counts.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        trained = record.conditions.seed is not None
        groups[trained, _recipe_of(record), record.conditions.data_fingerprint].append(record)
    cells = []
    for (trained, *_), group in groups.items():
        by_seed = defaultdict(list)
        for record in group:
            by_seed[record.conditions.seed].append(record)
        picked = [pick(same) for same in by_seed.values()]
        runs = tuple(
            sorted((one.record for one in picked if one.record.measured), key=lambda r: r.started)
        )
        if not trained or len(runs) < 2:
            cells.append(max(picked, key=lambda one: (one.record.measured, one.record.started)))
            continue
        summary = mean_std([one.value for one in runs])
        status = next((one.status for one in runs if one.status != "ok"), "ok")
        cells.append(
            Cell(
                runs[0].metric, summary.mean, summary.interval, status, None, runs,
                std=summary.std,
            )
        )  # fmt: skip
    best = max(
        cells,
        key=lambda cell: (cell.value is not None, cell.seeds, cell.record.started),
        default=None,
    )
    given = [cell.record for cell in cells if cell.seeds == 0 and cell is not best]
    return replace(best, also=tuple(given)) if best and given else best


def is_standard(record: Record, variant: Variant | None) -> bool:
    """Whether a record speaks of the variant as its paper declares it."""
    given = record.conditions
    if given.options:
        return False
    if variant is None:
        return True
    spec = variant.spec
    if given.image_size not in (None, spec.image_size):
        return False
    return record.metric in ACCURACIES or given.num_classes in (None, spec.num_classes)


def collect(store: RecordStore, papers: list[Paper]) -> Board:
    """Read every record and arrange it by variant, track, machine and setting.

    Raises:
        ReplivitError: a file of records cannot be opened.
    """
    records, notices = read_all(store, papers)
    notices += [f"paper {one.key} is left out: {one.broken}" for one in papers if one.broken]
    return arrange(records, papers, notices)


def arrange(records: list[Record], papers: list[Paper], notices: list[str]) -> Board:
    """The board of some records (see `collect`)."""
    known = {
        name: Variant(name, paper, spec)
        for paper in papers
        if paper.facts
        for name, spec in paper.facts.variants.items()
    }
    by_variant: dict[str, list[Record]] = {name: [] for name in known}
    for record in records:
        if record.metric != "experiment" and is_standard(record, known.get(record.variant)):
            by_variant.setdefault(record.variant, []).append(record)

    rows = []
    for name, mine in by_variant.items():
        variant = known.get(name)
        scored = {r.conditions.track for r in mine if r.metric in ACCURACIES} - {None}
        own = variant.track if variant else min(scored, default=NO_TRACK)
        others = sorted(scored - {own})
        fixed, speeds = _counts(mine), _speeds(mine)
        for track in (own, *others):
            accuracies = {
                metric: over_seeds(same)
                for metric in ACCURACIES
                if (same := [r for r in mine if (r.metric, r.conditions.track) == (metric, track)])
            }
            rows.append(Row(name, track, variant, {**fixed, **accuracies}, speeds))
    views = sorted({view for row in rows for view in row.speeds if is_timed(row.speeds[view])})
    board = Board(rows, views, papers, records, notices)
    tracks, view = board.tracks, board.default_view
    board.rows.sort(key=lambda row: _place(row, tracks, view))
    return board


def is_timed(cells: dict[str, Cell]) -> bool:
    """Whether a setting's cells hold a time, and not memory alone."""
    return any(metric in cells for metric in TIMES)


def _place(row: Row, tracks: list[str], view: View | None) -> tuple:
    """The order of a fresh page: the largest track first, in it the fastest model first."""
    cell = row.cell("latency_ratio", view)
    timed = cell is not None and cell.value is not None
    return tracks.index(row.track), not timed, cell.value if timed else 0, row.name


def _counts(records: list[Record]) -> dict[str, Cell]:
    """Counts are those of the eager form; the deployment form has fewer parameters."""
    grouped = defaultdict(list)
    for record in records:
        if record.metric in COUNTS and record.conditions.backend == "eager":
            grouped[record.metric].append(record)
    return {metric: pick(same) for metric, same in grouped.items()}


def _speeds(records: list[Record]) -> dict[View, dict[str, Cell]]:
    grouped = defaultdict(list)
    for record in records:
        if record.metric in SPEEDS:
            grouped[View.of(record), record.metric].append(record)
    speeds: dict[View, dict[str, Cell]] = defaultdict(dict)
    for (view, metric), same in grouped.items():
        speeds[view][metric] = pick(same)
    return dict(speeds)
