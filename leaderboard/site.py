"""The site: one self-contained index, a page per paper, and the same numbers as files."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness import registry
from harness.errors import ReplivitError
from harness.experiment import save_figures
from harness.record import RecordStore
from harness.registry import Paper
from leaderboard import pages, paper_pages
from leaderboard.changes import Comparison, compare_boards, describe, load_old
from leaderboard.export import to_csv, to_json, to_markdown
from leaderboard.figures import STYLES, all_figures
from leaderboard.lessons import picture_uri, render_lesson
from leaderboard.tables import Board, collect
from leaderboard.verdicts import Verdict, ledger

TEMPLATES = Path(__file__).parent / "templates"
LEGEND = {
    "transformer": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0",
    "hybrid": "M-5,-5h10v10h-10z",
    "cnn": "M0,-6L6,5H-6z",
    "other": "M0,-6.5L6.5,0L0,6.5L-6.5,0z",
}


@dataclass
class SitePaths:
    """What `build_site` wrote, and what it was made from."""

    index: Path
    papers: dict[str, Path]
    csv: Path
    markdown: Path
    json: Path
    figures: list[Path]
    board: Board
    ledgers: dict[str, list[Verdict]] = field(default_factory=dict)
    comparison: Comparison | None = None


def build_site(
    store: RecordStore,
    out: Path | str,
    papers: list[Paper] | None = None,
    against: Path | str | None = None,
) -> SitePaths:
    """Write the leaderboard's pages, tables and figures to `out`.

    Args:
        store: where the records are; those shipped with the papers are read as well.
        papers: default: all that are registered.
        against: an old `leaderboard.json`, records file or records folder to compare with.

    Raises:
        ReplivitError: `against` or a file of records cannot be read, or `out` cannot be written.
    """
    out = Path(out)
    papers = registry.papers() if papers is None else papers
    board = collect(store, papers)
    comparison = None
    if against is not None:
        old = load_old(Path(against), papers)
        comparison = compare_boards(old, board, Path(against).name)
    sound = [paper for paper in papers if paper.facts]
    ledgers = {paper.key: ledger(paper, board) for paper in sound}
    try:
        figures = save_figures(all_figures(board), out / "figures")
        site = SitePaths(
            index=out / "index.html",
            papers={paper.key: out / "papers" / f"{paper.key}.html" for paper in sound},
            csv=out / "leaderboard.csv",
            markdown=out / "leaderboard.md",
            json=out / "leaderboard.json",
            figures=figures,
            board=board,
            ledgers=ledgers,
            comparison=comparison,
        )
        (out / "papers").mkdir(parents=True, exist_ok=True)
        for text, path in (
            (to_csv(board), site.csv),
            (to_markdown(board), site.markdown),
            (to_json(board), site.json),
        ):
            _write(path, text)
        environment = _environment()
        for paper in sound:
            context = _paper_context(paper, board, ledgers[paper.key], site)
            _write(site.papers[paper.key], environment.get_template("paper.html").render(context))
        index = environment.get_template("index.html").render(_index_context(site, sound))
        _write(site.index, index)
    except OSError as error:
        raise ReplivitError(f"cannot write the site to {out}: {error.strerror}") from error
    return site


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a page."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),  # no other script may run in the page
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    )
    return environment


def _index_context(site: SitePaths, papers: list[Paper]) -> dict[str, Any]:
    board = site.board
    addresses = {paper.key: f"papers/{paper.key}.html" for paper in papers}
    data = pages.page_data(board, addresses)
    view = board.default_view
    listed = []
    for paper in papers:
        sections = paper_pages.experiment_sections(paper, board)
        found = [row["outcome"] for section in sections for row in section["findings"]]
        listed.append(
            {
                "title": paper.facts.title, "venue": paper.facts.venue, "year": paper.facts.year,
                "page": addresses[paper.key], "experiments": "not run yet" if sections else "–",
                "verdicts": pages.count_outcomes(one.outcome for one in site.ledgers[paper.key]),
                "findings": pages.count_outcomes(found) if found else None,
            }
        )  # fmt: skip
    rows = board.rows
    compared = site.comparison.changes if site.comparison else []
    return {
        "data": data,
        "default_view": board.views.index(view) if view else 0,
        "axes": ("latency_ratio" if view else "macs", "top1"),
        "filters": [
            ("track", "Track", board.tracks),
            ("family", "Family", sorted({row.family for row in rows})),
            ("paper", "Paper", sorted({row.paper for row in rows if row.paper})),
        ],
        "machines": board.machines,
        "devices": sorted({one.device for one in board.views}),
        "legend": [
            (family, LEGEND[family])
            for family in sorted({r.family if r.family in STYLES else "other" for r in rows})
        ],
        "summary": {
            "variants": len({row.name for row in rows}),
            "papers": len(papers),
        },
        "headlines": pages.headlines(board, site.ledgers),
        "notices": board.notices,
        "comparison": site.comparison,
        "changes": [describe(one) for one in compared],
        "across": pages.across_machines(board),
        "papers": listed,
        "figures": [
            {"uri": picture_uri(path, path.parent), "alt": path.stem.replace("_", " ")}
            for path in site.figures
            if path.suffix == ".svg"
        ],
    }


def _paper_context(
    paper: Paper, board: Board, verdicts: list[Verdict], site: SitePaths
) -> dict[str, Any]:
    facts = paper.facts
    sections = paper_pages.experiment_sections(paper, board)
    found = [row["outcome"] for section in sections for row in section["findings"]]
    readme = paper.directory / "README.md"
    lesson = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    addresses = {key: path.name for key, path in site.papers.items()}
    rows = paper_pages.ledger_rows(verdicts)
    return {
        "paper": paper,
        "facts": facts,
        "code_link": _web(facts.code.url) if facts.code else None,
        "official": [{**one.model_dump(), "link": _web(one.url)} for one in facts.official_weights],
        "experiments": sections,
        "findings": pages.count_outcomes(found) if found else None,
        "compared": [row for row in rows if row["outcome"] != "not measured"],
        "untested": [row for row in rows if row["outcome"] == "not measured"],
        "counts": pages.count_outcomes(one.outcome for one in verdicts),
        "measurements": paper_pages.measurement_rows(paper, board),
        "weights": paper_pages.weight_rows(paper, board),
        "lesson": Markup(render_lesson(lesson, paper.directory, addresses)),
    }


def _web(address: str) -> str | None:
    """The address if it is a web one; anything else (javascript:, ...) is shown, not linked."""
    return address if address.startswith(("https://", "http://")) else None
