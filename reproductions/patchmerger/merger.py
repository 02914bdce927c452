"""The PatchMerger: M learned queries read N tokens and leave M."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchMerger(nn.Module):
    """Merge tokens into `num_outputs` weighted means of all of them.

    The paper's formula is `softmax(W X^T) X`, with the softmax over the inputs: no bias, no
    projections, values that are the inputs themselves. Both public implementations normalise the
    tokens first, and the scores as well as the values are those of the normalised tokens; the one
    for plain ViTs also scales the scores. `norm` and `scale` choose between the three.

    There is one head, no residual and no randomness; any number of tokens may come in. Each output
    lies in the convex hull of the (normalised) tokens.

    Args:
        dim: width of the tokens.
        num_outputs: how many tokens leave, M; may exceed the number that come in.
        num_prefix_tokens: the first tokens (class token, registers) that pass by untouched.
        norm: whether a layer norm comes first (official code: none; both ports have it).
        scale: whether scores are multiplied by `dim ** -0.5`.
        init_std: of the queries. By default such that scores of normalised tokens start with a
            standard deviation of 1: `1` if they are scaled, else `dim ** -0.5`. Unscaled scores of
            queries with standard deviation 1 have one of `dim ** 0.5`, and their softmax is
            nearly a choice of one token, through which hardly any gradient flows.

    Raises:
        ValueError: fewer than one output, not a whole number, or a negative `init_std`.
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int = 8,
        num_prefix_tokens: int = 0,
        norm: bool = True,
        scale: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_outputs, int) or isinstance(num_outputs, bool) or num_outputs < 1:
            raise ValueError(
                f"a merger gives a whole number of tokens, at least 1, not {num_outputs!r}"
            )
        if init_std is not None and not init_std >= 0:
            raise ValueError(f"init_std must not be negative, not {init_std}")
        self.num_prefix_tokens = num_prefix_tokens
        self.scale = dim**-0.5 if scale else 1.0
        self.init_std = init_std if init_std is not None else 1.0 if scale else dim**-0.5
        self.queries = nn.Parameter(torch.empty(num_outputs, dim))
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.register_buffer("gain", None)  # both set by deploy_
        self.register_buffer("shift", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries anew."""
        nn.init.normal_(self.queries, std=self.init_std)

    @property
    def num_outputs(self) -> int:
        """Merged tokens that leave, M."""
        return len(self.queries)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, P + N, C) -> (B, P + M, C)` with P prefix tokens."""
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        tokens = self.norm(tokens)[:, None]  # one head
        queries = self.queries.expand(len(x), 1, -1, -1)
        merged = F.scaled_dot_product_attention(queries, tokens, tokens, scale=self.scale)[:, 0]
        if self.gain is not None:
            merged = torch.addcmul(self.shift, merged, self.gain)
        return torch.cat((prefix, merged), dim=1) if self.num_prefix_tokens else merged

    def assignment(self, x: Tensor) -> Tensor:
        """The mixing weights `(B, M, N)` of tokens `(B, P + N, C)`; each output's sum to 1."""
        tokens = self.norm(x[:, self.num_prefix_tokens :])
        return (self.queries @ tokens.transpose(-2, -1) * self.scale).softmax(dim=-1)

    @torch.no_grad()
    def deploy_(self) -> None:
        """Move the norm's gain and shift behind the mixing, from N tokens to M.

        A softmax ignores what is added to all its inputs, so the shift leaves the scores, and the
        gain moves into the queries. The weights of an output sum to 1, so gain and shift of the
        values may wait until they are mixed.
        """
        if not isinstance(self.norm, nn.LayerNorm) or self.gain is not None:
            return
        self.gain, self.shift = self.norm.weight.detach(), self.norm.bias.detach()
        self.queries = nn.Parameter(self.queries * self.gain, requires_grad=False)
        self.norm = nn.LayerNorm(
            self.norm.normalized_shape, eps=self.norm.eps, elementwise_affine=False
        )

    def extra_repr(self) -> str:
        return f"num_outputs={self.num_outputs}, scale={self.scale:.4g}"
