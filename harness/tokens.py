"""Tokens over pictures: which patches a method keeps, and which it merges into what.

A patch position is an index into the flattened grid of patches, row by row: 0 is the top left.
Class tokens are not patches and never among them.

    sample = sample_images(model, "fashion_mini", count=6)
    logits, kept = model.forward_with_tokens(sample.inputs)      # one entry per stage
    figure = kept_figure(sample, {"block 2": kept[0], "block 3": kept[1]}, grid=(8, 8))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from harness.data import AugmentedDataset, ImageDataset, create_transform, load_split
from harness.evaluation import model_input

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

#: Kept positions of one stage: `(B, K)`, where negative entries are padding; or, where images
#: keep different numbers of tokens, B tensors `(K_b,)`.
Positions = Tensor | Sequence[Tensor]
Grid = tuple[int, int]

#: How much of a dropped patch is painted over, and with what: a hue, since pictures may be grey.
VEIL, PAINT = 0.8, np.array([92, 138, 188])


@dataclass(frozen=True)
class Sample:
    """Real images as a model sees them.

    Attributes:
        inputs: `(B, 3, H, W)`, normalised, on the CPU.
        pictures: the same pixels to look at, uint8 `(B, H, W, 3)`.
        labels: `(B,)` int64.
        names: the name of each image's class.
        source: the data set's name.
    """

    inputs: Tensor
    pictures: np.ndarray
    labels: Tensor
    names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.labels)


def sample_images(
    model: nn.Module,
    track: str | Path | ImageDataset,
    count: int,
    *,
    split: str = "test",
    root: str | Path | None = None,
) -> Sample:
    """`count` images of a split, evenly spread over its classes, as `model` sees them.

    The choice depends on `count` alone: the first images of each class, one class after the other.

    Args:
        track: a track or whatever `load_split` takes, or a data set.

    Raises:
        ValueError: no images asked for, or more than there are.
        ReplivitError: no such data.
    """
    dataset = track if isinstance(track, ImageDataset) else load_split(track, split, root)
    if not 1 <= count <= len(dataset):
        raise ValueError(f"count must be 1 to {len(dataset)}, the images of {dataset.name}")
    spec, size = model_input(model, dataset.track)
    chosen = _by_turns(dataset.labels, count)
    seen = AugmentedDataset(dataset, create_transform(spec, size), seed=0)
    inputs = torch.stack([image for image, _ in seen.__getitems__(chosen)])
    mean, std = (torch.tensor(one)[:, None, None] for one in (spec.mean, spec.std))
    pictures = ((inputs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(dataset.labels[chosen])
    return Sample(
        inputs, pictures.permute(0, 2, 3, 1).numpy(), labels,
        tuple(dataset.classes[label] for label in labels), dataset.name,
    )  # fmt: skip


def _by_turns(labels: np.ndarray, count: int) -> list[int]:
    """The first image of each class, then the second of each, ...: `count` indices."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    turn = np.arange(len(labels)) - starts  # the how many-th of its class each image is
    return order[np.argsort(turn, kind="stable")][:count].tolist()


def keep_mask(kept: Positions, num_tokens: int) -> Tensor:
    """Which of the `num_tokens` patches are among the kept positions: bool `(B, num_tokens)`.

    Raises:
        ValueError: a position that no patch has.
    """
    rows = list(kept)
    mask = torch.zeros(len(rows), num_tokens, dtype=torch.bool)
    for row, positions in zip(mask, rows, strict=True):
        positions = positions[positions >= 0].cpu()
        if len(positions) and int(positions.max()) >= num_tokens:
            raise ValueError(
                f"position {int(positions.max())} is not one of {num_tokens} patches "
                f"(0 to {num_tokens - 1})"
            )
        row[positions] = True
    return mask


def draw_kept(axes: Axes, picture: np.ndarray, mask: Tensor, grid: Grid) -> None:
    """A picture `(H, W, 3)` with the patches that `mask` `(N,)` does not keep painted over.

    Raises:
        ValueError: the mask is not the grid's, or the picture does not divide into it.
    """
    kept = _over_pixels(mask, grid, picture)[..., None]
    veiled = (1 - VEIL) * picture + VEIL * PAINT
    axes.imshow(np.where(kept, picture, veiled).astype(np.uint8), interpolation="nearest")
    _bare(axes)


