"""Training the supernet: sandwich rule, distillation inside, projected gradients (Sec. 3).

Four networks see every batch. The largest one learns from teachers or labels; the smallest one and
random ones learn from the largest. The gradients of these are added up and clipped, and then meet
that of the largest network: from a quarter of the training on, by projection.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from harness import ReplivitError
from harness.training import (
    Context,
    Objective,
    cross_entropy,
    freeze_teacher,
    load_teacher,
    only_logits,
)
from harness.training.state import state_sha256
from reproductions.nasvit.gradients import Gradients, combine, take_gradients
from reproductions.nasvit.losses import SHARPNESS, adaptive_divergence, soft_targets
from reproductions.nasvit.space import Config

Distillation = Literal["alpha", "soft", "none"]


class ConflictAware(Objective):
    """The paper's training of a supernet; each technique can be switched off.

    Args:
        sandwich: train the smallest network in every step; without, one more random one.
        distillation: how networks learn from the largest one: `alpha` (the adaptive
            alpha-divergence), `soft` (cross-entropy with its answers) or `none` (from what it
            learns from itself).
        projection: project gradients; without, they are added.
        plain_share: part of the epochs before projection begins. The released 400 epochs begin it
            at epoch 101.
        subnets: networks per step beside the largest one.
        clip: bound of the norm of the subnets' gradient; 0 for none.
        teachers: modules, or names for `harness.training.load_teacher`, whose sharpened answers the
            largest network learns; none for labels. The released two were ResNeXt-101 models.
        sharpness: factor of the teachers' logits.

    Raises:
        ValueError: an impossible number, or no such distillation.
    """

    find_unused_parameters = True

    def __init__(
        self,
        sandwich: bool = True,
        distillation: Distillation = "alpha",
        projection: bool = True,
        plain_share: float = 0.25,
        subnets: int = 3,
        clip: float = 1.0,
        teachers: Sequence[nn.Module | str] = (),
        sharpness: float = SHARPNESS,
    ) -> None:
        if distillation not in get_args(Distillation):
            raise ValueError(f"distillation is alpha, soft or none, not {distillation!r}")
        if subnets < 1 or clip < 0 or not 0 <= plain_share <= 1:
            raise ValueError(
                "subnets must be at least 1, clip at least 0 and plain_share between 0 and 1, not "
                f"{subnets}, {clip} and {plain_share}"
            )
        self.sandwich, self.distillation, self.projection = sandwich, distillation, projection
        self.plain_share, self.subnets, self.clip = plain_share, subnets, clip
        self.sharpness = sharpness
        self.teachers = list(teachers)

    def setup(self, context: Context) -> None:
        if not hasattr(context.model, "set_config"):
            raise ReplivitError(f"{context.name} is no supernet: it has no configuration to set")
        if context.recipe.mixed_precision == "fp16" or context.recipe.accumulation > 1:
            raise ReplivitError(
                "projected gradients need the recipe to say mixed_precision no or bf16, and "
                "accumulation 1: scaled or partial gradients have other angles"
            )
        self._teachers = [
            load_teacher(one, context.track, context.num_classes, context.side)
            if isinstance(one, str)
            else one
            for one in self.teachers
        ]
        for one in self._teachers:
            freeze_teacher(one, context.device)

    def identity(self) -> dict[str, Any]:
        told = super().identity()
        told["teachers"] = [
            one if isinstance(one, str) else state_sha256(one.state_dict()) for one in self.teachers
        ]
        return told

    def projects(self, context: Context) -> bool:
        """Whether gradients are projected in the epoch under way."""
        begun = context.epoch > self.plain_share * context.recipe.epochs or not self.plain_share
        return self.projection and begun

    def draw(self, context: Context) -> Iterator[tuple[str, Config]]:
        """The networks of a step beside the largest, alike on all devices.

        A random one is drawn as released, and follows from (seed, epoch, step) alone.
        """
        rng = random.Random(f"{context.seed}/{context.epoch}/{context.step}")
        for number in range(self.subnets):
            if number == 0 and self.sandwich:
                yield "smallest", context.model.space.smallest()
            else:
                yield f"random{number}", context.model.space.sample(rng)

    def step(self, model, images, targets, context) -> dict[str, Tensor]:
        parameters = [one for one in context.model.parameters() if one.requires_grad]
        losses, largest = self.gradients(model, images, targets, context, self.draw(context))
        if self.clip:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        made = combine(largest, [one.grad for one in parameters], self.projects(context))
        for one, gradient in zip(parameters, made, strict=True):
            one.grad = gradient
        return {"loss": sum(losses.values()) / len(losses), **losses}

    def gradients(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        context: Context,
        others: Iterable[tuple[str, Config]],
    ) -> tuple[dict[str, Tensor], Gradients]:
        """Both gradients of a batch, before they meet.

        The subnets' sum, not clipped, stays with the parameters; the largest network's is returned,
        beside the losses by network. Afterwards the supernet's configuration is what it was.
        """
        supernet = context.model
        parameters = [one for one in supernet.parameters() if one.requires_grad]
        before = supernet.config
        if self._teachers:
            targets = self._answers(images)
        try:
            supernet.set_config(supernet.space.largest())
            with context.autocast():
                logits = only_logits(model(images))
                loss = cross_entropy(logits, targets, context.recipe.label_smoothing)
            context.backward(loss)
            losses = {"largest": loss.detach()}
            largest, answers = take_gradients(parameters), logits.detach().float()
            for name, config in others:
                supernet.set_config(config)
                with context.autocast():
                    logits = only_logits(model(images))
                loss = self.subnet_loss(logits.float(), answers, targets, context)
                context.backward(loss)
                losses[name] = loss.detach()
        finally:
            supernet.set_config(before)
        return losses, largest

    def subnet_loss(
        self, logits: Tensor, answers: Tensor, targets: Tensor, context: Context
    ) -> Tensor:
        """The loss of a network beside the largest, whose `answers` are logits `(B, K)`."""
        if self.distillation == "alpha":
            return adaptive_divergence(logits, answers).loss.mean()
        if self.distillation == "soft":
            return cross_entropy(logits, answers.softmax(1))
        return cross_entropy(logits, targets, context.recipe.label_smoothing)

    @torch.no_grad()
    def _answers(self, images: Tensor) -> Tensor:
        return soft_targets([only_logits(one(images)) for one in self._teachers], self.sharpness)


def objective(teacher: nn.Module | str | None = None, weights: Any = None) -> ConflictAware:
    """The supernet's objective: with all techniques, from labels unless a teacher is given.

    Raises:
        ReplivitError: weights without a teacher.
    """
    if weights is not None:
        raise ReplivitError("give the teacher as a module with its weights; the supernet itself "
                            "trains from scratch")  # fmt: skip
    return ConflictAware(teachers=() if teacher is None else (teacher,))
