"""Sentinels fed with made-up systems."""

from __future__ import annotations

import os

import pytest

from harness.measurement import sentinels
from harness.measurement.sentinels import Limits, Reading, Snapshot, disturbances, reading

QUIET = Reading(pressure=0.0, steal=0.0, switches=0.0, wall_over_cpu=1.0)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write the two files of /proc; returns a function that sets their numbers."""
    monkeypatch.setattr(sentinels, "PRESSURE", tmp_path / "pressure")
    monkeypatch.setattr(sentinels, "PROC_STAT", tmp_path / "stat")
    monkeypatch.setattr(sentinels, "available_cpus", lambda: [1, 3])

    def put(pressure_us: int, steal_ticks: list[int]) -> None:
        (tmp_path / "pressure").write_text(
            f"some avg10=1.00 avg60=2.00 avg300=0.00 total={pressure_us}\n"
            "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
        )
        rows = [f"cpu{i} 1 2 3 4 5 6 7 {ticks} 0 0" for i, ticks in enumerate(steal_ticks)]
        (tmp_path / "stat").write_text("\n".join(["cpu  9 9 9 9 9 9 9 999 0 0", *rows, "intr 1"]))

    return put


def test_snapshot_reads_pressure_and_the_steal_of_own_processors(system):
    system(2_500_000, [900, 10, 900, 30])
    found = sentinels.snapshot()
    assert found.pressure == 2.5
    assert found.steal == 20 / os.sysconf("SC_CLK_TCK")
    assert found.cpu > 0 and found.switches >= 0


@pytest.mark.parametrize("text", ["", "nonsense", "some total=x"])
def test_what_a_system_does_not_tell_is_none_and_never_trips(system, tmp_path, text):
    (tmp_path / "pressure").write_text(text)
    found = sentinels.snapshot()  # no stat file at all
    assert found.pressure is None and found.steal is None
    between = reading(found, sentinels.snapshot(), calls=1)
    assert between.pressure is None and between.steal is None
    assert disturbances(Reading(None, None, 0.0, 1.0), Limits()) == []


def test_reading_is_relative_to_wall_time_and_calls():
    before = Snapshot(wall=10, cpu=5, switches=100, pressure=1.0, steal=0.5)
    after = Snapshot(wall=12, cpu=6.6, switches=300, pressure=1.5, steal=0.52)
    found = reading(before, after, calls=100)
    assert found.pressure == pytest.approx(0.25)
    assert found.steal == pytest.approx(0.01)
    assert found.switches == pytest.approx(2.0)
    assert found.wall_over_cpu == pytest.approx(1.25)
    # 4 calls of half a second: one switch in 20 ms is housekeeping, not disturbance
    assert reading(before, after, calls=4).switches == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"pressure": 0.06}, "CPU pressure 6% (limit 5%)"),
        ({"steal": 0.02}, "stolen time 2.0% (limit 1.0%)"),
        ({"switches": 1.5}, "involuntary context switches 1.5 per call (limit 1.0 per call)"),
        ({"wall_over_cpu": 1.04}, "wall time over CPU time 1.04 (limit 1.03)"),
    ],
)
def test_each_limit_trips_by_itself(change, word):
    found = Reading(**{**vars(QUIET), **change})
    assert disturbances(found, Limits()) == [word]
    assert disturbances(QUIET, Limits()) == []


@pytest.mark.parametrize(("drift", "trips"), [(None, 0), (0.02, 0), (0.04, 1), (-0.04, 1)])
def test_drift_counts_in_both_directions(drift, trips):
    assert len(disturbances(QUIET, Limits(), drift)) == trips


def test_own_processors():
    assert sentinels.available_cpus() == sorted(os.sched_getaffinity(0))
