"""Does DynamicViT spend more on harder images? It does not, and this shows it.

    replivit run dynamicvit/adaptive_cost

The name suggests a cost that follows the image. What follows the image is *which* tokens stay;
*how many* is fixed by the keep ratio. So multiply-adds are the same for every image to the last
one, and latency differs from image to image no more than one image from itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import harness
from harness import Conditions, ExperimentResult, Finding, ReplivitError
from harness.data import load_split
from harness.measurement.macs import count_macs_distribution
from harness.measurement.macs_fvcore import count_macs_fvcore
from harness.measurement.side_by_side import time_images
from harness.settings import of_scale
from harness.tokens import keep_mask, sample_images
from reproductions.dynamicvit.method import DynamicViTObjective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANT, PARENT = "dynamicvit_micro", "vit_micro"
#: Images counted by the paper's rule, which traces each of them anew.
TRACED = 20
#: scale -> (images, repeats of the timing)
SCALES = {"tiny": (4, 2), "small": (200, 15), "paper": (2000, 30)}


def adaptive_cost(
    scale: str = "small",
    *,
    track: str = "fashion_mini",
    variant: str = VARIANT,
    parent: str = PARENT,
    weights: str | Path | None = None,
    images: int | None = None,
    repeats: int | None = None,
    root: str | Path | None = None,
) -> ExperimentResult:
    """Multiply-adds and latency of single test images, as distributions; and which tokens stay.

    Args:
        scale: `small` (200 images of the small track), `paper` (2,000), `tiny` (does it run?).
        weights: of the variant; default the shipped ones, else the parent's shipped weights
            fine-tuned here for one epoch.
        images, repeats: how many test images, and how often each is timed.

    Raises:
        ReplivitError: unknown scale or names, or no weights to start from.
    """
    count, times = of_scale(SCALES, scale)
    count, times = images or count, repeats or times
    if harness.get_variant(variant).paper.key != "dynamicvit":
        raise ReplivitError(f"{variant} is no variant of DynamicViT: it keeps every token")
    model, origin = trained(variant, parent, track, weights, root, tiny=scale == "tiny")
    dense = harness.build(parent, model.num_classes).eval()
    sample = sample_images(model, track, count, root=root)
    names = (variant, parent)
    models = dict(zip(names, (model, dense), strict=True))
    macs = {name: count_macs_distribution(one, sample.inputs) for name, one in models.items()}
    traced = sample.inputs[:TRACED]
    paper = {name: by_the_paper(one, traced) for name, one in models.items()}
    seconds = {name: time_images(one, sample.inputs, times) for name, one in models.items()}
    rows = [
        row
        for name in names
        for row in (
            _row(name, "MACs (M)", np.array(macs[name].values) / 1e6),
            _row(name, "MACs by the paper's rule (M)", paper[name] / 1e6),
            _row(name, "latency (ms), median of repeats", 1e3 * np.median(seconds[name], axis=0)),
            _row(name, "latency (ms), one image repeated", _noise(1e3 * seconds[name])),
        )
    ]
    with torch.inference_mode():
        kept = model.forward_with_tokens(sample.inputs)[1]
    masks = [keep_mask(one, model.grid[0] * model.grid[1]) for one in kept]
    return ExperimentResult(
        rows,
        [
            _constant(macs[variant].values, paper[variant]),
            _time_follows_image(seconds[variant]),
            *(_choice_differs(stage, mask) for stage, mask in enumerate(masks, 1)),
        ],
        figures={"adaptive_cost": _draw(model, macs[variant].values, seconds, masks)},
        notes=(
            f"{count} images of {sample.source}, {times} repeats each in random order, batch 1, "
            f"one thread, CPU time. {origin} The paper's rule is fvcore's total, which adds five "
            "per element of a layer norm. 'One image repeated' is the spread of single timings "
            "around their image's median: the noise."
        ),
        conditions=Conditions(
            threads=1, batch_size=1, image_size=sample.inputs.shape[-1], track=str(track)
        ),
    )


def trained(
    variant: str,
    parent: str,
    track: str,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    tiny: bool = False,
) -> tuple[nn.Module, str]:
    """The variant with trained weights in evaluation mode, and in words where they are from.

    Shipped weights if there are any for the track; else one epoch of fine-tuning (resumable) from
    the parent's shipped weights.
    """
    if weights is not None:
        from harness.checkpoints import load_model

        return load_model(variant, weights), "The weights are those of the file given."
    if harness.get_variant(variant).weights_file(track):
        return harness.load_pretrained(variant, track), "The weights are the shipped ones."
    teacher = harness.load_pretrained(parent, track)
    start = {key: value.clone() for key, value in teacher.state_dict().items()}
    run = harness.train(
        variant, track, "micro", epochs=1, init=start, root=root,
        objective=DynamicViTObjective(teacher), device="cpu", evaluate=False, quiet=True,
        hold_out=len(load_split(track, "train", root)) - 256 if tiny else 0,
    )  # fmt: skip
    return run.model.cpu(), f"{variant} was fine-tuned for one epoch from the shipped {parent}."


def by_the_paper(model: nn.Module, images: Tensor) -> np.ndarray:
    """Multiply-adds of each image `(3, H, W)` by the authors' counter, `(N,)`."""
    return np.array([count_macs_fvcore(model, inputs=image[None]).total for image in images])


