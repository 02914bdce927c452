"""Soft masks in any timm vision transformer: the network that is searched.

`make_searchable` changes a model in place: same weights, same names, and in every block three new
parameters that multiply activations (official code: `SparseAttention`, `SparseMlp`).

- `attn.zeta` `(1, 1, H, 1, d)`: one gate per head and dimension, shared by q, k and v. So a logit
  gets it squared, a value once.
- `mlp.zeta` `(1, 1, M)`: one gate per hidden channel, after the activation.
- `attn.patch_zeta` `(1, N, 1)`: one gate per token, through tanh, on the normalised input of the
  attention and of the MLP. The residual stream is never masked.

Gates scale activations in the paper; here they scale the weights that make or read those
activations, which is the same product and cheaper from two images on.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import Tensor, nn

from harness.linear import linear
from reproductions.vit_slim.selection import Kept, Scores, choose

#: Where token masks start; tanh(3) = 0.995.
TOKENS_START = 3.0


class SearchAttention(Attention):
    """timm's attention with a gate per head and dimension; also keeps the block's token gates."""

    def add_masks(self, tokens: int, head_search: bool, uniform_search: bool) -> None:
        heads = 1 if uniform_search else self.num_heads
        dims = 1 if head_search else self.head_dim
        like = self.qkv.weight
        self.zeta = nn.Parameter(like.new_ones(1, 1, heads, 1, dims))
        self.patch_zeta = nn.Parameter(like.new_full((1, tokens, 1), TOKENS_START))
        # 0/1 masks that stand in for the soft ones; no part of the state dict, as in the release
        self.register_buffer("kept", None, persistent=False)
        self.register_buffer("kept_tokens", None, persistent=False)

    def token_mask(self) -> Tensor:
        """`(1, N, 1)`."""
        return torch.tanh(self.patch_zeta) if self.kept_tokens is None else self.kept_tokens

    def rows(self) -> Tensor:
        """The gate of each row of `qkv`: `(3 H d,)`."""
        gates = self.zeta if self.kept is None else self.kept
        return gates.expand(1, 1, self.num_heads, 1, self.head_dim).reshape(-1).repeat(3)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C) -> (B, N, C)`."""
        rows = self.rows()
        bias = None if self.qkv.bias is None else self.qkv.bias * rows
        qkv = linear(x, self.qkv.weight * rows[:, None], bias)
        qkv = qkv.unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class SearchMlp(Mlp):
    """timm's MLP with a gate per hidden channel."""

    def add_masks(self) -> None:
        self.zeta = nn.Parameter(self.fc1.weight.new_ones(1, 1, self.fc1.out_features))
        self.register_buffer("kept", None, persistent=False)

    def columns(self) -> Tensor:
        """The gate of each column of `fc2`: `(1, M)`."""
        return (self.zeta if self.kept is None else self.kept).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C) -> (B, N, C)`."""
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(linear(x, self.fc2.weight * self.columns(), self.fc2.bias))


class SearchBlock(Block):
    """timm's pre-norm block whose two branches see the tokens through their mask."""

    def add_masks(self, tokens: int, head_search: bool, uniform_search: bool) -> None:
        self.attn.__class__, self.mlp.__class__ = SearchAttention, SearchMlp
        self.attn.add_masks(tokens, head_search, uniform_search)
        self.mlp.add_masks()
        # the token mask as a constant, once deployed
        self.register_buffer("fixed_tokens", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C) -> (B, N, C)`."""
        tokens = self.attn.token_mask() if self.fixed_tokens is None else self.fixed_tokens
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x) * tokens)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x) * tokens)))

    @torch.no_grad()
    def deploy_(self) -> None:
        """Multiply the gates into the weights; the block's attention and MLP are timm's again."""
        attn, mlp = self.attn, self.mlp
        self.fixed_tokens = attn.token_mask().detach()
        rows = attn.rows()
        attn.qkv.weight.mul_(rows[:, None])
        if attn.qkv.bias is not None:
            attn.qkv.bias.mul_(rows)
        mlp.fc2.weight.mul_(mlp.columns())
        for part, plain, names in (
            (attn, Attention, ("zeta", "patch_zeta", "kept", "kept_tokens")),
            (mlp, Mlp, ("zeta", "kept")),
        ):
            for name in names:
                delattr(part, name)
            part.__class__ = plain


def make_searchable(
    model: VisionTransformer, head_search: bool = False, uniform_search: bool = False
) -> VisionTransformer:
    """Put soft masks at their constants into a timm vision transformer, in place.

    Args:
        model: timm's `VisionTransformer` or a model derived from it (DeiT, distilled or not,
            DeiT-III with its layer scales, AugReg, registers ...), with ordinary pre-norm blocks.
        head_search: one gate per head instead of one per dimension (an ablation of the paper).
        uniform_search: gates per dimension that all heads of a layer share.

    Returns:
        The same model. Masks at their constants scale every block's input by tanh 3, so it is not
        quite the function it was.

    Raises:
        ValueError: another kind of model, one that is searchable already, or both layouts.
    """
    if head_search and uniform_search:
        raise ValueError("head_search and uniform_search exclude each other")
    check_model(model)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for block in model.blocks:
        block.__class__ = SearchBlock
        block.add_masks(tokens, head_search, uniform_search)
    return model


def check_model(model: nn.Module) -> None:
    """Raise `ValueError` for a model that cannot take masks and be sliced afterwards."""
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"masks go into timm's VisionTransformer, not into a {name}")
    if model.dynamic_img_size or not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("every token has a mask: no dynamic_img_size and no patch dropout")
    for block in model.blocks:
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if type(block) is not Block or type(attn) is not Attention or type(mlp) is not Mlp:
            kinds = "/".join(type(one).__name__ for one in (block, attn, mlp))
            raise ValueError(f"masks go into timm's Block with Attention and Mlp, not into {kinds}")
        norms = (attn.q_norm, attn.k_norm, getattr(attn, "norm", None), mlp.norm)
        if any(not isinstance(one, nn.Identity | None) for one in norms):
            raise ValueError(
                "a norm over head dimensions or hidden channels mixes what is to be sliced "
                "(qk_norm, scale_attn_norm, scale_mlp_norm)"
            )
        if getattr(attn, "gate", None) is not None or not isinstance(mlp.fc1, nn.Linear):
            raise ValueError("gated attention and convolutional MLPs cannot be sliced")


def search_blocks(model: nn.Module) -> list[SearchBlock]:
    """The blocks of a searchable model.

    Raises:
        ValueError: it has no masks (any more).
    """
    blocks = list(getattr(model, "blocks", ()))
    if not blocks or any(not hasattr(getattr(one, "attn", None), "patch_zeta") for one in blocks):
        raise ValueError(
            f"this {type(model).__name__} has no masks: call make_searchable first, and slim "
            "before deploying"
        )
    return blocks


def penalties(model: nn.Module) -> dict[str, Tensor]:
    """Sums of the absolute masks over all layers, by kind; tokens after their tanh.

    Official code: `get_sparsity_loss`.
    """
    blocks = search_blocks(model)
    kinds = {
        "attention": [block.attn.zeta for block in blocks],
        "mlp": [block.mlp.zeta for block in blocks],
        "tokens": [torch.tanh(block.attn.patch_zeta) for block in blocks],
    }
    return {
        kind: torch.cat([one.flatten() for one in masks]).abs().sum()
        for kind, masks in kinds.items()
    }


@torch.no_grad()
def learned_scores(model: nn.Module) -> Scores:
    """The masks' values, signed, by which they are ranked; tokens after their tanh."""
    blocks = search_blocks(model)
    attn = blocks[0].attn
    return Scores(
        attention=tuple(to_numpy(block.attn.zeta[0, 0, :, 0]) for block in blocks),
        mlp=tuple(to_numpy(block.mlp.zeta.flatten()) for block in blocks),
        # tanh of each layer's own tensor: another shape may round the last bit differently
        tokens=tuple(to_numpy(torch.tanh(block.attn.patch_zeta).flatten()) for block in blocks),
        heads=(attn.num_heads, attn.head_dim),
    )


