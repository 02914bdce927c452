"""The one latency instrument: interleaved timing with intervals, in this process.

Callables take turns in palindromes (`a b b a`, `c a b b a c`): whatever drifts linearly hits all of
them alike and cancels in their ratio. Some palindromes make a round; rounds are the independent
unit of the bootstrap. Sentinels watch each round, and a disturbed one is repeated.

    timings = time_callables({"yardstick": yardstick, "model": model}, budget_s=10)
    timings["model"].median, timings["model"].ratio     # seconds; x yardstick
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics as plain
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from harness.errors import ReplivitError
from harness.measurement.allocator import keep_freed_blocks
from harness.measurement.sentinels import Limits, Snapshot, disturbances, reading, snapshot

Call = Callable[[], object]
Timer = Callable[[Call, int], float]

#: A repeat of a disturbed round is itself disturbed: after so many, the cell is `contended`.
REPEATS = 3
#: Drift is judged against the median of at least so many earlier rounds.
DRIFT_AFTER = 3


@dataclass(frozen=True)
class Effort:
    """How hard to try; a cell that has not converged when it ends says `noisy`.

    Attributes:
        budget_s: no further round starts after it, once `min_rounds` are complete.
        half_width: converged when each 95 % interval is at most this half as wide, relative.
        palindromes: per round, at most; slow callables get fewer, so that rounds fit the budget.
        block_s: calls are grouped until a block lasts this long.
        warm_up_s, warm_up_limit_s: the least and the most warm-up of one callable.
    """

    budget_s: float = 20.0
    half_width: float = 0.02
    min_rounds: int = 7
    max_rounds: int = 40
    palindromes: int = 5
    block_s: float = 0.010
    warm_up_s: float = 0.5
    warm_up_limit_s: float = 15.0

    def __post_init__(self) -> None:
        if not 2 <= self.min_rounds <= self.max_rounds:
            raise ReplivitError("latency needs 2 <= min_rounds <= max_rounds")
        if self.palindromes < 1 or min(self.budget_s, self.half_width, self.block_s) <= 0:
            raise ReplivitError(
                "latency needs a positive budget, half width, block and palindromes"
            )


#: Efforts by name, as `measure(profile=...)` and the command know them.
PROFILES = {
    "quick": Effort(budget_s=8.0, warm_up_s=0.3, warm_up_limit_s=3.0),
    "full": Effort(budget_s=60.0),
}


@dataclass
class Session:
    """What the callables of one `time_callables` share: how the timing itself went."""

    rounds: int = 0
    voided: int = 0
    palindromes: int = 0
    seconds: float = 0.0
    warm_up: dict[str, dict[str, Any]] = field(default_factory=dict)
    disturbances: list[str] = field(default_factory=list)
    contended: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one callable; intervals are 95 %, bootstrapped over rounds.

    Attributes:
        rounds: for each round the seconds per call of its blocks, two per palindrome.
        ratio: median of paired ratios to the first callable (1 for the first itself).
        status: of the median; `ratio_status` of the ratio, which converges earlier.
    """

    median: float
    interval: tuple[float, float]
    min: float
    p10: float
    p90: float
    mean: float
    rounds: tuple[tuple[float, ...], ...]
    ratio: float
    ratio_interval: tuple[float, float]
    status: Literal["ok", "noisy", "contended"]
    ratio_status: Literal["ok", "noisy", "contended"]
    reason: str | None
    ratio_reason: str | None
    calls_per_block: int
    session: Session

    def detail(self) -> dict[str, Any]:
        """What a record keeps beside the value: spread, raw samples, how the timing went."""
        return {
            "min": self.min, "p10": self.p10, "p90": self.p90, "mean": self.mean,
            "ratio": self.ratio, "ratio_interval": list(self.ratio_interval),
            "calls_per_block": self.calls_per_block,
            "rounds": [[float(f"{value:.6g}") for value in one] for one in self.rounds],
            "session": vars(self.session),
        }  # fmt: skip


