"""Text that arrives while training runs: a budget of a hub's data set, or of a local folder.

`bitllm_core.prepare_data` reaches it where `max_train_tokens` is set for such a source.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from bitllm_core import (
    DataConfig,
    Piece,
    Session,
    TokenData,
    TrainConfig,
    encode_pieces,
    first_line,
    read_json,
    text_parts,
    text_pieces,
    write_atomically,
)

log = logging.getLogger("bitllm")

VALIDATION_CHARS = 2_000_000  # the start of a stream is held out: its length is unknown
TOKENIZER_CHARS = 20_000_000  # text a tokenizer is trained on, at most; training waits for it
ROWS = 64  # read at once
BLOCK_TOKENS = 1 << 22  # written, and shuffled, together
RETRY_S = (1.0, 60.0, 10)
"""Seconds until a broken stream is opened again (doubling from the first to the second), and how
often in a row."""

State = dict[str, Any]  # where to resume: the number of a local file or shard, and of its row


def stream_pieces(
    config: DataConfig, state: State | None = None
) -> Iterator[tuple[list[Piece], State]]:
    """The training text, some rows at a time, each with the state that resumes after it."""
    first, start = (state or {}).get("source", 0), (state or {}).get("rows", 0)
    mark = config.document_separator
    parts = enumerate(text_parts(config.data, "train", config))
    for number, (rows, lines, ends) in itertools.islice(parts, first, None):
        rows = itertools.islice(rows, start, None)
        while batch := list(itertools.islice(rows, ROWS)):
            start += len(batch)
            yield list(text_pieces(batch, lines, False, mark)), {"source": number, "rows": start}
        if lines and ends and start:
            yield [("", True)], {"source": number + 1}
        start = 0


def first_pieces(config: DataConfig) -> Iterator[tuple[list[Piece], State]]:
    """`stream_pieces` from the start, opened again where it broke off, three times at most."""
    state = None
    for tries in (3, 2, 1, 0):
        try:
            for pieces, after in stream_pieces(config, state):
                yield pieces, after
                state = after
            return
        except (ValueError, FileNotFoundError, ImportError):
            raise
        except Exception as error:  # each layer of the hub's clients has kinds of its own
            if not tries:
                raise
            log.warning("data: %s; trying again in %.0f s", first_line(error), RETRY_S[0])
            time.sleep(RETRY_S[0])


def tokenizer_texts(config: DataConfig) -> Iterator[str]:
    """The text to train a tokenizer on, from the start of the stream."""
    texts = (text for pieces, _ in first_pieces(config) for text, _ in pieces)
    left = min(TOKENIZER_CHARS, 8 * (config.max_train_tokens or 0))
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return


@lru_cache(maxsize=32)  # of some sources
def _block_order(seed: int, epoch: int, first: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, first]).permutation(size)


class StreamedData(TokenData):
    """Tokens that a thread reads while training uses those that are there.

    Windows are shuffled inside blocks of `BLOCK_TOKENS`, so a step's are a function of (seed, step)
    no matter when they arrived. train.bin grows; progress.json beside it records its complete
    parts, each with the state to resume from.
    """

    def __init__(self, folder: Path, validation: np.ndarray, manifest: dict[str, Any]) -> None:
        super().__init__(np.empty(0, dtype=manifest["dtype"]), validation, manifest)
        self.folder, self.ended = folder, False
        self.error: Exception | None = None  # what ended the stream early
        manifest["train"]["sha256"] = manifest["validation"]["sha256"]  # start of the same source
        self.budget: int = manifest["asked"]["data"]["max_train_tokens"]

    @property
    def epoch_tokens(self) -> int:
        """The budget, or as many tokens as the source has."""
        return len(self.training) if self.ended else self.budget

    def refresh(self) -> None:
        """Look for new tokens."""
        progress = _progress(self.folder)
        count = progress["parts"][-1]["tokens"] if progress["parts"] else 0
        if count > len(self.training):
            path, dtype = self.folder / "train.bin", self.manifest["dtype"]
            self.training = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
        self.ended = progress["ended"]

    @property
    def tokens_there(self) -> int:
        return len(self.training)

    def ready(self, config: TrainConfig, context: int, step: int) -> bool:
        """Whether the tokens of a step are there; `error` is set where they never will be."""
        return self.has_windows((step + 1) * (config.batch_tokens // context), context)

    def has_windows(self, count: int, context: int) -> bool:
        """Whether the first `count` windows are there; `error` is set where they never will be."""
        needed = ((count - 1) // self._block(context) + 1) * self._block(context) * context + 1
        for look in (lambda: None, self.refresh):
            look()
            if self.ended and len(self.training) <= context:
                count = len(self.training)
                self.error = ValueError(
                    f"the stream has {count} tokens; expected more than one window ({context})"
                )
            elif self.ended or len(self.training) >= min(needed, self.budget):
                return True
        return False

    def wait(self, session: Session) -> bool:
        return wait_for(self, session)

    def _block(self, context: int) -> int:
        """Windows shuffled together: fewer where the budget is small, so that training starts."""
        return max(min(BLOCK_TOKENS, self.budget // 16) // context, 1)

    def window_starts(self, numbers: np.ndarray, context: int, seed: int) -> np.ndarray:
        """Where the windows of a step that is `ready` start: shuffled inside their block."""
        block, per_epoch = self._block(context), self.epoch_tokens // context
        starts = np.empty(len(numbers), dtype=np.int64)
        for row, number in enumerate(numbers.tolist()):
            epoch, within = divmod(number, per_epoch)
            first = within // block * block
            order = _block_order(seed, epoch, first, min(block, per_epoch - first))
            starts[row] = (first + order[within - first]) * context
        return starts

    @contextlib.contextmanager
    def coming(self, tokenizer: Any) -> Iterator[None]:
        """Read the rest in the background until the end of the block.

        ConnectionError at the end where the source could not be read.
        """
        self.refresh()
        closed = threading.Event()
        work = partial(self._read_all, tokenizer, closed)
        thread = threading.Thread(target=work, name="stream", daemon=True)
        if not self.ended:
            thread.start()
        try:
            yield
        finally:
            closed.set()
            if thread.is_alive():
                thread.join(5)  # one that waits for the network notices later, and writes nothing
        if self.error:
            raise ConnectionError(
                f"data={self.manifest['asked']['data']['data']!r} could not be read to its end "
                f"({first_line(self.error)}). The last step is saved; the same command resumes "
                "from there"
            ) from self.error

    def _read_all(self, tokenizer: Any, closed: threading.Event) -> None:
        """Read until the end, opening the stream again after an error."""
        wait, longest, tries = RETRY_S
        failures, before = 0, -1
        while not closed.is_set():
            try:
                self._read(tokenizer, closed)
                return
            except Exception as error:  # each layer of the hub's clients has kinds of its own
                self.refresh()
                failures = failures + 1 if len(self.training) == before else 1
                before = len(self.training)
                if isinstance(error, ValueError) or failures > tries:
                    self.error = error
                    return
                pause = min(wait * 2.0 ** (failures - 1), longest)
                if not closed.is_set():
                    log.warning("data: %s; trying again in %.0f s", first_line(error), pause)
                closed.wait(pause)

    def _read(self, tokenizer: Any, closed: threading.Event) -> None:
        """Append tokens from where the last part ended until the budget is reached."""
        config = DataConfig(**self.manifest["asked"]["data"])
        parts = _PartWriter(self.folder, self.manifest, closed)
        at_once = min(BLOCK_TOKENS, self.budget // 16)
        try:
            for pieces, after in stream_pieces(config, parts.state):
                parts.add(list(encode_pieces(tokenizer, pieces)), after)
                if closed.is_set():
                    return
                if parts.tokens >= self.budget:
                    break
                if len(parts.new) >= at_once:
                    parts.write()
        except BaseException:
            if parts.new:
                parts.write()  # need not be read again
            raise
        del parts.new[max(self.budget - parts.done, 0) :]
        parts.write(ended=True)


def wait_for(data: Any, session: Session) -> bool:
    """Wait for the tokens of the next step; False: stopped, or they will never be there.

    Args:
        data: has `ready`, `error` and `tokens_there`, as `StreamedData`.
    """
    waiting = False
    while True:
        ready = data.ready(session.config, session.context, session.state.step)
        failed = data.error is not None
        missing, failed = session.processes.all_reduce_max([not ready, failed])
        if not missing:
            return True
        if failed:
            session.state.stop_signal = session.state.stop_signal or signal.SIGTERM
        if session.stop_asked():
            return False
        if not waiting:
            log.info(f"waiting for more text; {data.tokens_there:,} tokens are there")
        waiting = True
        time.sleep(0.1)


class _PartWriter:
    """Appends parts to train.bin, and their ends, hashes and states to progress.json."""

    def __init__(self, folder: Path, manifest: dict[str, Any], closed: threading.Event) -> None:
        self.folder, self.closed, self.dtype = folder, closed, np.dtype(manifest["dtype"])
        self.parts = _progress(folder)["parts"]
        self.done: int = self.parts[-1]["tokens"] if self.parts else 0
        self.state = self.parts[-1]["state"] if self.parts else manifest["stream_state"]
        self.new = array(self.dtype.char)
        self.text_bytes = 0
        (folder / "train.bin").touch()

    @property
    def tokens(self) -> int:
        return self.done + len(self.new)

    def add(self, encoded: list[tuple[list[int], int]], state: State) -> None:
        for ids, length in encoded:
            self.new.extend(ids)
            self.text_bytes += length
        self.state = state

    def write(self, ended: bool = False) -> None:
        """Write what was added as one part, unless the stream was closed meanwhile."""
        if self.closed.is_set():
            return
        data = self.new.tobytes()
        with (self.folder / "train.bin").open("r+b") as file:
            file.seek(self.done * self.dtype.itemsize)  # overwrites what a kill left there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.done += len(self.new)
        digest = hashlib.sha256(data).hexdigest()
        part = {"tokens": self.done, "bytes": self.text_bytes, "sha256": digest}
        self.parts.append({**part, "state": self.state})
        _write_progress(self.folder, self.parts, ended)
        self.new, self.text_bytes = array(self.dtype.char), 0


def _progress(folder: Path) -> dict[str, Any]:
    return read_json(folder / "progress.json") or {"parts": [], "ended": False}


def _write_progress(folder: Path, parts: list[dict[str, Any]], ended: bool) -> None:
    text = json.dumps({"parts": parts, "ended": ended})
    write_atomically(folder / "progress.json", text.encode())


def begin_stream(
    config: DataConfig, held: Iterator[Piece] | None, write: Callable[..., Any], folder: Path
) -> dict[str, Any]:
    """Write validation.bin; return the manifest's entries for the stream.

    Args:
        held: the text to validate on; otherwise it is the start of the stream.
        write: writes pieces to a file, and returns the manifest's entry for it.
    """
    for name in ("train.bin", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    state: State = {}
    share = 4 * config.validation_fraction * (config.max_train_tokens or 0)
    limit, seen = min(VALIDATION_CHARS, share), 0.0

    def start_of_stream() -> Iterator[Piece]:
        nonlocal seen
        for batch, after in first_pieces(config):
            yield from batch
            seen += sum(len(text) for text, _ in batch)
            state.update(after)
            if seen >= limit:
                return

    validation = write(held or start_of_stream(), folder / "validation.bin")
    if not held and seen < limit:
        raise ValueError(
            f"data={config.data!r}: the start of a stream is held out for validation, and that "
            f"would be all of its {seen:,.0f} characters; leave max_train_tokens out for a text as "
            "short as this"
        )
    train = {"tokens": config.max_train_tokens, "bytes": 0, "sha256": ""}
    return {"train": train, "validation": validation, "stream_state": state or None}


def open_data(
    folder: Path, validation: np.ndarray, manifest: dict[str, Any]
) -> StreamedData | None:
    """The stream that `begin_stream` started, as far as train.bin holds what was written.

    None where it must be read again from the start: earlier versions kept the position as a state
    of `datasets`. The tokens are the same.
    """
    progress = _progress(folder)
    states = [manifest["stream_state"], *(part["state"] for part in progress["parts"])]
    old = any(isinstance(state and state.get("rows"), dict) for state in states)
    if old and not progress["ended"]:
        return None
    itemsize, good, end = np.dtype(manifest["dtype"]).itemsize, [], 0
    with contextlib.suppress(FileNotFoundError), (folder / "train.bin").open("rb") as file:
        for part in progress["parts"]:
            data = file.read((part["tokens"] - end) * itemsize)
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                break
            good, end = [*good, part], part["tokens"]
    if len(good) < len(progress["parts"]):
        log.warning("data: train.bin is damaged after token %d; reading the rest again", end)
        _write_progress(folder, good, ended=False)
    return StreamedData(folder, validation, manifest)
