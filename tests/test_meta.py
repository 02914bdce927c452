"""Building without memory, also with a timm that reads numbers back while it builds."""

from __future__ import annotations

import timm
import timm.layers
import torch

from harness.meta import on_meta


def test_modules_have_shapes_and_no_memory():
    with on_meta():
        model = timm.create_model("deit_tiny_patch16_224", drop_path_rate=0.1)
    assert all(one.is_meta for one in model.parameters())
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_rates_of_an_older_timm_stay_numbers(monkeypatch):
    monkeypatch.delattr(timm.layers, "calculate_drop_path_rates", raising=False)
    with on_meta():
        rates = [one.item() for one in torch.linspace(0, 0.2, 3)]
        layer = torch.nn.Linear(2, 2)
    assert rates == torch.linspace(0, 0.2, 3).tolist() and layer.weight.is_meta
    assert torch.linspace(0, 1, 2, device="cpu").device.type == "cpu"
