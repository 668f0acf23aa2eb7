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
    3 Model           the transformer and its initialisation
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
    [1] Ma et al., The Era of 1-bit LLMs, 2024, arXiv:2402.17764, and its "Training Tips" and FAQ.
    [2] Ma et al., BitNet b1.58 2B4T Technical Report, 2025, arXiv:2504.12285.
    [3] Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    [4] Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864.
    [5] Hägele et al., Scaling Laws Beyond Fixed Training Durations, 2024, arXiv:2405.18392 (wsd).
    [6] Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import importlib
import io
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from numbers import Integral, Real
from operator import ge, gt, le, lt
from pathlib import Path
from typing import TYPE_CHECKING, Any

STARTED = time.monotonic()  # of a command: before torch, whose import takes seconds
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # more is slow beside others: docs/log.md
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

log = logging.getLogger("bitllm")

__all__ = ["PRESETS", "DataConfig", "ModelConfig", "SamplingConfig", "TrainConfig"]
__all__ += ["BitLM", "BitLinear", "activation_quant", "weight_quant"]
__all__ += ["TokenData", "load_tokenizer", "prepare_data", "train_tokenizer"]
__all__ += ["evaluate", "generate", "load_checkpoint", "load_model", "save_checkpoint", "stream"]
__all__ += ["Callback", "TrainState", "import_seed_checkpoint", "train"]

# -----------------------------------------------------------------------------
# 1 Configuration
# Every field is a command-line flag of the same name. __post_init__ only checks.

END_OF_TEXT = "<|endoftext|>"
MARKS = "\ufdd0\ufdd1"  # in no text; bitllm/conversations.py puts them around turns
TOKENIZERS = ("bpe", "wordpiece")  # that are trained here; any other is a file or of the hub
MIN_VOCAB_SIZE = 257  # 256 bytes and END_OF_TEXT


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise the ValueError that names a field, its value and what was expected, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def config_from(kind: Any, values: Any, path: Path) -> Any:
    """A configuration as a file gives it; ValueError names the file and what is wrong in it."""
    try:
        if not isinstance(values, dict):
            raise ValueError(f"expected the fields of a {kind.__name__}, got {values!r:.80}")
        if unknown := values.keys() - {item.name for item in fields(kind)}:
            raise ValueError(f"{min(unknown)!r:.80} is no field of {kind.__name__}")
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def first_line(error: Exception) -> str:
    """The first line of a library's error, to quote in a message of ours."""
    return next(iter(str(error).strip().splitlines()), "")[:140]


def library(name: str, why: str, how: str = "the package {0}: pip install {0}") -> Any:
    """An optional library, imported; ImportError says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (package := name.partition(".")[0], name):
            raise
        raise ImportError(f"{why} needs {how.format(package)}") from error


def extension(module: str, why: str) -> Any:
    """The module `bitllm.<module>`, the core's one way to the package; ImportError without it."""
    sys.modules.setdefault("bitllm_core", sys.modules[__name__])  # run as a script: no second copy
    how = "the {0} package, not bitllm_core.py alone: pip install its repository"
    return library(f"bitllm.{module}".rstrip("."), why, how)


_COMPARE: dict[str, Any] = {"at_least": ge, "at_most": le, "more_than": gt, "less_than": lt}


def _field(default: Any, **limits: Any) -> Any:
    """A checked field: limits as in _COMPARE, large ones against hostile files; or `one_of`."""
    return field(default=default, metadata=limits)


_TYPES: dict[str, Any] = {"None": (lambda _: None, type(None)), "int": (int, Integral)}
_TYPES |= {"bool": (bool, (bool, np.bool_)), "float": (float, Real), "str": (str, (str, Path))}


def _converted(name: str, value: Any, kinds: list[str]) -> Any:
    """`value` as the first of the types that it can be without loss, numpy's and paths too."""
    for kind in kinds:
        make, types = _TYPES[kind]
        whole = kind == "int" and isinstance(value, Real) and value % 1 == 0  # 2000.0
        if isinstance(value, types) or whole:
            if (kind == "bool") == isinstance(value, bool | np.bool_):
                return make(value)
    raise ValueError(f"{name}={value!r:.80}: expected {' or '.join(kinds)}")


class _Checked:
    def __post_init__(self: Any) -> None:
        for item in fields(self):
            name, kinds = item.name, str(item.type).split(" | ")
            value = _converted(name, getattr(self, name), kinds)
            object.__setattr__(self, name, value)
            require(value not in (math.inf, -math.inf), name, value, "a finite number")
            for rule, limit in item.metadata.items():
                if rule == "one_of":
                    require(value in limit, name, value, f"one of {', '.join(limit)}")
                elif value is not None or item.default is not None:
                    expected = f"{rule.replace('_', ' ')} {limit:,}"
                    require(_COMPARE[rule](value, limit), name, value, expected)


def _require_divisor(name: str, value: int, number: int, meaning: str) -> None:
    """ValueError, with a divisor of `number` to use instead, unless `value` is one."""
    divisors = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    nearest = min(divisors, key=lambda d: (abs(d - value), d))
    fits = value >= 1 and number % value == 0
    require(fits, name, value, f"a divisor of {meaning}, such as {nearest}")


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """The shape of the network, in Hugging Face's names."""

    vocab_size: int = _field(2048, at_least=MIN_VOCAB_SIZE, at_most=1 << 24)
    """embedding rows; at most this many tokens are learned, and a given tokenizer decides itself"""
    hidden_size: int = _field(256, at_least=1, at_most=1 << 16)
    """width of the residual stream"""
    intermediate_size: int = _field(768, at_least=1, at_most=1 << 18)
    """width inside the feed-forward block"""
    num_hidden_layers: int = _field(4, at_least=1, at_most=1 << 10)
    """transformer blocks"""
    num_attention_heads: int = _field(4, at_least=1)
    """query heads; each is hidden_size / num_attention_heads wide"""
    num_key_value_heads: int | None = None
    """key and value heads, shared by groups of query heads; default: num_attention_heads"""
    max_position_embeddings: int = _field(128, at_least=2, at_most=1 << 20)
    """context length and length of a training window, tokens"""
    rope_theta: float = _field(10_000.0, more_than=0)
    """base wavelength of the rotary embedding"""
    rms_norm_eps: float = _field(1e-5, more_than=0)
    """added to the mean square in every norm"""
    tie_word_embeddings: bool = True
    """use the (float) embedding as output head; otherwise the head is a BitLinear of its own"""
    linear: str = _field("ternary", one_of=("ternary", "weight_only", "dense"))
    """form of every BitLinear: ternary (and 8-bit activations), weight_only, or dense (the twin)"""
    block: str = _field("bitnet", one_of=("bitnet", "seed"))
    """bitnet (RMSNorm, rotary, SiLU, sub-norms) or seed (LayerNorm, learned positions, ReLU)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, kv_heads, D = self.num_attention_heads, self.num_kv_heads, self.hidden_size
        _require_divisor("num_attention_heads", heads, D, f"hidden_size={D}")
        _require_divisor("num_key_value_heads", kv_heads, heads, f"num_attention_heads={heads}")
        even = self.block == "seed" or self.head_dim % 2 == 0
        require(even, "num_attention_heads", heads, f"an even head width, not {self.head_dim}")

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
        block = 2 * D * D + 2 * D * kv + 3 * D * M + 3 * D + M
        rest = D + self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        if self.block == "seed":
            block += D - M - D * M  # LayerNorms, no sub-norm, no gate
            rest += D + self.max_position_embeddings * D
        return self.num_hidden_layers * block + rest


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Where the text comes from and how it becomes tokens."""

    data: str = "pydocs"
    """a file, folder, known name or hf:OWNER/NAME[:CONFIG][#COLUMN]; or shares: a.txt:0.7,b:0.3"""
    validation_data: str | None = None
    """a second source to validate on; default: the source's own split, or its held-out tail"""
    validation_fraction: float = _field(0.05, more_than=0, less_than=0.9)
    """share of the text held out where the source has no validation split"""
    text_column: str | None = None
    """column of .jsonl, .parquet or hub rows; default: text, or the only column of strings"""
    max_train_tokens: int | None = _field(None, at_least=1)
    """train on at most this many; hub sources and folders then arrive while training runs"""
    tokenizer: str = "bpe"
    """bpe (byte-level, lossless), wordpiece (the seed's), a tokenizer.json, or hf:OWNER/NAME"""
    encoding: str | None = None
    """of local text, such as latin-1; default: UTF-8, or what a byte order mark says"""
    persona: str | None = None
    """who the companion is: "name=Luna; home=a boat" (likes, maker, motto); a flag takes a .json"""
    document_separator: str | None = None
    """a line that ends a document of a .txt, such as <|endoftext|>; default: there is none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data), "data", "", "a file, a folder, a data set's name or pydocs")
        fits = not self.persona or re.search("(^|,) *companion(:|$)", self.data) is not None
        require(fits, "persona", self.persona, f"none with data={self.data!r}; companion has one")


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """How long, how fast and how carefully to train."""

    max_steps: int = _field(200, at_least=1)
    """optimizer steps in all; of a run by the clock, a guess"""
    batch_tokens: int = _field(4096, at_least=1, at_most=1 << 27)
    """tokens per optimizer step, a multiple of max_position_embeddings"""
    minutes: float | None = _field(None, more_than=0, at_most=1e6)
    """end by the clock: minutes of all sessions, with start, evaluations and saving"""
    micro_batch_size: int | None = _field(None, at_least=1)
    """windows at once on the device; default: found. Does not change the mathematics"""
    seed: int = _field(0, at_least=0)
    """of the initial weights and the order of the data"""
    init_from: str | None = None
    """weights to begin with: a run folder, a packed file, a Hugging Face folder, hf:OWNER/NAME"""
    optimizer: str = _field("muon", one_of=("muon", "adamw"))
    """muon (matrices; AdamW for the rest) or adamw"""
    learning_rate: float | None = _field(None, more_than=0)
    """peak rate of the matrices; default: as tuned, 0.04 with muon (0.02 where linear=dense)"""
    adamw_learning_rate: float | None = _field(None, more_than=0)
    """peak rate of embedding, norms, head; default: 0.005 with muon, learning_rate with adamw"""
    weight_decay: float = _field(0.0, at_least=0)
    """decoupled, on matrices only"""
    momentum: float = _field(0.95, at_least=0, less_than=1)
    """Muon's"""
    adam_beta1: float = _field(0.9, at_least=0, less_than=1)
    """AdamW's decay of the mean gradient"""
    adam_beta2: float = _field(0.95, at_least=0, less_than=1)
    """AdamW's decay of the mean square gradient"""
    max_grad_norm: float = _field(1.0, at_least=0)
    """clip AdamW's gradients to this norm (Muon's step does not depend on it); 0: never"""
    schedule: str = _field("wsd", one_of=("wsd", "cosine"))
    """wsd (warm-up, constant, linear cooldown) or cosine"""
    warmup_steps: int = _field(20, at_least=0)
    """optimizer steps of linear warm-up"""
    cooldown_fraction: float = _field(0.4, at_least=0, at_most=1)
    """share of max_steps, or of minutes, in the cooldown of wsd"""
    device: str = _field("auto", one_of=("auto", "cpu", "cuda", "mps"))
    """auto, cpu, cuda or mps"""
    dtype: str = _field("auto", one_of=("auto", "float32", "bfloat16", "float16"))
    """of matrix products: auto, float32, bfloat16, float16. Master weights are float32"""
    compile: str = _field("auto", one_of=("auto", "on", "off"))
    """torch.compile: auto (where it pays), on, off"""
    fsdp: bool = False
    """shard the model over several processes (FSDP), for a model that does not fit on one GPU"""
    deterministic: bool = False
    """ask a GPU for repeatable kernels (slower); a CPU always is"""
    log_every_steps: int = _field(10, at_least=1)
    """optimizer steps between lines in metrics.jsonl"""
    eval_every_steps: int = _field(100, at_least=0)
    """optimizer steps between evaluations; 0: only at the end"""
    eval_tokens: int = _field(65_536, at_least=1)
    """validation tokens of an evaluation during training; at the end: all"""
    patience: int = _field(0, at_least=0)
    """evaluations in a row without a better validation loss that end the run; 0: none do"""
    sample_prompt: str = ""
    """start of the text generated at each evaluation"""
    save_every_steps: int = _field(0, at_least=0)
    """optimizer steps between checkpoints; 0: by time only"""
    save_every_minutes: float = _field(5.0, at_least=0)
    """minutes between checkpoints; 0: by steps only"""
    save_every_epoch: bool = False
    """keep a checkpoint of every finished epoch, as the seed script does"""
    keep_checkpoints: int = _field(2, at_least=1)
    """how many of the newest checkpoints to keep"""


