"""Random search without training: draw, keep what lies in the window, score, take the best.

Source: Sec. "search" of the paper as restated (8000 subnets, the highest score is retrained) and
official code `search_autoformer.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from harness.errors import ReplivitError

C = TypeVar("C")
#: The release draws this many candidates at once; their ids count from 0 in each such batch.
RELEASED_BATCH = 20
#: Draws in a row that bring nothing new before a window counts as empty, or as exhausted.
PATIENCE = 20_000


class SearchSpace(Protocol[C]):
    """What the search needs of a space: a name, random members, its smallest and its largest."""

    name: str

    def sample(self, rng: random.Random) -> C: ...
    def smallest(self) -> C: ...
    def largest(self) -> C: ...


class Scorer(Protocol[C]):
    """What the search needs of a proxy. `identity` says what a score depends on."""

    def __call__(self, config: C) -> float: ...
    def params(self, config: C) -> int: ...
    def identity(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Candidate(Generic[C]):
    """A subnet inside the window.

    Attributes:
        id: its number; in the released search its place in a batch of 20 draws, so ids repeat.
        params: parameters.
        score: None until it was scored.
        seconds: CPU time of scoring it; 0 where its twin was scored before.
    """

    id: int
    config: C
    params: int
    score: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class SearchResult(Generic[C]):
    """The trace of a search.

    Attributes:
        candidates: in the order of their draws; `best` has the highest score, the first of equals.
        drawn, rejected, repeated: draws in all, outside the window, and of a known subnet.
        exhausted: whether the window had fewer subnets than were asked for.
        crash: index of the candidate at which the released search stops with an error (see
            `Draws.crash`), or None.
    """

    candidates: list[Candidate[C]]
    drawn: int
    rejected: int
    repeated: int
    exhausted: bool
    crash: int | None = None

    @property
    def best(self) -> Candidate[C]:
        return max(self.candidates, key=lambda one: one.score)  # max keeps the first of equals

    @property
    def seconds(self) -> float:
        """CPU seconds of all scores."""
        return sum(one.seconds for one in self.candidates)

    @property
    def scored(self) -> int:
        """Subnets that were really scored."""
        return sum(one.seconds > 0 for one in self.candidates)


def random_search(
    space: SearchSpace[C],
    scorer: Scorer[C],
    population: int = 8000,
    window: tuple[float, float] = (3.0, 23.0),
    seed: int | random.Random = 0,
    *,
    faithful_to_release: bool = False,
    state: str | Path | None = None,
    workers: int = 1,
    quiet: bool = True,
) -> SearchResult[C]:
    """Score `population` random subnets inside a window of parameters; the best is the find.

    No subnet is scored twice. Draws outside the window do not count.

    Args:
        window: least and largest number of parameters, in M, both inside. The default is the
            release's; for space T it holds everything.
        seed: of the draws, or a generator to draw from.
        faithful_to_release: draw in batches of 20 with repeating ids, and let a subnet that is
            drawn twice count twice. Otherwise draws are single, and subnets distinct.
        state: a file (JSON lines) that every score is appended to. The same search with the same
            file goes on where it was stopped.
        workers: processes that score, each on one thread.
        quiet: no progress display.

    Raises:
        ValueError: nothing of the space lies in the window, or numbers that make no sense.
        ReplivitError: the file belongs to another search.
    """
    if population < 1 or workers < 1:
        raise ValueError(f"population and workers must be at least 1, not {population}, {workers}")
    check_window(space, scorer, window)
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    draws = Draws(space, scorer.params, window, rng, faithful_to_release)
    found = draws.take(population)
    trace = Trace(state, _identity(space, scorer, window, seed, faithful_to_release))
    scored = _score_all(found, scorer, trace, workers, quiet)
    return SearchResult(
        scored, draws.drawn, draws.rejected, draws.repeated, len(found) < population, draws.crash
    )


def check_window(
    space: SearchSpace[C], scorer: Scorer[C], window: tuple[float, float]
) -> tuple[float, float]:
    """Return the window if it overlaps with the space's sizes.

    Raises:
        ValueError: it does not; the sizes that exist are named.
    """
    low, high = window
    ends = [scorer.params(one) / 1e6 for one in (space.smallest(), space.largest())]
    if not low <= high:
        raise ValueError(f"a window starts below its end, not {low:g} to {high:g} M parameters")
    if high < ends[0] or low > ends[1]:
        raise ValueError(
            f"no subnet of {space.name} has {low:g} to {high:g} M parameters; the space holds "
            f"{ends[0]:.3f} to {ends[1]:.3f} M"
        )
    return low, high


@dataclass
class Draws(Generic[C]):
    """Random members of a space inside a window, with the tally of all draws.

    Attributes:
        crash: where the released search would have stopped. It counts parameters on slices with
            gradients; blocks of a rejected candidate beyond the depth of the next accepted one
            keep such slices, and these cannot be copied. Here the count is analytic, and only the
            place is noted.
    """

    space: SearchSpace[C]
    params: Callable[[C], int]
    window: tuple[float, float]
    rng: random.Random
    faithful: bool = False
    drawn: int = 0
    rejected: int = 0
    repeated: int = 0
    crash: int | None = None
    _deepest_rejected: int = 0

    def take(self, count: int) -> list[Candidate[C]]:
        """`count` candidates, or fewer where the window has no more different ones.

        Raises:
            ValueError: not one was found.
        """
        found: list[Candidate[C]] = []
        known: set[C] = set()
        waited = 0
        for number, config in self._stream():
            params = self.params(config)
            new = config not in known
            if not self._inside(params):
                self.rejected += 1
                self._deepest_rejected = max(self._deepest_rejected, _blocks(config))
            else:
                self.repeated += not new
                if new or self.faithful:
                    self._note_crash(config, len(found))
                    identity = number if self.faithful else len(found)
                    found.append(Candidate(identity, config, params))
                    known.add(config)
                    waited = -1
            waited += 1
            if len(found) == count or waited == PATIENCE:
                break
        if not found:
            low, high = self.window
            raise ValueError(
                f"none of {self.drawn} random subnets of {self.space.name} has {low:g} to {high:g} "
                "M parameters; widen the window"
            )
        return found

    def _stream(self) -> Iterator[tuple[int, C]]:
        size = RELEASED_BATCH if self.faithful else 1
        while True:
            batch = [self.space.sample(self.rng) for _ in range(size)]
            for number, config in enumerate(batch):
                self.drawn += 1
                yield number, config

    def _inside(self, params: int) -> bool:
        return self.window[0] <= params / 1e6 <= self.window[1]

    def _note_crash(self, config: C, index: int) -> None:
        if self.crash is None and _blocks(config) < self._deepest_rejected:
            self.crash = index
        self._deepest_rejected = 0


def _blocks(config: Any) -> int:
    """Blocks of a configuration; a PiT's are counted over its stages."""
    return config.depth if isinstance(config.depth, int) else sum(config.depth)


