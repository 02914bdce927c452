"""The supernet: every block is a weighted choice of branches (paper: MetaPath, Sec. 4.2).

No official code exists for this part; it follows the paper's text. What the text leaves open is
said where it is decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from harness.training.callbacks import Callback

from .blocks import Block, Meta3D, Meta4D, Size, init_linear
from .model import EfficientFormer

if TYPE_CHECKING:
    from harness.training.context import Context

GRID = 16  # widths are multiples of it
SEARCHED_3D = 2  # so many of the last stages may hold 3D blocks

Path = Literal["4d", "3d", "identity"]
Noise = Literal["uniform", "gumbel", "none"]


@dataclass(frozen=True)
class Architecture:
    """One network of the search space.

    Attributes:
        widths: channels per stage, multiples of 16.
        paths: for each stage what each of its MetaPaths became.

    Raises:
        ValueError: it lies outside the space: 4D blocks after 3D ones, 3D blocks in an early stage.
    """

    widths: tuple[int, ...]
    paths: tuple[tuple[Path, ...], ...]

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.paths):
            raise ValueError(f"{len(self.widths)} widths for {len(self.paths)} stages")
        if any(width < GRID or width % GRID for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of {GRID}")
        kinds = [kind for _, _, kind in self.blocks()]
        if "4d" in kinds[kinds.index("3d") if "3d" in kinds else len(kinds) :]:
            raise ValueError(f"4D blocks must come before 3D blocks, not {' '.join(kinds)}")
        if any("3d" in stage for stage in self.paths[:-SEARCHED_3D]):
            raise ValueError(f"only the last {SEARCHED_3D} stages may hold 3D blocks")

    @classmethod
    def largest(cls, widths: Sequence[int], depths: Sequence[int]) -> Architecture:
        """The network that slimming starts from: every path as its most expensive branch."""
        early = len(depths) - SEARCHED_3D
        kinds = ("4d" if stage < early else "3d" for stage in range(len(depths)))
        return cls(tuple(widths), tuple((kind,) * n for kind, n in zip(kinds, depths, strict=True)))

    @classmethod
    def by_hand(cls, widths: Sequence[int], depths: Sequence[int]) -> Architecture:
        """What one would draw without a search: 4D blocks, and one 3D block at the very end."""
        paths = [["4d"] * depth for depth in depths]
        paths[-1][-1] = "3d"
        return cls(tuple(widths), tuple(tuple(stage) for stage in paths))

    def blocks(self) -> Iterator[tuple[int, int, Path]]:
        """(stage, position, kind) of each block that is left, in order."""
        for stage, paths in enumerate(self.paths):
            for position, kind in enumerate(paths):
                if kind != "identity":
                    yield stage, position, kind

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(len(stage) - stage.count("identity") for stage in self.paths)

    @property
    def num_3d(self) -> tuple[int, ...]:
        return tuple(stage.count("3d") for stage in self.paths)

    def with_path(self, stage: int, position: int, kind: Path) -> Architecture:
        """This architecture with one path changed."""
        paths = [list(one) for one in self.paths]
        paths[stage][position] = kind
        return Architecture(self.widths, tuple(tuple(one) for one in paths))

    def with_width(self, stage: int, width: int) -> Architecture:
        """This architecture with one stage's width changed."""
        widths = (*self.widths[:stage], width, *self.widths[stage + 1 :])
        return Architecture(widths, self.paths)

    def build(self, **options) -> EfficientFormer:
        """The plain network, freshly initialised; `options` go to `EfficientFormer`."""
        return EfficientFormer(self.depths, self.widths, self.num_3d, **options)

    def __str__(self) -> str:
        stages = zip(self.widths, self.depths, strict=True)
        text = " ".join(f"{width}x{depth}" for width, depth in stages)
        return f"{text}, {sum(self.num_3d)} of {sum(self.depths)} blocks 3D"


