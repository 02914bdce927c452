"""What the tests of the deployment form do to networks."""

from __future__ import annotations

import torch
from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms statistics, and whatever starts at zero a value, as after training; eval mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.02 * torch.randn_like(one))
    for module in model.modules():
        if isinstance(module, NORMS) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def norms_left(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())
