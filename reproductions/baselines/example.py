# %% [markdown]
# # How many multiply-adds has a model?
#
# Three counters look at the reference rows. They disagree, and the differences have names: fused
# attention that one of them cannot see, and norms that two of them add. Run this file with Python
# (about a minute on a laptop), or open it as a notebook. It writes `baselines.png`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from fvcore.nn import FlopCountAnalysis

import harness
from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import count_macs_fvcore, explain_gap

# %% [markdown]
# ## Counting
# *fvcore as it comes* traces the model and adds up what it knows. It does not know fused attention
# and counts it as zero, with a warning that is easily lost. *fvcore, repaired* is the same with a
# handler for attention. *Dispatched* is torch's own counter halved: it sees the kernels that run,
# and counts convolutions and matrix products alone. That last one is the leaderboard's column.

# %%
rows = []
for variant in harness.variants("baselines"):
    size = variant.spec.image_size
    model = harness.build(variant.name).eval()
    params = sum(one.numel() for one in model.parameters())
    bare = FlopCountAnalysis(model, torch.zeros(1, 3, size, size))
    bare.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    dispatched, repaired = count_macs(model, size), count_macs_fvcore(model, size)
    gap = explain_gap(dispatched, repaired)
    rows.append((variant, params, bare.total(), repaired.total, dispatched.total))
    print(
        f"{variant.name:18} {params / 1e6:6.2f} M parameters | GMACs: as it comes "
        f"{bare.total() / 1e9:7.3f}, repaired {repaired.total / 1e9:7.3f}, "
        f"dispatched {dispatched.total / 1e9:7.3f} | repaired - dispatched: "
        + ", ".join(f"{one.operator} {one.macs / 1e6:.1f} M" for one in gap.reasons)
    )

# %% [markdown]
# ## Looking
# Left: what the rows cost. At 5 to 6 million parameters a convolutional network does a third to a
# half of DeiT-Ti's work: parameters do not tell the cost. Right: how much of a model the first
# counter misses. It is most in the narrowest ViTs, where attention is a larger part of the work,
# and nothing where timm does not fuse attention (Swin) or there is none.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
colours = {"transformer": "#0072B2", "cnn": "#D55E00"}
for variant, params, *_, macs in rows:
    left.scatter(params / 1e6, macs / 1e9, color=colours[variant.spec.family], s=40)
# A distilled DeiT lies on its parent and ViT-B/16 on DeiT-B: one label is enough.
beside = {"deit_b": (-8, -3), "deit_s": (-8, 2), "swin_t": (8, 2), "resnet50": (8, -10)}
for variant, params, *_, macs in rows:
    name = variant.name
    if name.endswith("_distilled") or name == "vit_b16":
        continue
    shift = beside.get(name, (8, -3))
    left.annotate(
        "deit_b, vit_b16" if name == "deit_b" else name,
        (params / 1e6, macs / 1e9),
        xytext=shift,
        textcoords="offset points",
        ha="left" if shift[0] > 0 else "right",
        fontsize=9,
    )
for family, colour in colours.items():
    left.scatter([], [], color=colour, label=family)
left.set(xscale="log", yscale="log", xlabel="parameters (M)", ylabel="multiply-adds per image (G)")
left.set_title("What the reference rows cost")
left.legend(loc="upper left", frameon=False)

names = [variant.name for variant, *_ in rows][::-1]
missing = [100 * (1 - bare / repaired) for _, _, bare, repaired, _ in rows][::-1]
bars = right.barh(names, missing, color="#56B4E9")
right.bar_label(bars, [f"{value:.1f} %" for value in missing], padding=3, fontsize=9)
right.set(xlabel="missing from fvcore's count as it comes (%)", xlim=(0, max(missing) * 1.2))
right.set_title("Attention that is counted as zero")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
out = Path("baselines.png")
figure.savefig(out, dpi=120)
print(f"wrote {out}")
