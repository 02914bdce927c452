"""Attention with two-dimensional relative positions on keys and on values (Sec. 3.4).

For a query n and a key m the released code adds the vectors R_k(n, m) to the key and R_v(n, m) to
the value, and materialises both as (N, N, d) tensors in every layer and every call. But each is the
sum of two table rows, one chosen by the vertical and one by the horizontal distance:

    R(n, m) = vertical[row(m) - row(n)] + horizontal[column(m) - column(n)]

So a query needs its products with one vector per grid row and one per grid column, and the values
need only the attention weights summed over the keys of each row and of each column. Both fit into
one ordinary attention call: queries are lengthened by those products, keys and values by the
one-hot code of their own row and column. Then q' k' is the logit with its position term, and the
extra channels of the output are the sums. No tensor has N x N entries, the fused kernels apply at
any resolution, and the result is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn


def distances(length: int, max_distance: int) -> Tensor:
    """Table entry of each query (first axis) and key along one side: `(length, length)`.

    Distances are clamped to `max_distance` and start at 1; entry 0 is for pairs with the class
    token.
    """
    place = torch.arange(length)
    distance = place[None, :] - place[:, None]
    return distance.clamp(-max_distance, max_distance) + max_distance + 1


class Grid(nn.Module):
    """Which table entries the tokens of a grid need; depends on nothing else, so built once.

    The tokens are the class token and the patches, row by row: N = 1 + H * W. A token's *marks* are
    H + W + 1 channels: one-hot row, one-hot column, whether it is the class token.

    Attributes:
        marks: `(N, H + W + 1)`.
        entries: for each query and mark of a key, the entry of `RelativePosition`'s joined table.
    """

    def __init__(self, size: tuple[int, int], max_distance: int) -> None:
        super().__init__()
        self.size = height, width = size
        patches = torch.arange(height * width)
        rows, columns = patches // width, patches % width
        marks = torch.zeros(1 + len(patches), height + width + 1)
        marks[1 + patches, rows] = 1
        marks[1 + patches, height + columns] = 1
        marks[0, -1] = 1
        length = 2 * max_distance + 2  # of one table
        entries = torch.zeros(1 + len(patches), height + width + 1, dtype=torch.long)
        entries[1:, :height] = distances(height, max_distance)[rows]
        entries[1:, height:-1] = distances(width, max_distance)[columns]
        entries[:, height:-1] += length  # the horizontal table follows the vertical one ...
        entries[:, -1] = 2 * length  # ... and both first entries in one
        self.register_buffer("marks", marks, persistent=False)
        self.register_buffer("entries", entries, persistent=False)


class RelativePosition(nn.Module):
    """Two tables `(2 * max_distance + 2, d)` (official code: `RelativePosition2D_super`)."""

    def __init__(self, head_dim: int, max_distance: int) -> None:
        super().__init__()
        self.embeddings_table_v = nn.Parameter(torch.empty(2 * max_distance + 2, head_dim))
        self.embeddings_table_h = nn.Parameter(torch.empty(2 * max_distance + 2, head_dim))
        trunc_normal_(self.embeddings_table_v, std=0.02)
        trunc_normal_(self.embeddings_table_h, std=0.02)
        self.joined: Tensor | None = None

    def forward(self) -> Tensor:
        """Vertical entries, horizontal entries, sum of their first ones: one table in one piece."""
        if self.joined is not None:
            return self.joined
        vertical, horizontal = self.embeddings_table_v, self.embeddings_table_h
        return torch.cat((vertical, horizontal, vertical[:1] + horizontal[:1]))

    def deploy_(self) -> None:
        """Join the tables once."""
        joined = self.forward().detach()
        del self.joined, self.embeddings_table_v, self.embeddings_table_h
        self.register_buffer("joined", joined)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_table: Tensor,
    value_table: Tensor,
    grid: Grid,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * q (k + R_k)^T) (v + R_v), all `(B, h, N, d)` with the class token first.

    Args:
        key_table, value_table: joined tables `(entries, d)`.
        dropout: of the attention weights (0 outside training).
    """
    batch, heads, _, dim = q.shape
    marks = grid.marks.to(q.dtype).expand(batch, heads, -1, -1)
    entries = grid.entries.expand(batch, heads, -1, -1)
    products = (q @ key_table.t()).to(q.dtype)
    out = F.scaled_dot_product_attention(
        torch.cat((q, products.gather(-1, entries)), dim=-1),
        torch.cat((k, marks), dim=-1),
        torch.cat((v, marks), dim=-1),
        dropout_p=dropout,
        scale=scale,
    )
    sums = torch.zeros_like(products).scatter_add_(-1, entries, out[..., dim:])
    return out[..., :dim] + sums @ value_table
