"""Pictures: the operator map of networks, and how a search went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from reproductions.uninet.model import Architecture
from reproductions.uninet.search import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"dw": "#4c72b0", "attn": "#dd8452", "mlp": "#55a868", "conv": "#8172b3"}
WORDS = {"dw": "convolution", "attn": "transformer", "mlp": "MLP", "conv": "full convolution"}
POLICY, RANDOM = "#c44e52", "0.55"
_GAP = 0.9  # between two stages, in blocks


def operator_map(axes: Axes, networks: Mapping[str, Architecture]) -> None:
    """A row per network: a box per block, coloured by operator, as high as it is wide in channels.

    Between stages stands the down-sampling module, below each stage its channels and expansion.
    """
    from matplotlib.patches import Patch, Rectangle

    widest = max(max(one.channels) for one in networks.values())
    longest = 0.0
    for row, arch in enumerate(networks.values()):
        left, middle = 0.0, -1.5 * row
        for stage, operator in enumerate(arch.block_ops):
            if stage:
                axes.text(left + _GAP / 2, middle, arch.ds_ops[stage - 1].upper(), ha="center",
                          va="center", fontsize=8)  # fmt: skip
                left += _GAP
            height = 0.25 + 0.6 * arch.channels[stage] / widest
            for block in range(arch.repeats[stage]):
                axes.add_patch(
                    Rectangle((left + block + 0.05, middle - height / 2), 0.9, height,
                              facecolor=COLOURS[operator], edgecolor="none")
                )  # fmt: skip
            centre = left + arch.repeats[stage] / 2
            axes.text(centre, middle - 0.5, f"{arch.channels[stage]}", ha="center", va="top",
                      fontsize=7, color="0.35")  # fmt: skip
            left += arch.repeats[stage]
        longest = max(longest, left)
    axes.set(xlim=(-0.2, longest + 0.2), ylim=(-1.5 * (len(networks) - 1) - 0.85, 0.75))
    axes.set_yticks([-1.5 * row for row in range(len(networks))], labels=list(networks))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    used = {operator for arch in networks.values() for operator in arch.block_ops}
    handles = [Patch(color=COLOURS[one], label=WORDS[one]) for one in COLOURS if one in used]
    axes.legend(handles=handles, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0),
                ncols=len(handles), fontsize=8)  # fmt: skip


def draw_rewards(
    axes: Axes, policy: Sequence[Trace], random: Sequence[Trace], batch: int, best: bool = False
) -> None:
    """Reward over evaluations: every network a dot, the mean over batch and searches a line.

    Args:
        best: the best so far instead, one thin line per search, their mean thick.
    """
    for name, traces, colour in (("policy gradient", policy, POLICY), ("random", random, RANDOM)):
        values = np.array([one.running_best if best else one.rewards for one in traces])
        places = np.arange(1, values.shape[1] + 1)
        if best:
            axes.plot(places, values.T, color=colour, linewidth=0.7, alpha=0.5)
            axes.plot(places, values.mean(0), color=colour, linewidth=2, label=name)
            continue
        axes.plot(np.tile(places, len(values)), values.ravel(), ".", color=colour, alpha=0.3, ms=4)
        starts = range(0, values.shape[1], batch)
        means = [values[:, start : start + batch].mean() for start in starts]
        centres = [places[start : start + batch].mean() for start in starts]
        axes.plot(centres, means, "o-", color=colour, ms=4, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="networks evaluated", ylabel="best reward so far" if best else "reward")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
