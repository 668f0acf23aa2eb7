"""Train a ternary (BitNet b1.58) language model from scratch, stop and go on exactly, and use it.

One file holds the model, the tokenizer, the data, the resumable training loop and the command
line; it runs on a laptop's CPU as well as on a GPU. Importing it defines names and does nothing.

    import bitllm_core as bit
    model, data, train = bit.PRESETS["demo"]
    bit.train(model, data, train, "runs/demo")          # again: goes on where it stopped
    net, tokenizer = bit.load_model("runs/demo")
    print(bit.generate(net, tokenizer, "The with statement", bit.SamplingConfig(seed=0)))

Contents
    1 Configuration   what can be set, checked when it is set, and the presets
    2 Quantization    ternary weights, 8-bit activations and the layer made of them
    3 Model           the transformer, its initialisation and the import of seed checkpoints
    4 Tokenizer       byte-level BPE (lossless) or the seed's WordPiece
    5 Data            any text to a token file; a batch is a function of (seed, step)
    6 Generation      cached sampling, streamed or whole
    7 Optimization    Muon and AdamW, their groups and the schedule
    8 Checkpoints     written whole or not at all, and loaded as data only
    9 Training        evaluation and the loop
    10 Export         to transformers, llama.cpp, one small file and a web page, and back
    11 Notebook       settings form, live display with buttons, Drive, prompt box
    12 Command line   train, generate, evaluate; the package adds commands

Dimensions in comments
    B batch   T tokens   D hidden_size   H query heads   G key/value heads   K head_dim
    V vocabulary   O, I out and in features of a matrix

References
    [1] Ma et al., The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024,
        arXiv:2402.17764; the authors' "Training Tips, Code and FAQ" to it.
    [2] Ma et al., BitNet b1.58 2B4T Technical Report, 2025, arXiv:2504.12285.
    [3] Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    [4] Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864.
    [5] Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations,
        2024, arXiv:2405.18392 (warm-up, constant, cooldown).
    [6] Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import ctypes
import dataclasses
import errno
import gzip
import hashlib
import html
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import platform
import queue
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger("bitllm")

__all__ = [
    "PRESETS",
    "BitLM",
    "BitLinear",
    "Callback",
    "DataConfig",
    "Exported",
    "LiveDisplay",
    "ModelConfig",
    "SamplingConfig",
    "Settings",
    "SettingsPanel",
    "TokenData",
    "TrainConfig",
    "TrainState",
    "activation_quant",
    "download_button",
    "environment_report",
    "evaluate",
    "export_gguf",
    "export_hf",
    "export_html",
    "export_packed",
    "generate",
    "import_seed_checkpoint",
    "llama_cpp_stream",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "mount_drive",
    "newest_run",
    "prepare_data",
    "prompt_box",
    "push_to_hub",
    "save_checkpoint",
    "show_run",
    "stream",
    "train",
    "train_tokenizer",
    "weight_quant",
]

# -----------------------------------------------------------------------------
# 1 Configuration
# Every field is a command-line flag of the same name. __post_init__ only checks.

END_OF_TEXT = "<|endoftext|>"
WORDPIECE_SPECIALS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
NO_COUNTERPART = "only block=bitnet, linear=ternary and a tied embedding have a counterpart"
MIN_VOCAB_SIZE = 257  # 256 bytes and <|endoftext|>


def require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def config_from(kind: Any, values: Any, path: Path) -> Any:
    """A configuration as a file gives it; ValueError names the file and what is wrong in it."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected the fields of a {kind.__name__}, got {values!r:.80}")
    types = {item.name: str(item.type).split(" | ") for item in fields(kind)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{path}: {name!r:.80} is no field of {kind.__name__}")
        given = "None" if value is None else type(value).__name__
        if given not in types[name] and not (given == "int" and "float" in types[name]):
            expected = " or ".join(types[name])
            raise ValueError(f"{path}: {name}={value!r:.80}: expected {expected}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def first_line(error: Exception) -> str:
    """The beginning of a library's error, for the line in which we explain it."""
    return next(iter(str(error).strip().splitlines()), "")[:140]


def library(name: str, why: str) -> Any:
    """A package that not everybody needs; ImportError says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{why} needs the package {name}: pip install {name}") from error


def extension(module: str, why: str) -> Any:
    """The module `bitllm.<module>`; ImportError where this file is alone.

    This is the only place where the core reaches for the package around it.
    """
    sys.modules.setdefault("bitllm_core", sys.modules[__name__])  # run as a script: no second copy
    try:
        return importlib.import_module(f"bitllm.{module}")
    except ModuleNotFoundError as error:
        if error.name not in ("bitllm", f"bitllm.{module}"):
            raise
        raise ImportError(
            f"{why} needs the bitllm package around bitllm_core.py: "
            "pip install it from its repository, or run in a checkout"
        ) from error


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network, in Hugging Face's names. The defaults are the `demo` preset's."""

    vocab_size: int = 2048
    """embedding rows; the tokenizer is trained to at most as many tokens"""
    hidden_size: int = 256
    """width of the residual stream"""
    intermediate_size: int = 768
    """width inside the feed-forward block"""
    num_hidden_layers: int = 4
    """transformer blocks"""
    num_attention_heads: int = 4
    """query heads; each is hidden_size / num_attention_heads wide"""
    num_key_value_heads: int | None = None
    """key and value heads, shared by groups of query heads; default: num_attention_heads"""
    max_position_embeddings: int = 128
    """context length and length of a training window, tokens"""
    rope_theta: float = 10_000.0
    """base wavelength of the rotary embedding"""
    rms_norm_eps: float = 1e-5
    """added to the mean square in every norm"""
    tie_word_embeddings: bool = True
    """the output head is the (float) embedding; without it the head is a BitLinear of its own"""
    linear: str = "ternary"
    """form of every BitLinear: ternary (and 8-bit activations), weight_only, or dense (the twin)"""
    block: str = "bitnet"
    """bitnet (RMSNorm, rotary, SiLU, sub-norms) or seed (LayerNorm, learned positions, ReLU)"""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name, most in _MOST.items():
            require(getattr(self, name) <= most, name, getattr(self, name), f"at most {most:,}")
        require(
            self.vocab_size >= MIN_VOCAB_SIZE,
            "vocab_size",
            self.vocab_size,
            f"at least {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT})",
        )
        heads, kv_heads = self.num_attention_heads, self.num_kv_heads
        require(heads >= 1, "num_attention_heads", heads, "at least 1")
        require(
            self.hidden_size % heads == 0,
            "num_attention_heads",
            heads,
            f"a divisor of hidden_size={self.hidden_size}, "
            f"such as {_near_divisor(self.hidden_size, heads)}",
        )
        require(
            self.block == "seed" or self.head_dim % 2 == 0,
            "num_attention_heads",
            heads,
            f"an even head width (rotary embedding turns pairs), not {self.head_dim}",
        )
        require(
            kv_heads >= 1 and heads % kv_heads == 0,
            "num_key_value_heads",
            kv_heads,
            f"a divisor of num_attention_heads={heads}, such as {_near_divisor(heads, kv_heads)}",
        )
        context = self.max_position_embeddings
        require(context >= 2, "max_position_embeddings", context, "at least 2")
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a positive number")
        require(self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "a positive number")
        linears = ("ternary", "weight_only", "dense")
        require(self.linear in linears, "linear", self.linear, f"one of {', '.join(linears)}")
        require(self.block in ("bitnet", "seed"), "block", self.block, "bitnet or seed")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """All trained numbers, the embedding counted once where it is tied."""
        D, M, kv = self.hidden_size, self.intermediate_size, self.num_kv_heads * self.head_dim
        seed = self.block == "seed"
        norms = 4 * D if seed else 3 * D + M
        matrices = 2 * D * D + 2 * D * kv + (2 if seed else 3) * D * M
        total = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        total += self.num_hidden_layers * (matrices + norms) + (2 * D if seed else D)
        return total + (self.max_position_embeddings * D if seed else 0)

    @property
    def export_limits(self) -> list[str]:
        """What keeps this model from some client once it is exported; empty: every client works."""
        found = []
        if self.block != "bitnet" or not self.tie_word_embeddings or self.linear != "ternary":
            found.append(NO_COUNTERPART)
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 256:
                found.append(f"llama.cpp's ternary blocks need {name} to be a multiple of 256")
        if self.head_dim not in (64, 128):
            found.append(f"head width {self.head_dim} is neither 64 nor 128")
        return found


_MOST = {  # beyond any machine: a slip of the hand, or a hostile file
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1 << 10,
    "max_position_embeddings": 1 << 20,
}


def _near_divisor(n: int, wanted: int) -> int:
    divisors = [d for d in range(1, min(n, 4096) + 1) if n % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    data: str = "pydocs"
    """a .txt, .jsonl, .parquet file or folder, a known name, hf:OWNER/NAME[:CONFIG][#COLUMN]"""
    validation_data: str | None = None
    """a second source to validate on; default: the source's own split, or its held-out tail"""
    validation_fraction: float = 0.05
    """share of the text held out where the source has no validation split"""
    text_column: str | None = None
    """column of .jsonl, .parquet or hub rows; default: text, or the only column of strings"""
    max_train_tokens: int | None = None
    """train on no more than this many; hub sources and folders then come in while training runs"""
    tokenizer: str = "bpe"
    """bpe (byte-level, lossless) or wordpiece (the seed's)"""

    def __post_init__(self) -> None:
        require(bool(self.data), "data", self.data, "a file, a folder, a data set's name or pydocs")
        fraction = self.validation_fraction
        require(0 < fraction < 0.9, "validation_fraction", fraction, "a number in (0, 0.9)")
        budget = self.max_train_tokens
        require(budget is None or budget > 0, "max_train_tokens", budget, "a positive number")
        kinds = ("bpe", "wordpiece")
        require(self.tokenizer in kinds, "tokenizer", self.tokenizer, "bpe or wordpiece")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and with what care to train."""

    max_steps: int = 200
    """optimizer steps in all"""
    batch_tokens: int = 4096
    """tokens an optimizer step, a multiple of max_position_embeddings"""
    micro_batch_size: int | None = None
    """windows at once on the device; default: found. Does not change the mathematics"""
    seed: int = 0
    """of the initial weights and the order of the data"""
    optimizer: str = "muon"
    """muon (matrices; AdamW for the rest) or adamw"""
    learning_rate: float | None = None
    """peak rate of the matrices; default: as tuned, 0.04 with muon (0.02 where linear=dense)"""
    adamw_learning_rate: float | None = None
    """peak rate of embedding, norms, head; default: 0.005 with muon, learning_rate with adamw"""
    weight_decay: float = 0.0
    """decoupled, on matrices only"""
    momentum: float = 0.95
    """Muon's"""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    adam_beta2: float = 0.95
    """AdamW's decay of the mean square gradient"""
    max_grad_norm: float = 1.0
    """clip AdamW's gradients to this norm (Muon's step does not depend on it); 0: never"""
    schedule: str = "wsd"
    """wsd (warm-up, constant, linear cooldown) or cosine"""
    warmup_steps: int = 20
    """optimizer steps of linear warm-up"""
    cooldown_fraction: float = 0.4
    """share of max_steps in the cooldown of wsd"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    dtype: str = "auto"
    """of matrix products: auto, float32, bfloat16, float16. Master weights are float32"""
    compile: str = "auto"
    """torch.compile: auto (where it pays), on, off"""
    fsdp: bool = False
    """share out the model itself over several processes (FSDP): for what does not fit on one GPU"""
    deterministic: bool = False
    """ask a GPU for repeatable kernels (slower); a CPU always is"""
    log_every_steps: int = 10
    """optimizer steps between lines in metrics.jsonl"""
    eval_every_steps: int = 100
    """optimizer steps between evaluations; 0: only at the end"""
    eval_tokens: int = 65_536
    """validation tokens of an evaluation during training; at the end: all"""
    patience: int = 0
    """evaluations in a row without a better validation loss that end the run; 0: none do"""
    sample_prompt: str = ""
    """beginning of the text written at each evaluation"""
    save_every_steps: int = 0
    """optimizer steps between checkpoints; 0: by time only"""
    save_every_minutes: float = 5.0
    """minutes between checkpoints; 0: by steps only"""
    save_every_epoch: bool = False
    """keep a checkpoint of every finished epoch, as the seed script does"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay"""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_tokens", "log_every_steps", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        batch = self.batch_tokens
        require(batch <= 1 << 27, "batch_tokens", batch, f"at most {1 << 27:,}")
        for name in ("eval_every_steps", "patience", "save_every_steps", "warmup_steps", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("weight_decay", "max_grad_norm", "save_every_minutes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.eval_tokens >= 1, "eval_tokens", self.eval_tokens, "at least 1")
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, "micro_batch_size", micro, "at least 1")
        for name in ("learning_rate", "adamw_learning_rate"):
            rate = getattr(self, name)
            require(rate is None or rate > 0, name, rate, "a positive number")
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)")
        share = self.cooldown_fraction
        require(0 <= share <= 1, "cooldown_fraction", share, "a number in [0, 1]")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, name, value, f"one of {', '.join(allowed)}")


_CHOICES = {
    "optimizer": ("muon", "adamw"),
    "schedule": ("wsd", "cosine"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "on", "off"),
}


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 100
    """tokens to write at most"""
    temperature: float = 0.8
    """divides the logits; 0: always the likeliest token"""
    top_k: int = 50
    """choose among this many likeliest tokens; 0: all"""
    top_p: float = 1.0
    """choose among the likeliest tokens whose probabilities reach this sum"""
    repetition_penalty: float = 1.0
    """divides (negative: multiplies) the logits of tokens already there; 1: none"""
    seed: int | None = None
    """of the choices; default: a new one each time"""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "0 or more")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        penalty = self.repetition_penalty
        require(penalty > 0, "repetition_penalty", penalty, "a positive number")
        require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")


_TUNED_RATES = {  # tools/experiments.py, recipe: of the matrices, of the rest
    ("muon", "ternary"): (0.04, 5e-3),
    ("muon", "dense"): (0.02, 5e-3),
    ("adamw", "ternary"): (1.5e-3, 1.5e-3),
    ("adamw", "dense"): (1.5e-3, 1.5e-3),
}


def peak_rates(model: ModelConfig, training: TrainConfig) -> tuple[float, float]:
    """Peak rates of the matrices and of embedding, norms and head; tuned where nothing is set.

    A ternary weight moves only when its master crosses a threshold, so it wants the faster rate.
    """
    tuned = _TUNED_RATES[training.optimizer, "dense" if model.linear == "dense" else "ternary"]
    matrices = training.learning_rate or tuned[0]
    rest = matrices if training.optimizer == "adamw" else tuned[1]
    return matrices, training.adamw_learning_rate or rest


def check_configs(model: ModelConfig, training: TrainConfig) -> None:
    """Check what depends on two configurations; ValueError names field, value and remedy."""
    context, batch = model.max_position_embeddings, training.batch_tokens
    below = max(batch // context, 1) * context
    require(
        batch % context == 0,
        "batch_tokens",
        batch,
        f"a multiple of max_position_embeddings={context}, such as {below} or {below + context}",
    )
    micro, windows = training.micro_batch_size, batch // context
    require(
        micro is None or windows % micro == 0,
        "micro_batch_size",
        micro,
        f"a divisor of the {windows} windows a step, such as {_near_divisor(windows, micro or 1)}",
    )


PRESETS: dict[str, tuple[ModelConfig, DataConfig, TrainConfig]] = {
    "ci": (
        ModelConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        ),
        DataConfig(),
        TrainConfig(
            max_steps=40,
            batch_tokens=1024,
            warmup_steps=4,
            eval_every_steps=20,
            eval_tokens=4096,
            log_every_steps=5,
        ),
    ),
    "demo": (
        ModelConfig(),
        DataConfig(),
        TrainConfig(
            max_steps=400,
            batch_tokens=2048,
            save_every_steps=100,
            eval_every_steps=100,
            patience=3,
        ),
    ),
    "laptop": (
        ModelConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
        ),
        DataConfig(data="wikitext-2"),
        TrainConfig(max_steps=750, batch_tokens=8192, eval_every_steps=75, patience=3),
    ),
    "t4-1h": (
        ModelConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
        ),
        DataConfig(data="tinystories", max_train_tokens=150_000_000),
        TrainConfig(max_steps=2500, batch_tokens=65_536, warmup_steps=100, eval_every_steps=250),
    ),
    "t4-3h": (
        ModelConfig(
            vocab_size=16_384,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=7,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=512,
        ),
        DataConfig(data="fineweb-edu", max_train_tokens=300_000_000),
        TrainConfig(max_steps=4000, batch_tokens=65_536, warmup_steps=100, eval_every_steps=250),
    ),
    "seed": (
        ModelConfig(
            vocab_size=30_000,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            linear="weight_only",
            block="seed",
        ),
        DataConfig(data="wikitext-2", tokenizer="wordpiece"),
        TrainConfig(
            max_steps=3000,
            batch_tokens=8192,
            optimizer="adamw",
            learning_rate=1e-4,
            weight_decay=0.01,
            adam_beta2=0.999,
            max_grad_norm=0.0,
            warmup_steps=0,
            cooldown_fraction=0.0,
            save_every_epoch=True,
        ),
    ),
}
"""Name -> (ModelConfig, DataConfig, TrainConfig). t4-* are sized by arithmetic, not measured."""

# -----------------------------------------------------------------------------
# 2 Quantization
# Both quantizers compute in float32: in float16, 127/absmax overflows below absmax 1.94e-3.

_SCALE_FLOOR = 1e-5  # the reference's clamp [1]


def weight_quant(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to {-1, 0, 1} times one scale (absmean).

    Args:
        weight: full-precision master weight, (out_features, in_features).

    Returns:
        ternary: float32, like `weight`, values in {-1, 0, 1}.
        scale: float32, shape (); weight is approximated by ternary * scale.

    Raises:
        ValueError: `weight` is not a matrix.

    Source: BitNet b1.58 [1], eq. 1-3. The authors' function returns the product.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected a matrix")
    weight = weight.float()
    scale = ternary_scale(weight.abs().mean(dim=1))
    return to_trits(weight, scale), scale


def ternary_scale(row_means: Tensor) -> Tensor:
    """Scale, shape (), of a matrix of which these are the mean magnitudes of the rows, (O).

    The mean of their mean: the same bits wherever the rows lie.
    """
    return row_means.mean().clamp(min=_SCALE_FLOOR)


def to_trits(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-1, 1)


def _to_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, float32, like x, (..., I), and what x was multiplied by."""
    x = x.float()
    scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=_SCALE_FLOOR)  # (..., 1)
    return (x * scale).round().clamp(-128, 127), scale


def activation_quant(x: Tensor) -> Tensor:
    """Round each token's vector to 8 bits and back (absmax).

    Args:
        x: activations, (..., features), any float type.

    Returns:
        float32, like `x`; each vector holds at most 255 different values n * absmax / 127.

    Source: [1], "Training Tips, Code and FAQ", activation_quant.
    """
    whole, scale = _to_8_bits(x)
    return whole / scale


class _StraightThrough(torch.autograd.Function):
    """Forward: a quantizer. Backward: the gradient unchanged, none to the scale ([1], FAQ).

    `x + (q(x) - x).detach()` is the same mathematics; compiled, it made a step three times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.dtype = x.dtype
        if kind == "activation":
            return activation_quant(x)
        ternary, scale = weight_quant(x)
        return ternary * scale

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0].to(ctx.dtype), None


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, held: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0].to(ctx.dtype), None


class _Gathered(torch.autograd.Function):
    """F.linear by a weight whose memory FSDP frees between forward and backward pass.

    Autograd would keep what multiplies, quantized or cast, of every block: in the end a whole
    model. Here it is made of the weight again, which FSDP then gathers again. `linear` is dense
    where trits were gathered, which are quantized already (`TritGather`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: str) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.linear, ctx.dtype, x = linear, x.dtype, x.to(dtype)
        ctx.save_for_backward(x, weight)
        with torch.autocast(kind, enabled=False):
            return F.linear(x, _Gathered.multiplier(weight, linear, dtype))

    @staticmethod
    def multiplier(weight: Tensor, linear: str, dtype: torch.dtype) -> Tensor:
        if linear != "dense":
            ternary, scale = weight_quant(weight.detach())
            weight = ternary.mul_(scale)
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        d_y = grad[0]
        d_x = d_y @ _Gathered.multiplier(weight, ctx.linear, x.dtype)
        d_weight = d_y.flatten(0, -2).T @ x.flatten(0, -2)
        return d_x.to(ctx.dtype), d_weight.to(weight.dtype), None


def held_for(parameter: Tensor, held: Tensor) -> Tensor:
    """`held`, made from `parameter` beforehand; its gradient reaches the parameter unchanged."""
    return _Held.apply(parameter, held) if torch.is_grad_enabled() else held


def quantize_input(x: Tensor, linear: str) -> Tensor:
    """What BitLinears of form `linear` read: 8-bit where ternary. Once for all that share `x`."""
    return _StraightThrough.apply(x, "activation") if linear == "ternary" else x


def pack_trits(trits: Tensor) -> Tensor:
    """Trits, (O, I), two bits each: byte j of a row holds those of inputs j + k * ceil(I / 4)."""
    codes = F.pad(trits + 1, (0, -trits.shape[1] % 4)).to(torch.uint8)
    a, b, c, d = codes.chunk(4, dim=1)
    return a | b << 2 | c << 4 | d << 6  # (O, ceil(I / 4))


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """The reverse of `pack_trits`: int8, (O, I)."""
    codes = torch.cat([packed >> 2 * k & 3 for k in range(4)], dim=1)
    return codes[:, :in_features].to(torch.int8) - 1


_KERNELS = r"""
#include <math.h>
#include <stdint.h>

/* y = x / sqrt(mean(x^2) + eps) * weight for B rows of I numbers. */
void rms_norm(const float *x, const float *weight, float eps, int B, int I, float *y) {
    for (int b = 0; b < B; b++, x += I, y += I) {
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = 0; i < I; i++) sum += x[i] * x[i];
        const float factor = 1 / sqrtf(sum / I + eps);
        for (int i = 0; i < I; i++) y[i] = x[i] * factor * weight[i];
    }
}

/* The products of x, (B, I), rounded to 8 bits, and n ternary matrices, (O[m], I), packed as by
   pack_trits, side by side in y, (B, sum of O). q: room for one row of whole numbers. */
void ternary_linear(const float *x, int B, int I, int n, const uint8_t **w,
                    const float *weight_scale, const int *O, float *y, int16_t *q, int threads) {
    const int J = (I + 3) / 4;
    const int16_t *q0 = q, *q1 = q + J, *q2 = q + 2 * J, *q3 = q + 3 * J;
    for (int b = 0; b < B; b++, x += I) {
        float top = 1e-5f;
        for (int i = 0; i < I; i++) top = fmaxf(top, fabsf(x[i]));
        const float scale = 1.0f / top * 127.0f;  /* torch's way to divide a number by a tensor */
        int32_t sum = 0;                          /* for the codes are trits + 1 */
        for (int i = 0; i < 4 * J; i++) sum += q[i] = i < I ? (int16_t)rintf(x[i] * scale) : 0;
        #pragma omp parallel num_threads(threads) if (threads > 1)
        for (int m = 0, first = 0; m < n; first += O[m++]) {
            #pragma omp for nowait
            for (int o = 0; o < O[m]; o++) {
                const uint8_t *row = w[m] + (int64_t)o * J;
                int32_t dot = 0;
                for (int j = 0; j < J; j++) {
                    const int16_t c = row[j];
                    dot += (int16_t)(c & 3) * q0[j] + (int16_t)(c >> 2 & 3) * q1[j]
                         + (int16_t)(c >> 4 & 3) * q2[j] + (int16_t)(c >> 6) * q3[j];
                }
                y[first + o] = (float)(dot - sum) * (weight_scale[m] / scale);
            }
        }
        for (int m = 0; m < n; m++) y += O[m];
    }
}
"""
"""Plain C, for the compiler to vectorize, for a few rows on a CPU. No torch operation multiplies by
two-bit weights, and torch's own norm takes eight operations, most of the time of a small model."""

FEW_ROWS = 8  # above, unpacking once for a product of matrices is faster


@cache
def cpu_kernels() -> Any:
    """The library of the compiled `_KERNELS`, or None where there is no C compiler.

    It takes a fraction of a second, so nothing is cached: a compiled file from elsewhere could have
    been made for another processor, or by somebody else.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform == "win32":
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.c"), Path(folder, "kernel.so")
        source.write_text(_KERNELS)
        base = [compiler, "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]
        for flags in (["-march=native", "-fopenmp"], ["-march=native"], []):
            command = [*base, *flags, str(source), "-o", str(library), "-lm"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                kernels = ctypes.CDLL(str(library))
                p, i, f = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
                kernels.ternary_linear.argtypes = [p, i, i, i, p, p, p, p, p, i]
                kernels.rms_norm.argtypes = [p, p, f, i, i, p]
                kernels.ternary_linear.restype = kernels.rms_norm.restype = None
                return kernels
    return None


def for_kernels(x: Tensor) -> bool:
    """Whether the kernels may read x, (..., I): a few rows on a CPU, nothing to learn or trace."""
    few = x.numel() <= FEW_ROWS * x.shape[-1] and x.device.type == "cpu"
    only_read = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return few and only_read and cpu_kernels() is not None


class _KernelCall:
    """The kernel's arguments for layers of one input, made once: that takes longer than it."""

    def __init__(self, layers: Sequence[BitLinear]) -> None:
        n, self.sizes = len(layers), [layer.out_features for layer in layers]
        self.packed = [layer.packed for layer in layers]  # held, so that the addresses stay theirs
        self.arguments = (
            *(layers[0].in_features, n),
            (ctypes.c_void_p * n)(*[packed.data_ptr() for packed in self.packed]),
            (ctypes.c_float * n)(*[layer.weight_scale.item() for layer in layers]),
            (ctypes.c_int * n)(*self.sizes),
        )
        self.width = sum(self.sizes)
        self.kernel = cpu_kernels().ternary_linear

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        x, (*batch, size) = x.float().contiguous(), x.shape
        y = torch.empty((*batch, self.width))
        room = torch.empty(size + 3, dtype=torch.int16)
        threads = torch.get_num_threads()
        rows = x.numel() // size
        self.kernel(x.data_ptr(), rows, *self.arguments, y.data_ptr(), room.data_ptr(), threads)
        return y.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (y,)


def project(x: Tensor, layers: Sequence[BitLinear]) -> Sequence[Tensor]:
    """Each layer's output of one input, (..., I), which is quantized once for all of them."""
    first = layers[0]
    if first.at_two_bits(x):
        call = first.kernel_call
        if call is None or any(a is not b.packed for a, b in zip(call.packed, layers, strict=True)):
            call = first.kernel_call = _KernelCall(layers)
        return call(x)
    x = first.read(x)
    return [layer(x) for layer in layers]


