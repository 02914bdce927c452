"""Pictures: an architecture layer by layer, a search's trace, and the supernet's slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reproductions.autoformer.space import Config, Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "0.75", "#009E73"


def draw_architecture(axes: Axes, config: Config, space: Space, title: str = "") -> None:
    """Layers from bottom to top: heads to the left, MLP to the right, in channels.

    The outline is the supernet. All layers have the dimension that stands in the title.
    """
    layers = np.arange(space.super_depth)
    inner = space.super_heads * space.head_dim
    widest = int(space.super_dim * space.super_ratio)
    outline = {"color": "none", "edgecolor": GREY, "linewidth": 0.8, "height": 0.8}
    axes.barh(layers, [-inner] * len(layers), **outline)
    axes.barh(layers, [widest] * len(layers), **outline)
    for layer in range(config.depth):
        for head in range(config.num_heads[layer]):
            axes.barh(layer, -space.head_dim, left=-head * space.head_dim, height=0.8,
                      color=BLUE, edgecolor="white", linewidth=1)  # fmt: skip
    used = layers[: config.depth]
    axes.barh(used, config.hidden_dims, height=0.8, color=ORANGE)
    for layer in used:
        axes.text(config.hidden_dims[layer], layer, f" {config.mlp_ratios[layer]:g}",
                  va="center", fontsize=8)  # fmt: skip
        axes.text(-config.num_heads[layer] * space.head_dim, layer,
                  f"{config.num_heads[layer]} ", va="center", ha="right", fontsize=8)  # fmt: skip
    axes.set_yticks(layers, labels=[str(layer + 1) for layer in layers])
    axes.set(ylabel="layer", xlabel="channels: heads | MLP, with its ratio",
             xlim=(-1.35 * inner, 1.25 * widest))  # fmt: skip
    ticks = [-inner, 0, widest // 2, widest]
    axes.set_xticks(ticks, labels=[str(abs(tick)) for tick in ticks])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title or f"{config.depth} layers, dimension {config.embed_dim}", fontsize=10)


def draw_trace(axes: Axes, traces: dict[str, Sequence[Sequence[dict[str, Any]]]]) -> None:
    """Best so far (lines) and all candidates (dots) against evaluations.

    Args:
        traces: searcher -> its runs, each a `SearchResult.trace()`.
    """
    for (name, runs), color in zip(traces.items(), (ORANGE, BLUE, GREEN), strict=False):
        for number, run in enumerate(runs):
            steps = [row["evaluation"] for row in run]
            axes.plot(steps, [row["fitness"] for row in run], ".", color=color, alpha=0.25, ms=4)
            axes.step(steps, [row["best"] for row in run], where="post", color=color, lw=1.8,
                      label=name if number == 0 else None)  # fmt: skip
    axes.set(xlabel="candidates evaluated", ylabel="top-1 on held-out images, %")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def draw_slices(axes: Axes, space: Space, configs: Sequence[Config], layer: int = 0) -> None:
    """Which part of one layer's MLP weight `fc1` the configurations share: nested rectangles."""
    from matplotlib.patches import Rectangle

    widest = int(space.super_dim * space.super_ratio)
    axes.add_patch(Rectangle((0, 0), space.super_dim, widest, fill=False, ec="0.3", lw=1.5))
    order = sorted(configs, key=lambda one: -one.embed_dim * one.hidden_dims[layer])
    for config, color in zip(order, (GREEN, BLUE, ORANGE), strict=False):
        width, height = config.embed_dim, config.hidden_dims[layer]
        axes.add_patch(Rectangle((0, 0), width, height, fc=color, ec=color, alpha=0.35, lw=1.5))
        axes.text(width - 1, height - 2, f"dim {width}, ratio {config.mlp_ratios[layer]:g}",
                  ha="right", va="bottom", fontsize=8, color="0.15")  # fmt: skip
    axes.set(xlim=(-2, space.super_dim + 2), ylim=(widest + 4, -4),
             xlabel="input channels", ylabel="hidden channels")  # fmt: skip
    axes.set_title("One weight, many layers", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
