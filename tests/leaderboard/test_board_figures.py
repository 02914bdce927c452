"""Figures: there for the data that is there, with labels that do not overlap."""

import matplotlib
import pytest
from display_case import make_case, make_paper, timing
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leaderboard.figures import (
    LOOK,
    all_figures,
    eager_vs_deploy,
    place_labels,
    ratio_bars,
    scatter,
)
from leaderboard.tables import arrange, collect


def label_boxes(figure):
    """The extents of a figure's names, in pixels."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]


@pytest.mark.parametrize("models", [22, 80])
def test_names_never_overlap_and_the_front_is_named(tmp_path, models):
    papers, store = make_case(tmp_path, models, machines=("AMD EPYC 9R14 x2",))
    rows = [row for row in collect(store, papers).rows if row.track == "imagenet"]
    with matplotlib.rc_context(LOOK):
        figure = scatter(rows, "macs", "top1", None, "imagenet")
    boxes = label_boxes(figure)
    assert len(boxes) >= 15
    frame = figure.axes[0].get_window_extent()
    for index, (name, box) in enumerate(boxes):
        assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1, name
        assert box.count_overlaps([other for _, other in boxes[index + 1 :]]) == 0, name


def test_labels_without_room_are_left_out():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1])
    assert place_labels(axes, [("same place", 0.5, 0.5)] * 30) < 30
    assert place_labels(axes, [("far outside", 5, 5)]) == 0


def test_bars_are_ordered_marked_and_hold_the_interval(tmp_path):
    variants = {f"p_{x}": {"build": "model:a"} for x in "ab"}
    records = [*timing("p_a", 9, 1.5), *timing("p_b", 5, 0.5, status="noisy", reason="9 %")]
    board = arrange(records, [make_paper(tmp_path, "p", variants=variants)], [])
    figure = ratio_bars(board.rows, board.default_view)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["p_a", "p_b"]
    assert [bar.get_width() for bar in axes.patches] == [1.5, 0.5]
    assert [text.get_text() for text in axes.texts] == ["1.50", "0.50 (noisy)"]
    assert list(axes.lines[0].get_xdata()) == pytest.approx([1.47, 1.53])


def test_eager_and_deploy_are_joined_per_model(tmp_path):
    variants = {f"p_{x}": {"build": "model:a"} for x in "abc"}
    records = [*timing("p_a", 9, 1.5), *timing("p_a", 6, 1.0, backend="deploy")]
    records += [*timing("p_b", 9, 1.0), *timing("p_b", 6, 1.2, backend="deploy")]
    records += timing("p_c", 9, 1.5)
    board = arrange(records, [make_paper(tmp_path, "p", variants=variants)], [])
    axes = eager_vs_deploy(board.rows, board.default_view).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["p_a", "p_b"]
    assert [text.get_text() for text in axes.texts] == ["1.50× faster", "1.20× slower"]


def test_no_data_no_figure(tmp_path):
    board = arrange([], [make_paper(tmp_path, "p")], [])
    assert all_figures(board) == {}
