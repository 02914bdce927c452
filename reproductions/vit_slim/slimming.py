"""From kept sets to a smaller network: sliced layers, dropped tokens (what the release leaves out).

`slim(model, attention=0.6, mlp=0.6)` cuts rows and columns out of a searched network. Heads keep
different numbers of dimensions: heads of equal width stand side by side, and each group is one
fused attention call, so nothing is padded and nothing is computed for gates that are gone.

Dropped tokens are subtler. A masked token is not absent: its normalised input is zero, so in every
attention it still is a key and a value, both equal to the bias of `qkv`. Three modes follow:

- `exact`: m dropped tokens are gathered away, and *one* virtual token with that key and value
  stands for them, with log m added to its logit. Same outputs as the masks, fewer tokens.
- `drop`: they are gone. The cheapest, and another function: evaluate (or retrain) it as such.
- `masked`: all tokens stay and their inputs are zeroed; the reference.

Prefix tokens (class, distillation, registers) are always carried, since the head reads them. Where
their own mask is 0 they carry on with a zeroed input; in `drop`, with their own.
"""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.vision_transformer import Block, Mlp, VisionTransformer
from torch import Tensor, nn

from harness.linear import Linear, pays
from reproductions.vit_slim.masks import (
    SearchAttention,
    SearchMlp,
    check_model,
    learned_scores,
    to_numpy,
)
from reproductions.vit_slim.selection import Kept, Scores, choose

MODES = ("exact", "drop", "masked")
#: Floats whose multiples a matrix product writes fastest.
ALIGNED = 8
#: Outputs from which spreading the rows pays (measured; below it, what reads them loses more).
WIDE = 256


