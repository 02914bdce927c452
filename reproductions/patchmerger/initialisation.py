"""How to draw the queries: what the softmax of a merger looks like before any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import harness
from harness import Conditions, ExperimentResult, Finding
from harness.settings import of_scale
from harness.tokens import sample_images
from reproductions.patchmerger.insertion import insert_merger, mergers
from reproductions.patchmerger.merger import PatchMerger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: (scaled scores, standard deviation of the queries; None = dim ** -0.5), as rows call them.
FORMS = {
    "unscaled, std 1": (False, 1.0),
    "unscaled, std C^-0.5": (False, None),
    "scaled, std 1": (True, 1.0),
}
#: scale -> (draws of the queries, images)
SCALES = {"tiny": (2, 8), "small": (20, 50), "paper": (100, 500)}
#: Noise inputs; each of them has 196 tokens.
NOISE = 8


def initialisation(
    scale: str = "small",
    widths: Sequence[int] = (64, 192, 384, 768),
    num_outputs: int = 8,
    base: str = "vit_micro",
    track: str = "fashion_mini",
) -> ExperimentResult:
    """The first softmax of a merger for three ways to draw and scale its queries.

    Measured on normalised normal noise of several widths (196 tokens), and on what a trained
    network shows a merger in its middle.

    Args:
        scale: `tiny`, `small` (seconds) or `paper`: draws and images.
        widths: of the noise.
        base: a variant with weights shipped for `track`.

    Raises:
        ReplivitError: unknown scale, or no such weights.
    """
    draws, count = of_scale(SCALES, scale)
    inputs = {
        f"noise, {width} wide": torch.randn(
            NOISE, 196, width, generator=torch.Generator().manual_seed(width)
        )
        for width in widths
    }
    inputs[f"{base}, {track}"] = _tokens(base, track, count)
    rows = []
    for source, tokens in inputs.items():
        for form in FORMS:
            values = [_first_softmax(tokens, form, num_outputs, seed) for seed in range(draws)]
            means = {key: sum(one[key] for one in values) / draws for key in values[0]}
            rows.append({"tokens": source, "width": tokens.shape[-1], "form": form, **means})
    return ExperimentResult(
        rows=rows,
        findings=_findings(rows),
        figures={"initialisation": _figure(inputs, num_outputs)},
        notes=(
            f"Means over {draws} draws of {num_outputs} queries, {NOISE} times 196 tokens of noise "
            f"and {count} images. Effective tokens: the exponential of an output's entropy, N for "
            "an even mean, 1 for a choice. "
            "Room to learn: one minus the sum of the squared weights, which the softmax passes on "
            "to its scores; 0 for a choice."
        ),
        conditions=Conditions(track=track, options={"num_outputs": num_outputs, "base": base}),
    )


@torch.no_grad()
def _tokens(base: str, track: str, count: int) -> Tensor:
    """What a merger in the middle of a trained `base` gets to see: `(B, N, C)`, patches alone."""
    model = harness.load_pretrained(base, track=track)
    middle = len(model.blocks) // 2
    insert_merger(model, middle)
    seen: list[Tensor] = []
    merger = mergers(model)[middle]
    merger.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(sample_images(model, track, count).inputs)
    return seen[0][:, merger.num_prefix_tokens :]


def _merger(width: int, form: str, num_outputs: int, seed: int) -> PatchMerger:
    scale, std = FORMS[form]
    torch.manual_seed(seed)
    return PatchMerger(width, num_outputs, scale=scale, init_std=std)


@torch.no_grad()
def _first_softmax(tokens: Tensor, form: str, num_outputs: int, seed: int) -> dict[str, float]:
    """Statistics of the weights `(B, M, N)` of a merger that was just made."""
    # in float64 the smallest weights do not vanish, and their logarithms are the scores again
    merger = _merger(tokens.shape[-1], form, num_outputs, seed).double()
    weights = merger.assignment(tokens.double())
    scores = weights.log()
    entropy = -(weights * scores).sum(-1)
    return {
        "score_std": float(scores.std(-1).mean()),
        "largest_weight": float(weights.amax(-1).mean()),
        "effective_tokens": float(entropy.exp().mean()),
        "room_to_learn": float((1 - weights.square().sum(-1)).mean()),
    }


def _findings(rows: list[dict[str, Any]]) -> list[Finding]:
    unscaled, small, scaled = (
        [row for row in rows if row["form"] == form] for form in FORMS
    )  # fmt: skip
    text = "; ".join(
        f"{bad['tokens']}: largest weight {bad['largest_weight']:.2f} against "
        f"{good['largest_weight']:.2f}, {bad['effective_tokens']:.1f} against "
        f"{good['effective_tokens']:.1f} effective tokens"
        for bad, good in zip(unscaled, small, strict=True)
    )
    peaked = all(
        bad["largest_weight"] > 5 * good["largest_weight"]
        and bad["room_to_learn"] < good["room_to_learn"]
        for bad, good in zip(unscaled, small, strict=True)
    )
    equal = max(
        abs(one["score_std"] / other["score_std"] - 1)
        for one, other in zip(small, scaled, strict=True)
    )
    return [
        Finding(
            "Queries of standard deviation 1 without a scale start as a choice, not as a mean",
            "reproduced" if peaked else "deviates",
            f"std 1 against C^-0.5, both unscaled: {text}",
        ),
        Finding(
            "Dividing the scores or the queries by the root of the width gives the same start",
            "reproduced" if equal < 0.05 else "deviates",
            f"the scores' standard deviations differ by at most {equal:.1%}",
        ),
    ]


@torch.no_grad()
def _figure(inputs: dict[str, Tensor], num_outputs: int) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(inputs), 3.4), layout="constrained")
    panels = figure.subplots(1, len(inputs), sharey=True, squeeze=False)[0]
    for axes, (source, tokens) in zip(panels, inputs.items(), strict=True):
        for form, style in zip(FORMS, ("-", "-", "--"), strict=True):
            weights = _merger(tokens.shape[-1], form, num_outputs, 0).assignment(tokens)
            ranked = weights.sort(-1, descending=True).values.mean((0, 1))
            axes.plot(range(1, len(ranked) + 1), ranked, style, label=form)
        axes.set(xscale="log", xlabel="token, by weight", title=source, ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight in an output")
    panels[0].legend(frameon=False, fontsize=8)
    return figure
