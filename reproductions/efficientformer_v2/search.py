"""The fine-grained joint search on size and latency.

From the whole supernet downwards: of all small steps the one that costs the least accuracy per
point of Mobile Efficiency Score is taken, until the target is met. Parameters are counted, latency
is the sum of a table that this machine's latency instrument measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from harness.deployment import batch_norm_affine, deploy, fold_before
from harness.errors import ReplivitError
from harness.measurement.latency import Effort
from harness.measurement.side_by_side import time_calls
from reproductions.efficientformer_v2.blocks import FFN, AttnFFN, Embedding, Stem
from reproductions.efficientformer_v2.layers import folded
from reproductions.efficientformer_v2.model import Architecture
from reproductions.efficientformer_v2.supernet import REMOVED, SearchSpace, Subnet

BASE_SCORE = 100.0


@dataclass(frozen=True)
class Cost:
    """What a network, or a part of one, costs: parameters and seconds per batch."""

    params: float
    latency: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.latency + other.latency)


@dataclass(frozen=True)
class MobileEfficiency:
    """Mobile Efficiency Score: `100 * prod_i (M_i / U_i) ** -alpha_i` over size and latency.

    U_i is the unit that a cost is compared with and alpha_i its weight. The transcription that was
    read prints the exponent without its minus sign; only with it do smaller costs score higher, as
    the text wants. The default exponents could not be verified in the paper; see the notes in
    paper.yaml. Units scale all scores alike, so the search does not depend on them.
    """

    unit: Cost
    alpha_params: float = 0.5
    alpha_latency: float = 1.0

    def __call__(self, cost: Cost) -> float:
        size = cost.params / self.unit.params
        latency = cost.latency / self.unit.latency
        return BASE_SCORE * size**-self.alpha_params * latency**-self.alpha_latency


# ---- the table -----------------------------------------------------------------------------------

#: A part of a network: its kind, where that matters its stage, and its sizes.
Unit = tuple[str | int | float, ...]


def units_of(architecture: Architecture) -> Iterator[Unit]:
    """The parts of a network, as keys of the table; a part that occurs twice comes twice."""
    widths = architecture.widths
    yield "stem", widths[0]
    for stage, width in enumerate(widths):
        if stage:
            yield "down", stage, widths[stage - 1], width
        for ratio in architecture.expansions[stage]:
            yield "ffn", stage, width, ratio
        if stage >= 2:
            yield from [("attention", stage, width)] * architecture.attention_blocks[stage - 2]
    yield "head", widths[-1]


def units_of_space(space: SearchSpace) -> list[Unit]:
    """Every part that any network of the space can have."""
    units: set[Unit] = set()
    for stage, widths in enumerate(space.widths):
        for width in widths:
            units.update(("ffn", stage, width, ratio) for ratio in space.expansions)
            if stage == 0:
                units.add(("stem", width))
            else:
                units.update(("down", stage, before, width) for before in space.widths[stage - 1])
            if stage >= 2:
                units.add(("attention", stage, width))
            if stage == 3:
                units.add(("head", width))
    return sorted(units, key=str)


class Mixer(nn.Module):
    """The attention half of a global block, `x + ls1 * Attention4D(x)`, as a part of its own."""

    def __init__(self, block: AttnFFN) -> None:
        super().__init__()
        self.token_mixer, self.ls1 = block.token_mixer, block.ls1

    def forward(self, x: Tensor) -> Tensor:
        return self.ls1(x, self.token_mixer(x))

    def deploy_(self) -> None:
        """Fold the layer scale, as the block itself does."""
        self.ls1 = folded(self.ls1, self.token_mixer.proj)


class Head(nn.Module):
    """Final norm, pool and classifier, as a part of its own."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((2, 3)))

    def deploy_(self) -> None:
        """Fold the norm, as the model itself does."""
        fold_before(self.head, *batch_norm_affine(self.norm))
        self.norm = nn.Identity()


