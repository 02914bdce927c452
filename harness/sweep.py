"""The sweep: many cells, each in a fresh process; resumable, and no failure stops it.

Counting, memory and accuracy do not depend on a quiet machine and run side by side; whatever is
timed runs alone afterwards. Records are appended after each cell, so a sweep that ends early, in
whatever way, loses at most the cells under way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from harness.environment import capture, home
from harness.errors import ReplivitError
from harness.measurement.cell import GROUPS, Cell, get_profile, is_measured, shipped_sha256
from harness.measurement.isolation import TIMED, Worker, end_workers, run_isolated
from harness.measurement.sentinels import available_cpus
from harness.record import Record, RecordStore, new_run_id
from harness.registry import Variant, get_variant
from harness.registry import variants as all_variants

#: Seconds per cell before this run has measured any of its kind; only for the remaining time.
TYPICAL_S = {"counts": 4, "accuracy": 8, "memory_inference": 2, "memory_training": 6}
OVERHEAD_S = 3.0
#: Least seconds of timing for one latency cell, however small the budget.
LEAST_TIMING_S = 2.0
#: Images per training step whose memory is measured: batch norm cannot train on one.
TRAINING_BATCH = 8


@dataclass(frozen=True)
class Step:
    """What `run_sweep` tells its `progress`: a cell starts (`records` None) or is done."""

    cell: Cell
    done: int
    total: int
    seconds_left: float
    records: tuple[Record, ...] | None = None


@dataclass
class Summary:
    """How a sweep went: cells by how they ended, and seconds in all."""

    measured: int = 0
    skipped: int = 0
    statuses: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """One sentence per cell that has no value."""
        sentences = (
            f"{record.variant}, {record.metric}: {record.reason}"
            for record in self.records
            if not record.measured and record.metric != "latency_ratio"
        )
        return list(dict.fromkeys(sentences))


def plan(
    variants: Iterable[Variant | str] | None = None,
    profile: str = "quick",
    *,
    device: str = "cpu",
    threads: int = 1,
) -> list[Cell]:
    """The cells of a profile for some variants.

    Without names all are counted and, where weights are shipped, scored; `quick` then leaves
    memory and latency to the variants that their paper puts into the showcase.

    `quick`: counts; memory of inference (batch 1) and of a training step (batch 8); top-1 of
    shipped weights; latency at batch 1, eager, and in the deployment form for reproductions.
    `full`: latency at batch 1, 8 and 32 eager, deployed and compiled; memory at 1 and 32.

    Raises:
        ReplivitError: unknown variant or profile.
    """
    get_profile(profile)
    chosen = all_variants() if variants is None else variants
    cells = []
    for one in chosen:
        variant = get_variant(one) if isinstance(one, str) else one
        common = {"device": device, "threads": threads, "profile": profile}
        cells.append(Cell(variant.name, "counts"))
        cells += [
            Cell(variant.name, "accuracy", track=track, batch_size=64, **common)
            for track in variant.spec.weights
        ]
        if variants is None and profile == "quick" and not variant.in_showcase:
            continue
        small, large = (1, TRAINING_BATCH), (32, 32)
        for inference, training in (small, large) if profile == "full" else (small,):
            cells.append(Cell(variant.name, "memory_inference", batch_size=inference, **common))
            cells.append(Cell(variant.name, "memory_training", batch_size=training, **common))
        for batch_size, backend in _timings(variant, profile):
            cells.append(
                Cell(variant.name, "latency", batch_size=batch_size, backend=backend, **common)
            )
    return cells


def _timings(variant: Variant, profile: str) -> list[tuple[int, str]]:
    """Batch sizes and backends at which a profile times a variant."""
    if profile == "full":
        return [(b, backend) for b in (1, 8, 32) for backend in ("eager", "deploy", "compile")]
    if variant.paper.facts.reference:
        return [(1, "eager")]
    return [(1, "eager"), (1, "deploy")]


def missing(
    cells: Iterable[Cell], known: list[Record], *, machine: str | None = None, retry: bool = False
) -> list[Cell]:
    """The cells without a full set of records among `known`.

    Args:
        machine: where the records must have been made; default this machine.
        retry: whether records that are noisy, contended or failed do not count.
    """
    machine = machine or capture().machine
    by_variant: dict[str, list[Record]] = {}
    for record in known:
        if record.status == "ok" or not retry:
            by_variant.setdefault(record.variant, []).append(record)

    def is_missing(cell: Cell) -> bool:
        sha = shipped_sha256(cell.variant, cell.track) if cell.group == "accuracy" else None
        found = {
            record.metric
            for record in by_variant.get(cell.variant, ())
            if is_measured(cell, record, machine, sha)
        }
        return not found.issuperset(GROUPS[cell.group])

    return [cell for cell in cells if is_missing(cell)]


def run_sweep(
    cells: Iterable[Cell],
    store: RecordStore | None = None,
    progress: Callable[[Step], None] | None = None,
    *,
    jobs: int | None = None,
    budget_minutes: float | None = None,
    retry: bool = False,
    fresh: bool = False,
) -> Summary:
    """Measure the cells that have no record of this machine yet.

    Args:
        progress: told of each cell's start and end, from this thread.
        jobs: processes side by side for what is not timed; default by cores and memory.
        budget_minutes: timing is shortened, down to `LEAST_TIMING_S` a cell, to end in time.
        retry: measure noisy, contended and failed cells again.
        fresh: measure everything again.

    Raises:
        ReplivitError: the store cannot be written, or a cell is impossible on this machine.
        KeyboardInterrupt: Ctrl-C; records of the finished cells are in the store.
    """
    store = store or RecordStore()
    cells = list(cells)
    for cell in cells:
        cell.check()
    known = [] if fresh else store.load()
    todo = cells if fresh else missing(cells, known, retry=retry)
    sweep = _Sweep(todo, store, known, progress or (lambda step: None), budget_minutes)
    sweep.summary.skipped = len(cells) - len(todo)
    return sweep.run(jobs or _side_by_side())


def _side_by_side() -> int:
    """Processes at once: one per core, four at most, 4 GiB for each."""
    return max(1, min(len(available_cpus()), 4, int(capture().memory_gib // 4)))


class _Sweep:
    """One run over the missing cells: phases, order, remaining time, records."""

    def __init__(
        self,
        todo: list[Cell],
        store: RecordStore,
        known: list[Record],
        progress: Callable[[Step], None],
        budget_minutes: float | None,
    ) -> None:
        self.left = list(todo)
        self.total = len(todo)
        self.store = store
        self.progress = progress
        self.budget_s = None if budget_minutes is None else 60 * budget_minutes
        self.summary = Summary()
        self.run_id = new_run_id()
        self.start = time.monotonic()
        self.spent: dict[str, list[float]] = {}
        self.overheads: list[float] = []
        self.macs = {r.variant: r.value for r in known if r.metric == "macs" and r.measured}

    def run(self, jobs: int) -> Summary:
        """Counts first (they order the rest), then what runs side by side, then timing alone."""
        phases = (
            (jobs, lambda cell: cell.group == "counts"),
            (jobs, lambda cell: cell.group not in TIMED and cell.device == "cpu"),
            (1, lambda cell: True),
        )
        try:
            for width, belongs in phases:
                phase = self._cheap_first([cell for cell in self.left if belongs(cell)])
                self._run_phase(phase, width)
        finally:
            self.summary.seconds = time.monotonic() - self.start
        return self.summary

    def _cheap_first(self, cells: list[Cell]) -> list[Cell]:
        groups = list(GROUPS)
        return sorted(
            cells,
            key=lambda cell: (
                groups.index(cell.group),
                self.macs.get(cell.variant, 0) * cell.batch_size,
            ),
        )

    def _run_phase(self, cells: list[Cell], width: int) -> None:
        if not cells:
            return
        threads = max(cell.threads for cell in cells)
        if width == 1:
            with Worker(threads) as worker:
                for cell in cells:
                    self.progress(self._step(cell))
                    self._finish(cell, *self._timed_run(self._shortened(cell), worker))
            return
        self.progress(self._step(cells[0]))
        idle: SimpleQueue[Worker] = SimpleQueue()

        def run(cell: Cell) -> tuple[list[Record], float]:
            worker = idle.get()
            try:
                return self._timed_run(cell, worker)
            finally:
                idle.put(worker)

        with ExitStack() as stack:  # the pool is left first: its threads still use the workers
            for _ in range(width):
                idle.put(stack.enter_context(Worker(threads)))
            pool = stack.enter_context(ThreadPoolExecutor(width))
            waiting = {pool.submit(run, cell): cell for cell in cells}
            try:
                for future in as_completed(waiting):
                    self._finish(waiting[future], *future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                end_workers()
                raise

    def _timed_run(self, cell: Cell, worker: Worker) -> tuple[list[Record], float]:
        tick = time.monotonic()
        return run_isolated(cell, self.run_id, worker), time.monotonic() - tick

    def _finish(self, cell: Cell, records: list[Record], seconds: float) -> None:
        self.store.append(records)
        self.left.remove(cell)
        self.spent.setdefault(cell.group, []).append(seconds)
        if cell.group == "latency" and "session" in records[0].detail:
            self.overheads.append(seconds - records[0].detail["session"]["seconds"])
        self.macs |= {r.variant: r.value for r in records if r.metric == "macs" and r.measured}
        self.summary.measured += 1
        self.summary.statuses[records[0].status if records else "failed"] += 1
        self.summary.records += records
        self.progress(self._step(cell, tuple(records)))

    def _step(self, cell: Cell, records: tuple[Record, ...] | None = None) -> Step:
        return Step(cell, self.total - len(self.left), self.total, self._seconds_left(), records)

    def _usual_s(self, cell: Cell) -> float:
        """Seconds a cell of this kind took so far, else a guess."""
        spent = self.spent.get(cell.group)
        if spent:
            return sum(spent) / len(spent)
        guess = self._overhead_s() + get_profile(cell.profile).budget_s
        return TYPICAL_S.get(cell.group, guess)

    def _seconds_left(self) -> float:
        light = sum(self._usual_s(cell) for cell in self.left if cell.group not in TIMED)
        timed = sum(self._usual_s(cell) for cell in self.left if cell.group in TIMED)
        return light / _side_by_side() + timed

    def _overhead_s(self) -> float:
        """What a latency cell takes beside timing: building, warm-up."""
        return sum(self.overheads) / len(self.overheads) if self.overheads else OVERHEAD_S

    def _shortened(self, cell: Cell) -> Cell:
        """A latency cell with its share of the time that is left."""
        if self.budget_s is None or cell.group != "latency" or "budget_s" in cell.effort:
            return cell
        rest = self.budget_s - (time.monotonic() - self.start)
        share = rest / sum(one.group == "latency" for one in self.left) - self._overhead_s()
        usual = get_profile(cell.profile).budget_s
        return replace(
            cell, effort={**cell.effort, "budget_s": max(LEAST_TIMING_S, min(usual, share))}
        )


def run_on_cluster(
    cells: Iterable[Cell],
    store: RecordStore | None = None,
    progress: Callable[[Step], None] | None = None,
    *,
    retry: bool = False,
    fresh: bool = False,
    parameters: dict[str, object] | None = None,
) -> Summary:
    """As `run_sweep`, each cell a job of the cluster (submitit; needs the extra `cluster`).

    A record of any machine counts as measured, since jobs do not choose theirs.

    Args:
        parameters: for `submitit.AutoExecutor.update_parameters` (`slurm_partition`, ...).

    Raises:
        ReplivitError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise ReplivitError(
            "a cluster sweep needs submitit: pip install 'replivit[cluster]'"
        ) from error
    store, cells = store or RecordStore(), list(cells)
    known = [] if fresh else store.load()
    machines = {record.environment.machine for record in known}
    todo = cells
    for machine in machines:
        todo = missing(todo, known, machine=machine, retry=retry)
    sweep = _Sweep(todo, store, known, progress or (lambda step: None), None)
    sweep.summary.skipped = len(cells) - len(todo)
    executor = submitit.AutoExecutor(folder=home() / "cluster")
    longest = max((cell.limit_s for cell in todo), default=60.0)
    executor.update_parameters(
        timeout_min=int(longest / 60) + 5,
        cpus_per_task=max((cell.threads for cell in todo), default=1),
        slurm_exclusive=True,  # a neighbour's job would disturb the timing
        **(parameters or {}),
    )
    jobs = {executor.submit(run_isolated, cell, sweep.run_id): cell for cell in todo}
    for job in submitit.helpers.as_completed(list(jobs)):
        cell = jobs[job]
        sweep._finish(cell, job.result(), 0.0)
    sweep.summary.seconds = time.monotonic() - sweep.start
    return sweep.summary
