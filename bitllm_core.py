"""Train a ternary (BitNet b1.58) language model from scratch, resume exactly, and use it.

This one file holds the model, the tokenizer, the data, the resumable training loop and a small
command line, for a laptop's CPU as well as a GPU; the package bitllm around it adds the rest.

    import bitllm_core as bit
    model, data, train = bit.PRESETS["demo"]
    bit.train(model, data, train, "runs/demo")          # run it again: it resumes
    net, tokenizer = bit.load_model("runs/demo")
    print(bit.generate(net, tokenizer, "The with statement", bit.SamplingConfig(seed=0)))

Contents
    1 Configuration   what can be set, checked at construction, and the presets
    2 Quantization    ternary weights, 8-bit activations and the layer made of them
    3 Model           the transformer, its initialisation and the import of seed checkpoints
    4 Tokenizer       byte-level BPE (lossless) or the seed's WordPiece
    5 Data            from any text to token files; a batch is a function of (seed, step)
    6 Generation      cached sampling, streamed or whole
    7 Optimization    Muon and AdamW, their groups and the schedule
    8 Checkpoints     complete or not written at all, and loaded as data only
    9 Training        evaluation and the loop
    10 Command line   train, generate, evaluate

Dimensions in comments
    B batch   T tokens   D hidden_size   H query heads   G key/value heads   K head_dim
    V vocabulary   O, I out and in features of a matrix

References
    [1] Ma et al., The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024,
        arXiv:2402.17764; and the authors' "Training Tips, Code and FAQ".
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
MIN_VOCAB_SIZE = 257
_SMALLEST_VOCAB = f"at least {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT})"


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise the ValueError that names a field, its value and what was expected, unless `ok`."""
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
    """The first line of a library's error, to quote in a message of ours."""
    return next(iter(str(error).strip().splitlines()), "")[:140]


