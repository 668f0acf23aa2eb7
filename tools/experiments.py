"""Train lists of configurations, several seeds each, and make the tables of docs/results.md.

    python tools/experiments.py run rates --train train.txt --valid valid.txt
    python tools/experiments.py report rates          # its table, in Markdown
    python tools/experiments.py draw rates            # rates.png: against tokens, or against time
    python tools/experiments.py costs                 # bytes and generation speed
    python tools/experiments.py list

Texts are local files: the figures in the docs are WikiText-2's, made with `gzip -dk`. A row is
added to the results file when its run has ended; rows that are there are not run again, so a list
may be stopped at any time, and a variant or a seed be added later. Every run is a process of its
own, and `--jobs 2` has two of them at a time. A budget is in tokens (equal work), or in minutes,
counted from the start of the process to the last step: import, tokenizer, compiling and all.
Minutes are of wall-clock, or with --clock cpu of processor time (one thread then), which other
work on the machine does not take away. What is tried only here is a patch of the core (see
PATCHES), not one of its settings.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

BORN = time.time()

from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bitllm_core as bit  # noqa: E402

CLOCK = os.environ.get("BITLLM_EXPERIMENTS_CLOCK", "wall")


def seconds() -> float:
    """Since this process began: of the wall's clock, or of processor time with its compilers'."""
    return time.time() - BORN if CLOCK == "wall" else sum(os.times()[:4])


# -----------------------------------------------------------------------------
# Patches: what is tried. Each is a context around one run; it may return a callback.


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is what `make` makes of it, for a while."""
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


def initialized(change: Callable[[bit.BitLM], None]) -> Any:
    """The usual initial weights, then `change`."""

    def make(initialize):
        def changed(model, generator):
            initialize(model, generator)
            with torch.no_grad():
                change(model)

        return changed

    return replaced(bit, "initialize", make)


def projections(gain: Callable[[int], float]) -> Callable[[bit.BitLM], None]:
    """What writes to the stream, times `gain` of the number of layers."""

    def change(model):
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(gain(model.config.num_hidden_layers))

    return change


def embedding_std(std: float) -> Callable[[bit.BitLM], None]:
    return lambda model: model.model.embed_tokens.weight.mul_(std / 0.02)


def z_loss(weight: float) -> Any:
    def make(_):
        def loss(self, input_ids, targets, blocks=None, _=None):
            at = torch.arange(input_ids.shape[1], device=input_ids.device)
            hidden = self._blocks(self.embed(input_ids), at, blocks=blocks)
            logits = self.head(hidden).flatten(0, 1).float()
            nats = F.cross_entropy(logits, targets.flatten(), reduction="sum")
            if torch.is_grad_enabled():
                nats = nats + weight * logits.logsumexp(-1).square().sum()
            return nats

        return loss

    return replaced(bit.BitLM, "loss", make)


def median_scale() -> Any:
    def make(_):
        def quant(weight):
            weight = weight.float()
            scale = weight.abs().median().clamp(min=1e-5)
            return (weight / scale).round().clamp(-1, 1), scale

        return quant

    return replaced(bit, "weight_quant", make)


@contextlib.contextmanager
def full_precision_until(share: float) -> Iterator[bit.Callback]:
    """Dense for the first share of the steps (eager: the compiler would see two programs)."""
    warm = {"on": True}

    class Switch(bit.Callback):
        def on_step(self, state, metrics):
            warm["on"] = state.step < share * state.config.max_steps

    def weights(quant):
        return lambda w: (w.float(), w.new_ones(())) if warm["on"] else quant(w)

    def activations(quant):
        return lambda x: x.float() if warm["on"] else quant(x)

    with replaced(bit, "weight_quant", weights), replaced(bit, "activation_quant", activations):
        yield Switch()


@contextlib.contextmanager
def without_sub_norms() -> Iterator[None]:
    def make(init):
        def changed(self, *args, **kwargs):
            init(self, *args, **kwargs)
            for name in ("attn_sub_norm", "ffn_sub_norm"):
                if hasattr(self, name):
                    setattr(self, name, torch.nn.Identity())

        return changed

    with (
        replaced(bit.Attention, "__init__", make),
        replaced(bit.FeedForward, "__init__", make),
    ):
        yield


