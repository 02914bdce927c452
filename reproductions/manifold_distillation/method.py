"""The method: which layers teach which, the whole loss, and the objective that trains with it.

replivit train manifold_deit_tiny --teacher cait_s24_224 --teacher-weights S24_224.pth
replivit train manifold_distillation_micro --track fashion_mini
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.training import Distillation, cross_entropy, only_logits
from harness.training.distillation import Kind
from reproductions.manifold_distillation.losses import Weights, manifold_loss
from reproductions.manifold_distillation.matching import Features, match_tokens
from reproductions.manifold_distillation.taps import Layer, block_names, find_layers, tapped

if TYPE_CHECKING:
    from harness.training import Context

#: (number of the layer pair from 0, rows there are, rows wanted) -> rows of the `rand` term.
Sampler = Callable[[int, int, int], Tensor]
#: What the authors' command says where the recipe is silent.
COMMAND = {"distillation": "soft", "distillation_alpha": 1.0, "distillation_tau": 1.0}
IMAGENET_TEACHER = "cait_s24_224"
MICRO_TEACHER = "manifold_distillation_teacher_micro"


def random_rows(pair: int, total: int, count: int) -> Tensor:
    """`count` of `total` rows without repetition, or all if there are fewer; anew for every pair,
    on the CPU's generator, as in the released code."""
    return torch.randperm(total)[:count]


