"""How many epochs until the learned choice pays, and what the network makes of other choices?

    replivit run dynamicvit/training_length                   # fashion_mini, three seeds
    replivit run dynamicvit/training_length --set lengths=3,10
    replivit run dynamicvit/training_length --scale paper --set parent_weights=deit_small.pth

The arms of `dynamicvit/effect` at keep 0.7, trained from the same parents for several lengths. What
is trained there for as long is found again. Each pruned network is then asked twice more, with its
own weights: keeping at random instead of by its prediction modules, and with sampled decisions, as
in its training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness import Conditions, ExperimentResult, registry
from harness.checkpoints import load_weights
from harness.effect import (
    CONTROL,
    LEAST,
    PARENT,
    SCALES,
    Arm,
    Claim,
    Run,
    Setting,
    top1_of,
    train_arm,
    trained_parent,
)
from harness.effect_report import Difference, judge
from harness.errors import ReplivitError
from harness.settings import choose
from harness.statistics import mean_std
from reproductions.dynamicvit.effect_experiment import ALLOWED, ATTENTION, LEARNED, RANDOM, arms
from reproductions.dynamicvit.model import DynamicViT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The weights of the learned arm, with tokens chosen by somebody else.
AT_RANDOM, SAMPLED = f"{LEARNED}, kept at random", f"{LEARNED}, sampled as in training"
STYLES = {
    CONTROL: ("0.5", "-", "s"), LEARNED: ("C0", "-", "o"), AT_RANDOM: ("C0", ":", "v"),
    SAMPLED: ("C0", "--", "^"), RANDOM: ("C1", "-", "D"), ATTENTION: ("C2", "-", "P"),
}  # fmt: skip

#: Name of an arm and epochs -> its runs, one per seed.
Lengths = dict[tuple[str, int], list[Run]]


@dataclass(frozen=True)
class Plan(Setting):
    """A setting of `harness.effect` with several numbers of extra epochs instead of one."""

    lengths: tuple[int, ...] = (3, 30)


def _plan(scale: str, **changes: Any) -> Plan:
    return Plan(**{**vars(SCALES[scale]), **changes})


PLANS = {
    "tiny": _plan("tiny", lengths=(1, 2)),
    "small": _plan("small"),
    "paper": _plan("paper", lengths=(15, 30)),
}


class Sampled(nn.Module):
    """A pruned network that decides in evaluation as in training: sampled, and masked."""

    def __init__(self, model: DynamicViT) -> None:
        super().__init__()
        self.model, self.num_classes = model, model.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to `(B, K)`."""
        return self.model.forward_train(images).logits


def training_length(scale: str = "small", **options: Any) -> ExperimentResult:
    """Top-1 of the pruned networks and of their dense control after several numbers of epochs.

    Args:
        scale: `tiny`, `small` or `paper`.
        options: fields of `Plan` (lengths, track, seeds, device, ...), and `variant`, the
            DynamicViT that fits the parent; its keep ratio is 0.7.

    Raises:
        ReplivitError: an unknown scale or option; weights of the parent that do not fit.
    """
    default = "dynamicvit_deit_s_k07" if scale == "paper" else "dynamicvit_micro"
    variant = options.pop("variant", default)
    if "epochs" in options:
        raise ReplivitError("training_length compares several lengths: say lengths=3,30")
    plan = choose(PLANS, scale, options, LEAST)
    chosen = [one for one in arms(variant) if one.name in (LEARNED, RANDOM, ATTENTION)]
    runs: Lengths = {}
    for seed in plan.seeds:
        parent = trained_parent(plan, seed)
        runs.setdefault((PARENT, 0), []).append(parent)
        for epochs in sorted(plan.lengths):
            for arm in (Arm(CONTROL, plan.parent), *chosen):
                run = train_arm(arm, parent, replace(plan, epochs=epochs))
                runs.setdefault((arm.name, epochs), []).append(run)
                if arm.name == LEARNED:
                    for name, asked in _asked_otherwise(run, arm, plan).items():
                        runs.setdefault((name, epochs), []).append(asked)
    longest = max(plan.lengths)
    asked = {name: runs[name, longest] for name in STYLES} | {PARENT: runs[PARENT, 0]}
    rows = [(name, epochs) for name in STYLES for epochs in sorted(plan.lengths)]
    return ExperimentResult(
        rows=[_row(name, epochs, runs) for name, epochs in ((PARENT, 0), *rows)],
        findings=judge(_claims(longest), asked),
        figures={"training_length": _draw(runs)},
        notes=(
            f"{plan.parent} on {plan.track}, seeds {', '.join(map(str, plan.seeds))}; all arms "
            "start from the parent of their seed, and each length is a training of its own. "
            "Random order: one for all images. Sampled: masked, drawn once per image. Intervals "
            "are 95 %, paired by seed."
        ),
        conditions=Conditions(
            device=plan.device, threads=torch.get_num_threads(), track=str(plan.track),
            data_fingerprint=runs[CONTROL, longest][0].top1.conditions.data_fingerprint,
            seed=plan.seeds[0] if len(plan.seeds) == 1 else None,
            options={"seeds": list(plan.seeds), "lengths": list(plan.lengths),
                     "parent": plan.parent, "recipe": dict(plan.recipe)},
        ),
    )  # fmt: skip