def build_unit(
    unit: Unit, space: SearchSpace, image_size: int, num_classes: int
) -> tuple[nn.Module, tuple[int, int, int]]:
    """A part of a network and the shape `(C, H, W)` of its input."""
    kind, *sizes = unit
    heads = {"num_heads": space.num_heads, "attn_ratio": space.attn_ratio}
    if kind == "stem":
        return Stem(sizes[0], space.stem_stride), (3, image_size, image_size)
    stage = 3 if kind == "head" else sizes[0]
    side = image_size // space.stem_stride // 2**stage
    if kind == "head":
        return Head(sizes[0], num_classes), (sizes[0], side, side)
    if kind == "ffn":
        return FFN(sizes[1], sizes[2]), (sizes[1], side, side)
    if kind == "attention":
        stride = 2 if stage == 2 else 1
        block = AttnFFN(sizes[1], side, stride=stride, key_dim=space.key_dim, **heads)
        return Mixer(block), (sizes[1], side, side)
    dual = {"key_dim": space.key_dim // 2, **heads} if stage == 3 else {}
    down = Embedding(sizes[1], sizes[2], 2 * side, dual_path=stage == 3, **dual)
    return down, (sizes[1], 2 * side, 2 * side)


#: Small parts, many of them: short blocks, few rounds.
TABLE_EFFORT = Effort(
    budget_s=8.0, half_width=0.05, min_rounds=5, max_rounds=15, palindromes=1,
    block_s=0.003, warm_up_s=0.02, warm_up_limit_s=0.2,
)  # fmt: skip


@dataclass(frozen=True)
class CostTable:
    """Parameters and measured seconds of every part; a network costs the sum of its parts.

    `unsettled` counts parts whose interval stayed wider than wanted.
    """

    entries: Mapping[Unit, Cost]
    unsettled: int = 0

    @classmethod
    def measure(
        cls,
        space: SearchSpace,
        image_size: int,
        num_classes: int,
        *,
        batch_size: int = 1,
        device: str = "cpu",
        effort: Effort = TABLE_EFFORT,
    ) -> CostTable:
        """Time every part of the space on this machine, in deployment form, interleaved.

        On a CPU the clock is the CPU time of one thread: the latency on a machine that does nothing
        else, and hardly disturbed where it does.
        """
        calls, params = {}, {}
        for unit in units_of_space(space):
            module, shape = build_unit(unit, space, image_size, num_classes)
            params[unit] = sum(one.numel() for one in module.parameters())
            images = torch.randn(batch_size, *shape).contiguous(memory_format=torch.channels_last)
            folded_form = deploy(module, example_inputs=(images,)).to(device)
            calls[str(unit)] = partial(folded_form, images.to(device))
        timings = time_calls(calls, effort=effort, device=device)
        entries = {unit: Cost(params[unit], timings[str(unit)].median) for unit in params}
        return cls(entries, sum(timing.status != "ok" for timing in timings.values()))

    def cost(self, architecture: Architecture) -> Cost:
        """Cost of a network of the space.

        Raises:
            ReplivitError: the network has a part that the table does not know.
        """
        try:
            parts = [self.entries[unit] for unit in units_of(architecture)]
        except KeyError as error:
            raise ReplivitError(f"the latency table knows no part {error.args[0]}") from None
        return sum(parts, Cost(0, 0.0))


# ---- the search ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """One small step: A_N removes a block (or turns the first global one local), A_C narrows a
    stage, A_E narrows one feed-forward network."""

    kind: str
    stage: int
    block: int | None
    result: Subnet

    def __str__(self) -> str:
        where = f"stage {self.stage + 1}" + (
            "" if self.block is None else f" block {self.block + 1}"
        )
        return f"{self.kind} {where}"


def actions(space: SearchSpace, subnet: Subnet) -> list[Action]:
    """The action pool `A = {A_N, A_C, A_E}` that is open to `subnet`; each takes one step."""
    pool = []
    for stage, ratios in enumerate(subnet.expansions):
        kept = subnet.kept(stage)
        for block in kept if len(kept) > 1 else ():
            pool.append(Action("A_N", stage, block, subnet.with_expansion(stage, block, REMOVED)))
        if stage >= 2 and subnet.attention[stage - 2]:
            fewer = list(subnet.attention)
            fewer[stage - 2] -= 1
            first = min(subnet.global_blocks(stage))
            local = replace(subnet, attention=tuple(fewer))
            pool.append(Action("A_N attention", stage, first, local))
        narrower = [width for width in space.widths[stage] if width < subnet.widths[stage]]
        if narrower:
            widths = list(subnet.widths)
            widths[stage] = max(narrower)
            pool.append(Action("A_C", stage, None, replace(subnet, widths=tuple(widths))))
        for block in kept:
            less = [ratio for ratio in space.expansions if ratio < ratios[block]]
            if less:
                thinner = subnet.with_expansion(stage, block, max(less))
                pool.append(Action("A_E", stage, block, thinner))
    return pool


@dataclass(frozen=True)
class Step:
    """A network on the way down: how it was reached and what it is."""

    action: Action | None
    subnet: Subnet
    cost: Cost
    mes: float
    accuracy: float
    evaluations: int


def greedy_search(
    space: SearchSpace,
    table: CostTable,
    score: MobileEfficiency,
    accuracy: Callable[[Subnet], float],
    target: Cost,
    progress: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Shrink the supernet until it costs at most `target`, each step at min dAccuracy / dMES.

    Args:
        accuracy: of a sub-network with the supernet's weights, in %; called once per candidate.
        progress: called after every step.

    Returns:
        The networks on the way, the supernet first. Each scores higher than the one before.

    Raises:
        ReplivitError: the target lies below what the space can reach.
    """
    subnet = space.uniform("largest")
    cost = table.cost(space.architecture(subnet))
    steps = [Step(None, subnet, cost, score(cost), accuracy(subnet), 1)]
    while steps[-1].cost.latency > target.latency or steps[-1].cost.params > target.params:
        now, candidates = steps[-1], []
        for action in actions(space, now.subnet):
            cost = table.cost(space.architecture(action.result))
            gain = score(cost) - now.mes
            if gain > 0:
                reached = accuracy(action.result)
                candidates.append(((now.accuracy - reached) / gain, -gain, action, cost, reached))
        if not candidates:
            raise ReplivitError(
                f"the search ends at {now.cost.params:,.0f} parameters and "
                f"{1e3 * now.cost.latency:.3f} ms; the target lies below what the space can reach"
            )
        _, gain, action, cost, reached = min(candidates, key=lambda one: one[:2])
        steps.append(Step(action, action.result, cost, now.mes - gain, reached, len(candidates)))
        if progress:
            progress(steps[-1])
    return steps


def scaled_widths(architecture: Architecture, factor: float, multiple: int = 8) -> Architecture:
    """Every width times `factor`, rounded to a multiple: scaling without a search."""
    widths = tuple(
        max(multiple, round(width * factor / multiple) * multiple) for width in architecture.widths
    )
    return replace(architecture, widths=widths)
