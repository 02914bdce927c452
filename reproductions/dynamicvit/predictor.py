"""Who decides which tokens stay: the prediction module, and the rules it must beat."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Scorer = Literal["predictor", "random", "attention"]
SCORERS: tuple[str, ...] = ("predictor", "random", "attention")


class Predictor(nn.Module):
    """Scores every token from its own features and from a summary of all.

    Half of the channels stay local; the other half is averaged over the tokens that are still
    alive. Column 0 of the result is *keep*, column 1 *drop* (official code: `PredictorLG`; the
    paper numbers them the other way round).

    Args:
        eps: of the layer norm: torch's default here, whatever the backbone has.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.embed = nn.Linear(dim, dim)
        self.mix = nn.Linear(dim, dim // 2)
        self.hidden = nn.Linear(dim // 2, dim // 4)
        self.out = nn.Linear(dim // 4, 2)
        self.act = nn.GELU()
        self.mix_global: nn.Linear | None = None

    def forward(self, tokens: Tensor, alive: Tensor | None = None) -> Tensor:
        """Log-probabilities of keep and drop.

        Args:
            tokens: patch tokens without the class token, `(B, N, C)`.
            alive: which of them count for the summary, `(B, N)`, values 0 and 1; default all.

        Returns:
            `(B, N, 2)`.
        """
        features = self.act(self.embed(self.norm(tokens)))
        local, shared = features.chunk(2, dim=-1)
        if alive is None:
            summary = shared.mean(dim=1, keepdim=True)
        else:
            weight = alive.unsqueeze(-1)
            # the bound only acts where no token at all is left: 0 / 0 would become NaN
            summary = (shared * weight).sum(1, True) / weight.sum(1, True).clamp(min=0.5)
        if self.mix_global is None:
            mixed = self.mix(torch.cat([local, summary.expand_as(local)], dim=-1))
        else:  # folded: the summary's part is the same for all tokens, so it is computed once
            mixed = self.mix(local) + self.mix_global(summary)
        return self.out(self.act(self.hidden(self.act(mixed)))).log_softmax(dim=-1)

    def deploy_(self) -> None:
        """Split the mixing layer into its local and its global half: a quarter fewer MACs."""
        if self.mix_global is not None:
            return
        half = self.mix.in_features // 2
        local, shared = nn.Linear(half, half), nn.Linear(half, half, bias=False)
        local.weight.data, shared.weight.data = self.mix.weight.data.clone().chunk(2, dim=1)
        local.bias.data = self.mix.bias.data
        self.mix, self.mix_global = local, shared


def straight_through(log_probs: Tensor, noise: Tensor | None = None) -> Tensor:
    """Sampled decisions, 1 = keep, with the gradient of their probability.

    Gumbel-softmax at temperature 1: the maximum of log-probabilities plus Gumbel noise is an exact
    sample, and the backward pass sees the softmax.

    Args:
        log_probs: `(B, N, 2)`, column 0 = keep.
        noise: Gumbel noise `(B, N, 2)`; drawn from torch's global generator by default.

    Returns:
        `(B, N)`, values 0 and 1 up to rounding.
    """
    if noise is None:
        noise = -torch.empty_like(log_probs).exponential_().log()
    soft = (log_probs + noise).softmax(dim=-1)
    hard = (soft[..., 0] >= soft[..., 1]).to(soft.dtype)
    return hard - soft[..., 0].detach() + soft[..., 0]


def keep_best(scores: Tensor, alive: Tensor, count: int) -> Tensor:
    """Decisions of a rule without gradient: the `count` best of what is alive, `(B, N)` of 0, 1."""
    best = scores.masked_fill(alive < 0.5, -torch.inf).topk(count, dim=1).indices
    return torch.zeros_like(alive).scatter(1, best, 1.0)


class RandomOrder(nn.Module):
    """The rival that keeps tokens at random (Table 4b): what the choice itself is worth.

    Training draws anew for every image and step. Evaluation has one fixed order for all images, so
    that a model has one accuracy and an image the same answer alone or in a batch.
    """

    def __init__(self, num_tokens: int, seed: int) -> None:
        super().__init__()
        # on the CPU whatever the default device: the order belongs to the model, not the machine
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(num_tokens, generator=generator, device="cpu").float()
        self.register_buffer("order", order, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores `(B, N)` for `(B, N, C)`."""
        batch, count, _ = tokens.shape
        if self.training:
            return torch.rand(batch, count, device=tokens.device)
        return self.order[:count].expand(batch, count)
