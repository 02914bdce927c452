"""The search space: what may be chosen, how it is drawn, and what a choice makes of every block.

A configuration has five genes (official code: `supernet_config` in misc/config.py): the resolution,
a width for the stem, for each stage and for the head, and per stage a depth, a depthwise kernel and
an expansion ratio. In a transformer stage the last two speak of its first block alone, an inverted
bottleneck; a transformer block has nothing to choose but the stage's width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

HEAD_DIM = 8  # channels of a query or key; values have four times as many
GENES = ("width", "depth", "kernel_size", "expand_ratio")

#: What draws: Python's module `random` or an instance of `random.Random`.
Draws = Any


def make_divisible(value: float, divisor: int = 8) -> int:
    """`value` rounded to a multiple of `divisor`, and up if that loses more than a tenth."""
    rounded = max(1, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@dataclass(frozen=True)
class Config:
    """One network of a space.

    Attributes:
        resolution: pixels; images of another size are resized to it inside the network.
        width: channels of the stem, of each stage, and features of the head.
        depth, kernel_size, expand_ratio: one per stage.
    """

    resolution: int
    width: tuple[int, ...]
    depth: tuple[int, ...]
    kernel_size: tuple[int, ...]
    expand_ratio: tuple[int, ...]

    @classmethod
    def of(cls, given: Config | Mapping[str, Any]) -> Config:
        """A configuration from a mapping with the authors' names.

        Raises:
            ValueError: a gene is missing or unknown, or is no list of whole numbers.
        """
        if isinstance(given, Config):
            return given
        names = ("resolution", *GENES)
        if not isinstance(given, Mapping) or set(given) != set(names):
            told = sorted(given) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(f"a configuration has {', '.join(names)}; this one is {told}")
        try:
            lists = {name: tuple(map(_whole, given[name])) for name in GENES}
            return cls(_whole(given["resolution"]), **lists)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"a configuration holds whole numbers and lists of them: {dict(given)}"
                             ) from error  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for files."""
        return {
            "resolution": self.resolution,
            **{name: list(getattr(self, name)) for name in GENES},
        }

    @property
    def genes(self) -> tuple[int, ...]:
        """All numbers in one row, in the order in which they are drawn."""
        return (self.resolution, *(one for name in GENES for one in getattr(self, name)))

    def __str__(self) -> str:
        lists = (f"{name} {'-'.join(map(str, getattr(self, name)))}" for name in GENES)
        return f"{self.resolution} px, {', '.join(lists)}"


def _whole(value: Any) -> int:
    """`value` as an int; 192.0 is one, 192.5, "192" and True are none."""
    if isinstance(value, bool | str) or value != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


