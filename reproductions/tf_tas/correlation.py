"""Does a score at initialisation rank trained networks, and does it do more than size does?"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from harness import Conditions, ExperimentResult, Finding
from harness.data import create_transform, get_track, load_split
from harness.settings import choose
from harness.training import train
from reproductions.autoformer.space import Config, Space, get_space
from reproductions.autoformer.subnet import Subnet
from reproductions.tf_tas.indicators import (
    DSS_MODES,
    dss,
    grasp,
    naswot,
    ntk_condition,
    snip,
    synflow,
)
from reproductions.tf_tas.published import published
from reproductions.tf_tas.ranking import Rank, kendall, rank
from reproductions.tf_tas.scoring import random_supernet
from reproductions.tf_tas.search import Draws

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DSS = "dss_shipped"
SIZES = ("params", "macs")
PROXIES = (*(f"dss_{mode}" for mode in DSS_MODES), "naswot", "snip", "grasp", "synflow", "te_score")


@dataclass(frozen=True)
class Settings:
    """A scale of the experiment; every field is an option of it.

    Attributes:
        subnets: random members of the whole space.
        equal: random members of a window, all of about the same size.
        window: that window, in M parameters.
        epochs: training length of every subnet.
        batch: images that the data-dependent proxies see.
        train_seed: of the subnets' own initial weights and of their training.
    """

    space: str = "micro"
    track: str = "fashion_mini"
    subnets: int = 12
    equal: int = 8
    window: tuple[float, float] = (0.225, 0.235)
    epochs: int = 2
    batch: int = 64
    seed: int = 0
    train_seed: int = 0
    resamples: int = 1000
    device: str = "cpu"
    root: str | None = None


SCALES = {
    "tiny": Settings(subnets=4, equal=0, epochs=1, batch=8, resamples=50),
    "small": Settings(),
    "paper": Settings(subnets=60, equal=40, epochs=12),
}


def correlation(scale: str = "small", **options: Any) -> ExperimentResult:
    """Score subnets at initialisation, train each from scratch, and compare the two orders.

    Proxies are read off slices of one random supernet, as the search does. Training is resumable:
    a subnet that was trained before is read back. Kendall's tau with accuracy is given for every
    proxy and for plain size; once more with the number of parameters held fixed, and
    once more among subnets of equal size.

    Args:
        scale: `tiny`, `small` (about 20 CPU minutes) or `paper` (a hundred subnets, a GPU).
        options: fields of `Settings`.

    Raises:
        ReplivitError: an unknown scale or option.
    """
    settings = choose(SCALES, scale, options)
    space = get_space(settings.space)
    proxies = Proxies(space, settings)
    groups = _draw(space, proxies.supernet.params_of, settings)
    rows = [
        {"group": group, "name": str(config), **proxies.of(config),
         "top1": _accuracy(space, config, settings)}
        for group, configs in groups.items() for config in configs
    ]  # fmt: skip
    ranks = _ranks(rows, settings.resamples)
    return ExperimentResult(
        rows=_table(ranks, rows),
        findings=_findings(ranks, rows),
        published=published("kendall_tau"),
        figures={"correlation": _figure(rows, ranks)},
        notes=(
            f"{len(rows)} subnets of {space.name}, {settings.epochs} epochs each on "
            f"{settings.track} from their own initial weights (one seed). Proxies are read off one "
            f"random supernet. Intervals are bootstrapped over subnets. `tau_fixed_size` is "
            "tau of what is left once the parameters are known (ranking.py), `tau_equal` tau among "
            f"subnets of {settings.window[0]:g} to {settings.window[1]:g} M parameters."
        ),
        conditions=Conditions(
            device=settings.device, threads=torch.get_num_threads(), track=settings.track,
            batch_size=settings.batch, seed=settings.seed,
        ),
    )  # fmt: skip


# ---- subnets, their scores and their accuracies --------------------------------------------------


def _draw(
    space: Space, params: Callable[[Config], int], settings: Settings
) -> dict[str, list[Config]]:
    """Different random subnets of the whole space, and of the window."""
    rng = random.Random(settings.seed)
    groups = {
        "space": (settings.subnets, (0, math.inf)),
        "equal": (settings.equal, settings.window),
    }
    return {
        name: [one.config for one in Draws(space, params, window, rng).take(count)]
        for name, (count, window) in groups.items()
        if count
    }


class Proxies:
    """All proxies of any subnet: one random supernet, one batch of images, one of noise."""

    def __init__(self, space: Space, settings: Settings) -> None:
        track = get_track(settings.track)
        self.size = track.image_size
        self.supernet = random_supernet(space, track.num_classes, self.size, settings.seed)
        dataset = load_split(settings.track, "train", settings.root)
        transform = create_transform(track.input, self.size)
        order = random.Random(settings.seed).sample(range(len(dataset)), settings.batch)
        pairs = [dataset[index] for index in order]
        self.images = torch.stack([transform(image) for image, _ in pairs])
        self.targets = torch.tensor([label for _, label in pairs])
        generator = torch.Generator().manual_seed(settings.seed)
        self.noise = torch.randn(self.images.shape, generator=generator)

    def of(self, config: Config) -> dict[str, float]:
        """Size and proxies of one subnet."""
        model = self.supernet.extract(config)
        return {
            "params": self.supernet.params_of(config),
            "macs": self.supernet.complexity_of(config),
            **{f"dss_{mode}": dss(model, self.size, mode).value for mode in DSS_MODES},
            "naswot": naswot(model, self.noise).value,
            "snip": snip(model, self.images, self.targets).value,
            "grasp": grasp(model, self.images, self.targets).value,
            "synflow": synflow(model, self.size).value,
            "te_score": ntk_condition(model, self.noise).value,
        }


def _accuracy(space: Space, config: Config, settings: Settings) -> float:
    """Top-1 in % of the subnet, trained from scratch."""
    track = get_track(settings.track)
    torch.manual_seed(settings.train_seed)
    model = Subnet(space, config, track.num_classes, track.image_size)
    trained = train(
        model, settings.track, seed=settings.train_seed, epochs=settings.epochs,
        device=settings.device, root=settings.root, name="tf_tas_subnet", quiet=True,
    )  # fmt: skip
    return trained.value("top1")


# ---- what was found ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """How one number ranks the subnets; None where there are too few of them."""

    name: str
    tau: Rank
    fixed_size: Rank | None
    equal: Rank | None


def _ranks(rows: list[dict[str, Any]], resamples: int) -> list[Ranks]:
    whole = [row for row in rows if row["group"] == "space"]
    equal = [row for row in rows if row["group"] == "equal"]
    found = []
    for name in (*SIZES, *PROXIES):
        x, y = ([row[key] for row in whole] for key in (name, "top1"))
        size = [row["params"] for row in whole]
        found.append(
            Ranks(
                name,
                rank(x, y, resamples=resamples),
                rank(x, y, size, resamples) if name != "params" else None,
                rank([row[name] for row in equal], [row["top1"] for row in equal], None, resamples)
                if len(equal) >= 4
                else None,
            )
        )
    return found


def _table(ranks: list[Ranks], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each proxy, then one for each subnet, with the same columns."""
    columns = {"tau": "tau", "tau_fixed_size": "fixed_size", "tau_equal": "equal"}
    table = []
    for one in ranks:
        found = {column: getattr(one, attribute) for column, attribute in columns.items()}
        taus = {column: rank and round(rank.tau, 3) for column, rank in found.items()}
        ends = {column: [round(end, 2) for end in rank.interval]
                for column, rank in found.items() if rank}  # fmt: skip
        table.append({"what": "proxy", "name": one.name, **taus, "detail": ends})
    for row in rows:
        scores = {name: float(f"{row[name]:.6g}") for name in ("macs", *PROXIES)}
        table.append({**row, "what": f"subnet ({row['group']})", "detail": scores})
    names = ("what", "name", *columns, "params", "top1", "detail")
    return [{name: row.get(name) for name in names} for row in table]


