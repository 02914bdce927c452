# %% [markdown]
# # PatchMerger: sixty-four tokens become eight, and half of the network is nearly free
#
# Run it as a program (`python -m reproductions.patchmerger.example`) or cell by cell in an editor.
# It takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/patchmerger.png`.

# %%
import torch

import harness
from harness.data import get_track
from harness.environment import home
from harness.evaluation import evaluate
from harness.measurement.latency import Effort
from harness.measurement.macs import count_macs
from harness.measurement.side_by_side import time_models
from harness.tokens import assignment_figure, sample_images
from harness.training import train
from reproductions.patchmerger.insertion import assignments, insert_merger, mergers
from reproductions.patchmerger.merger import PatchMerger

TRACK = "fashion_mini"
torch.manual_seed(0)


def top1(model: torch.nn.Module) -> float:
    """Top-1 in % on the whole test split."""
    return evaluate(model, TRACK)[0].value


# %% [markdown]
# ## 1. The whole method is one softmax
# Eight learned queries look at all tokens; each takes a weighted mean of them. The softmax runs
# over the tokens, so the weights of one output sum to one.

# %%
merger = PatchMerger(dim=64, num_outputs=8)
tokens = torch.randn(1, 64, 64)
print(f"{tuple(tokens.shape)} -> {tuple(merger(tokens).shape)}, with", end=" ")
print(f"{sum(one.numel() for one in merger.parameters())} parameters")
print("weights of each output sum to", merger.assignment(tokens).sum(-1).detach().unique().tolist())

# %% [markdown]
# ## 2. How the queries start
# Scores of normalised tokens with queries of standard deviation 1 have one of `dim ** 0.5`: too
# large for a softmax. It chooses a single token, and hardly any gradient flows.

# %%
for text, std in (("1", 1.0), ("dim ** -0.5", None)):
    weights = PatchMerger(dim=384, init_std=std).assignment(torch.randn(1, 196, 384))
    print(f"queries of std {text:12} largest of 196 weights: {weights.amax(-1).mean():.2f}")

# %% [markdown]
# ## 3. Into a trained network
# `vit_micro` is a plain vision transformer with 64 patches and six blocks. A merger before block 3
# leaves the class token and eight others to the last three blocks. Nobody has told those what the
# eight tokens mean, so the accuracy falls.

# %%
dense = harness.load_pretrained("vit_micro", track=TRACK)
merged = insert_merger(harness.load_pretrained("vit_micro", track=TRACK), layer=3, num_outputs=8)
merged.eval()
size = get_track(TRACK).image_size
macs = [count_macs(model, size).total for model in (dense, merged)]
print(f"multiply-adds: {macs[0] / 1e6:.1f} M -> {macs[1] / 1e6:.1f} M ({macs[0] / macs[1]:.2f}x)")
batch = sample_images(dense, TRACK, 32).inputs
effort = Effort(budget_s=3, warm_up_s=0.2, warm_up_limit_s=0.5, min_rounds=5)
timing = time_models({"dense": dense, "merged": merged}, [batch], effort=effort)["merged"]
low, high = (1 / ratio for ratio in reversed(timing.ratio_interval))
print(f"32 images are {1 / timing.ratio:.2f}x as fast (95 % interval {low:.2f} to {high:.2f})")
before = top1(dense), top1(merged)
print(f"top-1 {before[0]:.1f} % -> {before[1]:.1f} %")

# %% [markdown]
# ## 4. Two epochs later
# The same network, trained on: the queries learn what to look at, the last blocks what they get.

# %%
trained = train(
    "patchmerger_micro", TRACK, {"lr": 5e-4, "warmup_epochs": 0}, epochs=2, device="cpu",
    init=merged.state_dict(),
).model  # fmt: skip
after = top1(trained)
print(f"top-1 {before[1]:.1f} % -> {after:.1f} % with {macs[1] / macs[0]:.0%} of the multiply-adds")

# %% [markdown]
# ## 5. The picture
# Which patches does each output look at?

# %%
sample = sample_images(trained, TRACK, 6)
maps = assignments(trained, sample.inputs)[3]
effective = torch.special.entr(maps).sum(-1).exp()
print(
    f"an output spreads over {effective.mean():.0f} of {maps.shape[-1]} patches (exp. of entropy)"
)
figure = assignment_figure(
    sample, maps, trained.patch_embed.grid_size, outputs=range(mergers(trained)[3].num_outputs)
)
path = home() / "lessons" / "patchmerger.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=100)
print(f"picture: {path}")
