"""The dial: which model, text tokens and steps suit some minutes, a text and a machine.

`bitllm train --data my.txt --minutes 10` and `dial(10, DataConfig("my.txt"))` choose every setting
that is not given, in this order:

1. The machine: the rate of a large matrix product, measured, tells the seconds per training token
   and step of each size (`step_seconds`).
2. The text: its bytes, and how often they can be read in the minutes.
3. Of all shapes and vocabularies, those that fit the time are compared by the bits per byte that
   the law promises (`bits_per_byte`), and the best is taken.
4. Size of a step, rates and context follow from the tokens and the width.

The law has the form of Kaplan et al. (2020, arXiv:2001.08361, eq. 1.5), where size matters little
as long as text is what is missing, which is so in minutes; the exponents of Hoffmann et al. (2022,
arXiv:2203.15556); and text that is read again counts less (Muennighoff et al., 2023,
arXiv:2305.16264). Its constants, and that a larger vocabulary learns more from the same bytes, are
fitted to our own runs on WikiText-2: `python tools/fit_dial.py` prints them and what they miss.
It compares settings for one text; how low the loss will be depends on the text.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitllm.clock import USEFUL_EPOCHS, inner_parameters
from bitllm.compiling import why_not_compile
from bitllm.cpu import products
from bitllm.files import files_on_disk
from bitllm.machine import measure_products
from bitllm.mixture import is_mixture, parts_of
from bitllm.vocabulary import num_rows, open_tokenizer
from bitllm_core import (
    KNOWN_DATA,
    MARKS,
    PRESETS,
    TOKENIZERS,
    DataConfig,
    Device,
    ModelConfig,
    Processes,
    TrainConfig,
    choose_device,
    extension,
    is_local,
    log,
    read_pieces,
    require,
)

E, A, B, G = 0.937, 0.0509, 1.08, 0.4
"""Of `bits_per_byte`: what remains, of parameters, of text, of the vocabulary."""
ALPHA, BETA, REPEATED = 0.34, 0.28, 4.0
"""Chinchilla's exponents; epochs after which reading a text again has taught most of what it can:
fewer than the 15.4 of larger models (Muennighoff et al.)"""
MOMENTUM, FEW_STEPS = 0.9, 2000
"""Of Muon, and in runs of at most so many steps: with 0.95 they learn less (docs/log.md)."""
OFTEN = 3.5
"""Epochs above which embedding and norms learn more slowly and matrices decay, or it overfits."""
LARGEST = 1.5
"""parameters inside the blocks for each byte of text, at most: more learn a small text by heart"""
VOCABULARIES = (1024, 2048, 4096, 8192, 16_384)
TEXT_PER_TOKEN = 90
"""bytes of text for each token of the vocabulary, at least: a rare token is not learned"""
WORDS_PER_TOKEN, SAMPLE_CHARS = 1.5, 1_000_000
"""Most tokens per different word of so many characters: others would be seldom used."""
WIDTHS, DEPTHS = (256, 512, 768, 1024, 1536), (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
"""Multiples of 256, which all clients of the exports load."""
MEASURING_S = 1.5
COMPILING_S = 15.0
"""what torch.compile takes where its cache is empty"""
BY_CLOCK = "none with minutes, which end the run; more minutes make it longer"
READ_PER_S = 3e6
"""bytes of text a second, for training a tokenizer and tokenizing"""
START_S = 8.0
"""imports, and the end: the last checkpoint and evaluation"""


@dataclass(frozen=True)
class Machine:
    """What the dial needs to know of a machine."""

    device: Device
    rate: float
    """FLOP a second of a large matrix product, of all processes together"""
    compiles: bool
    threads: int = 2
    amx: bool = False
    """of a CPU: whether it trains with AMX"""


@dataclass(frozen=True)
class Text:
    """How much text there is to learn from."""

    bytes: float
    name: str
    words: float = math.inf
    """different ones in its first million characters"""
    conversations: bool = False


def has_amx(device: Device) -> bool:
    """Whether such training uses it."""
    cpu = device.device.type == "cpu" and device.dtype == torch.bfloat16
    return cpu and products.has_amx()


def measure(device: str = "auto", dtype: str = "auto", processes: int = 1) -> Machine:
    """Measure this machine for a second or two: neighbours make it faster and slower meanwhile."""
    found, rates, start = choose_device(device, dtype), [], time.monotonic()
    while not rates or time.monotonic() - start < MEASURING_S:
        rates.append(measure_products(found))
    rate, threads = sum(rates) / len(rates), torch.get_num_threads()
    compiles, amx = not why_not_compile(found.device), has_amx(found)
    return Machine(found, rate * processes, compiles, threads * processes, amx)


def size_of(data: DataConfig) -> Text:
    """The bytes of a source or mixture. Of the hub, of which a stream is read, there is enough.

    Raises:
        FileNotFoundError: there is no such source. ValueError: it cannot be read.
    """
    name = data.data
    if is_mixture(name):
        texts = [size_of(part) for part in parts_of(data)]
        size, words = sum(t.bytes for t in texts), max(t.words for t in texts)
        return Text(size, name, words, any(t.conversations for t in texts))
    if is_local(name):
        path = Path(name).expanduser()
        files = [path] if path.is_file() else files_on_disk(path)
        packed = 3.0 if all(f.suffix in (".gz", ".zst", ".zip", ".parquet") for f in files) else 1.0
        size = packed * sum(file.stat().st_size for file in files)
    elif name.partition(":")[0] in ("pydocs", "companion"):
        if name != "pydocs":
            return Text(4.2e6, name, 1000, conversations=True)
        size = 0.46e6
    elif name in KNOWN_DATA or name.startswith("hf:"):
        words = 4000 if name == "tinystories" else math.inf
        return Text(10.8e6 if name == "wikitext-2" else math.inf, name, words)
    else:
        raise FileNotFoundError(f"data={name!r}: no such file or folder, and no known data set")
    size = min(size, 4.0 * (data.max_train_tokens or math.inf))
    if data.validation_data is None:
        size *= 1 - data.validation_fraction
    return Text(max(size, 1.0), name, *_words(data))


def _words(data: DataConfig) -> tuple[int, bool]:
    """Different words at the beginning of a text, and whether it has conversations."""
    words, read, chats = set(), 0, False
    for text, _ in read_pieces(data.data, "train", data):
        words.update(text.split())
        chats |= MARKS[0] in text
        if (read := read + len(text)) > SAMPLE_CHARS:
            break
    return len(words), chats


# The law


def bytes_per_token(vocab_size: int) -> float:
    """Of English, by a byte-level BPE trained on it: 3.43 with 4,096, 3.85 with 8,192."""
    return 3.43 + 0.4 * math.log2(vocab_size / 4096)


def step_seconds(
    model: ModelConfig, machine: Machine, compiled: bool, batch_tokens: float
) -> float:
    """Seconds of a step of so many tokens, with the neighbours that a machine usually has.

    A token takes products at a share of the measured rate; what grows with width and depth; and,
    on a CPU, the softmax. A step takes what it takes to start it, the optimizer's way through
    memory, and its products. With AMX products are so fast that much waits for memory.
    docs/dial.md tells what this misses.
    """
    rate, width = machine.rate, model.hidden_size
    if machine.device.device.type == "cpu":
        slower = 2 / machine.threads
        share, start = (0.7, 0.022) if machine.amx else (0.9, 0.012)
        element, parameter = (20e-9, 3e-9) if machine.amx else (7e-9, 1e-9)
        element *= slower * (1 if compiled else 1.7)
        column, parameter = 0.8e-9 * slower, parameter * slower
    else:
        share, element, column, start, parameter = 0.65, 5e4 / rate, 0.0, 0.003, 1e4 / rate
    token = 6 * model.num_parameters / (share * rate)
    token += element * width * model.num_hidden_layers + column * model.vocab_size
    orthogonalizing = 18 * width * inner_parameters(model) / (share * rate)
    return batch_tokens * token + start + parameter * model.num_parameters + orthogonalizing


def tokens_of_step(tokens: float) -> float:
    """Best size of a step of a run of so many tokens, before it is rounded to whole windows: 1,024
    for a quarter of a million, 4,096 for five million, near what was measured (docs/dial.md), and
    32,768 for a GPU's hour.
    """
    return min(max(0.4 * tokens**0.6, 1024), 1 << 19)


def tokens_in(
    seconds: float, model: ModelConfig, machine: Machine, compiled: bool, batch: float = 0
) -> float:
    """Tokens of so many seconds of training, in steps of `batch` or, if 0, the size for them."""
    tokens = 1e6
    for _ in range(8):  # a larger step costs less per token: the size of both settles soon
        size = batch or tokens_of_step(tokens)
        tokens = max(seconds, 0.0) * size / step_seconds(model, machine, compiled, size)
    return tokens


def learned_bytes(read: float, there: float) -> float:
    """What reading so many bytes teaches, of a text that has fewer: as much as so many new ones."""
    if read <= there:
        return read
    again = read / there - 1
    return there + there * REPEATED * (1 - math.exp(-again / REPEATED))


def bits_per_byte(model: ModelConfig, learned: float) -> float:
    """The loss on WikiText-2 that the law expects of a model that has learned so many bytes."""
    text = learned / 1e6 * (model.vocab_size / 8192) ** G
    size = inner_parameters(model) / 1e6
    return E + (A * size ** (-ALPHA / BETA) + B / text) ** BETA


# The choice


def shapes(text: Text, given: dict[str, Any]) -> Iterator[ModelConfig]:
    """All shapes to choose from, with what is given."""
    fields = {item.name for item in dataclasses.fields(ModelConfig)}
    own = {k: v for k, v in given.items() if k in fields}
    widths = (own["hidden_size"],) if "hidden_size" in own else WIDTHS
    depths = (own["num_hidden_layers"],) if "num_hidden_layers" in own else DEPTHS
    most = min(text.bytes / TEXT_PER_TOKEN, WORDS_PER_TOKEN * text.words)
    sizes = tuple(v for v in VOCABULARIES if v <= most)
    sizes = (own["vocab_size"],) if "vocab_size" in own else sizes or VOCABULARIES[:1]
    for width in widths:
        heads = max(n for n in range(1, max(width // 64, 1) + 1) if width % n == 0)
        heads = own.get("num_attention_heads", heads)
        inner = 2 * width if width <= 512 else 256 * round(8 / 3 * width / 256)
        shape: dict[str, Any] = {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2 if heads % 2 == 0 else None,
        }
        for depth in depths:
            if width / 160 <= depth <= width / 32 or "num_hidden_layers" in own or len(widths) == 1:
                for size in sizes:
                    more = {"vocab_size": size, "num_hidden_layers": depth}
                    yield ModelConfig(**{**shape, **more, **own})


def _compiling(asked: str, machine: Machine) -> tuple[bool, ...]:
    """Whether to compile, or both to choose from; the first is better where they are equal."""
    if asked == "on":
        return (True,)
    return (False, True) if machine.compiles and asked == "auto" else (False,)


@dataclass(frozen=True)
class Choice:
    """What the dial chose: the three configurations, and what they are expected to do."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    why: tuple[str, str, str]


