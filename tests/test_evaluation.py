"""Accuracy: known answers, the bits behind them, and what must stop an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_tools import encoded, image_of, install_toy_paper, small_cifar, write_parquet
from torch import nn

import harness
from harness import registry
from harness.checkpoints import file_sha256, save_weights
from harness.data import get_track, load_split, preprocessing_sha256
from harness.errors import ReplivitError
from harness.evaluation import bits_of, evaluate
from harness.record import RecordStore
from harness.statistics import mcnemar, wilson_interval


class Reader(nn.Module):
    """Reads the label off a made-up image: right but for the labels in `wrong`.

    A wrong answer puts `miss` classes before the right one.
    """

    def __init__(self, track, wrong=(), miss=1, classes=10):
        super().__init__()
        self.mean, self.std = track.mean[0], track.std[0]
        self.wrong, self.miss, self.num_classes = set(wrong), miss, classes
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        grey = (images[:, 0, 0, 0] * self.std + self.mean) * 255
        labels = (grey / 20 + 1e-3).long()
        logits = -(torch.arange(self.num_classes) - labels[:, None]).abs().float()
        for row, label in enumerate(labels.tolist()):
            if label in self.wrong:
                others = [one for one in range(self.num_classes) if one != label]
                logits[row, others[: self.miss]] = 5.0
        return logits


@pytest.fixture
def cifar(tmp_path):
    track = small_cifar(tmp_path, count=40)
    return load_split(track, "test", tmp_path)


def test_known_answers(cifar):
    model = Reader(cifar.track, wrong={3, 4}).train()
    top1, top5 = evaluate(model, cifar, batch_size=7)
    assert (top1.metric, top1.value, top1.n, top1.unit) == ("top1", 80.0, 40, "%")
    assert top1.interval == pytest.approx([100 * one for one in wilson_interval(32, 40)])
    assert (top5.metric, top5.value) == ("top5", 100.0)
    np.testing.assert_array_equal(bits_of(top1), ~np.isin(cifar.labels, [3, 4]))
    assert bits_of(top5).all()
    assert model.training  # left as it was
    conditions = top1.conditions
    assert (conditions.track, conditions.num_classes, conditions.image_size) == ("cifar10", 10, 32)
    assert conditions.data_fingerprint == cifar.fingerprint
    assert conditions.preprocessing_sha256 == preprocessing_sha256(cifar.track.input, 32)
    assert conditions.options == {}
    assert conditions.weights_sha256 is None
    assert top1.detail["data"] == "CIFAR-10"
    assert top1.detail["images_per_second"] > 0
    assert (top1.variant, top1.run_id) == ("reader", top5.run_id)


@pytest.mark.parametrize(("miss", "top5"), [(4, 100.0), (5, 90.0)])
def test_top5_counts_the_classes_before_the_right_one(cifar, miss, top5):
    records = evaluate(Reader(cifar.track, wrong={6}, miss=miss), cifar)
    assert [record.value for record in records] == [90.0, top5]


def test_equal_logits_do_not_score(cifar):
    model = Reader(cifar.track)
    model.forward = lambda images: torch.zeros(len(images), 10)
    top1, top5 = evaluate(model, cifar)
    assert (top1.value, top5.value) == (10.0, 50.0)  # class 0 alone; classes 0 to 4


def test_bits_serve_mcnemar_and_survive_the_store(cifar, tmp_path):
    first = evaluate(Reader(cifar.track, wrong={0}), cifar)[0]
    second = evaluate(Reader(cifar.track, wrong={0, 1, 2}), cifar)[0]
    store = RecordStore(tmp_path / "records")
    store.append([first, second])
    test = mcnemar(*(bits_of(record) for record in store.load()))
    assert (test.only_a, test.only_b, test.difference) == (8, 0, 0.2)
    bare = first.model_copy(update={"detail": {}})
    with pytest.raises(ReplivitError, match="top1 record of reader keeps no bits"):
        bits_of(bare)


def test_a_slice_is_spread_and_says_so(tmp_path):
    track = get_track("cifar10")
    labels = np.repeat(np.arange(10), 4).tolist()  # sorted by class, as a folder is
    images = [encoded(image_of(label)) for label in labels]
    path = write_parquet(tmp_path / "s.parquet", images, labels, list(track.classes))
    dataset = load_split(path)
    dataset.track = track
    seen = []
    top1, _ = evaluate(
        Reader(track, wrong={9}), dataset, limit=20, batch_size=8,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (top1.n, top1.value, len(bits_of(top1))) == (20, 90.0, 20)
    assert top1.conditions.options == {"limit": 20}
    assert seen == [(8, 20), (16, 20), (20, 20)]
    assert evaluate(Reader(track), dataset, limit=99)[0].conditions.options == {}


def test_foreign_data(tmp_path):
    """Four classes, no track: ImageNet's numbers, top-1 only."""
    images = [encoded(image_of(label, size=(48, 40))) for label in range(4)]
    path = write_parquet(tmp_path / "pets.parquet", images, [0, 1, 2, 3], list("abcd"))
    model = Reader(get_track("imagenet"), classes=4)
    with pytest.raises(ReplivitError, match="say the image_size"):
        evaluate(model, path)
    records = evaluate(model, path, image_size=24, workers=0, name="mine")
    assert [(record.variant, record.metric, record.value) for record in records] == [
        ("mine", "top1", 100.0)
    ]
    assert records[0].conditions.track == "pets.parquet"


