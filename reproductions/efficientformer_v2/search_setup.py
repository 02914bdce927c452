"""What the search experiment runs on: its scales, and the images that steer and judge it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harness import ReplivitError
from harness.data import SearchImages
from harness.settings import choose
from reproductions.efficientformer_v2.supernet import SearchSpace, Subnet, Supernet


@dataclass(frozen=True)
class Settings:
    """A scale of the experiment; every field is an option of it.

    Attributes:
        track, image_size: data and input side in pixels.
        supernet_epochs, final_epochs: training length of the supernet and of the final networks.
        seeds: of the final trainings.
        target: latency of the network searched for, as a part of the supernet's.
        search_images: images held out of the supernet's training, which steer the search; the test
            split judges.
        random_subnets: how many random sub-networks the walk is compared with.
        latency_batch: images per call when latency is measured.
        timing_seconds: budget of the cost table, and of finding an equally fast uniform network.
        layer_scale_init: 1e-5 in the paper; a short training needs branches that can be felt.
    """

    space: SearchSpace
    track: str
    image_size: int
    supernet_epochs: int
    final_epochs: int
    seeds: tuple[int, ...] = (0,)
    target: float = 0.5
    search_images: int = 1000
    random_subnets: int = 40
    latency_batch: int = 1
    timing_seconds: float = 8.0
    batch_size: int | None = None
    layer_scale_init: float = 1e-5
    device: str = "cpu"
    root: str | None = None


SCALES = {
    "small": Settings(
        SearchSpace(
            widths=((16, 32), (32, 48), (48, 64, 80), (64, 80, 96)), depths=(2, 2, 3, 3),
            num_heads=4, key_dim=16, attn_ratio=2, stem_stride=2,
        ),
        track="fashion_mini", image_size=32, supernet_epochs=3, final_epochs=3,
        search_images=500, random_subnets=30, latency_batch=32, layer_scale_init=0.1,
    ),
    # the size of the paper's search; its exact space is not published, this one is ours
    "paper": Settings(
        SearchSpace(
            widths=((32, 48), (48, 64, 80), (96, 128, 160, 192), (176, 224, 288, 384)),
            depths=(5, 5, 15, 10),
        ),
        track="imagenet", image_size=224, supernet_epochs=300, final_epochs=300, target=0.35,
        search_images=10_000, device="cuda",
    ),
}  # fmt: skip


def choose_settings(scale: str, options: dict[str, Any]) -> Settings:
    """The settings of a scale with some of them changed; a mistake is one clear sentence."""
    settings = choose(SCALES, scale, options)
    if not 0 < settings.target < 1:
        raise ReplivitError("target is a part of the supernet's latency, between 0 and 1")
    return settings


class Images:
    """Held-out training images that steer the search, and the test split that judges."""

    def __init__(self, settings: Settings) -> None:
        images = SearchImages(
            settings.track, settings.image_size, search_images=settings.search_images,
            root=settings.root, workers=8,
        )  # fmt: skip
        self.num_classes = images.num_classes
        self.parts = {"search": images.search_batches(), "judge": images.test_batches()}

    @torch.inference_mode()
    def accuracy(self, supernet: Supernet, subnet: Subnet, part: str) -> float:
        """Top-1 in % of a sub-network with the supernet's weights."""
        supernet.eval().select(subnet)
        device = next(supernet.parameters()).device
        right = total = 0
        for batch, labels in self.parts[part]:
            found = supernet(batch.to(device)).argmax(dim=1).cpu()
            right, total = right + int((found == labels).sum()), total + len(labels)
        return 100 * right / total
