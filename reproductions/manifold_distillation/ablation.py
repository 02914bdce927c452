"""What each part of the loss is worth: no teacher, its answers, its manifolds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from harness import ExperimentResult, Finding, ReplivitError, get_paper, get_variant
from harness.data import TRACKS, get_track
from harness.effect import CONTROL, PARENT, Arm, Claim, Runs, Setting, choose_setting
from harness.effect import effect as compare_arms
from harness.evaluation import evaluate
from harness.record import read_records
from harness.tokens import sample_images
from harness.training import load_teacher
from reproductions.manifold_distillation.losses import Weights
from reproductions.manifold_distillation.method import (
    IMAGENET_TEACHER,
    MICRO_TEACHER,
    ManifoldDistillation,
    end_layers,
)
from reproductions.manifold_distillation.picture import manifold_figure
from reproductions.manifold_distillation.taps import block_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "manifold_distillation"
LABELS, HARD, SOFT, ALL = "labels alone", "hard", "soft", "soft + all terms"
NONE, README = Weights(0, 0, 0), Weights()
#: name of an arm -> what its objective is given. Weights are those of the authors' command.
OBJECTIVES: dict[str, dict[str, Any]] = {
    HARD: {"kind": "hard", "alpha": 0.5, "terms": NONE},
    SOFT: {"kind": "soft", "alpha": 1.0, "terms": NONE},
    "soft + patch": {"kind": "soft", "alpha": 1.0, "terms": Weights(README.patch, 0, 0)},
    "soft + sample": {"kind": "soft", "alpha": 1.0, "terms": Weights(0, README.sample, 0)},
    "soft + rand": {"kind": "soft", "alpha": 1.0, "terms": Weights(0, 0, README.rand)},
    ALL: {"kind": "soft", "alpha": 1.0, "terms": README},
    "labels + all terms": {"kind": "soft", "alpha": 0.0, "terms": README},
    "soft + all terms, mean over draws": {
        "kind": "soft", "alpha": 1.0, "terms": README, "expected_rand": True,
    },
}  # fmt: skip
DEFAULT = tuple(OBJECTIVES)[:6]
Start = Literal["parent", "scratch"]
#: Epochs of the parent where arms train from scratch, which then is not looked at: scale -> epochs.
SHORT = {"small": 1, "paper": 270}


def claims_against(labels: str) -> tuple[Claim, ...]:
    """The steps of the paper's comparison, and each term by itself; `labels` has no teacher."""
    steps = (
        Claim("A teacher's hard answers beat labels alone", HARD, labels),
        Claim("Its soft answers beat the hard ones", SOFT, HARD),
        Claim("All manifold terms beat soft answers alone", ALL, SOFT),
        Claim("Soft answers beat labels alone", SOFT, labels),
    )
    terms = tuple(
        Claim(f"The {term} term alone beats soft answers alone", f"soft + {term}", SOFT)
        for term in ("patch", "sample", "rand")
    )
    extra = (
        Claim("All manifold terms beat labels alone without soft answers, too",
              "labels + all terms", labels),
        Claim("The mean over all draws does as well as one draw, to half a point",
              "soft + all terms, mean over draws", ALL, 0.5),
    )  # fmt: skip
    return steps + terms + extra


def ablation(
    scale: str = "small",
    arms: str | Sequence[str] | None = None,
    start: Start = "scratch",
    teacher: str | None = None,
    teacher_weights: str | Path | None = None,
    num_samples: int = 192,
    **changes: Any,
) -> ExperimentResult:
    """One student by labels, hard and soft answers, each manifold term and all; equal epochs.

    All arms have the same teacher and see as many images.

    Args:
        scale: `tiny`, `small` or `paper` (DeiT-Ti on ImageNet).
        arms: names of those to train; default the six of the paper's comparison.
        start: `scratch`: as in the paper every arm trains from random weights, and so does one
            with labels alone, for `parent_epochs` and `epochs` together (4 where nothing is
            said, a third of the small tracks' protocol; 300 on ImageNet); `parent`: every arm
            goes on from the seed's student trained by labels, and so does the control.
        teacher: a variant or a model of timm; default the micro teacher, on ImageNet CaiT-S24.
        teacher_weights: default those that ship, or timm's.
        num_samples: K, rows of the random term.
        changes: fields of `harness.effect.Setting`: track, parent, seeds, epochs, parent_epochs...

    Raises:
        ReplivitError: an unknown scale, arm, start or option; a teacher without weights.
    """
    if scale == "paper":
        changes.setdefault("parent", "deit_ti")
    if start == "scratch" and scale in SHORT:
        changes.setdefault("parent_epochs", SHORT[scale])
    changes.setdefault("seconds", 0)  # all arms are one network: there is nothing to time
    setting = choose_setting(scale, changes)
    if start not in ("parent", "scratch"):
        raise ReplivitError(f"start is parent or scratch, not {start!r}")
    names = list(DEFAULT) if arms is None else [arms] if isinstance(arms, str) else list(arms)
    for name in names:
        if name not in OBJECTIVES:
            raise ReplivitError(f"no arm {name!r}; there are: {'; '.join(OBJECTIVES)}")
    if teacher is None:
        teacher = IMAGENET_TEACHER if setting.track == "imagenet" else MICRO_TEACHER
    model = _load(teacher, teacher_weights, setting)

    def taught(name: str) -> Arm:
        options = {"num_samples": num_samples, **OBJECTIVES[name]}
        return Arm(
            name, setting.parent, start=start,
            objective=lambda parent: ManifoldDistillation(model, **options),
        )  # fmt: skip

    chosen = [taught(name) for name in names]
    labels = CONTROL
    if start == "scratch":
        labels = LABELS
        chosen.insert(0, Arm(LABELS, setting.parent, start=start))
    compared = {*names, labels}
    result = compare_arms(
        chosen,
        scale=scale,
        claims=[one for one in claims_against(labels) if {one.better, one.than} <= compared],
        published=[
            {key: getattr(row, key) for key in ("variant", "metric", "value", "unit", "source")}
            for row in get_paper(PAPER).facts.published
            if row.metric == "top1" and row.variant.startswith("DeiT-Tiny")
            and "other recipe" not in row.source
        ],
        notes=f"{_about(teacher, model, setting)} Terms are weighted as in the authors' command, "
              f"K = {num_samples}; hard answers share with the labels, soft ones replace them.",
        pictures=lambda runs, setting: {"manifolds": draw(runs, setting, model)},
        **changes,
    )  # fmt: skip
    result.findings.append(order_of(result, (labels, HARD, SOFT, ALL)))
    return result


