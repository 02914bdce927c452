"""The joint search on a micro space: policy gradient against random search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness import Conditions, ExperimentResult, Finding, Record, RecordStore
from harness.data import load_split
from harness.environment import home
from harness.evaluation import bits_of, evaluate
from harness.statistics import mann_whitney, mcnemar, mean_std, paired_means
from harness.training import train
from reproductions.uninet.drawing import draw_rewards, operator_map
from reproductions.uninet.model import ARCHITECTURES, Architecture
from reproductions.uninet.proxy import ProxyScores
from reproductions.uninet.search import Trace, policy_search, random_search
from reproductions.uninet.search_setup import Setting, choose_setting
from reproductions.uninet.space import in_words, variant_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICY, RANDOM = "policy gradient", "random"
Traces = Mapping[str, Sequence[Trace]]


def search(scale: str = "small", **options: Any) -> ExperimentResult:
    """Search with a controller and at random, at equal evaluations; train both winners.

    Every candidate is trained for a few epochs on some of the training images and judged on others,
    never on the test split. The winners of each seed are then trained alike and judged on that.

    Args:
        scale: `tiny` (does it run?), `small` (minutes on a CPU) or `paper` (ImageNet, GPUs).
        options: fields of `Setting`.
    """
    setting = choose_setting(scale, options)
    traces, seconds = _search(setting)
    rows, tops = [], {POLICY: [], RANDOM: []}
    for place, seed in enumerate(setting.seeds):
        for name in (POLICY, RANDOM):
            trace = traces[name][place]
            rows.append(_row(name, seed, trace, setting))
            if setting.final_epochs:
                record = _train_winner(setting, name, trace, seed)
                tops[name].append(record)
                rows[-1]["top-1, test (%)"] = record.value
    winners = [setting.space.architecture(one.best.genes) for one in traces[POLICY]]
    findings = [_rises(traces), _samples_better(traces), _best_better(traces), _order(winners)]
    if setting.final_epochs:
        findings.insert(3, _winners(tops))
    return ExperimentResult(
        rows=rows,
        findings=findings,
        figures={
            "rewards": _rewards(traces, setting.batch), "networks": _networks(setting, winners)
        },
        notes=_notes(setting, seconds),
        conditions=Conditions(
            device=setting.device, threads=torch.get_num_threads(), track=setting.track,
            image_size=setting.image_size, seed=setting.seeds[0],
            options={"seeds": list(setting.seeds), "evaluations": setting.evaluations},
        ),
        detail={
            "traces": {
                name: [one.rows(setting.space) for one in runs] for name, runs in traces.items()
            },
            "entropies": [list(one.entropies) for one in traces[POLICY]],
        },
    )  # fmt: skip


def _search(setting: Setting) -> tuple[Traces, float]:
    """Both searches for every seed, and the seconds of training behind all scores."""
    traces: dict[str, list[Trace]] = {POLICY: [], RANDOM: []}
    common = {"evaluations": setting.evaluations, "batch": setting.batch}
    store = RecordStore(home() / "searches" / "uninet" / setting.track)
    with ProxyScores(setting.proxy, store, setting.workers) as scores, _progress() as bar:
        for seed in setting.seeds:
            for name, run in ((POLICY, policy_search), (RANDOM, random_search)):
                task = bar.add_task(f"{name}, seed {seed}", total=setting.evaluations, best=0.0)

                def report(found: Sequence, task=task) -> None:
                    best = max(one.reward for one in found)
                    bar.update(task, completed=len(found), best=best)

                traces[name].append(run(setting.space, scores, seed=seed, report=report, **common))
        networks = {one.genes for runs in traces.values() for run in runs for one in run.scores}
        seconds = scores.seconds(networks)
    return traces, seconds


def _progress() -> Progress:
    """Networks scored, the best reward, time left; on standard error, on a terminal only."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("best {task.fields[best]:.2f}"), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


def _row(name: str, seed: int, trace: Trace, setting: Setting) -> dict[str, Any]:
    best, late = trace.best, trace.rewards[-_quarter(trace) :]
    return {
        "search": name, "seed": seed, "networks drawn": len(trace.scores),
        "different": len({one.genes for one in trace.scores}),
        "mean reward": round(float(trace.rewards.mean()), 2),
        "last quarter": round(float(late.mean()), 2),
        "best reward": round(best.reward, 2),
        "its accuracy, held out (%)": round(best.accuracy, 2),
        "top-1, test (%)": None,
        "MACs (M)": round(best.macs / 1e6, 2), "params": best.params,
        "network": in_words(setting.space.architecture(best.genes)),
    }  # fmt: skip