class SlimLinear(Linear):
    """A linear layer with any number of outputs, nearly as fast as one with an even number.

    MKL's wide matrix product takes up to half as long again where the rows of its result are not
    multiples of 32 bytes. In inference they are therefore written that far apart: same numbers,
    same work, and the result is a view. (The deployed form pads with zeros instead, which is faster
    still but more multiply-adds.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features) -> (..., out_features)`."""
        width = self.out_features
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or self.bias is None
        plain = plain or width % ALIGNED == 0 or width < WIDE
        plain = plain or x.device.type != "cpu" or x.dtype != torch.float32
        if plain or pays(x, self.weight):  # oneDNN does not mind
            return super().forward(x)
        rows = x.flatten(0, -2)
        result = rows.new_empty(len(rows), -(-width // ALIGNED) * ALIGNED)[:, :width]
        torch.addmm(self.bias, rows, self.weight.t(), out=result)
        return result.unflatten(0, x.shape[:-1])


class SlimAttention(nn.Module):
    """Attention whose heads have widths of their own, in groups of equal width.

    Rows of `qkv` are, group by group, the q, k and v of its heads.

    Args:
        attn: the attention to cut; its weights are copied.
        dims: kept dimensions of each head, bool `(H, d)`, at least one.
        dropped: tokens that a virtual one stands for; `length` are left.
    """

    def __init__(
        self, attn: nn.Module, dims: NDArray[np.bool_], length: int, dropped: int = 0
    ) -> None:
        super().__init__()
        widths = dims.sum(1)
        order = [head for head in np.argsort(-widths, kind="stable") if widths[head]]
        #: `(width, heads)` of each group
        self.groups = tuple(
            (int(width), len(list(heads)))
            for width, heads in itertools.groupby(order, key=lambda head: widths[head])
        )
        places = np.arange(dims.size).reshape(dims.shape)
        rows, columns = [], []
        for _, heads in itertools.groupby(order, key=lambda head: widths[head]):
            group = np.concatenate([places[head][dims[head]] for head in heads])
            rows += [group + part * dims.size for part in range(3)]
            columns.append(group)
        self.scale = attn.scale  # of the full width, always (official code: never rescaled)
        self.qkv = _cut(attn.qkv, rows=np.concatenate(rows))
        self.proj = _cut(attn.proj, columns=np.concatenate(columns))
        self.attn_drop, self.proj_drop = attn.attn_drop.p, copy.deepcopy(attn.proj_drop)
        logits = None
        if dropped:
            logits = self.qkv.weight.new_zeros(1, 1, 1, length + 1)
            logits[..., -1] = math.log(dropped)
        self.register_buffer("logits", logits, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C) -> (B, N, C)`."""
        qkv, length, logits = self.qkv(x), x.shape[1], self.logits
        if logits is not None:
            bias = qkv.new_zeros(qkv.shape[-1]) if self.qkv.bias is None else self.qkv.bias
            qkv = torch.cat((qkv, bias.to(qkv.dtype).expand(x.shape[0], 1, -1)), dim=1)
            logits = logits.to(qkv.dtype)
        dropout = self.attn_drop if self.training else 0.0
        mixed = []
        sizes = [3 * width * heads for width, heads in self.groups]
        qkv = qkv.narrow(-1, 0, sum(sizes))  # deployed, there are zeros behind
        for part, (width, heads) in zip(qkv.split(sizes, dim=-1), self.groups, strict=True):
            q, k, v = part.unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(
                q[:, :, :length], k, v, attn_mask=logits, dropout_p=dropout, scale=self.scale
            )
            mixed.append(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(torch.cat(mixed, dim=-1) if mixed[1:] else mixed[0]))


class BiasOnly(nn.Module):
    """What is left of an attention or an MLP that keeps nothing: the bias of its last layer."""

    def __init__(self, last: nn.Linear) -> None:
        super().__init__()
        self.bias = None if last.bias is None else nn.Parameter(last.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C) -> (B, N, C)`, the same for all tokens."""
        return torch.zeros_like(x) if self.bias is None else self.bias.to(x.dtype).expand_as(x)


class SlimBlock(Block):
    """timm's block behind a choice of tokens."""

    def choose_tokens(self, places: Tensor | None, seen: Tensor | None) -> None:
        """Let through the incoming tokens `places` `(n,)`, and multiply the branches' inputs by
        `seen` `(1, n, 1)`; None: all of them, by one."""
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C) -> (B, n, C)`."""
        if self.places is not None:
            x = x.index_select(1, self.places)
        x = x + self.drop_path1(self.ls1(self.attn(self._masked(self.norm1(x)))))
        return x + self.drop_path2(self.ls2(self.mlp(self._masked(self.norm2(x)))))

    def _masked(self, x: Tensor) -> Tensor:
        return x if self.seen is None else x * self.seen.to(x.dtype)

    @torch.no_grad()
    def deploy_(self) -> None:
        """Fill the sliced layers up with zeros to widths that matrix products like; same outputs,
        up to one percent more multiply-adds."""
        if isinstance(self.attn, SlimAttention):
            self.attn.qkv = _padded(self.attn.qkv, rows=True)
        if isinstance(self.mlp, Mlp):
            self.mlp.fc1 = _padded(self.mlp.fc1, rows=True)
            self.mlp.fc2 = _padded(self.mlp.fc2, rows=False)


def slim(
    model: VisionTransformer,
    attention: float = 0.7,
    mlp: float = 0.7,
    tokens: float = 1.0,
    *,
    mode: str = "exact",
    scores: Scores | None = None,
    token_rule: str = "released",
    soft: bool = False,
) -> VisionTransformer:
    """A smaller copy of a searched network: `(B, 3, H, W) -> (B, num_classes)`, dense.

    Its outputs are those of the masked form (`masks.compress` with the same budgets) in the modes
    `exact` and `masked`. All its weights are trainable, whatever the search froze.

    Args:
        model: searched (`make_searchable`), or any timm vision transformer if `scores` are given.
        attention, mlp, tokens: budgets in (0, 1]: the share of head dimensions, of hidden channels
            and of (layer, token) pairs to keep over the whole network.
        mode: what becomes of dropped tokens: exact, drop or masked; see above.
        scores: rank by these instead of the learned masks (`random_scores`, `magnitude_scores`).
        token_rule: as in `selection.choose`.
        soft: multiply the mask values of the dimensions and channels that are kept into the
            weights. By default a kept gate counts 1, as in the authors' code; a token always does.

    Raises:
        ValueError: a budget outside (0, 1], an unknown mode, a model without masks, or tokens
            dropped from a model whose head reads them all.
    """
    if scores is None:
        scores = learned_scores(model)
    return slim_to(model, choose(scores, attention, mlp, tokens, token_rule), mode, soft)


@torch.no_grad()
def slim_to(
    model: VisionTransformer, kept: Kept, mode: str = "exact", soft: bool = False
) -> VisionTransformer:
    """`slim` with the kept sets at hand. The copy says what it is: `.kept` and `.token_mode`.

    Raises:
        ValueError: as `slim`; or kept sets of another network.
    """
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r} for dropped tokens; there are {', '.join(MODES)}")
    searched = _is_searchable(model)
    if not searched:
        check_model(model)
        if soft:
            raise ValueError("soft slimming needs the learned masks of a searchable model")
    kept = kept.with_tokens(model.patch_embed.num_patches + model.num_prefix_tokens)
    _check_fit(model, kept, mode)
    training = model.training
    small = copy.deepcopy(model)
    carried = [_carried(one, small.num_prefix_tokens, mode) for one in kept.tokens]
    before = np.arange(len(kept.tokens[0]))
    for layer, block in enumerate(small.blocks):
        attn, hidden = block.attn, block.mlp
        if soft:
            attn.kept = hidden.kept = None  # of a compressed model: its soft masks still stand
            _multiply(attn, hidden)
        here, wanted = carried[layer], kept.tokens[layer]
        dropped = len(wanted) - len(here) if mode == "exact" else 0
        block.__class__ = SlimBlock
        if searched:
            del block.fixed_tokens
        dims, channels = kept.dims[layer], np.flatnonzero(kept.mlp[layer])
        block.attn = (
            SlimAttention(attn, dims, len(here), dropped) if dims.any() else BiasOnly(attn.proj)
        )
        block.mlp = _slim_mlp(hidden, channels)
        device = attn.qkv.weight.device
        places, seen = None, None
        if len(here) < len(before):
            places = torch.from_numpy(np.searchsorted(before, here)).to(device)
        if mode != "drop" and not wanted[here].all():
            seen = torch.from_numpy(wanted[here]).to(attn.qkv.weight).view(1, -1, 1)
        block.choose_tokens(places, seen)
        before = here
    small.kept, small.token_mode = kept, mode
    small.requires_grad_(True)
    return small.train(training)


def _is_searchable(model: nn.Module) -> bool:
    first = next(iter(getattr(model, "blocks", ())), None)
    return isinstance(getattr(first, "attn", None), SearchAttention)


def _carried(wanted: NDArray[np.bool_], prefix: int, mode: str) -> NDArray[np.int64]:
    """Positions of the tokens that a layer computes."""
    if mode == "masked":
        return np.arange(len(wanted))
    return np.flatnonzero(wanted | (np.arange(len(wanted)) < prefix))


def _check_fit(model: VisionTransformer, kept: Kept, mode: str) -> None:
    attn, fc1 = model.blocks[0].attn, model.blocks[0].mlp.fc1
    ours = (len(model.blocks), attn.num_heads, attn.head_dim, fc1.out_features)
    theirs = (len(kept.attention), *kept.heads, len(kept.mlp[0]))
    if ours != theirs:
        raise ValueError(
            "the kept sets are of another network: (layers, heads, head dimensions, channels) are "
            f"{theirs}, here {ours}"
        )
    if kept.all_tokens or mode == "masked":
        return
    if model.global_pool != "token":
        raise ValueError(
            "tokens can be dropped only where the head reads the class token alone; this model "
            f"pools by {model.global_pool!r}: take tokens=1.0 or mode='masked'"
        )
    table = np.stack(kept.tokens)
    if (table[1:] & ~table[:-1]).any():
        raise ValueError("a layer keeps tokens that a layer before it has dropped")


def _slim_mlp(mlp: nn.Module, channels: NDArray[np.int64]) -> nn.Module:
    """timm's MLP with the kept hidden channels alone."""
    if not len(channels):
        return BiasOnly(mlp.fc2)
    if isinstance(mlp, SearchMlp):
        for name in ("zeta", "kept"):
            delattr(mlp, name)
        mlp.__class__ = Mlp
    mlp.fc1 = _cut(mlp.fc1, rows=channels)
    mlp.fc2 = _cut(mlp.fc2, columns=channels)
    return mlp


def _multiply(attn: SearchAttention, mlp: SearchMlp) -> None:
    """The soft masks into the weights."""
    rows = attn.rows()
    attn.qkv.weight.mul_(rows[:, None])
    if attn.qkv.bias is not None:
        attn.qkv.bias.mul_(rows)
    mlp.fc2.weight.mul_(mlp.columns())


def _cut(
    linear: nn.Linear,
    rows: NDArray[np.int64] | None = None,
    columns: NDArray[np.int64] | None = None,
) -> nn.Linear:
    """Some outputs (rows) or inputs (columns) of a linear layer, as a layer of its own."""
    weight, bias = linear.weight, linear.bias
    for axis, chosen in enumerate((rows, columns)):
        if chosen is not None:
            weight = weight.index_select(axis, torch.from_numpy(chosen).to(weight.device))
    if bias is not None:
        bias = bias.clone() if rows is None else bias.index_select(
            0, torch.from_numpy(rows).to(bias.device)
        )  # fmt: skip
    return _linear(SlimLinear, weight.clone(), bias)


def _padded(linear: nn.Linear, rows: bool) -> nn.Linear:
    """Zeros behind the outputs (rows) or inputs of a layer, up to a multiple of `ALIGNED`."""
    weight, bias = linear.weight, linear.bias
    more = -weight.shape[0 if rows else 1] % ALIGNED
    weight = F.pad(weight, (0, 0, 0, more) if rows else (0, more))
    if bias is not None and rows:
        bias = F.pad(bias, (0, more))
    return _linear(Linear, weight, bias)


def _linear(kind: type[nn.Linear], weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


@torch.no_grad()
def magnitude_scores(model: VisionTransformer) -> Scores:
    """The rival that only looks at weights: the norm of all that belong to a gate.

    A head's dimension has three rows of `qkv` and a column of `proj`, a channel a row of `fc1` and
    a column of `fc2`. No weight belongs to a token, so tokens tie and are all kept.

    Raises:
        ValueError: a model that cannot be sliced.
    """
    if not _is_searchable(model):
        check_model(model)
    attention, mlp = [], []
    for block in model.blocks:
        attn = block.attn
        rows = attn.qkv.weight.square().sum(1).view(3, -1).sum(0)
        squares = rows + attn.proj.weight.square().sum(0)
        attention.append(to_numpy(squares.sqrt().view(attn.num_heads, attn.head_dim)))
        fc1, fc2 = block.mlp.fc1.weight, block.mlp.fc2.weight
        mlp.append(to_numpy((fc1.square().sum(1) + fc2.square().sum(0)).sqrt()))
    tokens = np.ones(model.patch_embed.num_patches + model.num_prefix_tokens)
    heads = (model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim)
    return Scores(tuple(attention), tuple(mlp), (tokens,) * len(mlp), heads)