def kept_figure(
    sample: Sample, stages: Mapping[str, Positions], grid: Grid, title: str | None = None
) -> Figure:
    """A row per image: the image, then what each stage keeps of it.

    Where all images keep the same number, it stands above the column, else under each picture.

    Args:
        stages: name -> kept positions, in the order of the network.
        grid: patches (down, across).

    Raises:
        ValueError: no stage, positions of other images, or a grid that does not fit.
    """
    if not stages:
        raise ValueError("a figure of kept tokens needs at least one stage")
    total = grid[0] * grid[1]
    masks = {name: keep_mask(kept, total) for name, kept in stages.items()}
    for name, mask in masks.items():
        if len(mask) != len(sample):
            raise ValueError(f"stage {name!r} is of {len(mask)} images, not of {len(sample)}")
    figure, cells = _cells(len(sample), 1 + len(masks), title)
    for row, (picture, label) in enumerate(zip(sample.pictures, sample.names, strict=True)):
        cells[row, 0].imshow(picture, interpolation="nearest")
        _bare(cells[row, 0])
        cells[row, 0].set_ylabel(label, fontsize=8)
        for axes, mask in zip(cells[row, 1:], masks.values(), strict=True):
            draw_kept(axes, picture, mask[row], grid)
    cells[0, 0].set_title(f"{total} patches", fontsize=9)
    for column, (name, mask) in enumerate(masks.items(), 1):
        counts = mask.sum(1).tolist()
        same = len(set(counts)) == 1
        cells[0, column].set_title(f"{name}: {counts[0]}" if same else name, fontsize=9)
        for row, count in enumerate(counts if not same else ()):
            cells[row, column].set_xlabel(str(count), fontsize=8, labelpad=1)
    return figure


def assignment_figure(
    sample: Sample,
    maps: Tensor,
    grid: Grid,
    outputs: Sequence[int] = (0, 1, 2, 3),
    title: str | None = None,
) -> Figure:
    """Soft merging over pictures: where each patch goes most, and where single outputs look.

    A row per image: the image; every patch in the colour of the output that weighs it most; then,
    for each of `outputs`, its weights, yellow where they are large, each on a scale of its own.

    Args:
        maps: weights of the patches in the M outputs, `(B, M, N)`.
        grid: patches (down, across), N together.

    Raises:
        ValueError: maps of other images or patches, or an output that does not exist.
    """
    batch, merged, patches = maps.shape
    if batch != len(sample) or patches != grid[0] * grid[1]:
        raise ValueError(
            f"maps {tuple(maps.shape)} do not fit {len(sample)} images of {grid[0]}x{grid[1]} "
            "patches"
        )
    if any(not 0 <= one < merged for one in outputs):
        raise ValueError(f"outputs {list(outputs)}: there are {merged}, 0 to {merged - 1}")
    import matplotlib

    maps = maps.detach().float().cpu()
    figure, cells = _cells(batch, 2 + len(outputs), title)
    colours = matplotlib.colormaps["tab20"](np.linspace(0, 1, max(merged, 2)))[:, :3]
    for row, (picture, own) in enumerate(zip(sample.pictures, maps, strict=True)):
        cells[row, 0].imshow(picture, interpolation="nearest")
        cells[row, 0].set_ylabel(sample.names[row], fontsize=8)
        strongest = _over_pixels(own.argmax(0), grid, picture)
        blend = 0.5 * picture / 255 + 0.5 * colours[strongest]
        cells[row, 1].imshow(blend, interpolation="nearest")
        for axes, output in zip(cells[row, 2:], outputs, strict=True):
            weights = own[output] / own[output].max().clamp_min(1e-12)
            heat = matplotlib.colormaps["viridis"](_over_pixels(weights, grid, picture))[..., :3]
            axes.imshow(0.35 * picture / 255 + 0.65 * heat, interpolation="nearest")
        for axes in cells[row]:
            _bare(axes)
    cells[0, 0].set_title(f"{patches} patches", fontsize=9)
    cells[0, 1].set_title(f"strongest of {merged}", fontsize=9)
    for axes, output in zip(cells[0, 2:], outputs, strict=True):
        axes.set_title(f"output {output}", fontsize=9)
    return figure


def _over_pixels(values: Tensor, grid: Grid, picture: np.ndarray) -> np.ndarray:
    """One value per patch `(N,)` as one value per pixel `(H, W)`."""
    height, width = picture.shape[:2]
    if values.numel() != grid[0] * grid[1] or height % grid[0] or width % grid[1]:
        raise ValueError(
            f"{values.numel()} patches and a picture of {height}x{width} pixels do not fit a grid "
            f"of {grid[0]}x{grid[1]}"
        )
    table = values.reshape(grid).cpu().numpy()
    return table.repeat(height // grid[0], axis=0).repeat(width // grid[1], axis=1)


def _cells(rows: int, columns: int, title: str | None) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.25 * columns + 0.4, 1.25 * rows + 0.5), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bare(axes: Axes) -> None:
    """No ticks; a thin frame, so that a veiled border still shows where the picture ends."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color="0.8", linewidth=0.5)
