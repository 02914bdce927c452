"""Measuring: `measure` gives records, `compare` says which of two models is faster.

A variant, named, is measured in a fresh process per group of metrics; a module cannot be rebuilt
from a name and is measured in the caller's process, which its records say.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from harness.errors import ReplivitError, one_line
from harness.measurement.cell import Cell, get_profile, groups_of
from harness.measurement.comparison import Comparison, compare
from harness.measurement.isolation import Worker, failed_records, run_isolated
from harness.record import Record, RecordStore, new_run_id
from harness.registry import get_variant

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Comparison", "compare", "measure"]


def measure(
    target: str | nn.Module,
    metrics: tuple[str, ...] = ("params", "macs", "latency", "memory"),
    *,
    batch_size: int = 1,
    device: str = "cpu",
    threads: int = 1,
    backend: str = "eager",
    dtype: str = "float32",
    image_size: int | None = None,
    num_classes: int | None = None,
    track: str | None = None,
    options: dict[str, Any] | None = None,
    profile: str = "quick",
    store: RecordStore | None = None,
    **effort: Any,
) -> list[Record]:
    """Measure a variant or a module.

    Args:
        target: a variant's name, or a module `(B, 3, H, W) -> (B, num_classes)`.
        metrics: of params, macs, latency, memory (memory_inference, memory_training), accuracy.
        backend: eager, deploy, compile, cuda_graph, channels_last, or several joined by "+".
        track: for accuracy; default the variant's own.
        options: of the variant's builder.
        profile: of latency: "quick" or "full"; `effort` changes single fields of it
            (`budget_s=30`, `half_width=0.01`, see `harness.measurement.latency.Effort`).
        store: where records are appended as each group is done; default nowhere.

    Returns:
        Records. What could not be measured is a record with status and reason, without a value.

    Raises:
        ReplivitError: a name, size, device or option that does not exist.
    """
    groups = groups_of(tuple(metrics))
    get_profile(profile)
    name = target if isinstance(target, str) else type(target).__name__
    if isinstance(target, str):
        variant = get_variant(target)
        name, track = variant.name, track or variant.track
    else:
        image_size = image_size or _image_size(target)
        if "accuracy" in groups and track is None:
            raise ReplivitError("the accuracy of a module needs a track")
    run_id = new_run_id()
    records: list[Record] = []
    with Worker(threads) as worker:
        for group in groups:
            cell = Cell(
                name, group, device=device, backend=backend, threads=threads, dtype=dtype,
                batch_size=batch_size, image_size=image_size, num_classes=num_classes,
                track=track, options=options or {}, profile=profile, effort=effort,
            )  # fmt: skip
            cell.check()
            if isinstance(target, str):
                made = run_isolated(cell, run_id, worker)
            else:
                made = _measure_here(cell, run_id, target)
            made = [record for record in made if _asked_for(record, metrics)]
            records += made
            if store is not None:
                store.append(made)
    return records


def _asked_for(record: Record, metrics: tuple[str, ...]) -> bool:
    """Counts come together; whoever asked for params alone gets params alone."""
    for counted in ("params", "macs"):
        if record.metric.startswith(counted):
            return counted in metrics
    return True


def _image_size(module: nn.Module) -> int:
    """The side of the images a timm model was made for."""
    config = getattr(module, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    if not size:
        raise ReplivitError(
            f"say image_size: a {type(module).__name__} does not tell what images it takes"
        )
    return int(size[-1])


def _measure_here(cell: Cell, run_id: str, module: nn.Module) -> list[Record]:
    """A module in this process, on a copy, since placing and training steps change a model."""
    from harness.measurement.tasks import measure_cell

    try:
        return measure_cell(cell, run_id, module=copy.deepcopy(module))
    except MemoryError as error:
        status, reason = "out_of_memory", one_line(error)
    except Exception as error:
        status, reason = "failed", one_line(error)
    return failed_records(cell, run_id, status, reason)
