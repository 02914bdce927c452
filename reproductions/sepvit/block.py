"""One SepViT block: separable attention and an MLP, each with a residual connection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from harness.deployment import fold_before
from reproductions.sepvit.attention import SeparableAttention
from reproductions.sepvit.layers import Mlp
from reproductions.sepvit.windows import Windows

#: How a learned window token starts: at zero as released, or normal with this deviation.
TOKEN_INIT_STD = {"zeros": 0.0, "normal": 1.0}


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a network have in common; every field is an option of the builder.

    Attributes:
        pointwise: False leaves window tokens and the attention between windows out.
        shift: windows of every second block of a stage are shifted by half their side, as Swin's
            are (without `pointwise` only).
        summary: what stands for a window in the attention between them (`attention.SUMMARIES`).
        token_init: how learned window tokens start: zeros or normal.
        qkv_bias, qk_scale, drop_rate, attn_drop_rate: as in the released code.
    """

    pointwise: bool = True
    shift: bool = False
    summary: str = "learned"
    token_init: str = "zeros"
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0

    def __post_init__(self) -> None:
        """Raise `ValueError` on what cannot be combined."""
        if self.shift and self.pointwise:
            raise ValueError(
                "shifted windows replace the attention between windows: pointwise=False"
            )
        if not 0 <= self.attn_drop_rate < 1:
            raise ValueError(f"attn_drop_rate must be in [0, 1), not {self.attn_drop_rate}")
        if self.token_init not in TOKEN_INIT_STD:
            raise ValueError(
                f"no token_init {self.token_init!r}; there are {', '.join(TOKEN_INIT_STD)}"
            )


class SepViTBlock(nn.Module):
    """`(B, H, W, C) -> (B, H, W, C)`.

    `num_windows` is the number for which the block was built, each with a token of its own. One
    window is the whole map, whatever its size: ordinary attention, without a token or an attention
    between windows (Sec. 2, official code: `do_PSA`). `num_windows=None` is the dense form of the
    detection and segmentation code: any map, always a (constant zero) token, padding not masked.

    Args:
        window: side of a window in tokens.
        shift: by how much the windows of this block are shifted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        num_windows: int | None,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        shift: int = 0,
        options: BlockOptions | None = None,
    ) -> None:
        super().__init__()
        options = options or BlockOptions()
        self.window, self.num_windows, self.shift = window, num_windows, shift
        dense = num_windows is None
        attention = SeparableAttention(
            dim, num_heads, masked=not dense, pointwise=options.pointwise and num_windows != 1,
            summary="zero" if dense else options.summary, window_size=window**2,
            qkv_bias=options.qkv_bias, qk_scale=options.qk_scale,
            attn_drop=options.attn_drop_rate, proj_drop=options.drop_rate,
        )  # fmt: skip
        if attention.has_token and attention.summary == "learned":
            self.win_tokens = nn.Parameter(torch.zeros(1, num_windows, 1, dim))
            if options.token_init != "zeros":
                nn.init.normal_(self.win_tokens, std=TOKEN_INIT_STD[options.token_init])
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), options.drop_rate)
        self.attn = attention
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def windows(self, height: int, width: int) -> Windows:
        """How this block cuts a map.

        Raises:
            ValueError: into another number of windows than it was built for.
        """
        if self.num_windows == 1:
            return Windows.whole(height, width)
        windows = Windows.of_side(height, width, self.window, self.shift)
        if self.num_windows not in (None, windows.count):
            raise ValueError(
                f"this block was built for {self.num_windows} windows of {self.window}x"
                f"{self.window} tokens; a map of {height}x{width} has {windows.count}: build the "
                "model with the image_size it shall see"
            )
        return windows

    def cut(self, x: Tensor, windows: Windows) -> Tensor:
        """The attention's input: windows with their tokens in front, then normalised together."""
        tokens = None
        if self.attn.has_token:
            tokens = getattr(self, "win_tokens", None)
            if tokens is None:
                tokens = x.new_zeros(1, windows.count, 1, x.shape[-1])
        return self.norm1(windows.split(x, tokens))

    def forward(self, x: Tensor) -> Tensor:
        windows = self.windows(x.shape[1], x.shape[2])
        x = x + self.drop_path(self.attn(self.cut(x, windows), windows))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def attention_maps(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention inside and between the windows of a map (`SeparableAttention.maps`)."""
        windows = self.windows(x.shape[1], x.shape[2])
        return self.attn.maps(self.cut(x, windows), windows)

    @torch.no_grad()
    def deploy_(self) -> None:
        """The affine part of the second norm moves into the MLP."""
        if self.norm2.elementwise_affine:
            fold_before(self.mlp.fc1, self.norm2.weight, self.norm2.bias)
            self.norm2 = nn.LayerNorm(
                self.norm2.normalized_shape, eps=self.norm2.eps, elementwise_affine=False
            )
