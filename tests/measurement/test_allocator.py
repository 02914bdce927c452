"""The C library's settings for what is measured; each in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from harness.measurement import allocator
from harness.measurement.latency import time_callables

torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(24, 2**20, dtype=torch.uint8)  # 24 MiB are 6144 pages
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20

{setting}
faults()
print(faults())
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def faults_per_block(setting: str) -> float:
    script = SCRIPT.format(setting=setting)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return float(ended.stdout)


@glibc
def test_timing_keeps_freed_memory():
    timed = "time_callables({'a': faults}, min_rounds=2, max_rounds=2, budget_s=0.01)"
    assert faults_per_block(timed) < 10


@glibc
def test_memory_is_measured_with_every_block_mapped():
    # a huge page is one fault for 512 pages, where the system hands those out
    assert faults_per_block("allocator.map_every_block()") >= 12
