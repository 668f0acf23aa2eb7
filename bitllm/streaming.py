"""Text that comes in while training runs: a budget of a hub's data set, or of a local folder.

`bitllm_core.prepare_data` reaches it where `max_train_tokens` is set for such a source.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from bitllm_core import (
    DataConfig,
    Piece,
    TokenData,
    TrainConfig,
    column_of,
    cut_long,
    end_of_text_id,
    file_rows,
    first_line,
    hub_rows,
    hub_source,
    is_local,
    join_lines,
    local_files,
    read_json,
    read_pieces,
    say,
    tokenize,
    write_atomically,
)

VALIDATION_CHARS = 2_000_000  # held out at the beginning of a source of unknown length
TOKENIZER_CHARS = 20_000_000  # text a tokenizer is trained on where training waits for it
ROWS = 64  # of a stream read at once
BLOCK_TOKENS = 1 << 22  # of a stream that come, and are shuffled, together
RETRY_S = (1.0, 60.0, 10)
"""Seconds until a broken stream is opened again: at first, doubling, at most; and how often."""


def stream_pieces(
    config: DataConfig, state: dict[str, Any] | None = None
) -> Iterator[tuple[list[Piece], dict[str, Any]]]:
    """The training text some rows at once, with the `state` that goes on after them."""
    state = state or {"source": 0, "column": None, "rows": None}
    files = local_files(Path(config.data).expanduser()) if is_local(config.data) else []
    hub = None if files else hub_source(config.data)
    for number in range(state["source"], len(files) or 1):
        if hub:
            rows, lines, wanted = hub_rows(hub, "train", True), hub.lines, hub.column
        else:
            rows, lines, wanted = file_rows(files[number]), files[number].suffix == ".txt", None
        # looking for the column reads the first rows: once is enough
        column = state["column"] or column_of(rows, wanted or config.text_column, config.data)
        if state["rows"]:
            rows.load_state_dict(state["rows"])
        for batch in rows.iter(batch_size=ROWS):
            texts: Iterable[str] = filter(None, batch[column])
            pieces = [(t, not lines) for t in (join_lines(texts) if lines else texts)]
            at = {"source": number, "column": column, "rows": rows.state_dict()}
            yield list(cut_long(pieces)), at
        state = {"source": number + 1, "column": None, "rows": None}
        if lines:
            yield [("", True)], state


def read_stream(config: DataConfig) -> Iterator[tuple[str, str, bool]]:
    for pieces, _ in stream_pieces(config):
        yield from (("train", *piece) for piece in pieces)


@lru_cache(maxsize=4)
def _block_order(seed: int, epoch: int, first: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, first]).permutation(size)


class StreamedData(TokenData):
    """Tokens of which a thread brings in more while training reads what is there.

    Windows are shuffled inside blocks of `BLOCK_TOKENS`, so that a step's are a function of (seed,
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
        return max(min(BLOCK_TOKENS, self.budget // 16) // context, 1)

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
        wait, most, tries = RETRY_S
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
        at_once = min(BLOCK_TOKENS, self.budget // 16) * dtype.itemsize
        room = (self.budget - done) * dtype.itemsize
        try:
            for pieces, after in stream_pieces(config, state):
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


def _mend(folder: Path, manifest: dict[str, Any]) -> None:
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


def begin_stream(config: DataConfig, tokenizer: Any, folder: Path) -> dict[str, Any]:
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
            VALIDATION_CHARS,
            4 * config.validation_fraction * (config.max_train_tokens or 0),
        ),
    )

    def pieces() -> Iterator[tuple[str, str, bool]]:
        nonlocal seen
        if first is not None:
            yield from (("validation", *piece) for piece in itertools.chain([first], own))
            seen = limit
            return
        for batch, after in stream_pieces(config):
            yield from (("validation", *piece) for piece in batch)
            seen += sum(len(text) for text, _ in batch)
            state.update(after)
            if seen >= limit:
                return

    counts = tokenize(tokenizer, pieces(), folder, None)
    if seen < limit:
        raise ValueError(
            f"data={config.data!r}: all of its {seen:,.0f} characters would validate, for a "
            "stream's beginning does; leave max_train_tokens out for a text as short as this"
        )
    to_come = {"tokens": config.max_train_tokens, "bytes": 0, "sha256": ""}
    return {**counts, "train": to_come, "stream_state": state or None}


def open_stream(folder: Path, validation: np.ndarray, manifest: dict[str, Any]) -> StreamedData:
    """The stream that `begin_stream` began, from where it is."""
    _mend(folder, manifest)
    return StreamedData(folder, validation, manifest)


def tokenizer_chars(config: DataConfig) -> int:
    """How much text to train a tokenizer on: training waits for it."""
    return min(TOKENIZER_CHARS, 8 * (config.max_train_tokens or 0))
