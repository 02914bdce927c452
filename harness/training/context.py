"""What an objective and callbacks may see and use while a model trains."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from harness.paper import InputSpec
from harness.training.recipe import Recipe


def derive_seed(*numbers: int) -> int:
    """A 32-bit seed that is a pure function of `numbers` (all >= 0), well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass
class Context:
    """The state of a run. Counters always name the step under way.

    Attributes:
        model: the module itself; `network` is what runs it (wrapped for several devices,
            compiled), and is what `Objective.loss` gets.
        epoch, step: of the step under way, from 0; `step` counts within the epoch.
        starts_trained: whether weights were given to start from.
        updates: optimizer updates done so far.
        images_seen: training images shown so far, over all processes.
        row: the columns of this epoch's log; `on_epoch_end` may add numbers to it.
    """

    model: nn.Module
    recipe: Recipe
    accelerator: Accelerator
    seed: int
    track: str
    num_classes: int
    image_size: tuple[int, int]
    input: InputSpec
    steps_per_epoch: int
    directory: Path
    root: str | Path | None = None
    name: str = ""
    starts_trained: bool = False
    network: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    epoch: int = 0
    step: int = 0
    updates: int = 0
    images_seen: int = 0
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def side(self) -> int | tuple[int, int]:
        """The image size as builders take it: one number where it is square."""
        height, width = self.image_size
        return height if height == width else (height, width)

    @property
    def total_updates(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def progress(self) -> float:
        """The part of all updates that is done, in [0, 1)."""
        return self.updates / self.total_updates

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group."""
        return self.optimizer.param_groups[0]["lr"]

    def autocast(self) -> AbstractContextManager:
        """The precision of the recipe; wrap every forward of a `step` of your own in it."""
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`: once or several times per step."""
        self.accelerator.backward(loss / self.recipe.accumulation)

    def reseed(self, *place: int) -> None:
        """Seed Python, NumPy and torch for one place of this epoch.

        Every random draw of a step follows from (seed, epoch, process, step), never from what ran
        before. A resumed run therefore continues bit by bit without stored generator states, and
        an evaluation in between changes nothing.
        """
        process = self.accelerator.process_index
        set_seed(derive_seed(self.seed, self.epoch, process, *place))
