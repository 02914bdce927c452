"""The leaderboard's figures for print: matplotlib, SVG and PNG, readable without colour.

Families differ in colour (Okabe and Ito's colour-blind safe set) and in marker. Labels are placed
where they fit; a point without room for its name keeps its marker and stands in the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from leaderboard.columns import COLUMNS
from leaderboard.fronts import OFF, ON, point, probabilities
from leaderboard.tables import Board, Row, View

STYLES = {  # family -> (colour, marker)
    "transformer": ("#0072B2", "o"),
    "hybrid": ("#D55E00", "s"),
    "cnn": ("#009E73", "^"),
}
OTHER_STYLE = ("#666666", "D")
LOOK = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}
#: Where a label may stand around its point: offset in points, alignments.
PLACES = (
    (7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 7, "center", "bottom"),
    (0, -7, "center", "top"), (6, 6, "left", "bottom"), (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"), (-6, -6, "right", "top"),
)  # fmt: skip
#: Alignment -> the part of a label that lies before its anchor.
BEFORE = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}


def all_figures(board: Board) -> dict[str, Figure]:
    """Every figure the records allow; what has no data is left out."""
    view = board.default_view
    figures: dict[str, Figure | None] = {}
    with matplotlib.rc_context(LOOK):
        for track in board.tracks:
            rows = [row for row in board.rows if row.track == track]
            figures[f"macs_vs_top1_{track}"] = scatter(rows, "macs", "top1", None, track)
            figures[f"params_vs_latency_{track}"] = scatter(rows, "params", "latency", view, track)
            figures[f"time_ratio_{track}"] = ratio_bars(rows, view)
            figures[f"eager_vs_deploy_{track}"] = eager_vs_deploy(rows, view)
    found = {name: figure for name, figure in figures.items() if figure is not None}
    for figure in found.values():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # settled: each file saved would lay it out again
    return found


def style_of(family: str) -> tuple[str, str]:
    """Colour and marker of a family."""
    return STYLES.get(family, OTHER_STYLE)


def scatter(rows: Sequence[Row], x: str, y: str, view: View | None, track: str) -> Figure | None:
    """Two columns of one track with 95 % intervals; the front's sure members are joined.

    Hollow markers are top-1 as published. Faint markers are beaten by somebody.
    """
    share = probabilities(rows, (x, y), view)
    found = [
        (row, point(row, x, view), point(row, y, view), chance)
        for row, chance in zip(rows, share, strict=True)
        if chance is not None
    ]
    if len(found) < 2:
        return None
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for row, (vx, *endx), (vy, *endy), chance in found:
        colour, marker = style_of(row.family)
        hollow = y == "top1" and (row.fixed.get("top1") is None or row.fixed["top1"].value is None)
        alpha = 1.0 if chance >= ON else 0.75 if chance > OFF else 0.45
        axes.errorbar(
            vx, vy, xerr=[[vx - endx[0]], [endx[1] - vx]], yerr=[[vy - endy[0]], [endy[1] - vy]],
            color=colour, elinewidth=1, alpha=alpha, fmt="none", zorder=2,
        )  # fmt: skip
        axes.plot(
            vx, vy, marker, color=colour, alpha=alpha, markersize=7, zorder=3,
            markerfacecolor="white" if hollow else colour,
        )  # fmt: skip
    front = sorted((vx, vy) for _, (vx, *_), (vy, *_), chance in found if chance >= 0.5)
    steps = {"drawstyle": "steps-post", "linestyle": "--", "linewidth": 1, "color": "#999999"}
    axes.plot(*zip(*front, strict=True), **steps, zorder=1)
    axes.set_xscale("log")
    if not COLUMNS[y].larger_is_better:
        axes.set_yscale("log")
    _plain_log_ticks(axes)
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel(COLUMNS[x].heading)
    axes.set_ylabel(COLUMNS[y].heading)
    where = f"\n{view.machine}; {view.setting}" if view and COLUMNS[y].speed else ""
    axes.set_title(f"{COLUMNS[y].label} against {COLUMNS[x].label}, {track}{where}", fontsize=11)
    _legend(axes, [row for row, *_ in found], hollow=y == "top1")
    order = sorted(found, key=lambda one: (-one[3], one[0].name))
    place_labels(axes, [(row.name, vx, vy) for row, (vx, *_), (vy, *_), _ in order])
    return figure


def _plain_log_ticks(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if getattr(axes, f"get_{name}scale")() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, rows: Sequence[Row], hollow: bool) -> None:
    handles = [
        Line2D([], [], linestyle="", marker=style_of(f)[1], color=style_of(f)[0], label=f)
        for f in sorted({row.family for row in rows})
    ]
    if hollow:
        handles.append(
            Line2D(
                [], [], linestyle="", marker="o", color="#444444", markerfacecolor="white",
                label="top-1 as published",
            )
        )  # fmt: skip
    handles.append(Line2D([], [], color="#999999", linestyle="--", label="likely front"))
    figure = axes.get_figure()
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )


def place_labels(axes: Axes, labels: Sequence[tuple[str, float, float]]) -> int:
    """Write names beside points, the first ones first; returns how many found room.

    Args:
        labels: name, x and y in data units, most important first.
    """
    figure = axes.get_figure()
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # settles the layout, so that extents are final
    renderer, frame = canvas.get_renderer(), axes.get_window_extent()
    spots = [axes.transData.transform((x, y)) for _, x, y in labels]
    point_size = figure.dpi / 72  # pixels
    reach = 4.5 * point_size
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in spots]
    placed = 0
    for (name, x, y), (px, py) in zip(labels, spots, strict=True):
        text = axes.annotate(
            name, (x, y), textcoords="offset points", xytext=(0, 0), fontsize=8, color="#333333",
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
        text.set_in_layout(False)
        size = text.get_window_extent(renderer)
        for dx, dy, horizontal, vertical in PLACES:
            left = px + dx * point_size - BEFORE[horizontal] * size.width
            low = py + dy * point_size - BEFORE[vertical] * size.height
            box = Bbox.from_bounds(left, low, size.width, size.height)
            if _inside(box, frame) and not box.count_overlaps(taken):
                text.set(position=(dx, dy), ha=horizontal, va=vertical)
                taken.append(box)
                placed += 1
                break
        else:
            text.remove()
    return placed


def _inside(box: Bbox, frame: Bbox) -> bool:
    across = frame.x0 <= box.x0 and box.x1 <= frame.x1
    return across and frame.y0 <= box.y0 and box.y1 <= frame.y1


def _height(count: int) -> float:
    return 1.4 + 0.24 * count


def ratio_bars(rows: Sequence[Row], view: View | None) -> Figure | None:
    """Time against the yardstick with intervals, fastest first."""
    cells = [(row, row.cell("latency_ratio", view)) for row in rows]
    found = [(row, cell) for row, cell in cells if cell and cell.value is not None]
    if not found:
        return None
    found.sort(key=lambda one: -one[1].value)
    figure = Figure(figsize=(8.6, _height(len(found))), layout="constrained")
    axes = figure.add_subplot()
    for place, (row, cell) in enumerate(found):
        low, high = cell.interval or (cell.value, cell.value)
        axes.barh(
            place, cell.value, height=0.7, color=style_of(row.family)[0],
            alpha=0.85 if cell.status == "ok" else 0.4,
            hatch=None if cell.status == "ok" else "///", edgecolor="white", linewidth=0,
        )  # fmt: skip
        axes.plot([low, high], [place, place], color="#111111", linewidth=1.4)
        mark = "" if cell.status == "ok" else f" ({cell.status})"
        axes.annotate(
            f"{cell.value:.2f}{mark}", (high, place), (4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.axvline(1, color="#111111", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(found)), [row.name for row, _ in found], fontsize=8.5)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("time of one batch / time of the yardstick, with 95 % interval")
    axes.set_title(f"Time against the yardstick\n{view.machine}; {view.setting}", fontsize=11)
    families = sorted({row.family for row, _ in found})
    handles = [Line2D([], [], color=style_of(f)[0], linewidth=6, label=f) for f in families]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    return figure


def eager_vs_deploy(rows: Sequence[Row], view: View | None) -> Figure | None:
    """Time ratio of the eager and of the deployment form, joined by a line."""
    if view is None:
        return None
    sides = [View(**{**vars(view), "backend": name}) for name in ("eager", "deploy")]
    found = []
    for row in rows:
        pair = [row.cell("latency_ratio", side) for side in sides]
        if all(cell and cell.value is not None for cell in pair):
            found.append((row.name, *pair))
    if not found:
        return None
    found.sort(key=lambda one: -one[1].value)
    figure = Figure(figsize=(8.6, _height(len(found))), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, eager, deploy) in enumerate(found):
        axes.plot([eager.value, deploy.value], [place] * 2, color="#bbbbbb", linewidth=2, zorder=1)
        for cell, style in ((eager, ("#666666", "o")), (deploy, ("#0072B2", "D"))):
            low, high = cell.interval or (cell.value, cell.value)
            axes.plot([low, high], [place] * 2, color=style[0], linewidth=1.2, zorder=2)
            axes.plot(cell.value, place, style[1], color=style[0], markersize=6, zorder=3)
        right = max(eager.value, deploy.value)
        axes.annotate(
            f"{eager.value / deploy.value:.2f}× faster"
            if eager.value >= deploy.value
            else f"{deploy.value / eager.value:.2f}× slower",
            (right, place), (9, 0), textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(found)), [name for name, *_ in found], fontsize=8.5)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("time of one batch / time of the yardstick, with 95 % interval")
    axes.set_title(f"Eager and deployment form\n{view.machine}; {sides[0].setting}", fontsize=11)
    handles = [
        Line2D([], [], linestyle="", marker="o", color="#666666", label="eager"),
        Line2D([], [], linestyle="", marker="D", color="#0072B2", label="deploy"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
