"""Where to merge and into how many tokens: multiply-adds and time beside the dense parent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import harness
from harness import Conditions, ExperimentResult, Finding, ReplivitError
from harness.experiment import Outcome
from harness.measurement.latency import Effort, Timing
from harness.measurement.macs import count_macs
from harness.measurement.side_by_side import time_models
from harness.measurement.yardstick import seeded_images
from harness.meta import on_meta
from harness.settings import choose

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = "patchmerger"
#: Our name of a size -> its dense parent.
PARENTS = {"ti": "deit_ti", "s": "deit_s", "b": "deit_b"}
#: The range of the claim, in percent less.
CLAIMED = (40.0, 60.0)
#: Columns of a row's speed-up and of its interval's ends.
TIMED = ("speedup", "speedup_low", "speedup_high")


@dataclass(frozen=True)
class Plan:
    """What is timed; every field is an option of the experiment.

    Attributes:
        size: of the network whose layer and number of outputs vary: ti, s or b.
        layers: blocks (from 0) that the merger stands before.
        outputs: tokens that leave a merger in the middle.
        image_sizes: pixels, for the default merger.
        timed_sizes: networks of which the default is timed too; MACs are counted for all.
        batch_sizes: the first one is used for the sweep over image sizes.
        seconds: timing budget of each group of networks that take turns.
    """

    size: str = "s"
    layers: Sequence[int] = (1, 3, 6, 9, 11)
    outputs: Sequence[int] = (1, 8, 16, 32, 64, 128)
    image_sizes: Sequence[int] = (224, 320, 448)
    timed_sizes: Sequence[str] = ("ti", "s")
    batch_sizes: Sequence[int] = (1, 8)
    seconds: float = 15.0
    threads: int = 1
    device: str = "cpu"


SCALES = {
    "tiny": Plan(
        size="ti", layers=(3, 6), outputs=(1, 8), image_sizes=(64, 96), timed_sizes=("ti",),
        batch_sizes=(1,), seconds=0.2,
    ),
    "small": Plan(),
    "paper": Plan(
        layers=tuple(range(12)), outputs=(1, 2, 4, 8, 16, 32, 64, 128, 196),
        image_sizes=(224, 288, 384, 512, 640), timed_sizes=("ti", "s", "b"),
        batch_sizes=(1, 8, 32), seconds=60.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """One network to count and time; `outputs=None` is the dense parent."""

    size: str
    image_size: int
    layer: int | None = None
    outputs: int | None = None

    def build(self) -> torch.nn.Module:
        if self.outputs is None:
            return harness.build(PARENTS[self.size], image_size=self.image_size).eval()
        return harness.build(
            f"patchmerger_deit_{self.size}", image_size=self.image_size,
            layers=self.layer, num_outputs=self.outputs,
        ).eval()  # fmt: skip

    def macs(self) -> int:
        """Convolutions and matrix products of one image, counted without computing them."""
        with on_meta():
            model = self.build()
        return count_macs(model, self.image_size).total


def placement(scale: str = "small", **changes: Any) -> ExperimentResult:
    """Cost against the place of the merger, its outputs, the size of image and of network.

    Time is that of the forward pass, all networks of a group and their dense parent in turns.

    Args:
        scale: `tiny` (does it run?), `small` (some minutes on one thread) or `paper`.
        changes: fields of `Plan`.

    Raises:
        ReplivitError: unknown scale or option.
    """
    plan = choose_plan(scale, changes)
    first = plan.image_sizes[0]
    at = partial(Network, plan.size, first)
    middle, default = 6, 8
    groups = {
        ("layer", "outputs"): [
            *(at(layer, default) for layer in plan.layers),
            *(at(middle, count) for count in plan.outputs),
        ]
    }
    for side in plan.image_sizes[1:]:
        groups["resolution", side] = [Network(plan.size, side, middle, default)]
    for size in PARENTS:
        if size != plan.size:
            groups["size", size] = [Network(size, first, middle, default)]
    rows: list[dict[str, Any]] = []
    for (kind, detail), networks in groups.items():
        networks = list(dict.fromkeys(networks))  # the default is a layer and a number of outputs
        timed = kind != "size" or detail in plan.timed_sizes
        batches = plan.batch_sizes[:1] if kind == "resolution" else plan.batch_sizes
        for batch in batches if timed else (None,):
            rows += _measure(networks, batch, plan)
    return ExperimentResult(
        rows=rows,
        findings=_findings(rows, plan),
        published=published_rows(),
        figures={"placement": _figure(rows, plan)},
        notes=(
            "Networks have random weights: cost does not depend on them. Speed-ups are the dense "
            "parent's time over the network's own, from samples taken next to each other, with "
            "95 % intervals; one thread of a CPU is timed by its CPU time. MACs are convolutions "
            "and matrix products of one image."
        ),
        conditions=Conditions(
            device=plan.device, threads=plan.threads if plan.device == "cpu" else None,
            options={key: str(value) for key, value in vars(plan).items()},
        ),
    )  # fmt: skip


def choose_plan(scale: str, changes: dict[str, Any]) -> Plan:
    """The plan of a scale with single fields changed.

    Raises:
        ReplivitError: an unknown scale, field or size of network.
    """
    plan = choose(SCALES, scale, changes)
    for size in (plan.size, *plan.timed_sizes):
        if size not in PARENTS:
            raise ReplivitError(f"no size {size!r}; there are {', '.join(PARENTS)}")
    return plan


def published_rows() -> list[dict[str, Any]]:
    """What was printed of cost and of settings."""
    keep = ("variant", "metric", "value", "unit", "source")
    return [
        {key: getattr(row, key) for key in keep}
        for row in harness.get_paper(PAPER).facts.published
        if row.metric in ("flops_and_runtime_reduction", "output_tokens")
    ]


def _measure(networks: list[Network], batch: int | None, plan: Plan) -> list[dict[str, Any]]:
    """A row for each network and for their dense parent; `batch=None` counts without timing."""
    dense = Network(networks[0].size, networks[0].image_size)
    macs = {network: network.macs() for network in (dense, *networks)}
    timings: dict[Network, Timing] = {}
    if batch is not None:
        effort = Effort(
            budget_s=plan.seconds, min_rounds=5, palindromes=1,
            warm_up_s=min(0.2, plan.seconds / 10), warm_up_limit_s=min(2.0, plan.seconds),
        )  # fmt: skip
        timings = time_models(
            {network: network.build().requires_grad_(False) for network in macs},
            seeded_images(batch, dense.image_size, count=1),
            device=plan.device, threads=plan.threads, effort=effort,
        )  # fmt: skip
    rows = []
    for network in macs:
        row = {
            "model": PARENTS[network.size], "image_size": network.image_size,
            "before_block": network.layer, "outputs": network.outputs, "batch": batch,
            "macs": macs[network], "macs_ratio": macs[dense] / macs[network],
        }  # fmt: skip
        rows.append(row | _time_columns(timings.get(network)))
    return rows


def _time_columns(timing: Timing | None) -> dict[str, Any]:
    keys = ("ms", *TIMED, "status")
    if timing is None:
        return dict.fromkeys(keys)
    low, high = timing.ratio_interval
    values = (1e3 * timing.median, 1 / timing.ratio, 1 / high, 1 / low, timing.ratio_status)
    return dict(zip(keys, values, strict=True))


# what the rows say


def _default(rows: list[dict[str, Any]], image_size: int) -> list[dict[str, Any]]:
    """The rows of the paper's protocol: 8 outputs in the middle."""
    return [
        row for row in rows
        if (row["before_block"], row["outputs"], row["image_size"]) == (6, 8, image_size)
    ]  # fmt: skip