def _asked_otherwise(run: Run, arm: Arm, plan: Plan) -> dict[str, Run]:
    """The same weights with tokens kept at random, and with sampled decisions."""
    model = run.model
    options = {**arm.options, "scorer": "random"}
    at_random = registry.build(arm.variant, model.num_classes, **options)
    backbone = {
        key: value.cpu()
        for key, value in model.state_dict().items()
        if not key.startswith("score_predictor.")
    }
    load_weights(at_random, backbone)
    torch.manual_seed(run.seed)  # of what is sampled
    return {
        name: Run(run.seed, top1_of(asked, plan), 0.0, 0, asked)
        for name, asked in ((AT_RANDOM, at_random.eval()), (SAMPLED, Sampled(model)))
    }


def _claims(epochs: int) -> list[Claim]:
    after = f"After {epochs} epochs"
    return [
        Claim(f"{after} the prediction modules beat random removal (79.3 against 77.5 after 30 on "
              "ImageNet, Table 4b)", LEARNED, RANDOM),
        Claim(f"{after} they beat the class token's attention (79.3 against 78.1)", LEARNED,
              ATTENTION),
        Claim(f"{after} the network is better with its own choice than with a random one", LEARNED,
              AT_RANDOM),
        Claim(f"{after} the best tokens do as well as sampled ones, which it was trained with, to "
              "half a point", LEARNED, SAMPLED, within=0.5),
        Claim(f"{after} keeping 0.7 loses at most half a point against the network it starts from "
              "(79.3 against 79.8, Table 1)", LEARNED, PARENT, within=ALLOWED),
        Claim(f"{after} keeping 0.7 loses at most half a point against that network trained on for "
              "as long", LEARNED, CONTROL, within=ALLOWED),
    ]  # fmt: skip


def _row(name: str, epochs: int, runs: Lengths) -> dict[str, Any]:
    own = runs[name, epochs]
    top1 = mean_std([run.top1.value for run in own])

    def against(rival: str) -> str:
        there = runs.get((rival, epochs if rival != PARENT else 0))
        return Difference.of(own, there).short if there and name != rival else ""

    return {
        "arm": name,
        "extra epochs": epochs,
        "top-1 (%)": round(top1.mean, 2),
        "±": round(top1.mean - top1.interval[0], 2) if top1.interval else None,
        "against the parent": against(PARENT),
        "against the control": against(CONTROL),
        "against random keep": against(RANDOM),
        "training (s)": round(mean_std([run.seconds for run in own]).mean, 1),
    }


def _draw(runs: Lengths) -> Figure:
    """Top-1 by extra epochs: a line per arm, bars are 95 % over seeds."""
    from matplotlib.figure import Figure

    lengths = sorted({epochs for name, epochs in runs if name != PARENT})
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    shift = 1.07 ** (torch.arange(len(STYLES)) - len(STYLES) / 2)  # bars side by side
    for place, (name, (colour, line, marker)) in zip(shift.tolist(), STYLES.items(), strict=True):
        found = [mean_std([run.top1.value for run in runs[name, epochs]]) for epochs in lengths]
        axes.errorbar(
            [epochs * place for epochs in lengths], [one.mean for one in found],
            [one.mean - one.interval[0] if one.interval else 0 for one in found], color=colour,
            linestyle=line, marker=marker, capsize=3, label=name,
        )  # fmt: skip
    parent = mean_std([run.top1.value for run in runs[PARENT, 0]]).mean
    axes.axhline(parent, color="0.8", linewidth=0.8, zorder=0, label="the parent, as it was")
    axes.set_xscale("log")
    axes.set_xticks(lengths, labels=list(map(str, lengths)))
    axes.minorticks_off()
    axes.set(xlabel="extra epochs", ylabel=f"top-1, % ({_seeds(runs)})")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _seeds(runs: Lengths) -> str:
    count = len(next(iter(runs.values())))
    return f"mean of {count} seeds, 95 %" if count > 1 else "one seed"
