# %% [markdown]
# # Reformer: attention that looks only where it would find something
#
# Run it as a program (`python -m reproductions.reformer.example`) or cell by cell in an editor.
# It takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/reformer.png`.

# %%
import time

import torch

import harness
from harness.environment import home
from harness.measurement.macs import count_macs
from harness.tokens import sample_images
from reproductions.reformer.attention import FullAttention, LSHAttention
from reproductions.reformer.drawing import lesson_figure, maps_by_rounds
from reproductions.reformer.hashing import hash_vectors
from reproductions.reformer.reversible_experiment import Setting, gradient_gap

torch.manual_seed(0)

# %% [markdown]
# ## 1. Hashing by angle
# A vector is turned at random and goes to the axis, positive or negative, that it points along
# most. Two vectors at a small angle usually share a bucket; opposite ones never do.

# %%
vectors = torch.randn(10_000, 16)
for degrees in (5, 30, 60, 90, 180):
    angle = torch.tensor(degrees).deg2rad()
    other = torch.randn(10_000, 16)
    vectors, other = torch.linalg.qr(torch.stack([vectors, other], -1)).Q.unbind(-1)
    turned = angle.cos() * vectors + angle.sin() * other
    rotations = torch.randn(1, 1, 16, 1, 8)
    one, two = (hash_vectors(each[None, None], rotations, 16) for each in (vectors, turned))
    print(f"{degrees:4d} degrees apart: {100 * (one == two).float().mean():5.1f} % share a bucket")

# %% [markdown]
# ## 2. Attention among the patches of an image
# Queries and keys are one and the same, so a patch attends to patches like itself, and these lie in
# its bucket. The more rounds of hashing, the more of the attention is found.

# %%
model = harness.build("vit_micro").eval()
sample = sample_images(model, "fashion_mini", 1)
patches = torch.nn.functional.unfold(sample.inputs, 4, stride=4)[0].T  # (64, 48)
queries = 2 * (patches - patches.mean(0)) / patches.std()
full, found = maps_by_rounds(queries, (1, 2, 4, 8, 16), chunk=8, num_buckets=8)
for rounds, one in zip((1, 2, 4, 8, 16), found, strict=True):
    share = torch.minimum(one, full).sum(-1).mean()
    print(f"{rounds:2d} rounds: {100 * share:.0f} % of the attention is where it belongs")

# %% [markdown]
# ## 3. What it costs
# The same 16384 tokens, as sequences that get longer and longer.

# %%
with torch.no_grad():
    layers = {"full": FullAttention(64, 1), "LSH, 2 rounds": LSHAttention(64, 1, rounds=2)}
    for length in (1024, 4096, 16384):
        tokens = torch.randn(16384 // length, length, 64)
        for name, layer in layers.items():
            start = time.process_time()
            layer.eval()(tokens)
            spent = time.process_time() - start
            print(f"{name:14} {length:6d} tokens a sequence: {spent:6.2f} CPU seconds")

# %% [markdown]
# ## 4. Layers that can be run backwards
# A reversible layer's input follows from its output, so nothing has to be kept for the backward
# pass. The gradients are those of ordinary layers, dropout included.

# %%
for name, gap in gradient_gap(Setting(length=256), depth=4).items():
    print(f"{name:17} differ by {gap:.0e}")

# %% [markdown]
# ## 5. A vision transformer of it
# 64 patches are few: here hashing saves nothing, and the leaderboard says so.

# %%
for name in ("vit_micro", "reformer_vit_micro"):
    network = harness.build(name).eval()
    print(f"{name:19} {count_macs(network, 32).total / 1e6:.1f} M multiply-adds")

# %% [markdown]
# ## 6. The picture

# %%
figure = lesson_figure(queries)
path = home() / "lessons" / "reformer.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=100)
print(f"picture: {path}")