def dropout(rate: float) -> Any:
    """On what each half of a block adds to the stream, in training."""

    def make(_):
        def forward(self, x, rope, cache, mask):
            training = torch.is_grad_enabled()
            y = self.self_attn(self.input_layernorm(x), rope, cache, mask)
            x = x + F.dropout(y, rate, training)
            return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), rate, training)

        return forward

    return replaced(bit.Block, "forward", make)


class EachStep(bit.Callback):
    """Sets something of the optimizers' groups as a function of the share of steps done."""

    def __init__(self, name: str, value: Callable[[float], float]) -> None:
        self.name, self.value = name, value

    def on_start(self, state):
        self.on_step(state, None)

    def on_step(self, state, metrics):
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                if self.name in group and group.get("initial_decay", 1):
                    group[self.name] = self.value(state.step / state.config.max_steps)


@contextlib.contextmanager
def each_step(name: str, value: Callable[[float], float]) -> Iterator[bit.Callback]:
    yield EachStep(name, value)


class Decay(bit.Callback):
    """Weight decay of the matrices follows the learning rate (to 0 in the cooldown)."""

    def on_step(self, state, metrics):
        factor = bit.learning_rate_factor(state.config, state.step)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                if group["weight_decay"]:
                    group["weight_decay"] = max(state.config.weight_decay * factor, 1e-12)


@contextlib.contextmanager
def callback(make: Callable[[], bit.Callback]) -> Iterator[bit.Callback]:
    yield make()


@contextlib.contextmanager
def first_defaults() -> Iterator[bit.Callback]:
    with (
        initialized(projections(lambda layers: 10.0)),
        each_step("ns_steps", lambda done: 5) as five_steps,
    ):
        yield five_steps


SEED_SCRIPT = "the seed guide's script"  # not a patch but another program

PATCHES: dict[str, Callable[[], Any]] = {
    "the first defaults": first_defaults,
    "zero-init projections": lambda: initialized(projections(lambda layers: 0.0)),
    "projections x 10": lambda: initialized(projections(lambda layers: 10.0)),
    "full-size projections": lambda: initialized(projections(lambda n: 10 * (2 * n) ** 0.5)),
    "embedding std 0.1": lambda: initialized(embedding_std(0.1)),
    "embedding std 0.005": lambda: initialized(embedding_std(0.005)),
    "z-loss 1e-4": lambda: z_loss(1e-4),
    "median scale": median_scale,
    "dense for the first 20%": lambda: full_precision_until(0.2),
    "no sub-norms": without_sub_norms,
    "dropout 0.1": lambda: dropout(0.1),
    "dropout 0.2": lambda: dropout(0.2),
    "momentum 0.85 to 0.95": lambda: each_step(
        "momentum", lambda done: 0.85 + 0.10 * min(done / 0.3, 1)
    ),
    "weight decay to 0": lambda: callback(Decay),
    "2 Newton-Schulz steps": lambda: each_step("ns_steps", lambda done: 2),
    "5 Newton-Schulz steps": lambda: each_step("ns_steps", lambda done: 5),
}


# -----------------------------------------------------------------------------
# Tables: what is compared with what.


@dataclass(frozen=True)
class Variant:
    """One line of a table: fields of the three configurations that it changes, and a patch."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    patch: str = ""


@dataclass(frozen=True)
class Table:
    """Variants of one base. Budget: tokens, or minutes of wall-clock from the process's start."""

    about: str
    base: dict[str, Any]
    variants: list[Variant]
    tokens: int = 0
    minutes: float = 0.0
    seeds: int = 1
    threads: int = 1
    valid_bytes: int = 240_000
    """how much of the validation text a run ends with; 0: all of it"""
    train_bytes: int = 0
    """how much of the training text there is; 0: all of it"""
    pydocs: bool = False
    """the text that comes with Python instead of --train and --valid"""


SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": None,
    "max_position_embeddings": 128,
    "batch_tokens": 2048,
    "micro_batch_size": 16,  # one compiled program for every batch
    "warmup_steps": 20,
    "compile": "on",
}
"""2.56M parameters; for the rest the core's defaults"""


SHORT: dict[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "batch_tokens": 2048,
    "micro_batch_size": 16,
    "compile": "on",
    "adamw_learning_rate": 0.015,  # see the table "longer"; with AdamW's twin as well, see "rates"
}
"""5.4M parameters: what ten minutes of a slow core can teach something, in any client"""

