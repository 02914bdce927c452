"""The blocks of a network whose images keep different numbers of tokens, in two layouts.

*Packed*: the tokens of all images stand one after the other, `(T, D)`, and no work is spent on
padding. Linear layers see one large matrix; attention and choice are done image by image, on
shapes that do not depend on the batch, so an image gets the same bits alone and in any batch where
the matrix product treats rows alike. For inference on a CPU with enough work per image.

*Padded*: `(B, M, D)` with M the longest image's count and a mask over keys. Few large operators:
for training, GPUs and small networks. With fixed shapes (M from the limits alone) it can be
exported, compiled and captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from reproductions.ats.sampling import first_places


@dataclass(frozen=True)
class Stage:
    """What a sampling block does.

    Attributes:
        limit: samples drawn, so the most patches an image may keep.
        score: `(row (..., H, N), values (..., H, N, d)) -> (..., N)`.
        choose: `(scores (..., N), limit) -> bool (..., N)`.
        prefix: tokens in front that are always kept, the class token first.
    """

    limit: int
    score: Callable[[Tensor, Tensor], Tensor]
    choose: Callable[[Tensor, int], Tensor]
    prefix: int

    def hits(self, q: Tensor, k: Tensor, v: Tensor, alive: Tensor | None = None) -> Tensor:
        """Which tokens stay: bool `(..., N)` for heads `(..., H, N, d)`.

        Only the class token's row of the attention is computed, in float32. Choices are piecewise
        constant in the weights, so nothing here has a gradient.
        """
        with torch.no_grad():
            logits = (q[..., :1, :] * q.shape[-1] ** -0.5 @ k.mT).float()
            if alive is not None:
                logits = logits.masked_fill(~alive[:, None, None], -torch.inf)
            row = logits.softmax(-1)[..., 0, self.prefix :]
            scores = self.score(row, v[..., self.prefix :, :].float())
            return F.pad(self.choose(scores, self.limit), (self.prefix, 0), value=True)


def split_heads(attn: nn.Module, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(..., H, N, d)` from `(..., N, 3 H d)`."""
    parts = qkv.unflatten(-1, (3, attn.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
    q, k, v = parts.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def joined(heads: Tensor) -> Tensor:
    """Heads `(..., H, N, d)` side by side, `(..., N, H d)`; no copy where they were split off."""
    return heads.transpose(-3, -2).flatten(-2)


def take_rows(x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Tokens of `x` `(B, N, C)` at the places `rows` `(B M,)` of all its tokens in one row, as
    `(*shape, C)` with `shape` (B, M); copied row by row."""
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, shape)


def finish_block(block: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    """From what attention gathered `(..., M, H d)` and the tokens it is for to the block's output.

    The first dimension must be images where the block drops paths.
    """
    attn = block.attn
    out = attn.proj_drop(attn.proj(attn.norm(mixed) if hasattr(attn, "norm") else mixed))
    x = x + block.drop_path1(block.ls1(out))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _dropout(attn: nn.Module) -> float:
    return attn.attn_drop.p if attn.training else 0.0


# --- packed ----------------------------------------------------------------------------------


def run_packed(
    blocks: Sequence[nn.Module], stages: Sequence[Stage | None], x: Tensor, trace: list | None
) -> tuple[Tensor, list[int]]:
    """The blocks from the first sampling one on, in evaluation.

    Args:
        x: `(B, N, D)`.
        trace: gets, for each stage, the positions `(B, K)` in `x` of the kept tokens, -1 where an
            image has fewer.

    Returns:
        Packed tokens `(T, D)` and how many each image has.
    """
    lengths = [x.shape[1]] * len(x)
    origins = [torch.arange(x.shape[1], device=x.device)] * len(x)
    x = x.flatten(0, 1)
    for block, stage in zip(blocks, stages, strict=True):
        attn = block.attn
        mixed, kept = [], []
        for part in attn.qkv(block.norm1(x)).split(lengths):
            q, k, v = split_heads(attn, part)
            if stage is not None:
                kept.append(stage.hits(q, k, v).nonzero()[:, 0])
                q = joined(q).index_select(0, kept[-1]).unflatten(1, (attn.num_heads, -1))
                q = q.transpose(0, 1)
            mixed.append(joined(F.scaled_dot_product_attention(q[None], k[None], v[None])[0]))
        if stage is not None:
            starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
            rows = [one + start for one, start in zip(kept, starts, strict=True)]
            x = x.index_select(0, torch.cat(rows))
            lengths = [len(one) for one in kept]
            if trace is not None:
                origins = [have[one] for have, one in zip(origins, kept, strict=True)]
                trace.append(pad_sequence(origins, batch_first=True, padding_value=-1))
        x = finish_block(block, x, torch.cat(mixed))
    return x, lengths


def unpack(x: Tensor, lengths: list[int]) -> Tensor:
    """Packed tokens `(T, D)` as `(B, M, D)`, zeros behind the shorter images."""
    if len(set(lengths)) == 1:
        return x.unflatten(0, (len(lengths), -1))
    return pad_sequence(list(x.split(lengths)), batch_first=True)


# --- padded ----------------------------------------------------------------------------------


def run_padded(
    blocks: Sequence[nn.Module],
    stages: Sequence[Stage | None],
    x: Tensor,
    trace: list | None,
    fixed: bool = False,
) -> Tensor:
    """The blocks from the first sampling one on; arguments and trace as in `run_packed`.

    Args:
        fixed: shapes may not depend on the values: lengths are those of the limits.

    Returns:
        `(B, M, D)`; what stands behind an image's own tokens has no meaning.
    """
    alive: Tensor | None = None
    firsts = torch.arange(len(x), device=x.device)[:, None]
    origin = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    for block, stage in zip(blocks, stages, strict=True):
        attn = block.attn
        q, k, v = split_heads(attn, attn.qkv(block.norm1(x)))
        mask = None if alive is None else alive[:, None, None]
        if stage is not None:
            hits = stage.hits(q, k, v, alive)
            counts = hits.sum(1)
            longest = min(stage.limit + stage.prefix, x.shape[1]) if fixed else int(counts.max())
            index = first_places(hits, longest)
            alive = torch.arange(longest, device=x.device) < counts[:, None]
            rows = (index + firsts * x.shape[1]).flatten()
            q = take_rows(joined(q), rows, index.shape)
            q = q.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            x = take_rows(x, rows, index.shape)
            if trace is not None:
                origin = origin.gather(1, index)
                trace.append(origin.where(alive, -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=_dropout(attn))
        x = finish_block(block, x, joined(out))
    return x
