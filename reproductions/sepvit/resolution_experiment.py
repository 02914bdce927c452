"""What SepViT costs at which resolution, and the counts that were published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import harness
from harness import Conditions, ExperimentResult, Finding, ReplivitError
from harness.measurement.latency import Timing
from harness.measurement.macs import MacsCount, count_macs
from harness.measurement.side_by_side import time_models
from harness.measurement.yardstick import seeded_images
from harness.meta import on_meta
from harness.settings import choose
from reproductions.sepvit.complexity import block_costs, two_swin_blocks
from reproductions.sepvit.conventions import macs as authors_macs
from reproductions.sepvit.model import ARCHITECTURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "sepvit"
#: Side at which everything was published.
PUBLISHED = 224


@dataclass(frozen=True)
class Plan:
    """What is counted and timed; every field is an option of the experiment.

    Attributes:
        size: of SepViT: lite, tiny, small or base.
        rival: a network to time beside it.
        image_sizes: pixels at which multiply-adds are counted.
        timed_sizes: of these, where both are timed.
        seconds: timing budget of each pair.
    """

    size: str = "tiny"
    rival: str = "swin_t"
    image_sizes: Sequence[int] = (192, 224, 256, 320, 384, 448, 672)
    timed_sizes: Sequence[int] = (224, 448)
    batch_size: int = 1
    seconds: float = 20.0
    threads: int = 1
    device: str = "cpu"


SCALES = {
    "tiny": Plan(
        size="lite", rival="mobilenetv2_100", image_sizes=(192, 224, 448), timed_sizes=(224,),
        seconds=0.1,
    ),
    "small": Plan(),
    "paper": Plan(
        image_sizes=(192, 224, 256, 320, 384, 448, 512, 672, 896),
        timed_sizes=(192, 224, 256, 384, 448, 672), batch_size=8, seconds=60.0,
    ),
}  # fmt: skip


def choose_plan(scale: str, changes: Mapping[str, Any]) -> Plan:
    """The plan of a scale with single fields changed.

    Raises:
        ReplivitError: unknown scale, field or size.
    """
    plan = choose(SCALES, scale, changes)
    if plan.size not in ARCHITECTURES or plan.size == "micro":
        raise ReplivitError(f"no size {plan.size!r}; there are lite, tiny, small, base")
    if PUBLISHED not in plan.image_sizes or not set(plan.timed_sizes) <= set(plan.image_sizes):
        raise ReplivitError(f"image_sizes must hold {PUBLISHED} and all timed_sizes")
    return plan


def resolution(scale: str = "small", **changes: Any) -> ExperimentResult:
    """Multiply-adds and time against the side of the image, beside a Swin of the same size.

    Args:
        scale: `tiny` (does it run?), `small` (about a minute on one thread) or `paper`.
        changes: fields of `Plan`.

    Raises:
        ReplivitError: unknown scale or option.
    """
    plan = choose_plan(scale, changes)
    counts = {side: _count(f"sepvit_{plan.size}", side) for side in plan.image_sizes}
    rivals = {side: _count(plan.rival, side) for side in plan.image_sizes}
    timings = {side: _time(plan, side) for side in plan.timed_sizes}
    rows = [
        _row(plan, side, counts[side], rivals[side], timings.get(side)) for side in plan.image_sizes
    ]
    findings = [
        *_published_counts(),
        _formulas(plan),
        _half_of_two_blocks(),
        _parts_of_the_ablation(),
        _law(rows),
        *_faster(plan, timings, rows),
        Finding(
            "40 % less latency than CSWin at the same accuracy, on TensorRT", "not measured",
            "CSWin is not built here, and neither device nor batch of that number is known",
        ),
    ]  # fmt: skip
    return ExperimentResult(
        rows,
        findings=findings,
        published=[
            {key: getattr(row, key) for key in ("variant", "metric", "value", "unit", "source")}
            for row in harness.get_paper(PAPER).facts.published
            if row.of is not None and row.metric in ("params_m", "macs_g", "throughput")
        ],
        figures={"resolution": _figure(plan, rows)},
        notes=(
            "Sides other than multiples of 224 leave incomplete windows, which are padded and "
            "masked; the released code refuses them. A network is built for each side, since the "
            "number of window tokens depends on it. Multiply-adds are those of convolutions and "
            "matrix products."
        ),
        conditions=Conditions(
            device=plan.device, threads=plan.threads, batch_size=plan.batch_size,
            options={"size": plan.size, "rival": plan.rival},
        ),
    )  # fmt: skip


def _on_meta(name: str, side: int, **options: Any) -> torch.nn.Module:
    with on_meta():
        return harness.build(name, image_size=side, **options).eval()


def _count(name: str, side: int, **options: Any) -> MacsCount:
    """Counted without computing anything."""
    return count_macs(_on_meta(name, side, **options), side)


def _time(plan: Plan, side: int) -> Timing:
    """The network's timing; its ratio is to the rival."""
    models = {
        name: harness.build(name, image_size=side).eval().requires_grad_(False)
        for name in (plan.rival, f"sepvit_{plan.size}")
    }
    return time_models(
        models, seeded_images(plan.batch_size, side, count=1), device=plan.device,
        threads=plan.threads, budget_s=plan.seconds, min_rounds=5, palindromes=1,
        warm_up_s=min(0.3, plan.seconds / 10), warm_up_limit_s=min(3.0, plan.seconds),
    )[f"sepvit_{plan.size}"]  # fmt: skip


