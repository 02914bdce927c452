"""How the samples fall: the CDF of the scores, and how many tokens a peaked one leaves.

    replivit run ats/sampling

From the first sampling stage of a trained network: the image that keeps the fewest tokens and the
one that keeps the most, with their CDFs and the samples drawn from them; and what happens to the
number of tokens if the class token's attention is made more peaked or flatter than it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from harness import Conditions, ExperimentResult, Finding
from harness.settings import of_scale
from harness.tokens import Sample, draw_kept, sample_images
from reproductions.ats.layouts import split_heads
from reproductions.ats.model import AtsVisionTransformer
from reproductions.ats.sampling import cumulative, sample_counts, significance, top_scores
from reproductions.ats.start import with_trained_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: scale -> images
SCALES = {"tiny": 12, "small": 500, "paper": 5000}
#: The attention's logits are divided by these: below 1 more peaked, above 1 flatter.
TEMPERATURES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 8.0)


def sampling(
    scale: str = "small",
    *,
    track: str = "fashion_mini",
    variant: str = "ats_micro",
    weights: str | Path | None = None,
    images: int | None = None,
    limit: float = 0.5,
    root: str | Path | None = None,
) -> ExperimentResult:
    """Tokens kept by the first stage, for attention of different temperatures.

    Args:
        scale: `small` (500 images, seconds), `paper` (5,000), `tiny` (does it run?).
        weights: of the variant or its parent; default the shipped ones.
        limit: samples drawn, in parts of the patches.

    Raises:
        ReplivitError: unknown scale or names, or no weights.
    """
    count = of_scale(SCALES, scale)
    model, origin = with_trained_weights(variant, track, weights, tokens=limit)
    sample = sample_images(model, track, images or count, root=root)
    logits, values = first_stage(model, sample.inputs)
    samples = model.ats.limits[min(model.ats.limits)]
    rows = []
    for temperature in TEMPERATURES:
        scores = scores_of(model, logits / temperature, values)
        kept = (sample_counts(cumulative(scores), samples) > 0).sum(1).numpy()
        rows.append(_row(temperature, scores, kept))
    scores = scores_of(model, logits, values)
    means = [row["tokens kept"] for row in rows]
    rising = np.all(np.diff(means) >= 0) and means[0] < means[-1]
    return ExperimentResult(
        rows,
        [
            Finding(
                "A peaked distribution is hit on the same tokens again and keeps few of them",
                "reproduced" if rising else "deviates",
                f"of {samples} samples, {means[0]:.1f} tokens are distinct at temperature "
                f"{TEMPERATURES[0]}, {means[TEMPERATURES.index(1.0)]:.1f} as trained, "
                f"{means[-1]:.1f} at {TEMPERATURES[-1]}",
            ),
            _against_topk(scores, samples),
        ],
        figures={"sampling": _draw(model, sample, scores, samples, rows)},
        notes=(
            f"{len(sample)} test images of {sample.source}. {origin} The first stage is block "
            f"{min(model.ats.limits)}; it draws {samples} samples. The temperature divides the "
            "logits of the class token's attention."
        ),
        conditions=Conditions(
            image_size=sample.inputs.shape[-1], track=str(track),
            options={"variant": variant, "limit": limit, "images": len(sample)},
        ),
    )  # fmt: skip


@torch.inference_mode()
def first_stage(model: AtsVisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the first sampling block scores by.

    Returns:
        The class token's attention to all tokens before the softmax `(B, H, N)`, and the values
        `(B, H, N, d)`.
    """
    index = min(model.ats.limits)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks[:index]:
        x = block(x)
    block = model.blocks[index]
    q, k, v = split_heads(block.attn, block.attn.qkv(block.norm1(x)))
    return (q[:, :, :1] @ k.mT * block.attn.scale)[:, :, 0], v


def scores_of(model: AtsVisionTransformer, logits: Tensor, values: Tensor) -> Tensor:
    """The patches' scores `(B, N)` from what `first_stage` gives."""
    row = logits.softmax(-1)[..., model.num_prefix_tokens :]
    return significance(row, values[:, :, model.num_prefix_tokens :])


