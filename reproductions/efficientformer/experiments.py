"""Tables that need no ImageNet: which operators cost time, and what the parts of the network cost.

The paper's statements are about one phone. Here they are asked again of this machine; what comes
out is decided by the intervals, and may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import harness
from harness import Conditions, ExperimentResult, Finding
from harness.measurement.latency import Timing
from harness.measurement.macs import count_macs
from harness.measurement.side_by_side import time_calls
from harness.meta import on_meta
from harness.settings import of_scale

from .blocks import Meta3D, Meta4D, stem
from .conventions import macs as official_macs
from .conventions import params as official_params
from .model import EfficientFormer, Flatten, Unflatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Seconds of timing for one group of operators.
BUDGETS = {"small": 4.0, "paper": 30.0}
L1 = dict(depths=[3, 2, 6, 4], widths=[48, 96, 224, 448], num_3d=1)


# ---- operators -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Operators that do the same job; ratios are to the first."""

    name: str
    shape: tuple[int, ...]  # of one input, without batch
    members: dict[str, nn.Module]


class Reshaped(nn.Module):
    """A token block inside a network of maps: to tokens and back, moved in memory each time."""

    def __init__(self, block: nn.Module, resolution: tuple[int, int]) -> None:
        super().__init__()
        self.inside = nn.Sequential(Flatten(resolution), block, Unflatten(resolution))

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x).contiguous()


def conv_block(width: int, norm: Callable[[int], nn.Module], act: type[nn.Module]) -> nn.Module:
    """The 4D block's MLP with another norm or activation: `(B, C, H, W) -> (B, C, H, W)`."""
    return nn.Sequential(
        nn.Conv2d(width, 4 * width, 1), norm(4 * width), act(),
        nn.Conv2d(4 * width, width, 1), norm(width),
    )  # fmt: skip


def group_norm(width: int) -> nn.Module:
    """A layer norm over a whole map: group norm with one group."""
    return nn.GroupNorm(1, width)


class TokenMlp(nn.Module):
    """The 3D block's MLP alone: LN, linear, GELU, linear, with the residual: `(B, N, C)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        block = Meta3D(width, num_heads=1, resolution=1)
        self.norm, self.mlp = block.norm2, block.mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class MapMlp(nn.Module):
    """The 4D block's MLP alone with the residual: `(B, C, H, W)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = Meta4D(width).mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def _folded(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    return harness.deploy(module, example_inputs=(torch.randn(1, *shape),))


def groups(width: int = 224, side: int = 14, depth: int = 4, image_size: int = 224) -> list[Group]:
    """The five questions of the paper's analysis, by default at the sizes of L1's third stage."""
    shape, size = (width, side, side), (side, side)

    def chain(block: Callable[[], nn.Module]) -> nn.Sequential:
        return nn.Sequential(*(block() for _ in range(depth)))

    def token_block() -> nn.Module:
        return Meta3D(width, resolution=size)

    return [
        Group("patch embedding", (3, image_size, image_size), {
            "two 3x3, stride 2": _folded(stem(3, 48), (3, image_size, image_size)),
            "7x7, stride 4": nn.Conv2d(3, 48, 7, 4, 2),
            "16x16, stride 16": nn.Conv2d(3, width, 16, 16),
        }),
        Group("MLP at equal MACs", shape, {
            "4D: 1x1 convolution, folded BN": _folded(MapMlp(width), shape),
            "3D: LN, linear": nn.Sequential(Flatten(size), TokenMlp(width), Unflatten(size)),
        }),
        Group("reshaping attention blocks", shape, {
            "once": nn.Sequential(Flatten(size), chain(token_block), Unflatten(size)),
            "in every block": chain(lambda: Reshaped(token_block(), size)),
        }),
        Group("norm", shape, {
            "BN, folded": conv_block(width, lambda _: nn.Identity(), nn.GELU),
            "BN": conv_block(width, nn.BatchNorm2d, nn.GELU),
            "LN over the map": conv_block(width, group_norm, nn.GELU),
        }),
        Group("activation", shape, {
            name: conv_block(width, lambda _: nn.Identity(), act)
            for name, act in (("GELU", nn.GELU), ("ReLU", nn.ReLU), ("HardSwish", nn.Hardswish))
        }),
    ]  # fmt: skip


def _call(module: nn.Module, image: Tensor) -> Callable[[], object]:
    return lambda: module(image)


def _time(group: Group, batch_size: int, threads: int, device: str, budget_s: float):
    torch.manual_seed(0)
    image = torch.randn(batch_size, *group.shape, device=device)
    image = image.contiguous(memory_format=torch.channels_last)  # as maps are in the network
    calls = {name: _call(one.eval().to(device), image) for name, one in group.members.items()}
    return time_calls(calls, device=device, threads=threads, budget_s=budget_s, warm_up_s=0.1)