def _row(
    plan: Plan, side: int, count: MacsCount, rival: MacsCount, timing: Timing | None
) -> dict[str, Any]:
    arch = ARCHITECTURES[plan.size]
    windows = arch.window_counts(side)
    costs = block_costs(arch, side)
    low, high = timing.ratio_interval if timing else (None, None)
    return {
        "side": side,
        "maps": " ".join(str(height) for height, _ in arch.maps(side)),
        "windows": " ".join("/".join(map(str, dict.fromkeys(one))) for one in windows),
        "params": count.modules.params,
        "MACs (G)": round(count.total / 1e9, 3),
        "between windows (%)": round(100 * sum(one.pointwise for one in costs) / count.total, 2),
        "MACs per pixel": round(count.total / side**2),
        f"{plan.rival}, MACs (G)": round(rival.total / 1e9, 3),
        "time (ms)": round(1e3 * timing.median, 2) if timing else None,
        f"times {plan.rival}": round(timing.ratio, 3) if timing else None,
        "95 %": f"{low:.3f} to {high:.3f}" if timing else "",
        "timing": timing.ratio_status if timing else "",
    }


# what the rows and the code say


def _published_counts() -> list[Finding]:
    """Parameters and the authors' own counter, for each size with a printed number."""
    rows = harness.get_paper(PAPER).facts.published
    findings = []
    for metric, unit, scale in (("params_m", "M", 1e6), ("macs_g", "G", 1e9)):
        texts, fits = [], True
        for row in (one for one in rows if one.metric == metric and one.of):
            model = _on_meta(row.of, PUBLISHED)
            value = sum(one.numel() for one in model.parameters())
            if metric == "macs_g":
                value = authors_macs(model, PUBLISHED)
            # B's 82.377 M is printed as 82.3: cut digits count as agreement
            fits &= 0 <= value / scale - row.value < 0.1 or round(value / scale, 1) == row.value
            texts.append(f"{row.variant} {value / scale:.3f} {unit} for {row.value}")
        what = "parameters" if metric == "params_m" else "multiply-adds (fvcore)"
        findings.append(
            Finding(f"The published {what}", "reproduced" if fits else "deviates", "; ".join(texts))
        )
    return findings


def _formulas(plan: Plan) -> Finding:
    """The formulas against the counter, attention by attention."""
    model = _on_meta(f"sepvit_{plan.size}", PUBLISHED)
    counted = count_macs(model, PUBLISHED).modules.flat(4)
    costs = block_costs(ARCHITECTURES[plan.size], PUBLISHED)
    prefix = "blocks.{0.stage}.{0.block}.attn"
    wrong = [one for one in costs if counted[prefix.format(one)] != one.attention]
    return Finding(
        "The complexity formulas of both attentions",
        "deviates" if wrong else "reproduced",
        f"{len(costs) - len(wrong)} of {len(costs)} blocks equal the counter exactly, from "
        f"{min(one.attention for one in costs):,} to {max(one.attention for one in costs):,} "
        "multiply-adds; blocks with one window without the terms of the token",
    )


def _half_of_two_blocks() -> Finding:
    """One separable block of T against the two that Swin and Twins need."""
    arch = ARCHITECTURES["tiny"]
    maps, ratios = arch.maps(PUBLISHED), {}
    for one in block_costs(arch, PUBLISHED):
        two = two_swin_blocks(*maps[one.stage], arch.embed_dims[one.stage])
        ratios[one.stage + 1, one.windows] = one.total / two
    values = ratios.values()
    return Finding(
        "One block costs about half of two Swin blocks of the same width",
        "reproduced" if min(values) > 0.45 and max(values) < 0.6 else "deviates",
        "; ".join(f"stage {stage}, {count} windows: {ratio:.3f}"
                  for (stage, count), ratio in ratios.items()),
    )  # fmt: skip


