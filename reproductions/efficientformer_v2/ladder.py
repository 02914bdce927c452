"""The design ladder (Table 1), of which three rows are printed precisely enough to be built."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import fill
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from harness import (
    Conditions,
    ExperimentResult,
    Finding,
    build,
    get_paper,
    get_variant,
)
from harness.measurement.paper_counters import snap_profile
from harness.meta import on_meta
from harness.settings import of_scale
from reproductions.efficientformer_v2.blocks import FFN, Embedding, Stem
from reproductions.efficientformer_v2.layers import ConvNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "efficientformer_v2"
DEPTHS, WIDTHS = (3, 2, 6, 4), (48, 96, 224, 448)  # of EfficientFormer-L1, where the ladder starts
NOT_PRINTED = "depths and widths are not printed"


class TokenAttention(nn.Module):
    """The attention of EfficientFormer's last block, on a map: `(B, C, H, W) -> (B, C, H, W)`.

    8 heads, queries and keys of 32 and values of 128 channels; for counting only, so without the
    position bias, which the counter leaves out.
    """

    def __init__(self, dim: int, heads: int = 8, key_dim: int = 32, value_dim: int = 128) -> None:
        super().__init__()
        self.heads, self.sizes = heads, [key_dim, key_dim, value_dim]
        self.qkv = nn.Linear(dim, heads * sum(self.sizes))
        self.proj = nn.Linear(heads * value_dim, dim)
        self.pairs = 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        self.pairs = tokens.shape[1] ** 2
        qkv = self.qkv(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(*qkv.split(self.sizes, dim=3))
        return self.proj(out.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)

    def paper_macs(self) -> int:
        """Both products of the last call."""
        return self.heads * (self.sizes[0] + self.sizes[2]) * self.pairs


class Row3(nn.Module):
    """Every mixer and MLP of EfficientFormer-L1 became the unified feed-forward network.

    The last block keeps its attention; batch norm, pool and both classifiers follow.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Stem(WIDTHS[0])]
        for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
            if stage:
                layers.append(Embedding(WIDTHS[stage - 1], width))
            layers += [FFN(width) for _ in range(depth)]
        layers.insert(-1, TokenAttention(WIDTHS[-1]))
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(WIDTHS[-1]))
        self.heads = nn.ModuleList(nn.Linear(WIDTHS[-1], 1000) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3))
        return self.heads[0](x) + self.heads[1](x)


