"""Peak memory above the idle process: of inference, and of one training step.

The peak is the weights, counted exactly, and what the work adds to them. On CPU that is the growth
of anonymous resident memory between "model loaded" and the highest mark (`VmHWM`); pages of
libraries that are mapped meanwhile belong to files, not to the model, and are taken off. On CUDA it
is the growth of the allocator's peak. Each measurement wants a process of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ReplivitError
from harness.measurement.allocator import return_free_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. `exact_peak` is False where the peak could not be reset: it is then an upper bound."""

    weights: int
    work: int
    exact_peak: bool
    method: str

    @property
    def peak(self) -> int:
        """What the process needs beyond an idle one."""
        return self.weights + self.work

    def detail(self) -> dict[str, Any]:
        """What a record keeps beside the value."""
        return {key: value for key, value in asdict(self).items() if key != "method"}


def _resident() -> dict[str, int]:
    """`VmHWM`, `VmRSS` and `RssFile` of this process in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError as error:
        raise ReplivitError(
            "resident memory is read from /proc, which this system lacks"
        ) from error
    rows = (line.split() for line in lines)
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}


def _reset_peak() -> bool:
    """Set `VmHWM` back to the present size; False where the system does not allow it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _touch_libraries(training: bool) -> None:
    """Run a few small operators, so that one-time tables and pools are not charged to a model."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 16, 3, groups=16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16),
    )  # fmt: skip
    with torch.set_grad_enabled(training):
        tokens = net(torch.zeros(2, 3, 16, 16)).view(1, 1, 2, 16)
        loss = F.scaled_dot_product_attention(tokens, tokens, tokens).square().mean()
    if training:
        loss.backward()
        torch.optim.AdamW(net.parameters()).step()


def measure_peak(work: Callable[[], object], model: nn.Module, device: str) -> MemoryUse:
    """Peak memory of `model` and `work()` above a process that holds neither."""
    import torch

    weights = sum(
        one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers())
    )
    gc.collect()
    return_free_memory()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return MemoryUse(weights, peak, True, "weights + peak allocated above them")
    exact = _reset_peak()
    before = _resident()
    work()
    after = _resident()
    mapped = max(after.get("RssFile", 0) - before.get("RssFile", 0), 0)
    peak = max(after["VmHWM"] - before["VmRSS"] - mapped, 0)
    return MemoryUse(weights, peak, exact, "weights + peak resident above them")


def inference_memory(
    model: nn.Module, images: list[torch.Tensor], run: Callable, device: str = "cpu"
) -> MemoryUse:
    """Peak of forward passes without gradients, one per batch of `images` (B, 3, H, W).

    Args:
        run: what is called, where a backend wraps the model; `model` itself for eager.
    """
    import torch

    def work() -> None:
        with torch.inference_mode():
            for one in images:
                run(one)

    _touch_libraries(training=False)
    return measure_peak(work, model, device)


def _loss(output: Any) -> torch.Tensor:
    """Cross-entropy of logits `(B, num_classes)`, summed over heads where there are several.

    Of an answer with a part called `logits`, that part.
    """
    import torch
    from torch.nn import functional as F

    output = getattr(output, "logits", output)
    heads = output if isinstance(output, tuple | list) else (output,)
    classes = [torch.arange(len(one), device=one.device) % one.shape[-1] for one in heads]
    return sum(F.cross_entropy(one.float(), y) for one, y in zip(heads, classes, strict=True))


def training_memory(model: nn.Module, images: list[torch.Tensor], device: str = "cpu") -> MemoryUse:
    """Peak of a training step: forward, cross-entropy, backward, AdamW.

    Two steps run: from the second on the optimizer's state is there during the forward pass,
    as in every later step of a training. The model's weights change.

    Raises:
        ReplivitError: a batch too small for batch normalisation.
    """
    import torch

    model = model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def work() -> None:
        for one in images[:2]:
            _loss(model(one)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    _touch_libraries(training=True)
    try:
        return measure_peak(work, model, device)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ReplivitError(
            "batch normalisation cannot train on one value per channel; use a larger batch"
        ) from error
