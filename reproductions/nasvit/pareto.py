"""One training, many networks: accuracy against multiply-adds inside a single supernet.

Evolution looks for the best network of every size, steered by training images that the supernet did
not see; the test split judges what it found, beside the smallest, the largest and random networks.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import ExperimentResult, Finding
from harness.checkpoints import file_sha256
from harness.environment import home
from harness.evolution import Workers
from harness.statistics import mcnemar
from reproductions.nasvit.counting import macs_of, params_of
from reproductions.nasvit.evolution import Evolution, SearchResult, Settings, config_of
from reproductions.nasvit.experiment_setup import (
    ALL,
    SCALES,
    Bench,
    Setting,
    choose_setting,
)
from reproductions.nasvit.judging import BLUE, GREEN, GREY, ORANGE
from reproductions.nasvit.space import Config, get_space
from reproductions.nasvit.supernet import Supernet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUCKETS = 12  # into which the space's range of multiply-adds is divided
#: Options that make another search of the same supernet.
SIZES = ("population", "mutations", "crossovers", "iterations", "search_images",
         "calibration_batches")  # fmt: skip


def pareto(scale: str = "small", **options: Any) -> ExperimentResult:
    """The accuracies that one supernet holds, from its smallest network to its largest.

    Args:
        scale: `small` (fashion_mini, on a CPU), `tiny` (does it run?) or `paper` (ImageNet).
        options: fields of `Setting`; only the first seed is used.
    """
    setting = choose_setting(scale, options)
    bench, seed = Bench(setting), setting.seeds[0]
    supernet, trained = bench.supernet(ALL, seed)
    weights = file_sha256(trained.weights)
    found = _search(setting, bench, supernet, weights)
    judge = bench.judge(supernet)
    space, rng = get_space(setting.space), random.Random(seed)
    chosen = {
        "smallest": [space.smallest()],
        "found": [config_of(space, one.genes) for one in found.front()],
        "random": [space.sample(rng) for _ in range(setting.random_networks)],
        "largest": [space.largest()],
    }
    rows, bits = [], {}
    for kind, configs in chosen.items():
        for config in configs:
            bits[config] = judge.bits(config)
            rows.append(_row(kind, config, bits[config], bench, found))
    return ExperimentResult(
        rows=rows,
        findings=[_range_finding(rows), _largest_finding(found, bits, bench.num_classes)],
        figures={"pareto": _figure(rows, found)},
        notes=(
            f"{len(found.scores)} networks were scored on {setting.search_images} held-out "
            f"training images; the test split judges. {bench.protocol()}"
        ),
        conditions=bench.conditions(),
        detail={
            "scores": [vars(one) for one in found.scores.entries],
            "supernet_seconds": trained.value("train_time"),
            "weights_sha256": weights,
        },
    )  # fmt: skip


def _search(setting: Setting, bench: Bench, supernet: Supernet, weights: str) -> SearchResult:
    """The evolution; scores that are in its file are not computed again."""
    space = get_space(setting.space)
    low, high = (
        macs_of(space, one, bench.num_classes) / 1e6 for one in (space.smallest(), space.largest())
    )
    settings = Settings(
        population=setting.population, mutations=setting.mutations, crossovers=setting.crossovers,
        iterations=setting.iterations, min_macs=low, max_macs=high, bucket=(high - low) / BUCKETS,
    )  # fmt: skip
    identity = {
        "weights": weights,
        "images": setting.search_images,
        "calibration": setting.calibration_batches,
    }
    with Workers(bench.judge(supernet, searching=True), setting.workers) as fitness:
        search = Evolution(
            space, fitness, settings, num_classes=bench.num_classes, seed=setting.seeds[0],
            state=scores_file(setting, weights), identity=identity,
        )  # fmt: skip
        return search.run()


def scores_file(setting: Setting, weights: str) -> Path:
    """Where a search keeps its scores: a file per supernet, named by what is not as at `small`, so
    that a search of another size leaves the first one's scores alone."""
    usual = SCALES["small"]
    sizes = {name: getattr(setting, name) for name in SIZES}
    told = "".join(f"-{key}{one}" for key, one in sizes.items() if one != getattr(usual, key))
    folder = home() / "searches" / "nasvit" / setting.track
    return folder / f"pareto-{weights[:12]}{told}.jsonl"