# ---- scoring -------------------------------------------------------------------------------------


@dataclass
class Trace:
    """Scores on disk: a line that says which search this is, then a line for every score."""

    path: str | Path | None
    identity: dict[str, Any]
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = Path(self.path) if self.path is not None else None
        if self.path is None:
            return
        lines = self._read()
        if lines and lines[0] != self.identity:
            differs = ", ".join(
                key for key in {**self.identity, **lines[0]}
                if lines[0].get(key) != self.identity.get(key)
            )  # fmt: skip
            raise ReplivitError(f"{self.path} belongs to another search (it differs in {differs})")
        for line in lines[1:]:
            self.scores[line["config"]] = (line["score"], line["seconds"])
        if not lines:
            self._append(self.identity)

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; one that a kill has torn is left out."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
        if not all(isinstance(line, dict) for line in lines):
            raise ReplivitError(f"{self.path} is not the trace of a search")
        return lines

    def add(self, config: Any, score: float, seconds: float) -> None:
        self.scores[str(config)] = (score, seconds)
        if self.path is not None:
            self._append({"config": str(config), "score": score, "seconds": seconds})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell() and not _ends_in_newline(file):
                    file.write(b"\n")
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise ReplivitError(f"cannot write {self.path}: {error.strerror or error}") from error


def _ends_in_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def _identity(
    space: SearchSpace, scorer: Scorer, window: tuple[float, float], seed: Any, faithful: bool
) -> dict[str, Any]:
    """What a trace belongs to; a longer search goes on in the file of a shorter one."""
    given = {
        "space": space.name, "window": list(window), "faithful_to_release": faithful,
        "seed": seed if isinstance(seed, int) else "given", **scorer.identity(),
    }  # fmt: skip
    return json.loads(json.dumps(given))


def _score_all(
    found: list[Candidate[C]], scorer: Scorer[C], trace: Trace, workers: int, quiet: bool
) -> list[Candidate[C]]:
    known = trace.scores
    waiting = list(dict.fromkeys(one.config for one in found if str(one.config) not in known))
    best = max((score for score, _ in trace.scores.values()), default=float("-inf"))
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[best]}"))
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("scoring", total=len(waiting), best="")
        scores = _scores(waiting, scorer, workers)
        for config, (score, seconds) in zip(waiting, scores, strict=True):
            trace.add(config, score, seconds)
            best = max(best, score)
            bar.update(task, advance=1, best=f"best {best:.5g}")
    scored, seen = [], set()
    for one in found:
        score, seconds = trace.scores[str(one.config)]
        again = one.config in seen
        seen.add(one.config)
        scored.append(Candidate(one.id, one.config, one.params, score, 0.0 if again else seconds))
    return scored


def _scores(configs: list[C], scorer: Scorer[C], workers: int) -> Iterator[tuple[float, float]]:
    """Score and CPU seconds of each configuration, in order."""
    if workers == 1 or len(configs) < 2:
        yield from (_timed(scorer, config) for config in configs)
        return
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (scorer,)
    ) as pool:
        yield from pool.map(_in_worker, configs, chunksize=1)


def _timed(scorer: Callable[[C], float], config: C) -> tuple[float, float]:
    tick = time.process_time()
    return scorer(config), time.process_time() - tick


_scorer: Callable | None = None  # of a worker process


def _start_worker(scorer: Callable) -> None:
    global _scorer
    _scorer = scorer
    torch.set_num_threads(1)


def _in_worker(config: Any) -> tuple[float, float]:
    return _timed(_scorer, config)
