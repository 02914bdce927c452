"""Where tokens are dropped and how many stay: the two knobs of the method, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Literal

Ratios = float | Sequence[float]


def pruning_blocks(pruning_loc: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """The blocks before which tokens are dropped, ascending; none is the dense network.

    Raises:
        ValueError: a block that does not exist, or stands twice.
    """
    blocks = tuple(pruning_loc) if isinstance(pruning_loc, Iterable) else (pruning_loc,)
    wrong = [one for one in blocks if not _is(one, Integral) or not 0 <= one < depth]
    if wrong:
        raise ValueError(
            f"pruning_loc: there is no block {wrong[0]!r}; blocks are numbered 0 to {depth - 1}"
        )
    if list(blocks) != sorted(set(blocks)):
        raise ValueError(f"pruning_loc must name each block once, in order, not {list(blocks)}")
    return tuple(int(one) for one in blocks)


def keep_ratios(
    keep_ratio: Ratios, stages: int, law: Literal["geometric", "linear"] = "geometric"
) -> tuple[float, ...]:
    """The share of all tokens that is left after each stage.

    One number r stands for r, r^2, r^3, ... (geometric) or for r, r - 0.2, r - 0.4, ...
    (linear; the journal version's Swin and ConvNeXt); a sequence gives each stage's share itself.

    Raises:
        ValueError: a ratio outside (0, 1], one that grows again where tokens cannot come back, or
            another number of ratios than of stages.
    """
    if not isinstance(keep_ratio, Iterable) or isinstance(keep_ratio, str):
        keep_ratio = _in_range(keep_ratio, "keep_ratio")
        if law == "geometric":
            return tuple(keep_ratio ** (stage + 1) for stage in range(stages))
        ratios = tuple(keep_ratio - 0.2 * stage for stage in range(stages))
        if ratios and ratios[-1] <= 0:
            raise ValueError(
                f"keep_ratio must be above {0.2 * (stages - 1):g}, not {keep_ratio}: each of the "
                f"{stages} stages keeps 0.2 less than the one before"
            )
        return ratios
    given = tuple(keep_ratio)
    if len(given) != stages:
        raise ValueError(f"keep_ratio has {len(given)} values for {stages} pruning stages")
    ratios = tuple(_in_range(ratio, "every keep_ratio") for ratio in given)
    if law == "geometric" and list(ratios) != sorted(ratios, reverse=True):
        raise ValueError(
            f"keep_ratio counts from all tokens, and dropped ones never come back: its values "
            f"cannot grow, as in {list(ratios)}"
        )
    return ratios


def _in_range(ratio: float, what: str) -> float:
    if not _is(ratio, Real) or not 0 < ratio <= 1:
        raise ValueError(f"{what} must be above 0 and at most 1, not {ratio!r}")
    return float(ratio)


def _is(value: object, kind: type) -> bool:
    """Whether `value` is such a number, Python's or numpy's; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def keep_counts(num_tokens: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Tokens left after each stage: ratios count from all of them, and fractions are cut off.

    Raises:
        ValueError: a stage would keep nothing.
    """
    counts = tuple(int(num_tokens * ratio) for ratio in ratios)
    if 0 in counts:
        ratio = ratios[counts.index(0)]
        raise ValueError(
            f"keep_ratio {ratio:g} of {num_tokens} tokens leaves none; the least is "
            f"1/{num_tokens} = {1 / num_tokens:.4f}"
        )
    return counts
