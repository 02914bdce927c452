"""One search, many budgets: does the learned choice pay? (Tables 2 to 4, Figures 2 and 3, small.)

    replivit run vit_slim/search                              # fashion_mini, three seeds
    replivit run vit_slim/search --set search_epochs=6 --set epochs=4
    replivit run vit_slim/search --scale paper                # ImageNet, DeiT-S

From a trained parent per seed one search is run. Every budget is then cut out of the same searched
network three times: by the learned masks, by the size of the weights, and at random. All are
evaluated as cut and retrained for equally long, beside the dense parent trained on for as long as
search and retraining together. Trainings are found again: what was stopped goes on.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

import harness
from harness import Conditions, ExperimentResult
from harness.effect import CONTROL, PARENT, Claim, Run
from harness.effect_report import Difference, judge
from harness.measurement.macs import count_macs
from harness.statistics import mean_std
from harness.training import TrainedModel
from reproductions.vit_slim.drawing import structure_figure
from reproductions.vit_slim.search_setup import (
    Setting,
    choose_setting,
    finished,
    rankings,
    retrain,
    retraining_recipe,
    run_search,
    scored,
    search_recipe,
    train_control,
    train_parent,
)
from reproductions.vit_slim.selection import Kept
from reproductions.vit_slim.slimming import slim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOFT = "soft network after the search"
CHOICES = {"searched": "#c44e52", "magnitude": "#4c72b0", "random": "#8c8c8c"}
#: One kind cut alone, the other left whole.
ALONE = ("heads alone", "MLP alone")

#: Budget -> points that it may lose to count as the paper's row, and that row.
PRINTED = {
    0.8: (0.5, "80.60 and 79.90 at 80 %, Table 4"),
    0.7: (0.5, "80.03 and 79.90 at 70 %, Table 4"),
    0.6: (1.0, "79.20 and 79.90 at 60 %, Table 4"),
}

Runs = dict[str, list[Run]]


def search(scale: str = "small", **options: Any) -> ExperimentResult:
    """Accuracy against budget of three ways to choose, from one search per seed.

    Args:
        scale: `tiny` (one seed, a few hundred images: does it run?), `small` or `paper`.
        options: fields of `search_setup.Setting`.

    Raises:
        ReplivitError: unknown scale or option, or an impossible value.
    """
    setting = choose_setting(scale, options)
    runs: Runs = defaultdict(list)
    kept: dict[str, Kept] = {}
    shares, costs = [], {}
    for seed in setting.seeds:
        parent = train_parent(setting, seed)
        runs[PARENT].append(finished(setting, parent, seed, setting.parent))
        control = train_control(setting, parent, seed)
        runs[CONTROL].append(finished(setting, control, seed, setting.parent))
        searched = run_search(setting, parent, seed)
        runs[SOFT].append(finished(setting, searched, seed, setting.variant))
        shares.append(_share(searched, parent))
        _cut_and_retrain(setting, searched, seed, runs, kept, costs)
    costs[CONTROL] = costs[PARENT] = _cost(runs[CONTROL][0].model)
    return ExperimentResult(
        rows=_rows(setting, runs, costs),
        findings=judge(claims(setting), runs),
        figures={"curve": draw(setting, runs), "structure": structure_figure(kept)},
        published=_published(),
        notes=_notes(setting, shares),
        conditions=Conditions(
            device=setting.device, threads=torch.get_num_threads(), track=str(setting.track),
            data_fingerprint=runs[CONTROL][0].top1.conditions.data_fingerprint,
            seed=setting.seeds[0] if len(setting.seeds) == 1 else None,
            options={
                "seeds": list(setting.seeds), "budgets": list(setting.budgets),
                "search_epochs": search_recipe(setting).epochs,
                "epochs": retraining_recipe(setting).epochs, "parent": setting.parent,
                "penalty": [setting.attention, setting.mlp, setting.tokens],
            },
        ),
        detail={"kept": {name: one.as_dict() for name, one in kept.items()}},
    )  # fmt: skip


def _cut_and_retrain(
    setting: Setting,
    searched: TrainedModel,
    seed: int,
    runs: Runs,
    kept: dict[str, Kept],
    costs: dict[str, tuple[int, int]],
) -> None:
    """Every budget by every choice from the searched network of one seed."""
    ranked = rankings(searched.model, seed)
    for budget in setting.budgets:
        for choice, scores in ranked.items():
            name = f"{choice} {budget:g}"
            small = slim(searched.model, budget, budget, scores=scores).eval()
            if choice == "searched":
                kept.setdefault(f"{budget:g}", small.kept)
            costs.setdefault(name, _cost(small))
            runs[as_cut(name)].append(scored(setting, small, seed, name))
            label = f"vit_slim_{choice}_{100 * budget:g}"
            runs[name].append(finished(setting, retrain(setting, small, seed, label), seed, name))
        for name, one in zip(ALONE, ((budget, 1.0), (1.0, budget)), strict=True):
            small = slim(searched.model, *one).eval()
            costs.setdefault(f"{name} {budget:g}", _cost(small))
            found = scored(setting, small, seed, f"{name} {budget:g}")
            runs[as_cut(f"{name} {budget:g}")].append(found)


def as_cut(name: str) -> str:
    """The name of an arm before it was retrained."""
    return f"{name}, as cut"


def _share(searched: TrainedModel, parent: TrainedModel) -> float:
    """Images that the search saw, per image that training the parent took."""
    return searched.value("images_seen") / parent.value("images_seen")


def _cost(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters and multiply-adds per image."""
    side = model.pretrained_cfg["input_size"][1:]
    return sum(one.numel() for one in model.parameters()), count_macs(model, tuple(side)).total


