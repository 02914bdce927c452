"""The transformer block: attention over the whole map with talking heads, then two small MLPs.

Tokens are the map's pixels, row by row. A map `(B, C, H, W)` in channels-last layout *is* its
tokens `(B, N, C)`, so going from one to the other costs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from harness.deployment import fold_after
from reproductions.nasvit.space import HEAD_DIM

VALUE_RATIO = 4  # values have four times the channels of queries and keys
SCALE_COLUMNS = 8  # layer scales are switched by the number of tokens modulo this


def to_tokens(x: Tensor) -> Tensor:
    """`(B, C, H, W) -> (B, N, C)`; a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, side: int) -> Tensor:
    """`(B, N, C) -> (B, C, side, side)`, a view in channels-last layout."""
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def relative_bias(table: Tensor, side: int) -> Tensor:
    """The bias of every pair of tokens: `((2 w - 1)^2, h) -> (h, N, N)` with N = side^2 <= w^2.

    Row `(dy + w - 1) * (2 w - 1) + dx + w - 1` of the table belongs to the offset (dy, dx) from key
    to query, for any side, so nothing is interpolated. Windows that slide over the table from its
    end are the rows of the bias: strided copies do what the released code does by an index of all
    (w^2)^2 pairs.
    """
    length = round(len(table) ** 0.5)
    first = length // 2 - side + 1
    offsets = table.unflatten(0, (length, length)).narrow(0, first, 2 * side - 1)
    offsets = offsets.narrow(1, first, 2 * side - 1).flip(0, 1)
    pairs = offsets.unfold(0, side, 1).unfold(1, side, 1).flip(0, 1)  # (y, x, h, y', x')
    return pairs.permute(2, 0, 1, 3, 4).reshape(-1, side**2, side**2)


def joint_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over tokens *and* channels, with weight and bias per channel.

    That is the released code's norm: `F.layer_norm` over the shape (N, C). A group norm with a
    single group computes it without spreading weight and bias over the tokens.

    Args:
        x: a map `(B, C, H, W)`.
    """
    return F.group_norm(x, 1, weight, bias, eps)


def talk(attention: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer over the heads: `(B, h, N, N)` with weight `(h, h)`.

    `bias` is anything that broadcasts to `(h, N * N)`: one number per head, or per head and pair.
    """
    batch, heads = attention.shape[:2]
    mixed = torch.baddbmm(bias, weight.expand(batch, heads, heads), attention.flatten(2))
    return mixed.view_as(attention)


def mix_values(attention: Tensor, values: Tensor) -> Tensor:
    """`(B, h, N, N)` times values `(B, 4 C, H, W)` -> tokens `(B, N, 4 C)`."""
    heads = attention.shape[1]
    values = to_tokens(values).unflatten(2, (heads, -1)).transpose(1, 2)
    return (attention @ values).transpose(1, 2).flatten(2)


def split_heads(x: Tensor) -> Tensor:
    """`(B, N, C) -> (B, h, N, 8)`."""
    return x.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)


