"""Weights in and out: coverage, converters, and files that must not be trusted."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types

import pytest
import torch
from data_tools import install_toy_paper
from golden_tools import filled_state_dict, load_golden
from safetensors.torch import load_file
from torch import nn

import harness
from harness import checkpoints, registry, state_dicts
from harness.checkpoints import (
    convert_official,
    coverage,
    file_sha256,
    load_model,
    load_official,
    load_pretrained,
    load_weights,
    read_metadata,
    read_state_dict,
    save_weights,
)
from harness.errors import ReplivitError


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder of the paper `toy`, whose weights folder is empty."""
    yield install_toy_paper(tmp_path, monkeypatch)
    registry.refresh()


def official_of(name, **options):
    """A state dict with the toy authors' names, and the model it must become."""
    torch.manual_seed(3)
    model = harness.build(name, **options)
    names = {"body": "stem", "head": "fc"}
    state = {
        f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value.clone()
        for key, value in model.state_dict().items()
        if key != "table"
    }
    return state, model.eval()


def same_output(one, other):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return torch.equal(one(images), other(images))


# --- coverage ----------------------------------------------------------------------------------


def test_coverage_tells_four_ways_of_not_fitting():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = model.state_dict()
    state["0.weight"] = torch.zeros(3, 5)
    del state["1.bias"], state["1.num_batches_tracked"]
    state["extra"] = torch.zeros(1)
    found = coverage(model, state)
    assert found.mismatched == (("0.weight", (3, 2), (3, 5)),)
    assert (found.missing, found.unexpected) == (("1.bias",), ("extra",))
    assert found.derived == ("1.num_batches_tracked",)
    assert found.matched == ("0.bias", "1.weight", "1.running_mean", "1.running_var")
    assert (found.total, found.covered) == (21, 12)
    assert not found.complete
    assert str(found) == (
        "4 keys matched, 57.1 % of the weights; 1 missing (1.bias); 1 unexpected (extra); "
        "1 of another shape (0.weight [3, 5] for [3, 2])"
    )
    assert coverage(model, model.state_dict()).percent == 100


def test_load_weights(tmp_path):
    source, target = nn.Linear(4, 4), nn.Linear(4, 4).train()
    assert load_weights(target, source.state_dict()).complete
    assert torch.equal(source.weight, target.weight)
    assert target.training
    other = nn.Linear(4, 2)
    before = other.weight.clone()
    with pytest.raises(ReplivitError, match="the state dict does not fit Linear: 2 of another sha"):
        load_weights(other, source.state_dict())
    assert torch.equal(other.weight, before)
    partly = {"weight": torch.ones(2, 4), "surplus": torch.ones(1)}
    found = load_weights(other, partly, strict=False)
    assert (found.matched, found.missing, found.unexpected) == (
        ("weight",),
        ("bias",),
        ("surplus",),
    )
    assert (other.weight == 1).all()