class BitLinear(nn.Linear):
    """A matrix without bias that computes with ternary weights and learns in full precision.

    The input is expected to be what `read` returns; `project` sees to it.

    Args:
        in_features, out_features: sizes; the weight is (out_features, in_features).
        linear: "ternary" or "weight_only" (both quantize the weight), or "dense" (neither).

    `freeze` turns the layer into its inference form, two bits a weight: `packed`, uint8
    (O, ceil(I / 4)), and `weight_scale`, float32 (), in place of the weight. Its output equals the
    training form's to float rounding; and where activations are quantized too, it is made of sums
    of whole numbers, and is therefore the same bits by whichever way it is computed.
    Never quantize t * s again: the mean of already ternary weights is smaller than their scale.
    """

    packed: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, linear: str = "ternary") -> None:
        super().__init__(in_features, out_features, bias=False)
        self.linear = linear
        self.held: Tensor | None = None  # see BitLM.hold_weights
        self.gathered: str | None = None  # form of the weight that FSDP brings, see sharded_model
        self.kernel_call: Any = None  # with this layer and those that share its input

    @property
    def frozen(self) -> bool:
        return "packed" in self._buffers

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def trits(self) -> Tensor:
        """Of the inference form: int8, (O, I)."""
        return unpack_trits(self.packed, self.in_features)

    def effective_weight(self) -> Tensor:
        """The weight that multiplies: t * s, or the dense weight. (O, I)"""
        if self.frozen:
            return self.trits * self.weight_scale
        if self.held is not None:
            return held_for(self.weight, self.held)
        if self.linear == "dense":
            return self.weight
        return _StraightThrough.apply(self.weight, "weight")

    def hold(self, dtype: torch.dtype) -> None:
        """Keep what multiplies ready in `dtype`, until `held` is None again."""
        self.held = None
        self.held = (self.trits if self.frozen else self.effective_weight().detach()).to(dtype)

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Trits, int8 (O, I), and their scale, float32 (). ValueError for a dense layer."""
        if self.frozen:
            return self.trits, self.weight_scale
        if self.linear == "dense":
            raise ValueError("this layer is dense (linear='dense'): it has no ternary form")
        ternary, scale = weight_quant(self.weight.detach())
        return ternary.to(torch.int8), scale

    def freeze(self) -> None:
        """Keep only trits and scale. A dense or already frozen layer stays as it is."""
        if self.frozen or self.linear == "dense":
            return
        trits, scale = self.ternary()
        del self.weight
        self.set_ternary(trits, scale)

    def set_ternary(self, trits: Tensor, scale: Tensor) -> None:
        """Give a frozen layer its trits, (O, I), and their scale, float32 ()."""
        self.register_buffer("packed", pack_trits(trits))
        self.register_buffer("weight_scale", scale)
        self.kernel_call = None

    def read(self, x: Tensor) -> Tensor:
        """Quantize an input for this layer's `forward`; the inference form does that itself."""
        return x if self.frozen else quantize_input(x, self.linear)

    def forward(self, input: Tensor) -> Tensor:
        if self.gathered:
            return _Gathered.apply(input, self.weight, self.gathered)
        return self._infer(input) if self.frozen else F.linear(input, self.effective_weight())

    def at_two_bits(self, x: Tensor) -> bool:
        """Whether the kernel multiplies by the packed weights."""
        packed = self.frozen and self.linear == "ternary" and self.held is None
        return packed and for_kernels(x)

    def _infer(self, x: Tensor) -> Tensor:
        weight = self.trits.to(x.dtype) if self.held is None else self.held
        if self.linear == "weight_only":
            return F.linear(x, weight) * self.weight_scale
        whole, scale = _to_8_bits(x)
        return F.linear(whole, weight) * (self.weight_scale / scale)


# -----------------------------------------------------------------------------
# 3 Model
# The block of BitNet b1.58 2B4T [2] with a SiLU gate, which both transformers' and llama.cpp's
# "bitnet" can hold; and, through the same classes, the seed guide's.


