"""Backends: their words, their forms, and recompilation as an error."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from harness.errors import ReplivitError
from harness.measurement.backends import (
    bring_into_form,
    parse_backend,
    place_images,
    prepare,
    to_torch_dtype,
)

IMAGES = list(torch.randn(2, 1, 3, 8, 8))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("eager", ("eager",)),
        ("compile+deploy", ("deploy", "compile")),
        ("channels_last+eager", ("eager", "channels_last")),
    ],
)
def test_words_apply_in_one_order(backend, words):
    assert parse_backend(backend) == words


@pytest.mark.parametrize(
    ("backend", "device", "sentence"),
    [
        ("fast", "cpu", "no backend 'fast'; known: eager"),
        ("", "cpu", "no backend ''"),
        ("cuda_graph", "cpu", "needs --device cuda"),
        ("compile+cuda_graph", "cuda", "exclude each other"),
    ],
)
def test_wrong_words_are_sentences(backend, device, sentence):
    with pytest.raises(ReplivitError, match=sentence):
        parse_backend(backend, device)


def test_eager_is_the_model_itself_in_eval_mode():
    model = small().train()
    done = prepare(model, ("eager",), IMAGES)
    assert done.run is model and not model.training
    assert done.first_call_s > 0
    with done.steady():
        done.run(IMAGES[0])


def test_deploy_folds_and_answers_the_same():
    model = small().eval()
    done = prepare(model, ("deploy",), IMAGES)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in done.run.modules())
    torch.testing.assert_close(done.run(IMAGES[0]), model(IMAGES[0]), rtol=1e-5, atol=1e-5)
    assert any(isinstance(one, nn.BatchNorm2d) for one in model.modules())  # on a copy


def test_dtype_and_layout_reach_model_and_images():
    words = parse_backend("eager+channels_last")
    placed = place_images(IMAGES, words, "cpu", "bfloat16")
    assert placed[0].dtype == torch.bfloat16
    assert placed[0].is_contiguous(memory_format=torch.channels_last)
    model = bring_into_form(small(), words, 8, "cpu", "bfloat16")
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model(placed[0]).dtype == torch.bfloat16
    with pytest.raises(ReplivitError, match="no dtype 'float8'"):
        to_torch_dtype("float8")


class Restless(nn.Module):
    """A model that torch.compile must compile again when `mode` changes."""

    def __init__(self):
        super().__init__()
        self.mode = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mode


def test_recompilation_while_timing_is_an_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = Restless()
    done = prepare(model, ("compile",), IMAGES)
    assert done.run is not model
    with torch.inference_mode(), done.steady():
        done.run(IMAGES[1])
        model.mode = 2
        with pytest.raises(RuntimeError):
            done.run(IMAGES[1])
    wanted = pytest.raises(ReplivitError, match="compiled the model again")
    with wanted, torch.inference_mode(), done.steady():
        done.run(IMAGES[1])


def test_other_errors_of_a_compiled_model_come_through(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    done = prepare(Restless(), ("compile",), IMAGES)
    with pytest.raises(RuntimeError, match="something else"), done.steady():
        raise RuntimeError("something else")
