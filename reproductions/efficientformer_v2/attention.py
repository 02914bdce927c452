"""The two attentions: inside a block (optionally strided) and as a down-sampler.

Both work on maps `(B, C, H, W)` of a size fixed at construction, since a table holds one learned
bias per head and per absolute offset between a query and a key.
"""

from __future__ import annotations

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from harness.deployment import fold_after
from reproductions.efficientformer_v2.layers import GELU, ConvNorm, merged

Size = tuple[int, int]


def offset_index(keys: Size, stride: int = 1) -> Tensor:
    """Which table entry belongs to which pair of query and key, in closed form.

    Queries stand on every `stride`-th key in both directions. The pair's entry is
    `|dy| * W + |dx|`, the number the authors' double loop arrives at (official code:
    `attention_bias_idxs`).

    Args:
        keys: (H, W) of the key map.
        stride: distance of two queries, in keys.

    Returns:
        int64 `(Nq, Nk)` with entries in `[0, H * W)`.
    """
    height, width = keys
    y, x = torch.arange(height), torch.arange(width)
    dy = (y[::stride, None] - y).abs()  # (Hq, H)
    dx = (x[::stride, None] - x).abs()  # (Wq, W)
    index = dy[:, None, :, None] * width + dx[None, :, None, :]  # (Hq, Wq, H, W)
    return index.flatten(2).flatten(0, 1)


def join_heads(x: Tensor, size: Size) -> Tensor:
    """`(B, heads, N, d) -> (B, heads * d, H, W)`, stored channels last.

    Bilinear up-sampling of such a map is ten times as fast on a CPU as of a contiguous one.
    """
    return x.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, size)