class RMSNorm(nn.Module):
    """Divide by the root mean square, times a learned weight. Always float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not for_kernels(x):
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        x, weight, size = x.float().contiguous(), self.weight.float(), x.shape[-1]
        y = torch.empty_like(x)
        pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
        cpu_kernels().rms_norm(*pointers[:2], self.eps, x.numel() // size, size, pointers[2])
        return y


def _norm(config: ModelConfig, size: int) -> nn.Module:
    if config.block == "seed":
        return nn.LayerNorm(size)
    return RMSNorm(size, config.rms_norm_eps)


def _rope_table(config: ModelConfig) -> Tensor:
    """cos and sin of every position and feature pair, (2, T, K/2) [4]."""
    K = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    angles = torch.outer(torch.arange(config.max_position_embeddings).double(), frequencies)
    return torch.stack([angles.cos(), angles.sin()]).float()


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (k, k + K/2) of x, (B, H, T, K), by rope, (2, B or 1, T, K/2)."""
    cos, sin = rope.unsqueeze(2)  # (B or 1, 1, T, K/2) each
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens read so far, room for `max_position_embeddings` of them."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        room = (config.num_hidden_layers, batch, config.num_kv_heads)
        shape = (*room, config.max_position_embeddings, config.head_dim)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, K) behind what is there; return all of it, (B, G, length + T, K)."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, kv = config.hidden_size, config.num_kv_heads * config.head_dim
        self.q_proj = BitLinear(D, D, config.linear)
        self.k_proj = BitLinear(D, kv, config.linear)
        self.v_proj = BitLinear(D, kv, config.linear)
        self.o_proj = BitLinear(D, D, config.linear)
        self.attn_sub_norm = nn.Identity() if config.block == "seed" else _norm(config, D)

    def forward(
        self, x: Tensor, rope: Tensor | None, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        (B, T, D), K = x.shape, self.config.head_dim
        q, k, v = (
            y.view(B, T, -1, K).transpose(1, 2)  # (B, H or G, T, K)
            for y in project(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        groups = q.shape[1] // k.shape[1]
        if T == 1 and mask is None:  # one token sees all: the heads of a group are its queries
            q, groups = q.view(B, k.shape[1], groups, K), 1
        if groups > 1:  # not enable_gqa: the T4's memory-efficient kernel does not have it
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = y.reshape(B, 1, D) if T == 1 else y.transpose(1, 2).reshape(B, T, D)
        return project(self.attn_sub_norm(y), (self.o_proj,))[0]


class FeedForward(nn.Module):
    """Gated SiLU with a norm before the way down; in the seed's block, plain ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, M = config.hidden_size, config.intermediate_size
        self.gate_proj = None if config.block == "seed" else BitLinear(D, M, config.linear)
        self.up_proj = BitLinear(D, M, config.linear)
        self.down_proj = BitLinear(M, D, config.linear)
        self.ffn_sub_norm = nn.Identity() if config.block == "seed" else _norm(config, M)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            y = F.relu(project(x, (self.up_proj,))[0])
        else:
            gate, up = project(x, (self.gate_proj, self.up_proj))
            y = F.silu(gate) * up
        return project(self.ffn_sub_norm(y), (self.down_proj,))[0]


class Block(nn.Module):
    """Attention, then feed-forward, each normed before and added to the stream after."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rope: Tensor | None, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Trunk(nn.Module):
    """Everything but the head; it exists to give the parameters Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.block == "seed":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config, config.hidden_size)


CHUNK_BYTES = 32 << 20  # of logits in float32 at once; smaller is slower: docs/log.md


def token_probabilities(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """log p of what was wanted, (N, 1) in float32, and p of all tokens in the logits' dtype."""
    log_p = logits.log_softmax(dim=1, dtype=torch.float32)
    return log_p.gather(1, wanted), log_p.exp_().to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Head and cross-entropy in one, a chunk of tokens at a time.

    All logits of a step would be its largest tensor by far (half a gigabyte at a vocabulary of
    30,000), written and read several times. Here a chunk's gradient is taken while its logits are
    there, so nothing of their size outlives it: what is kept for the backward pass is the finished
    gradient of hidden states and weight. The idea is that of Liger Kernel's fused linear cross
    entropy [6], in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        probabilities: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        kind = hidden.device.type
        reduced = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if reduced else hidden.dtype
        learning = any(ctx.needs_input_grad[:2])
        nats = torch.zeros((), device=hidden.device)
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            d_hidden, d_weight = (torch.zeros_like(t) if learning else t for t in (hidden, w))
            ctx.save_for_backward(d_hidden, d_weight)
            rows = max(1, CHUNK_BYTES // (4 * len(w)))
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                x, wanted = hidden[part].to(dtype), targets[part, None]
                counts = (wanted >= 0).to(dtype)  # 0 where the target is -100
                logits = x @ w.T  # (rows, V)
                if not learning:
                    nats += F.cross_entropy(logits.float(), targets[part], reduction="sum")
                    continue
                wanted = wanted.clamp(min=0)
                log_p, d_logits = probabilities(logits, wanted)
                nats -= (log_p * counts).sum()
                # the gradient of the logits is p, less 1 at what was wanted
                at = torch.arange(len(x), device=x.device)  # scatter_ would copy all the logits
                d_logits[at, wanted.squeeze(1)] = log_p.expm1().squeeze(1).to(dtype)
                d_hidden[part] = d_logits @ w * counts
                d_weight.addmm_(d_logits.T, x * counts)
        return nats

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad[0], d_weight.mul_(grad[0]), None, None


class BitLM(nn.Module):
    """The language model: token ids in, logits of each next token out.

    Args:
        config: the shape.
        seed: of the initial weights (see `initialize`); None leaves them to the caller.
    """

    rope: Tensor

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.model = _Trunk(config)
        self.lm_head: BitLinear | None = None
        self.held_head: Tensor | None = None  # the tied head's weight, see hold_weights
        if not config.tie_word_embeddings:
            self.lm_head = BitLinear(config.hidden_size, config.vocab_size, config.linear)
        self.fill_rope()
        if seed is not None:
            initialize(self, torch.Generator().manual_seed(seed))

    def fill_rope(self) -> None:
        """Make the table of positions, anew where the model was made without memory."""
        bitnet = self.config.block == "bitnet"
        table = _rope_table(self.config) if bitnet else torch.zeros(0)
        self.register_buffer("rope", table, persistent=False)

    def bit_linears(self) -> dict[str, BitLinear]:
        """Every BitLinear under its parameter name."""
        return {n: m for n, m in self.named_modules() if isinstance(m, BitLinear)}

    def freeze(self) -> BitLM:
        """Turn every BitLinear into its inference form (in place) and return the model."""
        for layer in self.bit_linears().values():
            layer.freeze()
        return self.requires_grad_(False).eval()

    @contextlib.contextmanager
    def hold_weights(self, dtype: torch.dtype = torch.float32) -> Iterator[None]:
        """Quantize each weight once, to `dtype`, for an optimizer step, an evaluation or a text.

        Gradients pass through what is held. What a step of an optimizer changes in the meantime
        has no effect before the end. Nothing is held of a sharded model: see `_Gathered`.
        """
        layers = [layer for layer in self.bit_linears().values() if not layer.gathered]
        try:
            with torch.no_grad():
                for layer in layers:
                    layer.hold(dtype)
                if self.lm_head is None and layers:
                    self.held_head = self.model.embed_tokens.weight.detach().to(dtype)
            yield
        finally:
            self.held_head = None
            for layer in layers:
                layer.held = None

    def hidden(
        self, input_ids: Tensor, cache: KVCache | None = None, left_pad: Tensor | None = None
    ) -> Tensor:
        """The normed output of the last block, (B, T, D); arguments as in `forward`."""
        past, T = (cache.length if cache else 0), input_ids.shape[1]
        limit = self.config.max_position_embeddings
        if past + T > limit:
            raise ValueError(f"{past + T} tokens, but max_position_embeddings={limit}")
        at = torch.arange(past, past + T, device=input_ids.device)
        mask = None
        if left_pad is not None:
            mask = self._padded_mask(at, left_pad)  # (B, 1, T, past + T)
            at = (at - left_pad[:, None]).clamp(min=0)  # (B, T)
        elif past and T > 1:
            mask = at[:, None] >= torch.arange(past + T, device=at.device)  # (T, past + T)
        x = self._blocks(self.embed(input_ids, at), at, cache, mask)
        if cache:
            cache.length += T
        return x

    def embed(self, input_ids: Tensor, at: Tensor | None = None) -> Tensor:
        """What the first block reads, (B, T, D), of tokens at the positions `at`, (T) or (B, T)."""
        x = self.model.embed_tokens(input_ids)
        if self.config.block == "seed":
            at = torch.arange(input_ids.shape[1], device=x.device) if at is None else at
            x = x + self.model.embed_positions(at)
        return x

    def _blocks(
        self,
        x: Tensor,
        at: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        blocks: Sequence[Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        rope = None
        if self.config.block == "bitnet":
            rope = self.rope[:, at].view(2, -1, x.shape[1], self.config.head_dim // 2)
        for block in blocks or self.model.layers:
            x = block(x, rope, cache, mask)
        return self.model.norm(x)

    def _padded_mask(self, at: Tensor, left_pad: Tensor) -> Tensor:
        keys = torch.arange(int(at[-1]) + 1, device=at.device)
        seen = (keys <= at[:, None]) & (keys >= left_pad[:, None, None])  # (B, T, keys)
        own = keys == at[:, None]  # padding sees itself: a row without keys would be NaN
        return (seen | own)[:, None]

    def head_weight(self) -> Tensor:
        """What turns hidden states into logits, (V, D)."""
        if self.lm_head is not None:
            return self.lm_head.effective_weight()
        weight = self.model.embed_tokens.weight
        return weight if self.held_head is None else held_for(weight, self.held_head)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., V)."""
        if self.lm_head is not None:
            return project(hidden, (self.lm_head,))[0]
        return F.linear(hidden, self.head_weight())

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, left_pad: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each given one.

        Args:
            input_ids: (B, T), int64; with `cache`, only the tokens it has not seen.
            cache: filled by earlier calls, extended by this one.
            left_pad: (B,), how many tokens at the beginning of each row are only filling.

        Returns:
            (B, T, V).

        Raises:
            ValueError: more tokens than `max_position_embeddings`.
        """
        return self.head(self.hidden(input_ids, cache, left_pad))

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        blocks: Sequence[Callable[..., Tensor]] | None = None,
        probabilities: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = token_probabilities,
    ) -> Tensor:
        """Cross-entropy in nats, summed over the `targets`, (B, T), that are not -100, in float32.

        `blocks` stands for `model.layers` where those are compiled, and so does `probabilities`.
        """
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self._blocks(self.embed(input_ids), at, blocks=blocks).flatten(0, 1)  # (N, D)
        if self.lm_head is not None:
            hidden = quantize_input(hidden, self.config.linear)
        return _ChunkedLoss.apply(hidden, self.head_weight(), targets.flatten(), probabilities)


@torch.no_grad()
def initialize(
    model: BitLM, generator: torch.Generator, keep: Callable[[Tensor, Tensor], Any] | None = None
) -> None:
    """Fill every parameter, in the order of their names, from one generator.

    With `keep`, each is made beside the model, on the CPU, and `keep(parameter, values)` called.

        parameter                            distribution
        embed_tokens, embed_positions        normal, std 0.02 (the tied head starts near uniform)
        q, k, v, gate, up, untied head       uniform, std 1/sqrt(in_features): unit gain
        o_proj, down_proj                    the same / sqrt(2 num_hidden_layers); bitnet: / 10 more
        norms                                weight 1, bias 0

    A ternary layer's output shrinks with its weights' common factor through its scale, so the last
    two rows of matrices differ in gain exactly as dense ones would. Blocks that begin by adding
    little learned a little faster with five Newton-Schulz steps, and with three as fast; zeros
    begin without trits (docs/results.md).
    """
    depth = (2 * model.config.num_hidden_layers) ** -0.5
    depth *= 0.1 if model.config.block == "bitnet" else 1.0
    for name, parameter in sorted(model.named_parameters()):
        values = torch.empty(parameter.shape) if keep else parameter
        if "norm" in name:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        elif "embed" in name:
            values.normal_(0.0, 0.02, generator=generator)
        else:
            bound = (3 / values.shape[1]) ** 0.5
            gain = depth if "o_proj" in name or "down_proj" in name else 1.0
            values.uniform_(-gain * bound, gain * bound, generator=generator)
        if keep:
            keep(parameter, values)


_SEED_NAMES = [
    ("token_embedding", "model.embed_tokens"),
    ("position_embedding", "model.embed_positions"),
    ("output_layer", "lm_head"),
    ("layers.", "model.layers."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    (".attn.out_proj.", ".self_attn.o_proj."),
    (".attn.", ".self_attn."),
    (".ff.w_1.", ".mlp.up_proj."),
    (".ff.w_2.", ".mlp.down_proj."),
]


def import_seed_checkpoint(path: str | Path, num_attention_heads: int = 8) -> BitLM:
    """Turn a checkpoint of the seed guide's script into a `BitLM` with the same logits.

    Args:
        path: `mi_llm_checkpoint.pth` or `mi_llm_epoch_N.pth`.
        num_attention_heads: the one size the file does not tell; the script's is 8.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not such a checkpoint. Nothing in the file is ever executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the seed script's checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch stores; a bomb would be compressed
            if sum(item.file_size for item in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
        weights = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
        renamed = {_seed_name(name): tensor.float() for name, tensor in weights.items()}
        model = BitLM(_seed_config(renamed, num_attention_heads), seed=None)
        model.load_state_dict(renamed)
    except Exception as error:
        raise ValueError(
            f"{path}: not a checkpoint of the seed script "
            f"({type(error).__name__}: {first_line(error)}); "
            "expected a dictionary with 'model_state_dict' as its torch.save wrote it"
        ) from error
    return model


def _seed_name(name: str) -> str:
    for old, new in _SEED_NAMES:
        name = name.replace(old, new)
    return "model." + name if name.startswith("norm.") else name


def _seed_config(weights: dict[str, Tensor], num_attention_heads: int) -> ModelConfig:
    vocab_size, hidden_size = weights["model.embed_tokens.weight"].shape
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")}
    return dataclasses.replace(
        PRESETS["seed"][0],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=weights["model.layers.0.mlp.up_proj.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=num_attention_heads,
        max_position_embeddings=weights["model.embed_positions.weight"].shape[0],
    )


# -----------------------------------------------------------------------------
# 4 Tokenizer
# The library `tokenizers` does the work; here is only which tokenizer, and its special tokens.


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> Any:
    """Train a tokenizer by iterating once over `texts`.

    Args:
        texts: pieces of text, never all in memory.
        vocab_size: most tokens, special ones included; a small text gives fewer.
        kind: "bpe", byte-level with GPT-2's pre-tokenizer: decode(encode(x)) == x for every
            string; or "wordpiece", the seed's, which loses white space and unknown characters.

    Returns:
        tokenizers.Tokenizer. Special tokens inside a text are encoded as text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    require(vocab_size >= MIN_VOCAB_SIZE, "vocab_size", vocab_size, f"at least {MIN_VOCAB_SIZE}")
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*WORDPIECE_SPECIALS, END_OF_TEXT],
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


_TOKENIZER_BYTES = 64 << 20  # a tokenizer.json of 100,000 tokens has 7 MB


def tokenizer_from(text: str, path: Path) -> Any:
    """The tokenizer that a tokenizer.json holds; ValueError names the file it came from."""
    from tokenizers import Tokenizer, decoders

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer.json ({first_line(error)})") from error
    if tokenizer.decoder is None and tokenizer.token_to_id("[UNK]") is not None:
        tokenizer.decoder = decoders.WordPiece()  # the seed script forgot it
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | Path) -> Any:
    """Read a `tokenizer.json`, ours or the seed script's.

    Raises FileNotFoundError or ValueError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a tokenizer.json")
    if path.stat().st_size > _TOKENIZER_BYTES:
        raise ValueError(f"{path}: not a tokenizer.json ({path.stat().st_size:,} bytes)")
    return tokenizer_from(path.read_text(encoding="utf-8", errors="replace"), path)


def check_tokenizer(tokenizer: Any, vocab_size: int, path: Path) -> None:
    """Every id must have its row in the embedding; ValueError names the file."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if len(ids) > vocab_size or max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{path}: token ids up to {max(ids):,}, but the model has vocab_size={vocab_size:,}"
        )


def end_of_text_id(tokenizer: Any) -> int | None:
    """The id of <|endoftext|>; None in the seed script's own tokenizers."""
    return tokenizer.token_to_id(END_OF_TEXT)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, no special ones added. A lone surrogate becomes U+FFFD."""
    clean = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return tokenizer.encode(clean, add_special_tokens=False).ids


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what the tokenizer does."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


# -----------------------------------------------------------------------------
# 5 Data
# Text is read in pieces, never whole; tokens lie in memory-mapped files in the run folder.


@dataclass(frozen=True)
class _Hub:
    """A data set on the Hugging Face hub. Rows are documents, or lines of a longer text."""

    name: str
    config: str | None = None
    column: str | None = None
    validation: str | None = None
    lines: bool = False


KNOWN_DATA = {
    "wikitext-2": _Hub("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "validation", True),
    "wikitext-103": _Hub("Salesforce/wikitext", "wikitext-103-raw-v1", "text", "validation", True),
    "tinystories": _Hub("roneneldan/TinyStories", None, "text", "validation"),
    "fineweb-edu": _Hub("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "wikipedia-es": _Hub("wikimedia/wikipedia", "20231101.es", "text"),
}
_BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_PIECE_CHARS = 1 << 16  # lines are joined to pieces of about this length
_LONGEST_PIECE = 1 << 20  # a longer row is cut at white space
_TOKENIZER_CHARS = 100_000_000  # text a tokenizer is trained on at most
_STREAM_VALIDATION_CHARS = 2_000_000  # held out at the beginning of a source of unknown length
_STREAM_TOKENIZER_CHARS = 20_000_000  # text a tokenizer is trained on where training waits for it
_STREAM_ROWS = 64  # of a stream read at once
_BLOCK_TOKENS = 1 << 22  # of a stream that come, and are shuffled, together
STREAM_RETRY_S = (1.0, 60.0, 10)
"""Seconds until a broken stream is opened again: at first, doubling, at most; and how often."""

Piece = tuple[str, bool]  # text, and whether a document ends with it


def _local_files(path: Path, split: str = "train") -> list[Path]:
    """The files of a source, sorted. In a folder, valid*, dev* and test* are not training text."""
    if path.is_file():
        files = [path] if split == "train" else []
    else:
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _BUILDERS)
        held = {p: _split_of(p) for p in found}
        files = [p for p in found if held[p] == split]
    wrong = [p for p in files if p.suffix not in _BUILDERS]
    if wrong or (split == "train" and not files):
        raise ValueError(
            f"data={str(path)!r}: expected {', '.join(_BUILDERS)} files"
            + (" in the folder" if path.is_dir() else f", not {path.suffix or 'no ending'}")
        )
    return files


def _split_of(path: Path) -> str:
    stem = path.stem.lower()
    for prefix, split in (("valid", "validation"), ("dev", "validation"), ("test", "test")):
        if stem.startswith(prefix):
            return split
    return "train"


def _is_local(source: str) -> bool:
    return Path(source).expanduser().exists()


def _hub_source(source: str) -> _Hub:
    if source in KNOWN_DATA:
        return KNOWN_DATA[source]
    if not source.startswith("hf:"):
        known = ", ".join(["pydocs", *KNOWN_DATA])
        raise FileNotFoundError(
            f"data={source!r}: no such file or folder, and no known data set; expected a "
            f".txt, .jsonl or .parquet file, a folder of them, hf:OWNER/NAME, or one of {known}"
        )
    name, _, column = source[3:].partition("#")
    name, _, config = name.partition(":")
    require(name.count("/") == 1, "data", source, "hf:OWNER/NAME[:CONFIG][#COLUMN]")
    return _Hub(name, config or None, column or None)


def _pydocs() -> Iterator[Piece]:
    """Python's reference texts by topic, from the interpreter itself."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip() + "\n", True


def _text_column(rows: Any, wanted: str | None, source: str) -> str:
    columns = next(iter(rows), {})
    texts = [name for name, value in columns.items() if isinstance(value, str)]
    column = wanted or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if column is None or column not in columns:
        raise ValueError(
            f"text_column={column!r}: data={source!r} has columns {', '.join(columns) or 'none'}; "
            "name the one that holds the text with --text-column"
        )
    return column


def _rows(rows: Any, column: str) -> Iterator[str]:
    for batch in rows.iter(batch_size=1000):
        for text in batch[column]:
            if text:
                yield text


def _join_lines(lines: Iterable[str]) -> Iterator[str]:
    """Join lines to pieces, cut where no token could join them: before a line without indent."""
    piece, size = [], 0
    for line in lines:
        if size >= _PIECE_CHARS and not line[:1].isspace():
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)


def _one_document(texts: Iterable[str]) -> Iterator[Piece]:
    """Pieces of which the last ends the document."""
    previous: str | None = None
    for text in texts:
        if previous is not None:
            yield previous, False
        previous = text
    if previous is not None:
        yield previous, True


def _cut_long(pieces: Iterable[Piece]) -> Iterator[Piece]:
    for text, ends in pieces:
        while len(text) > _LONGEST_PIECE:
            cut = text.rfind(" ", 1, _LONGEST_PIECE)
            cut = cut if cut > 0 else _LONGEST_PIECE
            yield text[:cut], False
            text = text[cut:]
        yield text, ends


def _file_rows(path: Path) -> Any:
    import datasets

    kind = _BUILDERS[path.suffix]
    options = {"keep_linebreaks": True, "encoding": "utf-8-sig"} if kind == "text" else {}
    files = {"train": [str(path)]}
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)


def _file_pieces(files: Sequence[Path], column: str | None) -> Iterator[Piece]:
    for path in files:
        try:
            rows = _file_rows(path)
            if path.suffix == ".txt":
                yield from _one_document(_join_lines(_rows(rows, "text")))
            else:
                for text in _rows(rows, _text_column(rows, column, str(path))):
                    yield text, True
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
        except Exception as error:
            if str(error).startswith("text_column="):  # ours, and clear already
                raise
            raise ValueError(f"{path}: cannot be read as {path.suffix} ({error})") from error


def _hub_rows(hub: _Hub, split: str, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(hub.name, hub.config, split=split, streaming=streaming)
    except (OSError, DatasetsError) as error:
        raise ConnectionError(
            f"the data set {hub.name} could not be loaded from the Hugging Face hub "
            f"({' '.join(str(error).split())[:200]}). Without a connection, give a local file "
            "(--data FILE.txt) or the text that comes with Python (--data pydocs)"
        ) from error


def _hub_pieces(hub: _Hub, split: str, column: str | None, streaming: bool) -> Iterator[Piece]:
    rows = _hub_rows(hub, split, streaming)
    texts = _rows(rows, _text_column(rows, hub.column or column, hub.name))
    if hub.lines:
        return ((text, False) for text in _join_lines(texts))
    return ((text, True) for text in texts)


def read_pieces(
    source: str, split: str = "train", config: DataConfig | None = None
) -> Iterator[Piece]:
    """Text of a source in pieces of bounded length, each with whether a document ends there.

    Args:
        source: as `DataConfig.data`. A .txt file is one document; a row of any other is one.
        split: "train", or "validation" where the source has one (nothing comes where not).

    Raises:
        FileNotFoundError, ValueError: no such source, or not readable as what its name says.
        ConnectionError: the hub cannot be reached (after the library's own few tries).
    """
    config = config or DataConfig(data=source)
    if _is_local(source):
        pieces = _file_pieces(_local_files(Path(source).expanduser(), split), config.text_column)
    elif source == "pydocs":
        pieces = _pydocs() if split == "train" else iter(())
    else:
        hub, streaming = _hub_source(source), config.max_train_tokens is not None
        name = hub.validation if split == "validation" else "train"
        pieces = _hub_pieces(hub, name, config.text_column, streaming) if name else iter(())
    return _cut_long(pieces)


def _split_tail(pieces: Iterable[Piece], train_chars: int) -> Iterator[tuple[str, str, bool]]:
    """(split, text, document ends): the first `train_chars` characters train, the rest validate."""
    seen = 0
    for text, ends in pieces:
        room = train_chars - seen
        seen += len(text)
        if room >= len(text):
            yield "train", text, ends
        elif room <= 0:
            yield "validation", text, ends
        else:
            cut = max(text.rfind("\n", 0, room), text.rfind(" ", 0, room)) + 1 or room
            yield "train", text[:cut], True
            yield "validation", text[cut:], ends
            seen, train_chars = 1, 0


def _splits(config: DataConfig) -> Callable[[], Iterator[tuple[str, str, bool]]]:
    """A function that reads the source from its beginning, each piece with its split."""
    held: str | None = config.validation_data
    own = next(read_pieces(held or config.data, "train" if held else "validation", config), None)
    if own is not None:

        def read_own() -> Iterator[tuple[str, str, bool]]:
            for text, ends in read_pieces(config.data, "train", config):
                yield "train", text, ends
            split = "train" if held else "validation"
            for text, ends in read_pieces(held or config.data, split, config):
                yield "validation", text, ends

        return read_own
    total = sum(len(text) for text, _ in read_pieces(config.data, "train", config))
    train_chars = round(total * (1 - config.validation_fraction))
    return lambda: _split_tail(read_pieces(config.data, "train", config), train_chars)


def is_streamed(config: DataConfig) -> bool:
    """Whether tokens are brought in while training runs: a budget of a hub's set or a folder."""
    local = Path(config.data).expanduser()
    small = config.data == "pydocs" or local.is_file()
    return config.max_train_tokens is not None and not small


def _stream(
    config: DataConfig, state: dict[str, Any] | None = None
) -> Iterator[tuple[list[Piece], dict[str, Any]]]:
    """The training text some rows at once, with the `state` that goes on after them."""
    state = state or {"source": 0, "column": None, "rows": None}
    files = _local_files(Path(config.data).expanduser()) if _is_local(config.data) else []
    hub = None if files else _hub_source(config.data)
    for number in range(state["source"], len(files) or 1):
        if hub:
            rows, lines, wanted = _hub_rows(hub, "train", True), hub.lines, hub.column
        else:
            rows, lines, wanted = _file_rows(files[number]), files[number].suffix == ".txt", None
        # looking for the column reads the first rows: once is enough
        column = state["column"] or _text_column(rows, wanted or config.text_column, config.data)
        if state["rows"]:
            rows.load_state_dict(state["rows"])
        for batch in rows.iter(batch_size=_STREAM_ROWS):
            texts: Iterable[str] = filter(None, batch[column])
            pieces = [(t, not lines) for t in (_join_lines(texts) if lines else texts)]
            at = {"source": number, "column": column, "rows": rows.state_dict()}
            yield list(_cut_long(pieces)), at
        state = {"source": number + 1, "column": None, "rows": None}
        if lines:
            yield [("", True)], state


def open_new(path: Path) -> Any:
    """Open a new file for writing; what has its name, a link to elsewhere too, is deleted."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write beside `path`, flush to the disk, rename: whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open_new(beside) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # a full disk needs the room
            beside.unlink(missing_ok=True)
        raise


class _TokenWriter:
    """Appends tokens to a file beside its final name, counting and hashing them."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.file = open_new(path.with_suffix(".tmp"))
        self.digest = hashlib.sha256()
        self.counts = {"tokens": 0, "bytes": 0}

    def write(self, ids: list[int], text_bytes: int) -> None:
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += text_bytes

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.path.with_suffix(".tmp").replace(self.path)
        return {**self.counts, "sha256": self.digest.hexdigest()}


def _tokenize(
    tokenizer: Any, pieces: Iterable[tuple[str, str, bool]], folder: Path, budget: int | None
) -> dict[str, Any]:
    """Write train.bin and validation.bin; return what the manifest says of them."""
    from tqdm.auto import tqdm

    dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
    eot = end_of_text_id(tokenizer)
    writers = {s: _TokenWriter(folder / f"{s}.bin", dtype) for s in ("train", "validation")}
    with tqdm(unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5) as bar:
        for batch in _batches(pieces, 64):
            texts = [text for _, text, _ in batch]
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (split, text, ends), tokens in zip(batch, encoded, strict=True):
                size = len(text.encode())
                end = [eot] if ends and eot is not None else []
                writers[split].write(tokens.ids + end, size)
                bar.update(size)
            if budget and writers["train"].counts["tokens"] >= budget:
                break
    return {"dtype": dtype, **{split: writer.close() for split, writer in writers.items()}}


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _limited(texts: Iterator[str], chars: int) -> Iterator[str]:
    for text in texts:
        yield text
        chars -= len(text)
        if chars <= 0:
            return


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def source_fingerprint(source: str) -> str | None:
    """sha256 of a local source's files; None for any other source, or where it is not there."""
    if not _is_local(source):
        return None
    digest = hashlib.sha256()
    path = Path(source).expanduser()
    for split in ("train", "validation"):
        for file in _local_files(path, split):
            digest.update(file_hash(file).encode())
    return digest.hexdigest()


@dataclass
class TokenData:
    """Tokenised text of a run: two memory-mapped arrays and what is known of them."""

    training: np.ndarray
    validation: np.ndarray
    manifest: dict[str, Any]
    streamed: bool = False
    """whether tokens come while training runs; then ask whether a step is `ready`"""
    error: Exception | None = None
    """what ended a stream before its end"""

    def ready(self, config: TrainConfig, context: int, step: int) -> bool:
        """Whether the tokens of a step have come."""
        return True

    def coming(self, tokenizer: Any) -> Any:
        """A block in which more tokens are brought in, where there are any."""
        return contextlib.nullcontext()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a validation token stands for, on average."""
        counts = self.manifest["validation"]
        return counts["bytes"] / max(counts["tokens"], 1)

    @property
    def sha256(self) -> str:
        """Of the tokens that tell these from any others."""
        return self.manifest["train"]["sha256"]

    def batch(self, config: TrainConfig, context: int, step: int) -> np.ndarray:
        """The windows of optimizer step `step` (from 0), (windows, context + 1), int64.

        A pure function of (seed, step): each epoch shuffles all windows anew and begins to cut at
        another place, the text being read as a ring, so no token is left out.
        """
        windows, N = config.batch_tokens // context, len(self.training)
        per_epoch = N // context
        number = np.arange(step * windows, (step + 1) * windows)
        starts = np.empty(windows, dtype=np.int64)
        for epoch in np.unique(number // per_epoch):
            here = number // per_epoch == epoch
            offset, order = _epoch_order(config.seed, int(epoch), per_epoch, N)
            starts[here] = offset + order[number[here] % per_epoch] * context
        return self.training[(starts[:, None] + np.arange(context + 1)) % N].astype(np.int64)

    def steps_per_epoch(self, config: TrainConfig, context: int) -> float:
        return (len(self.training) // context) / (config.batch_tokens // context)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, windows: int, tokens: int) -> tuple[int, np.ndarray]:
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(tokens)), generator.permutation(windows)


class StreamedData(TokenData):
    """Tokens of which a thread brings in more while training reads what is there.

    Windows are shuffled inside blocks of `_BLOCK_TOKENS`, so that a step's are a function of (seed,
    step) whenever they came. train.bin grows; progress.json beside it tells how far it is whole
    and from where to go on.
    """

    def __init__(self, folder: Path, validation: np.ndarray, manifest: dict[str, Any]) -> None:
        super().__init__(np.empty(0, dtype=manifest["dtype"]), validation, manifest)
        self.streamed, self.folder, self.ended = True, folder, False
        self.budget: int = manifest["asked"]["data"]["max_train_tokens"]

    @property
    def sha256(self) -> str:
        return self.manifest["validation"]["sha256"]  # the beginning of the same source

    def refresh(self) -> None:
        """See what has come."""
        progress = read_json(self.folder / "progress.json") or {"parts": [], "ended": False}
        count = progress["parts"][-1]["tokens"] if progress["parts"] else 0
        if count > len(self.training):
            path, dtype = self.folder / "train.bin", self.manifest["dtype"]
            self.training = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
        self.ended = progress["ended"]

    def _in_all(self) -> int:
        """Tokens an epoch: the budget, or as many as the source has."""
        return len(self.training) if self.ended else self.budget

    def ready(self, config: TrainConfig, context: int, step: int) -> bool:
        """Whether the tokens of a step have come."""
        last = (step + 1) * (config.batch_tokens // context) - 1
        needed = (last // self._block(context) + 1) * self._block(context) * context + 1
        for look in (lambda: None, self.refresh):
            look()
            if self.ended and len(self.training) <= context:
                count = len(self.training)
                self.error = ValueError(
                    f"{count} tokens in the stream; expected more than a window"
                )
            elif self.ended or len(self.training) >= min(needed, self.budget):
                return True
        return False

    def _block(self, context: int) -> int:
        """Windows shuffled together: fewer where the budget is small, so that training begins."""
        return max(min(_BLOCK_TOKENS, self.budget // 16) // context, 1)

    def batch(self, config: TrainConfig, context: int, step: int) -> np.ndarray:
        """The windows of a step that is `ready`, as `TokenData.batch`."""
        windows, block, N = config.batch_tokens // context, self._block(context), self._in_all()
        starts = np.empty(windows, dtype=np.int64)
        for row, number in enumerate(range(step * windows, (step + 1) * windows)):
            epoch, within = divmod(number, N // context)
            first = within // block * block
            size = min(block, N // context - first)
            order = _block_order(config.seed, epoch, first, size)
            starts[row] = (first + order[within - first]) * context
        return self.training[(starts[:, None] + np.arange(context + 1)) % N].astype(np.int64)

    def steps_per_epoch(self, config: TrainConfig, context: int) -> float:
        return (self._in_all() // context) / (config.batch_tokens // context)

    @contextlib.contextmanager
    def coming(self, tokenizer: Any) -> Iterator[None]:
        """Bring the rest in, in the background, until the end of the block."""
        self.refresh()
        closed = threading.Event()
        work = partial(self._bring_all, tokenizer, closed)
        thread = threading.Thread(target=work, name="stream", daemon=True)
        if not self.ended:
            thread.start()
        try:
            yield
        finally:
            closed.set()
            if thread.is_alive():
                thread.join(5)  # one that waits for the network finds out later, and writes nothing

    def _bring_all(self, tokenizer: Any, closed: threading.Event) -> None:
        wait, most, tries = STREAM_RETRY_S
        failures, before = 0, -1
        while not closed.is_set():
            try:
                self._bring(tokenizer, closed)
                return
            except Exception as error:  # each layer of the hub's clients has kinds of its own
                self.refresh()
                failures = failures + 1 if len(self.training) == before else 1
                before = len(self.training)
                if isinstance(error, ValueError) or failures > tries:
                    self.error = error
                    return
                pause = min(wait * 2.0 ** (failures - 1), most)
                if not closed.is_set():
                    say(f"data: {first_line(error)}; trying again in {pause:.0f} s")
                closed.wait(pause)

    def _bring(self, tokenizer: Any, closed: threading.Event) -> None:
        """Append what comes, from where the last part ended, until the budget is reached."""
        config, eot = DataConfig(**self.manifest["asked"]["data"]), end_of_text_id(tokenizer)
        parts = (read_json(self.folder / "progress.json") or {"parts": []})["parts"]
        state = parts[-1]["state"] if parts else self.manifest["stream_state"]
        dtype = np.dtype(self.manifest["dtype"])
        done, new, size = (parts[-1]["tokens"] if parts else 0), bytearray(), 0

        def write(ended: bool) -> None:
            nonlocal done, new, size
            if closed.is_set():
                return
            with path.open("r+b") as file:
                file.seek(done * dtype.itemsize)  # what a kill left after it is overwritten
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
            done += len(new) // dtype.itemsize
            part = {"tokens": done, "bytes": size, "sha256": hashlib.sha256(new).hexdigest()}
            parts.append({**part, "state": state})
            text = json.dumps({"parts": parts, "ended": ended})
            write_atomically(self.folder / "progress.json", text.encode())
            new, size = bytearray(), 0

        path = self.folder / "train.bin"
        path.touch()
        at_once = min(_BLOCK_TOKENS, self.budget // 16) * dtype.itemsize
        room = (self.budget - done) * dtype.itemsize
        try:
            for pieces, after in _stream(config, state):
                texts = [text for text, _ in pieces]
                encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                ids: list[int] = []
                for (_, ends), tokens in zip(pieces, encoded, strict=True):
                    ids += tokens.ids + ([eot] if ends and eot is not None else [])
                new += np.asarray(ids, dtype=dtype).tobytes()  # all of them or none
                size, state = size + sum(len(text.encode()) for text in texts), after
                if closed.is_set():
                    return
                if len(new) >= room:
                    break
                if len(new) >= at_once:
                    room -= len(new)
                    write(ended=False)
        except BaseException:
            if new:
                write(ended=False)  # it need not come again
            raise
        del new[room:]
        write(ended=True)


@lru_cache(maxsize=4)
def _block_order(seed: int, epoch: int, first: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, first]).permutation(size)


def _read_split(folder: Path, manifest: dict[str, Any], split: str) -> np.ndarray | None:
    """A token file, or None where it is missing or not what the manifest says."""
    path, expected, dtype = folder / f"{split}.bin", manifest[split], manifest["dtype"]
    if dtype not in ("uint16", "uint32") or not path.is_file() or not expected["tokens"]:
        return None
    if path.stat().st_size != expected["tokens"] * np.dtype(dtype).itemsize:
        return None
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if file_hash(path) != expected["sha256"]:
        return None
    if tokens.max() >= manifest["asked"]["vocab_size"]:  # it has no row in the embedding
        return None
    return tokens


def _read_tokens(folder: Path, manifest: dict[str, Any]) -> TokenData | None:
    """Whatever data a manifest tells of, or None where a file is not what it says."""
    validation = _read_split(folder, manifest, "validation")
    if validation is None:
        return None
    if "stream_state" in manifest:
        _mend_stream(folder, manifest)
        return StreamedData(folder, validation, manifest)
    training = _read_split(folder, manifest, "train")
    return None if training is None else TokenData(training, validation, manifest)


def _mend_stream(folder: Path, manifest: dict[str, Any]) -> None:
    """Take a stream back to where train.bin is what was written."""
    progress = read_json(folder / "progress.json") or {"parts": []}
    itemsize, good, end = np.dtype(manifest["dtype"]).itemsize, [], 0
    with contextlib.suppress(FileNotFoundError), (folder / "train.bin").open("rb") as file:
        for part in progress["parts"]:
            data = file.read((part["tokens"] - end) * itemsize)
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                break
            good, end = [*good, part], part["tokens"]
    if len(good) < len(progress["parts"]):
        say(f"data: train.bin is not what was written after token {end:,}; that is read again")
        text = json.dumps({"parts": good, "ended": False})
        write_atomically(folder / "progress.json", text.encode())


def _begin_stream(config: DataConfig, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write validation.bin; return what the manifest says of a stream that begins after it."""
    for name in ("train.bin", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    state: dict[str, Any] = {}
    held = config.validation_data
    own = read_pieces(held or config.data, "train" if held else "validation", config)
    first = next(own, None)

    seen, limit = (
        0.0,
        min(
            _STREAM_VALIDATION_CHARS,
            4 * config.validation_fraction * (config.max_train_tokens or 0),
        ),
    )

    def pieces() -> Iterator[tuple[str, str, bool]]:
        nonlocal seen
        if first is not None:
            yield from (("validation", *piece) for piece in itertools.chain([first], own))
            seen = limit
            return
        for batch, after in _stream(config):
            yield from (("validation", *piece) for piece in batch)
            seen += sum(len(text) for text, _ in batch)
            state.update(after)
            if seen >= limit:
                return

    counts = _tokenize(tokenizer, pieces(), folder, None)
    if seen < limit:
        raise ValueError(
            f"data={config.data!r}: all of its {seen:,.0f} characters would validate, for a "
            "stream's beginning does; leave max_train_tokens out for a text as short as this"
        )
    to_come = {"tokens": config.max_train_tokens, "bytes": 0, "sha256": ""}
    return {**counts, "train": to_come, "stream_state": state or None}


_JSON_BYTES = 16 << 20  # configurations and manifests have a few thousand


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or none that can be read."""
    try:
        if path.stat().st_size > _JSON_BYTES:
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def same_data(out: Path, config: DataConfig, vocab_size: int) -> bool:
    """Whether the token files of a run folder are of this source and size of vocabulary."""
    manifest = read_json(out / "data" / "manifest.json") or {}
    return manifest.get("asked") == {"data": asdict(config), "vocab_size": vocab_size}


def _prepared_data(out: Path, config: DataConfig, vocab_size: int) -> tuple[TokenData, Any] | None:
    """What `prepare_data` made before; None where it is not all there, or not what it was."""
    if not same_data(out, config, vocab_size) or not (out / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(out / "tokenizer.json")
    manifest = read_json(out / "data" / "manifest.json") or {}
    try:
        tokens = _read_tokens(out / "data", manifest)
        made_with = manifest["tokenizer_sha256"]
    except (KeyError, TypeError, ValueError):  # a manifest that is not ours
        return None
    return (tokens, tokenizer) if tokens and made_with == tokenizer_hash(tokenizer) else None


def prepare_data(
    config: DataConfig, vocab_size: int, context: int, out: str | Path
) -> tuple[TokenData, Any]:
    """Tokenizer and token files of a run folder, made where they are not there yet.

    Files: `tokenizer.json` (reused when present) and `data/{train,validation}.bin` with
    `data/manifest.json`. Reading the source again is not needed once they are there.

    Raises:
        ValueError: too little text, or the local source has changed since the files were made.
    """
    out = Path(out)
    folder = out / "data"
    found = _prepared_data(out, config, vocab_size)
    if found:
        _check_unchanged(config, found[0].manifest)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    streamed = is_streamed(config)
    fingerprint = None if streamed else source_fingerprint(config.data)
    read = (lambda: _stream_texts(config)) if streamed else _splits(config)
    path = out / "tokenizer.json"
    if path.is_file():
        tokenizer = load_tokenizer(path)
        say(f"tokenizer: reusing {path}")
    else:
        start = time.perf_counter()
        texts = (text for split, text, _ in read() if split == "train")
        chars = _TOKENIZER_CHARS
        if streamed:
            chars = min(_STREAM_TOKENIZER_CHARS, 8 * (config.max_train_tokens or 0))
        tokenizer = train_tokenizer(_limited(texts, chars), vocab_size, config.tokenizer)
        say(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {time.perf_counter() - start:.1f} s")
    check_tokenizer(tokenizer, vocab_size, path)
    manifest = {
        "format_version": 1,
        "asked": {"data": asdict(config), "vocab_size": vocab_size},
        "source_sha256": fingerprint,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        **(
            _begin_stream(config, tokenizer, folder)
            if streamed
            else _tokenize(tokenizer, read(), folder, config.max_train_tokens)
        ),
    }
    for split, needed in (("train", context + 1), ("validation", 2)):
        if manifest[split]["tokens"] < needed:
            raise ValueError(
                f"data={config.data!r}: {manifest[split]['tokens']} {split} tokens; expected at "
                f"least {needed} (one window). Give more text or a smaller max_position_embeddings"
            )
    write_atomically(path, tokenizer.to_str(pretty=True).encode())
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    tokens = _read_tokens(folder, manifest)
    assert tokens is not None, "token files differ from what was just written"
    return tokens, tokenizer


def _stream_texts(config: DataConfig) -> Iterator[tuple[str, str, bool]]:
    for pieces, _ in _stream(config):
        yield from (("train", *piece) for piece in pieces)


def _check_unchanged(config: DataConfig, manifest: dict[str, Any]) -> None:
    if is_streamed(config):  # reading all of it again is what a stream is there to avoid
        return
    now = source_fingerprint(config.data)
    if now is not None and now != manifest["source_sha256"]:
        raise ValueError(
            f"data={config.data!r}: the text has changed since this run began. Put the old text "
            "back, or train on the new one in another folder (--out)"
        )


def say(line: str) -> None:
    log.info(line)


# -----------------------------------------------------------------------------
# 6 Generation


def _choose(
    logits: Tensor, seen: Tensor, config: SamplingConfig, generator: torch.Generator
) -> Tensor:
    """The next token of each row from logits, (B, V), and the tokens so far, (B, T). (B,)"""
    if config.repetition_penalty != 1:
        old = logits.gather(1, seen)
        penalised = torch.where(
            old > 0, old / config.repetition_penalty, old * config.repetition_penalty
        )
        logits = logits.scatter(1, seen, penalised)
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[1]:
        least = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if config.top_p < 1:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        logits = logits.masked_fill((before >= config.top_p).gather(1, index.argsort()), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def _at_two_bits(model: BitLM, rows: int) -> bool:
    """Whether the weights can stay packed: the kernel is as quick as float ones, for a few rows."""
    layers = list(model.bit_linears().values())
    frozen = all(layer.frozen and layer.linear == "ternary" for layer in layers)
    on_cpu = next(model.buffers()).device.type == "cpu"
    return frozen and on_cpu and rows <= FEW_ROWS and cpu_kernels() is not None


@torch.inference_mode()
def generate_tokens(
    model: BitLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    end_id: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield one new token id for each prompt at a time; None for those that have ended.

    Text may go on beyond `max_position_embeddings`: when the context is full, its older half is
    dropped and the newer half read again.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        end_id: a row ends before this token.
        num_tokens: choose among the first `num_tokens` rows of the head only.
    """
    device = next(model.buffers()).device
    limit = model.config.max_position_embeddings
    width = max(map(len, prompts))
    rows = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])  # (B, T), on the CPU
    pad = torch.tensor([width - len(p) for p in prompts])
    start, unread = max(0, width - limit), min(width, limit)
    cache = KVCache(model.config, len(prompts), device)
    generator = torch.Generator()
    generator.manual_seed(config.seed) if config.seed is not None else generator.seed()
    ended = [False] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with (
            contextlib.nullcontext() if _at_two_bits(model, len(prompts)) else model.hold_weights()
        ):
            for _ in range(config.max_new_tokens):
                if cache.length + unread > limit:
                    start, unread, cache.length = rows.shape[1] - limit // 2, limit // 2, 0
                left_pad = (pad - start).clamp(min=0)
                # a row whose padding is all of the window cannot be: its own tokens are newer
                padded = left_pad.to(device) if left_pad.any() else None
                logits = model(rows[:, -unread:].to(device), cache, padded)[:, -1]
                logits = logits[:, :num_tokens].float().cpu()
                seen = _real_tokens(rows, pad)
                chosen = _choose(logits, seen, config, generator)
                rows, unread = torch.cat([rows, chosen[:, None]], dim=1), 1
                ended = [e or c == end_id for e, c in zip(ended, chosen.tolist(), strict=True)]
                yield [None if e else c for e, c in zip(ended, chosen.tolist(), strict=True)]
                if all(ended):
                    return
    finally:
        model.train(was_training)


def _real_tokens(rows: Tensor, pad: Tensor) -> Tensor:
    """`rows` with the filling at each left end replaced by the row's last token."""
    filling = torch.arange(rows.shape[1]) < pad[:, None]
    return torch.where(filling, rows[:, -1:], rows)


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """An empty prompt begins where a document ends."""
    eot = end_of_text_id(tokenizer)
    return encode(tokenizer, prompt) or [0 if eot is None else eot]


def stream(
    model: BitLM, tokenizer: Any, prompt: str, sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """Yield the continuation of `prompt` bit by bit, whole characters only."""
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=True)
    for token in _prompt_ids(tokenizer, prompt):  # word pieces join what came before
        decoder.step(tokenizer, token)
    eot, size = end_of_text_id(tokenizer), tokenizer.get_vocab_size()
    prompts = [_prompt_ids(tokenizer, prompt)]
    for tokens in generate_tokens(model, prompts, sampling or SamplingConfig(), eot, size):
        text = None if tokens[0] is None else decoder.step(tokenizer, tokens[0])
        if text:
            yield text


