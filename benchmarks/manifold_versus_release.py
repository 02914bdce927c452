"""Manifold distillation: our losses against the released ones, in time and in memory.

The authors' `losses.py` is imported from your own checkout of their repository:

    git clone https://github.com/Hao840/manifold-distillation
    python benchmarks/manifold_versus_release.py --authors manifold-distillation
    python benchmarks/manifold_versus_release.py --authors manifold-distillation --pairs 8

Both get the features of the released pair, DeiT-Ti (197 tokens, 192 wide) and CaiT-S24 (196, 384),
and the same random rows; losses and gradients are compared first, since a speed counts only for the
same function. What is timed is the three weighted terms of all layer pairs, forward and backward,
in alternation in this process. Memory is the peak above a process that holds the features already,
each form in a fresh process. The bars: equal to 1e-5, not slower, and at least three times less
memory at batch 256.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from race import Table, race_parser, run, speedup, take_turns
from torch import Tensor, nn

from harness.errors import ReplivitError
from harness.measurement.allocator import map_every_block
from harness.measurement.memory import measure_peak
from reproductions.manifold_distillation.losses import Weights
from reproductions.manifold_distillation.method import manifold_terms

NUM_SAMPLES = 192
#: The bar of memory, and the batch from which it holds: below, the matrices are not the most of it.
LESS_MEMORY, LARGE_BATCH = 3.0, 256
STUDENT, TEACHER = (197, 192), (196, 384)
Loss = Callable[[], Tensor]


def load_theirs(checkout: Path) -> ModuleType:
    """Their `losses.py`.

    Raises:
        ReplivitError: `checkout` is not their repository.
    """
    path = checkout / "losses.py"
    if not path.is_file():
        raise ReplivitError(f"{path} is missing: is {checkout} a checkout of the authors' code?")
    spec = importlib.util.spec_from_file_location("manifold_losses_of_the_authors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(batch: int, pairs: int) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens of `pairs` layers of student (with gradient) and teacher."""
    torch.manual_seed(0)
    student = [torch.randn(batch, *STUDENT).requires_grad_() for _ in range(pairs)]
    return student, [torch.randn(batch, *TEACHER) for _ in range(pairs)]


def forms(student: list[Tensor], teacher: list[Tensor], theirs: ModuleType) -> dict[str, Loss]:
    """The whole manifold loss by the released code and by ours; both draw their rows with
    `torch.randperm`, once for every pair."""
    weights, layers = Weights(), range(len(student))

    def released() -> Tensor:
        return sum(
            theirs.mf_loss(
                student, teacher, layers, layers, NUM_SAMPLES, weights.sample, weights.patch,
                weights.rand,
            )
        )  # fmt: skip

    def ours() -> Tensor:
        return manifold_terms(student, teacher, weights, num_samples=NUM_SAMPLES)["manifold"]

    return {"released": released, "ours": ours}


def step(loss: Loss, student: list[Tensor]) -> float:
    """Forward and backward; the gradients stay on the features."""
    for one in student:
        one.grad = None
    torch.manual_seed(1)
    with torch.inference_mode(False), torch.enable_grad():  # timings run without gradients
        value = loss()
        value.backward()
    return value.item()


def largest_error(calls: dict[str, Loss], student: list[Tensor]) -> float:
    """The larger relative error of ours: of the loss, and of its gradients."""
    values, grads = {}, {}
    for name, loss in calls.items():
        values[name] = step(loss, student)
        grads[name] = torch.stack([one.grad for one in student])
    wanted = grads["released"]
    off = (grads["ours"] - wanted).double().norm() / wanted.double().norm()
    return max(abs(values["ours"] / values["released"] - 1), off.item())


def peak_bytes(form: str, batch: int, pairs: int, checkout: Path) -> int:
    """Peak of one step above a process that holds the features; to be asked of a fresh process."""
    map_every_block()
    small = features(2, 1)
    step(forms(*small, load_theirs(checkout))[form], small[0])  # one-time tables and pools
    student, teacher = features(batch, pairs)
    loss = forms(student, teacher, load_theirs(checkout))[form]
    return measure_peak(lambda: step(loss, student), nn.Identity(), "cpu").work


def peak_of_fresh_process(form: str, batch: int, arguments: argparse.Namespace) -> float:
    """The same in MB, asked of a process of its own.

    Raises:
        ReplivitError: it failed.
    """
    command = [
        sys.executable, __file__, "--authors", str(arguments.authors), "--batch", str(batch),
        "--pairs", str(arguments.pairs), "--peak-of", form,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise ReplivitError(f"the memory of the {form} form could not be measured: {words[0]}")
    return int(done.stdout) / 1e6


def compare(batch: int, arguments: argparse.Namespace, table: Table) -> None:
    """One batch size: both take turns, and their memory is measured."""
    student, teacher = features(batch, arguments.pairs)
    losses = forms(student, teacher, load_theirs(arguments.authors))
    error = largest_error(losses, student)
    timings = take_turns(
        {name: lambda loss=loss: step(loss, student) for name, loss in losses.items()}, arguments
    )
    peaks = {name: peak_of_fresh_process(name, batch, arguments) for name in losses}
    less = peaks["released"] / peaks["ours"]
    for name, own in timings.items():
        ours, note = name == "ours", f"{peaks[name]:8.1f} MB"
        enough = batch < LARGE_BATCH or less >= LESS_MEMORY
        table.row(
            f"{arguments.pairs} pair(s) of layers", batch, name, own, error=error if ours else None,
            good=not ours or (speedup(own).value >= 1 and enough),
            note=f"{note}, {less:.1f}x less" if ours else note,
        )  # fmt: skip


def main() -> bool:
    parser = race_parser(__doc__, budget_s=30.0, batch=(8, 64, 256))
    parser.add_argument("--pairs", type=int, default=1, help="of layers; the released run has 8")
    parser.add_argument("--peak-of", choices=("released", "ours"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        (batch,) = arguments.batch
        print(peak_bytes(arguments.peak_of, batch, arguments.pairs, arguments.authors))
        return True
    table = Table()
    for batch in arguments.batch:
        compare(batch, arguments, table)
    return table.passed


if __name__ == "__main__":
    run(main)
