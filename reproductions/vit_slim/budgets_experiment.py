"""The columns of parameters and FLOPs of the budget tables, row by row (Tables 2, 4, 6, 7).

    replivit run vit_slim/budgets

Both depend only on how many gates are kept, so no search is needed: every row is built with that
many gates and counted three times, by the authors' formulas and by ours. Rows with dropped tokens
depend on which tokens; for these the two rules that paper and code describe give bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import harness
from harness import Conditions, ExperimentResult, Finding
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from harness.paper import Published
from harness.settings import of_scale
from reproductions.vit_slim import conventions
from reproductions.vit_slim.selection import Kept

#: Token budget -> FLOPs printed in Table 6, in G.
TOKEN_ROWS = {0.8: "vit_slim_js_s_70_patch80", 0.7: "vit_slim_js_s_70_patch70",
              0.6: "vit_slim_js_s_70_patch60"}  # fmt: skip
TOKEN_MODEL = "vit_slim_deit_s_70"


def budgets(scale: str = "small") -> ExperimentResult:
    """Count every DeiT row of the budget tables and compare it with the print.

    Args:
        scale: has no influence; the networks are the paper's own at every scale.

    Raises:
        ReplivitError: unknown scale.
    """
    of_scale(dict.fromkeys(("tiny", "small", "paper")), scale)  # the same at each of them
    paper = harness.get_paper("vit_slim").facts
    printed: dict[tuple[str, str], dict[str, Published]] = {}
    for row in paper.published:
        if row.of and row.metric in ("params_m", "macs_g"):
            printed.setdefault((row.of, row.source), {})[row.metric] = row
    counted = {name: _count(name) for name in dict.fromkeys(name for name, _ in printed)}
    rows = [_row(name, source, found, *counted[name]) for (name, source), found in printed.items()]
    tokens = [_token_row(budget, name) for budget, name in TOKEN_ROWS.items()]
    return ExperimentResult(
        rows=rows,
        findings=[_all_match(rows), _token_rule(tokens)],
        notes=(
            "Official counters: get_params without masks, get_flops of the compressed network "
            "(multiply-adds with biases, norms and softmax). MACs: convolutions and matrix "
            "products, by torch's counter on the slimmed network. Gates are drawn at random under "
            "each budget, since the found masks were not released; counts do not depend on which. "
            "The authors round in some tables and cut digits off in others, so both are accepted "
            "and named. Swin rows are missing: no code was released, and there the cost depends on "
            "which gates go. Token rows of Table 6: " + " ".join(_said(one) for one in tokens)
        ),
        conditions=Conditions(image_size=224, batch_size=1),
        detail={"tokens": tokens},
    )


def _count(name: str) -> tuple[int, int, int]:
    """Parameters and FLOPs by the authors' rules, and our multiply-adds."""
    with on_meta():
        model = harness.build(name).eval()
    return (
        conventions.params(model), conventions.macs(model, 224), count_macs(model, 224).total
    )  # fmt: skip


def _row(
    name: str, source: str, found: dict[str, Published], params: int, official: int, macs: int
) -> dict[str, Any]:
    fits = {
        "params_m": agreement(params / 1e6, found.get("params_m")),
        "macs_g": agreement(official / 1e9, found.get("macs_g")),
    }
    return {
        "variant": name,
        "source": source,
        "params printed (M)": found["params_m"].value if "params_m" in found else None,
        "params, get_params (M)": round(params / 1e6, 3),
        "params fit": fits["params_m"],
        "FLOPs printed (G)": found["macs_g"].value if "macs_g" in found else None,
        "FLOPs, get_flops (G)": round(official / 1e9, 3),
        "FLOPs fit": fits["macs_g"],
        "MACs, ours (G)": round(macs / 1e9, 3),
    }


def agreement(value: float, printed: Published | None) -> str:
    """Whether a number is what was printed: "rounded", "cut off", "differs", or "" if not printed.

    All numbers of these columns are printed with one digit after the point.
    """
    if printed is None:
        return ""
    tenths = round(10 * printed.value)
    if round(10 * value) == tenths:
        return "rounded"
    return "cut off" if int(10 * value) == tenths else "differs"


def _all_match(rows: list[dict[str, Any]]) -> Finding:
    fits = [row[key] for row in rows for key in ("params fit", "FLOPs fit") if row[key]]
    wrong = fits.count("differs")
    return Finding(
        "Every printed parameter and FLOPs number of the DeiT rows without dropped tokens",
        "deviates" if wrong else "reproduced",
        f"{len(fits)} numbers: {fits.count('rounded')} equal to the rounded count, "
        f"{fits.count('cut off')} to the count with its digits cut off, {wrong} differ",
    )


def _token_row(budget: float, printed_as: str) -> dict[str, Any]:
    """Bounds of the authors' FLOPs of the 70/70 DeiT-S under a token budget.

    Kept tokens only become fewer with depth. By the paper's text (a token is gone after the first
    layer that does not want it) at most the budget's share of all entries is kept, by the code at
    least. The formula is convex in the numbers of tokens, so the most that the text's rule can cost
    lies at a corner: some layers with all tokens, some with equally many, the rest with none.
    """
    row = next(
        one for one in harness.get_paper("vit_slim").facts.published
        if one.variant == printed_as and one.metric == "macs_g"
    )  # fmt: skip
    with on_meta():
        model = harness.build(TOKEN_MODEL)
    kept: Kept = model.kept
    layers, count = len(kept.tokens), len(kept.tokens[0])
    entries = layers * count - int((1.0 - budget) * layers * count)
    corners = [
        np.repeat([count, (entries - count * full) // some, 0], [full, some, layers - full - some])
        for full in range(min(layers, entries // count + 1))
        for some in range(1, layers - full + 1)
        if (entries - count * full) // some <= count
    ]
    costs = [conventions.searched_macs(model, _with_counts(kept, one)) for one in corners]
    return {
        "budget": budget, "printed": row.value, "entries": entries,
        "text_at_most": max(costs) / 1e9,
        "all_tokens": conventions.searched_macs(model, kept) / 1e9,
    }  # fmt: skip


def _with_counts(kept: Kept, counts: np.ndarray) -> Kept:
    """The same gates with so many tokens in each layer."""
    total = len(kept.tokens[0])
    tokens = tuple(np.arange(total) < one for one in counts)
    return Kept(kept.attention, kept.mlp, tokens, kept.heads)


def _said(row: dict[str, Any]) -> str:
    return (
        f"at {row['budget']:.0%} {row['printed']} G are printed; the rule of the text keeps "
        f"{row['entries']} entries at most, {row['text_at_most']:.2f} G."
    )


def _token_rule(rows: list[dict[str, Any]]) -> Finding:
    """Printed FLOPs above what the text's rule could cost at most follow the code's rule."""
    over = [row for row in rows if row["printed"] - 0.05 > row["text_at_most"]]
    return Finding(
        "A token that one layer drops is gone from all later layers, as the text says",
        "deviates" if over else "reproduced",
        f"{len(over)} of {len(rows)} printed FLOPs are more than that rule can cost: "
        + "; ".join(f"{row['printed']} G against {row['text_at_most']:.2f} G" for row in rows)
        + ". They fit the released code, which keeps a token in all layers before one that "
        "wants it.",
    )
