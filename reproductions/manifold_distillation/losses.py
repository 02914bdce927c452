"""The manifold losses of one pair of layers: value and gradient, without the large matrices.

Points are tokens of length one. A term compares the student's points A with the teacher's T by the
mean square of `D = A A^T - T T^T`, over groups of points:

    patch    the N tokens of an image        B groups    intra-image in the paper
    sample   the B images at a position      N groups    inter-image
    rand     K random rows of the batch      1 group     random-sampled
    full     all B*N rows                    1 group     what the other three stand for

The released code builds D of all groups and keeps it for the backward pass. Since the gradient of
||D||^2 is 4 D A, value and gradient come from one look at D: here a few groups are taken at a time,
small enough for the cache, and D is gone before the next. What waits for the backward pass is the
gradient itself, as large as the features. Where a group has far more points than channels, D is not
built at all:

    ||A A^T - T T^T||^2 = ||A^T A||^2 + ||T^T T||^2 - 2 ||T^T A||^2
    gradient: 4 (A (A^T A) - T (T^T A))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Shorter tokens are divided by this instead of their length (official code: `F.normalize`).
EPS = 1e-12
#: Bytes of D at a time: about what a processor core caches, and what fills a GPU.
BLOCK = {"cpu": 2 << 20, "cuda": 128 << 20}
#: How many times fewer multiply-adds the form by channels must have: its value, a difference of
#: large numbers, takes most of them in float64.
WORTH = 2


@dataclass(frozen=True)
class Weights:
    """How much each term counts; one of weight 0 is not computed.

    The defaults are those of the authors' command. They belong to means over the entries of the
    matrices, as in the code; the paper writes sums.
    """

    patch: float = 4.0
    sample: float = 0.1
    rand: float = 0.2
    full: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Real) or not 0 <= value < inf:
                raise ValueError(f"the weight of the {name} term must be 0 or more, not {value!r}")


@dataclass(frozen=True)
class _Plan:
    """What to compute for one pair of layers."""

    weights: Weights
    rows: Tensor | None
    num_samples: int
    expected: bool
    skip: int
    storage: torch.dtype | None
    wants_gradient: bool


def manifold_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Weights | None = None,
    *,
    num_samples: int = 192,
    rows: Tensor | None = None,
    expected_rand: bool = False,
    skip: int = 0,
    storage: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms, and each term by itself (official code: `layer_mf_loss`).

    Widths may differ, since Gram matrices have no channels. Computed in float32 (float64 where the
    student is), whatever the precision of the features or of an `autocast` around it.

    Args:
        student: `(B, skip + N, C_S)`; gets the gradient.
        teacher: `(B, N, C_T)`; gets none.
        weights: default those of the authors' command.
        num_samples: K, rows that the `rand` term draws; all of them if there are fewer.
        rows: these rows instead of random ones: numbers `image * N + token`.
        expected_rand: the mean of the `rand` term over all draws instead of one draw (ours, not
            the paper's): no sampling noise, at the cost of the `full` term.
        skip: leading tokens of the student that take no part.
        storage: round the matrices to float16 or bfloat16, as the released code does within its
            mixed precision; to see what that loses.

    Returns:
        The sum, a scalar; and the terms with a weight, unweighted, without gradient.

    Raises:
        ValueError: features of other shapes, no row to draw, or rows that do not exist.
    """
    weights = weights or Weights()
    if student.ndim != 3 or teacher.ndim != 3:
        raise ValueError(
            f"features must be (B, N, C), not {list(student.shape)} and {list(teacher.shape)}"
        )
    images, tokens = teacher.shape[:2]
    if tuple(student.shape[:2]) != (images, skip + tokens) or not images * tokens:
        raise ValueError(
            f"{student.shape[1]} tokens of {len(student)} images without the first {skip} cannot "
            f"be compared with {tokens} tokens of {images} images"
        )
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"the rand term needs at least one row, not {num_samples}")
    if weights.rand and not expected_rand:
        rows = torch.randperm(images * tokens)[:num_samples] if rows is None else rows
        if not len(rows) or rows.min() < 0 or rows.max() >= images * tokens:
            raise ValueError(f"rows must be numbers from 0 to {images * tokens - 1}, at least one")
    if torch.float64 in (student.dtype, teacher.dtype):  # the student's precision is that of all
        teacher = teacher.to(torch.promote_types(student.dtype, torch.float32))
    plan = _Plan(
        weights, rows, min(num_samples, images * tokens), expected_rand, skip, storage,
        torch.is_grad_enabled() and student.requires_grad,
    )  # fmt: skip
    total, values = _ManifoldLoss.apply(student, teacher.detach(), plan)
    names = [name for name, weight in vars(weights).items() if weight]
    return total, dict(zip(names, values.unbind(), strict=True))


