"""Networks trained from scratch by one protocol, compared seed by seed.

Every run is an ordinary `harness.train` run: found again when it is finished, continued when it was
stopped, shared by experiments that need the same one. Seeds may be trained side by side by commands
of their own (`--set seeds=0`); the one that asks for all of them then only reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import Conditions, ExperimentResult, get_paper
from harness.data import load_split
from harness.effect import Arm, Claim, Run
from harness.effect_report import Difference, draw_arms, judge
from harness.evaluation import evaluate
from harness.measurement.latency import Timing
from harness.measurement.macs import count_macs
from harness.measurement.side_by_side import time_models
from harness.settings import choose
from harness.statistics import adjust_p_values, mean_std
from harness.tokens import sample_images
from harness.training import train


@dataclass(frozen=True)
class Plan:
    """The size of a comparison; every field is an option of the experiment.

    Attributes:
        epochs: of every run; None for the track's protocol.
        train_images, test_images: only so many, for a look at whether it runs; default all.
        batch_size, seconds, threads: of the timing; 0 seconds for none.
    """

    track: str = "fashion_mini"
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = 5
    train_images: int | None = None
    test_images: int | None = None
    batch_size: int = 32
    seconds: float = 15.0
    threads: int = 1
    device: str = "cpu"
    root: str | Path | None = None
    quiet: bool = False


SCALES = {
    "tiny": Plan(seeds=(0,), epochs=1, train_images=128, test_images=100, batch_size=4,
                 seconds=0, quiet=True),
    "small": Plan(),
    "paper": Plan(track="imagenet", seeds=(0,), epochs=None, device="cuda"),
}  # fmt: skip


def choose_plan(scale: str, changes: Mapping[str, Any]) -> Plan:
    """The plan of a scale with single fields changed.

    Raises:
        ReplivitError: unknown scale or field, or an impossible number.
    """
    counts = ("epochs", "train_images", "test_images", "batch_size", "threads")
    return choose(SCALES, scale, changes, least=dict.fromkeys(counts, 1))


def compare_from_scratch(
    arms: Sequence[Arm],
    claims: Sequence[Claim],
    plan: Plan,
    *,
    paper: str,
    about: Sequence[str] = (),
    notes: str = "",
) -> ExperimentResult:
    """Train every arm with every seed and compare them with the first, the reference.

    Args:
        paper: key of the paper whose published rows are shown beside, ...
        about: ... if their variant contains one of these words.
    """
    runs = {arm.name: [_run(arm, seed, plan) for seed in plan.seeds] for arm in arms}
    reference = arms[0].name
    gaps = {name: Difference.of(one, runs[reference]) for name, one in runs.items()}
    rivals = [name for name in runs if name != reference]
    p_values = adjust_p_values([gaps[name].p_value for name in rivals])
    p_values = dict(zip(rivals, map(float, p_values), strict=True))
    timings = _timings(runs, plan)
    rows = [
        _row(name, one, gaps[name], p_values.get(name), timings.get(name), plan)
        for name, one in runs.items()
    ]
    return ExperimentResult(
        rows,
        findings=judge(claims, runs),
        published=[
            {key: getattr(row, key) for key in ("variant", "metric", "value", "unit", "source")}
            for row in get_paper(paper).facts.published
            if any(word in row.variant for word in about)
        ],
        figures={"accuracy": draw_arms(runs, reference)},
        notes=" ".join(filter(None, (notes, _protocol(plan)))),
        conditions=Conditions(
            device=plan.device, threads=plan.threads, track=plan.track,
            seed=plan.seeds[0] if len(plan.seeds) == 1 else None,
            data_fingerprint=runs[reference][0].top1.conditions.data_fingerprint,
            options={"seeds": list(plan.seeds), "epochs": plan.epochs},
        ),
    )  # fmt: skip


def _run(arm: Arm, seed: int, plan: Plan) -> Run:
    hold_out = 0
    if plan.train_images is not None:
        count = len(load_split(plan.track, "train", plan.root))
        hold_out = max(0, count - plan.train_images)
    whole = plan.test_images is None
    trained = train(
        arm.variant, plan.track, dict(arm.recipe) or None, seed, options=dict(arm.options),
        epochs=plan.epochs, hold_out=hold_out, device=plan.device, root=plan.root,
        quiet=plan.quiet, evaluate=whole,
    )  # fmt: skip
    records = trained.records
    if not whole:
        test = load_split(plan.track, "test", plan.root)
        records = evaluate(trained.model, test, device=plan.device, limit=plan.test_images)
    top1 = next(record for record in records if record.metric == "top1")
    return Run(
        seed, top1, trained.value("train_time"), trained.value("images_seen"), trained.model
    )  # fmt: skip


def _timings(runs: Mapping[str, Sequence[Run]], plan: Plan) -> dict[str, Timing]:
    """Forward passes of all arms in turns; ratios are to the reference, the first."""
    if plan.seconds <= 0:
        return {}
    models = {name: one[0].model for name, one in runs.items()}
    test = load_split(plan.track, "test", plan.root)
    images = sample_images(next(iter(models.values())), test, plan.batch_size).inputs
    return time_models(
        models, [images], device=plan.device, threads=plan.threads, budget_s=plan.seconds,
        warm_up_s=0.2, warm_up_limit_s=1.0, half_width=0.01, palindromes=1,
    )  # fmt: skip


def _row(
    name: str,
    runs: Sequence[Run],
    gap: Difference,
    p_value: float | None,
    timing: Timing | None,
    plan: Plan,
) -> dict[str, Any]:
    top1 = mean_std([run.top1.value for run in runs])
    model = runs[0].model
    size = model.pretrained_cfg["input_size"][1:]
    return {
        "arm": name,
        "top-1 (%)": round(top1.mean, 2),
        "±": round(top1.mean - top1.interval[0], 2) if top1.interval else None,
        "against the first (points)": gap.short if p_value is not None else "",
        "p": float(f"{p_value:.2g}") if p_value is not None else None,
        "params": sum(one.numel() for one in model.parameters()),
        "MACs (M)": round(count_macs(model, size).total / 1e6, 2),
        "time (ms)": round(1e3 * timing.median, 2) if timing else None,
        "times the first's": round(timing.ratio, 3) if timing else None,
        "training (s)": round(float(np.mean([run.seconds for run in runs])), 1),
    }


def _protocol(plan: Plan) -> str:
    epochs = f"{plan.epochs} epochs" if plan.epochs else "the protocol's epochs"
    limits = "".join(
        f" Only {count} {what} images were used: no number here means anything."
        for what, count in (("training", plan.train_images), ("test", plan.test_images))
        if count is not None
    )
    seeds = ", ".join(map(str, plan.seeds))
    return (
        f"All arms from scratch on {plan.track}, {epochs}, seeds {seeds}, by the recipe of the "
        "first. Intervals are 95 %: t over seeds, differences paired by seed. McNemar's test pools "
        "the images of all seeds and is corrected for the number of arms (Benjamini-Hochberg)."
        + limits
    )