def _quarter(trace: Trace) -> int:
    return max(1, len(trace.scores) // 4)


def _train_winner(setting: Setting, name: str, trace: Trace, seed: int) -> Record:
    """The best network of a search, trained from scratch by the track's protocol; top-1 on test."""
    architecture = setting.space.architecture(trace.best.genes)
    whole, hold_out = setting.test_images is None, 0
    if setting.train_images is not None:
        whole_split = len(load_split(setting.track, "train", setting.root))
        hold_out = max(0, whole_split - setting.train_images)
    trained = train(
        variant_for(setting.track), setting.track, None, seed, epochs=setting.final_epochs,
        device=setting.device, root=setting.root, image_size=setting.image_size, evaluate=whole,
        hold_out=hold_out,
        options={"architecture": architecture.as_dict()},
    )  # fmt: skip
    records = trained.records
    if not whole:
        records = evaluate(
            trained.model, setting.track, root=setting.root, limit=setting.test_images,
            device=setting.device, image_size=setting.image_size,
        )  # fmt: skip
    return next(one for one in records if one.metric == "top1")


# what was found


def _rises(traces: Traces) -> Finding:
    claim = "The reward of the networks that the controller draws rises"
    gains = [
        float(one.rewards[-_quarter(one) :].mean() - one.rewards[: _quarter(one)].mean())
        for one in traces[POLICY]
    ]
    summary = mean_std(gains)
    first = np.concatenate([one.rewards[: _quarter(one)] for one in traces[POLICY]])
    last = np.concatenate([one.rewards[-_quarter(one) :] for one in traces[POLICY]])
    p_value = mann_whitney(last, first)
    sure = summary.mean > 0 and p_value < 0.05 and min(gains) > 0
    return Finding(
        claim,
        "reproduced" if sure else "deviates",
        f"last quarter minus first quarter: {summary.mean:+.2f} on average over {len(gains)} "
        f"searches, in single ones {', '.join(f'{one:+.2f}' for one in gains)}; rank test of all "
        f"networks p = {p_value:.2g}",
    )


def _samples_better(traces: Traces) -> Finding:
    late = np.concatenate([one.rewards[-_quarter(one) :] for one in traces[POLICY]])
    drawn = np.concatenate([one.rewards for one in traces[RANDOM]])
    p_value = mann_whitney(late, drawn)
    better = late.mean() > drawn.mean() and p_value < 0.05
    return Finding(
        "What the controller draws in the end is better than what is drawn at random",
        "reproduced" if better else "deviates",
        f"mean reward {late.mean():.2f} (last quarter) against {drawn.mean():.2f}; rank test "
        f"p = {p_value:.2g}",
    )


def _best_better(traces: Traces) -> Finding:
    claim = "At equal evaluations the policy gradient finds a better network than random search"
    ours, theirs = ([one.best.reward for one in traces[name]] for name in (POLICY, RANDOM))
    if len(ours) < 2:
        return Finding(
            claim, "not measured",
            f"one search of each kind says little: {ours[0]:.2f} against {theirs[0]:.2f}",
        )  # fmt: skip
    gap = paired_means(ours, theirs)
    low, high = gap.interval
    return Finding(
        claim,
        "reproduced" if low > 0 else "deviates",
        f"best reward {gap.difference:+.2f} [{low:+.2f}, {high:+.2f}] over {gap.n} seeds; ahead in "
        f"{sum(a > b for a, b in zip(ours, theirs, strict=True))} of {gap.n}",
    )


def _winners(tops: Mapping[str, Sequence[Record]]) -> Finding:
    tests = [
        mcnemar(bits_of(ours), bits_of(theirs))
        for ours, theirs in zip(tops[POLICY], tops[RANDOM], strict=True)
    ]
    gains = [100 * one.difference for one in tests]
    ahead = all(one.interval[0] > 0 for one in tests)
    return Finding(
        "Trained alike, its winners are the more accurate ones (at whatever cost they chose)",
        "reproduced" if ahead else "deviates",
        f"{np.mean(gains):+.2f} points on the test split on average; by seed "
        + ", ".join(
            f"{gain:+.2f} (p = {one.p_value:.2g})" for gain, one in zip(gains, tests, strict=True)
        ),
    )


def _order(winners: Sequence[Architecture]) -> Finding:
    ordered = [one.block_ops[0] == "dw" and one.block_ops[-1] != "dw" for one in winners]
    return Finding(
        "The best networks begin with convolution and end with something global",
        "reproduced" if all(ordered) else "deviates",
        f"{sum(ordered)} of {len(winners)} winners do: "
        + "; ".join(" > ".join(one.block_ops) for one in winners)
        + f". Down-sampling: {'; '.join(', '.join(one.ds_ops) for one in winners)}",
    )


def _rewards(traces: Traces, batch: int) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, best in zip(figure.subplots(1, 2), (False, True), strict=True):
        draw_rewards(axes, traces[POLICY], traces[RANDOM], batch, best)
    return figure


def _networks(setting: Setting, winners: Sequence[Architecture]) -> Figure:
    from matplotlib.figure import Figure

    found = {f"found, seed {seed}": one for seed, one in zip(setting.seeds, winners, strict=True)}
    figure = Figure(figsize=(10, 1.2 * len(found) + 3.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1.0, len(found)])
    operator_map(above, {"published, B1": ARCHITECTURES["b1"]})
    operator_map(below, found)
    return figure


def _notes(setting: Setting, seconds: float) -> str:
    return (
        "Searcher, space and the MLP and G-DSM options are our reconstruction; the authors "
        f"released the networks they found, not the search. {len(setting.space):,} networks; each "
        f"candidate trains {setting.epochs} epochs on {setting.images} images and is judged on "
        f"{setting.judged_on} held-out training images; reward accuracy * (MACs / "
        f"{setting.target / 1e6:g} M)^{setting.alpha:g}. All candidates together trained for "
        f"{seconds:.0f} s. The winners' top-1 is on the test split, after {setting.final_epochs} "
        "epochs on the whole training split. Best rewards are the best of many noisy ones, for "
        "both searches alike."
    )
