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
import contextlib
import dataclasses
import errno
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
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
    "ModelConfig",
    "SamplingConfig",
    "TokenData",
    "TrainConfig",
    "TrainState",
    "activation_quant",
    "evaluate",
    "generate",
    "import_seed_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "prepare_data",
    "save_checkpoint",
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
    log.info(line)


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
# Also the processes that share the work: here there is one, in bitllm/distributed.py more.


class Processes:
    """The processes that train one model, which call its methods in one order; here, one alone."""

    rank, world_size, is_main = 0, 1, True  # the main one writes the run folder, calls callbacks
    sharded = False  # whether each holds only a part of every parameter (FSDP)

    def guard(self) -> Any:
        return contextlib.nullcontext()  # in it, the loss of another is a ConnectionError

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    all_reduce_max = all_reduce_sum

    def broadcast(self, value: Any) -> Any:
        return value  # the main one's

    gather = broadcast  # to the main one: tensors by name, of which each has its own
    whole = broadcast  # to the main one: whole, of which each has all or a part of every one
    whole_model = broadcast  # to the main one: a model that can generate by itself

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        return work()  # None in the others, which wait for it

    def scatter(self, parameter: Tensor, values: Tensor) -> Tensor:
        return values  # of whole values of a parameter, the part that this one holds

    def owns(self, parameter: Tensor) -> bool:
        return True  # this one updates it and holds its optimizer state

    def micro_batches(self, x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """This process' rows of inputs and targets, (N, T) each, at most `size` at once."""
        return list(zip(x.split(size), y.split(size), strict=True))

    def build_model(self, config: ModelConfig, seed: int, device: torch.device) -> BitLM:
        return BitLM(config, seed).to(device)

    def make_optimizers(self, model: BitLM, config: TrainConfig) -> list[Any]:
        return make_optimizers(model, config)

    def reduce_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        return loss  # the sum over all, and the gradients become sums, in place

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.step()


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """What multiplies the peak rates at optimizer step `step` (from 0), in (0, 1].

    wsd: linear warm-up, constant, linear cooldown to 0 [5]; cosine: warm-up, half a cosine to 0.1.
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


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Newton-Schulz [3]: singular values to about 1, of each matrix of a batch, (n, O, I).

    It computes in bfloat16 or, on a GPU without it, float16, and so is the result; in float32
    elsewhere, since a CPU without bfloat16 takes sixty times as long to emulate it.
    """
    device, tall = matrices.device, matrices.shape[1] > matrices.shape[2]
    other = torch.float16 if device.type == "cuda" else torch.float32
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (matrices / norms.clamp(min=1e-7)).to(torch.bfloat16 if has_bfloat16(device) else other)
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT.contiguous() if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal [3], as in torch.optim.Muon, but a batch of equal shapes at once.

    torch's, one matrix after the other, takes 11.7 ms for 49 on an H200; this takes 2.5. Small
    models learn more with three steps of Newton-Schulz than with torch's five (docs/log.md).
    """

    BATCH_NUMBERS = 1 << 24  # at most, or one matrix: a batch needs 16 bytes of memory for each

    def __init__(self, params: Any, lr: float, momentum=0.95, weight_decay=0.0, ns_steps=3):
        options = {"momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps}
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters that have a gradient, which is used up."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for shape in dict.fromkeys(weight.shape for weight in weights):
                alike = [weight for weight in weights if weight.shape == shape]
                count = max(self.BATCH_NUMBERS // shape.numel(), 1)
                for start in range(0, len(alike), count):
                    self._update(alike[start : start + count], group)

    def _update(self, weights: list[Any], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights]
        means = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, means, group["momentum"])  # Nesterov's look ahead
        rows, columns = weights[0].shape
        rate = group["lr"] * math.sqrt(max(1, rows / columns))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, self.updates(gradients, group["ns_steps"]), alpha=-rate)

    def updates(self, directions: list[Any], steps: int) -> Sequence[Any]:
        return orthogonalize(torch.stack(directions), steps).to(directions[0].dtype).unbind()


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """All parameters, in the optimizers' order."""
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


def make_optimizers(model: BitLM, config: TrainConfig, muon: Any = Muon) -> list[Any]:
    """Muon [3] for the matrices inside the blocks and AdamW for the rest, or AdamW for all.

    Only matrices are decayed. Each group's peak rate is its `initial_lr`.
    """
    matrices = {f"{n}.weight": m.weight for n, m in model.bit_linears().items() if n != "lm_head"}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    first, second = ({"lr": rate, "initial_lr": rate} for rate in peak_rates(model.config, config))
    decayed = {"params": list(matrices.values()), "weight_decay": config.weight_decay, **first}
    rest = {"params": others, "weight_decay": 0.0, **second}
    adamw = partial(torch.optim.AdamW, betas=(config.adam_beta1, config.adam_beta2), fused=True)
    if config.optimizer == "adamw":
        return [adamw([decayed, rest])]
    return [muon([decayed], lr=first["lr"], momentum=config.momentum), adamw([rest])]


def apply_gradients(
    optimizers: Sequence[Any],
    scaler: torch.amp.GradScaler,
    factor: float,
    max_grad_norm: float,
    loss: Tensor | None = None,
    processes: Processes | None = None,
) -> tuple[float, float]:
    """One optimizer step, on gradients that are the same in all processes; rates times `factor`.

    AdamW's are clipped; Muon's step does not depend on their norm. Returns the loss and the norm of
    all; where that is not finite, nothing changes, of which GradScaler.step takes no care.
    """
    processes, norms = processes or Processes(), []
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        parameters = parameters_of([optimizer])
        norms.append(processes.norm([p.grad for p in parameters if p.grad is not None]))
        if max_grad_norm and isinstance(optimizer, torch.optim.AdamW):
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norms[-1])
    total = torch.stack(norms).norm()
    nats, norm = torch.stack([total if loss is None else loss, total]).tolist()  # waits for the GPU
    if math.isfinite(norm):
        processes.step(optimizers)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return nats, norm