def _sweep(
    rows: list[dict[str, Any]], plan: Plan, column: str, batch: int | None = None
) -> list[dict[str, Any]]:
    """The rows timed with `batch` images (default: the first size) in which `column` varies."""
    batch = plan.batch_sizes[0] if batch is None else batch
    fixed = {"before_block": 6, "outputs": 8, "image_size": plan.image_sizes[0]}
    del fixed[column]
    chosen = [
        row for row in rows
        if row["model"] == PARENTS[plan.size] and row["batch"] == batch
        and row["outputs"] is not None and all(row[key] == value for key, value in fixed.items())
    ]  # fmt: skip
    return sorted(chosen, key=lambda row: row[column])


def _timing_note(rows: list[dict[str, Any]]) -> str:
    """What a reader must know of the timings, if they did not go well."""
    poor = sorted({row["status"] for row in rows if row["status"] not in (None, "ok")})
    return f" (timing: {', '.join(poor)})" if poor else ""


def _findings(rows: list[dict[str, Any]], plan: Plan) -> list[Finding]:
    findings = _claimed_range(rows, plan)
    layers = _sweep(rows, plan, "before_block")
    if len(layers) > 2:
        fits = {
            key: _linear_fit([row["before_block"] for row in layers], [row[key] for row in layers])
            for key in ("macs", "ms")
        }
        findings.append(
            Finding(
                "Earlier is cheaper, in proportion to the blocks that still see all tokens",
                "reproduced" if min(fits.values()) > 0.98 else "deviates",
                f"before block {layers[0]['before_block']} to {layers[-1]['before_block']}: "
                f"{layers[0]['macs'] / 1e9:.2f} to {layers[-1]['macs'] / 1e9:.2f} G MACs, "
                f"{layers[0]['ms']:.1f} to {layers[-1]['ms']:.1f} ms; a line explains "
                f"{fits['macs']:.1%} of the MACs' variance and {fits['ms']:.1%} of the time's"
                + _timing_note(layers),
            )
        )
    few = [row for row in _sweep(rows, plan, "outputs") if row["outputs"] <= 16]
    if len(few) > 1:
        spread = few[-1]["ms"] / few[0]["ms"] - 1
        findings.append(
            Finding(
                "The number of outputs hardly matters while it is small (up to 16)",
                "reproduced" if abs(spread) < 0.1 else "deviates",
                f"{few[-1]['outputs']} instead of {few[0]['outputs']} outputs: "
                f"{few[-1]['macs'] / few[0]['macs'] - 1:+.1%} MACs, {spread:+.1%} time"
                + _timing_note(few),
            )
        )
    sides = _sweep(rows, plan, "image_size")
    if len(sides) > 1:
        after = {row["image_size"]: _after(plan.size, row["image_size"]) for row in sides}
        grows = sides[-1]["macs_ratio"] > sides[0]["macs_ratio"] and len(set(after.values())) == 1
        findings.append(
            Finding(
                "What follows the merger costs the same at every image size",
                "reproduced" if grows else "deviates",
                f"{after[sides[0]['image_size']] / 1e6:.1f} M MACs after the merger at "
                f"{', '.join(str(side) for side in after)} px; dense over merged grows from "
                f"{sides[0]['macs_ratio']:.3f} to {sides[-1]['macs_ratio']:.3f} in MACs, from "
                f"{sides[0]['speedup']:.2f} to {sides[-1]['speedup']:.2f} in time"
                + _timing_note(sides),
            )
        )
    findings.append(
        Finding(
            "The quality of the original is matched, upstream and after finetuning",
            "not measured",
            "needs JFT-300M; patchmerger/effect asks it of small images",
        )
    )
    return findings