#: claim, group, the operator said to be slower than the group's first, and by how much (if said).
CLAIMS = (
    ("A patch embedding with a big kernel is slower than two 3x3 convolutions of stride 2",
     "patch embedding", "7x7, stride 4"),
    ("Linear with layer norm is slower than convolution with a folded batch norm",
     "MLP at equal MACs", "3D: LN, linear"),
    ("Reshaping in every block is slower than reshaping once",
     "reshaping attention blocks", "in every block"),
    ("A layer norm costs time that a folded batch norm does not", "norm", "LN over the map"),
    ("HardSwish is slower than GELU", "activation", "HardSwish"),
)  # fmt: skip


def slower(claim: str, timing: Timing) -> Finding:
    """Whether `timing` is slower than the first of its group, by the interval of the ratio."""
    low, high = timing.ratio_interval
    outcome = "reproduced" if low > 1 else "deviates"
    seen = "" if not low <= 1 <= high else "; no difference detected"
    state = "" if timing.ratio_status == "ok" else f"; {timing.ratio_status}"
    return Finding(
        claim, outcome, f"{timing.ratio:.2f} times the time [{low:.2f}, {high:.2f}]{seen}{state}"
    )


def operator_latency(
    scale: str = "small",
    *,
    batch_size: int = 1,
    threads: int = 1,
    device: str = "cpu",
    width: int = 224,
    side: int = 14,
    budget_s: float | None = None,
) -> ExperimentResult:
    """Which operators cost time on this machine (the questions behind the paper's Fig. 2).

    Args:
        width, side: channels and map of the blocks (default: L1's third stage).
        budget_s: seconds of timing per group.
    """
    budget = budget_s or of_scale(BUDGETS, scale)
    rows, timings = [], {}
    for group in groups(width, side):
        timed = timings[group.name] = _time(group, batch_size, threads, device, budget)
        for name, timing in timed.items():
            low, high = timing.ratio_interval
            count = count_macs(group.members[name].cpu(), inputs=torch.zeros(1, *group.shape))
            rows.append({
                "question": group.name,
                "operator": name,
                "MACs (M)": round(count.total / 1e6, 2),
                "time (ms)": round(timing.median * 1e3, 4),
                "x first": round(timing.ratio, 3),
                "interval": f"{low:.3f} to {high:.3f}",
                "status": timing.ratio_status,
            })  # fmt: skip
    findings = [slower(claim, timings[group][name]) for claim, group, name in CLAIMS]
    return ExperimentResult(
        rows,
        findings,
        published=[
            {"model": "L3 with GELU", "latency (ms)": 3.0, "device": "iPhone 12"},
            {"model": "L3 with ReLU", "latency (ms)": 2.5, "device": "iPhone 12"},
            {"model": "L3 with HardSwish", "latency (ms)": 32.4, "device": "iPhone 12"},
            {"model": "LeViT-256 with HardSwish", "latency (ms)": 44.5, "device": "iPhone 12"},
            {"model": "LeViT-256 with GELU", "latency (ms)": 11.9, "device": "iPhone 12"},
        ],
        figures={"operators": _draw_operators(rows)},
        notes=(
            "The paper speaks of an iPhone's neural engine; none of this need hold elsewhere. On "
            "one CPU thread the time is CPU time. The 16x16 embedding ends in a smaller map."
        ),
        conditions=Conditions(
            device=device, threads=threads, batch_size=batch_size, seed=0,
            options={"width": width, "side": side},
        ),
    )  # fmt: skip