FIRST: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "batch_tokens": 8192,
    "learning_rate": 0.02,
    "adamw_learning_rate": 0.005,
    "warmup_steps": 20,
    "cooldown_fraction": 0.4,
}
"""the first WikiText-2 figure of docs/log.md; what the core has won in speed since, it has too"""


def named(**changes: Any) -> Variant:
    return Variant(
        ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in changes.items()),
        changes,
    )


def patched(*names: str) -> list[Variant]:
    return [Variant(name, {}, name) for name in names]


def rates(linear: str, optimizer: str, *values: float) -> list[Variant]:
    return [
        Variant(
            f"{linear}, {optimizer} {value:g}",
            {"linear": linear, "optimizer": optimizer, "learning_rate": value},
        )
        for value in values
    ]


TWINS = [
    Variant(f"{linear}{more}", {"linear": linear, **changes}, patch)
    for more, changes, patch in (
        ("", {}, ""),
        (", 5 Newton-Schulz steps", {}, "5 Newton-Schulz steps"),
        (", the rest 0.015", {"adamw_learning_rate": 0.015}, ""),
    )
    for linear in ("ternary", "dense")
]

TABLES: dict[str, Table] = {
    "rates": Table(
        "peak rate of the matrices, 2.56M parameters, equal tokens",
        SMALL,
        [
            *rates("ternary", "muon", 0.01, 0.02, 0.04, 0.08),
            *rates("dense", "muon", 0.01, 0.02, 0.04),
            *rates("dense", "adamw", 0.00075, 0.0015, 0.003, 0.006),
            *rates("ternary", "adamw", 0.0015, 0.003),
            *(
                Variant(
                    f"dense, adamw 0.0015, the rest {rate:g}",
                    {
                        "linear": "dense",
                        "optimizer": "adamw",
                        "learning_rate": 0.0015,
                        "adamw_learning_rate": rate,
                    },
                )
                for rate in (0.005, 0.015)
            ),
            *(
                Variant(
                    f"dense, muon 0.02, the rest {rate:g}",
                    {"linear": "dense", "learning_rate": 0.02, "adamw_learning_rate": rate},
                )
                for rate in (0.015, 0.03)
            ),
        ],
        tokens=262_144,
    ),
    "longer": Table(
        "four times the tokens: the rate of what is not a matrix, and the cooldown",
        {**SHORT, "vocab_size": 4096},
        [
            *(named(adamw_learning_rate=rate) for rate in (0.005, 0.015, 0.03)),
            Variant(
                "0.015, cooldown 0.2", {"adamw_learning_rate": 0.015, "cooldown_fraction": 0.2}
            ),
        ],
        tokens=1_048_576,
    ),
    "gap": Table(
        "ternary against its dense twin at equal steps, each with its own rate, 2.56M",
        SMALL,
        TWINS,
        tokens=262_144,
        seeds=3,
    ),
    "gap-14M": Table(
        "the same at 13.8M parameters",
        {
            **FIRST,
            "learning_rate": None,
            "adamw_learning_rate": None,
            "batch_tokens": 2048,
            "compile": "on",
        },
        TWINS,
        tokens=262_144,
        seeds=3,
    ),
    "ten-minutes": Table(
        "ten minutes, everything counted",
        {"compile": "on"},
        [
            Variant("ternary, 5.4M", {**SHORT, "learning_rate": 0.02}),
            Variant("first defaults, ternary, 13.8M", FIRST, "the first defaults"),
            Variant(
                "dense twin of 5.4M, AdamW",
                {**SHORT, "linear": "dense", "optimizer": "adamw"},
            ),
            Variant(SEED_SCRIPT, {}, SEED_SCRIPT),
            Variant("dense twin of 5.4M, Muon", {**SHORT, "linear": "dense"}),
            Variant("ternary, 5.4M, 0.04", SHORT),
            Variant("ternary, 5.4M, momentum 0.98", {**SHORT, "momentum": 0.98}),
            Variant(
                "dense twin of 5.4M, AdamW 0.00075",
                {**SHORT, "linear": "dense", "optimizer": "adamw", "learning_rate": 0.00075},
            ),
        ],
        minutes=10,
        seeds=3,
        threads=2,
    ),
    "recipe": Table(
        "one change at a time, 2.56M parameters, equal tokens",
        SMALL,
        [
            Variant("defaults"),
            *patched("projections x 10", "zero-init projections", "embedding std 0.005"),
            *patched("momentum 0.85 to 0.95", "5 Newton-Schulz steps", "2 Newton-Schulz steps"),
            Variant("dense", {"linear": "dense"}),
            Variant("dense, 5 Newton-Schulz steps", {"linear": "dense"}, "5 Newton-Schulz steps"),
            *(named(adamw_learning_rate=rate) for rate in (0.0017, 0.01, 0.015, 0.03)),
            *(named(learning_rate=rate) for rate in (0.03, 0.06)),
            Variant("batch_tokens 1024", {"batch_tokens": 1024, "micro_batch_size": 8}),
            named(batch_tokens=4096),
            *(named(cooldown_fraction=share) for share in (0.2, 0.7)),
            *patched("z-loss 1e-4", "median scale", "no sub-norms", "dense for the first 20%"),
            named(linear="weight_only"),
            named(weight_decay=0.1),
            *patched("dropout 0.1", "embedding std 0.1"),
            Variant("weight decay 0.1 to 0", {"weight_decay": 0.1}, "weight decay to 0"),
        ],
        tokens=262_144,
    ),
    "shape": Table(
        "vocabulary, context and head of the same model, equal tokens; compare bits per byte",
        SMALL,
        [
            *(named(vocab_size=size) for size in (2048, 4096, 8192, 16_384)),
            *(
                Variant(
                    f"context {n}", {"max_position_embeddings": n, "micro_batch_size": 2048 // n}
                )
                for n in (64, 256, 512)
            ),
            Variant("ternary head", {"tie_word_embeddings": False}),
        ],
        tokens=262_144,
    ),
    "epochs": Table(
        "a small text many times over (200 kB, 9 epochs)",
        SMALL,
        [
            Variant("defaults"),
            *patched("dropout 0.1", "dropout 0.2"),
            named(weight_decay=0.1),
            named(weight_decay=0.5),
            Variant("dense", {"linear": "dense"}),
        ],
        tokens=524_288,
        train_bytes=200_000,
    ),
    "laptop": Table(
        "the preset's model, a fifth of its tokens: the size of a step, and of the vocabulary",
        {
            **dataclasses.asdict(bit.PRESETS["laptop"][0]),
            "batch_tokens": 4096,
            "micro_batch_size": 8,
            "warmup_steps": 20,
            "compile": "on",
        },
        [
            *(named(batch_tokens=size) for size in (8192, 4096, 2048)),
            named(vocab_size=16_384),
            named(adamw_learning_rate=0.01),
        ],
        tokens=1_228_800,
    ),
    "pydocs": Table(
        "does the recipe hold for another text? equal tokens, about twice over it",
        SMALL,
        [
            Variant("defaults"),
            *patched("projections x 10", "5 Newton-Schulz steps"),
            Variant("dense", {"linear": "dense"}),
            *rates("dense", "adamw", 0.0015),
            *rates("ternary", "adamw", 0.0015),
            named(adamw_learning_rate=0.015),
            *(named(learning_rate=rate) for rate in (0.02, 0.03, 0.06)),
            Variant("batch_tokens 1024", {"batch_tokens": 1024, "micro_batch_size": 8}),
            named(weight_decay=0.1),
            *patched("z-loss 1e-4", "no sub-norms", "dropout 0.1"),
            *(named(vocab_size=size) for size in (2048, 8192)),
        ],
        tokens=262_144,
        seeds=2,
        pydocs=True,
    ),
}


# -----------------------------------------------------------------------------
# One run


def split_fields(changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of each of the three configurations; ValueError names one that is of none."""
    kinds = (bit.ModelConfig, bit.DataConfig, bit.TrainConfig)
    names = [{item.name for item in dataclasses.fields(kind)} for kind in kinds]
    for key in changes:
        bit.require(any(key in n for n in names), "changes", key, "a field of a configuration")
    return [{k: v for k, v in changes.items() if k in n} for n in names]


class Recorder(bit.Callback):
    """The curve: tokens, seconds since the process began, validation loss on a fixed slice.

    With a deadline it evaluates by the clock, ten times in all, and stops when the time is over.
    """

    def __init__(self, out: Path, deadline: float = 0.0) -> None:
        self.out, self.deadline = out, deadline
        self.curve: list[list[float]] = []
        self.trained_at = 0.0

    def on_step(self, state, metrics):
        self.trained_at = seconds()
        if not self.deadline:
            return
        if self.trained_at > self.deadline * (len(self.curve) + 1) / 10:
            tokens = np.fromfile(self.out / "data" / "validation.bin", "uint16")[:8192]
            device = bit.choose_device()
            loss = bit.total_loss(state.model, tokens, 0, device) / len(tokens)
            self.add(state, loss)
        if seconds() >= self.deadline:
            state.stop_signal = 2

    def on_eval(self, state, metrics):
        if not metrics.get("final"):
            self.add(state, metrics["val_loss"])

    def add(self, state, loss):
        self.curve.append([state.tokens, round(seconds(), 1), round(loss, 4)])


@contextlib.contextmanager
def rate_by_the_clock(minutes: float) -> Iterator[None]:
    """The schedule's share of steps becomes the share of the time that is left for training."""
    start: list[float] = []
    scale = 1 << 20

    def make(factor):
        def by_clock(config, step):
            if step < config.warmup_steps:
                return factor(config, step)
            now = seconds()
            start.append(now)
            share = (now - start[0]) / max(minutes * 60 - start[0], 1)
            timed = dataclasses.replace(config, max_steps=scale, warmup_steps=0)
            return factor(timed, min(int(share * scale), scale - 1))

        return by_clock

    with replaced(bit, "learning_rate_factor", make):
        yield


def cut_text(source: Path, size: int, folder: Path) -> Path:
    """The first `size` bytes of a text, cut at a line's end; all of it where size is 0."""
    if not size:
        return source
    path = folder / f"{source.stem}-{size}.txt"
    if not path.is_file():
        data = source.read_bytes()[:size]
        bit.write_atomically(path, data[: data.rfind(b"\n") + 1])
    return path


def python_texts(folder: Path) -> tuple[Path, Path]:
    """The text that comes with Python as two files: every tenth topic is for validation."""
    topics = [text for text, _ in bit.read_pieces("pydocs", "train", bit.DataConfig())]
    paths = folder / "pydocs-train.txt", folder / "pydocs-valid.txt"
    for path, chosen in zip(paths, (lambda i: i % 10 > 0, lambda i: i % 10 == 0), strict=True):
        text = "".join(topic for i, topic in enumerate(topics) if chosen(i))
        if not path.is_file():
            bit.write_atomically(path, text.encode())
    return paths


SAMPLE = bit.SamplingConfig(max_new_tokens=80, seed=0)  # what a row keeps of a model's writing


def own_texts(table: Table, texts: tuple[Path, Path], work: Path) -> tuple[Path, Path]:
    """Training and validation text of a table, of those that were given."""
    train, valid = python_texts(work) if table.pydocs else texts
    return cut_text(train, table.train_bytes, work), valid


def configurations(
    table: Table, variant: Variant, seed: int, texts: tuple[Path, Path], work: Path
) -> tuple[bit.ModelConfig, bit.DataConfig, bit.TrainConfig]:
    """What is trained: the core's defaults, then the table's, then the variant's."""
    changes = {
        "data": str(texts[0]),
        "validation_data": str(cut_text(texts[1], 30_000, work)),
        "eval_tokens": 8192,
        "save_every_minutes": 0.0,
        "keep_checkpoints": 1,
        "seed": seed,
        **table.base,
        **variant.changes,
    }
    model_part, data_part, train_part = split_fields(changes)
    train = bit.TrainConfig(**train_part)
    steps, every = 1_000_000, 0
    if table.tokens:
        steps = table.tokens // train.batch_tokens
        every = max(steps // 4, 1)
    train = dataclasses.replace(train, max_steps=steps, eval_every_steps=every)
    return bit.ModelConfig(**model_part), bit.DataConfig(**data_part), train


def shared_data(data: bit.DataConfig, model: bit.ModelConfig, work: Path) -> Path:
    """A text tokenised once for all runs that read it so; the folder."""
    size, context = model.vocab_size, model.max_position_embeddings
    folder = work / "tokens" / f"{Path(data.data).stem}-{size}-{context}"
    bit.prepare_data(data, size, context, folder)
    return folder


def run_one(table: Table, variant: Variant, seed: int, texts: tuple[Path, Path], work: Path) -> Any:
    """Train one variant with one seed and measure it; a dictionary for the results file."""
    if variant.patch == SEED_SCRIPT:
        return run_seed_script(table, seed, texts, work)
    texts = own_texts(table, texts, work)
    model, data, train = configurations(table, variant, seed, texts, work)
    out = work / "runs" / f"{os.getpid()}"
    if table.tokens:  # with a clock, tokenizing is part of the run
        link_data(shared_data(data, model, work), out)
    recorder = Recorder(out, table.minutes * 60)
    with contextlib.ExitStack() as stack:
        callbacks: list[bit.Callback] = [recorder]
        if variant.patch:
            more = stack.enter_context(PATCHES[variant.patch]())
            callbacks += [more] if more else []
        if table.minutes:
            stack.enter_context(rate_by_the_clock(table.minutes))
        state = bit.train(model, data, train, out, callbacks=callbacks)
        whole = cut_text(texts[1], table.valid_bytes, work)
        tokenizer = bit.load_tokenizer(out / "tokenizer.json")
        result = bit.evaluate(state.model, tokenizer, whole)
        text = bit.generate(state.model, tokenizer, "", SAMPLE)
    remove_folder(out)
    return {
        **{key: round(value, 5) for key, value in result.items()},
        "parameters": model.num_parameters,
        "steps": state.step,
        "trained_tokens": state.tokens,
        "seconds": round(recorder.trained_at, 1),
        "train_seconds": round(state.train_seconds, 1),
        "curve": recorder.curve,
        "clock": CLOCK,
        "device": str(bit.choose_device()),
        "text": text,
    }


def run_seed_script(table: Table, seed: int, texts: tuple[Path, Path], work: Path) -> Any:
    """The seed guide's script in its time: its model, its windows in their order, its AdamW.

    Its classes are those of tests/seed_model.py. What it prints and saves on its way is left out,
    its data loader's processes too: neither costs it anything that could be measured.
    """
    from tests import seed_model

    torch.manual_seed(seed)
    deadline, out = table.minutes * 60, work / "runs" / f"{os.getpid()}"
    out.mkdir(parents=True)
    lines = [x for x in texts[0].read_text("utf-8").splitlines(keepends=True) if x.strip()]
    tokenizer = bit.train_tokenizer(lines, 30_000, kind="wordpiece")
    tokenizer.save(str(out / "tokenizer.json"))
    encoded = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
    ids = torch.tensor([i for line in encoded for i in line.ids])
    windows = ids.unfold(0, 513, 1)  # they overlap with stride one and are read in order
    model = seed_model.MiLLM(30_000, 512, 8, 2048, 6, 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step, now = 0, 0.0
    while now < deadline:
        batch = windows[step * 16 : step * 16 + 16]
        optimizer.zero_grad()
        logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        step, now = step + 1, seconds()
        print(f"seed script: step {step}, {now:.0f} s", file=sys.stderr)
    path = out / "mi_llm_checkpoint.pth"
    torch.save({"epoch": 0, "batch": step, "model_state_dict": model.state_dict()}, path)
    loaded = bit.load_model(path)
    result = bit.evaluate(*loaded, cut_text(texts[1], table.valid_bytes, work))
    text = bit.generate(*loaded, "", SAMPLE)
    remove_folder(out)
    return {
        **{key: round(value, 5) for key, value in result.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "trained_tokens": step * 16 * 512,
        "seconds": round(now, 1),
        "train_seconds": round(now, 1),
        "curve": [],
        "clock": CLOCK,
        "device": "cpu, float32",
        "text": text,
    }


def link_data(shared: Path, out: Path) -> None:
    (out / "data").mkdir(parents=True)
    for name in ("tokenizer.json", "data/train.bin", "data/validation.bin", "data/manifest.json"):
        os.link(shared / name, out / name)


def remove_folder(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


# -----------------------------------------------------------------------------
# Lists of runs, and what comes of them


def read_rows(path: Path, table: str) -> list[dict[str, Any]]:
    """The rows of one table; a torn line, as a kill leaves it, is not there."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if row["table"] == table]


def add_row(path: Path, row: dict[str, Any]) -> None:
    """A line more, written at once, and behind a torn one not on the same line."""
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(row) + "\n")


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_row(name: str, variant: Variant, seed: int, flags: argparse.Namespace) -> bool:
    """One row, in a process of its own, added to the results file; False if that failed."""
    table = TABLES[name]
    command = [sys.executable, __file__, "one", name, "--variant", variant.name]
    command += ["--seed", str(seed), "--train", str(flags.train)]
    command += ["--valid", str(flags.valid), "--work", str(flags.work)]
    threads = 1 if flags.clock == "cpu" or flags.jobs > 1 else table.threads
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment["BITLLM_EXPERIMENTS_CLOCK"] = flags.clock
    key = {"table": name, "variant": variant.name, "seed": seed, "commit": commit()}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{variant.name}, seed {seed}: exit {done.returncode}", file=sys.stderr)
        return False
    row = {**key, **json.loads(done.stdout.splitlines()[-1])}
    add_row(flags.results, row)
    print(f"{variant.name}, seed {seed}: {row['loss']:.4f}", flush=True)
    return True


def run_table(name: str, flags: argparse.Namespace) -> bool:
    """Every variant and seed that has no row yet, `--jobs` at a time; False if one failed."""
    table = TABLES[name]
    texts = own_texts(table, (flags.train, flags.valid), flags.work)
    there = {(row["variant"], row["seed"]) for row in read_rows(flags.results, name)}
    pool, rows = ThreadPoolExecutor(flags.jobs), []
    try:
        for seed in range(flags.seeds or table.seeds):  # the first seed of all, then the second
            for variant in table.variants:
                if flags.only not in variant.name or (variant.name, seed) in there:
                    continue
                # what rows share is made here, so that no two make the same files
                model, data, _ = configurations(table, variant, seed, texts, flags.work)
                cut_text(texts[1], table.valid_bytes, flags.work)
                if table.tokens:
                    shared_data(data, model, flags.work)
                rows.append(pool.submit(run_row, name, variant, seed, flags))
        done = [row.result() for row in rows]
    finally:  # after Ctrl-C too, no further row begins
        pool.shutdown(cancel_futures=True)
    return all(done)


def spread(values: list[float], digits: int) -> str:
    """mean ± half the range."""
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{half}"


def report(name: str, rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, in its order: mean over the seeds, ± half the range."""
    lines = [
        "| variant | seeds | parameters | steps | tokens "
        "| loss | bits per byte | word perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in TABLES[name].variants:
        found = [row for row in rows if row["variant"] == variant.name]
        if not found:
            continue
        cells = [
            spread([row[key] for row in found], digits)
            for key, digits in (("loss", 3), ("bits_per_byte", 3), ("word_perplexity", 0))
        ]
        steps, tokens = (
            f"{statistics.mean(row[key] for row in found):,.0f}"
            for key in ("steps", "trained_tokens")
        )
        size = f"{found[0]['parameters'] / 1e6:.2f}M"
        lines.append(
            "| " + " | ".join([variant.name, str(len(found)), size, steps, tokens, *cells]) + " |"
        )
    return "\n".join(lines)


def draw(name: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte against tokens, and where the budget is time, against it, over the seeds.

    Lines are means, areas ranges. Bits per byte, since vocabularies differ: the watched slice's
    loss is turned into them as the final one. The clock's points of several seeds are not at quite
    the same tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["thousand training tokens"]
    if TABLES[name].minutes:
        names.append("seconds, everything counted")
    figure, places = plt.subplots(
        1,
        len(names),
        figsize=(5 * len(names) + 1, 4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for variant in TABLES[name].variants:
        found = [row for row in rows if row["variant"] == variant.name and row["curve"]]
        if not found:
            continue
        shared = min(len(row["curve"]) for row in found)
        points = np.array([row["curve"][:shared] for row in found])  # (seeds, points, 3)
        scales = np.array([row["bits_per_byte"] / row["loss"] for row in found])
        bits = points[:, :, 2] * scales[:, None]
        for axes, column in zip(places[0], (0, 1), strict=False):
            x = points[:, :, column].mean(0) / (1000 if column == 0 else 1)
            (line,) = axes.plot(x, bits.mean(0), ".-", label=variant.name)
            axes.fill_between(x, bits.min(0), bits.max(0), alpha=0.25, color=line.get_color())
    for axes, label in zip(places[0], names, strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    places[0][0].set_ylabel("validation, bits per byte")
    places[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def costs(train_text: Path, work: Path) -> str:
    """Bytes and generation speed of ternary models and their dense twins, in Markdown.

    Neither depends on how long a model was trained: one step, of one window.
    """
    lines = [
        "| model | linear | parameters | bytes | tokens/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, shape in {"ten minutes": SHORT, "first defaults": FIRST}.items():
        for linear in ("ternary", "dense"):
            model_part, _, _ = split_fields({**shape, "linear": linear})
            model = bit.ModelConfig(**model_part)
            out = work / "runs" / f"{os.getpid()}-{linear}"
            window = model.max_position_embeddings
            train = bit.TrainConfig(max_steps=1, batch_tokens=window, eval_tokens=window)
            bit.train(model, bit.DataConfig(data=str(train_text)), train, out, callbacks=[])
            size = 2 * model.num_parameters  # float16
            if linear == "ternary":
                size = bit.export_packed(out, out / "packed.safetensors").size
            net, _ = bit.load_model(out)
            sampling = bit.SamplingConfig(max_new_tokens=100, seed=0)
            taken = []
            for _ in range(3):
                start = time.perf_counter()
                count = len(list(bit.generate_tokens(net, [[0]], sampling)))
                taken.append((time.perf_counter() - start) / count)
            remove_folder(out)
            lines.append(
                f"| {name} | {linear} | {model.num_parameters / 1e6:.2f}M | {size:,} "
                f"| {1 / min(taken):.0f} |"
            )
    return "\n".join(lines)


def check(flags: argparse.Namespace) -> None:
    """ValueError for what cannot be, before any work."""
    for name in flags.table:
        bit.require(name in TABLES, "table", name, f"one of {', '.join(TABLES)}")
    bit.require(flags.jobs >= 1, "jobs", flags.jobs, "at least 1")
    bit.require(flags.seeds is None or flags.seeds >= 1, "seeds", flags.seeds, "at least 1")
    names = flags.table or list(TABLES)
    if flags.command == "run":
        known = [variant.name for name in names for variant in TABLES[name].variants]
        there = any(flags.only in name for name in known)
        bit.require(there, "only", flags.only, f"a part of one of: {'; '.join(known)}")
    read = {"run": ("train", "valid"), "costs": ("valid",)}.get(flags.command, ())
    if flags.command == "run" and all(TABLES[name].pydocs for name in names):
        read = ()  # it comes with Python
    for name in read:
        path = getattr(flags, name)
        bit.require(path.is_file(), name, str(path), "a text file, such as WikiText-2's")
    if flags.command == "draw":
        bit.require(bool(flags.table), "table", "", f"one of {', '.join(TABLES)}")
        folder = (flags.out or Path()).parent
        bit.require(folder.is_dir(), "out", str(flags.out), "a file in a folder that is there")
    if flags.command in ("report", "draw"):
        for name in flags.table:
            there = bool(read_rows(flags.results, name))
            bit.require(there, "results", str(flags.results), f"rows of {name}; run {name} first")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the tables of docs/results.md.")
    parser.add_argument("command", choices=("run", "one", "report", "draw", "costs", "list"))
    parser.add_argument("table", nargs="*", help=", ".join(TABLES))
    parser.add_argument("--train", type=Path, default=Path("train.txt"), help="training text")
    parser.add_argument("--valid", type=Path, default=Path("valid.txt"), help="validation text")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="for its files")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in --work")
    parser.add_argument("--seeds", type=int, help="how many; default: the table's")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of minutes")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, of one thread each")
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--out", type=Path, help="of draw: the .png file")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    flags.results = flags.results or flags.work / "results.jsonl"
    try:
        check(flags)
    except ValueError as error:
        parser.error(str(error))
    flags.work.mkdir(parents=True, exist_ok=True)
    if flags.command == "list":
        for name, table in TABLES.items():
            print(f"{name}: {table.about}; {len(table.variants)} variants")
    elif flags.command == "one":
        table = TABLES[flags.table[0]]
        variant = next(v for v in table.variants if v.name == flags.variant)
        row = run_one(table, variant, flags.seed, (flags.train, flags.valid), flags.work)
        print(json.dumps({**row, "machine": bit.machine()}))
    elif flags.command == "costs":
        print(costs(flags.valid, flags.work))
    elif flags.command == "draw":
        for name in flags.table:
            draw(name, read_rows(flags.results, name), flags.out or Path(f"{name}.png"))
    elif flags.command == "run":
        done = [run_table(name, flags) for name in flags.table or TABLES]
        return 0 if all(done) else 1
    else:
        for name in flags.table or TABLES:
            if rows := read_rows(flags.results, name):
                print(f"\n### {name}: {TABLES[name].about}\n")
                print(report(name, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
