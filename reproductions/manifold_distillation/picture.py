"""The manifolds as pictures: who resembles whom, for a teacher and its students."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproductions.manifold_distillation.taps import Layer, tapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from harness.tokens import Sample


@torch.no_grad()
def points_of(model: nn.Module, layer: Layer, images: Tensor) -> Tensor:
    """The patches after a layer, of length one: `(B, N, C)` for images `(B, 3, H, W)`."""
    device = next(model.parameters()).device
    with tapped(model, [layer]) as taps:
        model.eval()(images.to(device))
    (features,) = taps.features()
    return F.normalize(features.gridded().patches.float(), dim=-1).cpu()


def manifolds(points: Tensor, image: int, position: int) -> dict[str, Tensor]:
    """Two matrices of cosines: `(N, N)` of one image's patches, `(B, B)` of one patch over images.

    Args:
        points: `(B, N, C)`, of length one.
    """
    within, across = points[image], points[:, position]
    return {"patch": within @ within.T, "sample": across @ across.T}


def manifold_figure(
    models: Mapping[str, tuple[nn.Module, Layer]], sample: Sample, images: tuple[int, ...] = (0, 1)
) -> Figure:
    """A column per network, the teacher first; a row per image, and one over all images.

    Below each matrix stands its mean squared difference from the teacher's. All colours have the
    same scale, that of cosines from -1 to 1.

    Args:
        models: name -> network and the layer to look at.
        sample: images; those of one class are put side by side in the last row.
        images: which of them have a row of their own.
    """
    from matplotlib.figure import Figure

    order = torch.argsort(sample.labels, stable=True)
    points = {name: points_of(*one, sample.inputs) for name, one in models.items()}
    position = next(iter(points.values())).shape[1] // 2
    figure = Figure(
        figsize=(1.6 * (len(models) + 1) + 0.5, 1.75 * (len(images) + 1)), layout="constrained"
    )
    cells = figure.subplots(len(images) + 1, len(models) + 1, squeeze=False)
    for row, image in enumerate(images):
        cells[row, 0].imshow(sample.pictures[image], interpolation="nearest")
        cells[row, 0].set_ylabel(f"{sample.names[image]}\n(patches)", fontsize=8)
        matrices = [manifolds(one, image, position)["patch"] for one in points.values()]
        shown = _row(cells[row, 1:], matrices)
    cells[-1, 0].set_axis_off()
    cells[-1, 0].text(
        0.5, 0.5, f"one patch of\n{len(sample)} images,\nby class", ha="center", va="center",
        fontsize=8, transform=cells[-1, 0].transAxes,
    )  # fmt: skip
    matrices = [manifolds(one[order], 0, position)["sample"] for one in points.values()]
    shown = _row(cells[-1, 1:], matrices)
    for axes, name in zip(cells[0], ("image", *models), strict=True):
        axes.set_title(name, fontsize=9)
    for axes in cells.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(shown, ax=cells[:, -1], shrink=0.6, label="cosine")
    return figure


def _row(cells: list[Axes], matrices: list[Tensor]) -> object:
    """Draw matrices, and below each how far it is from the first; returns one of the drawings."""
    for number, (axes, matrix) in enumerate(zip(cells, matrices, strict=True)):
        shown = axes.imshow(matrix.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        if number and matrix.shape == matrices[0].shape:
            far = (matrix - matrices[0]).square().mean()
            axes.set_xlabel(f"{far:.3f}", fontsize=8, labelpad=2)
    return shown
