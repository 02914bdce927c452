"""Tokens over pictures: the right patches are painted, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_tools import image_of, write_folders

import harness
from harness.data import create_transform, get_track, load_split
from harness.tokens import (
    PAINT,
    VEIL,
    Sample,
    assignment_figure,
    draw_kept,
    keep_mask,
    kept_figure,
    sample_images,
)


@pytest.fixture(scope="module")
def vit_micro():
    torch.manual_seed(0)
    return harness.build("vit_micro").eval()


def made_sample(count: int = 2, side: int = 8, value: int = 200) -> Sample:
    pictures = np.full((count, side, side, 3), value, dtype=np.uint8)
    names = tuple(f"class {index}" for index in range(count))
    return Sample(torch.zeros(count, 3, side, side), pictures, torch.arange(count), names, "made")


def pixels(axes) -> np.ndarray:
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


# images


def test_sample_takes_turns_among_classes(vit_micro):
    sample = sample_images(vit_micro, "fashion_mini", 23)
    labels = sample.labels.tolist()
    assert labels[:10] == list(range(10)) and labels[10:20] == list(range(10))
    assert sample.names[0] == "T-shirt/top" and len(sample) == 23
    dataset = load_split("fashion_mini", "test")
    first = int(np.flatnonzero(dataset.labels == 3)[0])
    transform = create_transform(get_track("fashion_mini").input, 32)
    assert torch.equal(sample.inputs[3], transform(dataset[first][0]))
    assert np.array_equal(sample.pictures[3], np.asarray(dataset[first][0]))


def test_sample_of_a_folder_is_what_the_model_sees(vit_micro, tmp_path):
    write_folders(tmp_path / "test", ["a", "b"], each=2, size=(32, 32))
    sample = sample_images(vit_micro, tmp_path, 3)
    assert sample.names == ("a", "b", "a")
    shown = sample.pictures[:, 16, 16, 0].tolist()
    assert shown == [np.asarray(image_of(*one))[0, 0, 0] for one in ((0, 0), (1, 0), (0, 1))]


@pytest.mark.parametrize("count", [0, 5001])
def test_sample_of_an_impossible_size(vit_micro, count):
    with pytest.raises(ValueError, match="count must be 1 to 5000"):
        sample_images(vit_micro, "fashion_mini", count)


# masks


def test_mask_of_equal_and_of_different_counts():
    equal = keep_mask(torch.tensor([[3, 0], [1, 2]]), 4)
    assert equal.tolist() == [[True, False, False, True], [False, True, True, False]]
    padded = keep_mask(torch.tensor([[3, -1], [1, 2]]), 4)
    ragged = keep_mask([torch.tensor([3]), torch.tensor([2, 1])], 4)
    assert torch.equal(padded, ragged)
    assert padded.sum(1).tolist() == [1, 2]
    assert not keep_mask([torch.tensor([], dtype=torch.long)], 4).any()


def test_mask_refuses_a_position_outside_the_grid():
    with pytest.raises(ValueError, match=r"position 4 is not one of 4 patches \(0 to 3\)"):
        keep_mask(torch.tensor([[4]]), 4)


# kept tokens


def test_dropped_patches_are_painted_and_kept_ones_are_not():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    draw_kept(axes, picture, torch.tensor([True, False, False, True]), (2, 2))
    drawn = pixels(axes)
    for rows, columns in ((slice(4), slice(4)), (slice(4, 8), slice(4, 8))):
        assert np.array_equal(drawn[rows, columns], picture[rows, columns])
    veiled = ((1 - VEIL) * picture[:4, 4:] + VEIL * PAINT).astype(np.uint8)
    assert np.array_equal(drawn[:4, 4:], veiled)
    assert not np.array_equal(drawn[4:, :4], picture[4:, :4])


def test_grids_need_not_be_square():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    picture = np.zeros((4, 12, 3), dtype=np.uint8)
    draw_kept(axes, picture, torch.tensor([False, False, True]), (1, 3))
    assert pixels(axes)[:, 8:].max() == 0 and pixels(axes)[:, :8].min() > 0


def test_kept_figure_names_stages_and_counts():
    stages = {
        "block 2": torch.tensor([[0, 1], [2, 3]]),
        "block 4": [torch.tensor([1]), torch.tensor([2, 3, 0])],
    }
    figure = kept_figure(made_sample(), stages, (2, 2), title="kept")
    cells = np.array(figure.axes).reshape(2, 3)
    assert [axes.get_title() for axes in cells[0]] == ["4 patches", "block 2: 2", "block 4"]
    assert [axes.get_xlabel() for axes in cells[:, 2]] == ["1", "3"]
    assert [axes.get_ylabel() for axes in cells[:, 0]] == ["class 0", "class 1"]
    shown = pixels(cells[1, 1])
    assert (shown[4:] == 200).all() and (shown[:4] != 200).any()


@pytest.mark.parametrize(
    ("stages", "grid", "message"),
    [
        ({}, (2, 2), "at least one stage"),
        ({"one": torch.zeros(3, 1, dtype=torch.long)}, (2, 2), "'one' is of 3 images, not of 2"),
        ({"one": torch.zeros(2, 1, dtype=torch.long)}, (3, 3), "do not fit a grid of 3x3"),
    ],
)
def test_kept_figure_refuses(stages, grid, message):
    with pytest.raises(ValueError, match=message):
        kept_figure(made_sample(), stages, grid)


# merged tokens


def test_assignment_figure_colours_each_patch_by_its_strongest_output():
    maps = torch.zeros(2, 3, 4)
    maps[0, 0, :2] = maps[0, 2, 2:] = 0.9  # upper half to output 0, lower half to output 2
    maps[1, 1] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    figure = assignment_figure(made_sample(), maps, (2, 2), outputs=(0, 1))
    cells = np.array(figure.axes).reshape(2, 4)
    titles = [axes.get_title() for axes in cells[0]]
    assert titles == ["4 patches", "strongest of 3", "output 0", "output 1"]
    strongest = pixels(cells[0, 1])
    assert (strongest[:4] == strongest[0, 0]).all() and (strongest[4:] == strongest[7, 7]).all()
    assert not np.array_equal(strongest[0, 0], strongest[7, 7])
    heat = pixels(cells[1, 3])[::4, ::4].reshape(4, 3)
    assert (np.diff(heat[:, 1]) > 0).all(), "viridis grows in green with the weight"


@pytest.mark.parametrize(
    ("shape", "outputs", "message"),
    [
        ((1, 2, 4), (0,), r"maps \(1, 2, 4\) do not fit 2 images of 2x2"),
        ((2, 2, 5), (0,), "do not fit 2 images of 2x2"),
        ((2, 2, 4), (2,), r"outputs \[2\]: there are 2, 0 to 1"),
    ],
)
def test_assignment_figure_refuses(shape, outputs, message):
    with pytest.raises(ValueError, match=message):
        assignment_figure(made_sample(), torch.rand(shape), (2, 2), outputs)
