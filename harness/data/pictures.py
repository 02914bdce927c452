"""A picture of a data set: one row of images per class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harness.data.images import ImageDataset


def contact_sheet(dataset: ImageDataset, columns: int = 12, rows: int = 20) -> Figure:
    """The first `columns` images of each of the first `rows` classes, each as a square.

    Raises:
        DataError: an image cannot be decoded.
    """
    from matplotlib.figure import Figure

    side = dataset.track.image_size if dataset.track else 96
    names = dataset.classes[:rows]
    sheet = np.full((len(names) * (side + 2), columns * (side + 2), 3), 255, dtype=np.uint8)
    for label in range(len(names)):
        for column, index in enumerate(np.flatnonzero(dataset.labels == label)[:columns]):
            image = dataset[int(index)][0].resize((side, side))
            top, left = label * (side + 2) + 1, column * (side + 2) + 1
            sheet[top : top + side, left : left + side] = np.asarray(image)
    figure = Figure(figsize=(0.5 * columns + 2.0, 0.5 * len(names) + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([(label + 0.5) * (side + 2) for label in range(len(names))], labels=names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{dataset.name}, {dataset.split}: {len(dataset):,} images")
    return figure
