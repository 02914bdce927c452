"""Pictures of what is left of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from reproductions.vit_slim.selection import Kept

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: One for each budget, from light to dark.
SHADES = ("#b8d4ea", "#86b6da", "#5596c8", "#2f74ad", "#174f86", "#0b2f57")


def structure_figure(kept: Mapping[str, Kept], title: str | None = None) -> Figure:
    """Heads and widths left per layer against the budget (Figures 2 and 3 of the paper).

    Above, for each budget, the dimensions that every head of every layer keeps; below the MLP
    channels of every layer, all budgets in one panel.

    Args:
        kept: budget as text -> what is left, from the largest budget to the smallest.

    Raises:
        ValueError: nothing to draw.
    """
    if not kept:
        raise ValueError("a picture of budgets needs at least one")
    from matplotlib.figure import Figure

    first = next(iter(kept.values()))
    layers, (heads, width) = len(first.attention), first.heads
    columns = len(kept)
    figure = Figure(
        figsize=(max(6.5, columns * (0.34 * heads + 0.5) + 0.8), 0.24 * layers + 3.6),
        layout="constrained",
    )
    grid = figure.add_gridspec(2, columns, height_ratios=[0.24 * layers + 0.6, 2.2])
    for column, (name, one) in enumerate(kept.items()):
        axes = figure.add_subplot(grid[0, column])
        dims = one.head_dims
        drawn = axes.imshow(dims, vmin=0, vmax=width, cmap="Blues", aspect="auto")
        for (layer, head), count in np.ndenumerate(dims):
            dark = count > 0.6 * width
            axes.text(head, layer, count, ha="center", va="center", fontsize=7,
                      color="white" if dark else "0.2")  # fmt: skip
        axes.set_title(f"budget {name}", fontsize=9)
        axes.set_xlabel("head", fontsize=8)
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
        axes.tick_params(labelsize=7, length=0)
        if column == 0:
            axes.set_ylabel("layer", fontsize=8)
        else:
            axes.set_yticklabels([])
    figure.colorbar(drawn, ax=figure.axes, shrink=0.9, label=f"dimensions left of {width}")
    panel = figure.add_subplot(grid[1, :])
    for number, (name, one) in enumerate(kept.items()):
        shade = SHADES[min(len(SHADES) - 1, number * len(SHADES) // len(kept))]
        panel.plot(one.hidden, marker="o", markersize=4, label=name, color=shade)
    panel.axhline(len(first.mlp[0]), color="0.7", linewidth=0.8, linestyle=":")
    panel.set_ylim(0, 1.05 * len(first.mlp[0]))
    panel.set_xticks(range(layers))
    panel.set_xlabel("layer", fontsize=8)
    panel.set_ylabel(f"MLP channels left of {len(first.mlp[0])}", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(
        title="budget", ncols=len(kept), fontsize=8, title_fontsize=8, frameon=False,
        loc="lower left",
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
