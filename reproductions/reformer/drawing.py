"""Pictures: vectors fall into buckets, buckets into chunks; attention that rounds recover."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reproductions.reformer.chunked import attention_maps
from reproductions.reformer.hashing import draw_rotations, hash_vectors, sort_by_bucket
from reproductions.reformer.rules import PAPER
from reproductions.reformer.windows import Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_buckets(axes: Axes, points: Tensor, rotation: Tensor) -> Tensor:
    """Points of the plane in the colours of their buckets, and the directions that decide.

    Args:
        points: `(L, 2)`.
        rotation: `(2, b / 2)`, columns of one length: then the nearest direction decides.

    Returns:
        Bucket ids `(L,)`.
    """
    total = 2 * rotation.shape[1]
    buckets = hash_vectors(points[None, None], rotation[None, None, :, None], total)[0, 0, 0]
    axes.scatter(*points.T.numpy(), c=_colours(buckets, total), s=16, zorder=3)
    for index, direction in enumerate(torch.cat([rotation, -rotation], 1).T):
        end = 2.6 * direction / direction.norm()
        axes.annotate(
            "", end.tolist(), (0, 0), arrowprops={"arrowstyle": "->", "color": "0.5", "lw": 0.8}
        )
        axes.text(*(1.12 * end).tolist(), str(index), ha="center", va="center", fontsize=8)
    axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])
    return buckets


def draw_sorting(axes: Axes, buckets: Tensor, total: int, chunk: int) -> None:
    """Tokens as they come, and sorted by bucket and cut into chunks.

    Args:
        buckets: `(L,)`.
    """
    ordered = sort_by_bucket(buckets[None, None, None]).buckets[0, 0]
    for height, row in ((1.5, buckets), (0, ordered)):
        places = np.arange(len(row))
        axes.bar(places, 1, 1.0, bottom=height, align="edge", color=_colours(row, total))
    for edge in range(0, len(buckets) + 1, chunk):
        axes.plot([edge, edge], [-0.15, 1.15], color="black", linewidth=1.2)
    start = 2 * chunk
    for first, text in ((start, "queries"), (start - chunk, "look back")):
        axes.annotate(
            text, (first + chunk / 2, -0.2), (first + chunk / 2, -0.75), ha="center", fontsize=8,
            arrowprops={"arrowstyle": "-[, widthB=1.8", "lw": 0.8},
        )  # fmt: skip
    axes.text(0, 2.6, "tokens as they come", fontsize=8)
    axes.text(0, 1.18, "sorted by bucket, in chunks", fontsize=8)
    axes.set(xlim=(-1, len(buckets) + 1), ylim=(-0.95, 3.0))
    axes.axis("off")


def maps_by_rounds(
    queries: Tensor, rounds: tuple[int, ...], chunk: int, num_buckets: int, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Full attention of shared queries `(L, d)`, and LSH attention of so many rounds: `(L, L)`.

    The rules are the paper's: only pairs of one bucket, each once. Rounds are nested: two rounds
    are the first of them and one more.
    """
    key, length = PAPER.keys(queries), len(queries)
    scores = queries @ key.T
    scores.fill_diagonal_(PAPER.self_penalty)
    rotations = draw_rotations(queries.shape[1], max(rounds), num_buckets, seed=seed)
    found = []
    for count in rounds:
        buckets = hash_vectors(queries[None, None], rotations[..., :count, :], num_buckets)
        windows = Windows(
            length, chunk, count, sorted=sort_by_bucket(buckets), same_bucket=True, union=True,
            self_penalty=PAPER.self_penalty,
        )  # fmt: skip
        found.append(attention_maps(queries[None], key[None], windows)[1][0])
    return scores.softmax(-1), found


def lesson_figure(queries: Tensor, rounds: tuple[int, ...] = (1, 4, 16), seed: int = 0) -> Figure:
    """Buckets in the plane, sorting, and attention among image patches by rounds.

    Args:
        queries: `(L, d)`, of one image.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.9))
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(64, 2, generator=generator)
    angles = torch.pi * (torch.arange(4) + torch.rand(1, generator=generator)) / 4
    rotation = torch.stack([angles.cos(), angles.sin()])  # spread evenly, turned at random
    buckets = draw_buckets(left, points, rotation)
    left.set_title("64 vectors, 8 buckets: the nearest arrow", fontsize=9)
    draw_sorting(right, buckets, 8, chunk=8)
    right.set_title("similar vectors come to lie side by side", fontsize=9)
    full, found = maps_by_rounds(queries, rounds, chunk=8, num_buckets=8, seed=seed)
    cells = bottom.subplots(1, 1 + len(rounds))
    titles = ["full attention, 64 patches"]
    for count, one in zip(rounds, found, strict=True):
        share = float(torch.minimum(one, full).sum(-1).mean())
        titles.append(f"{count} round{'s' * (count > 1)}: {100 * share:.0f} % recovered")
    for axes, one, title in zip(cells, (full, *found), titles, strict=True):
        axes.imshow(one.sqrt(), cmap="viridis", vmin=0, vmax=float(full.sqrt().max()))
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
    return figure


def _colours(buckets: Tensor, total: int) -> np.ndarray:
    import matplotlib

    return matplotlib.colormaps["tab10"](np.arange(total) % 10)[buckets.numpy()]