def choose(
    minutes: float, data: DataConfig, given: dict[str, Any], machine: Machine, text: Text
) -> Choice:
    """The settings for so many minutes; those of `given` are kept, by the fields' names."""
    asked = TrainConfig(minutes=minutes, **{k: v for k, v in given.items() if k in _TRAIN})
    reading = min(text.bytes, 100e6) / READ_PER_S
    for_steps = max(60 * minutes - START_S - reading, 20 * minutes)
    found = list(shapes(text, given))
    smallest = min(map(inner_parameters, found))
    best, model, tokens, compiled, epochs = math.inf, None, 0.0, False, 0.0
    for shape in found:
        if inner_parameters(shape) > max(LARGEST * text.bytes, smallest):
            continue
        unit = bytes_per_token(shape.vocab_size)
        there = text.bytes / unit
        most = there * USEFUL_EPOCHS
        for compiles in _compiling(asked.compile, machine):
            left = for_steps - COMPILING_S * compiles
            batch = given.get("batch_tokens", 0)
            read = min(tokens_in(left, shape, machine, compiles, batch), most)
            loss = bits_per_byte(shape, learned_bytes(max(read, 1) * unit, text.bytes))
            if loss < best:
                best, model, tokens, compiled = loss, shape, max(read, 1), compiles
                epochs = read / there
    assert model is not None
    context = given.get("max_position_embeddings") or context_for(tokens, text)
    model = dataclasses.replace(model, max_position_embeddings=context)
    train = training_for(model, tokens, asked, given, compiled, epochs > OFTEN)
    read = tokens * bytes_per_token(model.vocab_size)
    if data.max_train_tokens is None and text.bytes > 3 * read + 20e6:
        data = dataclasses.replace(data, max_train_tokens=round(1.2 * tokens))
    why = _why(model, train, machine, text, tokens, epochs > 0.9 * USEFUL_EPOCHS)
    return Choice(model, data, train, why)