def _findings(ranks: list[Ranks], rows: list[dict[str, Any]]) -> list[Finding]:
    by_name = {one.name: one for one in ranks}
    own, size = by_name[DSS], by_name["params"]
    best = max(ranks, key=lambda one: one.tau.tau)
    order = sorted(ranks, key=lambda one: -one.tau.tau)
    whole = [row for row in rows if row["group"] == "space"]
    to_size = kendall([row[DSS] for row in whole], [row["params"] for row in whole])
    beyond = own.fixed_size.interval[0] > 0 and (own.equal is None or own.equal.interval[0] > 0)
    listed = ", ".join(f"{one.name} {one.tau.tau:+.2f}" for one in order)
    among = f"; among subnets of equal size {own.equal}" if own.equal else ""
    return [
        Finding(
            "The DSS-indicator ranks trained transformers",
            "reproduced" if own.tau.interval[0] > 0 else "deviates",
            f"Kendall's tau with accuracy {own.tau} over {own.tau.n} subnets",
        ),
        Finding(
            "DSS ranks better than NASWOT, SNIP, GraSP and TE-score",
            "reproduced" if all(
                own.tau.tau > by_name[name].tau.tau
                for name in ("naswot", "snip", "grasp", "te_score")
            ) else "deviates",
            f"{listed}; best: {best.name}",
        ),
        Finding(
            "DSS says more than the number of parameters does (not a claim of the paper)",
            "reproduced" if beyond and own.tau.tau > size.tau.tau else "deviates",
            f"parameters alone {size.tau}; DSS and parameters agree with tau {to_size:+.2f}; DSS "
            f"with parameters held fixed {own.fixed_size}{among}",
        ),
    ]  # fmt: skip


