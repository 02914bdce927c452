"""The toy models of the training tests; programs that run in processes of their own import them."""

from __future__ import annotations

import torch
from torch import nn

SIDE, CLASSES = 16, 4
RECIPE = {"batch_size": 24, "epochs": 3, "lr": 1e-2}  # 96 images: 4 steps per epoch


def same(a: dict, b: dict) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Net(nn.Module):
    """A convolution, a norm with buffers, dropout, a classifier."""

    num_classes = CLASSES

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8 * (SIDE // 4) ** 2, CLASSES)

    def forward(self, images):
        return self.head(self.drop(self.norm(self.stem(images)).relu().flatten(1)))


class Flat(nn.Sequential):
    """No norm, no dropout: passes can be split without changing gradients."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(3 * SIDE**2, 16), nn.GELU(), nn.Linear(16, CLASSES)
        )
