"""The joint search, run to its end: supernet, cost table, greedy walk, and two opponents."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness import Conditions, ExperimentResult, Finding, deploy
from harness.evaluation import bits_of
from harness.measurement.latency import Effort
from harness.measurement.side_by_side import time_calls
from harness.statistics import bootstrap_interval, mcnemar
from harness.training import train
from reproductions.efficientformer_v2.model import Architecture, EfficientFormerV2
from reproductions.efficientformer_v2.search import (
    TABLE_EFFORT,
    Cost,
    CostTable,
    MobileEfficiency,
    Step,
    greedy_search,
    scaled_widths,
)
from reproductions.efficientformer_v2.search_setup import SCALES, Images, Settings, choose_settings
from reproductions.efficientformer_v2.supernet import SandwichRule, SearchSpace, Supernet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def search(scale: str = "small", seed: int = 0, **options: Any) -> ExperimentResult:
    """Train a supernet, shrink it by min dAccuracy / dMES, and judge what is found.

    The walk is compared with random sub-networks (with the supernet's weights, in the plane of
    accuracy and Mobile Efficiency Score), and its last network with the supernet scaled uniformly
    in width to equal measured latency, both trained from scratch alike.

    Args:
        scale: `small` (fashion_mini, minutes on a CPU) or `paper` (ImageNet, a GPU).
        seed: of the supernet's training and of the random sub-networks.
        options: fields of `Settings`: `track`, `image_size`, `supernet_epochs`, `final_epochs`,
            `seeds`, `target`, `search_images`, `random_subnets`, `latency_batch`, `timing_seconds`,
            `batch_size`, `layer_scale_init`, `device`, `root`, `space`.
    """
    settings = choose_settings(scale, options)
    images = Images(settings)
    supernet = _train_supernet(settings, seed, images.num_classes)
    table = CostTable.measure(
        settings.space, settings.image_size, images.num_classes,
        batch_size=settings.latency_batch, device=settings.device,
        effort=replace(TABLE_EFFORT, budget_s=settings.timing_seconds),
    )  # fmt: skip
    whole = table.cost(settings.space.architecture(settings.space.uniform("largest")))
    score = MobileEfficiency(unit=whole)
    target = Cost(whole.params, settings.target * whole.latency)
    steps = greedy_search(
        settings.space, table, score, lambda one: images.accuracy(supernet, one, "search"), target
    )
    walk = _walk_rows(settings.space, steps, images, supernet)
    randoms = _random_rows(settings, seed, images, supernet, table, score, walk[-1]["mes"])
    duel = _duel(settings, settings.space.architecture(steps[-1].subnet), images)
    rows = [*walk, *randoms, *duel.rows]
    return ExperimentResult(
        rows=rows,
        findings=[_step_finding(walk), _random_finding(walk, randoms), _scaling_finding(duel)],
        figures={"search": _figure(rows)},
        notes=_notes(settings, steps, table),
        conditions=Conditions(
            device=settings.device, threads=torch.get_num_threads(), track=settings.track,
            image_size=settings.image_size, batch_size=settings.latency_batch, seed=seed,
        ),
    )  # fmt: skip


def _recipe(settings: Settings) -> dict[str, Any]:
    return {"batch_size": settings.batch_size} if settings.batch_size else {}


def _train_supernet(settings: Settings, seed: int, num_classes: int) -> Supernet:
    torch.manual_seed(seed)
    supernet = Supernet(
        settings.space, num_classes, settings.image_size,
        layer_scale_init=settings.layer_scale_init,
    )  # fmt: skip
    trained = train(
        supernet, settings.track, _recipe(settings), seed, objective=SandwichRule(),
        hold_out=settings.search_images, epochs=settings.supernet_epochs,
        device=settings.device, root=settings.root,
        image_size=settings.image_size, name="efficientformer_v2_supernet",
        options=_told(settings.space), evaluate=False,
    )  # fmt: skip
    return trained.model


def _told(space: SearchSpace) -> dict[str, str]:
    """What tells a supernet's run: its weights do not show which narrower widths it trains."""
    known = any(space == setting.space for setting in SCALES.values())
    return {} if known else {"space": repr(space)}