def generate(
    model: BitLM,
    tokenizer: Any,
    prompt: str | Sequence[str],
    sampling: SamplingConfig | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Any:
    """The continuation of a prompt, or the list of those of several prompts at once.

    Args:
        prompt: one text or several; the results do not contain it.
        on_text: called with every piece of text as it is written (one prompt only).
    """
    if isinstance(prompt, str):
        pieces = []
        for piece in stream(model, tokenizer, prompt, sampling):
            pieces.append(piece)
            if on_text:
                on_text(piece)
        return "".join(pieces)
    if on_text:
        raise ValueError("on_text goes with one prompt: expected a string, got several prompts")
    if not prompt:
        return []
    prompts = [_prompt_ids(tokenizer, p) for p in prompt]
    written: list[list[int]] = [[] for _ in prompts]
    eot, size = end_of_text_id(tokenizer), tokenizer.get_vocab_size()
    for tokens in generate_tokens(model, prompts, sampling or SamplingConfig(), eot, size):
        for row, token in zip(written, tokens, strict=True):
            if token is not None:
                row.append(token)
    return [tokenizer.decode(row) for row in written]


# -----------------------------------------------------------------------------
# 7 Optimization
# Also the processes that share the work: here there is one, in bitllm/distributed.py more.


class Processes:
    """The processes that train one model together; here, this one alone.

    `bitllm.distributed` subclasses it for torchrun and FSDP. All processes call its methods in the
    same order.
    """

    rank, world_size = 0, 1
    sharded = False
    """whether each process holds only a part of every parameter (FSDP)"""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder and calls the callbacks."""
        return self.rank == 0

    def guard(self) -> Any:
        """A context in which the loss of another process raises ConnectionError."""
        return contextlib.nullcontext()

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def broadcast(self, value: Any) -> Any:
        """The main process' value, in every process."""
        return value

    def barrier(self) -> None:
        """Wait for all processes."""

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in the main process; None in the others, which wait for it."""
        return work()

    def gather(self, tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """In the main process: the tensors that the processes hold, each its own, whole."""
        return tensors

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the main process: whole what every process holds, or a part of."""
        return tensors

    def scatter(self, parameter: Tensor, values: Tensor) -> Tensor:
        """The part of `values`, whole and shaped like the parameter, that this process holds."""
        return values

    def owns(self, parameter: Tensor) -> bool:
        """Whether this process updates the parameter and holds its optimizer state."""
        return True

    def micro_batches(self, x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """This process' rows of inputs and targets, (N, T) each, at most `size` at once."""
        return list(zip(x.split(size), y.split(size), strict=True))

    def build_model(self, config: ModelConfig, seed: int, device: torch.device) -> BitLM:
        return BitLM(config, seed).to(device)

    def whole_model(self, model: BitLM) -> BitLM | None:
        """In the main process: a model that can generate by itself."""
        return model

    def make_optimizers(self, model: BitLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
        return make_optimizers(model, config)

    def reduce_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Sum the gradients over all processes, in place, and the loss, which is returned."""
        return loss

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.step()


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """What multiplies the peak rates at optimizer step `step` (from 0), in (0, 1].

    wsd: linear warm-up, constant, linear cooldown to 0 [5]; cosine: warm-up, then half a cosine
    to a tenth. Both end at `max_steps`; a larger one moves the end, and the rate rises again.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        span = max(config.max_steps - config.warmup_steps, 1)
        return 0.55 + 0.45 * math.cos(math.pi * min((step - config.warmup_steps) / span, 1))
    cooldown = max(round(config.cooldown_fraction * config.max_steps), 1)
    return min(1.0, (config.max_steps - step) / cooldown)


def has_bfloat16(device: torch.device) -> bool:
    """In hardware: on a CPU, AMX or AVX-512 with bfloat16. Emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, n, lambda: False)() for n in names)


class Float32Muon(torch.optim.Muon):
    """torch's Muon with its iteration in float32, for hardware without bfloat16.

    torch casts to bfloat16, whose products take sixty times as long as float32's on a CPU without
    it: a `demo` step's took 10.3 s on one core with AVX2, and take 0.28 s here.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for weight, update in self.updates(weights, group):
                rate = group["lr"] * math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def updates(self, weights: list[Any], group: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Each weight, (O, I), with its orthogonal update."""
        for weight in weights:
            yield weight, orthogonalize(self.direction(weight, group["momentum"]), group)

    def direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Nesterov's: the gradient mixed with its running mean."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum)


def orthogonalize(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Newton-Schulz [3]: singular values to about 1, in the dtype of `update`, (O, I)."""
    a, b, c = group["ns_coefficients"]
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if update.shape[0] > update.shape[1] else x


NEWTON_SCHULZ_STEPS = 3
"""Of Muon's iteration. torch's default, 5, is dearer, and small models learn less (docs/log.md)."""


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """All parameters, in the optimizers' order."""
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


def make_optimizers(
    model: BitLM, config: TrainConfig, muon: Any = None
) -> list[torch.optim.Optimizer]:
    """Muon [3] for the matrices inside the blocks and AdamW for the rest, or AdamW for all.

    Only matrices are decayed. Each group's peak rate is its `initial_lr`.
    """
    matrices = [m.weight for n, m in model.bit_linears().items() if n != "lm_head"]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    matrix_rate, other_rate = peak_rates(model.config, config)
    decayed = {"params": matrices, "lr": matrix_rate, "weight_decay": config.weight_decay}
    rest = {"params": others, "lr": other_rate, "weight_decay": 0.0}
    adamw = partial(torch.optim.AdamW, betas=(config.adam_beta1, config.adam_beta2), fused=True)
    if config.optimizer == "muon":
        muon = muon or (torch.optim.Muon if has_bfloat16(matrices[0].device) else Float32Muon)
        first = muon([decayed], momentum=config.momentum, ns_steps=NEWTON_SCHULZ_STEPS)
        optimizers: list[torch.optim.Optimizer] = [first, adamw([rest])]
    else:
        optimizers = [adamw([decayed, rest])]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def clip_gradients(optimizers: Sequence[Any], limit: float, processes: Processes) -> Tensor:
    """Clip the gradients that AdamW will read; return the norm of all of them, before."""
    norms = []
    for optimizer in optimizers:
        parameters = [p for p in parameters_of([optimizer]) if p.grad is not None]
        norms.append(processes.norm([p.grad for p in parameters if p.grad is not None]))
        if limit and isinstance(optimizer, torch.optim.AdamW):
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norms[-1])
    return torch.stack(norms).norm()


def apply_gradients(
    optimizers: Sequence[Any],
    scaler: torch.amp.GradScaler,
    factor: float,
    max_grad_norm: float,
    loss: Tensor | None = None,
    processes: Processes | None = None,
) -> tuple[float, float]:
    """One optimizer step, on gradients that are the same in all processes; rates times `factor`.

    Nothing changes where a gradient is not finite: with two optimizers, GradScaler.step would let
    one step and skip the other. Reading loss and norm is a step's one wait for the GPU.

    Returns:
        the loss and the norm of all gradients, which is not finite where the step was skipped.
    """
    processes = processes or Processes()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    norm = clip_gradients(optimizers, max_grad_norm, processes)
    nats, norm = torch.stack([norm if loss is None else loss, norm]).tolist()
    if math.isfinite(norm):
        processes.step(optimizers)
    if scaler.is_enabled():
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return nats, norm


# -----------------------------------------------------------------------------
# 8 Checkpoints
# A checkpoint is one safetensors file, the whole state of a run as data, and a manifest with its
# size and sha256. It is written beside its name, read back, compared, given its manifest and then
# its name: what has the name was whole once, and the manifest shows what has been damaged since.

FORMAT_VERSION = 3
READABLE_FORMATS = (2, 3)  # 2 also held the lines of metrics.jsonl
_BLOCK = 4 << 20  # bytes read, written and hashed at once
PART = ".part"  # suffix of a file that is not finished
_CHECKPOINT_NAME = re.compile(r"(step|epoch|best)_(\d{8,})\.safetensors")
_OUR_NAME = re.compile(r"(step|epoch|best)_\d{8,}\.(safetensors(\.part)?|json)")


class Folder:
    """A folder of checkpoints through the few operations that a disk or Google Drive may refuse.

    Each raises OSError where the file system does. Tests replace it by one that fails on purpose
    (tests/faults.py).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def names(self) -> list[str]:
        """Names of the files in it, sorted; empty where there is no folder."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if not entry.is_dir())
        except FileNotFoundError:
            return []

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Write a new file, or none at all."""
        with self._new(name) as path, path.open("xb") as file:
            for block in blocks:
                file.write(block)

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: Any) -> None:
        """Write a new safetensors file, or none at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        with self._new(name) as path:
            try:
                save_file(tensors, path, metadata)
            except SafetensorError as error:
                raise OSError(errno.EIO, first_line(error), str(path)) from error

    @contextlib.contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        self.path.mkdir(exist_ok=True)
        self.remove(name)
        try:
            yield self.path / name
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk needs the space
                self.remove(name)
            raise

    def sync(self, name: str) -> None:
        """Wait until the file is on the disk."""
        with (self.path / name).open("r+b") as file:
            os.fsync(file.fileno())

    def rename(self, old: str, new: str) -> None:
        """Only to an unused name: on Drive, renaming over a file can leave two."""
        self.remove(new)
        (self.path / old).rename(self.path / new)

    def read(self, name: str) -> Iterator[bytes]:
        """Blocks of a regular file of this folder: links out of it, pipes, ... are refused."""
        path = self.path / name
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def remove(self, name: str) -> None:
        """Delete a file, emptied first: in Drive's trash it would still use the quota."""
        path = self.path / name
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:  # not someone else's, too
                os.truncate(path, 0)
            path.unlink()

    def digest(self, name: str) -> str:
        """sha256 of a file as it reads now."""
        digest = hashlib.sha256()
        for block in self.read(name):
            digest.update(block)
        return digest.hexdigest()


def _split_tensors(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`tree` with a copy of each tensor moved to `tensors`, and its name put there instead."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(tree, dict):
        return {k: _split_tensors(v, f"{path}/{k}".lstrip("/"), tensors) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_split_tensors(v, f"{path}/{i}", tensors) for i, v in enumerate(tree)]
    return tree


def snapshot(contents: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Contents as JSON, with names in place of the tensors, and copies of those."""
    tensors: dict[str, Tensor] = {}
    tree = _split_tensors({"format_version": FORMAT_VERSION, **contents}, "", tensors)
    text = json.dumps(tree)
    require(len(text) < 50 << 20, "contents", f"{len(text):,} bytes", "50 MB besides tensors")
    return text, tensors


def write_snapshot(folder: Folder, name: str, tree: str, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint beside its name, read it back, and publish it."""
    part = name + PART
    folder.write_tensors(part, tensors, {"contents": tree})
    folder.sync(part)
    if not _holds(folder.path / part, tree, tensors):
        raise OSError(errno.EIO, "what was read back is not what was written", str(folder.path))
    manifest = {"name": name, "format_version": FORMAT_VERSION, "step": checkpoint_step(name)}
    publish(folder, {**manifest, "size": folder.size(part), "sha256": folder.digest(part)})
    return folder.path / name


def _holds(path: Path, tree: str, tensors: dict[str, Tensor]) -> bool:
    from safetensors import SafetensorError, safe_open

    def same(a: Tensor, b: Tensor) -> bool:  # as bytes, since NaN equals nothing
        return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))

    try:
        with safe_open(path, framework="pt") as file:
            whole = all(same(file.get_tensor(name), tensor) for name, tensor in tensors.items())
            return whole and file.metadata()["contents"] == tree
    except (SafetensorError, KeyError, TypeError):
        return False


def checkpoint_step(path: str | Path) -> int:
    """The step in the name of a checkpoint."""
    return int(Path(path).name.split("_")[1].split(".")[0])


def publish(folder: Folder, manifest: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint that was read back, then give the file its name."""
    name = manifest["name"]
    folder.remove(name)  # an earlier one, damaged since; before its manifest goes
    folder.write(_manifest_name(name), [json.dumps(manifest).encode()])
    folder.sync(_manifest_name(name))
    folder.rename(name + PART, name)
    if folder.size(name) != manifest["size"]:
        folder.remove(name)
        raise OSError(errno.EIO, "not whole after renaming", str(folder.path / name))


def _manifest_name(name: str) -> str:
    return name.removesuffix(".safetensors") + ".json"


def save_checkpoint(folder: str | Path, contents: dict[str, Any], kind: str = "step") -> Path:
    """Write a checkpoint and, once it has been read back, its manifest.

    Args:
        folder: of checkpoints; created if need be.
        contents: tensors and what JSON can hold, in dictionaries and lists, with at least `step`.
        kind: "step", "epoch" or "best", the beginning of the file's name.

    Raises:
        OSError: the disk refused; the checkpoints of other steps are untouched.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = f"{kind}_{contents['step']:08d}.safetensors"
    return write_snapshot(Folder(folder), name, *snapshot(contents))


def read_manifest(folder: Folder, name: str) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError where it is missing, torn or not ours."""
    path, kinds = folder.path / name, {"name": str, "step": int, "size": int, "sha256": str}
    try:
        manifest = json.loads(b"".join(itertools.islice(folder.read(_manifest_name(name)), 1)))
        if manifest["name"] != name or any(type(manifest[k]) is not t for k, t in kinds.items()):
            raise ValueError("not of this file")
        version = manifest["format_version"]
    except FileNotFoundError:
        raise ValueError(f"{path}: damaged (its manifest is missing)") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: its manifest is torn or not its own") from None
    if version not in READABLE_FORMATS:
        raise ValueError(f"{path}: format {version!r:.20}, not one of {READABLE_FORMATS}")
    return manifest


def load_checkpoint(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint as data: nothing in it is executed, all tensors on the CPU.

    Args:
        path: a checkpoint file, its manifest beside it; or a run folder: its newest whole one.
        mapped: leave the tensors in the file, which must not change while they are used.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: incomplete, damaged, or not a checkpoint; the message says which.
    """
    path = Path(path)
    if path.is_dir():
        found = newest_checkpoint(path / "checkpoints")
        if found is None:
            raise FileNotFoundError(f"{path}: no whole checkpoint in it yet; train first")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    folder = Folder(path.parent)
    manifest = read_manifest(folder, path.name)
    if folder.size(path.name) != manifest["size"] or folder.digest(path.name) != manifest["sha256"]:
        raise ValueError(f"{path}: damaged (its size or sha256 differs from its manifest's)")
    contents = _read_safetensors(path, mapped)
    if contents.get("step") != manifest["step"]:
        raise ValueError(f"{path}: its step is {contents.get('step')!r}, not its manifest's")
    return contents


def _read_safetensors(path: Path, mapped: bool) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:

            def join(tree: dict[str, Any]) -> Any:
                if tree.keys() != {"tensor"}:
                    return tree
                tensor = file.get_tensor(tree["tensor"])
                return tensor if mapped else tensor.clone()  # the file may be deleted any time

            contents = json.loads(file.metadata()["contents"], object_hook=join)
        if not isinstance(contents["format_version"], int):
            raise ValueError("no format version in it")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a checkpoint of bitllm ({first_line(error)})") from error
    return contents


def list_checkpoints(folder: str | Path | Folder, kind: str = "step") -> list[Path]:
    """Checkpoint files by step, newest last, whole or not."""
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    matches = [_CHECKPOINT_NAME.fullmatch(name) for name in folder.names()]
    ours = [m[0] for m in matches if m and m[1] == kind]
    return [folder.path / name for name in sorted(ours, key=checkpoint_step)]


def newest_checkpoint(folder: str | Path, kind: str = "step") -> dict[str, Any] | None:
    """The newest whole one, None where there is none; every file it skips is logged."""
    place = Folder(folder)
    for name in place.names() if kind == "step" else ():
        if not _OUR_NAME.fullmatch(name):
            log.warning(f"skipped: {place.path / name}: not the name of a checkpoint")
    for path in reversed(list_checkpoints(place, kind)):
        try:
            return load_checkpoint(path)
        except (ValueError, OSError) as error:
            log.warning(f"skipped: {error}")
    return None


def prune_checkpoints(
    folder: str | Path | Folder, keep: int, kind: str = "step", spare: str = ""
) -> None:
    """Delete what is older than the `keep` newest finished ones of a kind, but not `spare`."""
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    paths = list_checkpoints(folder, kind)
    finished = [path for path in paths if is_finished(folder, path.name)]
    if len(finished) <= keep:
        return
    for path in paths[: paths.index(finished[-keep])]:
        if path.name != spare:
            folder.remove(path.name)  # first: without its manifest it would look damaged
            folder.remove(_manifest_name(path.name))


def remove_unfinished(folder: Folder) -> None:
    """Delete what an earlier session began to write and did not finish."""
    names = folder.names()
    for name in names:
        alone = name.endswith(".json") and name[: -len(".json")] + ".safetensors" not in names
        if _OUR_NAME.fullmatch(name) and (name.endswith(PART) or alone):
            folder.remove(name)


def is_finished(folder: Folder, name: str) -> bool:
    """Whether a checkpoint was finished, by its manifest and size, without reading it."""
    try:
        return read_manifest(folder, name)["size"] == folder.size(name)
    except (ValueError, OSError):
        return False


def checked_settings(values: Any, path: Path) -> dict[str, Any]:
    """The settings of a run, every value checked; ValueError names the file and the field."""
    kinds = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a run's settings (no JSON object with {', '.join(kinds)})")
    return {part: asdict(config_from(kind, values.get(part), path)) for part, kind in kinds.items()}


def read_run_config(run: Path) -> dict[str, Any]:
    """config.json of a run, checked."""
    return checked_settings(read_json(run / "config.json"), run / "config.json")


def check_weights(config: ModelConfig, weights: Any, path: Path) -> None:
    """Names and shapes of a model's tensors, before memory is taken; ValueError names the file."""
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{path}: no model in it")
    held = sum(tensor.numel() for tensor in weights.values())
    if held != config.num_parameters or len(weights) < config.num_hidden_layers:
        raise ValueError(
            f"{path}: {held:,} numbers in it, but its configuration has {config.num_parameters:,}"
        )
    with torch.device("meta"):
        expected = BitLM(config, seed=None).state_dict()
    for name in expected.keys() | weights.keys():
        want, came = (getattr(group.get(name), "shape", None) for group in (expected, weights))
        if want != came:
            raise ValueError(f"{path}: {name} has shape {came}; its configuration says {want}")


def _checkpoint_of_run(path: Path, checkpoint: str | int) -> dict[str, Any]:
    folder = path / "checkpoints"
    if not folder.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: not a run folder (no config.json in it)")
    if isinstance(checkpoint, int):
        names = [f"{kind}_{checkpoint:08d}.safetensors" for kind in ("step", "epoch", "best")]
        there = [folder / name for name in names if (folder / name).is_file()]
        return load_checkpoint(there[0] if there else folder / names[0])
    kinds = {"last": "step", "best": "best"}
    require(checkpoint in kinds, "checkpoint", checkpoint, "last, best or a step")
    found = newest_checkpoint(folder, kinds[checkpoint])
    if found is None:
        other = "last" if checkpoint == "best" else "best"
        raise FileNotFoundError(
            f"{path}: no whole checkpoint ({checkpoint}) in it; train first, or try {other}"
        )
    return found


def load_run(path: str | Path, checkpoint: str | int = "last") -> tuple[BitLM, Any, dict[str, Any]]:
    """A run's model ready to generate, its tokenizer, and facts from its checkpoint.

    Args:
        path: a run folder (or a mirror of one), one checkpoint file; or a seed script's .pth file
            with its tokenizer.json beside it.
        checkpoint: "last", "best" (lowest validation loss) or a step that was kept.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, and where.
    """
    path = Path(path)
    if path.suffix == ".pth":
        model = import_seed_checkpoint(path)
        return model.freeze(), load_tokenizer(path.with_name("tokenizer.json")), {}
    contents = load_checkpoint(path) if path.is_file() else _checkpoint_of_run(path, checkpoint)
    try:
        config = config_from(ModelConfig, contents["config"]["model"], path)
        check_weights(config, contents["model"], path)
        tokenizer = tokenizer_from(contents["tokenizer"], path)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its checkpoint lacks what generating needs ({error})") from error
    check_tokenizer(tokenizer, config.vocab_size, path)
    model = BitLM(config, seed=None)
    model.load_state_dict(contents["model"])
    facts = {key: contents.get(key) for key in ("step", "config", "metrics", "loss", "val_loss")}
    return model.freeze(), tokenizer, facts


def load_model(path: str | Path, checkpoint: str | int = "last") -> tuple[BitLM, Any]:
    """A model ready to generate, and its tokenizer.

    Args:
        path: a run folder, a mirror of one, or one checkpoint file; a packed file or a Hugging
            Face folder that bitllm exported; or a seed script's .pth file with its tokenizer.json
            beside it.
        checkpoint: of a run folder: "last", "best" (lowest validation loss) or a kept step.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, and where. Files are only data:
            nothing in them is executed.
    """
    path = Path(path)
    packed = path.suffix in (".safetensors", ".gguf") and not _CHECKPOINT_NAME.fullmatch(path.name)
    if packed or "model_type" in (read_json(path / "config.json") or {}):
        return extension("export", f"reading {path}").read_exported(path)[:2]
    return load_run(path, checkpoint)[:2]


# -----------------------------------------------------------------------------
# 9 Training


@dataclass(frozen=True)
class Device:
    """Where and in which precision to compute."""

    device: torch.device
    dtype: torch.dtype
    why: str

    def autocast(self) -> Any:
        """Matrix products in `dtype`, all else in float32."""
        reduced = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=reduced)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which only float16's narrow range needs."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.why})"


def choose_device(device: str = "auto", dtype: str = "auto") -> Device:
    """CUDA, MPS or CPU; bfloat16 where the hardware has it, float16 on older GPUs, else float32.

    Raises ValueError for a device that this machine does not have.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    there = [name for name, ok in present.items() if ok]
    device = there[0] if device == "auto" else device
    require(device in there, "device", device, f"one that this machine has: {', '.join(there)}")
    found = torch.device(device)
    if dtype != "auto":
        return Device(found, getattr(torch, dtype), "as asked")
    if has_bfloat16(found):
        return Device(found, torch.bfloat16, "bfloat16 in hardware")
    if device == "cuda":
        return Device(found, torch.float16, "no bfloat16 in hardware; loss scaled")
    return Device(found, torch.float32, "no fast bfloat16 here")


def windows_at_once(
    model: ModelConfig, train: TrainConfig, device: Device, world_size: int = 1
) -> int:
    """Windows of a micro-batch, for each process.

    On a CPU, what the blocks keep for the backward pass stays below 192 MB, near its caches: more
    is slower. On a GPU it may take a quarter of the free memory.
    """
    windows = -(-train.batch_tokens // model.max_position_embeddings // world_size)
    if train.micro_batch_size:
        return min(train.micro_batch_size, windows)
    room = torch.cuda.mem_get_info()[0] // 4 if device.device.type == "cuda" else 192 << 20
    numbers = model.num_hidden_layers * (8 * model.hidden_size + 3 * model.intermediate_size)
    fit = room // (device.dtype.itemsize * numbers * model.max_position_embeddings)
    return max(d for d in range(1, windows + 1) if windows % d == 0 and d <= max(fit, 1))


@torch.no_grad()
def total_loss(
    model: BitLM,
    tokens: np.ndarray,
    first: int,
    device: Device,
    batch_size: int = 16,
    stride: int | None = None,
    processes: Processes | None = None,
) -> float:
    """Nats of `tokens`, each predicted once, `first` standing before them; not per token.

    The text is cut into windows of the context length, and a token sees what is before it in its
    window. With `stride`, a window ends every `stride` tokens and counts what the one before did
    not, so each token sees at least context - stride others: context / stride times the work.
    """
    context, processes = model.config.max_position_embeddings, processes or Processes()
    total, ends = 0.0, [*range(context, len(tokens), stride or context), len(tokens)]
    spans = zip([0, *ends], ends, strict=False)  # of the tokens that each window counts
    windows = torch.tensor([(max(b - context, 0) if stride else a, a, b) for a, b in spans])
    with model.hold_weights(device.dtype), device.autocast():
        for part, _ in processes.micro_batches(windows, windows, batch_size):
            x = torch.zeros(len(part), min(context, len(tokens)), dtype=torch.int64)
            y = torch.full_like(x, -100)  # which the loss ignores
            for row, (start, counted, end) in enumerate(part.tolist()):
                text = torch.from_numpy(tokens[max(start - 1, 0) : end].astype(np.int64))
                text = text if start else F.pad(text, (1, 0), value=first)
                x[row, : end - start] = text[:-1]
                y[row, counted - start : end - start] = text[1 + counted - start :]
            total += model.loss(x.to(device.device), y.to(device.device)).item()
    return processes.all_reduce_sum([total])[0]


def evaluate(
    model: BitLM,
    tokenizer: Any,
    data: str | Path,
    *,
    text_column: str | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    device: Device | None = None,
) -> dict[str, float]:
    """How well the model predicts every token of a text (of a folder, the training files).

    Args:
        data: a source as `DataConfig.data`.
        stride: tokens that the context moves; default: the whole context, which is fastest.

    Returns:
        loss: nats per token. perplexity: exp(loss). bits_per_byte: bits per byte of UTF-8 text.
        word_perplexity: exp(nats / words), where words are white-space words and line ends, so
        models with different vocabularies compare. tokens, words, bytes: the counts.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `read_pieces`; or no text in it.
    """
    device, context = device or choose_device(), model.config.max_position_embeddings
    fits = stride is None or 1 <= stride <= context
    require(fits, "stride", stride, f"1 to {context} tokens, the context of this model")
    eot, ids, words, size = end_of_text_id(tokenizer), [], 0, 0
    config = DataConfig(data=str(data), text_column=text_column)
    for text, ends in read_pieces(str(data), "train", config):
        ids += encode(tokenizer, text) + ([eot] if ends and eot is not None else [])
        words += len(text.split()) + text.count("\n")
        size += len(text.encode("utf-8", "replace"))
    ids = ids[:-1] if eot is not None and ids[-1:] == [eot] else ids  # only between documents
    if not ids:
        raise ValueError(f"data={str(data)!r}: no text in it to evaluate on")
    model.to(device.device)
    nats = total_loss(model, np.asarray(ids), eot or 0, device, batch_size, stride)
    return {
        "loss": nats / len(ids),
        "perplexity": safe_exp(nats / len(ids)),
        "bits_per_byte": nats / math.log(2) / size,
        "word_perplexity": safe_exp(nats / max(words, 1)),
        "tokens": len(ids),
        "words": words,
        "bytes": size,
    }


def safe_exp(x: float) -> float:
    return math.exp(min(x, 700.0))


@dataclass
class TrainState:
    """Everything that a step changes, and what a checkpoint holds. Callbacks read it."""

    model: BitLM
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    config: TrainConfig
    processes: Processes = field(default_factory=Processes)
    step: int = 0  # optimizer steps done
    skipped: int = 0  # of these, left out because a gradient was not finite
    skipped_in_a_row: int = 0
    loss: float = math.nan  # nats per token of the last step's batch
    val_loss: float = math.nan  # of the last evaluation
    best_val_loss: float = math.inf
    best_step: int = 0
    evals_since_best: int = 0
    train_seconds: float = 0.0  # all sessions
    trits: dict[str, Tensor] = field(default_factory=dict)  # of each BitLinear when last logged
    last_saved_step: int = 0  # of the newest checkpoint that is safe on the disk
    last_saved_at: float = 0.0  # time.time() of that; 0: not in this session
    save_seconds: float = 0.0  # that training waited for saving, in this session
    mirror: Any = None  # the bitllm.mirror.Mirror, with its `status()`
    # set by callbacks, buttons and signals, read after each step:
    stop_signal: int = 0  # save a checkpoint and end, as after this signal
    save_requested: bool = False  # save a checkpoint
    paused: bool = False  # no further step until it is cleared

    _SAVED = ("step", "skipped", "skipped_in_a_row", "loss", "val_loss", "best_val_loss")
    _SAVED += ("best_step", "evals_since_best", "train_seconds")

    @property
    def tokens(self) -> int:
        """training tokens read so far"""
        return self.step * self.config.batch_tokens

    @property
    def out_of_patience(self) -> bool:
        """whether the last `patience` evaluations were all no better than one before them"""
        return 0 < self.config.patience <= self.evals_since_best

    @property
    def finished(self) -> bool:
        """whether there is no step left to do: all are done, or more would only overfit"""
        return self.step >= self.config.max_steps or self.out_of_patience

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs; complete in the main process, but all call it."""
        gather, names = self.processes.gather, self._parameter_names()
        optimizers = []
        for optimizer in self.optimizers:
            tensors = {(names[p], k): t for p, s in optimizer.state.items() for k, t in s.items()}
            state: dict[str, dict[str, Tensor]] = {}
            for (name, key), tensor in gather(tensors).items():
                state.setdefault(name, {})[key] = tensor
            optimizers.append({"state": state})
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            **{name: getattr(self, name) for name in self._SAVED},
            "model": self.processes.whole(self.model.state_dict()),
            "optimizers": optimizers,
            "scaler": self.scaler.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
            "trits": self.trits,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, possibly on another device.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: it is not of this model and optimizer.
        """
        for name in self._SAVED:
            if not isinstance(saved[name], (int, float)):
                raise TypeError(f"{name} is {saved[name]!r:.80}")
            setattr(self, name, saved[name])
        scatter, own = self.processes.scatter, self.model.state_dict()
        self.model.load_state_dict({n: scatter(own[n], w) for n, w in saved["model"].items()})
        names = self._parameter_names()
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            numbered = {}
            for number, parameter in enumerate(parameters_of([optimizer])):
                tensors = state["state"].get(names[parameter], {})
                if any(t.shape not in (parameter.shape, ()) for t in tensors.values()):
                    raise ValueError(f"optimizer state of {names[parameter]} has another shape")
                if tensors and self.processes.owns(parameter):
                    numbered[number] = {k: scatter(parameter, t) for k, t in tensors.items()}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"]["torch"])
        if torch.cuda.is_available() and len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        for name, layer in self.model.bit_linears().items():
            trits = saved["trits"].get(name)
            if trits is not None and trits.shape != layer.weight.shape:
                raise ValueError(f"trits of {name} have shape {tuple(trits.shape)}")
        self.trits = dict(saved["trits"]) if self.processes.is_main else {}

    def _parameter_names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}


class Callback:
    """Attached to `train`; override what is needed. To stop training, set state.stop_signal."""

    def on_start(self, state: TrainState) -> None:
        """Before the first step of this session."""

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        """After every step; `metrics` is the line just logged, if one was."""

    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """After an evaluation."""

    def on_sample(self, state: TrainState, text: str) -> None:
        """After a text was generated to look at."""

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        """After a checkpoint was written and verified."""

    def on_mirror(self, state: TrainState, status: str) -> None:
        """Between steps, when the status of the mirror has changed."""

    def on_pause(self, state: TrainState) -> None:
        """Ten times a second while `state.paused` keeps the loop from its next step."""

    def on_end(self, state: TrainState) -> None:
        """After the last step of this session, whatever ended it."""


class ProgressBar(Callback):
    """tqdm on stderr: loss, tokens/s, time left; texts and evaluations above it."""

    mirror_failing = False

    def on_start(self, state: TrainState) -> None:
        from tqdm.auto import tqdm

        total = state.config.max_steps
        self.bar = tqdm(total=total, initial=state.step, unit="step", dynamic_ncols=True)

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        if metrics:
            text = f"loss {metrics['loss']:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s"
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None:
        loss, perplexity = metrics["val_loss"], metrics["val_perplexity"]
        self._print(f"step {state.step}: validation loss {loss:.4f}, perplexity {perplexity:.1f}")

    def on_sample(self, state: TrainState, text: str) -> None:
        self._print(f"  | {' '.join(text.split())[:160]}")

    def on_mirror(self, state: TrainState, status: str) -> None:
        if (state.mirror.errors > 0) != self.mirror_failing:  # when it begins and when it ends
            self.mirror_failing = not self.mirror_failing
            self._print(status)

    def on_end(self, state: TrainState) -> None:
        self.bar.close()

    def _print(self, line: str) -> None:
        self.bar.write(line, file=sys.stderr)


class MetricsLog:
    """metrics.jsonl: one JSON object per line, cut back to the step that a run resumes from.

    A line that the disk refuses is kept and written with the next one. Without a path, as in all
    processes but the main one, nothing is written.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path, self.waiting = path, []
        self.lines = [line for line in self.read(path) if line["step"] <= step] if path else []
        """those of earlier sessions"""
        if path:
            write_atomically(path, "".join(map(self._text, self.lines)).encode())

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All whole lines, null as NaN; a torn last one, as a kill leaves it, is left out."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    lines.append(json.loads(text))
        lines = [x for x in lines if isinstance(x, dict) and isinstance(x.get("step"), int)]
        return [{k: math.nan if v is None else v for k, v in x.items()} for x in lines]

    @staticmethod
    def _text(line: dict[str, Any]) -> str:
        odd = {k for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        return json.dumps({k: None if k in odd else v for k, v in line.items()}) + "\n"

    def write(self, line: dict[str, Any]) -> None:
        if not self.path:
            return
        self.waiting.append(line)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(self._text, self.waiting)))
            self.waiting.clear()
        except OSError as error:
            if len(self.waiting) == 1:
                log.warning(f"metrics.jsonl cannot be written ({error}); its lines wait")


def log_to(stream: Any) -> None:
    """Show what "bitllm" logs on `stream`, a line per message, instead of where it went before."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


@contextlib.contextmanager
def _stop_on_signals(state: TrainState) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP set a flag read between steps; a second one ends at once."""

    def handle(number: int, frame: Any) -> None:
        if state.stop_signal:
            raise KeyboardInterrupt
        state.stop_signal = number
        log.info("stopping: a checkpoint is saved after this step (again: stop at once)")

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")):
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SAVE_RETRY_S = 60.0
"""Seconds until a checkpoint that could not be saved is tried again."""
MAX_SKIPPED_STEPS = 25
"""Non-finite steps in a row that end a run. float16's first loss scale takes some to settle."""
LOCK_NAME = ".lock"
_SET_ASIDE = "set-aside-"
_MAY_CHANGE = ("micro_batch_size", "device", "dtype", "compile", "deterministic", "max_steps")
_MAY_CHANGE += ("patience", "fsdp", "sample_prompt", "keep_checkpoints", "log_every_steps")
_MAY_CHANGE += ("eval_every_steps", "eval_tokens")
_MAY_CHANGE += ("save_every_steps", "save_every_minutes", "save_every_epoch")


def check_same_settings(where: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run keeps its settings, except those that may change; ValueError names what differs."""
    found = [
        f"{name} (run: {saved[part][name]}, asked: {value})"
        for part in ("model", "data", "train")
        for name, value in now[part].items()
        if saved[part][name] != value and not (part == "train" and name in _MAY_CHANGE)
    ]
    if found:
        raise ValueError(
            f"{where} was made with other settings: {'; '.join(found)}. "
            "Ask for the same, or choose another --out"
        )


def check_run_folder(folder: Path) -> None:
    """ValueError for a file, or a folder of something else. Nothing is written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file; expected a folder for the run, choose another")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if "config.json" in names or "checkpoints" in names:
        return
    ours = ("tokenizer.json", "metrics.jsonl", "data", "lock.json")
    ignored = [n for n in names if n[0] == "." or ".tmp" in n or _SET_ASIDE in n]
    strange = sorted(set(names) - {*ours, *ignored})
    if strange:
        raise ValueError(
            f"{folder}: not a run folder (no config.json) and not empty "
            f"({', '.join(strange[:3])}); choose another"
        )


def set_aside(folder: Path, keep_data: bool) -> None:
    """Move what a run left to a folder inside it, so that another can begin; nothing is lost."""
    kept = ["lock.json", *(["data", "tokenizer.json"] if keep_data else [])]
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    moved = [n for n in names if n not in kept and n[0] != "." and not n.startswith(_SET_ASIDE)]
    if moved:
        numbers = (folder / f"{_SET_ASIDE}{n}" for n in itertools.count(1))
        target = next(path for path in numbers if not path.exists())
        target.mkdir()
        for name in moved:
            (folder / name).rename(target / name)
        log.info(f"{folder}: the run in it was moved to {target}")


def _lock(folder: Path) -> Any:
    """The run folder's lock, which ends with the process; ValueError: another process has it."""
    import filelock

    path = folder / LOCK_NAME
    if path.is_symlink():
        path.unlink()
    lock = filelock.FileLock(path, timeout=0, thread_local=False)
    try:
        return lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{folder}: another process is training in it. Stop that one or choose another folder"
        ) from None


def open_run(out: Path, settings: dict[str, Any], resume: str, mirror: Any) -> Any:
    """The checkpoint to resume from; None to begin. Nothing is changed but what a mirror returns.

    Raises:
        ValueError: other settings, remains of which nothing is whole, or `resume` does not fit.
    """
    folder = out / "checkpoints"
    try:
        checkpoint = mirror.newest_checkpoint(settings) if mirror else newest_checkpoint(folder)
        remains = list_checkpoints(folder) or (mirror and mirror.has_checkpoints())
    except OSError as error:
        raise ValueError(
            f"{error}: whether there is a run to resume is not known. Mount the drive, or leave "
            "--mirror out"
        ) from error
    if checkpoint is None:
        if remains:
            raise ValueError(
                f"{out}: there are remains of a run, but no checkpoint that is whole. Nothing was "
                "changed; --resume never begins anew and moves the remains to a folder set-aside-1"
            )
        require(resume != "must", "resume", resume, f"a checkpoint in {out} to resume from")
        if (out / "config.json").is_file():  # of a run that has not saved yet
            check_same_settings(out, read_run_config(out), settings)
        return None
    then = checked_settings(checkpoint.get("config"), folder)
    check_same_settings(out, then, settings)
    before, now = then["train"]["max_steps"], settings["train"]["max_steps"]
    done = checkpoint["step"]
    require(now >= done, "max_steps", now, f"at least {done}, which this run has done already")
    if before != now:
        log.info(f"max_steps: {before} -> {now}; the schedule now ends there, and the rate with it")
    path = out / "tokenizer.json"
    try:
        load_tokenizer(path)
    except (ValueError, FileNotFoundError) as error:
        log.warning(f"{first_line(error)}: taken from the checkpoint")
        tokenizer = tokenizer_from(str(checkpoint.get("tokenizer")), folder)
        write_atomically(path, tokenizer.to_str(pretty=True).encode())
    return checkpoint


def memory_in_use(device: Device) -> int:
    """Most bytes held so far: on the GPU, or by this process."""
    if device.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # not ru_maxrss: it begins with that of the parent
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) << 10
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """What decides the bits of a run besides its settings."""
    libraries = {"torch": str(torch.__version__), "numpy": np.__version__}
    return {"python": platform.python_version(), **libraries}


class _Session:
    """One call of `train`: what it holds in memory, and its steps."""

    def __init__(
        self, configs: tuple[Any, Any, Any], out: Path, processes: Processes, callbacks: Any
    ) -> None:
        self.model_config, data_config, self.config = configs
        self.out, self.processes, self.callbacks = out, processes, callbacks
        self.settings = _settings(configs)
        self.context, vocab_size = self.model_config.max_position_embeddings, configs[0].vocab_size
        self.device = choose_device(self.config.device, self.config.dtype)
        prepare = partial(prepare_data, data_config, vocab_size, self.context, out)
        self.data, self.tokenizer = processes.run_on_main(prepare) or prepare()
        size = processes.world_size
        self.micro_batch = windows_at_once(self.model_config, self.config, self.device, size)
        torch.manual_seed(self.config.seed)  # nothing draws from it yet; a checkpoint holds it
        model = processes.build_model(self.model_config, self.config.seed, self.device.device)
        optimizers = processes.make_optimizers(model, self.config)
        self.state = TrainState(model, optimizers, self.device.scaler(), self.config, processes)
        self.loss: Callable[[Tensor, Tensor], Tensor] = model.loss
        self.unproven = False  # compiled, but no step has shown yet that it works
        self.log = MetricsLog(None, 0)

    def notify(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.state, *values)

    def compile(self) -> None:
        """Compile the loss where asked to, or where it pays: it takes ten seconds and more."""
        model, config = self.model_config, self.config
        worth = 1e15 if self.device.device.type == "cuda" else 5e12  # a minute's work, guessed
        work = 6 * model.num_parameters * config.batch_tokens * config.max_steps
        if config.compile == "off" or (config.compile == "auto" and work <= worth):
            return
        try:
            compiling = extension("compiling", "torch.compile")
            require(not self.processes.sharded, "fsdp", True, "False to compile")
            self.loss = compiling.compiled_loss(self.state.model)
            self.unproven = True
            log.info("torch.compile: on; the first step takes some ten seconds longer")
        except Exception as error:  # of whatever kind: it also imports the compiler
            self.back_to_eager(error)

    def back_to_eager(self, error: Exception) -> None:
        log.warning(f"torch.compile: off ({type(error).__name__}: {first_line(error)})")
        self.loss, self.unproven = self.state.model.loss, False

    def gradients(self, windows: Tensor) -> Tensor:
        """Accumulate the gradients of this process' windows, (N, T + 1); return their loss.

        With half the micro-batch when a GPU runs out of memory, eager when compiling fails.
        """
        while True:
            try:
                total = self._backward(windows)
                self.unproven = False
                return total
            except torch.OutOfMemoryError:
                if self.micro_batch == 1 or self.processes.sharded:
                    raise
                self.micro_batch //= 2
                log.warning(f"out of GPU memory: {self.micro_batch} windows at once from here on")
            except Exception as error:
                if not self.unproven:
                    raise
                if self.state.stop_signal:  # it reaches the compiler's helpers too
                    raise KeyboardInterrupt from error
                self.back_to_eager(error)
            self.state.model.zero_grad()
            if self.device.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward(self, windows: Tensor) -> Tensor:
        device, total = self.device.device, torch.zeros((), device=self.device.device)
        x, y = windows[:, :-1], windows[:, 1:]  # (N, T)
        with self.state.model.hold_weights(self.device.dtype):
            for pair in self.processes.micro_batches(x, y, self.micro_batch):
                x, y = (part.to(device, non_blocking=True).contiguous() for part in pair)
                with self.device.autocast():
                    loss = self.loss(x, y) / self.config.batch_tokens
                self.state.scaler.scale(loss).backward()
                total += loss.detach()
        return total

    def run(self, saver: _Saver) -> None:
        """Steps until all are done, a signal came, or the loss stays non-finite."""
        state, config, processes = self.state, self.config, self.processes
        parameters = parameters_of(state.optimizers)
        steps, since = 0, time.perf_counter()  # the last line of the log
        while not state.finished and not self.stop_asked():
            if not self.tokens_came():
                continue
            start = time.perf_counter()
            windows = torch.from_numpy(self.data.batch(config, self.context, state.step))
            factor = learning_rate_factor(config, state.step)
            loss = processes.reduce_gradients(parameters, self.gradients(windows))
            state.loss, norm = apply_gradients(
                state.optimizers, state.scaler, factor, config.max_grad_norm, loss, processes
            )
            self.count_step(math.isfinite(norm), time.perf_counter() - start)
            steps, metrics = steps + 1, None
            if state.step % config.log_every_steps == 0 or state.step == config.max_steps:
                speed = steps * config.batch_tokens / (time.perf_counter() - since)
                metrics = self.step_metrics(norm, factor, speed)
                self.log.write(metrics)
            self.notify("on_step", metrics)
            if config.eval_every_steps and state.step % config.eval_every_steps == 0:
                _evaluate(self)
                _sample(self)
                saver.keep_best()
            saver.save_where_due()
            if metrics:
                steps, since = 0, time.perf_counter()
            since += self.wait_while_paused(saver)

    def count_step(self, finite: bool, seconds: float) -> None:
        state = self.state
        state.step += 1
        state.train_seconds += seconds
        state.skipped += not finite
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        if state.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"{MAX_SKIPPED_STEPS} steps in a row had no finite gradient; stopped at step "
                f"{state.step}. The last checkpoint in {self.out} is from before. Try a lower "
                "learning_rate, or --dtype float32"
            )

    def stop_asked(self) -> bool:
        """Whether any process has been told to stop; the same answer in all."""
        [number] = self.processes.all_reduce_max([self.state.stop_signal])
        self.state.stop_signal = int(number) or self.state.stop_signal  # one may have just come
        return number != 0

    def tokens_came(self) -> bool:
        """Whether the next step's tokens are there, after waiting for them; False: stop first."""
        data, waiting = self.data, False
        while data.streamed:
            ready = data.ready(self.config, self.context, self.state.step)
            missing, failed = self.processes.all_reduce_max([not ready, data.error is not None])
            if not missing:
                break
            if failed:
                self.state.stop_signal = self.state.stop_signal or signal.SIGTERM
            if self.stop_asked():
                return False
            if not waiting:
                log.info(f"waiting for more text; {len(data.training):,} tokens are there")
            waiting = True
            time.sleep(0.1)
        return True

    def wait_while_paused(self, saver: _Saver) -> float:
        """Seconds spent here, which belong to no step; stopping and saving work meanwhile."""
        start = time.perf_counter()
        while any(self.processes.all_reduce_max([self.state.paused])) and not self.stop_asked():
            self.notify("on_pause")
            saver.save_where_due(paused=True)
            time.sleep(0.1)
        return time.perf_counter() - start

    def step_metrics(self, norm: float, factor: float, tokens_per_s: float) -> dict[str, Any]:
        return {
            "step": self.state.step,
            "loss": self.state.loss,
            "learning_rate": peak_rates(self.model_config, self.config)[0] * factor,
            "grad_norm": norm,
            "tokens": self.state.tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "memory_bytes": memory_in_use(self.device),
            "train_seconds": round(self.state.train_seconds, 3),
            **_telemetry(self.state),
        }