def _row(
    kind: str, config: Config, bits: np.ndarray, bench: Bench, found: SearchResult
) -> dict[str, Any]:
    space, genes = found.space, config.genes
    searched = found.scores[genes].fitness if genes in found.scores else None
    return {
        "network": kind,
        "macs_m": round(macs_of(space, config, bench.num_classes) / 1e6, 3),
        "params_k": round(params_of(space, config, bench.num_classes) / 1e3, 1),
        "top1_held_out": None if searched is None else round(searched, 2),
        "top1_test": round(100 * float(bits.mean()), 2),
        "config": str(config),
    }


def _range_finding(rows: list[dict[str, Any]]) -> Finding:
    front = [row for row in rows if row["network"] in ("smallest", "found", "largest")]
    low, high = min(front, key=_macs), max(front, key=_macs)
    values = [row["top1_test"] for row in sorted(front, key=_macs)]
    # how often a larger network of the front is at least as good as the next smaller one
    rises = np.mean(np.diff(values) >= 0) if len(values) > 1 else 0.0
    return Finding(
        "Networks of many sizes come out of one training",
        "reproduced" if rises >= 0.5 and high["top1_test"] > low["top1_test"] else "deviates",
        f"{len(front)} networks from {low['macs_m']} M ({low['top1_test']} %) to "
        f"{high['macs_m']} M ({high['top1_test']} %); {100 * rises:.0f} % of the steps up in size "
        "gain or keep accuracy",
    )


def _macs(row: dict[str, Any]) -> float:
    return row["macs_m"]


def _largest_finding(
    found: SearchResult, bits: dict[Config, np.ndarray], num_classes: int
) -> Finding:
    """What the best network of the search loses or gains against the largest, image by image."""
    space = found.space
    best = config_of(space, max(found.front(), key=lambda one: one.fitness).genes)
    test = mcnemar(bits[best], bits[space.largest()])
    low, high = (100 * one for one in test.interval)
    macs = [macs_of(space, one, num_classes) / 1e6 for one in (best, space.largest())]
    return Finding(
        "A searched network keeps the largest one's accuracy at fewer multiply-adds",
        "reproduced" if low > -1 and macs[0] < macs[1] else "deviates",
        f"the best on held-out images has {macs[0]:.2f} M against {macs[1]:.2f} M: "
        f"{100 * test.difference:+.2f} points [{low:+.2f}, {high:+.2f}] over {test.n} test images, "
        f"p = {test.p_value:.2g}",
    )


def _figure(rows: list[dict[str, Any]], found: SearchResult) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    scores = found.scores.entries
    axes.scatter([one.cost / 1e6 for one in scores], [one.fitness for one in scores], s=9,
                 color=GREY, label="all that were looked at (held-out images)")  # fmt: skip
    styles = {"found": (BLUE, "o"), "random": (ORANGE, "x"), "smallest": (GREEN, "v"),
              "largest": (GREEN, "^")}  # fmt: skip
    for kind, (color, marker) in styles.items():
        own = sorted((row for row in rows if row["network"] == kind), key=_macs)
        axes.plot([row["macs_m"] for row in own], [row["top1_test"] for row in own], marker,
                  color=color, linestyle="-" if kind == "found" else "none",
                  label=f"{kind} (test split)")  # fmt: skip
    axes.set_xlabel("multiply-adds (M)")
    axes.set_ylabel("top-1 (%)")
    axes.set_title("One training, many networks", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
