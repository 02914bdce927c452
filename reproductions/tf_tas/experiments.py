"""The search, its cost and its pick; and the pick of a micro space, trained beside others'."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness import Conditions, ExperimentResult, Finding
from harness.environment import home
from harness.evaluation import bits_of
from harness.settings import choose
from harness.statistics import bootstrap_interval, mcnemar, mean_std
from harness.training import TrainedModel, train
from reproductions.autoformer.drawing import draw_architecture
from reproductions.autoformer.space import PUBLISHED, Config, Space, get_space
from reproductions.tf_tas.indicators import DssMode
from reproductions.tf_tas.model import FOUND, MICRO_WINDOW
from reproductions.tf_tas.published import published
from reproductions.tf_tas.ranking import percentile, rank
from reproductions.tf_tas.scoring import DssScorer, random_supernet
from reproductions.tf_tas.search import Draws, SearchResult, random_search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELEASED_POPULATION = 8000


@dataclass(frozen=True)
class SearchSettings:
    """A scale of the search; every field is an option of the experiment.

    Attributes:
        population: subnets scored in the window.
        free: subnets scored in the released window, which excludes nothing of space T.
        window: parameters in M around the published subnet.
        workers: processes that score.
    """

    space: str = "t"
    mode: DssMode = "shipped"
    population: int = 150
    free: int = 50
    window: tuple[float, float] = (5.5, 6.5)
    seed: int = 0
    workers: int = 1


SEARCH_SCALES = {
    "tiny": SearchSettings("micro", population=30, free=20, window=(0.2, 0.25)),
    "small": SearchSettings(),
    "paper": SearchSettings(population=RELEASED_POPULATION, free=1000),
}


def search(scale: str = "small", **options: Any) -> ExperimentResult:
    """Search a window of parameters and the whole space; weigh the published subnets.

    Every candidate is scored on slices of one random supernet. The search is resumable: its trace
    lies in `searches/` at home.

    Args:
        scale: `tiny` (the micro space), `small` (space T, about a CPU minute) or `paper` (8000).
        options: fields of `SearchSettings`.

    Raises:
        ReplivitError: an unknown scale or option.
    """
    settings = choose(SEARCH_SCALES, scale, options)
    space = get_space(settings.space)
    shape = (10, 32) if settings.space == "micro" else (1000, 224)
    scorer = DssScorer(random_supernet(space, *shape, settings.seed), settings.mode)
    in_window = _searched(space, scorer, settings, settings.window, settings.population)
    free = _searched(space, scorer, settings, (3.0, 23.0), settings.free, everything=True)
    rows = [_row("window", one.config, one.params, one.score) for one in in_window.candidates]
    rows += [_row("free", one.config, one.params, one.score) for one in free.candidates]
    known = {"TF-TAS": FOUND.get(settings.space), "AutoFormer": PUBLISHED.get(settings.space)}
    for name, config in known.items():
        if config is not None:
            rows.append(_row(name, config, scorer.params(config), scorer(config)))
    scores = [one.score for one in in_window.candidates]
    for row in rows:
        row["percentile"] = round(percentile(row["dss"], scores), 1)
    return ExperimentResult(
        rows=rows,
        findings=[
            _cost_finding(in_window, space),
            _size_finding(in_window, free, space, _size_of(known["TF-TAS"], settings, scorer)),
            *_published_findings(rows, settings),
        ],
        published=published("gpu_days") + published("samples"),
        figures={"search": _search_figure(rows, in_window, space, known["TF-TAS"])},
        notes=(
            f"DSS, mode {settings.mode}; one random supernet of {space.name} (seed "
            f"{settings.seed}) scores all. `percentile` is among the {len(scores)} subnets of the "
            f"window {settings.window[0]:g} to {settings.window[1]:g} M parameters, for which "
            f"{in_window.drawn} were drawn."
        ),
        conditions=Conditions(device="cpu", threads=torch.get_num_threads(), seed=settings.seed,
                              image_size=shape[1], batch_size=1),
    )  # fmt: skip


def _searched(
    space: Space, scorer: DssScorer, settings: SearchSettings, window: tuple[float, float],
    population: int, everything: bool = False,
) -> SearchResult[Config]:  # fmt: skip
    """One search with its trace at home; the released window, if nothing is to be excluded."""
    if everything and scorer.params(space.smallest()) / 1e6 < window[0]:
        window = (0.0, window[1])
    name = f"{space.name}_{settings.mode}_{window[0]:g}_{window[1]:g}_seed{settings.seed}.jsonl"
    return random_search(
        space, scorer, population, window, settings.seed, workers=settings.workers,
        state=home() / "searches" / "tf_tas" / name, quiet=False,
    )  # fmt: skip


def _size_of(config: Config | None, settings: SearchSettings, scorer: DssScorer) -> int | None:
    """Parameters of the published subnet; the micro space has none."""
    return None if config is None or settings.space == "micro" else scorer.params(config)


def _row(what: str, config: Config, params: int, score: float) -> dict[str, Any]:
    return {"what": what, "params": params, "dss": score, "config": str(config)}


def _cost_finding(result: SearchResult[Config], space: Space) -> Finding:
    seconds = np.array([one.seconds for one in result.candidates])
    low, high = bootstrap_interval(seconds, statistic=np.mean) if len(seconds) > 1 else (0, 0)
    hours = RELEASED_POPULATION * seconds.mean() / 3600
    return Finding(
        "The search costs less than 0.5 GPU days (training-based search: about 24)",
        "reproduced" if hours < 12 else "deviates",
        f"{seconds.mean():.3f} CPU seconds [{low:.3f}, {high:.3f}] per candidate of {space.name}: "
        f"{hours:.2f} CPU hours for {RELEASED_POPULATION}, without any GPU",
    )


def _size_finding(
    in_window: SearchResult[Config], free: SearchResult[Config], space: Space, known: int | None
) -> Finding:
    """`known`: parameters of the published subnet."""
    claim = "The released window of 3 to 23 M parameters leads to a subnet of the published size"
    params = [one.params for one in free.candidates]
    tau = rank([one.score for one in free.candidates], params)
    inside = rank(
        [one.score for one in in_window.candidates], [one.params for one in in_window.candidates]
    )
    evidence = (
        f"the best of {len(params)} random subnets of {space.name} has "
        f"{free.best.params / 1e6:.3f} M, more than {percentile(free.best.params, params):.0f} % "
        f"of them; tau of score and parameters {tau}, inside the window {inside}"
    )
    if known is None:
        return Finding(claim, "not measured", f"no subnet of this space is published; {evidence}")
    near = abs(free.best.params / known - 1) < 0.1
    evidence += f"; the published subnet has {known / 1e6:.3f} M"
    return Finding(claim, "reproduced" if near else "deviates", evidence)


def _published_findings(rows: list[dict[str, Any]], settings: SearchSettings) -> list[Finding]:
    low, high = settings.window
    findings = []
    for name in ("TF-TAS", "AutoFormer"):
        row = next((one for one in rows if one["what"] == name), None)
        if row is None:
            continue
        size = row["params"] / 1e6
        place = f"{size:.3f} M parameters, score {row['dss']:.5g}: above {row['percentile']:.0f} % "
        place += f"of the random subnets of {low:g} to {high:g} M"
        claim = f"The subnet of {name} scores among the best of its size"
        if not low <= size <= high:
            findings.append(Finding(claim, "not measured", f"{place}, whose window it is not in"))
            continue
        outcome = "reproduced" if row["percentile"] >= 90 else "deviates"
        findings.append(Finding(claim, outcome, place))
    return findings


def _search_figure(
    rows: list[dict[str, Any]], result: SearchResult[Config], space: Space, known: Config | None
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    widths = [1.5, 1, 1] if known else [1.5, 1]
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    axes = panels[0]
    for what, label, style in (
        ("free", "random subnets", {"color": "0.7"}),
        ("window", "inside the window", {"color": "C0"}),
    ):
        chosen = [row for row in rows if row["what"] == what]
        axes.plot(
            [row["params"] / 1e6 for row in chosen], [row["dss"] for row in chosen], "o", ms=3,
            label=label, **style,
        )  # fmt: skip
    marks = [("picked here", result.best.params, result.best.score, "*", "C3", 14)]
    markers = {"TF-TAS": "D", "AutoFormer": "P"}
    marks += [
        (f"published {row['what']}", row["params"], row["dss"], markers[row["what"]], "k", 7)
        for row in rows if row["what"] in markers
    ]  # fmt: skip
    for label, params, score, marker, color, size in marks:
        axes.plot(params / 1e6, score, marker, color=color, ms=size, label=label, ls="none")
    axes.set(xlabel="parameters, M", ylabel="DSS at initialisation", title=space.name)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    best = result.best.config
    draw_architecture(
        panels[1], best, space, f"picked: {best.depth} layers, dimension {best.embed_dim}"
    )
    if known is not None:
        draw_architecture(
            panels[2], known, space, f"published: {known.depth} layers, dimension {known.embed_dim}"
        )
    return figure


# ---- the pick of the micro space, trained --------------------------------------------------------


@dataclass(frozen=True)
class PickSettings:
    """A scale of the comparison; every field is an option of the experiment.

    Attributes:
        population: subnets that DSS scores.
        controls: random subnets of the same window that are trained too, one per seed.
        epochs: of every training; None is the track's protocol.
        variants: what is trained beside the controls.
    """

    population: int = 1000
    window: tuple[float, float] = MICRO_WINDOW
    variants: tuple[str, ...] = ("tf_tas_micro", "autoformer_micro", "vit_micro")
    controls: bool = True
    track: str = "fashion_mini"
    epochs: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str | None = None
    root: str | None = None


PICK_SCALES = {
    "tiny": PickSettings(population=40, epochs=1, seeds=(0,), controls=False),
    "small": PickSettings(epochs=4),
    "paper": PickSettings(),
}


def pick(scale: str = "small", **options: Any) -> ExperimentResult:
    """Search the micro space by DSS, and train the pick beside AutoFormer's and a plain ViT.

    All have about the parameters of `vit_micro`. Random subnets of the same window, one per seed,
    show what the window alone is worth. Trainings are resumable, and shared with `replivit train`.

    Args:
        scale: `tiny`, `small` (4 epochs) or `paper` (the track's protocol).
        options: fields of `PickSettings`.

    Raises:
        ReplivitError: an unknown scale or option.
    """
    settings = choose(PICK_SCALES, scale, options)
    space = get_space("micro")
    scorer = DssScorer(random_supernet(space, 10, 32))
    result = random_search(space, scorer, settings.population, settings.window)
    rows, bits = [], {}
    for name in settings.variants:
        runs = [_trained(name, seed, settings) for seed in settings.seeds]
        for seed, run in zip(settings.seeds, runs, strict=True):
            rows.append(_result_row(name, seed, run))
        bits[name] = [_bits(run) for run in runs]
    if settings.controls:
        draws = Draws(space, scorer.params, settings.window, random.Random(1)).take(
            len(settings.seeds)
        )
        for seed, drawn in zip(settings.seeds, draws, strict=True):
            run = _trained("tf_tas_micro", seed, settings, drawn.config)
            rows.append(_result_row("random subnet", seed, run))
    return ExperimentResult(
        rows=rows,
        findings=[_pick_finding(result), _duel_finding(rows, bits), _control_finding(rows)],
        published=published("top1"),
        figures={"pick": _pick_figure(rows, space)},
        notes=(
            f"DSS (shipped) over {settings.population} random subnets of {space.name} with "
            f"{settings.window[0]:g} to {settings.window[1]:g} M parameters took "
            f"{result.seconds:.1f} CPU seconds; `seconds` is the training time of a row. What "
            "AutoFormer's search cost is in autoformer/evolution."
        ),
        conditions=Conditions(device=settings.device or "cpu", threads=torch.get_num_threads(),
                              track=settings.track, image_size=32),
    )  # fmt: skip


def _trained(
    name: str, seed: int, settings: PickSettings, config: Config | None = None
) -> TrainedModel:
    options = {} if config is None else {"config": config.as_dict()}
    return train(
        name, settings.track, seed=seed, epochs=settings.epochs, device=settings.device,
        root=settings.root, options=options,
    )  # fmt: skip


def _bits(run: TrainedModel) -> np.ndarray:
    return bits_of(next(one for one in run.records if one.metric == "top1"))


def _result_row(name: str, seed: int, run: TrainedModel) -> dict[str, Any]:
    return {
        "what": name, "seed": seed, "top1": run.value("top1"),
        "params": sum(one.numel() for one in run.model.parameters()),
        "seconds": round(run.value("train_time"), 1),
        "config": str(getattr(run.model, "config", "")),
    }  # fmt: skip


def _pick_finding(result: SearchResult[Config]) -> Finding:
    same = result.best.config == FOUND["micro"]
    return Finding(
        "The search is repeatable: it returns the subnet of tf_tas_micro",
        "reproduced" if same else "deviates",
        f"best of {len(result.candidates)}: {result.best.config} ({result.best.params:,} "
        f"parameters, score {result.best.score:.5g}) in {result.seconds:.1f} CPU seconds",
    )


def _of(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row["top1"] for row in rows if row["what"] == name]


def _words(name: str, values: list[float]) -> str:
    summary = mean_std(values)
    spread = "" if summary.std is None else f" (std {summary.std:.2f}, {summary.n} seeds)"
    return f"{name} {summary.mean:.2f} %{spread}"


def _duel_finding(rows: list[dict[str, Any]], bits: dict[str, list[np.ndarray]]) -> Finding:
    claim = "The pick is as accurate as AutoFormer's"
    if not {"tf_tas_micro", "autoformer_micro"} <= bits.keys():
        return Finding(claim, "not measured", "one of the two was not trained")
    pairs = zip(bits["tf_tas_micro"], bits["autoformer_micro"], strict=True)
    tests = [mcnemar(*pair) for pair in pairs]
    worse = sum(test.interval[1] < 0 for test in tests)
    gain = 100 * float(np.mean([test.difference for test in tests]))
    return Finding(
        claim,
        "deviates" if 2 * worse > len(tests) else "reproduced",
        ", ".join(_words(name, _of(rows, name)) for name in bits)
        + f"; pick minus AutoFormer's {gain:+.2f} points, p by seed "
        + ", ".join(f"{test.p_value:.2g}" for test in tests),
    )


def _control_finding(rows: list[dict[str, Any]]) -> Finding:
    claim = "The pick beats a random subnet of its window"
    own, control = _of(rows, "tf_tas_micro"), _of(rows, "random subnet")
    if len(control) < 2 or len(own) < 2:
        return Finding(claim, "not measured", "needs random subnets and at least two seeds")
    summary = mean_std(np.subtract(own, control))
    return Finding(
        claim,
        "reproduced" if summary.interval[0] > 0 else "deviates",
        f"{_words('pick', own)}, {_words('random', control)}: {summary.mean:+.2f} points "
        f"[{summary.interval[0]:+.2f}, {summary.interval[1]:+.2f}]",
    )


def _pick_figure(rows: list[dict[str, Any]], space: Space) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    names = list(dict.fromkeys(row["what"] for row in rows))
    for place, name in enumerate(names):
        values = _of(rows, name)
        left.plot(values, [place] * len(values), "o", color="C0", mfc="none")
        left.plot(np.mean(values), place, "|", color="C3", ms=18, mew=2)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="top-1, %", ylim=(-0.6, len(names) - 0.4), title="seeds and their mean")
    left.invert_yaxis()
    left.spines[["top", "right"]].set_visible(False)
    draw_architecture(right, FOUND["micro"], space, "tf_tas_micro")
    return figure