def _settings(configs: tuple[Any, Any, Any]) -> dict[str, Any]:
    return dict(zip(("model", "data", "train"), map(asdict, configs), strict=True))


def _telemetry(state: TrainState) -> dict[str, list[float]]:
    """Per layer: share of zeros, and of trits that changed since the last call."""
    config, processes = state.model.config, state.processes
    zeros, flips, sizes = (np.zeros(config.num_hidden_layers) for _ in range(3))
    for name, linear in state.model.bit_linears().items() if config.linear != "dense" else ():
        weight = processes.whole({name: linear.weight.detach()}).get(name)
        if name == "lm_head" or weight is None or not processes.is_main:
            continue
        layer, trits = int(name.split(".")[2]), weight_quant(weight)[0].to("cpu", torch.int8)
        zeros[layer] += (trits == 0).sum().item()
        flips[layer] += (trits != state.trits.get(name, trits)).sum().item()
        sizes[layer] += trits.numel()
        state.trits[name] = trits
    found = {"zero_fraction": zeros, "flip_rate": flips} if sizes.any() else {}
    return {name: (counts / sizes).round(6).tolist() for name, counts in found.items()}


def _evaluate(session: _Session, final: bool = False) -> None:
    """Validation loss: on a slice of the tokens, the same each time; at the end on all of them."""
    state, data = session.state, session.data
    tokens = data.validation if final else data.validation[: session.config.eval_tokens]
    first = end_of_text_id(session.tokenizer) or 0
    nats = total_loss(state.model, tokens, first, session.device, processes=state.processes)
    state.val_loss = loss = nats / len(tokens)
    metrics = {
        "step": state.step,
        "val_loss": loss,
        "val_perplexity": safe_exp(loss),
        "val_bits_per_byte": loss / math.log(2) / data.bytes_per_token,
        "val_tokens": len(tokens),
        **({"final": True} if final else {}),
    }
    session.log.write(metrics)
    session.notify("on_eval", metrics)


def _sample(session: _Session) -> None:
    """Generate a text of fixed seed, to look at."""
    model, prompt = session.processes.whole_model(session.state.model), session.config.sample_prompt
    if model and session.callbacks:
        text = generate(model, session.tokenizer, prompt, SamplingConfig(60, seed=0))
        session.notify("on_sample", prompt + text)


class _Saver:
    """Checkpoints of a session, written by a thread: training only waits for copies of tensors."""

    def __init__(self, session: _Session) -> None:
        self.session, self.state, self.mirror = session, session.state, session.state.mirror
        self.folder = Folder(session.out / "checkpoints")
        self.keep = keep_of(session.config)
        self.worker = ThreadPoolExecutor(1, "checkpoints")
        self.running: tuple[str, Future[Path]] | None = None
        self.begun_step = self.state.step or -1  # of the newest checkpoint begun
        self.last_save, self.retry_at = time.monotonic(), math.inf
        self.mirror_status = ""
        with contextlib.suppress(OSError):
            remove_unfinished(self.folder)

    def save_where_due(self, paused: bool = False) -> None:
        """Save what is due after this step, and report what has become safe since the last."""
        session, state, step = self.session, self.state, self.state.step
        config, due = session.config, state.save_requested
        epoch = session.data.steps_per_epoch(config, session.context)
        if not paused:
            if config.save_every_epoch and step // epoch > (step - 1) // epoch:
                self.save("epoch")
            minutes = (time.monotonic() - self.last_save) / 60
            due |= bool(config.save_every_steps and step % config.save_every_steps == 0)
            due |= bool(config.save_every_minutes and minutes >= config.save_every_minutes)
            due |= time.monotonic() >= self.retry_at
        due, less = state.processes.all_reduce_max([due, -session.micro_batch])
        session.micro_batch = -int(less)  # in all processes as small as where memory was scarce
        if due:
            self.save()
        self.collect()
        if self.mirror and self.mirror.status() != self.mirror_status:
            self.mirror_status = self.mirror.status()
            session.notify("on_mirror", self.mirror_status)

    def keep_best(self) -> None:
        """Save the model where the last evaluation was the best."""
        state = self.state
        state.evals_since_best += 1
        if state.val_loss < state.best_val_loss:
            state.best_val_loss, state.best_step = state.val_loss, state.step
            state.evals_since_best = 0
            self.save("best")

    def save(self, kind: str = "step") -> None:
        """Begin a checkpoint; a disk that refuses does not end the training."""
        start, step = time.perf_counter(), self.state.step
        if kind == "step":
            self.state.save_requested = False
            if not any(self.state.processes.all_reduce_max([self.begun_step != step])):
                return
            self.last_save, self.begun_step = time.monotonic(), step
        contents = self.contents(kind)  # every process gives its part
        if self.state.processes.is_main:
            self.collect(wait=True)  # one copy at a time
            name = f"{kind}_{step:08d}.safetensors"
            write = partial(write_snapshot, self.folder, name, *snapshot(contents))
            self.running = name, self.worker.submit(write)
        self.state.save_seconds += time.perf_counter() - start

    def contents(self, kind: str) -> dict[str, Any]:
        """All of a run but its tokens; of the best, what generating needs."""
        session, state = self.session, self.state
        if kind == "best":
            weights = state.processes.whole(state.model.state_dict())
            contents = {"step": state.step, "val_loss": state.val_loss, "model": weights}
        else:
            contents = {**state.state_dict(), **_circumstances(session)}
            contents["micro_batch"] = session.micro_batch
        text = session.tokenizer.to_str()
        return {**contents, "config": session.settings, "tokenizer": text, "versions": versions()}

    def collect(self, wait: bool = False) -> None:
        """Report the checkpoint on its way, once it is safe or could not be saved."""
        if self.running is None or not (wait or self.running[1].done()):
            return
        (name, future), self.running, state = self.running, None, self.state
        kind = name.split("_")[0]
        try:
            path = future.result()
        except OSError as error:
            last = state.last_saved_step
            good = f"the last good one is of step {last}" if last else "there is no good one yet"
            log.warning(f"{name} could not be saved: {error}. Training goes on; {good}")
            if kind == "step":
                self.begun_step, self.retry_at = -1, time.monotonic() + SAVE_RETRY_S
            return
        if kind in self.keep:
            if self.mirror:
                self.mirror.offer(kind, name)
            with contextlib.suppress(OSError):  # what stays is pruned next time
                spare = self.mirror.copying if self.mirror else ""
                prune_checkpoints(self.folder, self.keep[kind], kind, spare)
        if kind == "step":
            state.last_saved_step, state.last_saved_at = checkpoint_step(name), time.time()
            self.retry_at = math.inf
            self.session.notify("on_checkpoint", path)

    def save_and_wait(self) -> None:
        """Save this step and wait until it is safe; OSError where it cannot be."""
        self.collect(wait=True)
        self.save()
        self.collect(wait=True)
        state = self.state
        state.last_saved_step = state.processes.broadcast(state.last_saved_step)
        if state.last_saved_step != state.step:
            raise OSError(
                f"step {state.step} could not be saved in {self.session.out} (see above); the last "
                f"good checkpoint is of step {state.last_saved_step}. Free some space or repair "
                "the disk, then train again: it resumes from there"
            )


def keep_of(config: TrainConfig) -> dict[str, int]:
    """How many checkpoints stay, by kind; those of epochs all do, and are not mirrored."""
    return {"step": config.keep_checkpoints, "best": 1}


def _circumstances(session: _Session) -> dict[str, Any]:
    """What a checkpoint holds for a resume to compare."""
    return {
        "tokenizer_sha256": session.data.manifest["tokenizer_sha256"],
        "data_sha256": session.data.sha256,
        "device": str(session.device),
        "processes": session.processes.world_size,
        "threads": torch.get_num_threads() if session.device.device.type == "cpu" else 0,
    }


def _restore(session: _Session, checkpoint: dict[str, Any]) -> None:
    """Resume from a checkpoint; other versions or another device are logged, not refused."""
    now, state = _circumstances(session), session.state
    try:
        for name in ("tokenizer_sha256", "data_sha256"):
            if checkpoint[name] != now[name]:
                raise ValueError(f"{name} differs; put its tokenizer.json and data/ back")
        before = {**checkpoint["config"]["train"], **checkpoint, **checkpoint["versions"]}
        now |= {**versions(), "fsdp": session.config.fsdp}
        changed = [f"{k} {before[k]} -> {v}" for k, v in now.items() if before.get(k, v) != v]
        if changed:
            log.info(f"note: not bit for bit as before, for these changed: {', '.join(changed)}")
        elif not session.config.micro_batch_size:
            session.micro_batch = int(checkpoint["micro_batch"])
        check_weights(session.model_config, checkpoint["model"], session.out / "checkpoints")
        state.load_state_dict(checkpoint)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{session.out}: its checkpoint of step {checkpoint['step']} is not of this run "
            f"({first_line(error)}); nothing was changed. Choose another --out, or begin anew with "
            "--resume never"
        ) from error
    state.last_saved_step = state.step


def _write_settings(session: _Session) -> None:
    """What a run folder holds beside its checkpoints, where it is missing or has changed."""
    path, text = session.out / "config.json", session.tokenizer.to_str(pretty=True)
    config = {"format_version": FORMAT_VERSION, **session.settings}
    if read_json(path) != json.loads(json.dumps(config)):
        write_atomically(path, json.dumps(config, indent=1).encode())
    if not (session.out / "tokenizer.json").is_file():
        write_atomically(session.out / "tokenizer.json", text.encode())


