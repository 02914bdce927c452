"""Batch norms of an extracted network: statistics of its own, in place of the supernet's.

The supernet's running statistics mix all widths and depths. Without this step the accuracy of a
subnet says nothing (official code: `reset_running_stats_for_calibration`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set running statistics to the plain average over batches of training images; in eval mode.

    The released evaluation uses 64 batches of augmented training images.

    Args:
        model: a network, or a supernet with its configuration set; changed in place.
        batches: images `(B, 3, S, S)` each.

    Raises:
        ValueError: there is no batch, and the statistics would stay empty.
    """
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    momenta = [one.momentum for one in norms]
    device = next(model.parameters()).device
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.train()
    seen = 0
    try:
        for images in batches:
            model(images.to(device))
            seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    if not seen:
        raise ValueError("calibration needs at least one batch of images")
    return model
