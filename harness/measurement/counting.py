"""Counts as records: parameters and MACs of one module, each counter for itself.

A counter that fails is a record that says why; the others still count.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from harness.errors import ReplivitError, one_line
from harness.measurement.evaluation_form import ImageSize, evaluation_form
from harness.measurement.macs import MacsCount, count_macs, count_macs_distribution
from harness.measurement.macs_fvcore import count_macs_fvcore, explain_gap
from harness.measurement.params import count_params
from harness.record import Conditions, Record, make_record
from harness.registry import Variant
from harness.statistics import bootstrap_interval

#: How deep the module table in a record goes; the whole tree is `macs.breakdown`.
DETAIL_DEPTH = 2

Fields = dict[str, Any]


class ImagePack(NamedTuple):
    """Real images `(3, H, W)`, preprocessed, and the name of the data set they are from."""

    images: list[torch.Tensor]
    source: str


def image_pack(variant: Variant, image_size: ImageSize, count: int = 64) -> ImagePack:
    """Images to count a model over whose cost depends on them.

    They come from the variant's track, evenly spread over its test split; where that data set
    is not on this machine, from the embedded one.
    """
    from harness.data import create_transform, input_spec, load_split

    try:
        dataset = load_split(variant.track, "test")
    except ReplivitError:
        dataset = load_split("fashion_mini", "test")
    transform = create_transform(input_spec(variant), image_size)
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    return ImagePack([transform(dataset[int(i)][0]) for i in chosen], dataset.name)


class _Counters:
    """The counters of one module, each returning a record's fields; `macs` must run first."""

    def __init__(self, module: nn.Module, size: ImageSize | None, pack: ImagePack | None) -> None:
        self.module, self.size, self.pack = module, size, pack
        self.inputs = pack.images[0][None] if pack else None
        self.counted: MacsCount | None = None

    def macs(self) -> Fields:
        self.counted = found = count_macs(self.module, self.size, inputs=self.inputs)
        detail = {
            "by_operator": found.by_operator,
            "not_counted": {name: asdict(use) for name, use in found.unsupported.items()},
            "modules": found.modules.flat(DETAIL_DEPTH),
        }
        method = "torch FlopCounterMode / 2, evaluation form, batch 1, per image"
        if self.pack is None:
            return {"value": found.total, "method": method, "detail": detail}
        spread = count_macs_distribution(self.module, self.pack.images)
        detail |= {"p5": spread.p5, "p95": spread.p95, "values": list(spread.values)}
        detail["images"] = self.pack.source
        return {
            "value": spread.mean,
            "interval": bootstrap_interval(spread.values, np.mean) if spread.n > 1 else None,
            "n": spread.n,
            "method": f"{method}; mean over images, tables for the first one",
            "detail": detail,
        }

    def macs_fvcore(self) -> Fields:
        found = count_macs_fvcore(self.module, self.size, inputs=self.inputs)
        detail: Fields = {"by_operator": found.by_operator, "not_counted": found.unsupported}
        if self.counted is not None:
            gap = explain_gap(self.counted, found)
            detail["gap"] = {
                "macs": gap.macs,
                "relative": gap.relative,
                "notable": gap.notable,
                "reasons": [asdict(reason) for reason in gap.reasons],
            }
        method = "fvcore with our handlers, evaluation form, batch 1, per image"
        if self.pack is not None:
            method += f"; the first image of {self.pack.source} only"
        return {"value": found.total, "method": method, "detail": detail}


def _why(error: Exception) -> Fields:
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return {
        "value": None,
        "status": "out_of_memory" if out_of_memory else "failed",
        "reason": textwrap.shorten(kind + one_line(error), 300, placeholder=" ..."),
    }


def count_records(
    name: str,
    module: nn.Module,
    conditions: Conditions,
    run_id: str,
    variant: Variant | None = None,
    *,
    groups: Collection[str] = ("params", "macs"),
    images: ImagePack | None = None,
) -> list[Record]:
    """Count `module` by every counter that applies.

    Args:
        conditions: stored as given; `image_size` is the size that is counted (else the
            variant's own).
        variant: brings the paper's own rules, and says whether the cost depends on the image.
        groups: `params` and/or `macs`.
        images: to count over; `image_pack(variant)` when the cost depends on the image and
            none are given.

    Returns:
        Records of `params`, `params_trainable`, `macs`, `macs_fvcore`, and where the paper has
        a rule of its own `params_paper`, `macs_paper`. A counter that failed has no value, and
        a status and reason.
    """
    size = conditions.image_size or (variant.spec.image_size if variant else None)
    jobs: dict[str, Callable[[], Fields]] = {}
    if "params" in groups:
        jobs["params"] = lambda: _params(module, "total")
        jobs["params_trainable"] = lambda: _params(module, "trainable")
        if variant and variant.spec.paper_params:
            jobs["params_paper"] = lambda: _paper_rule(variant, "paper_params", module)
    if "macs" in groups:
        if images is None and variant and variant.spec.dynamic:
            images = image_pack(variant, size)
        counters = _Counters(module, size, images)
        jobs |= {"macs": counters.macs, "macs_fvcore": counters.macs_fvcore}
        if variant and variant.spec.paper_macs:
            jobs["macs_paper"] = lambda: _paper_rule(variant, "paper_macs", module, size)
    records = []
    for metric, job in jobs.items():
        started, tick = datetime.now(timezone.utc), time.perf_counter()
        try:
            fields = job()
        except Exception as error:  # one counter that cannot must not hide the others
            fields = _why(error)
        records.append(
            make_record(
                name,
                metric,
                fields.pop("value"),
                conditions,
                run_id=run_id,
                paper=variant.paper.key if variant else None,
                started=started,
                duration_s=time.perf_counter() - tick,
                **fields,
            )
        )
    return records


def _params(module: nn.Module, which: str) -> Fields:
    found = count_params(module)
    return {
        "value": getattr(found, which),
        "method": "elements of parameters, shared ones once",
        "detail": {"buffers": found.buffers} if which == "total" else {},
    }


def _paper_rule(variant: Variant, hook: str, module: nn.Module, *arguments: Any) -> Fields:
    rule = variant.hook(hook)
    with evaluation_form(module):
        value = rule(module, *arguments)
    return {"value": value, "method": f"the paper's rule: {getattr(variant.spec, hook)}"}
