"""The four published forms of LSH attention as data: they are not the same function.

The paper (the authors' code of 2019), the authors' later code, and the two well-known PyTorch
ports differ in what a score is, who sees whom, and how often a pair counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from reproductions.reformer.hashing import (
    NumBuckets,
    Sharing,
    buckets_hugging_face,
    buckets_lucidrains,
    buckets_paper,
    buckets_trax,
)


@dataclass(frozen=True)
class Rules:
    """How LSH attention scores, hides and counts.

    Attributes:
        score: "key" for `q . k / |k|`, "scaled_key" for that over `sqrt(d)`. (The authors divide
            a key of root mean square 1 by `sqrt(d)`, which is a key of length 1.)
        same_bucket: only tokens of one bucket see each other.
        count: "union": a pair that several rounds find counts once; "multiplicity": each time.
        before, after: neighbouring chunks that are seen.
        num_buckets: rule from length and chunk.
        multiple: of chunks to which a sequence is padded, so that the rule gives an even number.
        sharing: who shares a rotation.
        self_penalty: a token's score with itself: it attends to itself only if to nobody else.
        hidden: added to hidden scores.
        shared_dropout: attention dropout draws one mask for all chunks.
        dense_up_to_chunk: a sequence of one chunk is attended to in full, without hashing.
    """

    score: Literal["key", "scaled_key"] = "key"
    same_bucket: bool = False
    count: Literal["union", "multiplicity"] = "multiplicity"
    before: int = 1
    after: int = 0
    num_buckets: Callable[[int, int], NumBuckets] = buckets_trax
    multiple: int = 1
    sharing: Sharing = "head"
    self_penalty: float = -1e5
    hidden: float = -1e9
    shared_dropout: bool = False
    dense_up_to_chunk: bool = False

    def __post_init__(self) -> None:
        if min(self.before, self.after) < 0:
            raise ValueError("the numbers of chunks before and after must not be below 0")

    def changed(self, **fields: Any) -> Rules:
        """A copy with single fields changed."""
        return replace(self, **fields)

    def keys(self, queries: Tensor) -> Tensor:
        """The keys `(..., d)` that belong to shared queries: the same directions, one length.

        This is inside autograd: keys do get a gradient.
        """
        width = queries.shape[-1]
        if self.score == "scaled_key":
            return F.normalize(queries, dim=-1) * width**-0.5
        mean_square = torch.linalg.vector_norm(queries, dim=-1, keepdim=True).square() / width
        return queries * (torch.rsqrt(mean_square + 1e-6) * width**-0.5)


#: Sec. 2 and appendix A; the authors' code of October 2019 with the paper's flags.
PAPER = Rules(
    same_bucket=True, count="union", num_buckets=buckets_paper, sharing="example_head",
    shared_dropout=True,
)  # fmt: skip
#: The authors' code from February 2020 on.
TRAX_V2 = Rules(sharing="example_head", shared_dropout=True)
#: The port in Hugging Face's transformers, for its checkpoints.
HUGGING_FACE = Rules(num_buckets=buckets_hugging_face, dense_up_to_chunk=True)
#: lucidrains/reformer-pytorch with its default flags.
LUCIDRAINS = Rules(
    score="scaled_key", num_buckets=buckets_lucidrains, multiple=2, sharing="all",
    self_penalty=-5e4, hidden=-torch.finfo(torch.float32).max,
)  # fmt: skip

RULES = {
    "paper": PAPER, "trax_v2": TRAX_V2, "hugging_face": HUGGING_FACE, "lucidrains": LUCIDRAINS,
}  # fmt: skip


def get_rules(rules: str | Rules) -> Rules:
    """Rules by name, or as they are.

    Raises:
        ValueError: no such name.
    """
    if isinstance(rules, Rules):
        return rules
    if rules not in RULES:
        raise ValueError(f"no rules {rules!r}; known: {', '.join(RULES)}")
    return RULES[rules]
