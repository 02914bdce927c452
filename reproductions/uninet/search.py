"""The search: draw networks, train each a little, learn from their rewards; or only draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from reproductions.uninet.controller import PPO, Learner
from reproductions.uninet.space import Genes, SearchSpace, in_words


def reward(accuracy: float, macs: float, target: float, alpha: float = -0.07) -> float:
    """`accuracy * (macs / target) ** alpha`: twice the multiply-adds cost 5 % of the accuracy."""
    return accuracy * (macs / target) ** alpha


@dataclass(frozen=True)
class Score:
    """What became of one network: its accuracy on held-out images in %, costs, and reward."""

    genes: Genes
    accuracy: float
    macs: int
    params: int
    reward: float


#: Networks -> their scores, in order.
Evaluate = Callable[[Sequence[Genes]], Iterable[Score]]
#: Called after every batch with all scores so far.
Report = Callable[[Sequence[Score]], None]


@dataclass(frozen=True)
class Trace:
    """All scores of a search in the order of drawing; a network drawn twice stands there twice.

    Attributes:
        entropies: of the controller's decisions at each update, in nats; empty for random search.
    """

    scores: tuple[Score, ...]
    entropies: tuple[float, ...] = field(default=())

    @property
    def best(self) -> Score:
        """The highest reward; among equals the first."""
        return max(self.scores, key=lambda one: one.reward)

    @property
    def running_best(self) -> np.ndarray:
        """The best reward up to each evaluation, `(n,)`."""
        return np.maximum.accumulate([one.reward for one in self.scores])

    @property
    def rewards(self) -> np.ndarray:
        """In the order of drawing, `(n,)`."""
        return np.array([one.reward for one in self.scores])

    def rows(self, space: SearchSpace) -> list[dict[str, Any]]:
        """A row per evaluation, for the record."""
        return [
            {"evaluation": number, "reward": round(one.reward, 4),
             "accuracy": round(one.accuracy, 3), "macs": one.macs, "params": one.params,
             "genes": list(one.genes), "network": in_words(space.architecture(one.genes))}
            for number, one in enumerate(self.scores, 1)
        ]  # fmt: skip


def policy_search(
    space: SearchSpace,
    evaluate: Evaluate,
    evaluations: int,
    *,
    batch: int = 8,
    settings: PPO = PPO(),
    seed: int = 0,
    report: Report | None = None,
) -> Trace:
    """Let a controller draw `evaluations` networks, a batch at a time, and learn from each batch.

    It depends on `seed` and on the scores alone: run again with the same scores, it draws the same.

    Raises:
        ValueError: no evaluation, or no network in a batch.
    """
    _check(evaluations, batch)
    learner = Learner(space.choices, settings, seed)
    scores: list[Score] = []
    entropies: list[float] = []
    while len(scores) < evaluations:
        made = learner.draw(min(batch, evaluations - len(scores)))
        found = list(evaluate([tuple(genes) for genes in made.tolist()]))
        entropies.append(learner.learn(made, torch.tensor([one.reward for one in found])))
        scores += found
        if report:
            report(scores)
    return Trace(tuple(scores), tuple(entropies))


def random_search(
    space: SearchSpace,
    evaluate: Evaluate,
    evaluations: int,
    *,
    batch: int = 8,
    seed: int = 0,
    report: Report | None = None,
) -> Trace:
    """As many networks drawn uniformly: what a search has to beat.

    Raises:
        ValueError: as `policy_search`.
    """
    _check(evaluations, batch)
    rng, scores = np.random.default_rng(seed), []
    while len(scores) < evaluations:
        count = min(batch, evaluations - len(scores))
        scores += evaluate([space.sample(rng) for _ in range(count)])
        if report:
            report(scores)
    return Trace(tuple(scores))


def _check(evaluations: int, batch: int) -> None:
    if evaluations < 1 or batch < 1:
        raise ValueError("a search needs at least one evaluation and one network in a batch")
