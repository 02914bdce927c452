"""The page in a real browser: sorting, filtering, axes, machines, details, keyboard, width.

A script appended to a copy of the page drives it and writes what it saw into the document, which
headless Chromium prints. The copy has no content policy, since the policy forbids such scripts.
"""

import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=4000", "--timeout=60000",
)  # fmt: skip

DRIVER = """
const $ = (id) => document.getElementById(id), seen = {};
const all = (selector) => [...document.querySelectorAll(selector)];
const names = () => all("#rows tr:not([hidden]) th a").map((a) => a.textContent);
const sort = (key) => document.querySelector(`button[data-key=${key}]`).click();
const sorted = () => all("th[aria-sort]").map((th) =>
  th.querySelector("button").dataset.key + " " + th.getAttribute("aria-sort"));
const set = (id, value) => {
  $(id).value = value;
  $(id).dispatchEvent(new Event(id === "text" ? "input" : "change", { bubbles: true }));
};
const cell = (name, key) => all("#rows tr").find((tr) => tr.textContent.includes(name))
  .querySelector(`td[data-key=${key}]`).textContent;
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true }));

seen.start = names();
sort("macs"); seen.up = names(); seen.ariaUp = sorted();
sort("macs"); seen.down = names(); seen.ariaDown = sorted();
sort("top1"); seen.bestFirst = names()[0];

set("family", "cnn"); seen.cnn = names(); seen.count = $("count").textContent;
set("text", "micro"); seen.both = names();
set("text", "nonsense");
seen.none = [names().length, $("nothing").hidden, $("plot-note").textContent];
$("reset").click(); seen.reset = names().length;
set("track", "fashion_mini"); seen.micro = all(".point").length; $("reset").click();

set("x", "params"); set("y", "macs");
seen.points = all(".point").length; seen.bars = all(".point .bar").length;
set("y", "latency_ratio"); seen.ratioBars = all(".point .bar").length;
seen.fronts = all("td.front").map((td) => td.textContent);

document.querySelector("button.more").click(); seen.details = $("details-body").textContent;
$("details-close").click(); seen.closed = !$("details").open;
seen.tabStops = all(".point[tabindex='0']").length;
document.querySelector(".point[tabindex='0']").focus();
const first = document.activeElement;
press("ArrowRight");
seen.moved = document.activeElement !== first && document.activeElement.matches(".point");
seen.tip = [$("tip").hidden, $("tip").textContent, all("tr.hot").length];
press("Enter"); seen.dialog = [$("details").open, $("details-title").textContent];
$("details-close").click();

seen.here = cell("model_cnn_02", "latency");
set("machine", "Intel Core i7-1260P x12"); seen.there = cell("model_cnn_02", "latency");
const offered = [...$("view").options].filter((option) => !option.hidden);
seen.settings = offered.length;
set("view", offered.find((option) => option.textContent.includes("deploy")).value);
seen.deploy = cell("model_cnn_02", "latency");

$("theme").click();
seen.theme = [document.documentElement.style.colorScheme, $("theme").getAttribute("aria-pressed")];
document.body.textContent = JSON.stringify(seen);
"""


def drive(page, folder, width, script):
    """Run a script in a copy of the page; what it leaves in the body comes back as JSON."""
    source = page.read_text(encoding="utf-8")
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    copy = folder / "driven.html"
    copy.write_text(source + f"<script>addEventListener('load', () => {{{script}}})</script>")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1200",
         "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return json.loads(re.search(r"<body>(\{.*\})</body>", done.stdout, re.DOTALL)[1])


@pytest.fixture(scope="module")
def seen(site, tmp_path_factory):
    return drive(site.index, tmp_path_factory.mktemp("browser"), 1280, DRIVER)


def values(site, metric):
    """Row names with a number, smallest first."""
    view = site.board.default_view
    found = {row.name: row.cell(metric, view) for row in site.board.rows}
    return sorted(
        (n for n, c in found.items() if c and c.value is not None), key=lambda n: found[n].value
    )


def test_columns_sort_both_ways_and_missing_numbers_stay_last(site, seen):
    order = values(site, "macs")
    assert seen["start"] == [row.name for row in site.board.rows]
    assert seen["up"][3 : len(order)] == order[3:], "the three micro models are equal"
    assert seen["down"][: len(order) - 3] == order[:2:-1]
    assert seen["up"][-1] == seen["down"][-1] == "model_cnn_11", "it was never counted"
    assert seen["ariaUp"] == ["macs ascending"] and seen["ariaDown"] == ["macs descending"]
    assert seen["bestFirst"] == "tiny_cnn_micro", "top-1 starts with the best"


def test_filters_combine_and_reset(seen):
    assert len(seen["cnn"]) == 5 and all("cnn" in name for name in seen["cnn"])
    assert seen["count"] == "5 of 15 rows" and seen["both"] == ["tiny_cnn_micro"]
    assert seen["none"][:2] == [0, False] and "choose other axes" in seen["none"][2]
    assert seen["reset"] == 15


def test_axes_choose_what_is_drawn(site, seen):
    assert seen["points"] == len(values(site, "macs"))
    assert seen["bars"] == 0, "counts have no interval"
    assert seen["ratioBars"] == len(values(site, "latency_ratio"))
    assert seen["micro"] == 3
    assert "front" in seen["fronts"] and "" in seen["fronts"]


def test_a_machine_and_a_setting_change_the_times(site, seen):
    row = next(row for row in site.board.rows if row.name == "model_cnn_02")
    shown = {}
    for view, cells in row.speeds.items():
        shown[view.machine[:5], view.backend] = f"{1e3 * cells['latency'].value:.1f}"
    assert seen["here"].startswith(shown["AMD E", "eager"])
    assert seen["there"].startswith(shown["Intel", "eager"])
    assert seen["deploy"].startswith(shown["Intel", "deploy"])
    assert seen["settings"] == 2


def test_the_plot_is_one_tab_stop_and_arrows_move_inside(seen):
    assert seen["tabStops"] == 1 and seen["moved"]
    hidden, text, lit = seen["tip"]
    assert not hidden and "Params (M)" in text and lit == 1
    assert seen["dialog"][0] and seen["dialog"][1] in text


def test_details_say_where_numbers_come_from(seen):
    for words in (
        "commit509bca100000",
        "machineIntel Core" if False else "machine",
        "measure again",
    ):
        assert words in seen["details"]
    assert seen["closed"]


def test_theme_can_be_chosen(seen):
    assert seen["theme"] in (["dark", "true"], ["light", "false"])


@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_is_wider_than_the_window(site, tmp_path, width):
    script = "document.body.textContent = JSON.stringify(" \
        "{ page: document.documentElement.scrollWidth, window: window.innerWidth })"  # fmt: skip
    for page in (site.index, site.papers["large"]):
        found = drive(page, tmp_path, width, script)
        assert found["page"] <= found["window"], page.name