def _row(name: str, what: str, values: np.ndarray) -> dict[str, Any]:
    p5, p95 = np.percentile(values, [5, 95])
    mean = float(values.mean())
    return {
        "model": name,
        "quantity": what,
        "mean": round(mean, 4),
        "p5": round(float(p5), 4),
        "p95": round(float(p95), 4),
        "(p95 - p5) / mean": f"{(p95 - p5) / mean:.2%}",
        "n": len(values),
    }


def _noise(seconds: np.ndarray) -> np.ndarray:
    """`(repeats, N)`: single timings, each with its image's own level taken out."""
    return (seconds - np.median(seconds, axis=0) + np.median(seconds)).ravel()


def _constant(macs: tuple[int, ...], paper: np.ndarray) -> Finding:
    """DynamicViT's cost is set by the keep ratio; that is no failure, but it is no adaptivity."""
    same = len(set(macs)) == 1 and len(set(paper.tolist())) == 1
    return Finding(
        "Every image costs the same number of multiply-adds, by both counting rules",
        "reproduced" if same else "deviates",
        f"{len(set(macs))} different count(s) over {len(macs)} images: {min(macs) / 1e6:.3f} to "
        f"{max(macs) / 1e6:.3f} M, by the paper's rule {paper.min() / 1e6:.3f} to "
        f"{paper.max() / 1e6:.3f} M",
    )


def _time_follows_image(seconds: np.ndarray) -> Finding:
    """Friedman's test: within every repeat, are some images always the slower ones?"""
    test = stats.friedmanchisquare(*seconds.T) if len(seconds) > 1 else None
    p_value = float(test.pvalue) if test else 1.0
    between = np.percentile(np.median(seconds, axis=0), [5, 95])
    spread = float((between[1] - between[0]) / np.median(seconds))
    found = p_value < 0.01
    return Finding(
        "Latency does not depend on the image",
        "deviates" if found else "reproduced",
        f"medians of images differ by {spread:.1%} (p5 to p95)"
        + (", and the same images are slower again and again" if found else ", which is noise")
        + f": Friedman's test over {len(seconds)} repeats, p = {p_value:.2g}",
    )


def _choice_differs(stage: int, mask: Tensor) -> Finding:
    """How much of what one image keeps another one keeps too, against a choice by lot."""
    kept = mask.float()
    share = float(kept.sum(1).mean()) / kept.shape[1]
    together = kept @ kept.T / kept.sum(1)
    others = ~torch.eye(len(kept), dtype=torch.bool)
    overlap = float(together[others].mean()) if len(kept) > 1 else 1.0
    return Finding(
        f"Which tokens stay depends on the image (stage {stage})",
        "reproduced" if overlap < 1 else "deviates",
        f"two images share {overlap:.0%} of the positions they keep; by lot it would be "
        f"{share:.0%}, with one choice for all 100 %",
    )


def _draw(
    model: nn.Module, macs: tuple[int, ...], seconds: dict[str, np.ndarray], masks: list[Tensor]
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 + 3.0 + 2.1 * len(masks), 3.2), layout="constrained")
    panels = figure.subplots(1, 2 + len(masks), width_ratios=[3.2, 3.0] + [2.1] * len(masks))
    panels[0].plot(np.sort(macs) / np.mean(macs), drawstyle="steps-mid", color="#c44e52")
    panels[0].set(
        ylim=(0, 1.5), xlabel="image, by its cost", ylabel="MACs / their mean",
        title=f"MACs: {np.mean(macs) / 1e6:.2f} M"
        + (" for every image" if len(set(macs)) == 1 else " on average"),
    )  # fmt: skip
    medians = {name: 1e3 * np.median(values, axis=0) for name, values in seconds.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(medians.values())), bins=40)
    for (name, values), colour in zip(medians.items(), ("#c44e52", "#4c72b0"), strict=True):
        panels[1].hist(values, bins=edges, alpha=0.7, color=colour, label=name)
    panels[1].set(xlabel="latency, ms", ylabel="images", title="Latency, batch 1")
    panels[1].legend(frameon=False, fontsize=8)
    for axes in panels[:2]:
        axes.spines[["top", "right"]].set_visible(False)
    for stage, (axes, mask) in enumerate(zip(panels[2:], masks, strict=True), 1):
        often = mask.float().mean(0).reshape(model.grid)
        shown = axes.imshow(often, vmin=0, vmax=1, cmap="viridis")
        axes.set(xticks=[], yticks=[], title=f"stage {stage}: {int(mask[0].sum())} kept")
    figure.colorbar(shown, ax=panels[2:].tolist(), label="kept in this share of images", shrink=0.8)
    return figure
