"""The Reformer on images: a reversible LSH vision transformer, and the benchmark's one.

The paper has no vision transformer. `reformer_vit` puts its two ideas behind a patch embedding;
`benchmark_vit` is the form in which a benchmark of efficient transformers compares it, where LSH
attention stands in an ordinary ViT (no reversible layers, unmasked padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from timm.layers import DropPath, PatchEmbed, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from harness.patches import ImageSize, patch_grid
from reproductions.reformer.attention import LSHAttention, check_rounds
from reproductions.reformer.hashing import NumBuckets, buckets_paper
from reproductions.reformer.layers import AxialPositions, FeedForward, PreNormAttention
from reproductions.reformer.reversible import ReversibleBlock, ReversibleStack
from reproductions.reformer.rules import LUCIDRAINS, Rules, get_rules


class ReformerViT(nn.Module):
    """Patches, positions, reversible LSH layers, mean over tokens, classes.

    There is no class token: tokens are all alike to the hashing. Both streams start as the
    embedded patches; behind the last layer they are averaged, then normed.

    Args: see `reformer_vit`.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: ImageSize,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        attention: dict,
        axial: bool,
        ff_chunk: int,
        reversible: bool,
        drop_rate: float,
        proj_drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        grid = patch_grid(image_size, patch_size, "the Reformer")
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.num_features = self.head_hidden_size = embed_dim
        self.grid = grid
        self.patch_embed = PatchEmbed(image_size, patch_size, 3, embed_dim)
        if axial:
            dims = (embed_dim // 3, embed_dim - embed_dim // 3)
            self.pos_embed = AxialPositions(grid, dims)
            for one in self.pos_embed.weights:
                nn.init.normal_(one, std=0.02)
        else:
            self.pos_embed = nn.Parameter(
                trunc_normal_(torch.empty(1, grid[0] * grid[1], embed_dim), std=0.02)
            )
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()

        def block(index: int) -> ReversibleBlock:
            own = dict(attention, rotation_seed=attention["rotation_seed"] + index)
            layer = LSHAttention(embed_dim, num_heads, out_bias=True, **own)
            layer.prepare(grid[0] * grid[1])
            drop = nn.Sequential(nn.Dropout(proj_drop_rate), DropPath(rates[index]))
            feed_forward = FeedForward(
                embed_dim, int(mlp_ratio * embed_dim), chunk_size=ff_chunk, drop_rate=proj_drop_rate
            )
            return ReversibleBlock(
                PreNormAttention(embed_dim, layer, drop),
                feed_forward if not rates[index] else _Dropped(feed_forward, rates[index]),
            )

        self.stack = ReversibleStack((block(index) for index in range(depth)), reversible)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_start)

    def tokens(self, images: Tensor) -> Tensor:
        """Embedded patches with their positions, `(B, L, C)`."""
        positions = self.pos_embed
        return self.patch_embed(images) + (positions() if callable(positions) else positions)

    def forward_features(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` as normed tokens `(B, L, C)`."""
        x = self.tokens(images)
        first, second = self.stack(x, x)
        return self.norm((first + second) / 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)`, or the mean token `(B, C)`."""
        x = self.head_drop(x.mean(1))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, where the network is; 0 for none."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            like = self.norm.weight
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Weights that timm's optimizers leave alone."""
        return {name for name, _ in self.named_parameters() if name.startswith("pos_embed")}

    def set_rounds(self, rounds: int | None = None, eval_rounds: int | None = None) -> None:
        """Change the rounds of hashing of all layers: weights do not depend on them.

        Raises:
            ValueError: less than one round; then nothing changes.
        """
        check_rounds(rounds, eval_rounds)
        for module in self.modules():
            if isinstance(module, LSHAttention):
                module.rounds = rounds or module.rounds
                module.eval_rounds = eval_rounds or module.eval_rounds
                module.prepare(self.grid[0] * self.grid[1])


class _Dropped(nn.Module):
    """A feed-forward with stochastic depth, which drops whole examples: it is not chunked."""

    def __init__(self, feed_forward: FeedForward, rate: float) -> None:
        super().__init__()
        self.inner, self.drop_path = feed_forward, DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.inner(x))


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def reformer_vit(
    num_classes: int,
    image_size: ImageSize,
    patch_size: int = 16,
    embed_dim: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    mlp_ratio: float = 4.0,
    chunk: int | None = None,
    num_buckets: NumBuckets | None = None,
    rounds: int = 2,
    eval_rounds: int = 4,
    rules: str | Rules = "trax_v2",
    before: int = 1,
    after: int = 1,
    qkv_bias: bool = False,
    axial: bool = False,
    ff_chunk: int = 0,
    reversible: bool = True,
    attn_drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    rotation_seed: int = 0,
) -> ReformerViT:
    """A reversible LSH vision transformer: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        chunk: tokens of a chunk; default see `fitting_chunk`.
        num_buckets: default two per chunk, as in the paper.
        rounds, eval_rounds: of hashing, in training and in evaluation.
        rules: which published form of LSH attention.
        before, after: chunks next to the own one that are seen.
        axial: positions as a table of rows and a table of columns.
        ff_chunk: positions that the feed-forward takes at a time, 0 for all.
        reversible: False keeps all activations for the backward pass.
        attn_drop_rate, proj_drop_rate, drop_rate: dropout of attention, of what blocks add, and
            before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        rotation_seed: of the rotations in evaluation; block i uses this plus i.

    Raises:
        ValueError: the image does not divide into patches, the width into heads, an odd number of
            buckets, or a size that is none.
    """
    _check_sizes(patch_size, embed_dim, depth, mlp_ratio, drop_path_rate)
    rows, columns = patch_grid(image_size, patch_size, "the Reformer")
    chunk = fitting_chunk(rows * columns) if chunk is None else chunk
    rules = get_rules(rules)
    rules = rules.changed(before=before, after=after, num_buckets=buckets_paper, multiple=1)
    attention = {
        "chunk": chunk, "num_buckets": num_buckets, "rounds": rounds, "eval_rounds": eval_rounds,
        "rules": rules, "qkv_bias": qkv_bias, "attn_drop": attn_drop_rate,
        "rotation_seed": rotation_seed,
    }  # fmt: skip
    return ReformerViT(
        num_classes, image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, attention,
        axial, ff_chunk, reversible, drop_rate, proj_drop_rate, drop_path_rate,
    )  # fmt: skip


