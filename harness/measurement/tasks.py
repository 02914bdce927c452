"""From a cell to its records, in the process that calls: what a child process does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from harness.errors import ReplivitError
from harness.measurement import memory, yardstick
from harness.measurement.backends import (
    Prepared,
    bring_into_form,
    parse_backend,
    place_images,
    prepare,
)
from harness.measurement.cell import Cell, get_profile
from harness.record import Record, make_record
from harness.registry import Variant, build, get_variant

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.measurement.latency import Timing

#: The word in a record's detail that says where it was measured.
FRESH, SHARED = "fresh process", "the caller's process"


@contextmanager
def torch_settings(cell: Cell):
    """Threads as the cell says and full float32 precision; the caller's values come back after."""
    import torch

    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_num_threads(cell.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


class Subject:
    """The model of a cell: a variant built with seed 0, or a module of the caller's."""

    def __init__(self, cell: Cell, name: str, module: nn.Module | None = None) -> None:
        self.cell = cell
        self.name = name
        self.variant: Variant | None = None
        if module is None:
            import torch

            self.variant = get_variant(name)
            torch.manual_seed(0)
            module = build(name, cell.num_classes, cell.image_size, **cell.options)
        self.model = module.eval()
        self.conditions = cell.variant_conditions(self.variant)
        self.isolation = FRESH if self.variant else SHARED

    def record(self, run_id: str, metric: str, value: float | int, **fields: Any) -> Record:
        """A record of this subject; `detail` also says in which process it was made."""
        detail = {"isolation": self.isolation, **fields.pop("detail", {})}
        paper = self.variant.paper.key if self.variant else None
        return make_record(
            self.name, metric, value, self.conditions,
            run_id=run_id, paper=paper, detail=detail, **fields,
        )  # fmt: skip

    def images(self) -> tuple[list[torch.Tensor], str]:
        """Batches `(B, 3, H, W)` on the CPU, and in words what they are."""
        cell, size = self.cell, self.conditions.image_size
        if self.variant and self.variant.spec.dynamic:
            found, source = yardstick.real_images(self.variant, cell.batch_size, size)
            return found, f"test images of {source}"
        made = yardstick.seeded_images(cell.batch_size, size)
        return made, "normal noise, seed 0"

    def prepared(self) -> tuple[Prepared, list[torch.Tensor], str]:
        """The model in the cell's backend, called once with each of its (placed) inputs."""
        cell = self.cell
        images, what = self.images()
        words = parse_backend(cell.backend, cell.device)
        placed = place_images(images, words, cell.device, cell.dtype)
        done = prepare(self.model, words, placed, device=cell.device, dtype=cell.dtype)
        return done, placed, what


def _cycled(run: Callable, images: Iterable) -> Callable[[], object]:
    """A call without arguments that goes round the inputs."""
    ring = itertools.cycle(images)
    return lambda: run(next(ring))


def _timed_fields(timing: Timing, ratio: bool = False) -> dict[str, Any]:
    """Interval, n and status of a timing's median, or of its ratio, as record fields."""
    if ratio:
        return {
            "interval": timing.ratio_interval, "n": timing.session.rounds,
            "status": timing.ratio_status, "reason": timing.ratio_reason,
        }  # fmt: skip
    return {
        "interval": timing.interval, "n": timing.session.rounds,
        "status": timing.status, "reason": timing.reason,
    }  # fmt: skip


def latency_records(cell: Cell, subject: Subject, run_id: str) -> list[Record]:
    """Latency, its ratio to the yardstick, and the first call."""
    from harness.measurement.latency import time_callables

    started, tick = datetime.now(timezone.utc), time.perf_counter()
    gauge = yardstick.build_yardstick(cell.device)
    noise = yardstick.seeded_images(cell.batch_size, yardstick.IMAGE_SIZE, count=2)
    gauge_images = place_images(noise, ("eager",), cell.device, "float32")
    gauge(gauge_images[0])  # so that starting the libraries is not in the model's first call
    prepared, images, what = subject.prepared()
    effort = replace(get_profile(cell.profile), **cell.effort)
    with prepared.steady():
        timings = time_callables(
            {"yardstick": _cycled(gauge, gauge_images), "model": _cycled(prepared.run, images)},
            effort=effort,
            device=cell.device,
        )
    own, duration = timings["model"], time.perf_counter() - tick
    common = {"started": started, "duration_s": duration}
    detail = {
        **own.detail(), "input": f"{len(images)} batches of {what}", "yardstick": yardstick.NAME,
        "yardstick_median": timings["yardstick"].median,
    }  # fmt: skip
    return [
        subject.record(
            run_id, "latency", own.median, **_timed_fields(own), **common, detail=detail,
            method="median over ABBA rounds beside the yardstick, bootstrap over rounds; freed "
            "memory is kept",
        ),
        subject.record(
            run_id, "latency_ratio", own.ratio, **_timed_fields(own, ratio=True), **common,
            detail={"yardstick": yardstick.NAME},
            method="median of paired ratios to the yardstick, bootstrap over rounds",
        ),
        subject.record(
            run_id, "first_call", prepared.first_call_s, n=1, **common,
            method="wall time of the first forward pass, compilation and capture included",
        ),
    ]  # fmt: skip


def compare_records(
    cell: Cell, subject: Subject, run_id: str, rival: nn.Module | None = None
) -> list[Record]:
    """Latency of the cell's variant and of its rival, timed against each other.

    The second record's `detail["ratio"]` is rival over variant. No yardstick takes part.
    """
    from harness.measurement.latency import time_callables

    started, tick = datetime.now(timezone.utc), time.perf_counter()
    # each with its own default size and classes; options of the builder go to both
    subjects = [subject, Subject(replace(cell, variant=cell.rival), cell.rival, rival)]
    with ExitStack() as stack:
        calls = {}
        for side, one in zip("ab", subjects, strict=True):
            prepared, images, _ = one.prepared()
            stack.enter_context(prepared.steady())
            calls[side] = _cycled(prepared.run, images)
        effort = replace(get_profile(cell.profile), **cell.effort)
        timings = time_callables(calls, effort=effort, device=cell.device)
    duration = time.perf_counter() - tick
    return [
        one.record(
            run_id, "latency", timing.median, **_timed_fields(timing),
            started=started, duration_s=duration,
            detail={
                **timing.detail(),
                "ratio_status": timing.ratio_status, "ratio_reason": timing.ratio_reason,
            },
            method="median over ABBA rounds of the pair, bootstrap over rounds",
        )
        for one, timing in zip(subjects, timings.values(), strict=True)
    ]  # fmt: skip


def memory_records(cell: Cell, subject: Subject, run_id: str) -> list[Record]:
    """Peak memory of inference in the cell's backend, or of a training step of the model."""
    started, tick = datetime.now(timezone.utc), time.perf_counter()
    images, what = subject.images()
    if not (subject.variant and subject.variant.spec.dynamic):
        images = images[:2]  # every further pass would take the same memory
    words = parse_backend(cell.backend, cell.device)
    placed = place_images(images, words, cell.device, cell.dtype)
    if cell.group == "memory_training" and set(words) & {"deploy", "compile", "cuda_graph"}:
        raise ReplivitError(f"a training step is measured as it is, not with {cell.backend}")
    if set(words) & {"compile", "cuda_graph"}:  # compiling takes memory of its own
        model = subject.model
        run = prepare(model, words, placed, device=cell.device, dtype=cell.dtype).run
    else:
        model = run = bring_into_form(
            subject.model, words, placed[0].shape[-1], cell.device, cell.dtype
        )
    if cell.group == "memory_inference":
        use = memory.inference_memory(model, placed, run, cell.device)
    else:
        use = memory.training_memory(model, placed, cell.device)
    return [
        subject.record(
            run_id, cell.group, use.peak, n=1, method=use.method,
            started=started, duration_s=time.perf_counter() - tick,
            detail={**use.detail(), "input": f"{len(placed)} batches of {what}"},
        )
    ]  # fmt: skip


def measure_cell(
    cell: Cell,
    run_id: str,
    module: nn.Module | None = None,
    rival: nn.Module | None = None,
) -> list[Record]:
    """Measure one cell here and now.

    Args:
        module: measured in place of the cell's variant, whose name it then only borrows; the
            caller hands over a copy where a training step must not change the weights.
        rival: likewise for the second model of a `compare` cell.

    Raises:
        ReplivitError: the cell cannot be measured; whatever the model raises comes through.
    """
    if cell.group == "accuracy":
        from harness.evaluation import evaluate

        target = cell.variant if module is None else module
        return evaluate(
            target, cell.track, device=cell.device, dtype=cell.dtype, run_id=run_id,
            image_size=cell.image_size, options=cell.options, name=cell.variant,
        )  # fmt: skip
    with torch_settings(cell):
        subject = Subject(cell, cell.variant, module)
        if cell.group == "counts":
            from harness.measurement.counting import count_records

            return count_records(
                subject.name, subject.model, subject.conditions, run_id, variant=subject.variant
            )
        if cell.group == "latency":
            return latency_records(cell, subject, run_id)
        if cell.group == "compare":
            return compare_records(cell, subject, run_id, rival)
        return memory_records(cell, subject, run_id)