def _parts_of_the_ablation() -> Finding:
    """Grouped attention and the overlapping stem, as counts of T."""
    forms = {
        "T": {},
        "all windows 7": {"windows": ((7,),) * 4},
        "stem 4x4": {"stem_kernel": 4},
    }
    found = {}
    for name, options in forms.items():
        model = _on_meta("sepvit_tiny", PUBLISHED, **options)
        params = sum(one.numel() for one in model.parameters())
        found[name] = params / 1e6, authors_macs(model, PUBLISHED) / 1e9
    fewer = found["T"][0] < found["all windows 7"][0]
    return Finding(
        "Grouped attention lowers the parameters: its one-window blocks need no tokens",
        "reproduced" if fewer else "deviates",
        "; ".join(
            f"{name}: {params:.3f} M, {macs:.3f} G" for name, (params, macs) in found.items()
        ),
    )  # fmt: skip


def _law(rows: Sequence[Mapping[str, Any]]) -> Finding:
    """How multiply-adds grow where nothing is padded, and what padding adds elsewhere."""
    claim = "Cost grows like the number of pixels"
    whole = [row for row in rows if row["side"] % PUBLISHED == 0]
    if len(whole) < 2:
        return Finding(claim, "not measured", "only one side without padding was counted")
    x, y = (np.log([row[key] for row in whole]) for key in ("side", "MACs (G)"))
    exponent = float(np.polyfit(2 * x, y, 1)[0])
    sides = [str(row["side"]) for row in whole]
    worst = max(rows, key=lambda row: row["MACs per pixel"])
    more = worst["MACs per pixel"] / whole[0]["MACs per pixel"] - 1
    return Finding(
        claim,
        "reproduced" if abs(exponent - 1) < 0.1 else "deviates",
        f"pixels to the power {exponent:.3f} over {', '.join(sides)}; attention between windows is "
        f"{whole[0]['between windows (%)']} % of the cost at {sides[0]} and "
        f"{whole[-1]['between windows (%)']} % at {sides[-1]}; a pixel costs most at "
        f"{worst['side']}: {more:+.0%}",
    )


def _faster(plan: Plan, timings: Mapping[int, Timing], rows: Sequence[Mapping]) -> list[Finding]:
    by_side = {row["side"]: row for row in rows}
    findings = []
    for side, timing in timings.items():
        low, high = timing.ratio_interval
        state = "" if timing.ratio_status == "ok" else f" (timing: {timing.ratio_status})"
        work = by_side[side]["MACs (G)"] / by_side[side][f"{plan.rival}, MACs (G)"]
        findings.append(
            Finding(
                f"Faster than {plan.rival} at {side} pixels",
                "reproduced" if high < 1 else "deviates",
                f"{timing.ratio:.3f} [{low:.3f}, {high:.3f}] times its time with {work:.2f} times "
                f"its multiply-adds, on {plan.device}, batch {plan.batch_size}{state}",
            )
        )
    return findings


def _figure(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sides = [row["side"] for row in rows]
    macs = [row["MACs (G)"] for row in rows]
    base = next(row for row in rows if row["side"] == PUBLISHED)
    left.plot(sides, macs, "o-", label=f"sepvit_{plan.size}")
    left.plot(sides, [row[f"{plan.rival}, MACs (G)"] for row in rows], "s--", label=plan.rival)
    line = [base["MACs (G)"] * (side / PUBLISHED) ** 2 for side in sides]
    left.plot(sides, line, color="0.7", linewidth=0.8, zorder=0, label="like the pixels")
    left.set(xscale="log", yscale="log", xlabel="side of the image, pixels", ylabel="MACs, G")
    left.set_xticks(sides, labels=[str(side) for side in sides])
    left.minorticks_off()
    left.legend(frameon=False)
    per_pixel = [row["MACs per pixel"] / base["MACs per pixel"] for row in rows]
    places = range(len(rows))
    right.bar(places, per_pixel, color="C0", alpha=0.7)
    right.axhline(1, color="0.5", linewidth=0.8)
    for place, row in enumerate(rows):
        right.text(place, per_pixel[place], row["windows"].replace(" ", "\n"), ha="center",
                   va="bottom", fontsize=7)  # fmt: skip
    right.set_xticks(places, labels=[str(side) for side in sides])
    right.set(
        xlabel="side of the image, pixels", ylabel=f"MACs per pixel, {PUBLISHED} = 1",
        ylim=(0, 1.35 * max(per_pixel)),
    )  # fmt: skip
    right.set_title("What incomplete windows cost (above: windows by stage)", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
