"""Accuracy of subnets with the weights they inherit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from harness.data import Batches
from reproductions.autoformer.space import Config


class InheritedAccuracy:
    """Top-1 of subnets of a supernet: `accuracy(config)` in %.

    Args:
        supernet: anything with `set_config`, with its weights; on its own device.
        batches: images and labels that judge.
    """

    def __init__(self, supernet: Any, batches: Batches) -> None:
        self.supernet, self.batches = supernet.eval(), batches

    @torch.inference_mode()
    def bits(self, config: Config) -> np.ndarray:
        """One bool per image, `(N,)`: was the right class first."""
        device = next(self.supernet.parameters()).device
        self.supernet.set_config(config)
        hits = [
            self.supernet(images.to(device)).argmax(dim=1).cpu() == labels
            for images, labels in self.batches
        ]
        return torch.cat(hits).numpy()

    def __call__(self, config: Config) -> float:
        return 100 * float(self.bits(config).mean())
