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

#: Elements of the bias that is made at a time: what a cache holds.
BIAS_ELEMENTS = 1 << 19
#: An accelerator wants larger pieces than a cache.
ACCELERATOR = 64
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

    def ring(self, device: torch.device) -> Tensor:
        """Places of each round's chunks and of their neighbours: `(n, L + (before + after) m)`."""
        start, stop = -self.before * self.chunk, self.length + self.after * self.chunk
        places = torch.arange(start, stop, device=device)
        rounds = torch.arange(self.rounds, device=device)[:, None] * self.length
        return (places + rounds) % (self.rounds * self.length)

    def near(self, of_places: Tensor) -> Tensor:
        """Values of places `(R, n L, ...)` for each lane and its neighbours `(R n, L', ...)`."""
        return of_places[:, self.ring(of_places.device)].flatten(0, 1)

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

    def blocks(self, lanes: int, device: torch.device) -> Iterator[tuple[int, int, bool]]:
        """Ranges of a round's chunks `(first, last + 1, whether they share a bias)`."""
        if self._alike() and self.per_round >= max(SHARED_BIAS_CHUNKS, self.parts):
            first, last = self.before, self.per_round - self.after
            ranges = ((0, first, False), (first, last, True), (last, self.per_round, False))
            for start, stop, shared in ranges:
                if start < stop:
                    yield start, stop, shared
            return
        elements = BIAS_ELEMENTS * (1 if device.type == "cpu" else ACCELERATOR)
        most = max(1, elements // (lanes * self.chunk * self.width))
        for first in range(0, self.per_round, most):
            yield first, min(first + most, self.per_round), False

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

    def bias(self, rows: slice, first: int, last: int, queries: Tensor, own: Tensor) -> Tensor:
        """The bias of a range of chunks, from positions: `(R n, last - first, m, w)`.

        Args:
            queries: of the rows, as `queries` gives them.
            own: `(R n, last - first, m)`, each query's score with itself. It is taken off again, so
                that the penalty replaces it: near -1e5 float32 resolves 0.008, and a token that
                sees nobody else must weigh the same in all rounds.
        """

        def pairs(of_places: Tensor) -> tuple[Tensor, Tensor]:
            """Values of places `(R, n L)` at queries and at keys, ready to be compared."""
            asked = of_places.unflatten(1, (self.rounds, self.per_round, self.chunk))
            around = of_places[:, self._around(first, last, of_places.device)].flatten(0, 1)
            return (
                asked[:, :, first:last].flatten(0, 1)[..., None],
                self.unfold(around)[..., None, :],
            )

        query, key = pairs(queries)
        itself = key == query
        hidden = key > query if self.causal else None
        if self.valid is not None:
            gone = ~pairs(self.valid[rows].gather(1, queries.long()))[1]
            hidden = gone if hidden is None else hidden | gone
        if self.same_bucket:
            ids, other_ids = pairs(self._bucket_ids(rows))
            other = ids != other_ids
            hidden = other if hidden is None else hidden | other
            itself = itself & ~other  # the copy that the ring brings from another round is hidden
        shape = (len(own), last - first, self.chunk, self.width)
        bias = torch.zeros(shape, dtype=own.dtype, device=own.device)
        if hidden is not None:
            bias.masked_fill_(hidden, self.hidden)
        if self.self_penalty is not None:
            bias = torch.where(itself, (self.self_penalty - own)[..., None], bias)
        if self.union:
            bias -= self._times_seen(rows, queries, pairs).to(own.dtype).clamp_min_(1).log_()
        return bias

    def _around(self, first: int, last: int, device: torch.device) -> Tensor:
        """The part of `ring` that a range of chunks sees."""
        return self.ring(device)[:, first * self.chunk : (last + self.parts - 1) * self.chunk]

    def _bucket_ids(self, rows: slice) -> Tensor:
        """Sorted bucket ids that differ between rounds: `(R, n L)`."""
        ids = self.sorted.buckets[rows].int()
        offsets = torch.arange(self.rounds, device=ids.device, dtype=ids.dtype)
        return (ids + offsets[:, None] * (ids.max() + 1)).flatten(1)

    def _times_seen(self, rows: slice, queries: Tensor, pairs) -> Tensor:
        """How often each query sees each key of its window, all rounds together (N_ij).

        Counts the chunks around the query's own, round by round, that hold the key; with
        `same_bucket`, only where both are in one bucket. Links between rounds count as well.
        """
        places, queries = self.sorted.places[rows], queries.long()
        steps = torch.arange(self.rounds, device=places.device, dtype=torch.int32)[:, None]
        chunk_of = places.div(self.chunk, rounding_mode="floor") + steps * self.per_round
        bucket_code = torch.zeros_like(chunk_of)
        if self.same_bucket:  # one number for chunk and bucket; links between rounds are hidden
            found = self.sorted.buckets[rows].int() * self.chunks
            bucket_code.scatter_(-1, self.sorted.order[rows].long(), found)
        seen = 0
        for one in range(self.rounds):
            own_chunk = pairs(chunk_of[:, one].gather(1, queries))[0]
            own_code = pairs(bucket_code[:, one].gather(1, queries))[0]
            reach = {one}
            if not self.same_bucket:  # rounds next to it, or all where a window spans rounds
                far = max(self.before, self.after) > self.per_round
                reach |= set(range(self.rounds)) if far else {one - 1, one + 1}
            for other in sorted({round % self.rounds for round in reach}):
                code = (chunk_of + bucket_code)[:, other]
                key_code = pairs(code.gather(1, queries))[1]
                for step in range(-self.before, self.after + 1):
                    target = (own_chunk + step) % self.chunks + own_code
                    seen = seen + (key_code == target).to(torch.int16)
        return seen
