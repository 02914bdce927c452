"""Backends: the forms in which one model can be run and timed.

A backend is one word or several joined by `+`: `eager`, `compile`, `deploy`, `deploy+compile`,
`eager+channels_last`, `deploy+cuda_graph`. Whatever their order, the words apply as listed in
`WORDS`: fold, lay out, then compile or capture.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import ReplivitError

if TYPE_CHECKING:
    import torch
    from torch import nn

WORDS = ("eager", "deploy", "channels_last", "compile", "cuda_graph")
DTYPES = ("float32", "bfloat16")


def parse_backend(backend: str, device: str = "cpu") -> tuple[str, ...]:
    """The words of a backend in the order in which they apply.

    Raises:
        ReplivitError: unknown word, or words that exclude each other or the device.
    """
    words = backend.split("+")
    for word in words:
        if word not in WORDS:
            raise ReplivitError(f"no backend {word!r}; known: {', '.join(WORDS)}, joined by '+'")
    if {"compile", "cuda_graph"} <= set(words):
        raise ReplivitError("backends compile and cuda_graph exclude each other")
    if "cuda_graph" in words and not device.startswith("cuda"):
        raise ReplivitError("backend cuda_graph needs --device cuda")
    return tuple(word for word in WORDS if word in words)


@dataclass(frozen=True)
class Prepared:
    """A model ready to be timed.

    Attributes:
        run: `(B, 3, H, W)` of the right device and dtype -> output.
        words: the backend's words.
        first_call_s: seconds of the very first call: compiling and capturing happen there.
    """

    run: Callable[[torch.Tensor], object]
    words: tuple[str, ...]
    first_call_s: float

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """While timing: a recompilation is an error, for it would be part of the time.

        Raises:
            ReplivitError: the model was compiled again.
        """
        if "compile" not in self.words:
            yield
            return
        import torch

        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                yield
        except RuntimeError as error:
            if "recompile" not in str(error).lower():
                raise
            raise ReplivitError(
                "torch.compile compiled the model again after warm-up: its graph depends on more "
                "than shapes"
            ) from error


class GraphReplay:
    """A CUDA graph of one forward pass; calling it copies the input in and replays."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        import torch

        self.input = example.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy initialisation must not be captured
            for _ in range(3):
                model(self.input)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = model(self.input)

    def __call__(self, images: torch.Tensor) -> object:
        self.input.copy_(images)
        self.graph.replay()
        return self.output


def to_torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype behind a name of `DTYPES`.

    Raises:
        ReplivitError: a name that is not one of them.
    """
    import torch

    if dtype not in DTYPES:
        raise ReplivitError(f"no dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def place_images(
    images: list[torch.Tensor], words: tuple[str, ...], device: str, dtype: str
) -> list[torch.Tensor]:
    """Batches on the device, in the dtype and memory layout that the backend runs with."""
    import torch

    layout = torch.channels_last if "channels_last" in words else torch.contiguous_format
    return [
        one.to(device=device, dtype=to_torch_dtype(dtype), memory_format=layout) for one in images
    ]


def bring_into_form(
    model: nn.Module, words: tuple[str, ...], image_size: int, device: str, dtype: str
) -> nn.Module:
    """The module as a backend runs it, before compiling: folded, placed, laid out, in eval mode.

    Folding is done, and checked, in float32 before the dtype changes.

    Raises:
        ReplivitError: the model cannot be folded.
    """
    import torch

    model = model.eval()
    if "deploy" in words:
        from harness.deployment import deploy

        model = deploy(model, image_size=image_size)
    model = model.to(device=device, dtype=to_torch_dtype(dtype))
    if "channels_last" in words:
        model = model.to(memory_format=torch.channels_last)
    return model


def prepare(
    model: nn.Module,
    words: tuple[str, ...],
    images: list[torch.Tensor],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> Prepared:
    """Bring a model into a backend's form and call it once with each of `images` (placed ones).

    Raises:
        ReplivitError: the model cannot be folded.
    """
    import torch

    model = bring_into_form(model, words, images[0].shape[-1], device, dtype)
    run: Callable = torch.compile(model) if "compile" in words else model
    with torch.inference_mode():
        start = time.perf_counter()
        if "cuda_graph" in words:
            run = GraphReplay(model, images[0])
        run(images[0])
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        first_call_s = time.perf_counter() - start
        for one in images[1:]:
            run(one)
    return Prepared(run, words, first_call_s)
