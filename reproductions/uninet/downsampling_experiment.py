"""Down-sampling modules against each other, and the order of operators, at equal multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness import Conditions, ExperimentResult, ReplivitError, evaluate
from harness.data import load_split
from harness.effect import Claim, Run
from harness.effect_report import Difference, draw_arms, judge
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from harness.settings import choose
from harness.statistics import mean_std
from harness.training import train
from reproductions.uninet.model import ARCHITECTURES, Architecture, UniNet
from reproductions.uninet.space import in_words, variant_for

#: Arms by name: what stands at the border from convolution to attention, and after it.
MODULES = {
    "strided convolution": "strided", "max pooling": "pool", "L-DSM": "l", "G-DSM": "g",
    "LG-DSM": "lg",
}  # fmt: skip
REFERENCE, REVERSED = "LG-DSM", "LG-DSM, attention first"
ARMS = (*MODULES, REVERSED)
CLAIMS = (
    Claim("LG-DSM is a better bridge than a strided convolution", "LG-DSM", "strided convolution"),
    Claim("LG-DSM is a better bridge than max pooling", "LG-DSM", "max pooling"),
    Claim("Looking at the whole map adds to a local module", "LG-DSM", "L-DSM"),
    Claim("Looking locally adds to a global module", "LG-DSM", "G-DSM"),
    Claim("L-DSM is better than a strided convolution", "L-DSM", "strided convolution"),
    Claim("Convolution first and attention last beats the reverse", "LG-DSM", REVERSED),
)
#: Two stages of convolution, two of attention; the third begins with a stride.
SMALL = Architecture(
    block_ops=("dw", "dw", "attn", "attn"), ds_ops=("l", "lg", "lg"), repeats=(1, 1, 2, 2),
    channels=(16, 16, 48, 96), expansion=(1, 6, 3, 4), strides=(1, 1, 2, 2), stem_dim=16,
    final_head_dim=256, head_dim=16,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """The size of the comparison; every field is an option of the experiment.

    Attributes:
        network: the arm `LG-DSM`; the others are made from it.
        epochs: of every arm, from scratch by the track's protocol.
        train_images, test_images: only so many, for a look at whether it runs; default all.
        init_values: where layer scales start; 1e-6 needs a long training.
        tolerance: how far the multiply-adds of an arm may be from the reference's, as a part.
    """

    network: Architecture = SMALL
    track: str = "fashion_mini"
    image_size: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 3
    train_images: int | None = None
    test_images: int | None = None
    init_values: float = 0.1
    tolerance: float = 0.02
    device: str = "cpu"
    root: str | None = None
    quiet: bool = False


SCALES = {
    "tiny": Setting(
        network=replace(
            SMALL, repeats=(1, 1, 1, 1), channels=(16, 16, 16, 32), final_head_dim=32
        ),
        seeds=(0,), epochs=1, train_images=128, test_images=200, quiet=True,
        tolerance=10.0,  # such small networks cannot be made to cost the same
    ),
    "small": Setting(),
    "paper": Setting(
        network=ARCHITECTURES["b1"], track="imagenet", image_size=224, seeds=(0,), epochs=300,
        init_values=1e-6, device="cuda",
    ),
}  # fmt: skip


def choose_setting(scale: str, changes: Mapping[str, Any]) -> Setting:
    """The setting of a scale with single fields changed.

    Raises:
        ReplivitError: an unknown scale or option, no seed or epoch, or a network that is none.
    """
    least = {"epochs": 1, "train_images": 1, "test_images": 1, "tolerance": 0}
    return choose(SCALES, scale, changes, least)


def networks_of(setting: Setting, names: Sequence[str] = ARMS) -> dict[str, Architecture]:
    """The network of every arm, all with the multiply-adds of `LG-DSM`.

    Modules are replaced where the reference has LG-DSM: at the border to attention and after it.
    What a module costs more or less is taken from the expansions, the same factor for all stages.

    Raises:
        ReplivitError: an arm cannot be made to cost as much as the reference.
    """
    network = setting.network
    target = macs_of(network, setting.image_size)
    found = {}
    for name in names:
        one = network
        if name == REVERSED:
            one = replace(network, block_ops=tuple(reversed(network.block_ops)))
        else:
            module = MODULES[name]
            one = replace(
                network, ds_ops=tuple(module if old == "lg" else old for old in network.ds_ops)
            )
        found[name] = with_macs(one, target, setting.image_size, setting.tolerance)
    return found


def macs_of(architecture: Architecture, image_size: int) -> int:
    """Multiply-adds per image, without a classifier."""
    with on_meta():
        return count_macs(UniNet(architecture, 1, image_size), image_size).total


def with_macs(
    architecture: Architecture, target: int, image_size: int, tolerance: float = 0.02
) -> Architecture:
    """The network with its expansions times one factor, as near to `target` as that comes.

    A stage without expansion keeps that.

    Raises:
        ReplivitError: no factor from 1/8 on comes within `tolerance`, a part of `target`.
    """

    def scaled(factor: float) -> Architecture:
        ratios = [  # the half: a block has int(width * ratio) channels inside
            ratio if ratio == 1 else (max(1, round(width * ratio * factor)) + 0.5) / width
            for width, ratio in zip(architecture.channels, architecture.expansion, strict=True)
        ]
        return replace(architecture, expansion=tuple(ratios))

    # multiply-adds are nearly a straight line in the factor: two points, then by the secant
    tried = {1.0: (macs_of(architecture, image_size), architecture)}
    factor = 0.5
    for _ in range(4):
        if min(abs(macs - target) for macs, _ in tried.values()) < 0.002 * target:
            break
        tried[factor] = (macs_of(scaled(factor), image_size), scaled(factor))
        (x, a), (y, b) = sorted(
            ((one, macs) for one, (macs, _) in tried.items()), key=lambda one: abs(one[1] - target)
        )[:2]
        factor = max(1 / 8, x + (target - a) * (y - x) / (b - a)) if a != b else factor
        if factor in tried:
            break
    macs, best = min(tried.values(), key=lambda one: abs(one[0] - target))
    if abs(macs - target) > tolerance * target:
        raise ReplivitError(
            f"no expansion gives {architecture.block_ops} with {architecture.ds_ops} "
            f"{target / 1e6:.2f} M multiply-adds; {macs / 1e6:.2f} M are the nearest"
        )
    return best


def downsampling(
    scale: str = "small", arms: Sequence[str] | None = None, **changes: Any
) -> ExperimentResult:
    """Train the same hybrid with each down-sampling module, and with its operators reversed.

    All arms have the same multiply-adds (expansions make up for what a module costs), the same
    protocol and the same seeds.

    Args:
        scale: `tiny` (does it run?), `small` (minutes on a CPU) or `paper` (ImageNet, a GPU).
        arms: names of those to train; default all.
        changes: fields of `Setting`.

    Raises:
        ReplivitError: an unknown scale, arm or option.
    """
    setting = choose_setting(scale, changes)
    chosen = list(ARMS) if arms is None else [arms] if isinstance(arms, str) else list(arms)
    for name in chosen:
        if name not in ARMS:
            raise ReplivitError(f"no arm {name!r}; there are: {'; '.join(ARMS)}")
    networks = networks_of(setting, chosen)
    runs = {
        name: [_run(networks[name], seed, setting) for seed in setting.seeds] for name in chosen
    }
    claims = [one for one in CLAIMS if {one.better, one.than} <= set(chosen)]
    first = runs[chosen[0]][0].top1.conditions
    return ExperimentResult(
        rows=[_row(name, networks[name], runs, setting) for name in chosen],
        findings=judge(claims, runs),
        figures={"downsampling": draw_arms(runs, REFERENCE if REFERENCE in runs else chosen[0])},
        notes=_notes(setting),
        conditions=Conditions(
            device=setting.device, threads=torch.get_num_threads(), track=setting.track,
            image_size=setting.image_size, data_fingerprint=first.data_fingerprint,
            seed=setting.seeds[0] if len(setting.seeds) == 1 else None,
            options={"seeds": list(setting.seeds), "epochs": setting.epochs},
        ),
    )  # fmt: skip


def _run(architecture: Architecture, seed: int, setting: Setting) -> Run:
    """One network from scratch; found again when it was trained before."""
    hold_out = 0
    if setting.train_images is not None:
        whole = len(load_split(setting.track, "train", setting.root))
        hold_out = max(0, whole - setting.train_images)
    trained = train(
        variant_for(setting.track), setting.track, None, seed,
        epochs=setting.epochs, hold_out=hold_out, device=setting.device, root=setting.root,
        image_size=setting.image_size, quiet=setting.quiet, evaluate=setting.test_images is None,
        options={"architecture": architecture.as_dict(), "init_values": setting.init_values},
    )  # fmt: skip
    records = trained.records
    if setting.test_images is not None:
        records = evaluate(
            trained.model, setting.track, root=setting.root, device=setting.device,
            limit=setting.test_images, image_size=setting.image_size,
        )  # fmt: skip
    top1 = next(one for one in records if one.metric == "top1")
    return Run(
        seed, top1, trained.value("train_time"), trained.value("images_seen"), trained.model
    )  # fmt: skip


def _row(
    name: str, architecture: Architecture, runs: Mapping[str, Sequence[Run]], setting: Setting
) -> dict[str, Any]:
    top1 = mean_std([run.top1.value for run in runs[name]])
    compared = name != REFERENCE and REFERENCE in runs
    model = runs[name][0].model
    return {
        "arm": name,
        "top-1 (%)": round(top1.mean, 2),
        "±": round(top1.mean - top1.interval[0], 2) if top1.interval else None,
        "against LG-DSM (points)": (
            Difference.of(runs[name], runs[REFERENCE]).short if compared else ""
        ),
        "MACs (M)": round(count_macs(model, setting.image_size).total / 1e6, 2),
        "params": sum(one.numel() for one in model.parameters()),
        "training (s)": round(sum(run.seconds for run in runs[name]) / len(runs[name]), 1),
        "network": in_words(architecture),
    }


def _notes(setting: Setting) -> str:
    limits = "".join(
        f" Only {count} {what} images were used: no number here means anything."
        for what, count in (("training", setting.train_images), ("test", setting.test_images))
        if count is not None
    )
    return (
        f"{setting.track}, {setting.epochs} epochs from scratch by the track's protocol, seeds "
        f"{', '.join(map(str, setting.seeds))}. Modules stand at the border from convolution to "
        "attention and after it. Every arm has the multiply-adds of the LG-DSM network: expansions "
        "share one factor. G-DSM is our reading, strided convolution and max pooling "
        "are plain. Intervals are 95 %: t over seeds, paired by seed; McNemar's test pools the "
        "images of all seeds and is corrected for the number of claims (Benjamini-Hochberg)."
        + limits
    )