@dataclass(frozen=True)
class SamplingConfig(_Checked):
    """How the next token is chosen."""

    max_new_tokens: int = _field(100, at_least=0)
    """tokens to generate, at most"""
    temperature: float = _field(0.8, at_least=0)
    """divides the logits; 0: always the likeliest token"""
    top_k: int = _field(50, at_least=0)
    """choose among this many likeliest tokens; 0: all"""
    top_p: float = _field(1.0, more_than=0, at_most=1)
    """choose among the likeliest tokens whose probabilities reach this sum"""
    repetition_penalty: float = _field(1.0, more_than=0)
    """divides (negative: multiplies) the logits of tokens already in the text; 1: none"""
    seed: int | None = _field(None, at_least=0)
    """of the choices; default: a new one each time"""


def peak_rates(model: ModelConfig, training: TrainConfig) -> tuple[float, float]:
    """Peak rates of the matrices and of the rest; by default as tuned in tools/experiments.py.
    A ternary weight changes only when its master crosses a threshold: it wants a higher rate.
    """
    muon = training.optimizer == "muon"
    tuned = (0.02 if model.linear == "dense" else 0.04) if muon else 1.5e-3
    matrices = training.learning_rate or tuned
    return matrices, training.adamw_learning_rate or (5e-3 if muon else matrices)


def check_configs(model: ModelConfig, training: TrainConfig) -> None:
    """Check what depends on two configurations; ValueError names field, value and remedy."""
    context, batch = model.max_position_embeddings, training.batch_tokens
    windows, below = batch // context, max(batch // context, 1) * context
    expected = f"a multiple of max_position_embeddings={context}, such as {below}"
    require(batch % context == 0, "batch_tokens", batch, f"{expected} or {below + context}")
    micro = training.micro_batch_size or 1
    _require_divisor("micro_batch_size", micro, windows, f"the {windows} windows per step")


# ModelConfig(vocab_size, hidden_size, intermediate_size, layers, heads, key/value heads, context),
# TrainConfig(max_steps, batch_tokens); t4-* are sized by arithmetic and not timed on a T4
_CI_TRAINING = TrainConfig(
    40, 1024, warmup_steps=4, eval_every_steps=20, eval_tokens=4096, log_every_steps=5
)
_DEMO: dict[str, Any] = {"learning_rate": 0.03, "cooldown_fraction": 0.7, "save_every_steps": 100}
_DEMO_TRAINING = TrainConfig(640, 2048, eval_every_steps=200, eval_tokens=8192, patience=3, **_DEMO)
_OFTEN: dict[str, Any] = {"adamw_learning_rate": 0.005, "weight_decay": 0.5}
_SEED_MODEL = ModelConfig(
    30000, 512, 2048, 6, 8, None, 512, tie_word_embeddings=False, linear="weight_only", block="seed"
)
_ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 0.01}
_ADAMW |= {"adam_beta2": 0.999, "max_grad_norm": 0.0, "warmup_steps": 0}
_SEED_TRAINING = TrainConfig(3000, 8192, cooldown_fraction=0.0, save_every_epoch=True, **_ADAMW)
PRESETS: dict[str, tuple[ModelConfig, DataConfig, TrainConfig]] = {
    "ci": (ModelConfig(512, 64, 192, 2, 2, 1, 64), DataConfig(), _CI_TRAINING),
    "demo": (ModelConfig(1024, 256, 512, 3, 4, None, 256), DataConfig("companion"), _DEMO_TRAINING),
    "laptop": (
        ModelConfig(16_384, 256, 512, 8, 4, 2, 256),
        DataConfig("wikitext-2"),
        TrainConfig(1400, 8192, learning_rate=0.024, eval_every_steps=140, patience=3, **_OFTEN),
    ),
    "t4-1h": (
        ModelConfig(8192, 512, 1536, 8, 8, 4, 512),
        DataConfig("tinystories", max_train_tokens=150_000_000),
        TrainConfig(2500, 65_536, warmup_steps=100, eval_every_steps=250),
    ),
    "t4-3h": (
        ModelConfig(16_384, 768, 2048, 7, 12, 4, 512),
        DataConfig("fineweb-edu", max_train_tokens=300_000_000),
        TrainConfig(4000, 65_536, warmup_steps=100, eval_every_steps=250),
    ),
    "seed": (_SEED_MODEL, DataConfig("wikitext-2", tokenizer="wordpiece"), _SEED_TRAINING),
}
_TUNING = {"init_from": "runs/t4-1h", "learning_rate": 0.01, "adamw_learning_rate": 0.00125}
PRESETS["t4-chat"] = (  # at a quarter of the rates that its source began with
    PRESETS["t4-1h"][0],
    DataConfig("smol-smoltalk", max_train_tokens=60_000_000),
    TrainConfig(900, 65_536, warmup_steps=50, eval_every_steps=90, **_TUNING),
)

# -----------------------------------------------------------------------------
# 2 Quantization
# Both quantizers compute in float32: in float16, 127/absmax overflows below absmax 1.94e-3.

_SCALE_FLOOR = 1e-5  # the reference's clamp [1]


def weight_quant(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight matrix, (O, I), to {-1, 0, 1} times one scale (absmean; [1], eq. 1-3).

    Returns ternary, (O, I), and scale, (), both float32, of which the authors' function returns
    the product: it approximates weight. ValueError where `weight` is not a matrix.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected a matrix")
    weight = weight.float()
    scale = weight.abs().mean().clamp(min=_SCALE_FLOOR)
    return F.hardtanh_((weight / scale).round_()), scale  # clamped; in place, a fifth faster


def _to_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127, float32, like x, (..., I), and the factor they were scaled by."""
    x = x.float()
    scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=_SCALE_FLOOR)  # (..., 1)
    return (x * scale).round().clamp(-128, 127), scale


def activation_quant(x: Tensor) -> Tensor:
    """Round each token's vector of x, (..., I), to 8 bits and back: float32 (absmax; [1], FAQ)."""
    integers, scale = _to_8_bits(x)
    return integers / scale


class _StraightThrough(torch.autograd.Function):
    """`x + (q(x) - x).detach()` is the same, but three times slower when compiled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0].to(ctx.dtype), None


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, which was computed from x; its gradient reaches x unchanged ([1], FAQ)."""
    return _StraightThrough.apply(x, quantized) if torch.is_grad_enabled() else quantized


def quantize_input(x: Tensor, linear: str) -> Tensor:
    """What BitLinears of form `linear` read: 8-bit values where that is ternary."""
    return straight_through(x, activation_quant(x.detach())) if linear == "ternary" else x


KERNELS: list[Any] = []  # faster inference, bit for bit the same; importing bitllm.cpu adds one:
# `ready(x) -> bool`, `rms_norm(x, weight, eps)` and, for frozen layers, `ternary_linear(x, layers)`


def kernels_for(x: Tensor) -> Any:
    """The first of KERNELS that is ready; None where a gradient is wanted or torch compiles."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return next((kernels for kernels in KERNELS if kernels.ready(x)), None)


def project(x: Tensor, layers: Sequence[BitLinear]) -> Sequence[Tensor]:
    """Each layer's output for one input, (..., I), which is quantized once for all of them."""
    first = layers[0]
    packed = first.frozen and first.linear == "ternary" and first.held is None
    if packed and (kernels := kernels_for(x)) is not None:
        return kernels.ternary_linear(x, layers)
    if not first.frozen:  # the inference form quantizes its input itself
        x = quantize_input(x, first.linear)
    return [layer(x) for layer in layers]


class BitLinear(nn.Linear):
    """A matrix without bias that computes with ternary weights and learns in full precision.

    Call it through `project`. "weight_only" does not quantize the input, "dense" nothing at all.

    `freeze` replaces the weight by its inference form at two bits each: `packed`, uint8
    (O, ceil(I / 4)), whose byte j of a row holds inputs j + k * ceil(I / 4), and `weight_scale`,
    float32 (). The output stays the same to float rounding; "ternary" adds up integers, so that
    every way to compute it gives the same bits.
    Never quantize t * s again: the mean of weights that are already ternary is below their scale.
    """

    packed: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, linear: str = "ternary") -> None:
        super().__init__(in_features, out_features, bias=False)
        self.shape, self.linear, self.frozen = self.weight.shape, linear, False
        self.held: Tensor | None = None  # see BitLM.hold_weights

    @property
    def trits(self) -> Tensor:
        """The trits of the inference form: int8, (O, I)."""
        codes = torch.cat([self.packed >> 2 * k & 3 for k in range(4)], dim=1)
        return codes[:, : self.in_features].to(torch.int8) - 1

    def effective_weight(self) -> Tensor:
        """The weight that multiplies: t * s, or the dense weight. (O, I)"""
        if self.frozen:
            return self.trits * self.weight_scale
        if self.held is not None:
            return straight_through(self.weight, self.held)
        if self.linear == "dense":
            return self.weight
        ternary, scale = weight_quant(self.weight.detach())
        return straight_through(self.weight, ternary.mul_(scale))

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
        if not self.frozen and self.linear != "dense":
            self.set_ternary(*self.ternary())

    def set_ternary(self, trits: Tensor, scale: Tensor) -> None:
        """Take the inference form with these trits, (O, I), and their scale, float32 ()."""
        codes = F.pad(trits + 1, (0, -self.in_features % 4)).to(torch.uint8)
        a, b, c, d = codes.chunk(4, dim=1)
        self.register_parameter("weight", None)
        self.register_buffer("packed", a | b << 2 | c << 4 | d << 6)
        self.register_buffer("weight_scale", scale)
        self.frozen = True

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
# The block of BitNet b1.58 2B4T [2] with a SiLU gate, and the seed guide's, of the same classes.


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square and multiply by a learned weight, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        kernels = kernels_for(x)
        return kernels.rms_norm(x, self.weight, self.eps) if kernels else super().forward(x.float())


def _norm(config: ModelConfig, size: int) -> nn.Module:
    return nn.LayerNorm(size) if config.block == "seed" else RMSNorm(size, config.rms_norm_eps)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (k, k + K/2) of x, (B, H, T, K), by rope, (2, B or 1, 1, T, K/2) [4]."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens so far, at most `max_position_embeddings` of them."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        layers, G = config.num_hidden_layers, config.num_kv_heads
        shape = (layers, batch, G, config.max_position_embeddings, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device) for _ in range(2))
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, T, K) and return all so far, (B, G, length + T, K)."""
        new = slice(self.length, self.length + keys.shape[2])
        self.keys[layer, :, :, new], self.values[layer, :, :, new] = keys, values
        return self.keys[layer, :, :, : new.stop], self.values[layer, :, :, : new.stop]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention, (B, H, T, K); `causal`: to all up to itself."""
    if causal and q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] <= 256:
        q, k, v = q.float(), k.float(), v.float()  # torch's kernel: over twice as fast at 128
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.layer = config.head_dim, layer
        D, kv = config.hidden_size, config.num_kv_heads * config.head_dim
        self.q_proj = BitLinear(D, D, config.linear)
        self.k_proj = BitLinear(D, kv, config.linear)
        self.v_proj = BitLinear(D, kv, config.linear)
        self.o_proj = BitLinear(D, D, config.linear)
        self.attn_sub_norm = nn.Identity() if config.block == "seed" else _norm(config, D)

    def forward(self, x: Tensor, rope: Tensor | None, cache: Any, mask: Tensor | None) -> Tensor:
        y = self.mix(project(x, (self.q_proj, self.k_proj, self.v_proj)), rope, cache, mask)
        return project(self.attn_sub_norm(y.to(x.dtype)), (self.o_proj,))[0]

    def mix(self, projected: Any, rope: Any, cache: Any, mask: Any, attend: Any = attend) -> Tensor:
        """What tokens read of each other, (B, T, D), by their queries, keys and values."""
        (B, T, D), K = projected[0].shape, self.head_dim
        q, k, v = (y.view(B, T, -1, K).transpose(1, 2) for y in projected)  # (B, H or G, T, K)
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        groups = q.shape[1] // k.shape[1]
        if T == 1 and mask is None:  # it attends to all: the heads of a group can be its queries
            q, groups = q.view(B, k.shape[1], groups, K), 1
        if groups > 1:  # not enable_gqa: the T4's memory-efficient kernel does not have it
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = attend(q, k, v, mask, mask is None and T > 1)
        return y.reshape(B, 1, D) if T == 1 else y.transpose(1, 2).reshape(B, T, D)


