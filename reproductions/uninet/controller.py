"""The controller: a small recurrent network that makes the decisions of a network one by one.

It is trained by policy gradient, clipped as in PPO, to make decisions of high reward likely. Our
reconstruction: the paper says "reinforcement learning", and its code has no search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Controller(nn.Module):
    """An LSTM cell that is fed its own last choice; every decision has a softmax of its own.

    It starts uniform: the heads begin at zero.

    Args:
        choices: how many options each decision has.
    """

    def __init__(self, choices: tuple[int, ...], hidden: int = 64) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(hidden))
        self.cell = nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, count) for count in choices)
        self.embeddings = nn.ModuleList(nn.Embedding(count, hidden) for count in choices)
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(
        self, count: int = 1, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decide anew, or look at decisions that were made.

        Args:
            count: networks to draw.
            chosen: decisions `(n, D)` to look at instead.

        Returns:
            Decisions `(n, D)`; the logarithm of each one's probability, given those before it; and
            the entropy of what it was drawn from, both `(n, D)`.
        """
        count = count if chosen is None else len(chosen)
        x, state, made = self.start.expand(count, -1), None, []
        log_probs, entropies = [], []
        for index, (head, embedding) in enumerate(zip(self.heads, self.embeddings, strict=True)):
            state = self.cell(x, state)
            log_p = head(state[0]).log_softmax(-1)
            drawn = torch.multinomial(log_p.exp(), 1)[:, 0] if chosen is None else None
            choice = chosen[:, index] if drawn is None else drawn
            made.append(choice)
            log_probs.append(log_p.gather(1, choice[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            x = embedding(choice)
        return torch.stack(made, 1), torch.stack(log_probs, 1), torch.stack(entropies, 1)


#: So many deviations of a batch from the baseline, and its own spread is no scale.
MOST_DEVIATIONS = 100


@dataclass(frozen=True)
class PPO:
    """How a controller learns from a batch of rewards.

    Attributes:
        lr: of Adam.
        steps: passes over each batch.
        clip: how far the probability of a decision may move from where it was drawn, as a part.
        entropy: weight of the bonus that keeps decisions open.
        baseline_decay: of the moving average of rewards that a reward is compared with.
    """

    lr: float = 0.03
    steps: int = 4
    clip: float = 0.2
    entropy: float = 0.05
    baseline_decay: float = 0.8


class Learner:
    """A controller with its optimizer and baseline: `draw`, look at rewards, `learn`."""

    def __init__(self, choices: tuple[int, ...], settings: PPO, seed: int) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.controller = Controller(choices)
            self._random = torch.get_rng_state()
        self.settings = settings
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=settings.lr)
        self.baseline: float | None = None

    @torch.no_grad()
    def draw(self, count: int) -> Tensor:
        """Decisions of `count` networks, `(count, D)`, from random numbers of its own."""
        with torch.random.fork_rng(devices=()):
            torch.set_rng_state(self._random)
            made, _, _ = self.controller(count)
            self._random = torch.get_rng_state()
        return made

    def learn(self, made: Tensor, rewards: Tensor) -> float:
        """One PPO update.

        Args:
            made: decisions `(n, D)` as they were just drawn.
            rewards: of the networks, `(n,)`.

        Returns:
            The mean entropy of a decision before the update, in nats.
        """
        mean = float(rewards.mean())
        self.baseline = mean if self.baseline is None else self.baseline
        # a fixed scale would need to know the rewards' size beforehand
        distance, spread = rewards - self.baseline, rewards.std(unbiased=False) + 1e-8
        # networks that are all but alike tell a direction and no size: one step of 1e9 deviations
        # would leave Adam's averages so large that nothing is learnt afterwards
        tied = distance.abs().max() > MOST_DEVIATIONS * spread
        advantage = distance.sign() if tied else distance / spread
        decay = self.settings.baseline_decay
        self.baseline = decay * self.baseline + (1 - decay) * mean
        with torch.no_grad():
            _, before, entropy = self.controller(chosen=made)
        for _ in range(self.settings.steps):
            _, log_probs, entropies = self.controller(chosen=made)
            ratio = (log_probs - before).exp()
            clipped = ratio.clamp(1 - self.settings.clip, 1 + self.settings.clip)
            gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
            loss = -gain.sum(1).mean() - self.settings.entropy * entropies.sum(1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return float(entropy.mean())