def test_other_splits_are_told(tmp_path):
    track = small_cifar(tmp_path)
    record = evaluate(Reader(track), track, split="train", root=tmp_path)[0]
    assert record.conditions.options == {"split": "train"}
    assert (record.value, record.detail["split"]) == (100.0, "train")


def test_timm_models_bring_their_own_input(tmp_path):
    import timm

    model = timm.create_model("test_vit", num_classes=4)
    path = write_parquet(
        tmp_path / "p.parquet", [encoded(image_of(1))] * 4, [0, 1, 2, 3], list("abcd")
    )
    record = evaluate(model, path, workers=0)[0]
    spec = get_track("imagenet").input.model_copy(
        update={"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.95}
    )
    assert record.conditions.image_size == 160
    assert record.conditions.preprocessing_sha256 == preprocessing_sha256(spec, 160)
    assert record.value == 25.0


# --- variants by name --------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    yield install_toy_paper(tmp_path / "papers", monkeypatch)
    registry.refresh()


def test_a_variant_with_shipped_weights(toy, tmp_path):
    track = small_cifar(tmp_path)
    path = toy / "weights" / "toy_small.safetensors"
    torch.manual_seed(0)
    model = harness.build("toy_small")
    save_weights(model, path, metadata={"variant": "toy_small", "seed": 2})
    top1 = evaluate("toy_small", track, root=tmp_path)[0]
    assert (top1.variant, top1.paper) == ("toy_small", "toy")
    assert (top1.conditions.weights_sha256, top1.conditions.seed) == (file_sha256(path), 2)
    live = evaluate(model, track, root=tmp_path)[0]
    assert (live.variant, live.paper, live.conditions.image_size) == ("toy_small", "toy", 32)
    np.testing.assert_array_equal(bits_of(live), bits_of(top1))


def test_a_variant_with_a_file(toy, tmp_path):
    track = small_cifar(tmp_path)
    with pytest.raises(ReplivitError, match="toy_big ships no weights for cifar10; name a file"):
        evaluate("toy_big", track, root=tmp_path)
    torch.manual_seed(0)
    model = harness.build("toy_big")
    save_weights(model, tmp_path / "w.safetensors")
    by_name = evaluate("toy_big", track, root=tmp_path, weights=tmp_path / "w.safetensors")[0]
    torch.manual_seed(1)
    loaded = evaluate(
        harness.build("toy_big"), track, root=tmp_path, weights=tmp_path / "w.safetensors"
    )[0]
    np.testing.assert_array_equal(bits_of(by_name), bits_of(loaded))
    assert by_name.conditions == loaded.conditions
    assert by_name.conditions.weights_sha256 == file_sha256(tmp_path / "w.safetensors")
    # toy_big crops to 0.5 on its own track
    spec = track.input.model_copy(update={"crop_pct": 0.5})
    assert by_name.conditions.preprocessing_sha256 == preprocessing_sha256(spec, 32)
    save_weights(harness.build("toy_big", num_classes=3), tmp_path / "three.safetensors")
    with pytest.raises(ReplivitError, match="toy_big has 3 classes, but CIFAR-10 has 10"):
        evaluate("toy_big", track, root=tmp_path, weights=tmp_path / "three.safetensors")


# --- what stops it -----------------------------------------------------------------------------


def test_wrong_models(cifar):
    with pytest.raises(ReplivitError, match="reader has 1000 classes, but CIFAR-10 has 10"):
        evaluate(Reader(cifar.track, classes=1000), cifar)
    undeclared = nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))
    with pytest.raises(ReplivitError, match="sequential has 7 classes, but CIFAR-10 has 10"):
        evaluate(undeclared, cifar)
    with pytest.raises(ReplivitError, match="does not answer with logits"):
        evaluate(nn.Identity(), cifar)

    class Broken(Reader):
        def forward(self, images):
            logits = super().forward(images)
            logits[logits.argmax(1) == 7] = float("nan")  # image 7 is the first of its class
            return logits

    with pytest.raises(ReplivitError, match="not finite, first in the batch from image 6"):
        evaluate(Broken(cifar.track), cifar, batch_size=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"backend": "cuda_graph"}, "backend 'cuda_graph' is unknown here; it is eager, deploy,"),
        ({"device": "toaster"}, "device 'toaster' is unknown"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"limit": 0}, "must be at least 1"),
    ],
)
def test_wrong_options(cifar, options, words):
    with pytest.raises(ReplivitError, match=words):
        evaluate(Reader(cifar.track), cifar, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_a_sentence(cifar):
    with pytest.raises(ReplivitError, match="no CUDA device is available"):
        evaluate(Reader(cifar.track), cifar, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_back():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    on_cpu = evaluate(model, "fashion_mini", limit=200)[0]
    on_gpu = evaluate(model, "fashion_mini", limit=200, device="cuda")[0]
    assert next(model.parameters()).device.type == "cpu"
    assert on_gpu.conditions.device == "cuda"
    assert (bits_of(on_cpu) != bits_of(on_gpu)).mean() < 0.02


def test_mixed_precision_is_told(cifar):
    seen = []

    class Typed(nn.Linear):
        def forward(self, images):
            out = super().forward(images.flatten(1))
            seen.append(out.dtype)
            return out

    record = evaluate(Typed(3072, 10), cifar, dtype="bfloat16")[0]
    assert record.conditions.dtype == "bfloat16"
    assert set(seen) == {torch.bfloat16}


class _Folding(nn.Sequential):
    """A network with something to fold, which counts how often it is called."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 256), nn.Linear(256, 10),
        )  # fmt: skip
        self.calls = 0
        self[1].running_mean.uniform_(-1, 1)

    def forward(self, images):
        self.calls += 1
        return super().forward(images)


def test_the_deployed_form_answers_alike_and_is_told(cifar):
    torch.manual_seed(0)
    model = _Folding()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    eager = evaluate(model, cifar)[0]
    calls = model.calls
    deployed = evaluate(model, cifar, backend="deploy")[0]
    assert model.calls == calls  # its copy answered
    assert (eager.conditions.backend, deployed.conditions.backend) == ("eager", "deploy")
    np.testing.assert_array_equal(bits_of(deployed), bits_of(eager))
    assert deployed.variant == eager.variant
    assert model.training
    assert isinstance(model[1], nn.BatchNorm2d)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_can_be_trained_after_it_was_evaluated(cifar):
    """A table cached in a forward pass must not be one that gradients refuse."""

    class Caching(nn.Linear):
        table = None

        def forward(self, images):
            if self.table is None:
                self.table = torch.ones(3072)
            return super().forward(images.flatten(1) * self.table)

    model = Caching(3072, 10)
    evaluate(model, cifar)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.weight.grad.abs().sum() > 0