class FeedForward(nn.Module):
    """Gated SiLU with a norm before `down_proj`; in the seed's block, plain ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
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

    def forward(self, x: Tensor, rope: Tensor | None, cache: Any, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


CHUNK_BYTES = {"cpu": 128 << 20, "mps": 128 << 20, "cuda": 512 << 20}  # of logits at once
CHUNK_COLUMNS = 4096  # of them in one product on a CPU, to stay near its caches: docs/log.md


def log_total(logits: Tensor) -> Tensor:
    """log of the sum of exp of each row, (N, 1), in float32."""
    return logits.float().logsumexp(1, keepdim=True)


def logits_gradient(logits: Tensor, total: Tensor, target: Tensor) -> Tensor:
    """Of the cross-entropy: p of each token, less 1 at the column `target`, (N, 1), if there."""
    p = (logits - total).exp_()  # float32
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    return p.add_(columns == target.int(), alpha=-1).to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Head and cross-entropy in one, a chunk of tokens at a time: all logits would be too large.

    A chunk's gradient is taken while its logits are there, as in Liger Kernel [6], by `softmax`:
    `log_total`, `logits_gradient`, and what adds dy^T x to a weight's, or None; none without it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, weight, targets, softmax, losses = inputs
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        total_of, gradient_of, add = softmax or (log_total, None, None)
        losses = hidden.new_zeros(len(hidden), 1).float() if losses is None else losses.zero_()
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            grads = hidden, weight if add else w
            d_hidden, d_weight = (torch.zeros_like(t) if softmax else t for t in grads)
            ctx.save_for_backward(d_hidden, d_weight)
            width = CHUNK_COLUMNS if kind == "cpu" else len(w)
            columns, d_columns = w.split(width), d_weight.split(width)
            rows = max(1, CHUNK_BYTES[kind] // (dtype.itemsize * len(w) * 32)) * 32
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                ignored = (targets[part] == -100)[:, None]  # (rows, 1)
                x = hidden[part].to(dtype).masked_fill(ignored, 0)  # adds 0 to the weight's
                logits = [x @ c.T for c in columns]  # (rows, V)
                total = log_total(torch.cat([total_of(block) for block in logits], 1))
                target = targets[part, None].clamp(min=0)
                for block, c, d_c in zip(logits, columns, d_columns, strict=True):
                    there = (0 <= target) & (target < len(c)) & ~ignored
                    losses[part] += (total - block.gather(1, target.clamp(0, len(c) - 1))) * there
                    if gradient_of:
                        d_block = gradient_of(block, total, target)
                        d_hidden[part] += (d_block @ c).masked_fill_(ignored, 0)
                        add(d_c, d_block, x) if add else d_c.addmm_(d_block.T, x)
                    target = target - len(c)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad[0], d_weight.mul_(grad[0]), None, None, None


class BitLM(nn.Module):
    """The language model. `seed`: of the initial weights; None leaves them to the caller."""

    rope: Tensor

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config, V, D = config, config.vocab_size, config.hidden_size
        trunk: Any = nn.Module()  # all but the head: so parameters have Hugging Face's names
        trunk.embed_tokens = nn.Embedding(V, D)
        if config.block == "seed":
            trunk.embed_positions = nn.Embedding(config.max_position_embeddings, D)
        trunk.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        trunk.norm = _norm(config, D)
        self.model = trunk
        self.lm_head = None if config.tie_word_embeddings else BitLinear(D, V, config.linear)
        self.losses: Tensor | None = None  # takes that of each target, (B * T, 1), where wanted
        self.fill_rope()
        if seed is not None:
            initialize(self, torch.Generator().manual_seed(seed))

    def fill_rope(self) -> None:
        """Compute cos and sin of position and feature pair, (2, T, K/2) [4]; again after `meta`."""
        config, K = self.config, self.config.head_dim
        frequencies = config.rope_theta ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
        angles = torch.outer(torch.arange(config.max_position_embeddings).double(), frequencies)
        rope = torch.stack([angles.cos(), angles.sin()]).float()
        self.register_buffer("rope", rope, persistent=False)

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
        """Quantize each weight once, to `dtype`. Gradients reach it; updates only after this."""
        layers = self.bit_linears().values()
        try:
            for layer in layers:
                layer.hold(dtype)
            yield
        finally:
            for layer in layers:
                layer.held = None

    def embed(self, input_ids: Tensor, at: Tensor) -> Tensor:
        """What the first block reads, (B, T, D), of tokens at the positions `at`, (T) or (B, T)."""
        x = self.model.embed_tokens(input_ids)
        return x + self.model.embed_positions(at) if self.config.block == "seed" else x

    def blocks(
        self, x: Tensor, at: Tensor, cache: Any = None, mask: Any = None, blocks: Sequence[Any] = ()
    ) -> Tensor:
        """The normed output of the last block, (B, T, D), of what `embed` returns.

        `mask`, (..., T, keys), is True where a token attends to a key; None: to all up to itself.
        `blocks` may be compiled versions of the model's own.
        """
        rope = None
        if self.config.block == "bitnet":
            rope = self.rope[:, at].view(2, -1, 1, x.shape[1], self.config.head_dim // 2)
        for block in blocks or self.model.layers:
            x = block(x, rope, cache, mask)
        return self.model.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., V)."""
        if self.lm_head is not None:
            return project(hidden, (self.lm_head,))[0]
        return F.linear(hidden, self.model.embed_tokens.weight)

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, left_pad: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each given one, (B, T, V); ValueError beyond the context.

        `cache` has keys and values of the tokens before these; those of these are appended to it.
        `left_pad`, (B,), says how many tokens at the start of each row are padding.
        """
        T, past = input_ids.shape[1], cache.length if cache else 0
        limit = self.config.max_position_embeddings
        require(past + T <= limit, "tokens", past + T, f"at most max_position_embeddings={limit}")
        keys = torch.arange(past + T, device=input_ids.device)
        at, mask = keys[past:], None
        if left_pad is not None:
            own = keys == at[:, None]  # padding attends to itself: no keys at all would be NaN
            seen = (keys <= at[:, None]) & (keys >= left_pad[:, None, None]) | own
            mask = seen[:, None]  # (B, 1, T, past + T)
            at = (at - left_pad[:, None]).clamp(min=0)  # (B, T)
        elif past and T > 1:
            mask = keys <= at[:, None]  # (T, past + T)
        hidden = self.blocks(self.embed(input_ids, at), at, cache, mask)
        if cache:
            cache.length += T
        return self.head(hidden)

    def loss(
        self, input_ids: Tensor, targets: Tensor, blocks: Any = (), softmax: Any = None
    ) -> Tensor:
        """Cross-entropy in nats, summed over the tokens of `targets`, (B, T), that are not -100.

        `blocks` and `softmax` may be compiled versions: see `_ChunkedLoss`. Float32.
        """
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.blocks(self.embed(input_ids, at), at, blocks=blocks).flatten(0, 1)  # (N, D)
        weight = self.model.embed_tokens.weight  # (V, D)
        if self.lm_head is not None:
            hidden = quantize_input(hidden, self.config.linear)
            weight = self.lm_head.effective_weight()
        softmax = softmax or (log_total, logits_gradient, None) if torch.is_grad_enabled() else None
        return _ChunkedLoss.apply(hidden, weight, targets.flatten(), softmax, self.losses)


@torch.no_grad()
def initialize(model: BitLM, generator: torch.Generator, keep: Any = Tensor.copy_) -> None:
    """Make values on the CPU from one generator and call `keep(parameter, values)` for each.

        parameter, in the order of names     distribution
        embed_tokens, embed_positions        normal, std 0.02 (the tied head starts near uniform)
        q, k, v, gate, up, untied head       uniform, std 1/sqrt(in_features); bitnet: / 2
        o_proj, down_proj                    the same / sqrt(2 num_hidden_layers); bitnet: / 10 more
        norms                                weight 1, bias 0

    Outputs are proportional to weights, ternary or not. From half unit gain, trits turn sooner.
    """
    gain, less = (0.5, 0.1) if model.config.block == "bitnet" else (1.0, 1.0)
    depth = less * (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in sorted(model.named_parameters()):
        values = torch.empty(parameter.shape, device="cpu")
        if "norm" in name:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        elif "embed" in name:
            values.normal_(0.0, 0.02, generator=generator)
        else:
            bound = gain * (3 / values.shape[1]) ** 0.5
            bound *= depth if "o_proj" in name or "down_proj" in name else 1.0
            values.uniform_(-bound, bound, generator=generator)
        keep(parameter, values)


# -----------------------------------------------------------------------------
# 4 Tokenizer
# The library `tokenizers` does the work; here are the choice of tokenizer and its special tokens.


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> Any:
    """Train a tokenizers.Tokenizer of at most `vocab_size` tokens; the same for the same texts.

    `kind` is "bpe", byte-level with GPT-2's pre-tokenizer: decode(encode(x)) == x for every string;
    or "wordpiece", the seed's, which loses white space and unknown characters, and reads all the
    texts into memory.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    require(vocab_size >= MIN_VOCAB_SIZE, "vocab_size", vocab_size, f"at least {MIN_VOCAB_SIZE}")
    with contextlib.suppress(ImportError):
        texts = extension("wordpiece", "").bounded_words(texts)
    if kind == "wordpiece":
        module = extension("wordpiece", "training a WordPiece tokenizer")
        tokenizer = module.train_word_pieces(texts, vocab_size)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.encode_special_tokens = True  # inside a text, they are text
    return tokenizer


