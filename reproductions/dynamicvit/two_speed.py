"""Two speeds in one stage: what the journal version does where positions cannot be dropped.

Swin's windows and ConvNeXt's convolutions need the whole map. So no position of the third stage is
removed: the unimportant ones take a cheap path, a norm and one linear layer, instead of the block's
MLP. A later prediction module does not look at earlier decisions: a position may come back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from harness.patches import ImageSize, patch_grid
from reproductions.dynamicvit import schedule
from reproductions.dynamicvit.layers import gather_tokens
from reproductions.dynamicvit.model import TrainingOutput
from reproductions.dynamicvit.predictor import Predictor, straight_through
from reproductions.dynamicvit.schedule import Ratios


def fast_path(dim: int, eps: float) -> nn.Sequential:
    """The cheap path of a position: layer norm and one linear layer, freshly initialised."""
    linear = nn.Linear(dim, dim)
    _init_linear(linear)
    return nn.Sequential(nn.LayerNorm(dim, eps=eps), linear)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def merge(slow: Tensor, fast: Tensor, keep: Tensor) -> Tensor:
    """Of two streams the one that each position follows; `keep` is 1 where it is the slow one."""
    return slow * keep + fast * (1 - keep)


class TwoSpeed(nn.Module):
    """Mixin of a network of timm: its third stage with two speeds.

    The network gives the stage in pieces; maps are `(B, H, W, C)`.

    - `before(images)`: the map at the stage's first block; `after(x)`: the final features of it;
    - `third_stage`: its blocks; `plain(block, x)`: a whole block;
    - `mix(block, x)`: what a block computes on the whole map, by attention or convolution;
    - `slow(block, y)`, `fast(block, y)`: the residual branches of single positions `(B, ..., C)`;
    - `describe(features)`: logits, and what is distilled position by position `(B, L, C)`.
    """

    feature_loss = "mse"
    ratio_weight = 10.0
    #: Whether the branches add to what `mix` gives (Swin), or to what went into it (ConvNeXt).
    branches_add_to_mix: bool

    def add_predictors(
        self,
        image_size: ImageSize,
        keep_ratio: Ratios,
        pruning_loc: int | Sequence[int],
        dim: int,
        eps: float,
    ) -> None:
        """Prediction modules before the blocks `pruning_loc` of the third stage, of width `dim`.

        Raises:
            ValueError: impossible ratio or block.
        """
        self.pruning_loc = schedule.pruning_blocks(pruning_loc, len(self.third_stage))
        self.keep_ratios = schedule.keep_ratios(keep_ratio, len(self.pruning_loc), "linear")
        self.counts = self.keep_counts(image_size)
        self.score_predictor = nn.ModuleList(Predictor(dim, eps) for _ in self.pruning_loc)
        self.score_predictor.apply(_init_linear)

    @property
    def two_speed_blocks(self) -> Sequence[nn.Module]:
        """The blocks with a fast path: all from the first prediction module on."""
        return self.third_stage[self.pruning_loc[0] :] if self.pruning_loc else ()

    def keep_counts(self, image_size: ImageSize | None = None) -> tuple[int, ...]:
        """Positions on the slow path after each prediction module."""
        if image_size is None:
            return self.counts
        height, width = patch_grid(image_size, 32, type(self).__name__)
        return schedule.keep_counts(4 * height * width, self.keep_ratios)

    # evaluation: each position is computed on its own path only

    def _run(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, order, kept = self.before(images), None, []
        for index, block in enumerate(self.third_stage):
            if index in self.pruning_loc:
                scores = self.score_predictor[len(kept)](x.flatten(1, 2))[..., 0]
                order, count = scores.argsort(dim=1, descending=True), self.counts[len(kept)]
                kept.append(order[:, :count])
            x = self.plain(block, x) if order is None else self._two_speed(block, x, order, count)
        return self.after(x), kept

    def _two_speed(self, block: nn.Module, x: Tensor, order: Tensor, count: int) -> Tensor:
        """A block whose first `count` positions of `order` `(B, N)` take the slow path."""
        mixed = self.mix(block, x)
        tokens = mixed.flatten(1, 2)
        batch, number, width = tokens.shape
        slow = self.slow(block, gather_tokens(tokens, order[:, :count]))
        fast = self.fast(block, gather_tokens(tokens, order[:, count:]))
        first = torch.arange(batch, device=order.device).unsqueeze(1) * number
        base = (mixed if self.branches_add_to_mix else x).reshape(-1, width)
        branches = torch.cat([slow, fast], dim=1).reshape(-1, width)
        return base.index_add(0, (order + first).flatten(), branches).view_as(mixed)

    def forward_features(self, x: Tensor) -> Tensor:
        """The final map, as the network of timm gives it."""
        return self._run(x)[0]

    def forward(self, x: Tensor) -> Tensor | TrainingOutput:
        """`(B, 3, H, W)` to logits `(B, K)`; in training mode a `TrainingOutput`, unless the
        network is dense."""
        if self.training and self.pruning_loc:
            return self.forward_train(x)
        return self.forward_head(self.forward_features(x))

    def forward_with_tokens(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits `(B, K)`, and each stage's positions on the slow path, `(B, K_s)`, best first."""
        features, kept = self._run(x)
        return self.forward_head(features), kept

    # training: both paths are computed everywhere

    def forward_train(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> TrainingOutput:
        """The training form: two streams, of which sampled decisions choose at each position.

        Args:
            x: images `(B, 3, H, W)`.
            noise: Gumbel noise for each stage, `(B, N, 2)`; drawn by default.
        """
        slow = fast = self.before(x)
        keep, decisions = None, []
        for index, block in enumerate(self.third_stage):
            if index in self.pruning_loc:
                stage = len(decisions)
                x = slow if keep is None else merge(slow, fast, keep)
                log_probs = self.score_predictor[stage](x.flatten(1, 2))
                decisions.append(straight_through(log_probs, noise[stage] if noise else None))
                keep = decisions[-1].view(*x.shape[:3], 1)
            if keep is None:
                slow = fast = self.plain(block, slow)
                continue
            mixed = self.mix(block, merge(slow, fast, keep))
            old_slow, old_fast = (mixed, mixed) if self.branches_add_to_mix else (slow, fast)
            slow, fast = (
                old_slow + self.slow(block, merge(mixed, slow, keep)),
                old_fast + self.fast(block, merge(fast, mixed, keep)),
            )
        logits, features = self.describe(self.after(merge(slow, fast, keep)))
        every = features.new_ones(features.shape[:2])  # all positions reach the end
        return TrainingOutput(logits, features, every, torch.stack(decisions, dim=1))

    def dense(self) -> nn.Module:
        """A copy of the parent without fast paths: the same weights. It is the teacher."""
        parent = copy.deepcopy(self)
        for block in parent.two_speed_blocks:
            del block.fast_path
        parent.pruning_loc, parent.keep_ratios, parent.counts = (), (), ()
        parent.score_predictor = nn.ModuleList()
        return parent