class MetaPath(nn.Module):
    """X' = sum_n softmax_n((alpha_n + eps_n) / tau) * branch_n(X), on maps `(B, C, H, W)`.

    The branches are a 4D block, in late stages a 3D block, and the identity. The paper speaks of
    Gumbel-softmax but prints eps ~ U(0, 1): `noise` has both. Evaluation is without noise.

    Raises:
        ValueError: there is no such noise.
    """

    def __init__(
        self, block_4d: Meta4D, block_3d: Meta3D | None = None, noise: Noise = "uniform"
    ) -> None:
        super().__init__()
        if noise not in get_args(Noise):
            raise ValueError(f"no noise {noise!r}; there are {', '.join(get_args(Noise))}")
        branches = {"4d": block_4d} if block_3d is None else {"4d": block_4d, "3d": block_3d}
        self.branches = nn.ModuleDict(branches)
        self.kinds: tuple[Path, ...] = (*branches, "identity")
        self.alpha = nn.Parameter(torch.zeros(len(self.kinds)))
        self.noise = noise
        self.temperature = 1.0

    def weights(self) -> Tensor:
        """Weight of each of `kinds`; they sum to 1."""
        eps = torch.zeros_like(self.alpha)
        if self.training and self.noise != "none":
            eps = torch.rand_like(self.alpha)
            if self.noise == "gumbel":
                eps = -torch.log(-torch.log(eps.clamp(1e-6, 1 - 1e-6)))
        return ((self.alpha + eps) / self.temperature).softmax(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights()
        mixed = weights[-1] * x
        for weight, (kind, block) in zip(weights, self.branches.items(), strict=False):
            if kind == "3d":
                tokens = block(x.flatten(2).transpose(1, 2))
                out = tokens.transpose(1, 2).unflatten(2, x.shape[-2:])
            else:
                out = block(x)
            mixed = torch.addcmul(mixed, weight, out)
        return mixed

    @torch.no_grad()
    def importance(self) -> float:
        """How much the path is worth against leaving it out: (p_4D + p_3D) / p_identity.

        The paper writes the ratio with alpha itself, which may be zero or negative; p is its
        softmax, so the ratio is positive and has the same order.
        """
        share = self.alpha.softmax(dim=0)
        return float(share[:-1].sum() / share[-1])


class SuperNet(EfficientFormer):
    """EfficientFormer whose blocks are MetaPaths: all networks of the space in one.

    One width per stage, the largest (the paper: several widths would not fit into memory);
    narrower networks use its first channels. Arguments as `EfficientFormer`, without `num_3d`.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 1000,
        image_size: Size = 224,
        *,
        noise: Noise = "uniform",
        key_dim: int = 32,
        num_heads: int = 8,
        attn_ratio: float = 4,
        **options,
    ) -> None:
        largest = Architecture.largest(widths, depths)  # checks the widths
        options.setdefault("distillation", False)
        super().__init__(depths, widths, 0, num_classes, image_size, **options)
        attention = dict(key_dim=key_dim, num_heads=num_heads, attn_ratio=attn_ratio)
        self.largest = largest
        self.build_options = dict(
            num_classes=num_classes, image_size=image_size, **attention, **options
        )
        names = ("mlp_ratio", "act_layer", "layer_scale_init_value")
        shared = {name: options[name] for name in names if name in options}
        for stage, kind in enumerate(paths[0] for paths in largest.paths):
            blocks = self.network[2 * stage]
            extra = dict(resolution=self.resolutions[stage], **attention, **shared)
            for position, block in enumerate(blocks):
                block_3d = Meta3D(widths[stage], **extra) if kind == "3d" else None
                blocks[position] = MetaPath(block, block_3d, noise)
        self.apply(init_linear)

    def meta_paths(self) -> Iterator[tuple[int, int, MetaPath]]:
        """(stage, position, path) of every MetaPath."""
        for stage in range(len(self.depths)):
            for position, path in enumerate(self.network[2 * stage]):
                yield stage, position, path

    def set_temperature(self, temperature: float) -> None:
        """tau of all paths: high mixes the branches, towards 0 it picks one."""
        if temperature <= 0:
            raise ValueError(f"the temperature must be above 0, not {temperature}")
        for _, _, path in self.meta_paths():
            path.temperature = temperature

    def importance(self) -> dict[tuple[int, int], float]:
        """(stage, position) -> importance of that path."""
        return {(stage, at): path.importance() for stage, at, path in self.meta_paths()}

    @torch.no_grad()
    def inherit(self, architecture: Architecture) -> EfficientFormer:
        """The plain network of `architecture` with this supernet's weights.

        A narrower layer takes the first channels (the paper does not say which). Batch norm
        statistics come from the mixture; see `slimming.recalibrate`.
        """
        network = architecture.build(**self.build_options).to(self.norm.weight.device)
        _copy_leading(network.patch_embed, self.patch_embed)
        _copy_leading(network.norm, self.norm)
        _copy_leading(network.head, self.head)
        for index in range(1, len(self.network), 2):
            _copy_leading(network.network[index], self.network[index])
        plain = (one for stage in network.network[::2] for one in stage if isinstance(one, Block))
        for block, (stage, position, kind) in zip(plain, architecture.blocks(), strict=True):
            _copy_leading(block, self.network[2 * stage][position].branches[kind])
        return network


def _copy_leading(target: nn.Module, source: nn.Module) -> None:
    """Fill every tensor of `target` with the leading part of the one of that name in `source`."""
    tensors = source.state_dict()
    for name, tensor in target.state_dict().items():
        tensor.copy_(tensors[name][tuple(slice(size) for size in tensor.shape)])


class AnnealTemperature(Callback):
    """tau falls by the same factor each epoch, from `start` to `end` (the course is our choice)."""

    def __init__(self, start: float = 1.0, end: float = 0.1) -> None:
        self.start, self.end = start, end

    def on_epoch_start(self, context: Context) -> None:
        progress = context.epoch / max(context.recipe.epochs - 1, 1)
        context.model.set_temperature(self.start * (self.end / self.start) ** progress)