def _row(what: str, cost: Cost, architecture: Architecture, **columns: Any) -> dict[str, Any]:
    """One row of the table; columns that do not apply are None."""
    return {
        "what": what, "action": None, "mes": None, "top1_search": None, "top1_shared": None,
        "top1_scratch": None, "params": int(cost.params), "ms": round(1e3 * cost.latency, 4),
        "architecture": in_words(architecture),
    } | columns  # fmt: skip


def in_words(architecture: Architecture) -> str:
    """Width, expansions and number of global blocks of each stage: `32: 4 4 | ... | 96: 3 (1)`."""
    counts = (0, 0, *architecture.attention_blocks)
    stages = zip(architecture.widths, architecture.expansions, counts, strict=True)
    return " | ".join(
        f"{width}: {' '.join(f'{ratio:g}' for ratio in ratios)}" + f" ({count})" * (count > 0)
        for width, ratios, count in stages
    )


def _walk_rows(
    space: SearchSpace, steps: list[Step], images: Images, supernet: Supernet
) -> list[dict[str, Any]]:
    return [
        _row(
            "walk", step.cost, space.architecture(step.subnet),
            action=str(step.action or "supernet"), mes=step.mes, top1_search=step.accuracy,
            top1_shared=images.accuracy(supernet, step.subnet, "judge"),
        )
        for step in steps
    ]  # fmt: skip


