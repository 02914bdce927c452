"""Accuracy of a supernet's networks: extracted, calibrated on training images, then judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from harness.data import Batches
from reproductions.nasvit.calibration import calibrate
from reproductions.nasvit.space import Config
from reproductions.nasvit.subnet import Subnet
from reproductions.nasvit.supernet import Supernet


class SubnetAccuracy:
    """Top-1 of networks of a supernet: `accuracy(config)` in %.

    Args:
        calibration: batches of training images for the batch norms' statistics.
        batches: images and labels that judge.
    """

    def __init__(self, supernet: Supernet, calibration: Sequence[Tensor], batches: Batches) -> None:
        self.supernet = supernet.eval()
        self.calibration, self.batches = calibration, batches

    def network(self, config: Config) -> Subnet:
        """The calibrated network, in evaluation mode."""
        return calibrate(self.supernet.extract(config), self.calibration)

    @torch.inference_mode()
    def bits(self, config: Config) -> np.ndarray:
        """One bool per image, `(N,)`: was the right class first."""
        with torch.inference_mode(False):
            network = self.network(config)
        device = next(network.parameters()).device
        hits = [
            network(images.to(device)).argmax(dim=1).cpu() == labels
            for images, labels in self.batches
        ]
        return torch.cat(hits).numpy()

    def __call__(self, config: Config) -> float:
        return 100 * float(self.bits(config).mean())