def _figure(rows: list[dict[str, Any]], ranks: list[Ranks]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    shown = ("params", DSS, "dss_linearised", "naswot", "snip", "grasp")
    by_name = {one.name: one for one in ranks}
    grid = figure.add_gridspec(2, 4)
    for place, name in enumerate(shown):
        axes = figure.add_subplot(grid[place // 3, place % 3])
        for group, color, label in (
            ("space", "C0", "the whole space"), ("equal", "C3", "equal size")
        ):  # fmt: skip
            chosen = [row for row in rows if row["group"] == group]
            axes.plot(
                [row[name] for row in chosen], [row["top1"] for row in chosen], "o",
                color=color, ms=4, label=label,
            )  # fmt: skip
        axes.set_title(f"{name}: tau {by_name[name].tau.tau:+.2f}", fontsize=10)
        axes.ticklabel_format(style="sci", scilimits=(-3, 6), axis="x")
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelsize=8)
        if place % 3 == 0:
            axes.set_ylabel("top-1 after training, %")
        if not place and any(row["group"] == "equal" for row in rows):
            axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    _bars(figure.add_subplot(grid[:, 3]), ranks)
    return figure


def _bars(axes: Any, ranks: list[Ranks]) -> None:
    """Tau of every proxy with its interval, and the partial one below it."""
    order = sorted(ranks, key=lambda one: one.tau.tau)
    for shift, attribute, color, label in (
        (0.15, "tau", "C0", "tau"), (-0.15, "fixed_size", "C1", "given the parameters")
    ):  # fmt: skip
        pairs = [(place, getattr(one, attribute)) for place, one in enumerate(order)]
        pairs = [(place, found) for place, found in pairs if found]
        axes.errorbar(
            [found.tau for _, found in pairs], [place + shift for place, _ in pairs],
            xerr=[
                [max(found.tau - found.interval[0], 0) for _, found in pairs],
                [max(found.interval[1] - found.tau, 0) for _, found in pairs],
            ],
            fmt="o", ms=4, capsize=2, color=color, label=label,
        )  # fmt: skip
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(order)), [one.name for one in order], fontsize=8)
    axes.set(xlim=(-1.05, 1.05), xlabel="Kendall's tau with top-1")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, 1.1))
    axes.spines[["top", "right"]].set_visible(False)
