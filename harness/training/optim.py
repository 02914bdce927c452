"""Optimizer, learning-rate schedule and gradient clipping of a recipe, by timm."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import nn

from harness.errors import ReplivitError
from harness.training.recipe import Recipe

#: torch has a fused kernel for these, on CPU and CUDA; unfused they cost a small model a tenth.
FUSED = ("adam", "adamw")


def weight_decay_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Two optimizer groups: what decays, and what does not.

    Not decayed are biases, 1-d tensors, what the model's `no_weight_decay()` names (unless the
    recipe says otherwise) and the recipe's own patterns.

    Raises:
        ReplivitError: a pattern of the recipe matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    exempt: set[str] = set()
    if hasattr(model, "no_weight_decay") and not recipe.decay_model_exceptions:
        exempt |= set(model.no_weight_decay())
    for pattern in recipe.no_decay:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ReplivitError(f"recipe {recipe.name}: no_decay: {pattern!r} matches no parameter")
        exempt.update(found)
    return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=exempt)


def create_optimizer(
    model: nn.Module,
    recipe: Recipe,
    extra: Iterable[nn.Parameter | dict[str, Any]] = (),
) -> torch.optim.Optimizer:
    """The recipe's optimizer over a model and an objective's own parameters (`extra`).

    Raises:
        ReplivitError: nothing is trainable, or timm has no such optimizer.
    """
    groups = weight_decay_groups(model, recipe)
    for one in extra:
        own = dict(one) if isinstance(one, dict) else {"params": [one]}
        groups.append({"weight_decay": 0.0, **own})
    trainable = [parameter for group in groups for parameter in group["params"]]
    if not trainable:
        raise ReplivitError("nothing to train: every parameter is frozen")
    options: dict[str, Any] = {}
    if recipe.optimizer.startswith(("adam", "nadam", "radam", "lamb", "lion")):
        options["betas"] = recipe.betas
    if recipe.optimizer.startswith("adam"):
        options["eps"] = recipe.eps
    if recipe.optimizer in FUSED and trainable[0].device.type in ("cpu", "cuda"):
        options["fused"] = True
    try:
        return create_optimizer_v2(
            groups, opt=recipe.optimizer, lr=recipe.peak_lr, momentum=recipe.momentum, **options
        )
    except (ValueError, AssertionError) as error:
        raise ReplivitError(f"recipe {recipe.name}: optimizer: {error}") from error


class Schedule:
    """The learning rate as a pure function of (epoch, step): nothing to store for a restart."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
    ) -> None:
        self._recipe = recipe
        self._steps_per_epoch = steps_per_epoch
        self._scheduler: Scheduler = create_scheduler_v2(
            optimizer,
            # a constant rate is steps that multiply by one (older timm has no "constant")
            sched="cosine" if recipe.scheduler == "cosine" else "step",
            decay_epochs=recipe.epochs,
            decay_rate=1.0,
            num_epochs=recipe.epochs,
            min_lr=recipe.min_lr,
            warmup_lr=recipe.warmup_lr,
            warmup_epochs=min(recipe.warmup_epochs, recipe.epochs),
            step_on_epochs=recipe.lr_updates == "epoch",
            updates_per_epoch=steps_per_epoch,
        )[0]

    def set(self, epoch: int, step: int) -> None:
        """Give the optimizer the rate of this step (both from 0)."""
        if self._recipe.lr_updates == "epoch":
            self._scheduler.step(max(0, epoch - self._recipe.lr_lag_epochs))
        else:
            self._scheduler.step_update(epoch * self._steps_per_epoch + step)


def clip_gradients(parameters: Iterable[nn.Parameter], recipe: Recipe) -> None:
    """Clip in place: by global norm, by value, or adaptively per output unit (agc)."""
    if recipe.clip is not None:
        with_gradient = [one for one in parameters if one.grad is not None]
        dispatch_clip_grad(with_gradient, recipe.clip_value, mode=recipe.clip)
