"""Which suffers more when its smallest weights are cut: attention or the MLPs?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from harness import Conditions, ExperimentResult, Finding, evaluate, load_pretrained
from harness.evaluation import bits_of
from harness.settings import choose
from harness.statistics import mcnemar
from reproductions.tf_tas.indicators import scored_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {"attention": {"qkv", "proj"}, "MLP": {"mlp"}}


@dataclass(frozen=True)
class Settings:
    """A scale of the experiment; every field is an option of it.

    Attributes:
        variant: a model with shipped weights for `track`.
        fractions: of a part's weights that are set to zero.
        limit: test images; None is all.
    """

    variant: str = "vit_micro"
    track: str = "fashion_mini"
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    limit: int | None = 2000
    device: str = "cpu"
    root: str | None = None


SCALES = {
    "tiny": Settings(fractions=(0.3, 0.6), limit=200),
    "small": Settings(),
    "paper": Settings(limit=None),
}


def pruning(scale: str = "small", **options: Any) -> ExperimentResult:
    """Zero the smallest weights of a trained network, in attention only or in the MLPs only.

    The paper takes from such a comparison that MLPs are the sensitive part, and hence judges them
    by saliency. The smallest weights of the part are cut, over all of its layers at once.

    Args:
        scale: `tiny`, `small` (about a CPU minute) or `paper` (the whole test split).
        options: fields of `Settings`.

    Raises:
        ReplivitError: an unknown scale or option, or a variant without shipped weights.
    """
    settings = choose(SCALES, scale, options)
    whole = _bits(load_pretrained(settings.variant, settings.track), settings)
    rows, bits = [], {}
    for part, roles in PARTS.items():
        for fraction in settings.fractions:
            model = load_pretrained(settings.variant, settings.track)
            cut = cut_smallest(model, roles, fraction)
            bits[part, fraction] = _bits(model, settings)
            rows.append({
                "part": part, "fraction": fraction, "weights_cut": cut,
                "top1": 100 * float(bits[part, fraction].mean()),
                "lost": 100 * float(whole.mean() - bits[part, fraction].mean()),
            })  # fmt: skip
    return ExperimentResult(
        rows=rows,
        findings=[_finding(settings, bits)],
        figures={"pruning": _figure(rows, 100 * float(whole.mean()))},
        notes=(
            f"{settings.variant} as shipped, {len(whole)} test images of {settings.track}, "
            f"{100 * whole.mean():.1f} % before. No training after the cut."
        ),
        conditions=Conditions(device=settings.device, threads=torch.get_num_threads(),
                              track=settings.track),
    )  # fmt: skip


@torch.no_grad()
def cut_smallest(model: nn.Module, roles: set[str], fraction: float) -> int:
    """Zero that fraction of the weights in layers of these roles, the smallest of all; in place.

    Returns:
        How many weights were set to zero.

    Raises:
        ValueError: a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"a fraction of weights is at least 0 and below 1, not {fraction}")
    layers = dict(model.named_modules())
    weights = [layers[name].weight for name, role in scored_layers(model).items() if role in roles]
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    count = int(fraction * len(sizes))
    if not count:
        return 0
    threshold = sizes.kthvalue(count).values
    cut = 0
    for weight in weights:
        small = weight.abs() <= threshold
        cut += int(small.sum())
        weight.masked_fill_(small, 0)
    return cut


def _bits(model: nn.Module, settings: Settings) -> np.ndarray:
    records = evaluate(
        model, settings.track, limit=settings.limit, device=settings.device, root=settings.root
    )
    return bits_of(records[0])


def _finding(settings: Settings, bits: dict[tuple[str, float], np.ndarray]) -> Finding:
    tests = {
        fraction: mcnemar(bits["attention", fraction], bits["MLP", fraction])
        for fraction in settings.fractions
    }
    clear = {at: test for at, test in tests.items() if test.interval[0] > 0 or test.interval[1] < 0}
    worse = [at for at, test in clear.items() if test.difference > 0]
    return Finding(
        "Cutting weights of the MLPs hurts more than cutting as large a part of attention",
        "reproduced" if clear and len(worse) == len(clear) else "deviates",
        f"MLPs lose more at {len(worse)} of the {len(clear)} fractions with a clear difference; "
        "top-1 with attention cut minus top-1 with MLPs cut: "
        + ", ".join(f"{100 * test.difference:+.1f} at {at:.0%}" for at, test in tests.items()),
    )


def _figure(rows: list[dict[str, Any]], whole: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for part, style in (("attention", "o-"), ("MLP", "s--")):
        chosen = [row for row in rows if row["part"] == part]
        axes.plot(
            [0, *(row["fraction"] for row in chosen)], [whole, *(row["top1"] for row in chosen)],
            style, ms=4, label=f"weights of {part}",
        )  # fmt: skip
    axes.set(xlabel="share of the part's weights set to zero", ylabel="top-1, %")
    axes.legend(frameon=False, title="cut:")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