def library(name: str, why: str) -> Any:
    """An optional library, imported; ImportError says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{why} needs the package {package}: pip install {package}") from error


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
            f"{why} needs the bitllm package, not bitllm_core.py alone: "
            "pip install it from its repository, or run in a checkout"
        ) from error


_AT_LEAST_1 = (lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
_POSITIVE = (lambda value: value > 0, "a positive number")


def _at_most(most: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value <= most, f"at most {most:,}"


def _one_of(*allowed: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in allowed, f"one of {', '.join(allowed)}"


def _check(config: Any, *checks: tuple[str, Callable[[Any], bool], str]) -> None:
    """Check fields against rows of (names, condition, what is expected); None where it may be."""
    optional = {item.name for item in fields(config) if "None" in str(item.type)}
    for names, holds, expected in checks:
        for name in names.split():
            value = getattr(config, name)
            require((value is None and name in optional) or holds(value), name, value, expected)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network, in Hugging Face's names. The defaults are the `demo` preset's."""

    vocab_size: int = 2048
    """embedding rows; the tokenizer is trained to at most this many tokens"""
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
    """use the (float) embedding as output head; otherwise the head is a BitLinear of its own"""
    linear: str = "ternary"
    """form of every BitLinear: ternary (and 8-bit activations), weight_only, or dense (the twin)"""
    block: str = "bitnet"
    """bitnet (RMSNorm, rotary, SiLU, sub-norms) or seed (LayerNorm, learned positions, ReLU)"""

    def __post_init__(self) -> None:
        _check(
            self,
            ("hidden_size intermediate_size num_hidden_layers num_attention_heads", *_AT_LEAST_1),
            ("vocab_size", lambda size: size >= MIN_VOCAB_SIZE, _SMALLEST_VOCAB),
            ("max_position_embeddings", lambda length: length >= 2, "at least 2"),
            # beyond any machine: a slip of the hand, or a hostile file
            ("num_hidden_layers", *_at_most(1 << 10)),
            ("hidden_size", *_at_most(1 << 16)),
            ("intermediate_size", *_at_most(1 << 18)),
            ("max_position_embeddings", *_at_most(1 << 20)),
            ("vocab_size", *_at_most(1 << 24)),
            ("rope_theta rms_norm_eps", *_POSITIVE),
            ("linear", *_one_of("ternary", "weight_only", "dense")),
            ("block", *_one_of("bitnet", "seed")),
        )
        heads, kv_heads, D = self.num_attention_heads, self.num_kv_heads, self.hidden_size
        expected = f"a divisor of hidden_size={D}, such as {_near_divisor(D, heads)}"
        require(D % heads == 0, "num_attention_heads", heads, expected)
        expected = f"an even head width (rotary embedding turns pairs), not {self.head_dim}"
        even = self.block == "seed" or self.head_dim % 2 == 0
        require(even, "num_attention_heads", heads, expected)
        expected = f"a divisor of num_attention_heads={heads}, such as "
        expected += str(_near_divisor(heads, kv_heads))
        fits = kv_heads >= 1 and heads % kv_heads == 0
        require(fits, "num_key_value_heads", kv_heads, expected)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """All trained numbers; a tied embedding counts once."""
        D, M, kv = self.hidden_size, self.intermediate_size, self.num_kv_heads * self.head_dim
        seed = self.block == "seed"
        norms = 4 * D if seed else 3 * D + M
        matrices = 2 * D * D + 2 * D * kv + (2 if seed else 3) * D * M
        total = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        total += self.num_hidden_layers * (matrices + norms) + (2 * D if seed else D)
        return total + (self.max_position_embeddings * D if seed else 0)

    @property
    def export_limits(self) -> list[str]:
        """Why an export of this model would not run everywhere; empty where it does."""
        found = []
        if self.block != "bitnet" or not self.tie_word_embeddings or self.linear != "ternary":
            found.append(NO_COUNTERPART)
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 256:
                found.append(f"llama.cpp's ternary blocks need {name} to be a multiple of 256")
        if self.head_dim not in (64, 128):
            found.append(f"head width {self.head_dim} is neither 64 nor 128")
        return found


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
    """train on at most this many; hub sources and folders then arrive while training runs"""
    tokenizer: str = "bpe"
    """bpe (byte-level, lossless) or wordpiece (the seed's)"""

    def __post_init__(self) -> None:
        _check(
            self,
            ("data", bool, "a file, a folder, a data set's name or pydocs"),
            ("validation_fraction", lambda share: 0 < share < 0.9, "a number in (0, 0.9)"),
            ("max_train_tokens", *_POSITIVE),
            ("tokenizer", *_one_of("bpe", "wordpiece")),
        )


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how carefully to train."""

    max_steps: int = 200
    """optimizer steps in all"""
    batch_tokens: int = 4096
    """tokens per optimizer step, a multiple of max_position_embeddings"""
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
    """shard the model over several processes (FSDP), for a model that does not fit on one GPU"""
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
    """start of the text generated at each evaluation"""
    save_every_steps: int = 0
    """optimizer steps between checkpoints; 0: by time only"""
    save_every_minutes: float = 5.0
    """minutes between checkpoints; 0: by steps only"""
    save_every_epoch: bool = False
    """keep a checkpoint of every finished epoch, as the seed script does"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints to keep"""

    def __post_init__(self) -> None:
        _check(
            self,
            ("max_steps batch_tokens micro_batch_size eval_tokens", *_AT_LEAST_1),
            ("log_every_steps keep_checkpoints", *_AT_LEAST_1),
            ("batch_tokens", *_at_most(1 << 27)),
            ("eval_every_steps patience save_every_steps warmup_steps seed", *_NOT_NEGATIVE),
            ("weight_decay max_grad_norm save_every_minutes", *_NOT_NEGATIVE),
            ("learning_rate adamw_learning_rate", *_POSITIVE),
            ("momentum adam_beta1 adam_beta2", lambda beta: 0 <= beta < 1, "a number in [0, 1)"),
            ("cooldown_fraction", lambda share: 0 <= share <= 1, "a number in [0, 1]"),
            ("optimizer", *_one_of("muon", "adamw")),
            ("schedule", *_one_of("wsd", "cosine")),
            ("device", *_one_of("auto", "cpu", "cuda", "mps")),
            ("dtype", *_one_of("auto", "float32", "bfloat16", "float16")),
            ("compile", *_one_of("auto", "on", "off")),
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 100
    """tokens to generate, at most"""
    temperature: float = 0.8
    """divides the logits; 0: always the likeliest token"""
    top_k: int = 50
    """choose among this many likeliest tokens; 0: all"""
    top_p: float = 1.0
    """choose among the likeliest tokens whose probabilities reach this sum"""
    repetition_penalty: float = 1.0
    """divides (negative: multiplies) the logits of tokens already in the text; 1: none"""
    seed: int | None = None
    """of the choices; default: a new one each time"""

    def __post_init__(self) -> None:
        _check(
            self,
            ("max_new_tokens temperature top_k seed", *_NOT_NEGATIVE),
            ("top_p", lambda share: 0 < share <= 1, "a number in (0, 1]"),
            ("repetition_penalty", *_POSITIVE),
        )


_TUNED_RATES = {  # tools/experiments.py, recipe: of the matrices, of the rest
    ("muon", "ternary"): (0.04, 5e-3),
    ("muon", "dense"): (0.02, 5e-3),
    ("adamw", "ternary"): (1.5e-3, 1.5e-3),
    ("adamw", "dense"): (1.5e-3, 1.5e-3),
}


def peak_rates(model: ModelConfig, training: TrainConfig) -> tuple[float, float]:
    """Peak rates of the matrices and of embedding, norms and head; tuned where nothing is set.

    A ternary weight changes only when its master crosses a threshold, so it wants a higher rate.
    """
    tuned = _TUNED_RATES[training.optimizer, "dense" if model.linear == "dense" else "ternary"]
    matrices = training.learning_rate or tuned[0]
    rest = matrices if training.optimizer == "adamw" else tuned[1]
    return matrices, training.adamw_learning_rate or rest


def check_configs(model: ModelConfig, training: TrainConfig) -> None:
    """Check what depends on two configurations; ValueError names field, value and remedy."""
    context, batch = model.max_position_embeddings, training.batch_tokens
    below, windows = max(batch // context, 1) * context, batch // context
    expected = f"a multiple of max_position_embeddings={context}, such as {below}"
    require(batch % context == 0, "batch_tokens", batch, f"{expected} or {below + context}")
    micro = training.micro_batch_size or 1
    expected = f"a divisor of the {windows} windows per step"
    expected += f", such as {_near_divisor(windows, micro)}"
    require(windows % micro == 0, "micro_batch_size", micro, expected)


# ModelConfig(vocab_size, hidden_size, intermediate_size, layers, heads, key/value heads, context)
PRESETS: dict[str, tuple[ModelConfig, DataConfig, TrainConfig]] = {
    "ci": (
        ModelConfig(512, 64, 192, 2, 2, 1, 64),
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
            max_steps=400, batch_tokens=2048, save_every_steps=100, eval_every_steps=100, patience=3
        ),
    ),
    "laptop": (
        ModelConfig(8192, 512, 1024, 6, 8, 4, 256),
        DataConfig(data="wikitext-2"),
        TrainConfig(max_steps=750, batch_tokens=8192, eval_every_steps=75, patience=3),
    ),
    "t4-1h": (
        ModelConfig(8192, 512, 1536, 8, 8, 4, 512),
        DataConfig(data="tinystories", max_train_tokens=150_000_000),
        TrainConfig(max_steps=2500, batch_tokens=65_536, warmup_steps=100, eval_every_steps=250),
    ),
    "t4-3h": (
        ModelConfig(16_384, 768, 2048, 7, 12, 4, 512),
        DataConfig(data="fineweb-edu", max_train_tokens=300_000_000),
        TrainConfig(max_steps=4000, batch_tokens=65_536, warmup_steps=100, eval_every_steps=250),
    ),
    "seed": (
        ModelConfig(
            *(30_000, 512, 2048, 6, 8, None, 512),
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
    scale = weight.abs().mean().clamp(min=_SCALE_FLOOR)
    return (weight / scale).round().clamp(-1, 1), scale


def _to_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127, float32, like x, (..., I), and the factor they were scaled by."""
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
    integers, scale = _to_8_bits(x)
    return integers / scale


class _StraightThrough(torch.autograd.Function):
    """Forward: what was computed from x. Backward: the gradient unchanged ([1], FAQ).

    `x + (q(x) - x).detach()` is the same mathematics, but three times slower when compiled.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0].to(ctx.dtype), None


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, which was computed from x; its gradient reaches x unchanged."""
    return _StraightThrough.apply(x, quantized) if torch.is_grad_enabled() else quantized


def quantize_input(x: Tensor, linear: str) -> Tensor:
    """What BitLinears of form `linear` read: 8-bit values where that is ternary."""
    return straight_through(x, activation_quant(x.detach())) if linear == "ternary" else x


def pack_trits(trits: Tensor) -> Tensor:
    """Trits, (O, I), at two bits each: byte j of a row holds inputs j + k * ceil(I / 4)."""
    codes = F.pad(trits + 1, (0, -trits.shape[1] % 4)).to(torch.uint8)
    a, b, c, d = codes.chunk(4, dim=1)
    return a | b << 2 | c << 4 | d << 6  # (O, ceil(I / 4))


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """The reverse of `pack_trits`: int8, (O, I)."""
    codes = torch.cat([packed >> 2 * k & 3 for k in range(4)], dim=1)
    return codes[:, :in_features].to(torch.int8) - 1


KERNELS: list[Any] = []
"""Faster inference, used instead of plain torch where it is ready. Importing bitllm.cpu adds one.

Each has `ready(x) -> bool`; `rms_norm(x, weight, eps)`, which returns what `RMSNorm` does; and
`ternary_linear(x, layers)`, which returns what `project` does for frozen layers, bit for bit.
"""


def kernels_for(x: Tensor) -> Any:
    """The first of KERNELS that is ready; None where a gradient is wanted or torch compiles."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    for kernels in KERNELS:
        if kernels.ready(x):
            return kernels
    return None


def project(x: Tensor, layers: Sequence[BitLinear]) -> Sequence[Tensor]:
    """Each layer's output for one input, (..., I), which is quantized once for all of them."""
    first = layers[0]
    packed = first.frozen and first.linear == "ternary" and first.held is None
    kernels = kernels_for(x) if packed else None
    if kernels is not None:
        return kernels.ternary_linear(x, layers)
    if not first.frozen:  # the inference form quantizes its input itself
        x = quantize_input(x, first.linear)
    return [layer(x) for layer in layers]


class BitLinear(nn.Linear):
    """A matrix without bias that computes with ternary weights and learns in full precision.

    Call it through `project`, which quantizes the input.

    Args:
        in_features, out_features: sizes; the weight is (out_features, in_features).
        linear: "ternary" or "weight_only" (both quantize the weight), or "dense" (neither).

    `freeze` turns the layer into its inference form, two bits per weight: `packed`, uint8
    (O, ceil(I / 4)), and `weight_scale`, float32 (), replace the weight. The output equals the
    training form's to float rounding. Where activations are quantized too, it consists of sums of
    integers, and every way to compute it gives the same bits.
    Never quantize t * s again: the mean of weights that are already ternary is below their scale.
    """

    packed: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, linear: str = "ternary") -> None:
        super().__init__(in_features, out_features, bias=False)
        self.linear = linear
        self.held: Tensor | None = None  # see BitLM.hold_weights

    @property
    def frozen(self) -> bool:
        return "packed" in self._buffers

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def trits(self) -> Tensor:
        """The trits of the inference form: int8, (O, I)."""
        return unpack_trits(self.packed, self.in_features)

    def effective_weight(self) -> Tensor:
        """The weight that multiplies: t * s, or the dense weight. (O, I)"""
        if self.frozen:
            return self.trits * self.weight_scale
        if self.held is not None:
            return straight_through(self.weight, self.held)
        if self.linear == "dense":
            return self.weight
        ternary, scale = weight_quant(self.weight.detach())
        return straight_through(self.weight, ternary * scale)

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the weight that multiplies in `dtype` until `held` is None again."""
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

    def forward(self, input: Tensor) -> Tensor:
        if not self.frozen:
            return F.linear(input, self.effective_weight())
        weight = self.trits.to(input.dtype) if self.held is None else self.held
        if self.linear == "weight_only":
            return F.linear(input, weight) * self.weight_scale
        integers, scale = _to_8_bits(input)
        return F.linear(integers, weight) * (self.weight_scale / scale)


# -----------------------------------------------------------------------------
# 3 Model
# The block of BitNet b1.58 2B4T [2] with a SiLU gate, as in transformers' and llama.cpp's "bitnet";
# and, with the same classes, the seed guide's.


class RMSNorm(nn.Module):
    """Divide by the root mean square and multiply by a learned weight, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        kernels = kernels_for(x)
        if kernels is not None:
            return kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


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
    """Rotate the pairs (k, k + K/2) of x, (B, H, T, K), by rope, (2, B or 1, T, K/2)."""
    cos, sin = rope.unsqueeze(2)  # (B or 1, 1, T, K/2) each
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens so far, at most `max_position_embeddings` of them."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        layers, G = config.num_hidden_layers, config.num_kv_heads
        shape = (layers, batch, G, config.max_position_embeddings, config.head_dim)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, T, K) and return all so far, (B, G, length + T, K)."""
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
        if T == 1 and mask is None:  # it attends to all: the heads of a group can be its queries
            q, groups = q.view(B, k.shape[1], groups, K), 1
        if groups > 1:  # not enable_gqa: the T4's memory-efficient kernel does not have it
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = y.reshape(B, 1, D) if T == 1 else y.transpose(1, 2).reshape(B, T, D)
        return project(self.attn_sub_norm(y), (self.o_proj,))[0]


class FeedForward(nn.Module):
    """Gated SiLU with a norm before `down_proj`; in the seed's block, plain ReLU."""

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
    """Attention, then feed-forward; each reads the normed stream and adds to it."""

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
    """Everything but the head, so that the parameters have Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.block == "seed":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config, config.hidden_size)


CHUNK_BYTES = 32 << 20  # of logits in float32 at once; smaller is slower: docs/log.md
IGNORE_INDEX = -100  # the target of a position that does not count, as in F.cross_entropy


def token_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the targets, (N, 1), in float32, and p of all tokens in the logits' dtype."""
    log_p = logits.log_softmax(dim=1, dtype=torch.float32)
    return log_p.gather(1, targets), log_p.exp_().to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Head and cross-entropy in one, a chunk of tokens at a time.

    All logits of a step would be its largest tensor by far (half a gigabyte at a vocabulary of
    30,000), written and read several times. Here a chunk's gradient is taken while its logits are
    there, and what is kept for the backward pass is the finished gradient of hidden states and
    weight. The idea is that of Liger Kernel's fused linear cross-entropy [6], in plain torch.
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
                ignored = (targets[part] == IGNORE_INDEX)[:, None]  # (rows, 1)
                x = hidden[part].to(dtype).masked_fill(ignored, 0)  # adds 0 to the weight's
                logits = x @ w.T  # (rows, V)
                if not learning:
                    nats += F.cross_entropy(logits.float(), targets[part], reduction="sum")
                    continue
                counted = targets[part].clamp(min=0)
                log_p, d_logits = probabilities(logits, counted[:, None])
                nats -= log_p.masked_fill(ignored, 0).sum()
                # the gradient of the logits is p, less 1 at the target
                at = torch.arange(len(x), device=x.device)  # scatter_ would copy all the logits
                d_logits[at, counted] = log_p.expm1().squeeze(1).to(dtype)
                d_hidden[part] = (d_logits @ w).masked_fill_(ignored, 0)
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
        """Compute the rotary table, again where the model was built on the meta device."""
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

        Gradients reach the parameters; changes of the parameters have no effect inside the block.
        """
        layers = self.bit_linears().values()
        try:
            with torch.no_grad():
                for layer in layers:
                    layer.hold(dtype)
                if self.lm_head is None:
                    self.held_head = self.model.embed_tokens.weight.detach().to(dtype)
            yield
        finally:
            self.held_head = None
            for layer in layers:
                layer.held = None

    def hidden(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        left_pad: Tensor | None = None,
        blocks: Sequence[Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        """The normed output of the last block, (B, T, D); arguments as in `forward` and `loss`."""
        T, past = input_ids.shape[1], cache.length if cache else 0
        limit = self.config.max_position_embeddings
        if past + T > limit:
            raise ValueError(f"{past + T} tokens, but max_position_embeddings={limit}")
        keys = torch.arange(past + T, device=input_ids.device)
        at, mask = keys[past:], None
        if left_pad is not None:
            seen = (keys <= at[:, None]) & (keys >= left_pad[:, None, None])  # (B, T, past + T)
            own = keys == at[:, None]  # padding attends to itself: no keys at all would be NaN
            mask = (seen | own)[:, None]  # (B, 1, T, past + T)
            at = (at - left_pad[:, None]).clamp(min=0)  # (B, T)
        elif past and T > 1:
            mask = keys <= at[:, None]  # (T, past + T)
        x, rope = self.model.embed_tokens(input_ids), None  # (B, T, D)
        if self.config.block == "seed":
            x = x + self.model.embed_positions(at)
        else:
            rope = self.rope[:, at].view(2, -1, T, self.config.head_dim // 2)
        for block in blocks or self.model.layers:
            x = block(x, rope, cache, mask)
        if cache:
            cache.length += T
        return self.model.norm(x)

    def head_weight(self) -> Tensor:
        """The matrix that turns hidden states into logits, (V, D)."""
        if self.lm_head is not None:
            return self.lm_head.effective_weight()
        weight = self.model.embed_tokens.weight
        return weight if self.held_head is None else straight_through(weight, self.held_head)

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
            input_ids: (B, T), int64; with `cache`, only the tokens that are not in it.
            cache: keys and values of earlier calls; this call appends to it.
            left_pad: (B,), how many tokens at the start of each row are padding.

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
        """Cross-entropy in nats, summed over the tokens of `targets`, (B, T), that are not -100.

        `blocks` and `probabilities` may be compiled versions of the model's own. Float32.
        """
        hidden = self.hidden(input_ids, blocks=blocks).flatten(0, 1)  # (N, D)
        if self.lm_head is not None:
            hidden = quantize_input(hidden, self.config.linear)
        return _ChunkedLoss.apply(hidden, self.head_weight(), targets.flatten(), probabilities)


@torch.no_grad()
def initialize(
    model: BitLM, generator: torch.Generator, keep: Callable[[Tensor, Tensor], Any] | None = None
) -> None:
    """Fill every parameter, in the order of their names, from one generator.

        parameter                            distribution
        embed_tokens, embed_positions        normal, std 0.02 (the tied head starts near uniform)
        q, k, v, gate, up, untied head       uniform, std 1/sqrt(in_features): unit gain
        o_proj, down_proj                    the same / sqrt(2 num_hidden_layers); bitnet: / 10 more
        norms                                weight 1, bias 0

    A ternary layer's output is proportional to its weights' scale, so the last two rows of matrices
    differ in gain exactly as dense ones would. Blocks that start by adding little learned a little
    faster with five Newton-Schulz steps, and as fast with three (docs/results.md).

    With `keep`, values are made on the CPU and `keep(parameter, values)` is called instead.
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


_SEED_NAMES = {
    "token_embedding": "model.embed_tokens",
    "position_embedding": "model.embed_positions",
    "output_layer": "lm_head",
    "layers.": "model.layers.",
    ".norm1.": ".input_layernorm.",
    ".norm2.": ".post_attention_layernorm.",
    ".attn.out_proj.": ".self_attn.o_proj.",
    ".attn.": ".self_attn.",
    ".ff.w_1.": ".mlp.up_proj.",
    ".ff.w_2.": ".mlp.down_proj.",
}


def import_seed_checkpoint(path: str | Path, num_attention_heads: int = 8) -> BitLM:
    """Turn a checkpoint of the seed guide's script into a `BitLM` with the same logits.

    Args:
        path: `mi_llm_checkpoint.pth` or `mi_llm_epoch_N.pth`.
        num_attention_heads: the only size that is not in the file; the script's is 8.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not such a checkpoint. Nothing in the file is executed.
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
    for old, new in _SEED_NAMES.items():
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
# The library `tokenizers` does the work; here are the choice of tokenizer and its special tokens.


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> Any:
    """Train a tokenizer in one pass over `texts`.

    Args:
        texts: pieces of text; they need not fit into memory.
        vocab_size: the most tokens, special ones included; a small text gives fewer.
        kind: "bpe", byte-level with GPT-2's pre-tokenizer: decode(encode(x)) == x for every
            string; or "wordpiece", the seed's, which loses white space and unknown characters.

    Returns:
        tokenizers.Tokenizer. Special tokens inside a text are encoded as text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    require(vocab_size >= MIN_VOCAB_SIZE, "vocab_size", vocab_size, f"at least {MIN_VOCAB_SIZE}")
    options: dict[str, Any] = {"vocab_size": vocab_size, "show_progress": False}
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        special = [*WORDPIECE_SPECIALS, END_OF_TEXT]
        trainer = trainers.WordPieceTrainer(special_tokens=special, **options)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, **options
        )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


