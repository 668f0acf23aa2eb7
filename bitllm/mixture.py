"""A mixture of sources by shares of tokens: `--data "tinystories:0.7,my.txt:0.3"`.

`bitllm_core.prepare_data` reaches it where the data has a comma and is no file. Each source is
prepared as if it were alone, in data/1, data/2, ... of the run folder, with the tokenizer of all.
The number of a window alone decides which source gives it, so a batch stays a function of seed and
step, whatever the micro-batch, the number of processes and the sessions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitllm.companion import is_companion, language_of
from bitllm.conversations import add_marks
from bitllm.streaming import TOKENIZER_CHARS, StreamedData, tokenizer_texts, wait_for
from bitllm.vocabulary import give_tokenizer
from bitllm_core import (
    HUB_NAME,
    KNOWN_DATA,
    MARKS,
    METRICS,
    TOKENIZERS,
    BitLM,
    DataConfig,
    MetricsLog,
    Session,
    TokenData,
    TrainConfig,
    TrainState,
    check_tokenizer,
    file_hash,
    is_local,
    load_tokenizer,
    prepare_data,
    read_pieces,
    require,
    tokenizer_hash,
    train_tokenizer,
    write_atomically,
)

log = logging.getLogger("bitllm")

CYCLE = 1_000_000
"""windows after which the order of the sources begins again; a share is a whole number of them"""
VALIDATION_PIECES = 64  # that the validation text is mixed of, at least
LAST_LINES = 10  # of metrics.jsonl, whose mean is the training loss at the end

# Which sources


def is_mixture(data: str) -> bool:
    """Whether DataConfig.data names several sources; a file that has a comma in its name is one."""
    return "," in data and not is_local(data)


def sources_of(data: str) -> list[tuple[str, float]]:
    """The sources of a mixture and their shares of the tokens, which add up to 1.

    A weight stands after the last colon of each source: C:\\a.txt:0.3, hf:me/stories:en:0.7.

    Raises:
        ValueError: a weight is missing or wrong. FileNotFoundError: there is no such source.
    """

    def check(ok: bool, expected: str) -> None:
        require(ok, "data", data, expected)

    weights: dict[str, float] = {}
    begun = ""
    for part in data.split(","):
        check(bool(part.strip()), "a source between two commas, and after the last")
        begun = f"{begun},{part}" if begun else part
        name, _, text = begun.strip().rpartition(":")
        try:
            weight = float(text)
        except ValueError:  # its name has a comma, or it has no weight
            continue
        if "," in name and not is_local(name):
            break
        check(bool(name), f"a source before the weight {text}, such as my.txt:{text}")
        fits = 0 < weight < math.inf
        check(fits, f"a weight above 0 for {name!r}, such as {name}:0.5, not {text}")
        check(name not in weights, f"{name!r} only once, with the sum of its weights")
        weights[name], begun = weight, ""
    expected = f"a weight for {begun.split(',')[0].strip()!r} too, for each source needs one, "
    check(not begun, f'{expected}as in "tinystories:0.7,my.txt:0.3"; or the name of a file')
    total = math.fsum(weights.values())  # sum() rounds in another way from Python 3.12 on
    for name, weight in weights.items():
        least = f"at least a millionth of all weights for {name!r}, or none of it"
        check(weight / total >= 1 / CYCLE, least)
        _check_source(name)
    return [(name, weight / total) for name, weight in weights.items()]


def _check_source(name: str) -> None:
    """FileNotFoundError, ValueError: no such source. Nothing is fetched."""
    if is_companion(name):
        language_of(name)
    elif not (is_local(name) or name in ("pydocs", *KNOWN_DATA) or re.fullmatch(HUB_NAME, name)):
        next(read_pieces(name), None)  # the core says what there is


def part_of(config: DataConfig, source: str, share: float) -> DataConfig:
    """A source of a mixture as if it were alone, with its share of `max_train_tokens`."""
    most = config.max_train_tokens and math.ceil(share * config.max_train_tokens)
    persona = config.persona if is_companion(source) else None
    changes: dict[str, Any] = {"data": source, "max_train_tokens": most, "persona": persona}
    return dataclasses.replace(config, **changes)


def parts_of(config: DataConfig) -> list[DataConfig]:
    """The sources of a mixture, each as if it were alone; of one source, itself."""
    if not is_mixture(config.data):
        return [config]
    return [part_of(config, *source) for source in sources_of(config.data)]


def has_conversations(config: DataConfig) -> bool:
    """Whether a source, or one of a mixture, has conversations, whose marks a tokenizer needs.

    It reads the beginning of each, first of what is on this machine.
    """
    parts = sorted(parts_of(config), key=lambda part: not is_local(part.data))
    firsts = [next(read_pieces(part.data, "train", part), ("", True)) for part in parts]
    return any(MARKS[0] in text for text, _ in firsts)


def describe(data: str, tokens: int) -> Iterator[str]:
    """What so many training tokens are of, line by line."""
    for name, share in sources_of(data):
        yield f"  {share:6.2%} {name}: {share * tokens:,.0f} tokens"


# The order


class Order:
    """Which source gives each window.

    It begins again after a cycle. Of the n windows that a source has in a cycle, window j stands
    at its place (j + 0.5) / n. So after any number of windows every source has had its share of
    them but for one window or so: it is how Sainte-Lague apportions seats.

    Args:
        shares: of each source; they add up to 1.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        exact = np.asarray(shares) * CYCLE
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: CYCLE - counts.sum()]] += 1
        counts //= np.gcd.reduce(counts)
        sources = np.repeat(np.arange(len(counts)), counts)
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        self.cycle = sources[np.argsort(places, kind="stable")]
        self.places = [np.flatnonzero(self.cycle == source) for source in range(len(counts))]

    def sources(self, first: int, count: int) -> np.ndarray:
        """The sources of `count` windows from window `first` on, (count)."""
        return self.cycle[np.arange(first, first + count) % len(self.cycle)]

    def before(self, window: int) -> list[int]:
        """How many windows before this one each source gives."""
        cycles, rest = divmod(window, len(self.cycle))
        return [cycles * len(p) + int(np.searchsorted(p, rest)) for p in self.places]

    def end(self, there: Sequence[int]) -> int:
        """The first window whose source has no more, where each has so many."""
        pairs = zip(there, self.places, strict=True)
        return min(n // len(p) * len(self.cycle) + int(p[n % len(p)]) for n, p in pairs)


class MixedData(TokenData):
    """The tokens of several sources.

    Args:
        parts: the tokens of each source, in whose own order its windows come.
        order: which of them gives each window.
        folder: data/ of the run.
    """

    def __init__(
        self,
        parts: Sequence[TokenData],
        order: Order,
        folder: Path,
        validation: np.ndarray,
        manifest: dict[str, Any],
    ) -> None:
        super().__init__(np.empty(0, dtype=manifest["dtype"]), validation, manifest)
        self.parts, self.order, self.folder = parts, order, folder
        self.names = [source["source"] for source in manifest["mixture"]]
        self.streams = [part for part in parts if isinstance(part, StreamedData)]
        self.trained: Any = lambda: None  # the TrainState, while there is one
        self.sources = self.targets = np.empty(0, np.int64)  # of each window of the newest batch:
        # which source it is of, and how many of its tokens count
        self.nats: list[Tensor] = []  # of each window of the newest step, in this process

    @property
    def epoch_tokens(self) -> int:
        """The tokens of all sources together."""
        return sum(part.epoch_tokens for part in self.parts)

    def batch(self, config: TrainConfig, context: int, step: int) -> np.ndarray:
        windows = config.batch_tokens // context
        self.sources = self.order.sources(step * windows, windows)
        found = np.empty((windows, context + 1), np.int64)
        pairs = zip(self.parts, self.order.before(step * windows), strict=True)
        for source, (part, before) in enumerate(pairs):
            here = np.flatnonzero(self.sources == source)
            numbers = before + np.arange(len(here))
            starts = part.window_starts(numbers, context, config.seed)
            at = starts[:, None] + np.arange(context + 1)
            found[here] = part.training[at % part.epoch_tokens]
        self.targets = (found[:, 1:] >= 0).sum(1)
        return found

    # Streams among the sources

    @property
    def error(self) -> Exception | None:
        return next((stream.error for stream in self.streams if stream.error), None)

    @property
    def tokens_there(self) -> int:
        return sum(len(part.training) for part in self.parts)

    def ready(self, config: TrainConfig, context: int, step: int) -> bool:
        """Whether the tokens of a step are there, of every source."""
        needed = self.order.before((step + 1) * (config.batch_tokens // context))
        pairs = zip(self.parts, needed, strict=True)
        streams = [(part, n) for part, n in pairs if isinstance(part, StreamedData) and n]
        return all(part.has_windows(n, context) for part, n in streams)

    def wait(self, session: Session) -> bool:
        if self.trained() is not session.state:
            self._attach(session)
        self.nats.clear()
        return wait_for(self, session) if self.streams else True

    @contextlib.contextmanager
    def coming(self, tokenizer: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.coming(tokenizer))
            yield
        for line in self.summary():
            log.info(line)

    # What was learned of each

    def _attach(self, session: Session) -> None:
        """Keep the losses of all windows of a step, for `metrics`."""
        step, model = session.micro_step, session.state.model
        self.trained = weakref.ref(session.state)
        size, device = session.micro_batch * session.context, session.device.device
        losses = torch.zeros(size, 1, device=device)  # stays in its place, for CUDA graphs

        def micro_step(x: Tensor, y: Tensor) -> Tensor:
            model.losses = own = losses[: y.numel()]
            loss = step(x, y)
            model.losses = None
            self.nats.append(own.view(y.shape).sum(1))
            return loss

        session.micro_step = micro_step
        _TRAINED[model] = self

    def metrics(self, state: TrainState) -> dict[str, Any]:
        """Epochs of each source so far, and its loss in this step, where it has a window in it."""
        index = torch.arange(len(self.sources))[:, None]
        batches = state.processes.micro_batches(index, index, len(index))
        own = torch.cat([y[:, 0] for _, y in batches])
        own = own[own >= 0]  # a filler of FSDP's is below
        kept = torch.cat(self.nats).double().cpu()
        kept = kept[: len(own)] if state.processes.sharded else kept[-len(own) :]  # began anew
        sums = torch.zeros(len(self.parts), dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(self.sources)[own].long(), kept)
        nats = state.processes.all_reduce_sum(sums.tolist())
        counts = np.bincount(self.sources, self.targets, len(self.parts)).tolist()
        found = zip(self.names, nats, counts, strict=True)
        return {
            "source_epochs": dict(zip(self.names, self.epochs(state), strict=True)),
            "source_loss": {name: sum_ / count for name, sum_, count in found if count},
        }

    def tokens_of(self, state: TrainState) -> list[int]:
        """Tokens of each source that were read so far."""
        context = state.model.config.max_position_embeddings
        return [context * n for n in self.order.before(state.tokens // context)]

    def epochs(self, state: TrainState) -> list[float]:
        pairs = zip(self.tokens_of(state), self.parts, strict=True)
        return [round(tokens / part.epoch_tokens, 4) for tokens, part in pairs]

    def summary(self) -> Iterator[str]:
        """Of each source: its share, tokens, epochs and training loss."""
        if (state := self.trained()) is None:
            return
        lines = MetricsLog.read(self.folder.parent / "metrics.jsonl")
        logged = [line["source_loss"] for line in lines if "source_loss" in line]
        read = self.tokens_of(state)
        for name, tokens, epochs in zip(self.names, read, self.epochs(state), strict=True):
            losses = [line[name] for line in logged if line.get(name) is not None][-LAST_LINES:]
            loss = f"{sum(losses) / len(losses):.4f}" if losses else "not logged"
            share = f"{tokens / max(sum(read), 1):.1%} of the tokens"
            yield f"{name}: {share}, {tokens:,} tokens, {epochs:.2f} epochs, loss {loss}"


_TRAINED: weakref.WeakKeyDictionary[BitLM, MixedData] = weakref.WeakKeyDictionary()


def source_metrics(state: TrainState) -> dict[str, Any]:
    """What a logged line has of a mixture."""
    data = _TRAINED.get(state.model)
    return data.metrics(state) if data else {}


METRICS.append(source_metrics)


# In the run folder


def write_data(config: DataConfig, context: int, out: Path, manifest: dict[str, Any]) -> None:
    """Make the tokenizer and the tokens of every source, where they are not there yet.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: see `sources_of` and `prepare_data`.
    """
    folder, vocab_size = out / "data", manifest["asked"]["vocab_size"]
    names, shares = zip(*sources_of(config.data), strict=True)
    other = config.validation_data
    require(not is_mixture(other or ""), "validation_data", other, "one source, not a mixture")
    tokenizer = _make_tokenizer(config, shares, vocab_size, out / "tokenizer.json")
    configs, order = parts_of(config), Order(shares)
    parts = _open_parts(configs, context, vocab_size, folder)
    tokens, size = _mixed_validation(parts, order, context)
    if config.validation_data:  # the same in all of them
        tokens, size = parts[0].validation, parts[0].manifest["validation"]["bytes"]
    types = [np.dtype(part.manifest["dtype"]) for part in parts]
    manifest |= {"dtype": str(np.result_type(*types)), "context": context}
    path = folder / "validation.bin"
    write_atomically(path, tokens.astype(manifest["dtype"]).tobytes())
    manifest["validation"] = {"tokens": len(tokens), "bytes": size, "sha256": file_hash(path)}
    counts = {k: sum(part.manifest["train"][k] for part in parts) for k in ("tokens", "bytes")}
    manifest["train"] = {**counts, "sha256": ""}  # the files are those of the sources
    manifest["tokenizer_sha256"] = tokenizer_hash(tokenizer)
    hashes = [part.manifest["train"]["sha256"] for part in parts]
    manifest["mixture"] = [
        {"source": name, "share": share, "sha256": sha256}
        for name, share, sha256 in zip(names, shares, hashes, strict=True)
    ]
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def open_data(folder: Path, validation: np.ndarray, manifest: dict[str, Any]) -> MixedData | None:
    """What `write_data` wrote; None where a source's tokens, made again, are not the same."""
    config, sources = DataConfig(**manifest["asked"]["data"]), manifest["mixture"]
    configs = [part_of(config, source["source"], source["share"]) for source in sources]
    parts = _open_parts(configs, manifest["context"], manifest["asked"]["vocab_size"], folder)
    hashes = [part.manifest["train"]["sha256"] for part in parts]
    if hashes != [source["sha256"] for source in sources]:
        return None
    manifest["train"]["sha256"] = hashlib.sha256("".join(hashes).encode()).hexdigest()
    for source, part in zip(sources, parts, strict=True):
        tokens = part.manifest["train"]["tokens"]
        log.info(
            f"mixture: {source['share']:.2%} of {source['source']}, which has {tokens:,} tokens"
        )
    return MixedData(parts, Order([s["share"] for s in sources]), folder, validation, manifest)


def _open_parts(
    configs: Sequence[DataConfig], context: int, vocab_size: int, folder: Path
) -> list[TokenData]:
    """The tokens of each source in its folder, made where they are not there yet."""
    spelled, parts = (folder.parent / "tokenizer.json").read_bytes(), []
    for number, config in enumerate(configs, 1):
        path = folder / str(number) / "tokenizer.json"
        if not path.is_file() or path.read_bytes() != spelled:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, spelled)
        parts.append(prepare_data(config, vocab_size, context, path.parent)[0])
    return parts


def _mixed_validation(
    parts: Sequence[TokenData], order: Order, context: int
) -> tuple[np.ndarray, int]:
    """The validation tokens of the sources in turn, as windows of training, and about their bytes.

    It ends where a source has no more. Pieces are windows, or shorter where there is little text.
    """
    sizes = [len(part.validation) for part in parts]
    places = zip(sizes, order.places, strict=True)
    whole = min(size * len(order.cycle) // len(own) for size, own in places)
    piece = max(min(context, whole // VALIDATION_PIECES), 2)
    count = order.end([size // piece for size in sizes])
    sources, counts = order.sources(0, count), order.before(count)
    found, size = np.empty((count, piece), np.int64), 0.0
    for source, part in enumerate(parts):
        used, entry = counts[source] * piece, part.manifest["validation"]
        found[sources == source] = part.validation[:used].reshape(-1, piece)
        size += used * entry["bytes"] / entry["tokens"]
    return found.ravel(), round(size)


# The tokenizer of all


def _make_tokenizer(
    config: DataConfig, shares: Sequence[float], vocab_size: int, path: Path
) -> Any:
    """The tokenizer in `path`; where there is none, the one asked for, or one of all sources."""
    chats = has_conversations(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() and config.tokenizer not in TOKENIZERS:
        give_tokenizer(config.tokenizer, path)
    if path.is_file():
        tokenizer = load_tokenizer(path)
    else:
        texts = mixed_texts(parts_of(config), shares)
        tokenizer = train_tokenizer(texts, vocab_size - 2 * chats, config.tokenizer)
    if chats:
        add_marks(tokenizer)
    check_tokenizer(tokenizer, vocab_size, path)
    write_atomically(path, tokenizer.to_str(pretty=True).encode())
    return tokenizer


def _training_texts(config: DataConfig) -> Iterator[str]:
    """The text of a source that is not held out; of what may be a stream, its beginning."""
    if config.max_train_tokens and not Path(config.data).expanduser().is_file():
        yield from tokenizer_texts(config)
        return
    read = partial(read_pieces, config.data, "train", config)
    own = config.validation_data or next(read_pieces(config.data, "validation", config), None)
    left: float = math.inf
    if not own:
        left = round(sum(len(text) for text, _ in read()) * (1 - config.validation_fraction))
    for text, _ in read():
        yield text if left > len(text) else text[: int(left)]
        left -= len(text)
        if left <= 0:
            return


def mixed_texts(parts: Sequence[DataConfig], shares: Sequence[float]) -> Iterator[str]:
    """The texts of all sources by their shares, to train a tokenizer on.

    Short ones are read again, as in training, until all were read or there is enough.
    """
    readers, read = [_training_texts(part) for part in parts], [0] * len(parts)
    marks, unread = dict.fromkeys(map(ord, MARKS)), set(range(len(parts)))
    while unread and sum(read) < TOKENIZER_CHARS:
        source = min(range(len(parts)), key=lambda i: read[i] / shares[i])
        text = next(readers[source], None)
        if text is None:
            require(read[source] > 0, "data", parts[source].data, "some text in it")
            unread.discard(source)
            readers[source] = _training_texts(parts[source])
            continue
        read[source] += len(text)
        yield text.translate(marks)
