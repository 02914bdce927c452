"""Counts as records and on the terminal: every counter for itself, failures with a reason."""

from importlib import metadata

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from harness import registry
from harness.measurement.counting import ImagePack, count_records, image_pack
from harness.record import Conditions, RecordStore
from replivit.cli import main as cli

PAPER = """\
key: abacus
title: Beads
authors: [A. Author]
venue: Nowhere
year: 2024
summary: Small.
variants:
  abacus_plain: {build: "model:plain", image_size: 8, num_classes: 5, track: fashion_mini}
  abacus_ruled:
    build: "model:plain"
    image_size: 8
    num_classes: 5
    paper_params: "model:paper_params"
    paper_macs: "model:paper_macs"
  abacus_broken: {build: "model:plain", image_size: 8, paper_macs: "model:broken"}
  abacus_dynamic:
    {build: "model:dynamic", image_size: 32, num_classes: 5, track: fashion_mini, dynamic: true}
"""
MODEL = """\
import torch
from torch import nn


def plain(num_classes, image_size):
    layers = nn.Conv2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * (image_size // 2) ** 2, num_classes))


class Dynamic(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        tokens = x.flatten(2).mT[0]
        tokens = tokens[tokens.mean(-1) > 0.5]
        return self.fc(tokens).sum(0, keepdim=True) + (tokens[:, None] * tokens).sum() * 0


def dynamic(num_classes, image_size):
    return Dynamic(num_classes)


def paper_params(module):
    assert not module.training
    return 100


def paper_macs(module, image_size):
    assert not module.training
    return 1000 * image_size


def broken(module, image_size):
    raise RuntimeError("beads\\nlost")
"""
PARAMS = 3 * 4 * 4 + 4 + 8 + 64 * 5 + 5
MACS = 16 * 12 * 4 + 64 * 5
NORM = 2 * 4 * 16


@pytest.fixture
def abacus(tmp_path, monkeypatch):
    """A paper `abacus`, found through an entry point."""
    root = tmp_path / "abacus"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "paper.yaml").write_text(PAPER)
    (root / "model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("abacus", "abacus", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [point])
    registry.refresh()
    yield
    registry.refresh()


def records_of(name, **options):
    variant = registry.get_variant(name)
    conditions = Conditions(image_size=variant.spec.image_size, batch_size=1)
    module = registry.build(name).train()
    found = count_records(name, module, conditions, "run", variant, **options)
    assert module.training
    return {record.metric: record for record in found}


def test_each_counter_is_a_record(abacus, tmp_path):
    found = records_of("abacus_ruled")
    assert {metric: record.value for metric, record in found.items()} == {
        "params": PARAMS,
        "params_trainable": PARAMS,
        "params_paper": 100,
        "macs": MACS,
        "macs_fvcore": MACS + NORM,
        "macs_paper": 8000,
    }
    assert {record.paper for record in found.values()} == {"abacus"}
    assert "model:paper_macs" in found["macs_paper"].method
    assert found["params"].detail == {"buffers": 9}
    store = RecordStore(tmp_path / "records")
    store.append(found.values())
    assert store.load() == list(found.values())


def test_the_tables_are_in_the_detail(abacus):
    found = records_of("abacus_plain")
    assert set(found) == {"params", "params_trainable", "macs", "macs_fvcore"}
    detail = found["macs"].detail
    assert sum(detail["by_operator"].values()) == MACS
    assert detail["modules"]["0"] == 16 * 12 * 4 and detail["modules"]["Sequential"] == MACS
    assert detail["not_counted"]["aten.gelu"]["kind"] == "elementwise"
    gap = found["macs_fvcore"].detail["gap"]
    assert gap["macs"] == NORM and gap["notable"]
    assert [reason["operator"] for reason in gap["reasons"]] == ["batch_norm"]


def test_groups_may_be_counted_alone(abacus):
    assert set(records_of("abacus_ruled", groups=["params"])) == {
        "params", "params_trainable", "params_paper",
    }  # fmt: skip
    assert set(records_of("abacus_plain", groups=["macs"])) == {"macs", "macs_fvcore"}


def test_a_counter_that_fails_is_a_record_with_its_reason(abacus):
    found = records_of("abacus_broken")
    broken = found["macs_paper"]
    assert (broken.value, broken.status) == (None, "failed")
    assert broken.reason == "RuntimeError: beads lost"
    assert found["macs"].status == found["macs_fvcore"].status == "ok"


def test_a_module_without_a_variant_counts_too():
    conditions = Conditions(image_size=8)
    found = count_records("mine", nn.Conv2d(3, 2, 8), conditions, "run")
    assert [record.value for record in found] == [386, 386, 384, 384]
    assert {record.paper for record in found} == {None}


def test_a_size_that_does_not_fit_fails_both_counters_in_one_line():
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 2))
    found = {
        record.metric: record
        for record in count_records("mine", model, Conditions(image_size=8), "run")
    }
    assert found["params"].value == 22
    for metric in ("macs", "macs_fvcore"):
        assert found[metric].status == "failed"
        assert "shapes cannot be multiplied" in found[metric].reason
        assert "\n" not in found[metric].reason and len(found[metric].reason) <= 300


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full")])
def test_out_of_memory_has_a_status_of_its_own(error):
    class Hungry(nn.Module):
        def forward(self, x):
            raise error

    *_, macs, fvcore = count_records("mine", Hungry(), Conditions(image_size=8), "run")
    assert macs.status == fvcore.status == "out_of_memory"