def tokenizer_from(text: str, path: Path) -> Any:
    """The tokenizer in a tokenizer.json, neither truncating nor padding; ValueError names it."""
    from tokenizers import Tokenizer, decoders

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer.json ({first_line(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.decoder is None and tokenizer.token_to_id("[UNK]") is not None:
        tokenizer.decoder = decoders.WordPiece()  # missing in the seed script's
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | Path) -> Any:
    """Read a tokenizer.json, ours or the seed script's; FileNotFoundError, ValueError name it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a tokenizer.json")
    return tokenizer_from(path.read_text(encoding="utf-8", errors="replace"), path)


def num_ids(tokenizer: Any) -> int:
    """One more than the largest id, which may be more than there are tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def check_tokenizer(tokenizer: Any, vocab_size: int, path: Path) -> None:
    """Raise a ValueError naming the file if an id has no row in the embedding."""
    if (count := num_ids(tokenizer)) > vocab_size:
        raise ValueError(f"{path}: token ids up to {count - 1:,}, but the model's {vocab_size=:,}")


def end_of_text_id(tokenizer: Any) -> int | None:
    """The id of <|endoftext|>; None in the seed script's own tokenizers."""
    return tokenizer.token_to_id(END_OF_TEXT)


def valid_unicode(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate, which has no UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` without special ones. A lone surrogate becomes U+FFFD."""
    return tokenizer.encode(valid_unicode(text), add_special_tokens=False).ids


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does, which versions of the library spell in different ways: its
    ids, and how it splits a text of all its tokens."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    names = sorted(vocab, key=lambda name: (vocab[name], name))
    text = " ".join(names) + "".join(names) + "Ab 12,\n\t é 漢字 🐱"
    found = [names, [vocab[name] for name in names], encode(tokenizer, text)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


# -----------------------------------------------------------------------------
# 5 Data
# Text is read in pieces, never whole; the tokens are memory-mapped files in the run folder.

KNOWN_DATA = {
    "wikitext-2": "hf:Salesforce/wikitext:wikitext-2-raw-v1#text",
    "wikitext-103": "hf:Salesforce/wikitext:wikitext-103-raw-v1#text",
    "tinystories": "hf:roneneldan/TinyStories#text",
    "fineweb-edu": "hf:HuggingFaceFW/fineweb-edu:sample-10BT#text",
    "wikipedia-es": "hf:wikimedia/wikipedia:20231101.es#text",
    "smol-smoltalk": "hf:HuggingFaceTB/smol-smoltalk#messages",
}
HUB_NAME = r"hf:([^/:#]+/[^/:#]+)(?::([^#]+))?(?:#(.+))?"
_OF_LINES = ("wikitext-2", "wikitext-103")  # rows are lines of one long text, not documents
_WITH_VALIDATION = (*_OF_LINES, "tinystories")  # have a validation split
_PIECE_CHARS, _LONGEST_PIECE = 1 << 16, 1 << 18  # lines are joined, longer rows are cut
_TOKENIZER_CHARS = 100_000_000  # text a tokenizer is trained on at most
_MARK_IN_TEXT = "lines that are %s stay text; --document-separator '%s' ends documents there"
_warn_once = lru_cache(log.warning)  # a source is read several times

Piece = tuple[str, bool]  # text, and whether a document ends with it
Part = tuple[Iterator[str], bool, bool]  # rows; whether they are lines; whether the last ends one


def row_texts(rows: Iterator[dict[Any, Any]], column: str | None, source: Any) -> Iterator[str]:
    """The text of each row. The package finds its column; this file alone takes "text"."""
    with contextlib.suppress(ImportError):
        return extension("rows", "").texts(rows, column, source)

    def text_of(row: dict[Any, Any]) -> str:
        value = row.get(column or "text", ...)
        expected = f"a column of text; {source} has {', '.join(row)}"
        require(isinstance(value, str | None), "text_column", column, expected)
        return valid_unicode(value or "")

    return map(text_of, rows)


_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def file_lines(path: Path, opened: Any, encoding: str | None, longest: int = -1) -> Iterator[str]:
    """The lines of a text file, which `opened` opens as a binary one; line ends are \\n.
    `encoding` is by default what its mark says. ValueError: unreadable."""
    why = ""
    try:
        with opened() as file:
            start = file.peek(4)[:4]
            found = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
            if not encoding and found == "utf-8" and b"\0" in start:
                raise ValueError("perhaps UTF-16 without its mark: try --encoding utf-16-le or -be")
            errors = "strict" if encoding else "surrogatepass"
            text = io.TextIOWrapper(file, encoding or found, errors)
            try:
                yield from iter(partial(text.readline, longest), "")
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                why = f"not {error.encoding.upper()} text, at byte {at}; save it as UTF-8, "
                why += "or say what it is (--encoding latin-1)"
    except Exception as error:  # each kind of file has its own
        why = f"cannot be read as text ({first_line(error)})"
    if why:
        raise ValueError(f"{path}: {why}")


def document_lines(path: Path, opened: Any, config: DataConfig) -> Part:
    """A .txt file as one document."""
    return map(valid_unicode, file_lines(path, opened, config.encoding, _LONGEST_PIECE)), True, True


def is_local(source: str) -> bool:
    known = source.partition(":")[0] in ("pydocs", "companion", *KNOWN_DATA)
    return not known and Path(source).expanduser().exists()


def text_parts(source: str, split: str, config: DataConfig) -> Iterator[Part]:
    """Files, a hub's data set or its shards (of a stream); nothing without such a split."""
    if is_local(source):
        path = Path(source).expanduser()
        if path.is_dir() or path.suffix.lower() != ".txt":
            yield from extension("files", f"reading {source}").parts(path, split, config)
        elif split == "train":
            yield document_lines(path, partial(path.open, "rb"), config)
        return
    name = source.partition(":")[0]
    if source == "pydocs" and split == "train":
        from pydoc_data.topics import topics  # the interpreter's own

        yield (topics[name].strip() + "\n" for name in sorted(topics)), False, True
    if name == "companion":
        yield from extension("companion", f"data={source!r}").parts(source, split, config)
    if name in ("pydocs", "companion") or not (split == "train" or source in _WITH_VALIDATION):
        return
    found = re.fullmatch(HUB_NAME, KNOWN_DATA.get(source, source))
    if not found:
        raise FileNotFoundError(
            f"data={source!r}: no such file or folder, and no known data set; expected a .txt, "
            ".jsonl or .parquet file, a folder of them, hf:OWNER/NAME[:CONFIG][#COLUMN], or one "
            f"of {', '.join(['companion', 'pydocs', *KNOWN_DATA])}"
        )
    name, subset, column = found.groups()
    datasets = library("datasets", f"data={name!r} from the Hugging Face hub")
    streaming = config.max_train_tokens is not None
    try:
        data = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:  # each layer of the hub's clients has kinds of its own
        raise ConnectionError(
            f"the data set {name} could not be loaded from the Hugging Face hub "
            f"({' '.join(str(error).split())[:200]}). Without a connection, give a local file "
            "(--data FILE.txt) or the text that comes with Python (--data pydocs)"
        ) from error
    count = data.num_shards if streaming else 1
    for shard in (data.shard(count, i) if streaming else data for i in range(count)):
        rows: Iterator[dict[str, Any]] = (
            dict(zip(batch, values, strict=True))
            for batch in shard.iter(100)
            for values in zip(*batch.values(), strict=True)
        )
        yield row_texts(rows, column or config.text_column, name), source in _OF_LINES, False


def text_pieces(
    rows: Iterable[str], lines: bool, ends: bool, separator: str | None = None
) -> Iterator[Piece]:
    """Rows as documents, or lines joined up to one without indent, which no token could join;
    cut at white space, where there is any, after 262,144 characters. A line that is `separator`
    ends a document and is left out.
    """
    held, ended = "", False
    for row in filter(None, rows):
        mark = lines and row.strip() == separator
        full = len(held) >= _PIECE_CHARS and not row[:1].isspace() and held.endswith("\n")
        if held and (full or mark or not lines):
            yield held, mark or not lines
            held = ""
        elif mark and not ended:
            yield "", True
        if ended := mark:
            continue
        held += row
        while len(held) > _LONGEST_PIECE:
            at = max(held.rfind(" ", 1, _LONGEST_PIECE), 0) or _LONGEST_PIECE
            yield held[:at], False
            held = held[at:]
    if held:
        yield held, ends or not lines


def read_pieces(
    source: str, split: str = "train", config: DataConfig | None = None
) -> Iterator[Piece]:
    """Text of a source in pieces of bounded length, each with whether a document ends there.

    A .txt is one document; a row of anything else is one. No text where there is no such split.

    FileNotFoundError, ValueError: no such source, or not readable as what its name says.
    ConnectionError: the hub cannot be reached (after the library's own few tries).
    """
    config = config or DataConfig(data=source)
    for part in text_parts(source, split, config):
        yield from text_pieces(*part, config.document_separator)


def _part_of(pieces: Iterable[Piece], chars: int, head: bool) -> Iterator[Piece]:
    """The first `chars` characters, or those after them."""
    for text, ends in pieces:
        if 0 < chars < len(text):
            cut = max(text.rfind("\n", 0, chars), text.rfind(" ", 0, chars)) + 1 or chars
            yield (text[:cut], True) if head else (text[cut:], ends)
        elif head == (chars > 0):
            yield text, ends
        chars -= len(text)
        if head and chars <= 0:
            return


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
    finally:
        with contextlib.suppress(OSError):  # there after an error; a full disk needs the room
            beside.unlink()


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def encode_pieces(tokenizer: Any, pieces: Iterable[Piece]) -> Iterator[tuple[list[int], int]]:
    """Tokens of each piece (~id: only read), <|endoftext|> ending documents, and UTF-8 bytes."""
    eot, pieces = end_of_text_id(tokenizer), iter(pieces)
    chat = tokenizer.token_to_id("<|im_start|>") is not None
    while batch := list(itertools.islice(pieces, 16)):
        if chat and any(MARKS[0] in text for text, _ in batch):
            encoded = extension("conversations", "").encode_batch(tokenizer, batch)
        else:
            plain = tokenizer.encode_batch_fast([t for t, _ in batch], add_special_tokens=False)
            tails = ([eot] if ends and eot is not None else [] for _, ends in batch)
            encoded = [tokens.ids + tail for tokens, tail in zip(plain, tails, strict=True)]
        for (text, _), ids in zip(batch, encoded, strict=True):
            if END_OF_TEXT in text:
                _warn_once(_MARK_IN_TEXT, END_OF_TEXT, END_OF_TEXT)
            yield ids, len(text.encode())


def tokenize(
    tokenizer: Any, pieces: Iterable[Piece], path: Path, dtype: str, budget: int | None = None
) -> dict[str, Any]:
    """Write a token file of at most `budget` tokens; return the manifest's entry for it."""
    tokens, size, most = 0, 0, budget or sys.maxsize
    with open_new(path) as file, tqdm(desc=path.name, unit="B", unit_scale=True) as bar:
        for ids, length in encode_pieces(tokenizer, pieces):
            file.write(np.asarray(ids[: most - tokens], dtype=dtype).tobytes())
            tokens, size = min(tokens + len(ids), most), size + length
            bar.update(length)
            if tokens == most:
                break
    return {"tokens": tokens, "bytes": size, "sha256": file_hash(path)}


@dataclass
class TokenData:
    """The tokens of a run, memory-mapped, and the manifest that describes them."""

    training: np.ndarray
    validation: np.ndarray
    manifest: dict[str, Any]

    def wait(self, session: Any) -> bool:
        """Wait for the tokens of the next step; False: the session was stopped meanwhile."""
        return True

    def coming(self, tokenizer: Any) -> contextlib.AbstractContextManager[None]:
        """A block during which more tokens are read in the background, if there are any."""
        return contextlib.nullcontext()

    @property
    def epoch_tokens(self) -> int:
        return len(self.training)

    def steps_per_epoch(self, config: TrainConfig, context: int) -> float:
        return (self.epoch_tokens // context) / (config.batch_tokens // context)

    def batch(self, config: TrainConfig, context: int, step: int) -> np.ndarray:
        """The windows of optimizer step `step` (from 0), (windows, context + 1), int64: a pure
        function of (seed, step). The text is read as a ring, so no token is left out."""
        windows, N = config.batch_tokens // context, self.epoch_tokens
        numbers = np.arange(step * windows, (step + 1) * windows)
        starts = self.window_starts(numbers, context, config.seed)
        return self.training[(starts[:, None] + np.arange(context + 1)) % N].astype(np.int64)

    def window_starts(self, numbers: np.ndarray, context: int, seed: int) -> np.ndarray:
        """Where windows start: each epoch shuffles them anew and cuts at another place."""
        starts, per_epoch = np.empty(len(numbers), dtype=np.int64), self.epoch_tokens // context
        for epoch in np.unique(numbers // per_epoch):
            here = numbers // per_epoch == epoch
            offset, order = _epoch_order(seed, int(epoch), per_epoch, self.epoch_tokens)
            starts[here] = offset + order[numbers[here] % per_epoch] * context
        return starts


@lru_cache(maxsize=16)  # of some sources
def _epoch_order(seed: int, epoch: int, windows: int, tokens: int) -> tuple[int, np.ndarray]:
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(tokens)), generator.permutation(windows)


def same_data(out: Path, config: DataConfig, vocab_size: int) -> bool:
    """Whether a run folder's token files were made with these settings."""
    manifest = read_json(out / "data" / "manifest.json") or {}
    asked = manifest.get("asked") or {}
    data = {**asdict(DataConfig()), **asked.get("data", {})}  # later fields have their defaults
    return {**asked, "data": data} == {"data": asdict(config), "vocab_size": vocab_size}


def _open_data(out: Path) -> tuple[TokenData, Any] | None:
    """What `prepare_data` wrote; None where a part is missing or differs from the manifest."""
    folder, arrays = out / "data", {}
    manifest = read_json(folder / "manifest.json") or {}
    kind = "streaming" * ("stream_state" in manifest) or "mixture" * ("mixture" in manifest)
    try:
        tokenizer = load_tokenizer(out / "tokenizer.json")
        spelled = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()  # of earlier versions
        same = manifest["tokenizer_sha256"] in (tokenizer_hash(tokenizer), spelled)
        require(manifest["dtype"] in ("uint16", "uint32", "int32"), "dtype", "", "integers")
        for split in ("train", "validation")[bool(kind) :]:
            path, expected = folder / f"{split}.bin", manifest[split]
            tokens = arrays[split] = np.memmap(path, dtype=manifest["dtype"], mode="r")
            same &= len(tokens) == expected["tokens"] and file_hash(path) == expected["sha256"]
            same &= bool(tokens.max() < manifest["asked"]["vocab_size"])
        require(same, "data", out, "files as in its manifest")
    except (OSError, KeyError, TypeError, ValueError):
        return None
    if kind:
        opened = extension(kind, "this data").open_data
        data = opened(folder, arrays["validation"], manifest)
        return data and (data, tokenizer)
    return TokenData(arrays["train"], arrays["validation"], manifest), tokenizer


def _write_data(config: DataConfig, context: int, out: Path, manifest: dict[str, Any]) -> None:
    """Train a tokenizer where there is none, and write the token files and their manifest."""
    folder, path, vocab_size = out / "data", out / "tokenizer.json", manifest["asked"]["vocab_size"]
    folder.mkdir(parents=True, exist_ok=True)
    chars, other = sys.maxsize, config.validation_data
    read = partial(read_pieces, config.data, "train", config)
    held = read_pieces(other or config.data, "train" if other else "validation", config)
    held = itertools.chain([first], held) if (first := next(held, None)) else None
    streaming = extension("streaming", "a stream") if "stream_state" in manifest else None
    if not held and not streaming:
        chars = round(sum(len(text) for text, _ in read()) * (1 - config.validation_fraction))
    head = _part_of(read(), min(chars, _TOKENIZER_CHARS), head=True)
    texts = streaming.tokenizer_texts(config) if streaming else (text for text, _ in head)
    chats = MARKS[0] in next(read(), ("", True))[0]
    if config.tokenizer not in TOKENIZERS and not path.is_file():
        extension("vocabulary", "--tokenizer").give_tokenizer(config.tokenizer, path)
    if path.is_file():
        tokenizer = load_tokenizer(path)
    else:
        texts = (text.translate(dict.fromkeys(map(ord, MARKS))) for text in texts)
        tokenizer = train_tokenizer(texts, vocab_size - 2 * chats, config.tokenizer)
    log.info("tokenizer: %d tokens", tokenizer.get_vocab_size())
    if chats:
        extension("conversations", "a conversation").add_marks(tokenizer)
    check_tokenizer(tokenizer, vocab_size, path)
    manifest["tokenizer_sha256"] = tokenizer_hash(tokenizer)
    manifest["dtype"] = "int32" if chats else f"uint{16 if num_ids(tokenizer) <= 1 << 16 else 32}"
    write = partial(tokenize, tokenizer, dtype=manifest["dtype"])
    if streaming:
        manifest |= streaming.begin_stream(config, held, write, folder)
    else:
        most, head = config.max_train_tokens, _part_of(read(), chars, head=True)
        held = held or _part_of(read(), chars, head=False)
        manifest["train"] = write(head, folder / "train.bin", budget=most)
        manifest["validation"] = write(held, folder / "validation.bin")
    for split, needed in (("train", context + 1), ("validation", 2)):
        tokens, more = manifest[split]["tokens"], "more text or a smaller max_position_embeddings"
        expected = f"at least {needed} {split} tokens (one window), not {tokens}. Give {more}"
        require(tokens >= needed, "data", config.data, expected)
    write_atomically(path, tokenizer.to_str(pretty=True).encode())
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def prepare_data(
    config: DataConfig, vocab_size: int, context: int, out: str | Path
) -> tuple[TokenData, Any]:
    """Tokenizer and token files of a run folder, made where they are not there yet.

    Files: `tokenizer.json` (reused when present) and `data/{train,validation}.bin` with
    `data/manifest.json`. The source is not read again once they are there. ValueError: too little
    text, or the local source has changed since the files were made.
    """
    out, asked = Path(out), {"data": asdict(config), "vocab_size": vocab_size}
    manifest = {"format_version": 1, "asked": asked, "source_sha256": None}
    path, mixed = Path(config.data).expanduser(), "," in config.data and not is_local(config.data)
    write = extension("mixture", "a mixture of sources").write_data if mixed else _write_data
    whole = config.data.partition(":")[0] in ("pydocs", "companion") or path.is_file() or mixed
    if config.max_train_tokens and not whole:
        manifest["stream_state"] = None
    elif is_local(config.data):
        files = [path] if path.is_file() else extension("files", "a folder").files_on_disk(path)
        digests = "".join(map(file_hash, files))
        manifest["source_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
    found = _open_data(out) if same_data(out, config, vocab_size) else None
    if found and manifest["source_sha256"]:
        same = manifest["source_sha256"] == found[0].manifest.get("source_sha256")
        expected = f"the text that {out} began with; it has changed. Choose another --out for it"
        require(same, "data", config.data, expected)
    if not found:
        write(config, context, out, manifest)
        found = _open_data(out)
    if not found:
        raise OSError(errno.EIO, "not what was just written", str(out / "data"))
    return found


# -----------------------------------------------------------------------------
# 6 Generation

DECODERS: dict[str, Any] = {}  # by device: a faster step for one token per row (bitllm/cuda.py)


def _choose(logits: Tensor, seen: Tensor, config: SamplingConfig, rng: torch.Generator) -> Tensor:
    """The next token of each row, (B), from logits, (B, V), and the tokens so far, (B, T)."""
    if config.repetition_penalty != 1:
        old, penalty = logits.gather(1, seen), config.repetition_penalty
        logits = logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], -math.inf)
    if config.top_p < 1:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        logits = logits.masked_fill((before >= config.top_p).gather(1, index.argsort()), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=rng).squeeze(1)


@torch.inference_mode()
def generate_tokens(
    model: BitLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    end_id: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield one new token id for each prompt at a time; None for those that have ended.

    A row ends before `end_id`, and consists of tokens below `num_tokens`. When the context is full,
    its older half is dropped and the newer half read again: text may be longer than the context.
    """
    device, limit = next(model.buffers()).device, model.config.max_position_embeddings
    width = max(map(len, prompts))
    pad = torch.tensor([width - len(p) for p in prompts])
    rows = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in prompts])  # (B, T), CPU
    unread, ended = min(width, limit), [False] * len(prompts)
    cache = KVCache(model.config, len(prompts), device)
    rng = torch.Generator()
    rng.manual_seed(config.seed) if config.seed is not None else rng.seed()
    x = torch.empty(len(prompts), model.config.hidden_size, device=device)
    ternary = all(m.frozen and m.linear == "ternary" for m in model.bit_linears().values())
    packed = ternary and kernels_for(x) is not None  # kernels read packed weights as they are
    decoder, step = DECODERS.get(device.type), model
    with contextlib.nullcontext() if packed else model.hold_weights():
        for _ in range(config.max_new_tokens):
            if cache.length + unread > limit:
                unread, cache.length, step = limit // 2, 0, model
            start = rows.shape[1] - unread - cache.length  # of the context
            left_pad = (pad - start).clamp(min=0)  # less than the context: a row's own are newer
            padded = left_pad.to(device) if left_pad.any() else None
            if decoder and unread == 1 and step is model:
                step = decoder(model, cache, padded)
            logits = step(rows[:, -unread:].to(device), cache, padded)[:, -1, :num_tokens]
            chosen = _choose(logits.float().cpu(), rows, config, rng)
            rows, unread = torch.cat([rows, chosen[:, None]], dim=1), 1
            tokens = chosen.tolist()
            ended = [e or token == end_id for e, token in zip(ended, tokens, strict=True)]
            yield [None if e else token for e, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return


def _pieces(
    model: BitLM, tokenizer: Any, prompts: Sequence[str], sampling: SamplingConfig | None
) -> Iterator[list[str]]:
    """Yield the next piece of each prompt's continuation, in complete characters."""
    from tokenizers.decoders import DecodeStream as Decoder

    if getattr(tokenizer.model, "byte_fallback", False):  # the library's fails amid characters
        Decoder = extension("vocabulary", "a tokenizer with a fallback to bytes").Decoder
    eot, size = end_of_text_id(tokenizer), num_ids(tokenizer)
    ids = [encode(tokenizer, p) or [eot or 0] for p in prompts]  # empty: where a document ends
    decoders = [Decoder(skip_special_tokens=True) for _ in ids]
    for decoder, row in zip(decoders, ids, strict=True):
        for token in row:  # word pieces join what came before
            decoder.step(tokenizer, token)
    for tokens in generate_tokens(model, ids, sampling or SamplingConfig(), eot, size):
        rows = zip(decoders, tokens, strict=True)
        yield ["" if t is None else decoder.step(tokenizer, t) or "" for decoder, t in rows]


def stream(
    model: BitLM, tokenizer: Any, prompt: str, sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, in complete characters."""
    yield from (piece for (piece,) in _pieces(model, tokenizer, [prompt], sampling) if piece)


def generate(
    model: BitLM, tokenizer: Any, prompt: Sequence[str], sampling: SamplingConfig | None = None
) -> Any:
    """The continuation of `prompt`, a text; or, of a list of texts, those of all, made at once."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = [""] * len(prompts)
    for pieces in _pieces(model, tokenizer, prompts, sampling) if prompts else ():
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts[0] if isinstance(prompt, str) else texts


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


def warmup_that_fits(config: TrainConfig) -> int:
    """`config.warmup_steps`, or as many as there are before the cooldown, or in the run."""
    rest = 1 - config.cooldown_fraction if config.schedule == "wsd" else 1
    return min(config.warmup_steps, max(int(rest * config.max_steps), 1))


def learning_rate_factor(config: TrainConfig, step: float, time_share: float = 0.0) -> float:
    """What multiplies the peak rates at optimizer step `step` (from 0), in (0, 1].
    wsd: linear warm-up, constant, linear cooldown to 0 [5]; cosine: warm-up, half a cosine to 0.1.
    By the clock, `time_share` of the time has passed, and only the warm-up counts steps.
    """
    warmup = warmup_that_fits(config)
    if step < warmup:
        return (step + 1) / warmup
    step = time_share * config.max_steps if config.minutes else step
    if config.schedule == "cosine":
        span = max(config.max_steps - warmup, 1)
        return 0.55 + 0.45 * math.cos(math.pi * min((step - warmup) / span, 1))
    cooldown = max(round(config.cooldown_fraction * config.max_steps), 1)
    return min(1.0, (config.max_steps - step) / cooldown)


def has_bfloat16(device: torch.device) -> bool:
    """In hardware: on a CPU, AMX or AVX-512 with bfloat16. Emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, n, lambda: False)() for n in names)


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """All parameters, in the optimizers' order."""
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


def scale_gains(adamw: Any, gains: Sequence[Tensor]) -> None:
    """Let AdamW's steps also scale each vector as a whole, at twice its rate, by moments of that:
    alone, its parts follow too slowly where Muon enlarges what reads them (docs/recipe.md)."""

    @torch.no_grad()
    def scale(*_: Any) -> None:
        group = adamw.param_groups[-1]
        for gain, grad in [(p, p.grad) for p in gains if p.grad is not None and p in adamw.state]:
            slope, state = (gain * grad).sum(), adamw.state[gain]
            slope = getattr(slope, "full_tensor", slope.clone)()  # of FSDP's shards
            means = [state.setdefault(k, torch.zeros_like(slope)) for k in ("scale", "scale_sq")]
            means[0].lerp_(slope, 1 - group["betas"][0])
            means[1].lerp_(slope**2, 1 - group["betas"][1])
            gain *= (-2 * group["lr"] * means[0] / (means[1].sqrt() + 1e-8)).exp()

    adamw.register_step_post_hook(scale)


def make_optimizers(model: BitLM, config: TrainConfig, muon: Any = None) -> list[Any]:
    """Muon [3] for the matrices inside the blocks and AdamW for the rest, or AdamW for all.
    Only matrices are decayed. Each group's peak rate is its `initial_lr`. Small models learn more
    with three steps of Newton-Schulz than with torch's five (docs/recipe.md).
    """
    matrices = {f"{n}.weight": m.weight for n, m in model.bit_linears().items() if n != "lm_head"}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    first, second = ({"lr": rate, "initial_lr": rate} for rate in peak_rates(model.config, config))
    decayed = {"params": list(matrices.values()), "weight_decay": config.weight_decay, **first}
    rest = {"params": others, "weight_decay": 0.0, **second}
    adamw = partial(torch.optim.AdamW, betas=(config.adam_beta1, config.adam_beta2), fused=True)
    if config.optimizer == "adamw":
        return [adamw([decayed, rest])]
    with contextlib.suppress(ImportError):  # the same, faster
        muon = muon or extension("muon", "Muon in batches").Muon
    options = {"lr": first["lr"], "momentum": config.momentum, "ns_steps": 3}
    optimizers = [(muon or torch.optim.Muon)([decayed], **options), adamw([rest])]
    scale_gains(optimizers[1], [p for n, p in model.named_parameters() if "norm.weight" in n])
    return optimizers


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
# A checkpoint is one safetensors file and a manifest with its size and sha256. It is written beside
# its name, read back, compared, given its manifest and then its name: so it was whole once.

FORMAT_VERSION = 3  # 2, which also held the lines of metrics.jsonl, can be read too
PART = ".part"  # suffix of a file that is not finished
_NAME = re.compile(r"(step|epoch|best)_\d{8,}\.(safetensors(\.part)?|json)")


class Folder:
    """A folder, through the few operations that a disk or Drive may refuse (tests/faults.py)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def names(self) -> list[str]:
        return sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []

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
    require(len(text) < 50_000_000, "contents", f"{text[:40]}...", "less than 50 MB beside tensors")
    return text, tensors


def write_snapshot(folder: Folder, name: str, tree: str, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint, read back its bytes, publish it; not by torch's threads: docs/log.md."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    part, metadata = name + PART, {"contents": tree}
    try:
        folder.write(part, partial(save_file, tensors, metadata=metadata))
        with safe_open(folder.path / part, framework="pt") as file:
            pairs = ((file.get_tensor(key), tensor) for key, tensor in tensors.items())
            pairs = ([t.flatten().view(torch.uint8).numpy() for t in pair] for pair in pairs)
            if file.metadata() != metadata or not all(np.array_equal(a, b) for a, b in pairs):
                raise SafetensorError("what was read back is not what was written")
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error), str(folder.path / part)) from error
    manifest = {"name": name, "format_version": FORMAT_VERSION, "step": checkpoint_step(name)}
    found = {"size": folder.size(part), "sha256": file_hash(folder.path / part)}
    publish(folder, {**manifest, **found})
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

    `path` is a file, its manifest beside it, or a run folder, of which `checkpoint` is "last",
    "best" (lowest validation loss) or a kept step. `mapped` leaves a file's tensors in it, which
    must not change while they are used.
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


_SEED_NAMES = {"token_embedding": "embed_tokens", "position_embedding": "embed_positions"}
_SEED_NAMES |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_SEED_NAMES |= {"attn.out_proj": "attn.o_proj", "attn": "self_attn", "output_layer": "lm_head"}
_SEED_NAMES |= {"ff.w_1": "mlp.up_proj", "ff.w_2": "mlp.down_proj"}


def import_seed_checkpoint(path: str | Path, num_attention_heads: int = 8) -> BitLM:
    """Turn the seed script's `mi_llm_checkpoint.pth` or `mi_llm_epoch_N.pth` into a `BitLM`.
    The file does not have the number of heads. Nothing in it is executed; ValueError if it differs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the seed script's checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch stores; a bomb would be compressed
            if sum(item.file_size for item in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
        weights = {}
        for name, tensor in torch.load(path, "cpu", weights_only=True)["model_state_dict"].items():
            for old, new in _SEED_NAMES.items():
                name = name.replace(old, new)
            weights[name if name.startswith("lm_head") else f"model.{name}"] = tensor.float()
        V, D = weights["model.embed_tokens.weight"].shape
        T = len(weights["model.embed_positions.weight"])
        ups = [tensor for name, tensor in weights.items() if "up_proj" in name]  # one per layer
        shape = (V, D, len(ups[0]), len(ups), num_attention_heads, None, T)
        config = ModelConfig(*shape, tie_word_embeddings=False, linear="weight_only", block="seed")
        return check_weights(config, weights, path)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path}: not a checkpoint of the seed script ({why})") from error


def load_masters(path: Path, checkpoint: str | int = "last") -> tuple[BitLM, Any, dict[str, Any]]:
    """The model of a run, a checkpoint or a .pth file as it trains, its tokenizer, and facts."""
    if path.suffix == ".pth":
        model = import_seed_checkpoint(path)
        return model, load_tokenizer(path.with_name("tokenizer.json")), {}
    contents = load_checkpoint(path, checkpoint)
    try:
        config = config_from(ModelConfig, contents["config"]["model"], path)
        model = check_weights(config, contents["model"], path)
        tokenizer = tokenizer_from(contents["tokenizer"], path)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its checkpoint lacks what generating needs ({error})") from error
    check_tokenizer(tokenizer, config.vocab_size, path)
    return model, tokenizer, {k: contents.get(k) for k in ("step", "config", "loss", "val_loss")}


def load_model(path: str | Path, checkpoint: str | int = "last") -> tuple[BitLM, Any]:
    """A model ready to generate, and its tokenizer; nothing in the files is executed.

    `path` is a run folder or a mirror of one (`checkpoint`: see `load_checkpoint`); a checkpoint; a
    packed file or Hugging Face folder that bitllm exported, or hf:OWNER/NAME on the hub; or a seed
    script's .pth file, its tokenizer.json beside it.
    """
    given, path = os.fspath(path), Path(path)
    packed = path.suffix in (".safetensors", ".gguf") and not _NAME.fullmatch(path.name)
    if packed or given[:3] == "hf:" or "model_type" in (read_json(path / "config.json") or {}):
        return extension("export", f"reading {given}").read_exported(given)[:2]
    model, tokenizer, _ = load_masters(path, checkpoint)
    return model.freeze(), tokenizer


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
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.why})"


def choose_device(device: str = "auto", dtype: str = "auto") -> Device:
    """CUDA, MPS or CPU (ValueError: not here); bfloat16 in hardware, else float16 or float32."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    there.append("cpu")
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
    """Windows of a micro-batch, for each process: what the package finds that the memory holds, for
    more are faster; this file alone takes 8,192 tokens at most.
    """
    windows = -(-train.batch_tokens // model.max_position_embeddings // world_size)
    if train.micro_batch_size:
        return min(train.micro_batch_size, windows)
    fit = 8192 // model.max_position_embeddings
    with contextlib.suppress(ImportError):
        fit = extension("memory", "").windows_that_fit(model, device, world_size)
    return max(d for d in range(1, windows + 1) if windows % d == 0 and d <= max(fit, 1))


def read_signed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of signed tokens: those below zero are read, but not predicted."""
    return torch.where(x < 0, ~x, x), y.masked_fill(y < 0, -100)


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
    A window of the context length begins every `stride` tokens, by default every context, and
    counts what the one before did not: with at least context - stride tokens before each.
    """
    context, last = model.config.max_position_embeddings, len(tokens) - 1
    bar = {"desc": "evaluating", "unit": "batch", "delay": 3, "disable": processes is not None}
    stride, processes, total = stride or context, processes or Processes(), 0.0
    starts = torch.arange(0, max(len(tokens) - context, 0) + stride, stride)
    t = torch.arange(min(context, len(tokens)))
    with model.hold_weights(device.dtype), device.autocast():
        batches = processes.micro_batches(starts, starts[:, None], batch_size)
        for _, start in tqdm(batches, leave=False, **bar):
            at = start + t  # (B, T), the places of the targets in the text
            x, y = (torch.from_numpy(tokens.take(i, mode="clip")).long() for i in (at - 1, at))
            x, y = read_signed(x, y)
            x[at == 0] = first
            counted = (t < context - stride) & (start > 0)  # by the window before
            y[counted | (at > last) | (start < 0)] = -100  # a start of -100 is a filler of FSDP's
            total += model.loss(x.to(device.device), y.to(device.device)).item()
    return processes.all_reduce_sum([total])[0]


def evaluate(
    model: BitLM,
    tokenizer: Any,
    data: str | Path,
    *,
    stride: int | None = None,
    batch_size: int = 16,
    device: Device | None = None,
    **reading: Any,
) -> dict[str, float]:
    """How well the model predicts `data`, named as in `DataConfig`; `stride`: see `total_loss`.
    `reading` is text_column, encoding or document_separator, as in `DataConfig`.

    Returns loss: nats per token; perplexity: exp(loss); bits_per_byte of the text in UTF-8;
    word_perplexity: exp(nats / words), comparable between vocabularies (line ends are words); and
    how many tokens, words, bytes. Raises what `read_pieces` does; ValueError: no text.
    """
    device, context = device or choose_device(), model.config.max_position_embeddings
    require(stride is None or 1 <= stride <= context, "stride", stride, f"1 to {context} tokens")
    eot, ids, words, size = end_of_text_id(tokenizer), [], 0, 0
    config = DataConfig(data=str(data), **reading)
    counted, pieces = itertools.tee(read_pieces(config.data, "train", config))
    for (tokens, length), (text, _) in zip(encode_pieces(tokenizer, pieces), counted, strict=True):
        ids += tokens
        words += len(text.split()) + text.count("\n")
        size += length
    ids = ids[:-1] if ids[-1:] == [eot] else ids  # it stands between documents
    if not ids:
        raise ValueError(f"data={config.data!r}: no text in it to evaluate on")
    model.to(device.device)
    nats = total_loss(model, np.asarray(ids), eot or 0, device, batch_size, stride)
    count = max(sum(token >= 0 for token in ids), 1)  # of a conversation, the answers'
    return {
        "loss": nats / count,
        "perplexity": math.exp(min(nats / count, 700)),
        "bits_per_byte": nats / math.log(2) / size,
        "word_perplexity": math.exp(min(nats / max(words, 1), 700)),
        **{"tokens": count, "words": words, "bytes": size},
    }


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
    clock_seconds: float = 0.0  # of config.minutes, all sessions; the main process' clock
    time_share: float = 0.0  # of the time for steps that config.minutes leave; in all processes
    trits: dict[str, Tensor] = field(default_factory=dict)  # of each BitLinear when last logged
    last_saved_step: int = 0  # of the newest checkpoint that is safe on the disk
    last_saved_at: float = 0.0  # time.time() of that; 0: not in this session
    save_seconds: float = 0.0  # that training waited for saving, in this session
    mirror: Any = None  # a bitllm.mirror.Mirror
    # set by callbacks, buttons and signals, read after each step:
    stop_signal: int = 0  # save a checkpoint and end, as after this signal
    save_requested: bool = False  # save a checkpoint
    paused: bool = False  # no further step until it is cleared

    _SAVED = ("step", "skipped", "skipped_in_a_row", "loss", "val_loss", "best_val_loss")
    _SAVED += ("best_step", "evals_since_best", "train_seconds", "clock_seconds")

    @property
    def tokens(self) -> int:  # read so far
        return self.step * self.config.batch_tokens

    @property
    def out_of_patience(self) -> bool:
        """whether the last `patience` evaluations were all no better than one before them"""
        return 0 < self.config.patience <= self.evals_since_best

    @property
    def finished(self) -> bool:
        """whether all steps are done, or the time is over, or more steps would only overfit"""
        done = self.time_share >= 1 if self.config.minutes else self.step >= self.config.max_steps
        return done or self.out_of_patience

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs: all processes call it, the main one has the whole."""
        names: Any = {parameter: name for name, parameter in self.model.named_parameters()}
        optimizers = []
        for optimizer in self.optimizers:
            tensors = {(names[p], k): t for p, s in optimizer.state.items() for k, t in s.items()}
            state: dict[str, dict[str, Tensor]] = {}
            for (name, key), tensor in self.processes.gather(tensors).items():
                state.setdefault(name, {})[key] = tensor
            optimizers.append({"state": state})
        return {
            **{name: getattr(self, name) for name in self._SAVED},
            "model": self.processes.whole(self.model.state_dict()),
            "optimizers": optimizers,
            "scaler": self.scaler.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "trits": self.trits,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, on any device; an error where it does not fit."""
        saved = {"clock_seconds": 0.0, **saved}  # not in those of earlier versions
        for name in self._SAVED:
            setattr(self, name, saved[name] + 0)  # TypeError: not a number
        scatter, own = self.processes.scatter, self.model.state_dict()
        self.model.load_state_dict({n: scatter(own[n], w) for n, w in saved["model"].items()})
        names: Any = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            numbered = {}
            for number, parameter in enumerate(parameters_of([optimizer])):
                tensors = state["state"].get(names[parameter], {})
                if any(t.shape not in (parameter.shape, ()) for t in tensors.values()):
                    raise ValueError(f"optimizer state of {names[parameter]} has another shape")
                if tensors and self.processes.owns(parameter):
                    numbered[number] = {k: scatter(parameter, t) for k, t in tensors.items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"]["torch"])
        if len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        for name, trits in saved["trits"].items():
            if trits.shape != own[f"{name}.weight"].shape:
                raise ValueError(f"trits of {name} have shape {tuple(trits.shape)}")
        self.trits = dict(saved["trits"]) if self.processes.is_main else {}


class Callback:
    """Attached to `train`; override what is needed. To stop training, set state.stop_signal.

    on_start: before the first step of this session.
    on_step: after every step; `metrics` is the line just logged, if one was.
    on_eval: after an evaluation.
    on_sample: after a text was generated to look at.
    on_checkpoint: after a checkpoint was written and verified.
    on_mirror: between steps, when the status of the mirror has changed.
    on_pause: ten times a second while `state.paused` keeps the loop from its next step.
    on_end: after the last step of this session, whatever ended it.
    """

    def on_start(self, state: TrainState) -> None: ...
    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None: ...
    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None: ...
    def on_sample(self, state: TrainState, text: str) -> None: ...
    def on_checkpoint(self, state: TrainState, path: Path) -> None: ...
    def on_mirror(self, state: TrainState, status: str) -> None: ...
    def on_pause(self, state: TrainState) -> None: ...
    def on_end(self, state: TrainState) -> None: ...


class MetricsLog:
    """metrics.jsonl: one JSON object per line, cut back to the step that a run resumes from.
    NaN becomes null. A line that the disk refuses is written with the next; without a path, none.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path, self.waiting = path, []
        self.lines = [line for line in self.read(path) if line["step"] <= step] if path else []
        if path:
            write_atomically(path, "".join(map(self._text, self.lines)).encode())

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All whole lines, null as NaN; a torn one, as a kill leaves it, is left out."""
        lines, text = [], path.read_text("utf-8", "replace") if path.exists() else ""
        for part in text.splitlines():
            with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
                line = {"step": json.loads(part)["step"] + 0, **json.loads(part)}
                lines.append({k: math.nan if v is None else v for k, v in line.items()})
        return lines

    @staticmethod
    def _text(line: dict[str, Any]) -> str:
        return json.dumps(json.loads(json.dumps(line), parse_constant=lambda _: None)) + "\n"

    def write(self, line: dict[str, Any]) -> None:
        if self.path:
            self.waiting.append(self._text(line))
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(self.waiting))
                self.waiting.clear()
            except OSError as error:
                if len(self.waiting) == 1:
                    log.warning(f"metrics.jsonl cannot be written ({error}); its lines wait")


def log_to(stream: Any) -> None:
    """Show what "bitllm" logs on `stream`, a line per message, instead of where it went before."""
    log.handlers, log.propagate = [logging.StreamHandler(stream)], False
    log.setLevel(logging.INFO)


@contextlib.contextmanager
def _stop_on_signals(state: TrainState) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP set a flag read between steps; a second one ends at once."""

    def handle(number: int, frame: Any) -> None:
        if state.stop_signal:
            raise KeyboardInterrupt
        state.stop_signal = number
        log.info("stopping: a checkpoint is saved after this step (again: stop at once)")

    handled = threading.current_thread() is threading.main_thread()  # elsewhere, signals are not
    names = ("SIGINT", "SIGTERM", "SIGHUP") if handled else ()
    with contextlib.ExitStack() as stack:
        for number in (s for s in signal.Signals if s.name in names):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                stack.callback(signal.signal, number, signal.signal(number, handle))
        yield


SAVE_RETRY_S = 60.0  # until a checkpoint that could not be saved is tried again
MAX_SKIPPED_STEPS = 25  # in a row end a run; float16's first loss scale takes some to settle
METRICS: list[Any] = []  # functions of the TrainState, in all processes, that add to a logged line
_MAY_CHANGE = "micro_batch_size device dtype compile deterministic max_steps minutes patience fsdp "
_MAY_CHANGE += "sample_prompt keep_checkpoints log_every_steps eval_every_steps eval_tokens "
_MAY_CHANGE += "save_every_steps save_every_minutes save_every_epoch"


def check_same_settings(where: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run keeps its settings, except those that may change; ValueError names what differs."""
    found = [
        f"{name} (run: {saved[part][name]}, asked: {value})"
        for part in ("model", "data", "train")
        for name, value in now[part].items()
        if saved[part][name] != value and not (part == "train" and name in _MAY_CHANGE.split())
    ]
    if found:
        raise ValueError(
            f"{where} was made with other settings: {'; '.join(found)}. "
            "Ask for the same, or choose another --out"
        )


def _open(stack: contextlib.ExitStack, configs: Any, out: Path, resume: str, mirror: Any) -> Any:
    """Take the run folder for this process; its mirror and the checkpoint to resume from, if any.

    ValueError: another process has the folder; or other settings, remains of which nothing is
    whole, `resume` does not fit: then nothing was changed but what a mirror returns.
    """
    import filelock

    settings = {part: asdict(config) for part, config in configs.items()}
    (model, data, config), place = configs.values(), Path(mirror or out).expanduser()
    folder, path = out / "checkpoints", out / "tokenizer.json"
    for where in {out, place}:
        fits = "train" in (read_json(where / "config.json") or "train")
        require(fits, "config.json of", str(where), "a run's; take another folder, to keep it")
    module = extension("mirror", "--mirror") if mirror else None
    if module:
        module.check_mirror(out, place)
    out.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(filelock.FileLock(out / ".lock", timeout=0, thread_local=False))
    except filelock.Timeout:
        raise ValueError(f"{out}: another process is training in it. Stop that one") from None
    copier = module and stack.enter_context(module.Mirror(out, place, config.keep_checkpoints))
    if resume == "never":
        aside = extension("aside", "--resume never")
        for where in {out, place}:
            aside.set_aside(where, same_data(where, data, model.vocab_size))
    checkpoint = copier.newest_checkpoint(settings) if copier else newest_checkpoint(folder)
    if checkpoint is None:
        if list_checkpoints(folder) or (copier and copier.has_checkpoints()):
            raise ValueError(
                f"{out}: there are remains of a run, but no checkpoint that is whole. Nothing was "
                "changed; --resume never begins anew and moves the remains to a folder set-aside-1"
            )
        require(resume != "must", "resume", resume, f"a checkpoint in {out} to resume from")
        return copier, None
    saved = checked_settings(checkpoint.get("config"), folder)
    check_same_settings(out, saved, settings)
    name, done = "max_steps", checkpoint["step"]
    if by_clock := config.minutes is not None:
        used = checkpoint.get("clock_seconds") or checkpoint["train_seconds"]
        name, done = "minutes", round(used / 60, 6)
    before, now = saved["train"][name], getattr(config, name)
    require(by_clock or not saved["train"]["minutes"], "minutes", None, "as this run began")
    require(now >= done, name, now, f"at least {done:g}, which this run has done already")
    if before != now:
        log.info(f"{name}: {before} -> {now}; the schedule now ends there, and the rate with it")
    text = tokenizer_from(str(checkpoint.get("tokenizer")), folder).to_str(pretty=True).encode()
    if not path.is_file() or path.read_bytes() != text:
        log.warning(f"{path}: missing or changed; restored from the checkpoint")
        write_atomically(path, text)
    return copier, checkpoint


def versions() -> dict[str, str]:
    """What decides the bits of a run besides its settings."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**found, "numpy": np.__version__, "threads": str(torch.get_num_threads())}


class Session:
    """One call of `train`: what it holds in memory, and its steps."""

    def __init__(self, configs: Any, out: Path, processes: Processes, callbacks: Any) -> None:
        self.model_config, data, self.config = model, _, config = configs.values()
        self.settings = {part: asdict(config) for part, config in configs.items()}
        self.out, self.processes, self.callbacks = out, processes, callbacks
        self.log, self.context = MetricsLog(None, 0), model.max_position_embeddings
        self.device = choose_device(config.device, config.dtype)
        prepare = partial(prepare_data, data, model.vocab_size, self.context, out)
        self.data, self.tokenizer = processes.run_on_main(prepare) or prepare()
        self.micro_batch = windows_at_once(model, config, self.device, processes.world_size)
        torch.manual_seed(config.seed)  # nothing draws from it yet; a checkpoint holds it
        net = processes.build_model(model, config.seed, self.device.device)
        optimizers = processes.make_optimizers(net, config)
        narrow = self.device.dtype == torch.float16  # its range needs the loss scaled
        scaler = torch.amp.GradScaler(self.device.device.type, enabled=narrow)
        self.state = TrainState(net, optimizers, scaler, config, processes)
        self.loss: Any = net.loss  # the package replaces these two, gradients and micro_step
        self.hold: Any = net.hold_weights
        self.clock: Any = None  # a bitllm.clock.Clock
        self.final_tokens: int | None = None  # of the last evaluation; None: all
        self.facts = {"device": str(self.device), "processes": processes.world_size, **versions()}
        self.facts["data_sha256"] = self.data.manifest["train"]["sha256"]

    def run(self, saver: _Saver) -> None:
        """Steps until all are done, a signal came, or the loss stays non-finite."""
        state, config, processes = self.state, self.config, self.processes
        parameters = parameters_of(state.optimizers)
        if config.init_from and not state.step and state.best_val_loss == math.inf:
            self.evaluate()  # the curves begin with it, and the run no longer needs its source
            saver.save("best")
            saver.save("step")
        self.logged = state.tokens, state.train_seconds
        while not self.stop_asked() and not state.finished and self.data.wait(self):
            start = time.perf_counter()
            windows = torch.from_numpy(self.data.batch(config, self.context, state.step))
            factor = learning_rate_factor(config, state.step, state.time_share)
            loss = processes.reduce_gradients(parameters, self.gradients(windows))
            if (windows < 0).any():
                extension("conversations", "").mean_of_counted(loss, parameters, windows)
            state.loss, norm = apply_gradients(
                state.optimizers, state.scaler, factor, config.max_grad_norm, loss, processes
            )
            state.step += 1
            state.train_seconds += time.perf_counter() - start
            skipped = not math.isfinite(norm)
            state.skipped += skipped
            state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
            due = state.step % config.log_every_steps == 0 or state.step == config.max_steps
            self.notify("on_step", self.log_step(norm, factor) if due else None)
            if state.skipped_in_a_row >= MAX_SKIPPED_STEPS:
                raise FloatingPointError(
                    f"{MAX_SKIPPED_STEPS} steps in a row, up to step {state.step}, had no finite "
                    "gradient. Try a lower learning_rate, or --dtype float32"
                )
            if config.eval_every_steps and state.step % config.eval_every_steps == 0:
                self.evaluate()
            saver.save_what_is_due()
            while any(processes.all_reduce_max([state.paused])) and not self.stop_asked():
                self.notify("on_pause")
                saver.save_what_is_due()
                time.sleep(0.1)

    def gradients(self, windows: Tensor) -> Tensor:
        """Add up the gradients of this process' windows, (N, T + 1); return their loss."""
        windows = windows.to(self.device.device)
        total = torch.zeros((), device=windows.device)
        with self.hold(self.device.dtype):
            pair = read_signed(windows[:, :-1], windows[:, 1:])  # (N, T) each
            for x, y in self.processes.micro_batches(*pair, self.micro_batch):
                total += self.micro_step(x.contiguous(), y.contiguous())
        return total

    def micro_step(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of windows x and targets y, (B, T) each; their gradients are added up."""
        with self.device.autocast():
            loss = self.loss(x, y) / self.config.batch_tokens
        self.state.scaler.scale(loss).backward()
        return loss.detach()

    def log_step(self, norm: float, factor: float) -> dict[str, Any]:
        state, (tokens, seconds) = self.state, self.logged
        self.logged = state.tokens, state.train_seconds
        metrics = {
            "step": state.step,
            "loss": state.loss,
            "learning_rate": peak_rates(self.model_config, self.config)[0] * factor,
            "grad_norm": norm,
            "tokens": state.tokens,
            "tokens_per_s": round((state.tokens - tokens) / (state.train_seconds - seconds), 1),
            "train_seconds": round(state.train_seconds, 3),
        }
        for more in METRICS:
            metrics |= more(state)
        self.log.write(metrics)
        if not self.callbacks and self.processes.is_main:
            speed = metrics["tokens_per_s"]
            log.info(f"step {state.step}: loss {state.loss:.4f}, {speed:,.0f} tokens/s")
        return metrics

    def evaluate(self, final: bool = False) -> None:
        """Validation loss: of the same first tokens each time, with a text; in the end of more."""
        state, processes, config = self.state, self.processes, self.config
        first, counts = end_of_text_id(self.tokenizer) or 0, self.data.manifest["validation"]
        tokens = self.data.validation[: self.final_tokens if final else config.eval_tokens]
        nats = total_loss(state.model, tokens, first, self.device, processes=processes)
        count = max(int((tokens >= 0).sum()), 1)
        loss = state.val_loss = nats / count
        metrics = {
            "step": state.step,
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, 700)),
            "val_bits_per_byte": loss / math.log(2) / (counts["bytes"] / counts["tokens"]),
            "val_tokens": count,
            **({"final": True} if final else {}),
        }
        self.log.write(metrics)
        self.notify("on_eval", metrics)
        if final:
            return
        state.evals_since_best += 1
        if loss < state.best_val_loss:
            state.best_val_loss, state.best_step, state.evals_since_best = loss, state.step, 0
        model = processes.whole_model(state.model)
        if model and self.callbacks:
            text = generate(model, self.tokenizer, config.sample_prompt, SamplingConfig(60, seed=0))
            self.notify("on_sample", config.sample_prompt + text)

    def stop_asked(self) -> bool:
        """Whether any process has been told to stop; and how late it is: the same in all."""
        state, late = self.state, self.clock.read() if self.clock else 0.0
        number, state.time_share = self.processes.all_reduce_max([state.stop_signal, late])
        state.stop_signal = int(number) or state.stop_signal  # one may have just come
        return number != 0

    def notify(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.state, *values)


class _Saver:
    """Checkpoints of a session, written by a thread: training only waits for copies of tensors."""

    def __init__(self, session: Session) -> None:
        self.session, self.state, self.mirror = session, session.state, session.state.mirror
        self.folder = Folder(session.out / "checkpoints")
        self.keep = session.config.keep_checkpoints
        self.worker, self.running, self.mirror_status = ThreadPoolExecutor(1), None, ""
        self.pause_s = 60 * (session.config.save_every_minutes or math.inf)
        self.due_at, step = time.monotonic() + self.pause_s, self.state.step
        self.begun = {"best": step, "epoch": step, "step": step or -1}  # the step of the newest
        with contextlib.suppress(OSError):
            remove_unfinished(self.folder)

    def save_what_is_due(self, ending: bool = False) -> None:
        """Report what has become safe since the last step, and save what is due after this one."""
        self.collect(wait=ending)
        if ending and self.session.clock:
            self.begun["step"] = -1  # the last one holds the time that was used
        session, state, step, config = self.session, self.state, self.state.step, self.state.config
        epoch = session.data.steps_per_epoch(config, session.context)
        every, asked = config.save_every_steps, ending or state.save_requested
        due = {
            "best": step == state.best_step,
            "epoch": config.save_every_epoch and step // epoch > (step - 1) // epoch,
            "step": asked or time.monotonic() >= self.due_at or (every and step % every == 0),
        }
        state.save_requested = False
        new = [bool(due[kind]) and self.begun[kind] != step for kind in due]
        for kind, somewhere in zip(due, state.processes.all_reduce_max(new), strict=True):
            if somewhere:
                self.save(kind)
        if self.mirror and self.mirror.status() != self.mirror_status:
            self.mirror_status = self.mirror.status()
            session.notify("on_mirror", self.mirror_status)

    def save(self, kind: str) -> None:
        """Begin a checkpoint; a disk that refuses does not end the training."""
        start, state, session = time.perf_counter(), self.state, self.session
        self.collect(wait=True)  # one copy at a time
        self.begun[kind] = state.step
        if kind == "best":  # what generating needs
            weights = state.processes.whole(state.model.state_dict())
            contents = {"step": state.step, "val_loss": state.val_loss, "model": weights}
        else:  # all of a run but its tokens; every process gives its part
            contents = {**state.state_dict(), **session.facts, "micro_batch": session.micro_batch}
            self.due_at = time.monotonic() + self.pause_s
        if state.processes.is_main:
            contents |= {"config": session.settings, "tokenizer": session.tokenizer.to_str()}
            name = f"{kind}_{state.step:08d}.safetensors"
            write = partial(write_snapshot, self.folder, name, *snapshot(contents))
            self.running = kind, self.worker.submit(write)
        state.save_seconds += time.perf_counter() - start

    def collect(self, wait: bool = False) -> None:
        """Report the checkpoint on its way, once it is safe or could not be saved."""
        if self.running is None or not (wait or self.running[1].done()):
            return
        (kind, future), self.running, state = self.running, None, self.state
        try:
            path = future.result()
        except OSError as error:
            safe = f"step {state.last_saved_step or 'none'} is safe"
            log.warning(f"a checkpoint could not be saved: {error}. Training continues; {safe}")
            if kind == "step":
                self.begun[kind], self.due_at = -1, time.monotonic() + SAVE_RETRY_S
            return
        if kind != "epoch":  # all of which stay, here alone
            if self.mirror:
                self.mirror.offer(kind, path.name)
            keep, spare = self.keep if kind == "step" else 1, getattr(self.mirror, "copying", "")
            with contextlib.suppress(OSError):  # what stays is pruned next time
                prune_checkpoints(self.folder, keep, kind, spare)
        if kind == "step":
            state.last_saved_step, state.last_saved_at = checkpoint_step(path), time.time()
            self.session.notify("on_checkpoint", path)


def _restore(session: Session, checkpoint: dict[str, Any]) -> None:
    """Resume from a checkpoint; other versions or another device are logged, not refused."""
    try:
        if checkpoint["data_sha256"] != session.facts["data_sha256"]:
            raise ValueError("its tokens differ; put its data/ back")
        before = {**checkpoint["config"]["train"], **checkpoint.get("versions", {}), **checkpoint}
        now = {**session.facts, "fsdp": session.config.fsdp}
        changed = [f"{k} {before[k]} -> {v}" for k, v in now.items() if before.get(k, v) != v]
        if changed:
            log.info(f"note: not bit for bit as before, for these changed: {', '.join(changed)}")
        elif not session.config.micro_batch_size:
            session.micro_batch = int(checkpoint["micro_batch"])
        check_weights(session.model_config, checkpoint["model"], session.out / "checkpoints")
        session.state.load_state_dict(checkpoint)
        session.settings = {**checkpoint["config"], **session.settings}  # also what it began with
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{session.out}: its checkpoint of step {checkpoint['step']} is not of this run "
            f"({first_line(error)}). Choose another --out, or begin anew with --resume never"
        ) from error
    session.state.last_saved_step = session.state.step


def _finish(session: Session, began: float) -> None:
    """Train what is left of a run, if anything, and leave everything safe."""
    state, out, processes = session.state, session.out, session.processes
    if session.config.minutes:
        session.clock = extension("clock", "training by the clock").Clock(session, began)
    coming = contextlib.nullcontext()
    if processes.is_main:
        settings = {"format_version": FORMAT_VERSION, **session.settings}
        write_atomically(out / "config.json", json.dumps(settings, indent=1).encode())
        session.log = MetricsLog(out / "metrics.jsonl", state.step)
        coming = session.data.coming(session.tokenizer)
    final = [x for x in session.log.lines if x.get("final") and x["step"] == state.step]
    if state.finished and (final := processes.broadcast(final)):
        state.val_loss = final[0].get("val_loss", math.nan)
        return
    with contextlib.suppress(ImportError):
        extension("progress", "").describe(session)
    saver = _Saver(session)
    with _stop_on_signals(state), coming:
        if not state.finished:
            with contextlib.suppress(ImportError):
                extension("compiling", "torch.compile").prepare(session)
        session.notify("on_start")
        try:
            session.run(saver)
            with contextlib.suppress(ImportError):
                extension("progress", "").describe_early_end(state)
            saver.save_what_is_due(ending=True)
            saver.collect(wait=True)
            last = state.last_saved_step = processes.broadcast(state.last_saved_step)
            if last != state.step:
                raise OSError(f"step {state.step} was not saved in {out}; step {last} is the last")
            if not session.stop_asked():
                session.evaluate(final=True)
        finally:
            saver.collect(wait=True)
            saver.worker.shutdown()
            session.notify("on_end")


def _join(configs: dict[str, Any], out: Path, resume: str, mirror: Any) -> Processes:
    """The processes that train together, once the shape is known, and that the memory will do."""
    if configs["data"].tokenizer not in TOKENIZERS:
        extension("vocabulary", "--tokenizer").give_rows(configs, out, resume, mirror)
    model, _, config = configs.values()
    check_configs(model, config)
    processes = Processes()
    if config.fsdp or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        processes = extension("distributed", "training with several processes").join(model, config)
    with contextlib.suppress(ImportError):
        extension("aside", "").check_run_folder(out)
        extension("planner", "").check_memory(model, config, processes.world_size)
    return processes


def train(
    model_config: ModelConfig,
    data_config: DataConfig,
    train_config: TrainConfig,
    out: str | Path,
    *,
    resume: str = "auto",
    mirror: str | Path | None = None,
    callbacks: Sequence[Callback] | None = None,
    started: float | None = None,
) -> TrainState:
    """Train, or resume the run in `out`, exactly as if it had never stopped.

    Args:
        out: run folder: config.json, tokenizer.json, data/, metrics.jsonl, checkpoints/.
        resume: "auto"; "must": not without a run to resume; "never": what is there is moved to a
            folder set-aside-N in `out`.
        mirror: a second folder, in one that exists, for copies of checkpoints; also resumed from.
        callbacks: default: a progress bar. Of several processes, only the main one calls them.
        started: time.monotonic() from which `minutes` count; default: now.

    Returns the state after the last step; interrupted, it has a `stop_signal` and a checkpoint.
    ValueError: settings are wrong or not the run's, or another process writes to the folder.
    FloatingPointError: the loss does not return to finite numbers.
    OSError: the last checkpoint of a session could not be saved.
    """
    out, configs = Path(out), {"model": model_config, "data": data_config, "train": train_config}
    require(resume in ("auto", "never", "must"), "resume", resume, "auto, never or must")
    began, processes = started or time.monotonic(), _join(configs, out, resume, mirror)
    if callbacks is None:
        with contextlib.suppress(ImportError):
            callbacks = [extension("progress", "a progress bar").ProgressBar()]
    with contextlib.ExitStack() as stack:
        if train_config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            before = torch.are_deterministic_algorithms_enabled()
            stack.callback(torch.use_deterministic_algorithms, before)
            torch.use_deterministic_algorithms(True)
        stack.enter_context(processes.guard())
        start = extension("start", "--init-from") if train_config.init_from else None
        if start:
            shape = partial(start.shape_of_run, configs, out, resume, mirror)
            configs["model"] = processes.broadcast(processes.run_on_main(shape))
        begin = partial(_open, stack, configs, out, resume, mirror)
        copier, checkpoint = processes.run_on_main(begin) or (None, None)
        step = processes.broadcast(checkpoint and checkpoint["step"])
        if step is not None and not checkpoint:
            path = out / "checkpoints" / f"step_{step:08d}.safetensors"
            checkpoint = load_checkpoint(path, mapped=train_config.fsdp)
        if start and not checkpoint:
            processes.run_on_main(partial(start.give_tokenizer, train_config.init_from, out))
        session = Session(configs, out, processes, callbacks or () if processes.is_main else ())
        session.state.mirror = copier
        if checkpoint:
            _restore(session, checkpoint)
            del checkpoint  # as large as the model and its optimizers
        elif start:
            start.give_weights(session)
        _finish(session, began)
    return session.state


if not TYPE_CHECKING:  # the package's names, which earlier versions had in this file

    def __getattr__(name: str) -> Any:
        with contextlib.suppress(ImportError):
            if not name.startswith("_") and name in (package := extension("", name)).__all__:
                return getattr(package, name)
        raise AttributeError(f"module 'bitllm_core' has no attribute {name!r}")


# -----------------------------------------------------------------------------
# 10 Command line
# Every field of a configuration is a flag. The package's bitllm/cli.py adds commands and help.


def true_or_false(text: str) -> bool:
    return ("false", "0", "no", "off", "true", "1", "yes", "on").index(text.lower()) >= 4


def add_command(commands: Any, name: str, run: Any, flags: dict[str, Any], *configs: type) -> Any:
    """Add a command: `flags` with their options, and a flag for every field of `configs`."""
    command = commands.add_parser(name, help=run.__doc__, usage="%(prog)s [--FLAG VALUE] ...")
    command.set_defaults(run=run)
    for flag, options in flags.items():
        command.add_argument(flag, **options)
    for config in configs:
        group = command.add_argument_group(config.__name__)
        for item in fields(config):
            kind = str(item.type).split(" | ")[0]
            options = {"type": {"int": int, "float": float, "bool": true_or_false}.get(kind, str)}
            options |= {"nargs": "?", "const": True} if kind == "bool" else {}
            flag = "--" + item.name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, metavar=kind.upper(), **options)
    return command


def from_flags(base: Any, flags: argparse.Namespace) -> Any:
    """The configuration `base` with the fields that were given as flags."""
    return dataclasses.replace(base, **{k: v for k, v in vars(flags).items() if k in vars(base)})


def train_command(flags: argparse.Namespace, callbacks: Any = None, report: Any = None) -> int:
    """train, or resume a run"""
    configs: Sequence[Any] = PRESETS[flags.preset or "demo"]
    for place in map(Path, filter(None, [] if flags.preset else [flags.mirror, flags.out])):
        saved = read_json(place / "config.json")
        saved = saved or (newest_checkpoint(place / "checkpoints") or {}).get("config")
        if saved:  # without a preset, the run's own settings are meant
            parts = checked_settings(saved, place / "config.json").values()
            configs = [type(base)(**part) for base, part in zip(configs, parts, strict=True)]
    if source := from_flags(configs[2], flags).init_from:
        places = [flags.mirror, flags.out] if flags.resume != "never" else []
        configs = extension("start", "--init-from").settings_of(source, configs, places)
    model, data, config = (from_flags(base, flags) for base in configs)
    more = {"resume": flags.resume, "mirror": flags.mirror, "started": flags.started}
    state = train(model, data, config, flags.out, callbacks=callbacks, **more)
    if state.stop_signal:
        log.info(f"stopped at step {state.step} of {config.max_steps}; saved in {flags.out}")
        return 128 + state.stop_signal
    if state.processes.is_main:
        if report:
            report(state)
        print(f"complete: {state.step} steps, validation loss {state.val_loss:.4f}")
    return 0


def generate_command(flags: argparse.Namespace) -> None:
    """write text"""
    sampling = from_flags(SamplingConfig(), flags)
    pieces = stream(*load_model(flags.model, flags.checkpoint), flags.prompt, sampling)
    for piece in itertools.chain([flags.prompt], pieces, ["\n"]):
        print(piece, end="", flush=True)


def evaluate_command(flags: argparse.Namespace) -> None:
    """print the loss on a text, as one JSON object"""
    names = ("stride", "text_column", "encoding", "document_separator")
    more = {name: getattr(flags, name) for name in names}
    more["device"] = choose_device(dtype=TrainConfig(dtype=flags.dtype).dtype)
    print(json.dumps(evaluate(*load_model(flags.model, flags.checkpoint), flags.data, **more)))


def command_parser(kind: Any = argparse.ArgumentParser) -> tuple[Any, Any]:
    """A parser of this file's commands, and what further ones are added to."""
    parser = kind(usage="%(prog)s COMMAND ... (export, plan, info, bench need the bitllm package)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog)
    flags: dict[str, Any] = {"--out": {"required": True}, "--resume": {"default": "auto"}}
    flags |= {"--preset": {"choices": [*PRESETS]}, "--mirror": {}}
    add_command(commands, "train", train_command, flags, ModelConfig, DataConfig, TrainConfig)
    step = {"default": "last", "type": lambda name: int(name) if name.isdecimal() else name}
    model = {"--model": {"required": True}, "--checkpoint": step}
    flags = {**model, "--prompt": {"default": ""}}
    add_command(commands, "generate", generate_command, flags, SamplingConfig)
    flags = {**model, "--data": {"required": True}, "--stride": {"type": int}, "--encoding": {}}
    flags |= {"--text-column": {}, "--document-separator": {}, "--dtype": {"default": "auto"}}
    add_command(commands, "evaluate", evaluate_command, flags)
    return parser, commands


def main(arguments: Sequence[str] | None = None, parser: Any = None) -> int:
    """Run a command; returns the exit status: 2 for a user's mistake, 130 after Ctrl-C."""
    flags = (parser or command_parser()[0]).parse_args(arguments)
    flags.started = STARTED if arguments is None else time.monotonic()
    log_to(sys.stderr)
    try:
        return flags.run(flags) or 0
    except KeyboardInterrupt:
        log.error("stopped at once; nothing after the last checkpoint was saved")
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        log.error(f"error: {error}")
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1


if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # this file alone
        sys.exit(extension("cli", "").main())
    sys.exit(main())