def _announce(session: _Session) -> None:
    """What is going to happen, in a few lines."""
    model, config, counts = session.model_config, session.config, session.data.manifest
    epochs = config.max_steps / session.data.steps_per_epoch(config, session.context)
    several = f" on each of {session.processes.world_size} processes"
    for line in (
        f"model: {model.num_parameters / 1e6:.2f}M parameters, {model.linear}, {session.device}",
        f"data: {counts['train']['tokens']:,} training and {counts['validation']['tokens']:,} "
        f"validation tokens; {epochs:.1f} epochs",
        f"steps: {config.max_steps} of {config.batch_tokens:,} tokens, {session.micro_batch} "
        f"windows of {session.context} at once{several * (session.processes.world_size > 1)}",
        *(f"note: not every client will load this model: {limit}" for limit in model.export_limits),
    ):
        log.info(line)
    if session.state.step:
        log.info(f"resuming from step {session.state.step} of {config.max_steps}")


def _join_processes(model: ModelConfig, config: TrainConfig) -> Processes:
    """This process alone, or those that torchrun started, once it is sure that the model fits."""
    size, device = int(os.environ.get("WORLD_SIZE", "1")), choose_device(config.device)
    several = "several processes, as of torchrun --nproc-per-node=2 bitllm_core.py train ..."
    require(size > 1 or not config.fsdp, "fsdp", True, several)
    windows = config.batch_tokens // model.max_position_embeddings
    require(size <= windows, "WORLD_SIZE", size, f"at most the {windows} windows of a step")
    with contextlib.suppress(ImportError):
        extension("planner", "a check of memory").check_memory(model, config, device, size)
    if size == 1:
        return Processes()
    distributed = extension("distributed", "training with several processes")
    return distributed.join(device.device, config.fsdp)


def _open(
    stack: contextlib.ExitStack, configs: Any, out: Path, resume: str, mirror: Any
) -> tuple[Any, dict[str, Any] | None]:
    """Take the run folder for this process alone.

    Returns:
        its `bitllm.mirror.Mirror` and the checkpoint to resume from; None where there is none.
    """
    check_run_folder(out)
    module, place = None, Path(mirror or out).expanduser()
    if mirror:
        module = extension("mirror", "--mirror")
        module.check_mirror(out, place)
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_lock(out))
    copier = module.Mirror(out, place, keep_of(configs[2])) if module else None
    if copier:
        stack.callback(copier.close, 1.0)  # after an error; else it was closed before
    if resume == "never":
        for folder in {out, place}:
            set_aside(folder, same_data(folder, configs[1], configs[0].vocab_size))
    return copier, open_run(out, _settings(configs), resume, copier)


def _finish(session: _Session) -> None:
    """Train what is left of a run, if anything."""
    state, out = session.state, session.out
    if session.processes.is_main:
        _write_settings(session)
        session.log = MetricsLog(out / "metrics.jsonl", state.step)
    if state.mirror:
        state.mirror.offer_newest()
    final = [x for x in session.log.lines if x.get("final") and x["step"] == state.step]
    if state.finished and session.processes.broadcast(bool(final)):
        state.val_loss = final[0].get("val_loss", math.nan) if final else math.nan
        return
    _announce(session)
    if not state.finished:
        session.compile()
    _train(session, _Saver(session))


def _train(session: _Session, saver: _Saver) -> None:
    """Train to the end or to a stop, and leave everything safe."""
    main, state, config = session.processes.is_main, session.state, session.config
    coming = session.data.coming(session.tokenizer) if main else contextlib.nullcontext()
    with _stop_on_signals(state), coming:
        session.notify("on_start")
        try:
            session.run(saver)
            stopped = session.stop_asked()
            if not stopped and state.step < config.max_steps:
                best = f"{state.best_val_loss:.4f} at step {state.best_step}"
                log.info(
                    f"ended early at step {state.step} of {config.max_steps}: no better validation "
                    f"loss in {config.patience} evaluations. The best, {best}, is kept "
                    "(--checkpoint best); --patience 0 trains to the end"
                )
            saver.save_and_wait()
            if not stopped:
                _evaluate(session, final=True)
        finally:
            saver.collect(wait=True)
            saver.worker.shutdown()
            session.notify("on_end")
    if session.data.error:
        raise ConnectionError(
            f"data={session.settings['data']['data']!r} could not be read to its end "
            f"({first_line(session.data.error)}). Step {state.step} is saved; the same command "
            "resumes from there"
        ) from session.data.error


def train(
    model_config: ModelConfig,
    data_config: DataConfig,
    train_config: TrainConfig,
    out: str | Path,
    *,
    resume: str = "auto",
    mirror: str | Path | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> TrainState:
    """Train, or resume the run in `out`, exactly as if it had never stopped.

    Args:
        out: run folder: config.json, tokenizer.json, data/, metrics.jsonl, checkpoints/.
        resume: "auto" resumes where there is something, "must" refuses where there is not; "never"
            begins anew and moves what is there to a folder set-aside-N in `out`.
        mirror: a second folder that checkpoints are copied to in the background, such as one on a
            mounted drive; a run also resumes from there. Its parent must exist.
        callbacks: see `Callback`; default: a progress bar. Of several processes, which torchrun
            starts and which share the work, only the main one calls them, and writes.

    Returns:
        the state after the last step; its `stop_signal` is set when it was interrupted, after a
        checkpoint. A finished run returns at once.

    Raises:
        ValueError: settings that cannot be or that differ from the run's, or a folder that another
            process writes to; before any work.
        FloatingPointError: the loss does not return to finite numbers.
        OSError: the last checkpoint of a session could not be saved.
    """
    out, configs = Path(out), (model_config, data_config, train_config)
    require(resume in ("auto", "never", "must"), "resume", resume, "auto, never or must")
    check_configs(model_config, train_config)
    processes = _join_processes(model_config, train_config)
    callbacks = [ProgressBar()] if callbacks is None else callbacks
    with contextlib.ExitStack() as stack:
        if train_config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            before = torch.are_deterministic_algorithms_enabled()
            stack.callback(torch.use_deterministic_algorithms, before)
            torch.use_deterministic_algorithms(True)
        stack.enter_context(processes.guard())
        begin = partial(_open, stack, configs, out, resume, mirror)
        copier, checkpoint = processes.run_on_main(begin) or (None, None)
        step = processes.broadcast(checkpoint and checkpoint["step"])
        if step is not None and not checkpoint:
            path = out / "checkpoints" / f"step_{step:08d}.safetensors"
            checkpoint = load_checkpoint(path, mapped=train_config.fsdp)
        session = _Session(configs, out, processes, callbacks if processes.is_main else ())
        state, state.mirror = session.state, copier
        if checkpoint:
            _restore(session, checkpoint)
            del checkpoint  # as large as the model and its optimizers
        _finish(session)
        if copier:
            copier.close()
            log.info(copier.status())
    return state


# -----------------------------------------------------------------------------
# -----------------------------------------------------------------------------
# 10 Export
# One recipe that both transformers and llama.cpp accept; docs/export.md tells what each client
# needs, what the wrong ways cost, and how close the clients come to this program.

EXPORT_FORMATS = ("hf", "gguf", "packed", "html")
GGUF_KINDS = {"TQ2_0": 37, "TQ1_0": 36, "F16": 1}  # and llama.cpp's number for general.file_type
_EMBEDDINGS = {"float32": "F32", "float16": "F16", "int8": "I8"}
_PACKED_FORMAT = "bitllm-packed"
_EXPORT_VERSION = 1
CREDITS = ("name", "author", "licence", "data_licence")
_DATA_LICENCES = {
    "pydocs": "PSF-2.0",
    "wikitext-2": "cc-by-sa-3.0",
    "wikitext-103": "cc-by-sa-3.0",
    "tinystories": "cdla-sharing-1.0",
    "fineweb-edu": "odc-by",
    "wikipedia-es": "cc-by-sa-3.0",
}
_QUANTIZATION = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote. It can stand for its path: `open(exported)`, `Path(exported)`."""

    path: Path
    size: int
    """bytes, all files together"""
    bits_per_weight: float
    """bits that a ternary weight takes in the file, its share of the scale included"""
    usage: str
    """how to load it, client by client"""

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class _Source:
    """A model to export and what is known of it."""

    model: BitLM
    tokenizer: Any
    facts: dict[str, Any]


def _pack4(trits: Tensor) -> Tensor:
    """Four trits a byte, as transformers reads them: rows r, r + O/4, ... low bits first."""
    quarters = (trits + 1).to(torch.uint8).view(4, -1, trits.shape[1])  # (4, O/4, I)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def _unpack4(packed: Tensor) -> Tensor:
    quarters = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])  # (4, O/4, I)
    return quarters.view(-1, packed.shape[1]).to(torch.int8) - 1


def _pack5(trits: Tensor) -> Tensor:
    """Five trits a byte, row after row: 1.6 bits each, where log2 3 = 1.585 is the limit."""
    digits = F.pad((trits + 1).flatten().to(torch.uint8), (0, -trits.numel() % 5)).view(-1, 5)
    return (digits * torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack5(packed: Tensor, shape: torch.Size) -> Tensor:
    digits = np.arange(256)[:, None] // np.array([1, 3, 9, 27, 81]) % 3 - 1
    table = torch.from_numpy(digits.astype(np.int8))  # (256, 5)
    return table[packed.int()].flatten()[: shape.numel()].view(shape)


def _write_safetensors(
    path: Path, entries: Sequence[TensorEntry], metadata: dict[str, str]
) -> None:
    with path.open("wb") as file:
        for block in safetensors_blocks(entries, metadata):
            file.write(block)


def _packed_entries(model: BitLM, embedding: str) -> list[TensorEntry]:
    """Our smallest form: trits five a byte, the embedding in `embedding`, the rest in float32."""
    entries = []
    for name, linear in model.bit_linears().items():
        size = -(-linear.shape.numel() // 5)
        entries.append(
            TensorEntry(f"{name}.trits", "U8", (size,), partial(lambda x: _pack5(x.trits), linear))
        )
        scale = linear.weight_scale
        entries.append(TensorEntry(f"{name}.weight_scale", "F32", (), lambda s=scale: s))
    for name, value in model.named_parameters():
        shape = tuple(value.shape)
        dtype = _EMBEDDINGS[embedding] if "embed" in name else "F32"
        if dtype == "I8":
            scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            rows = partial(lambda v, s: (v / s).round().to(torch.int8), value, scale)
            entries.append(TensorEntry(name, dtype, shape, rows))
            entries.append(TensorEntry(f"{name}_scale", "F32", (shape[0], 1), lambda s=scale: s))
        else:
            entries.append(TensorEntry(name, dtype, shape, lambda v=value: v))
    return entries


def _hf_entries(model: BitLM, dense: bool) -> list[TensorEntry]:
    """Hugging Face's tensors, all floats in float32: transformers refuses a mixture."""
    entries = []
    for name, linear in model.bit_linears().items():
        rows, columns = linear.shape
        if dense:
            weight = linear.effective_weight
            entries.append(TensorEntry(f"{name}.weight", "F32", (rows, columns), weight))
            continue
        packed = partial(lambda layer: _pack4(layer.trits), linear)
        entries.append(TensorEntry(f"{name}.weight", "U8", (rows // 4, columns), packed))
        scale = linear.weight_scale.view(1)  # it multiplies: autobitlinear, not bitlinear
        entries.append(TensorEntry(f"{name}.weight_scale", "F32", (1,), lambda s=scale: s))
    for name, value in model.named_parameters():
        entries.append(TensorEntry(name, "F32", tuple(value.shape), lambda v=value: v))
    return entries


def _skeleton(settings: dict[str, Any], tensors: int, path: Path) -> BitLM:
    """A frozen model without memory behind it, to compare a stranger's file with."""
    names = {f.name for f in fields(ModelConfig)}
    known = {key: value for key, value in settings.items() if key in names}
    config = config_from(ModelConfig, known, path)
    if config.num_hidden_layers > tensors:
        raise ValueError(f"{path}: {tensors} tensors in it, too few for num_hidden_layers layers")
    with torch.device("meta"):
        return BitLM(config, seed=None).freeze()


def _checked(file: Any, expected: list[TensorEntry], path: Path) -> None:
    """ValueError where the tensors of a safetensors file are not exactly those expected."""
    names = {entry.name for entry in expected}
    for name in sorted(names ^ set(file.keys())):
        raise ValueError(f"{path}: tensor {name} is {'missing' if name in names else 'unknown'}")
    for entry in expected:
        part = file.get_slice(entry.name)
        found = (part.get_dtype(), tuple(part.get_shape()))
        if found != (entry.dtype, entry.shape):
            raise ValueError(
                f"{path}: tensor {entry.name} is {found[0]} {found[1]}, "
                f"expected {entry.dtype} {entry.shape}"
            )


@torch.no_grad()
def _fill(skeleton: BitLM, trits_of: Callable[[str, BitLinear], Any], read: Any) -> BitLM:
    """A frozen model, its trits and scales from `trits_of(name, layer)`, the rest from `read`."""
    model = BitLM(skeleton.config, seed=None).freeze()
    for name, linear in model.bit_linears().items():
        trits, scale = trits_of(name, linear)
        if trits.abs().max() > 1 or not scale.isfinite().all():
            raise ValueError(f"tensor {name} is not ternary, or its scale not finite")
        linear.set_ternary(trits, scale.float().view(()))
    for name, value in model.named_parameters():
        value.copy_(read(name))
    return model


def _packed_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of one of our packed files; None for any other file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file ({first_line(error)})") from error
    return metadata if metadata.get("format") == _PACKED_FORMAT else None


def _read_packed(path: Path, metadata: dict[str, str]) -> _Source:
    """Our packed file as a frozen model; sizes are compared before memory is taken."""
    from safetensors import safe_open

    version = metadata.get("format_version")
    if version != str(_EXPORT_VERSION):
        raise ValueError(f"{path}: format {version}; this program reads {_EXPORT_VERSION}")
    try:
        settings, facts = json.loads(metadata["config"]), json.loads(metadata["facts"])
        tokenizer = tokenizer_from(metadata["tokenizer"], path)
        embedding = metadata["embedding"]
        require(embedding in _EMBEDDINGS, "embedding", embedding, ", ".join(_EMBEDDINGS))
    except Exception as error:
        raise ValueError(f"{path}: its metadata is not that of a model ({error})") from error
    with safe_open(path, framework="pt") as file:
        skeleton = _skeleton(settings, len(file.keys()), path)
        check_tokenizer(tokenizer, skeleton.config.vocab_size, path)
        _checked(file, _packed_entries(skeleton, embedding), path)

        def trits_of(name: str, linear: BitLinear) -> tuple[Tensor, Tensor]:
            packed = file.get_tensor(f"{name}.trits")
            if packed.max() > 242:
                raise ValueError(f"{path}: {name}.trits holds bytes that are not five trits")
            return _unpack5(packed, linear.shape), file.get_tensor(f"{name}.weight_scale")

        def read(name: str) -> Tensor:
            value = file.get_tensor(name).float()
            scaled = embedding == "int8" and "embed" in name
            return value * file.get_tensor(f"{name}_scale") if scaled else value

        return _Source(_fill(skeleton, trits_of, read), tokenizer, facts)


def _read_hf(path: Path, settings: dict[str, Any]) -> _Source:
    """A Hugging Face folder that `export_hf` wrote, packed or dense, as a frozen model."""
    from safetensors import safe_open

    dense = "quantization_config" not in settings
    wanted = {"model_type": "bitnet", "hidden_act": "silu", "tie_word_embeddings": True}
    if not dense:
        wanted["quantization_config"] = _QUANTIZATION
    for key, value in wanted.items():
        if settings.get(key) != value:
            raise ValueError(
                f"{path / 'config.json'}: {key}={settings.get(key)!r}, expected {value!r}; "
                "only folders that this program exported are read"
            )
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; expected the weights of the export")
    try:
        opened = safe_open(weights, framework="pt")
    except Exception as error:
        raise ValueError(f"{weights}: not a safetensors file ({first_line(error)})") from error
    with opened as file:
        skeleton = _skeleton(settings, len(file.keys()), path / "config.json")
        _checked(file, _hf_entries(skeleton, dense), weights)

        def trits_of(name: str, linear: BitLinear) -> tuple[Tensor, Tensor]:
            weight = file.get_tensor(f"{name}.weight")
            if not dense:
                return _unpack4(weight), file.get_tensor(f"{name}.weight_scale")
            scale = weight.abs().max().clamp(min=1e-12)
            trits = (weight / scale).round()
            if not torch.equal(trits * scale, weight):
                raise ValueError(f"{weights}: {name}.weight is not trits times one scale")
            return trits, scale

        model = _fill(skeleton, trits_of, file.get_tensor)
    return _Source(model, load_tokenizer(path / "tokenizer.json"), settings.get("bitllm", {}))


def _read_any(path: Path, checkpoint: str | int) -> _Source:
    """Whatever `load_model` reads, with what is known of it."""
    if path.suffix == ".gguf":
        raise ValueError(
            f"{path}: a GGUF file runs in llama.cpp; give the run folder, a packed "
            "file or a Hugging Face folder here"
        )
    metadata = _packed_metadata(path)
    if metadata is not None:
        return _read_packed(path, metadata)
    settings = read_json(path / "config.json") or {}
    if "model_type" in settings:
        return _read_hf(path, settings)
    model, tokenizer, told = load_run(path, checkpoint)
    return _Source(model, tokenizer, {"name": path.stem, **_facts(path, told)})


def _open_source(path: Path, checkpoint: str | int, credits: dict[str, Any]) -> _Source:
    """A model to export; the user's `credits` go before what is known of it."""
    for key in credits:
        require(key in CREDITS, "credits", key, f"one of {', '.join(CREDITS)}")
    source = _read_any(path, checkpoint)
    known = source.facts if isinstance(source.facts, dict) else {}  # a stranger's may be anything
    given = {key: value for key, value in credits.items() if value is not None}
    return dataclasses.replace(source, facts={**known, **given})


def _facts(run: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint and the run folder around it tell: data, steps, tokens, losses."""
    saved, step = told.get("config") or {}, told.get("step")
    data = saved.get("data", {}).get("data")
    if data is not None and data not in _DATA_LICENCES and not data.startswith("hf:"):
        data = Path(data).name  # where it lay on this machine is nobody's business
    facts = {"data": data, "data_licence": _DATA_LICENCES.get(data or "")}
    facts["prompt"] = saved.get("train", {}).get("sample_prompt")
    if step is None:
        return facts
    lines = MetricsLog.read(run / "metrics.jsonl") if run.is_dir() else told["metrics"] or []
    lines = [line for line in lines if line["step"] <= step]
    for name in ("loss", "val_loss", "val_perplexity"):
        facts[name] = next((line[name] for line in reversed(lines) if name in line), None)
    batch = saved.get("train", {}).get("batch_tokens")
    return {**facts, "steps": step, "tokens": batch and batch * step}


def _check_exportable(config: ModelConfig, to: str) -> None:
    """ValueError with all reasons why no client of this format could hold the model."""
    limits = config.export_limits
    if to in ("hf", "F16"):  # without ternary blocks, any width will do
        limits = [limit for limit in limits if limit == NO_COUNTERPART]
    kv = config.num_kv_heads * config.head_dim
    if to == "hf" and any(n % 4 for n in (config.hidden_size, config.intermediate_size, kv)):
        limits = [*limits, "transformers packs four rows a byte: sizes must be multiples of 4"]
    if limits:
        raise ValueError(
            f"this model cannot be exported to {to}: {'; '.join(limits)}. It has "
            f"block={config.block}, linear={config.linear}, "
            f"tie_word_embeddings={config.tie_word_embeddings}. "
            + ("It has no ternary form" if config.linear == "dense" else "Export it as packed")
        )


@contextlib.contextmanager
def _replacing(out: Path, overwrite: bool, folder: bool) -> Iterator[Path]:
    """A path beside `out` to write to; it gets its name when all is written and on the disk.

    An existing target is only replaced when asked to, and only by its own kind: a file by a file,
    a folder by a folder if it is empty or itself an export.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise ValueError(f"{out}: exists already; choose another path, or ask to overwrite it")
        if folder != out.is_dir() or (folder and not _may_replace(out)):
            kind = "an exported folder" if folder else "a file"
            raise ValueError(f"{out}: not {kind}, so it is not overwritten; choose another path")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (out.with_name(f"{out.name}.{word}") for word in ("exporting", "replaced"))
    _remove(beside)  # of an export that was killed
    if folder:
        beside.mkdir()
    try:
        yield beside
        for file in beside.iterdir() if folder else [beside]:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        if folder and out.exists():
            _remove(old)
            out.replace(old)  # no system replaces a folder that is not empty
        beside.replace(out)
        _remove(old if folder else beside)
    finally:
        _remove(beside)


def _may_replace(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    ours = "bitllm" in (read_json(folder / "config.json") or {})
    return not names or ours or names == _PAGE_FILES


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _result(path: Path, ternary_bytes: int, model: BitLM, usage: str) -> Exported:
    files = path.iterdir() if path.is_dir() else [path]
    weights = sum(linear.shape.numel() for linear in model.bit_linears().values())
    size = sum(file.stat().st_size for file in files)
    return Exported(path, size, 8 * ternary_bytes / weights, usage)


def export_packed(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    embedding: str = "float16",
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write this program's smallest file: five trits a byte, tokenizer and settings inside.

    Args:
        source: whatever `load_model` reads.
        out: the file, *.safetensors; it appears whole or not at all.
        checkpoint: of a run folder: "last", "best" or a step.
        embedding: float16, int8 (a scale a row; smallest) or float32 (the same logits bit for bit).
        overwrite: replace an existing file.
        credits: name, author, licence, data_licence (of the text): noted in what is written.

    Raises:
        ValueError, FileNotFoundError: no such model, a dense one, or `out` exists.
    """
    out = Path(out)
    require(embedding in _EMBEDDINGS, "embedding", embedding, f"one of {', '.join(_EMBEDDINGS)}")
    require(out.suffix == ".safetensors", "out", str(out), "a name that ends in .safetensors")
    with _replacing(out, overwrite, folder=False) as beside:
        opened = _open_source(Path(source), checkpoint, credits)
        model = opened.model
        if model.config.linear == "dense":
            _check_exportable(model.config, "packed")
        metadata = {
            "format": _PACKED_FORMAT,
            "format_version": str(_EXPORT_VERSION),
            "embedding": embedding,
            "config": json.dumps(asdict(model.config)),
            "tokenizer": opened.tokenizer.to_str(),
            "facts": json.dumps(opened.facts),
        }
        entries = _packed_entries(model, embedding)
        _write_safetensors(beside, entries, metadata)
    ternary = sum(e.size for e in entries if "embed" not in e.name and "norm" not in e.name)
    usage = f'  this program   python bitllm_core.py generate --model {out} --prompt "..."'
    return _result(out, ternary, model, usage)


def export_hf(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    dense: bool = False,
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write a folder for transformers' AutoModelForCausalLM and AutoTokenizer, as they are.

    Args:
        source, checkpoint, overwrite: as `export_packed`.
        out: the folder; it appears whole or not at all.
        dense: full float32 weights, t * s, for four trits a byte: sixteen times larger, needs no
            extra package to load, but its activations are no longer rounded to 8 bits.
        credits: as `export_packed`.

    Raises:
        ValueError, FileNotFoundError: no such model, one that transformers has no counterpart of
            (the message says why), or `out` exists.
    """
    out = Path(out)
    with _replacing(out, overwrite, folder=True) as beside:
        opened = _open_source(Path(source), checkpoint, credits)
        model, tokenizer = opened.model, opened.tokenizer
        _check_exportable(model.config, "hf")
        files = _hf_files(opened, dense)
        entries = _hf_entries(model, dense)
        _write_safetensors(beside / "model.safetensors", entries, {"format": "pt"})
        ternary = sum(e.size for e in entries if "_proj." in e.name)
        for file, contents in files.items():
            (beside / file).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        (beside / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        size = sum(file.stat().st_size for file in beside.iterdir())
        card = _model_card(opened, size, dense)
        (beside / "README.md").write_text(card, encoding="utf-8")
    return _result(out, ternary, model, _hf_usage(out.as_posix(), dense))


def _end_id(tokenizer: Any) -> int:
    end = end_of_text_id(tokenizer)
    if end is None:
        raise ValueError(
            f"the tokenizer has no {END_OF_TEXT}, which clients need; export as packed"
        )
    return end


def _hf_files(source: _Source, dense: bool) -> dict[str, dict[str, Any]]:
    """config.json and the like. Most of Hugging Face's defaults differ, so all is spelled out."""
    config, size, sampling = (
        source.model.config,
        source.tokenizer.get_vocab_size(),
        SamplingConfig(),
    )
    end = _end_id(source.tokenizer)
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    settings = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **{k: v for k, v in asdict(config).items() if k not in ("linear", "block")},
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        # transformers 4 reads rope_theta only, 5 either
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **ends,
        "torch_dtype": "float32",
        **({} if dense else {"quantization_config": _QUANTIZATION}),
        "bitllm": {"format_version": _EXPORT_VERSION, **source.facts},
    }
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special tokens inside a text are text, as in training
        "model_max_length": config.max_position_embeddings,
    }
    generation = {
        **ends,
        "do_sample": True,
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")},
        "max_new_tokens": sampling.max_new_tokens,
    }
    if size < config.vocab_size:  # rows of the head that stand for no token
        generation["suppress_tokens"] = list(range(size, config.vocab_size))
    return {
        "config.json": settings,
        "tokenizer_config.json": tokens,
        "generation_config.json": generation,
    }


def _hf_usage(folder: str, dense: bool) -> str:
    packages = "transformers" if dense else "transformers accelerate"
    return "\n".join(
        [
            f"  transformers   pip install {packages}",
            f'                 model = AutoModelForCausalLM.from_pretrained("{folder}")',
            f'                 tokenizer = AutoTokenizer.from_pretrained("{folder}")',
            f'  this program   python bitllm_core.py generate --model {folder} --prompt "..."',
        ]
    )


def _model_card(source: _Source, size: int, dense: bool) -> str:
    config, facts = source.model.config, source.facts
    trits = sum(linear.shape.numel() for linear in source.model.bit_linears().values())
    known = KNOWN_DATA.get(facts.get("data") or "")
    rows = {
        "author": facts.get("author"),
        "licence": facts.get("licence"),
        "trained on": facts.get("data"),
        "licence of that text": facts.get("data_licence"),
        "optimizer steps": facts.get("steps"),
        "training tokens": facts.get("tokens"),
        "loss of the last logged batch, nats per token": facts.get("loss"),
        "validation loss, nats per token": facts.get("val_loss"),
        "validation perplexity": facts.get("val_perplexity"),
        "parameters": config.num_parameters,
        "of which ternary": trits,
        "context, tokens": config.max_position_embeddings,
        "size of the files, bytes": size,
    }
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"license: {json.dumps(facts['licence'])}"] if facts.get("licence") else []
    front += ["datasets:", f"- {known.name}"] if known else []
    table = "\n".join(f"| {key} | {_told(value)} |" for key, value in rows.items())
    compiler = "" if dense else _COMPILER_NOTE
    return (
        "---\n"
        + "\n".join(front)
        + f"""
---
# {facts.get("name") or "A ternary language model"}

A ternary (BitNet b1.58) language model, trained from scratch with `bitllm_core.py`. It continues
text; it was not taught to follow instructions or to be right.

| | |
| --- | --- |
{table}

## Loading it

```
{_hf_usage(".", dense)}
```

All floats are float32; load it in that dtype, transformers' default for this folder.{compiler}

llama.cpp, ollama and LM Studio read a GGUF file, which `bitllm_core.py` makes of this folder:
`python bitllm_core.py export --model . --to gguf --out ../model.gguf`. llama.cpp's own converter
does not: it takes the scale of the weights anew.
"""
    )


_COMPILER_NOTE = """
On a CPU, loading compiles code: it needs a C++ compiler, or TORCHDYNAMO_DISABLE=1 in the
environment."""


def _told(value: Any) -> str:
    if value is None:
        return "not stated"
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


_GGUF_NAMES = [
    ("model.layers.", "blk."),
    ("self_attn.attn_sub_norm", "attn_sub_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"),
    ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attn_norm"),
    ("mlp.ffn_sub_norm", "ffn_sub_norm"),
    ("mlp.", "ffn_"),
    ("_proj", ""),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
]


def _gguf_name(name: str) -> str:
    for old, new in _GGUF_NAMES:
        name = name.replace(old, new)
    return name


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    kind: str = "TQ2_0",
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write a GGUF file that stock llama.cpp and what is built on it load, tokenizer included.

    Args:
        source, checkpoint, overwrite: as `export_packed`.
        out: the file, *.gguf; it appears whole or not at all.
        kind: of the ternary matrices: TQ2_0 (2.06 bits a weight, fastest), TQ1_0 (1.69 bits) or
            F16 (any width; activations are then not rounded to 8 bits).
        credits: as `export_packed`.

    Raises:
        ValueError, FileNotFoundError: no such model, one that llama.cpp has no counterpart of
            (the message says why), or `out` exists.
        ImportError: the package gguf is not installed.
    """
    out = Path(out)
    require(kind in GGUF_KINDS, "kind", kind, f"one of {', '.join(GGUF_KINDS)}")
    require(out.suffix == ".gguf", "out", str(out), "a name that ends in .gguf")
    library("gguf", "a GGUF export")
    with _replacing(out, overwrite, folder=False) as beside:
        opened = _open_source(Path(source), checkpoint, credits)
        ternary = _write_gguf(beside, opened, kind)
    return _result(out, ternary, opened.model, _gguf_usage(out.as_posix(), opened.model.config))


def _write_gguf(path: Path, source: _Source, kind: str) -> int:
    """Returns the bytes of the ternary tensors."""
    gguf = library("gguf", "a GGUF export")
    _check_exportable(source.model.config, kind)
    vocabulary = _gguf_vocabulary(source.tokenizer, source.model.config.vocab_size)
    writer = gguf.GGUFWriter(path, "bitnet")
    try:
        _gguf_metadata(writer, source, kind)
        _gguf_tokenizer(writer, vocabulary, _end_id(source.tokenizer))
        return _gguf_tensors(writer, source.model, kind)
    finally:
        writer.close()


def _gguf_metadata(writer: Any, source: _Source, kind: str) -> None:
    config, facts, sampling = source.model.config, source.facts, SamplingConfig()
    writer.add_file_type(GGUF_KINDS[kind])
    writer.add_quantization_version(2)
    writer.add_name(facts.get("name") or "A ternary language model")
    writer.add_author(facts.get("author") or "")
    writer.add_license(facts.get("licence") or "")
    writer.add_size_label(f"{config.num_parameters / 1e6:.1f}M")
    if facts.get("data"):
        licence = facts.get("data_licence") or "licence not stated"
        writer.add_description(f"Trained from scratch on {facts['data']} ({licence}).")
        writer.add_dataset_count(1)
        writer.add_dataset_name(0, facts["data"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_sampling_temp(sampling.temperature)
    writer.add_sampling_top_k(sampling.top_k)
    writer.add_sampling_top_p(sampling.top_p)
    writer.add_sampling_min_p(0.0)


def _gguf_vocabulary(tokenizer: Any, rows: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges; as many tokens as the embedding has rows."""
    described = json.loads(tokenizer.to_str())
    model, before = described["model"], described["pre_tokenizer"] or {}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if model["type"] != "BPE" or described["normalizer"] or plain.items() - before.items():
        raise ValueError(
            f"the tokenizer is {model['type']} after {before.get('type')}: a GGUF file can hold "
            "byte-level BPE with GPT-2's regular expression only; export to hf or packed"
        )
    added = {token["id"] for token in described["added_tokens"]}
    by_id = {i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [3 if i in added else 1 if i in by_id else 5 for i in range(rows)]
    return tokens, kinds, [" ".join(merge) for merge in model["merges"]]


def _gguf_tokenizer(writer: Any, vocabulary: Any, end: int) -> None:
    tokens, kinds, merges = vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # "default" splits words and numbers in other places
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _gguf_tensors(writer: Any, model: BitLM, kind: str) -> int:
    """Announce all tensors, then make and write one at a time; returns bytes of ternary ones."""
    gguf = library("gguf", "a GGUF export")
    quantized, F32 = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    made: list[tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]] = []
    for name, linear in model.bit_linears().items():
        # blocks of scale 1 hold the trits; the scale stays exact in float32 beside them
        trits = partial(lambda x: gguf.quantize(x.trits.numpy().astype("f4"), quantized), linear)
        name, shape = _gguf_name(name), tuple(linear.shape)
        made.append((f"{name}.weight", shape, quantized, trits))
        scale = linear.weight_scale
        made.append((f"{name}.scale", (1,), F32, lambda s=scale: s.view(1).numpy()))
    for name, value in model.named_parameters():
        half = "embed" in name
        float_type = gguf.GGMLQuantizationType.F16 if half else F32
        array = partial(lambda v, t: v.numpy().astype(t), value, "f2" if half else "f4")
        made.append((_gguf_name(name), tuple(value.shape), float_type, array))
    ternary = 0
    for name, shape, dtype, _ in made:
        block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype("f4"), size, raw_dtype=dtype)
        ternary += size if "norm" not in name and "embd" not in name else 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for *_, array in made:
        writer.write_tensor_data(array())
    return ternary


def _gguf_usage(path: str, config: ModelConfig) -> str:
    """Commands with `generate`'s sampling. The file itself names the token that ends a text."""
    s, context = SamplingConfig(), config.max_position_embeddings
    penalty = s.repetition_penalty
    return f"""\
  llama.cpp      llama-completion -m "{path}" -no-cnv -p "..." -n {s.max_new_tokens} \
-c {context} --temp {s.temperature} --top-k {s.top_k} --top-p {s.top_p} --min-p 0 \
--repeat-penalty {penalty}
                 (builds before December 2025: llama-cli, with the same arguments)
  this program   python bitllm_core.py generate --model "{path}" --prompt "..."
  ollama         ollama create NAME -f Modelfile, these lines in the file Modelfile:
                 FROM "{path}"
                 TEMPLATE {{{{ .Prompt }}}}
                 PARAMETER stop {END_OF_TEXT}
                 PARAMETER num_ctx {context}
                 PARAMETER num_predict {s.max_new_tokens}
                 PARAMETER temperature {s.temperature}
                 PARAMETER top_k {s.top_k}
                 PARAMETER top_p {s.top_p}
                 PARAMETER min_p 0.0
                 PARAMETER repeat_penalty {penalty}"""


PAGE_TEMPLATE = "web/page.html"
_WLLAMA = "3.8.1"  # llama.cpp as WebAssembly (MIT); newer: new hashes, and run tests/test_page.py
_WLLAMA_CDN = "https://cdn.jsdelivr.net/npm/@wllama"
_WLLAMA_FILES = {  # part of the page -> package/file, sha256
    "library": (
        "wllama/esm/index.cjs",
        "762520f305a85b290d5cd979aa287b3c4b768a5f483e21339ef70a052ae8dea4",
    ),
    "licence": (
        "wllama/LICENCE",
        "5866e3bd7e3cbd3f7c8bea6efd8a1e7fa7cc8de68c30f428aff7c6584a0fb720",
    ),
    "glue": (
        "wllama-compat/wasm/wllama.js",
        "2649eeb408988841c372e54805adfa25aed5d02f850c09add78c2f3ac0f3fce1",
    ),
    "engine": (
        "wllama-compat/wasm/wllama.wasm",
        "2db3f67d0bcc19cdf8f14f129e46cab691bff898954808f8a2dc4c586eb5bb68",
    ),
}
_PAGE_FILES = {"README.md", "index.html", "model.gguf", "runtime.bin"}


def export_html(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    runtime: str | Path | None = None,
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write a web page in which the model runs, in any browser, without a server behind it.

    Args:
        source, checkpoint, overwrite: as `export_packed`.
        out: *.html: one file with everything inside, which also opens from disk. Else a folder
            with the parts side by side, for GitHub Pages or a static Hugging Face Space.
        runtime: folder with llama.cpp for browsers, as npm lays it out (node_modules/@wllama);
            default: fetched once with npm, or from a CDN where there is none, and kept.
        credits: as `export_packed`; they appear on the page.

    Raises:
        ValueError, FileNotFoundError: no such model, one that llama.cpp has no counterpart of
            (the message says why), `out` exists, or a file of `runtime` is not the expected one.
        ImportError: the package gguf is not installed.
        OSError: llama.cpp for browsers cannot be fetched.
    """
    out, template = Path(out), _page_template()
    folder = out.suffix != ".html"
    library("gguf", "an html export")
    with _replacing(out, overwrite, folder) as beside, tempfile.TemporaryDirectory() as scratch:
        opened = _open_source(Path(source), checkpoint, credits)
        gguf = Path(scratch) / "model.gguf"
        ternary = _write_gguf(gguf, opened, "TQ2_0")
        parts = {**_page_runtime(runtime), "model": gguf.read_bytes()}
        files = _page_files(template, parts, _page_told(opened, ternary), folder)
        say(f"{out}: a page of {sum(map(len, files.values())) / 1e6:.1f} MB")
        for name, data in files.items():
            (beside / name if folder else beside).write_bytes(data)
    return _result(out, ternary, opened.model, _page_usage(out.as_posix(), folder))


def _page_template() -> str:
    path = Path(__file__).resolve().parent / PAGE_TEMPLATE
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: not there. An html export fills in this template, a file of its own: get "
            f"{PAGE_TEMPLATE} from the repository that bitllm_core.py is from and put it there"
        ) from None


def _page_told(source: _Source, ternary_bytes: int) -> dict[str, Any]:
    """All that the page's script is told. A fact may come from a stranger's file."""
    config, sampling = source.model.config, SamplingConfig()
    weights = sum(linear.shape.numel() for linear in source.model.bit_linears().values())
    facts = {
        "name": "A ternary language model",
        **source.facts,
        "parameters": config.num_parameters,
        "context": config.max_position_embeddings,
        "bits_per_weight": 8 * ternary_bytes / weights,
        "exported": time.strftime("%Y-%m-%d"),
    }
    for key, value in facts.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            facts[key] = None if value is None else str(value)
    return {
        "facts": facts,
        "prompt": str(source.facts.get("prompt") or ""),
        "context": config.max_position_embeddings,
        "end": END_OF_TEXT,
        "sampling": {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "length": sampling.max_new_tokens,
        },
    }


def _page_files(
    template: str, parts: dict[str, bytes], told: dict[str, Any], folder: bool
) -> dict[str, bytes]:
    """File name -> contents; one file unless `folder`."""
    name, files = str(told["facts"]["name"]), {}
    holes = {
        "policy": "{{policy}}",
        "title": html.escape(name),
        "licence": html.escape(parts["licence"].decode()),
        "library": parts["library"].decode(),
        # "<" alone could end the script element that the JSON stands in
        "facts": json.dumps(told).replace("<", "\\u003c"),
    }
    beside = {"engine": "runtime.bin", "model": "model.gguf"} if folder else {}
    for part in ("glue", "engine", "model"):
        data, packed = parts[part], part not in beside or part != "model"
        if packed:
            data = gzip.compress(data, 9, mtime=0)
        holes[f"{part}_source"] = f'data-bytes="{len(data)}"'
        holes[part] = base64.b64encode(data).decode() if part not in beside else ""
        if part in beside:
            packing = "" if packed else ' data-packed="no"'
            holes[f"{part}_source"] += f' data-file="{beside[part]}"{packing}'
            files[beside[part]] = data
    page = re.sub(r"\{\{(\w+)\}\}", lambda hole: holes[hole[1]], template)
    page = page.replace("{{policy}}", _page_policy(page, folder), 1)
    if folder:
        files["README.md"] = _page_readme(name).encode(errors="replace")
    return {"index.html": page.encode(errors="replace"), **files}


def _page_policy(page: str, folder: bool) -> str:
    """What the page may do: run its own scripts, known by hash, and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')} 'wasm-unsafe-eval'; "
        f"style-src {hashes('style')}; worker-src blob:; img-src data:; "
        + ("connect-src 'self'; " if folder else "")
        + "base-uri 'none'; form-action 'none'"
    )


def _page_usage(path: str, folder: bool) -> str:
    if not folder:
        return "  any browser    open the file, from disk or anywhere; it may be sent as it is"
    return f"""\
  here           python -m http.server --directory "{path}"     (from disk it does not open)
  GitHub Pages, Hugging Face   see "{path}/README.md\""""


def _page_readme(name: str) -> str:
    title = json.dumps(name)  # YAML reads it as it is
    return f"""\
---
title: {title}
sdk: static
---

A small language model that runs in the visitor's browser. All files of this folder belong together.

- **GitHub Pages**: commit the files to a repository, then Settings > Pages > Deploy from a branch.
- **Hugging Face**: make a Space with the SDK "Static" and upload the files (the lines at the top of
  this one are for it), or `hf upload OWNER/NAME . --repo-type space` in this folder.
- **Here**: `python -m http.server`, then open the address it prints.
"""


def _page_runtime(runtime: str | Path | None) -> dict[str, bytes]:
    """Part of the page -> its bytes, which are those that this program was tested with."""
    folder = Path(runtime) if runtime else _cache_folder() / f"wllama-{_WLLAMA}"
    if runtime is None:
        try:
            return _read_runtime(folder)
        except (ValueError, FileNotFoundError):  # not fetched yet, or spoilt
            _fetch_runtime(folder)
    return _read_runtime(folder)


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(cache) if cache else Path.home() / ".cache") / "bitllm"


def _read_runtime(folder: Path) -> dict[str, bytes]:
    parts = {}
    for part, (file, expected) in _WLLAMA_FILES.items():
        try:
            data = (folder / file).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder / file}: no such file; expected wllama {_WLLAMA} as npm lays it out "
                f"(npm install @wllama/wllama@{_WLLAMA} @wllama/wllama-compat@{_WLLAMA}, then "
                "node_modules/@wllama)"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / file}: refused, its sha256 is {found} instead of {expected}; "
                f"expected the file of wllama {_WLLAMA}, unchanged"
            )
        parts[part] = data
    return parts


