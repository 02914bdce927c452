"""The blocks: one local, one global, and the two ways to go to the next resolution."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from reproductions.efficientformer_v2.attention import Attention4D, Attention4DDownsample, Size
from reproductions.efficientformer_v2.layers import (
    GELU,
    ConvNorm,
    LayerScale,
    folded,
    init_feed_forward_,
)


class Stem(nn.Module):
    """Two 3x3 convolutions with norm and GELU: `(B, 3, H, W) -> (B, dim, H / s, W / s)`.

    `stride` is s: 4 in the paper, 2 for images of 32 pixels (the first one strides).
    """

    def __init__(self, dim: int, stride: int = 4) -> None:
        super().__init__()
        if stride not in (2, 4):
            raise ValueError(
                f"the stem's stride is 4 (the paper) or 2 (small images), not {stride}"
            )
        self.conv1 = ConvNorm(3, dim // 2, 3, stride=2)
        self.act1 = GELU()
        self.conv2 = ConvNorm(dim // 2, dim, 3, stride=stride // 2)
        self.act2 = GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.conv2(self.act1(self.conv1(x))))


class Mlp(nn.Module):
    """The unified feed-forward network: 1x1, depthwise 3x3 and 1x1 convolution.

    Table 1, row 3; official code: `Mlp` with `mid_conv=True`.

    Each is normalised; GELU follows the first two. The depthwise convolution inside replaces the
    local token mixer of the first EfficientFormer. `(B, C, H, W) -> (B, C, H, W)`.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden_dim)
        self.mid = ConvNorm(hidden_dim, hidden_dim, 3, groups=hidden_dim)
        self.fc2 = ConvNorm(hidden_dim, dim)
        self.act = GELU()
        for layer in (self.fc1, self.fc2):
            init_feed_forward_(layer.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.mid(self.act(self.fc1(x)))))


class FFN(nn.Module):
    """Local block: `x + ls2 * Mlp(x)`, without a norm in front."""

    def __init__(
        self, dim: int, mlp_ratio: float = 4, drop_path: float = 0.0, layer_scale_init: float = 1e-5
    ) -> None:
        super().__init__()
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale_init)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.ls2(x, self.drop_path2(self.mlp(x)))

    def deploy_(self) -> None:
        """Fold the layer scale into the last convolution of the branch."""
        self.ls2 = folded(self.ls2, self.mlp.fc2)


class AttnFFN(FFN):
    """Global block: `x + ls1 * Attention4D(x)`, then the local block."""

    def __init__(
        self,
        dim: int,
        resolution: int | Size,
        mlp_ratio: float = 4,
        stride: int = 1,
        drop_path: float = 0.0,
        layer_scale_init: float = 1e-5,
        **attention: float,
    ) -> None:
        super().__init__(dim, mlp_ratio, drop_path, layer_scale_init)
        self.token_mixer = Attention4D(dim, resolution, stride=stride, **attention)
        self.ls1 = LayerScale(dim, layer_scale_init)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ls1(x, self.drop_path1(self.token_mixer(x)))
        return super().forward(x)

    def deploy_(self) -> None:
        """Fold both layer scales."""
        super().deploy_()
        self.ls1 = folded(self.ls1, self.token_mixer.proj)


class Embedding(nn.Module):
    """Down-sampling: a strided 3x3 convolution, and in the dual path an attention beside it.

    `(B, dim, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))`. The sum of both paths is used
    between the last two stages (Table 1, row 9; official code: `Embedding` with `asub=True`).
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        resolution: int | Size | None = None,
        dual_path: bool = False,
        **attention: float,
    ) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, out_dim, 3, stride=2)
        if dual_path and resolution is None:
            raise ValueError("the dual path needs the resolution of its input")
        self.attn = (
            Attention4DDownsample(dim, out_dim, resolution, **attention) if dual_path else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return out if self.attn is None else self.attn(x) + out
