"""Latency of every part at every width, measured once on this machine (Sec. 4.2).

A network's latency is then the sum of its parts, which makes judging a candidate free. The paper
states the table for 4D and 3D blocks on a phone; stem, strided convolutions and head are in it as
well here, since a stage's width changes them too. Parts are timed in their deployment form, as a
network would run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from harness import ReplivitError, deploy
from harness.measurement.latency import Effort
from harness.measurement.side_by_side import time_calls

from .blocks import Embedding, Meta3D, Meta4D, init_linear, stem
from .supernet import GRID, Architecture, SuperNet

#: Many small parts share one session, so each gets little time; rounds make up for it.
EFFORT = Effort(
    budget_s=20.0, min_rounds=5, palindromes=1, block_s=0.003, warm_up_s=0.02, warm_up_limit_s=0.2
)


class Head(nn.Module):
    """What follows the last block: norm, mean over tokens, classifier."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x).mean(dim=1))


@dataclass(frozen=True)
class LatencyTable:
    """Seconds per part; `latency` adds them up.

    Attributes:
        seconds: key of a part (`parts` makes them) -> median seconds per call.
        conditions: batch size, threads, device and how the timing went.
    """

    seconds: dict[str, float]
    conditions: dict[str, object] = field(default_factory=dict)

    def latency(self, architecture: Architecture) -> float:
        """Seconds per call of the whole network.

        Raises:
            ReplivitError: a part was never measured.
        """
        try:
            return sum(self.seconds[key] for key in parts(architecture))
        except KeyError as error:
            raise ReplivitError(f"the latency table has no entry {error.args[0]!r}") from None

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(json.dumps(vars(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))


def parts(architecture: Architecture) -> Iterator[str]:
    """The keys of all parts of a network: `stem/32`, `4d/0/32`, `embedding/0/32/64`, `head/96`."""
    widths = architecture.widths
    yield f"stem/{widths[0]}"
    for stage, _, kind in architecture.blocks():
        yield f"{kind}/{stage}/{widths[stage]}"
    for stage, (width, following) in enumerate(itertools.pairwise(widths)):
        yield f"embedding/{stage}/{width}/{following}"
    yield f"head/{widths[-1]}"


def modules(supernet: SuperNet) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Every part of the supernet's space: key -> (module, shape of its input without batch)."""
    options, widths = supernet.build_options, supernet.largest.widths
    attention = {name: options[name] for name in ("key_dim", "num_heads", "attn_ratio")}
    grids = [range(GRID, width + 1, GRID) for width in widths]
    sizes = supernet.resolutions
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    for width in grids[0]:
        found[f"stem/{width}"] = (
            stem(3, width, options.get("strides", (2, 2))), (3, *supernet.image_size)
        )  # fmt: skip
    for stage, (grid, size) in enumerate(zip(grids, sizes, strict=True)):
        for width in grid:
            found[f"4d/{stage}/{width}"] = (Meta4D(width), (width, *size))
            if "3d" in supernet.largest.paths[stage]:
                block = Meta3D(width, resolution=size, **attention)
                found[f"3d/{stage}/{width}"] = (block, (size[0] * size[1], width))
    for stage, pair in enumerate(itertools.pairwise(grids)):
        for width, following in itertools.product(*pair):
            embedding = Embedding(in_chans=width, embed_dim=following)
            found[f"embedding/{stage}/{width}/{following}"] = (embedding, (width, *sizes[stage]))
    tokens = sizes[-1][0] * sizes[-1][1]
    for width in grids[-1]:
        found[f"head/{width}"] = (Head(width, options["num_classes"]), (tokens, width))
    return found


def measure_table(
    supernet: SuperNet,
    batch_size: int = 1,
    threads: int = 1,
    device: str = "cpu",
    effort: Effort = EFFORT,
) -> LatencyTable:
    """Time every part of the space, all interleaved, with the harness's latency instrument."""
    calls = {}
    for key, (module, shape) in modules(supernet).items():
        module.apply(init_linear)
        image = torch.randn(batch_size, *shape)
        if len(shape) == 3:
            image = image.contiguous(memory_format=torch.channels_last)
        deployed = deploy(module, example_inputs=(image,)).to(device)
        calls[key] = _call(deployed, image.to(device))
    timings = time_calls(calls, device=device, threads=threads, effort=effort)
    return LatencyTable(
        {key: timing.median for key, timing in timings.items()},
        {
            "batch_size": batch_size, "threads": threads, "device": device,
            "rounds": len(next(iter(timings.values())).rounds),
            "noisy": sum(timing.status != "ok" for timing in timings.values()),
        },
    )  # fmt: skip


def _call(module: nn.Module, image: torch.Tensor) -> Callable[[], object]:
    return lambda: module(image)


def measure_networks(
    architectures: Sequence[Architecture],
    supernet: SuperNet,
    batch_size: int = 1,
    threads: int = 1,
    device: str = "cpu",
    budget_s: float = 20.0,
) -> list[tuple[float, tuple[float, float]]]:
    """Measured seconds per call of whole deployed networks, interleaved: (median, interval)."""
    calls = {}
    shape = (batch_size, 3, *supernet.image_size)
    for index, architecture in enumerate(architectures):
        network = deploy(architecture.build(**supernet.build_options), supernet.image_size)
        calls[str(index)] = _call(network.to(device), torch.randn(shape).to(device))
    timings = time_calls(calls, device=device, threads=threads, budget_s=budget_s, warm_up_s=0.2)
    return [(one.median, one.interval) for one in timings.values()]