def _draw_operators(rows: list[dict]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    position, ticks, labels = 0.0, [], []
    colours = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")
    names = list(dict.fromkeys(row["question"] for row in rows))
    for row, previous in zip(rows, [None, *rows[:-1]], strict=True):
        if previous is not None and row["question"] != previous["question"]:
            position += 0.7
        colour = colours[names.index(row["question"])]
        axes.barh(position, row["x first"], xerr=_error(row, "x first"), capsize=2, color=colour)
        axes.text(0.02, position, f"{row['time (ms)']:.3g} ms", va="center", color="white", size=8)
        ticks.append(position)
        labels.append(row["operator"])
        position += 1
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("time relative to the first of its group")
    handles = [Patch(color=one, label=name) for one, name in zip(colours, names, strict=False)]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _error(row: dict, column: str) -> list[list[float]]:
    """A row's interval as lengths below and above its value, as matplotlib wants them."""
    low, high = (float(one) for one in row["interval"].split(" to "))
    return [[max(row[column] - low, 0)], [max(high - row[column], 0)]]


# ---- parts of the network ------------------------------------------------------------------------


def ablation(
    scale: str = "small",
    *,
    image_size: int = 224,
    batch_size: int = 1,
    threads: int = 1,
    device: str = "cpu",
    budget_s: float | None = None,
) -> ExperimentResult:
    """Parameters, MACs and latency of L1 with one part exchanged; counts of all sizes."""
    budget = (budget_s or of_scale(BUDGETS, scale)) * 2
    changes = {
        "L1": {},
        "pooling -> identity": {"token_mixer": "identity"},
        "pooling -> depthwise 3x3": {"token_mixer": "depthwise"},
        "GELU -> ReLU": {"act_layer": nn.ReLU},
        "GELU -> HardSwish": {"act_layer": nn.Hardswish},
        "no attention block": {"num_3d": 0},
        "one head": {"distillation": False},
    }
    torch.manual_seed(0)
    models = {
        name: EfficientFormer(**{**L1, **change}, image_size=image_size).eval()
        for name, change in changes.items()
    }
    models["L1, deployed"] = harness.deploy(models["L1"], image_size)
    image = torch.randn(batch_size, 3, image_size, image_size, device=device)
    calls = {name: _call(model.to(device), image) for name, model in models.items()}
    timings = time_calls(
        calls, device=device, threads=threads, budget_s=budget, palindromes=1, warm_up_s=0.1
    )
    rows = []
    for name, model in models.items():
        own = "deployed" not in name
        timing = timings[name]
        low, high = timing.ratio_interval
        rows.append({
            "model": name,
            "params": sum(one.numel() for one in model.parameters()),
            "params, official rule (M)":
                round(official_params(model.cpu()) / 1e6, 3) if own else None,
            "MACs (G)": round(count_macs(model, image_size).total / 1e9, 4),
            "MACs, official rule (G)":
                round(official_macs(model, image_size) / 1e9, 4) if own else None,
            "time (ms)": round(timing.median * 1e3, 2),
            "x L1": round(timing.ratio, 3),
            "interval": f"{low:.3f} to {high:.3f}",
            "status": timing.ratio_status,
        })  # fmt: skip
    return ExperimentResult(
        rows,
        _ablation_findings(rows, timings) + _published_counts(),
        published=[
            {"model": "L1", "params (M)": 12.25, "MACs (G)": 1.30, "source": "v2 paper, Table 1"},
            {"model": "pooling -> depthwise 3x3", "params (M)": 12.27, "MACs (G)": 1.30,
             "source": "v2 paper, Table 1 (top-1 79.2 -> 79.8)"},
        ],
        figures={"parts": _draw_parts(rows)},
        notes="Untrained weights; accuracies of these rows need ImageNet. CPU time on one thread.",
        conditions=Conditions(
            device=device, threads=threads, batch_size=batch_size, image_size=image_size, seed=0
        ),
    )  # fmt: skip


def _ablation_findings(rows: list[dict], timings: dict[str, Timing]) -> list[Finding]:
    table = {row["model"]: row for row in rows}
    base, mixer = table["L1"], table["pooling -> depthwise 3x3"]
    more = mixer["params, official rule (M)"] - base["params, official rule (M)"]
    same = round(mixer["MACs (G)"] / base["MACs (G)"] - 1, 3)
    deployed = timings["L1, deployed"]
    low, high = deployed.ratio_interval
    return [
        Finding(
            "A depthwise mixer instead of pooling adds 0.02 M parameters and no visible MACs",
            "reproduced" if abs(more - 0.02) < 0.01 and same < 0.01 else "deviates",
            f"{more:+.3f} M parameters by the official rule, {same:+.1%} MACs",
        ),
        slower("HardSwish instead of GELU slows the network down", timings["GELU -> HardSwish"]),
        Finding(
            "Folding batch norms makes the network faster",
            "reproduced" if high < 1 else "deviates",
            f"{deployed.ratio:.2f} times the time [{low:.2f}, {high:.2f}] deployed",
        ),
    ]


def _published_counts() -> list[Finding]:
    """The published columns against the official rule, for every size."""
    facts = harness.get_paper("efficientformer").facts
    counts: dict[str, tuple[int, int]] = {}
    findings = []
    for row in facts.published:
        if row.against not in ("params_paper", "macs_paper"):
            continue
        if row.of not in counts:
            with on_meta():  # counting needs shapes alone
                model = harness.build(row.of)
            counts[row.of] = official_params(model), official_macs(model, model.image_size)
        params, macs = counts[row.of]
        ours = params / 1e6 if row.against == "params_paper" else macs / 1e9
        findings.append(
            Finding(
                f"{row.variant} has {row.value} {row.unit} {row.metric.split('_')[0]}",
                "reproduced" if round(ours, 1) == row.value else "deviates",
                f"{ours:.4f} {row.unit} by the official rule",
            )
        )
    return findings


def _draw_parts(rows: list[dict]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        axes.barh(position, row["x L1"], xerr=_error(row, "x L1"), capsize=2, color="#4c72b0")
        text = f"{row['time (ms)']:.3g} ms, {row['MACs (G)']:.3f} G"
        axes.text(0.02, position, text, va="center", color="white", size=8)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("time relative to L1 (in the bars: time and MACs)")
    return figure
