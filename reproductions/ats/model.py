"""Adaptive token sampling in any timm vision transformer that has a class token.

`insert_ats` changes a model in place: same weights, same names, and at the chosen blocks the
attention keeps only the queries that were sampled (Sec. 3.2). Keys and values of that block are
still those of all tokens; from the next block on the others are gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from harness import build
from reproductions.ats import released
from reproductions.ats.layouts import Stage, run_packed, run_padded, unpack
from reproductions.ats.sampling import (
    sampled,
    sampled_by_tokenreduction,
    significance,
    significance_by_head,
    top_scores,
)

#: mode -> (score, choice) of the modes that share the two layouts.
CHOICES = {
    "paper": (significance, sampled),
    "tokenreduction": (significance_by_head, sampled_by_tokenreduction),
    "topk": (significance, top_scores),
}
MODES = (*CHOICES, "released", "released_keepshape")
LAYOUTS = ("auto", "packed", "padded")
#: Tokens times width squared from which an image is worth a loop of its own (measured; DeiT-Ti has
#: 7.3 million, `vit_micro` 0.3).
PACK_FROM = 2**22

Tokens = int | float | Sequence[int | float]


@dataclass(frozen=True)
class Settings:
    """How a model samples.

    Attributes:
        mode: of `MODES`.
        limits: for each sampling block the number of samples: at most so many patches stay.
        layout: `packed`, `padded`, or `auto` (see `layouts`).
    """

    mode: str
    limits: dict[int, int]
    layout: str = "auto"


class _AdaptiveTokens:
    """What sampling changes in a timm vision transformer; `insert_ats` puts it in front."""

    ats: Settings

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, num_classes)`."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens `(B, M, D)`: the prefix, then the M patches that the longest image
        keeps. Behind an image's own tokens stands nothing of meaning."""
        return self._tokens(images, None)

    def forward_with_tokens(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and for each stage which patches are left after it.

        Returns:
            Logits `(B, num_classes)`, and per stage a tensor `(B, K)` of patch positions in the
            order of the sequence, -1 behind those of images that keep fewer than K.
        """
        trace: list[Tensor] = []
        logits = self.forward_head(self._tokens(images, trace))
        patches = [positions[:, self.num_prefix_tokens :] for positions in trace]
        return logits, [
            torch.where(one < 0, -1, one - self.num_prefix_tokens) for one in patches
        ]  # fmt: skip

    def _tokens(self, images: Tensor, trace: list | None) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))
        if self.ats.mode not in CHOICES:
            return self.norm(self._released(x, trace))
        first = min(self.ats.limits)
        for block in self.blocks[:first]:
            x = block(x)
        blocks = list(self.blocks)[first:]
        score, choose = CHOICES[self.ats.mode]
        stages = [
            Stage(self.ats.limits[index], score, choose, self.num_prefix_tokens)
            if index in self.ats.limits
            else None
            for index in range(first, len(self.blocks))
        ]
        fixed = _shapes_must_be_fixed(x)
        if not fixed and self._packs(x):
            x, lengths = run_packed(blocks, stages, x, trace)
            return unpack(self.norm(x), lengths)
        return self.norm(run_padded(blocks, stages, x, trace, fixed))

    def _packs(self, x: Tensor) -> bool:
        if self.training or self.ats.layout != "auto":
            return not self.training and self.ats.layout == "packed"
        return x.device.type == "cpu" and x.shape[1] * x.shape[2] ** 2 >= PACK_FROM

    def _released(self, x: Tensor, trace: list | None) -> Tensor:
        policy, points = x.new_ones(x.shape[:2]), x.shape[1] - 1
        drop = self.ats.mode == "released"
        origin = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        for index, block in enumerate(self.blocks):
            if index not in self.ats.limits:
                x = released.plain_block(block, x, policy)
                continue
            x, policy, kept = released.sampling_block(block, x, policy, points, drop)
            if trace is not None:
                origin = origin.gather(1, kept)
                trace.append(origin.where(policy > 0, -1))
        return x


class AtsVisionTransformer(_AdaptiveTokens, VisionTransformer):
    """A `VisionTransformer` that samples its tokens."""


class AtsVisionTransformerDistilled(_AdaptiveTokens, VisionTransformerDistilled):
    """A distilled DeiT that samples its tokens; the distillation token always stays."""


_CLASSES = {
    VisionTransformer: AtsVisionTransformer,
    VisionTransformerDistilled: AtsVisionTransformerDistilled,
    AtsVisionTransformer: AtsVisionTransformer,
    AtsVisionTransformerDistilled: AtsVisionTransformerDistilled,
}


def insert_ats(
    model: VisionTransformer,
    stages: int | Sequence[int] | None = None,
    tokens: Tokens = 1.0,
    mode: str = "paper",
    layout: str = "auto",
) -> VisionTransformer:
    """Let a timm vision transformer sample its tokens; changed in place and returned.

    Args:
        model: with a class token that it classifies by, and ordinary pre-norm blocks. One that
            samples already gets the new settings.
        stages: blocks that sample, from 0; default from a quarter of the depth on (3 to 11).
        tokens: the limit of each stage, or of all: samples drawn, so at most so many patches stay.
            Integers count; fractions in (0, 1] are of the image's patches. `tokenreduction` reads
            one fraction r as its own rule, int(r^s * patches) + 1 in stage s.
        mode: `paper`; `tokenreduction`, a second implementation's choice; `topk`, the rival that
            keeps the best `tokens` by the same score; `released` and `released_keepshape`, the
            authors' code with and without dropping, where an image's result depends on its batch.
        layout: `packed`, `padded` or `auto`; how unequal images are computed (`layouts`).

    Raises:
        ValueError: what cannot be; the message names the limit.
    """
    _check_model(model)
    if mode not in MODES:
        raise ValueError(f"no ATS mode {mode!r}; there are {', '.join(MODES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    depth, patches = len(model.blocks), model.patch_embed.num_patches
    if stages is None:
        stages = range(-(-depth // 4), depth)
    stages = _checked_stages(stages, depth)
    limits = _limits(tokens, stages, patches, mode)
    if mode not in CHOICES and (model.num_prefix_tokens != 1 or set(limits.values()) != {patches}):
        raise ValueError(
            f"the released code runs with one class token and its limit at all {patches} patches "
            "only; for fewer take mode 'paper'"
        )
    model.__class__ = _CLASSES[type(model)]
    model.ats = Settings(mode, limits, layout)
    return model


def ats(
    num_classes: int,
    image_size: int | tuple[int, int],
    base: str,
    stages: int | Sequence[int] | None = None,
    tokens: Tokens = 1.0,
    mode: str = "paper",
    layout: str = "auto",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """A variant that is a timm vision transformer, with ATS in it: `(B, 3, H, W) -> (B, classes)`.

    Args:
        base: the variant, e.g. `deit_s`; its weights fit under the same names.
        stages, tokens, mode, layout: as in `insert_ats`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: the base is no such transformer, or a setting is impossible.
    """
    options: dict[str, Any] = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    return insert_ats(build(base, num_classes, image_size, **options), stages, tokens, mode, layout)


# --- checks ----------------------------------------------------------------------------------


def _check_model(model: VisionTransformer) -> None:
    name = type(model).__name__
    if type(model) not in _CLASSES:
        raise ValueError(f"ATS goes into timm's VisionTransformer, not into {name}")
    if not model.has_class_token or model.global_pool != "token":
        raise ValueError(
            "ATS scores patches by the class token's attention: the model needs a class token and "
            f"must classify by it (class token: {model.has_class_token}, pooling: "
            f"{model.global_pool!r})"
        )
    for block in model.blocks:
        if type(block) is not Block or not hasattr(block.attn, "qkv"):
            raise ValueError(
                f"ATS goes into timm's pre-norm Block, not into {type(block).__name__}"
            )
        if getattr(block.attn, "gate", None) is not None:
            raise ValueError("ATS does not go into gated attention")


def _checked_stages(stages: int | Sequence[int], depth: int) -> list[int]:
    given = list(stages) if isinstance(stages, Iterable) else [stages]
    for stage in given:
        if not _is_whole(stage) or not 0 <= stage < depth:
            raise ValueError(f"there is no block {stage!r}: stages are 0 to {depth - 1}")
    if len(set(given)) != len(given) or not given:
        raise ValueError(f"stages must be different blocks, at least one, not {given}")
    return [int(stage) for stage in given]


def _limits(tokens: Tokens, stages: list[int], patches: int, mode: str) -> dict[int, int]:
    """The limit of every stage in samples; stages and their limits come in the same order, the
    answer is in that of the network."""
    single = not isinstance(tokens, Iterable) or isinstance(tokens, str)
    given = [tokens] * len(stages) if single else list(tokens)
    if len(given) != len(stages):
        raise ValueError(f"{len(given)} token limits for {len(stages)} stages")
    if mode == "tokenreduction" and single and not _is_whole(tokens):
        stages, most = sorted(stages), patches + 1
        limits = [int(_ratio(tokens) ** (1 + place) * patches) + 1 for place in range(len(stages))]
    else:
        limits = [
            int(one) if _is_whole(one) else max(1, round(_ratio(one) * patches)) for one in given
        ]
        most = patches
    for limit in limits:
        if not 1 <= limit <= most:
            raise ValueError(f"tokens must be 1 to {patches}, the image's patches, not {limit}")
    if mode == "tokenreduction" and min(limits) < 2:
        raise ValueError(
            "mode 'tokenreduction' draws one sample less than its limit: tokens must leave every "
            f"stage a limit of at least 2, not {limits}"
        )
    return dict(sorted(zip(stages, limits, strict=True)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _ratio(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ValueError(f"a fraction of the tokens lies in (0, 1], not {value!r}")
    return float(value)


def _shapes_must_be_fixed(x: Tensor) -> bool:
    """Whether the number of kept tokens cannot be asked for: traced, captured, or no values."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or x.is_meta or capturing
