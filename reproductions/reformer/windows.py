"""Who may look at whom in chunked attention: neighbours among sorted chunks, and what hides keys.

Tokens are sorted (LSH: by bucket, in several rounds) or taken as they come (local: one round) and
cut into chunks; each chunk looks at itself and its neighbours. The chunks of all rounds lie on one
ring: the first chunk of a round has the last one of the round before it as its neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reproductions.reformer.hashing import Sorted
from reproductions.reformer.pieces import pieces

#: Elements of the bias that is made at a time: what a cache holds.
BIAS_ELEMENTS = 1 << 19
#: From so many chunks a round on, the inner ones share a bias and only the outer ones compare.
SHARED_BIAS_CHUNKS = 4


@dataclass(frozen=True)
class Windows:
    """Who may look at whom.

    A *lane* is one round of one row (a head of an example). There are R rows and n rounds.

    Attributes:
        length, chunk: L and m; m divides L.
        rounds: n.
        before, after: neighbouring chunks that are seen.
        sorted: of R rows; None for tokens in their own order (one round).
        valid: `(R, L)`; other positions are hidden as keys.
        causal: keys of later positions are hidden.
        same_bucket: keys of other buckets (or rounds) are hidden.
        union: a pair that is seen N times counts once: log N is taken from each score (Eq. 6).
        self_penalty: a token's score with itself, also where it is padding; None: no rule.
        hidden: what is added to hidden scores.
    """

    length: int
    chunk: int
    rounds: int = 1
    before: int = 1
    after: int = 0
    sorted: Sorted | None = None
    valid: Tensor | None = None
    causal: bool = False
    same_bucket: bool = False
    union: bool = False
    self_penalty: float | None = None
    hidden: float = -1e9

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.length % self.chunk:
            raise ValueError(f"chunk {self.chunk} does not divide length {self.length}")
        if min(self.before, self.after) < 0:
            raise ValueError("the numbers of chunks before and after must not be below 0")

    @property
    def per_round(self) -> int:
        """Chunks of one round."""
        return self.length // self.chunk

    @property
    def chunks(self) -> int:
        """Chunks of all rounds."""
        return self.rounds * self.per_round

    @property
    def parts(self) -> int:
        """Chunks in a window."""
        return self.before + 1 + self.after

    @property
    def width(self) -> int:
        """Keys in a window."""
        return self.parts * self.chunk

    def queries(self, rows: slice, device: torch.device) -> Tensor:
        """Tokens in sorted order, all rounds: `(R, n L)` int32."""
        if self.sorted is None:
            order = torch.arange(self.length, dtype=torch.int32, device=device)
            return order.expand(rows.stop - rows.start, -1)
        return self.sorted.order[rows].flatten(1)

    def places(self, rounds: slice, first: int, last: int, device: torch.device) -> Tensor:
        """Places of a range of some rounds' chunks, on the ring: `(p, (last - first) m)`."""
        places = torch.arange(first * self.chunk, last * self.chunk, device=device)
        starts = torch.arange(rounds.start, rounds.stop, device=device)[:, None] * self.length
        return (places + starts) % (self.rounds * self.length)

    def unfold(self, near: Tensor) -> Tensor:
        """Windows over consecutive chunks: a view `(lanes, C, w, ...)`, nothing is copied.

        Args:
            near: contiguous `(lanes, (C + before + after) m, ...)`.
        """
        count = near.shape[1] // self.chunk - self.parts + 1
        step = near.stride(1)
        return near.as_strided(
            (near.shape[0], count, self.width, *near.shape[2:]),
            (near.stride(0), self.chunk * step, step, *near.stride()[2:]),
        )

    def _alike(self) -> bool:
        """Whether all chunks but the outermost of a round have the same bias."""
        if self.valid is not None or self.same_bucket or self.union:
            return False
        return self.sorted is None or not self.causal

    def blocks(
        self, lanes: int, chunks: slice, device: torch.device
    ) -> Iterator[tuple[int, int, bool]]:
        """A round's chunks in ranges `(first, last + 1, whether they share a bias)`."""
        if self._alike() and self.per_round >= max(SHARED_BIAS_CHUNKS, self.parts):
            first, last = self.before, self.per_round - self.after
            ranges = ((0, first, False), (first, last, True), (last, self.per_round, False))
            for start, stop, shared in ranges:
                start, stop = max(start, chunks.start), min(stop, chunks.stop)
                if start < stop:
                    yield start, stop, shared
            return
        each = lanes * self.chunk * self.width
        for part in pieces(chunks.start, chunks.stop, each, BIAS_ELEMENTS, device):
            yield part.start, part.stop, False

    def shared_bias(self, like: Tensor) -> Tensor:
        """The bias of a chunk all of whose neighbours are of its round: `(1, 1, m, w)`."""
        query = torch.arange(self.chunk, device=like.device)[:, None] + self.before * self.chunk
        key = torch.arange(self.width, device=like.device)[None, :]
        bias = torch.zeros(self.chunk, self.width, dtype=like.dtype, device=like.device)
        if self.causal:
            bias.masked_fill_(key > query, self.hidden)
        if self.self_penalty is not None:
            bias.masked_fill_(key == query, self.self_penalty)
        return bias[None, None]


