"""From records to rows: which record counts, what is aggregated, what is left out."""

import csv
import io
import json
import math

import pytest
from display_case import EPYC, GPU, LAPTOP, make_paper, make_store, record, timing, trained

import harness
from harness.data import get_track
from harness.training.recipe import read_recipe, resolve_recipe
from leaderboard.columns import COLUMNS, show, show_interval
from leaderboard.export import to_csv, to_json, to_markdown
from leaderboard.provenance import record_id, remeasure_command
from leaderboard.tables import View, arrange, collect, over_seeds, pick


def board_of(tmp_path, records, **facts):
    """The board of some records and one paper `p`."""
    return collect(make_store(tmp_path / "r", records), [make_paper(tmp_path, "p", **facts)])


def test_the_newest_sound_record_counts():
    old = record("p_a", "params", 1, day=1)
    new = record("p_a", "params", 2, day=2)
    assert pick([new, old]).value == 2
    noisy = record("p_a", "latency", 0.5, day=3, status="noisy", reason="6 %")
    ok = record("p_a", "latency", 0.4, day=2)
    assert pick([ok, noisy]).value == 0.4
    assert pick([noisy]).status == "noisy"


def test_a_failure_after_a_number_is_remembered_and_alone_is_shown():
    ok = record("p_a", "latency", 0.4, day=1)
    failed = record("p_a", "latency", None, day=2, status="failed", reason="segfault")
    cell = pick([ok, failed])
    assert (cell.value, cell.later_failure.reason) == (0.4, "segfault")
    assert pick([failed]).status == "failed" and pick([failed]).value is None
    assert pick([failed, record("p_a", "latency", 0.3, day=3)]).later_failure is None
    assert pick([]) is None


def test_seeds_become_mean_and_std():
    cell = over_seeds([trained("p_a", seed, top1) for seed, top1 in enumerate((88.0, 89.0, 90.0))])
    assert cell.value == pytest.approx(89.0) and cell.std == pytest.approx(1.0)
    reach = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) * std / sqrt(n)
    assert cell.interval == pytest.approx((89 - reach, 89 + reach))
    assert cell.seeds == 3


def test_a_seed_trained_again_counts_once_and_recipes_do_not_mix():
    runs = [trained("p_a", 0, 80.0), trained("p_a", 0, 88.0, day=1), trained("p_a", 1, 90.0)]
    assert over_seeds(runs).value == pytest.approx(89.0)
    other = trained("p_a", 2, 10.0, day=9, recipe="one_epoch")
    assert over_seeds([*runs, other]).value == pytest.approx(89.0)


@pytest.mark.parametrize("how", [{"starts_trained": True}, {"frozen": ["x"]}, {"held_out": 500}])
def test_trainings_of_another_kind_do_not_mix_with_those_from_scratch(how):
    runs = [trained("p_a", seed, 88.0 + seed) for seed in range(2)]
    tuned = trained("p_a", 2, 99.0, day=9)
    tuned.detail["training"].update(how)
    assert over_seeds([*runs, tuned]).value == pytest.approx(88.5)


def test_one_seed_keeps_its_own_interval_and_says_so():
    cell = over_seeds([trained("p_a", 0, 88.0)])
    assert (cell.seeds, cell.std, cell.interval) == (1, None, (87.4, 88.6))


def test_the_shipped_files_score_stands_beside_the_seeds():
    shipped = trained("p_a", None, 88.2, day=5, weights_sha256="a" * 64)
    cell = over_seeds([shipped, *(trained("p_a", seed, 88.0 + seed) for seed in range(3))])
    assert cell.value == pytest.approx(89.0) and cell.also == (shipped,)
    assert over_seeds([shipped]).value == 88.2


def test_options_other_sizes_and_slices_stay_off_the_board(tmp_path):
    records = [
        record("p_a", "params", 1, conditions={"options": {"keep_ratio": 0.7}}),
        record("p_a", "macs", 1, conditions={"image_size": 384}),
        record("p_a", "macs_fvcore", 7, conditions={"image_size": 224, "num_classes": 1000}),
        record("p_a", "macs_paper", 1, conditions={"num_classes": 10}),
        trained("p_a", None, 50.0, track="imagenet", options={"limit": 100}),
    ]
    (row,) = board_of(tmp_path, records).rows
    assert set(row.fixed) == {"macs_fvcore"}