def claims(setting: Setting) -> list[Claim]:
    """What the paper says, where the budgets of this run can answer."""
    low = min(setting.budgets)
    level = [
        Claim(f"A budget of {budget:g} loses at most {within:g} points against dense ({text})",
              f"searched {budget:g}", CONTROL, within=within)
        for budget, (within, text) in PRINTED.items() if budget in setting.budgets
    ]  # fmt: skip
    rivals = {"random": "a random choice", "magnitude": "the size of the weights"}
    choices = [
        Claim(f"{when} at {low:g}, the learned masks beat {what}",
              named(f"searched {low:g}"), named(f"{rival} {low:g}"))
        for when, named in (("As cut", as_cut), ("Retrained", str))
        for rival, what in rivals.items()
    ]  # fmt: skip
    return [
        *level,
        *choices,
        Claim("Head dimensions are dearer to cut than MLP channels (79.61 and 80.39 at equal "
              f"FLOPs, Table 2): as cut, {low:g} of the channels beats {low:g} of the dimensions",
              as_cut(f"{ALONE[1]} {low:g}"), as_cut(f"{ALONE[0]} {low:g}")),
    ]  # fmt: skip


def _rows(setting: Setting, runs: Runs, costs: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    names = [PARENT, CONTROL, SOFT]
    for budget in setting.budgets:
        names += [f"{choice} {budget:g}" for choice in (*CHOICES, *ALONE)]
    rows = []
    for name in names:
        params, macs = costs.get(name, (None, None))
        cut, after = runs.get(as_cut(name)), runs.get(name)
        choice, _, budget = name.rpartition(" ")
        rows.append({
            "arm": name,
            "params": params,
            "MACs (M)": None if macs is None else round(macs / 1e6, 2),
            "as cut (%)": _mean(cut),
            "± as cut": _reach(cut),
            "top-1 (%)": _mean(after),
            "±": _reach(after),
            "against control (points)": "" if after is None or name in (PARENT, CONTROL)
            else Difference.of(after, runs[CONTROL]).short,
            "against random (points)": Difference.of(after, runs[f"random {budget}"]).short
            if after and choice in ("searched", "magnitude") else "",
        })  # fmt: skip
    return rows


def _mean(runs: list[Run] | None) -> float | None:
    return round(mean_std([run.top1.value for run in runs]).mean, 2) if runs else None


def _reach(runs: list[Run] | None) -> float | None:
    found = mean_std([run.top1.value for run in runs]) if runs else None
    return round(found.mean - found.interval[0], 2) if found and found.interval else None


def draw(setting: Setting, runs: Runs) -> Figure:
    """Accuracy against budget, as cut and retrained."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    panels = figure.subplots(1, 2)  # scales of their own: retraining brings all close together
    control = mean_std([run.top1.value for run in runs[CONTROL]]).mean
    for axes, title, named in (
        (panels[0], "as cut from the searched network", as_cut),
        (panels[1], "retrained", str),
    ):
        axes.axhline(control, color="0.6", linewidth=0.9, linestyle=":", label="dense control")
        for number, (choice, colour) in enumerate(CHOICES.items()):
            found = [runs[named(f"{choice} {budget:g}")] for budget in setting.budgets]
            means = [mean_std([run.top1.value for run in one]) for one in found]
            reach = [
                [abs(mean.mean - (mean.interval or one[0].top1.interval)[end])
                 for mean, one in zip(means, found, strict=True)]
                for end in (0, 1)
            ]  # fmt: skip
            axes.errorbar(
                [budget + 0.006 * (number - 1) for budget in setting.budgets],
                [mean.mean for mean in means], reach, marker="o", markersize=5, capsize=3,
                color=colour, label=choice,
            )  # fmt: skip
        axes.set_xlim(max(setting.budgets) + 0.05, min(setting.budgets) - 0.05)
        axes.set_xticks(setting.budgets)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("budget: share of head dimensions and MLP channels kept")
        axes.spines[["top", "right"]].set_visible(False)
    seeds = len(setting.seeds)
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    panels[0].set_ylabel(f"top-1, % ({over}, 95 %)")
    panels[1].legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def _published() -> list[dict[str, Any]]:
    """Top-1 of Tables 2 and 4: the same question on ImageNet."""
    tables = ("paper Table 2", "paper Tables 2", "paper Table 4")
    return [
        {"model": row.variant, "what": row.conditions, "top-1 (%)": row.value, "source": row.source}
        for row in harness.get_paper("vit_slim").facts.published
        if row.metric == "top1" and row.source.startswith(tables)
    ]


def _notes(setting: Setting, shares: list[float]) -> str:
    limits = "".join(
        f" Only {count} {what} images were used: no number here means anything."
        for what, count in (("training", setting.train_images), ("test", setting.test_images))
        if count is not None
    )
    looked, after = search_recipe(setting), retraining_recipe(setting)
    return (
        f"{setting.parent} on {setting.track}, a parent and one search per seed "
        f"({', '.join(map(str, setting.seeds))}). The search takes {looked.epochs} epochs at a "
        f"constant {looked.lr:g}, {sum(shares) / len(shares):.0%} of the images of the parent's "
        "training, and serves all budgets; "
        f"retraining takes {after.epochs} epochs from the searched weights. All choices cut the "
        "same weights, with all tokens kept; 'magnitude' ranks by the norm of all weights of a "
        "gate. The dense control is the parent, trained on for as long as search and retraining "
        f"together. Penalty weights {setting.attention:g}, {setting.mlp:g}, {setting.tokens:g} "
        "(heads, MLP, tokens). Intervals are 95 %: t over seeds; differences are paired by seed. "
        "McNemar's test pools the images of all seeds and is corrected for the number of claims. "
        "Nothing is selected by test accuracy." + limits
    )