def _fetch_runtime(folder: Path) -> None:
    """Put llama.cpp for browsers into `folder`, with npm or else from the CDN."""
    say(f"fetching llama.cpp for browsers (wllama {_WLLAMA}), once, into {folder}")
    reasons = []
    for fetch in (_fetch_with_npm, _fetch_from_cdn):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                fetch(Path(scratch))
            except (OSError, subprocess.SubprocessError) as error:
                reasons.append(first_line(error))
                continue
            _read_runtime(Path(scratch))  # a wrong hash ends it here
            for file, _ in _WLLAMA_FILES.values():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / file, (Path(scratch) / file).read_bytes())
            return
    raise OSError(
        f"llama.cpp for browsers could not be fetched ({'; '.join(reasons)}). Where there is a "
        f"network: npm install @wllama/wllama@{_WLLAMA} @wllama/wllama-compat@{_WLLAMA}; then "
        "give the folder node_modules/@wllama as runtime"
    )


def _fetch_with_npm(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("no npm on the path")
    packages = ("wllama", "wllama-compat")
    command = [npm, "pack", "--silent", *(f"@wllama/{name}@{_WLLAMA}" for name in packages)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    for name in packages:
        with tarfile.open(folder / f"wllama-{name}-{_WLLAMA}.tgz") as archive:
            for file, _ in _WLLAMA_FILES.values():
                package, _, inside = file.partition("/")
                member = archive.extractfile(f"package/{inside}") if package == name else None
                if member is not None:
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(member.read())


def _fetch_from_cdn(folder: Path) -> None:
    for file, _ in _WLLAMA_FILES.values():
        package, _, inside = file.partition("/")
        address = f"{_WLLAMA_CDN}/{package}@{_WLLAMA}/{inside}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(answer.read())


def llama_cpp_stream(
    path: str | Path, prompt: str, sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """Yield the continuation of `prompt` as llama.cpp, inside this process, writes it.

    Args:
        path: a GGUF file. Its tokenizer reads the prompt; "<|endoftext|>" in it ends a document.

    Raises:
        FileNotFoundError, ValueError: no such file, or llama.cpp refuses it or the prompt.
        ImportError: the package xllamacpp is not installed.
    """
    xllamacpp, path = library("xllamacpp", "running a GGUF file"), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a GGUF file")
    request = _llama_cpp_request(prompt, sampling or SamplingConfig())
    if not request["max_tokens"]:  # a server that was asked nothing can hang when it is left
        return
    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.warmup = str(path), -1, False
    params.n_parallel, params.ctx_shift = 1, True
    threads = max(1, (os.cpu_count() or 1) // 2)  # they wait by spinning: leave cores to others
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    try:
        server = xllamacpp.Server(params)
    except Exception as error:
        raise ValueError(f"{path}: llama.cpp does not load it ({first_line(error)})") from error
    pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left = threading.Event()  # the reader wants no more

    def hear(piece: Any) -> bool:
        pieces.put(piece)
        return left.is_set()

    def work() -> None:
        try:
            server.handle_completions(request, hear)
        except Exception as error:
            pieces.put({"error": error})
        pieces.put(None)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            if "error" in piece:
                raise ValueError(f"{path}: llama.cpp refuses the prompt ({piece['error']})")
            if text := piece["choices"][0]["text"]:
                yield text
    finally:
        left.set()
        worker.join()


def _llama_cpp_request(prompt: str, sampling: SamplingConfig) -> dict[str, Any]:
    """Our sampling in llama.cpp's words and, with `samplers`, in our order."""
    return {
        "prompt": prompt or END_OF_TEXT,
        "stream": True,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": 1 << 16,  # all of the text, as ours
        "samplers": ["penalties", "temperature", "top_k", "top_p"],
        **({} if sampling.seed is None else {"seed": sampling.seed}),
    }


def push_to_hub(
    path: str | Path, repo_id: str, token: str | None = None, private: bool = True
) -> str:
    """Upload an exported folder or file to the Hugging Face hub; returns the address.

    Args:
        path: what an export wrote.
        repo_id: OWNER/NAME; made if it is not there, `private` or not.
        token: with the right to write; default: HF_TOKEN from the environment or from Colab's
            secrets, else what the hub's own login keeps. It is neither printed nor stored.

    Raises:
        FileNotFoundError, ValueError: nothing at `path`, or no OWNER/NAME.
        OSError: the hub cannot be reached or refuses.
    """
    import huggingface_hub

    path = Path(path)
    require(repo_id.count("/") == 1, "repo_id", repo_id, "OWNER/NAME")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; export first")
    api = huggingface_hub.HfApi(token=token or _hub_token())
    api.create_repo(repo_id, private=private, exist_ok=True)
    if path.is_dir():
        api.upload_folder(repo_id=repo_id, folder_path=path, commit_message="Add the model")
    else:
        api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=path,
            path_in_repo=path.name,
            commit_message=f"Add {path.name}",
        )
    return f"{api.endpoint}/{repo_id}"


def _hub_token() -> str | None:
    if os.environ.get("HF_TOKEN"):
        return os.environ["HF_TOKEN"]
    try:
        return importlib.import_module("google.colab.userdata").get("HF_TOKEN")
    except Exception:  # not on Colab, no such secret, or it may not be read
        return None


# -----------------------------------------------------------------------------
# 11 Notebook
# What the notebooks share. ipywidgets, matplotlib and IPython are imported where they are used;
# where there is no notebook everything has a form in plain text.


def in_notebook() -> bool:
    """Whether a kernel runs this (Jupyter, Colab), so that images and widgets can be shown."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")  # IPython in a terminal has none


def _widgets() -> Any:
    """The module ipywidgets, or None where widgets cannot be shown."""
    with contextlib.suppress(ImportError):
        if in_notebook():
            import ipywidgets

            return ipywidgets
    return None


def environment_report(folder: str | Path = ".") -> str:
    """GPU, memory, disk, precision and versions, a line each."""
    device, disk = choose_device(), shutil.disk_usage(folder)
    gpu = "none, so the processor trains. In Colab: Runtime > Change runtime type > T4 GPU"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, {_free_of(*torch.cuda.mem_get_info())}"
    memory = "unknown"
    with contextlib.suppress(ImportError):  # every notebook kernel brings it
        import psutil

        memory = _free_of(psutil.virtual_memory().available, psutil.virtual_memory().total)
    installed = versions()
    for name in ("tokenizers", "datasets", "ipykernel", "ipywidgets", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    report = {
        "GPU": gpu,
        "memory": f"{memory}, {os.cpu_count()} cores",
        "disk": _free_of(disk.free, disk.total),
        "precision": str(device),
        "torch.compile": why_not_compile(device) or "available",
        "versions": ", ".join(f"{name} {version}" for name, version in installed.items()),
    }
    return "\n".join(f"{name + ':':15}{value}" for name, value in report.items())


def _free_of(free: int, total: int) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def mount_drive(mount_point: str = "/content/drive", timeout_s: int = 120) -> Path | None:
    """Mount Google Drive in Colab and return the folder for copies; None, and why, if not.

    Drive is a convenience: refused, timed out or absent, training goes on without it.
    """
    try:
        from google.colab import drive  # type: ignore[import-not-found]
    except ImportError:
        print("Drive: this is not Colab, so there is nothing to mount; runs stay in this folder")
        return None
    try:
        drive.mount(mount_point, timeout_ms=1000 * timeout_s)
        folder = Path(mount_point) / "MyDrive" / "bitllm"
        folder.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # Colab raises its own kinds; none of them may end the notebook
        print(
            f"Drive: not mounted ({type(error).__name__}: {first_line(error)}). Training works "
            "without it, but the run is lost when Colab takes the machine back. To try again, run "
            "this cell once more and allow access within two minutes"
        )
        return None
    print("Drive: mounted; checkpoints are copied to MyDrive/bitllm")
    return folder


@lru_cache(maxsize=4)
def product_rate(device: Device) -> float:
    """FLOP a second of 2048³ matrix products in the training's dtype, the best of five."""
    a = torch.randn(2048, 2048, device=device.device, dtype=device.dtype)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def estimate_seconds(model: ModelConfig, config: TrainConfig, rate: float) -> float:
    """Training time at a quarter of the rate of large products; a guess within a factor of two."""
    return 6 * model.num_parameters * config.batch_tokens * config.max_steps / (rate / 4)


@dataclass(frozen=True)
class Settings:
    """The form of the notebooks. Empty or 0: as the preset has it."""

    preset: str = "auto"
    """a preset's name; auto: BITLLM_PRESET, else t4-1h with a CUDA GPU, else demo in 3 minutes"""
    data: str = ""
    """a file, a folder, a known data set or hf:OWNER/NAME, as DataConfig.data"""
    hidden_size: int = 0
    """width; the number of heads and the feed-forward width follow"""
    num_hidden_layers: int = 0
    """depth"""
    minutes: float = 0.0
    """time budget: as many steps as should fit in it"""
    batch_tokens: int = 0
    """tokens an optimizer step"""
    learning_rate: float = 0.0
    """peak rate of the matrices"""
    resume: str = "auto"
    """auto goes on where the folder's run stopped; never sets that run aside and begins anew"""
    out: str = ""
    """run folder; default: runs/PRESET, with the name of the data where that is another"""
    mirror: str = ""
    """folder that receives copies, such as one on Drive"""

    def __post_init__(self) -> None:
        names = ("auto", *PRESETS)
        require(self.preset in names, "preset", self.preset, f"one of {', '.join(names)}")
        require(self.preset_name in PRESETS, "BITLLM_PRESET", self.preset_name, ", ".join(PRESETS))
        require(self.minutes >= 0, "minutes", self.minutes, "0 (the preset's steps) or more")
        require(self.resume in ("auto", "never"), "resume", self.resume, "auto or never")
        self.configs()

    @property
    def preset_name(self) -> str:
        if self.preset != "auto":
            return self.preset
        fitting = "demo" if self.is_fallback else "t4-1h"
        return os.environ.get("BITLLM_PRESET") or fitting

    @property
    def is_fallback(self) -> bool:
        """Whether nobody chose a preset and there is no GPU, so that it should not take long."""
        chosen = self.preset != "auto" or os.environ.get("BITLLM_PRESET")
        return not chosen and not torch.cuda.is_available()

    def replace(self, **changes: Any) -> Settings:
        return dataclasses.replace(self, **changes)

    @property
    def run_folder(self) -> Path:
        own = f"-{Path(self.data).stem}" if self.data else ""
        return Path(self.out or f"runs/{self.preset_name}{re.sub(r'[^-.0-9A-Za-z_]+', '-', own)}")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `train`."""
        return {"resume": self.resume, **({"mirror": self.mirror} if self.mirror else {})}

    def configs(self) -> tuple[ModelConfig, DataConfig, TrainConfig]:
        """What `train` takes. ValueError names the field that cannot be, and a remedy."""
        model, data, config = PRESETS[self.preset_name]
        if self.hidden_size and self.hidden_size != model.hidden_size:
            heads = max(1, self.hidden_size // model.head_dim)
            groups = model.num_attention_heads // model.num_kv_heads
            model = dataclasses.replace(
                model,
                hidden_size=self.hidden_size,
                intermediate_size=self.hidden_size * model.intermediate_size // model.hidden_size,
                num_attention_heads=heads,
                num_key_value_heads=heads // groups if heads % groups == 0 else None,
            )
        changes = {name: getattr(self, name) for name in ("batch_tokens", "learning_rate")}
        config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v})
        if self.num_hidden_layers:
            model = dataclasses.replace(model, num_hidden_layers=self.num_hidden_layers)
        if self.data:
            data = dataclasses.replace(data, data=self.data)
        check_configs(model, config)
        if self.minutes or self.is_fallback:
            config = dataclasses.replace(config, max_steps=self._fitting_steps(model, config))
        return model, data, config

    def _fitting_steps(self, model: ModelConfig, config: TrainConfig) -> int:
        """Steps for the time budget, or no more than the preset's where nobody gave one.

        A run that is there keeps its length if that is about as long: estimates differ from day to
        day, and every other length moves the schedule.
        """
        one = dataclasses.replace(config, max_steps=1)
        rate = product_rate(choose_device(config.device, config.dtype))
        steps = max(1, round(60 * (self.minutes or 3) / estimate_seconds(model, one, rate)))
        saved = self._run_there()[1].get("train", {})
        before = saved.get("max_steps", 0) if self.resume == "auto" else 0
        if not self.minutes:
            return before or min(steps, config.max_steps)
        return before if 2 / 3 < steps / max(before, 1) < 3 / 2 else steps

    def describe(self) -> str:
        """Parameters, memory, time and what will happen, a line each."""
        model, data, config = self.configs()
        device = choose_device(config.device, config.dtype)
        minutes = estimate_seconds(model, config, product_rate(device)) / 60
        memory = estimate_memory(model, config) / 2**20
        small = " (small and short, for there is no GPU here)" if self.is_fallback else ""
        lines = {
            "preset": self.preset_name + small,
            "model": f"{model.num_parameters / 1e6:.2f}M parameters: {model.num_hidden_layers} "
            f"layers of width {model.hidden_size}, context {model.max_position_embeddings}",
            "data": data.data,
            "training": f"{config.max_steps:,} steps of {config.batch_tokens:,} tokens, peak "
            f"learning rate {peak_rates(model, config)[0]:g}",
            "memory": f"{memory:,.0f} MB for weights, gradients and optimizer; activations besides",
            "time": f"about {minutes:.1f} minutes on {device.device}, a guess before training",
            "run folder": f"{self.run_folder.as_posix()}: {self._what_is_there(model, data)}",
        }
        return "\n".join(f"{name + ':':12}{value}" for name, value in lines.items())

    def _what_is_there(self, model: ModelConfig, data: DataConfig) -> str:
        place, saved = self._run_there()
        if not saved:
            return "new"
        if self.resume == "never":
            return "holds a run, which is set aside"
        if (saved.get("model"), saved.get("data")) != (asdict(model), asdict(data)):
            return "HOLDS A RUN WITH OTHER SETTINGS; choose another folder, or resume = never"
        steps = saved["train"]["max_steps"]
        if place != self.run_folder:
            return f"goes on with the run of {steps} steps that is in {place}"
        lines = MetricsLog.read(self.run_folder / "metrics.jsonl")
        step = lines[-1]["step"] if lines else 0
        return f"holds a run that has come to step {step} of {steps}; goes on"

    def _run_there(self) -> tuple[Path, dict[str, Any]]:
        """The settings of the run to go on with, in the run folder or else in the mirror."""
        for place in (self.run_folder, *([Path(self.mirror)] if self.mirror else [])):
            saved = read_json(place / "config.json")
            if saved:
                return place, saved
        return self.run_folder, {}


class SettingsPanel:
    """`Settings` as a form of widgets that answers each change; plain text without widgets.

    `settings` is what the form says now; like `Settings`, it raises ValueError for nonsense.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._given = settings or Settings()
        self._fields: dict[str, Any] = {}

    @property
    def settings(self) -> Settings:
        if not self._fields:
            return self._given
        return Settings(**{name: field.value for name, field in self._fields.items()})

    def show(self) -> None:
        """Display the form, or print what the settings mean."""
        widgets = _widgets()
        if widgets is None:
            print(self._given.describe())
            return
        from IPython.display import display

        display(self._form(widgets))

    def _form(self, w: Any) -> Any:
        wide = {"style": {"description_width": "140px"}, "layout": w.Layout(width="520px")}
        choices = {"preset": ("auto", *PRESETS), "resume": ("auto", "never")}
        for f in fields(Settings):
            value = getattr(self._given, f.name)
            options = {"value": value, "description": f.name.replace("_", " "), **wide}
            if f.name in choices:
                field = w.Dropdown(options=choices[f.name], **options)
            elif isinstance(value, str):
                field = w.Text(continuous_update=False, **options)
            else:
                field = (w.IntText if isinstance(value, int) else w.FloatText)(**options)
            field.observe(self._tell, names="value")
            self._fields[f.name] = field
        own = w.Textarea(description="own text", continuous_update=False, **wide)
        own.observe(lambda change: self._take({"own_text.txt": change["new"].encode()}), "value")
        upload = w.FileUpload(accept=".txt,.jsonl,.parquet", description="upload a text")
        upload.observe(lambda change: self._take(_uploaded(change["new"])), "value")
        self._message = w.HTML()
        self._tell()
        return w.VBox([*self._fields.values(), own, upload, self._message])

    def _take(self, files: dict[str, bytes]) -> None:
        """Keep texts given in the form as files, and name the last as the data."""
        for name, content in files.items():
            if content:
                path = Path("texts") / Path(name).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                self._fields["data"].value = path.as_posix()
        self._tell()

    def _tell(self, change: Any = None) -> None:
        try:
            text, color = self.settings.describe(), INK
        except ValueError as error:
            text, color = f"cannot be: {error}", "#b00020"
        self._message.value = (
            f'<pre style="{CARD};color:{color};white-space:pre-wrap">{html.escape(text)}</pre>'
        )


def _uploaded(value: Any) -> dict[str, bytes]:
    """Name and content of the files in a FileUpload; ipywidgets 7 has a dict, 8 a tuple."""
    if isinstance(value, dict):
        return {name: bytes(item["content"]) for name, item in value.items()}
    return {item["name"]: bytes(item["content"]) for item in value}


INK, PAPER = "#1f2328", "#ffffff"
"""Text and ground of the displays; their own, so that dark and light themes read alike."""
CARD = f"background:{PAPER};color:{INK};padding:8px 12px;border-radius:6px"
_BLUE, _ORANGE, _GREEN = "#0b5cad", "#b34700", "#1a7f37"


def run_figure(lines: list[dict[str, Any]]) -> Any:
    """The curves of a run from the lines of its metrics.jsonl, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    steps = [line for line in lines if "loss" in line]
    tests = [line for line in lines if "val_loss" in line]
    layered = [line for line in steps if line.get("zero_fraction")]
    # places are fixed, for working them out anew takes as long as drawing
    figure = Figure(figsize=(9, 4.2), dpi=100, facecolor=PAPER)
    right = 0.5 if layered else 0.93
    loss = figure.add_axes((0.06, 0.46, right - 0.06, 0.47))
    rate = figure.add_axes((0.06, 0.11, right - 0.06, 0.24))
    speed = rate.twinx()
    _curve(loss, steps, "loss", _BLUE, "training")
    _curve(loss, tests, "val_loss", _ORANGE, "validation", marker="o")
    _curve(rate, steps, "learning_rate", _GREEN)
    _curve(speed, steps, "tokens_per_s", _BLUE)
    if steps or tests:
        loss.legend(fontsize=8, frameon=False, labelcolor=INK)
    loss.set_title("loss, nats per token", fontsize=9, color=INK)
    rate.set_title("learning rate", fontsize=9, color=_GREEN, loc="left")
    rate.set_title("tokens/s", fontsize=9, color=_BLUE, loc="right")
    for axes in (loss, rate, speed):
        axes.tick_params(labelcolor=INK, labelsize=8)
    for axes in (rate, speed):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    if layered:
        for bottom, key, title in ((0.6, "zero_fraction", "zeros"), (0.11, "flip_rate", "flips")):
            places = ((0.61, bottom, 0.29, 0.33), (0.91, bottom, 0.015, 0.33))
            axes, scale = map(figure.add_axes, places)
            _heat_map(axes, scale, layered, key)
            axes.set_title(f"{title}, share of trits by layer", fontsize=9, color=INK)
    return figure


def _curve(
    axes: Any, lines: list[dict[str, Any]], key: str, color: str, label: str = "", **style: Any
) -> None:
    if lines:
        xs, ys = zip(*((line["step"], line[key]) for line in lines), strict=True)
        axes.plot(xs, ys, color=color, label=label, linewidth=1.5, markersize=3, **style)


def _heat_map(axes: Any, scale: Any, lines: list[dict[str, Any]], key: str) -> None:
    """Layers upwards, steps to the right, at most 300 columns; the colours' scale beside it."""
    lines = lines[:: 1 + len(lines) // 300]
    values = np.array([line[key] for line in lines]).T  # (layers, lines)
    extent = (0, lines[-1]["step"], -0.5, len(values) - 0.5)
    image = axes.imshow(
        values, origin="lower", aspect="auto", extent=extent, interpolation="nearest"
    )
    axes.set_yticks(range(0, len(values), 1 + len(values) // 6))
    axes.figure.colorbar(image, cax=scale)
    for part in (axes, scale):
        part.tick_params(labelcolor=INK, labelsize=8)


def figure_png(figure: Any) -> bytes:
    """A matplotlib Figure as PNG, by Agg and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def run_facts(lines: list[dict[str, Any]], max_steps: int, batch_tokens: int) -> dict[str, str]:
    """The newest figures of a run, by name, in words."""
    step = max((line["step"] for line in lines), default=0)
    facts = {"step": f"{step:,} of {max_steps:,}"}
    last = next((line for line in reversed(lines) if "loss" in line), None)
    test = next((line for line in reversed(lines) if "val_loss" in line), None)
    if last:
        left = (max_steps - step) * batch_tokens / max(last["tokens_per_s"], 1)
        facts["loss"] = f"{last['loss']:.3f}"
        facts["tokens/s"] = f"{last['tokens_per_s']:,.0f}"
        facts["memory"] = f"{last['memory_bytes'] / 2**30:.2f} GiB"
        facts["time left"] = f"{left // 60:.0f} min {left % 60:02.0f} s"
    if test:
        facts["validation loss"] = f"{test['val_loss']:.3f} at step {test['step']:,}"
    return facts


def show_run(out: str | Path, handle: Any = None) -> None:
    """Draw the whole curve of a run from its metrics.jsonl; one line of figures without notebook.

    With IPython's handle of an earlier display, draws there, which makes a live curve.
    Raises FileNotFoundError for a folder without a run.
    """
    out = Path(out)
    saved = read_json(out / "config.json")
    if saved is None:
        raise FileNotFoundError(f"{out}: not a run folder (no config.json in it)")
    lines = MetricsLog.read(out / "metrics.jsonl")
    facts = run_facts(lines, saved["train"]["max_steps"], saved["train"]["batch_tokens"])
    text = ", ".join(f"{name} {value}" for name, value in facts.items())
    if not in_notebook():
        print(text)
        return
    from IPython.display import display

    show = handle.update if handle else display
    show({"image/png": figure_png(run_figure(lines)), "text/plain": text}, raw=True)


class LiveDisplay(Callback):
    """Curves, figures, a sample and buttons under the training cell; a progress bar elsewhere.

    Buttons set flags that the loop reads between steps. Clicks arrive while the cell runs on
    ipykernel 7 in JupyterLab 4.4 or newer (which sends them to a thread of their own), and on
    ipykernel 6, Colab's, if jupyter_ui_poll is installed. Elsewhere they wait for the cell's end;
    interrupting the cell (the ■ button) stops everywhere.

    Args:
        out: the run folder given to `train`, whose metrics.jsonl has the curve so far.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.text = None if in_notebook() and _has_matplotlib() else ProgressBar()
        self.facts: dict[str, str] = {}
        self.sample = ""
        self.draw_after = 0.0
        self.answered: tuple[Any, ...] = ()
        self.buttons: dict[str, Any] = {}
        self.handle: Any = None
        self.began, self.ended = time.monotonic(), False

    def on_start(self, state: TrainState) -> None:
        if self.text:
            return self.text.on_start(state)
        self.lines = MetricsLog.read(self.out / "metrics.jsonl")
        if state.step:
            self.facts["last save"] = f"step {state.step:,}"
        if state.mirror:
            self.on_mirror(state, state.mirror.status())
        self.resources = contextlib.ExitStack()
        self.poll = self.resources.enter_context(_clicks_between_steps())
        self._show_buttons(state)
        from IPython.display import display

        self.handle = display({"text/plain": "drawing"}, raw=True, display_id=True)
        self._draw_if_due(state)

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        if self.text:
            return self.text.on_step(state, metrics)
        if metrics:
            self.lines.append(metrics)
        self.poll()
        self._draw_if_due(state)

    def on_pause(self, state: TrainState) -> None:
        if not self.text:
            self.poll()
            self._draw_if_due(state)

    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None:
        if self.text:
            return self.text.on_eval(state, metrics)
        self.lines.append(metrics)

    def on_sample(self, state: TrainState, text: str) -> None:
        if self.text:
            return self.text.on_sample(state, text)
        self.sample = text

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        when = time.strftime("%H:%M:%S", time.localtime(state.last_saved_at))
        self.facts["last save"] = f"step {state.last_saved_step:,} at {when}"

    def on_mirror(self, state: TrainState, status: str) -> None:
        self.facts["mirror"] = status.removeprefix("mirror: ")

    def on_end(self, state: TrainState) -> None:
        if self.text:
            return self.text.on_end(state)
        for button in self.buttons.values():
            button.disabled = True
        self.draw_after, self.ended = 0.0, True
        self._draw_if_due(state)
        self.resources.close()

    def _show_buttons(self, state: TrainState) -> None:
        widgets = _widgets()
        if widgets is None:
            return
        from IPython.display import display

        for name in ("Stop", "Pause", "Save now"):
            self.buttons[name] = widgets.Button(description=name)
            self.buttons[name].on_click(lambda _, name=name: _press(state, name))
            _deliver_to_thread(self.buttons[name].comm)
        note = widgets.HTML("to stop, or press the ■ button (interrupt): both save first")
        display(widgets.HBox([*self.buttons.values(), note]))

    def _draw_if_due(self, state: TrainState) -> None:
        """At once after a click or save; else at most once a second, for a twentieth of the time.

        Rarer as hours pass: what a closed tab missed comes all at once when it is opened again.
        """
        start = time.monotonic()
        answered = (state.paused, state.stop_signal, self.facts.get("last save"))
        if start < self.draw_after and answered == self.answered:
            return
        self.answered = answered
        if self.buttons:
            self.buttons["Pause"].description = "Continue" if state.paused else "Pause"
        try:
            self.handle.update(self._card(state), raw=True)
        except Exception as error:  # a drawing is not worth a training
            say(f"display: not drawn ({type(error).__name__}: {first_line(error)})")
        now = time.monotonic()
        self.draw_after = now + max(1.0, 19 * (now - start), (now - self.began) / 600)

    def _card(self, state: TrainState) -> dict[str, str]:
        facts = run_facts(self.lines, state.config.max_steps, state.config.batch_tokens)
        facts |= {"step": f"{state.step:,} of {state.config.max_steps:,}", **self.facts}
        if state.stop_signal:
            facts["stopped"] = "saved; run this cell again to go on" if self.ended else "saving"
        elif state.paused:
            facts["paused"] = "press Continue"
        figure = base64.b64encode(figure_png(run_figure(self.lines))).decode()
        cells = " · ".join(f"{k} <b>{html.escape(v)}</b>" for k, v in facts.items())
        sample = html.escape(self.sample or "at the first evaluation")
        alt = "loss, learning rate and speed by step; zeros and flipped trits by layer"
        text = ", ".join(f"{name} {value}" for name, value in facts.items())
        page = (
            f'<div style="{CARD}"><div>{cells}</div>'
            f'<img alt="{alt}" style="max-width:100%" src="data:image/png;base64,{figure}">'
            f'<div>sample text</div><pre style="{CARD};white-space:pre-wrap">{sample}</pre></div>'
        )
        return {"text/html": page, "text/plain": text}


def _press(state: TrainState, name: str) -> None:
    """What a click does: a flag, for it may come on another thread in the middle of a step."""
    if name == "Stop":
        state.stop_signal = signal.SIGINT
    elif name == "Pause":
        state.paused = not state.paused
    else:
        state.save_requested = True


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _deliver_to_thread(comm: Any) -> None:
    """Let clicks keep the thread that the front end chose for them.

    ipykernel 7.4 sends them after the widget's last update instead, which the training's own
    thread made: they would wait for the end of the cell.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


@contextlib.contextmanager
def _clicks_between_steps() -> Iterator[Callable[[], None]]:
    """A function that lets ipykernel 6 answer waiting clicks; cells sent meanwhile run later."""
    generation = int(importlib.metadata.version("ipykernel").split(".")[0])
    poll, last = None, 0.0
    with contextlib.ExitStack() as stack:
        if generation < 7:
            with contextlib.suppress(ImportError):
                from jupyter_ui_poll import ui_events

                poll = stack.enter_context(ui_events())

        def between_steps() -> None:
            nonlocal last
            if poll and time.monotonic() - last > 0.1:
                poll(10)
                last = time.monotonic()

        yield between_steps


def download_button(path: str | Path) -> None:
    """Offer a file, or a folder as a zip: Colab's download, elsewhere a link, or its path."""
    path = Path(path)
    if path.is_dir():
        shutil.make_archive(str(path), "zip", path)
        path = path.with_name(path.name + ".zip")
    widgets = _widgets()
    if widgets is None:
        print(f"to take along: {path}")
        return
    from IPython.display import display

    try:
        from google.colab import files  # type: ignore[import-not-found]
    except ImportError:
        name = html.escape(path.as_posix(), quote=True)
        link = f'<a href="{name}" download>{name}</a>'
        display({"text/html": link, "text/plain": path.as_posix()}, raw=True)
        return
    button = widgets.Button(description=f"Download {path.name}", layout={"width": "auto"})
    button.on_click(lambda _: files.download(str(path)))
    display(button)


def newest_run(folder: str | Path = "runs") -> Path | None:
    """The run folder in `folder` that was trained last; None where there is none."""
    runs = [p.parent for p in Path(folder).glob("*/metrics.jsonl")]
    return max(runs, key=lambda p: (p / "metrics.jsonl").stat().st_mtime, default=None)


def prompt_box(model: BitLM, tokenizer: Any, prompt: str = "") -> None:
    """A prompt with sliders that answers as it writes; without widgets one text is printed."""
    widgets = _widgets()
    if widgets is None:
        print(prompt + generate(model, tokenizer, prompt, SamplingConfig(seed=0)))
        return
    from IPython.display import display

    w = widgets
    wide = {"layout": w.Layout(width="520px"), "style": {"description_width": "100px"}}
    text = w.Textarea(value=prompt, description="prompt", **wide)
    sliders = {
        "temperature": w.FloatSlider(value=0.8, min=0, max=2, step=0.05, **wide),
        "top_k": w.IntSlider(value=50, min=0, max=200, **wide),
        "top_p": w.FloatSlider(value=1.0, min=0.05, max=1, step=0.05, **wide),
        "max_new_tokens": w.IntSlider(value=100, min=1, max=500, **wide),
    }
    for name, slider in sliders.items():
        slider.description = name.replace("_", " ").removesuffix(" new tokens")
    button, answer = w.Button(description="Write"), w.HTML()

    def write(_: Any) -> None:
        written = text.value
        sampling = SamplingConfig(**{name: slider.value for name, slider in sliders.items()})
        for piece in stream(model, tokenizer, text.value, sampling):
            written += piece
            answer.value = f'<pre style="{CARD};white-space:pre-wrap">{html.escape(written)}</pre>'

    button.on_click(write)
    display(w.VBox([text, *sliders.values(), button, answer]))


# -----------------------------------------------------------------------------
# 12 Command line
# Every field of a configuration is a flag. Where the package is there, bitllm/cli.py adds commands.


def _field_help(config: type) -> dict[str, str]:
    """The string under each field, which Python itself forgets."""
    try:
        body = ast.parse(inspect.getsource(config)).body[0]
    except OSError:  # no source file, as in a notebook cell
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for item, after in itertools.pairwise(body.body):
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(item.target, ast.Name)
            assert isinstance(after.value, ast.Constant)
            found[item.target.id] = str(after.value.value).replace("%", "%%")
    return found


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")


def add_fields(parser: argparse.ArgumentParser, config: type, defaults: bool) -> None:
    """One flag per field, with its default where no preset gives it."""
    group, texts = parser.add_argument_group(config.__name__), _field_help(config)
    for item in fields(config):
        kind = str(item.type).split(" | ")[0]
        options: dict[str, Any] = {"type": {"int": int, "float": float}.get(kind, str)}
        if kind == "bool":
            options = {"type": _parse_bool, "nargs": "?", "const": True}
        options["help"] = texts.get(item.name, "") + (
            f" (default: {item.default})" if defaults else ""
        )
        flag = "--" + item.name.replace("_", "-")
        group.add_argument(flag, default=argparse.SUPPRESS, metavar=kind.upper(), **options)


def from_flags(config: type, flags: argparse.Namespace, base: Any = None) -> Any:
    given = {f.name: getattr(flags, f.name) for f in fields(config) if hasattr(flags, f.name)}
    return config(**given) if base is None else dataclasses.replace(base, **given)


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag, and exit 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def command_parser(prog: str = "bitllm_core.py") -> tuple[argparse.ArgumentParser, Any]:
    """The parser, and what further commands are added to."""
    parser = _Parser(prog=prog, description="Train and use ternary language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train, or resume a run")
    command.add_argument("--preset", help=f"settings to begin from: {', '.join(PRESETS)}")
    command.add_argument("--out", required=True, metavar="DIR", help="run folder")
    command.add_argument("--resume", default="auto", help="auto, never or must")
    command.add_argument("--mirror", metavar="DIR", help="second folder for the checkpoints")
    for config in (ModelConfig, DataConfig, TrainConfig):
        add_fields(command, config, defaults=False)
    command.set_defaults(run=train_command)

    command = commands.add_parser("generate", help="write text")
    add_model_flags(command)
    command.add_argument("--prompt", default="", help="beginning of the text")
    add_fields(command, SamplingConfig, defaults=True)
    command.set_defaults(run=generate_command)

    command = commands.add_parser("evaluate", help="loss on a text, as one JSON object")
    add_model_flags(command)
    command.add_argument("--data", required=True, metavar="SOURCE", help="file, folder or name")
    command.add_argument("--text-column", help="column of .jsonl, .parquet or hub rows")
    command.add_argument("--stride", type=int, help="tokens the context moves; default: all of it")
    command.add_argument("--dtype", default="float32", help="auto, float32, bfloat16, float16")
    command.set_defaults(run=_evaluate_command)
    return parser, commands


def add_model_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="PATH", help="run, export or seed .pth")
    command.add_argument("--checkpoint", default="last", help="last, best or a step")


def checkpoint_flag(flags: argparse.Namespace) -> str | int:
    return int(flags.checkpoint) if flags.checkpoint.isdigit() else flags.checkpoint


def preset(name: str) -> tuple[ModelConfig, DataConfig, TrainConfig]:
    require(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _settings_of_run(out: Path, mirror: str | None) -> dict[str, Any] | None:
    """What the run in `out`, or in its mirror, was made with; None: there is none."""
    for place in (out, Path(mirror)) if mirror else (out,):
        if (place / "config.json").is_file():
            with contextlib.suppress(ValueError):  # train reports it
                return read_run_config(place)
        found = newest_checkpoint(place / "checkpoints")
        if found:
            return checked_settings(found.get("config"), place / "checkpoints")
    return None


def _configs_from_flags(flags: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The preset's, or the run's own where no preset is named, with the flags laid over."""
    kinds = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    saved = None if flags.preset else _settings_of_run(Path(flags.out), flags.mirror)
    bases = preset("demo" if flags.preset is None else flags.preset)
    if saved:
        bases = tuple(kind(**saved[part]) for part, kind in kinds.items())
    model, data, config = map(from_flags, kinds.values(), [flags] * 3, bases)
    return model, data, config


def train_command(flags: argparse.Namespace, callbacks: Sequence[Callback] = ()) -> int:
    configs, out = _configs_from_flags(flags), Path(flags.out)
    options = {"resume": flags.resume, "mirror": flags.mirror}
    state = train(*configs, out, callbacks=[ProgressBar(), *callbacks], **options)
    if state.stop_signal:
        log.info(f"stopped at step {state.step} of {state.config.max_steps}; saved in {out}")
        return 128 + state.stop_signal
    if not state.processes.is_main:
        return 0
    model, tokenizer = load_model(out, "best" if state.out_of_patience else "last")
    prompt, size = state.config.sample_prompt, model.config.vocab_size
    text = generate(model, tokenizer, prompt, SamplingConfig(120, seed=0))
    speed = state.tokens / state.train_seconds if state.train_seconds else 0
    print(f"\n{prompt}{text}\n")
    print(f"complete: {state.step} steps, {state.tokens:,} tokens, {speed:,.0f} tokens/s")
    print(f"last training loss {state.loss:.4f}, {state.skipped} steps skipped")
    print(
        f"validation loss {state.val_loss:.4f}, perplexity {safe_exp(state.val_loss):.1f} "
        f"(a uniform guess: {math.log(size):.4f}, {size})"
    )
    print(f"checkpoint: {list_checkpoints(out / 'checkpoints')[-1]}")
    if state.out_of_patience:
        print(
            f"ended early: {state.config.patience} evaluations without a better validation loss; "
            f"the text above is from the best checkpoint, {state.best_val_loss:.4f} at step "
            f"{state.best_step} (--checkpoint best)"
        )
    return 0


def generate_command(flags: argparse.Namespace) -> int:
    sampling = from_flags(SamplingConfig, flags)
    model, tokenizer = load_model(flags.model, checkpoint_flag(flags))
    print_text(flags.prompt, stream(model, tokenizer, flags.prompt, sampling))
    return 0


def print_text(prompt: str, pieces: Iterable[str]) -> None:
    for piece in itertools.chain([prompt], pieces):
        print(piece, end="", flush=True)
    print()


def _evaluate_command(flags: argparse.Namespace) -> int:
    dtypes = ("auto", "float32", "bfloat16", "float16")
    require(flags.dtype in dtypes, "dtype", flags.dtype, f"one of {', '.join(dtypes)}")
    model, tokenizer = load_model(flags.model, checkpoint_flag(flags))
    device = choose_device("auto", flags.dtype)
    options = {"text_column": flags.text_column, "stride": flags.stride, "device": device}
    print(json.dumps(evaluate(model, tokenizer, flags.data, **options)))
    return 0


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run a command; returns the exit status: 2 for a user's mistake, 130 after Ctrl-C."""
    flags = parser.parse_args(arguments)
    log_to(sys.stderr)
    try:
        return flags.run(flags)
    except KeyboardInterrupt:
        log.error("stopped at once; nothing after the last checkpoint was saved")
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        log.error(f"error: {error}")
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: that of the package where it is there."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        cli = extension("cli", " ".join(arguments[:1]))
    except ImportError as error:
        if arguments[:1] and arguments[0] in ("export", "plan", "bench", "info"):
            print(f"error: {error}", file=sys.stderr)
            return 2
        return run_command(command_parser()[0], arguments)
    return cli.main(arguments)


def exit_with(status: int) -> None:
    """End the process; at once after an error among several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # gloo's threads abort a process that ends in order, and NCCL's may wait for the dead
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    exit_with(main())
