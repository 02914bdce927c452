# %% [markdown]
# # SepViT: attention inside windows, then between whole windows
#
# Run it as a program (`python -m reproductions.sepvit.example`) or cell by cell in an editor. It
# takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/sepvit.png`.

# %%
import torch

import harness
from harness.environment import home
from harness.evaluation import evaluate
from harness.measurement.macs import count_macs
from harness.tokens import sample_images
from harness.training import train
from reproductions.sepvit.attention import SeparableAttention
from reproductions.sepvit.complexity import block_costs, two_swin_blocks
from reproductions.sepvit.drawing import look, window_figure
from reproductions.sepvit.model import ARCHITECTURES
from reproductions.sepvit.windows import Windows

TRACK = "fashion_mini"
torch.manual_seed(0)

# %% [markdown]
# ## 1. Two attentions in one block
# A map of 8x8 tokens is cut into four windows. In front of each stands a window token. The first
# attention stays inside the windows, and the token comes out as a summary of its window.

# %%
windows = Windows.of_side(8, 8, side=4)
attention = SeparableAttention(dim=64, num_heads=2).eval()
tokens = torch.zeros(1, windows.count, 1, 64)
cut = windows.split(torch.randn(1, 8, 8, 64), tokens)
print(f"a map of 8x8 tokens, cut: {tuple(cut.shape)} (images, windows, token + 16, channels)")

# %% [markdown]
# The second attention has four tokens for queries and keys, but its values are the whole windows: a
# 4x4 table for each head decides how much of every window goes into every other one.

# %%
inside, between = attention.maps(cut, windows)
print(f"inside: {tuple(inside.shape)}; between: {tuple(between.shape)}, the second is tiny")
print(f"back as a map: {tuple(attention(cut, windows).shape)}")

# %% [markdown]
# ## 2. What it costs
# Looking across windows is nearly free. Swin needs a second block for that.

# %%
tiny = ARCHITECTURES["tiny"]
print("SepViT-T, 224 pixels:   windows   between windows   of two Swin blocks")
for cost in block_costs(tiny, 224):
    if cost.block < 2:
        two = two_swin_blocks(*tiny.maps(224)[cost.stage], tiny.embed_dims[cost.stage])
        share = cost.pointwise / cost.total
        print(f"  stage {cost.stage + 1}, block {cost.block + 1}: {cost.windows:14}"
              f"   {share:15.1%}   {cost.total / two:18.1%}")  # fmt: skip
macs = {
    name: count_macs(harness.build(name), 32).total
    for name in ("sepvit_micro", "sepvit_micro_window", "sepvit_micro_swin")
}
print("the small network and its twins:",
      ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in macs.items()))  # fmt: skip

# %% [markdown]
# ## 3. A small network on real images
# The shipped weights, or, where there are none, one epoch of training.

# %%
if harness.get_variant("sepvit_micro").weights_file() is not None:
    model = harness.load_pretrained("sepvit_micro")
else:
    quick = {"epochs": 1, "warmup_epochs": 0}
    model = train("sepvit_micro", TRACK, quick, device="cpu", evaluate=False).model
print(f"top-1 on the test split: {evaluate(model, TRACK)[0].value:.1f} %")

# %% [markdown]
# ## 4. Without the tokens' say
# What if every window took the same share of every other one? That is what constant queries give.


# %%
def top1_with_uniform_shares() -> float:
    """The same weights, but queries and keys between windows are zero."""
    other = harness.build("sepvit_micro", num_classes=model.num_classes)
    other.load_state_dict(model.state_dict())
    for name, parameter in other.named_parameters():
        if ".PSA_qk." in name:
            parameter.data.zero_()
    return evaluate(other.eval(), TRACK)[0].value


print(f"with uniform shares between windows: {top1_with_uniform_shares():.1f} %")

# %% [markdown]
# ## 5. The picture
# Which part of its window does a token look at? And which windows does a window take from?

# %%
sample = sample_images(model, TRACK, 5)
fine, grouped = look(model, sample.inputs, 0, 0), look(model, sample.inputs, 0, 1)
figure = window_figure(sample, {"fine": (fine, (0, 5, 10)), "grouped": (grouped, (0, 3))})
path = home() / "lessons" / "sepvit.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=110)
print(f"picture: {path}")
