"""What every search over candidates needs: scores that outlive a kill, and several workers.

How candidates are drawn, and which of them survive, is a paper's own. A search draws, asks for
scores, and draws again; run again after a kill it draws the same candidates and finds their scores
in the file.

    scores = Scores(folder / "search.jsonl", identity={"seed": 0, "weights": sha256})
    with Workers(accuracy, count=2) as fitness:
        scores.fill(candidates, fitness, cost=macs, phase="generation 1")
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.errors import ReplivitError

#: A candidate as numbers in a row; what a file holds and a dictionary is indexed with.
Genes = tuple[int | float, ...]


@dataclass(frozen=True)
class Score:
    """One candidate's fitness (higher is better), what it costs, and where it came from."""

    genes: Genes
    fitness: float
    cost: float
    phase: str


class Scores:
    """Fitness by candidate, in the order of evaluation.

    The file's first line says which search it belongs to; every further line is one score, on the
    disk before the next candidate is taken up. A torn last line is dropped.

    Args:
        path: the file; None keeps the scores in memory only.
        identity: plain values that must agree for a file to be taken up again.

    Raises:
        ReplivitError: the file cannot be read or written, or belongs to another search.
    """

    def __init__(self, path: Path | None = None, identity: dict[str, Any] | None = None) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity or {}))
        self._known: dict[Genes, Score] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or not self._read(path):
                self._append({"identity": self.identity})
        except OSError as error:
            raise ReplivitError(f"cannot open {path}: {error.strerror}") from error

    def _read(self, path: Path) -> bool:
        """Take up what the file holds; whether there was a whole line."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote
            os.truncate(path, len(whole))
        if not whole:
            return False
        try:
            first, *rest = map(json.loads, whole.splitlines())
            before = first["identity"]
            scores = [Score(**{**one, "genes": tuple(one["genes"])}) for one in rest]
        except (ValueError, KeyError, TypeError) as error:
            raise ReplivitError(f"{path} is no file of scores; remove it") from error
        for key in {**before, **self.identity}:
            if before.get(key) != self.identity.get(key):
                raise ReplivitError(
                    f"{path} holds a search with {key} = {before.get(key)}, asked for is "
                    f"{self.identity.get(key)}; choose another file or remove this one"
                )
        self._known = {one.genes: one for one in scores}
        return True

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with open(self.path, "ab") as stream:
                stream.write(json.dumps(line).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise ReplivitError(f"cannot write {self.path}: {error.strerror}") from error

    def add(self, score: Score) -> None:
        """Note a new score, in memory and in the file."""
        self._known[score.genes] = score
        self._append(vars(score))

    def fill(
        self,
        candidates: Sequence[Genes],
        fitness: Callable[[list[Genes]], Iterable[float]],
        cost: Callable[[Genes], float],
        phase: str,
    ) -> None:
        """Score what has no score yet, and write each one down as soon as it is known."""
        missing = [one for one in dict.fromkeys(candidates) if one not in self._known]
        values = fitness(missing) if missing else ()
        for genes, value in zip(missing, values, strict=True):
            self.add(Score(genes, float(value), cost(genes), phase))

    @property
    def entries(self) -> list[Score]:
        return list(self._known.values())

    def __contains__(self, genes: Genes) -> bool:
        return genes in self._known

    def __getitem__(self, genes: Genes) -> Score:
        return self._known[genes]

    def __len__(self) -> int:
        return len(self._known)


class Workers:
    """Call a function on many candidates, in this process or in several of one thread each.

    `workers(candidates)` yields the values in order, each as soon as it is known. What was computed
    is remembered. As a context manager it ends its processes.

    Args:
        function: candidate -> value; picklable where there are workers, to which it goes once.
        count: processes beside this one; 0 computes here.
    """

    def __init__(self, function: Callable[[Any], float], count: int = 0) -> None:
        self.function, self.count = function, count
        self.known: dict[Hashable, float] = {}
        self._pool = None

    def __call__(self, candidates: Iterable[Hashable]) -> Iterator[float]:
        candidates = list(candidates)
        missing = [one for one in dict.fromkeys(candidates) if one not in self.known]
        values = iter(
            self._pool.imap(_call, missing) if self._pool else map(self.function, missing)
        )
        for one in candidates:
            if one not in self.known:
                self.known[one] = next(values)
            yield self.known[one]

    def __enter__(self) -> Workers:
        if self.count > 0:
            context = multiprocessing.get_context("spawn")
            self._pool = context.Pool(self.count, _start, (self.function,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool = None


_function: Callable[[Any], float] | None = None  # of a worker process


def _start(function: Callable[[Any], float]) -> None:
    global _function
    torch.set_num_threads(1)
    _function = function


def _call(candidate: Any) -> float:
    return _function(candidate)