class _ManifoldLoss(torch.autograd.Function):
    """Computes the gradient together with the value, and keeps nothing else."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        with torch.autocast(student.device.type, enabled=False):
            values, gradient = _compute(student, teacher, plan)
        total = sum(getattr(plan.weights, name) * value for name, value in values.items())
        dtype = torch.promote_types(student.dtype, torch.float32)
        ctx.dtype = student.dtype
        if gradient is not None:
            ctx.save_for_backward(gradient)
        found = torch.stack(list(values.values())) if values else student.new_zeros(0)
        found = found.to(dtype)
        ctx.mark_non_differentiable(found)
        total = torch.as_tensor(total, dtype=dtype, device=student.device)
        return total, found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # rounded after the scale of a mixed-precision run came in: without it float16 has no room
        return (gradient * scale.to(gradient.dtype)).to(ctx.dtype), None, None


class _Points:
    """The tokens `(B, N, C)` of one model, of length one whenever they are asked for."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=dtype)
        self.short = lengths < EPS
        self.inverse = lengths.clamp_min_(EPS).reciprocal_()

    def images(self, some: slice) -> Tensor:
        """`(b, N, C)`: a group per image."""
        return self.tokens[some] * self.inverse[some]

    def positions(self, some: slice) -> Tensor:
        """`(n, B, C)`: a group per position."""
        return (self.tokens[:, some] * self.inverse[:, some]).transpose(0, 1)

    def rows(self, image: Tensor, token: Tensor) -> Tensor:
        """`(1, K, C)`: one group."""
        return (self.tokens[image, token] * self.inverse[image, token])[None]


