"""SepViT's experiments and pictures: what they count exactly, what they claim, how they refuse."""

from __future__ import annotations

import pytest
import torch

import harness
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from harness.record import RecordStore
from harness.tokens import sample_images
from reproductions.sepvit.ablation_experiments import TWINS
from reproductions.sepvit.drawing import look, window_figure


def finding(result, words: str):
    return next(one for one in result.findings if words in one.claim)


@pytest.fixture(scope="module")
def resolution(tmp_path_factory):
    """One run for all tests of this file."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIVIT_HOME", str(home))
        return harness.run("sepvit/resolution", scale="tiny", store=RecordStore(home / "records"))


def test_resolution_counts_every_size(resolution):
    assert [row["side"] for row in resolution.rows] == [192, 224, 448]
    small, published, large = resolution.rows
    assert published["windows"] == "64 16/4 4/1 1" and published["maps"] == "56 28 14 7"
    assert large["windows"] == "256 64/16 16/4 4"
    assert (published["params"], published["MACs (G)"]) == (3_661_128, 0.568)
    for row in resolution.rows:
        with on_meta():
            model = harness.build("sepvit_lite", image_size=row["side"])
        assert row["MACs (G)"] == round(count_macs(model, row["side"]).total / 1e9, 3)
        assert (row["time (ms)"] is not None) == (row["side"] == 224)
    assert small["MACs per pixel"] > published["MACs per pixel"], "padding costs"
    assert 0 < published["between windows (%)"] < large["between windows (%)"] < 10
    low, high = map(float, published["95 %"].split(" to "))
    assert low <= published["times mobilenetv2_100"] <= high
    assert resolution.record.value == 3 and len(resolution.figure_files) == 2


def test_resolution_replays_the_published_counts(resolution):
    for words in (
        "published parameters",
        "published multiply-adds",
        "complexity formulas",
        "about half of two Swin blocks",
        "lowers the parameters",
        "number of pixels",
    ):
        assert finding(resolution, words).outcome == "reproduced", words
    assert "SepViT-B 82.377 M for 82.3" in finding(resolution, "published parameters").evidence
    assert "SepViT-T 4.533 G for 4.5" in finding(resolution, "published multiply-adds").evidence
    assert "11 of 11 blocks" in finding(resolution, "complexity formulas").evidence
    assert finding(resolution, "CSWin").outcome == "not measured"
    assert {row["variant"] for row in resolution.published} == {"SepViT-T", "SepViT-S", "SepViT-B"}


@pytest.mark.parametrize("name", ["twins", "window_token"])
def test_ablations_train_all_arms_and_answer_their_claims(name, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path))
    store = RecordStore(tmp_path / "records")
    result = harness.run(f"sepvit/{name}", scale="tiny", store=store)
    arms = [row["arm"] for row in result.rows]
    assert arms[0] == "SepViT" and len(set(arms)) == len(arms)
    assert len(result.findings) == {"twins": 2, "window_token": 5}[name]
    assert result.published and "no number here means anything" in result.notes
    macs = [row["MACs (M)"] for row in result.rows]
    if name == "twins":
        assert max(macs) / min(macs) < 1.002
    else:
        assert arms[1:] == ["token starts normal", "token always zero", "mean of the window",
                            "convolution of the window", "no grouped windows"]  # fmt: skip
        params = {row["arm"]: row["params"] for row in result.rows}
        tokens = 16 * 32 + 4 * 32 + 4 * 64
        assert params["SepViT"] - params["token always zero"] == tokens
        assert params["token always zero"] == params["mean of the window"]
    runs = {path.parent for path in tmp_path.glob("training/**/weights.safetensors")}
    assert len(runs) == len(arms)


def test_twins_cost_the_same_at_paper_scale():
    macs = []
    for name, options in (("sepvit_tiny", {}), *TWINS["tiny"][1:]):
        with on_meta():
            model = harness.build(name, **options)
        macs.append(count_macs(model, 224).total)
    assert max(macs) / min(macs) < 1.005


def test_looking_at_a_block():
    model = harness.build("sepvit_micro").eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn_like(one))
    sample = sample_images(model, "fashion_mini", 2)
    fine, grouped = (look(model, sample.inputs, 0, block) for block in (0, 1))
    assert fine.token.shape == (2, 16, 16) and grouped.token.shape == (2, 16, 16)
    assert fine.between.shape == (2, 16, 16) and grouped.between.shape == (2, 4, 4)
    torch.testing.assert_close(fine.between.sum(-1), torch.ones(2, 16))
    figure = window_figure(sample, {"fine": (fine, (0, 5)), "grouped": (grouped, (3,))})
    assert len(figure.axes) == 2 * 7
    with pytest.raises(ValueError, match="block 1 of stage 1 has no window tokens"):
        look(model, sample.inputs, 1, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("twins", {"scale": "huge"}, "no scale 'huge'; there are tiny, small, paper"),
        ("twins", {"patience": 1}, "no option 'patience'; there are track, seeds"),
        ("twins", {"seeds": (0, 0)}, "seeds must be whole numbers that differ"),
        ("window_token", {"epochs": 0}, "option epochs must be a whole number from 1 on, not 0"),
        ("resolution", {"size": "micro"}, "no size 'micro'; there are lite, tiny, small, base"),
        ("resolution", {"timed_sizes": 300}, "image_sizes must hold 224 and all timed_sizes"),
        ("resolution", {"scale": "huge"}, "no scale 'huge'"),
    ],
)
def test_wrong_options_are_one_sentence(name, options, message):
    with pytest.raises(harness.ReplivitError, match=message):
        harness.run(f"sepvit/{name}", **options)
