"""The search and the sharing of weights, rerun on a micro space.

Sizes, images and trainings are in `experiment_setup.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from harness import ExperimentResult, Finding, get_paper
from harness.checkpoints import file_sha256
from harness.environment import home
from harness.evolution import Workers
from harness.statistics import mcnemar, paired_means
from reproductions.autoformer.counting import params_of
from reproductions.autoformer.drawing import BLUE, GREY, ORANGE, draw_architecture, draw_trace
from reproductions.autoformer.evolution import Evolution, SearchResult, random_search
from reproductions.autoformer.experiment_setup import Bench, Setting, choose_setting
from reproductions.autoformer.fitness import InheritedAccuracy
from reproductions.autoformer.space import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harness.record import Record


def evolution(scale: str = "small", **options: Any) -> ExperimentResult:
    """Evolution against random search at equal evaluations, and its subnet against a plain ViT.

    One supernet is trained; both searches run on it several times, steered by held-out training
    images. Their winners are judged on the test split with inherited weights; the subnet that the
    first evolution found is trained from scratch, beside the plain ViT of the same size.

    Args:
        scale: `small` (fashion_mini, on a CPU), `tiny` (does it run?) or `paper` (ImageNet).
        options: fields of `Setting`.
    """
    setting = choose_setting(scale, options)
    bench = Bench(setting)
    supernet, trained = bench.entangled(setting.seeds[0])
    searches = _search(setting, bench, supernet, file_sha256(trained.weights))
    judge = InheritedAccuracy(supernet, bench.test_batches())
    rows, bits = [], {"evolution": [], "random": []}
    for name, results in searches.items():
        for seed, (result, seconds) in enumerate(results):
            bits[name].append(judge.bits(result.winner))
            rows.append(
                _row(
                    f"{name}, inherited", seed, result.winner, setting, bench.num_classes,
                    top1_search=result.scores[result.winner.genes].fitness,
                    top1_test=100 * float(bits[name][-1].mean()),
                    evaluations=len(result.scores), seconds=seconds,
                )
            )  # fmt: skip
    found = searches["evolution"][0][0].winner
    alone = [bench.alone(found, seed) for seed in setting.seeds]
    plain = [bench.plain(seed) for seed in setting.seeds]
    for seed, record in zip(setting.seeds, alone, strict=True):
        rows.append(_row("found, trained alone", seed, found, setting, bench.num_classes,
                         top1_test=record.value))  # fmt: skip
    for seed, record in zip(setting.seeds, plain, strict=True):
        rows.append({**dict.fromkeys(rows[0]), "what": setting.plain, "seed": seed,
                     "top1_test": record.value})  # fmt: skip
    return ExperimentResult(
        rows=rows,
        findings=[
            _search_finding(searches), _test_finding(bits),
            _inherited_finding(rows, alone), _plain_finding(setting, alone, plain),
        ],
        published=_published("weight sharing", "weight entanglement"),
        figures={"trace": _trace_figure(searches), "architecture": _architecture(setting, found)},
        notes=_evolution_notes(setting, trained, searches, found),
        conditions=bench.conditions(),
        detail={
            "traces": {name: [result.trace() for result, _ in results]
                       for name, results in searches.items()},
        },
    )  # fmt: skip


def _search(
    setting: Setting, bench: Bench, supernet: Any, weights: str
) -> dict[str, list[tuple[SearchResult, float]]]:
    """Both searches, for every seed, with the seconds each took (remembered scores are free)."""
    space = setting.search_space

    def count(config: Config) -> int:
        return params_of(space, config, bench.num_classes, setting.image_size)

    folder = home() / "searches" / "autoformer" / setting.track
    identity = {"weights": weights, "images": setting.search_images, "track": setting.track}
    wanted = 2 * setting.searches * setting.evolution.evaluations
    done: dict[str, list[tuple[SearchResult, float]]] = {"evolution": [], "random": []}
    accuracy = InheritedAccuracy(supernet, bench.search_batches())
    with Workers(accuracy, setting.workers) as workers, _progress_bar() as bar:
        task = bar.add_task("search", total=wanted, best=0.0)

        def fitness(configs: list[Config]) -> Iterator[float]:
            for value in workers(configs):
                best = max(value, bar.tasks[task].fields["best"])
                bar.update(task, advance=1, best=best)
                yield value

        for seed in range(setting.searches):
            for name, make in (
                ("evolution", lambda **kw: Evolution(space, count, fitness, **kw).run()),
                ("random", lambda **kw: random_search(
                    space, count, fitness, setting.evolution.evaluations, **kw)),
            ):  # fmt: skip
                begun = time.perf_counter()
                state = folder / f"{name}-{weights[:12]}-{setting.rule}-seed{seed}.jsonl"
                result = make(settings=setting.evolution, seed=seed, state=state, identity=identity)
                bar.update(
                    task,
                    completed=sum(len(one.scores) for runs in done.values() for one, _ in runs)
                    + len(result.scores),
                )
                for score in result.scores.entries:
                    workers.known[Config.from_genes(score.genes)] = score.fitness
                done[name].append((result, time.perf_counter() - begun))
    return done


def _progress_bar() -> Progress:
    """Candidates scored, the best so far, time left; on standard error, on a terminal only."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("best {task.fields[best]:.2f} %"), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


