"""Optimizer, learning-rate schedule and gradient clipping of a recipe, by timm."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import nn

from harness.errors import ReplivitError
from harness.training.recipe import ParameterGroup, Recipe

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
    if recipe.parameter_groups:
        return _own_rates(model, recipe, exempt)
    return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=exempt)


def _own_rates(model: nn.Module, recipe: Recipe, exempt: set[str]) -> list[dict[str, Any]]:
    """Groups by the recipe's `parameter_groups`, each split into what decays and what does not."""
    rest = ParameterGroup(match=("*",))
    for number, rule in enumerate(recipe.parameter_groups):
        if rule == ParameterGroup(match=rule.match):
            continue  # names what learns at the full rate, and may be absent: new modules
        for pattern in rule.match:
            if not any(fnmatch.fnmatch(name, pattern) for name, _ in model.named_parameters()):
                raise ReplivitError(
                    f"recipe {recipe.name}: parameter_groups.{number}: {pattern!r} matches no "
                    "parameter"
                )
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        rule = next(
            (
                one
                for one in recipe.parameter_groups
                if any(fnmatch.fnmatch(name, pattern) for pattern in one.match)
            ),
            rest,
        )
        if rule.lr_scale == 0 or not parameter.requires_grad:
            continue
        bare = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
        group = {
            "weight_decay": 0.0 if bare else recipe.weight_decay,
            "lr_scale": rule.lr_scale,  # timm's schedulers multiply by it
            "frozen_epochs": rule.frozen_epochs,
        }
        groups.setdefault(tuple(group.values()), {**group, "params": []})["params"].append(
            parameter
        )
    return list(groups.values())


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
        self._optimizer = optimizer
        if recipe.scheduler == "cosine_after_warmup":
            self._scheduler: Scheduler = _CosineAfterWarmup(optimizer, recipe, steps_per_epoch)
            return
        self._scheduler = create_scheduler_v2(
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
        for group in self._optimizer.param_groups:
            if epoch < group.get("frozen_epochs", 0):
                group["lr"] = 0.0


class _CosineAfterWarmup(Scheduler):
    """Linear from `warmup_lr` to the peak, both included, then a cosine over what is left.

    The schedule of ConvNeXt's code, which many fine-tuning methods took over. It counts steps, or
    epochs where the recipe sets the rate by epoch.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
    ) -> None:
        by_epoch = recipe.lr_updates == "epoch"
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=by_epoch)
        length = 1 if by_epoch else steps_per_epoch
        self._recipe, self._total = recipe, recipe.epochs * length
        self._warmup = min(recipe.warmup_epochs, recipe.epochs) * length

    def _get_lr(self, t: int) -> list[float]:
        return [self._rate(t, peak) for peak in self.base_values]

    def _rate(self, t: int, peak: float) -> float:
        if t < self._warmup:
            start = self._recipe.warmup_lr
            return start + (peak - start) * t / max(1, self._warmup - 1)
        done = (t - self._warmup) / max(1, self._total - self._warmup)
        low = self._recipe.min_lr
        return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * done))


def clip_gradients(parameters: Iterable[nn.Parameter], recipe: Recipe) -> None:
    """Clip in place: by global norm, by value, or adaptively per output unit (agc)."""
    if recipe.clip is not None:
        with_gradient = [one for one in parameters if one.grad is not None]
        dispatch_clip_grad(with_gradient, recipe.clip_value, mode=recipe.clip)
