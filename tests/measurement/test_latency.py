"""The latency instrument on a simulated machine: no test here looks at a real clock."""

from __future__ import annotations

import gc
import json
import math

import numpy as np
import pytest
import torch

from harness.errors import ReplivitError
from harness.measurement.latency import Effort, time_callables
from harness.measurement.sentinels import Snapshot


class Machine:
    """A clock that callables advance. `slowness(time)` stretches every call.

    `disturbed` are the numbers of rounds (0, 1, ...) in which tasks wait for a processor.
    """

    def __init__(self, slowness=lambda now: 1.0, disturbed=()):
        self.now = 0.0
        self.slowness = slowness
        self.disturbed = disturbed
        self.log: list[str] = []
        self.pressure = 0.0
        self.snapshots = 0

    def task(self, name: str, *seconds: float):
        """A callable that takes `seconds`, the last value for ever."""
        left = list(seconds)

        def call():
            self.log.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) * self.slowness(self.now)

        return call

    def clock(self) -> float:
        return self.now

    def watch(self) -> Snapshot:
        number, end = divmod(self.snapshots, 2)
        self.snapshots += 1
        if end and number in self.disturbed:
            self.pressure += 1e3
        return Snapshot(self.now, self.now, 0, self.pressure, 0.0)

    def time(self, tasks, **changes):
        return time_callables(tasks, watch=self.watch, clock=self.clock, **changes)


def test_steady_callables_give_exact_numbers_after_the_least_rounds():
    machine = Machine()
    found = machine.time({"a": machine.task("a", 0.02), "b": machine.task("b", 0.03)})
    assert found["a"].median == pytest.approx(0.02)
    assert found["a"].ratio == 1 and found["a"].ratio_interval == (1, 1)
    assert found["b"].ratio == pytest.approx(1.5)
    assert found["b"].interval == pytest.approx((0.03, 0.03))
    assert found["b"].status == found["b"].ratio_status == "ok"
    assert found["b"].reason is None
    assert found["b"].session.rounds == 7
    assert found["b"].session.voided == 0
    assert np.shape(found["b"].rounds) == (7, 2 * 5)


def test_spread_of_known_samples():
    machine = Machine()
    random = np.random.default_rng(0).lognormal(-4, 0.02, 10_000)
    found = machine.time({"a": machine.task("a", *random)}, max_rounds=20)["a"]
    samples = np.concatenate(found.rounds)
    assert found.min == samples.min()
    assert found.mean == pytest.approx(samples.mean())
    assert found.p10 == pytest.approx(np.quantile(samples, 0.1))
    assert found.p90 == pytest.approx(np.quantile(samples, 0.9))
    assert found.interval[0] <= found.median == np.median(samples) <= found.interval[1]


def test_fast_calls_are_grouped_into_blocks():
    machine = Machine()
    found = machine.time({"fast": machine.task("f", 0.0004), "slow": machine.task("s", 0.5)})
    assert found["fast"].calls_per_block == 25  # 10 ms
    assert found["slow"].calls_per_block == 1
    assert found["fast"].median == pytest.approx(0.0004)


def test_callables_take_turns_in_palindromes():
    machine = Machine()
    names = "abc"
    tasks = {name: machine.task(name, 0.05) for name in names}
    session = machine.time(tasks)["a"].session
    timed = machine.log[-session.rounds * session.palindromes * 6 :]
    chunks = ["".join(timed[i : i + 6]) for i in range(0, len(timed), 6)]
    assert all(chunk == chunk[::-1] and set(chunk) == set(names) for chunk in chunks)
    assert len(set(chunks)) > 1  # nobody always follows the same neighbour


def test_linear_drift_cancels_in_the_ratio():
    machine = Machine(slowness=lambda now: 1 + now / 20)
    found = machine.time(
        {"a": machine.task("a", 0.02), "b": machine.task("b", 0.04)},
        limits=None, budget_s=4, max_rounds=40,
    )  # fmt: skip
    assert found["b"].ratio == pytest.approx(2, rel=1e-3)
    assert found["b"].ratio_interval == pytest.approx((2, 2), rel=2e-3)
    assert found["b"].p90 > 1.05 * found["b"].p10  # the times themselves did drift


def test_warm_up_leaves_slow_first_calls_out():
    machine = Machine()
    slow_start = [3.0] + [0.1] * 12 + [0.02]
    found = machine.time({"a": machine.task("a", *slow_start)})["a"]
    assert found.median == found.p90 == pytest.approx(0.02)
    assert found.session.warm_up["a"]["first_call"] == pytest.approx(3.0)
    assert found.session.warm_up["a"]["stable"]


