"""ViT-Slim's experiments: the printed counts, a tiny search, the pictures, the micro network."""

from __future__ import annotations

import numpy as np
import pytest

import harness
from harness import ReplivitError
from harness.paper import Published
from reproductions.vit_slim import micro
from reproductions.vit_slim.budgets_experiment import agreement, budgets
from reproductions.vit_slim.drawing import structure_figure
from reproductions.vit_slim.search_experiment import as_cut, claims, search
from reproductions.vit_slim.search_setup import SCALES, choose_setting
from reproductions.vit_slim.selection import choose, constant_scores, random_scores


@pytest.fixture(scope="module")
def counted():
    return budgets()


def test_every_printed_count_matches(counted):
    rows = {(row["variant"], row["source"]): row for row in counted.rows}
    fits = [row[key] for row in counted.rows for key in ("params fit", "FLOPs fit")]
    assert set(fits) <= {"rounded", "cut off", ""} and fits.count("") == 1
    printed = [
        row for row in harness.get_paper("vit_slim").facts.published
        if row.of and row.metric in ("params_m", "macs_g")
    ]  # fmt: skip
    assert len(fits) - fits.count("") == len({(one.of, one.metric, one.source) for one in printed})
    assert rows["vit_slim_deit_b_60", "paper Table 7"]["params, get_params (M)"] == 52.570
    small = rows["vit_slim_deit_s_60", "paper Table 4 (ViT-Slim PS, no patch search)"]
    assert (small["params, get_params (M)"], small["FLOPs, get_flops (G)"]) == (13.545, 2.806)
    assert small["MACs, ours (G)"] == 2.783
    assert counted.findings[0].outcome == "reproduced"


def test_token_rows_tell_the_rules_apart(counted):
    """What the text's rule can cost at most lies under every printed number, the code's above."""
    for row in counted.detail["tokens"]:
        assert row["text_at_most"] < row["printed"] - 0.05 < row["all_tokens"]
    assert counted.findings[1].outcome == "deviates"


@pytest.mark.parametrize(
    ("value", "printed", "said"),
    [(17.799, 17.7, "cut off"), (17.799, 17.8, "rounded"), (2.351, 2.5, "differs")],
)
def test_digits(value, printed, said):
    row = Published(variant="x", metric="macs_g", value=printed, unit="G", source="y", seen=True)
    assert agreement(value, row) == said
    assert agreement(value, None) == ""


def test_a_tiny_search_runs_end_to_end():
    result = search("tiny")
    rows = {row["arm"]: row for row in result.rows}
    assert {"searched 0.5", "magnitude 0.5", "random 0.5", "dense control"} <= set(rows)
    dense, cut = rows["dense control"], rows["random 0.5"]
    assert cut["params"] < 0.6 * dense["params"] and cut["MACs (M)"] < 0.6 * dense["MACs (M)"]
    assert all(0 <= rows[f"{one} 0.5"]["top-1 (%)"] <= 100 for one in ("searched", "random"))
    assert rows["heads alone 0.5"]["top-1 (%)"] is None
    assert {one.claim.split(",")[0] for one in result.findings} >= {"As cut at 0.5"}
    assert "no number here means anything" in result.notes
    assert set(result.figures) == {"curve", "structure"}
    assert set(result.detail["kept"]) == {"0.5"}


def test_claims_cite_rows_that_were_run():
    setting = choose_setting("small", {"budgets": (0.4, 0.8)})
    assert setting.budgets == (0.8, 0.4)
    found = claims(setting)
    assert [one.better for one in found if one.within] == ["searched 0.8"]
    assert {one.than for one in found if not one.within} == {
        as_cut("random 0.4"), as_cut("magnitude 0.4"), "random 0.4", "magnitude 0.4",
        as_cut("heads alone 0.4"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (0.5, 1.2)}, r"budgets must lie in \(0, 1\]"),
        ({"attention": -1}, r"weights of the penalty must be 0 or more, not \(-1, "),
        ({"search_recipe": "no_such"}, "no recipe 'no_such'"),
        ({"recipe": "no_such"}, "no recipe 'no_such'"),
        ({"seeds": ()}, "seeds must be whole numbers"),
        ({"epochs": 0}, "epochs must be a whole number from 1 on"),
        ({"depth": 3}, "no option 'depth'; there are"),
    ],
)
def test_bad_options_are_one_sentence(changes, message):
    with pytest.raises(ReplivitError, match=message):
        choose_setting("small", changes)
    with pytest.raises(ReplivitError, match="no scale 'huge'"):
        choose_setting("huge", {})


def test_the_paper_scale_is_the_released_one():
    setting = SCALES["paper"]
    assert (setting.attention, setting.mlp, setting.tokens) == (2e-4 / 4, 5e-5 / 4, 1e-4 / 4)


def test_structure_picture_shows_what_is_left():
    layout = constant_scores(3, (2, 8), 32, 5)
    kept = {
        f"{budget:g}": choose(random_scores(layout), budget, budget) for budget in (0.8, 0.4)
    }  # fmt: skip
    figure = structure_figure(kept, "title")
    texts = [[int(text.get_text()) for text in axes.texts] for axes in figure.axes[:2]]
    assert texts == [one.head_dims.ravel().tolist() for one in kept.values()]
    lines = [line.get_ydata() for line in figure.axes[-1].lines[:2]]
    assert all((a == b.hidden).all() for a, b in zip(lines, kept.values(), strict=True))
    with pytest.raises(ValueError, match="at least one"):
        structure_figure({})


def test_the_micro_network_is_what_its_search_kept():
    model = harness.build("vit_slim_micro")
    dims, channels = model.kept.head_dims, model.kept.hidden
    assert dims.sum() == 384 - int((1.0 - micro.BUDGET) * 384)
    assert channels.sum() == 1152 - int((1.0 - micro.BUDGET) * 1152)
    assert [one.mlp.fc1.out_features for one in model.blocks] == channels.tolist()
    assert np.ptp(channels) > 0, "a search leaves layers different widths"
