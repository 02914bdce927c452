"""The duplication task: sequences `0w0w`, and a model that learns to copy (Sec. 4, Table 2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.environment import home
from harness.errors import ReplivitError
from harness.state_dicts import read_state_dict, save_weights
from reproductions.reformer.language_model import ReformerLM
from reproductions.reformer.rules import get_rules

#: Between checkpoints of a run that may be stopped.
STEPS_PER_CHECKPOINT = 500


@dataclass(frozen=True)
class Task:
    """Size of the task and of its one-layer model.

    Attributes:
        symbols, length: N symbols; 0w0w has `length` tokens, |w| = length / 2 - 1.
        dim, num_heads, hidden: of the model.
        chunk, num_buckets: of LSH attention.
        positions: "learned" or "sinusoidal".
        rules: which published form of LSH attention.
        batch_size, lr, warmup: of Adam.
        steps: of training with full attention, 1, 2, 4 and 8 rounds.
    """

    symbols: int = 63
    length: int = 128
    dim: int = 64
    num_heads: int = 4
    hidden: int = 64
    chunk: int = 16
    num_buckets: int = 16
    positions: str = "learned"
    rules: str = "paper"
    batch_size: int = 16
    lr: float = 2e-3
    warmup: int = 200
    steps: tuple[int, int, int, int, int] = (1500, 8000, 5000, 2500, 2500)

    def steps_of(self, rounds: int | None) -> int:
        """Training steps with full attention (None), 1, 2, 4 or 8 rounds."""
        return dict(zip((None, 1, 2, 4, 8), self.steps, strict=True))[rounds]


def draw(task: Task, count: int, seed: int) -> Tensor:
    """Sequences `0w0w`: `(count, length)`, w uniform over the symbols."""
    generator = torch.Generator().manual_seed(seed)
    word = torch.randint(1, task.symbols + 1, (count, task.length // 2 - 1), generator=generator)
    half = torch.cat([torch.zeros(count, 1, dtype=torch.long), word], 1)
    return torch.cat([half, half], 1)


def targets_of(tokens: Tensor) -> Tensor:
    """The next token where it can be known: symbols of the second half; -100 elsewhere."""
    half = tokens.shape[1] // 2
    targets = torch.full_like(tokens, -100)
    targets[:, half:-1] = tokens[:, half + 1 :]
    return targets


def build(task: Task, rounds: int | None, rotation_seed: int = 0) -> ReformerLM:
    """One layer with full attention (None) or so many rounds; weights fit all of them alike."""
    return ReformerLM(
        task.symbols + 1, task.dim, task.num_heads, layers=("full" if rounds is None else "lsh",),
        max_length=task.length, hidden=task.hidden, positions=task.positions, chunk=task.chunk,
        num_buckets=task.num_buckets, rounds=rounds or 1, rules=get_rules(task.rules),
        reversible=False, rotation_seed=rotation_seed,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A trained model and where its weights are.

    Attributes:
        loss: mean of the last 20 steps.
    """

    state: dict[str, Tensor]
    path: Path
    loss: float


def run_path(task: Task, rounds: int | None, seed: int) -> Path:
    """Where a run's weights lie: the name says task, row and seed."""
    mark = hashlib.sha256(json.dumps(asdict(task), sort_keys=True).encode()).hexdigest()[:10]
    row = "full" if rounds is None else f"lsh{rounds}"
    return home() / "runs" / "reformer_duplication" / mark / f"{row}-seed{seed}.safetensors"


def train(
    task: Task, rounds: int | None, seed: int, device: str = "cpu", quiet: bool = True
) -> Run:
    """Train one row of the table, or find it trained; a stopped run goes on where it was.

    Data and rotations of a step are decided by seed and step alone, so that a run that was stopped
    ends as one that was not.

    Raises:
        ReplivitError: the loss is no number any more; the last checkpoint stays.
    """
    path, total = run_path(task, rounds, seed), task.steps_of(rounds)
    if path.is_file():
        state = read_state_dict(path)
        loss = float(state.pop("loss"))
        return Run(state, path, loss)
    torch.manual_seed(seed)
    model = build(task, rounds).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / task.warmup)
    )
    first, recent, partial = 0, [], path.with_suffix(".partial.pt")
    if partial.is_file():
        saved = torch.load(partial, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["step"]
    for step in range(first, total):
        torch.manual_seed(1_000_003 * seed + step)
        tokens = draw(task, task.batch_size, 1_000_003 * seed + step).to(device)
        loss = model.loss(tokens, targets_of(tokens))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        recent = [*recent[-19:], loss.detach()]
        last = step + 1 == total
        pause = (step + 1) % STEPS_PER_CHECKPOINT == 0 or last
        if pause and not loss.isfinite():
            raise ReplivitError(f"{path.stem}: the loss is {loss.item()} at step {step + 1}")
        if pause and not last:
            _save_partial(partial, model, optimizer, scheduler, step + 1)
            if not quiet:
                print(f"{path.stem}: step {step + 1} of {total}, loss {loss.item():.3f}")
    mean = torch.stack(recent).mean().cpu()
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    save_weights({**state, "loss": mean}, path, metadata={"task": json.dumps(asdict(task))})
    partial.unlink(missing_ok=True)
    return Run(state, path, float(mean))


def _save_partial(path: Path, model, optimizer, scheduler, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    torch.save(
        {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(), "step": step,
        },
        whole,
    )  # fmt: skip
    whole.replace(path)


@torch.no_grad()
def accuracy(
    task: Task,
    state: dict[str, Tensor],
    rounds: int | None,
    sequences: int,
    rotation_seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
) -> tuple[float, int]:
    """Share of the second half's symbols that are predicted right, and how many were asked.

    Args:
        rounds: of evaluation; None for full attention.
        rotation_seeds: of the rotations; the mean over them (full attention has none).
    """
    right = asked = 0
    for seed in rotation_seeds if rounds is not None else (0,):
        model = build(task, rounds, rotation_seed=seed).to(device).eval()
        model.load_state_dict(state)
        for tokens in draw(task, sequences, seed=2**40).to(device).split(task.batch_size):
            targets = targets_of(tokens)
            counted = targets >= 0
            right += int((model(tokens).argmax(-1) == targets)[counted].sum())
            asked += int(counted.sum())
    return right / asked, asked
