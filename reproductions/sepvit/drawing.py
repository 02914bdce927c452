"""Pictures of both attentions over real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from harness.tokens import Sample
from reproductions.sepvit.model import SepViT
from reproductions.sepvit.windows import Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Seen:
    """What one block does with some images, averaged over heads.

    Attributes:
        windows: how it cuts the map.
        token: where each window's token looks, laid out as the map: `(B, H, W)`.
        between: what each window takes from each other one: `(B, n, n)`, rows sum to 1.
    """

    windows: Windows
    token: Tensor
    between: Tensor


@torch.no_grad()
def look(model: SepViT, images: Tensor, stage: int, block: int) -> Seen:
    """Run `images` `(B, 3, H, W)` up to a block and read its attentions.

    Raises:
        ValueError: the block has no window token.
    """
    chosen = model.blocks[stage][block]
    if not chosen.attn.has_token:
        raise ValueError(f"block {block} of stage {stage} has no window tokens to look at")
    inputs = []
    hook = chosen.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        model(images)
    finally:
        hook.remove()
    windows = chosen.windows(*inputs[0].shape[1:3])
    inside, between = chosen.attention_maps(inputs[0])
    token = inside[:, :, :, 0, 1:].mean(2)  # (B, n, S): the token's row, without itself
    laid_out = windows.join(token[:, None, ..., None])[..., 0]
    return Seen(windows, laid_out, between.mean(1))


def window_figure(sample: Sample, blocks: dict[str, tuple[Seen, tuple[int, ...]]]) -> Figure:
    """A row per image: for each block its windows, where their tokens look, and what single windows
    (outlined) take from the others.

    Args:
        blocks: name -> what was seen, and the windows to ask.
    """
    from matplotlib.figure import Figure

    columns = sum(2 + len(asked) for _, asked in blocks.values())
    figure = Figure(figsize=(1.3 * columns, 1.3 * len(sample) + 0.5), layout="constrained")
    cells = figure.subplots(len(sample), columns, squeeze=False)
    for row, picture in enumerate(sample.pictures):
        cells[row, 0].set_ylabel(sample.names[row], fontsize=8)
        column = 0
        for name, (seen, asked) in blocks.items():
            grid, token = cells[row, column], cells[row, column + 1]
            grid.imshow(picture, interpolation="nearest")
            _heat(token, picture, seen.token[row])
            for axes in (grid, token):
                _lines(axes, picture, seen.windows)
            titles = [f"{name}: {seen.windows.count} windows", "their tokens look"]
            for number, window in enumerate(asked):
                axes = cells[row, column + 2 + number]
                share = seen.between[row, window].view(seen.windows.rows, seen.windows.columns)
                _heat(axes, picture, share)
                _outline(axes, picture, seen.windows, window)
                titles.append(f"window {window} takes")
            if row == 0:
                for axes, title in zip(cells[0, column:], titles, strict=False):
                    axes.set_title(title, fontsize=8)
            column += 2 + len(asked)
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def _heat(axes: Axes, picture: np.ndarray, values: Tensor) -> None:
    """`values` of a grid over a dimmed picture, from 0 to their own largest."""
    height, width = picture.shape[:2]
    axes.imshow(picture, interpolation="nearest", alpha=0.45)
    axes.imshow(
        values.cpu().numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5), alpha=0.6,
        interpolation="nearest", cmap="viridis", vmin=0,
    )  # fmt: skip


def _lines(axes: Axes, picture: np.ndarray, windows: Windows) -> None:
    """The borders between windows, where the map divides into them."""
    height, width = picture.shape[:2]
    for row in range(1, windows.rows):
        axes.axhline(row * height / windows.rows - 0.5, color="w", linewidth=0.7)
    for column in range(1, windows.columns):
        axes.axvline(column * width / windows.columns - 0.5, color="w", linewidth=0.7)


def _outline(axes: Axes, picture: np.ndarray, windows: Windows, window: int) -> None:
    from matplotlib.patches import Rectangle

    height, width = picture.shape[:2]
    down, across = height / windows.rows, width / windows.columns
    row, column = divmod(window, windows.columns)
    axes.add_patch(
        Rectangle((column * across - 0.5, row * down - 0.5), across, down, fill=False,
                  edgecolor="r", linewidth=1.5)
    )  # fmt: skip
