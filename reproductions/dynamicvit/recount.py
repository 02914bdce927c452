"""Printed parameters and MACs of every model that can be built here, counted again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import harness
from harness import Finding
from harness.measurement.macs_fvcore import count_macs_fvcore

if TYPE_CHECKING:
    from harness.paper import Published

#: Half of the last printed digit, for rows whose tolerance `paper.yaml` does not give; and the
#: relative tolerance of the paper's MACs, which are counted by hand.
ROUNDING, BY_HAND = {"macs_g": 0.05, "params_m": 0.05}, 0.035


@dataclass(frozen=True)
class Model:
    """A variant of this or another paper, and options of its builder."""

    variant: str
    image_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """In evaluation mode, weights from seed 0."""
        torch.manual_seed(0)
        return harness.build(self.variant, image_size=self.image_size, **self.options).eval()


def unpruned(base: str) -> Model:
    """An unpruned parent that no other paper here has."""
    return Model(f"dynamicvit_{base}_k07", options={"pruning_loc": []})


#: Printed rows that are no variant by themselves: dense parents, and other image sizes.
PRINTED = {
    "DeiT-S": Model("deit_s"),
    "DeiT-B": Model("deit_b"),
    "DeiT-Base/16": Model("deit_b"),
    "ViT-Base/16": Model("vit_b16"),
    "Swin-T": Model("swin_t"),
    "LV-ViT-S": unpruned("lvvit_s"),
    "LV-ViT-M": unpruned("lvvit_m"),
    "DeiT-S-384": Model("deit_s", 384),
    "DynamicViT-S-384/0.7": Model("dynamicvit_deit_s_k07", 384),
    "DynamicViT-S-384/0.5": Model("dynamicvit_deit_s_k05", 384),
}


@dataclass(frozen=True)
class Recount:
    """A printed count beside ours by the paper's rule, in the printed unit.

    Attributes:
        tolerance: of the comparison. The authors' MACs are by hand, or cut off (`paper.yaml`).
        reason: why a difference is expected, if it is.
    """

    name: str
    metric: str
    printed: float
    counted: float
    unit: str
    source: str
    tolerance: float
    reason: str | None = None

    @property
    def relative(self) -> float:
        """How far ours lies above the printed number."""
        return self.counted / self.printed - 1

    @property
    def finding(self) -> Finding:
        """Whether both are equal within the tolerance."""
        held = abs(self.counted - self.printed) <= self.tolerance + 1e-9
        what = "parameters" if self.metric == "params_m" else "MACs"
        return Finding(
            f"{self.name} has {self.printed:g} {self.unit} {what} ({self.source})",
            "reproduced" if held else "deviates",
            f"{self.counted:.3f} {self.unit} by the paper's rule, {self.relative:+.1%} (within "
            f"{self.tolerance:g} {self.unit} is equal)"
            + (f"; {self.reason}" if self.reason else ""),
        )


def recount_printed() -> list[Recount]:
    """Every printed number of parameters and MACs of a model that can be built here."""
    counts: dict[str, tuple[int, int]] = {}
    found: dict[tuple, Recount] = {}
    for row in harness.get_paper("dynamicvit").facts.published:
        model = Model(row.of) if row.of else PRINTED.get(row.variant)
        if row.metric not in ROUNDING or model is None:
            continue
        key = f"{model}"
        if key not in counts:
            counts[key] = _count(model)
        params, macs = counts[key]
        ours = params / 1e6 if row.metric == "params_m" else macs / 1e9
        one = Recount(
            row.variant, row.metric, float(row.value), ours, row.unit, row.source,
            _tolerance(row), row.reason,
        )  # fmt: skip
        # a table that repeats another's number adds nothing
        found.setdefault((one.name, one.metric, one.printed), one)
    return list(found.values())


def _tolerance(row: Published) -> float:
    """Of a printed count, in its unit."""
    if row.tolerance is not None:
        return row.tolerance
    by_hand = row.metric == "macs_g" and row.variant.startswith("Dynamic")
    if by_hand and row.source.startswith("paper"):
        return round(BY_HAND * float(row.value), 2)
    return ROUNDING[row.metric]


def _count(model: Model) -> tuple[int, int]:
    """Parameters, and multiply-adds as `calc_flops.py` of the official code counts them."""
    built = model.build()
    size = model.image_size or harness.get_variant(model.variant).spec.image_size
    return sum(one.numel() for one in built.parameters()), count_macs_fvcore(built, size).total