def _row(
    what: str, seed: int, config: Config, setting: Setting, num_classes: int, **columns: Any
) -> dict[str, Any]:
    """One row of the table; columns that do not apply are None."""
    params = params_of(setting.search_space, config, num_classes, setting.image_size)
    return {
        "what": what, "seed": seed, "top1_search": None, "top1_test": None, "params": params,
        "evaluations": None, "seconds": None, "config": str(config),
    } | columns  # fmt: skip


def entanglement(scale: str = "small", **options: Any) -> ExperimentResult:
    """Entangled weights against one set per candidate, at the same number of updates.

    For each seed both supernets are trained alike; the same sampled subnets are then judged on the
    test split with the weights they inherit from either. Some of them are also trained alone for as
    many epochs, on the same images: is inheriting as good?

    Args:
        scale: `small` (fashion_mini, on a CPU), `tiny` (does it run?) or `paper` (ImageNet).
        options: fields of `Setting`.
    """
    setting = choose_setting(scale, options)
    bench = Bench(setting)
    rng = random.Random(0)
    space = setting.search_space
    configs = list(dict.fromkeys(space.sample(rng) for _ in range(setting.subnets)))
    test, rows = bench.test_batches(), []
    sizes = {}
    for seed in setting.seeds:
        for sharing, make in (("entangled", bench.entangled), ("classical", bench.classical)):
            supernet, _ = make(seed)
            sizes[sharing] = sum(one.numel() for one in supernet.parameters())
            judge = InheritedAccuracy(supernet, test)
            for number, config in enumerate(configs):
                rows.append({
                    "sharing": sharing, "seed": seed, "subnet": number,
                    "params": params_of(space, config, bench.num_classes, setting.image_size),
                    "inherited": judge(config), "alone": None, "config": str(config),
                })  # fmt: skip
    for number, config in enumerate(configs[: setting.retrained]):
        value = bench.alone(config, setting.seeds[0], whole=False).value
        for row in rows:
            if row["subnet"] == number and row["seed"] == setting.seeds[0]:
                row["alone"] = value
    return ExperimentResult(
        rows=rows,
        findings=[_sharing_finding(rows), *_alone_findings(rows)],
        published=_published("weight sharing", "weight entanglement", "trained from scratch"),
        figures={"inherited": _inherited_figure(rows)},
        notes=(
            f"{setting.search_space.name}: {len(configs)} sampled subnets, {setting.epochs} epochs "
            f"for everything, seeds {list(setting.seeds)}. The entangled supernet has "
            f"{sizes['entangled']:,} parameters, the classical one {sizes['classical']:,}; a step "
            f"costs the same in both. The first {setting.retrained} subnets are also trained "
            f"alone, with seed {setting.seeds[0]}, on the images the supernets saw. Accuracies are "
            "top-1 in % on the test split."
        ),
        conditions=bench.conditions(),
    )