class Biases:
    """What is added to the scores of some rows, range of chunks by range of chunks.

    What all ranges share is made once, and a range touches its own tokens alone: the whole costs as
    much as the sequence is long.

    Args:
        rows: of the windows' R rows.
        tokens: of the rows in sorted order `(R, n L)`, as `Windows.queries` gives them.
    """

    def __init__(self, windows: Windows, rows: slice, tokens: Tensor) -> None:
        self.windows, self.tokens = windows, tokens
        self.valid = self.buckets = self.codes = None
        if windows.valid is not None:
            self.valid = windows.valid[rows].gather(1, tokens.long())
        if windows.same_bucket:
            self.buckets = self._bucket_ids(windows.sorted.buckets[rows])
        if windows.union:
            self.codes = self._codes(rows)

    def _bucket_ids(self, buckets: Tensor) -> Tensor:
        """Sorted bucket ids that differ between rounds: `(R, n L)`."""
        ids = buckets.int()
        offsets = torch.arange(self.windows.rounds, device=ids.device, dtype=ids.dtype)
        return (ids + offsets[:, None] * (ids.max() + 1)).flatten(1)

    def _codes(self, rows: slice) -> tuple[Tensor, Tensor]:
        """For each token and round `(R, n, L)`: its chunk on the ring, and what its bucket adds.

        With `same_bucket` the sum is one number for chunk and bucket, else the second is 0.
        """
        windows = self.windows
        places = windows.sorted.places[rows]
        steps = torch.arange(windows.rounds, device=places.device, dtype=torch.int32)[:, None]
        chunks = places.div(windows.chunk, rounding_mode="floor") + steps * windows.per_round
        buckets = torch.zeros_like(chunks)
        if windows.same_bucket:
            found = windows.sorted.buckets[rows].int() * windows.chunks
            buckets.scatter_(-1, windows.sorted.order[rows].long(), found)
        return chunks, buckets

    def of(self, rounds: slice, first: int, last: int, own: Tensor) -> Tensor:
        """The bias of a range of chunks in p of the rounds: `(R p, last - first, m, w)`.

        Args:
            own: `(R p, last - first, m)`, each query's score with itself. It is taken off again, so
                that the penalty replaces it: near -1e5 float32 resolves 0.008, and a token that
                sees nobody else must weigh the same in all rounds.
        """
        windows, device = self.windows, own.device
        asked = windows.places(rounds, first, last, device)
        near = windows.places(rounds, first - windows.before, last + windows.after, device)

        def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
            """Values of places `(R, n L)` for queries and keys, ready to be compared."""
            return self._at_queries(values[:, asked]), self._at_keys(values[:, near])

        query, key = pairs(self.tokens)
        itself = key == query
        hidden = key > query if windows.causal else None
        if self.valid is not None:
            gone = ~self._at_keys(self.valid[:, near])
            hidden = gone if hidden is None else hidden | gone
        if self.buckets is not None:
            ids, other_ids = pairs(self.buckets)
            other = ids != other_ids
            hidden = other if hidden is None else hidden | other
            itself = itself & ~other  # the copy that the ring brings from another round is hidden
        shape = (own.shape[0], last - first, windows.chunk, windows.width)
        bias = torch.zeros(shape, dtype=own.dtype, device=device)
        if hidden is not None:
            bias.masked_fill_(hidden, windows.hidden)
        if windows.self_penalty is not None:
            bias = torch.where(itself, (windows.self_penalty - own)[..., None], bias)
        if self.codes is not None:
            seen = self._times_seen(self.tokens[:, asked].long(), self.tokens[:, near].long())
            bias -= seen.to(own.dtype).clamp_min_(1).log_()
        return bias

    def _at_queries(self, asked: Tensor) -> Tensor:
        """Values of a range's places `(R, p, c m)` as `(R p, c, m, 1)`."""
        return asked.flatten(0, 1).unflatten(1, (-1, self.windows.chunk))[..., None]

    def _at_keys(self, near: Tensor) -> Tensor:
        """Values of a range's places and their neighbours' as windows `(R p, c, 1, w)`."""
        return self.windows.unfold(near.flatten(0, 1))[..., None, :]

    def _times_seen(self, asked: Tensor, near: Tensor) -> Tensor:
        """How often each query sees each key of its window, all rounds together (N_ij).

        Counts the chunks around the query's own, round by round, that hold the key; with
        `same_bucket`, only where both are in one bucket. Links between rounds count as well.

        Args:
            asked, near: tokens of a range's places `(R, p, ...)`, `_at_queries` and `_at_keys` of
                which are compared.
        """
        windows, (chunks, buckets) = self.windows, self.codes

        def look_up(of_tokens: Tensor, tokens: Tensor) -> Tensor:
            return of_tokens.gather(1, tokens.flatten(1)).view_as(tokens)

        seen = 0
        for one in range(windows.rounds):
            own_chunk = self._at_queries(look_up(chunks[:, one], asked))
            own_bucket = self._at_queries(look_up(buckets[:, one], asked))
            reach = {one}
            if not windows.same_bucket:  # rounds next to it, or all where a window spans rounds
                far = max(windows.before, windows.after) > windows.per_round
                reach |= set(range(windows.rounds)) if far else {one - 1, one + 1}
            for other in sorted({round % windows.rounds for round in reach}):
                code = look_up(chunks[:, other], near) + look_up(buckets[:, other], near)
                key_code = self._at_keys(code)
                for step in range(-windows.before, windows.after + 1):
                    target = (own_chunk + step) % windows.chunks + own_bucket
                    seen = seen + (key_code == target).to(torch.int16)
        return seen