@dataclass(frozen=True)
class Stage:
    """The choices of one stage.

    Attributes:
        stride: of its first block.
        squeeze: whether its inverted bottlenecks have squeeze-and-excitation.
        transformer: whether all blocks but the first are transformer blocks.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    kernels: tuple[int, ...] = (3,)
    ratios: tuple[int, ...] = (4, 5, 6)
    stride: int = 2
    squeeze: bool = False
    transformer: bool = False


@dataclass(frozen=True)
class Block:
    """What a configuration makes of one block.

    Attributes:
        stage, index: its place; `name` is its module's.
        transformer: then it keeps its width, and only `width_out`, `side` and `depth` count.
        width_in, width_out, hidden: channels; `hidden` those of an inverted bottleneck's middle.
        expands: whether a convolution makes these; where the stage's largest ratio is 1, none does.
        reduced: features in the squeeze-and-excitation, 0 for none.
        side_in, side: of the incoming and the outgoing map.
        depth: active blocks of the stage, by which layer scales are switched.
    """

    stage: int
    index: int
    transformer: bool
    width_in: int
    width_out: int
    hidden: int
    expands: bool
    reduced: int
    kernel: int
    stride: int
    side_in: int
    side: int
    depth: int

    @property
    def name(self) -> str:
        return f"stages.{self.stage}.{self.index}"

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def heads(self) -> int:
        return self.width_out // HEAD_DIM


@dataclass(frozen=True)
class Space:
    """Choices of all genes, and sizes that are not chosen.

    Attributes:
        stem, head: widths of the first convolution and of the last features.
        head_ratio: expansion of the convolution before the pool.
        window: side of the map that tables of relative positions are made for.
        scale_rows: depths that the layer-scale tables know.
        scale_init: their initial value; a short training needs branches that can be felt.
        leftovers: keep the parameters that the released supernet holds and never uses: a
            projection in every shortcut, and a vector `rescale` in every inverted bottleneck.
    """

    name: str
    resolutions: tuple[int, ...]
    stem: tuple[int, ...]
    stages: tuple[Stage, ...]
    head: tuple[int, ...]
    head_ratio: int = 6
    window: int = 18
    scale_rows: int = 10
    scale_init: float = 1e-4
    leftovers: bool = False

    @property
    def candidates(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Gene -> the choices of each of its entries."""
        return {
            "width": (self.stem, *(one.widths for one in self.stages), self.head),
            "depth": tuple(one.depths for one in self.stages),
            "kernel_size": tuple(one.kernels for one in self.stages),
            "expand_ratio": tuple(one.ratios for one in self.stages),
        }

    @property
    def size(self) -> int:
        """How many configurations there are."""
        lists = [one for gene in self.candidates.values() for one in gene]
        return len(self.resolutions) * prod(map(len, lists))

    def smallest(self) -> Config:
        """The minimum of every choice."""
        return self._every(min)

    def largest(self) -> Config:
        """The maximum of every choice."""
        return self._every(max)

    def _every(self, pick: Callable[[Sequence[int]], int]) -> Config:
        lists = {gene: tuple(map(pick, lists)) for gene, lists in self.candidates.items()}
        return Config(pick(self.resolutions), **lists)

    def check(self, given: Config | Mapping[str, Any]) -> Config:
        """`given`, if it is of this space.

        Raises:
            ValueError: it is not; the gene and its choices are named.
        """
        config = Config.of(given)
        if config.resolution not in self.resolutions:
            raise ValueError(
                f"{self.name} has the resolutions {_listed(self.resolutions)}, "
                f"not {config.resolution}"
            )
        for gene, lists in self.candidates.items():
            values = getattr(config, gene)
            if len(values) != len(lists):
                raise ValueError(f"{gene} of {self.name} has {len(lists)} entries, not {values}")
            for number, (value, choices) in enumerate(zip(values, lists, strict=True)):
                if value not in choices:
                    raise ValueError(
                        f"{gene}[{number}] of {self.name} is {_listed(choices)}, not {value}"
                    )
        return config

    # drawing, with the released order of draws

    def sample(self, rng: Draws = random) -> Config:
        """One draw per gene's entry, single choices included (`_sample_active_subnet`)."""
        resolution = rng.choice(self.resolutions)
        lists = {gene: tuple(map(rng.choice, lists)) for gene, lists in self.candidates.items()}
        return Config(resolution, **lists)

    def mutate(
        self, config: Config, probability: float, rng: Draws = random, keep_resolution: bool = False
    ) -> Config:
        """Each entry becomes another one with `probability` (`mutate_and_reset`)."""

        def changed(value: int, choices: Sequence[int], allowed: bool = True) -> int:
            if rng.random() >= probability or not allowed or len(choices) == 1:
                return value
            return rng.choice([one for one in choices if one != value])

        resolution = changed(config.resolution, self.resolutions, not keep_resolution)
        lists = {
            gene: tuple(map(changed, getattr(config, gene), lists))
            for gene, lists in self.candidates.items()
        }
        return Config(resolution, **lists)

    def cross(
        self, one: Config, two: Config, rng: Draws = random, probability: float = 0.5
    ) -> Config:
        """Each entry of `one` with `probability`, else of `two` (`crossover_and_reset`)."""

        def either(a: int, b: int) -> int:
            return a if rng.random() < probability else b

        resolution = either(one.resolution, two.resolution)
        lists = {gene: tuple(map(either, getattr(one, gene), getattr(two, gene))) for gene in GENES}
        return Config(resolution, **lists)

    # what a configuration is

    def blocks(self, config: Config) -> Iterator[Block]:
        """The blocks of a network, in order: always the first `depth` of each stage."""
        width, side = config.width[0], -(-config.resolution // 2)
        genes = (config.width[1:-1], config.depth, config.kernel_size, config.expand_ratio)
        for number, (stage, chosen) in enumerate(
            zip(self.stages, zip(*genes, strict=True), strict=True)
        ):
            width_out, depth, kernel, ratio = chosen
            for index in range(depth):
                stride = 1 if index else stage.stride
                hidden = make_divisible(round(width * ratio))
                expands = max(stage.ratios) > 1
                after = -(-side // stride)
                yield Block(
                    stage=number, index=index, transformer=stage.transformer and index > 0,
                    width_in=width, width_out=width_out, hidden=hidden if expands else width,
                    expands=expands, reduced=make_divisible(hidden // 4) if stage.squeeze else 0,
                    kernel=kernel, stride=stride, side_in=side, side=after, depth=depth,
                )  # fmt: skip
                width, side = width_out, after

    def projects(self, block: Block) -> bool:
        """Whether the shortcut of an inverted bottleneck can ever need a projection."""
        if block.index:
            return False
        before = self.candidates["width"][block.stage]
        return any(one != two for one in before for two in self.stages[block.stage].widths)


def _listed(choices: Sequence[int]) -> str:
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


_FREE, _SIX = (4, 5, 6), (6,)
NASVIT = Space(
    "nasvit",
    resolutions=(192, 224, 256, 288),
    stem=(16, 24),
    stages=(
        Stage((16, 24), (1, 2), (3, 5), (1,), stride=1),
        Stage((24, 32), (3, 4, 5), (3, 5), _FREE),
        Stage((32, 40), (3, 4, 5, 6), (3,), _FREE, squeeze=True),
        Stage((64, 72), (3, 4, 5, 6), (3,), _FREE, transformer=True),
        Stage((112, 120, 128), tuple(range(3, 10)), (3,), _FREE, squeeze=True, transformer=True),
        Stage((160, 168, 176, 184), tuple(range(3, 9)), (3,), _SIX, 1, True, transformer=True),
        Stage((208, 216, 224), (3, 4, 5, 6), (3,), _SIX, squeeze=True, transformer=True),
    ),
    head=(1792, 1984),
    leftovers=True,
)

# Ours, for images of 32 pixels: 28 exercises odd sides, and the three resolutions switch the layer
# scales differently (8x8, 7x7 and 6x6 tokens, then 4x4, 4x4 and 3x3).
MICRO = Space(
    "micro",
    resolutions=(24, 28, 32),
    stem=(8, 12),
    stages=(
        Stage((8, 16), (1, 2), (3, 5), (1,), stride=1),
        Stage((16, 24), (1, 2), (3, 5), (3, 4), squeeze=True),
        Stage((24, 32, 40), (2, 3), (3,), (3, 4), stride=1, transformer=True),
        Stage((48, 56, 64), (2, 3), (3,), (3, 4), squeeze=True, transformer=True),
    ),
    head=(96, 128),
    head_ratio=3,
    window=8,
    scale_rows=4,
    scale_init=1.0,
)

# The same stages without attention. An inverted bottleneck of ratio 7 has the 14 C^2 weights that
# a transformer block has in its linear layers.
MICRO_CNN = Space(
    "micro_cnn",
    resolutions=MICRO.resolutions,
    stem=MICRO.stem,
    stages=(
        *MICRO.stages[:2],
        Stage((24, 32, 40), (2, 3), (3, 5), (5, 6, 7), stride=1),
        Stage((48, 56, 64), (2, 3), (3,), (5, 6, 7)),
    ),
    head=MICRO.head,
    head_ratio=3,
)

SPACES = {one.name: one for one in (NASVIT, MICRO, MICRO_CNN)}


def get_space(name: str) -> Space:
    """The space of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in SPACES:
        raise ValueError(f"no space {name!r}; there are {_listed(list(SPACES))}")
    return SPACES[name]
