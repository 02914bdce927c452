"""The yardstick every latency is divided by, and the inputs that models are fed.

The yardstick is timm's DeiT-Ti, eager, float32, weights from a fixed seed, with the same linear
layers as the models it is beside (`harness.linear`): the ratio to it is what travels between
machines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.registry import Variant

NAME = "deit_tiny_patch16_224"
IMAGE_SIZE = 224
#: Inputs take turns, so that no data-dependent path and no cache is frozen by one of them.
RING = 8


def build_yardstick(device: str = "cpu") -> nn.Module:
    """DeiT-Ti with seed 0 in eval mode; the caller's random state is left as it was."""
    import timm
    import torch

    from harness.linear import choose_linears

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(NAME, pretrained=False).eval().to(device)
    return choose_linears(model)


def seeded_images(
    batch_size: int, image_size: int, count: int = RING, seed: int = 0
) -> list[torch.Tensor]:
    """`count` batches `(batch_size, 3, image_size, image_size)` of normal noise, float32."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 3, image_size, image_size)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def real_images(
    variant: Variant, batch_size: int, image_size: int, count: int = RING
) -> tuple[list[torch.Tensor], str]:
    """Batches of test images, transformed as in evaluation, and the name of their data set.

    For models whose cost depends on the image (`dynamic: true` in paper.yaml): noise would give
    them a path that no image takes.
    """
    import torch

    from harness.measurement.counting import image_pack

    images, source = image_pack(variant, image_size, count=batch_size * count)
    return list(torch.stack(images).split(batch_size)), source