def dial(minutes: float, data: DataConfig | None = None, **given: Any) -> tuple[Any, Any, Any]:
    """The configurations for `train` that suit so many minutes, this machine and a text.

    Args:
        minutes: of the whole run, from its start; see `TrainConfig`.
        data: default: the preset demo's.
        given: fields of the configurations to keep, such as hidden_size=512.

    Raises:
        ValueError: wrong values, or max_steps among `given`. FileNotFoundError: no such text.
    """
    data = data or PRESETS["demo"][1]
    if data.tokenizer not in TOKENIZERS:
        given = {**given, "vocab_size": num_rows(open_tokenizer(data.tokenizer), data)}
    choice = _dialed(minutes, data, given)
    for line in choice.why:
        log.info(line)
    return choice.model, choice.data, choice.train


def _dialed(minutes: float, data: DataConfig, given: dict[str, Any]) -> Choice:
    """The choice of the main process, in all of them."""
    require("max_steps" not in given, "max_steps", given.get("max_steps"), BY_CLOCK)
    names = {item.name for kind in (ModelConfig, TrainConfig) for item in dataclasses.fields(kind)}
    unknown = min(given.keys() - names, default="")
    require(not unknown, unknown, given.get(unknown), "a field of ModelConfig or TrainConfig")
    fixed = TrainConfig(minutes=minutes, **{k: v for k, v in given.items() if k in _TRAIN})
    processes, size = Processes(), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        distributed = extension("distributed", "several processes")
        distributed.meet(fixed.device)
        processes = distributed.DistributedProcesses()

    def work() -> Choice:
        machine = measure(fixed.device, fixed.dtype, size)
        return choose(minutes, data, given, machine, size_of(data))

    return processes.broadcast(processes.run_on_main(work))


