"""Which token of the student stands for which token of the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

Grid = tuple[int, int]
#: Leading tokens there may be: a class token, a distillation token, up to four registers.
MOST_PREFIX = 6


@dataclass(frozen=True)
class Features:
    """What one layer gives for a batch of images.

    Attributes:
        tokens: `(B, N, C)`.
        grid: rows and columns of the patches, which are the last tokens; None if unknown.
    """

    tokens: Tensor
    grid: Grid | None = None

    @property
    def prefix(self) -> int:
        """Leading tokens that are no patches: class, distillation, registers."""
        return self.tokens.shape[1] - self.grid[0] * self.grid[1]

    @property
    def patches(self) -> Tensor:
        """`(B, H*W, C)`."""
        return self.tokens[:, self.prefix :]

    @classmethod
    def of(cls, output: Tensor, grid: Grid | None = None, channels_last: bool = False) -> Features:
        """A layer's output as tokens: `(B, N, C)`, or a map `(B, C, H, W)`, or `(B, H, W, C)`.

        Args:
            grid: of the patches in `(B, N, C)`, where it is known.
            channels_last: what a map's last dimension is.

        Raises:
            ValueError: something else.
        """
        if output.ndim == 4:
            tokens = output if channels_last else output.permute(0, 2, 3, 1)
            return cls(tokens.flatten(1, 2), tuple(tokens.shape[1:3]))
        if output.ndim != 3:
            raise ValueError(
                f"a layer that gives {list(output.shape)} cannot be tapped: tokens (B, N, C) or a "
                "map of four dimensions are needed"
            )
        fits = grid is not None and 0 <= output.shape[1] - grid[0] * grid[1] <= MOST_PREFIX
        return cls(output, grid if fits else None)

    def gridded(self) -> Features:
        """With a grid: where none is known, the largest square.

        Raises:
            ValueError: the tokens are no square with a few others before it.
        """
        if self.grid is not None:
            return self
        side = math.isqrt(self.tokens.shape[1])
        if self.tokens.shape[1] - side**2 > MOST_PREFIX:
            raise ValueError(
                f"{self.tokens.shape[1]} tokens are no square of patches with at most "
                f"{MOST_PREFIX} tokens before it"
            )
        return Features(self.tokens, (side, side))

    def merged(self, factor: int) -> Features:
        """The patches alone, `factor` x `factor` neighbours as one, their channels side by side:
        `(B, H*W / factor^2, factor^2 * C)`."""
        down, across = self.grid[0] // factor, self.grid[1] // factor
        cells = self.patches.unflatten(1, (down, factor, across, factor)).transpose(2, 3)
        return Features(cells.flatten(3).flatten(1, 2), (down, across))


def merge_patches(features: Features, max_patches: int = 196) -> Features:
    """Merge a square of patches to at most `max_patches` (official code: `merge`).

    As there, the target is the largest square within `max_patches`, and what has no more patches
    stays as it is. Without a grid all tokens are taken for patches; with one, tokens before the
    patches are dropped when these are merged.

    Raises:
        ValueError: the patches are no square, or one that the target's side does not divide.
    """
    if max_patches < 1:
        raise ValueError(f"max_patches must be at least 1, not {max_patches}")
    count = features.tokens.shape[1]
    side, target = math.isqrt(count), math.isqrt(max_patches)
    rows, columns = features.grid or ((side, side) if side**2 == count else (1, count))
    if rows * columns <= max_patches:
        return features
    if rows != columns or rows % target:
        raise ValueError(
            f"{rows * columns} patches cannot be merged to {target}x{target}: they must be a "
            f"square with a side that is a multiple of {target}"
        )
    return Features(features.tokens, (rows, columns)).merged(rows // target)


def match_tokens(
    student: Features, teacher: Features, max_patches: int = 0, patches_only: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Tokens of both that correspond, and how many of the student's first have no partner.

    As in the released code the student's first tokens are dropped where it has more of them: its
    class token beside a CaiT, whose blocks have none. With as many on both sides all take part.
    Where the grids differ, the finer one is merged onto the coarser (the released helper for this,
    `merge`, is never called there), and only patches take part.

    Args:
        max_patches: first merge both to at most so many; 0 = do not.
        patches_only: drop the leading tokens on both sides.

    Returns:
        Student `(B, skip + N, C_S)`, teacher `(B, N, C_T)`, skip.

    Raises:
        ValueError: batches or grids that do not fit, or a teacher with tokens that the student
            lacks.
    """
    if len(student.tokens) != len(teacher.tokens):
        raise ValueError(
            f"features of {len(student.tokens)} images cannot be compared with those of "
            f"{len(teacher.tokens)}"
        )
    if max_patches:
        student = _without_extra(student, teacher)
        merged = [merge_patches(one, max_patches) for one in (student, teacher)]
        patches_only = patches_only or merged[0] is not student or merged[1] is not teacher
        student, teacher = merged
    if patches_only or _differ(student, teacher):
        student, teacher = _same_grid(student.gridded(), teacher.gridded())
        return student.tokens, teacher.patches, student.prefix
    skip = student.tokens.shape[1] - teacher.tokens.shape[1]
    if skip < 0:
        raise ValueError(
            f"the teacher has {teacher.tokens.shape[1]} tokens and the student "
            f"{student.tokens.shape[1]}: only the student's leading tokens are dropped; with "
            "patches_only the teacher's are, too"
        )
    return student.tokens, teacher.tokens, skip


def _without_extra(student: Features, teacher: Features) -> Features:
    """Where no grid tells them from patches: the student's few tokens too many cut away."""
    extra = student.tokens.shape[1] - teacher.tokens.shape[1]
    if student.grid is not None or not 0 < extra <= MOST_PREFIX:
        return student
    return Features(student.tokens[:, extra:])


def _differ(one: Features, two: Features) -> bool:
    """Whether the patches differ; of unknown grids: whether a few tokens do not explain it."""
    if one.grid is None or two.grid is None:
        return abs(one.tokens.shape[1] - two.tokens.shape[1]) > MOST_PREFIX
    return one.grid != two.grid


def _same_grid(student: Features, teacher: Features) -> tuple[Features, Features]:
    """The finer grid merged onto the other.

    Raises:
        ValueError: neither divides into the other.
    """
    if student.grid == teacher.grid:
        return student, teacher
    for finer, coarser in ((student, teacher), (teacher, student)):
        factor = finer.grid[0] // coarser.grid[0]
        if factor > 1 and finer.grid == (factor * coarser.grid[0], factor * coarser.grid[1]):
            merged = finer.merged(factor)
            return (merged, coarser) if finer is student else (coarser, merged)
    (a, b), (c, d) = student.grid, teacher.grid
    raise ValueError(
        f"the student's {a}x{b} patches and the teacher's {c}x{d} cannot be matched: one grid must "
        "be the other, or a whole number of times as fine in both directions"
    )
