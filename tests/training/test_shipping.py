"""Shipped weights: small, re-evaluated as they are shipped, with the records of all seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.checkpoints import file_sha256, load_model, read_metadata
from harness.errors import ReplivitError
from harness.record import read_records
from harness.training import shipping, train


@pytest.fixture
def fit(toy_paper, tmp_path):
    def run(seed: int, **more):
        recipe = {"batch_size": 500, "epochs": 1, "warmup_epochs": 0, "lr": 1e-2}
        return train("toy_ship", "fashion_mini", recipe, seed, out=tmp_path / f"seed{seed}",
                     quiet=True, **more)  # fmt: skip

    return run


def test_ship(fit, toy_paper):
    runs = [fit(0), fit(1)]
    weights, records = shipping.ship("toy_ship", "fashion_mini", runs)
    assert weights == toy_paper / "weights" / "toy_ship_fashion_mini.safetensors"
    assert records == toy_paper / "weights" / "toy_ship_fashion_mini.records.jsonl"
    assert weights.stat().st_size < 50_000
    assert read_metadata(weights)["seed"] == "0"
    half = runs[0].model[0].weight.to(torch.float16).float()
    assert torch.equal(load_model("toy_ship", weights)[0].weight, half)
    kept = list(read_records(records))
    assert kept[:-2] == runs[0].records + runs[1].records
    shipped = {record.metric: record for record in kept[-2:]}
    assert set(shipped) == {"top1", "top5"}
    assert shipped["top1"].detail["shipped"] is True
    assert shipped["top1"].conditions.weights_sha256 == file_sha256(weights)
    assert shipped["top1"].conditions.seed == 0
    assert abs(shipped["top1"].value - runs[0].value("top1")) < 0.5  # the cast alone


def test_what_cannot_be_shipped(fit, toy_paper, monkeypatch):
    run = fit(0, evaluate=False)
    with pytest.raises(ReplivitError, match="evaluated"):
        shipping.ship("toy_ship", "fashion_mini", [run])
    with pytest.raises(ReplivitError, match="evaluated"):
        shipping.ship("toy_ship", "fashion_mini", [])
    with pytest.raises(ReplivitError, match="for a track"):
        shipping.ship("toy_ship", "somewhere", [run])
    scored = run.records[0].model_copy(update={"metric": "top1", "value": 50.0})
    own = scored.conditions.model_copy(update={"options": {"width": 4}})
    with pytest.raises(ReplivitError, match="options of its own"):
        other = scored.model_copy(update={"conditions": own})
        shipping.ship("toy_ship", "fashion_mini", [replace(run, records=[other])])
    monkeypatch.setattr(shipping, "LIMIT", 1000)
    with pytest.raises(ReplivitError, match=r"MB as float16; at most 0\.001 MB"):
        shipping.ship("toy_ship", "fashion_mini", [replace(run, records=[scored])])
    assert not (toy_paper / "weights").exists()


def test_an_option_that_is_the_default_is_none(fit, toy_paper):
    """A run that names the variant's own width is a run of the variant."""
    run = fit(0)
    named = [
        one.model_copy(
            update={"conditions": one.conditions.model_copy(update={"options": {"width": 8}})}
        )
        for one in run.records
    ]
    _, records = shipping.ship("toy_ship", "fashion_mini", [replace(run, records=named)])
    kept = list(read_records(records))
    assert kept[:-2] == run.records and not any(one.conditions.options for one in kept)
