"""Where data come from, and the one sentence when they are not as they should be."""

from __future__ import annotations

import shutil
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_tools import encoded, grey_of, image_of, small_cifar, write_folders, write_parquet

from harness.data import get_track, load_split, locate, places, sources
from harness.errors import ReplivitError

IMAGENET = get_track("imagenet")
FEW = [encoded(image_of(label)) for label in (0, 1, 2, 1)]
LABELS = [0, 1, 2, 1]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*arguments, **keywords):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


# --- where a track is looked for -------------------------------------------------------------


def test_data_folder_goes_before_the_package(tmp_path, monkeypatch):
    assert locate("fashion_mini").origin == "package"
    monkeypatch.setenv("REPLIVIT_DATA", str(tmp_path))
    assert [place.origin for place in places("fashion_mini")] == ["REPLIVIT_DATA", "package"]
    assert locate("fashion_mini").origin == "package"
    shutil.copytree(locate("fashion_mini").folder, tmp_path / "fashion_mini")
    assert locate("fashion_mini").folder == tmp_path / "fashion_mini"
    assert load_split("fashion_mini", "test").place.startswith(str(tmp_path))


def test_root_goes_instead_of_the_data_folder(tmp_path, monkeypatch):
    track = small_cifar(tmp_path / "there")
    monkeypatch.setenv("REPLIVIT_DATA", str(tmp_path / "nowhere"))
    by_parent = load_split(track, "train", root=tmp_path / "there")
    by_itself = load_split(track, "train", root=tmp_path / "there" / "cifar10")
    assert by_parent.fingerprint == by_itself.fingerprint
    assert [label for _, label in by_parent][:3] == [0, 1, 2]


def test_cifar10_says_which_copy_it_is(tmp_path):
    original = load_split(small_cifar(tmp_path / "png"), "test", tmp_path / "png")
    assert original.name == "CIFAR-10"
    copy = load_split(small_cifar(tmp_path / "jpeg", kind="JPEG"), "test", tmp_path / "jpeg")
    assert copy.name == "CIFAR-10 (JPEG re-encoded)"
    assert copy.fingerprint != original.fingerprint
    assert copy.pixels.shape == (40, 32, 32, 3)


def test_nowhere(tmp_path, monkeypatch):
    with pytest.raises(ReplivitError, match=r"imagenet is not on this machine .REPLIVIT_DATA"):
        load_split("imagenet")
    monkeypatch.setenv("REPLIVIT_DATA", str(tmp_path))
    with pytest.raises(ReplivitError, match=f"looked in {tmp_path}/imagenet, .* that holds imag"):
        load_split("imagenet")
    with pytest.raises(ReplivitError, match="no track 'cifar'; did you mean cifar10"):
        load_split("cifar")
    with pytest.raises(ReplivitError, match=r"no folder or parquet file './cifar10/'"):
        load_split("./cifar10/")
    with pytest.raises(ReplivitError, match="has no split 'dev'; it has train, test"):
        load_split("cifar10", "dev")


def test_a_folder_that_is_named_must_exist(tmp_path):
    with pytest.raises(ReplivitError, match=r"no folder .*/typo to look for fashion_mini in"):
        load_split("fashion_mini", "test", root=tmp_path / "typo")


def test_another_number_of_images_is_refused(tmp_path):
    track = small_cifar(tmp_path).model_copy(update={"images": {"test": 41}})
    with pytest.raises(ReplivitError, match="has 40 images, but cifar10 has 41 in test: it is tru"):
        load_split(track, "test", tmp_path)


def test_classes_in_another_order_are_refused(tmp_path):
    track = small_cifar(tmp_path)
    names = list(track.classes)
    names[2], names[3] = names[3], names[2]
    path = tmp_path / "cifar10" / "test.parquet"
    write_parquet(path, FEW * 10, LABELS * 10, names)
    with pytest.raises(ReplivitError, match=r"class 2 is 'cat', but cifar10 has 'bird'"):
        load_split(track, "test", tmp_path)
    write_parquet(path, FEW * 10, LABELS * 10, names[:9])
    with pytest.raises(ReplivitError, match=r"has 9 classes, but cifar10 has 10; truck is missing"):
        load_split(track, "test", tmp_path)


# --- parquet -----------------------------------------------------------------------------------