# --- the authors' files ------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", None])
def test_load_official(toy, tmp_path, wrapper):
    state, expected = official_of("toy_small")
    checkpoint = {wrapper: state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(checkpoint if wrapper else state, tmp_path / "official.pth")
    model = load_official("toy_small", tmp_path / "official.pth")
    assert not model.training
    assert same_output(model, expected)


def test_raw_weights_go_before_averages_and_prefixes_go(toy):
    state, expected = official_of("toy_small")
    wrapped = {f"module.{key}": value for key, value in state.items()}
    average = {key: value * 0 for key, value in state.items()}
    model = load_official("toy_small", {"model_ema": average, "model": {"state_dict": wrapped}})
    assert same_output(model, expected)


def test_settings_of_yacs_are_read_without_yacs(toy, tmp_path, monkeypatch):
    state, expected = official_of("toy_small")
    config = types.ModuleType("yacs.config")
    config.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = config.CfgNode(lr=1.0, data=config.CfgNode(name="x"))
    settings.__dict__["__immutable__"] = False
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", config)
        torch.save({"model": state, "config": settings}, tmp_path / "official.pth")
    assert same_output(load_official("toy_small", tmp_path / "official.pth"), expected)


def test_number_of_classes_comes_from_the_file(toy):
    state, expected = official_of("toy_small", num_classes=7)
    model = load_official("toy_small", state)
    assert model.num_classes == 7
    assert same_output(model, expected)
    with pytest.raises(
        ReplivitError, match=r"2 of another shape \(head.weight \[7, 4\] for \[10, 4"
    ):
        load_official("toy_small", state, num_classes=10)


def test_everything_must_fit(toy):
    state, _ = official_of("toy_small")
    missing = {key: value for key, value in state.items() if key != "fc.bias"}
    with pytest.raises(ReplivitError, match=r"does not fit toy_small: 1 missing \(head.bias\)$"):
        load_official("toy_small", missing)
    with pytest.raises(ReplivitError, match=r"no official checkpoint of toy_small .'unknown'"):
        load_official("toy_small", {**state, "unknown.weight": torch.ones(1)})


def test_a_siblings_file_is_recognised(toy):
    state, _ = official_of("toy_big")
    with pytest.raises(ReplivitError, match=r"of another shape.*; it fits toy_big$"):
        load_official("toy_small", state)


def test_a_real_paper_converts_its_golden_weights():
    golden = load_golden("efficientformer_v2/s0")
    state = filled_state_dict(golden["state_dict"])
    model = load_official("efficientformer_v2_s0", state)
    assert sum(one.numel() for one in model.parameters()) == golden["params"]
    found = coverage(model, convert_official("efficientformer_v2_s0", state))
    assert found.complete
    assert found.percent == 100


# --- our own files -----------------------------------------------------------------------------


def test_shipped_weights(toy, tmp_path):
    path = toy / "weights" / "toy_small.safetensors"
    torch.manual_seed(5)
    trained = harness.build("toy_small").eval()
    notes = {"variant": "toy_small", "seed": 1, "recipe": None}
    digest = save_weights(trained, path, half=True, metadata=notes)
    assert digest == file_sha256(path)
    assert read_metadata(path) == {"format": "pt", "variant": "toy_small", "seed": "1"}
    assert {value.dtype for value in load_file(path).values()} == {torch.float16, torch.int64}
    model = load_pretrained("toy_small")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, trained.state_dict()[key].half().to(value.dtype))
    fewer = load_pretrained("toy_small", num_classes=3)
    assert fewer(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert torch.equal(fewer.body.weight, model.body.weight)
    with pytest.raises(ReplivitError, match=r"ships no weights for imagenet \(shipped: cifar10\)"):
        load_pretrained("toy_small", track="imagenet")
    with pytest.raises(ReplivitError, match=r"toy_big ships no weights for cifar10 .shipped: none"):
        load_pretrained("toy_big")
    path.unlink()
    with pytest.raises(ReplivitError, match=r"no weights file .*toy_small.safetensors"):
        load_pretrained("toy_small")


def test_load_model_takes_both_kinds(toy, tmp_path):
    state, expected = official_of("toy_small", num_classes=4)
    torch.save({"model": state}, tmp_path / "official.pt")
    save_weights(expected, tmp_path / "ours.safetensors", metadata={"variant": "toy_small"})
    for name in ("official.pt", "ours.safetensors"):
        model = load_model("toy_small", tmp_path / name)
        assert not model.training
        assert same_output(model, expected)
    with pytest.raises(ReplivitError, match=r"ours.safetensors does not fit toy_big: 4 of another"):
        load_model("toy_big", tmp_path / "ours.safetensors")
    with pytest.raises(
        ReplivitError, match=r"official.pt does not fit toy_big: .*; it fits toy_sm"
    ):
        load_model("toy_big", tmp_path / "official.pt")


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out" / "w.safetensors"
    save_weights({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def full(tensors, temporary, metadata):
        with open(temporary, "wb") as stream:
            stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_dicts, "save_file", full)
    with pytest.raises(
        ReplivitError, match=r"cannot write .*w.safetensors: No space left on device"
    ):
        save_weights({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["w.safetensors"]


def test_save_shared_and_strided_tensors(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    save_weights({"a": base, "b": base, "c": base.T}, tmp_path / "w.safetensors")
    found = read_state_dict(tmp_path / "w.safetensors")
    assert all(torch.equal(found[key], value) for key, value in (("b", base), ("c", base.T)))


def test_half_precision_must_hold_the_values(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(ReplivitError, match="a has values that float16 cannot hold"):
        save_weights({"a": torch.tensor([1e6])}, path, half=True)
    assert not path.exists()


# --- files that must not be trusted ------------------------------------------------------------


class Evil:
    """Unpickling it would leave a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_nothing_is_unpickled_freely(tmp_path, how):
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    content = {"model": {"a": torch.ones(1)}, "x": Evil(mark)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ReplivitError, match=r"truncated or no|holds more than tensors"):
        read_state_dict(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"a": 3}, "holds no tensors"),
        (nn.Linear(1, 1), "holds more than tensors and was not loaded"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ReplivitError, match=words):
        read_state_dict(tmp_path / "w.pth")


def test_damaged_files(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "w.pth")
    save_weights({"a": torch.ones(100)}, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for size in (0, 5, len(whole) // 2, len(whole) - 20):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(ReplivitError, match="is truncated or no"):
                read_state_dict(tmp_path / name)
    with pytest.raises(ReplivitError, match="is truncated or no safetensors file"):
        read_metadata(tmp_path / "w.safetensors")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(ReplivitError, match="no torch checkpoint"):
        read_state_dict(tmp_path / "page.pth")
    (tmp_path / "list.pth").write_text("root:x:0:0:root:/root:/bin/bash\n")  # "r": pickle's append
    with pytest.raises(ReplivitError, match="no torch checkpoint"):
        read_state_dict(tmp_path / "list.pth")
    with pytest.raises(ReplivitError, match="no weights file"):
        read_state_dict(tmp_path / "nowhere.pth")
    with pytest.raises(ReplivitError, match=r"cannot read .*: No such file"):
        file_sha256(tmp_path / "nowhere.pth")
    assert read_metadata(tmp_path / "page.pth") == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    save_weights({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").chmod(0)
    for read in (read_state_dict, read_metadata):
        with pytest.raises(ReplivitError, match="Permission denied"):
            read(tmp_path / "w.safetensors")


def test_a_file_that_holds_itself_is_read_once(tmp_path):
    state = {"a": torch.ones(2)}
    torch.save(state | {"model": state}, tmp_path / "inner.pth")
    state["model"] = state
    torch.save(state, tmp_path / "ring.pth")
    for name in ("inner.pth", "ring.pth"):
        assert list(read_state_dict(tmp_path / name)) == ["a"]


def test_safetensors_under_another_name(tmp_path):
    save_weights({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(tmp_path / "w.bin")
    assert list(read_state_dict(tmp_path / "w.bin")) == ["a"]


def test_public_face():
    assert all(hasattr(checkpoints, name) for name in checkpoints.__all__)
    assert harness.load_official is load_official
