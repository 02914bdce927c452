"""Evolution search for a subnet under a parameter budget (Sec. 3.3; official code: `evolution.py`).

A generation keeps the best candidates as parents, mutates and crosses them, and fills up with
random ones. Drawing candidates needs parameter counts only, so a generation is drawn first and then
scored at once, in parallel. Every score goes to a file as soon as it is known; a search that was
killed is simply run again, draws the same candidates, and finds their scores there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.evolution import Scores
from reproductions.autoformer.space import Config, Genes, Space

#: Configurations -> their fitness, in order and as soon as each is known (higher is better).
Fitness = Callable[[list[Config]], Iterable[float]]

BATCH = 10  # the released generators draw so many candidates at a time
TRIES = 10  # draws per wanted child
MISSES = 100_000  # random draws in a row without a legal candidate, then a search gives up


@dataclass(frozen=True)
class Settings:
    """How to search; the defaults are the released script's.

    Attributes:
        generations, population, parents, mutations, crossovers: sizes.
        layer_probability: of redrawing a ratio or a number of heads, layer by layer.
        global_probability: of redrawing the depth, and again for the dimension.
        min_params, max_params: the window, in millions of parameters.
        faithful_to_release: also do what looks unintended there: throw away the rest of a batch of
            ten candidates when a phase ends, and score a last generation that nobody looks at.

    Raises:
        ValueError: impossible sizes, or an empty window.
    """

    generations: int = 20
    population: int = 50
    parents: int = 10
    mutations: int = 25
    crossovers: int = 25
    layer_probability: float = 0.2
    global_probability: float = 0.4
    min_params: float = 18.0
    max_params: float = 23.0
    faithful_to_release: bool = False

    def __post_init__(self) -> None:
        if min(self.generations, self.population, self.parents) < 1:
            raise ValueError("generations, population and parents must be at least 1")
        if min(self.mutations, self.crossovers) < 0:
            raise ValueError("mutations and crossovers must be at least 0")
        if self.mutations + self.crossovers > self.population:
            raise ValueError(
                f"{self.mutations} mutations and {self.crossovers} crossovers are more than the "
                f"population of {self.population}"
            )
        if not self.min_params <= self.max_params:
            raise ValueError(
                f"the parameter window is empty: {self.min_params:g} to {self.max_params:g} M"
            )
        for name in ("layer_probability", "global_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")

    @property
    def evaluations(self) -> int:
        """How many candidates are scored, if every phase finds its children."""
        return self.population * (1 + self.generations)


RELEASED = Settings()
#: The probabilities as the paper is restated; in the code they stand the other way round.
PAPER = replace(RELEASED, layer_probability=0.4, global_probability=0.2)


def check_window(space: Space, count: Callable[[Config], int], low: float, high: float) -> None:
    """Refuse a parameter window that no candidate of the space can hit.

    Raises:
        ValueError: the window lies outside the space's range, which is named.
    """
    smallest, largest = count(space.smallest()) / 1e6, count(space.largest()) / 1e6
    if high < smallest or low > largest:
        raise ValueError(
            f"no candidate of {space.name} has {low:g} to {high:g} M parameters; it can be "
            f"{smallest:.3f} to {largest:.3f} M"
        )


@dataclass
class Generation:
    """A population that was scored, and the best so far."""

    candidates: list[Genes]
    best: list[Genes]


@dataclass
class SearchResult:
    """What a search leaves.

    Attributes:
        best: the best candidates, best first, at most 50.
        generations: population by population.
        scores: all that was evaluated, in order, with fitness and parameters.
        drawn: number of different candidates that were looked at, legal or not.
    """

    settings: Settings
    best: list[Config]
    generations: list[Generation]
    scores: Scores
    last: list[Genes] = field(default_factory=list)
    drawn: int = 0

    @property
    def winner(self) -> Config:
        return self.best[0]

    def trace(self) -> list[dict[str, Any]]:
        """A row per evaluation, in order, for records and plots."""
        rows, best = [], float("-inf")
        for number, entry in enumerate(self.scores.entries, 1):
            best = max(best, entry.fitness)
            rows.append({"evaluation": number, "fitness": entry.fitness, "best": best,
                         "params": entry.cost, "phase": entry.phase,
                         "config": Config.from_genes(entry.genes).as_dict()})  # fmt: skip
        return rows


class Evolution:
    """One search: `Evolution(...).run()`.

    Args:
        space: where candidates are drawn.
        count: parameters of a configuration.
        fitness: scores configurations.
        seed: of the draws, or a generator (the released script uses Python's global one).
        state: the file of scores; None keeps them in memory.
        identity: what else makes two searches the same (weights, images, ...).

    Raises:
        ValueError: no candidate can lie in the parameter window.
        ReplivitError: the file holds another search, or cannot be read or written.
    """

    def __init__(
        self,
        space: Space,
        count: Callable[[Config], int],
        fitness: Fitness,
        settings: Settings = RELEASED,
        seed: int | random.Random = 0,
        state: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        check_window(space, count, settings.min_params, settings.max_params)
        self.space, self.count, self.fitness, self.settings = space, count, fitness, settings
        self.rng = random.Random(seed) if isinstance(seed, int) else seed
        name = {"search": "evolution", "space": space.name, "seed": str(seed)}
        self.scores = Scores(state, {**name, **asdict(settings), **(identity or {})})
        self._params: dict[Genes, int] = {}
        self._chosen: set[Genes] = set()

    def run(self) -> SearchResult:
        """Search to the end, or continue where the file of scores ends."""
        settings = self.settings
        population = self._fill([])
        self._score(population, "random")
        parents: list[Genes] = []
        best: list[Genes] = []
        generations: list[Generation] = []
        for number in range(settings.generations):
            parents = self._top(parents + population, settings.parents)
            best = self._top(best + population, 50)
            generations.append(Generation(population, list(best)))
            mutated = self._draw(partial(self._mutate, parents), settings.mutations)
            crossed = self._draw(partial(self._cross, parents), settings.crossovers)
            population = self._fill(mutated + crossed)
            phase = f"generation {number + 1}"
            self._score(population, phase)
        if not settings.faithful_to_release:
            best = self._top(best + population, 50)
            generations.append(Generation(population, list(best)))
        return SearchResult(
            settings, [Config.from_genes(one) for one in best], generations, self.scores,
            last=population, drawn=len(self._params),
        )  # fmt: skip

    # scoring

    def _score(self, candidates: list[Genes], phase: str) -> None:
        self.scores.fill(
            candidates,
            lambda missing: self.fitness([Config.from_genes(one) for one in missing]),
            cost=self._count,
            phase=phase,
        )

    def _top(self, candidates: list[Genes], count: int) -> list[Genes]:
        """The best, best first; among equals the earlier one."""
        return sorted(candidates, key=lambda one: self.scores[one].fitness, reverse=True)[:count]

    # drawing

    def _legal(self, genes: Genes) -> bool:
        """New, and inside the window."""
        if genes in self._chosen:
            return False
        low, high = self.settings.min_params, self.settings.max_params
        return low <= self._count(genes) / 1e6 <= high

    def _count(self, genes: Genes) -> int:
        if genes not in self._params:
            self._params[genes] = self.count(Config.from_genes(genes))
        return self._params[genes]

    def _stream(self, draw: Callable[[], Genes]) -> Iterator[Genes]:
        """Candidates, one by one; as released, drawn ten at a time and looked at later."""
        while True:
            batch = [draw() for _ in range(BATCH if self.settings.faithful_to_release else 1)]
            for one in batch:
                self._count(one)
            yield from batch

    def _draw(self, draw: Callable[[], Genes], count: int) -> list[Genes]:
        """Up to `count` legal candidates; gives up after ten tries for each."""
        found: list[Genes] = []
        stream = self._stream(draw)
        for _ in range(TRIES * count):
            if len(found) == count:
                break
            genes = next(stream)
            if self._legal(genes):
                found.append(genes)
                self._chosen.add(genes)
        return found

    def _fill(self, candidates: list[Genes]) -> list[Genes]:
        """Random legal candidates up to the size of the population.

        Raises:
            ValueError: the window is so narrow that they cannot be found.
        """
        full, tries = list(candidates), 0
        stream = self._stream(lambda: self.space.sample(self.rng).genes)
        while len(full) < self.settings.population:
            genes = next(stream)
            tries += 1
            if self._legal(genes):
                full.append(genes)
                self._chosen.add(genes)
                tries = 0
            elif tries >= MISSES:
                raise ValueError(
                    f"{MISSES:,} draws found no new candidate of {self.space.name} with "
                    f"{self.settings.min_params:g} to {self.settings.max_params:g} M parameters"
                )
        return full

    def _mutate(self, parents: list[Genes]) -> Genes:
        """A parent with some genes drawn anew; the old value may come again."""
        rng, space, settings = self.rng, self.space, self.settings
        parent = Config.from_genes(rng.choice(parents))
        depth, dim = parent.depth, parent.embed_dim
        ratios, heads = list(parent.mlp_ratios), list(parent.num_heads)
        if rng.random() < settings.global_probability:
            depth = rng.choice(space.depths)
            added = range(depth - parent.depth)
            ratios = ratios[:depth] + [rng.choice(space.mlp_ratios) for _ in added]
            heads = heads[:depth] + [rng.choice(space.num_heads) for _ in added]
        for genes, choices in ((ratios, space.mlp_ratios), (heads, space.num_heads)):
            for layer in range(depth):
                if rng.random() < settings.layer_probability:
                    genes[layer] = rng.choice(choices)
        if rng.random() < settings.global_probability:
            dim = rng.choice(space.embed_dims)
        return Config(depth, dim, tuple(ratios), tuple(heads)).genes

    def _cross(self, parents: list[Genes]) -> Genes:
        """Each gene from one of two parents of the same depth, which may be the same one."""
        choice = self.rng.choice
        one, two = choice(parents), choice(parents)
        tries = 50
        while len(one) != len(two) and tries > 0:
            tries -= 1
            one, two = choice(parents), choice(parents)
        if len(one) != len(two):  # the released code mixes them up here; a copy is legal at least
            two = one
        return tuple(choice(pair) for pair in zip(one, two, strict=True))


def random_search(
    space: Space,
    count: Callable[[Config], int],
    fitness: Fitness,
    evaluations: int,
    settings: Settings = RELEASED,
    seed: int = 0,
    state: Path | None = None,
    identity: dict[str, Any] | None = None,
) -> SearchResult:
    """As many random candidates of the same window: what evolution has to beat.

    Raises:
        ValueError: no candidate can lie in the parameter window.
    """
    only_random = replace(settings, population=evaluations, mutations=0, crossovers=0)
    search = Evolution(space, count, fitness, only_random, seed, state,
                       {"search": "random", **(identity or {})})  # fmt: skip
    candidates = search._fill([])
    search._score(candidates, "random")
    best = search._top(candidates, 50)
    return SearchResult(only_random, [Config.from_genes(one) for one in best],
                        [Generation(candidates, best)], search.scores,
                        drawn=len(search._params))  # fmt: skip