class BiasedAttention(nn.Module):
    """What both attentions share: heads and the learned position bias."""

    def __init__(
        self, num_heads: int, key_dim: int, attn_ratio: float, keys: Size, query_stride: int = 1
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = int(attn_ratio * key_dim)
        self.scale = key_dim**-0.5
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, keys[0] * keys[1]))
        self.register_buffer("bias_index", offset_index(keys, query_stride), persistent=False)

    def position_bias(self) -> Tensor:
        """The bias of each head and pair, `(heads, Nq, Nk)`.

        It is gathered anew on each call (15 us for a 49x49 table). The authors keep the gathered
        tensor in evaluation mode, where it goes stale when weights are loaded afterwards and cuts
        the table off its gradient; here only `deploy_` keeps it.
        """
        index = self.bias_index
        return self.attention_biases.index_select(1, index.flatten()).unflatten(1, index.shape)

    def split_heads(self, x: Tensor) -> Tensor:
        """`(B, heads * d, H, W) -> (B, heads, d, H * W)`, a view in either memory format."""
        batch, channels, height, width = x.shape
        return x.reshape(batch, self.num_heads, channels // self.num_heads, height * width)

    def paper_macs(self) -> int:
        """Multiply-adds of both attention products per image, as the authors count them."""
        pairs = self.bias_index.numel()
        return self.num_heads * (self.key_dim + self.value_dim) * pairs

    def freeze_bias_(self, bias: Tensor) -> None:
        """Keep `bias` (heads, Nq, Nk) in place of the table it was made from."""
        del self.attention_biases
        self.register_buffer("bias", bias.contiguous())


class Attention4D(BiasedAttention):
    """Multi-head attention on a map, with locality and talking heads.

    Table 1, rows 6 to 8; official code: `Attention4D`.

    Queries, keys and values are 1x1 convolutions; a depthwise 3x3 convolution of the values is
    added to the result. Heads are mixed before and after the softmax. Head dimensions do not
    depend on the width. With `stride=2` a depthwise convolution halves the map first and bilinear
    up-sampling restores it before the projection: attention at a quarter of the tokens.

    Args:
        dim: channels of input and output.
        resolution: (H, W) of the input.
        key_dim: channels of a query or key per head.
        attn_ratio: channels of a value per head, in multiples of `key_dim`.
        stride: 1 for attention over the whole map, 2 for a quarter of it (the paper's stage 3).

    Raises:
        ValueError: the map cannot be restored, since `stride` does not divide it.
    """

    def __init__(
        self,
        dim: int,
        resolution: int | Size,
        key_dim: int = 32,
        num_heads: int = 8,
        attn_ratio: float = 4,
        stride: int = 1,
    ) -> None:
        height, width = to_2tuple(resolution)
        if height % stride or width % stride:
            raise ValueError(
                f"attention with stride {stride} cannot restore a map of {height}x{width}; "
                f"both sides must be multiples of {stride}"
            )
        super().__init__(num_heads, key_dim, attn_ratio, (height // stride, width // stride))
        values = num_heads * self.value_dim
        self.stride = stride
        self.stride_conv = ConvNorm(dim, dim, 3, stride, groups=dim) if stride > 1 else None
        self.q = ConvNorm(dim, num_heads * key_dim)
        self.k = ConvNorm(dim, num_heads * key_dim)
        self.v = ConvNorm(dim, values)
        self.v_local = ConvNorm(values, values, 3, groups=values)
        self.talking_head1 = nn.Conv2d(num_heads, num_heads, 1)
        self.talking_head2 = nn.Conv2d(num_heads, num_heads, 1)
        self.act = GELU()
        self.proj = ConvNorm(values, dim)
        self.qkv: nn.Conv2d | None = None  # set by deploy_

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention logits `(B, heads, N, N)`: position bias first, then the first mix of heads."""
        scores = q.transpose(-2, -1) @ k
        if self.qkv is not None:  # scale folded into q, the mixed bias kept
            return self.talking_head1(scores).add_(self.bias)
        return self.talking_head1(torch.add(self.position_bias(), scores, alpha=self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, H, W) -> (B, dim, H, W)`."""
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        if self.qkv is None:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            keys = self.num_heads * self.key_dim
            q, k, v = self.qkv(x).split([keys, keys, self.num_heads * self.value_dim], dim=1)
        attention = self.logits(self.split_heads(q), self.split_heads(k)).softmax(dim=-1)
        attention = self.talking_head2(attention)
        mixed = attention @ self.split_heads(v).transpose(-2, -1)  # (B, heads, N, d)
        out = join_heads(mixed, x.shape[-2:]) + self.v_local(v)
        if self.stride_conv is not None:
            out = F.interpolate(out, scale_factor=self.stride, mode="bilinear", align_corners=False)
        return self.proj(self.act(out))

    @torch.no_grad()
    def deploy_(self) -> None:
        """One convolution for q, k and v; scale and first mix of heads folded."""
        if self.qkv is not None:
            return
        fold_after(self.q.conv, torch.full((self.q.conv.out_channels,), self.scale))
        bias = self.talking_head1(self.position_bias()[None])[0]
        self.talking_head1.bias = None
        self.freeze_bias_(bias)
        self.qkv = merged(self.q.conv, self.k.conv, self.v.conv)
        del self.q, self.k, self.v


class LGQuery(nn.Module):
    """Queries of the down-sampler: every second pixel, plus a strided depthwise convolution.

    `(B, in_dim, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))` (official code:
    `LGQuery`, whose average pool of kernel 1 and stride 2 is the slice below).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(in_dim, in_dim, 3, stride=2, padding=1, groups=in_dim)
        self.proj = ConvNorm(in_dim, out_dim)
        self.subsample = True  # until deploy_ moves it into `local`

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x)
        return self.proj(local + x[:, :, ::2, ::2] if self.subsample else local)

    @torch.no_grad()
    def deploy_(self) -> None:
        """Taking every second pixel is the depthwise kernel with a one in the centre."""
        if self.subsample:
            self.local.weight[:, :, 1, 1] += 1
            self.subsample = False


class Attention4DDownsample(BiasedAttention):
    """Attention whose queries stand on every second pixel.

    Table 1, row 9; official code: `Attention4DDownsample`.

    It halves the map and changes the width. There are no talking heads, so the fused attention
    kernel serves, with the position bias as its mask.

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
        resolution: (H, W) of the input.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        resolution: int | Size,
        key_dim: int = 16,
        num_heads: int = 8,
        attn_ratio: float = 4,
    ) -> None:
        super().__init__(num_heads, key_dim, attn_ratio, to_2tuple(resolution), query_stride=2)
        values = num_heads * self.value_dim
        self.dim = dim
        self.q = LGQuery(dim, num_heads * key_dim)
        self.k = ConvNorm(dim, num_heads * key_dim)
        self.v = ConvNorm(dim, values)
        self.v_local = ConvNorm(values, values, 3, stride=2, groups=values)
        self.act = GELU()
        self.proj = ConvNorm(values, out_dim)
        self.kv: nn.Conv2d | None = None  # set by deploy_

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))`."""
        q = self.q(x)
        if self.kv is None:
            k, v, bias = self.k(x), self.v(x), self.position_bias()
        else:
            keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
            (k, v), bias = self.kv(x).split([keys, values], dim=1), self.bias
        query, key, value = (self.split_heads(one).transpose(-2, -1) for one in (q, k, v))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(self.act(join_heads(mixed, q.shape[-2:]) + self.v_local(v)))

    def paper_macs(self) -> int:
        """Both products, and one operation per output of the pool in `LGQuery`."""
        return super().paper_macs() + self.dim * self.bias_index.shape[0]

    @torch.no_grad()
    def deploy_(self) -> None:
        """One convolution for k and v, and the gathered bias kept."""
        if self.kv is not None:
            return
        self.freeze_bias_(self.position_bias())
        self.kv = merged(self.k.conv, self.v.conv)
        del self.k, self.v
