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
    12 Command line   train, generate, evaluate, bench, info

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
import hashlib
import html
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "PRESETS",
    "BitLM",
    "BitLinear",
    "Callback",
    "DataConfig",
    "LiveDisplay",
    "ModelConfig",
    "SamplingConfig",
    "Settings",
    "SettingsPanel",
    "TensorBoard",
    "TokenData",
    "TrainConfig",
    "TrainState",
    "WandB",
    "activation_quant",
    "download_button",
    "environment_report",
    "estimate_memory",
    "evaluate",
    "generate",
    "import_seed_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "mount_drive",
    "newest_run",
    "prepare_data",
    "prompt_box",
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
                logits = x @ w.T  # (rows, V)
                if not learning:
                    nats += F.cross_entropy(logits.float(), targets[part], reduction="sum")
                    continue
                log_p, d_logits = probabilities(logits, wanted)
                nats -= log_p.sum()
                # the gradient of the logits is p, less 1 at what was wanted
                at = torch.arange(len(x), device=x.device)  # scatter_ would copy all the logits
                d_logits[at, targets[part]] = log_p.expm1().squeeze(1).to(dtype)
                d_hidden[part] = d_logits @ w
                d_weight.addmm_(d_logits.T, x)
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
        """Cross-entropy in nats, summed over all tokens of `targets`, (B, T), in float32.

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
    """One line to stderr, from the first process alone; results alone go to stdout."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)


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
# Also the processes that share the work. One alone takes the same way: its share is all of it.


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """All parameters, in the optimizers' order."""
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


PROCESS_TIMEOUT_S = 600.0
"""Seconds without an answer from the other processes after which one gives up."""
BUCKET_NUMBERS = 1 << 23
"""Numbers of a message between processes, 32 MB; a larger tensor is one message."""
MESSAGES_UNDER_WAY = 4


