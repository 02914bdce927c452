"""What the largest network learns from, and what the others learn from it.

The largest network gets sharpened answers of external teachers, or labels; every other network gets
the largest one's answers through the adaptive alpha-divergence (official code: `AdaptiveLossSoft`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 5.0  # factor of the teachers' logits: a temperature of 1/5
CLOSE = 1e-3  # so near to 0 or 1 an alpha counts as that


def soft_targets(logits: Sequence[Tensor], sharpness: float = SHARPNESS) -> Tensor:
    """The mean of the teachers' sharpened answers: several `(B, K)` -> `(B, K)`."""
    return torch.stack([(sharpness * one).softmax(1) for one in logits]).mean(0)


@dataclass(frozen=True)
class Divergences:
    """Two divergences per sample and the choice between them, all `(B,)`.

    Attributes:
        low, high: divergence at the smaller and the larger alpha; they only choose.
        surrogate_low, surrogate_high: their surrogates, which carry the gradient.
    """

    low: Tensor
    high: Tensor
    surrogate_low: Tensor
    surrogate_high: Tensor

    @property
    def chosen_low(self) -> Tensor:
        return self.low > self.high

    @property
    def loss(self) -> Tensor:
        """Per sample the surrogate of the larger divergence; often negative, as surrogates are."""
        return torch.where(self.chosen_low, self.surrogate_low, self.surrogate_high)


def alpha_divergence(
    student: Tensor, teacher: Tensor, alpha: float, clip: float = 5.0, normalized: bool = False
) -> tuple[Tensor, Tensor]:
    """The divergence of order `alpha` and its surrogate, `(B,)` each.

    With p the teacher's and q the student's probabilities and r = p / q, both held fixed, the
    divergence is the sum of `q (f(r) - f(1))` and the surrogate that of `-q rho(r) log q`, whose
    gradient through `log q` is the divergence's. Powers of r are clipped; at alpha = 1, where
    `f = r log r`, nothing is, as released.

    Probabilities that are 0 in float32 give their limits and not NaN.

    Args:
        student, teacher: logits `(B, K)`.
        normalized: the teacher's are probabilities already.
    """
    log_q = F.log_softmax(student, dim=1)
    q = student.detach().softmax(1)
    p = teacher.detach() if normalized else teacher.detach().softmax(1)
    if abs(alpha - 1) < CLOSE:
        divergence = torch.special.xlogy(p, p) - p * log_q.detach()
        return divergence.sum(1), -(p * log_q).sum(1)
    tiny = torch.finfo(p.dtype).tiny
    ratio = p / q.clamp_min(tiny)
    if abs(alpha) < CLOSE:
        ratio = ratio.clamp(tiny, clip)
        f, base, rho = -ratio.log(), 0.0, ratio.log() - 1
    else:
        base = 1 / (alpha * (alpha - 1))
        weight = ratio.pow(alpha).clamp(0, clip)
        f, rho = weight * base, weight / alpha + base
    return (q * (f - base)).sum(1), -(q * rho * log_q).sum(1)


def adaptive_divergence(
    student: Tensor,
    teacher: Tensor,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    clip: float = 5.0,
    normalized: bool = False,
) -> Divergences:
    """The divergences at two alphas; per sample the larger one counts.

    At alpha = -1 a student is punished for what it is sure of and the teacher is not, at alpha = 1
    for what it misses.

    Args:
        student, teacher: logits `(B, K)`; only the student's carry a gradient.
        normalized: the teacher's are probabilities already.

    Raises:
        ValueError: the alphas are in the wrong order, or nothing is left by the clip.
    """
    if not alpha_min <= alpha_max:
        raise ValueError(f"alpha_min must not exceed alpha_max: {alpha_min} and {alpha_max}")
    if clip <= 0:
        raise ValueError(f"clip must be positive, not {clip}")
    low, surrogate_low = alpha_divergence(student, teacher, alpha_min, clip, normalized)
    high, surrogate_high = alpha_divergence(student, teacher, alpha_max, clip, normalized)
    return Divergences(low, high, surrogate_low, surrogate_high)
