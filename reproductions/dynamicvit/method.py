"""The method's fine-tuning: four losses, and the teacher that two of them need.

    replivit train dynamicvit_micro --track fashion_mini --init vit_micro.safetensors
    replivit train dynamicvit_deit_s_k07 --data /data/imagenet --init deit_small.pth

The dense network is both the start and the teacher. Which parameters learn how fast is data: the
`parameter_groups` of the recipes beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from harness import ReplivitError
from harness.training import Objective, cross_entropy, freeze_teacher, load_teacher
from harness.training.state import state_sha256
from reproductions.dynamicvit.model import TrainingOutput

if TYPE_CHECKING:
    from harness.training import Context


def ratio_loss(decisions: Tensor, ratios: Sequence[float], per_image: bool = True) -> Tensor:
    """Squared distance of the kept share from its target, summed over stages.

    Args:
        decisions: `(B, S, N)`.
        ratios: S targets.
        per_image: whether every image has to meet them, or only the batch's mean (official code:
            `dynamic=True`, which nobody uses).
    """
    kept = decisions.mean(dim=2)  # (B, S)
    if not per_image:
        kept = kept.mean(dim=0, keepdim=True)
    return (kept - kept.new_tensor(ratios)).square().mean(dim=0).sum()


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits `(..., K)`, summed.

    In double precision: two logarithms near -7 nearly cancel, and in single precision their
    rounding, 5e-7, would be the sum's fifth digit.
    """
    ours, theirs = (one.log_softmax(dim=-1, dtype=torch.float64) for one in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True).to(logits.dtype)


def token_loss(features: Tensor, teacher: Tensor, mask: Tensor, kind: str = "mse") -> Tensor:
    """How far the kept tokens are from the teacher's (Eq. 13); 0 where none is kept.

    Args:
        features, teacher: `(B, L, C)`.
        mask: `(B, L)`, 1 = kept at the end.
        kind: "mse", over tokens and channels (the paper's formula divides by tokens alone), or
            "kl" for logits, over tokens.
    """
    kept = mask > 0.5
    ours, theirs = features[kept], teacher[kept]
    count = max(len(ours), 1)
    if kind == "kl":
        return divergence(ours, theirs) / count
    return (ours - theirs).square().sum() / (count * features.shape[-1])


def pruning_losses(
    output: TrainingOutput,
    teacher: tuple[Tensor, Tensor],
    classification: Tensor,
    ratios: Sequence[float],
    ratio_weight: float = 2.0,
    distill_weight: float = 0.5,
    kind: str = "mse",
    per_image: bool = True,
) -> dict[str, Tensor]:
    """The whole loss and its parts, which are not yet weighted.

    Args:
        teacher: logits `(B, K)` and features `(B, L, C)` of the same images.
        classification: the loss of `output.logits` with the labels.
        kind: see `token_loss`.
    """
    logits, features = teacher
    ratio = ratio_loss(output.decisions, ratios, per_image)
    kl = divergence(output.logits, logits) / len(logits)
    token = token_loss(output.features, features, output.mask, kind)
    loss = classification + ratio_weight * ratio / len(ratios) + distill_weight * (kl + token)
    parts = {"loss": loss, "classification": classification, "ratio": ratio, "kl": kl,
             "token": token}  # fmt: skip
    shares = output.decisions.detach().mean(dim=(0, 2))
    return parts | {f"kept_{stage}": share for stage, share in enumerate(shares, start=1)}


def teacher_answers(teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `(B, K)` and features `(B, L, C)` of a dense network: one of this paper's, or a
    vision transformer of timm.

    Raises:
        ReplivitError: another kind of network.
    """
    features = teacher.forward_features(images)
    if hasattr(teacher, "describe"):
        return teacher.describe(features)
    if isinstance(teacher, VisionTransformer):
        return teacher.forward_head(features), features[:, teacher.num_prefix_tokens :]
    raise ReplivitError(
        f"{type(teacher).__name__} cannot teach DynamicViT: its features are unknown; give the "
        "dense parent (the same variant with pruning_loc=[]) or a vision transformer of timm"
    )


class DynamicViTObjective(Objective):
    """Classification, keep ratios, and distillation of classes and tokens from the dense parent.

    A network without stages learns by plain classification.

    Args:
        teacher: a module, or a name for `harness.training.load_teacher`; default the dense parent
            with the weights that the run starts from.
        weights: the teacher's, if it is named.
        ratio_weight: default the model's: 2, 5 for DeiT-B, 10 for ConvNeXt and Swin.
        distill_weight: of both distillation losses.

    Raises:
        ReplivitError: no teacher and no trained weights to start from; a teacher that does not fit.
    """

    def __init__(
        self,
        teacher: nn.Module | str | None = None,
        weights: str | Path | None = None,
        ratio_weight: float | None = None,
        distill_weight: float = 0.5,
    ) -> None:
        self.teacher, self.weights = teacher, weights
        self.ratio_weight, self.distill_weight = ratio_weight, distill_weight

    def setup(self, context: Context) -> None:
        student, self._teacher = context.model, self.teacher
        if isinstance(self.teacher, str):
            self._teacher = load_teacher(
                self.teacher, context.track, context.num_classes, context.side, self.weights
            )
        elif self.teacher is None:
            if student.pruning_loc and not context.starts_trained:
                raise ReplivitError(
                    "DynamicViT fine-tunes a trained network: give its weights to start from "
                    "(--init), or a teacher"
                )
            self._teacher = student.dense()
        freeze_teacher(self._teacher, context.device)
        self._ratio_weight = (
            student.ratio_weight if self.ratio_weight is None else self.ratio_weight
        )

    def loss(self, model, images, targets, context):
        output = model(images)
        dense = isinstance(output, Tensor)
        logits = output if dense else output.logits
        classification = cross_entropy(logits, targets, context.recipe.label_smoothing)
        if dense:
            return classification
        with torch.no_grad():
            answers = teacher_answers(self._teacher, images)
        for ours, theirs in zip((output.logits, output.features), answers, strict=True):
            if ours.shape != theirs.shape:
                raise ReplivitError(
                    f"the teacher answers with {list(theirs.shape)}, the model with "
                    f"{list(ours.shape)}: they need the same classes, tokens and width"
                )
        student = context.model
        return pruning_losses(
            output, answers, classification, student.keep_ratios, self._ratio_weight,
            self.distill_weight, student.feature_loss,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        told = super().identity()
        if isinstance(self.teacher, nn.Module):
            told["teacher_sha256"] = state_sha256(self.teacher.state_dict())
        return told