@contextlib.contextmanager
def told_of_the_dead() -> Iterator[None]:
    """A block that talks to the other processes; ConnectionError where one is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of gloo, NCCL and the rendezvous alike
        raise ConnectionError(
            f"another process has ended or has not answered for {PROCESS_TIMEOUT_S:.0f} s "
            f"({first_line(error)}). The same command goes on from the last checkpoint"
        ) from error


class World:
    """The processes that train one model together; this one alone unless torchrun started it.

    Each holds the whole model, takes its share of a step's windows, and updates its share of the
    parameters, which the others receive. All methods but `part` and `owners` are for all processes
    to call in the same order.

    Where `sharded`, each holds and updates its rows of every parameter instead (`sharded_model`).
    """

    rank, size, sharded = 0, 1, False

    @classmethod
    def of_environment(cls, device: torch.device) -> World:
        """Meet the others that torchrun's environment tells of, once in the life of a process.

        Raises:
            ValueError: this machine has fewer GPUs than processes.
        """
        world = cls()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            if not dist.is_initialized():
                world._meet(device)
            world.rank, world.size = dist.get_rank(), dist.get_world_size()
        return world

    def _meet(self, device: torch.device) -> None:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend, wait = "gloo", timedelta(seconds=PROCESS_TIMEOUT_S)
        if device.type == "cuda":
            backend, local = "cpu:gloo,cuda:nccl", int(os.environ.get("LOCAL_RANK", "0"))
            there = torch.cuda.device_count()
            require(local < there, "LOCAL_RANK", local, f"one of this machine's {there} GPUs")
            torch.cuda.set_device(local)
        with told_of_the_dead():
            store, rank, size = next(rendezvous("env://", timeout=wait))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun's own store outlives a restart, with the addresses of the dead in it
                store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            options = {"store": store, "rank": rank, "world_size": size}
            dist.init_process_group(backend, timeout=wait, **options)

    def part(self, count: int) -> slice:
        """Which of `count` things in a row are for this process."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def most(self, value: float) -> float:
        """The largest of the values that the processes give."""
        return self._reduced(value, "MAX")

    def total(self, value: float) -> float:
        """The sum of the values that the processes give."""
        return self._reduced(value, "SUM")

    def _reduced(self, value: float, operation: str) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64)
        with told_of_the_dead():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor.item()

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns where the first process calls it; None on the others.

        They wait as long as it takes, and end where it fails.
        """
        if self.size == 1:
            return work()
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        if self.rank == 0:
            threading.Thread(target=run, name="first", daemon=True).start()
        while self.most(self.rank == 0 and not future.done()):
            time.sleep(0.05)
        failed = self.most(self.rank == 0 and future.exception() is not None)
        if self.rank == 0:
            return future.result()
        if failed:
            raise ChildProcessError("the first process could not begin; its message says why")
        return None

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into each tensor, in few large messages."""
        if self.size > 1:
            _exchange((b, dist.all_reduce) for b in _buckets(tensors))

    def owners(self, optimizers: Iterable[torch.optim.Optimizer]) -> list[int]:
        """Which process updates each of `parameters_of`, so that all have about as much to do.

        Muon's Newton-Schulz multiplies a matrix by its square, which costs its size times its
        shorter side; AdamW passes over its numbers once.
        """
        cost = []
        for optimizer in optimizers:
            once = isinstance(optimizer, torch.optim.AdamW)
            cost += [p.numel() * (1 if once else min(p.shape)) for p in parameters_of([optimizer])]
        if self.sharded:
            return [self.rank] * len(cost)
        load, owner = [0] * self.size, [0] * len(cost)
        for i in sorted(range(len(cost)), key=lambda i: (-cost[i], i)):
            owner[i] = min(range(self.size), key=load.__getitem__)
            load[owner[i]] += cost[i]
        return owner

    @torch.no_grad()
    def spread(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Give every process the owner's values of each tensor."""
        for rank in range(self.size if self.size > 1 and not self.sharded else 0):
            of_rank = (t for t, owner in zip(tensors, owners, strict=True) if owner == rank)
            _exchange((b, partial(dist.broadcast, src=rank)) for b in _buckets(of_rank))

    def wholes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the first process: each whole, on the CPU; on the others nothing. One at a time."""
        if not self.sharded:
            return tensors
        found = {}
        for name, tensor in tensors.items():
            found[name] = all_rows(tensor.detach()).cpu()
            if self.rank:
                found.clear()
        return found

    def gathered(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """On the first process: what all have, by two names, that of the others on the CPU."""
        if self.size == 1:
            return tensors
        if self.sharded:
            return {name: self.wholes(of_one) for name, of_one in tensors.items()}
        shapes: list[Any] = [None] * self.size
        own = [(a, b, t.shape, t.dtype) for a, inner in tensors.items() for b, t in inner.items()]
        with told_of_the_dead():
            dist.all_gather_object(shapes, own)
            for rank in range(1, self.size):
                for a, b, shape, dtype in shapes[rank]:
                    if self.rank == 0:
                        tensors.setdefault(a, {})[b] = torch.empty(shape, dtype=dtype)
                        dist.recv(tensors[a][b], rank)
                    elif self.rank == rank:
                        dist.send(tensors[a][b].cpu(), 0)
        return tensors


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _exchange(messages: Iterable[tuple[list[Tensor], Callable[..., Any]]]) -> None:
    """Send each bucket as one tensor and take over what comes back; a few are under way at once."""

    def receive(bucket: list[Tensor], flat: Tensor, work: Any) -> None:
        work.wait()
        for tensor, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(values.view_as(tensor))

    sent: list[tuple[list[Tensor], Tensor, Any]] = []
    with told_of_the_dead():
        for bucket, send in messages:
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            sent.append((bucket, flat, send(flat, async_op=True)))
            if len(sent) == MESSAGES_UNDER_WAY:
                receive(*sent.pop(0))
        for message in sent:
            receive(*message)


def is_shared(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each process holds some rows; its module imports slowly."""
    return hasattr(tensor, "full_tensor")


def own_rows(tensor: Any) -> Tensor:
    """What lies in this process of a tensor that processes share; else all of it."""
    return tensor.to_local() if is_shared(tensor) else tensor


def all_rows(tensor: Any) -> Tensor:
    """All of a tensor that processes share, for which all have to ask; else itself."""
    with told_of_the_dead():
        return tensor.full_tensor() if is_shared(tensor) else tensor


def _rows_of(tensor: Any) -> list[slice]:
    """Which rows lie in each process: as even as FSDP has it, the last may have fewer or none."""
    count, size = len(tensor), tensor.device_mesh.size()
    most = -(-count // size)
    return [slice(min(r * most, count), min((r + 1) * most, count)) for r in range(size)]


@torch.no_grad()
def sharded_like(parameter: Any, values: Tensor) -> Tensor:
    """`values`, all of it, shared by the processes as `parameter` is; itself where that is not."""
    if not is_shared(parameter):
        return values
    if values.shape != parameter.shape:  # AdamW's count of steps
        return values.clone()
    shared = torch.empty_like(parameter, dtype=values.dtype)
    rows = _rows_of(parameter)[parameter.device_mesh.get_local_rank()]
    own_rows(shared).copy_(values[rows])
    return shared


class ExactSum:
    """As a context: the gradients of several backward passes, added in float64.

    There the sum of a few float32 numbers is all but always exact. So neither their order shows nor
    which process had which of them; a ternary model would turn a last bit into a trit.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._sums: dict[Tensor, Tensor] = {}

    def __enter__(self) -> None:
        take = self._take
        self._hooks = [p.register_post_accumulate_grad_hook(take) for p in self.parameters]

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if parameter in self._sums:
            self._sums[parameter] += parameter.grad
        else:
            self._sums[parameter] = parameter.grad.double()
        parameter.grad = None

    def clear(self) -> None:
        self._sums.clear()

    def write(self, world: World) -> None:
        """Make the sums over all processes the parameters' gradients, rounded once."""
        world.add_up(self._sums[p] for p in self.parameters)
        for parameter in self.parameters:
            parameter.grad = self._sums.pop(parameter).float()


class ShardedSum:
    """The same for FSDP, which calls it to add up the gradients of one part of a model.

    It adds all processes' of one backward pass to those of the passes before. FSDP rounds that and
    takes it for the gradient of this one pass, so there must not be any other then.
    """

    total: Tensor | None = None

    def clear(self) -> None:
        self.total = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        dist.reduce_scatter(output_tensor, list(input_tensor.chunk(group.size())), op, group)
        if self.total is not None:
            output_tensor += self.total
        self.total = output_tensor


class TritGather:
    """How FSDP gathers a ternary weight: as trits, four in a byte, instead of float32.

    It calls what it finds of these names on the rows in this process. The whole weight that comes
    of them is trits * scale already, as `weight_quant` has them. Rows must share out evenly.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @classmethod
    def attach(cls, layer: BitLinear) -> bool:
        """Let the weight of `layer`, a DTensor, be gathered so; False where that cannot be."""
        weight: Any = layer.weight
        if layer.linear == "dense" or len(weight) % weight.device_mesh.size():
            return False
        rows = weight._local_tensor
        way = cls(rows)
        rows.fsdp_pre_all_gather, rows.fsdp_post_all_gather = way.pack, way.unpack
        return True

    @torch.no_grad()
    def pack(self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> Any:
        means = self.rows.abs().mean(dim=1)
        of_all = [torch.empty_like(means) for _ in range(mesh.size())]
        dist.all_gather(of_all, means, mesh.get_group())
        scale = ternary_scale(torch.cat(of_all))
        return (pack_trits(to_trits(self.rows, scale)),), scale

    @torch.no_grad()
    def unpack(self, packed: Any, scale: Tensor, dtype: Any, *, out: Tensor | None = None) -> Any:
        whole = unpack_trits(packed[0], self.rows.shape[1]).to(dtype) * scale
        if out is None:
            return whole, (whole,)
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(out):  # the same values
            return out.copy_(whole)


def sharded_model(
    config: ModelConfig, seed: int, device: torch.device
) -> tuple[BitLM, list[ShardedSum]]:
    """`BitLM(config, seed)` of which each process holds its rows of every parameter (FSDP2).

    It is made without memory, and filled one parameter at a time: no process holds all of it. The
    blocks are gathered one by one as they compute, as trits where they can, and freed again;
    embedding and head stay for a forward and backward pass. Gradients are summed over the
    processes, on a CPU by what comes with the model, to be cleared at the beginning of a step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact, sums = device.type == "cpu", []
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64 if exact else None)
    with torch.device("meta"):
        model = BitLM(config, seed=None)
    for part in [*model.model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        if exact:
            sums.append(ShardedSum())
            part.set_custom_reduce_scatter(sums[-1])
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device=device)
    model.fill_rope()
    model.rope = model.rope.to(device)
    for layer in model.bit_linears().values():
        layer.gathered = "dense" if TritGather.attach(layer) else layer.linear

    def keep(parameter: Tensor, values: Tensor) -> None:
        parameter.copy_(sharded_like(parameter, values))

    initialize(model, torch.Generator().manual_seed(seed), keep)
    return model, sums


def reshard(model: Any) -> None:
    """Free what a sharded model has gathered without a backward pass after it."""
    for part in [*model.model.layers, model]:
        part.reshard()


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """What multiplies the peak rates at optimizer step `step` (from 0), in (0, 1].

    wsd: linear warm-up, constant, linear cooldown to 0 [5]; cosine: warm-up, then half a cosine
    to a tenth. Both end at `max_steps`: a larger one moves the end, and the rate goes up again.
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

    torch's own casts to bfloat16, whose products a CPU without it computes sixty times slower than
    float32's: `demo`'s matrices took 10.3 s a step of one core with AVX2, and take 0.28 s here.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for weight, update in self.updates(weights, group):
                rate = group["lr"] * math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
                own = own_rows(weight)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.add_(update, alpha=-rate)

    def updates(
        self, weights: list[Tensor], group: dict[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for weight in weights:
            yield weight, _orthogonalize(self.mean(weight, group["momentum"]), group)

    def mean(self, weight: Tensor, momentum: float) -> Tensor:
        """What is to be made orthogonal, of the rows that lie here."""
        assert weight.grad is not None
        state, grad = self.state[weight], own_rows(weight.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean = own_rows(state["momentum_buffer"]).lerp_(grad, 1 - momentum)
        return grad.lerp(mean, momentum)


class ShardedMuon(Float32Muon):
    """Muon for matrices of which each process holds some rows.

    The iteration needs whole ones. So in each turn every process is sent the rows of one matrix,
    makes it orthogonal and sends the rows back: the work is shared out, and a process holds one
    whole matrix at a time. The iteration's dtype is torch's, or float32 as in Float32Muon.
    """

    def updates(
        self, weights: list[Tensor], group: dict[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        alike = sorted(weights, key=lambda w: (w.numel() * min(w.shape), w.shape))  # in one turn
        size = dist.get_world_size()
        for start in range(0, len(alike), size):
            turn = alike[start : start + size]
            yield from zip(turn, self._turn(turn, group), strict=True)

    def _turn(self, turn: list[Any], group: dict[str, Any]) -> list[Tensor]:
        mesh = turn[0].device_mesh
        rank, processes = mesh.get_local_rank(), mesh.get_group()
        dtype = torch.bfloat16 if has_bfloat16(turn[0].device) else torch.float32
        mine = turn[rank] if rank < len(turn) else None
        rows = [] if mine is None else [s.stop - s.start for s in _rows_of(mine)]
        here = [0] * mesh.size() if mine is None else [n * mine.shape[1] for n in rows]
        own = [self.mean(weight, group["momentum"]).to(dtype) for weight in turn]
        there = [rows.numel() for rows in own] + [0] * (mesh.size() - len(own))
        flat = torch.cat([rows.flatten() for rows in own])
        received = flat.new_empty(sum(here))
        with told_of_the_dead():
            dist.all_to_all_single(received, flat, here, there, processes)
        if mine is not None:
            received = _orthogonalize(received.view(mine.shape), group).flatten()
        with told_of_the_dead():
            dist.all_to_all_single(flat, received, there, here, processes)
        parts = flat.split(there)[: len(turn)]
        return [part.view_as(rows) for part, rows in zip(parts, own, strict=True)]


def _orthogonalize(update: Tensor, group: dict[str, Any]) -> Tensor:
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


def make_optimizers(model: BitLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon [3] for the matrices inside the blocks and AdamW for the rest, or AdamW for all.

    Matrices alone are decayed. Each group's peak rate is its `initial_lr`.
    """
    matrices = [m.weight for n, m in model.bit_linears().items() if n != "lm_head"]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    betas = (config.adam_beta1, config.adam_beta2)
    matrix_rate, other_rate = peak_rates(model.config, config)
    rest = {"params": others, "lr": other_rate, "weight_decay": 0.0}
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        muon = torch.optim.Muon if has_bfloat16(matrices[0].device) else Float32Muon
        muon = ShardedMuon if is_shared(matrices[0]) else muon
        optimizers.append(
            muon(
                matrices,
                lr=matrix_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                ns_steps=NEWTON_SCHULZ_STEPS,
            )
        )
        optimizers.append(torch.optim.AdamW([rest], betas=betas, fused=True))
    else:
        decayed = {
            "params": matrices,
            "lr": matrix_rate,
            "weight_decay": config.weight_decay,
        }
        optimizers.append(torch.optim.AdamW([decayed, rest], betas=betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _squares(gradients: Sequence[Tensor]) -> float:
    """The sum of their squares: of each row in float32, of rows in float64.

    So it is the same however processes share out the rows, but for the last of 53 bits.
    """
    rows = [grad.norm(dim=-1) if grad.dim() > 1 else grad for grad in gradients]
    return torch.cat(rows).cpu().double().square().sum().item()  # waits for the device


def _clip(optimizers: list[torch.optim.Optimizer], limit: float, world: World) -> float:
    """Clip the gradients AdamW will read; return the norm of all of them, before."""
    total = 0.0
    for optimizer in optimizers:
        parameters = [p for p in parameters_of([optimizer]) if p.grad is not None]
        squares = _squares([own_rows(p.grad) for p in parameters])
        squares = world.total(squares) if world.sharded else squares
        if limit and isinstance(optimizer, torch.optim.AdamW):
            norm = torch.tensor(math.sqrt(squares))
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        total += squares
    return math.sqrt(total)


def apply_gradients(
    optimizers: list[torch.optim.Optimizer],
    scaler: Any,
    factor: float,
    max_grad_norm: float,
    world: World | None = None,
) -> float:
    """One optimizer step, on gradients that are the same in all processes; rates times `factor`.

    Nothing is changed where a gradient is not finite: with two optimizers, GradScaler.step would
    let one step and skip the other.

    Returns:
        the norm of all gradients; not finite where the step was skipped.
    """
    world, parameters = world or World(), parameters_of(optimizers)
    for optimizer in optimizers:
        with told_of_the_dead():  # it asks the others where the model is sharded
            scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    norm = _clip(optimizers, max_grad_norm, world)
    if math.isfinite(norm):
        owners = world.owners(optimizers)
        for parameter, owner in zip(parameters, owners, strict=True):
            if owner != world.rank:
                parameter.grad = None  # the optimizer passes over it
        for optimizer in optimizers:
            optimizer.step()
        world.spread(parameters, owners)
    if scaler.is_enabled():
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return norm


# -----------------------------------------------------------------------------
# 8 Checkpoints
# A checkpoint is one safetensors file, which holds the whole state of a run as data, and a manifest
# with its size and sha256. It is written under another name, read back, its manifest written, and
# given its own name last: what has that name was whole once, and what is damaged since is found.

FORMAT_VERSION = 2
LOCK_NAME = "lock.json"
_BLOCK = 4 << 20  # bytes read, written and hashed at once
_PART = ".part"  # behind the name of what is not finished
_CHECKPOINT_NAME = re.compile(r"(step|epoch|best)_(\d{8,})\.safetensors")
_OUR_NAME = re.compile(r"(step|epoch|best)_\d{8,}\.(safetensors(\.part)?|json)")
SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Folder:
    """A folder of checkpoints through the few operations that a disk or Google Drive may refuse.

    Each raises OSError where the file system does. Tests put a folder in its place that fails on
    purpose (tests/faults.py).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def names(self) -> list[str]:
        """Names of the files in it, sorted; none where the folder is not there."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if not entry.is_dir())
        except FileNotFoundError:
            return []

    def write(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        """A new file in place of what had the name; a part of it is not left behind."""
        self.path.mkdir(exist_ok=True)
        self.remove(name)
        try:
            with (self.path / name).open("xb") as file:
                for block in blocks:
                    file.write(block)
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk needs the room
                self.remove(name)
            raise

    def sync(self, name: str) -> None:
        """Wait until the file is on the disk."""
        with (self.path / name).open("r+b") as file:
            os.fsync(file.fileno())

    def rename(self, old: str, new: str) -> None:
        """Only to a name that nothing has: on Drive, renaming over a file can leave two."""
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
        """Delete a file, emptied first: in Drive's trash it would go on using the quota."""
        path = self.path / name
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:  # else it is someone's, too
                os.truncate(path, 0)
            path.unlink()

    def digest(self, name: str) -> str:
        """sha256 of a file as it reads now."""
        digest = hashlib.sha256()
        for block in self.read(name):
            digest.update(block)
        return digest.hexdigest()


def _split_tensors(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`tree` with each tensor moved to `tensors` and its name put there instead."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach()
        return {"tensor": path}
    if isinstance(tree, dict):
        return {k: _split_tensors(v, f"{path}/{k}".lstrip("/"), tensors) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_split_tensors(v, f"{path}/{i}", tensors) for i, v in enumerate(tree)]
    return tree


def _join_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {"tensor"}:
            return tensors[tree["tensor"]]
        return {k: _join_tensors(v, tensors) for k, v in tree.items()}
    return [_join_tensors(v, tensors) for v in tree] if isinstance(tree, list) else tree


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a safetensors file: what its header says, and how to make it in its turn."""

    name: str
    dtype: str
    """a key of SAFETENSORS_TYPES"""
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def itemsize(self) -> int:
        return SAFETENSORS_TYPES[self.dtype].itemsize

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.itemsize


def safetensors_blocks(
    entries: Sequence[TensorEntry], metadata: dict[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file, tensor by tensor.

    The library's own writer copies all tensors in memory first: for 617 MB, 617 MB more and three
    times as long. Its reader, which checks every size, is what reads these files.
    """
    entries = sorted(entries, key=lambda e: (-e.itemsize, e.name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.size]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        end += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry in entries:
        tensor = entry.make().to("cpu", SAFETENSORS_TYPES[entry.dtype])
        assert tuple(tensor.shape) == entry.shape, entry.name
        for part in tensor.contiguous().reshape(-1).view(torch.uint8).split(_BLOCK):
            yield part.numpy().data


def _checkpoint_blocks(contents: dict[str, Any]) -> Iterator[bytes | memoryview]:
    tensors: dict[str, Tensor] = {}
    tree = _split_tensors(contents, "", tensors)
    codes = {dtype: code for code, dtype in SAFETENSORS_TYPES.items()}
    entries = [
        TensorEntry(
            name, codes[tensor.dtype], tuple(tensor.shape), partial(tensors.__getitem__, name)
        )
        for name, tensor in tensors.items()
    ]
    return safetensors_blocks(entries, {"contents": json.dumps(tree)})


def _begin_checkpoint(folder: Folder, contents: dict[str, Any], kind: str) -> dict[str, Any]:
    """Hand a checkpoint to the system, not yet safe on the disk; return its manifest."""
    name = f"{kind}_{contents['step']:08d}.safetensors"
    digest, size = hashlib.sha256(), 0

    def hashed() -> Iterator[bytes | memoryview]:
        nonlocal size
        for block in _checkpoint_blocks({"format_version": FORMAT_VERSION, **contents}):
            digest.update(block)
            size += len(block)
            yield block

    folder.write(name + _PART, hashed())
    return {
        "name": name,
        "format_version": FORMAT_VERSION,
        "step": contents["step"],
        "size": size,
        "sha256": digest.hexdigest(),
    }


def _finish_checkpoint(folder: Folder, manifest: dict[str, Any]) -> None:
    """Wait for the disk, read the checkpoint back, write its manifest, and let it count."""
    name = manifest["name"]
    part, text = name + _PART, json.dumps(manifest).encode()
    folder.sync(part)
    if folder.size(part) != manifest["size"] or folder.digest(part) != manifest["sha256"]:
        raise OSError(errno.EIO, "what was read back is not what was written", str(folder.path))
    folder.remove(name)  # of an earlier time, damaged since; before its manifest goes
    folder.write(_manifest_name(name), [text])
    folder.sync(_manifest_name(name))
    folder.rename(part, name)
    if folder.size(name) != manifest["size"]:
        folder.remove(name)
        raise OSError(errno.EIO, "it is not whole after renaming", str(folder.path / name))


def _manifest_name(name: str) -> str:
    return name.removesuffix(".safetensors") + ".json"


def save_checkpoint(folder: str | Path, contents: dict[str, Any], kind: str = "step") -> Path:
    """Write a checkpoint and, once it is read back and right, its manifest.

    Args:
        folder: of checkpoints; made if need be.
        contents: tensors and what JSON can hold, in dictionaries and lists, with at least `step`.
        kind: "step", "epoch" or "best", the beginning of the file's name.

    Raises:
        OSError: the disk refused; the checkpoints of other steps are untouched.
    """
    where = Folder(folder)
    where.path.mkdir(parents=True, exist_ok=True)
    manifest = _begin_checkpoint(where, contents, kind)
    _finish_checkpoint(where, manifest)
    return where.path / manifest["name"]


def read_manifest(folder: Folder, name: str) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError where there is none, or it is torn or foreign."""
    try:
        manifest = json.loads(b"".join(itertools.islice(folder.read(_manifest_name(name)), 1)))
    except FileNotFoundError:
        raise ValueError(
            f"{folder.path / name}: damaged (the manifest beside it is gone)"
        ) from None
    except (ValueError, RecursionError):
        manifest = None
    kinds = {"name": str, "format_version": int, "step": int, "size": int, "sha256": str}
    if not isinstance(manifest, dict) or any(
        not isinstance(manifest.get(key), kind) for key, kind in kinds.items()
    ):
        raise ValueError(f"{folder.path / name}: the manifest beside it is torn or not ours")
    if manifest["name"] != name:
        raise ValueError(f"{folder.path / name}: its manifest is of {manifest['name'][:80]!r}")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder.path / name}: format {manifest['format_version']}; "
            f"this program reads {FORMAT_VERSION}"
        )
    return manifest


def load_checkpoint(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint as data: nothing in it is executed, all tensors on the CPU.

    Args:
        path: a checkpoint file, its manifest beside it; or a run folder: its newest whole one.
        mapped: leave the tensors in the file, which must stay as it is while they are used.

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
        raise ValueError(f"{path}: damaged (its size or sha256 is not its manifest's)")
    contents = _read_safetensors(path, mapped)
    if contents.get("step") != manifest["step"]:
        raise ValueError(f"{path}: its step is {contents.get('step')!r}, not its manifest's")
    return contents


def _read_safetensors(path: Path, mapped: bool) -> dict[str, Any]:
    """A tree that `_checkpoint_blocks` wrote; ValueError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["contents"])
            # copied, since the library's tensors lie in the file, which may be deleted any time
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            tensors = tensors if mapped else {name: t.clone() for name, t in tensors.items()}
        contents = _join_tensors(tree, tensors)
        if not isinstance(contents["format_version"], int):
            raise ValueError("no format version in it")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a checkpoint of this program ({first_line(error)})"
        ) from error
    return contents


def checkpoint_step(path: str | Path) -> int:
    """The step that the name of a checkpoint tells."""
    return int(Path(path).name.split("_")[1].split(".")[0])


def list_checkpoints(folder: str | Path | Folder, kind: str = "step") -> list[Path]:
    """Checkpoint files by step, newest last, finished or not."""
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    matches = [_CHECKPOINT_NAME.fullmatch(name) for name in folder.names()]
    ours = [m[0] for m in matches if m and m[1] == kind]
    return [folder.path / name for name in sorted(ours, key=checkpoint_step)]


def newest_checkpoint(
    folder: str | Path, kind: str = "step", mirror: str | Path | None = None
) -> dict[str, Any] | None:
    """The newest that is whole, of a folder and of its mirror; None: there is none.

    One in the mirror is copied to the folder and read there. Each file that is passed over is
    said in a line.
    """
    local = Folder(folder)
    places, found, unread = [local, *([Folder(mirror)] if mirror else [])], [], None
    for order, place in enumerate(places):
        try:
            names = [path.name for path in list_checkpoints(place, kind)]
            found += [(checkpoint_step(name), -order, place, name) for name in names]
            for name in place.names() if kind == "step" else ():
                if not _OUR_NAME.fullmatch(name):
                    say(f"passed over: {place.path / name}: not a name that this program gives")
        except OSError as error:
            unread = error
            say(f"passed over: {error}")
    for _, _, place, name in sorted(found, key=lambda item: item[:2], reverse=True):
        try:
            if place is not local:
                local.path.mkdir(parents=True, exist_ok=True)
                copy_checkpoint(place, name, local)
                say(f"fetched {place.path / name}")
            return load_checkpoint(local.path / name)
        except (ValueError, OSError) as error:
            say(f"passed over: {error}")
    if unread:  # whether there is one is not known
        raise unread
    return None


def copy_checkpoint(
    source: Folder, name: str, target: Folder, progress: Callable[[int], None] | None = None
) -> None:
    """Bring a checkpoint to another folder; its manifest comes last, once it reads back right.

    Raises:
        ValueError: the source is not whole.
        OSError: a file system refused, or gave back something else than was written.
    """
    manifest = read_manifest(source, name)
    if copy_file(source, name, target, progress, name + _PART) != manifest["sha256"]:
        target.remove(name + _PART)
        raise ValueError(f"{source.path / name}: damaged (its sha256 is not its manifest's)")
    _finish_checkpoint(target, manifest)


def copy_file(
    source: Folder,
    name: str,
    target: Folder,
    progress: Callable[[int], None] | None = None,
    new_name: str = "",
) -> str:
    """Copy one file in blocks; return the sha256 of what was read."""
    digest = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        for block in source.read(name):
            digest.update(block)
            yield block
            if progress:
                progress(len(block))

    target.write(new_name or name, blocks())
    return digest.hexdigest()


def prune_checkpoints(
    folder: str | Path | Folder, keep: int, kind: str = "step", spare: str = ""
) -> None:
    """Delete what is older than the `keep` newest finished ones of a kind, the manifest first.

    Args:
        spare: the name of one that is still being copied, which stays for now.
    """
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    paths = list_checkpoints(folder, kind)
    finished = [path for path in paths if _has_manifest(folder, path.name)]
    if len(finished) <= keep:
        return
    for path in paths[: paths.index(finished[-keep])]:
        if path.name != spare:
            folder.remove(path.name)  # first: what lacks its manifest looks damaged
            folder.remove(_manifest_name(path.name))


def remove_unfinished(folder: Folder) -> None:
    """Delete what an earlier session began to write and did not end."""
    names = folder.names()
    for name in names:
        alone = name.endswith(".json") and name[: -len(".json")] + ".safetensors" not in names
        if _OUR_NAME.fullmatch(name) and (name.endswith(_PART) or alone):
            folder.remove(name)


def _has_manifest(folder: Folder, name: str) -> bool:
    """Whether a checkpoint was finished, by its manifest and size, without reading it."""
    try:
        return read_manifest(folder, name)["size"] == folder.size(name)
    except (ValueError, OSError):
        return False


LOCK_RENEW_S = 60.0
"""Seconds between signs of life in a lock file."""
LOCK_STALE_S = 300.0
"""Seconds without one after which the lock of another machine is taken over."""


def _name_of(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _process_start(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists() or os.name != "posix":
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


class FolderLock:
    """One writer a folder: a file in it names the process and is renewed every minute.

    A dead process of this machine is known as such at once; that of another machine (yesterday's
    Colab) by `LOCK_STALE_S` without a sign of life.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK_NAME
        self.owner = {
            "host": platform.node(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "id": uuid.uuid4().hex,
        }
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, if need be after waiting for a stale one to run out; again: no effect.

        Raises:
            ValueError: another process has it; the message names it.
            OSError: the folder cannot be read or written.
        """
        if self._thread:
            if self.taken():
                raise ValueError(f"{self.folder}: taken over by {_name_of(self._holder() or {})}")
            return
        seen = None
        while (holder := self._holder()) is not None and not self._is_dead(holder):
            if holder["host"] == self.owner["host"] or (seen and holder["alive"] != seen["alive"]):
                raise ValueError(self._refusal(holder))
            if seen is None:
                say(f"{self._refusal(holder)}; waiting for that")
                seen = holder
            time.sleep(min(1.0, LOCK_STALE_S / 10))
        if holder is not None:
            say(f"{self.folder}: taking over from {_name_of(holder)}, which is gone")
            self.path.unlink(missing_ok=True)
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:  # two at the same moment: the first has it
            raise ValueError(self._refusal(self._holder() or {})) from None
        if holder is not None:
            time.sleep(0.2)  # another may have found the same stale lock: the later one has it
            if self.taken():
                raise ValueError(self._refusal(self._holder() or {}))
        self._thread = threading.Thread(target=self._keep_alive, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Delete the file, unless it is another's by now."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._thread and not self.taken():
                self.path.unlink(missing_ok=True)
        self._thread = None

    def taken(self) -> bool:
        """Whether another process has the folder now, as when this one was asleep for long."""
        with contextlib.suppress(OSError):
            holder = self._holder()
            return holder is not None and holder["id"] != self.owner["id"]
        return False

    def _text(self) -> str:
        return json.dumps({**self.owner, "alive": time.time()})

    def _holder(self) -> dict[str, Any] | None:
        """Who has the folder; None: nobody. A torn file is nobody's who is still alive."""
        kinds = {"host": str, "pid": int, "id": str, "alive": (int, float)}
        for _ in range(3):
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                if all(isinstance(found[key], kind) for key, kind in kinds.items()):
                    return found
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, KeyError, RecursionError):
                time.sleep(0.05)  # it may be just being written
        return {"host": "?", "pid": 0, "id": "", "alive": 0.0}

    def _keep_alive(self) -> None:
        while not self._released.wait(LOCK_RENEW_S) and not self.taken():
            with contextlib.suppress(OSError):  # the next minute may be better
                # in place: a file that is replaced every minute would fill Drive's trash
                self.path.write_text(self._text(), encoding="utf-8")

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        if holder["host"] == self.owner["host"] and os.name == "posix":
            start = _process_start(holder["pid"])
            if start is None or start != holder.get("process_start"):
                return True
        return abs(time.time() - holder["alive"]) > LOCK_STALE_S

    def _refusal(self, holder: dict[str, Any]) -> str:
        alive = holder.get("alive", 0)
        until = time.strftime("%H:%M:%S", time.localtime(alive + LOCK_STALE_S))
        return (
            f"{self.folder} is being written by {_name_of(holder)}, last sign of life "
            f"{max(time.time() - alive, 0):.0f} s ago. Stop that one or choose another folder; "
            f"without a further sign it is taken to be gone at {until}"
        )


MIRROR_RETRY_S = (2.0, 300.0)
"""Seconds until a failed copy is tried again: at first, doubling each time, and at most."""
MIRROR_FINISH_S = 120.0
"""Seconds that the mirror gets at the end of a session to take what is not there yet."""


class Mirror:
    """Brings finished checkpoints to a second folder, such as a mounted Google Drive.

    A thread of its own copies; training never waits for it and never ends because of it. What it
    cannot keep up with is left out: the newest comes next. The folder becomes a run folder.

    Args:
        run: the run folder to copy from.
        folder: made if need be; its parent must be there.
        keep: how many of the newest stay, by kind of checkpoint.

    Raises:
        ValueError: `folder` cannot be a mirror, or another process writes to it.
    """

    def __init__(self, run: Path, folder: Path, keep: dict[str, int]) -> None:
        self.run, self.folder, self.keep = run, folder, keep
        self.copying = ""
        """name of the checkpoint on its way"""
        self.last_good_step: int | None = None
        self.errors = 0
        """since the last success"""
        self._failing_since = 0.0
        self._last_error = ""
        self._bytes = [0, 0]  # copied, of how many
        self._pending: dict[str, str] = {}
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._ended = threading.Event()
        self.lock = FolderLock(folder)
        try:
            folder.mkdir(exist_ok=True)
            self.lock.acquire()
        except OSError as error:
            self._failed(error)
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def offer(self, kind: str, name: str) -> None:
        """A checkpoint is ready; one of its kind that still waits is left out."""
        with self._changed:
            self._pending[kind] = name
            self._changed.notify()

    def offer_newest(self) -> None:
        """Offer what an earlier session could not bring."""
        for kind in self.keep:
            folder = Folder(self.run / "checkpoints")
            finished = [p for p in list_checkpoints(folder, kind) if _has_manifest(folder, p.name)]
            if finished:
                self.offer(kind, finished[-1].name)

    def status(self) -> str:
        """One line for the eye."""
        if self.errors:
            since = time.strftime("%H:%M", time.localtime(self._failing_since))
            times = "1 error" if self.errors == 1 else f"{self.errors} errors"
            return (
                f"mirror: failing since {since} ({times}), {self._last_error}, "
                f"last good step {self.last_good_step or 'none'}"
            )
        if self.last_good_step is None:
            return "mirror: nothing copied yet"
        return f"mirror: step {self.last_good_step} is in {self.folder}"

    def close(self, timeout_s: float | None = None) -> bool:
        """Give it a bounded time to finish, with a progress bar; whether all is there."""
        from tqdm.auto import tqdm

        with self._changed:
            self._closing = True
            self._changed.notify()
        until = time.monotonic() + (MIRROR_FINISH_S if timeout_s is None else timeout_s)
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "mininterval": 1.0}
        with tqdm(desc="mirror", delay=0.5, leave=False, **options) as bar:
            while time.monotonic() < until and not self._ended.wait(0.1):
                bar.total = self._bytes[1]
                bar.update(self._bytes[0] - bar.n)
        self._abandoned = True  # where a call to the file system hangs, its thread ends after it
        return self._ended.is_set() and not self.errors

    def _failed(self, error: Exception) -> None:
        if not self.errors:
            self._failing_since = time.time()
        self.errors += 1
        number = getattr(error, "errno", None)
        self._last_error = f"Errno {number}" if number else first_line(error)

    def _next(self) -> tuple[str, str] | None:
        """Wait for something to copy; None: the end has come and nothing is left."""
        with self._changed:
            if self.errors and not self._closing:
                first, most = MIRROR_RETRY_S
                self._changed.wait_for(
                    lambda: self._closing, min(first * 2.0 ** (self.errors - 1), most)
                )
            self._changed.wait_for(lambda: self._pending or self._closing)
            if not self._pending or self._abandoned:
                return None
            kind = min(self._pending, key=lambda k: k != "step")  # the one to go on from first
            self.copying = self._pending.pop(kind)
            return kind, self.copying

    def _work(self) -> None:
        tries_left = 5  # once the end has come
        while (item := self._next()) is not None:
            kind, name = item
            try:
                self._bring(kind, name)
                self.errors = 0
                if kind == "step":
                    self.last_good_step = checkpoint_step(name)
            except Exception as error:  # of whatever kind: training does not end because of it
                self._failed(error)
                tries_left -= self._closing
                if isinstance(error, OSError) and tries_left > 0:
                    with self._changed:
                        self._pending.setdefault(kind, name)
                    self._ended.wait(MIRROR_RETRY_S[0] if self._closing else 0)
            finally:
                self.copying = ""
        with contextlib.suppress(Exception):
            self._small_files(["config.json", "tokenizer.json", "metrics.jsonl"])
        self.lock.release()
        self._ended.set()

    def _bring(self, kind: str, name: str) -> None:
        self.folder.mkdir(exist_ok=True)
        self.lock.acquire()
        self._token_files()
        self._small_files(["config.json", "tokenizer.json"])
        source, target = Folder(self.run / "checkpoints"), Folder(self.folder / "checkpoints")
        remove_unfinished(target)
        self._bytes = [0, source.size(name)]
        if not _has_manifest(target, name) or (
            read_manifest(target, name) != read_manifest(source, name)
        ):
            copy_checkpoint(source, name, target, self._progress)
        prune_checkpoints(target, self.keep[kind], kind)

    def _progress(self, size: int) -> None:
        self._bytes[0] += size

    def _small_files(self, names: Sequence[str]) -> None:
        source, target = Folder(self.run), Folder(self.folder)
        for name in names:
            if name in source.names() and (
                name not in target.names() or source.digest(name) != target.digest(name)
            ):
                copy_file(source, name, target)

    def _token_files(self) -> None:
        """Once: tokenising anew on another machine would take minutes, and might differ."""
        source, target = Folder(self.run / "data"), Folder(self.folder / "data")
        text = b"".join(source.read("manifest.json"))
        if "manifest.json" in target.names() and b"".join(target.read("manifest.json")) == text:
            return
        counts = json.loads(text)
        for split in ("train", "validation"):
            if not counts[split]["sha256"]:  # a stream's: they come from their source again
                continue
            name = f"{split}.bin"
            self._bytes = [0, source.size(name)]
            if copy_file(source, name, target, self._progress) != target.digest(name):
                raise OSError(errno.EIO, "what was read back is not what was written", name)
        target.write("manifest.json", [text])


class CheckpointWriter:
    """Saves to one folder while training goes on.

    The caller waits until the system has taken the data; the disk, the reading back, the manifest,
    the pruning and the mirror are left to a thread.
    """

    def __init__(self, folder: Path, keep: dict[str, int], mirror: Mirror | None = None) -> None:
        self.folder, self.keep, self.mirror = Folder(folder), keep, mirror
        with contextlib.suppress(OSError):
            remove_unfinished(self.folder)
        self.worker = ThreadPoolExecutor(1, "checkpoints")
        self.running: list[tuple[str, Future[Path]]] = []
        """names and outcomes of those that are not collected yet"""

    def save(self, contents: dict[str, Any], kind: str = "step") -> None:
        """Begin a checkpoint; OSError where not even that can be done."""
        manifest = _begin_checkpoint(self.folder, contents, kind)
        self.running.append((manifest["name"], self.worker.submit(self._finish, manifest, kind)))

    def _finish(self, manifest: dict[str, Any], kind: str) -> Path:
        _finish_checkpoint(self.folder, manifest)
        if self.mirror and kind in self.keep:
            self.mirror.offer(kind, manifest["name"])
        if kind in self.keep:
            with contextlib.suppress(OSError):  # what stays is pruned next time
                spare = self.mirror.copying if self.mirror else ""
                prune_checkpoints(self.folder, self.keep[kind], kind, spare)
        return self.folder.path / manifest["name"]

    def finished(self, wait: bool = False) -> list[tuple[str, Path | OSError]]:
        """What has ended since the last call: its name, and its path or the error."""
        results: list[tuple[str, Path | OSError]] = []
        while self.running and (wait or self.running[0][1].done()):
            name, future = self.running.pop(0)
            try:
                results.append((name, future.result()))
            except OSError as error:
                results.append((name, error))
        return results


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


def checked_settings(values: Any, path: Path) -> dict[str, Any]:
    """The settings of a run, every value checked; ValueError names the file and the field."""
    kinds = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a run's settings (no JSON object with {', '.join(kinds)})")
    return {part: asdict(config_from(kind, values.get(part), path)) for part, kind in kinds.items()}


def read_run_config(run: Path) -> dict[str, Any]:
    """config.json of a run, checked."""
    return checked_settings(read_json(run / "config.json"), run / "config.json")


def _check_beside(run: Path, config: ModelConfig, tokenizer: Any) -> None:
    """config.json and tokenizer.json of a run are for people; they must not tell another story."""
    if (run / "config.json").is_file() and read_run_config(run)["model"] != asdict(config):
        raise ValueError(
            f"{run / 'config.json'}: not the settings that its checkpoint was made with"
        )
    path = run / "tokenizer.json"
    if path.is_file() and tokenizer_hash(load_tokenizer(path)) != tokenizer_hash(tokenizer):
        raise ValueError(f"{path}: not the tokenizer that its checkpoint was trained with")


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


def load_run(path: str | Path, checkpoint: str | int = "last") -> tuple[BitLM, Any, dict[str, Any]]:
    """A run's model ready to generate, its tokenizer, and what else its checkpoint tells.

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
    if path.is_file():
        contents = load_checkpoint(path)
    else:
        contents = _checkpoint_of_run(path, checkpoint)
    try:
        config = config_from(ModelConfig, contents["config"]["model"], path)
        check_weights(config, contents["model"], path)
        tokenizer = tokenizer_from(contents["tokenizer"], path)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its checkpoint lacks what generating needs ({error})") from error
    check_tokenizer(tokenizer, config.vocab_size, path)
    if path.is_dir():
        _check_beside(path, config, tokenizer)
    model = BitLM(config, seed=None)
    model.load_state_dict(contents["model"])
    told = {name: contents.get(name) for name in ("step", "config", "metrics", "val_loss")}
    return model.freeze(), tokenizer, told


# -----------------------------------------------------------------------------
# 9 Training


@dataclass(frozen=True)
class Device:
    """Where and in which precision to compute; chosen once, said once."""

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
    if device == "auto":
        device = next(name for name, there in present.items() if there)
    there = ", ".join(name for name, ok in present.items() if ok)
    require(present[device], "device", device, f"one that this machine has: {there}")
    if dtype != "auto":
        return Device(torch.device(device), getattr(torch, dtype), "as asked")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Device(torch.device(device), torch.bfloat16, "the GPU has bfloat16")
        return Device(torch.device(device), torch.float16, "the GPU has no bfloat16; loss scaled")
    if device == "cpu" and has_bfloat16(torch.device(device)):
        return Device(torch.device(device), torch.bfloat16, "the processor has bfloat16")
    return Device(torch.device(device), torch.float32, "no fast bfloat16 here")


def why_not_compile(device: Device) -> str:
    """Why torch.compile cannot work here; empty where it can."""
    if sys.platform == "win32" or device.device.type == "mps":
        return f"not used on {device.device.type} under {platform.system()}"
    if device.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler found"
    return ""


def compiled_loss(model: BitLM) -> Callable[[Tensor, Tensor], Tensor]:
    """`model.loss` with its blocks compiled, once, since they are alike, and the head's softmax.

    The head's products are quick as they are. The embedding has to stay eager: its gradient,
    compiled for a CPU, is added up by several threads in no fixed order, so that two runs differ in
    their last bits.
    """
    blocks = [torch.compile(block, dynamic=False) for block in model.model.layers]
    # dynamic: the last chunk is a smaller one
    probabilities = torch.compile(token_probabilities, dynamic=True)

    def loss(input_ids: Tensor, targets: Tensor) -> Tensor:
        with warnings.catch_warnings():  # the compiler looks at the input's .grad; it has none
            warnings.filterwarnings("ignore", message="The .grad attribute")
            return model.loss(input_ids, targets, blocks, probabilities)

    return loss


def _pays_to_compile(model: ModelConfig, train: TrainConfig, device: Device) -> bool:
    """Compiling takes ten seconds on a CPU and more for a GPU; steps gain a quarter to a half."""
    worth = 1e15 if device.device.type == "cuda" else 5e12  # a minute's work, guessed for a T4
    return 6 * model.num_parameters * train.batch_tokens * train.max_steps > worth


def windows_at_once(
    model: ModelConfig, train: TrainConfig, device: Device, processes: int = 1
) -> int:
    """Windows at once, a divisor of the windows of a step; each process has some of them.

    On a CPU as many as keep what the blocks hold for the backward pass below 192 MB, near its
    caches: more is slower. They are the same for up to four processes, and so are all bits. On a
    GPU as many as a quarter of its free memory takes.
    """
    windows = train.batch_tokens // model.max_position_embeddings
    on_gpu = device.device.type == "cuda"
    room = torch.cuda.mem_get_info()[0] // 4 if on_gpu else 192 << 20
    numbers = model.num_hidden_layers * (8 * model.hidden_size + 3 * model.intermediate_size)
    at_once = room // (device.dtype.itemsize * numbers * model.max_position_embeddings)
    at_once = min(at_once, windows // max(processes, 1 if on_gpu else 4))
    if train.micro_batch_size:
        at_once = min(train.micro_batch_size, windows // processes)
    whole = train.micro_batch_size or windows
    return max(d for d in range(1, whole + 1) if whole % d == 0 and d <= max(at_once, 1))


def estimate_memory(model: ModelConfig, train: TrainConfig) -> int:
    """Bytes that weights, gradients and optimizer state take in training, float32."""
    matrices = model.num_parameters - model.vocab_size * model.hidden_size
    states = 1 if train.optimizer == "muon" else 2
    return 4 * (
        2 * model.num_parameters + states * matrices + 2 * (model.num_parameters - matrices)
    )


@cache
def activation_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that a token's activations take in one block until the backward pass, uncompiled.

    Measured on the processor: what autograd keeps of 16 tokens in two blocks, less that in one.
    """

    def kept(layers: int) -> int:
        config = dataclasses.replace(
            model, num_hidden_layers=layers, vocab_size=MIN_VOCAB_SIZE, tie_word_embeddings=True
        )
        net = BitLM(dataclasses.replace(config, max_position_embeddings=16), seed=None)
        tensors: list[Tensor] = []  # kept alive, so that no address comes twice

        def note(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        ids = torch.zeros(1, 16, dtype=torch.int64)
        with (
            net.hold_weights(dtype),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            Device(torch.device("cpu"), dtype, "").autocast(),
        ):
            net.loss(ids, ids)
            weights = [*net.parameters(), *(layer.held for layer in net.bit_linears().values())]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        for weight in weights:
            found.pop(weight.untyped_storage().data_ptr() if weight is not None else 0, None)
        return sum(found.values())

    return (kept(2) - kept(1)) // 16


def memory_parts(
    model: ModelConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    processes: int = 1,
    windows: int = 1,
    device: str = "cuda",
) -> dict[str, int]:
    """Bytes on each of so many devices, by part, at the moment of a step that takes the most.

    That is when the loss of the second micro-batch, of so many windows, is there: gradients of the
    first and activations of the second. Or the update, where those were small. Counted are tensors;
    what an allocator keeps beyond them is its own affair (docs/scaling.md).
    """
    D, V, P = model.hidden_size, model.vocab_size, model.num_parameters
    kv, up = model.num_kv_heads * model.head_dim, 2 if model.block == "seed" else 3
    matrices = model.num_hidden_layers * (2 * D * D + 2 * D * kv + up * D * model.intermediate_size)
    states = 4 * (matrices if train.optimizer == "muon" else 2 * matrices) + 8 * (P - matrices)
    shared = processes if train.fsdp else 1
    exact = device == "cpu"  # see ExactSum
    always = {
        "weights": 4 * P // shared,
        "gradients": (8 if exact else 4) * P // shared,
        "optimizer": states // processes,
    }
    size, tokens = dtype.itemsize, windows * model.max_position_embeddings
    reduced, quantized = size < 4, model.linear != "dense"  # else what multiplies is the weight
    head = size * V * D if reduced or (quantized and not model.tie_word_embeddings) else 0
    held = head + (size * matrices if reduced or quantized else 0)
    logits = min(CHUNK_BYTES, 4 * V * tokens)
    work = {
        "quantized weights": head if train.fsdp else held,
        "gradient of the head": size * V * D,
        "loss": logits * (4 + size) // 4 + size * tokens * D,  # logits, their log-softmax; d_hidden
        "activations": activation_bytes(model, dtype) * model.num_hidden_layers * tokens,
    }
    if train.fsdp:
        two, one = (dataclasses.replace(model, num_hidden_layers=n) for n in (2, 1))
        block = two.num_parameters - one.num_parameters
        work["gathered embedding and head"] = 4 * (P - model.num_hidden_layers * block)
        came_in = block // 4 if quantized else 4 * block  # trits, see TritGather
        work["gathered blocks"] = 4 * block + came_in  # one, and what another came in
        under_way = (4 + 2 * (8 if exact else 4)) * block  # a block's gradient, sent with another's
        work["loss"] = max(work["loss"], under_way)  # whose memory is free then
    at_once = min(MESSAGES_UNDER_WAY * max(BUCKET_NUMBERS, V * D), P)
    update = {"messages": (8 if exact else 4) * at_once if processes > shared else 0}
    return always | max(work, update, key=lambda parts: sum(parts.values()))


def check_memory(
    model: ModelConfig, train: TrainConfig, device: Device, processes: int = 1
) -> None:
    """Refuse what cannot fit before anything of it is made; ValueError tells both sizes."""
    if device.device.type == "cuda":
        there = torch.cuda.mem_get_info()[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    needed = estimate_memory(model, train) // (processes if train.fsdp else 1)
    if needed > there:
        raise ValueError(
            f"{model.num_parameters:,} parameters need {needed / 2**30:,.1f} GiB for weights, "
            f"gradients and optimizer; {device.device} has {there / 2**30:,.1f} GiB. "
            "Choose a smaller hidden_size, num_hidden_layers or vocab_size, or --fsdp on several"
        )


@torch.no_grad()
def total_loss(
    model: BitLM, tokens: np.ndarray, first: int, device: Device, batch_size: int = 16
) -> float:
    """Nats of `tokens`, each predicted once, `first` standing before them; not per token.

    The text is cut into windows of the context length, so a token sees what is before it in its
    window only. The result does not depend on `batch_size`, but for rounding.
    """
    context, count, total = model.config.max_position_embeddings, len(tokens), 0.0
    with model.hold_weights(device.dtype), device.autocast():
        for start in range(0, count, context * batch_size):
            piece = tokens[start : start + context * batch_size].astype(np.int64)
            before = first if start == 0 else int(tokens[start - 1])
            whole = len(piece) // context * context
            for part, rows in ((piece[:whole], context), (piece[whole:], len(piece) - whole)):
                if len(part):
                    inputs = np.concatenate([[before], part[:-1]])
                    pair = torch.from_numpy(np.stack([inputs, part])).to(device.device)
                    x, y = pair.view(2, -1, rows)
                    total += model.loss(x, y).item()
                    before = int(part[-1])
    return total


def loss_calls(count: int, context: int, batch_size: int = 16) -> int:
    """How often `total_loss` calls the model for so many tokens."""
    batches, rest = divmod(count, context * batch_size)
    return batches + (rest >= context) + (rest % context > 0)


@torch.no_grad()
def sliding_loss(
    model: BitLM, tokens: np.ndarray, first: int, device: Device, stride: int, batch_size: int = 16
) -> float:
    """`total_loss`, but each token sees at least context - `stride` tokens before it.

    Windows of the context length end every `stride` tokens, and of all but the first only what the
    window before did not count is counted: context / stride times the work.
    """
    context, count, total = model.config.max_position_embeddings, len(tokens), 0.0
    inputs = torch.from_numpy(np.concatenate([[first], tokens[:-1]]).astype(np.int64))
    targets = torch.from_numpy(tokens.astype(np.int64))
    ends = [*range(min(context, count), count, stride), count]
    spans = zip([0, *ends], ends, strict=False)  # of the tokens that each window counts
    with model.hold_weights(device.dtype), device.autocast():
        for counted, same in itertools.groupby(spans, key=lambda span: span[1] - span[0]):
            for part in torch.tensor(list(same)).split(batch_size):
                rows = [inputs[max(end - context, 0) : end] for end in part[:, 1].tolist()]
                hidden = model.hidden(torch.stack(rows).to(device.device))[:, -counted:]
                y = torch.stack([targets[a:b] for a, b in part.tolist()]).to(device.device)
                logits = model.head(hidden).flatten(0, 1).float()
                total += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
    return total


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
    """How well the model predicts a text it is given: every token of it, once.

    Args:
        data: a source as `DataConfig.data`; of a folder, the training files.
        stride: move the context along by this many tokens, so that each token is predicted from
            at least context - stride tokens; default: by the whole context, which is fastest.

    Returns:
        loss: nats per token. perplexity: exp(loss). bits_per_byte: bits per byte of UTF-8 text.
        word_perplexity: exp(nats / words), where words are white-space words and line ends, so
        models with different vocabularies compare. tokens, words, bytes: the counts.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `read_pieces`; or no text in it.
    """
    device = device or choose_device()
    context = model.config.max_position_embeddings
    fits = stride is None or 1 <= stride <= context
    require(fits, "stride", stride, f"1 to {context} tokens, the context of this model")
    model.to(device.device)
    eot = end_of_text_id(tokenizer)
    ids: list[int] = []
    words = size = 0
    config = DataConfig(data=str(data), text_column=text_column)
    document_ended = False
    for text, ends in read_pieces(str(data), "train", config):
        if document_ended and eot is not None:
            ids.append(eot)
        ids.extend(encode(tokenizer, text))
        words += len(text.split()) + text.count("\n")
        size += len(text.encode("utf-8", "replace"))
        document_ended = ends
    if not ids:
        raise ValueError(f"data={str(data)!r}: no text in it to evaluate on")
    first = eot if eot is not None else 0
    if stride is None:
        nats = total_loss(model, np.asarray(ids), first, device, batch_size)
    else:
        nats = sliding_loss(model, np.asarray(ids), first, device, stride, batch_size)
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
    world: World = field(default_factory=World)
    """the processes that train together; callbacks hear of the first one's state"""
    step: int = 0
    """optimizer steps done"""
    skipped: int = 0
    """of these, steps left out because a gradient was not finite"""
    skipped_in_a_row: int = 0
    loss: float = math.nan
    """nats per token of the last step's batch"""
    val_loss: float = math.nan
    """of the last evaluation"""
    best_val_loss: float = math.inf
    best_step: int = 0
    evals_since_best: int = 0
    train_seconds: float = 0.0
    """of training, all sessions"""
    trits: dict[str, Tensor] = field(default_factory=dict)
    """of each BitLinear when last logged, int8"""
    stop_signal: int = 0
    """set by a signal handler or a callback; read after each step"""
    last_saved_step: int = 0
    """of the newest checkpoint that is safe on the disk"""
    last_saved_at: float = 0.0
    """when it was, time.time(); 0: not in this session"""
    save_seconds: float = 0.0
    """that training waited for saving, in this session"""
    mirror: Mirror | None = None
    """the copier to a second folder, with its `status()`"""
    save_requested: bool = False
    """set by a callback or a button: a checkpoint is saved after the running step"""
    paused: bool = False
    """set by a callback or a button: no further step until it is cleared"""

    _SAVED = (
        "step",
        "skipped",
        "skipped_in_a_row",
        "loss",
        "val_loss",
        "best_val_loss",
        "best_step",
        "evals_since_best",
        "train_seconds",
    )

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
        """Plain types and tensors, enough to go on as if never stopped."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            **{name: getattr(self, name) for name in self._SAVED},
            "model": self.world.wholes(self.model.state_dict()),
            "optimizers": [_optimizer_state(self.model, o, self.world) for o in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
            "trits": self.trits,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, possibly on another device.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: it is not of this model and optimizer.
        """
        saved = {"evals_since_best": 0, **saved}  # a run of before there was patience
        for name in self._SAVED:
            if not isinstance(saved[name], (int, float)):
                raise TypeError(f"{name} is {saved[name]!r:.80}")
            setattr(self, name, saved[name])
        weights, own = saved["model"], self.model.state_dict()
        self.model.load_state_dict({n: sharded_like(own[n], weights[n]) for n in weights})
        owners = self.world.owners(self.optimizers)
        shared = zip(parameters_of(self.optimizers), owners, strict=True)
        mine = {id(p) for p, owner in shared if owner == self.world.rank}
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            _load_optimizer_state(self.model, optimizer, state["state"], mine)
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"]["torch"])
        if torch.cuda.is_available() and len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        shapes = {name: layer.weight.shape for name, layer in self.model.bit_linears().items()}
        for name, trits in saved["trits"].items():
            if trits.shape != shapes[name]:
                raise ValueError(f"trits of {name} have shape {tuple(trits.shape)}")
        keeps = self.world.rank == 0 or not self.world.sharded  # they are the telemetry's
        self.trits = dict(saved["trits"]) if keeps else {}


def _optimizer_state(
    model: BitLM, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Any]:
    """An optimizer's tensors by parameter name; its rates are the configuration's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {names[id(p)]: dict(state) for p, state in optimizer.state.items()}
    return {"state": world.gathered(own)}


def _load_optimizer_state(
    model: BitLM, optimizer: torch.optim.Optimizer, state: dict[str, Any], mine: set[int]
) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = parameters_of([optimizer])
    by_number = {}
    for number, parameter in enumerate(parameters):  # as the optimizer itself numbers them
        tensors = state.get(names[id(parameter)], {})
        for key, tensor in tensors.items():
            if tensor.shape not in (parameter.shape, torch.Size([])):
                raise ValueError(f"{key} of {names[id(parameter)]} has shape {tuple(tensor.shape)}")
        if tensors and id(parameter) in mine:
            by_number[number] = {k: sharded_like(parameter, t) for k, t in tensors.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_number, "param_groups": groups})


class Callback:
    """What may be attached to `train`; override what is needed. To stop: set state.stop_signal."""

    def on_start(self, state: TrainState) -> None:
        """Before the first step of this session."""

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        """After every step; `metrics` is the line just logged, on steps that are."""

    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """After an evaluation."""

    def on_sample(self, state: TrainState, text: str) -> None:
        """After a text was written for the eye."""

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        """After a checkpoint was written and verified."""

    def on_mirror(self, state: TrainState, status: str) -> None:
        """Between steps, when the state of the mirror has changed."""

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
            self.bar.set_postfix_str(
                f"loss {metrics['loss']:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s",
                refresh=False,
            )
        self.bar.update()

    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None:
        self.bar.write(
            f"step {state.step}: validation loss {metrics['val_loss']:.4f}, "
            f"perplexity {metrics['val_perplexity']:.1f}",
            file=sys.stderr,
        )

    def on_sample(self, state: TrainState, text: str) -> None:
        self.bar.write(f"  | {' '.join(text.split())[:160]}", file=sys.stderr)

    def on_mirror(self, state: TrainState, status: str) -> None:
        assert state.mirror
        if (state.mirror.errors > 0) != self.mirror_failing:  # when it begins and when it ends
            self.mirror_failing = not self.mirror_failing
            self.bar.write(status, file=sys.stderr)

    def on_end(self, state: TrainState) -> None:
        self.bar.close()


class MetricsLog:
    """metrics.jsonl: one object a line, cut back to the step a run goes on from.

    Args:
        saved: the lines that the checkpoint holds; they count where the file lacks one of them.

    A line that the disk does not take is kept, and written with the next one. Without a path, as in
    all processes but the first, all are only kept.
    """

    def __init__(self, path: Path | None, step: int, saved: Sequence[dict[str, Any]] = ()) -> None:
        self.path = path
        there = [line for line in (self.read(path) if path else ()) if line["step"] <= step]
        self.lines = there if there[: len(saved)] == list(saved) else list(saved)
        self.behind = True
        self._catch_up()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All whole lines; a torn last one, as a kill leaves it, is not there."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    lines.append(json.loads(text))
        return [x for x in lines if isinstance(x, dict) and isinstance(x.get("step"), int)]

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if not self.path:
            return
        try:
            if self.behind or not self.path.is_file():
                self._catch_up()
            else:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        except OSError as error:
            if not self.behind:
                say(f"metrics.jsonl cannot be written ({error}); its lines are kept for later")
            self.behind = True

    def _catch_up(self) -> None:
        if self.path:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_atomically(self.path, text.encode())
        self.behind = False


class _Curves(Callback):
    """Hands every line of metrics.jsonl to `write`, in order, those of earlier sessions first.

    An error ends the writing for this session, not the training; the next one makes up for it.
    """

    write: Callable[[dict[str, Any]], None]
    close: Callable[[], None]

    def __init__(self, out: str | Path) -> None:
        self.out, self.failed = Path(out), False
        self.library = library(type(self).__name__.lower(), type(self).__name__)

    def on_start(self, state: TrainState) -> None:
        for line in MetricsLog.read(self.out / "metrics.jsonl"):
            self._try(lambda line=line: self.write(line))

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        if metrics:
            self._try(lambda: self.write(metrics))

    on_eval = on_step

    def on_end(self, state: TrainState) -> None:
        self._try(lambda: self.close())

    def _try(self, work: Callable[[], None]) -> None:
        try:
            if not self.failed:
                work()
        except Exception as error:  # a full disk, no network: training goes on
            self.failed, name = True, type(self).__name__
            what = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
            say(f"{name}: {what}. Nothing more goes there in this session; metrics.jsonl has it")


def curve_points(line: dict[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl, named for charts: `train/loss`, `flip_rate/layer_03`."""
    kind = "final" if line.get("final") else "validation" if "val_loss" in line else "train"
    points = {}
    for name, value in line.items():
        if isinstance(value, list):
            points |= {f"{name}/layer_{layer:02}": x for layer, x in enumerate(value)}
        elif name not in ("step", "final"):
            points[f"{kind}/{name}"] = value
    return points


class TensorBoard(_Curves):
    """What metrics.jsonl holds, for `tensorboard --logdir OUT/tensorboard`.

    Each session writes the whole curve anew and has TensorBoard forget what it read before, so
    that no step is there twice and none that was rolled back. ImportError: it is not installed.
    """

    writer: Any = None

    def write(self, line: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-not-found]
        from torch.utils.tensorboard.writer import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=0)
        points = [{"tag": tag, "simple_value": x} for tag, x in curve_points(line).items()]
        # in one event: add_scalar writes one a number, which takes twenty times as long
        self.writer.file_writer.add_summary(Summary(value=points), line["step"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


class WandB(_Curves):
    """What metrics.jsonl holds, at Weights & Biases; ImportError: it is not installed.

    All sessions of a run, on whatever machine, go on with one run there: its id is made of the
    first training line. W&B takes no step twice, so of steps that were rolled back it keeps what
    came first; where the resume is exact, the same would have come again. Where the network is
    down, W&B gives up after a minute and a half, for which training waits. WANDB_MODE=offline
    leaves the whole curve of each session in OUT/wandb: `wandb sync` the newest.
    """

    def __init__(self, out: str | Path, project: str = "bitllm") -> None:
        super().__init__(out)
        self.project, self.run, self.first = project, None, 0
        self.waiting: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any]) -> None:
        self.waiting.append(line)
        if self.run is None and "train_seconds" in line:  # with times no two runs are alike
            self.run = self.library.init(
                project=self.project,
                dir=str(self.out),
                id=hashlib.sha256(json.dumps(line).encode()).hexdigest()[:16],
                name=self.out.resolve().name,
                resume="allow",
                config=read_json(self.out / "config.json"),
            )
            self.first = self.run.step  # the one after the last that is there
        while self.run and self.waiting:
            line = self.waiting.pop(0)
            if line["step"] >= self.first:
                self.run.log(curve_points(line), step=line["step"])

    def close(self) -> None:
        if self.run:
            self.run.finish()


@contextlib.contextmanager
def _stop_on_signals(state: TrainState) -> Iterator[None]:
    """Ctrl-C and SIGTERM set a flag read between steps; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if state.stop_signal:
            raise KeyboardInterrupt
        state.stop_signal = number
        say("stopping: this step ends, then a checkpoint is saved (again: stop at once)")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


SAVE_RETRY_S = 60.0
"""Seconds until a checkpoint that could not be saved is tried again."""
MAX_SKIPPED_STEPS = 25
"""Non-finite steps in a row that end a run. float16's first loss scale takes some to settle."""

_MAY_CHANGE = ("micro_batch_size", "device", "dtype", "compile", "deterministic", "max_steps")
_MAY_CHANGE += ("patience", "fsdp")
_MAY_CHANGE += ("log_every_steps", "eval_every_steps", "eval_tokens", "sample_prompt")
_MAY_CHANGE += ("save_every_steps", "save_every_minutes", "save_every_epoch", "keep_checkpoints")


def _refuse_differences(where: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run keeps its settings on its way, but for those of `_MAY_CHANGE`."""
    found = []
    for part in ("model", "data", "train"):
        for name, value in now[part].items():
            there = saved[part][name]
            if there != value and not (part == "train" and name in _MAY_CHANGE):
                found.append(f"{name} (run: {there}, asked: {value})")
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
    ours = ("tokenizer.json", "metrics.jsonl", "data", LOCK_NAME)
    strange = [n for n in names if n not in ours and ".tmp" not in n and _SET_ASIDE not in n]
    if strange:
        raise ValueError(
            f"{folder}: not a run folder (no config.json) and not empty "
            f"({', '.join(sorted(strange)[:3])}); choose another"
        )


def check_mirror(out: Path, mirror: Path) -> None:
    """ValueError for a folder that cannot be a mirror of `out`."""
    if not mirror.absolute().parent.is_dir():
        raise ValueError(
            f"mirror={str(mirror)!r}: expected a folder in one that exists; "
            f"{mirror.parent} does not. Is the drive mounted?"
        )
    one, other = out.resolve(), mirror.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"mirror={str(mirror)!r}: expected a folder apart from {out}")
    with contextlib.suppress(OSError):  # not readable now; it is tried again
        check_run_folder(mirror)


_SET_ASIDE = "set-aside-"


def set_aside(folder: Path, keep_data: bool) -> None:
    """Move what a run left to a folder inside it, so that another can begin; nothing is lost."""
    ours = [LOCK_NAME, *(["data", "tokenizer.json"] if keep_data else [])]
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    moved = [name for name in names if name not in ours and not name.startswith(_SET_ASIDE)]
    if not moved:
        return
    numbers = (folder / f"{_SET_ASIDE}{n}" for n in itertools.count(1))
    target = next(path for path in numbers if not path.exists())
    target.mkdir()
    for name in moved:
        (folder / name).rename(target / name)
    say(f"{folder}: the run in it was moved to {target}")


def open_run(
    out: Path, configs: dict[str, Any], resume: str, mirror: Path | None = None
) -> dict[str, Any] | None:
    """The checkpoint to go on from; None to begin. Nothing is changed but what the mirror lends.

    Raises:
        ValueError: other settings, remains of which nothing is whole, or `resume` asks for what is
            not so.
    """
    places = [place for place in (out, mirror) if place]
    saved = None
    for place in places:
        if (place / "config.json").is_file():
            try:
                saved = read_run_config(place)
            except ValueError as error:
                say(f"passed over: {error}")
            else:
                _refuse_differences(place, saved, configs)
    try:
        checkpoint = newest_checkpoint(
            out / "checkpoints", mirror=mirror / "checkpoints" if mirror else None
        )
        remains = [] if checkpoint else [list_checkpoints(p / "checkpoints") for p in places]
    except OSError as error:
        raise ValueError(
            f"{error}: whether there is a run to go on from is not known. Mount the drive, or "
            "leave --mirror out"
        ) from error
    if checkpoint is None:
        if any(remains) or (saved is None and (out / "config.json").is_file()):
            raise ValueError(
                f"{out}: there are remains of a run, but no checkpoint that is whole. Nothing was "
                "changed; --resume never begins anew and moves the remains to a folder set-aside-1"
            )
        if resume == "must":
            raise ValueError(f"{out}: resume=must, but there is no checkpoint to go on from")
        return None
    then = checked_settings(checkpoint.get("config"), out / "checkpoints")
    _refuse_differences(out, then, configs)
    before, now = then["train"]["max_steps"], configs["train"]["max_steps"]
    require(
        now >= checkpoint["step"],
        "max_steps",
        now,
        f"at least {checkpoint['step']}, which this run has done already",
    )
    if before != now:
        say(f"max_steps: {before} -> {now}; the schedule now ends there, and the rate follows it")
    return checkpoint


class _Trainer:
    """The parts of one session that `train` puts together; not for use outside."""

    def __init__(
        self,
        model_config: ModelConfig,
        data_config: DataConfig,
        config: TrainConfig,
        out: Path,
        world: World,
        lock: FolderLock | None,
        callbacks: Sequence[Callback],
    ) -> None:
        self.model_config, self.config, self.out = model_config, config, out
        self.world, self.lock, self.callbacks = world, lock, callbacks
        self.settings = {
            "model": asdict(model_config),
            "data": asdict(data_config),
            "train": asdict(config),
        }
        self.context = model_config.max_position_embeddings
        self.device = choose_device(config.device, config.dtype)
        check_memory(model_config, config, self.device, world.size)
        prepare = partial(prepare_data, data_config, model_config.vocab_size, self.context, out)
        prepared = world.first(prepare)
        if not prepared and not same_data(out, data_config, model_config.vocab_size):
            raise FileNotFoundError(
                f"{out}: the tokens that the first process left there are not to be seen from here "
                f"({platform.node()}). Processes on several machines need a folder that all share"
            )
        self.data, self.tokenizer = prepared or prepare()
        self.micro_batch = windows_at_once(model_config, config, self.device, world.size)
        torch.manual_seed(config.seed)  # nothing draws from it yet; a checkpoint holds its state
        world.sharded = config.fsdp
        if world.sharded:  # they compute together, each the same number of times
            self.micro_batch = -int(world.most(-self.micro_batch))
            model, self.sums = sharded_model(model_config, config.seed, self.device.device)
        else:
            model = BitLM(model_config, config.seed).to(self.device.device)
        optimizers = make_optimizers(model, config)
        self.state = TrainState(model, optimizers, self.device.scaler(), config, world)
        self.sum = ExactSum(parameters_of(optimizers))
        self.loss: Callable[[Tensor, Tensor], Tensor] = model.loss
        self.unproven = False  # compiled, but no step has shown yet that it works
        self.log: MetricsLog  # from when it is known which step a run goes on from
        self.writer = CheckpointWriter(out / "checkpoints", keep_of(config))
        self.last_save = time.monotonic()
        self.begun_step = -1  # of the newest checkpoint begun
        self.retry_at = math.inf  # when a failed save is tried again
        self.mirror_status = ""

    def tell(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.state, *values)

    def announce(self) -> None:
        """What is going to happen, in four lines."""
        model, config = self.model_config, self.config
        epochs = config.max_steps / self.data.steps_per_epoch(config, self.context)
        counts = self.data.manifest
        say(
            f"model: {model.num_parameters / 1e6:.2f}M parameters, {model.linear}, on {self.device}"
        )
        say(
            f"data: {counts['train']['tokens']:,} training and "
            f"{counts['validation']['tokens']:,} validation tokens; {epochs:.1f} epochs"
        )
        say(
            f"steps: {config.max_steps} of {config.batch_tokens:,} tokens, "
            f"{self.micro_batch} windows of {self.context} at once"
            + (f" on each of {self.world.size} processes" if self.world.size > 1 else "")
        )
        for limit in model.export_limits:
            say(f"note: this model trains, but not every client will load it: {limit}")

    def compile(self) -> None:
        """Wrap the loss in torch.compile where asked for, or where it pays."""
        asked, why_not = self.config.compile, why_not_compile(self.device)
        why_not = "not with fsdp" if self.world.sharded else why_not
        wanted = asked == "on" or (
            asked == "auto" and _pays_to_compile(self.model_config, self.config, self.device)
        )
        if wanted and why_not:
            say(f"torch.compile: off ({why_not})")
        elif wanted:
            say("torch.compile: on; the first step takes some ten seconds longer")
            try:  # it also imports the compiler
                self.loss = compiled_loss(self.state.model)
                self.unproven = True
            except Exception as error:
                self.back_to_eager(error)

    def back_to_eager(self, error: Exception) -> None:
        say(f"torch.compile: off ({type(error).__name__}: {first_line(error)})")
        self.loss, self.unproven = self.state.model.loss, False

    def backward(self, batch: Tensor) -> float:
        """Loss of the windows in `batch`, (windows, T + 1), its gradient accumulated.

        It is the share of these windows in the mean over all tokens of the step.
        """
        tokens, shares = self.config.batch_tokens, []
        for part in batch.split(self.micro_batch):
            part = part.to(self.device.device, non_blocking=True)
            with self.device.autocast():
                loss = self.loss(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / tokens
            self.state.scaler.scale(loss).backward()
            shares.append(loss.detach())
        return math.fsum(torch.stack(shares).tolist())

    def backward_sharded(self, batch: Tensor) -> float:
        """`backward` in as many turns as the largest share of a process takes.

        Blocks are gathered in each, so all have to take part; one's own may count for nothing.
        """
        tokens, shares = self.config.batch_tokens, []
        turns = -(-tokens // (self.context * self.micro_batch) // self.world.size)
        parts = batch.split(self.micro_batch)
        for part_sum in self.sums:
            part_sum.clear()
        with told_of_the_dead():
            for turn in range(turns):
                if self.sums:  # they hold the gradients of the turns before
                    self.state.model.zero_grad()
                counts = turn < len(parts)
                part = parts[turn] if counts else batch[:1]
                part = part.to(self.device.device, non_blocking=True)
                with self.device.autocast():
                    loss = self.loss(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / tokens
                loss = loss if counts else loss * 0
                self.state.scaler.scale(loss).backward()
                shares.append(loss.detach())
            return math.fsum(torch.stack(shares).tolist())

    def backward_or_less(self, batch: Tensor) -> float:
        """`backward`; in halves when the GPU's memory does not do, eager when compiling fails."""
        while True:
            try:
                return self.backward(batch)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                smaller = [d for d in range(1, self.micro_batch) if self.micro_batch % d == 0]
                self.micro_batch = smaller[-1]
                say(f"out of GPU memory: {self.micro_batch} windows at once from here on")
            except Exception as error:
                if not self.unproven:
                    raise
                if self.state.stop_signal:  # it reaches the compiler's helpers too
                    raise KeyboardInterrupt from error
                self.back_to_eager(error)
            for optimizer in self.state.optimizers:
                optimizer.zero_grad()
            self.sum.clear()
            if self.device.device.type == "cuda":
                torch.cuda.empty_cache()

    def gradients(self, batch: Tensor) -> float:
        """The share of the loss of `batch`; each parameter has the gradient of the whole step."""
        parameters = parameters_of(self.state.optimizers)
        on_gpu = self.device.device.type == "cuda"  # which has neither room nor use for it
        if on_gpu or (self.world.size == 1 and self.micro_batch == len(batch)):
            share = self.backward_or_less(batch)
            self.world.add_up(p.grad for p in parameters if p.grad is not None)
            return share
        with self.sum:
            share = self.backward_or_less(batch)
        self.sum.write(self.world)
        return share

    def train_step(self) -> float:
        """One optimizer step; returns the norm of its gradient."""
        state = self.state
        windows = self.data.batch(self.config, self.context, state.step)
        part = self.world.part(len(windows) // self.micro_batch)
        batch = windows[part.start * self.micro_batch : part.stop * self.micro_batch]
        if self.world.sharded:
            share = self.backward_sharded(torch.from_numpy(batch))
        else:
            with state.model.hold_weights(self.device.dtype):
                share = self.gradients(torch.from_numpy(batch))
        state.loss = self.world.total(share)
        smallest = -int(self.world.most(-self.micro_batch))
        if smallest < self.micro_batch:
            say(f"another process is out of memory: {smallest} windows at once from here on")
            self.micro_batch = smallest
        self.unproven = False
        factor = learning_rate_factor(self.config, state.step)
        limit = self.config.max_grad_norm
        norm = apply_gradients(state.optimizers, state.scaler, factor, limit, self.world)
        state.step += 1
        if math.isfinite(norm):
            state.skipped_in_a_row = 0
        else:
            state.skipped += 1
            state.skipped_in_a_row += 1
        return norm

    def telemetry(self) -> dict[str, list[float]]:
        """Per layer: share of zeros, and of trits that changed since the last call."""
        if self.model_config.linear == "dense":
            return {}
        zeros, flips, sizes = (np.zeros(self.model_config.num_hidden_layers) for _ in range(3))
        for name, linear in self.state.model.bit_linears().items():
            if name == "lm_head":
                continue
            layer, weight = int(name.split(".")[2]), all_rows(linear.weight.detach())
            trits = weight_quant(weight)[0].to(torch.int8).cpu()
            sizes[layer] += trits.numel()
            if self.world.sharded and self.world.rank:
                continue  # it only had to give its rows
            zeros[layer] += (trits == 0).sum().item()
            if name in self.state.trits:
                flips[layer] += (trits != self.state.trits[name]).sum().item()
            self.state.trits[name] = trits
        return {
            "zero_fraction": [round(z, 6) for z in zeros / sizes],
            "flip_rate": [round(f, 6) for f in flips / sizes],
        }

    def step_metrics(self, norm: float, tokens_per_s: float) -> dict[str, Any]:
        state = self.state
        factor = learning_rate_factor(self.config, state.step - 1)
        return {
            "step": state.step,
            "loss": state.loss,
            "learning_rate": peak_rates(self.model_config, self.config)[0] * factor,
            "grad_norm": norm,
            "tokens": state.tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "memory_bytes": memory_in_use(self.device),
            "train_seconds": round(state.train_seconds, 3),
            **self.telemetry(),
        }

    def evaluate(self, whole: bool) -> dict[str, Any]:
        """Loss on a fixed slice of the validation tokens, or on all of them."""
        tokens = self.data.validation if whole else self.data.validation[: self.config.eval_tokens]
        first, part = end_of_text_id(self.tokenizer) or 0, self.world.part(len(tokens))
        begin, end = (at // self.context * self.context for at in (part.start, part.stop))
        end = len(tokens) if self.world.rank == self.world.size - 1 else end
        first = int(tokens[begin - 1]) if begin else first
        if self.world.sharded:
            nats = self.total_loss_sharded(tokens[begin:end], first)
        else:
            nats = total_loss(self.state.model, tokens[begin:end], first, self.device)
        loss = self.world.total(nats) / len(tokens)
        return {
            "step": self.state.step,
            "val_loss": loss,
            "val_perplexity": safe_exp(loss),
            "val_bits_per_byte": loss / math.log(2) / self.data.bytes_per_token,
            "val_tokens": len(tokens),
            **({"final": True} if whole else {}),
        }

    def total_loss_sharded(self, tokens: np.ndarray, first: int) -> float:
        """`total_loss`, and as many computations more as others take that have more tokens."""
        model, calls = self.state.model, loss_calls(len(tokens), self.context)
        spare = int(self.world.most(calls)) - calls
        with told_of_the_dead():
            nats = total_loss(model, tokens, first, self.device)
            for _ in range(spare):
                total_loss(model, self.data.validation[:1], first, self.device)
        reshard(model)
        return nats

    def sample(self) -> str:
        """A text of fixed seed; it touches no random state of the training."""
        sampling = SamplingConfig(max_new_tokens=60, seed=0)
        prompt, model = self.config.sample_prompt, self.state.model
        if self.world.sharded:
            weights = self.world.wholes(model.state_dict())
            if not weights:
                return ""
            with torch.device("meta"):
                model = BitLM(self.model_config, seed=None)
            model.load_state_dict(weights, assign=True)
            del weights  # each goes as its layer is packed
            model.fill_rope()
            model.freeze()
        return prompt + generate(model, self.tokenizer, prompt, sampling)

    def checkpoint_contents(self, kind: str) -> dict[str, Any]:
        """All of a run but its tokens; of the best, what generating needs."""
        state = self.state
        if kind == "best":
            contents = {"step": state.step, "val_loss": state.val_loss}
            contents["model"] = self.world.wholes(state.model.state_dict())
        else:
            contents = state.state_dict() | {
                "metrics": self.log.lines,
                "tokenizer_sha256": self.data.manifest["tokenizer_sha256"],
                "data_sha256": self.data.sha256,
                "device": str(self.device),
                "micro_batch": self.micro_batch,
                "processes": self.world.size,
            }
        text = self.tokenizer.to_str()
        return {**contents, "config": self.settings, "tokenizer": text, "versions": versions()}

    def write_settings(self) -> None:
        """What a run folder holds beside its checkpoints, where it is not there or has changed."""
        self.out.mkdir(parents=True, exist_ok=True)
        config = {"format_version": FORMAT_VERSION, **self.settings}
        if read_json(self.out / "config.json") != json.loads(json.dumps(config)):
            write_atomically(self.out / "config.json", json.dumps(config, indent=1).encode())
        if not (self.out / "tokenizer.json").is_file():
            text = self.tokenizer.to_str(pretty=True)
            write_atomically(self.out / "tokenizer.json", text.encode())

    def save(self, kind: str = "step") -> None:
        """Begin a checkpoint; a disk that refuses does not end the training."""
        if kind == "step":
            self.state.save_requested = False
            if not self.world.most(self.begun_step != self.state.step):  # asked for twice
                return
        start = time.perf_counter()
        contents = self.checkpoint_contents(kind)  # every process gives its part
        if self.lock:
            self.write(contents, kind, self.lock)
        self.state.save_seconds += time.perf_counter() - start
        if kind == "step":
            self.last_save, self.begun_step = time.monotonic(), self.state.step

    def write(self, contents: dict[str, Any], kind: str, lock: FolderLock) -> None:
        if lock.taken():
            raise ValueError(
                f"{self.out}: another process has taken this run over; stopped at step "
                f"{self.state.step}, the last checkpoint of this one is of step "
                f"{self.state.last_saved_step}"
            )
        try:
            self.write_settings()
            self.writer.save(contents, kind)
        except OSError as error:
            self.save_failed(f"{kind}_{self.state.step:08d}", error)

    def save_failed(self, name: str, error: OSError) -> None:
        last = self.state.last_saved_step
        good = f"the last good one is of step {last}" if last else "there is no good one yet"
        say(f"checkpoint {name} could not be saved: {error}. Training goes on; {good}")
        if name.startswith("step"):
            self.begun_step, self.retry_at = -1, time.monotonic() + SAVE_RETRY_S

    def collect_saves(self, wait: bool = False) -> None:
        """Tell of checkpoints that have become safe, or have not, since the last call."""
        for name, result in self.writer.finished(wait):
            if isinstance(result, OSError):
                self.save_failed(name, result)
            elif name.startswith("step"):
                self.state.last_saved_step = checkpoint_step(result)
                self.state.last_saved_at, self.retry_at = time.time(), math.inf
                self.tell("on_checkpoint", result)

    def save_to_the_end(self) -> None:
        """Save this step and wait until it is safe; OSError where it cannot be."""
        self.collect_saves(wait=True)
        if self.world.most(self.begun_step != self.state.step):
            self.save()
            self.collect_saves(wait=True)
        self.state.last_saved_step = int(self.world.most(self.state.last_saved_step))
        if self.state.last_saved_step != self.state.step:
            raise OSError(
                f"step {self.state.step} could not be saved in {self.out} (see above); the last "
                f"good checkpoint is of step {self.state.last_saved_step}. Make room or mend the "
                "disk, then train again: it goes on from there"
            )

    def watch_mirror(self) -> None:
        mirror = self.state.mirror
        if mirror and (status := mirror.status()) != self.mirror_status:
            self.mirror_status = status
            self.tell("on_mirror", status)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint; other versions or another device are said, not refused."""
        try:
            self._restore(checkpoint)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.out}: its checkpoint of step {checkpoint['step']} is not of this run "
                f"({first_line(error)}); nothing was changed. Choose another --out, or begin anew "
                "with --resume never"
            ) from error

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        for name in ("tokenizer_sha256", "data_sha256"):
            there = {**self.data.manifest, "data_sha256": self.data.sha256}
            if checkpoint[name] != there[name]:
                raise ValueError(
                    f"it was trained on other tokens: {name} differs; put tokenizer.json and data/ "
                    "back"
                )
        now = {**versions(), "device": str(self.device), "processes": self.world.size}
        now["fsdp"] = self.config.fsdp
        before = {**checkpoint["versions"], "device": checkpoint["device"]}
        before["processes"] = checkpoint.get("processes", 1)
        before["fsdp"] = checkpoint["config"]["train"].get("fsdp", False)
        micro, windows = int(checkpoint["micro_batch"]), self.config.batch_tokens // self.context
        if not self.config.micro_batch_size and windows // micro >= self.world.size:
            self.micro_batch = micro
        if self.micro_batch == micro and not self.config.fsdp and self.device.device.type == "cpu":
            now.pop("processes")  # ExactSum
        changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
        if changed:
            say(f"note: not bit for bit as before, for these changed: {', '.join(changed)}")
        check_weights(self.model_config, checkpoint["model"], self.out / "checkpoints")
        self.state.load_state_dict(checkpoint)
        self.state.last_saved_step = self.begun_step = self.state.step

    def save_is_due(self) -> bool:
        config, step = self.config, self.state.step
        if self.state.save_requested:
            return True
        by_steps = config.save_every_steps and step % config.save_every_steps == 0
        minutes = (time.monotonic() - self.last_save) / 60
        by_time = config.save_every_minutes and minutes >= config.save_every_minutes
        return bool(by_steps or by_time or time.monotonic() >= self.retry_at)

    def epoch_ended(self) -> bool:
        per_epoch = self.data.steps_per_epoch(self.config, self.context)
        return self.state.step // per_epoch > (self.state.step - 1) // per_epoch

    def after_step(self) -> None:
        """Evaluate, write a sample and save, each where it is due."""
        state, config = self.state, self.config
        if config.eval_every_steps and state.step % config.eval_every_steps == 0:
            metrics = self.evaluate(whole=False)
            self.log.write(metrics)
            state.val_loss = metrics["val_loss"]
            self.tell("on_eval", metrics)
            self.tell("on_sample", self.sample())
            state.evals_since_best += 1
            if state.val_loss < state.best_val_loss:
                state.best_val_loss, state.best_step = state.val_loss, state.step
                state.evals_since_best = 0
                self.save("best")
        if config.save_every_epoch and self.epoch_ended():
            self.save("epoch")
        if self.world.most(self.save_is_due()):
            self.save()
        self.collect_saves()
        self.watch_mirror()

    def stop_asked(self) -> bool:
        """Whether any process has been told to stop; the same answer in all."""
        number = int(self.world.most(self.state.stop_signal))
        self.state.stop_signal = number or self.state.stop_signal  # one may have come just now
        return number != 0

    def tokens_came(self) -> bool:
        """Whether the next step's tokens are there, after waiting for them; False: stop first."""
        data, state, started = self.data, self.state, time.monotonic()
        while data.streamed and self.world.most(
            not data.ready(self.config, self.context, state.step)
        ):
            if self.world.most(data.error is not None):
                state.stop_signal = state.stop_signal or signal.SIGTERM
            if self.stop_asked():
                return False
            if started < time.monotonic() - 10:
                say(f"waiting for more text to come in; {len(data.training):,} tokens are there")
                started = time.monotonic() + 50
            time.sleep(0.1)
        return True

    def run(self) -> None:
        """Steps until all are done, a signal came, or the loss stays non-finite."""
        state, config = self.state, self.config
        steps_logged, started = 0, time.perf_counter()
        while not state.finished and not self.stop_asked():
            if not self.tokens_came():
                continue
            start = time.perf_counter()
            norm = self.train_step()
            state.train_seconds += time.perf_counter() - start
            steps_logged += 1
            metrics = None
            if state.step % config.log_every_steps == 0 or state.step == config.max_steps:
                elapsed = time.perf_counter() - started
                speed = steps_logged * config.batch_tokens / elapsed
                metrics = self.step_metrics(norm, speed)
                self.log.write(metrics)
            self.tell("on_step", metrics)
            if state.skipped_in_a_row >= MAX_SKIPPED_STEPS:
                raise FloatingPointError(
                    f"{MAX_SKIPPED_STEPS} steps in a row had no finite gradient; stopped at step "
                    f"{state.step}. The last checkpoint in {self.out} is from before. Try a lower "
                    "learning_rate, or --dtype float32"
                )
            self.after_step()
            if metrics:
                steps_logged, started = 0, time.perf_counter()
            started += self.wait_while_paused()

    def wait_while_paused(self) -> float:
        """Seconds spent here, which belong to no step; stopping and saving work meanwhile."""
        start = time.perf_counter()
        while self.world.most(self.state.paused) and not self.stop_asked():
            self.tell("on_pause")
            if self.world.most(self.state.save_requested):
                self.save()
            self.collect_saves()
            self.watch_mirror()
            time.sleep(0.1)
        return time.perf_counter() - start

    def finish(self) -> None:
        """Save and evaluate on everything, once."""
        state = self.state
        if state.step < self.config.max_steps:
            say(
                f"ended early at step {state.step} of {self.config.max_steps}: no better "
                f"validation loss in {self.config.patience} evaluations. The best, "
                f"{state.best_val_loss:.4f} at step {state.best_step}, is kept (--checkpoint "
                "best); --patience 0 goes on all the same"
            )
        self.save_to_the_end()
        metrics = self.evaluate(whole=True)
        self.log.write(metrics)
        self.state.val_loss = metrics["val_loss"]
        self.tell("on_eval", metrics)

    def session(self) -> None:
        """Train to the end or to a stop, and leave everything safe."""
        coming = self.data.coming(self.tokenizer) if self.lock else contextlib.nullcontext()
        with _stop_on_signals(self.state), coming:
            self.tell("on_start")
            try:
                self.run()
                if self.stop_asked():
                    self.save_to_the_end()
                else:
                    self.finish()
            finally:
                self.collect_saves(wait=True)
                self.writer.worker.shutdown()
                self.tell("on_end")
            self.close_mirror()
            if self.data.error:
                raise ConnectionError(
                    f"data={self.settings['data']['data']!r} could not be read on "
                    f"({first_line(self.data.error)}). Step {self.state.step} is saved; the same "
                    "command goes on from there"
                ) from self.data.error

    def close_mirror(self) -> None:
        if self.state.mirror:
            self.state.mirror.close()
            say(self.state.mirror.status())


def memory_in_use(device: Device) -> int:
    """Most bytes held so far: on the GPU, or by this process."""
    if device.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Of what decides the bits of a run."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


@contextlib.contextmanager
def _repeatable_kernels(wanted: bool) -> Iterator[None]:
    """`deterministic`, for the time of a training."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def keep_of(config: TrainConfig) -> dict[str, int]:
    """How many checkpoints stay, by kind; those of epochs all do, and are not mirrored."""
    return {"step": config.keep_checkpoints, "best": 1}


def _fetch_data(mirror: Path, out: Path, config: DataConfig, vocab_size: int) -> None:
    """Token files that only the mirror has: tokenising anew takes long and may need a network."""
    if same_data(out, config, vocab_size) or not same_data(mirror, config, vocab_size):
        return
    (out / "data").mkdir(exist_ok=True)
    there = Folder(mirror / "data")
    for name in ("train.bin", "validation.bin", "manifest.json"):
        if name in there.names():  # of a stream, what trains comes from its source again
            copy_file(there, name, Folder(out / "data"))
    say(f"fetched {mirror / 'data'}")


def _bring_back(
    out: Path, mirror: Path | None, data_config: DataConfig, checkpoint: dict[str, Any]
) -> None:
    """Complete a run folder that only the mirror or only its checkpoints have kept."""
    path = out / "tokenizer.json"
    try:
        load_tokenizer(path)
    except (ValueError, FileNotFoundError) as error:
        say(f"{first_line(error)}: taken from the checkpoint")
        tokenizer = tokenizer_from(str(checkpoint.get("tokenizer")), out / "checkpoints")
        write_atomically(path, tokenizer.to_str(pretty=True).encode())
    if mirror:
        vocab_size = checkpoint["config"]["model"]["vocab_size"]
        try:
            _fetch_data(mirror, out, data_config, vocab_size)
            newest_checkpoint(out / "checkpoints", "best", mirror / "checkpoints")
        except OSError as error:
            say(f"passed over: {error}")


def _final_metrics(lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """The last evaluation of a finished run; empty where it is not finished."""
    found = (line for line in lines if line.get("final") and line["step"] == step)
    return next((line for line in found if isinstance(line.get("val_loss"), float)), {})


def _train(
    configs: tuple[ModelConfig, DataConfig, TrainConfig],
    out: Path,
    resume: str,
    world: World,
    lock: FolderLock | None,
    copier: Mirror | None,
    callbacks: Sequence[Callback],
) -> TrainState:
    """`train`, alone in its folders; `lock` and `copier` are the first process' own."""
    model_config, data_config, train_config = configs
    mirror = copier.folder if copier else None

    def begin() -> dict[str, Any] | None:
        if resume == "never":
            for place in (out, mirror):
                if place:
                    set_aside(place, same_data(place, data_config, model_config.vocab_size))
        names = ("model", "data", "train")
        settings = {name: asdict(part) for name, part in zip(names, configs, strict=True)}
        checkpoint = open_run(out, settings, resume, mirror)
        if checkpoint:
            _bring_back(out, mirror, data_config, checkpoint)
        return checkpoint

    checkpoint = world.first(begin)
    step = int(world.most(checkpoint["step"] if checkpoint else -1))
    if step >= 0 and not checkpoint:
        path = out / "checkpoints" / f"step_{step:08d}.safetensors"
        checkpoint = load_checkpoint(path, mapped=train_config.fsdp)
    trainer = _Trainer(model_config, data_config, train_config, out, world, lock, callbacks)
    state = trainer.state
    state.mirror = trainer.writer.mirror = copier
    saved_metrics = checkpoint.get("metrics", []) if checkpoint else []
    if checkpoint:
        trainer.restore(checkpoint)
        del checkpoint
    if lock:
        trainer.write_settings()
    path = out / "metrics.jsonl" if lock else None
    trainer.log = MetricsLog(path, state.step, saved_metrics)
    final = _final_metrics(trainer.log.lines, state.step)
    if copier:
        copier.offer_newest()
    if state.finished and world.most(bool(final)):
        state.val_loss = final.get("val_loss", state.val_loss)
        trainer.close_mirror()
        return state
    trainer.announce()
    if state.step:
        say(f"going on from step {state.step} of {train_config.max_steps}")
    if not state.finished:
        trainer.compile()
    trainer.session()
    return state


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
    """Train, or go on where the run in `out` stopped, exactly as if it had not.

    Args:
        out: run folder: config.json, tokenizer.json, data/, metrics.jsonl, checkpoints/.
        resume: "auto" goes on where there is something, "must" refuses where there is nothing;
            "never" begins anew and moves what is there to a folder set-aside-N in `out`.
        mirror: a second folder that checkpoints are copied to in the background, such as one on a
            mounted drive; a run is also gone on with from there. Its parent must exist.
        callbacks: see `Callback`; default: a progress bar.

    Under torchrun, the processes share the work; the first alone writes and calls back.

    Returns:
        the state after the last step; its `stop_signal` is set when it was interrupted, after a
        checkpoint. A finished run comes back at once.

    Raises:
        ValueError: settings that cannot be, that differ from the run's, or a folder that another
            process writes to, before any work.
        FloatingPointError: the loss does not come back to finite numbers.
        OSError: the last checkpoint of a session could not be saved.
    """
    out = Path(out)
    mirror = Path(mirror).expanduser() if mirror else None
    require(resume in ("auto", "never", "must"), "resume", resume, "auto, never or must")
    check_configs(model_config, train_config)
    device = choose_device(train_config.device)
    several = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        several > 1 or not train_config.fsdp,
        "fsdp",
        True,
        "several processes, as of torchrun --nproc-per-node=2 bitllm_core.py train ...",
    )
    check_memory(model_config, train_config, device, several)
    callbacks = [ProgressBar()] if callbacks is None else callbacks
    configs = (model_config, data_config, train_config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_repeatable_kernels(train_config.deterministic))
        world = World.of_environment(device.device)
        windows = train_config.batch_tokens // model_config.max_position_embeddings
        require(world.size <= windows, "WORLD_SIZE", world.size, f"at most the {windows} windows")

        def enter() -> tuple[FolderLock, Mirror | None]:
            check_run_folder(out)
            if mirror:
                check_mirror(out, mirror)
            out.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(FolderLock(out))
            copier = Mirror(out, mirror, keep_of(train_config)) if mirror else None
            if copier:
                stack.callback(copier.close, 1.0)  # after an error; else it has been closed before
            return lock, copier

        lock, copier = world.first(enter) or (None, None)
        return _train(configs, out, resume, world, lock, copier, callbacks if lock else ())


# -----------------------------------------------------------------------------
# 10 Export
# The exports are in bitllm/export; here is the door to them.

EXPORT_FORMATS = ("hf", "gguf", "packed", "html")
GGUF_KINDS = ("TQ2_0", "TQ1_0", "F16")
CREDITS = ("name", "author", "licence", "data_licence")
PAGE_TEMPLATE = "bitllm/export/page.html"


def _export(name: str, /, *arguments: Any, **options: Any) -> Any:
    """Call a function of bitllm.export."""
    import logging

    module, log = importlib.import_module("bitllm.export"), logging.getLogger("bitllm")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel("INFO")
    return getattr(module, name)(*arguments, **options)


export_hf = partial(_export, "export_hf")
export_gguf = partial(_export, "export_gguf")
export_packed = partial(_export, "export_packed")
export_html = partial(_export, "export_html")
llama_cpp_stream = partial(_export, "llama_cpp_stream")
push_to_hub = partial(_export, "push_to_hub")


def load_model(path: str | Path, checkpoint: str | int = "last") -> tuple[BitLM, Any]:
    """A model ready to generate, and its tokenizer.

    Args:
        path: a run folder, a mirror of one, or one checkpoint file; a packed file or a Hugging
            Face folder that this program exported; or a seed script's .pth file with its
            tokenizer.json beside it.
        checkpoint: of a run folder: "last", "best" (lowest validation loss) or a kept step.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, and where. Files are only data:
            nothing in them is executed.
    """
    path = Path(path)
    if path.suffix == ".gguf" or _looks_exported(path):
        model, tokenizer, _ = _export("read_exported", path)
        return model, tokenizer
    return load_run(path, checkpoint)[:2]


def _looks_exported(path: Path) -> bool:
    """Not a run folder, checkpoint or .pth file."""
    if path.is_dir():
        return "model_type" in (read_json(path / "config.json") or {})
    no_checkpoint = path.suffix == ".safetensors" and not _CHECKPOINT_NAME.fullmatch(path.name)
    return no_checkpoint and path.is_file()


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


def _field_help(config: type) -> dict[str, str]:
    """The string under each field, which Python itself forgets."""
    try:
        body = ast.parse(inspect.getsource(config)).body[0]
    except OSError:  # no source file, as in a notebook cell
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for item, after in zip(body.body, body.body[1:], strict=False):
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


def _add_fields(parser: argparse.ArgumentParser, config: type, preset_gives: bool) -> None:
    """One flag a field; without a preset's say, with its default."""
    group = parser.add_argument_group(config.__name__)
    texts = _field_help(config)
    for item in fields(config):
        kind = str(item.type).split(" | ")[0]
        options: dict[str, Any] = {"type": {"int": int, "float": float}.get(kind, str)}
        if kind == "bool":
            options = {"type": _parse_bool, "nargs": "?", "const": True}
        help_text = texts.get(item.name, "")
        if not preset_gives:
            help_text += f" (default: {item.default})"
        group.add_argument(
            "--" + item.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar=kind.upper(),
            help=help_text,
            **options,
        )


def _from_flags(config: type, flags: argparse.Namespace, base: Any = None) -> Any:
    given = {f.name: getattr(flags, f.name) for f in fields(config) if hasattr(flags, f.name)}
    return config(**given) if base is None else dataclasses.replace(base, **given)


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag, and exit 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bitllm_core.py", description="Train and use ternary language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train, or go on where a run stopped")
    command.add_argument("--preset", help=f"settings to begin from: {', '.join(PRESETS)}")
    command.add_argument("--out", required=True, metavar="DIR", help="run folder")
    command.add_argument("--resume", default="auto", help="auto, never or must")
    command.add_argument("--mirror", metavar="DIR", help="second folder for the checkpoints")
    command.add_argument("--tensorboard", action="store_true", help="curves in DIR/tensorboard too")
    text = "curves at Weights & Biases too (default: bitllm)"
    command.add_argument("--wandb", nargs="?", const="bitllm", metavar="PROJECT", help=text)
    for config in (ModelConfig, DataConfig, TrainConfig):
        _add_fields(command, config, preset_gives=True)
    command.set_defaults(run=_train_command)

    command = commands.add_parser("generate", help="write text")
    _add_model_flags(command)
    command.add_argument("--prompt", default="", help="beginning of the text")
    _add_fields(command, SamplingConfig, preset_gives=False)
    command.set_defaults(run=_generate_command)

    command = commands.add_parser("evaluate", help="loss on a text, as one JSON object")
    _add_model_flags(command)
    command.add_argument("--data", required=True, metavar="SOURCE", help="file, folder or name")
    command.add_argument("--text-column", help="column of .jsonl, .parquet or hub rows")
    command.add_argument("--stride", type=int, help="tokens the context moves; default: all of it")
    command.add_argument("--dtype", default="float32", help="auto, float32, bfloat16, float16")
    command.set_defaults(run=_evaluate_command)

    command = commands.add_parser("export", help="write a model for other programs")
    _add_model_flags(command)
    command.add_argument("--to", required=True, choices=EXPORT_FORMATS, help="the format")
    command.add_argument("--out", required=True, metavar="PATH", help="file, or folder with hf")
    command.add_argument("--gguf-type", choices=GGUF_KINDS, help="of gguf (default: TQ2_0)")
    command.add_argument("--embedding", help="of packed: float16 (default), int8 or float32")
    command.add_argument("--dense", action="store_true", help="of hf: unpacked float32 weights")
    command.add_argument("--runtime", metavar="DIR", help="of html: llama.cpp for browsers")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    for name in CREDITS:
        command.add_argument("--" + name.replace("_", "-"), help="noted in what is written")
    command.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it, with HF_TOKEN")
    command.set_defaults(run=_export_command)

    command = commands.add_parser("bench", help="speeds on this machine, as one JSON object")
    command.add_argument("--quick", action="store_true", help="a small shape, seconds")
    command.set_defaults(run=_bench_command)

    command = commands.add_parser("info", help="device, versions, presets; or plan a training")
    command.add_argument("--preset", help="plan this, or what the flags change in it")
    command.add_argument("--gpus", type=int, metavar="N", help="plan for so many GPUs")
    for config in (ModelConfig, TrainConfig):
        _add_fields(command, config, preset_gives=True)
    command.set_defaults(run=_info_command)
    return parser


def _add_model_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="PATH", help="run, export or seed .pth")
    command.add_argument("--checkpoint", default="last", help="last, best or a step")


def _checkpoint_flag(flags: argparse.Namespace) -> str | int:
    return int(flags.checkpoint) if flags.checkpoint.isdigit() else flags.checkpoint


def _settings_of_run(out: Path, mirror: str | None) -> dict[str, Any] | None:
    """What the run in `out`, or in its mirror, was made with; None: there is none."""
    for place in (out, Path(mirror)) if mirror else (out,):
        if (place / "config.json").is_file():
            with contextlib.suppress(ValueError):  # said by train
                return read_run_config(place)
        if list_checkpoints(place / "checkpoints"):
            found = newest_checkpoint(place / "checkpoints")
            if found:
                return checked_settings(found.get("config"), place / "checkpoints")
    return None


def _preset(name: str) -> str:
    require(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    return name


def _configs_from_flags(flags: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The preset's, or the run's own where no preset is named, with the flags laid over."""
    kinds = (ModelConfig, DataConfig, TrainConfig)
    if flags.preset is not None:
        _preset(flags.preset)
    saved = None if flags.preset else _settings_of_run(Path(flags.out), flags.mirror)
    if saved:
        parts = zip(kinds, ("model", "data", "train"), strict=True)
        bases = tuple(kind(**saved[part]) for kind, part in parts)
    else:
        bases = PRESETS[flags.preset or "demo"]
    model, data, train_config = (
        _from_flags(kind, flags, base) for kind, base in zip(kinds, bases, strict=True)
    )
    return model, data, train_config


def _train_command(flags: argparse.Namespace) -> int:
    configs = _configs_from_flags(flags)
    callbacks: list[Callback] = [ProgressBar()]
    callbacks += [TensorBoard(flags.out)] if flags.tensorboard else []
    callbacks += [WandB(flags.out, flags.wandb)] if flags.wandb else []
    more = {"resume": flags.resume, "mirror": flags.mirror, "callbacks": callbacks}
    state = train(*configs, flags.out, **more)
    if state.world.size > 1:
        dist.destroy_process_group()
    out = Path(flags.out)
    if state.world.rank != 0:
        return 128 + state.stop_signal if state.stop_signal else 0
    if state.stop_signal:
        say(f"stopped at step {state.step} of {state.config.max_steps}; saved in {out}")
        return 128 + state.stop_signal
    model, tokenizer = load_model(out, "best" if state.out_of_patience else "last")
    prompt = state.config.sample_prompt
    text = generate(model, tokenizer, prompt, SamplingConfig(max_new_tokens=120, seed=0))
    speed = state.tokens / state.train_seconds if state.train_seconds else 0
    size = model.config.vocab_size
    print(f"\n{prompt}{text}\n")
    print(f"complete: {state.step} steps, {state.tokens:,} tokens, {speed:,.0f} tokens/s")
    print(f"last training loss {state.loss:.4f}, {state.skipped} steps skipped")
    print(
        f"validation loss {state.val_loss:.4f}, perplexity {safe_exp(state.val_loss):.1f}", end=""
    )
    print(f" (a uniform guess: {math.log(size):.4f}, {size})")
    print(f"checkpoint: {list_checkpoints(out / 'checkpoints')[-1]}")
    if state.out_of_patience:
        print(
            f"ended early: {state.config.patience} evaluations without a better validation loss; "
            f"the text above is of the best, {state.best_val_loss:.4f} at step {state.best_step} "
            "(--checkpoint best)"
        )
    return 0


def _generate_command(flags: argparse.Namespace) -> int:
    sampling = _from_flags(SamplingConfig, flags)
    if flags.model.endswith(".gguf"):
        pieces = llama_cpp_stream(flags.model, flags.prompt, sampling)
    else:
        model, tokenizer = load_model(flags.model, _checkpoint_flag(flags))
        pieces = stream(model, tokenizer, flags.prompt, sampling)
    print(flags.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _evaluate_command(flags: argparse.Namespace) -> int:
    require(flags.dtype in _DTYPES, "dtype", flags.dtype, f"one of {', '.join(_DTYPES)}")
    model, tokenizer = load_model(flags.model, _checkpoint_flag(flags))
    device = choose_device("auto", flags.dtype)
    options = {"text_column": flags.text_column, "stride": flags.stride, "device": device}
    print(json.dumps(evaluate(model, tokenizer, flags.data, **options)))
    return 0


def _export_command(flags: argparse.Namespace) -> int:
    formats = {"hf": export_hf, "gguf": export_gguf, "packed": export_packed, "html": export_html}
    options = {
        "gguf": {"kind": flags.gguf_type or "TQ2_0"},
        "packed": {"embedding": flags.embedding or "float16"},
        "hf": {"dense": flags.dense},
        "html": {"runtime": flags.runtime},
    }
    strange = {"gguf": flags.gguf_type, "packed": flags.embedding, "hf": flags.dense}
    strange["html"] = flags.runtime
    for to, value in strange.items():
        require(not value or to == flags.to, "to", flags.to, f"{to}, whose flag is given")
    exported = formats[flags.to](
        flags.model,
        flags.out,
        checkpoint=_checkpoint_flag(flags),
        overwrite=flags.overwrite,
        **options[flags.to],
        **{name: getattr(flags, name) for name in CREDITS},
    )
    print(
        f"{exported.path}: {exported.size:,} bytes, "
        f"{exported.bits_per_weight:.3f} bits per ternary weight"
    )
    print(exported.usage)
    if flags.push_to_hub:
        print(f"uploaded: {push_to_hub(exported.path, flags.push_to_hub)}")
    return 0


_DTYPES = ("auto", "float32", "bfloat16", "float16")


def bench_step(
    model: ModelConfig, device: Device, windows: int, train: TrainConfig | None = None
) -> Callable[[], float]:
    """A function that makes one optimizer step on random tokens and returns its seconds."""
    tokens = windows * model.max_position_embeddings
    config = dataclasses.replace(train or TrainConfig(), batch_tokens=tokens)
    net = BitLM(model).to(device.device)
    optimizers, scaler = make_optimizers(net, config), device.scaler()
    loss = net.loss if why_not_compile(device) else compiled_loss(net)
    shape = (windows, model.max_position_embeddings)
    ids = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    ids, at_once = ids.to(device.device), windows_at_once(model, config, device)

    def step() -> float:
        start = time.perf_counter()
        with net.hold_weights(device.dtype):
            for part in ids.split(at_once):
                with device.autocast():
                    value = loss(part, part) / ids.numel()
                scaler.scale(value).backward()
        apply_gradients(optimizers, scaler, 1.0, 1.0)
        return time.perf_counter() - start

    return step


def bench_generation(model: BitLM, tokens: int, rounds: int = 3) -> float:
    """Tokens a second of one greedy text of `tokens` tokens, the best of some rounds."""
    best = math.inf
    for _ in range(rounds):
        written = generate_tokens(
            model, [[1]], SamplingConfig(max_new_tokens=tokens, temperature=0, seed=0)
        )
        next(written)
        start = time.perf_counter()
        for _ in written:
            pass
        best = min(best, time.perf_counter() - start)
    return (tokens - 1) / best


def _bench_command(flags: argparse.Namespace) -> int:
    """Ternary and dense steps in turn, so that a busy machine slows both."""
    device = choose_device()
    model = ModelConfig(
        vocab_size=512 if flags.quick else 30_000,
        hidden_size=128 if flags.quick else 512,
        intermediate_size=256 if flags.quick else 1536,
        num_hidden_layers=2 if flags.quick else 6,
        num_attention_heads=2 if flags.quick else 8,
        max_position_embeddings=64 if flags.quick else 512,
    )
    windows, rounds = 16, 10 if flags.quick else 4
    ternary = bench_step(model, device, windows)
    first = ternary()
    ternary()
    peak, state = memory_in_use(device), estimate_memory(model, TrainConfig())
    dense = bench_step(dataclasses.replace(model, linear="dense"), device, windows)
    dense()
    seconds = [(ternary(), dense(), product_rate(device)) for _ in range(rounds)]
    t, d, rate = (np.array(column) for column in zip(*seconds, strict=True))
    tokens = windows * model.max_position_embeddings
    net = BitLM(model).to(device.device).freeze()
    trits = sum(layer.shape.numel() for layer in net.bit_linears().values())
    packed = sum(layer.packed.numel() for layer in net.bit_linears().values())
    result = {
        "train": {
            "ternary_tokens_per_s": tokens / np.median(t),
            "dense_tokens_per_s": tokens / np.median(d),
            "ternary_to_dense": np.median(d / t),
            "flop_utilization": 6 * model.num_parameters * tokens / np.median(t) / rate.max(),
            "product_flop_per_s": rate.max(),
            "first_step_s": first,
            "steps_in_turn": rounds,
        },
        "generate": {
            "tokens_per_s": bench_generation(net, min(256, model.max_position_embeddings - 1)),
            "bits_per_ternary_weight": 8 * packed / trits,
        },
        "memory": {
            "peak_bytes": peak,
            "weights_and_optimizer_bytes": state,
            "ratio": peak / state,
        },
        "machine": {**machine(), "device": str(device), "parameters": model.num_parameters},
    }
    print(json.dumps(result))
    return 0


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"system": platform.platform(), "cores": os.cpu_count(), "gpu": gpu}
    return {**found, "threads": torch.get_num_threads(), **versions()}


GPUS = {
    "T4": (14.6, 65e12, 0.2, 5e9),
    "A100": (40, 312e12, 0.35, 200e9),
    "H100": (80, 989e12, 0.35, 300e9),
}
"""GiB, FLOP/s of 16-bit products, the assumed share of it, bytes/s assumed from one to another."""


def _plan(model: ModelConfig, config: TrainConfig, gpus: int) -> Iterator[str]:
    """Size, memory by part and time of a training on several GPUs of a kind, line by line."""
    dtype = torch.float32 if config.dtype == "float32" else torch.float16
    context, layers, P = (
        model.max_position_embeddings,
        model.num_hidden_layers,
        model.num_parameters,
    )
    tokens = config.batch_tokens * config.max_steps
    per_token = 6 * P + 6 * layers * context * model.hidden_size  # and causal attention's
    memory = partial(memory_parts, model, config, dtype, gpus)
    parts, window = memory(), activation_bytes(model, dtype) * layers * context
    share = -(-config.batch_tokens // context // gpus)
    yield f"parameters: {P:,}"
    yield f"tokens: {tokens:,} in {config.max_steps:,} steps of {config.batch_tokens:,}"
    yield f"FLOP: {per_token * tokens:.2e}, {per_token:.2e} a token"
    kind = f"{str(dtype).removeprefix('torch.')} products{', fsdp' if config.fsdp else ''}"
    yield f"memory on each of {gpus}, {kind}, one window of {context} tokens at once:"
    yield from (f"  {name:27} {size / 2**20:8,.0f} MB" for name, size in parts.items() if size)
    yield f"  {'sum':27} {sum(parts.values()) / 2**20:8,.0f} MB"
    yield f"  and for each window more {window / 2**20:,.0f} MB, uncompiled"
    if config.fsdp:
        whole_state = 4 * P + memory_parts(model, config, dtype)["optimizer"]
        yield f"while it saves, in the first's main memory: {whole_state / 2**20:,.0f} MB"
    for name, (gib, peak, used, between) in GPUS.items():
        room = 0.7 * gib * 2**30  # CUDA and the gaps of its allocator are not counted
        fit = max((n for n in range(1, share + 1) if sum(memory(n).values()) <= room), default=0)
        if fit < 1:
            yield f"{gpus} x {name} ({gib} GiB): does not fit"
            continue
        # gradients there and back, and weights; with fsdp weights twice and gradients, each time
        times = -(-share // fit) if config.fsdp else 1
        sent = 12 * P * times * (gpus - 1) / gpus
        seconds = per_token * tokens / (gpus * peak * used) + config.max_steps * sent / between
        yield (
            f"{gpus} x {name} ({gib} GiB): {fit} of {share} windows at once, "
            f"{seconds / 3600:,.1f} hours"
        )
    used = ", ".join(f"{n} {share:.0%} of {peak:.3g}" for n, (_, peak, share, _) in GPUS.items())
    yield f"hours: a guess, nothing measured; assumed FLOP a second: {used}"


def _info_command(flags: argparse.Namespace) -> int:
    names = {item.name for kind in (ModelConfig, TrainConfig) for item in fields(kind)}
    if flags.preset or flags.gpus is not None or names & vars(flags).keys():
        model, _, config = PRESETS[_preset(flags.preset or "demo")]
        model = _from_flags(ModelConfig, flags, model)
        config = _from_flags(TrainConfig, flags, config)
        check_configs(model, config)
        gpus = 1 if flags.gpus is None else flags.gpus
        require(gpus >= 1, "gpus", gpus, "at least 1")
        require(gpus > 1 or not config.fsdp, "gpus", gpus, "several with fsdp")
        for line in _plan(model, config, gpus):
            print(line)
        return 0
    device = choose_device()
    print(f"device: {device}")
    print(f"torch.compile: {why_not_compile(device) or 'available'}")
    for name, value in machine().items():
        print(f"{name}: {value}")
    rate = product_rate(device)
    print(f"\n{'preset':8} {'parameters':>10} {'memory':>8} {'time here':>10}  data")
    for name, (model, data, config) in PRESETS.items():
        memory = estimate_memory(model, config) / 2**20
        minutes = estimate_seconds(model, config, rate) / 60
        print(
            f"{name:8} {model.num_parameters / 1e6:9.2f}M {memory:5.0f} MB "
            f"{minutes:6.0f} min  {data.data}"
        )
    print("\nmemory: weights, gradients and optimizer; time: at a quarter of this machine's best")
    print("matrix product rate, measured now, without compiling and reading the data")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for what the user gave, 130 after Ctrl-C."""
    flags = _parser().parse_args(arguments)
    try:
        return flags.run(flags)
    except KeyboardInterrupt:
        say("stopped at once; nothing after the last checkpoint was saved")
        return 130
    except (ValueError, FileNotFoundError) as error:
        say(f"error: {error}")
        return 2
    except (OSError, ImportError, FloatingPointError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    status = main()
    if dist.is_available() and dist.is_initialized():  # after an error
        # gloo's threads abort a process that ends in order, and NCCL's may wait for the dead
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
