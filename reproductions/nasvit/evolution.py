"""Which networks of a trained supernet are worth having: evolution with one champion per size.

NASViT's repository has the draws (sample, mutate, cross) and no search. The loop is that of
AlphaNet, by the same authors: evaluate everything, keep the best of each bucket of multiply-adds,
and draw the next candidates from these. Genes of networks outside the budget are drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.evolution import Genes, Score, Scores
from reproductions.nasvit.counting import macs_of
from reproductions.nasvit.space import GENES, Config, Space

MISSES = 20_000  # draws in a row outside the budget, then a search gives up

#: Configurations -> their fitness in order (higher is better).
Fitness = Callable[[list[Config]], Iterable[float]]


@dataclass(frozen=True)
class Settings:
    """How to search; sizes and probabilities are AlphaNet's.

    Attributes:
        population, mutations, crossovers: candidates at first, and then per iteration.
        iterations: after the first population.
        mutation_probability, crossover_probability: per gene.
        min_macs, max_macs, bucket: in millions of multiply-adds.

    Raises:
        ValueError: impossible sizes, or an empty budget.
    """

    population: int = 512
    mutations: int = 128
    crossovers: int = 128
    iterations: int = 20
    mutation_probability: float = 0.2
    crossover_probability: float = 0.5
    min_macs: float = 200.0
    max_macs: float = 1200.0
    bucket: float = 10.0

    def __post_init__(self) -> None:
        if self.population < 1 or min(self.mutations, self.crossovers, self.iterations) < 0:
            raise ValueError("a search needs a population of at least 1, and no other size below 0")
        for name in ("mutation_probability", "crossover_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not self.min_macs <= self.max_macs or self.bucket <= 0:
            raise ValueError(
                f"the budget is empty: {self.min_macs:g} to {self.max_macs:g} M multiply-adds in "
                f"buckets of {self.bucket:g} M"
            )


@dataclass
class SearchResult:
    """What a search leaves.

    Attributes:
        champions: bucket in M multiply-adds -> the best of it.
        scores: all that was evaluated, in order.
    """

    space: Space
    champions: dict[float, Score]
    scores: Scores

    def front(self) -> list[Score]:
        """Champions that no smaller network equals, smallest first."""
        front: list[Score] = []
        for one in sorted(self.champions.values(), key=lambda one: (one.cost, -one.fitness)):
            if not front or one.fitness > front[-1].fitness:
                front.append(one)
        return front

    def best(self, low: float = 0.0, high: float = float("inf")) -> Score:
        """The best of all that cost `low` to `high` M multiply-adds.

        Raises:
            ValueError: there is none.
        """
        inside = [one for one in self.scores.entries if low <= one.cost / 1e6 <= high]
        if not inside:
            raise ValueError(f"the search met no network of {low:g} to {high:g} M multiply-adds")
        return max(inside, key=lambda one: one.fitness)


def config_of(space: Space, genes: Genes) -> Config:
    """The configuration that `Config.genes` came from."""
    resolution, *rest = map(int, genes)
    lists = {}
    for gene in GENES:
        count = len(space.candidates[gene])
        lists[gene], rest = tuple(rest[:count]), rest[count:]
    return Config(resolution, **lists)


class Evolution:
    """One search: `Evolution(...).run()`.

    Args:
        fitness: scores configurations; called with new ones only.
        num_classes: of the networks whose multiply-adds are counted.
        seed: of the draws.
        state: the file of scores; None keeps them in memory.
        identity: what else makes two searches the same (weights, images, ...).

    Raises:
        ValueError: no network of the space can lie in the budget.
        ReplivitError: the file holds another search, or cannot be read or written.
    """

    def __init__(
        self,
        space: Space,
        fitness: Fitness,
        settings: Settings,
        *,
        num_classes: int = 1000,
        seed: int = 0,
        state: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        low, high = (self._millions(space, one, num_classes)
                     for one in (space.smallest(), space.largest()))  # fmt: skip
        if settings.max_macs < low or settings.min_macs > high:
            raise ValueError(
                f"no network of {space.name} has {settings.min_macs:g} to {settings.max_macs:g} M "
                f"multiply-adds; it can be {low:.3f} to {high:.3f} M"
            )
        self.space, self.fitness, self.settings = space, fitness, settings
        self.num_classes, self.rng = num_classes, random.Random(seed)
        known = {"space": space.name, "seed": seed, **asdict(settings), **(identity or {})}
        self.scores = Scores(state, known)
        self._met: dict[Genes, None] = {}  # in this run; the file may know later ones already

    @staticmethod
    def _millions(space: Space, config: Config, num_classes: int) -> float:
        return macs_of(space, config, num_classes) / 1e6

    def run(self) -> SearchResult:
        """Search to the end, or continue where the file of scores ends."""
        settings, space, rng = self.settings, self.space, self.rng
        first = [space.smallest()] if self._inside(space.smallest()) else []
        candidates = self._draw(lambda: space.sample(rng), settings.population - len(first))
        self._score(first + candidates, "random")
        for number in range(settings.iterations):
            kept = [config_of(space, one.genes) for one in self._champions().values()]
            mutated = self._draw(partial(self._mutate, kept), settings.mutations)
            crossed = self._draw(partial(self._cross, kept), settings.crossovers)
            self._score(mutated + crossed, f"iteration {number + 1}")
        return SearchResult(space, self._champions(), self.scores)

    def _mutate(self, kept: list[Config]) -> Config:
        probability = self.settings.mutation_probability
        return self.space.mutate(self.rng.choice(kept), probability, self.rng)

    def _cross(self, kept: list[Config]) -> Config:
        one, two = self.rng.choice(kept), self.rng.choice(kept)
        return self.space.cross(one, two, self.rng, self.settings.crossover_probability)

    def _inside(self, config: Config) -> bool:
        macs = self._millions(self.space, config, self.num_classes)
        return self.settings.min_macs <= macs <= self.settings.max_macs

    def _draw(self, draw: Callable[[], Config], count: int) -> list[Config]:
        """`count` configurations inside the budget.

        Raises:
            ValueError: the budget is so narrow that they cannot be found.
        """
        found: list[Config] = []
        misses = 0
        while len(found) < count:
            config = draw()
            if self._inside(config):
                found.append(config)
                misses = 0
                continue
            misses += 1
            if misses >= MISSES:
                raise ValueError(
                    f"{MISSES:,} draws found no network of {self.space.name} with "
                    f"{self.settings.min_macs:g} to {self.settings.max_macs:g} M multiply-adds"
                )
        return found

    def _score(self, candidates: list[Config], phase: str) -> None:
        genes = [one.genes for one in candidates]
        self.scores.fill(
            genes,
            lambda genes: self.fitness([config_of(self.space, one) for one in genes]),
            lambda genes: macs_of(self.space, config_of(self.space, genes), self.num_classes),
            phase,
        )
        self._met |= dict.fromkeys(genes)

    def _champions(self) -> dict[float, Score]:
        """The best of each bucket; among equals the earlier one."""
        champions: dict[float, Score] = {}
        width = self.settings.bucket
        for one in map(self.scores.__getitem__, self._met):
            bucket = round(one.cost / 1e6 / width) * width
            if bucket not in champions or one.fitness > champions[bucket].fitness:
                champions[bucket] = one
        return champions