def mixer_cost(make: Callable[[int], nn.Module], side: int = 56) -> tuple[int, int]:
    """(parameters, MACs) of `make(width)` in every block of L1 that mixes locally.

    `side` is the map's in stage 1; the last block has an attention and does not count.
    """
    params = macs = 0
    for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        entrance = nn.Conv2d(3, width, 1)  # the counter feeds images
        whole = snap_profile(nn.Sequential(entrance, make(width)), side // 2**stage)
        alone = snap_profile(entrance, side // 2**stage)
        blocks = depth - 1 if stage == 3 else depth
        params += blocks * (whole[0] - alone[0])
        macs += blocks * (whole[1] - alone[1])
    return params, macs


def counted_rows() -> dict[int, tuple[int, int]]:
    """(parameters, MACs) of the ladder's first three rows, by the authors' counter."""
    first = get_variant("efficientformer_l1")
    with on_meta():
        model = build(first.name)
        row1 = (first.hook("paper_params")(model), first.hook("paper_macs")(model, 224))
        pool = mixer_cost(lambda _: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False))
        depthwise = mixer_cost(lambda width: ConvNorm(width, width, 3, groups=width))
        row3 = snap_profile(Row3(), 224)
    row2 = tuple(old - out + new for old, out, new in zip(row1, pool, depthwise, strict=True))
    return {1: row1, 2: row2, 3: row3}


def printed_rows() -> dict[int, dict[str, Any]]:
    """The ladder as printed: row -> its name and its numbers by metric."""
    rows: dict[int, dict[str, Any]] = {}
    for fact in get_paper(PAPER).facts.published:
        if fact.variant.startswith("ladder row"):
            number, _, step = fact.variant.removeprefix("ladder row").partition(" ")
            rows.setdefault(int(number), {"step": step})[fact.metric] = fact.value
    return rows


def ladder(scale: str = "small") -> ExperimentResult:
    """Table 1 beside exact counts of the rows that can be built.

    Args:
        scale: `small` or `paper`; the counts are the same.
    """
    of_scale(dict.fromkeys(("small", "paper")), scale)  # the same at both
    counted, printed = counted_rows(), printed_rows()
    rows = []
    for number, facts in sorted(printed.items()):
        params, macs = counted.get(number, (None, None))
        rows.append(
            {
                "row": number,
                "step": facts["step"],
                "params_m_printed": facts["params_m"],
                "params_m": params and round(params / 1e6, 4),
                "macs_g_printed": facts["macs_g"],
                "macs_g": macs and round(macs / 1e9, 4),
                "ms_printed": facts["latency_ms"],
                "top1_printed": facts["top1"],
                "measured": "counts" if params else "not measured",
                "reason": "latency and top-1 need an iPhone 12 and ImageNet"
                if params
                else NOT_PRINTED,
            }
        )
    return ExperimentResult(
        rows=rows,
        findings=[*_count_findings(rows), _no_loss(printed)],
        published=[{"row": number, **facts} for number, facts in sorted(printed.items())],
        figures={"ladder": _figure(rows)},
        notes=(
            "Counts by the authors' counter. Row 1 is the rebuilt EfficientFormer-L1, row 2 has "
            "depthwise convolutions for its pools, row 3 the unified feed-forward network in every "
            "block. Counts agree within one unit of the last printed digit (0.01); row 2 is "
            "printed rounded down. Printed values come from a third-party transcription."
        ),
        conditions=Conditions(image_size=224, num_classes=1000),
    )


def _count_findings(rows: list[dict[str, Any]]) -> list[Finding]:
    findings = []
    for row in rows:
        claim = (
            f"Row {row['row']}, {row['step']}: "
            f"{row['params_m_printed']} M parameters, {row['macs_g_printed']} G MACs"
        )
        if row["params_m"] is None:
            findings.append(Finding(claim, "not measured", row["reason"]))
            continue
        off = max(
            abs(row["params_m"] - row["params_m_printed"]),
            abs(row["macs_g"] - row["macs_g_printed"]),
        )
        findings.append(
            Finding(
                claim,
                "reproduced" if off < 0.01 else "deviates",
                f"counted {row['params_m']:.4f} M and {row['macs_g']:.4f} G",
            )
        )
    return findings


def _no_loss(printed: dict[int, dict[str, Any]]) -> Finding:
    """The survey's summary against the table it sums up."""
    before, after = printed[7], printed[8]
    change = after["top1"] - before["top1"]
    return Finding(
        "Stride attention: 3.5 to 1.5 ms with no loss (as the survey puts it)",
        "reproduced" if change >= 0 else "deviates",
        f"the paper's own table has {before['latency_ms']} to {after['latency_ms']} ms and "
        f"{before['top1']} to {after['top1']} % top-1: {change:+.1f} points",
    )


def _figure(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    numbers = [row["row"] for row in rows]
    top.bar(numbers, [row["ms_printed"] for row in rows], color="0.85", width=0.6)
    top.set(ylabel="printed latency, ms (bars)", title="The design ladder on an iPhone 12")
    accuracy = top.twinx()
    accuracy.plot(numbers, [row["top1_printed"] for row in rows], "o-", color="C3")
    accuracy.set_ylabel("printed top-1, % (line)", color="C3")
    accuracy.set_ylim(78.5, 82.5)
    bottom.plot(
        numbers, [row["macs_g_printed"] for row in rows], "o", mfc="none", ms=9, label="printed"
    )
    counted = [row for row in rows if row["macs_g"] is not None]
    bottom.plot(
        [row["row"] for row in counted], [row["macs_g"] for row in counted], "x", color="C1",
        ms=8, label="counted here",
    )  # fmt: skip
    bottom.set(ylabel="MACs, G")
    bottom.legend(frameon=False)
    bottom.set_xticks(
        numbers, [f"{row['row']}\n" + fill(row["step"], 12) for row in rows], fontsize=8
    )
    for axes in (top, bottom):
        axes.spines[["top"]].set_visible(False)
    return figure
