"""Separable self-attention: inside the windows first, then between them.

"Depthwise": each window attends to itself, with one extra *window token* in front that ends up as
its summary. "Pointwise": windows attend to each other; queries and keys come from their summaries
alone, values are the windows as they are. (Paper Sec. 3; official code: `SeparableAttention`.)

Notation of shapes: B images, n windows, S tokens in a window, h heads of d channels, C = h * d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reproductions.sepvit.windows import Windows

#: Where a window's summary comes from: a token that takes part in the first attention (learned, or
#: a constant zero), the mean of its tokens, or a depthwise convolution over them.
SUMMARIES = ("learned", "zero", "mean", "convolution")


class SeparableAttention(nn.Module):
    """Depthwise, then pointwise self-attention, on windows that were normalised together.

    Both have an inner shortcut, which adds *normalised* values. The dense form of the released code
    pads without a mask; else padding takes no part: no key in a window, no value between windows.

    Args:
        dim: channels, C.
        pointwise: whether windows attend to each other. Without it this is window attention.
        summary: one of `SUMMARIES`.
        window_size: tokens of a window, for the summary by convolution.
        qk_scale: of both products; default `d ** -0.5`.

    Raises:
        ValueError: heads that do not divide the width, or an unknown summary.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        pointwise: bool = True,
        summary: str = "learned",
        window_size: int | None = None,
        masked: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} does not divide into {num_heads} heads")
        if summary not in SUMMARIES:
            raise ValueError(f"no summary {summary!r}; there are {', '.join(SUMMARIES)}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.pointwise = pointwise
        self.summary = summary
        self.masked = masked
        self.attn_drop = attn_drop
        # sub-modules have the authors' names, so that their checkpoints load as they are
        self.DSA_qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if pointwise:
            self.win_tokens_norm = nn.LayerNorm(dim)
            self.PSA_qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            if summary == "convolution":
                self.win_conv = nn.Parameter(torch.full((window_size, dim), 1 / window_size))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def has_token(self) -> bool:
        """Whether a token stands in front of each window."""
        return self.pointwise and self.summary in ("learned", "zero")

    def qkv(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all windows, `(B * n, h, L, d)` each, as views."""
        batch, count, length, dim = y.shape
        qkv = self.DSA_qkv(y).view(batch * count, length, 3, self.num_heads, dim // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def mask(self, windows: Windows, device: torch.device) -> Tensor | None:
        """Who sees whom in a window, `(n, 1 or L, L)`; everybody sees the window token."""
        visible = windows.visible(device) if self.masked else None
        if visible is None or not self.has_token:
            return visible
        return F.pad(visible, (1, 0) if visible.shape[1] == 1 else (1, 0, 1, 0), value=True)

    def depthwise(self, y: Tensor, windows: Windows) -> Tensor:
        """Attention inside each window, plus its input: `(B, n, L, C)`, L = S or S + 1."""
        q, k, v = self.qkv(y)
        mask = self.mask(windows, y.device)
        if mask is not None:
            mask = mask[None, :, None].expand(len(y), -1, -1, -1, -1).flatten(0, 1)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        return out.transpose(1, 2).reshape(y.shape) + y

    def summaries(self, a: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        """One vector per window `(B, n, C)`, and the windows' own tokens `(B, n, S, C)`."""
        if self.has_token:
            return a[:, :, 0], a[:, :, 1:]
        weight = self.win_conv if self.summary == "convolution" else a.new_ones(windows.size, 1)
        if self.masked and windows.padded:
            weight = weight * windows.real(a.device)[:, :, None]  # (n, S, C or 1)
        total = (a * weight).sum(2)
        return (total / weight.sum(-2) if self.summary == "mean" else total), a

    def window_attention(self, summaries: Tensor) -> Tensor:
        """How much each window takes from each other one: `(B, n, C) -> (B, h, n, n)`."""
        t = F.gelu(self.win_tokens_norm(summaries))
        qk = self.PSA_qk(t).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = qk.unbind(0)
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)

    def mix(self, weights: Tensor, f: Tensor, windows: Windows) -> Tensor:
        """Windows as sums of whole windows, plus themselves: `(B, h, n, S, d)`.

        Slot s of a window only ever meets slot s of the others. Where some windows are padded
        there, the weights of the others are scaled up to one.
        """
        weights = F.dropout(weights, self.attn_drop, self.training)
        count, size = f.shape[1:3]
        f = f.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)  # (B, h, n, S, d)
        if self.masked and windows.padded:
            real = windows.real(f.device).to(f.dtype)
            values = f * real[:, :, None]
            mixed = (weights @ values.flatten(3)).unflatten(-1, (size, -1))
            share = weights @ real  # (B, h, n, S)
            return mixed / share.clamp_min(torch.finfo(f.dtype).tiny)[..., None] + f
        # the shortcut is one more on the diagonal: it costs no pass over the map
        weights = weights + torch.eye(count, dtype=f.dtype, device=f.device)
        return (weights @ f.flatten(3)).unflatten(-1, (size, -1))

    def forward(self, y: Tensor, windows: Windows) -> Tensor:
        """Normalised windows `(B, n, L, C)` -> map `(B, H, W, C)`."""
        a = self.depthwise(y, windows)
        if self.pointwise:
            tokens, f = self.summaries(a, windows)
            mixed = self.mix(self.window_attention(tokens), f, windows)
        else:
            mixed = a[:, None]
        return self.proj_drop(self.proj(windows.join(mixed)))

    @torch.no_grad()
    def maps(self, y: Tensor, windows: Windows) -> tuple[Tensor, Tensor | None]:
        """Both attention maps, for pictures and tests: the forward pass never forms the first.

        Returns:
            inside the windows `(B, n, h, L, L)`, and between them `(B, h, n, n)` or None.
        """
        q, k, _ = self.qkv(y)
        scores = (q @ k.transpose(-2, -1) * self.scale).unflatten(0, y.shape[:2])
        mask = self.mask(windows, y.device)
        if mask is not None:
            scores = scores.masked_fill(~mask[None, :, None], -torch.inf)
        between = None
        if self.pointwise:
            between = self.window_attention(self.summaries(self.depthwise(y, windows), windows)[0])
        return scores.softmax(-1), between
