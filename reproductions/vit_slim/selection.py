"""From scores to what is kept: one threshold per kind over the whole network.

Everything here works on NumPy arrays and knows no network: a budget is a position in a sorted list,
so one search serves every budget, and what a smaller budget keeps a larger one keeps too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import ReplivitError

Masks = tuple[NDArray[np.bool_], ...]
Values = tuple[NDArray[np.floating], ...]

TOKEN_RULES = ("released", "paper")


@dataclass(frozen=True)
class Scores:
    """How much each gate is worth, layer by layer.

    Attributes:
        attention: `(H, d)` each; `(H, 1)` for one gate per head, `(1, d)` for gates that all heads
            share.
        mlp: `(M,)` each.
        tokens: `(N,)` each, prefix tokens first.
        heads: number of heads and their dimensions.
    """

    attention: Values
    mlp: Values
    tokens: Values
    heads: tuple[int, int]


@dataclass(frozen=True)
class Kept:
    """What is left of a network, layer by layer; shapes as in `Scores`.

    Attributes:
        thresholds: kind -> the smallest score that was kept; empty if it was not chosen here.
        tokens_wanted: the tokens that each layer keeps by its own scores.
    """

    attention: Masks
    mlp: Masks
    tokens: Masks
    heads: tuple[int, int]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    tokens_wanted: Masks = ()

    @property
    def dims(self) -> Masks:
        """Kept dimensions of each head, `(H, d)` per layer, whatever the gates' layout."""
        return tuple(np.broadcast_to(one, self.heads) for one in self.attention)

    @property
    def head_dims(self) -> NDArray[np.int64]:
        """How many dimensions each head keeps: `(L, H)`."""
        return np.stack([one.sum(1) for one in self.dims])

    @property
    def hidden(self) -> NDArray[np.int64]:
        """How many MLP channels each layer keeps: `(L,)`."""
        return np.array([one.sum() for one in self.mlp])

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """How many tokens each layer keeps: `(L,)`."""
        return np.array([one.sum() for one in self.tokens])

    @property
    def all_tokens(self) -> bool:
        return all(one.all() for one in self.tokens)

    def with_tokens(self, count: int) -> Kept:
        """The same for images of `count` tokens, if no token is dropped.

        Raises:
            ValueError: tokens are dropped, so that the image size is fixed.
        """
        if all(len(one) == count for one in self.tokens):
            return self
        if not self.all_tokens:
            raise ValueError(
                f"tokens were chosen among {len(self.tokens[0])}, this image size has {count}"
            )
        return Kept(self.attention, self.mlp, _everything(len(self.tokens), count), self.heads)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file; masks as hexadecimal bits, `np.packbits` of C order."""
        return {
            "heads": list(self.heads),
            "hidden": len(self.mlp[0]),
            "tokens": len(self.tokens[0]),
            "attention": [_packed(one) for one in self.dims],
            "mlp": [_packed(one) for one in self.mlp],
            "kept_tokens": None if self.all_tokens else [_packed(one) for one in self.tokens],
        }

    @classmethod
    def from_dict(cls, found: Any, origin: str = "the file") -> Kept:
        """What `as_dict` gave.

        Raises:
            ReplivitError: something else.
        """
        try:
            heads = tuple(int(one) for one in found["heads"])
            layers, tokens = len(found["attention"]), int(found["tokens"])
            if len(heads) != 2 or layers == 0 or len(found["mlp"]) != layers:
                raise ValueError("layers do not match")
            attention = [_unpacked(one, heads[0] * heads[1]) for one in found["attention"]]
            packed = found["kept_tokens"]
            return cls(
                tuple(one.reshape(heads) for one in attention),
                tuple(_unpacked(one, int(found["hidden"])) for one in found["mlp"]),
                tuple(_unpacked(one, tokens) for one in packed) if packed
                else _everything(layers, tokens),
                heads,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ReplivitError(f"{origin} does not say what is kept of a network") from error


def choose(
    scores: Scores,
    attention: float = 0.7,
    mlp: float = 0.7,
    tokens: float = 1.0,
    token_rule: str = "released",
) -> Kept:
    """Keep the best of each kind over all layers; the three kinds do not compete.

    Scores rank by their signed value; what ties with the threshold is kept. Nothing guarantees a
    layer anything: a head, an attention or an MLP may vanish. A token is in addition kept in all
    layers before one that wants it (`released`, the authors' code and their published FLOPs), or
    gone from all layers after one that does not (`paper`, what their text says).

    Args:
        attention, mlp, tokens: budgets, the shares to keep, in (0, 1].

    Raises:
        ValueError: a budget outside (0, 1] or too small to keep anything, or an unknown rule.
    """
    if token_rule not in TOKEN_RULES:
        raise ValueError(f"no token rule {token_rule!r}; there are {', '.join(TOKEN_RULES)}")
    thresholds = {
        "attention": threshold(scores.attention, attention, "attention"),
        "mlp": threshold(scores.mlp, mlp, "mlp"),
        "tokens": threshold(scores.tokens, tokens, "tokens"),
    }
    wanted = tuple(one >= thresholds["tokens"] for one in scores.tokens)
    table = np.stack(wanted)
    if token_rule == "released":
        left = np.logical_or.accumulate(table[::-1])[::-1]
    else:
        left = np.logical_and.accumulate(table)
    return Kept(
        attention=tuple(one >= thresholds["attention"] for one in scores.attention),
        mlp=tuple(one >= thresholds["mlp"] for one in scores.mlp),
        tokens=tuple(left),
        heads=scores.heads,
        thresholds={kind: float(value) for kind, value in thresholds.items()},
        tokens_wanted=wanted,
    )


def threshold(values: Sequence[NDArray[np.floating]], budget: float, kind: str) -> np.floating:
    """The smallest score that a budget keeps: entry `int((1 - budget) * n)` of the sorted scores
    (official code: `calculate_search_threshold`).

    The product is binary floating point on purpose: 0.7 of 4608 drops 1382, and 0.8 drops 921.

    Raises:
        ValueError: a budget outside (0, 1], one that keeps nothing, or a score that is no number.
    """
    if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget <= 1:
        raise ValueError(f"the budget for {kind} must lie in (0, 1], not {budget!r}")
    everything = np.concatenate([one.ravel() for one in values])
    if np.isnan(everything).any():
        raise ValueError(f"the scores for {kind} are not all numbers")
    index = int((1.0 - float(budget)) * len(everything))
    if index >= len(everything):
        raise ValueError(f"a budget of {budget} keeps none of the {len(everything)} for {kind}")
    return np.sort(everything)[index]


def random_scores(like: Scores, seed: int = 0) -> Scores:
    """Uniform scores in the layout of others: the rival that knows nothing.

    Raises:
        ValueError: a seed that is no whole number from 0 on.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0 on, not {seed!r}")
    rng = np.random.default_rng(seed)
    attention, mlp, tokens = (
        tuple(rng.random(one.shape) for one in kind)
        for kind in (like.attention, like.mlp, like.tokens)
    )
    return Scores(attention, mlp, tokens, like.heads)


def constant_scores(layers: int, heads: tuple[int, int], hidden: int, tokens: int) -> Scores:
    """Scores that are all equal, so that every budget keeps everything; a layout to draw in."""
    return Scores(
        (np.ones(heads),) * layers, (np.ones(hidden),) * layers, (np.ones(tokens),) * layers, heads
    )


def _everything(layers: int, count: int) -> Masks:
    return (np.ones(count, dtype=bool),) * layers


def _packed(mask: NDArray[np.bool_]) -> str:
    return np.packbits(mask).tobytes().hex()


def _unpacked(text: str, count: int) -> NDArray[np.bool_]:
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError("wrong number of bits")
    return np.unpackbits(packed, count=count).astype(bool)