def wall_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """A timer that reads `clock` around a block and returns seconds per call."""

    def timer(call: Call, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls

    return timer


def cuda_timer() -> Timer:
    """A timer with an event pair around every call and one synchronisation per block."""
    import torch

    def timer(call: Call, calls: int) -> float:
        pairs = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)
        ]
        torch.cuda.synchronize()
        for start, end in pairs:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3  # ms -> s

    return timer


@contextlib.contextmanager
def _quiet_interpreter() -> Iterator[None]:
    """No garbage collection and no autograd while timing."""
    import torch

    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        if enabled:
            gc.enable()


def _warm_up(
    timer: Timer, call: Call, effort: Effort, clock: Callable[[], float]
) -> dict[str, Any]:
    """Call until two successive windows of five blocks differ by less than 3 % in median.

    Returns first call, seconds per call, number of blocks, and whether it became stable; never
    fewer than three calls and `warm_up_s`, never more than about `warm_up_limit_s`.
    """
    start = clock()
    first = timer(call, 1)
    calls = _calls_per_block(timer(call, 1), effort.block_s)
    blocks: list[float] = []
    stable = False
    while True:
        blocks.append(timer(call, calls))
        spent = clock() - start
        if len(blocks) >= 10:
            before, now = plain.median(blocks[-10:-5]), plain.median(blocks[-5:])
            stable = abs(now - before) < 0.03 * before
        if (stable and spent >= effort.warm_up_s) or spent >= effort.warm_up_limit_s:
            break
    seconds = plain.median(blocks[-5:])
    return {"first_call": first, "seconds": seconds, "blocks": len(blocks), "stable": stable}


def _calls_per_block(seconds: float, block_s: float) -> int:
    return max(1, math.ceil(block_s / max(seconds, 1e-9)))


def _palindromes(cost_s: float, effort: Effort) -> int:
    """Palindromes per round, so that half as many rounds again as the minimum fit the budget."""
    wanted = effort.budget_s / (1.5 * effort.min_rounds * cost_s)
    return max(1, min(effort.palindromes, int(wanted)))


def time_callables(
    callables: Mapping[str, Call],
    *,
    effort: Effort | None = None,
    device: str = "cpu",
    limits: Limits | None = None,
    watch: Callable[[], Snapshot] = snapshot,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Timing]:
    """Time callables against each other; ratios are to the first one.

    From here on the process keeps the memory it frees (`harness.measurement.allocator`).

    Args:
        callables: name -> function without arguments. The first is the yardstick.
        effort: rounds, budget and precision; `changes` replaces single fields of it
            (`budget_s=5`, `min_rounds=9`, ...).
        device: "cpu", or "cuda": CUDA events instead of `clock`.
        limits: of the sentinels.
        watch: gives the sentinels' snapshots. With `clock`, the seam for tests.
        clock: seconds; `time.process_time` compares CPU time where a machine is never quiet.
        seed: of the order within palindromes.

    Raises:
        ReplivitError: nothing to time, or an impossible effort.
    """
    if not callables:
        raise ReplivitError("nothing to time")
    effort = replace(effort or Effort(), **changes)
    limits = limits or Limits()
    timer = wall_timer(clock)
    if device.startswith("cuda"):
        timer = cuda_timer()
        limits = replace(limits, wall_over_cpu=math.inf)  # the host may sleep while a GPU works
    session = Session()
    keep_freed_blocks()
    with _quiet_interpreter():
        for name, call in callables.items():
            session.warm_up[name] = _warm_up(timer, call, effort, clock)
        rounds, blocks = _run_rounds(
            callables, timer, effort, limits, watch, clock, session, np.random.default_rng(seed)
        )
    return _summarise(rounds, blocks, effort, session)


