# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: all,-language_info
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside a ternary network
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bitllm/blob/main/notebooks/03_inside_ternary.ipynb)
#
# How a matrix of real numbers becomes one of -1, 0 and 1, what that does to the numbers that flow
# through, and what it costs against the same network in full precision. Two tiny networks are
# trained for it, which takes a minute or two on a CPU and needs no download.

# %% [markdown]
# ## Installation

# %%
# @title Set up
import importlib.util
import os
import re
import subprocess
import sys

sys.path[:0] = [".", ".."]  # in a checkout the package is beside this notebook or above it
if not getattr(importlib.util.find_spec("bitllm"), "origin", None):  # elsewhere: install it
    sessions = subprocess.getoutput("curl -sm 2 $COLAB_JUPYTER_IP:$KMP_TARGET_PORT/api/sessions")
    match = re.search(r'github\.com/([^"]+?/blob/[^"]+?)/notebooks/', sessions.replace("%2F", "/"))
    source = os.environ.get("BITLLM_REPOSITORY") or (match[1] if match else "OWNER/bitllm@main")
    archive = f"https://github.com/{re.sub('/blob/|@', '/archive/', source)}.zip"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "jupyter_ui_poll"]
    subprocess.run([*pip, archive], check=True)  # if this fails: open bitllm_one_cell.ipynb

# %%
import dataclasses
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import bitllm as bit
from bitllm_core import encode, generate_tokens

bit.log_to(sys.stdout)

# %% [markdown]
# ## Two small networks
#
# The same shape, the same data in the same order, the same number of steps. `linear="ternary"`
# rounds every weight of the blocks and every activation that enters them; `linear="dense"` rounds
# nothing.

# %%
shape, data, train = bit.PRESETS["ci"]
train = dataclasses.replace(train, max_steps=100, eval_every_steps=25, log_every_steps=5)
states = {}
for linear in ("ternary", "dense"):
    model = dataclasses.replace(shape, linear=linear)
    run = Path("runs") / f"inside-{linear}"
    states[linear] = bit.train(model, data, train, run, callbacks=[bit.LiveDisplay(run)])

# %% [markdown]
# ## Absmean: from a matrix to trits
#
# The scale is the mean size of the weights, s = mean |W|. Each weight is divided by it, rounded and
# clipped: what is smaller than s/2 becomes 0, the rest keeps its sign and nothing else.

# %%
name, layer = next(iter(states["ternary"].model.bit_linears().items()))
master = layer.weight.detach().cpu()
scale = master.abs().mean()
by_hand = (master / scale).round().clamp(-1, 1)
print(name, tuple(master.shape), f"s = {scale:.4f}")
print(master[:3, :5], by_hand[:3, :5].int(), sep="\n")

# %% [markdown]
# The library does the same, with a floor under the scale for a matrix of zeros.

# %%
ternary, s = bit.weight_quant(master)
assert torch.equal(ternary, by_hand)
print({int(v): f"{(ternary == v).float().mean():.1%}" for v in (-1, 0, 1)})

# %%
_, places = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
matrices = {"master weights": master, "trits": ternary}
for axes, (title, matrix) in zip(places, matrices.items(), strict=True):
    axes.imshow(matrix, cmap="RdBu", vmin=-matrix.abs().max(), vmax=matrix.abs().max())
    axes.set_title(f"{name.removeprefix('model.')}: {title}", fontsize=9)
plt.show()

# %% [markdown]
# ## Weights around the thresholds
#
# Training moves the master weights, which stay real numbers. A weight near a threshold, ±s/2,
# flips with a small push; one in the middle of its bin needs many. The dense twin's weights, under
# the same optimizer, know no thresholds.

# %%
_, places = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axes, (linear, state) in zip(places, states.items(), strict=True):
    weight = state.model.bit_linears()[name].weight.detach().cpu().flatten()
    half = weight.abs().mean() / 2
    axes.hist(weight.numpy(), bins=80, color="#0b5cad")
    for threshold in (-half, half):
        axes.axvline(threshold, color="#b34700")
    near = ((weight.abs() - half).abs() < 0.1 * half).float().mean()
    axes.set_title(f"{linear}: {near:.1%} within a tenth of a threshold", fontsize=9)
