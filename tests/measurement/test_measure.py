"""`measure` and `compare`: what users call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement import cell as cells
from harness.measurement.cell import Cell, groups_of
from harness.measurement.comparison import paired_accuracy, verdict_on
from harness.record import Conditions, RecordStore, make_record

FAST = {
    "budget_s": 0.2, "min_rounds": 2, "max_rounds": 2, "warm_up_s": 0.0, "warm_up_limit_s": 0.1,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.head = nn.Linear(width, 10)
        self.num_classes = 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean(dim=(2, 3)))


def test_a_module_is_measured_here_and_left_as_it_was(tmp_path):
    model = Net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    store = RecordStore(tmp_path / "records")
    records = harness.measure(model, image_size=32, batch_size=2, store=store, **FAST)
    found = {record.metric: record for record in records}
    assert found["params"].value == 4 * 3 * 16 + 4 + 4 * 10 + 10
    assert found["macs"].value == 8 * 8 * 4 * 3 * 16 + 4 * 10
    assert {"latency", "latency_ratio", "memory_inference", "memory_training"} <= set(found)
    assert found["latency"].variant == "Net" and found["latency"].paper is None
    assert found["latency"].detail["isolation"] == "the caller's process"
    assert found["latency"].conditions.batch_size == 2
    assert found["latency"].conditions.image_size == 32
    assert all(record.measured for record in records)
    assert model.training and torch.get_num_threads() == threads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [one.metric for one in store.load()] == [one.metric for one in records]


def test_only_what_was_asked_for():
    records = harness.measure(Net(), ("params",), image_size=32)
    assert {record.metric for record in records} == {"params", "params_trainable"}


def test_a_module_that_fails_is_a_row():
    class Broken(Net):
        def forward(self, x):
            raise RuntimeError("no way")

    (record,) = harness.measure(Broken(), ("memory_inference",), image_size=32)
    assert (record.status, record.reason, record.value) == ("failed", "no way", None)


def test_image_size_comes_from_a_timm_config_or_must_be_said():
    model = Net()
    model.pretrained_cfg = {"input_size": (3, 48, 48)}
    (record,) = harness.measure(model, ("memory_inference",))
    assert record.conditions.image_size == 48
    with pytest.raises(ReplivitError, match="say image_size: a Net"):
        harness.measure(Net(), ("latency",))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"metrics": ("speed",)}, "no metric 'speed'; known: params"),
        ({"metrics": ()}, "no metric asked for"),
        ({"profile": "slow"}, "no profile 'slow'; known: quick, full"),
        ({"backend": "fast"}, "no backend 'fast'"),
        ({"dtype": "int4"}, "no dtype 'int4'"),
        ({"batch_size": 0}, "batch size 0"),
        ({"threads": 0}, "0 threads do not fit"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"device": "cuda:77"}, "torch sees"),
        ({"metrics": ("accuracy",)}, "needs a track"),
    ],
)
def test_wrong_arguments_are_sentences(arguments, sentence):
    with pytest.raises(ReplivitError, match=sentence):
        harness.measure(Net(), image_size=32, **arguments)


def test_groups_are_ordered_and_not_doubled():
    assert groups_of(("latency", "macs", "params")) == ["counts", "latency"]
    assert groups_of(("memory",)) == ["memory_inference", "memory_training"]


def test_labels_say_what_differs():
    assert Cell("a", "counts").label == "a counts"
    assert Cell("a", "latency", backend="deploy", batch_size=8).label == "a latency deploy batch 8"
    assert Cell("a", "compare", rival="b").label == "a and b compare"


def test_counts_do_not_depend_on_threads_or_backend():
    one, two = (Cell("a", "counts", threads=n, backend="deploy") for n in (1, 2))
    assert one.variant_conditions(None) == two.variant_conditions(None)
    assert Cell("a", "latency", device="cuda:1").variant_conditions(None).device == "cuda"


def test_every_metric_group_exists():
    assert {one for groups in cells.METRIC_GROUPS.values() for one in groups} < set(cells.GROUPS)


# --- comparing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "interval", "status", "verdict"),
    [
        (1.5, (1.4, 1.6), "ok", "a is 1.50x faster than b (95 % interval 1.40 to 1.60)"),
        (0.5, (0.4, 0.8), "ok", "b is 2.00x faster than a (95 % interval 1.25 to 2.50)"),
        (1.01, (0.99, 1.03), "ok", "no difference detected (ratio 1.010"),
        (1.0, (1.0, 1.0), "ok", "no difference detected"),
        (1.05, (1.02, 1.08), "ok", "a is 1.05x faster"),
        (1.05, (1.02, 1.08), "contended", "no difference detected: the machine was busy"),
        (0.93, (0.91, 0.95), "contended", "no difference detected: the machine was busy"),
        (1.5, (1.4, 1.6), "contended", "a is 1.50x faster"),
    ],
)
def test_verdicts(ratio, interval, status, verdict):
    assert verdict_on("a", "b", ratio, interval, status).startswith(verdict)


def test_two_modules_are_timed_against_each_other():
    found = harness.compare(Net(4), Net(512), image_size=128, batch_size=4, **FAST)
    assert found.a == found.b == "Net"
    assert found.ratio > 1.2  # 128 times the channels
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert len(found.records) == 2
    assert found.verdict == verdict_on("Net", "Net", found.ratio, found.interval, found.status)
    assert found.accuracy is None


def test_comparing_needs_two_of_a_kind_and_a_size():
    with pytest.raises(ReplivitError, match="not one of each"):
        harness.compare(Net(), "deit_ti")
    with pytest.raises(ReplivitError, match="needs image_size"):
        harness.compare(Net(), Net())


def test_a_comparison_that_fails_says_why(monkeypatch):
    from harness.measurement import comparison, isolation

    def fail(cell, run_id):
        return isolation.failed_records(cell, run_id, "timeout", "not done after 9 s")

    monkeypatch.setattr(comparison, "run_isolated", fail)
    monkeypatch.setattr(comparison, "get_variant", lambda name: type("V", (), {"name": name}))
    found = harness.compare("a", "b")
    assert found.ratio is None and found.interval is None
    assert found.status == "timeout"
    assert found.verdict == "could not be compared: not done after 9 s"


def top1(variant: str, bits: list[int], data: str = "d"):
    import base64

    packed = base64.b64encode(np.packbits(np.array(bits, dtype=bool)).tobytes()).decode()
    return make_record(
        variant, "top1", 100 * sum(bits) / len(bits),
        Conditions(track="fashion_mini", data_fingerprint=data), run_id="x", n=len(bits),
        detail={"bits": packed, "n": len(bits)},
    )  # fmt: skip


def test_accuracy_is_paired_on_the_same_images_only():
    good, bad = [1] * 40, [0] * 30 + [1] * 10
    known = [top1("b", good), top1("a", good), top1("b", bad)]  # the newest of b is the bad one
    test, track = paired_accuracy("a", "b", known)
    assert track == "fashion_mini"
    assert (test.only_a, test.only_b, test.n) == (30, 0, 40)
    assert test.p_value < 0.001
    assert paired_accuracy("a", "b", [top1("a", good), top1("b", bad, data="other")]) == (
        None,
        None,
    )
    assert paired_accuracy("a", "b", []) == (None, None)


def test_of_several_data_sets_the_one_scored_last_is_compared():
    good, bad = [1] * 40, [0] * 40
    known = [top1(name, bits, data) for data, bits in (("old", good), ("new", good), ("old", bad))
             for name in ("a", "b")]  # fmt: skip
    known[-1] = top1("b", good, "old")
    test, _ = paired_accuracy("a", "b", known)
    assert (test.only_a, test.only_b) == (0, 40)
