# %% [markdown]
# # EfficientFormerV2: attention on a strided map, and a search that counts size and time together
#
# Run it as a program (`python -m reproductions.efficientformer_v2.example`) or cell by cell in an
# editor. It takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves the
# picture `lessons/efficientformer_v2.png`.

# %%
import random
from functools import partial

import torch
from matplotlib.figure import Figure

from harness.data import AugmentedDataset, create_transform, get_track, load_split
from harness.environment import home
from harness.measurement.latency import Effort
from harness.measurement.side_by_side import time_calls
from harness.training import train
from reproductions.efficientformer_v2.attention import Attention4D
from reproductions.efficientformer_v2.search import (
    Cost,
    CostTable,
    MobileEfficiency,
    actions,
    greedy_search,
)
from reproductions.efficientformer_v2.supernet import SandwichRule, SearchSpace, Subnet, Supernet

torch.manual_seed(0)
random.seed(0)
EFFORT = Effort(
    budget_s=1.5, half_width=0.1, min_rounds=3, max_rounds=5, palindromes=1, block_s=0.002,
    warm_up_s=0.02, warm_up_limit_s=0.1,
)  # fmt: skip

# %% [markdown]
# ## 1. Why a stride
# Attention compares every pixel of a map with every other: twice the side, sixteen times the
# products. Stage 3 has a map large enough to hurt. The paper halves it first, attends, and
# up-samples the result. Both mixers below have the same input, output and (almost) weights.

# %%
sides, milliseconds = (8, 14, 20, 28), {"every pixel": [], "stride 2": []}
for side in sides:
    maps = torch.randn(1, 96, side, side).contiguous(memory_format=torch.channels_last)
    mixers = {"every pixel": Attention4D(96, side), "stride 2": Attention4D(96, side, stride=2)}
    calls = {name: partial(mixer.eval(), maps) for name, mixer in mixers.items()}
    for name, timing in time_calls(calls, effort=EFFORT).items():
        milliseconds[name].append(1e3 * timing.median)
    pair = [milliseconds[name][-1] for name in calls]
    print(f"{side:2} x {side:2} pixels: {pair[0]:6.2f} ms, with stride {pair[1]:6.2f} ms")

# %% [markdown]
# ## 2. One set of weights, many networks
# A sub-network uses the leading channels of every weight; only the batch norms are its own. One
# epoch of training shows every step four of them: the largest, the smallest and two random ones.

# %%
space = SearchSpace(
    widths=((8, 16), (16, 24), (24, 32, 48), (32, 48, 64)), depths=(1, 2, 2, 2),
    num_heads=4, key_dim=8, attn_ratio=2, stem_stride=2,
)  # fmt: skip
supernet = Supernet(space, num_classes=10, image_size=32, layer_scale_init=0.1)
supernet = train(
    supernet, "fashion_mini", objective=SandwichRule(), epochs=1, device="cpu", evaluate=False,
    name="efficientformer_v2_lesson",
).model  # fmt: skip

# %% [markdown]
# ## 3. What is an action worth?
# Size and latency become one number, the Mobile Efficiency Score. From the whole supernet (score
# 100) each possible small step gains some score and loses some accuracy on real images.

# %%
track = get_track("fashion_mini")
transform = create_transform(track.input, track.image_size)
test = AugmentedDataset(load_split("fashion_mini", "test"), transform, seed=0)
pairs = [test[index] for index in range(400)]
images = torch.stack([image for image, _ in pairs])
labels = torch.tensor([label for _, label in pairs])


@torch.inference_mode()
def accuracy(subnet: Subnet) -> float:
    """Top-1 in % on 400 test images, with the supernet's weights."""
    supernet.eval().select(subnet)
    return 100 * float((supernet(images).argmax(1) == labels).float().mean())


table = CostTable.measure(space, 32, 10, batch_size=32, effort=EFFORT)
whole = table.cost(space.architecture(space.uniform("largest")))
score = MobileEfficiency(unit=whole)
start = accuracy(space.uniform("largest"))
pool = []
for action in actions(space, space.uniform("largest")):
    gain = score(table.cost(space.architecture(action.result))) - 100
    pool.append((gain, start - accuracy(action.result), str(action)))
    print(f"{pool[-1][2]:24} score {gain:+6.1f}   accuracy {-pool[-1][1]:+5.1f} points")

# %% [markdown]
# ## 4. Walk
# Take the action that costs the least accuracy per point of score; look again; stop at 60 % of the
# latency. What is left is a list of depths, widths and expansions, to be trained from scratch.

# %%
steps = greedy_search(space, table, score, accuracy, Cost(whole.params, 0.6 * whole.latency))
for step in steps:
    print(f"{step.action or 'supernet'!s:24} score {step.mes:6.1f}   top-1 {step.accuracy:5.1f} %")
found = space.architecture(steps[-1].subnet)
print(f"found: depths {found.depths}, widths {found.widths}, expansions {found.expansions}")

# %% [markdown]
# ## 5. The picture

# %%
figure = Figure(figsize=(13, 3.8), layout="constrained")
left, middle, right = figure.subplots(1, 3)
for (name, values), style in zip(milliseconds.items(), ("o-", "s--"), strict=True):
    left.plot(sides, values, style, label=name)
left.set(xlabel="side of the map, pixels", ylabel="ms", title="Attention, with and without stride")
left.set_xticks(sides)
left.legend(frameon=False)
kinds = {"A_N": "remove a block", "A_C": "narrow a stage", "A_E": "thin a feed-forward"}
for kind, marker in zip(kinds, "os^", strict=True):
    chosen = [(gain, drop) for gain, drop, name in pool if name.startswith(kind)]
    middle.plot(*zip(*chosen, strict=True), marker, label=f"{kind}: {kinds[kind]}", alpha=0.8)
middle.axhline(0, color="0.8", linewidth=0.8, zorder=0)
middle.set(
    xlabel="score gained", ylabel="accuracy lost, points", title="All first steps of the search"
)
low, high = middle.get_ylim()
middle.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
middle.legend(frameon=False, loc="upper right")
right.plot([step.mes for step in steps], [step.accuracy for step in steps], "o-", color="C3")
right.set(xlabel="Mobile Efficiency Score", ylabel="top-1, % (shared weights)", title="The walk")
for axes in (left, middle, right):
    axes.spines[["top", "right"]].set_visible(False)
path = home() / "lessons" / "efficientformer_v2.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=130)
print(f"picture: {path}")
