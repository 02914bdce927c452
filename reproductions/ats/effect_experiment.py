"""Does adaptive sampling pay on real images?

    replivit run ats/effect                                     # fashion_mini, three seeds
    replivit run ats/effect --set track=cifar10 --set epochs=10
    replivit run ats/effect --scale paper --set parent_weights=deit_small.pth

From the same trained parents: ATS put in without any training, and trained on for the same extra
epochs as the dense control; and the trivial rival, the best tokens by the same score, as many in
every image as ATS keeps on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import ExperimentResult, build, get_paper, get_variant
from harness.checkpoints import load_weights
from harness.effect import (
    CONTROL,
    PARENT,
    Arm,
    Claim,
    Runs,
    Setting,
    choose_setting,
    effect,
    trained_parent,
)
from harness.tokens import kept_figure, sample_images
from reproductions.ats.model import AtsVisionTransformer
from reproductions.ats.start import with_trained_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATS, ATS_AS_IS = "ATS", "ATS, no training"
TOPK, TOPK_AS_IS = "top-k", "top-k, no training"
#: Half the patches may be drawn; fewer stay, since samples meet.
LIMIT = 0.5

CLAIMS = (
    Claim("Adaptive sampling preserves accuracy (abstract)", ATS, CONTROL, within=0.5),
    Claim("It can be put into a trained network without training, at a loss of at most one point",
          ATS_AS_IS, PARENT, within=1.0),
    Claim("Training on wins back what putting it in costs", ATS, ATS_AS_IS),
    Claim("Without training, sampling beats the best tokens by the same score, as many on average",
          ATS_AS_IS, TOPK_AS_IS),
    Claim("With training too", ATS, TOPK),
)  # fmt: skip


def effect_on_images(
    scale: str = "small",
    *,
    variant: str | None = None,
    limit: float = LIMIT,
    topk_tokens: Sequence[int] | None = None,
    **options: Any,
) -> ExperimentResult:
    """Accuracy and cost of ATS with and without training, its dense control and top-k.

    Args:
        scale: `tiny`, `small` or `paper`; see `harness.effect`.
        variant: default `ats_micro`, `ats_deit_s` for `paper`.
        limit: of ATS, in parts of the patches.
        topk_tokens: patches that the rival keeps in each stage; default what ATS keeps on average
            in a trained network: `parent_weights`, the shipped weights, or else the parent of the
            first seed.
        options: fields of `harness.effect.Setting` (track, seeds, epochs, device, ...).

    Raises:
        ReplivitError: unknown names.
    """
    setting = choose_setting(scale, options)
    variant = variant or ("ats_deit_s" if scale == "paper" else "ats_micro")
    if topk_tokens is None:
        model = _trained(variant, limit, setting)
        topk_tokens = average_tokens(model, str(setting.track), setting.root)
    sampling, rival = {"tokens": limit}, {"tokens": list(topk_tokens), "mode": "topk"}
    arms = [
        Arm(ATS_AS_IS, variant, sampling, train=False),
        Arm(ATS, variant, sampling),
        Arm(TOPK_AS_IS, variant, rival, train=False),
        Arm(TOPK, variant, rival),
    ]
    return effect(
        arms, scale=scale, claims=CLAIMS, published=_published(), pictures=_kept,
        notes=(
            f"ATS draws samples for {limit:.0%} of the patches in each stage; the rival keeps "
            f"{', '.join(map(str, topk_tokens))} patches, what ATS keeps on average in a parent. "
            "Both take the parent's weights as they are."
        ),
        **options,
    )  # fmt: skip


def _trained(variant: str, limit: float, setting: Setting) -> AtsVisionTransformer:
    """ATS with trained weights, its own or a parent's, which are whole."""
    track, weights = str(setting.track), setting.parent_weights
    if weights or get_variant(variant).weights_file(track):
        return with_trained_weights(variant, track, weights, tokens=limit)[0]
    parent = trained_parent(setting, setting.seeds[0]).model
    model = build(variant, parent.num_classes, tokens=limit)
    load_weights(model, parent.state_dict(), strict=False)
    return model.eval()


@torch.inference_mode()
def average_tokens(
    model: AtsVisionTransformer,
    track: str,
    root: str | Path | None = None,
    images: int = 500,
) -> list[int]:
    """How many patches ATS keeps on average behind each stage, over test images, rounded."""
    sample = sample_images(model, track, images, root=root)
    parts = [model.forward_with_tokens(part)[1] for part in sample.inputs.split(64)]
    return [
        round(sum(int((stage >= 0).sum()) for stage in stages) / images)
        for stages in zip(*parts, strict=True)
    ]


def _published() -> list[dict[str, Any]]:
    """What was read of the same question: DeiT-B without fine-tuning, and DeiT-S."""
    return [
        {"model": row.variant, "top-1 (%)": row.value, "what": row.conditions, "source": row.source}
        for row in get_paper("ats").facts.published
        if row.metric == "top1" and row.seen and "ATS" in row.variant
    ]


def _kept(runs: Runs, setting: Setting) -> dict[str, Figure]:
    figures = {}
    for name, file in ((ATS, "kept"), (TOPK, "kept_by_topk")):
        model = runs[name][0].model.to("cpu")
        figures[file] = kept_tokens(model, str(setting.track), root=setting.root, title=name)
    return figures


def kept_tokens(
    model: AtsVisionTransformer,
    track: str = "fashion_mini",
    count: int = 6,
    title: str = "",
    root: str | Path | None = None,
) -> Figure:
    """What the stages of `model` keep, over `count` test images; four stages at most."""
    sample = sample_images(model, track, count, root=root)
    with torch.inference_mode():
        _, kept = model.forward_with_tokens(sample.inputs)
    every = -(-len(kept) // 4)
    stages = {
        f"block {block}": positions
        for block, positions in list(zip(sorted(model.ats.limits), kept, strict=True))[::every]
    }
    return kept_figure(sample, stages, model.patch_embed.grid_size, title or None)