# what was found


def _published(*words: str) -> list[dict[str, Any]]:
    rows = get_paper("autoformer").facts.published
    return [
        {"variant": one.variant, "conditions": one.conditions, "value": one.value,
         "unit": one.unit, "source": one.source}
        for one in rows if any(word in one.variant for word in words)
    ]  # fmt: skip


def _search_finding(searches: dict[str, list[tuple[SearchResult, float]]]) -> Finding:
    claim = "Evolution finds better candidates than random search with as many evaluations"
    best = {
        name: [result.scores[result.winner.genes].fitness for result, _ in results]
        for name, results in searches.items()
    }
    gains = np.subtract(best["evolution"], best["random"])
    said = ", ".join(f"{gain:+.2f}" for gain in gains)
    count = searches["evolution"][0][0]
    return Finding(
        claim,
        "reproduced" if (gains > 0).all() else "deviates",
        f"best fitness {np.mean(best['evolution']):.2f} against {np.mean(best['random']):.2f} % on "
        f"the search images after {len(count.scores)} evaluations; search by search {said} points",
    )


def _test_finding(bits: dict[str, list[np.ndarray]]) -> Finding:
    tests = [mcnemar(*pair) for pair in zip(bits["evolution"], bits["random"], strict=True)]
    gains = [100 * test.difference for test in tests]
    low, high = (100 * end for end in tests[0].interval)
    better = all(test.interval[0] > 0 for test in tests)
    return Finding(
        "... and the advantage holds on images that steered nothing",
        "reproduced" if better else "deviates",
        f"test split, inherited weights: {', '.join(f'{gain:+.2f}' for gain in gains)} points (the "
        f"first: [{low:+.2f}, {high:+.2f}], p = {tests[0].p_value:.2g})",
    )


def _inherited_finding(rows: list[dict[str, Any]], alone: Sequence[Record]) -> Finding:
    inherited = next(row["top1_test"] for row in rows if row["what"] == "evolution, inherited")
    mean = float(np.mean([one.value for one in alone]))
    return Finding(
        "The subnet found is as good with inherited weights as when it is trained alone",
        "reproduced" if inherited >= mean - 0.5 else "deviates",
        f"inherited {inherited:.2f} %, trained alone {mean:.2f} % (mean of {len(alone)} seeds); "
        "the paper has 81.7 and 81.7 %",
    )


def _plain_finding(setting: Setting, alone: Sequence[Record], plain: Sequence[Record]) -> Finding:
    claim = f"At equal parameters and training, the subnet found beats {setting.plain}"
    values = [[one.value for one in records] for records in (alone, plain)]
    if len(alone) < 2:
        return Finding(claim, "not measured", f"one seed only: {values[0][0]:.2f} against "
                       f"{values[1][0]:.2f} %")  # fmt: skip
    paired = paired_means(*values)
    low, high = paired.interval
    return Finding(
        claim,
        "reproduced" if low > 0 else "deviates",
        f"{np.mean(values[0]):.2f} against {np.mean(values[1]):.2f} %, difference "
        f"{paired.difference:+.2f} points [{low:+.2f}, {high:+.2f}] over {len(alone)} seeds",
    )