_TOKENIZER_BYTES = 64 << 20  # a tokenizer.json of 100,000 tokens has 7 MB


def tokenizer_from(text: str, path: Path) -> Any:
    """The tokenizer in the text of a tokenizer.json; ValueError names the file."""
    from tokenizers import Tokenizer, decoders

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer.json ({first_line(error)})") from error
    if tokenizer.decoder is None and tokenizer.token_to_id("[UNK]") is not None:
        tokenizer.decoder = decoders.WordPiece()  # missing in the seed script's
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
    """Raise a ValueError naming the file if an id has no row in the embedding."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if len(ids) > vocab_size or max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{path}: token ids up to {max(ids):,}, but the model has vocab_size={vocab_size:,}"
        )


def end_of_text_id(tokenizer: Any) -> int | None:
    """The id of <|endoftext|>; None in the seed script's own tokenizers."""
    return tokenizer.token_to_id(END_OF_TEXT)


def valid_unicode(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` without special ones. A lone surrogate becomes U+FFFD."""
    return tokenizer.encode(valid_unicode(text), add_special_tokens=False).ids


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 that identifies a tokenizer."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


# -----------------------------------------------------------------------------
# 5 Data
# Text is read in pieces, never whole; the tokens are memory-mapped files in the run folder.


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub."""

    name: str
    config: str | None = None
    column: str | None = None
    validation: str | None = None
    """its validation split, if it has one"""
    lines: bool = False
    """rows are lines of one long text; otherwise each row is a document"""


KNOWN_DATA = {
    "wikitext-2": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "validation", True),
    "wikitext-103": HubSource(
        "Salesforce/wikitext", "wikitext-103-raw-v1", "text", "validation", True
    ),
    "tinystories": HubSource("roneneldan/TinyStories", None, "text", "validation"),
    "fineweb-edu": HubSource("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "wikipedia-es": HubSource("wikimedia/wikipedia", "20231101.es", "text"),
}
_PIECE_CHARS = 1 << 16  # lines are joined to pieces of about this length
_LONGEST_PIECE = 1 << 20  # a longer row is cut at white space
_TOKENIZER_CHARS = 100_000_000  # text a tokenizer is trained on at most

Piece = tuple[str, bool]  # text, and whether a document ends with it
SplitPiece = tuple[str, str, bool]  # the same after "train" or "validation"


def choose_column(row: dict[str, Any], wanted: str | None, source: object) -> str:
    """The column that holds the text, chosen by a source's first row.

    ValueError names the columns where `wanted` is not among them or nothing decides.
    """
    texts = [name for name, value in row.items() if isinstance(value, str)]
    column = wanted or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if column is None or column not in row:
        raise ValueError(
            f"text_column={column!r}: data='{source}' has columns {', '.join(row) or 'none'}; "
            "name the one that holds the text with --text-column"
        )
    return column


def _text_in(row: dict[str, Any], column: str, where: object) -> str:
    """The text of a row, "" where it has none."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{where}: column {column!r} holds a value of type {kind}, expected text")
    return value


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, a byte order mark dropped and every line end made \\n."""
    with path.open(encoding="utf-8-sig") as file:
        yield from file


def _jsonl_rows(path: Path, wanted: str | None) -> Iterator[str]:
    column = None
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: cannot be read as JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}: expected an object such as {{"text": "..."}}')
        column = column or choose_column(row, wanted, path)
        yield valid_unicode(_text_in(row, column, where))


def _parquet_rows(path: Path, wanted: str | None) -> Iterator[str]:
    pyarrow = library("pyarrow", f"reading {path.name}")
    parquet = library("pyarrow.parquet", f"reading {path.name}")
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                return
            column = choose_column(next(file.iter_batches(1)).to_pylist()[0], wanted, path)
            for batch in file.iter_batches(1000, columns=[column]):
                for row in batch.to_pylist():
                    yield _text_in(row, column, path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: cannot be read as .parquet ({first_line(error)})") from error


_READERS: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
    ".txt": lambda path, _: _lines(path),
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


def file_rows(path: Path, column: str | None = None) -> Iterator[str]:
    """The rows of a local file: lines of a .txt, or the text of each row, "" where it has none.

    Raises ValueError naming the file where it is not what its name says.
    """
    try:
        yield from _READERS[path.suffix](path, column)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({first_line(error)})") from error


def local_files(source: str, split: str = "train") -> list[Path]:
    """The files of a source, sorted. In a folder, valid*, dev* and test* are not training text."""
    path = Path(source).expanduser()
    if path.is_file():
        files = [path] if split == "train" else []
    else:
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _READERS)
        files = [p for p in found if _split_of(p) == split]
    if any(p.suffix not in _READERS for p in files) or (split == "train" and not files):
        raise ValueError(
            f"data={source!r}: expected {', '.join(_READERS)} files"
            + (" in the folder" if path.is_dir() else f", not {path.suffix or 'no suffix'}")
        )
    return files


def _split_of(path: Path) -> str:
    for prefix, split in (("valid", "validation"), ("dev", "validation"), ("test", "test")):
        if path.stem.lower().startswith(prefix):
            return split
    return "train"


def is_local(source: str) -> bool:
    return Path(source).expanduser().exists()


def hub_source(source: str) -> HubSource:
    """The data set that a known name or hf:OWNER/NAME[:CONFIG][#COLUMN] stands for."""
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
    return HubSource(name, config or None, column or None)


def hub_rows(hub: HubSource, split: str, streaming: bool) -> Any:
    """The rows of a split, as `datasets` gives them; ConnectionError where the hub does not."""
    datasets = library("datasets", f"data={hub.name!r} from the Hugging Face hub")
    try:
        return datasets.load_dataset(hub.name, hub.config, split=split, streaming=streaming)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ConnectionError(
            f"the data set {hub.name} could not be loaded from the Hugging Face hub "
            f"({' '.join(str(error).split())[:200]}). Without a connection, give a local file "
            "(--data FILE.txt) or the text that comes with Python (--data pydocs)"
        ) from error


def join_lines(lines: Iterable[str]) -> Iterator[str]:
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


def cut_long(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Cut what is longer than a million characters, at white space where there is any."""
    for text, ends in pieces:
        while len(text) > _LONGEST_PIECE:
            cut = text.rfind(" ", 1, _LONGEST_PIECE)
            cut = cut if cut > 0 else _LONGEST_PIECE
            yield text[:cut], False
            text = text[cut:]
        yield text, ends


def _file_pieces(path: Path, column: str | None) -> Iterator[Piece]:
    rows = filter(None, file_rows(path, column))
    if path.suffix != ".txt":
        yield from ((text, True) for text in rows)
        return
    previous = None
    for text in join_lines(rows):
        if previous is not None:
            yield previous, False
        previous = text
    if previous is not None:
        yield previous, True  # the file is one document


def _hub_pieces(hub: HubSource, split: str, config: DataConfig) -> Iterator[Piece]:
    rows = hub_rows(hub, split, streaming=config.max_train_tokens is not None)
    column = choose_column(next(iter(rows), {}), hub.column or config.text_column, hub.name)
    texts = (text for batch in rows.iter(batch_size=1000) for text in batch[column] if text)
    return ((text, not hub.lines) for text in (join_lines(texts) if hub.lines else texts))


def _pydocs() -> Iterator[Piece]:
    """Python's reference texts by topic, from the interpreter itself."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip() + "\n", True


def read_pieces(
    source: str, split: str = "train", config: DataConfig | None = None
) -> Iterator[Piece]:
    """Text of a source in pieces of bounded length, each with whether a document ends there.

    Args:
        source: as `DataConfig.data`. A .txt file is one document; a row of any other is one.
        split: "train", or "validation", which is empty where the source has no such split.

    Raises:
        FileNotFoundError, ValueError: no such source, or not readable as what its name says.
        ConnectionError: the hub cannot be reached (after the library's own few tries).
    """
    config = config or DataConfig(data=source)
    pieces: Iterator[Piece] = iter(())
    if is_local(source):
        paths = local_files(source, split)
        pieces = (piece for path in paths for piece in _file_pieces(path, config.text_column))
    elif source == "pydocs":
        pieces = _pydocs() if split == "train" else pieces
    else:
        hub = hub_source(source)
        name = hub.validation if split == "validation" else "train"
        pieces = _hub_pieces(hub, name, config) if name else pieces
    return cut_long(pieces)


def _split_tail(pieces: Iterable[Piece], train_chars: int) -> Iterator[SplitPiece]:
    """The first `train_chars` characters train, the rest validates."""
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


def _splits(config: DataConfig) -> Callable[[], Iterator[SplitPiece]]:
    """A function that reads the source from its beginning, each piece with its split."""
    source = config.validation_data
    held = (source, "train") if source else (config.data, "validation")

    def read_both() -> Iterator[SplitPiece]:
        yield from (("train", *piece) for piece in read_pieces(config.data, "train", config))
        yield from (("validation", *piece) for piece in read_pieces(*held, config))

    if next(read_pieces(*held, config), None) is not None:
        return read_both
    total = sum(len(text) for text, _ in read_pieces(config.data, "train", config))
    train_chars = round(total * (1 - config.validation_fraction))
    return lambda: _split_tail(read_pieces(config.data, "train", config), train_chars)


def is_streamed(config: DataConfig) -> bool:
    """Whether tokens arrive while training runs: a budget of a hub's set or a folder."""
    whole = config.data == "pydocs" or Path(config.data).expanduser().is_file()
    return config.max_train_tokens is not None and not whole


def open_new(path: Path) -> Any:
    """Open a new file for writing; what has its name, a link to elsewhere too, is deleted."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write beside `path`, flush to the disk, rename: the file is complete or unchanged."""
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


def tokenize(
    tokenizer: Any, pieces: Iterable[SplitPiece], folder: Path, budget: int | None
) -> dict[str, Any]:
    """Write train.bin and validation.bin; return the manifest's entries for them."""
    from tqdm.auto import tqdm

    dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
    eot, pieces = end_of_text_id(tokenizer), iter(pieces)
    counts: dict[str, Any] = {s: {"tokens": 0, "bytes": 0} for s in ("train", "validation")}
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open_new(folder / f"{s}.tmp")) for s in counts}
        bar = stack.enter_context(
            tqdm(unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5)
        )
        while batch := list(itertools.islice(pieces, 64)):
            texts = [text for _, text, _ in batch]
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (split, text, ends), tokens in zip(batch, encoded, strict=True):
                ids = tokens.ids + ([eot] if ends and eot is not None else [])
                files[split].write(np.asarray(ids, dtype=dtype).tobytes())
                counts[split]["tokens"] += len(ids)
                counts[split]["bytes"] += len(text.encode())
            bar.update(sum(count["bytes"] for count in counts.values()) - bar.n)
            if budget and counts["train"]["tokens"] >= budget:
                break
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for split, count in counts.items():
        path = (folder / f"{split}.tmp").replace(folder / f"{split}.bin")
        count["sha256"] = file_hash(path)
    return {"dtype": dtype, **counts}


def limited(texts: Iterable[str], chars: int) -> Iterator[str]:
    """Texts until there are `chars` characters of them."""
    for text in texts:
        yield text
        chars -= len(text)
        if chars <= 0:
            return


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def source_fingerprint(source: str) -> str | None:
    """sha256 of a local source's files; None for any other source, or where it is not there."""
    if not is_local(source):
        return None
    paths = [path for split in ("train", "validation") for path in local_files(source, split)]
    return hashlib.sha256("".join(map(file_hash, paths)).encode()).hexdigest()


@dataclass
class TokenData:
    """The tokens of a run: two memory-mapped arrays, and the manifest that describes them."""

    training: np.ndarray
    validation: np.ndarray
    manifest: dict[str, Any]
    streamed: bool = False
    """whether tokens arrive while training runs; then ask whether a step is `ready`"""
    error: Exception | None = None
    """what ended a stream early"""

    def ready(self, config: TrainConfig, context: int, step: int) -> bool:
        """Whether the tokens of a step are there."""
        return True

    def coming(self, tokenizer: Any) -> contextlib.AbstractContextManager[None]:
        """A block during which more tokens are read in the background, if there are any."""
        return contextlib.nullcontext()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per validation token, on average."""
        counts = self.manifest["validation"]
        return counts["bytes"] / max(counts["tokens"], 1)

    @property
    def sha256(self) -> str:
        """The hash that identifies these tokens."""
        return self.manifest["train"]["sha256"]

    @property
    def epoch_tokens(self) -> int:
        return len(self.training)

    def steps_per_epoch(self, config: TrainConfig, context: int) -> float:
        return (self.epoch_tokens // context) / (config.batch_tokens // context)

    def batch(self, config: TrainConfig, context: int, step: int) -> np.ndarray:
        """The windows of optimizer step `step` (from 0), (windows, context + 1), int64.

        A pure function of (seed, step). The text is read as a ring, so no token is left out.
        """
        windows, N = config.batch_tokens // context, self.epoch_tokens
        numbers = np.arange(step * windows, (step + 1) * windows)
        starts = self.window_starts(numbers, context, config.seed)
        return self.training[(starts[:, None] + np.arange(context + 1)) % N].astype(np.int64)

    def window_starts(self, numbers: np.ndarray, context: int, seed: int) -> np.ndarray:
        """Where the windows of these numbers, counted from the first step, start in the text.

        Each epoch shuffles all windows anew and starts to cut at another place.
        """
        starts, per_epoch = np.empty(len(numbers), dtype=np.int64), self.epoch_tokens // context
        for epoch in np.unique(numbers // per_epoch):
            here = numbers // per_epoch == epoch
            offset, order = _epoch_order(seed, int(epoch), per_epoch, self.epoch_tokens)
            starts[here] = offset + order[numbers[here] % per_epoch] * context
        return starts


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, windows: int, tokens: int) -> tuple[int, np.ndarray]:
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(tokens)), generator.permutation(windows)


def _read_split(folder: Path, manifest: dict[str, Any], split: str) -> np.ndarray | None:
    """A token file, or None where it is missing or differs from the manifest."""
    path, expected, dtype = folder / f"{split}.bin", manifest[split], manifest["dtype"]
    if dtype not in ("uint16", "uint32") or not path.is_file() or not expected["tokens"]:
        return None
    same_size = path.stat().st_size == expected["tokens"] * np.dtype(dtype).itemsize
    if not same_size or file_hash(path) != expected["sha256"]:
        return None
    tokens = np.memmap(path, dtype=dtype, mode="r")
    return tokens if tokens.max() < manifest["asked"]["vocab_size"] else None


_STREAMING = "max_train_tokens with a folder or a data set of the hub"


def _read_tokens(folder: Path, manifest: dict[str, Any]) -> TokenData | None:
    """The data that a manifest describes, or None where a file differs from it."""
    validation = _read_split(folder, manifest, "validation")
    if validation is None:
        return None
    if "stream_state" in manifest:
        return extension("streaming", _STREAMING).open_stream(folder, validation, manifest)
    training = _read_split(folder, manifest, "train")
    return None if training is None else TokenData(training, validation, manifest)


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
    """Whether a run folder's token files were made with these settings."""
    manifest = read_json(out / "data" / "manifest.json") or {}
    return manifest.get("asked") == {"data": asdict(config), "vocab_size": vocab_size}


def _prepared_data(out: Path, config: DataConfig, vocab_size: int) -> tuple[TokenData, Any] | None:
    """What `prepare_data` made before; None where a part is missing or has changed.

    ValueError where it is the local text that has changed.
    """
    if not same_data(out, config, vocab_size) or not (out / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(out / "tokenizer.json")
    manifest = read_json(out / "data" / "manifest.json") or {}
    try:
        tokens = _read_tokens(out / "data", manifest)
        made_with, read_from = manifest["tokenizer_sha256"], manifest["source_sha256"]
    except (KeyError, TypeError, ValueError):  # a manifest that is not ours
        return None
    if tokens is None or made_with != tokenizer_hash(tokenizer):
        return None
    now = None if tokens.streamed else source_fingerprint(config.data)  # not all is read again
    if now is not None and now != read_from:
        raise ValueError(
            f"data={config.data!r}: the text has changed since this run started. Put the old text "
            "back, or train on the new one in another folder (--out)"
        )
    return tokens, tokenizer


def _run_tokenizer(path: Path, texts: Iterable[str], config: DataConfig, vocab_size: int) -> Any:
    """The tokenizer at `path`, or one trained on `texts` where there is none."""
    if path.is_file():
        tokenizer = load_tokenizer(path)
        log.info("tokenizer: reusing %s", path)
    else:
        start = time.perf_counter()
        tokenizer = train_tokenizer(texts, vocab_size, config.tokenizer)
        size, seconds = tokenizer.get_vocab_size(), time.perf_counter() - start
        log.info("tokenizer: %d tokens, %.1f s", size, seconds)
    check_tokenizer(tokenizer, vocab_size, path)
    return tokenizer


def prepare_data(
    config: DataConfig, vocab_size: int, context: int, out: str | Path
) -> tuple[TokenData, Any]:
    """Tokenizer and token files of a run folder, made where they are not there yet.

    Files: `tokenizer.json` (reused when present) and `data/{train,validation}.bin` with
    `data/manifest.json`. The source is not read again once they are there.

    Raises:
        ValueError: too little text, or the local source has changed since the files were made.
    """
    out = Path(out)
    folder, path = out / "data", out / "tokenizer.json"
    found = _prepared_data(out, config, vocab_size)
    if found:
        return found
    if is_streamed(config):
        streaming = extension("streaming", _STREAMING)
        fingerprint, texts = None, streaming.tokenizer_texts(config)
        write = partial(streaming.begin_stream, config)
    else:
        fingerprint, read = source_fingerprint(config.data), _splits(config)
        train_texts = (text for split, text, _ in read() if split == "train")
        texts = limited(train_texts, _TOKENIZER_CHARS)

        def write(tokenizer: Any, folder: Path) -> dict[str, Any]:
            return tokenize(tokenizer, read(), folder, config.max_train_tokens)

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _run_tokenizer(path, texts, config, vocab_size)
    manifest = {
        "format_version": 1,
        "asked": {"data": asdict(config), "vocab_size": vocab_size},
        "source_sha256": fingerprint,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        **write(tokenizer, folder),
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


def say(line: str) -> None:
    """One line to stderr, from the first process alone; results alone go to stdout."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# 6 Generation


def _choose(
    logits: Tensor, seen: Tensor, config: SamplingConfig, generator: torch.Generator
) -> Tensor:
    """The next token of each row, (B), from logits, (B, V), and the tokens so far, (B, T)."""
    if config.repetition_penalty != 1:
        old, penalty = logits.gather(1, seen), config.repetition_penalty
        logits = logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))
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


def _can_stay_packed(model: BitLM, rows: int) -> bool:
    """Whether some kernels can generate from packed weights, a token of each row at a time."""
    layers = model.bit_linears().values()
    if not all(layer.frozen and layer.linear == "ternary" for layer in layers):
        return False
    device = next(model.buffers()).device
    return kernels_for(torch.empty(rows, model.config.hidden_size, device=device)) is not None


@torch.inference_mode()
def generate_tokens(
    model: BitLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    end_id: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield one new token id for each prompt at a time; None for those that have ended.

    Text may be longer than `max_position_embeddings`: when the context is full, its older half is
    dropped and the newer half read again.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        end_id: a row ends before this token.
        num_tokens: choose among the first `num_tokens` rows of the head only.
    """
    device, limit = next(model.buffers()).device, model.config.max_position_embeddings
    width = max(map(len, prompts))
    rows = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])  # (B, T), on the CPU
    pad = torch.tensor([width - len(p) for p in prompts])
    start, unread = max(0, width - limit), min(width, limit)
    cache = KVCache(model.config, len(prompts), device)
    generator = torch.Generator()
    generator.manual_seed(config.seed) if config.seed is not None else generator.seed()
    ended, was_training = [False] * len(prompts), model.training
    packed = _can_stay_packed(model, len(prompts))
    model.eval()
    try:
        with contextlib.nullcontext() if packed else model.hold_weights():
            for _ in range(config.max_new_tokens):
                if cache.length + unread > limit:
                    start, unread, cache.length = rows.shape[1] - limit // 2, limit // 2, 0
                left_pad = (pad - start).clamp(min=0)  # less than the window: a row's own are newer
                padded = left_pad.to(device) if left_pad.any() else None
                logits = model(rows[:, -unread:].to(device), cache, padded)[:, -1]
                filling = torch.arange(rows.shape[1]) < pad[:, None]
                seen = torch.where(filling, rows[:, -1:], rows)  # no penalty for the filling
                chosen = _choose(logits[:, :num_tokens].float().cpu(), seen, config, generator)
                rows, unread = torch.cat([rows, chosen[:, None]], dim=1), 1
                tokens = chosen.tolist()
                ended = [e or token == end_id for e, token in zip(ended, tokens, strict=True)]
                yield [None if e else token for e, token in zip(ended, tokens, strict=True)]
                if all(ended):
                    return
    finally:
        model.train(was_training)


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """An empty prompt starts where a document ends."""
    return encode(tokenizer, prompt) or [end_of_text_id(tokenizer) or 0]


def _continuations(
    model: BitLM, tokenizer: Any, prompts: list[list[int]], sampling: SamplingConfig | None
) -> Iterator[list[int | None]]:
    eot, size = end_of_text_id(tokenizer), tokenizer.get_vocab_size()
    return generate_tokens(model, prompts, sampling or SamplingConfig(), eot, size)


def stream(
    model: BitLM, tokenizer: Any, prompt: str, sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, in complete characters."""
    from tokenizers.decoders import DecodeStream

    decoder, ids = DecodeStream(skip_special_tokens=True), _prompt_ids(tokenizer, prompt)
    for token in ids:  # word pieces join what came before
        decoder.step(tokenizer, token)
    for (token,) in _continuations(model, tokenizer, [ids], sampling):
        text = None if token is None else decoder.step(tokenizer, token)
        if text:
            yield text


def generate(
    model: BitLM,
    tokenizer: Any,
    prompt: str | Sequence[str],
    sampling: SamplingConfig | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Any:
    """The continuation of a prompt, or a list of those of several prompts at once.

    Args:
        prompt: one text or several; the results do not contain it.
        on_text: called with every piece of text as it is generated (one prompt only).
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
    ids = [_prompt_ids(tokenizer, p) for p in prompt]
    generated: list[list[int]] = [[] for _ in ids]
    for tokens in _continuations(model, tokenizer, ids, sampling):
        for row, token in zip(generated, tokens, strict=True):
            row += [] if token is None else [token]
    return [tokenizer.decode(row) for row in generated]


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
    source = _read_any(Path(path), checkpoint)
    return source.model, source.tokenizer


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
