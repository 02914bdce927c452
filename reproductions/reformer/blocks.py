"""Blocks of chunked attention: tokens gathered in sorted order, as much at a time as a cache holds.

A block has some rows, some of their rounds, and a range of these rounds' chunks: everything where
sequences are short, one round where they are long, and part of one where they are very long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reproductions.reformer.windows import ACCELERATOR, Biases, Windows

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
        self.room = _room(query, value)

    def lanes(self, rounds: slice) -> int:
        """How often a round of a row: `R p`."""
        return self.query.shape[0] * (rounds.stop - rounds.start)

    def rounds(self) -> Iterator[slice]:
        """Rounds that are taken at a time."""
        windows = self.windows
        yield from _slices(windows.rounds, self.room // (self.query.shape[0] * windows.length))

    def blocks(self, rounds: slice) -> Iterator[Block]:
        """Blocks that together hold every chunk of some rounds."""
        most = self.room // (self.lanes(rounds) * self.windows.chunk)
        for chunks in _slices(self.windows.per_round, most):
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


def _slices(count: int, most: int) -> Iterator[slice]:
    """`range(count)` in slices of at most so many, but at least of one."""
    if torch.compiler.is_compiling():  # a program may be for any batch
        yield slice(0, count)
        return
    most = max(1, most)
    for first in range(0, count, most):
        yield slice(first, min(first + most, count))


def _room(query: Tensor, value: Tensor) -> int:
    """Tokens of which a block gathers queries, keys and values."""
    elements = ROW_ELEMENTS * (1 if query.device.type == "cpu" else ACCELERATOR)
    return elements // (2 * query.shape[-1] + value.shape[-1])


def groups(windows: Windows, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Rows]:
    """All rows of `(R, L, ...)`, so many at a time as a block takes with all their rounds."""
    most = _room(query, value) // (windows.rounds * windows.length)
    for rows in _slices(query.shape[0], most):
        yield Rows(windows, rows, query, key, value)
