# %% [markdown]
# # TF-TAS: judging transformers before they are trained
#
# Run it as a program (`python -m reproductions.tf_tas.example`) or cell by cell in an editor. It
# takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/tf_tas.png`.

# %%
import random
import time

import torch
from matplotlib.figure import Figure

from harness.environment import home
from harness.training import train
from reproductions.autoformer.space import get_space
from reproductions.autoformer.subnet import Subnet
from reproductions.tf_tas.indicators import dss
from reproductions.tf_tas.ranking import kendall
from reproductions.tf_tas.scoring import DssScorer, random_supernet
from reproductions.tf_tas.search import random_search

torch.manual_seed(0)
random.seed(0)

# %% [markdown]
# ## 1. Two terms
# A random network, one image of ones, one backward pass. Each attention matrix is judged by the
# nuclear norms of its weight and of its gradient (is it far from low rank?), each MLP matrix by
# weight times gradient (would cutting it hurt?). Attention makes nearly all of the sum.

# %%
space = get_space("micro")
supernet = random_supernet(space, num_classes=10, image_size=32)
score = dss(supernet.extract(space.largest()), 32, "with_qkv")
attention = sum(value for name, value in score.per_layer.items() if ".attn." in name)
print(f"DSS of the largest subnet: {score.value:.0f}, {attention / score.value:.0%} from attention")

# %% [markdown]
# ## 2. A search in seconds
# Draw random subnets, keep those in a window of parameters, score each on slices of the same random
# supernet. Nothing is trained.

# %%
scorer = DssScorer(supernet)
tick = time.perf_counter()
everything = random_search(space, scorer, 60, window=(0.0, 1.0), seed=1)
window = random_search(space, scorer, 60, window=(0.235, 0.2586), seed=1)
print(f"120 subnets scored in {time.perf_counter() - tick:.1f} s")
print(f"best of the whole space: {everything.best.config}, {everything.best.params:,} parameters")
print(f"best of the window:      {window.best.config}, {window.best.params:,} parameters")

# %% [markdown]
# ## 3. Is it more than size?
# Over the whole space, larger subnets tend to have the larger score. How closely do the two agree?

# %%
sizes = [one.params for one in everything.candidates]
scores = [one.score for one in everything.candidates]
print(f"Kendall's tau of score and parameters: {kendall(scores, sizes):+.2f}")

# %% [markdown]
# ## 4. Does it come true?
# The best and the worst of the window, of about equal size, each trained for one epoch. One pair
# proves nothing: `replivit run tf_tas/correlation` asks twenty subnets, and gives intervals.

# %%
ordered = sorted(window.candidates, key=lambda one: one.score)
accuracy = {}
for label, candidate in {"lowest score": ordered[0], "highest score": ordered[-1]}.items():
    torch.manual_seed(0)
    model = Subnet(space, candidate.config, num_classes=10, image_size=32)
    trained = train(model, "fashion_mini", epochs=1, device="cpu", name="tf_tas_lesson", quiet=True)
    accuracy[label] = trained.value("top1")
    print(f"{label:13} {candidate.score:8.0f}: {accuracy[label]:.1f} % after one epoch")

# %% [markdown]
# ## 5. The picture

# %%
figure = Figure(figsize=(11, 3.8), layout="constrained")
left, middle, right = figure.subplots(1, 3)
parts = {"qkv": 0.0, "proj": 0.0, "fc1": 0.0, "fc2": 0.0}
for name, value in score.per_layer.items():
    parts[name.rpartition(".")[2]] += value
left.bar(parts.keys(), parts.values(), color=["C0", "C0", "C1", "C1"])
left.set(title="what adds to the score", ylabel="sum over all layers")
middle.plot([size / 1e6 for size in sizes], scores, "o", color="0.6", ms=4, label="whole space")
middle.plot(
    [one.params / 1e6 for one in window.candidates], [one.score for one in window.candidates],
    "o", color="C0", ms=4, label="window",
)  # fmt: skip
middle.plot(window.best.params / 1e6, window.best.score, "*", color="C3", ms=13, label="picked")
middle.set(title="score against size", xlabel="parameters, M", ylabel="DSS")
middle.locator_params(axis="x", nbins=5)
middle.legend(frameon=False)
right.bar(accuracy.keys(), accuracy.values(), color=["0.6", "C3"])
right.set(title="trained for one epoch", ylabel="top-1, %", ylim=(0, 100))
for place, value in enumerate(accuracy.values()):
    right.text(place, value + 1, f"{value:.1f}", ha="center")
for axes in (left, middle, right):
    axes.spines[["top", "right"]].set_visible(False)
path = home() / "lessons" / "tf_tas.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=110)
print(f"saved {path}")
