"""How much small networks disagree with the large one: gradients of the same batch, compared."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from harness.training import Context
from harness.training.callbacks import Watcher
from reproductions.nasvit.gradients import MOST, SMALL, Products, combine
from reproductions.nasvit.supernet import SlicedBlock, Supernet
from reproductions.nasvit.training import ConflictAware

#: Biases that are the same for all keys of a softmax: their gradients are zero but for rounding.
ROUNDING = (".attn.k.bias", ".attn.before.bias")


@dataclass(frozen=True)
class Conflict:
    """Gradients of one batch, tensor by tensor; only tensors that both sides move.

    Attributes:
        names: of the parameter tensors, `(T,)`.
        attention: whether they belong to a transformer block.
        before: cosine of the subnets' gradient with the largest network's.
        plain, projected: cosine of the subnets' gradient with the one that is used, when both
            are added and when they are projected.
        exempt: where projection promises nothing: its coefficient hit its bound, or the subnets'
            gradient is lost in what is added to its squared norm.
        whole: the cosine of all tensors together.
    """

    names: tuple[str, ...]
    attention: np.ndarray
    before: np.ndarray
    plain: np.ndarray
    projected: np.ndarray
    exempt: np.ndarray
    whole: float

    @property
    def share(self) -> float:
        """Part of the tensors on which the two disagree."""
        return float((self.before < 0).mean())


def measure_conflict(
    supernet: Supernet, images: Tensor, targets: Tensor, seed: int = 0
) -> Conflict:
    """Compare gradients on a batch, with the networks that a step of this seed would draw.

    The subnets' gradient is clipped, as it is when the two meet.

    The supernet is left as it was: weights, gradients, running statistics, mode, configuration.
    """
    objective = ConflictAware()
    objective._teachers = []
    context = SimpleNamespace(
        model=supernet, seed=seed, epoch=0, step=0, autocast=nullcontext,
        backward=lambda loss: loss.backward(), recipe=SimpleNamespace(label_smoothing=0.0),
    )  # fmt: skip
    training, buffers = supernet.training, copy.deepcopy(dict(supernet.named_buffers()))
    named = [(name, one) for name, one in supernet.named_parameters() if one.requires_grad]
    held = [one.grad for _, one in named]
    supernet.train().zero_grad(set_to_none=True)
    try:
        with torch.enable_grad():
            _, largest = objective.gradients(
                supernet, images, targets, context, objective.draw(context)
            )
        nn.utils.clip_grad_norm_([one for _, one in named], objective.clip)
        subnets = [one.grad for _, one in named]
    finally:
        for (_, one), gradient in zip(named, held, strict=True):
            one.grad = gradient
        with torch.no_grad():
            for name, value in supernet.named_buffers():
                value.copy_(buffers[name])
        supernet.train(training)
    return compare(supernet, [name for name, _ in named], largest, subnets)


@torch.no_grad()
def compare(supernet: Supernet, names: list[str], largest: list, subnets: list) -> Conflict:
    """The comparison of two lists of gradients, in the order of `names`."""
    both = [
        number
        for number, pair in enumerate(zip(largest, subnets, strict=True))
        if all(one is not None and one.any() for one in pair)
        and not names[number].endswith(ROUNDING)
    ]
    left, right = [largest[one] for one in both], [subnets[one] for one in both]
    products = Products.of(left, right)
    blocks = tuple(
        f"{name}." for name, one in supernet.named_modules() if isinstance(one, SlicedBlock)
    )

    def with_subnets(project: bool) -> np.ndarray:
        return Products.of(combine(left, right, project), right).cosine.cpu().numpy()

    names = [names[one] for one in both]
    exempt = (products.coefficients >= MOST) | (products.subnets <= MOST * SMALL)
    return Conflict(
        names=tuple(names),
        attention=np.array([name.startswith(blocks) for name in names]),
        before=products.cosine.cpu().numpy(),
        plain=with_subnets(False),
        projected=with_subnets(True),
        exempt=exempt.cpu().numpy(),
        whole=float(products.whole_cosine),
    )


class ConflictWatch(Watcher):
    """Log after every epoch how much the gradients of one batch disagree.

    `conflict` is the share of tensors, `cosine` that of all tensors together.
    """

    def __init__(self, batch: tuple[Tensor, Tensor], seed: int = 0) -> None:
        self._batch, self._seed = batch, seed

    def on_epoch_end(self, context: Context) -> None:
        images, targets = (one.to(context.device) for one in self._batch)
        found = measure_conflict(context.model, images, targets, self._seed)
        context.row["conflict"], context.row["cosine"] = found.share, found.whole
