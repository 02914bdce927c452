"""The down-sampling modules (DSM) between two stages: `(B, C_in, H, W) -> (B, C_out, H', W')`.

H' is ceil(H / stride), W' likewise. `LocalDSM` and `LocalGlobalDSM` are the released ones.
`GlobalDSM` is named in the paper's figure, but not released: it is **our reading**. `StridedDSM`
and `PoolDSM` are what the paper argues against.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from reproductions.uninet.layers import Residual, SeparableConv, map_of, tokens_of


class StridedDSM(nn.Sequential):
    """A strided 3x3 convolution and a BatchNorm: the usual way to the next stage."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1, **_: Any) -> None:
        super().__init__(
            nn.Conv2d(in_dim, out_dim, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out_dim)
        )


class PoolDSM(nn.Sequential):
    """Strided 3x3 max pooling, a 1x1 convolution and a BatchNorm: the other usual way."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1, **_: Any) -> None:
        super().__init__(
            nn.MaxPool2d(3, stride, padding=1),
            nn.Conv2d(in_dim, out_dim, 1, bias=False),
            nn.BatchNorm2d(out_dim),
        )


class LocalDSM(nn.Module):
    """L-DSM: a separable convolution, with max pooling and a 1x1 convolution round it."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1, **_: Any) -> None:
        super().__init__()
        self.local = SeparableConv(in_dim, out_dim, stride)
        self.residual = Residual(in_dim, out_dim, stride, pool=stride != 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.local(x) + self.residual(x)


class LocalGlobalDSM(nn.Module):
    """LG-DSM: queries from a strided separable convolution attend to every pixel of the input.

        q    = norm(separable(x))                   (B, N', C_out): local
        k, v = linear(norm(x))                      (B, N, C_out) each: the whole map
        y    = proj(softmax(q k^T / sqrt(d)) v) + residual(x)

    N' follows from the map at hand, so every size works.

    Raises:
        ValueError: `out_dim` is no multiple of `head_dim`.
    """

    def __init__(
        self, in_dim: int, out_dim: int, stride: int = 1, *, head_dim: int = 32, **_: Any
    ) -> None:
        super().__init__()
        if head_dim < 1 or out_dim % head_dim:
            raise ValueError(
                f"{type(self).__name__}: {out_dim} channels are no multiple of the heads'"
                f" {head_dim}"
            )
        self.num_heads = out_dim // head_dim
        self._add_paths(in_dim, out_dim, stride)
        self.q_norm = nn.LayerNorm(out_dim)
        self.kv_norm = nn.LayerNorm(in_dim)
        self.kv = nn.Linear(in_dim, 2 * out_dim)
        self.proj = nn.Linear(out_dim, out_dim)

    def _add_paths(self, in_dim: int, out_dim: int, stride: int) -> None:
        """Where queries come from, and what goes round the attention."""
        self.query = SeparableConv(in_dim, out_dim, stride)
        self.residual = Residual(in_dim, out_dim, stride, pool=stride != 1)

    def forward(self, x: Tensor) -> Tensor:
        residual, query = self.residual(x), self.query(x)
        attended = self._attend(self.q_norm(tokens_of(query)), self.kv_norm(tokens_of(x)))
        return map_of(attended, query.shape[-2:]) + residual

    def _attend(self, q: Tensor, x: Tensor) -> Tensor:
        """`(B, N', C_out), (B, N, C_in) -> (B, N', C_out)`."""
        batch, _, dim = q.shape
        q = q.view(batch, -1, self.num_heads, dim // self.num_heads).transpose(1, 2)
        kv = self.kv(x).view(batch, -1, 2, self.num_heads, dim // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class GlobalDSM(LocalGlobalDSM):
    """G-DSM: LG-DSM without anything local. Ours, not released.

    Queries and residual are every `stride`-th pixel, linearly mapped; neighbourhoods play no role,
    and all mixing of places is the attention's.
    """

    def _add_paths(self, in_dim: int, out_dim: int, stride: int) -> None:
        self.query = nn.Conv2d(in_dim, out_dim, 1, stride)
        self.residual = nn.Conv2d(in_dim, out_dim, 1, stride)
