"""Distillation from a teacher's answers, as DeiT and both EfficientFormers train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import registry
from harness.checkpoints import file_sha256, load_model, load_pretrained, load_weights
from harness.data import TRACKS, get_track
from harness.deployment import pack_linears
from harness.errors import ReplivitError, one_line
from harness.evaluation import model_input
from harness.training.objective import Objective, cross_entropy, only_logits
from harness.training.state import state_sha256

if TYPE_CHECKING:
    from harness.training.context import Context

Kind = Literal["none", "soft", "hard"]


def distillation_loss(
    logits: Tensor,
    logits_kd: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    kind: Kind = "hard",
    alpha: float = 0.5,
    tau: float = 1.0,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """`(1 - alpha)` times the labels' loss plus `alpha` times the teacher's.

    hard: cross-entropy with the class the teacher names. soft: KL divergence of the two
    distributions at temperature `tau`, times `tau`^2, divided by the number of *elements* B*K (not
    by B; official code: `DistillationLoss`, util/losses.py). none: the labels' loss alone.

    Args:
        logits: class head, `(B, K)`; logits_kd: distillation head, `(B, K)`.
        teacher_logits: `(B, K)`, of the same (mixed) images.
        targets: labels `(B,)` or probabilities `(B, K)`.
    """
    base = cross_entropy(logits, targets, smoothing)
    if kind == "none":
        return {"loss": base}
    if kind == "hard":
        teacher = F.cross_entropy(logits_kd, teacher_logits.argmax(dim=1))
    else:
        divergence = F.kl_div(
            F.log_softmax(logits_kd / tau, dim=1),
            F.log_softmax(teacher_logits / tau, dim=1),
            reduction="sum",
            log_target=True,
        )
        teacher = divergence * tau**2 / logits_kd.numel()
    return {"loss": (1 - alpha) * base + alpha * teacher, "base": base, "teacher": teacher}


class Distillation(Objective):
    """Learn from labels and from a teacher that sees the same augmented, mixed images.

    A model with two heads answers with a pair in training: the first learns from the labels, the
    second from the teacher. A model with one head learns both with it.

    Args:
        teacher: a module, or a name and perhaps `weights` for `load_teacher`.
        kind, alpha, tau: as in `distillation_loss`; default the recipe's.

    Raises:
        ReplivitError: neither the recipe nor `kind` says how to distil; an impossible alpha or tau;
            the teacher answers for other classes, or wants images of another normalisation.
    """

    def __init__(
        self,
        teacher: nn.Module | str,
        kind: Kind | None = None,
        alpha: float | None = None,
        tau: float | None = None,
        weights: str | Path | None = None,
    ) -> None:
        self.teacher, self.weights = teacher, weights
        self.kind, self.alpha, self.tau = kind, alpha, tau

    def setup(self, context: Context) -> None:
        recipe = context.recipe
        self._kind = self.kind or recipe.distillation
        self._alpha = recipe.distillation_alpha if self.alpha is None else self.alpha
        self._tau = recipe.distillation_tau if self.tau is None else self.tau
        if self._kind == "none":
            raise ReplivitError(f"recipe {recipe.name} does not say how to distil: hard or soft")
        if self._kind not in get_args(Kind):
            raise ReplivitError(f"distillation is soft or hard, not {self._kind!r}")
        if not 0 <= self._alpha <= 1 or not self._tau > 0:
            raise ReplivitError(
                "alpha must lie between 0 and 1 and tau be above 0, not "
                f"{self._alpha} and {self._tau}"
            )
        self._teacher = self.teacher
        if isinstance(self.teacher, str):
            self._teacher = load_teacher(
                self.teacher, context.track, context.num_classes, context.side, self.weights
            )
        self._check_input(context)
        freeze_teacher(self._teacher, context.device)

    def _check_input(self, context: Context) -> None:
        """Teacher and student share the images, so both must mean the same normalisation."""
        if not hasattr(self._teacher, "pretrained_cfg"):
            return  # an unknown module: taken to fit
        track = get_track(context.track) if context.track in TRACKS else None
        wanted = model_input(self._teacher, track, context.side)[0]
        if (wanted.mean, wanted.std) != (context.input.mean, context.input.std):
            raise ReplivitError(
                f"the teacher wants images of mean {wanted.mean} and deviation {wanted.std}, the "
                f"model {context.input.mean} and {context.input.std}"
            )

    def loss(self, model, images, targets, context):
        output = model(images)
        logits, logits_kd = output if isinstance(output, (tuple, list)) else (output, output)
        with torch.no_grad():
            answers = only_logits(self._teacher(images))
        if answers.shape != logits.shape:
            raise ReplivitError(
                f"the teacher answers for {answers.shape[-1]} classes, "
                f"the model for {logits.shape[-1]}"
            )
        return distillation_loss(
            logits, logits_kd, answers, targets,
            self._kind, self._alpha, self._tau, context.recipe.label_smoothing,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        told = super().identity()  # a teacher's name is among the plain attributes
        if isinstance(self.teacher, nn.Module):
            told["teacher_sha256"] = state_sha256(self.teacher.state_dict())
        if self.weights is not None:
            told["weights"] = file_sha256(self.weights)
        return told


def freeze_teacher(teacher: nn.Module, device: torch.device | str) -> nn.Module:
    """`teacher` itself, on `device`, in evaluation mode, ready to answer and not to learn.

    On a CPU its linear layers keep their weights as the matrix product reads them, since they no
    longer change: see `harness.deployment.packed`.
    """
    teacher.to(device).eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        pack_linears(teacher)
    return teacher


def load_teacher(
    name: str,
    track: str,
    num_classes: int,
    image_size: int | tuple[int, int] | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """A teacher in eval mode: a variant, or any model of timm.

    Args:
        weights: its weights, ours or the authors'; default the ones shipped with the variant for
            `track`, or timm's pretrained ones (which timm downloads).

    Raises:
        ReplivitError: unknown name, no weights, or weights for other classes.
    """
    known = {variant.name for variant in registry.variants()}
    if name in known and weights is None:
        teacher = load_pretrained(name, track, image_size=image_size)
    elif name in known:
        teacher = load_model(name, weights, num_classes, image_size)
    elif timm.is_model(name):
        try:
            teacher = timm.create_model(name, pretrained=weights is None, num_classes=num_classes)
        except (OSError, RuntimeError) as error:
            raise ReplivitError(
                f"timm's weights of {name} cannot be fetched ({one_line(error)[:120]}); "
                "give a file of weights"
            ) from error
        if weights is not None:
            load_weights(teacher, weights)
    else:
        raise ReplivitError(f"no variant and no timm model {name!r} to teach")
    return teacher.eval()
