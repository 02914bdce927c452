"""Verdicts: like with like, tolerance by metric, a reason for everything that is not equal."""

import pytest
from display_case import make_paper, record, timing, trained

from leaderboard.tables import arrange
from leaderboard.verdicts import ledger, printed_range


def verdict(tmp_path, metric, value, unit, records=(), *, facts=None, **row):
    """The verdict on one printed number of `p_a`."""
    printed = {"variant": "A", "of": "p_a", "source": "Table 1", "seen": True, **row}
    printed |= {"metric": metric, "value": value, "unit": unit}
    paper = make_paper(tmp_path, "p", published=[printed], **(facts or {}))
    (found,) = ledger(paper, arrange(list(records), [paper], []))
    return found


@pytest.mark.parametrize(
    "value, low, high",
    [(12.3, 12.25, 12.35), (86, 85.5, 86.5), (25.557032, 25.5570315, 25.5570325), (0.4, 0.35, 0.45),
     (12.0, 11.95, 12.05)],
)  # fmt: skip
def test_printed_digits_are_a_range(value, low, high):
    assert printed_range(value) == pytest.approx((low, high), rel=1e-7)


@pytest.mark.parametrize(
    "params, outcome",
    [(12_250_000, "reproduced"), (12_349_999, "reproduced"), (12_360_000, "deviates"),
     (12_240_000, "deviates")],
)  # fmt: skip
def test_counts_must_round_to_the_printed_digits(tmp_path, params, outcome):
    found = verdict(tmp_path, "params_m", 12.3, "M", [record("p_a", "params", params)])
    assert found.outcome == outcome and found.measured == params / 1e6
    assert found.against == "params" and found.command.startswith("replivit measure p_a")


def test_like_is_compared_with_like(tmp_path):
    records = [record("p_a", "macs", 1_290_000_000), record("p_a", "macs_paper", 1_310_000_000)]
    found = verdict(tmp_path, "macs_g", 1.31, "G", records, against="macs_paper")
    assert (found.outcome, found.measured) == ("reproduced", 1.31)
    other = verdict(tmp_path, "macs_g", 1.31, "G", records)
    assert (other.outcome, other.code) == ("deviates", "convention")
    assert "the paper's own counting" in other.reason


def test_a_truncated_print_deviates_and_says_why(tmp_path):
    found = verdict(tmp_path, "params_m", 86, "M", [record("p_a", "params", 86_567_656)])
    assert (found.outcome, found.code) == ("deviates", "truncated")
    found = verdict(tmp_path, "params_m", 86, "M", [record("p_a", "params", 87_100_000)])
    assert found.code == "unexplained" and "+1.1 M" in found.reason


def test_the_files_own_reason_and_tolerance_count(tmp_path):
    records = [record("p_a", "params", 14_000_000)]
    found = verdict(tmp_path, "params_m", 12.3, "M", records, reason="counts one head")
    assert (found.outcome, found.reason) == ("deviates", "counts one head")
    found = verdict(tmp_path, "params_m", 12.3, "M", records, tolerance=2.0)
    assert (found.outcome, found.code) == ("reproduced", "tolerance")


@pytest.mark.parametrize(
    "seed, top1, outcome",
    [(None, 79.1, "reproduced"), (None, 79.4, "deviates"), (0, 79.6, "reproduced"),
     (0, 79.8, "deviates")],
)  # fmt: skip
def test_top1_of_given_weights_is_held_tighter_than_a_retrained_one(tmp_path, seed, top1, outcome):
    records = [trained("p_a", seed, top1, track="imagenet")]
    assert verdict(tmp_path, "top1", 79.2, "%", records).outcome == outcome


def test_the_authors_weights_are_known_by_their_hash(tmp_path):
    sha = "a" * 64
    official = [{"variant": "A", "url": "https://x.org/a.pth", "sha256": sha}]
    records = [trained("p_a", 0, 79.6, track="imagenet", weights_sha256=sha)]
    found = verdict(tmp_path, "top1", 79.2, "%", records, facts={"official_weights": official})
    assert found.outcome == "deviates"


def test_another_tracks_accuracy_is_no_answer(tmp_path):
    found = verdict(tmp_path, "top1", 79.2, "%", [trained("p_a", 0, 79.2, track="cifar10")])
    assert found.outcome == "not measured" and "imagenet" in found.reason
    assert found.command == "replivit evaluate p_a --track imagenet"


def test_phone_latency_is_not_measured_unless_the_row_asks(tmp_path):
    records = timing("p_a", 1.6, 0.1)
    found = verdict(tmp_path, "latency_ms", 1.6, "ms", records, conditions="iPhone 12")
    assert (found.outcome, found.code) == ("not measured", "device") and "iPhone" in found.reason
    asked = verdict(tmp_path, "latency_ms", 1.6, "ms", records, against="latency")
    assert asked.outcome == "reproduced" and asked.measured == pytest.approx(1.6)
    throughput = verdict(tmp_path, "throughput", 900, "img/s", records, against="latency")
    assert throughput.code == "device"


@pytest.mark.parametrize(
    "metric, value, row, code",
    [("top1", 77.1, {"of": None}, "not built"), ("mes", "high", {}, "no number"),
     ("mes", 3.5, {}, "no metric"), ("params_m", 3.5, {}, "no record")],
)  # fmt: skip
def test_what_cannot_be_compared_says_why(tmp_path, metric, value, row, code):
    unit = {"top1": "%", "params_m": "M"}.get(metric, "")
    found = verdict(tmp_path, metric, value, unit, **row)
    assert (found.outcome, found.code) == ("not measured", code) and found.reason


def test_a_failed_measurement_is_not_a_verdict_on_the_paper(tmp_path):
    failed = record("p_a", "params", None, status="timeout", reason="900 s passed")
    found = verdict(tmp_path, "params_m", 3.5, "M", [failed])
    assert (found.outcome, found.code) == ("not measured", "failed") and "900 s" in found.reason