def test_parquet_file_and_shards(tmp_path):
    whole = load_split(write_parquet(tmp_path / "x.parquet", FEW, LABELS, ["a", "b", "c"]))
    assert [(grey_of(image), label) for image, label in whole] == [
        (0, 0),
        (20, 1),
        (40, 2),
        (20, 1),
    ]
    assert whole.classes == ("a", "b", "c")
    for number, part in enumerate((slice(0, 3), slice(3, 4))):
        name = tmp_path / "set" / "data" / f"validation-{number:05d}-of-00002.parquet"
        write_parquet(name, FEW[part], LABELS[part], ["a", "b", "c"])
    assert load_split(tmp_path / "set", "test").fingerprint == whole.fingerprint
    name.unlink()
    with pytest.raises(ReplivitError, match="has 1 of 2 parts of validation"):
        load_split(tmp_path / "set", "test")
    with pytest.raises(ReplivitError, match=r"has no split 'train': expected train.parquet or"):
        load_split(tmp_path / "set", "train")


def test_plain_columns_without_names(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", FEW, LABELS, columns=("img", "labels"))
    assert load_split(path).classes == ("0", "1", "2")
    path = write_parquet(tmp_path / "y.parquet", FEW, LABELS, columns=("picture", "label"))
    with pytest.raises(ReplivitError, match=r"y.parquet has no column named label or labels"):
        load_split(write_parquet(tmp_path / "y.parquet", FEW, LABELS, columns=("img", "kind")))


def test_damaged_parquet(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", FEW, LABELS, ["a", "b", "c"])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ReplivitError, match=r"x\.parquet is truncated or not a parquet file"):
        load_split(path)
    write_parquet(path, FEW, [0, 1, 2, 3], ["a", "b", "c"])
    with pytest.raises(ReplivitError, match="image 3 has the label 3, outside the 3 classes"):
        load_split(path)


def test_large_parquet_goes_through_datasets_with_the_same_result(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", FEW, LABELS, ["a", "b", "c"])
    small = load_split(path)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    large = load_split(path)
    assert isinstance(large.source.rows, datasets.Dataset)
    assert large.fingerprint == small.fingerprint
    assert [grey_of(image) for image, _ in large] == [grey_of(image) for image, _ in small]


# --- folders -----------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    write_folders(tmp_path / "pets" / "val", ["cat", "dog"], each=3)
    data = load_split(tmp_path / "pets", "test")
    assert (data.name, data.classes, len(data)) == ("pets", ("cat", "dog"), 6)
    assert [(grey_of(image), label) for image, label in data][2:4] == [(2, 0), (20, 1)]
    (tmp_path / "pets" / "val" / "eel").mkdir()
    with pytest.raises(ReplivitError, match="no valid file for the classes eel"):
        load_split(tmp_path / "pets", "test")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A folder with one tiny image in each of the 1000 wnid folders of `val`."""
    root = tmp_path_factory.mktemp("data")
    write_folders(root / "imagenet" / "val", list(IMAGENET.classes), each=1, size=(4, 4))
    return root


def few(track=IMAGENET):
    return track.model_copy(update={"images": {"train": 1000, "test": 1000}})


def test_imagenet_layout(imagenet, monkeypatch):
    data = load_split(few(), "test", imagenet)
    assert data.labels.tolist() == list(range(1000))
    assert data.classes == IMAGENET.classes
    assert data.split == "test"
    with pytest.raises(ReplivitError, match=r"val has 1,000 images, but imagenet has 50,000"):
        load_split("imagenet", "test", imagenet)
    assert len(load_split(imagenet / "imagenet", "test")) == 1000  # as a folder, not as the track
    with pytest.raises(ReplivitError, match="has no split 'train'"):
        load_split(few(), "train", imagenet)


def test_imagenet_class_folders_are_checked(imagenet):
    folder = imagenet / "imagenet" / "val" / "n01440764"
    moved = folder.rename(folder.with_name("n99999999"))
    with pytest.raises(ReplivitError, match="class 0 is 'n01443537', but imagenet has 'n01440764'"):
        load_split(few(), "test", imagenet)
    aside = moved.rename(imagenet / "n01440764")
    with pytest.raises(ReplivitError, match=r"has 999 classes.*has 1000; n01440764 is missing"):
        load_split(few(), "test", imagenet)
    aside.rename(folder)
    assert len(load_split(few(), "test", imagenet)) == 1000


def test_flat_imagenet_val(tmp_path):
    folder = tmp_path / "imagenet" / "val"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(FEW[0])
    with pytest.raises(
        ReplivitError, match=r"3 images without class folders; .* per class .n01440764, n01443537"
    ):
        load_split("imagenet", "test", tmp_path)


# --- the hub -----------------------------------------------------------------------------------


def hub_data(names, split="validation", labels=LABELS):
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)}
    )
    rows = {"img": [{"bytes": one, "path": None} for one in FEW], "fine_label": labels}
    return datasets.DatasetDict({split: datasets.Dataset.from_dict(rows, features=features)})


def test_hub_name(monkeypatch):
    asked = []

    def load_dataset(name):
        asked.append(name)
        return hub_data(["a", "b", "c"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_split("someone/pets", "test")
    assert asked == ["someone/pets"]
    assert (data.name, data.classes, data.labels.tolist()) == (
        "someone/pets",
        ("a", "b", "c"),
        LABELS,
    )
    assert [grey_of(image) for image, _ in data] == [0, 20, 40, 20]
    with pytest.raises(
        ReplivitError, match=r"ValueError: it has the splits validation, not 'train'"
    ):
        load_split("hub:someone/pets", "train")


def test_a_track_from_the_hub_is_checked_like_a_local_one(monkeypatch):
    track = get_track("cifar10")
    given = hub_data(list(track.classes), "test")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: given)
    with pytest.raises(
        ReplivitError, match="hub:uoft-cs/cifar10 has 4 images, but cifar10 has 10,0"
    ):
        load_split("cifar10", "test")
    assert len(load_split(track.model_copy(update={"images": {"test": 4}}), "test")) == 4
    wrong = hub_data(list(track.classes[::-1]), "test")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: wrong)
    with pytest.raises(ReplivitError, match="class 0 is 'truck'"):
        load_split("cifar10", "test", root="hub:someone/cifar")


def test_imagenet_of_the_hub_names_classes_in_words(monkeypatch):
    words = [f"{one}, {number}" for number, one in enumerate(IMAGENET.class_words)]
    assert words[0] == "tench, Tinca tinca, 0"
    words[7] = "rooster"  # one spelt otherwise is no other class
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub_data(words))
    track = IMAGENET.model_copy(update={"images": {"test": 4}})
    assert load_split(track, "test", root="hub:someone/imagenet").classes == IMAGENET.classes
    for wrong, complaint in (
        (words[:999], "has 999 classes"),
        (words[::-1], "class 0 is 'toilet t"),
    ):
        given = hub_data(wrong)
        monkeypatch.setattr(datasets, "load_dataset", lambda name, given=given: given)
        with pytest.raises(ReplivitError, match=complaint):
            load_split(track, "test", root="hub:someone/imagenet")


def test_hub_out_of_reach(monkeypatch):
    def fail(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ReplivitError) as caught:
        load_split("cifar10", "test")
    assert "put it below REPLIVIT_DATA" in str(caught.value)
    assert str(caught.value).endswith("(ConnectionError: no route to host)")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": ["cat"] * 4}, r"whole numbers, .* \(the first is cat\)"),
        ({"label": [0, None, 1, 2]}, "none missing"),
        ({"label": [[0, 1]] * 4}, "one for each image"),
        ({"label": [0, 1, 2, 2**40]}, "a label is 1,099,511,627,776, which cannot be a class"),
        ({"image": ["a.png"] * 4}, "column image holds string, not encoded images"),
        ({"image": [{"path": "a.png"}] * 4}, "column image holds struct<path: string>"),
    ],
)
def test_columns_of_another_kind_are_one_sentence(tmp_path, columns, words):
    table = pa.table({"image": FEW, "label": LABELS, **columns})
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(ReplivitError, match=words):
        load_split(tmp_path)


@pytest.mark.parametrize(
    "note",
    [b"{torn", b"[1]", b'{"info": null}', b'{"info": {"features": [1]}}',
     b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}'],
)  # fmt: skip
def test_a_note_of_the_hub_that_cannot_be_read_says_nothing(tmp_path, note):
    table = pa.table({"image": FEW, "label": LABELS}).replace_schema_metadata({"huggingface": note})
    pq.write_table(table, tmp_path / "test.parquet")
    assert load_split(tmp_path).classes == ("0", "1", "2")


def test_a_columns_name_that_is_no_text_is_one_sentence(tmp_path):
    pq.write_table(pa.table({"image": FEW, "label": LABELS}), tmp_path / "test.parquet")
    whole = (tmp_path / "test.parquet").read_bytes()
    (tmp_path / "test.parquet").write_bytes(whole.replace(b"label", b"l\xfdbel"))
    with pytest.raises(ReplivitError, match=r"test\.parquet is truncated or not a parquet file"):
        load_split(tmp_path)
