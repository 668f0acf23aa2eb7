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
# # Use your model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bitllm/blob/main/notebooks/02_use.ipynb)
#
# A chat, or a prompt box with sliders, for the model that `01_train` left behind, and what its
# ternary weights weigh. Costs nothing and takes seconds. Where no model is found, a small one is
# trained first.

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
from pathlib import Path

import torch

import bitllm as bit

bit.log_to(sys.stdout)

# %% [markdown]
# ## The model
#
# A run folder is all that is needed: give its path, also one on a mounted Drive. Empty: the run
# that was trained last.

# %%
# @title Model
run = ""  # @param {type: "string"}

run = Path(run) if run else bit.newest_run("runs")
if run is None:
    settings = bit.Settings()
    print(f"no run in runs/ yet, so this trains one\n{settings.describe()}")
    run = settings.run_folder
    bit.train(*settings.configs(), run, callbacks=[bit.LiveDisplay(run)])
net, tokenizer = bit.load_model(run)
print(f"{run.as_posix()}: {net.config.num_parameters / 1e6:.2f}M parameters")

# %% [markdown]
# ## Write
#
# A model that was trained on conversations gets a chat here, and remembers what was said. Any
# other gets a box for the beginning of a text. There, temperature 0 always takes the likeliest
# token; higher values dare more. Top-k and top-p leave out what is unlikely. Press **Say** or
# **Write** as often as you like. Empty: `hello`, or `The `.

# %%
prompt = ""  # @param {type: "string"}
prompt = prompt or ("hello" if bit.can_chat(tokenizer) else "The ")
bit.prompt_box(net, tokenizer, prompt)

# %% [markdown]
# The same in code: `respond` yields an answer, or how the text goes on, as it comes. `bit.Chat` is
# a conversation with its history; `bit.stream` and `bit.generate` know text alone.

# %%
sampling = bit.SamplingConfig(max_new_tokens=80, temperature=0.7, top_k=40, top_p=0.95, seed=0)
for piece in bit.respond(net, tokenizer, prompt, sampling):
    print(piece, end="")

# %% [markdown]
# A low temperature repeats itself, a high one loses the thread.

# %%
for temperature in (0.0, 0.7, 1.5):
    sampling = bit.SamplingConfig(max_new_tokens=30, temperature=temperature, seed=0)
    text = "".join(bit.respond(net, tokenizer, prompt, sampling))
    print(f"temperature {temperature}: {text!r}")

# %% [markdown]
# ## What it weighs
#
# A ternary weight needs log2(3) = 1.58 bits. Five of them fit into a byte (3^5 = 243), which is
# 1.6 bits each. Embedding and norms stay 16-bit numbers, so the larger the model, the nearer it
# comes to a tenth.

# %%
trits = sum(x.in_features * x.out_features for x in net.bit_linears().values())
others = net.config.num_parameters - trits
fp16, packed = 2 * (trits + others), trits / 5 + 2 * others
print(f"{trits:,} ternary weights, {others:,} others")
print(f"all of it in fp16: {fp16 / 1e6:.2f} MB; packed: {packed / 1e6:.2f} MB, {packed / fp16:.0%}")

# %% [markdown]
# Packing and unpacking gives the same weights: five trits are the digits of a number to base 3.

# %%
layer = next(iter(net.bit_linears().values()))
ternary, scale = layer.ternary()
digits = (ternary.flatten()[: ternary.numel() // 5 * 5].long() + 1).view(-1, 5)
powers = torch.tensor([1, 3, 9, 27, 81])
bytes_ = (digits * powers).sum(1).to(torch.uint8)
unpacked = bytes_.long()[:, None] // powers % 3
print(f"{digits.numel():,} trits in {bytes_.numel():,} bytes; the first five: {digits[0].tolist()}")
assert torch.equal(unpacked, digits)

# %% [markdown]
# ## Take it along
#
# One packed file for this program, a folder for transformers, and a GGUF file for llama.cpp and
# what is built on it. `docs/export.md` shows how closely they agree.

# %%
# @title Export
folder = Path("exports")
folder.mkdir(exist_ok=True)
exports = [
    bit.export_packed(run, folder / f"{run.name}.safetensors", overwrite=True),
    bit.export_hf(run, folder / f"{run.name}-hf", overwrite=True),
]
limits = bit.export_limits(net.config)
if not limits:
    if importlib.util.find_spec("gguf") is None:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "gguf"]
        subprocess.run(command, check=True)
    exports.append(bit.export_gguf(run, folder / f"{run.name}.gguf", overwrite=True))
for exported in exports:
    size, bits = (
        f"{exported.size:,} bytes",
        f"{exported.bits_per_weight:.2f} bits per ternary weight",
    )
    print(f"{exported.path.as_posix()}: {size}, {bits}\n{exported.usage}")
if limits:
    print(f"no GGUF file: {'; '.join(limits)}")

# %%
for exported in exports:
    bit.download_button(exported.path)

# %% [markdown]
# ## A page for your friends
#
# One web page with the model inside: it opens in any browser, on a phone too, and writes there. It
# needs no server and sends nothing anywhere. The first time, llama.cpp for browsers (17 MB) is
# fetched for it. `docs/demo.md` explains how to put the page on the web.

# %%
# @title Web page
try:
    if limits:
        raise OSError("; ".join(limits))
    page = bit.export_html(run, folder / f"{run.name}.html", overwrite=True)
    print(f"{page.path.as_posix()}: {page.size:,} bytes\n{page.usage}")
    bit.download_button(page.path)
except OSError as error:
    print(f"no web page: {error}")

# %% [markdown]
# The packed file, read back, is the same model but for the embedding, which is rounded to 16 bits:
# where two words are nearly equally likely, it may take the other one.

# %%
again, its_tokenizer = bit.load_model(exports[0].path)
sampling = bit.SamplingConfig(max_new_tokens=30, temperature=0, seed=0)
for model, words in ((net, tokenizer), (again, its_tokenizer)):
    print(repr("".join(bit.respond(model, words, prompt, sampling))))

# %% [markdown]
# llama.cpp itself, inside this notebook. It is a download of 34 MB, so only with a tick.

# %%
use_llama_cpp = False  # @param {type: "boolean"}
if use_llama_cpp and exports[-1].path.suffix == ".gguf":
    if importlib.util.find_spec("xllamacpp") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "xllamacpp"], check=False)
    for piece in bit.llama_cpp_stream(exports[-1].path, prompt, sampling):
        print(piece, end="")

# %% [markdown]
# To the Hugging Face hub, for others to load by name: put a token with the right to write under
# `HF_TOKEN` into Colab's secrets (the key at the left) or the environment, and give the name here.

# %%
repo_id = ""  # @param {type: "string"}
if repo_id:
    print(bit.push_to_hub(exports[1].path, repo_id))
