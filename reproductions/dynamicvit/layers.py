"""Transformer blocks with a training form, where dropped tokens are masked, and an evaluation
form, where they are gone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from harness.linear import linear

EPS = 1e-6  # of the masked softmax


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens `(B, K, C)` at `index` `(B, K)` of `(B, N, C)`."""
    batch, count, width = tokens.shape
    first = torch.arange(batch, device=index.device).unsqueeze(1) * count
    # whole rows of one flat table: several times faster than gather, which copies numbers singly
    rows = tokens.reshape(-1, width).index_select(0, (index + first).flatten())
    return rows.view(batch, index.shape[1], width)


class _MaskedAttention(torch.autograd.Function):
    """See `masked_attention`. Written out, since autograd would pass over the (N, N) matrix several
    times more for the diagonal, the maximum and the mask."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        q, keep = q * q.shape[-1] ** -0.5, keep[:, None, :, None]
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        values = F.pad(v, (0, 1), value=1.0)
        floor = EPS * weights.amax(dim=-1, keepdim=True)
        own = weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * (1 - keep)
        mixed = weights @ (values * keep) + own * values + floor * values.mean(2, keepdim=True)
        out = mixed[..., :-1] / mixed[..., -1:]
        ctx.save_for_backward(q, k, values, keep, weights, out, mixed[..., -1:])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, values, keep, weights, out, normaliser = ctx.saved_tensors
        grad = grad / normaliser
        grad = torch.cat([grad, -(grad * out).sum(-1, keepdim=True)], dim=-1)  # of `mixed`
        own = weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        top = weights.argmax(dim=-1, keepdim=True)
        floor = EPS * weights.gather(-1, top)
        at_self = (grad * values).sum(-1, keepdim=True)  # gradient of a_ii without its keep_i
        at_top = EPS * (grad * values.mean(2, keepdim=True)).sum(-1, keepdim=True)

        mixed = weights.transpose(-2, -1) @ grad  # gradient of keep V'
        d_keep = ((mixed * values).sum(-1, keepdim=True) - own * at_self).sum(1)
        d_values = mixed * keep + own * (1 - keep) * grad
        d_values = d_values + (floor * grad).mean(2, keepdim=True)

        d_weights = grad @ (values * keep).transpose(-2, -1)
        d_weights.diagonal(dim1=-2, dim2=-1).add_(((1 - keep) * at_self).squeeze(-1))
        d_weights.scatter_add_(-1, top, at_top)
        d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_q = (d_logits @ k) * q.shape[-1] ** -0.5
        return d_q, d_logits.transpose(-2, -1) @ q, d_values[..., :-1], d_keep.squeeze(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attention in which dropped tokens are seen by nobody but themselves.

    With E_ij = exp(P_ij - max_j P_ij) G_ij, where G_ij = keep_j, and 1 for i = j, the weights are
    (E_ij + eps / N) / (sum_j E_ij + eps); the maximum is over all keys, dropped ones too. Instead
    of passing over the (N, N) matrix for each of these steps, G moves to the values and the
    normaliser becomes one more value: with the plain softmax A, whose largest entry a_i is
    1 / sum_j exp(P_ij - max P),

        [numerator, denominator] = A (keep V') + A_ii (1 - keep_i) V'_i + eps a_i mean(V')

    gives the same quotient for V' = [V, 1]. In float32 whatever the mixed precision, since eps is
    below what half precision resolves. Gradients reach `keep`.

    Args:
        q, k, v: `(B, H, N, d)`; q is scaled by 1 / sqrt(d) here.
        keep: decisions of all tokens, class token first, `(B, N)`.

    Returns:
        `(B, H, N, d)`.
    """
    precise = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (q, k, v, keep))
    with torch.autocast(q.device.type, enabled=False):
        return _MaskedAttention.apply(*precise).to(v.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; `keep` masks tokens while training."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        """`(B, N, C)` as `(B, H, N, d)`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """`(B, N, C)` to `(B, N, C)`; `keep` as in `masked_attention`."""
        q, k, v = (self._heads(one) for one in self.qkv(x).chunk(3, dim=-1))
        if keep is None:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = masked_attention(q, k, v, keep)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _split(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weight and bias of the queries, and of keys and values together."""
        width = self.qkv.in_features
        sizes = (width, 2 * width)
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        return tuple(zip(self.qkv.weight.split(sizes), biases, strict=True))

    def first_token(self, x: Tensor) -> Tensor:
        """What `forward` gives at token 0, `(B, 1, C)`, without computing the others."""
        query, rest = self._split()
        k, v = (self._heads(one) for one in linear(x, *rest).chunk(2, dim=-1))
        q = self._heads(linear(x[:, :1], *query))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def class_attention(self, x: Tensor) -> Tensor:
        """How much the class token attends to each patch, mean over heads: `(B, N - 1)`.

        The key's projection is applied to the class token's query instead of to all tokens, which
        makes this rival of the predictor almost free. A key's bias shifts all logits of a head
        alike, and so does not count.
        """
        query, (weight, _) = self._split()
        keys = weight[: x.shape[-1]].unflatten(0, (self.num_heads, -1))
        q = self._heads(linear(x[:, :1], *query)).squeeze(2)  # (B, H, d)
        towards = torch.einsum("bhd,hdc->bhc", q, keys) * q.shape[-1] ** -0.5
        return (towards @ x.transpose(1, 2)).softmax(dim=-1).mean(dim=1)[:, 1:]


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        eps: of both layer norms.
        residual_scale: factor of both residual branches (LV-ViT: 1/2).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """`(B, N, C)` to `(B, N, C)`; `keep` as in `masked_attention`."""
        x = self._add(x, self.attn(self.norm1(x), keep))
        return self._add(x, self.mlp(self.norm2(x)))

    def first_token(self, x: Tensor) -> Tensor:
        """What `forward` gives at token 0 in evaluation, `(B, 1, C)`."""
        first = self._add(x[:, :1], self.attn.first_token(self.norm1(x)))
        return self._add(first, self.mlp(self.norm2(first)))

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + branch if self.residual_scale == 1 else x + branch * self.residual_scale

    def deploy_(self) -> None:
        """Move the residual scale into the branches' last layers."""
        for layer in (self.attn.proj, self.mlp.fc2):
            layer.weight.data = layer.weight.data * self.residual_scale
            layer.bias.data = layer.bias.data * self.residual_scale
        self.residual_scale = 1.0