# -----------------------------------------------------------------------------
# 8 Checkpoints
# A checkpoint is one safetensors file, the whole state of a run as data, and a manifest with its
# size and sha256. It is written beside its name, read back, compared, given its manifest and then
# its name: what has the name was whole once, and the manifest shows what has been damaged since.

FORMAT_VERSION = 3  # 2, which also held the lines of metrics.jsonl, can be read too
PART = ".part"  # suffix of a file that is not finished
_NAME = re.compile(r"(step|epoch|best)_\d{8,}\.(safetensors(\.part)?|json)")


class Folder:
    """A folder, through the few operations that a disk or Drive may refuse (tests/faults.py)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.name for path in self.path.iterdir())
        return []

    def write(self, name: str, fill: Callable[[Path], Any]) -> None:
        """A new file that `fill` writes, safe on the disk; or none at all."""
        self.path.mkdir(exist_ok=True)
        self.remove(name)
        try:
            fill(self.path / name)
            with (self.path / name).open("r+b") as file:
                os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk needs the space
                self.remove(name)
            raise

    def rename(self, old: str, new: str) -> None:
        (self.path / old).rename(self.path / new)

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


def snapshot(contents: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Contents as JSON, with numbers in place of the tensors, and copies of those."""
    tensors: dict[str, Tensor] = {}

    def number(tensor: Tensor) -> dict[str, str]:
        copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        tensors[str(len(tensors))] = copy.copy_(tensor.detach())
        return {"tensor": str(len(tensors) - 1)}

    text = json.dumps({"format_version": FORMAT_VERSION, **contents}, default=number)
    return text, tensors


