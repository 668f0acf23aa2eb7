"""A tokenizer that exists already: a tokenizer.json, or that of a model on the hub.

`--tokenizer FILE` and `--tokenizer hf:OWNER/NAME` reach it. The embedding gets as many rows as the
tokenizer has ids, and the run folder a copy: a resume needs neither the file nor the hub.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from bitllm.conversations import add_marks
from bitllm_core import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    TOKENIZERS,
    DataConfig,
    checked_settings,
    encode,
    end_of_text_id,
    first_line,
    list_checkpoints,
    load_tokenizer,
    newest_checkpoint,
    num_ids,
    read_json,
    same_data,
    tokenizer_from,
    tokenizer_hash,
    write_atomically,
)

log = logging.getLogger("bitllm")

_PROBE = "Ab 12,\n\t\u00e9 \u6f22\u5b57 \U0001f431 \U000e0041"  # something that no vocabulary has


def open_tokenizer(name: str) -> Any:
    """The tokenizer that `name` says, with <|endoftext|> as one more token where it has none.

    Args:
        name: a tokenizer.json, a folder with one, or hf:OWNER/NAME.

    Raises:
        ValueError: no such file, or one that cannot read every text. ConnectionError: the hub
            cannot be reached, or has no such tokenizer.
    """
    path = _local(name)
    if name.startswith("hf:"):
        from bitllm.export.hub import fetch_tokenizer

        path = fetch_tokenizer(name.removeprefix("hf:"))
    elif not path.is_file():
        expected = f"{', '.join(TOKENIZERS)}, a tokenizer.json that is there, or hf:OWNER/NAME"
        raise ValueError(f"tokenizer={name!r}: expected {expected}")
    tokenizer = load_tokenizer(path)
    try:
        found = encode(tokenizer, _PROBE)
    except Exception as error:  # the library's own kinds, such as an unknown word without [UNK]
        raise ValueError(f"{path}: cannot read every text ({first_line(error)})") from error
    if not found:
        raise ValueError(f"{path}: gives no tokens for {_PROBE!r}; expected a trained tokenizer")
    if end_of_text_id(tokenizer) is None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _local(name: str) -> Path:
    path = Path(name).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def with_marks(tokenizer: Any) -> Any:
    """A copy that has the marks of a conversation."""
    marked = tokenizer_from(tokenizer.to_str(), Path("tokenizer.json"))
    add_marks(marked)
    return marked


def same_tokenizer(found: Any, given: Any) -> bool:
    """Whether a run's tokenizer is the one given, with or without the marks of a conversation."""
    return tokenizer_hash(found) in (tokenizer_hash(given), tokenizer_hash(with_marks(given)))


def num_rows(tokenizer: Any, data: DataConfig) -> int:
    """Rows of the embedding: the tokenizer's, and a conversation's marks where the data has any."""
    marked = with_marks(tokenizer)
    if num_ids(marked) > num_ids(tokenizer):
        from bitllm.mixture import has_conversations

        tokenizer = marked if has_conversations(data) else tokenizer
    return max(num_ids(tokenizer), MIN_VOCAB_SIZE)


def saved_settings(places: Iterable[str | Path | None]) -> dict[str, Any] | None:
    """The settings of the run in one of the folders, which has a checkpoint to resume from."""
    for folder in (Path(place).expanduser() for place in places if place):
        if list_checkpoints(folder / "checkpoints"):
            saved = read_json(folder / "config.json")
            saved = saved or (newest_checkpoint(folder / "checkpoints") or {}).get("config")
            if saved:
                start = saved.get("start")
                more = start if isinstance(start, dict) else {}
                return {**checked_settings(saved, folder / "config.json"), "start": more}
    return None


def give_rows(configs: dict[str, Any], out: Path, resume: str, mirror: str | Path | None) -> None:
    """Give the model as many rows as the tokenizer needs; a run that is resumed keeps its own.

    ValueError: no such tokenizer; or the one in `out` is another, as where the file has changed.
    """
    model, data = configs["model"], configs["data"]
    saved, given = saved_settings([] if resume == "never" else [mirror, out]), None
    same = saved and saved["data"]["tokenizer"] == data.tokenizer
    if not same or _local(data.tokenizer).is_file():
        given = open_tokenizer(data.tokenizer)
    rows = saved["model"]["vocab_size"] if saved and same else num_rows(given, data)
    path = out / "tokenizer.json"
    kept = resume != "never" or same_data(out, data, rows)
    if given and kept and path.is_file() and not same_tokenizer(load_tokenizer(path), given):
        raise ValueError(
            f"tokenizer={data.tokenizer!r}: not the tokenizer of {out}, whose tokens another one "
            "made. Give that one again, or choose another --out"
        )
    if rows != model.vocab_size:
        log.info(f"vocab_size: {rows:,}, as the tokenizer has")
    configs["model"] = dataclasses.replace(model, vocab_size=rows)


def give_tokenizer(name: str, path: Path) -> None:
    """Write the tokenizer that `name` says into a run folder, where the data is made with it."""
    write_atomically(path, open_tokenizer(name).to_str(pretty=True).encode())


class Decoder:
    """The text of tokens, one after the other; U+FFFD stands for a broken character.

    The library's `DecodeStream`, which this one uses, fails at a byte that changes the text before
    it, as a fallback to bytes can.
    """

    def __init__(self, skip_special_tokens: bool) -> None:
        self.skip = skip_special_tokens
        self.stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, tokenizer: Any, token: int) -> str | None:
        """The text that one more token completes, if any."""
        try:
            return self.stream.step(tokenizer, token)
        except Exception:
            self.stream = DecodeStream(skip_special_tokens=self.skip)
            return "\ufffd" + (self.stream.step(tokenizer, token) or "")
