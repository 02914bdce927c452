"""The pages: complete, self-contained, honest about what is missing, and safe."""

import base64
import hashlib
import json
import re
from datetime import datetime, timezone
from html.parser import HTMLParser

import numpy as np
import pytest
from display_case import make_paper, make_store, record, timing, trained
from safetensors.numpy import save_file

from harness.errors import ReplivitError
from harness.registry import Paper
from leaderboard import build_site
from leaderboard.columns import show

HOSTILE = "\"'><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.data = [], [], ""
        self.open = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source.replace("<wbr>", ""))  # where a line may break; no text

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append((tag, dict(attributes)))

    def handle_data(self, text):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script" and attributes.get("id") == "data":
            self.data += text
        elif tag not in ("script", "style"):
            self.text.append(text)

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def pages_of(site):
    return [Page(path) for path in (site.index, *site.papers.values())]


def test_the_index_has_a_row_per_model_with_its_numbers(site):
    page = Page(site.index)
    rows = [attributes for tag, attributes in page.tags if tag == "tr" and "data-row" in attributes]
    assert len(rows) == len(site.board.rows) == 15
    row = next(row for row in site.board.rows if row.name == "model_cnn_02")
    ratio = row.cell("latency_ratio", site.board.default_view).value
    numbers = f"{show(row.fixed['params'].value / 1e6)} {show(row.fixed['macs'].value / 1e9)}"
    words = f"model_cnn_02 cnn, 224 px, imagenet {numbers} {row.published_top1} published"
    assert f"{words} {show(ratio)}" in page.words
    assert "3 seeds ± " in page.words and "1 seed" in page.words


def test_states_of_cells_are_words(site):
    words = Page(site.index).words
    assert "out of memory the process was killed at 20.1 GiB" in words
    assert " noisy " in words and " contended " in words


def test_the_scripts_data_fit_the_table(site):
    data = json.loads(Page(site.index).data)
    assert [row["name"] for row in data["rows"]] == [row.name for row in site.board.rows]
    assert len(data["views"]) == len(site.board.views) == len(data["fronts"])
    for share in data["fronts"][0].values():
        assert len(share) == len(data["rows"])
        assert all(one is None or 0 <= one <= 1 for one in share)
    record_number = data["rows"][0]["fixed"]["params"]["records"][0]
    facts = {label: data["texts"][text] for label, text in data["records"][record_number]["facts"]}
    assert facts["commit"] == "509bca100000" and "AMD EPYC" in facts["machine"]
    assert data["records"][record_number]["command"].startswith("replivit measure")


