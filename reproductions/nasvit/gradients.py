"""Two gradients of one step, and what becomes of them where they disagree.

All of it is per parameter tensor, weight and bias apart (official code: misc/constrain_opt.py). The
names there are the other way round: `proj_student = False` is what projects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST = 2.0  # bound of the coefficient
SMALL = 1e-6  # added to the squared norm

Gradients = list[Tensor | None]


def take_gradients(parameters: Sequence[nn.Parameter]) -> Gradients:
    """The gradients there are, which the parameters lose."""
    taken = [one.grad for one in parameters]
    for one in parameters:
        one.grad = None
    return taken


@dataclass(frozen=True)
class Products:
    """Inner products of two lists of gradients, tensor by tensor, `(T,)`: of the tensors that both
    have.

    Attributes:
        inner: largest times subnets.
        largest, subnets: the squared norms.
    """

    inner: Tensor
    largest: Tensor
    subnets: Tensor

    @classmethod
    def of(cls, largest: Sequence[Tensor], subnets: Sequence[Tensor]) -> Products:
        def squares(one: Sequence[Tensor]) -> Tensor:
            return torch.stack(torch._foreach_norm(list(one))).square()

        products = torch._foreach_mul(list(largest), list(subnets))
        return cls(torch.stack([one.sum() for one in products]), squares(largest), squares(subnets))

    @property
    def cosine(self) -> Tensor:
        """Per tensor; 0 where a gradient is zero."""
        return self.inner / (self.largest * self.subnets).sqrt().clamp_min(1e-30)

    @property
    def whole_cosine(self) -> Tensor:
        """Of the concatenation of all tensors."""
        return self.inner.sum() / (self.largest.sum() * self.subnets.sum()).sqrt().clamp_min(1e-30)

    @property
    def coefficients(self) -> Tensor:
        """c of the projection: 0 where the gradients agree."""
        return (-self.inner / (SMALL + self.subnets)).clamp(0, MOST)


@torch.no_grad()
def combine(largest: Gradients, subnets: Gradients, project: bool = True) -> Gradients:
    """The gradient of a step: `(1 + c) g_S + g_L` for every tensor.

    Where the largest network's gradient points against that of the subnets, `g_L + c g_S` is g_L
    without its part along -g_S, and adding g_S leaves the subnets better off to first order, unless
    c hits its bound of 2. Elsewhere, and everywhere without `project`, it is the plain sum.

    A tensor that only one of them has keeps that gradient. (With gradients that are dropped and not
    zero-filled the released code doubles the largest network's there, by adding a tensor to
    itself; its training ran in a torch that filled zeros.)
    """
    pairs = list(zip(largest, subnets, strict=True))
    both = [number for number, pair in enumerate(pairs) if all(one is not None for one in pair)]
    made = [own if other is None else other for own, other in pairs]
    if not both:
        return made
    ours, theirs = [subnets[one] for one in both], [largest[one] for one in both]
    if project:
        factors = 1 + Products.of(theirs, ours).coefficients
        ours = torch._foreach_mul(ours, list(factors.unbind()))
    for number, gradient in zip(both, torch._foreach_add(ours, theirs), strict=True):
        made[number] = gradient
    return made