def _row(temperature: float, scores: Tensor, kept: np.ndarray) -> dict[str, Any]:
    share = scores / scores.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1)
    p5, p95 = np.percentile(kept, [5, 95])
    return {
        "temperature": temperature,
        "tokens kept": round(float(kept.mean()), 2),
        "p5": float(p5),
        "p95": float(p95),
        "effective number of tokens": round(float(entropy.exp().mean()), 1),
        "n": len(kept),
    }


def _against_topk(scores: Tensor, samples: int) -> Finding:
    """How much of the significance each rule keeps, at as many tokens for every image."""
    hit = sample_counts(cumulative(scores), samples) > 0
    share = scores / scores.sum(1, keepdim=True)
    best = torch.stack(
        [top_scores(own, int(count)) for own, count in zip(scores, hit.sum(1), strict=True)]
    )
    ours, theirs = (float((share * mask).sum(1).mean()) for mask in (hit, best))
    common = float(((hit & best).sum(1) / hit.sum(1)).mean())
    return Finding(
        "Sampling is not top-k: tokens of small score have a chance too",
        "reproduced" if common < 1 else "deviates",
        f"of the tokens it keeps, {common:.0%} are among the best as many; they hold {ours:.0%} of "
        f"all significance, the best ones {theirs:.0%}",
    )


# --- picture ---------------------------------------------------------------------------------


def _draw(
    model: AtsVisionTransformer,
    sample: Sample,
    scores: Tensor,
    samples: int,
    rows: list[dict[str, Any]],
) -> Figure:
    from matplotlib.figure import Figure

    counts = (sample_counts(cumulative(scores), samples) > 0).sum(1)
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.7, 1])
    cells = left.subplots(2, 3, width_ratios=[1, 1, 2.4])
    for line, image in zip(cells, (int(counts.argmin()), int(counts.argmax())), strict=True):
        _draw_image(line, model, sample, scores[image], samples, image)
    axes = right.subplots()
    temperatures = [row["temperature"] for row in rows]
    axes.fill_between(
        temperatures, [row["p5"] for row in rows], [row["p95"] for row in rows], alpha=0.2,
        color="#4c72b0", label="5 to 95 % of images",
    )  # fmt: skip
    axes.plot(temperatures, [row["tokens kept"] for row in rows], "o-", color="#4c72b0")
    axes.axvline(1, color="0.7", linewidth=0.8)
    axes.set(
        xscale="log", xlabel="temperature of the attention", ylabel="tokens kept",
        title=f"Peaked keeps few ({samples} samples)",
    )  # fmt: skip
    axes.set_xticks(temperatures[::2], [f"{one:g}" for one in temperatures[::2]])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_image(
    axes: np.ndarray,
    model: AtsVisionTransformer,
    sample: Sample,
    scores: Tensor,
    samples: int,
    image: int,
) -> None:
    """A picture, what is kept of it, and its CDF with the samples."""
    cdf = cumulative(scores)
    hits = sample_counts(cdf, samples)
    kept = hits > 0
    grid = model.patch_embed.grid_size
    draw_kept(axes[0], sample.pictures[image], torch.ones_like(kept), grid)
    axes[0].set_title(sample.names[image], fontsize=9)
    draw_kept(axes[1], sample.pictures[image], kept, grid)
    axes[1].set_title(f"{int(kept.sum())} of {len(kept)} kept", fontsize=9)
    places = np.arange(len(cdf))
    axes[2].step(places, cdf, where="mid", color="0.35", linewidth=1)
    middle = (np.arange(samples) + 0.5) / samples
    hit = np.repeat(places, hits.numpy())
    axes[2].hlines(middle, -1, hit, color="#4c72b0", linewidth=0.4)
    axes[2].vlines(hit, 0, middle, color="#4c72b0", linewidth=0.4, alpha=0.5)
    axes[2].plot(places[kept], np.zeros(int(kept.sum())), "|", color="#c44e52", markersize=9)
    axes[2].set(xlim=(-1, len(cdf)), ylim=(0, 1), ylabel="CDF of the scores")
    axes[2].set_xlabel("patch, row by row (red: kept)")
    axes[2].spines[["top", "right"]].set_visible(False)