def test_no_page_requests_anything(site):
    for page in pages_of(site):
        for source in page.attributes("src"):
            assert source.startswith("data:")
        assert not [tag for tag, attributes in page.tags if tag in ("link", "iframe", "object")]
        assert "url(" not in page.source and "@import" not in page.source
        assert "fetch(" not in page.source and "XMLHttpRequest" not in page.source
        (policy,) = (a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
        assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_the_policy_admits_the_pages_own_script(site):
    for path in (site.index, *site.papers.values()):
        source = path.read_text(encoding="utf-8")
        (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in source


def test_every_local_link_exists(site):
    for path in (site.index, *site.papers.values()):
        for address in Page(path).attributes("href"):
            if not address.startswith(("http", "#")):
                assert (path.parent / address).is_file(), address


def test_every_file_is_written_and_nothing_is_left_half(site):
    folder = site.index.parent
    assert not list(folder.rglob("*.part"))
    assert {path.suffix for path in site.figures} == {".svg", ".png"}
    assert "<text" in next(p for p in site.figures if p.suffix == ".svg").read_text()
    assert all(path.stat().st_size > 1000 for path in (site.csv, site.json, site.markdown))


def test_a_papers_page_is_a_ledger(site):
    page = Page(site.papers["large"])
    counts = re.search(r"(\d+) reproduced, (\d+) deviates?, (\d+) not measured", page.words)
    outcomes = [one.outcome for one in site.ledgers["large"]]
    assert int(counts[1]) == outcomes.count("reproduced") > 15
    assert int(counts[2]) == outcomes.count("deviates") > 0
    assert int(counts[3]) == outcomes.count("not measured") > 20
    assert "belongs to a device that is not here: iPhone 12" in page.words
    assert "Not run yet." in page.words and "replivit run large/sweep" in page.words


def experiment_record(**detail):
    detail = {
        "scale": "small", "options": {"rounds": "3"}, "notes": "A note.",
        "rows": [{"size": 224, "ms": 1.23456, "kind": None}],
        "published": [{"size": 224, "ms": 1.5}],
        "findings": [{"claim": "It is faster", "outcome": "reproduced", "evidence": "2x"}],
        "figures": ["experiments/p/sweep/plot.png", "experiments/p/sweep/plot.svg"], **detail,
    }  # fmt: skip
    return record("p/sweep", "experiment", 1, detail=detail)


def paper_with_everything(root, **changes):
    experiments = {"sweep": {"run": "e:f", "title": "Sweep", "reproduces": "Table 9"}}
    paper = make_paper(
        root, "p", experiments=experiments, claims=["It is good"], notes=["Code differs"],
        code={"url": "https://github.com/x/y"}, arxiv="2206.01191",
        official_weights=[{"variant": "A", "url": "https://x.org/a.pth"}], **changes,
    )  # fmt: skip
    (paper.directory / "README.md").write_text("# The lesson\n\nAn *idea*.")
    return paper


def test_experiments_lesson_and_citation_are_on_the_page(tmp_path, home):
    folder = home / "experiments" / "p" / "sweep"
    folder.mkdir(parents=True)
    for name in ("plot.svg", "plot.png"):
        (folder / name).write_bytes(b"picture")
    paper = paper_with_everything(tmp_path)
    site = build_site(make_store(tmp_path / "r", [experiment_record()]), tmp_path / "s", [paper])
    page = Page(site.papers["p"])
    for words in (
        "It is good", "Code differs", "arXiv 2206.01191", "no licence stated", "Table 9", "A note.",
        "It is faster reproduced 2x", "size ms kind 224 1.235", "As the paper prints it",
        "replivit run p/sweep --scale small --set rounds=3", "The lesson", "https://x.org/a.pth",
    ):  # fmt: skip
        assert words in page.words, words
    assert page.attributes("src") == ["data:image/svg+xml;base64,cGljdHVyZQ=="]
    assert "1 reproduced, 0 deviate, 0 not measured" in Page(site.index).words


def test_cells_of_several_values_read_as_words(tmp_path, home):
    rows = [{"name": "x", "tau": {"all": [-0.32, 0.591234], "equal": None}}]
    store = make_store(tmp_path / "r", [experiment_record(rows=rows)])
    page = Page(build_site(store, tmp_path / "s", [paper_with_everything(tmp_path)]).papers["p"])
    assert "name tau x all [-0.3200, 0.5912]; equal" in page.words


def test_a_shipped_result_shows_with_its_figure_where_nothing_ran(tmp_path, home):
    paper = paper_with_everything(tmp_path)
    folder = paper.directory / "results"
    folder.mkdir()
    shipped = experiment_record(figures=["results/sweep-plot.svg"], shipped=True)
    (folder / "sweep.records.jsonl").write_text(shipped.model_dump_json() + "\n")
    (folder / "sweep-plot.svg").write_bytes(b"picture")
    page = Page(build_site(make_store(tmp_path / "r", []), tmp_path / "s", [paper]).papers["p"])
    assert "It is faster reproduced 2x" in page.words and "Not run yet" not in page.words
    assert page.attributes("src") == ["data:image/svg+xml;base64,cGljdHVyZQ=="]


def test_only_the_newest_run_of_an_experiment_counts(tmp_path, home):
    old = experiment_record(notes="old").model_copy(
        update={"started": datetime(2025, 1, 1, tzinfo=timezone.utc)}
    )
    store = make_store(tmp_path / "r", [experiment_record(notes="new"), old])
    words = Page(
        build_site(store, tmp_path / "s", [paper_with_everything(tmp_path)]).papers["p"]
    ).words
    assert "new" in words and "old" not in words


def test_each_track_of_an_experiment_has_its_own_section(tmp_path, home):
    runs = [("fashion_mini", "stale"), ("cifar10", "small"), ("fashion_mini", "fresh")]
    made = [
        record("p/sweep", "experiment", 1, detail=experiment_record(notes=note).detail,
               conditions={"track": track})
        for track, note in runs
    ]  # fmt: skip
    made[0] = made[0].model_copy(update={"started": datetime(2025, 1, 1, tzinfo=timezone.utc)})
    site = build_site(
        make_store(tmp_path / "r", made), tmp_path / "s", [paper_with_everything(tmp_path)]
    )
    words = Page(site.papers["p"]).words
    assert "Sweep, on fashion_mini" in words and "Sweep, on cifar10" in words
    assert "small" in words and "fresh" in words and "stale" not in words


def test_figures_outside_home_are_not_read(tmp_path, home):
    (tmp_path / "secret.png").write_bytes(b"secret")
    store = make_store(tmp_path / "r", [experiment_record(figures=["../secret.png", 7])])
    site = build_site(store, tmp_path / "s", [paper_with_everything(tmp_path)])
    assert Page(site.papers["p"]).attributes("src") == []


def test_shipped_weights_are_listed_with_their_own_score(tmp_path):
    weights = {"cifar10": "no", "imagenet": "w.safetensors"}
    paper = make_paper(tmp_path, "p", variants={"p_a": {"build": "m:a", "weights": weights}})
    save_file({"x": np.zeros(3)}, paper.directory / "w.safetensors")
    sha = hashlib.sha256((paper.directory / "w.safetensors").read_bytes()).hexdigest()
    scored = trained("p_a", None, 88.25, track="imagenet", weights_sha256=sha)
    site = build_site(make_store(tmp_path / "r", [scored]), tmp_path / "s", [paper])
    words = Page(site.papers["p"]).words
    assert f"w.safetensors 88.25 % 0.00 MiB {sha}" in words and "no is missing" in words


def test_everything_from_files_is_escaped(tmp_path, home):
    """Hostile text in every free field of a paper, a record, a README and a file name."""
    row = {
        "variant": HOSTILE, "of": "p_a", "metric": "top1", "value": 80.0, "unit": "%",
        "conditions": HOSTILE, "source": HOSTILE, "seen": True, "reason": HOSTILE,
    }  # fmt: skip
    paper = make_paper(
        tmp_path, "p", title=HOSTILE, authors=[HOSTILE], venue=HOSTILE, summary=HOSTILE,
        doi=HOSTILE, claims=[HOSTILE], notes=[HOSTILE], conventions={HOSTILE: HOSTILE},
        published=[row], code={"url": f"javascript:{HOSTILE}", "license": HOSTILE},
        variants={"p_a": {"build": "m:a", "family": HOSTILE, "track": HOSTILE, "summary": HOSTILE}},
        experiments={"sweep": {"run": "e:f", "title": HOSTILE, "reproduces": HOSTILE}},
        official_weights=[{"variant": HOSTILE, "url": f"javascript:{HOSTILE}", "note": HOSTILE}],
    )  # fmt: skip
    (paper.directory / "README.md").write_text(f"# {HOSTILE}\n\n[x](javascript:alert(3)) {HOSTILE}")
    broken = Paper(HOSTILE, tmp_path, HOSTILE, None, HOSTILE)
    records = [
        record(HOSTILE, "params", 5, machine=f"{HOSTILE} x2"),
        record("p_a", "macs", None, status="failed", reason=HOSTILE, method=HOSTILE),
        *timing(HOSTILE, 5, 0.5, backend=HOSTILE, device=HOSTILE, status="noisy", reason=HOSTILE),
        experiment_record(
            rows=[{HOSTILE: HOSTILE}], published=[{HOSTILE: HOSTILE}], notes=HOSTILE, scale=HOSTILE,
            findings=[{"claim": HOSTILE, "outcome": HOSTILE, "evidence": HOSTILE}],
            figures=[HOSTILE], options={HOSTILE: HOSTILE},
        ),
    ]  # fmt: skip
    old = make_store(tmp_path / "old", [record(HOSTILE, "params", 4)])
    site = build_site(
        make_store(tmp_path / "r", records), tmp_path / "s", [paper, broken], against=old.folder
    )
    for page in pages_of(site):
        assert page.words.count("<script>alert(2)</script>") > 5, "the text is shown, as text"
        assert "{{ 7 * 7 }}" in page.words and " 49 " not in page.words
        assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
        assert not [tag for tag, a in page.tags if tag == "img" and a.get("src") == "x"]
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert len(scripts) <= 2
        assert not [one for one in page.attributes("href") if one.startswith("javascript")]
    names = [row["name"] for row in json.loads(Page(site.index).data)["rows"]]
    assert HOSTILE in names


def test_an_empty_case_is_a_useful_page(tmp_path):
    site = build_site(make_store(tmp_path / "r", []), tmp_path / "s", [])
    words = Page(site.index).words
    assert "Nothing is measured yet: run replivit leaderboard" in words
    assert "No model is known yet." in words and "No paper was found." in words


def test_papers_without_records_show_what_they_printed(tmp_path):
    row = {"variant": "A", "of": "p_a", "metric": "top1", "unit": "%", "source": "s"}
    published = [{**row, "value": 79.2, "seen": True}, {**row, "value": 80.1, "seen": False}]
    paper = make_paper(tmp_path, "p", published=published)
    site = build_site(make_store(tmp_path / "r", []), tmp_path / "s", [paper])
    board = Page(site.index).words
    assert "79.2 published" in board and "80.1" not in board
    assert "(source not read)" in Page(site.papers["p"]).words


def test_a_broken_paper_is_named_and_hides_nobody(tmp_path):
    broken = Paper("bad", tmp_path, "bad", None, "bad/paper.yaml, line 3: unknown key")
    site = build_site(
        make_store(tmp_path / "r", []), tmp_path / "s", [broken, make_paper(tmp_path, "p")]
    )
    words = Page(site.index).words
    assert "paper bad is left out: bad/paper.yaml, line 3: unknown key" in words
    assert "p_a" in words and set(site.papers) == {"p"}


def test_what_changed_is_told_against_an_old_board(tmp_path):
    papers = [make_paper(tmp_path, "p")]
    old = build_site(make_store(tmp_path / "a", timing("p_a", 10, 1.0)), tmp_path / "s", papers)
    site = build_site(
        make_store(tmp_path / "b", timing("p_a", 8, 0.8)), tmp_path / "s", papers, against=old.json
    )
    words = Page(site.index).words
    assert "What changed against leaderboard.json" in words
    assert "better p_a Latency" in words and "-20.0%" in words
    assert [one.kind for one in site.comparison.changes] == ["better", "better"]


def test_several_machines_meet_in_the_ratio_only(site):
    words = Page(site.index).words
    assert "Across machines" in words
    table = words[words.index("Across machines") :]
    assert "Intel Core i7-1260P x12" in table and "model_cnn_02" in table


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplivitError, match="cannot write"):
        build_site(make_store(tmp_path / "r", []), tmp_path / "file", [])
