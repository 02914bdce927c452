"""Traps of counting in whole networks: sharing, folding, checkpointing, data-dependent counts."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from counting_tools import Calls, counted, totals
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import count_macs_fvcore, explain_gap

# --- resampling, sharing, folding, checkpointing -----------------------------------------------


def test_unfold_with_a_matrix_product_counts_as_the_convolution():
    x, weight = torch.randn(1, 3, 9, 9), torch.randn(8, 27)
    assert totals(lambda x: weight @ F.unfold(x, 3), x) == (7 * 7 * 27 * 8,) * 2
    assert totals(nn.Conv2d(3, 8, 3), x) == (7 * 7 * 27 * 8,) * 2


def test_shared_modules_count_every_call():
    layer = nn.Linear(6, 6)
    assert totals(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(1, 6)) == (72, 72)


def test_grid_sample_is_four_per_output_in_fvcore_and_an_estimate_here():
    x, grid = torch.randn(1, 3, 8, 8), torch.zeros(1, 4, 5, 2)
    canonical, fvcore = counted(lambda *t: F.grid_sample(*t, align_corners=False), x, grid)
    assert (canonical.total, fvcore.total) == (0, 4 * 3 * 4 * 5)
    assert canonical.unsupported["aten.grid_sampler_2d"].estimated_macs == 4 * 3 * 4 * 5
    assert [one.operator for one in explain_gap(canonical, fvcore).reasons] == ["grid_sampler"]


@pytest.mark.parametrize(("mode", "taps"), [("bilinear", 4), ("bicubic", 16)])
def test_interpolation_is_estimated_by_its_taps(mode, taps):
    found = count_macs(nn.Upsample(scale_factor=2, mode=mode), inputs=torch.randn(1, 3, 4, 5))
    (use,) = found.unsupported.values()
    assert (found.total, use.kind, use.estimated_macs) == (0, "resampling", taps * 3 * 8 * 10)


def test_grouped_and_transposed_convolutions():
    x = torch.randn(1, 4, 5, 5)
    assert totals(nn.Conv2d(4, 8, 3, groups=4), x) == (3 * 3 * 8 * 9,) * 2
    assert totals(nn.ConvTranspose2d(4, 8, 3, stride=2), x) == (5 * 5 * 4 * 8 * 9,) * 2


def keep_positive(x):
    tokens = x.flatten(0, 1)
    tokens = tokens[tokens[:, 0] > 0]
    return tokens @ tokens.mT


def test_a_data_dependent_token_count_is_counted_as_executed():
    for kept in (2, 5, 9):
        x = -torch.ones(1, 9, 4)
        x[:, :kept] = 1
        assert totals(keep_positive, x) == (kept * kept * 4,) * 2
    with pytest.raises(NotImplementedError):  # meta tensors have no data to depend on
        count_macs(Calls(keep_positive), inputs=torch.ones(1, 9, 4, device="meta"))


def test_reparameterised_branches_count_as_they_are():
    """MobileOne-S0: 1.052 G with its training branches, 0.275 G folded (224 px)."""
    model = timm.create_model("mobileone_s0").eval()
    folded = reparameterize_model(model)
    branches, single = count_macs(model, 224).total, count_macs(folded, 224).total
    assert branches / 1e9 == pytest.approx(1.052, abs=5e-4)
    assert single / 1e9 == pytest.approx(0.275, abs=5e-4)
    assert count_macs_fvcore(folded, 224).by_operator["conv"] + 1024 * 1000 == single


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_left_on_hides_nothing(reentrant):
    layers = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return checkpoint(self.layers, x, use_reentrant=reentrant)

    assert totals(Checkpointed(), torch.randn(1, 6)) == (2 * 54, 2 * 54)


def test_every_kernel_of_a_small_vit_is_of_a_known_kind():
    """`other` is for kernels to look into; a plain model must have none."""
    found = count_macs(timm.create_model("test_vit"), 160)
    assert not found.suspicious
    kinds = {use.kind for use in found.unsupported.values()}
    assert {"elementwise", "normalisation"} <= kinds
    assert np.all([use.bytes_moved > 0 for use in found.unsupported.values()])


def test_a_parameters_view_between_modules_is_counted():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(self.token.expand(len(x), -1, -1))

    model = Token()
    canonical, fvcore = counted(model, torch.randn(1, 3, 7, 7))
    assert canonical.total == fvcore.total == 64
    assert all(one.requires_grad for one in model.parameters())