def _check_sizes(
    patch_size: int, embed_dim: int, depth: int, mlp_ratio: float, drop_path_rate: float
) -> None:
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth}
    for name, value in sizes.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
    if not mlp_ratio > 0:
        raise ValueError(f"mlp_ratio must be positive, not {mlp_ratio}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), not {drop_path_rate}")


def fitting_chunk(length: int, least: int = 8, most: int = 32) -> int:
    """The chunk that needs no padding and is nearest to `sqrt(length)`; 14 for 196, 32 for 1024.

    Where no number of the range divides the length, the nearest to the root within the range.
    """
    root = min(max(length**0.5, least), most)
    fits = [one for one in range(least, most + 1) if length % one == 0]
    return min(fits, key=lambda one: abs(one - root)) if fits else min(round(root), max(length, 1))


class BenchmarkAttention(LSHAttention):
    """LSH attention in the benchmark's form.

    Tokens are padded with zeros to two chunks before the projections, and the padding is not
    masked: its queries and values are the projections' biases, and take part.
    """

    def forward(self, x: Tensor, valid=None, buckets=None, **_) -> Tensor:
        """`(B, L, C)`, as timm's blocks call it."""
        length = x.shape[1]
        x = nn.functional.pad(x, (0, 0, 0, -length % (2 * self.chunk)))
        return super().forward(x)[0][:, :length]

    def prepare(self, length: int) -> None:
        """As above, with the benchmark's padding."""
        super().prepare(length + -length % (2 * self.chunk))


def benchmark_vit(
    num_classes: int,
    image_size: ImageSize,
    patch_size: int = 16,
    embed_dim: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    chunk: int = 64,
    rounds: int = 8,
    qkv_bias: bool = True,
    init_values: float | None = None,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    rotation_seed: int = 0,
) -> VisionTransformer:
    """timm's ViT with LSH attention in each block, as tobna/WhatTransformerToFavor has it.

    Their hashing is random in evaluation, too (logits differ by 9 % from call to call); here it is
    fixed by `rotation_seed`.

    Args:
        chunk, rounds: of LSH attention, by lucidrains' rules.
        init_values: of layer scales; None for none.

    Raises:
        ValueError: the image does not divide into patches, the width into heads, or a size that is
            none.
    """
    _check_sizes(patch_size, embed_dim, depth, 4.0, drop_path_rate)
    rows, columns = patch_grid(image_size, patch_size, "the Reformer")
    model = VisionTransformer(
        img_size=image_size, patch_size=patch_size, num_classes=num_classes, embed_dim=embed_dim,
        depth=depth, num_heads=num_heads, qkv_bias=qkv_bias, init_values=init_values,
        no_embed_class=True, drop_rate=drop_rate, drop_path_rate=drop_path_rate,
    )  # fmt: skip
    for index, block in enumerate(model.blocks):
        block.attn = BenchmarkAttention(
            embed_dim, num_heads, chunk=chunk, rounds=rounds, rules=LUCIDRAINS, qkv_bias=qkv_bias,
            out_bias=True, attn_drop=attn_drop_rate, rotation_seed=rotation_seed + index,
        )  # fmt: skip
        block.attn.prepare(rows * columns + 1)
    return model


def set_rotations(model: nn.Module, rotations: Sequence[Tensor]) -> None:
    """Give every LSH layer of a model its rotations, in order (see `hash_vectors`).

    Raises:
        ValueError: not one for each layer.
    """
    layers = [one for one in model.modules() if isinstance(one, LSHAttention)]
    if len(layers) != len(rotations):
        raise ValueError(f"{len(layers)} LSH layers, {len(rotations)} rotations")
    for layer, one in zip(layers, rotations, strict=True):
        layer.rotations = one