def test_views_are_machine_and_setting(tmp_path):
    records = [
        *timing("p_a", 10, 0.5),
        *timing("p_a", 6, 0.6, machine=LAPTOP),
        *timing("p_a", 8, 0.4, backend="deploy"),
        *timing("p_a", 1, 0.3, device="cuda", machine=GPU, batch_size=32),
    ]
    board = board_of(tmp_path, records)
    assert len(board.views) == 4 and board.machines == sorted([EPYC, LAPTOP, GPU])
    assert board.default_view == View(EPYC, "cpu", 1, 1, "eager", "float32")
    (row,) = board.rows
    assert row.cell("latency", board.default_view).value == pytest.approx(0.010)
    gpu = next(view for view in board.views if view.device == "cuda")
    assert gpu.setting == "cuda, batch 32, eager, float32"
    assert row.cell("latency_ratio", gpu).value == 0.3


def test_memory_comes_from_the_nearest_setting_of_the_same_machine(tmp_path):
    given = {"threads": 1, "batch_size": 8}
    records = [
        *timing("p_a", 8, 0.4, backend="deploy"),
        *timing("p_a", 8, 0.4, machine=LAPTOP),
        record("p_a", "memory_training", 10, conditions={**given, "batch_size": 32}),
        record("p_a", "memory_training", 99, conditions=given),
    ]
    board = board_of(tmp_path, records)
    assert len(board.views) == 2, "a setting in which only memory was measured is no view"
    (row,) = board.rows
    here, there = (next(v for v in board.views if v.machine == one) for one in (EPYC, LAPTOP))
    assert row.cell("memory_training", here).value == 99
    assert row.cell("memory_training", there) is None


def test_rows_of_several_tracks_and_of_unknown_models(tmp_path):
    records = [
        trained("p_a", 0, 80.0, track="imagenet"),
        trained("p_a", 0, 90.0, track="cifar10"),
        record("MyModule", "params", 5),
    ]
    board = board_of(tmp_path, records)
    found = {(row.name, row.track): row for row in board.rows}
    assert set(found) == {("p_a", "imagenet"), ("p_a", "cifar10"), ("MyModule", "none")}
    assert found["p_a", "cifar10"].fixed["top1"].value == 90.0
    assert found["MyModule", "none"].family == "unknown"
    assert board.tracks[-1] == "none"


def test_rows_come_largest_track_first_then_by_speed(tmp_path):
    spec = {"build": "model:a"}
    facts = {
        "p_slow": spec, "p_fast": spec, "p_untimed": spec,
        "p_micro": {**spec, "track": "cifar10"},
    }  # fmt: skip
    records = [*timing("p_slow", 9, 2.0), *timing("p_fast", 5, 1.0), *timing("p_micro", 1, 0.1)]
    names = [row.name for row in board_of(tmp_path, records, variants=facts).rows]
    assert names == ["p_fast", "p_slow", "p_untimed", "p_micro"]


def test_records_shipped_beside_weights_are_read_and_torn_lines_reported(tmp_path):
    paper = make_paper(tmp_path, "p")
    (paper.directory / "weights").mkdir()
    line = trained("p_a", 0, 91.0, track="imagenet").model_dump_json()
    (paper.directory / "weights" / "p_a.records.jsonl").write_text(line + "\n" + line[:40])
    board = collect(make_store(tmp_path / "r", [record("p_a", "params", 3)]), [paper])
    assert board.rows[0].fixed["top1"].value == 91.0
    assert len(board.notices) == 1 and "line 2" in board.notices[0]


def test_published_top1_is_the_first_of_the_papers_file_that_was_read(tmp_path):
    row = {"variant": "A", "of": "p_a", "metric": "top1", "unit": "%", "source": "s", "seen": True}
    hearsay = {**row, "value": 78.2, "source": "memory", "seen": False}
    published = [hearsay, {**row, "value": 79.2}, {**row, "value": 80.2, "source": "t"}]
    board = board_of(tmp_path, [], published=published)
    assert board.rows[0].published_top1 == 79.2


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0153, "0.0153"),
        (1.254, "1.25"),
        (86.57, "86.6"),
        (1240, "1,240"),
        (0, "0"),
        (9.999, "10.00"),
        (5.5e-15, "5.5e-15"),
        (-0.0000123456, "-1.23e-05"),
        (0.000123456, "0.000123"),
    ],
)
def test_numbers_read_well(value, text):
    assert show(value) == text


def test_interval_ends_that_would_read_the_same_get_more_digits():
    assert show_interval(1.25, (1.21, 1.28)) == "1.21–1.28"
    assert show_interval(13.7, (13.66, 13.74)) == "13.660–13.740"
    assert show_interval(1, None) == ""


