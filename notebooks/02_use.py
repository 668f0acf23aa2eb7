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
# Talk to a model that you trained, see how small it is, and take it to other programs, to a web
# page or to the Hugging Face Hub. **Run everything once:** in Colab *Runtime > Run all*, in
# JupyterLab *Run > Run All Cells*. It takes seconds. Where no model is found, a small one is
# trained first, in about three minutes.

# %% cellView="form" jupyter={"source_hidden": true}
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

# %% cellView="form" jupyter={"source_hidden": true}
# @title Start
from pathlib import Path

import torch

import bitllm as bit

bit.log_to(sys.stdout)
bit.brief_errors()

# %% [markdown]
# ## The model
#
# Path of a run folder or of an exported file, or `hf:OWNER/NAME`. Leave it empty for the most
# recent model: in `runs/`, where the command line leaves it, or uploaded below. In Colab every
# notebook has a machine of its own: tick the box for runs that were copied to your Drive.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Model
where = ""  # @param {type: "string"}
use_drive = False  # @param {type: "boolean"}

drive = bit.mount_drive() if use_drive else None
bit.upload_box()
run = bit.find_model(where, drive)
if run is None:
    settings = bit.Settings(data="companion")
    print(f"no model yet, so this trains one\n{settings.describe()}")
    run = settings.run_folder
    bit.train(*settings.configs(), run, callbacks=[bit.LiveDisplay(run)])
net, tokenizer = bit.load_model(run)
print(f"{run.as_posix()}: {net.config.num_parameters / 1e6:.2f}M parameters")

# %% [markdown]
# ## Write
#
# A model that was trained on conversations gets a chat here, and remembers what was said. Any
# other gets a box for the beginning of a text. Under **How it chooses its words**: temperature 0
# always takes the likeliest token; higher values take more risks.

# %%
bit.try_out(run)

# %% [markdown]
# The same in code: `respond` yields an answer, or how the text continues, as it is generated.
# `bit.Chat` is a conversation with its history; `bit.stream` and `bit.generate` know text alone.

# %%
prompt = ""  # @param {type: "string"}
prompt = prompt or ("hello" if bit.can_chat(tokenizer) else bit.first_words(run, tokenizer))
between = "\n" if bit.can_chat(tokenizer) else ""
sampling = bit.SamplingConfig(max_new_tokens=80, temperature=0.7, top_k=40, top_p=0.95, seed=0)
print(prompt, end=between)
for piece in bit.respond(net, tokenizer, prompt, sampling):
    print(piece, end="")

# %% [markdown]
# A low temperature repeats itself, a high one loses the thread.

# %%
for temperature in (0.0, 0.7, 1.5):
    sampling = bit.SamplingConfig(max_new_tokens=30, temperature=temperature, seed=0)
    print(f"\ntemperature {temperature}\n{prompt}", end=between)
    print(*bit.respond(net, tokenizer, prompt, sampling), sep="")

# %% [markdown]
# ## Side by side
#
# Two models and the same words: a run that trained longer, a dense twin, a companion and the model
# it began with. Give another run, an export or `hf:OWNER/NAME`, or a step of this run, such as
# `500`. Empty: the earliest step that was kept.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Side by side
beside = ""  # @param {type: "string"}
bit.compare(run, beside)

# %% [markdown]
# ## How big is it?
#
# A ternary weight needs log2(3) = 1.58 bits. Five of them fit into a byte (3^5 = 243), which is
# 1.6 bits each. Embedding and norms stay 16-bit numbers, so the larger the model, the closer the
# file gets to a tenth of its fp16 size.

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
# ## Export
#
# One packed file for this program, a folder for transformers, and a GGUF file for llama.cpp,
# ollama and LM Studio. How closely they agree:
# [export](https://github.com/OWNER/bitllm/blob/main/docs/export.md).

# %%
folder = Path("exports")
names = ["Small file", "transformers"]
limits = bit.export_limits(net.config)
names += [] if limits else ["GGUF", "Web page"]
exports = {}
for name in names:
    try:
        exports[name] = bit.write_export(name, run, folder)
        bit.download_button(exports[name])
    except OSError as error:  # without a network, no web page
        print(f"{name}: {error}")
print(*limits, sep="\n")

# %% [markdown]
# ## A page for your friends
#
# One web page with the model inside: it opens in any browser, on a phone too, and writes there. It
# needs no server and sends nothing anywhere. The first time, llama.cpp for browsers (17 MB) is
# fetched for it. How to put it on the web:
# [the web page](https://github.com/OWNER/bitllm/blob/main/docs/demo.md).

# %%
if "Web page" in exports:
    bit.show_page(exports["Web page"])

# %% [markdown]
# The packed file, read back, is the same model except for the embedding, which is rounded to 16
# bits: where two words are nearly equally likely, it may choose the other one.

# %%
again, its_tokenizer = bit.load_model(exports["Small file"])
sampling = bit.SamplingConfig(max_new_tokens=30, temperature=0, seed=0)
for model, words in ((net, tokenizer), (again, its_tokenizer)):
    print(repr("".join(bit.respond(model, words, prompt, sampling))))

# %% [markdown]
# llama.cpp itself, inside this notebook. Tick the box to try it (34 MB download).

# %% cellView="form" jupyter={"source_hidden": true}
# @title llama.cpp
use_llama_cpp = False  # @param {type: "boolean"}
if use_llama_cpp and "GGUF" in exports:
    if importlib.util.find_spec("xllamacpp") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "xllamacpp"], check=False)
    for piece in bit.llama_cpp_stream(exports["GGUF"], prompt, sampling):
        print(piece, end="")

# %% [markdown]
# Publish all of these in one repository of the Hugging Face Hub: store a write token as `HF_TOKEN`
# in Colab's secrets (the key at the left) or in the environment, and give OWNER/NAME here.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Hugging Face Hub
repo_id = ""  # @param {type: "string"}
if repo_id:
    print(bit.publish(run, repo_id))
