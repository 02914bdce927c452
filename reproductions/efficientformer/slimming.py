"""Gradual slimming: from the supernet to a network that meets a latency (Sec. 4.2).

Step by step one of three actions is taken: leave out the least important MetaPath, turn the first
3D block into a 4D block, or narrow the least important stage by 16 channels; namely the one that
loses the least accuracy per millisecond saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from harness import ReplivitError

from .latency_table import LatencyTable
from .supernet import GRID, Architecture

Importance = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class Step:
    """The network after an action; the first step is the start.

    Attributes:
        latency_s: of the table, seconds per call.
        accuracy: in percent, with inherited weights.
        drop_per_ms: percentage points lost per millisecond saved by this action.
    """

    action: str
    architecture: Architecture
    latency_s: float
    accuracy: float
    drop_per_ms: float = 0.0


def actions(architecture: Architecture, importance: Importance) -> dict[str, Architecture]:
    """The candidates of one step, by name: at most one of each kind.

    Every stage keeps at least one block and 16 channels (the paper does not say).
    """
    found = {}
    blocks = list(architecture.blocks())
    depths = architecture.depths
    spare = [(stage, at) for stage, at, _ in blocks if depths[stage] > 1]
    if spare:
        stage, at = min(spare, key=lambda place: importance[place])
        found["remove path"] = architecture.with_path(stage, at, "identity")
    for stage, at, kind in blocks:
        if kind == "3d":
            found["3D to 4D"] = architecture.with_path(stage, at, "4d")
            break
    wide = [stage for stage, width in enumerate(architecture.widths) if width > GRID]
    if wide:
        stage = min(wide, key=lambda one: _stage_importance(architecture, importance, one))
        width = architecture.widths[stage] - GRID
        found["narrow stage"] = architecture.with_width(stage, width)
    return found


def _stage_importance(architecture: Architecture, importance: Importance, stage: int) -> float:
    """Sum over the stage's paths that are left."""
    return sum(importance[one, at] for one, at, _ in architecture.blocks() if one == stage)


def slim(
    start: Architecture,
    target_s: float,
    table: LatencyTable,
    score: Callable[[Architecture], float],
    importance: Importance,
    random: np.random.Generator | None = None,
) -> list[Step]:
    """Act until the table's latency is at most `target_s`; returns all steps.

    Only actions that save time count as candidates, so the latency falls with every step.

    Args:
        score: accuracy in percent of a network with inherited weights.
        random: if given, actions are drawn from it instead (the rival that looks at nothing).

    Raises:
        ReplivitError: the target lies below what slimming can reach.
    """
    steps = [Step("start", start, table.latency(start), score(start))]
    while steps[-1].latency_s > target_s:
        last = steps[-1]
        candidates = []
        for name, architecture in actions(last.architecture, importance).items():
            latency = table.latency(architecture)
            if latency < last.latency_s:
                candidates.append((name, architecture, latency))
        if not candidates:
            raise ReplivitError(
                f"slimming ends at {last.latency_s * 1e3:.3f} ms; the target of "
                f"{target_s * 1e3:.3f} ms cannot be reached in this space"
            )
        if random is not None:
            candidates = [candidates[random.integers(len(candidates))]]
        outcomes = []
        for name, architecture, latency in candidates:
            accuracy = score(architecture)
            saved_ms = (last.latency_s - latency) * 1e3
            drop = (last.accuracy - accuracy) / saved_ms
            outcomes.append(Step(name, architecture, latency, accuracy, drop))
        steps.append(min(outcomes, key=lambda step: step.drop_per_ms))
    return steps


def scale_uniformly(start: Architecture, target_s: float, table: LatencyTable) -> Architecture:
    """The rival: all widths of `start` times one factor (to multiples of 16), the widest in time.

    Raises:
        ReplivitError: even 16 channels everywhere are too slow.
    """
    for factor in np.linspace(1, 0, 201):
        widths = [max(GRID, round(width * factor / GRID) * GRID) for width in start.widths]
        scaled = Architecture(tuple(widths), start.paths)
        if table.latency(scaled) <= target_s:
            return scaled
    raise ReplivitError(f"no uniform width meets {target_s * 1e3:.3f} ms")


@torch.no_grad()
def recalibrate(network: nn.Module, images: Tensor, batch_size: int = 250) -> None:
    """Take batch norm statistics from `images`: a chosen path sees other inputs than the mixture.

    The paper does not mention it; without it most networks with inherited weights answer at random.
    """
    norms = [one for one in network.modules() if isinstance(one, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    network.train()
    for batch in images.split(batch_size):
        network(batch)
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Share of right answers in percent."""
    network.eval()
    right = [
        (network(batch).argmax(dim=1) == expected).sum()
        for batch, expected in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return 100 * float(torch.stack(right).sum()) / len(labels)