def _evolution_notes(
    setting: Setting, trained: Any, searches: dict[str, list[tuple[SearchResult, float]]],
    found: Config,
) -> str:  # fmt: skip
    seen, seconds = trained.value("images_seen"), trained.value("train_time")
    first, spent = searches["evolution"][0]
    few = setting.train_images
    images = "the whole training split" if few is None else f"{few} images"
    return (
        f"Supernet: {setting.epochs} epochs, {seen:,} images, {seconds:.0f} s of training steps, "
        f"one random subnet a step. Search ({setting.rule} probabilities): {len(first.scores)} "
        f"evaluations on {setting.search_images:,} images held out of that training, in "
        f"{spent:.0f} s (less where scores were on file). Window {setting.min_params:g} to "
        f"{setting.max_params:g} M parameters. Found: {found}. Trained alone: {setting.epochs} "
        f"epochs on {images}, seeds {list(setting.seeds)}, as {setting.plain} is; "
        "its training is not charged with the search."
    )


def _by_sharing(rows: list[dict[str, Any]], column: str, sharing: str) -> list[float]:
    return [row[column] for row in rows if row["sharing"] == sharing and row[column] is not None]


def _sharing_finding(rows: list[dict[str, Any]]) -> Finding:
    entangled = np.array(_by_sharing(rows, "inherited", "entangled"))
    classical = np.array(_by_sharing(rows, "inherited", "classical"))
    gains = entangled - classical
    return Finding(
        "Subnets inherit far better weights from entanglement than from classical sharing",
        "reproduced" if (gains > 0).all() else "deviates",
        f"inherited top-1 {entangled.mean():.2f} % (spread {np.ptp(entangled):.2f}) against "
        f"{classical.mean():.2f} % (spread {np.ptp(classical):.2f}); each of {len(gains)} pairs "
        f"differs by {gains.min():+.2f} to {gains.max():+.2f} points; the paper has about +10 "
        "after random search",
    )


def _alone_findings(rows: list[dict[str, Any]]) -> list[Finding]:
    findings = []
    for sharing, claim, printed in (
        ("entangled", "With entanglement inherited accuracy is that of training alone", "-0.1"),
        ("classical", "With classical sharing inherited accuracy falls short of it", "-10.4"),
    ):
        pairs = [(row["inherited"], row["alone"]) for row in rows
                 if row["sharing"] == sharing and row["alone"] is not None]  # fmt: skip
        gap = float(np.mean([inherited - alone for inherited, alone in pairs]))
        held = gap >= -0.5 if sharing == "entangled" else gap < -0.5
        findings.append(
            Finding(
                claim,
                "reproduced" if held else "deviates",
                f"inherited minus alone: {gap:+.2f} points over {len(pairs)} subnets; the paper "
                f"has {printed}",
            )
        )
    return findings


# pictures


def _trace_figure(searches: dict[str, list[tuple[SearchResult, float]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    traces = {name: [one.trace() for one, _ in results] for name, results in searches.items()}
    draw_trace(axes, traces)
    # random initialisation falls far below what matters
    values = [row["fitness"] for runs in traces.values() for run in runs for row in run]
    low, high = float(np.percentile(values, 5)), max(values)
    axes.set_ylim(low - 0.1 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))
    axes.set_title("Best candidate so far (lines) and all candidates (dots)", fontsize=10)
    return figure


def _architecture(setting: Setting, found: Config) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    title = f"Found: {found.depth} layers of dimension {found.embed_dim} (outline: supernet)"
    draw_architecture(figure.subplots(), found, setting.search_space, title)
    return figure


def _inherited_figure(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for sharing, color in (("entangled", ORANGE), ("classical", BLUE)):
        chosen = [row for row in rows if row["sharing"] == sharing]
        axes.plot([row["params"] / 1e6 for row in chosen], [row["inherited"] for row in chosen],
                  "o", color=color, alpha=0.7, ms=5, label=f"inherited, {sharing}")  # fmt: skip
    alone = {row["params"]: row["alone"] for row in rows if row["alone"] is not None}
    axes.plot([size / 1e6 for size in alone], list(alone.values()), "D", color="0.2", ms=6,
              mfc="none", label="trained alone")  # fmt: skip
    axes.set(xlabel="parameters of the subnet (M)", ylabel="top-1 on the test split, %")
    axes.grid(color=GREY, lw=0.4)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
