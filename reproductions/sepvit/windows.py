"""Cutting a map of tokens into windows and putting it together again.

Windows are numbered row by row over the map, and tokens row by row inside a window. A map that does
not divide is padded with zeros at the bottom and on the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Windows:
    """How a map of `height` x `width` tokens is cut.

    Attributes:
        window: tokens down and across in one window.
        shift: tokens by which the map is rolled up and left before it is cut (Swin's).
    """

    height: int
    width: int
    window: tuple[int, int]
    shift: int = 0

    @classmethod
    def of_side(cls, height: int, width: int, side: int, shift: int = 0) -> Windows:
        """Square windows; a map that fits into one is not shifted."""
        alone = height <= side and width <= side
        return cls(height, width, (side, side), 0 if alone else shift)

    @classmethod
    def whole(cls, height: int, width: int) -> Windows:
        """One window that is the map."""
        return cls(height, width, (height, width))

    @property
    def rows(self) -> int:
        return -(-self.height // self.window[0])

    @property
    def columns(self) -> int:
        return -(-self.width // self.window[1])

    @property
    def count(self) -> int:
        """Number of windows, n."""
        return self.rows * self.columns

    @property
    def size(self) -> int:
        """Tokens of one window, S."""
        return self.window[0] * self.window[1]

    @property
    def padding(self) -> tuple[int, int]:
        """Tokens added at the bottom and on the right."""
        return (
            self.rows * self.window[0] - self.height,
            self.columns * self.window[1] - self.width,
        )

    @property
    def padded(self) -> bool:
        return any(self.padding)

    def fits(self, count: int) -> bool:
        """Whether the map divides into exactly so many windows."""
        return self.count == count and not self.padded

    def split(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """`(B, H, W, C) -> (B, n, S, C)`, or S + 1 with `tokens` `(1, n, 1, C)` in front."""
        if self.padded:
            bottom, right = self.padding
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        down, across = self.window
        batch, channels = x.shape[0], x.shape[-1]
        x = x.unflatten(2, (self.columns, across)).unflatten(1, (self.rows, down))
        x = x.transpose(2, 3)  # (B, rows, columns, down, across, C)
        x = x.reshape(batch, self.count, self.size, channels)
        if tokens is None:
            return x
        return torch.cat([tokens.expand(batch, -1, -1, -1), x], dim=2)

    def join(self, x: Tensor) -> Tensor:
        """`(B, h, n, S, d)` with the heads apart `-> (B, H, W, h * d)`, in one copy."""
        batch, heads, _, _, dim = x.shape
        down, across = self.window
        x = x.reshape(batch, heads, self.rows, self.columns, down, across, dim)
        x = x.permute(0, 2, 4, 3, 5, 1, 6)  # (B, rows, down, columns, across, h, d)
        x = x.reshape(batch, self.rows * down, self.columns * across, heads * dim)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, : self.height, : self.width] if self.padded else x

    def real(self, device: torch.device | None = None) -> Tensor:
        """Which tokens of each window are no padding: bool `(n, S)`."""
        ones = torch.ones(1, self.height, self.width, 1, device=device)
        return self.split(ones)[0, :, :, 0] > 0

    def visible(self, device: torch.device | None = None) -> Tensor | None:
        """Who may look at whom in a window: bool `(n, 1 or S, S)`, or None where all may.

        Nobody looks at padding; after a shift, only tokens that were neighbours before it do.
        """
        mask = self.real(device)[:, None, :] if self.padded else None
        if self.shift:
            down = self._regions(self.rows * self.window[0], self.window[0], device)
            across = self._regions(self.columns * self.window[1], self.window[1], device)
            regions = (3 * down[:, None] + across)[None, :, :, None]
            regions = Windows(*regions.shape[1:3], self.window).split(regions)[0, :, :, 0]
            together = regions[:, :, None] == regions[:, None, :]
            # padding would otherwise leave some padded queries without any key
            mask = together if mask is None else together & (mask | ~mask.transpose(1, 2))
        return mask

    def _regions(self, length: int, window: int, device: torch.device | None) -> Tensor:
        """Along a side: 0 where windows hold neighbours, 1 and 2 in the halves of the last one."""
        place = torch.arange(length, device=device)
        return (place >= length - window).long() + (place >= length - self.shift).long()
