"""A/A check: does the latency instrument agree with itself?

Each variant is measured twice, in two passes over all of them, so that minutes lie between its
two runs; and two copies of it are compared in alternation, which must end in a tie.

    python benchmarks/aa_check.py                        # quick variants
    python benchmarks/aa_check.py deit_ti resnet50 --budget-s 20
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
from harness.record import Record

VARIANTS = ("deit_ti", "mobilenetv2_100", "efficientnet_b0", "resnet50", "efficientformer_l1",
            "efficientformer_v2_s0", "vit_micro")  # fmt: skip
TOLERANCE = 0.05  #: of the ratio to the yardstick, between two runs
SHARE = 0.90  #: of cells that must agree


def yardstick_ratio(variant: str, budget_s: float) -> Record:
    """The record of one run of one variant."""
    records = harness.measure(variant, ("latency",), budget_s=budget_s)
    (ratio,) = (record for record in records if record.metric == "latency_ratio")
    return ratio


def check_runs(variants: list[str], budget_s: float) -> tuple[int, int]:
    """Two passes; returns how many cells agree, and how many count (are not noisy)."""
    passes = [{name: yardstick_ratio(name, budget_s) for name in variants} for _ in range(2)]
    agreeing = counted = 0
    print(f"{'variant':24} {'run 1':>8} {'run 2':>8} {'apart':>7}  status")
    for name in variants:
        first, second = (one[name] for one in passes)
        if not (first.measured and second.measured):
            print(f"{name:24} {first.reason or second.reason}")
            counted += 1
            continue
        apart = abs(first.value / second.value - 1)
        statuses = {first.status, second.status}
        if "noisy" not in statuses:
            counted += 1
            agreeing += apart <= TOLERANCE
        print(
            f"{name:24} {first.value:8.3f} {second.value:8.3f} {apart:7.1%}  "
            f"{' '.join(sorted(statuses))}"
        )
    return agreeing, counted


def check_ties(variants: list[str], budget_s: float) -> int:
    """Each variant against itself; returns how many were told apart."""
    told_apart = 0
    for name in variants:
        found = harness.compare(name, name, budget_s=budget_s)
        # a 95 % interval misses 1 one time in twenty: as a tie counts what differs by under 1 %
        low, high = found.interval or (float("nan"),) * 2
        tie = low <= 1.01 and high >= 0.99
        told_apart += not tie
        print(f"{name:24} {'tie' if tie else 'TOLD APART'}: {found.verdict}")
    return told_apart


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    parser.add_argument("--budget-s", type=float, default=8.0, help="seconds of timing per cell")
    arguments = parser.parse_args()
    variants = [harness.get_variant(name).name for name in arguments.variants]
    agreeing, counted = check_runs(variants, arguments.budget_s)
    print(f"{agreeing} of {counted} cells that are not noisy agree within {TOLERANCE:.0%}\n")
    told_apart = check_ties(variants, arguments.budget_s)
    passed = agreeing >= SHARE * counted and not told_apart
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