def _compute(
    student: Tensor, teacher: Tensor, plan: _Plan
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The unweighted terms in float64, and the gradient of their weighted sum, float32 or 64."""
    weights = plan.weights
    ours, theirs = _Points(student[:, plan.skip :]), _Points(teacher)
    images, tokens = teacher.shape[:2]
    gradient = part = None
    if plan.wants_gradient:
        gradient = torch.zeros(student.shape, dtype=ours.inverse.dtype, device=student.device)
        part = gradient[:, plan.skip :]
    total = images * tokens
    values: dict[str, Tensor] = {}
    if weights.patch:
        entries = images * tokens**2
        values["patch"] = sum(
            _compare(ours.images(some), theirs.images(some), plan,
                     _into(part, some), weights.patch / entries)
            for some in _blocks(images, tokens**2, student.device)
        ) / entries  # fmt: skip
    if weights.sample:
        entries = tokens * images**2
        values["sample"] = sum(
            _compare(ours.positions(some), theirs.positions(some), plan,
                     _into(part, some, across=True), weights.sample / entries)
            for some in _blocks(tokens, images**2, student.device)
        ) / entries  # fmt: skip
    drawn, share = plan.num_samples, 0.0
    if weights.rand and not plan.expected:
        values["rand"] = _random_rows(ours, theirs, plan, part)
    elif weights.rand and total > 1:
        # a pair of different rows is drawn with chance K (K-1) / (n (n-1)); the diagonal is zero
        share = (drawn - 1) / (drawn * total * (total - 1))
    if weights.full or (weights.rand and plan.expected):
        coefficient = weights.full / total**2 + weights.rand * share
        square = _whole(ours, theirs, part, coefficient)
        if weights.rand and plan.expected:
            values["rand"] = square * share
        if weights.full:
            values["full"] = square / total**2
    if gradient is not None:
        _through_normalisation(ours, part)
    return values, gradient


def _blocks(groups: int, entries: int, device: torch.device) -> Iterator[slice]:
    """Slices over the groups, each of so many that their matrices fit into a block."""
    step = max(1, BLOCK.get(device.type, BLOCK["cuda"]) // (4 * entries))
    for start in range(0, groups, step):
        yield slice(start, min(start + step, groups))


def _into(gradient: Tensor | None, some: slice, across: bool = False) -> Tensor | None:
    """The part of the gradient that belongs to some images, or (across) to some positions."""
    if gradient is None:
        return None
    return gradient[:, some].transpose(0, 1) if across else gradient[some]


def _compare(
    ours: Tensor, theirs: Tensor, plan: _Plan, into: Tensor | None, coefficient: float
) -> Tensor:
    """||D||^2 of groups of points `(G, P, C)`, summed; 4 `coefficient` D A is added to `into`."""
    points, width, other = ours.shape[1], ours.shape[2], theirs.shape[2]
    by_points = points * (2 * width + other)
    by_channels = 2 * width**2 + other**2 + 2 * width * other
    if plan.storage is None and WORTH * by_channels < by_points:
        return _by_channels(ours, theirs, into, 4 * coefficient)
    return _by_points(ours, theirs, into, 4 * coefficient, plan.storage)


def _by_points(
    ours: Tensor, theirs: Tensor, into: Tensor | None, coefficient: float,
    storage: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """By the matrices D `(G, P, P)`, some of their rows at a time."""
    square = ours.new_zeros((), dtype=torch.float64)
    if storage is not None:
        ours, theirs = ours.to(storage).to(ours.dtype), theirs.to(storage).to(theirs.dtype)
    for rows in _blocks(ours.shape[1], len(ours) * ours.shape[1], ours.device):
        if storage is None:
            difference = torch.bmm(theirs[:, rows], theirs.mT)
            difference.baddbmm_(ours[:, rows], ours.mT, beta=-1)
        else:
            pair = [torch.bmm(one[:, rows], one.mT).to(storage) for one in (ours, theirs)]
            difference = pair[0] - pair[1]
        if into is not None:  # D is symmetric: its rows are enough
            into[:, rows].baddbmm_(difference.to(ours.dtype), ours, alpha=coefficient)
        square += difference.square_().sum(dtype=None if storage is None else torch.float32)
    return square


def _by_channels(ours: Tensor, theirs: Tensor, into: Tensor | None, coefficient: float) -> Tensor:
    """By Gram matrices of the channels, `(G, C, C)`."""
    a, t = ours.double(), theirs.double()
    own, cross = a.mT @ a, t.mT @ a
    if into is not None:
        into.baddbmm_(ours, own.to(ours.dtype), alpha=coefficient)
        into.baddbmm_(theirs, cross.to(ours.dtype), alpha=-coefficient)
    return _square_of(own, t.mT @ t, cross)


def _square_of(own: Tensor, other: Tensor, cross: Tensor) -> Tensor:
    """||D||^2 from A^T A, T^T T and T^T A in float64: large numbers that nearly cancel."""
    squares = [one.square().sum() for one in (own, other, cross)]
    return (squares[0] + squares[1] - 2 * squares[2]).clamp_min(0)


def _random_rows(ours: _Points, theirs: _Points, plan: _Plan, gradient: Tensor | None) -> Tensor:
    """The mean square over the drawn rows (with repetitions, if a caller's rows have any)."""
    rows = plan.rows.to(ours.tokens.device)
    tokens = ours.tokens.shape[1]
    image, token = rows // tokens, rows % tokens
    own = ours.rows(image, token)
    into = None if gradient is None else torch.zeros_like(own)
    entries = len(rows) ** 2
    square = _compare(own, theirs.rows(image, token), plan, into, plan.weights.rand / entries)
    if into is not None:
        gradient.index_put_((image, token), into[0], accumulate=True)
    return square / entries


def _whole(ours: _Points, theirs: _Points, gradient: Tensor | None, coefficient: float) -> Tensor:
    """||D||^2 over all rows of the batch, always by channels: D would have (B N)^2 entries."""
    images, tokens, width = ours.tokens.shape
    other, device = theirs.tokens.shape[2], ours.tokens.device
    some = list(_blocks(images, tokens * (width + other), device))
    shapes = ((width, width), (other, other), (other, width))
    own, theirs_own, cross = (
        ours.inverse.new_zeros(shape, dtype=torch.float64) for shape in shapes
    )
    for one in some:
        a, t = (side.images(one).flatten(0, 1).double() for side in (ours, theirs))
        own.addmm_(a.T, a)
        theirs_own.addmm_(t.T, t)
        cross.addmm_(t.T, a)
    if gradient is not None:
        own_part, cross_part = (gram.to(gradient.dtype) for gram in (own, cross))
        for one in some:
            change = ours.images(one) @ own_part - theirs.images(one) @ cross_part
            gradient[one].add_(change, alpha=4 * coefficient)
    return _square_of(own, theirs_own, cross)


def _through_normalisation(ours: _Points, gradient: Tensor) -> None:
    """From the gradient of points of length one to that of the tokens, in place."""
    images, tokens, width = ours.tokens.shape
    for some in _blocks(images, tokens * width, gradient.device):
        points, part = ours.images(some), gradient[some]
        along = (part * points).sum(-1, keepdim=True).masked_fill_(ours.short[some], 0)
        part.addcmul_(points, along, value=-1).mul_(ours.inverse[some])
