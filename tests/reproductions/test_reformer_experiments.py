"""Reformer's experiments at their tiny scale, and the parts they are made of."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch

import harness
from harness.errors import ReplivitError
from reproductions.reformer import duplication as task_module
from reproductions.reformer.drawing import lesson_figure
from reproductions.reformer.duplication import Task, accuracy, build, draw, targets_of, train
from reproductions.reformer.duplication_experiment import TASKS, _row, duplication
from reproductions.reformer.peaks import peak_bytes
from reproductions.reformer.reversible_experiment import (
    Setting,
    _findings,
    gradient_gap,
    reversible,
)
from reproductions.reformer.scaling_experiment import _setting, crossing, exponent, scaling


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path))
    return tmp_path


def test_sequences_are_words_said_twice():
    task = Task()
    tokens = draw(task, 5, seed=3)
    assert tokens.shape == (5, 128) and torch.equal(tokens[:, :64], tokens[:, 64:])
    assert (tokens[:, 0] == 0).all() and tokens[:, 1:64].min() >= 1 and tokens.max() <= 63
    assert not torch.equal(tokens, draw(task, 5, seed=4))
    targets = targets_of(tokens)
    assert (targets[:, :64] == -100).all() and (targets[:, -1] == -100).all()
    assert torch.equal(targets[:, 64:-1], tokens[:, 65:])


def test_a_stopped_run_ends_as_one_that_was_not(home, monkeypatch):
    task = TASKS["tiny"]
    whole = train(task, 2, seed=0)
    whole.path.unlink()
    monkeypatch.setattr(task_module, "STEPS_PER_CHECKPOINT", 7)

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    save = task_module._save_partial
    monkeypatch.setattr(task_module, "_save_partial", stop)
    with pytest.raises(KeyboardInterrupt):
        train(task, 2, seed=0)
    monkeypatch.setattr(task_module, "_save_partial", save)
    resumed = train(task, 2, seed=0)
    assert all(torch.equal(resumed.state[key], one) for key, one in whole.state.items())
    assert resumed.loss == pytest.approx(whole.loss, abs=0.5)
    assert not list(home.rglob("*.partial.pt"))
    found = train(task, 2, seed=0)  # found, not trained
    assert found.loss == resumed.loss


def test_accuracy_counts_the_second_half():
    task = TASKS["tiny"]
    state = build(task, None).state_dict()
    share, asked = accuracy(task, state, 2, sequences=4, rotation_seeds=(0, 1))
    assert asked == 2 * 4 * (task.length // 2 - 1) and 0 <= share < 0.5


def test_full_attention_learns_to_copy():
    """The task can be solved at all, so a table of it can say something."""
    task = Task(
        symbols=5, length=16, dim=32, hidden=32, lr=5e-3, warmup=20, steps=(250, 1, 1, 1, 1)
    )
    run = train(task, None, seed=0)
    assert accuracy(task, run.state, None, 32)[0] > 0.9


def test_table_of_duplication():
    result = duplication("tiny", trained=(0, 1), quiet=True)
    cells = {(row["trained with"], row["evaluated with"]): row for row in result.rows}
    assert len(cells) == 10 and len(result.published) == 20
    assert cells["full", "LSH-2"]["paper, %"] == 76.9
    assert cells["LSH-1", "full"]["paper, %"] == 0.8
    assert {row["verdict"] for row in result.rows} == {"not measured"}  # seconds say nothing
    assert all(set(row) <= {"variant", "metric", "value", "unit", "source"}
               for row in result.published)  # fmt: skip
    assert {one.outcome for one in result.findings} == {"not measured"} and result.figures


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": "huge"}, "no scale 'huge'"),
        ({"scale": "tiny", "widht": 3}, "no option 'widht'"),
        ({"scale": "tiny", "trained": (3,)}, "1, 2, 4 and 8"),
        ({"scale": "tiny", "sequences": 0}, "sequences must be a whole number from 1 on, not 0"),
        ({"scale": "tiny", "steps": (10, 10)}, "five whole numbers from 1 on"),
        ({"scale": "tiny", "steps": 0}, "five whole numbers from 1 on"),
        ({"scale": "tiny", "length": 31}, "an even length, not 31"),
        ({"scale": "tiny", "warmup": 0}, "option warmup must be a whole number from 1 on"),
        (
            {"scale": "tiny", "lr": float("inf"), "steps": 3, "trained": 0},
            "full-seed0: the loss is nan",
        ),
    ],
)
def test_duplication_refuses(options, words):
    with pytest.raises(ReplivitError, match=words):
        duplication(**options)


def test_a_row_that_is_asked_for_twice_is_one_row():
    result = duplication("tiny", trained=(1, 1), steps=1, sequences=1, quiet=True)
    assert [row["seeds"] for row in result.rows] == [1] * 5


def test_exponents_and_crossings_of_known_curves():
    lengths, noise = [1024, 2048, 4096, 8192], np.array([[0.99], [1.01], [1.0]])
    full, flat = noise * np.array([1.0, 2, 4, 8]), noise[::-1] * np.full(4, 3.0)
    slope, low, high = exponent(lengths, full)
    assert low < 1 < high and slope == pytest.approx(1, abs=0.02)
    assert exponent(lengths, flat)[0] == pytest.approx(0, abs=0.02)
    where, (left, right) = crossing(lengths, full, flat)
    assert where == pytest.approx(3072, rel=0.03) and left <= where <= right
    assert crossing(lengths, full, 100 * flat) is None
    assert crossing(lengths, full, flat / 100)[0] == 1024


def test_scaling_gives_fits_and_a_figure():
    result = scaling("tiny", memory=False, rounds=2)
    assert [row["attention"] for row in result.rows] == ["full, fused"] * 3 + ["LSH-2"] * 3
    assert all(row["ms"] > 0 and row["peak MB"] is None for row in result.rows)
    assert set(result.detail["exponents"]) == {"full, fused", "LSH-2"} and result.figures
    with pytest.raises(ReplivitError, match="length 1000 must divide"):
        scaling("tiny", lengths=(1000, 512, 256))
    with pytest.raises(ReplivitError, match="rounds must be from 1 on"):
        scaling("tiny", rounds=(0, 1))
    with pytest.raises(ReplivitError, match="option chunk must be a whole number from 1 on"):
        scaling("tiny", chunk=0)
    turned = _setting("tiny", {"lengths": (1024, 256, 512, 256), "rounds": (2, 1)})
    assert turned.lengths == (256, 512, 1024) and turned.rounds == (1, 2)


def allocate(megabytes: int):
    return lambda: torch.ones(megabytes * 250_000).sum()


def fail():
    raise ValueError("this work cannot be done")


def test_peaks_are_measured_in_a_process_of_their_own():
    small, large = peak_bytes(allocate, [{"megabytes": 8}, {"megabytes": 64}])
    assert 7e6 < small < 16e6 and 60e6 < large < 80e6
    with pytest.raises(ReplivitError, match="this work cannot be done"):
        peak_bytes(fail, [{}])


def test_gradients_of_both_stacks_agree_with_dropout():
    gaps = gradient_gap(Setting(length=128, dim=32, chunk=32))
    assert set(gaps) == {"outputs", "input gradient", "weight gradients"}
    assert max(gaps.values()) < 1e-5


def test_memory_of_a_deep_reversible_stack():
    """The ordinary stack grows with each layer, the reversible one by a small part of that."""
    result = reversible("tiny", dim=64, length=512, depths=(1, 4, 8))
    slopes = result.detail["slopes_mb"]
    assert slopes["reversible"][0] < 0.15 * slopes["ordinary"][0]
    with pytest.raises(ReplivitError, match="three depths"):
        reversible("tiny", depths=(1, 2, 2))
    with pytest.raises(ReplivitError, match="option length must be a whole number from 1 on"):
        reversible("tiny", length=0)


@pytest.mark.parametrize(("scale", "value", "verdict"), [
    ("small", 99.0, "reproduced"), ("paper", 90.0, "deviates"), ("tiny", 99.0, "not measured"),
])  # fmt: skip
def test_the_verdict_of_a_cell(scale, value, verdict):
    assert _row("LSH-1", "LSH-8", [value], 99.9, scale)["verdict"] == verdict


@pytest.mark.parametrize(("ratio", "outcome"), [(1.35, "reproduced"), (0.9, "deviates"),
                                                (3.0, "deviates")])  # fmt: skip
def test_what_reversible_layers_cost_is_judged(ratio, outcome):
    slopes, gaps = {True: [1.0, 0.9, 1.1], False: [100.0, 99.0, 101.0]}, {"outputs": 0.0}
    seconds = {True: [ratio] * 5, False: [1.0] * 5}
    findings = _findings("small", Setting(), slopes, gaps, seconds)
    assert [one.outcome for one in findings] == ["reproduced", "reproduced", outcome]


def test_arrows_of_the_picture_are_apart_and_the_nearest_one_decides():
    figure = lesson_figure(torch.randn(64, 8))
    axes = figure.subfigs[0].axes[0]
    ends = torch.tensor([one.get_position() for one in axes.texts if one.get_text().isdigit()])
    assert torch.cdist(ends, ends).fill_diagonal_(9).min() > 1  # labels do not overlap
    dots = axes.collections[0]
    points = torch.tensor(dots.get_offsets().data, dtype=torch.float32)
    nearest = (points @ ends.T).argmax(-1).numpy()
    colours = matplotlib.colormaps["tab10"](nearest)
    assert np.allclose(dots.get_facecolors(), colours)


def test_experiments_are_listed():
    names = {one.name for one in harness.experiments("reformer")}
    assert names == {"reformer/duplication", "reformer/scaling", "reformer/reversible"}
