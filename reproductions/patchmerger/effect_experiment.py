"""Mergers on real images: trained from the start, or inserted into a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import ExperimentResult, ReplivitError, get_paper
from harness.effect import CONTROL, Arm, Claim, choose_setting
from harness.effect import effect as compare_arms

PAPER = "patchmerger"
#: Dense parent -> the same network with a merger of 8 outputs in its middle.
MERGED = {
    "vit_micro": "patchmerger_micro",
    "deit_ti": "patchmerger_deit_ti",
    "deit_s": "patchmerger_deit_s",
    "deit_b": "patchmerger_deit_b",
}
#: What a dense parent does not have.
NEW = ("blocks.merger*",)


def arms_of(variant: str) -> dict[str, Arm]:
    """All arms by name, for a network with a merger in its middle."""
    inserted, scratch = {"new": NEW}, {"start": "scratch"}
    arms = (
        Arm("inserted, no training", variant, **inserted, train=False),
        Arm("inserted", variant, **inserted),
        Arm("inserted, before block 1", variant, {"layers": 1}, **inserted),
        Arm("inserted, 2 outputs", variant, {"num_outputs": 2}, **inserted),
        Arm("inserted, 32 outputs", variant, {"num_outputs": 32}, **inserted),
        Arm("inserted, queries of std 1", variant, {"init_std": 1.0}, **inserted),
        Arm("from the start", variant, **scratch),
        Arm("from the start, queries of std 1", variant, {"init_std": 1.0}, **scratch),
    )
    return {arm.name: arm for arm in arms}


CLAIMS = (
    Claim("Trained from the start, a merger costs at most a point", "from the start", CONTROL, 1.0),
    Claim("Inserted into a trained network, a merger costs at most a point", "inserted", CONTROL,
          1.0),
    Claim("A merger should be there from the start", "from the start", "inserted"),
    Claim("An inserted merger needs training", "inserted", "inserted, no training"),
    Claim("The middle is a better place than the first blocks", "inserted",
          "inserted, before block 1"),
    Claim("8 outputs are better than 2", "inserted", "inserted, 2 outputs"),
    Claim("8 outputs do as well as 32, to half a point", "inserted", "inserted, 32 outputs", 0.5),
    Claim("Unscaled queries should start small: inserted", "inserted",
          "inserted, queries of std 1"),
    Claim("Unscaled queries should start small: from the start", "from the start",
          "from the start, queries of std 1"),
)  # fmt: skip


def effect(
    scale: str = "small", arms: Sequence[str] | None = None, **changes: Any
) -> ExperimentResult:
    """Accuracy and cost of mergers beside the dense control, with the same number of extra epochs.

    Args:
        scale: `tiny`, `small` or `paper`.
        arms: names of those to train; default all.
        changes: fields of `harness.effect.Setting`: track, seeds, epochs, ...

    Raises:
        ReplivitError: an unknown scale, parent, arm or option.
    """
    parent = choose_setting(scale, changes).parent
    if parent not in MERGED:
        raise ReplivitError(f"no merged variant of {parent}; there are some of {', '.join(MERGED)}")
    known = arms_of(MERGED[parent])
    names = list(known) if arms is None else [arms] if isinstance(arms, str) else list(arms)
    for name in names:
        if name not in known:
            raise ReplivitError(f"no arm {name!r}; there are: {'; '.join(known)}")
    compared = {*names, CONTROL}
    return compare_arms(
        [known[name] for name in names],
        scale=scale,
        claims=[one for one in CLAIMS if {one.better, one.than} <= compared],
        published=[
            {key: getattr(row, key) for key in ("variant", "metric", "value", "unit", "source")}
            for row in get_paper(PAPER).facts.published
            if row.metric in ("claim", "remark")
        ],
        notes=(
            "Mergers of 8 outputs in the middle, unless an arm's name says otherwise. 'From "
            "the start' trains from random weights for the parent's epochs and the extra ones."
        ),
        **changes,
    )