plt.show()

# %% [markdown]
# ## Zeros and flips, by layer and time
#
# Weights begin uniformly distributed, and a quarter of such weights is smaller than half their mean
# size. Training gives them the shape of a bell, for which it would be 31%. Trits flip often while
# the learning rate is high, and freeze as it falls.

# %%
lines = [line for line in bit.read_metrics("runs/inside-ternary") if "loss" in line]
steps = [line["step"] for line in lines]
_, places = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axes, key in zip(places, ("zero_fraction", "flip_rate"), strict=True):
    for number, values in enumerate(zip(*(line[key] for line in lines), strict=True)):
        axes.plot(steps, values, label=f"layer {number}")
    axes.set_title(key.replace("_", " "), fontsize=9)
    axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Activations in 8 bits
#
# What enters a ternary matrix is rounded too: each token's vector to 127 steps up and down of its
# own largest value. A hook on the norm before the first attention shows the vectors of real text
# before, and `activation_quant` after.

# %%
net, tokenizer = bit.load_model("runs/inside-ternary")
outputs = []
norm = net.model.layers[0].input_layernorm
hook = norm.register_forward_hook(lambda layer, x, y: outputs.append(y))
with torch.no_grad():
    net(torch.tensor([encode(tokenizer, "The with statement is used to wrap a block.")]))
hook.remove()
before = outputs[0][0]
after = bit.activation_quant(before)
error = (after - before).norm() / before.norm()
print(f"{len(before)} tokens of width {before.shape[1]}, relative error {error:.2%}")
assert error > 0

# %%
_, axes = plt.subplots(figsize=(9, 3), layout="constrained")
axes.plot(before[0], label="before", color="#0b5cad")
axes.plot(after[0], ".", label="after, 8 bits", color="#b34700")
axes.set_title("the first token's vector", fontsize=9)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What it costs
#
# Validation loss of both networks, each trained at the learning rate that was tuned for its form:
# at one rate for both, most of the gap would be the rate's. In so short a training they end close
# to each other; `docs/results.md` has the gap of longer ones, over several seeds.

# %%
_, axes = plt.subplots(figsize=(9, 3), layout="constrained")
last = {}
for linear, color in {"ternary": "#0b5cad", "dense": "#b34700"}.items():
    lines = bit.read_metrics(f"runs/inside-{linear}")
    points = [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x and "final" not in x]
    axes.plot(*zip(*points, strict=True), ".-", label=linear, color=color)
    last[linear] = points[-1][1]
axes.set_title("validation loss, nats per token", fontsize=9)
axes.legend(fontsize=8)
plt.show()

# %%
gap = last["ternary"] - last["dense"]
print(f"ternary {last['ternary']:.3f}, dense {last['dense']:.3f}: {gap:+.3f} nats per token")

# %% [markdown]
# ## What it saves
#
# The smallest file of each: five trits in a byte for the one, 16 bits per weight for the other. The
# embedding has 16 bits in both, and is a large part of a network this small. The time to write
# text is that of this program; llama.cpp gains more from trits.

# %%
packed = bit.export_packed("runs/inside-ternary", "runs/inside.safetensors", overwrite=True)
sizes = {"ternary": packed.size, "dense": 2 * shape.num_parameters}
for linear in states:
    net, _ = bit.load_model(f"runs/inside-{linear}")
    start = time.perf_counter()
    tokens = list(generate_tokens(net, [[0]], bit.SamplingConfig(max_new_tokens=60, seed=0)))
    speed = len(tokens) / (time.perf_counter() - start)
    print(f"{linear:8} {sizes[linear]:9,} bytes, {speed:4.0f} tokens/s")

# %%
assert all(state.step == train.max_steps for state in states.values()), "a training was stopped"
print("complete:", {linear: state.step for linear, state in states.items()})