def end_layers(student_depth: int, teacher_depth: int) -> tuple[list[int], list[int]]:
    """Layers by the rule of the authors' command: as many of the first as of the last, a third of
    the student's depth each, the middle left out. Of 12 and 24 blocks: 0-3 and 8-11, 0-3 and 20-23.

    Raises:
        ValueError: a network without blocks.
    """
    if min(student_depth, teacher_depth) < 1:
        raise ValueError("a network without blocks has no layers to pair")
    if min(student_depth, teacher_depth) == 1:
        return [student_depth - 1], [teacher_depth - 1]
    ends = max(1, min(student_depth // 3, teacher_depth // 2))

    def of(depth: int) -> list[int]:
        return [*range(ends), *range(depth - ends, depth)]

    return of(student_depth), of(teacher_depth)


def manifold_terms(
    student: Sequence[Features | Tensor],
    teacher: Sequence[Features | Tensor],
    weights: Weights | None = None,
    *,
    num_samples: int = 192,
    sampler: Sampler = random_rows,
    max_patches: int = 0,
    patches_only: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The manifold losses of several layer pairs (official code: `mf_loss`).

    Args:
        student, teacher: entry j of one goes with entry j of the other.
        sampler: chooses the rows of the `rand` term.
        max_patches, patches_only: of `match_tokens`.
        options: of `manifold_loss`: expected_rand, storage.

    Returns:
        `manifold`, what is to be learned; and each term that has a weight, weighted. All are means
        over the pairs.

    Raises:
        ValueError: not as many layers on one side as on the other, or features that do not fit.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"{len(student)} layers of the student cannot be paired with {len(teacher)} of the "
            "teacher: as many are needed, and at least one"
        )
    weights = weights or Weights()
    losses, parts = [], []
    for number, pair in enumerate(zip(student, teacher, strict=True)):
        ours, theirs = (one if isinstance(one, Features) else Features.of(one) for one in pair)
        own, other, skip = match_tokens(ours, theirs, max_patches, patches_only)
        rows = None
        if weights.rand and not options.get("expected_rand"):
            rows = sampler(number, other.shape[0] * other.shape[1], num_samples)
        loss, values = manifold_loss(
            own, other, weights, num_samples=num_samples, rows=rows, skip=skip, **options
        )
        losses.append(loss)
        parts.append(values)
    means = {
        name: getattr(weights, name) * torch.stack([one[name] for one in parts]).mean()
        for name in parts[0]
    }
    return {"manifold": torch.stack(losses).mean(), **means}


def label_terms(
    logits: Tensor,
    logits_kd: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    kind: Kind = "soft",
    alpha: float = 1.0,
    tau: float = 1.0,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """`base`, 1 - `alpha` times the labels' loss, and `teacher`, `alpha` times the teacher's.

    soft: KL divergence at temperature `tau`, times `tau`^2, summed over the classes and averaged
    over the batch. (DeiT's own code divides by the number of classes as well.) hard: cross-entropy
    with the class the teacher names. Official code: `DistillationLoss`.

    Args:
        logits, logits_kd, teacher_logits: `(B, K)`; targets: `(B,)` or `(B, K)`.
    """
    base = cross_entropy(logits, targets, smoothing)
    if kind == "soft":
        taught = tau**2 * F.kl_div(
            F.log_softmax(logits_kd / tau, dim=1), F.log_softmax(teacher_logits / tau, dim=1),
            reduction="batchmean", log_target=True,
        )  # fmt: skip
    elif kind == "hard":
        taught = F.cross_entropy(logits_kd, teacher_logits.argmax(dim=1))
    else:
        raise ValueError(f"distillation is soft or hard, not {kind!r}")
    return {"base": (1 - alpha) * base, "teacher": alpha * taught}


class ManifoldDistillation(Distillation):
    """Labels, the teacher's answers, and the manifolds of several layers.

    The defaults are the authors' command: soft answers at temperature 1 alone (labels count for
    nothing), and the three terms over the first and last layers.

    Args:
        teacher: a module, or a name and perhaps `weights` for `harness.training.load_teacher`:
            any network with blocks, such as cait_s24_224, deit_base_patch16_224, regnety_160.
        kind, alpha, tau: of the answers; default the recipe's if it says how to distil.
        beta: factor of the manifold terms.
        terms: their weights; all 0 for answers alone.
        num_samples: K of the `rand` term.
        s_id, t_id: layers that are paired, by number from 0 or by name; default `end_layers`.
        expected_rand, max_patches, patches_only: see `manifold_terms`.
        sampler: chooses the rows of the `rand` term.

    Raises:
        ValueError: an impossible beta; when the run starts: an impossible alpha or tau, layers that
            do not exist or cannot be paired.
    """

    def __init__(
        self,
        teacher: nn.Module | str,
        weights: str | Path | None = None,
        *,
        kind: Kind | None = None,
        alpha: float | None = None,
        tau: float | None = None,
        beta: float = 1.0,
        terms: Weights | None = None,
        num_samples: int = 192,
        s_id: Sequence[Layer] | None = None,
        t_id: Sequence[Layer] | None = None,
        expected_rand: bool = False,
        max_patches: int = 0,
        patches_only: bool = False,
        sampler: Sampler = random_rows,
    ) -> None:
        super().__init__(teacher, kind, alpha, tau, weights)
        if not 0 <= beta < inf:
            raise ValueError(f"beta must be 0 or more, not {beta}")
        self.terms = terms or Weights()
        self.s_id = None if s_id is None else tuple(s_id)
        self.t_id = None if t_id is None else tuple(t_id)
        self.beta, self.num_samples = beta, num_samples
        self.expected_rand, self.max_patches = expected_rand, max_patches
        self.patches_only, self.sampler = patches_only, sampler

    def setup(self, context: Context) -> None:
        recipe = context.recipe
        if recipe.distillation == "none":
            recipe = recipe.changed(**COMMAND)
        super().setup(replace(context, recipe=recipe))
        student = context.model
        if hasattr(student, "set_distilled_training"):  # two heads: labels, and the teacher
            student.set_distilled_training(True)
        self._layers = ([], [])
        if any(vars(self.terms).values()) and self.beta:
            self._layers = self._find_layers(student)

    def _find_layers(self, student: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
        depths = [len(block_names(one)) for one in (student, self._teacher)]
        if (self.s_id is None) != (self.t_id is None):
            raise ValueError("s_id and t_id are layers in pairs: give both or none")
        ids = end_layers(*depths) if self.s_id is None else (self.s_id, self.t_id)
        if len(ids[0]) != len(ids[1]) or not ids[0]:
            raise ValueError(
                f"{len(ids[0])} layers of the student (s_id) cannot be paired with {len(ids[1])} "
                "of the teacher (t_id): as many are needed, and at least one"
            )
        return (
            find_layers(student, ids[0], "student"),
            find_layers(self._teacher, ids[1], "teacher"),
        )

    def loss(self, model, images, targets, context):
        student, teacher = context.model, self._teacher
        with tapped(student, self._layers[0]) as ours:
            output = model(images)
        with torch.no_grad(), tapped(teacher, self._layers[1]) as theirs:
            answers = only_logits(teacher(images))
        logits, logits_kd = output if isinstance(output, tuple | list) else (output, output)
        if answers.shape != logits.shape:
            raise ValueError(
                f"the teacher answers for {answers.shape[-1]} classes, "
                f"the model for {logits.shape[-1]}"
            )
        parts = label_terms(
            logits, logits_kd, answers, targets, self._kind, self._alpha, self._tau,
            context.recipe.label_smoothing,
        )  # fmt: skip
        loss = parts["base"] + parts["teacher"]
        if ours.layers:
            found = manifold_terms(
                ours.features(), theirs.features(), self.terms, num_samples=self.num_samples,
                sampler=self.sampler, max_patches=self.max_patches,
                patches_only=self.patches_only, expected_rand=self.expected_rand,
            )  # fmt: skip
            parts |= {name: self.beta * value for name, value in found.items()}
            loss = loss + parts.pop("manifold")
        return {"loss": loss, **parts}

    def identity(self) -> dict[str, Any]:
        return {
            **super().identity(),
            "terms": dict(vars(self.terms)),
            "s_id": None if self.s_id is None else list(self.s_id),
            "t_id": None if self.t_id is None else list(self.t_id),
        }


def imagenet_objective(
    teacher: nn.Module | str | None = None, weights: str | Path | None = None
) -> ManifoldDistillation:
    """The authors' command; the teacher is CaiT-S24 unless another is named."""
    return ManifoldDistillation(teacher or IMAGENET_TEACHER, weights)


def micro_objective(
    teacher: nn.Module | str | None = None, weights: str | Path | None = None
) -> ManifoldDistillation:
    """The same for the small tracks; the teacher is the small one that ships."""
    return ManifoldDistillation(teacher or MICRO_TEACHER, weights)