def to_numpy(values: Tensor) -> NDArray[np.floating]:
    """As an array, also where NumPy lacks the type (bfloat16)."""
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()


@torch.no_grad()
def compress(
    model: nn.Module,
    attention: float = 0.7,
    mlp: float = 0.7,
    tokens: float = 1.0,
    token_rule: str = "released",
) -> Kept:
    """Replace the soft masks by 0 and 1, in place: the reference form, at full width.

    This is all that the released code does under this name; the smaller network is
    `reproductions.vit_slim.slimming.slim`. The soft values stay in the state dict, frozen.

    Args:
        attention, mlp, tokens: budgets, the shares to keep of each kind, in (0, 1].
        token_rule: as in `selection.choose`.

    Raises:
        ValueError: a budget outside (0, 1], or a model without masks.
    """
    kept = choose(learned_scores(model), attention, mlp, tokens, token_rule)
    for layer, block in enumerate(search_blocks(model)):
        attn, hidden = block.attn, block.mlp
        for part, buffer, mask, values in (
            (attn, "kept", attn.zeta, kept.attention[layer]),
            (attn, "kept_tokens", attn.patch_zeta, kept.tokens[layer]),
            (hidden, "kept", hidden.zeta, kept.mlp[layer]),
        ):
            setattr(part, buffer, torch.from_numpy(values).to(mask).view_as(mask))
            mask.requires_grad_(False)
    return kept


def decompress(model: nn.Module) -> None:
    """Back to the soft masks, trainable again, in place.

    Raises:
        ValueError: the model has no masks.
    """
    for block in search_blocks(model):
        block.attn.kept = block.attn.kept_tokens = block.mlp.kept = None
        for mask in (block.attn.zeta, block.attn.patch_zeta, block.mlp.zeta):
            mask.requires_grad_(True)
