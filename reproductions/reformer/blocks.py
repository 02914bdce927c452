"""Blocks of chunked attention: tokens gathered in sorted order, as much at a time as a cache holds.

A block has some rows, some of their rounds, and a range of these rounds' chunks: everything where
sequences are short, one round where they are long, and part of one where they are very long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reproductions.reformer.pieces import pieces
from reproductions.reformer.windows import Biases, Windows

#: Elements of one block's gathered queries, keys and values: what a cache holds.
ROW_ELEMENTS = 1 << 21


def take(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[r, index[r, k]]` as `(R, K, ...)` for rows `(R, L, ...)`: whole rows are copied."""
    count, length = rows.shape[:2]
    offsets = torch.arange(count, device=index.device, dtype=index.dtype) * length
    flat = (index + offsets[:, None]).flatten()
    return rows.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape)


class Rows:
    """Some rows of queries, keys and values `(R, L, ...)`, and what their blocks share.

    A block has some rounds, p of the n, and a range of their chunks.
    """

    def __init__(
        self, windows: Windows, rows: slice, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        self.windows, self.rows = windows, rows
        self.query, self.key, self.value = query[rows], key[rows], value[rows]
        self.tokens = windows.queries(rows, query.device)
        self.biases = Biases(windows, rows, self.tokens)
        self.width = _width(query, value)

    def lanes(self, rounds: slice) -> int:
        """Lanes of some rounds: `R p`."""
        return self.query.shape[0] * (rounds.stop - rounds.start)

    def rounds(self) -> Iterator[slice]:
        """Rounds that are taken at a time."""
        each = self.query.shape[0] * self.windows.length * self.width
        yield from pieces(0, self.windows.rounds, each, ROW_ELEMENTS, self.query.device)

    def blocks(self, rounds: slice) -> Iterator[Block]:
        """Blocks that together hold every chunk of some rounds."""
        each = self.lanes(rounds) * self.windows.chunk * self.width
        count = self.windows.per_round
        for chunks in pieces(0, count, each, ROW_ELEMENTS, self.query.device):
            yield Block(self, rounds, chunks)

    def tokens_of(self, rounds: slice, first: int, last: int) -> Tensor:
        """Tokens of a range of some rounds' chunks, on the ring: `(R, p (last - first) m)`."""
        places = self.windows.places(rounds, first, last, self.tokens.device)
        return self.tokens.index_select(1, places.flatten())

    def unsorted(self, lanes: Tensor, rounds: slice, before: int = 0) -> Tensor:
        """Values of some rounds' chunks `(R p, C, m, ...)` by token: `(R, p, L, ...)`.

        Args:
            before: chunks in front of the round's own, which are left out, as are those behind.
        """
        windows, count = self.windows, rounds.stop - rounds.start
        if windows.sorted is None:
            own = lanes[:, before : before + windows.per_round]
            return own.reshape(-1, count, windows.length, *lanes.shape[3:])
        length = lanes.shape[1] * windows.chunk
        starts = torch.arange(count, dtype=torch.int32, device=lanes.device) * length
        starts += before * windows.chunk
        index = windows.sorted.places[self.rows, rounds] + starts[:, None]
        flat = lanes.reshape(-1, count * length, *lanes.shape[3:])
        return take(flat, index.flatten(1)).unflatten(1, (count, windows.length))


class Block:
    """Queries, and windows of keys and values, of a range of chunks in some rounds.

    Attributes:
        query: `(R p, C, m, d)`; key, value: `(R p, C, w, ...)`, views.
    """

    def __init__(self, of: Rows, rounds: slice, chunks: slice) -> None:
        windows = of.windows
        self.of, self.rounds, self.chunks = of, rounds, chunks
        self.asked = None  # tokens as they come
        if windows.sorted is not None or chunks != slice(0, windows.per_round):
            self.asked = of.tokens_of(rounds, chunks.start, chunks.stop)
        near = of.tokens_of(rounds, chunks.start - windows.before, chunks.stop + windows.after)
        self.query = self.sorted(of.query)
        self.key, self.value = (self._windows_of(one, near) for one in (of.key, of.value))

    def sorted(self, rows: Tensor) -> Tensor:
        """Values of tokens `(R, L, ...)` in these chunks: `(R p, C, m, ...)`."""
        rows = rows if self.asked is None else take(rows, self.asked)
        chunks = self.chunks.stop - self.chunks.start
        return rows.reshape(-1, chunks, self.of.windows.chunk, *rows.shape[2:])

    def _windows_of(self, rows: Tensor, near: Tensor) -> Tensor:
        lanes = take(rows, near).unflatten(1, (self.rounds.stop - self.rounds.start, -1))
        return self.of.windows.unfold(lanes.flatten(0, 1))

    def at(self, chunks: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a range of this block's chunks."""
        return self.query[:, chunks], self.key[:, chunks], self.value[:, chunks]

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of this block's chunks with their bias `(R p or 1, C or 1, m, w)`."""
        windows, lanes, start = self.of.windows, self.query.shape[0], self.chunks.start
        for first, last, alike in windows.blocks(lanes, self.chunks, self.query.device):
            at = slice(first - start, last - start)
            if alike:
                bias = windows.shared_bias(self.query)
            else:
                bias = self.of.biases.of(self.rounds, first, last, self.own_scores(at))
            yield at, bias

    def own_scores(self, at: slice) -> Tensor:
        """Each query's score with itself, of a range of chunks: `(R p, C, m)`."""
        start = self.of.windows.before * self.of.windows.chunk
        own_key = self.key[:, at, start : start + self.of.windows.chunk]
        return (self.query[:, at] * own_key).sum(-1)


def _width(query: Tensor, value: Tensor) -> int:
    """Elements that a token's query, key and value take."""
    return 2 * query.shape[-1] + value.shape[-1]


def groups(windows: Windows, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Rows]:
    """All rows of `(R, L, ...)`, so many at a time as a block takes with all their rounds."""
    each = windows.rounds * windows.length * _width(query, value)
    for rows in pieces(0, query.shape[0], each, ROW_ELEMENTS, query.device):
        yield Rows(windows, rows, query, key, value)
