"""Objectives: what a method optimises. A method brings this and, where needed, callbacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import ReplivitError

if TYPE_CHECKING:
    from harness.training.context import Context


class Objective:
    """Base of all objectives.

    Most methods write `loss` alone. One that needs several passes or works on gradients
    (a sandwich of sub-networks, gradient projection, ...) overrides `step`:

        def step(self, model, images, targets, context):
            for widths in self.sample(context):
                context.model.set_widths(widths)
                with context.autocast():
                    loss = ...
                context.backward(loss)          # gradients add up
            return {"loss": loss}

    The trainer clears gradients before a step; afterwards it clips, updates, averages and moves
    the schedule. Draw random numbers from the global generators: they are seeded for each step, so
    that a resumed run repeats them. What must survive a restart besides the model goes through
    `state_dict`.
    """

    #: Whether a pass may leave parameters without gradient (sampled sub-networks); needed to run
    #: on several devices.
    find_unused_parameters: bool = False

    def setup(self, context: Context) -> None:
        """Called once before training: move a teacher to the device, look at the model, ..."""

    def parameters(self) -> Iterable[nn.Parameter | dict[str, Any]]:
        """Trainable parameters outside the model, or optimizer groups of such; asked after
        `setup`, and expected on `context.device`. A group may have its own `lr` and `weight_decay`
        (0 unless given)."""
        return ()

    def loss(
        self, model: nn.Module, images: Tensor, targets: Tensor, context: Context
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch, or a dict with `loss` and scalar parts that are logged.

        Args:
            model: call it for the forward pass (its attributes: `context.model`).
            images: `(B, 3, H, W)`, normalised.
            targets: class indices `(B,)`, or probabilities `(B, K)` where images are mixed.
        """
        raise NotImplementedError

    def step(
        self, model: nn.Module, images: Tensor, targets: Tensor, context: Context
    ) -> dict[str, Tensor]:
        """Forwards and backwards of one batch; returns `loss` and parts to log."""
        with context.autocast():
            parts = self.loss(model, images, targets, context)
        parts = parts if isinstance(parts, dict) else {"loss": parts}
        context.backward(parts["loss"])
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them that a restart needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def identity(self) -> dict[str, Any]:
        """What makes this objective this one; a run cannot be resumed with another."""
        return identity_of(self)


def identity_of(thing: object) -> dict[str, Any]:
    """The class of `thing` and its public plain attributes."""
    plain = {
        key: value
        for key, value in vars(thing).items()
        if isinstance(value, (bool, int, float, str)) and not key.startswith("_")
    }
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", **plain}


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with labels `(B,)` or with probabilities `(B, K)`.

    Probabilities come from mixing and are already smoothed, so `smoothing` is for labels.
    """
    if targets.is_floating_point():
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def only_logits(output: Any) -> Tensor:
    """The logits `(B, K)` that a model answers with; of two heads their mean, as in evaluation.

    An answer of several parts names them `logits`, as models of Hugging Face do.
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and len(output) == 2:
        return (output[0] + output[1]) / 2
    raise ReplivitError(f"the model answers with {type(output).__name__}, not with logits")


class CrossEntropy(Objective):
    """Plain classification, smoothed as the recipe says."""

    def loss(self, model, images, targets, context):
        logits = only_logits(model(images))
        return cross_entropy(logits, targets, context.recipe.label_smoothing)
