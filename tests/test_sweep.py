"""The sweep: what is planned, what is skipped, and that nothing measured is lost."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import bench_paper
import pytest

from harness import registry, sweep
from harness.errors import ReplivitError
from harness.measurement.cell import GROUPS, Cell
from harness.measurement.isolation import failed_records
from harness.record import RecordStore, make_record
from harness.registry import get_variant
from harness.sweep import missing, plan, run_on_cluster, run_sweep

SMALL, WIDE = "benchpaper_small", "benchpaper_wide"


@pytest.fixture(autouse=True, scope="module")
def bench(tmp_path_factory):
    with bench_paper.installed(tmp_path_factory.mktemp("bench")):
        yield


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path / "records")


@pytest.fixture
def bench_of_fakes(monkeypatch):
    """`run_isolated` without processes; returns the cells that were measured, in order."""
    measured: list[Cell] = []

    def run(cell, run_id, worker=None):
        measured.append(cell)
        if cell.variant == "benchpaper_raising":
            variant = get_variant(cell.variant)
            return failed_records(cell, run_id, "failed", "the model is unwell", variant)
        return records_of(cell, run_id)

    monkeypatch.setattr(sweep, "run_isolated", run)
    return measured


def records_of(cell: Cell, run_id: str = "x", **fields) -> list:
    variant = get_variant(cell.variant)
    value = 2e6 if cell.variant == WIDE else 1e6
    conditions = cell.variant_conditions(variant)
    return [
        make_record(cell.variant, metric, value, conditions, run_id=run_id, paper="p", **fields)
        for metric in GROUPS[cell.group]
    ]


def test_quick_plan():
    cells = plan([SMALL])
    assert [(one.group, one.backend, one.batch_size) for one in cells] == [
        ("counts", "eager", 1),
        ("memory_inference", "eager", 1),
        ("memory_training", "eager", 8),
        ("latency", "eager", 1),
        ("latency", "deploy", 1),
    ]


def test_full_plan_has_batches_and_backends():
    timings = [one for one in plan([SMALL], "full") if one.group == "latency"]
    assert {(one.batch_size, one.backend) for one in timings} == {
        (batch, backend) for batch in (1, 8, 32) for backend in ("eager", "deploy", "compile")
    }
    assert {one.profile for one in timings} == {"full"}


def test_shipped_weights_are_evaluated_and_reference_papers_stay_eager():
    variants = registry.variants()
    shipped = {(one.name, track) for one in variants for track in one.spec.weights}
    cells = plan()
    assert {(one.variant, one.track) for one in cells if one.group == "accuracy"} == shipped
    assert {one.variant for one in cells if one.group == "counts"} == {v.name for v in variants}
    showcase = [one for one in variants if one.in_showcase]
    assert {one.variant for one in cells if one.group == "latency"} == {v.name for v in showcase}
    deployed = {one.variant for one in cells if one.backend == "deploy"}
    assert deployed == {one.name for one in showcase if not one.paper.facts.reference}


def test_outside_the_showcase_a_variant_is_timed_when_it_is_named(monkeypatch):
    small = get_variant(SMALL)
    facts = small.paper.facts.model_copy(update={"showcase": [WIDE]})
    modest = replace(small, paper=replace(small.paper, facts=facts))
    monkeypatch.setattr(sweep, "all_variants", lambda: [modest])
    assert [one.group for one in plan()] == ["counts"]
    assert "latency" in {one.group for one in plan([modest])}
    assert "latency" in {one.group for one in plan(profile="full")}


def test_unknown_names_are_sentences():
    with pytest.raises(ReplivitError, match="did you mean benchpaper_small"):
        plan(["benchpaper_smal"])
    with pytest.raises(ReplivitError, match="no profile 'huge'"):
        plan([SMALL], "huge")


def test_everything_is_measured_once(store, bench_of_fakes):
    cells = plan([SMALL, WIDE])
    first = run_sweep(cells, store)
    assert (first.measured, first.skipped) == (10, 0)
    assert first.failures == []
    assert len(store.load()) == sum(len(GROUPS[one.group]) for one in cells)
    bench_of_fakes.clear()
    second = run_sweep(cells, store)
    assert (second.measured, second.skipped) == (0, 10)
    assert bench_of_fakes == []
    assert run_sweep(cells, store, fresh=True).measured == 10


def test_only_the_missing_condition_is_measured(store, bench_of_fakes):
    run_sweep(plan([SMALL]), store)
    bench_of_fakes.clear()
    run_sweep(plan([SMALL], "full"), store)
    again = {(one.group, one.batch_size, one.backend) for one in bench_of_fakes}
    assert ("latency", 8, "eager") in again
    assert not again & {("latency", 1, "eager"), ("counts", 1, "eager")}


def test_counts_come_first_timing_last_and_cheap_before_dear(store, bench_of_fakes):
    run_sweep(plan([WIDE, SMALL]), store, jobs=1)
    groups = [one.group for one in bench_of_fakes]
    assert groups[:2] == ["counts"] * 2 and groups[-4:] == ["latency"] * 4
    assert [one.variant for one in bench_of_fakes[-4:]] == [SMALL, SMALL, WIDE, WIDE]


def test_a_failing_model_is_a_row_and_the_sweep_goes_on(store, bench_of_fakes):
    cells = [Cell(name, "latency") for name in ("benchpaper_raising", SMALL)]
    summary = run_sweep(cells, store)
    assert summary.measured == 2
    assert summary.statuses == {"failed": 1, "ok": 1}
    assert summary.failures == ["benchpaper_raising, latency: the model is unwell"]
    assert run_sweep(cells, store).measured == 0  # the failure stands until --retry
    assert run_sweep(cells, store, retry=True).measured == 1


def test_an_evaluation_that_fails_stands_as_well(store):
    cell = Cell("vit_micro", "accuracy", track="fashion_mini", batch_size=64)
    store.append(failed_records(cell, "x", "failed", "no luck", get_variant("vit_micro")))
    assert missing([cell], store.load()) == []
    assert missing([cell], store.load(), retry=True) == [cell]


@pytest.mark.parametrize("status", ["noisy", "contended"])
def test_retry_measures_doubtful_cells_again(store, bench_of_fakes, status):
    cell = Cell(SMALL, "latency")
    store.append(records_of(cell, status=status, reason="busy"))
    assert missing([cell], store.load()) == []
    assert missing([cell], store.load(), retry=True) == [cell]
    run_sweep([cell], store, retry=True)
    assert missing([cell], store.load(), retry=True) == []


def test_half_a_cell_and_another_machine_do_not_count(store):
    cell = Cell(SMALL, "latency")
    store.append(records_of(cell)[:1])
    assert missing([cell], store.load()) == [cell]
    store.append(records_of(cell)[1:])
    assert missing([cell], store.load()) == []
    assert missing([cell], store.load(), machine="another x8") == [cell]


def test_other_conditions_do_not_count(store):
    store.append(records_of(Cell(SMALL, "latency")))
    for change in (
        {"batch_size": 8},
        {"threads": 2},
        {"image_size": 64},
        {"options": {"width": 4}},
    ):
        cell = Cell(SMALL, "latency", **change)
        assert missing([cell], store.load()) == [cell]
    same = Cell(SMALL, "latency", image_size=32, num_classes=10, effort={"budget_s": 1})
    assert missing([same], store.load()) == []


def test_accuracy_belongs_to_its_weights(store, monkeypatch):
    cell = Cell(SMALL, "accuracy", track="fashion_mini")
    monkeypatch.setattr(sweep, "shipped_sha256", lambda variant, track: "new")
    conditions = cell.variant_conditions(None)
    for sha, options in (("old", {}), ("new", {"limit": 100})):
        update = {"track": "fashion_mini", "weights_sha256": sha, "options": options}
        changed = conditions.model_copy(update=update)
        store.append([make_record(SMALL, "top1", 50.0, changed, run_id="x")])
        assert missing([cell], store.load()) == [cell]
    update = {"track": "fashion_mini", "weights_sha256": "new"}
    changed = conditions.model_copy(update=update)
    store.append([make_record(SMALL, "top1", 50.0, changed, run_id="x")])
    assert missing([cell], store.load()) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_keeps_what_was_measured(store, monkeypatch, jobs):
    def run(cell, run_id, worker=None):
        if cell.variant == WIDE:
            raise KeyboardInterrupt
        return records_of(cell, run_id)

    monkeypatch.setattr(sweep, "run_isolated", run)
    with pytest.raises(KeyboardInterrupt):
        run_sweep([Cell(SMALL, "counts"), Cell(WIDE, "counts")], store, jobs=jobs)
    if jobs == 1:
        assert {record.variant for record in store.load()} == {SMALL}
    assert missing([Cell(WIDE, "counts")], store.load()) != []


def test_progress_tells_start_end_and_time_left(store, bench_of_fakes):
    steps = []
    run_sweep(plan([SMALL]), store, steps.append, jobs=1)
    ends = [step for step in steps if step.records is not None]
    assert [step.done for step in ends] == [1, 2, 3, 4, 5]
    assert {step.total for step in steps} == {5}
    assert steps[0].records is None and steps[0].seconds_left > ends[-1].seconds_left == 0


def test_budget_shortens_timing_and_never_to_nothing(store, bench_of_fakes):
    run_sweep(plan([SMALL, WIDE]), store, budget_minutes=0.001)
    budgets = [one.effort["budget_s"] for one in bench_of_fakes if one.group == "latency"]
    assert budgets == [sweep.LEAST_TIMING_S] * 4
    bench_of_fakes.clear()
    run_sweep(plan([SMALL, WIDE]), store, budget_minutes=60, fresh=True)
    budgets = [one.effort["budget_s"] for one in bench_of_fakes if one.group == "latency"]
    assert budgets == [8.0] * 4  # the profile's own
    assert not any(one.effort for one in bench_of_fakes if one.group != "latency")


def test_a_sweep_of_real_processes(store):
    """One real pass over counting, with a model that ends its process among them."""
    cells = [Cell(name, "counts") for name in ("benchpaper_exiting", SMALL)]
    summary = run_sweep(cells, store, jobs=1)
    assert summary.failures[0].startswith(
        "benchpaper_exiting, params: the process ended with code 3"
    )
    found = {(one.variant, one.metric): one.value for one in store.load()}
    assert found["benchpaper_exiting", "macs"] is None
    assert found[SMALL, "params"] == 8 * 3 * 16 + 8 + 8 * 10 + 10


# --- the cluster ---------------------------------------------------------------------------


def test_without_submitit_there_is_a_sentence(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ReplivitError, match=r"pip install 'replivit\[cluster\]'"):
        run_on_cluster([], store)


def test_each_cell_is_a_job(store, bench_of_fakes, monkeypatch):
    asked = {}

    class Job:
        def __init__(self, function, *arguments):
            self.call = lambda: function(*arguments)

        def result(self):
            return self.call()

    class Executor:
        def __init__(self, folder):
            asked["folder"] = folder

        def update_parameters(self, **parameters):
            asked.update(parameters)

        def submit(self, function, *arguments):
            return Job(function, *arguments)

    helpers = types.SimpleNamespace(as_completed=lambda jobs: iter(jobs))
    fake = types.SimpleNamespace(AutoExecutor=Executor, helpers=helpers)
    monkeypatch.setitem(sys.modules, "submitit", fake)
    cells = plan([SMALL])
    summary = run_on_cluster(cells, store, parameters={"slurm_partition": "cpu"})
    assert summary.measured == len(bench_of_fakes) == 5
    assert asked["slurm_partition"] == "cpu" and asked["timeout_min"] == 20
    assert len(store.load()) == sum(len(GROUPS[one.group]) for one in cells)
    assert run_on_cluster(cells, store).skipped == 5
