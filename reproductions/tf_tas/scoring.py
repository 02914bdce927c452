"""Scorers for the search: a configuration in, a number out, fast.

The released search copies the whole supernet for every candidate. Here the supernet stays where it
is and computes with views of its own weights: nothing is copied, only the wanted gradients are
taken, and the nuclear norm of a weight slice, which many candidates share, is computed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.training.state import state_sha256
from reproductions.autoformer.space import Config, Space
from reproductions.autoformer.supernet import Supernet
from reproductions.tf_tas.indicators import DssMode, check_mode, dss
from reproductions.tf_tas.pit import PitConfig, PitSpace, PoolingTransformer


class DssScorer:
    """DSS of subnets of AutoFormer's supernet; equal to `dss(supernet.extract(config))`.

    Args:
        supernet: its weights score every candidate, as in the release.
        mode: see `dss`.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(self, supernet: Supernet, mode: DssMode = "shipped") -> None:
        self.supernet, self.mode = supernet.eval(), check_mode(mode)
        self.weights = {name: one.detach() for name, one in supernet.named_parameters()}
        self.norms: dict[tuple, float] = {}

    def params(self, config: Config) -> int:
        """Parameters of the subnet, by formula."""
        return self.supernet.params_of(config)

    def __call__(self, config: Config) -> float:
        self.supernet.set_config(config)
        views = subnet_views(self.weights, self.supernet.space, config)
        size = self.supernet.image_size
        return dss(self.supernet, size, self.mode, parameters=views, weight_norms=self.norms).value

    def identity(self) -> dict[str, Any]:
        """What a score depends on beside the configuration."""
        return {
            "indicator": "dss",
            "mode": self.mode,
            "image_size": list(self.supernet.image_size),
            "weights": state_sha256(self.supernet.state_dict()),
        }


class PitScorer:
    """DSS of networks of a PiT space, each with its own random weights; there is no supernet.

    The search of this space was not released. What is scored is defined by `dss`.

    Args:
        seed: of the weights, the same for every network.
    """

    def __init__(
        self, space: PitSpace, num_classes: int = 1000, image_size: int = 224,
        mode: DssMode = "with_qkv", seed: int = 0,
    ) -> None:  # fmt: skip
        self.space, self.mode, self.seed = space, check_mode(mode), seed
        self.num_classes, self.image_size = num_classes, image_size

    def params(self, config: PitConfig) -> int:
        """Parameters of the network, by formula."""
        return self.space.params_of(config, self.num_classes, self.image_size)

    def __call__(self, config: PitConfig) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = PoolingTransformer(config, self.num_classes, self.image_size)
        return dss(model, self.image_size, self.mode).value

    def identity(self) -> dict[str, Any]:
        """What a score depends on beside the configuration."""
        return {"indicator": "dss", "mode": self.mode, "image_size": [self.image_size] * 2,
                "weights": f"random, seed {self.seed}"}  # fmt: skip


def subnet_views(weights: dict[str, Tensor], space: Space, config: Config) -> dict[str, Tensor]:
    """The supernet's parameters with those of the scored layers cut to a subnet's part, as views.

    All else is cut by the supernet's layers themselves. Rows of a qkv weight stay interleaved, as
    the supernet wants them; a nuclear norm does not see their order.
    """
    views = {
        name: weight for name, weight in weights.items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < config.depth
    }  # fmt: skip
    dim = config.embed_dim
    for index, (heads, hidden) in enumerate(zip(config.num_heads, config.hidden_dims, strict=True)):
        inner = heads * space.head_dim
        shapes = {
            "attn.qkv": (3 * inner, dim), "attn.proj": (dim, inner),
            "fc1": (hidden, dim), "fc2": (dim, hidden),
        }  # fmt: skip
        for layer, (rows, columns) in shapes.items():
            name = f"blocks.{index}.{layer}.weight"
            views[name] = weights[name][:rows, :columns]
    return views


def random_supernet(
    space: Space, num_classes: int = 1000, image_size: int = 224, seed: int = 0
) -> Supernet:
    """The supernet whose untrained weights score all candidates."""
    torch.manual_seed(seed)
    return Supernet(space, num_classes, image_size).eval()
