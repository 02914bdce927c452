"""DynamicViT on plain vision transformers: DeiT, and the small ViT of the small tracks.

Before some blocks a prediction module scores the patch tokens. Evaluation keeps the best ones and
really drops the others, so that the sequence gets shorter; the class token always stays. Training
samples decisions instead and masks what was dropped, since every image drops another number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed, trunc_normal_
from torch import Tensor, nn

from harness.patches import ImageSize, patch_grid
from reproductions.dynamicvit import schedule
from reproductions.dynamicvit.layers import Block, gather_tokens
from reproductions.dynamicvit.predictor import (
    SCORERS,
    Predictor,
    RandomOrder,
    Scorer,
    keep_best,
    straight_through,
)
from reproductions.dynamicvit.schedule import Ratios

#: size -> (width, heads); 12 blocks, MLP ratio 4 (official code: VisionTransformerDiffPruning).
SIZES = {"ti": (192, 3), "256": (256, 4), "s": (384, 6), "b": (768, 12)}


class TrainingOutput(NamedTuple):
    """What a model answers with in training mode, for `method.DynamicViTObjective`.

    Attributes:
        logits: `(B, K)`.
        features: what is distilled token by token, `(B, L, C)`; of dropped tokens too.
        mask: tokens whose features count, `(B, L)`, 1 or 0; without gradient.
        decisions: keep decisions of each stage, `(B, S, N)`, 1 or 0 with gradient.
    """

    logits: Tensor
    features: Tensor
    mask: Tensor
    decisions: Tensor


class DynamicViT(nn.Module):
    """A vision transformer with class token that drops tokens as it goes.

    Args:
        num_classes: number of classes; with 0 the answer is the features.
        image_size: pixels, a multiple of the patch size.
        keep_ratio: share of the patches that stays, see `schedule.keep_ratios`.
        pruning_loc: blocks (from 0) before which tokens are dropped; `()` is the dense network.
        scorer: "predictor" is the method; "random" and "attention" are rules to compare it with.
        embed: makes the patch embedding from (image_size, patch_size, width); default one
            convolution.
        norm_eps: of all layer norms but the predictors'.
        xavier: Xavier initialisation of linear layers; std 0.02 starts narrow models too slowly.

    Raises:
        ValueError: impossible ratio, block or image size; the message names the limit.
    """

    #: How the token-level loss compares features: squared error, or KL divergence of logits.
    feature_loss = "mse"
    #: Weight of the ratio loss in training.
    ratio_weight = 2.0

    def __init__(
        self,
        num_classes: int,
        image_size: ImageSize,
        keep_ratio: Ratios,
        pruning_loc: int | Sequence[int],
        embed_dim: int,
        num_heads: int,
        depth: int = 12,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        residual_scale: float = 1.0,
        scorer: Scorer = "predictor",
        embed: Callable[..., nn.Module] | None = None,
        xavier: bool = False,
    ) -> None:
        super().__init__()
        if scorer not in SCORERS:
            raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, not {scorer!r}")
        name = type(self).__name__
        grid = patch_grid(image_size, patch_size, name)
        self.patch_size, self.grid, self.scorer = patch_size, grid, scorer
        self.num_classes, self.num_features = num_classes, embed_dim
        self.pruning_loc = schedule.pruning_blocks(pruning_loc, depth)
        self.keep_ratios = schedule.keep_ratios(keep_ratio, len(self.pruning_loc))
        self.counts = schedule.keep_counts(grid[0] * grid[1], self.keep_ratios)
        self.first_token_last = False  # see deploy_

        make = embed or (lambda size, patch, dim: PatchEmbed(size, patch, 3, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, embed_dim))
        self.patch_embed = make(image_size, patch_size, embed_dim)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, norm_eps, residual_scale)
            for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = self._classifier()
        if scorer == "predictor":
            scorers = [Predictor(embed_dim) for _ in self.pruning_loc]
        elif scorer == "random":
            before = (grid[0] * grid[1], *self.counts[:-1])
            scorers = [RandomOrder(count, seed) for seed, count in enumerate(before)]
        else:
            scorers = []
        self.score_predictor = nn.ModuleList(scorers)
        self._init_weights(xavier)

    def _init_weights(self, xavier: bool) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if xavier:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's and our optimizers do not decay."""
        return {"cls_token", "pos_embed"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier; 0 classes leave the features."""
        self.num_classes = num_classes
        self.head = self._classifier()

    def _classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes)

    def keep_counts(self, image_size: ImageSize | None = None) -> tuple[int, ...]:
        """Patches left after each stage, for images of `image_size` or of the model's own size."""
        if image_size is None:
            return self.counts
        height, width = patch_grid(image_size, self.patch_size, type(self).__name__)
        return schedule.keep_counts(height * width, self.keep_ratios)

    # evaluation: tokens are dropped

    def _embed(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        first = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1) + self.pos_embed

    def _scores(self, stage: int, tokens: Tensor, alive: Tensor | None = None) -> Tensor:
        """How much each patch is worth: `(B, N)` for tokens `(B, 1 + N, C)`."""
        if self.scorer == "predictor":
            return self.score_predictor[stage](tokens[:, 1:], alive)[..., 0]
        if self.scorer == "random":
            return self.score_predictor[stage](tokens[:, 1:])
        block = self.blocks[self.pruning_loc[stage]]
        return block.attn.class_attention(block.norm1(tokens))

    def _run(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised tokens `(B, 1 + K, C)`, and for each stage the chosen slots `(B, K)` of the
        sequence before it, best first."""
        x, chosen = self._embed(images), []
        for index, block in enumerate(self.blocks):
            if index in self.pruning_loc:
                stage = len(chosen)
                best = self._scores(stage, x).topk(self.counts[stage], dim=1).indices
                chosen.append(best)
                x = gather_tokens(x, nn.functional.pad(best + 1, (1, 0)))  # slot 0: class token
            if self.first_token_last and block is self.blocks[-1]:
                x = block.first_token(x)
            else:
                x = block(x)
        return self.norm(x), chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens that are left, class token first, normalised: `(B, 1 + K, C)`.

        In deployment form the class token alone, `(B, 1, C)`.
        """
        return self._run(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, K)` of `forward_features`' tokens, or the class token `(B, C)`."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor | TrainingOutput:
        """`(B, 3, H, W)` to logits `(B, K)`; in training mode a `TrainingOutput`, unless the
        network is dense."""
        if self.training and self.pruning_loc:
            return self.forward_train(x)
        return self.forward_head(self.forward_features(x))

    def forward_with_tokens(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and each stage's kept patches.

        Returns:
            logits `(B, K)`; per stage `(B, K_s)` places on the image's grid, row by row from 0,
            in the order of the sequence: best first.
        """
        features, chosen = self._run(x)
        kept: list[Tensor] = []
        for slots in chosen:
            kept.append(kept[-1].gather(1, slots) if kept else slots)
        return self.forward_head(features), kept

    # training: tokens are masked

    def forward_train(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> TrainingOutput:
        """The training form: sampled decisions, masked attention.

        Args:
            x: images `(B, 3, H, W)`.
            noise: Gumbel noise for each stage, `(B, N, 2)`; drawn by default.
        """
        x = self._embed(x)
        alive, keep, decisions = x.new_ones(len(x), x.shape[1] - 1), None, []
        for index, block in enumerate(self.blocks):
            if index in self.pruning_loc:
                alive = self._decide(len(decisions), x, alive, noise)
                decisions.append(alive)
                keep = nn.functional.pad(alive, (1, 0), value=1.0)
            # While nothing is masked, eps moves no weight by more than a millionth, which no output
            # shows at 1e-5: plain attention.
            x = block(x, keep)
        logits, features = self.describe(self.norm(x))
        return TrainingOutput(logits, features, alive.detach(), torch.stack(decisions, dim=1))

    def _decide(
        self, stage: int, tokens: Tensor, alive: Tensor, noise: Sequence[Tensor] | None
    ) -> Tensor:
        """Which patches stay, `(B, N)`; what was dropped once never comes back."""
        if self.scorer == "predictor":
            log_probs = self.score_predictor[stage](tokens[:, 1:], alive if stage else None)
            return straight_through(log_probs, noise[stage] if noise else None) * alive
        with torch.no_grad():
            return keep_best(self._scores(stage, tokens), alive, self.counts[stage])

    def describe(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The classification's logits and what is distilled token by token.

        Args:
            features: normalised tokens of a whole sequence, `(B, 1 + N, C)`.
        """
        return self.head(features[:, 0]), features[:, 1:]

    def dense(self) -> DynamicViT:
        """A copy of the unpruned parent: the same weights, no stages. It is the teacher."""
        parent = copy.deepcopy(self)
        parent.pruning_loc, parent.keep_ratios, parent.counts = (), (), ()
        parent.score_predictor = nn.ModuleList()
        return parent

    def deploy_(self) -> None:
        """Compute the last block for the class token alone: nothing else is read."""
        self.first_token_last = True


def dynamicvit_deit(
    num_classes: int,
    image_size: ImageSize,
    size: str = "s",
    keep_ratio: Ratios = 0.7,
    pruning_loc: int | Sequence[int] = (3, 6, 9),
    drop_path_rate: float = 0.0,
    scorer: Scorer = "predictor",
) -> DynamicViT:
    """DynamicViT on DeiT: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        size: ti, 256, s or b.
        keep_ratio: one ratio r (stages keep r, r^2, r^3, ... of all patches), or one per stage.
        pruning_loc: blocks before which patches are dropped, from 0; `[]` is the dense DeiT.
        drop_path_rate: stochastic depth of the last block; the authors use 0.2 for b.
        scorer: predictor, random or attention.

    Raises:
        ValueError: unknown size, impossible ratio, block or image size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    width, heads = SIZES[size]
    model = DynamicViT(
        num_classes, image_size, keep_ratio, pruning_loc, width, heads,
        drop_path_rate=drop_path_rate, scorer=scorer,
    )  # fmt: skip
    if size == "b":
        model.ratio_weight = 5.0  # the README's command; the paper says 2 everywhere
    return model


def dynamicvit_micro(
    num_classes: int,
    image_size: ImageSize,
    keep_ratio: Ratios = 0.7,
    pruning_loc: int | Sequence[int] = (2, 3, 4),
    drop_path_rate: float = 0.0,
    scorer: Scorer = "predictor",
) -> DynamicViT:
    """DynamicViT on the plain ViT of the small tracks, whose weights it can start from.

    The stages stand at a quarter, a half and three quarters of the depth, rounded, as in the
    paper's models.

    Args:
        keep_ratio: one ratio r (stages keep r, r^2, r^3 of the 64 patches), or one per stage.
        pruning_loc: blocks before which patches are dropped, from 0; `[]` is the dense network.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        scorer: predictor, random or attention.

    Raises:
        ValueError: impossible ratio, block or image size.
    """
    return DynamicViT(
        num_classes, image_size, keep_ratio, pruning_loc, embed_dim=64, num_heads=4, depth=6,
        patch_size=4, mlp_ratio=3.0, drop_path_rate=drop_path_rate, scorer=scorer, xavier=True,
    )  # fmt: skip