def _claimed_range(rows: list[dict[str, Any]], plan: Plan) -> list[Finding]:
    """The claim of 40 to 60 %: for the MACs of all sizes, and for the time at each batch size."""
    default = _default(rows, plan.image_sizes[0])
    macs = {row["model"]: _spared(row["macs_ratio"]) for row in default}
    findings = [
        Finding(
            "40 to 60 % fewer FLOPs with 8 outputs in the middle, across model sizes",
            _in_range(macs.values()),
            "fewer MACs: " + ", ".join(f"{name} {value:.1f} %" for name, value in macs.items()),
        )
    ]
    for batch in plan.batch_sizes:
        timed = [row for row in default if row["batch"] == batch]
        findings.append(
            Finding(
                f"40 to 60 % less runtime with 8 outputs in the middle, batch {batch}",
                _in_range([_spared(row["speedup"]) for row in timed]),
                "less time: "
                + ", ".join(
                    f"{row['model']} {_spared(row['speedup']):.1f} % "
                    f"[{_spared(row['speedup_low']):.1f}, {_spared(row['speedup_high']):.1f}]"
                    for row in timed
                )
                + _timing_note(timed),
            )
        )
    return findings


def _spared(ratio: float) -> float:
    """How much less, in percent, is spent by what is `ratio` times as cheap."""
    return 100 * (1 - 1 / ratio)


def _in_range(values: Iterable[float]) -> Outcome:
    low, high = CLAIMED
    return "reproduced" if all(low <= value <= high for value in values) else "deviates"


def _after(size: str, image_size: int) -> int:
    """Multiply-adds of the blocks behind a merger of 8 outputs in the middle."""
    with on_meta():
        model = Network(size, image_size, 6, 8).build()
    tree = {child.name: child for child in count_macs(model, image_size).modules.children}
    return sum(
        block.macs for block in tree["blocks"].children if block.name.isdigit()
        and int(block.name) >= 6
    )  # fmt: skip


def _linear_fit(x: Sequence[float], y: Sequence[float]) -> float:
    """The share of the variance of `y` that a line in `x` explains (R squared)."""
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def _figure(rows: list[dict[str, Any]], plan: Plan) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    texts = {
        "before_block": "merger before block, 8 outputs",
        "outputs": "outputs, merger before block 6",
        "image_size": "image side in pixels, 8 outputs before block 6",
    }
    for axes, (column, label) in zip(panels, texts.items(), strict=True):
        chosen = _sweep(rows, plan, column)
        places = [row[column] for row in chosen]
        axes.plot(places, [100 / row["macs_ratio"] for row in chosen], "o-", label="MACs")
        for batch in plan.batch_sizes:
            timed = _sweep(rows, plan, column, batch)
            if len(timed) == len(places):
                _plot_times(axes, places, timed, f"time, batch {batch}")
        axes.axhline(100, color="0.7", linewidth=0.8)
        axes.set(xlabel=label, ylabel=f"% of the dense {PARENTS[plan.size]}")
        axes.set_ylim(bottom=0)
        if column == "outputs":
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, labels=[str(place) for place in places])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, loc="lower right")
    figure.suptitle("What a merger leaves of the cost")
    return figure


def _plot_times(axes: Axes, places: list[int], rows: list[dict[str, Any]], label: str) -> None:
    """Time in % of the dense parent's, with its interval."""
    share = {key: [100 / row[key] for row in rows] for key in TIMED}
    below = [a - b for a, b in zip(share["speedup"], share["speedup_high"], strict=True)]
    above = [a - b for a, b in zip(share["speedup_low"], share["speedup"], strict=True)]
    axes.errorbar(
        places, share["speedup"], [below, above], fmt="s--", capsize=3, mfc="white", label=label
    )  # fmt: skip
