"""The parts of EfficientFormer: attention, pooling, both kinds of blocks, stem and down-sampling.

Class names and parameter names are the authors', so their checkpoints load almost as they are.
Section numbers are the paper's; where it is silent or differs, the official code decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from harness.deployment import batch_norm_affine, fold_after

Size = int | tuple[int, int]


def to_pair(size: Size) -> tuple[int, int]:
    """`(height, width)` of a size given as one number or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def relative_position_index(height: int, width: int) -> Tensor:
    """The entry of the bias table for each pair of tokens: `(N, N)`, N = height * width.

    A bias depends on the distances |dy| and |dx| only. The official code numbers the distances as
    they appear in a double loop over tokens; the first token already meets all of them row by row,
    so the number is |dy| * width + |dx|.
    """
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    return (y[:, None] - y).abs() * width + (x[:, None] - x).abs()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, fused: bool) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: `(B, H, N, D)` twice and `(B, H, N, V) -> (B, H, N, V)`.

    The fused kernels for CPUs want keys as wide as values; with others PyTorch falls back to a
    path that takes up to twice the time of the three plain operations.
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    logits = torch.add(bias, q @ k.transpose(-2, -1), alpha=q.shape[-1] ** -0.5)
    return logits.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with a learned bias per distance: `(B, N, C) -> (B, N, C)`.

    Keys are narrow and values wide (`attn_ratio` times the key), whatever `dim` is. The scale is
    key_dim^-0.5 as in the official code (the paper's text has the width under the root).

    The bias map is gathered in every call. That costs some microseconds, and it can never be
    stale: not after loading weights in eval mode, not in an averaged copy, not on another device.
    `deploy_` freezes it.
    """

    def __init__(
        self,
        dim: int = 384,
        key_dim: int = 32,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: Size = 7,
    ) -> None:
        super().__init__()
        height, width = to_pair(resolution)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = int(attn_ratio * key_dim)
        self.num_tokens = height * width
        self.qkv = nn.Linear(dim, num_heads * (2 * key_dim + self.value_dim))
        self.proj = nn.Linear(num_heads * self.value_dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, self.num_tokens))
        index = relative_position_index(height, width).flatten()
        self.register_buffer("attention_bias_idxs", index, persistent=False)
        self.register_buffer("frozen_bias", None, persistent=False)

    def bias(self) -> Tensor:
        """What is added to the logits, `(num_heads, N, N)`."""
        if self.frozen_bias is not None:
            return self.frozen_bias
        N = self.num_tokens
        return self.attention_biases.index_select(1, self.attention_bias_idxs).view(-1, N, N)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).view(B, N, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        x = attend(q, k, v, self.bias().to(q.dtype), fused=x.is_cuda)
        return self.proj(x.transpose(1, 2).reshape(B, N, -1))

    def paper_macs(self) -> int:
        """Both attention products for one image, as the official counter has them."""
        return self.num_tokens**2 * self.num_heads * (self.key_dim + self.value_dim)

    @torch.no_grad()
    def deploy_(self) -> None:
        """Freeze the bias map."""
        self.frozen_bias = self.bias()


class Pooling(nn.Module):
    """Token mixer without parameters: the mean of the neighbours minus the pixel itself.

    The residual connection adds the pixel again. Padding does not count in the mean.
    """

    def __init__(self, pool_size: int = 3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, 1, pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


def depthwise(dim: int, kernel_size: int = 3) -> nn.Conv2d:
    """A depthwise convolution as token mixer (an ablation: the paper avoids it)."""
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)


#: Token mixers of a 4D block by name: f(dim, pool_size) -> nn.Module.
TOKEN_MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "pool": lambda dim, size: Pooling(size),
    "identity": lambda dim, size: nn.Identity(),
    "depthwise": depthwise,
}


class ConvMlp(nn.Module):
    """MLP of 1x1 convolutions, each with a batch norm that folds away: `(B, C, H, W)`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden, out = hidden_features or in_features, out_features or in_features
        self.fc1 = nn.Conv2d(in_features, hidden, 1)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden, out, 1)
        self.drop = nn.Dropout(drop)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.norm2 = nn.BatchNorm2d(out)
        for conv in (self.fc1, self.fc2):
            trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)
        self.deployed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.deployed:
            return self.fc2(self.act(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        x = self.drop(self.act(self.norm1(self.fc1(x))))
        return self.drop(self.norm2(self.fc2(x)))

    def deploy_(self) -> None:
        """Fold the norms; 1x1 convolutions of a channels-last map are linears of its pixels."""
        self.fc1 = _as_linear(self.fc1, self.norm1)
        self.fc2 = _as_linear(self.fc2, self.norm2)
        self.norm1 = self.norm2 = None
        self.deployed = True


def _as_linear(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Linear:
    """A 1x1 convolution and the batch norm after it as one linear layer."""
    fold_after(conv, *batch_norm_affine(norm))
    linear = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
    linear.weight = nn.Parameter(conv.weight.flatten(1), requires_grad=False)
    linear.bias = conv.bias
    return linear


class Block(nn.Module):
    """What both kinds of blocks share: two residual branches, each with a scale per channel.

    x = x + DropPath(layer_scale * branch(x)). Scaling and adding is one pass over memory.
    """

    def __init__(self, dim: int, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        for name in ("layer_scale_1", "layer_scale_2"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def add(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        """`x + scale * branch`, the branch dropped for some samples in training."""
        branch = self.drop_path(branch)
        if scale is None:
            return x + branch
        return torch.addcmul(x, scale.view(-1, 1, 1) if x.ndim == 4 else scale, branch)


class Meta4D(Block):
    """Pooling, then an MLP of 1x1 convolutions: `(B, C, H, W) -> (B, C, H, W)`. No norm before."""

    def __init__(
        self,
        dim: int,
        pool_size: int = 3,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        use_layer_scale: bool = True,
        layer_scale_init_value: float = 1e-5,
        token_mixer: str = "pool",
    ) -> None:
        super().__init__(dim, drop_path, layer_scale_init_value if use_layer_scale else None)
        if token_mixer not in TOKEN_MIXERS:
            raise ValueError(f"no token mixer {token_mixer!r}; known: {', '.join(TOKEN_MIXERS)}")
        self.token_mixer = TOKEN_MIXERS[token_mixer](dim, pool_size)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        self.blend = False

    def forward(self, x: Tensor) -> Tensor:
        if self.blend:
            x = torch.lerp(x, self.token_mixer.pool(x), self.layer_scale_1.view(-1, 1, 1))
        else:
            x = self.add(x, self.token_mixer(x), self.layer_scale_1)
        return self.add(x, self.mlp(x), self.layer_scale_2)

    def deploy_(self) -> None:
        """x + s * (pool(x) - x) becomes one blend; the other scale moves into the MLP."""
        if self.layer_scale_1 is not None:
            self.blend = isinstance(self.token_mixer, Pooling)
            fold_after(self.mlp.fc2, self.layer_scale_2)
            self.layer_scale_2 = None


class Meta3D(Block):
    """Self-attention, then an MLP, each after a layer norm: `(B, N, C) -> (B, N, C)`."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        drop: float = 0.0,
        drop_path: float = 0.0,
        use_layer_scale: bool = True,
        layer_scale_init_value: float = 1e-5,
        key_dim: int = 32,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: Size = 7,
    ) -> None:
        super().__init__(dim, drop_path, layer_scale_init_value if use_layer_scale else None)
        self.norm1 = norm_layer(dim)
        self.token_mixer = Attention(dim, key_dim, num_heads, attn_ratio, resolution)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.token_mixer(self.norm1(x)), self.layer_scale_1)
        return self.add(x, self.mlp(self.norm2(x)), self.layer_scale_2)

    def deploy_(self) -> None:
        """Move both scales into the linears before them."""
        if self.layer_scale_1 is not None:
            fold_after(self.token_mixer.proj, self.layer_scale_1)
            fold_after(self.mlp.fc2, self.layer_scale_2)
            self.layer_scale_1 = self.layer_scale_2 = None


def stem(in_chs: int, out_chs: int, strides: tuple[int, int] = (2, 2)) -> nn.Sequential:
    """Two 3x3 convolutions instead of one big patch embedding: `(B, 3, H, W) -> (B, C, H/4, W/4)`.

    ReLU here, GELU everywhere else.
    """
    half = out_chs // 2
    return nn.Sequential(
        nn.Conv2d(in_chs, half, 3, strides[0], 1), nn.BatchNorm2d(half), nn.ReLU(),
        nn.Conv2d(half, out_chs, 3, strides[1], 1), nn.BatchNorm2d(out_chs), nn.ReLU(),
    )  # fmt: skip


class Embedding(nn.Module):
    """A strided convolution and a batch norm between two stages; the map halves: `(B, C, H, W)`."""

    def __init__(
        self,
        patch_size: int = 3,
        stride: int = 2,
        padding: int = 1,
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, padding)
        self.norm = nn.BatchNorm2d(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


def init_linear(module: nn.Module) -> None:
    """Linears start from a truncated normal; convolutions outside MLPs keep PyTorch's start."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
