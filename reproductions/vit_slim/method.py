"""The search: cross-entropy plus the masks' absolute sums.

Official code: `SearchingDistillationLoss`, losses.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from harness.training import CrossEntropy, Distillation, Objective
from harness.training.objective import identity_of
from reproductions.vit_slim.masks import penalties, search_blocks

if TYPE_CHECKING:
    from harness.training import Context

#: Processes of the command in the authors' README.
RELEASED_PROCESSES = 4


class SparsitySearch(Objective):
    """`CE + w1 * sum |attention gates| + w2 * sum |MLP gates| + w3 * sum |tanh token gates|`.

    Train a searchable model with it; weights and masks learn together. Sums run over all layers.

    Args:
        attention, mlp, tokens: w1, w2, w3; the paper's best by default. Masks whose weight is 0 are
            frozen.
        world_size: the weights are divided by it, as the released script divides them by its number
            of processes (and then averages their gradients): 4 stands for the README's command. 1
            is the formula as printed.
        freeze_weights: only masks and norms learn, those of weight 0 included (official flag).
        teacher, weights: distil beside the labels, as the recipe says; nothing published does.

    Raises:
        ValueError: a negative weight, or fewer than one process.
    """

    def __init__(
        self,
        attention: float = 2e-4,
        mlp: float = 5e-5,
        tokens: float = 1e-4,
        world_size: int = 1,
        freeze_weights: bool = False,
        teacher: nn.Module | str | None = None,
        weights: str | Path | None = None,
    ) -> None:
        if min(attention, mlp, tokens) < 0 or world_size < 1:
            raise ValueError("weights of the penalty are 0 or more, world_size is 1 or more")
        self.attention, self.mlp, self.tokens = attention, mlp, tokens
        self.world_size, self.freeze_weights = world_size, freeze_weights
        self._base = CrossEntropy() if teacher is None else Distillation(teacher, weights=weights)

    def setup(self, context: Context) -> None:
        self._base.setup(context)
        model = context.model
        for block in search_blocks(model):
            for weight, mask in (
                (self.attention, block.attn.zeta),
                (self.mlp, block.mlp.zeta),
                (self.tokens, block.attn.patch_zeta),
            ):
                if weight == 0:
                    mask.requires_grad_(False)
        if self.freeze_weights:
            for name, one in model.named_parameters():
                one.requires_grad_("zeta" in name or "norm" in name)

    def loss(self, model, images, targets, context):
        parts = self._base.loss(model, images, targets, context)
        base = parts["loss"] if isinstance(parts, dict) else parts
        penalty = self.penalty(context.model)
        return {"loss": base + penalty, "base": base, "penalty": penalty}

    def penalty(self, model: nn.Module):
        """The three weighted sums of a searchable model, a scalar."""
        sums = penalties(model)
        total = sum(getattr(self, kind) * one for kind, one in sums.items())
        return total / self.world_size

    def identity(self) -> dict[str, Any]:
        return {**identity_of(self), "base": self._base.identity()}


def released_search(
    teacher: nn.Module | str | None = None, weights: str | Path | None = None
) -> SparsitySearch:
    """The search as the authors' README starts it: four processes, so a quarter of the penalty."""
    return SparsitySearch(world_size=RELEASED_PROCESSES, teacher=teacher, weights=weights)
