"""Is attention between windows worth its cost, and what should stand for a window in it?"""

from __future__ import annotations

from typing import Any

from harness import ExperimentResult
from harness.effect import Arm, Claim
from reproductions.sepvit.scratch import choose_plan, compare_from_scratch

PAPER = "sepvit"
SEPVIT = "SepViT"

#: track's own size -> (network, its twin without attention between windows, its shifted twin).
#: At paper scale, T with the same changes; MLPs as wide as makes the multiply-adds equal.
TWINS = {
    "micro": ("sepvit_micro", ("sepvit_micro_window", {}), ("sepvit_micro_swin", {})),
    "tiny": (
        "sepvit_tiny",
        ("sepvit_tiny", {"pointwise": False, "mlp_ratio": 4.0625}),
        ("sepvit_tiny", {"pointwise": False, "shift": True, "mlp_ratio": 4.25,
                         "windows": ((7,), (7,), (7,), (7,))}),
    ),
}  # fmt: skip


def _size(scale: str) -> str:
    return "tiny" if scale == "paper" else "micro"


def twins(scale: str = "small", **changes: Any) -> ExperimentResult:
    """SepViT, the same without attention between windows, and with Swin's shift in its place.

    All three cost the same: what the twins save goes into wider MLPs.

    Args:
        scale: `tiny` (does it run?), `small` (small images) or `paper` (ImageNet).
        changes: fields of `scratch.Plan`: seeds, epochs, ...

    Raises:
        ReplivitError: an unknown scale or option.
    """
    plan = choose_plan(scale, changes)
    network, (window, window_options), (shifted, shifted_options) = TWINS[_size(scale)]
    arms = [
        Arm(SEPVIT, network),
        Arm("windows alone", window, window_options),
        Arm("shifted windows", shifted, shifted_options),
    ]
    claims = [
        Claim("Attention between windows is better than wider MLPs", SEPVIT, "windows alone"),
        Claim("One separable block is better than Swin's shifted windows", SEPVIT,
              "shifted windows"),
    ]  # fmt: skip
    return compare_from_scratch(
        arms, claims, plan, paper=PAPER, about=("no overlapping embedding",),
        notes="Equal multiply-adds. The paper compares with Swin-T and conditional positions, on "
        "ImageNet.",
    )  # fmt: skip


def window_token(scale: str = "small", **changes: Any) -> ExperimentResult:
    """What stands for a window, how its token starts, and whether windows are grouped.

    Arguments and errors as of `twins`.
    """
    plan = choose_plan(scale, changes)
    network = TWINS[_size(scale)][0]
    ungrouped = ((7,),) * 4 if scale == "paper" else ((4,),) * 3
    arms = [
        Arm(SEPVIT, network),
        Arm("token starts normal", network, {"token_init": "normal"}),
        Arm("token always zero", network, {"summary": "zero"}),
        Arm("mean of the window", network, {"summary": "mean"}),
        Arm("convolution of the window", network, {"summary": "convolution"}),
        Arm("no grouped windows", network, {"windows": ungrouped}),
    ]
    claims = [
        Claim("Learned tokens are better than tokens that are always zero", SEPVIT,
              "token always zero"),
        Claim("A token stands for its window better than the mean", SEPVIT, "mean of the window"),
        Claim("A token stands for its window better than a convolution", SEPVIT,
              "convolution of the window"),
        Claim("Grouped windows help", SEPVIT, "no grouped windows"),
        Claim("Tokens may start at zero: it costs at most half a point", SEPVIT,
              "token starts normal", 0.5),
    ]  # fmt: skip
    return compare_from_scratch(
        arms, claims, plan, paper=PAPER, about=("OPE + DSSA",),
        notes="SepViT has learned tokens that start at zero, and grouped windows in every second "
        "block of the first two stages.",
    )  # fmt: skip
