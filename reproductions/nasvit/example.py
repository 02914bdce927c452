# %% [markdown]
# # NASViT: small networks that are not run over
#
# Run it as a program (`python -m reproductions.nasvit.example`) or cell by cell in an editor.
# It takes about two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/nasvit.png`.

# %%
import random

import numpy as np
import torch
from matplotlib.figure import Figure

from harness.data import batches_of, hold_out, load_split
from harness.environment import home
from harness.training import train
from reproductions.nasvit.conflict import measure_conflict
from reproductions.nasvit.counting import macs_of
from reproductions.nasvit.fitness import SubnetAccuracy
from reproductions.nasvit.judging import BLUE, GREY, ORANGE
from reproductions.nasvit.space import MICRO
from reproductions.nasvit.supernet import Supernet
from reproductions.nasvit.training import ConflictAware

torch.manual_seed(0)

# %% [markdown]
# ## 1. One set of weights, many networks
# Set a configuration and the same weights compute another network, at another resolution, width and
# depth. Copied out, it is an ordinary dense model with the same outputs.

# %%
supernet = Supernet(MICRO, num_classes=10, image_size=32)
config = MICRO.sample(random.Random(0))
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    inside = supernet.eval().set_config(config)(images)
    outside = supernet.extract()(images)
print(f"{MICRO.size:,} networks in {sum(p.numel() for p in supernet.parameters()):,} parameters")
print(f"one of them: {config}")
print(f"inside the supernet against copied out: {(inside - outside).abs().max():.1e}")

# %% [markdown]
# ## 2. Train them all at once
# Every batch is seen by the largest network, the smallest and two random ones. The largest learns
# from labels, the others from the largest.

# %%
HELD_OUT, EPOCHS = 8000, 2
supernet.set_config(MICRO.largest())
run = train(
    supernet, "fashion_mini",
    {"batch_size": 64, "warmup_epochs": 0, "weight_decay": 0.0, "lr": 2e-3, "channels_last": True},
    objective=ConflictAware(plain_share=0), epochs=EPOCHS, hold_out=HELD_OUT, evaluate=False,
    name="nasvit_lesson", device="cpu",
)  # fmt: skip

# %% [markdown]
# ## 3. Do they pull in the same direction?
# For every parameter tensor: the angle between the gradient of the small networks and that of the
# largest one. Below zero, a step for one is a step against the other. Projection turns the step
# until it hurts the small ones no more.

# %%
seen, held = hold_out(load_split("fashion_mini", "train"), HELD_OUT)
batch = next(iter(batches_of(seen, 32, limit=128, batch_size=128)))
conflict = measure_conflict(supernet, *batch)
print(f"tensors in conflict: {100 * conflict.share:.0f} %")
for name, values in (("plain sum", conflict.plain), ("projected", conflict.projected)):
    print(f"steps against the small networks, {name}: {100 * np.mean(values < 0):.0f} %")

# %% [markdown]
# ## 4. One training, many networks
# Batch norms of the supernet mix the statistics of all widths, so a network is calibrated on a few
# images when it is cut out. Without that it is nearly blind.

# %%
calibration = [one for one, _ in batches_of(seen, 32, limit=256, batch_size=64)]
judged = SubnetAccuracy(supernet, calibration, batches_of(held, 32, limit=1000))
rng = random.Random(1)
networks = [MICRO.smallest(), *(MICRO.sample(rng) for _ in range(10)), MICRO.largest()]
macs = [macs_of(MICRO, one, 10) / 1e6 for one in networks]
after = [judged(one) for one in networks]


def uncalibrated(one) -> float:
    """Top-1 in % with the supernet's own statistics."""
    network = supernet.extract(one).eval()
    with torch.inference_mode():
        hits = [network(images).argmax(1) == labels for images, labels in judged.batches]
    return 100 * float(torch.cat(hits).float().mean())


before = [uncalibrated(one) for one in networks]
for name, place in (("smallest", 0), ("largest", -1)):
    print(f"{name}: {macs[place]:.1f} M multiply-adds, {before[place]:.1f} % before calibration, "
          f"{after[place]:.1f} % after")  # fmt: skip

# %% [markdown]
# ## 5. The picture

# %%
figure = Figure(figsize=(11, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
edges = np.linspace(-1, 1, 41)
left.hist(conflict.before, edges, color=ORANGE, alpha=0.75,
          label="small networks and the largest one")  # fmt: skip
left.hist(conflict.projected, edges, histtype="step", color=BLUE, linewidth=1.8,
          label="small networks and the projected step")  # fmt: skip
left.axvline(0, color=GREY, linewidth=0.8)
left.set_xlabel("cosine of two gradients of one tensor")
left.set_ylabel("parameter tensors")
left.set_ylim(top=1.25 * left.get_ylim()[1])  # room for the legend
left.legend(frameon=False, fontsize=9, loc="upper left")
right.plot(macs, before, "x", color=GREY, label="with the supernet's statistics")
right.plot(macs, after, "o", color=BLUE, label="calibrated")
right.set_xlabel("multiply-adds (M)")
right.set_ylabel("top-1 on held-out images (%)")
right.legend(frameon=False, fontsize=9)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
out = home() / "lessons" / "nasvit.png"
out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(out, dpi=110)
print(f"wrote {out}")
