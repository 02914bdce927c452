"""Reversible residual layers: activations are recomputed from the outputs, not kept (Sec. 3).

    y1 = x1 + F(x2)        x2 = y2 - G(y1)
    y2 = x2 + G(y1)        x1 = y1 - F(x2)                                       (Eq. 8 and 9)

Each layer is a node of autograd that keeps none of its streams: the node behind it hands back its
outputs. Only the last pair is kept and, per layer, what cannot be computed again: bucket ids (a
vector that is recomputed differs in its last bits and might change its bucket) and the random state
before F and before G (so that dropout, stochastic depth and all that draws numbers repeat exactly).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class ReversibleBlock(nn.Module):
    """One layer: F is attention, G is feed-forward, each with its norm inside.

    Args:
        attention: `(x, valid, buckets) -> (out, buckets)`.
        feed_forward: `x -> out`, position by position. Where its `chunk_size` is not 0, forward
            and backward go through so many positions at a time.
    """

    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def forward(
        self, first: Tensor, second: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two streams `(B, L, C)` one layer on."""
        first = first + self.attention(second, valid)[0]
        return first, second + self.feed_forward(first)


@dataclass
class _Trace:
    """What the layers of one pass share on the way back.

    Attributes:
        streams: the outputs of the layer whose turn is next.
    """

    blocks: list[ReversibleBlock]
    valid: Tensor | None
    precision: tuple[str, bool, torch.dtype] | None
    streams: tuple[Tensor, Tensor] | None = None


class ReversibleStack(nn.Module):
    """Reversible layers in a row: two streams in, two streams out.

    With `reversible=False`, and where no gradient is asked for, the same layers run one after the
    other as any others; the numbers are the same.

    Args:
        blocks: must draw random numbers from torch's default generators alone, and must not
            change state of their own (batch norms would count a batch twice).
    """

    def __init__(self, blocks: Iterable[ReversibleBlock], reversible: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reversible = reversible

    def forward(
        self, first: Tensor, second: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Streams `(B, L, C)` behind the last layer.

        Args:
            valid: `(B, L)` bool, False for padding.
        """
        wanted = first.requires_grad or second.requires_grad
        wanted = wanted or any(one.requires_grad for one in self.parameters())
        if not (self.reversible and wanted and torch.is_grad_enabled()):
            for block in self.blocks:
                first, second = block(first, second, valid)
            return first, second
        trace = _Trace(list(self.blocks), valid, _precision(first.device.type))
        for index, block in enumerate(self.blocks):
            weights = (one for one in block.parameters() if one.requires_grad)
            first, second = _Layer.apply(trace, index, first, second, *weights)
        return first, second


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trace: _Trace, index: int, first: Tensor, second: Tensor, *weights: Tensor):
        block, ctx.before_attention = trace.blocks[index], _random_state(first)
        change, ctx.buckets = block.attention(second, trace.valid)
        first = first + change
        ctx.before_feed_forward = _random_state(first)
        second = second + block.feed_forward(first)
        if index == len(trace.blocks) - 1:
            ctx.save_for_backward(first, second)
        ctx.trace, ctx.block, ctx.weights, ctx.is_first = trace, block, weights, index == 0
        return first, second

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_first: Tensor, grad_second: Tensor):
        trace, block = ctx.trace, ctx.block
        first, second = ctx.saved_tensors or trace.streams
        grads = dict.fromkeys(ctx.weights)
        with _replayed(trace, ctx.before_feed_forward, first):
            change, grad = _step_back(block.feed_forward, first, grad_second, grads)
        second, grad_first = second - change, grad_first + grad
        del change, grad

        def attention(x: Tensor) -> Tensor:
            return block.attention(x, trace.valid, ctx.buckets)[0]

        attention.parameters = block.attention.parameters
        with _replayed(trace, ctx.before_attention, first):
            change, grad = _step_back(attention, second, grad_first, grads)
        first, grad_second = first - change, grad_second + grad
        trace.streams = None if ctx.is_first else (first, second)
        return (None, None, grad_first, grad_second, *grads.values())


def _step_back(part, x: Tensor, grad: Tensor, grads: dict) -> tuple[Tensor, Tensor]:
    """`part(x)` and the gradient of `x`; those of the weights are added to `grads`.

    A part with a `chunk_size` is gone through section by section, in the order of the forward
    pass, so that the graph of one section exists at a time.
    """
    weights = [one for one in part.parameters() if one in grads]
    size = getattr(part, "chunk_size", 0) or x.shape[1]
    outputs, inward = [], []
    for section, outer in zip(x.split(size, 1), grad.split(size, 1), strict=True):
        with torch.enable_grad():
            section = section.detach().requires_grad_()
            output = part(section)
        inner, *own = torch.autograd.grad(output, [section, *weights], outer, allow_unused=True)
        for weight, found in zip(weights, own, strict=True):
            if found is not None:
                grads[weight] = found if grads[weight] is None else grads[weight] + found
        outputs.append(output.detach())
        inward.append(inner)
    return torch.cat(outputs, 1), torch.cat(inward, 1)


def _precision(device: str) -> tuple[str, bool, torch.dtype] | None:
    """Mixed precision as it is now; None where a device has none."""
    if not torch.amp.is_autocast_available(device):
        return None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _random_state(like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The state of torch's generators that a layer on the device of `like` draws from."""
    device = torch.cuda.get_rng_state(like.device) if like.is_cuda else None
    return torch.get_rng_state(), device


@contextmanager
def _replayed(trace: _Trace, state: tuple[Tensor, Tensor | None], like: Tensor) -> Iterator[None]:
    """Random numbers and mixed precision as in the forward pass; afterwards as before."""
    cpu, device = state
    precision = nullcontext()
    if trace.precision is not None:
        device_type, enabled, dtype = trace.precision
        precision = torch.autocast(device_type, dtype, enabled=enabled)
    with torch.random.fork_rng([like.device] if device is not None else []), precision:
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device, like.device)
        yield
