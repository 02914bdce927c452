"""Training a supernet: one random subnet per step, and nothing else (Sec. 3.3).

No sandwich of sizes, no distillation, no shrinking: each step draws a configuration, and only its
slices are computed and get gradients. With AdamW a slice that was not drawn still decays and moves
by its momentum, because it belongs to a tensor that has a gradient; whole blocks beyond the drawn
depth have none and stand still.
"""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor, nn

from harness import ReplivitError
from harness.training import Context, CrossEntropy, Distillation, Objective
from reproductions.autoformer.space import Config


class OneSubnetPerStep(Objective):
    """Draw a configuration of the supernet's space for every step, alike on all devices.

    Args:
        inner: the loss on the drawn subnet; default cross-entropy.
        faithful_to_release: draw the same sequence for every seed, restarted from the epoch's
            number (official code: `random.seed(epoch)` in `train_one_epoch`).
    """

    find_unused_parameters = True

    def __init__(self, inner: Objective | None = None, faithful_to_release: bool = False) -> None:
        self.inner = CrossEntropy() if inner is None else inner
        self.faithful_to_release = faithful_to_release
        self._drawn: tuple[tuple[int, int], random.Random, Config | None] | None = None

    def setup(self, context: Context) -> None:
        if not hasattr(context.model, "set_config"):
            raise ReplivitError(f"{context.name} is no supernet: it has no configuration to set")
        self.inner.setup(context)

    def parameters(self):
        return self.inner.parameters()

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "inner": self.inner.identity()}

    def draw(self, context: Context) -> Config:
        """The configuration of the step under way: a function of (seed, epoch, step) alone."""
        here = (context.epoch, context.step)
        if self._drawn is None or self._drawn[0] != here:
            follows = self._drawn is not None and self._drawn[0] == (here[0], here[1] - 1)
            if follows:
                rng, skipped = self._drawn[1], 0
            else:  # a new epoch, or a run that was resumed inside one
                released = self.faithful_to_release
                rng = random.Random(
                    context.epoch if released else f"{context.seed}/{context.epoch}"
                )
                skipped = context.step
            for _ in range(skipped):
                context.model.space.sample(rng)
            self._drawn = (here, rng, context.model.space.sample(rng))
        return self._drawn[2]

    def loss(
        self, model: nn.Module, images: Tensor, targets: Tensor, context: Context
    ) -> Tensor | dict[str, Tensor]:
        context.model.set_config(self.draw(context))
        return self.inner.loss(model, images, targets, context)

    def step(
        self, model: nn.Module, images: Tensor, targets: Tensor, context: Context
    ) -> dict[str, Tensor]:
        """One step; afterwards the supernet stands at the configuration it had before, so what is
        scored in between and at the end is the one it was built with."""
        before = context.model.config
        try:
            return super().step(model, images, targets, context)
        finally:
            context.model.set_config(before)


def objective(teacher: nn.Module | None = None, weights: Any = None) -> OneSubnetPerStep:
    """The supernet's objective; with a teacher, hard distillation at equal parts (an option of the
    released script, off by default).

    Raises:
        ReplivitError: weights are given: this method starts from none.
    """
    if weights is not None:
        raise ReplivitError("AutoFormer's supernet trains from scratch; its objective takes no "
                            "weights")  # fmt: skip
    return OneSubnetPerStep(None if teacher is None else Distillation(teacher))