def order_of(result: ExperimentResult, arms: Sequence[str]) -> Finding:
    """Whether the arms stand in the paper's order, and each step is more than noise."""
    claim = f"The order of the paper: {' < '.join(arms)}"
    means = {row["arm"]: row["top-1 (%)"] for row in result.rows}
    if not set(arms) <= set(means):
        missing = ", ".join(one for one in arms if one not in means)
        return Finding(claim, "not measured", f"without {missing}")
    told = ", ".join(f"{one} {means[one]:.2f} %" for one in arms)
    if sorted(arms, key=means.__getitem__) != list(arms):
        return Finding(claim, "deviates", f"another order of means: {told}")
    steps = [one for one in result.findings[:3] if one.outcome != "reproduced"]
    if steps:
        return Finding(
            claim, "deviates",
            f"the means are in order ({told}), but {len(steps)} of 3 steps are not more than noise",
        )  # fmt: skip
    return Finding(claim, "reproduced", f"each step is more than noise: {told}")


def draw(runs: Runs, setting: Setting, teacher: nn.Module) -> Figure:
    """Manifolds one layer before the last: teacher, students without and with one."""
    shown = [LABELS, SOFT, ALL] if LABELS in runs else [PARENT, CONTROL, SOFT, ALL]
    students = {name: runs[name][0].model for name in shown if name in runs}
    depths = [len(block_names(one)) for one in (runs[PARENT][0].model, teacher)]
    own, other = (ids[max(len(ids) - 2, 0)] for ids in end_layers(*depths))
    columns = {"teacher": (teacher, other)}
    columns |= {name: (model, own) for name, model in students.items()}
    sample = sample_images(runs[PARENT][0].model, setting.track, 60, root=setting.root)
    return manifold_figure(columns, sample)


def _load(name: str, weights: str | Path | None, setting: Setting) -> nn.Module:
    """The teacher, on the setting's track.

    Raises:
        ReplivitError: no track of ours, or no weights.
    """
    if setting.track not in TRACKS:
        raise ReplivitError(f"the ablation needs a track ({', '.join(TRACKS)})")
    track = get_track(setting.track)
    return load_teacher(name, track.name, track.num_classes, track.image_size, weights)


def _about(name: str, model: nn.Module, setting: Setting) -> str:
    """The teacher in a sentence: size, accuracy, and what it cost where that is on record."""
    records = evaluate(
        model, setting.track, root=setting.root, limit=setting.test_images, device=setting.device
    )
    top1 = next(one.value for one in records if one.metric == "top1")
    params = sum(one.numel() for one in model.parameters())
    told = f"Teacher {name}: {params / 1e6:.2f} M parameters, top-1 {top1:.2f} %"
    return f"{told}{_cost(name, setting)}."


def _cost(name: str, setting: Setting) -> str:
    """What training the shipped teacher took."""
    try:
        file = get_variant(name).weights_file(setting.track)
    except ReplivitError:  # a model of timm
        return ""
    if file is None or not file.with_suffix(".records.jsonl").is_file():
        return ""
    found = {}
    for record in read_records(file.with_suffix(".records.jsonl")):
        found.setdefault(record.metric, record.value)
    return f", trained on {found['images_seen']:,} images in {found['train_time']:.0f} s"
