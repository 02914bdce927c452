# %% [markdown]
# # UniNet: convolution, transformer and MLP in one form, and a search over all of them at once
#
# Run it as a program (`python -m reproductions.uninet.example`) or cell by cell in an editor.
# It takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/uninet.png`.

# %%
import tempfile

import torch
from matplotlib.figure import Figure

from harness.environment import home
from harness.measurement.macs import count_macs
from harness.record import RecordStore
from reproductions.uninet.drawing import draw_rewards, operator_map
from reproductions.uninet.model import ARCHITECTURES, DOWNSAMPLERS, OPERATORS
from reproductions.uninet.proxy import Proxy, ProxyScores
from reproductions.uninet.search import policy_search, random_search
from reproductions.uninet.space import SearchSpace, in_words

torch.manual_seed(0)

# %% [markdown]
# ## 1. One form
# Every operator is built from the same numbers (width, expansion, stride) and takes and returns the
# same map, so that a search may put any of them anywhere. They do not cost the same.

# %%
maps = torch.randn(1, 64, 8, 8)
for name, operator in OPERATORS.items():
    block = operator(64, 64, expansion=3, grid=(8, 8)).eval()
    params = sum(one.numel() for one in block.parameters())
    macs = count_macs(block, inputs=maps).total
    print(f"{name:5} {tuple(block(maps).shape)}  {params:7,} parameters  {macs / 1e6:5.2f} M MACs")

# %% [markdown]
# ## 2. What a down-sampling module sees
# Between two stages the map shrinks. What may one pixel of the small map know? The gradient tells
# which pixels of the large one it depends on: for L-DSM its neighbours; for LG-DSM all of them,
# asked for by a query from its neighbours.


# %%
def sight(name: str, side: int = 13) -> torch.Tensor:
    """How strongly the middle pixel after the module depends on each pixel before it."""
    torch.manual_seed(1)
    module = DOWNSAMPLERS[name](32, 32, 2).eval()
    x = torch.randn(8, 32, side, side, requires_grad=True)
    middle = (side + 1) // 4
    module(x)[:, :, middle, middle].square().sum().backward()
    return x.grad.abs().sum((0, 1))


seen = {name: sight(name) for name in ("l", "g", "lg")}
for name, strength in seen.items():
    share = strength / strength.sum()
    count, top = int((strength > 0).sum()), float(share.max())
    title = f"{name.upper()}-DSM"
    print(f"{title:6} depends on {count:3} of {strength.numel()} pixels, most on one: {top:.0%}")

# %% [markdown]
# ## 3. Search
# A controller decides: here the operators of three stages and the modules between them, with sizes
# fixed to keep it short. The network is trained for a second on a few hundred images and judged on
# held-out ones; reward is accuracy times (MACs / target) to the power -0.07. Decisions that were
# rewarded become likely. Random search gets as many networks.

# %%
space = SearchSpace(repeats=(1,), channels=((16,), (32,), (64,)), expansion=(2,))
proxy = Proxy(
    space, images=480, judged_on=500, epochs=1, target=3e6,
    recipe={"batch_size": 16, "lr": 5e-3, "warmup_epochs": 0},
)  # fmt: skip
print(f"{len(space):,} networks, of which each search looks at 24")
with tempfile.TemporaryDirectory() as folder:
    scores = ProxyScores(proxy, RecordStore(folder))
    found = policy_search(space, scores, 24, batch=4)
    drawn = random_search(space, scores, 24, batch=4)
for name, trace in (("policy gradient", found), ("random", drawn)):
    best, half = trace.best, len(trace.scores) // 2
    print(f"{name:16} first half {trace.rewards[:half].mean():.1f}, second half "
          f"{trace.rewards[half:].mean():.1f}, best {best.reward:.1f}: "
          f"{in_words(space.architecture(best.genes))}")  # fmt: skip

# %% [markdown]
# A few noisy looks decide little; `replivit run uninet/search` decides sizes as well, three times.
#
# ## 4. The picture

# %%
figure = Figure(figsize=(11, 6.2), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
operator_map(
    above.subplots(),
    {"published, B1": ARCHITECTURES["b1"], "found here": space.architecture(found.best.genes)},
)
*panels, rewards = below.subplots(1, 4, width_ratios=(1, 1, 1, 2))
for axes, (name, strength) in zip(panels, seen.items(), strict=True):
    axes.imshow((strength / strength.max()) ** 0.3, cmap="magma", vmin=0)
    axes.set_title(f"{name.upper()}-DSM sees", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
draw_rewards(rewards, [found], [drawn], batch=4)
path = home() / "lessons" / "uninet.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=100)
print(f"picture: {path}")