_TRAIN = {item.name for item in dataclasses.fields(TrainConfig)} - {"minutes"}


def context_for(tokens: float, text: Text) -> int:
    """Tokens of a window: short ones learn faster in the beginning; a conversation needs 256."""
    if text.conversations:
        return 256
    return 128 if tokens < 3e6 else 256 if tokens < 50e6 else 512


def training_for(
    model: ModelConfig,
    tokens: float,
    asked: TrainConfig,
    given: dict[str, Any],
    compiled: bool,
    often: bool = False,
) -> TrainConfig:
    """Size of a step, rates and evaluations.

    Embedding and norms learn faster in a narrow model, matrices where there are few steps. Of a
    text that is read `often`, they learn more slowly, and the matrices decay.
    """
    context, width = model.max_position_embeddings, model.hidden_size
    windows = 2 ** max(round(math.log2(tokens_of_step(tokens) / context)), 0)
    batch = given.get("batch_tokens") or windows * context
    steps = max(round(tokens / batch), 1)
    rate = min(max(0.04 * (steps / 500) ** -0.5, 0.02), 0.04)
    choice = {
        "max_steps": steps,
        "batch_tokens": batch,
        "learning_rate": None if model.linear == "dense" else round(rate, 3),
        "momentum": MOMENTUM if steps <= FEW_STEPS else asked.momentum,
        "adamw_learning_rate": 0.005 if often else round(min(0.015, 3.84 / width), 4),
        "weight_decay": 0.5 if often else 0.0,
        "warmup_steps": min(20 if batch < 32_768 else 100, max(steps // 10, 1)),
        "eval_every_steps": max(steps // 10, 20),
        "eval_tokens": min(65_536, max(4096, round(tokens / 400))),
        "compile": "on" if compiled else "off",
    }
    if asked.optimizer != "muon":
        del choice["learning_rate"], choice["adamw_learning_rate"], choice["momentum"]
    return dataclasses.replace(asked, **{k: v for k, v in choice.items() if k not in given})


def _why(
    model: ModelConfig,
    train: TrainConfig,
    machine: Machine,
    text: Text,
    tokens: float,
    ends_early: bool,
) -> tuple[str, str, str]:
    """The three lines: machine, text, choice."""
    compiled = train.compile == "on"
    rate, kind = machine.rate / 1e12, machine.device
    batch = train.batch_tokens
    per_s = batch / step_seconds(model, machine, compiled, batch)
    seconds = tokens / per_s
    epochs = tokens * bytes_per_token(model.vocab_size) / text.bytes
    size = f"{text.bytes / 1e6:,.1f} MB of text" if text.bytes < math.inf else "a stream of text"
    often = f"{epochs:.1f} times" if text.bytes < math.inf else "once"
    ends = ""
    if ends_early:
        ends = (
            f"; more would only overfit, so it ends after {max(seconds, 6) / 60:.1f} minutes or so"
        )
    return (
        f"{train.minutes:g} minutes on {kind}: {rate:.3g} TFLOP/s measured, about "
        f"{per_s:,.0f} tokens/s"
        f"{' compiled' if compiled else ', not compiled'}",
        f"{size}, read {often} ({tokens / 1e6:,.2f}M tokens){ends}",
        f"so {model.num_parameters / 1e6:.1f}M parameters: vocabulary {model.vocab_size:,}, "
        f"{model.num_hidden_layers} layers x {model.hidden_size}, context "
        f"{model.max_position_embeddings}; about {train.max_steps:,} steps of "
        f"{train.batch_tokens:,}",
    )