def test_csv_holds_every_row_and_view_in_the_columns_units(case):
    papers, store = case
    board = collect(store, papers)
    lines = list(csv.DictReader(io.StringIO(to_csv(board))))
    one = next(
        x for x in lines if x["variant"] == "model_cnn_02" and x["machine"] == EPYC
        and x["backend"] == "eager"
    )  # fmt: skip
    row = next(row for row in board.rows if row.name == "model_cnn_02")
    assert float(one["params_M"]) == pytest.approx(row.fixed["params"].value / 1e6)
    cell = row.cell("latency", board.default_view)
    assert float(one["latency_ms"]) == pytest.approx(1e3 * cell.value)
    assert float(one["latency_ms_low"]) == pytest.approx(1e3 * cell.interval[0])
    broken = [x for x in lines if x["variant"] == "model_trans_03"]
    assert broken and all(x["latency_ms"] == "" for x in broken)
    assert {x["latency_status"] for x in broken} == {"out_of_memory"}
    assert {x["variant"] for x in lines} == {row.name for row in board.rows}


def test_json_names_the_records_behind_each_cell(case):
    papers, store = case
    data = json.loads(to_json(collect(store, papers)))
    assert data["schema_version"] == 1
    known = {record_id(one) for one in store}
    used = {name for cell in data["cells"] for name in cell["records"]}
    assert used and used <= known
    micro = next(
        c for c in data["cells"] if (c["variant"], c["metric"]) == ("tiny_cnn_micro", "top1")
    )
    assert micro["seeds"] == 1 and len(micro["records"]) == 1


def test_markdown_has_a_line_per_row_and_cannot_be_broken_by_a_name(tmp_path):
    board = board_of(tmp_path, [record("bad|name\nx", "params", 5_000_000)])
    text = to_markdown(board)
    assert "| bad\\|name x | none | 5.00 |" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 4


@pytest.mark.parametrize(
    "metric, conditions, command",
    [
        ("macs", {}, "replivit measure v --metrics macs"),
        ("latency", {"backend": "deploy", "threads": 2, "batch_size": 8},
         "replivit measure v --metrics latency --device cpu --batch-size 8 --backend deploy "
         "--dtype float32 --threads 2"),
        ("top1", {"track": "cifar10"}, "replivit evaluate v --track cifar10"),
        ("top1", {"track": "cifar10", "device": "cuda", "dtype": "bfloat16"},
         "replivit evaluate v --track cifar10 --device cuda --dtype bfloat16"),
        ("top1", {"track": "cifar10", "backend": "deploy"},
         "replivit evaluate v --track cifar10 --backend deploy"),
        ("top1", {"track": "cifar10", "seed": 2}, "replivit train v --track cifar10 --seed 2"),
    ],
)  # fmt: skip
def test_each_record_names_the_command_that_repeats_it(metric, conditions, command):
    assert remeasure_command(record("v", metric, 1, conditions=conditions)) == command


def test_a_training_is_repeated_by_its_recipe():
    """What it changed of the recipe that it had, or of the default; an old recipe is left out."""
    variant = harness.get_variant("vit_slim_micro")
    default = resolve_recipe(None, variant, "fashion_mini", get_track("fashion_mini").protocol)
    changed = default.changed(lr=0.25, no_decay=("head.*",))
    named = read_recipe("retrain_small", variant)

    def command(recipe) -> str:
        conditions = {"track": "fashion_mini", "seed": 1}
        detail = {"training": {"recipe": recipe}}
        made = record("vit_slim_micro", "top1", 1, conditions=conditions, detail=detail)
        return remeasure_command(made).removeprefix(
            "replivit train vit_slim_micro --track fashion_mini --seed 1"
        )

    assert command(default.model_dump(mode="json")) == ""
    told = " --set lr=0.25 --set 'no_decay=[\"head.*\"]'"
    assert command(changed.model_dump(mode="json")) == told
    assert command(named.model_dump(mode="json")) == " --recipe retrain_small"
    assert command({"name": "gone"}) == ""


def test_a_command_leaves_options_out_that_are_none():
    made = record("p/table", "experiment", 1, detail={"scale": "small", "options": ["a"]})
    assert remeasure_command(made) == "replivit run p/table --scale small"


def test_commands_quote_what_a_shell_would_run():
    found = remeasure_command(record("v; rm -rf /", "params", 1))
    assert found == "replivit measure 'v; rm -rf /' --metrics params"


def test_an_empty_store_gives_rows_without_numbers(tmp_path):
    board = arrange([], [make_paper(tmp_path, "p")], [])
    assert [row.name for row in board.rows] == ["p_a"]
    assert board.default_view is None and board.rows[0].cell("latency", None) is None
    assert all(key in to_csv(board) for key in COLUMNS)
