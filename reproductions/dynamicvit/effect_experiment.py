"""Does the learned choice of tokens pay on real images? (Tables 3 and 4 in small.)

    replivit run dynamicvit/effect                            # fashion_mini, three seeds
    replivit run dynamicvit/effect --set track=cifar10 --set epochs=10
    replivit run dynamicvit/effect --scale paper --set parent_weights=deit_small.pth

From the same trained parents, for the same extra epochs: the dense network, DynamicViT at three
keep ratios, and the two rules that need no predictor: keep at random, and keep what the class
token attends to. All pruned arms learn with the same losses from the same teacher, the parent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import harness
from harness import ExperimentResult
from harness.effect import CONTROL, PARENT, Arm, Claim, Runs, Setting, effect, test_split
from harness.tokens import kept_figure, sample_images
from harness.training import read_recipe
from reproductions.dynamicvit.method import DynamicViTObjective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harness.data import ImageDataset
    from reproductions.dynamicvit.model import DynamicViT

LEARNED = "DynamicViT 0.7"
RANDOM, ATTENTION = "random keep 0.7", "attention top-k 0.7"
#: Points that the paper loses at most against the dense network, at 0.7 and 0.9 (Table 1).
ALLOWED = 0.5


def arms(variant: str = "dynamicvit_micro") -> list[Arm]:
    """DynamicViT at 0.9, 0.7 and 0.5, and its two rivals at 0.7.

    The prediction modules learn faster than the rest, as the variant's recipe says: a hundred
    times on ImageNet, twenty times on the small tracks. The rest learns as fast as the control.
    """
    own = harness.get_variant(variant)
    rates = read_recipe(own.spec.recipe, own).model_dump(include={"lr", "parameter_groups"})
    learned = [
        Arm(
            f"DynamicViT {ratio}", variant, {"keep_ratio": ratio},
            objective=DynamicViTObjective, recipe=rates, new=("score_predictor.*",),
        )
        for ratio in (0.9, 0.7, 0.5)
    ]  # fmt: skip
    rivals = [
        Arm(name, variant, {"keep_ratio": 0.7, "scorer": scorer}, objective=DynamicViTObjective)
        for name, scorer in ((RANDOM, "random"), (ATTENTION, "attention"))
    ]
    return [*learned, *rivals]


CLAIMS = (
    Claim("The prediction module beats random removal (79.3 against 77.5, Table 4b)",
          LEARNED, RANDOM),
    Claim("The prediction module beats the class token's attention (79.3 against 78.1, Table 4b)",
          LEARNED, ATTENTION),
    Claim("Keeping 0.9 loses nothing against the network it starts from (79.8 and 79.8, Table 1)",
          "DynamicViT 0.9", PARENT, within=ALLOWED),
    Claim("Keeping 0.7 loses at most 0.5 points against it (79.3 against 79.8, Table 1)", LEARNED,
          PARENT, within=ALLOWED),
    Claim("Keeping 0.9 loses at most 0.5 points against that network trained on for as long",
          "DynamicViT 0.9", CONTROL, within=ALLOWED),
    Claim("Keeping 0.7 loses at most 0.5 points against that network trained on for as long",
          LEARNED, CONTROL, within=ALLOWED),
    Claim("Keeping 0.5 costs accuracy against 0.7 (77.5 against 79.3, appendix)", LEARNED,
          "DynamicViT 0.5"),
)  # fmt: skip


def effect_on_images(scale: str = "small", **options: Any) -> ExperimentResult:
    """Accuracy and cost of DynamicViT, its dense control and two trivial rivals.

    Args:
        scale: `tiny`, `small` or `paper`; see `harness.effect`.
        options: fields of `harness.effect.Setting` (track, seeds, epochs, device, ...), and
            `variant`, the DynamicViT that fits the setting's parent.
    """
    default = "dynamicvit_deit_s_k07" if scale == "paper" else "dynamicvit_micro"
    variant = options.pop("variant", default)
    return effect(
        arms(variant), scale=scale, claims=CLAIMS, published=_published(), pictures=_kept,
        notes=(
            "All pruned arms learn with the same losses from the parent of their seed. Random "
            "keep draws anew for every image in training and has one fixed random order in "
            "evaluation. The paper's numbers are of DeiT-S on ImageNet at 2.9 G."
        ),
        **options,
    )  # fmt: skip


def _published() -> list[dict[str, Any]]:
    """Tables 4a to 4c: the same question on ImageNet."""
    return [
        {"model": row.variant, "what": row.conditions, "top-1 (%)": row.value, "source": row.source}
        for row in harness.get_paper("dynamicvit").facts.published
        if row.source.startswith("paper Table 4")
    ]


def _kept(runs: Runs, setting: Setting) -> dict[str, Figure]:
    """What the stages of the learned and of the attention arm keep, over test images."""
    figures = {}
    for name, file in ((LEARNED, "kept"), (ATTENTION, "kept_by_attention")):
        model = runs[name][0].model.to("cpu")
        figures[file] = kept_tokens(model, test_split(setting), title=name)
    return figures


def kept_tokens(
    model: DynamicViT, images: str | ImageDataset = "fashion_mini", count: int = 6, title: str = ""
) -> Figure:
    """What each stage of `model` keeps, over `count` images of a track or of a data set."""
    sample = sample_images(model, images, count)
    with torch.inference_mode():
        _, kept = model.forward_with_tokens(sample.inputs)
    stages = {
        f"before block {block}": positions
        for block, positions in zip(model.pruning_loc, kept, strict=True)
    }
    return kept_figure(sample, stages, model.grid, title or None)
