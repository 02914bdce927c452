"""The embedded data set, decoding, fingerprints, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from data_tools import encoded, grey_of, image_of, write_parquet
from PIL import Image
from torch.utils.data import DataLoader

from harness.data import ImageDataset, get_track, load_split
from harness.data.images import DataError


class Memory:
    """Encoded images in a list."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index]

    def where(self, index):
        return f"cell {index}"


def dataset(images, labels, classes=("a", "b", "c"), **fields):
    return ImageDataset(Memory(images), np.array(labels), classes, name="made", split="test",
                        **fields)  # fmt: skip


GOOD = [encoded(image_of(label)) for label in (0, 1, 2)]


def test_the_embedded_data_set():
    train, test = load_split("fashion_mini", "train"), load_split("fashion_mini", "test")
    assert (len(train), len(test)) == (10_000, 5_000)
    assert np.bincount(train.labels).tolist() == [1000] * 10
    assert np.bincount(test.labels).tolist() == [500] * 10
    assert train.classes == get_track("fashion_mini").classes
    assert train.fingerprint.startswith("3d1f6b4d7115be97")
    assert test.fingerprint.startswith("162dbd7b349c4dbc")
    encoded_train = {train.source.read(i) for i in range(len(train))}
    assert len(encoded_train) == 10_000
    assert encoded_train.isdisjoint(test.source.read(i) for i in range(len(test)))


def test_grey_images_are_centred_and_replicated():
    data = load_split("fashion_mini", "test")
    image, label = data[7]
    assert (image.mode, image.size, type(label)) == ("RGB", (32, 32), int)
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    original = np.asarray(Image.open(io.BytesIO(data.source.read(7))))
    assert original.shape == (28, 28)
    np.testing.assert_array_equal(pixels[2:30, 2:30, 0], original)
    pixels = pixels.copy()
    pixels[2:30, 2:30] = 0
    assert not pixels.any()


def test_access():
    data = dataset(GOOD, [0, 1, 2])
    assert [grey_of(image) for image, _ in data] == [0, 20, 40]
    assert data[-1][1] == 2
    assert data.pixels is None  # photographs are not kept
    with pytest.raises(IndexError):
        data[3]
    assert repr(data) == "<made, test: 3 images, 3 classes>"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_any_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = image_of(3).quantize() if mode == "P" else image_of(3).convert(mode)
    assert image.mode == mode
    data = dataset([encoded(image, kind)], [0])
    assert data[0][0].mode == "RGB"
    assert abs(grey_of(data[0][0]) - 60) <= 1


def test_fingerprint_is_the_content(tmp_path):
    base = dataset(GOOD, [0, 1, 2]).fingerprint
    assert dataset(list(GOOD), [0, 1, 2], place="elsewhere").fingerprint == base
    changed = [
        dataset(GOOD[::-1], [0, 1, 2]),
        dataset(GOOD, [0, 1, 1]),
        dataset(GOOD, [0, 1, 2], ("a", "b", "x")),
        dataset(GOOD[:2], [0, 1]),
        dataset([*GOOD[:2], encoded(image_of(2, 1))], [0, 1, 2]),
    ]
    assert len({base, *(one.fingerprint for one in changed)}) == 6


def test_fingerprint_of_files_is_kept_until_they_change(tmp_path, monkeypatch):
    from harness.data import fingerprint as module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for label in range(3):
        (tmp_path / "set" / "test" / f"c{label}").mkdir(parents=True)
        (tmp_path / "set" / "test" / f"c{label}" / "1.png").write_bytes(GOOD[label])
    first = load_split(tmp_path / "set").fingerprint
    assert first == dataset(GOOD, [0, 1, 2], ("c0", "c1", "c2")).fingerprint
    monkeypatch.setattr(module, "_with_images", None)  # a second reading would fail
    assert load_split(tmp_path / "set").fingerprint == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set" / "test" / "c0" / "1.png").write_bytes(encoded(image_of(5, 3)))
    assert load_split(tmp_path / "set").fingerprint != first


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 3], "image 2 has the label 3, outside the 3 classes; 1 such"),
        ([0, -1, 2], "image 1 has the label -1"),
        ([-1, -1, -1], "this split has no labels"),
        ([0.0, 1.0, 2.0], "whole numbers, not float64"),
        ([0, 1], "3 images but 2 labels"),
    ],
)
def test_wrong_labels(labels, words):
    with pytest.raises(DataError, match=words):
        dataset(GOOD, labels)


def test_no_images():
    with pytest.raises(DataError, match="no images"):
        dataset([], np.array([], dtype=int))


@pytest.mark.parametrize(
    "bad", [b"", b"no image", GOOD[0][:40], encoded(image_of(1, size=(64, 64)), "JPEG")[:-200]]
)
def test_undecodable_image_is_named(bad):
    data = dataset([GOOD[0], bad, GOOD[2]], [0, 1, 2])
    assert data[2][1] == 2
    with pytest.raises(DataError, match=r"made, test: image 1 \(cell 1\) cannot be decoded: \w+"):
        data[1]


def test_the_sentence_survives_a_loader_process():
    data = dataset([GOOD[0], b"broken", GOOD[2]], [0, 1, 2])
    with pytest.raises(DataError) as caught:
        list(DataLoader(data, batch_size=None, num_workers=1))
    assert str(caught.value) == "made, test: image 1 (cell 1) cannot be decoded: not an image"


def test_missing_bytes_and_too_large_images(tmp_path):
    path = write_parquet(tmp_path / "test.parquet", [GOOD[0], None], [0, 1], ["a", "b"])
    data = load_split(path)
    with pytest.raises(DataError, match=r"image 1 \(row 1 of .*test.parquet\).*no image is stored"):
        data[1]
    with pytest.raises(DataError, match="cannot be read"):
        _ = data.fingerprint
    track = get_track("cifar10")
    large = dataset([encoded(image_of(0, size=(33, 20)))], [0], track.classes, track=track)
    with pytest.raises(DataError, match="image 0 is 33x20 pixels, the track's are at most 32x32"):
        large[0]