def _random_rows(
    settings: Settings, seed: int, images: Images, supernet: Supernet, cost: CostTable,
    score: MobileEfficiency, highest: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Random sub-networks that score between the supernet and the walk's end."""
    rng, rows = random.Random(seed), []
    for _ in range(1000 * settings.random_subnets):
        subnet = settings.space.sample(rng)
        architecture = settings.space.architecture(subnet)
        price = cost.cost(architecture)
        if score(price) <= highest:
            reached = images.accuracy(supernet, subnet, "judge")
            rows.append(_row("random", price, architecture, mes=score(price), top1_shared=reached))
            if len(rows) == settings.random_subnets:
                break
    return rows


# ---- the found network against uniform scaling ---------------------------------------------------


def _equally_fast(
    settings: Settings, found: Architecture, num_classes: int
) -> tuple[Architecture, dict[str, float]]:
    """The supernet, scaled in width to the latency of `found`; and the seconds of both.

    All candidates are timed in their deployment form, interleaved; the nearest one is taken.
    """
    largest = settings.space.architecture(settings.space.uniform("largest"))
    factors = np.arange(0.2, 1.0, 0.05)
    scaled = dict.fromkeys(scaled_widths(largest, float(factor)) for factor in factors)
    networks = {"found": found} | {f"uniform{i}": one for i, one in enumerate(scaled)}
    images = torch.randn(
        settings.latency_batch, 3, settings.image_size, settings.image_size, device=settings.device
    )
    calls = {}
    for name, architecture in networks.items():
        model = EfficientFormerV2(
            architecture, num_classes, settings.image_size, distillation=False
        )
        form = deploy(model, settings.image_size).to(settings.device)
        calls[name] = partial(form, images)
    effort = Effort(
        budget_s=settings.timing_seconds, half_width=0.05, min_rounds=5, palindromes=1,
        warm_up_s=0.05, warm_up_limit_s=0.3,
    )  # fmt: skip
    timings = time_calls(calls, device=settings.device, effort=effort)
    nearest = min(calls.keys() - {"found"}, key=lambda name: abs(np.log(timings[name].ratio)))
    return networks[nearest], {
        "found": timings["found"].median, "uniform": timings[nearest].median,
        "ratio": timings[nearest].ratio,
    }  # fmt: skip


@dataclass(frozen=True)
class Duel:
    """Found and uniformly scaled network, trained alike; bits are those of the test split."""

    rows: list[dict[str, Any]]
    bits: dict[str, list[np.ndarray]]
    latency_ratio: float


def _duel(settings: Settings, found: Architecture, images: Images) -> Duel:
    uniform, seconds = _equally_fast(settings, found, images.num_classes)
    rows, bits = [], {"found": [], "uniform": []}
    for name, architecture in {"found": found, "uniform": uniform}.items():
        for seed in settings.seeds:
            torch.manual_seed(seed)
            model = EfficientFormerV2(
                architecture, images.num_classes, settings.image_size, distillation=False,
                layer_scale_init=settings.layer_scale_init,
            )  # fmt: skip
            params = sum(one.numel() for one in model.parameters())
            trained = train(
                model, settings.track, _recipe(settings), seed, epochs=settings.final_epochs,
                device=settings.device, root=settings.root, image_size=settings.image_size,
                name=f"efficientformer_v2_{name}",
            )  # fmt: skip
            record = next(one for one in trained.records if one.metric == "top1")
            bits[name].append(bits_of(record))
        top1 = 100 * float(np.mean(bits[name]))
        rows.append(_row(name, Cost(params, seconds[name]), architecture, top1_scratch=top1))
    return Duel(rows, bits, seconds["ratio"])


# ---- what was found ------------------------------------------------------------------------------


def _step_finding(rows: list[dict[str, Any]]) -> Finding:
    scores = [row["mes"] for row in rows]
    rising = all(low < high for low, high in pairwise(scores))
    kinds = sorted({row["action"].split()[0] for row in rows[1:]})
    return Finding(
        "Small steps, each of which raises the score, lead from the supernet to the target",
        "reproduced" if rising else "deviates",
        f"{len(rows) - 1} steps (of the kinds {', '.join(kinds)}), score {scores[0]:.0f} to "
        f"{scores[-1]:.0f}, latency {rows[0]['ms']:.2f} to {rows[-1]['ms']:.2f} ms",
    )


def _random_finding(walk: list[dict[str, Any]], randoms: list[dict[str, Any]]) -> Finding:
    claim = "The search beats random sub-networks of equal score"
    if len(randoms) < 2:
        return Finding(claim, "not measured", "too few random sub-networks score in the range")
    at = [row["mes"] for row in randoms]
    usual = np.interp(at, [row["mes"] for row in walk], [row["top1_shared"] for row in walk])
    gain = usual - [row["top1_shared"] for row in randoms]
    low, high = bootstrap_interval(gain, statistic=np.mean)
    return Finding(
        claim,
        "reproduced" if low > 0 else "deviates",
        f"at equal score the walk is {gain.mean():+.1f} points [{low:+.1f}, {high:+.1f}] from "
        f"{len(randoms)} random sub-networks (shared weights), and above "
        f"{np.mean(gain > 0):.0%} of them",
    )


def _scaling_finding(duel: Duel) -> Finding:
    tests = [mcnemar(*pair) for pair in zip(duel.bits["found"], duel.bits["uniform"], strict=True)]
    gain = 100 * np.mean([test.difference for test in tests])
    low, high = (100 * end for end in tests[0].interval)
    better = all(test.interval[0] > 0 for test in tests)
    return Finding(
        "At equal latency the found network is more accurate than uniform width scaling",
        "reproduced" if better else "deviates",
        f"{gain:+.2f} points after equal training ({len(tests)} seeds; the first: [{low:+.2f}, "
        f"{high:+.2f}], p = {tests[0].p_value:.2g}); latency uniform / found "
        f"{duel.latency_ratio:.2f}, parameters found {duel.rows[0]['params']:,} and uniform "
        f"{duel.rows[1]['params']:,}",
    )


def _notes(settings: Settings, steps: list[Step], table: CostTable) -> str:
    evaluations = sum(step.evaluations for step in steps)
    return (
        f"Supernet: {settings.supernet_epochs} epochs with the sandwich rule (4 sub-networks a "
        f"step); the search evaluated {evaluations} sub-networks on {settings.search_images} "
        f"images held out of the training; all accuracies but `top1_search` are on the test "
        f"split. Scores are relative to the supernet's size and latency (100). Latency: deployment "
        f"form, batch {settings.latency_batch}, one thread; {table.unsettled} of "
        f"{len(table.entries)} parts of the table stayed wider than wanted. Found and "
        f"uniform network: {settings.final_epochs} epochs from scratch, "
        f"seeds {list(settings.seeds)}."
    )


def _figure(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for what, label, style in (
        ("random", "random sub-networks", {"fmt": "o", "color": "0.65", "ms": 4}),
        ("walk", "the search", {"fmt": "o-", "color": "C3", "ms": 5}),
    ):
        chosen = [row for row in rows if row["what"] == what]
        form = style.pop("fmt")
        axes.plot(
            [row["mes"] for row in chosen], [row["top1_shared"] for row in chosen], form,
            label=label, **style,
        )  # fmt: skip
    axes.set(
        xlabel="Mobile Efficiency Score (supernet = 100)",
        ylabel="top-1 with shared weights, %",
        title="Smaller and faster to the right",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    return figure