def _run_rounds(
    callables: Mapping[str, Call],
    timer: Timer,
    effort: Effort,
    limits: Limits,
    watch: Callable[[], Snapshot],
    clock: Callable[[], float],
    session: Session,
    random: np.random.Generator,
) -> tuple[np.ndarray, dict[str, int]]:
    """Rounds until converged or at an end; `(R, K, 2, C)` seconds of R rounds, K palindromes."""
    names = list(callables)
    seconds = {name: session.warm_up[name]["seconds"] for name in names}
    blocks = {name: _calls_per_block(seconds[name], effort.block_s) for name in names}
    session.palindromes = _palindromes(
        2 * sum(seconds[name] * blocks[name] for name in names), effort
    )
    calls = 2 * session.palindromes * sum(blocks.values())

    def one_round() -> np.ndarray:
        samples = np.empty((session.palindromes, 2, len(names)))
        for palindrome in samples:
            order = random.permutation(len(names))
            for half, indices in enumerate((order, order[::-1])):
                for index in indices:
                    name = names[index]
                    palindrome[half, index] = timer(callables[name], blocks[name])
        return samples

    rounds: list[np.ndarray] = []
    repeats, start = 0, clock()
    while len(rounds) < effort.max_rounds:
        before = watch()
        samples = one_round()
        found = disturbances(reading(before, watch(), calls), limits, _drift(rounds, samples))
        session.seconds = clock() - start
        late = session.seconds > effort.budget_s
        if found:
            session.disturbances.append("; ".join(found))
            if repeats < REPEATS and not late and not session.contended:
                repeats += 1
                session.voided += 1
                continue
            session.contended = True
        repeats = 0
        rounds.append(samples)
        if len(rounds) >= effort.min_rounds and (late or _converged(rounds, effort)):
            break
    session.rounds = len(rounds)
    return np.stack(rounds), blocks


def _drift(rounds: list[np.ndarray], samples: np.ndarray) -> float | None:
    """Relative change of the first callable's median against that of the earlier rounds."""
    if len(rounds) < DRIFT_AFTER:
        return None
    usual = np.median([np.median(one[..., 0]) for one in rounds])
    return float(np.median(samples[..., 0]) / usual - 1)


def _estimates(rounds: np.ndarray, index: int):
    """Median and paired ratio to the first of callable `index`, of rounds `(R, K, 2, C)`."""
    from harness.statistics import median_estimate, paired_ratio

    own = rounds[..., index]
    median = median_estimate(own.reshape(len(own), -1))
    # a palindrome's two halves are added first: there linear drift cancels
    return median, paired_ratio(own.sum(axis=2), rounds[..., 0].sum(axis=2))


def _converged(rounds: list[np.ndarray], effort: Effort) -> bool:
    stacked = np.stack(rounds)
    return all(
        estimate.half_width <= effort.half_width
        for index in range(stacked.shape[-1])
        for estimate in _estimates(stacked, index)
    )


def _verdict(half_width: float, effort: Effort, session: Session) -> tuple[str, str | None]:
    if session.contended:
        count = len(session.disturbances)
        return "contended", f"{count} rounds were disturbed, the last by {session.disturbances[-1]}"
    if half_width > effort.half_width:
        return "noisy", (
            f"the interval is ±{half_width:.1%} after {session.rounds} rounds "
            f"(wanted ±{effort.half_width:.0%})"
        )
    return "ok", None


def _summarise(
    rounds: np.ndarray, blocks: dict[str, int], effort: Effort, session: Session
) -> dict[str, Timing]:
    timings = {}
    for index, name in enumerate(blocks):
        own = rounds[..., index].reshape(len(rounds), -1)
        median, ratio = _estimates(rounds, index)
        status, reason = _verdict(median.half_width, effort, session)
        ratio_status, ratio_reason = _verdict(ratio.half_width, effort, session)
        low, high = np.quantile(own, [0.1, 0.9])
        timings[name] = Timing(
            median=median.value, interval=median.interval,
            min=float(own.min()), p10=float(low), p90=float(high), mean=float(own.mean()),
            rounds=tuple(tuple(one) for one in own.tolist()),
            ratio=ratio.value, ratio_interval=ratio.interval,
            status=status, ratio_status=ratio_status, reason=reason, ratio_reason=ratio_reason,
            calls_per_block=blocks[name], session=session,
        )  # fmt: skip
    return timings
