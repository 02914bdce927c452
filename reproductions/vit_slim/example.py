# %% [markdown]
# # ViT-Slim: learn what matters once, then cut to any size
#
# Run it as a program (`python -m reproductions.vit_slim.example`) or cell by cell in an editor. It
# takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/vit_slim.png`.

# %%
import copy

import torch

import harness
from harness.data import get_track
from harness.environment import home
from harness.evaluation import evaluate
from harness.measurement.latency import Effort
from harness.measurement.macs import count_macs
from harness.measurement.side_by_side import time_models
from harness.tokens import sample_images
from harness.training import train
from reproductions.vit_slim.drawing import structure_figure
from reproductions.vit_slim.masks import compress, learned_scores, penalties
from reproductions.vit_slim.method import SparsitySearch
from reproductions.vit_slim.selection import random_scores
from reproductions.vit_slim.slimming import slim

TRACK = "fashion_mini"
SIZE = get_track(TRACK).image_size


def top1(model: torch.nn.Module) -> float:
    """Top-1 in % on the whole test split."""
    return evaluate(model, TRACK)[0].value


def params(model: torch.nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


# %% [markdown]
# ## 1. Soft masks in a trained network
# `vit_micro` is a plain vision transformer with six blocks. Every head dimension, every hidden
# channel and every token gets a number that it is multiplied with. All start at (nearly) one.

# %%
dense = harness.load_pretrained("vit_micro", track=TRACK)
print(f"dense: {params(dense):,} parameters, top-1 {top1(dense):.1f} %")

# %% [markdown]
# ## 2. The search
# Weights and masks learn together; the penalty pulls every mask down, the loss holds those up that
# it needs. One epoch is enough to see it.

# %%
searched = train(
    "vit_slim_micro_search", TRACK, objective=SparsitySearch(2e-3, 5e-4, 1e-3), epochs=1,
    init=dense.state_dict(), device="cpu", evaluate=False,
).model  # fmt: skip
sums = {kind: f"{one.item():.0f}" for kind, one in penalties(searched).items()}
gates = torch.cat([block.mlp.zeta.flatten() for block in searched.blocks])
print(f"sums of the masks: {sums}; MLP masks from {gates.min():.2f} to {gates.max():.2f}")

# %% [markdown]
# ## 3. One sorted list, every budget
# A budget is a position in the list of all masks of a kind: what lies below is cut, in whichever
# layer it stands. Beside it a random choice of as many, from the same weights. Nothing is retrained
# yet.

# %%
scores = {"searched": learned_scores(searched)}
scores["random"] = random_scores(scores["searched"], seed=0)
kept = {}
for budget in (0.8, 0.6, 0.4):
    cut = {name: slim(searched, budget, budget, scores=one) for name, one in scores.items()}
    kept[f"{budget:g}"] = cut["searched"].kept
    said = ", ".join(f"{name} {top1(model):.1f} %" for name, model in cut.items())
    macs = count_macs(cut["searched"], SIZE).total / 1e6
    print(f"budget {budget:g}: {params(cut['searched']):,} parameters, {macs:.1f} M MACs; {said}")

# %% [markdown]
# ## 4. Smaller, and the same function
# The released code multiplies by 0 and 1 and stays as large as it was. `slim` cuts the rows and
# columns out. Tokens need care: a masked token is still a key in every attention. One virtual token
# stands for all that are gone; without it the outputs differ.

# %%
budgets = {"attention": 0.6, "mlp": 0.6, "tokens": 0.7}
masked = copy.deepcopy(searched)
compress(masked, **budgets)
images = sample_images(dense, TRACK, 32).inputs
with torch.inference_mode():
    expected = masked(images)
    for mode in ("exact", "drop"):
        small = slim(searched, **budgets, mode=mode)
        off = (small(images) - expected).abs().max().item()
        print(f"tokens per layer {small.kept.num_tokens.tolist()}, {mode}: differs by {off:.1e}")

# %% [markdown]
# ## 5. Faster, too
# Where the masks only multiply, nothing is gained.

# %%
small = slim(searched, 0.6, 0.6)
ratio = count_macs(dense, SIZE).total / count_macs(small, SIZE).total
effort = Effort(budget_s=4, warm_up_s=0.2, warm_up_limit_s=0.5, min_rounds=5)
compress(masked, 0.6, 0.6)
models = {"dense": dense, "masked": masked, "slim": harness.deploy(small)}
timings = time_models(models, [images], effort=effort)
for name in ("masked", "slim"):
    low, high = (1 / one for one in reversed(timings[name].ratio_interval))
    print(f"{name}: {1 / timings[name].ratio:.2f}x as fast as dense ({low:.2f} to {high:.2f})")
print(f"multiply-adds: {ratio:.2f}x fewer")

# %% [markdown]
# ## 6. The picture
# What is left of each head and each layer.

# %%
figure = structure_figure(kept, "vit_micro after a short search")
path = home() / "lessons" / "vit_slim.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=110)
print(f"picture: {path}")
