"""Networks at the published multiply-adds, found by size alone: `a0` to `a5` in networks.yaml.

    python -m reproductions.nasvit.search

A stand-in until there is a trained supernet: the evolution of `evolution.py` runs as it would, but
its fitness is a network's number of parameters, so it looks for the largest network of each budget.
"""

from __future__ import annotations

from collections.abc import Mapping

from reproductions.nasvit.counting import params_of
from reproductions.nasvit.evolution import Evolution, Settings, config_of
from reproductions.nasvit.space import NASVIT, Config

#: Published multiply-adds, in millions.
TARGETS = {"a0": 208, "a1": 309, "a2": 421, "a3": 528, "a4": 591, "a5": 757}
#: How far below its target a network may stay, in millions.
SLACK = 2.0
SETTINGS = Settings(population=128, mutations=64, crossovers=64, iterations=60, min_macs=189.0,
                    max_macs=757.0, bucket=4.0)  # fmt: skip


def find(
    settings: Settings = SETTINGS, seed: int = 0, targets: Mapping[str, float] = TARGETS
) -> dict[str, Config]:
    """The largest network met at most `SLACK` below each target.

    Raises:
        ValueError: none was met below one of them.
    """

    def size(configs: list[Config]) -> list[float]:
        return [params_of(NASVIT, one) for one in configs]

    result = Evolution(NASVIT, size, settings, seed=seed).run()
    return {
        name: config_of(NASVIT, result.best(target - SLACK, target).genes)
        for name, target in targets.items()
    }


if __name__ == "__main__":
    for name, config in find().items():
        print(f"{name}: {params_of(NASVIT, config):,} parameters, {config}")