def test_warm_up_ends_at_its_limit():
    machine = Machine()
    restless = [0.02, 0.03] * 5000
    found = machine.time({"a": machine.task("a", *sorted(restless))}, warm_up_limit_s=1.0)
    assert machine.log.index("a") == 0
    assert found["a"].session.warm_up["a"]["blocks"] < 60


def test_restless_callable_is_noisy_and_says_so():
    machine = Machine()
    random = np.random.default_rng(1).uniform(0.01, 0.05, 100_000)
    found = machine.time(
        {"a": machine.task("a", 0.02), "b": machine.task("b", *random)},
        palindromes=1, budget_s=1e9, max_rounds=12, limits=None, half_width=0.02,
    )  # fmt: skip
    assert found["b"].session.rounds == 12
    assert found["b"].status == found["b"].ratio_status == "noisy"
    assert "after 12 rounds (wanted ±2%)" in found["b"].reason
    assert found["a"].status == "ok"


def test_budget_ends_after_the_least_rounds():
    machine = Machine()
    random = np.random.default_rng(1).uniform(0.5, 1.5, 1000)
    found = machine.time({"a": machine.task("a", *random)}, budget_s=1.0)["a"]
    assert found.session.rounds == 7
    assert found.session.palindromes == 1
    assert len(found.rounds) == 7


def test_one_disturbed_round_is_repeated_and_left_out():
    machine = Machine(disturbed={2})
    found = machine.time({"a": machine.task("a", 0.02)})["a"]
    assert found.status == "ok"
    assert found.session.voided == 1
    assert found.session.rounds == 7
    assert found.session.disturbances[0].startswith("CPU pressure")


def test_lasting_disturbance_is_contended_but_keeps_its_numbers():
    machine = Machine(disturbed=range(1000))
    found = machine.time({"a": machine.task("a", 0.02), "b": machine.task("b", 0.03)})
    assert found["b"].status == found["b"].ratio_status == "contended"
    assert found["b"].session.voided == 3  # the first round three times, then no more
    assert found["b"].ratio == pytest.approx(1.5)
    assert "10 rounds were disturbed" in found["b"].reason


def test_jump_of_the_yardstick_is_a_disturbance():
    machine = Machine(slowness=lambda now: 1.0 if now < 3.0 else 1.2)
    found = machine.time(
        {"a": machine.task("a", 0.02), "b": machine.task("b", 0.02)}, half_width=1e-9
    )
    assert any("drift of the yardstick" in one for one in found["a"].session.disturbances)


def test_interpreter_is_as_before_and_quiet_inside():
    machine, seen = Machine(), []
    task = machine.task("a", 0.02)

    def call():
        seen.append((gc.isenabled(), torch.is_inference_mode_enabled()))
        task()

    machine.time({"a": call})
    assert set(seen) == {(False, True)}
    assert gc.isenabled() and not torch.is_inference_mode_enabled()


def test_an_error_comes_through_and_the_collector_runs_again():
    with pytest.raises(RuntimeError, match="broken"):
        time_callables({"a": lambda: (_ for _ in ()).throw(RuntimeError("broken"))})
    assert gc.isenabled()


def test_detail_is_json_and_complete():
    machine = Machine()
    found = machine.time({"a": machine.task("a", 0.02), "b": machine.task("b", 0.03)})["b"]
    detail = json.loads(json.dumps(found.detail()))
    assert len(detail["rounds"]) == detail["session"]["rounds"] == 7
    assert detail["ratio"] == pytest.approx(1.5)
    assert set(detail["session"]["warm_up"]) == {"a", "b"}


def test_nothing_to_time_and_impossible_efforts_are_sentences():
    with pytest.raises(ReplivitError, match="nothing to time"):
        time_callables({})
    for wrong in ({"min_rounds": 1}, {"max_rounds": 3}, {"budget_s": 0}, {"palindromes": 0}):
        with pytest.raises(ReplivitError, match="latency needs"):
            Effort(**wrong)
    with pytest.raises(TypeError):
        time_callables({"a": math.sqrt}, no_such_field=1)


def test_a_real_callable_on_the_real_clock():
    layer = torch.nn.Linear(64, 64)
    x = torch.randn(8, 64)
    found = time_callables(
        {"a": lambda: layer(x), "b": lambda: layer(x)}, budget_s=0.3, warm_up_s=0, max_rounds=8
    )
    assert 0 < found["b"].min <= found["b"].median < 1
    assert found["b"].ratio > 0