def write_snapshot(folder: Folder, name: str, tree: str, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint beside its name, read it back, and publish it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    part, metadata = name + PART, {"contents": tree}
    try:
        folder.write(part, partial(save_file, tensors, metadata=metadata))
        with safe_open(folder.path / part, framework="pt") as file:
            pairs = ((file.get_tensor(key), tensor) for key, tensor in tensors.items())
            pairs = ([t.flatten().view(torch.uint8) for t in pair] for pair in pairs)  # NaN != NaN
            if file.metadata() != metadata or not all(torch.equal(*pair) for pair in pairs):
                raise SafetensorError("what was read back is not what was written")
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error), str(folder.path / part)) from error
    manifest = {"name": name, "format_version": FORMAT_VERSION, "step": checkpoint_step(name)}
    publish(
        folder, {**manifest, "size": folder.size(part), "sha256": file_hash(folder.path / part)}
    )
    return folder.path / name


def publish(folder: Folder, manifest: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint that was read back, then give the file its name."""
    name, text = manifest["name"], json.dumps(manifest)
    folder.remove(name)  # one damaged since; before its manifest, or Drive would keep two
    folder.write(Path(name).stem + ".json", lambda path: path.write_text(text))
    folder.rename(name + PART, name)
    if folder.size(name) != manifest["size"]:
        folder.remove(name)
        raise OSError(errno.EIO, "not whole after renaming", str(folder.path / name))


def save_checkpoint(folder: str | Path, contents: dict[str, Any], kind: str = "step") -> Path:
    """Write a checkpoint: tensors and what JSON can hold, with its `step`. Kinds: epoch, best."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = f"{kind}_{contents['step']:08d}.safetensors"
    return write_snapshot(Folder(folder), name, *snapshot(contents))


def read_manifest(folder: Folder, name: str) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError where it is missing, torn or not ours."""
    path = folder.path / name
    manifest = read_json(path.with_suffix(".json")) or {}
    if manifest.get("name") != name or not {"step", "size", "sha256"} <= manifest.keys():
        raise ValueError(f"{path}: damaged (its manifest is missing, torn or not its own)")
    if (version := manifest.get("format_version")) not in (2, FORMAT_VERSION):
        raise ValueError(f"{path}: format {version!r:.20}, not 2 or {FORMAT_VERSION}")
    return manifest


def load_checkpoint(path: str | Path, checkpoint: str | int = "last", mapped: bool = False) -> dict:
    """Read a checkpoint as data, to the CPU; ValueError: damaged, or not a checkpoint.

    Args:
        path: a checkpoint file, its manifest beside it; or a run folder.
        checkpoint: of a run folder: "last", "best" (lowest validation loss) or a kept step.
        mapped: leave a file's tensors in it; it must not change while they are used.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        folder = path / "checkpoints"
        if isinstance(checkpoint, int):
            paths = sorted(folder.glob(f"*_{checkpoint:08}.safetensors"))  # best, epoch, step
            found = load_checkpoint(paths[-1]) if paths else None
        else:
            found = newest_checkpoint(folder, {"last": "step"}.get(checkpoint, checkpoint))
        if found is None:
            raise FileNotFoundError(f"{path}: not a run folder, or no whole checkpoint in it yet")
        return found
    manifest = read_manifest(Folder(path.parent), path.name)
    if file_hash(path) != manifest["sha256"]:
        raise ValueError(f"{path}: damaged (its sha256 differs from its manifest's)")
    try:
        with safe_open(path, framework="pt") as file:

            def join(tree: dict[str, Any]) -> Any:
                if tree.keys() != {"tensor"}:
                    return tree
                tensor = file.get_tensor(tree["tensor"])
                return tensor if mapped else tensor.clone()  # the file may be deleted any time

            contents = json.loads(file.metadata()["contents"], object_hook=join)
        if contents["step"] != manifest["step"]:
            raise ValueError(f"its step is {contents['step']!r:.20}, not its manifest's")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a checkpoint of bitllm ({first_line(error)})") from error
    return contents


def checkpoint_step(path: str | Path) -> int:
    """The step in the name of a checkpoint."""
    return int(Path(path).stem.split("_")[1])


def list_checkpoints(folder: str | Path | Folder, kind: str = "step") -> list[Path]:
    """Checkpoint files by step, newest last, whole or not."""
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    names = [n for n in folder.names() if re.fullmatch(rf"{kind}_\d{{8,}}\.safetensors", n)]
    return [folder.path / name for name in sorted(names, key=checkpoint_step)]


def newest_checkpoint(folder: str | Path, kind: str = "step") -> dict[str, Any] | None:
    """The newest whole one, None where there is none; every file it skips is logged."""
    for name in Folder(folder).names() if kind == "step" else ():
        if not _NAME.fullmatch(name):
            log.warning(f"skipped: {Path(folder, name)}: not the name of a checkpoint")
    for path in reversed(list_checkpoints(folder, kind)):
        try:
            return load_checkpoint(path)
        except (ValueError, OSError) as error:
            log.warning(f"skipped: {error}")
    return None


def is_finished(folder: Folder, name: str) -> bool:
    """Whether a checkpoint was finished, by its manifest and size, without reading it."""
    try:
        return read_manifest(folder, name)["size"] == folder.size(name)
    except (ValueError, OSError):
        return False


def prune_checkpoints(folder: Folder, keep: int, kind: str = "step", spare: str = "") -> None:
    """Delete what is older than the `keep` newest finished ones of a kind, but not `spare`."""
    names = [path.name for path in list_checkpoints(folder, kind)]
    finished = [name for name in names if is_finished(folder, name)]
    for name in names[: names.index(finished[-keep])] if len(finished) > keep else ():
        if name != spare:
            folder.remove(name)  # first: without its manifest it would look damaged
            folder.remove(Path(name).stem + ".json")


def remove_unfinished(folder: Folder) -> None:
    """Delete what an earlier session began to write and did not finish."""
    names = folder.names()
    for name in filter(_NAME.fullmatch, names):
        if name.endswith(PART) or f"{Path(name).stem}.safetensors" not in names:
            folder.remove(name)


def checked_settings(values: Any, path: Path) -> dict[str, Any]:
    """The settings of a run, every value checked; ValueError names the file and the field."""
    kinds = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    values = values if isinstance(values, dict) else {}
    return {part: asdict(config_from(kind, values.get(part), path)) for part, kind in kinds.items()}


def read_run_config(run: Path) -> dict[str, Any]:
    """config.json of a run, checked."""
    return checked_settings(read_json(run / "config.json"), run / "config.json")


def check_weights(config: ModelConfig, weights: Any, path: Path) -> BitLM:
    """The model of these tensors, themselves, not copies; ValueError where others are expected."""
    with torch.device("meta"):  # a configuration takes no memory
        model = BitLM(config, seed=None)
    try:
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: not the model of its configuration ({why})") from error
    model.fill_rope()
    return model.float()


def load_run(path: str | Path, checkpoint: str | int = "last") -> tuple[BitLM, Any, dict[str, Any]]:
    """`load_model` of a run, a checkpoint or a .pth file, and facts from the checkpoint."""
    path = Path(path)
    if path.suffix == ".pth":
        model = import_seed_checkpoint(path)
        return model.freeze(), load_tokenizer(path.with_name("tokenizer.json")), {}
    contents = load_checkpoint(path, checkpoint)
    try:
        config = config_from(ModelConfig, contents["config"]["model"], path)
        model = check_weights(config, contents["model"], path)
        tokenizer = tokenizer_from(contents["tokenizer"], path)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its checkpoint lacks what generating needs ({error})") from error
    check_tokenizer(tokenizer, config.vocab_size, path)
    facts = {key: contents.get(key) for key in ("step", "config", "loss", "val_loss")}
    return model.freeze(), tokenizer, facts


def load_model(path: str | Path, checkpoint: str | int = "last") -> tuple[BitLM, Any]:
    """A model ready to generate, and its tokenizer; nothing in the files is executed.

    Args:
        path: a run folder or a mirror of one; a checkpoint; a packed file or Hugging Face folder
            that bitllm exported; a seed script's .pth file, its tokenizer.json beside it.
        checkpoint: of a run folder: "last", "best" (lowest validation loss) or a kept step.
    """
    path = Path(path)
    packed = path.suffix in (".safetensors", ".gguf") and not _NAME.fullmatch(path.name)
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
# 10 Command line
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