class Attention(nn.Module):
    """Attention of a dense network: `(B, C, H, W) -> (B, N, C)`.

    In evaluation without gradients the bias of all pairs, mixed over the heads, is kept from the
    first call on, and made again when one of its weights has changed (written to in place or
    replaced; what is written past autograd, through `.data`, is not noticed). `deploy_` makes it
    for good.

    Args:
        dim: C, a multiple of 8.
        side: of the map.
        window: side that the table of relative positions is made for.
    """

    def __init__(self, dim: int, side: int, window: int) -> None:
        super().__init__()
        heads, inner = dim // HEAD_DIM, VALUE_RATIO * dim
        self.side = side
        self.qk = nn.Linear(dim, 2 * dim)
        self.v = nn.Linear(dim, inner)
        self.vconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.before = nn.Linear(heads, heads)  # talking heads, around the softmax
        self.after = nn.Linear(heads, heads)
        self.proj = nn.Linear(inner, dim)
        self.table: nn.Parameter | None = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        trunc_normal_(self.table, std=0.02)
        self._kept: tuple[tuple, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        query, key = split_heads(self.qk(tokens)).chunk(2, 1)
        values = self.vconv(to_map(self.v(tokens), self.side))
        weight, bias = self.mixed_bias()
        attention = talk(query @ key.transpose(-2, -1), weight, bias).softmax(-1)
        attention = talk(attention, self.after.weight, self.after.bias[:, None])
        return self.proj(F.silu(mix_values(attention, values)))

    def mixed_bias(self) -> tuple[Tensor, Tensor]:
        """Weight `(h, h)` and bias `(h, N * N)` of the heads' mix before the softmax.

        The mix is linear: that of scaled products plus position bias is that of the products, and
        beside it one of the position bias, which no image changes.
        """
        if self.table is None:
            return self.mix, self.bias
        sources = (self.table, self.before.weight, self.before.bias)
        if (
            self.training
            or torch.compiler.is_compiling()
            or any(one.is_inference() for one in sources)
            or (torch.is_grad_enabled() and any(one.requires_grad for one in sources))
        ):
            return self._mix()
        if any(one.is_meta for one in sources):
            return self._mix(_summed)  # nothing to keep, and counters see what they see elsewhere
        state = tuple((one._version, one.data_ptr(), one.device, one.dtype) for one in sources)
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = state, self._mix(_summed)
        return self._kept[1]

    def _mix(self, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul):
        weight = self.before.weight
        positions = product(weight, relative_bias(self.table, self.side).flatten(1))
        return weight * HEAD_DIM**-0.5, positions + self.before.bias[:, None]

    def deploy_(self) -> None:
        """Keep the mixed bias in place of the table."""
        weight, bias = self._mix()
        self.register_buffer("mix", weight.detach(), persistent=False)
        self.register_buffer("bias", bias.detach(), persistent=False)
        self.table = self._kept = None
        del self.before

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}  # a copy makes its own


def _summed(weight: Tensor, positions: Tensor) -> Tensor:
    """`(h, h)` times `(h, N * N)`, as a sum: made once per model, it is no product per image, and
    counters of multiply-adds shall not take it for one."""
    return (weight[:, :, None] * positions).sum(1)


class MLP(nn.Module):
    """Linear, swish, linear, all of one width."""

    def __init__(self, dim: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.linear1, self.linear2 = linear(dim, dim), linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x), inplace=True))


class TransformerBlock(nn.Module):
    """Attention and two MLPs, each after a joint norm and under a layer scale, in a dense network.

    `(B, C, H, W) -> (B, C, H, W)`. Both MLPs share one scale. The scales of a dense network are
    those that the supernet's tables hold for its depth and its number of tokens, with the factor
    8 / C in them.

    Args:
        scale_init: initial value of the tables.
    """

    def __init__(self, dim: int, side: int, window: int, scale_init: float) -> None:
        super().__init__()
        self.side = side
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(1, dim) for _ in range(3))
        self.attn = Attention(dim, side, window)
        self.mlp1, self.mlp2 = MLP(dim), MLP(dim)
        start = scale_init * SCALE_COLUMNS / dim
        self.scale_attn: nn.Parameter | None = nn.Parameter(torch.full((dim,), start))
        self.scale_mlp: nn.Parameter | None = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        tokens = self._add(tokens, self.attn(self._normed(tokens, self.norm1)), self.scale_attn)
        for norm, mlp in ((self.norm3, self.mlp2), (self.norm2, self.mlp1)):
            branch = mlp(to_tokens(self._normed(tokens, norm)))
            tokens = self._add(tokens, branch, self.scale_mlp)
        return to_map(tokens, self.side)

    def _normed(self, tokens: Tensor, norm: nn.GroupNorm) -> Tensor:
        return joint_norm(to_map(tokens, self.side), norm.weight, norm.bias, norm.eps)

    @staticmethod
    def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        return x + branch if scale is None else torch.addcmul(x, branch, scale)

    def deploy_(self) -> None:
        """Move the layer scales into the linear layers before them."""
        fold_after(self.attn.proj, self.scale_attn)
        for mlp in (self.mlp1, self.mlp2):
            fold_after(mlp.linear2, self.scale_mlp)
        self.scale_attn = self.scale_mlp = None