def test_input_dependent_cost_is_a_distribution_over_real_images(abacus):
    variant = registry.get_variant("abacus_dynamic")
    pack = image_pack(variant, 32, count=12)
    assert len(pack.images) == 12 and pack.images[0].shape == (3, 32, 32)
    bright = [int((image.mean(0) > 0.5).sum()) for image in pack.images]
    assert len(set(bright)) > 6, "the pack must vary"
    macs = records_of("abacus_dynamic", images=pack)["macs"]
    assert macs.detail["values"] == [15 * count for count in bright]
    assert macs.value == pytest.approx(15 * sum(bright) / 12)
    assert macs.interval[0] < macs.value < macs.interval[1]
    assert macs.detail["p5"] <= macs.value <= macs.detail["p95"]
    assert (macs.n, macs.detail["images"]) == (12, pack.source)


def test_the_pack_falls_back_to_the_embedded_images(abacus):
    """`abacus_ruled` is of ImageNet, which is not on the test's machine."""
    pack = image_pack(registry.get_variant("abacus_ruled"), 8, count=3)
    embedded = image_pack(registry.get_variant("abacus_plain"), 8, count=3)
    assert pack.source == embedded.source
    assert [image.shape for image in pack.images] == [(3, 8, 8)] * 3


def test_one_image_gives_no_interval(abacus):
    pack = ImagePack([torch.ones(3, 32, 32)], "one")
    macs = records_of("abacus_dynamic", images=pack)["macs"]
    assert (macs.value, macs.interval, macs.n) == (1024 * 15, None, 1)


# --- on the terminal ---------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["count", *arguments])
    return result, " ".join(result.output.split())


def test_count_shows_counters_gap_modules_and_uncounted_work(abacus):
    result, words = run("abacus_ruled")
    assert result.exit_code == 0
    assert f"MACs {MACS:,} 0.001088 MMACs" in words
    assert f"MACs, fvcore {MACS + NORM:,}" in words
    assert f"+{NORM / MACS:.2%}" in words
    assert f"+{NORM} batch_norm" in words
    assert "MACs, paper's rule 8,000" in words
    assert "4 Linear 325 320 29.4%" in words
    assert "elementwise gelu 1" in words
    assert "may hide multiply-adds" not in words


def test_count_lists_operators_and_leaves_modules_out_on_request(abacus):
    _, words = run("abacus_plain", "--operators", "--depth", "0", "--image-size", "16")
    assert "16 px" in words and f"MACs {4 * MACS:,}" in words
    assert "Where they go" not in words
    assert "elementwise gelu 1" in words


def test_count_of_a_dynamic_model_says_how_costs_spread(abacus):
    result, words = run("abacus_dynamic")
    assert result.exit_code == 0
    assert "MACs depend on the image: mean of 64 images" in words
    assert "hidden product mul (broadcast) 1" in words
    assert "may hide multiply-adds" in words


def test_count_with_a_broken_counter_shows_the_rest_and_fails(abacus):
    result, words = run("abacus_broken")
    assert result.exit_code == 1
    assert "MACs, paper's rule: RuntimeError: beads lost" in words
    assert "MACs, fvcore" in words
