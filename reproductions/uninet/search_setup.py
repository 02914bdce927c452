"""What the search experiment runs on: its scales and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.settings import choose
from reproductions.uninet.proxy import Proxy
from reproductions.uninet.space import SearchSpace


@dataclass(frozen=True)
class Setting:
    """The size of the experiment; every field is an option of it.

    Attributes:
        seeds: one search of each kind for every seed.
        evaluations: networks that each search draws.
        batch: networks between two updates of the controller.
        images, epochs, judged_on: training images and epochs of a candidate, and held-out images
            that judge it.
        target: multiply-adds at which the reward is the accuracy.
        final_epochs: how long the winners train afterwards, on the whole training split; 0 = not.
        train_images, test_images: only so many for the winners, for a look at whether it runs;
            default all.
        workers: processes that train candidates; 0 trains here.
        space: fields of `SearchSpace`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    evaluations: int = 48
    batch: int = 4
    track: str = "fashion_mini"
    image_size: int = 32
    images: int = 1000
    epochs: int = 2
    judged_on: int = 1000
    target: float = 4e6
    alpha: float = -0.07
    final_epochs: int = 3
    train_images: int | None = None
    test_images: int | None = None
    workers: int = 0
    recipe: Mapping[str, Any] = field(
        default_factory=lambda: {"batch_size": 32, "lr": 5e-3, "warmup_epochs": 0}
    )
    space: SearchSpace = field(default_factory=SearchSpace)
    device: str = "cpu"
    root: str | None = None

    @property
    def proxy(self) -> Proxy:
        """How candidates are trained and judged."""
        return Proxy(
            self.space, self.track, self.image_size, self.images, self.judged_on, self.epochs,
            self.recipe, self.target, self.alpha, device=self.device, root=self.root,
        )  # fmt: skip


SCALES = {
    "tiny": Setting(
        seeds=(0,), evaluations=4, batch=2, images=64, epochs=1, judged_on=100, final_epochs=1,
        train_images=128, test_images=200,
        space=SearchSpace(
            repeats=(1,), channels=((16,), (16, 32)), strides=(2, 2), expansion=(1, 2)
        ),
    ),
    "small": Setting(),
    # our reading of the sizes (from memory); the paper's space is not published, this one is ours
    "paper": Setting(
        seeds=(0,), evaluations=2000, batch=16, track="imagenet", image_size=224, images=1_231_167,
        epochs=5, judged_on=50_000, target=5.5e8, final_epochs=300, device="cuda",
        recipe={"batch_size": 1024, "lr": 1e-3, "warmup_epochs": 1},
        space=SearchSpace(
            repeats=(1, 2, 3, 4, 5), expansion=(1, 2, 3, 4, 5, 6),
            channels=((32,), (32, 64), (64, 96), (96, 128, 160), (128, 160, 256)),
            strides=(1, 2, 2, 2, 2), stem_dim=32, final_head_dim=1280, head_dim=32,
        ),
    ),
}  # fmt: skip


def choose_setting(scale: str, options: Mapping[str, Any]) -> Setting:
    """The setting of a scale with single fields changed.

    Raises:
        ReplivitError: an unknown scale or option, no seed, no CUDA device, or an impossible space.
    """
    counts = ("evaluations", "batch", "images", "epochs", "judged_on", "target", "train_images",
              "test_images")  # fmt: skip
    least = {**dict.fromkeys(counts, 1), "final_epochs": 0, "workers": 0}
    return choose(SCALES, scale, options, least)
