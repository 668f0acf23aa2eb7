"""Scores that people know: multiple choice by log-likelihood, as lm-evaluation-harness computes it.

A row is {"context": text, "choices": [text, ...], "answer": index of the right one}, with "subset"
where scores of parts are wanted too. Rows of BLiMP and HellaSwag are known by their columns.

Source: lm-evaluation-harness 0.4.13, `TemplateLM.loglikelihood` for what becomes tokens and
`ConfigurableTask.process_results` for acc, acc_norm and acc_bytes; `tasks/hellaswag/utils.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from bitllm.files import json_rows, parquet_rows, unpacked
from bitllm_core import (
    CHUNK_BYTES,
    BitLM,
    Device,
    choose_device,
    encode,
    end_of_text_id,
    library,
    log,
    valid_unicode,
)

KNOWN_TASKS = {
    "blimp": "hf:nyu-mll/blimp#train",
    "hellaswag": "hf:Rowan/hellaswag#validation",
}
DELIMITER = " "  # between context and choice
BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 16384  # at once; on a CPU more are slower
_SHAPE = '{"context": text, "choices": [text, text, ...], "answer": index of the right one}'


@dataclass(frozen=True)
class Row:
    """A question with its possible answers."""

    context: str
    """what stands before each choice; may be empty"""
    choices: Sequence[str]
    answer: int
    """index of the right choice"""
    subset: str
    """part of the task that is also reported by itself; "" for none"""
    place: str
    """where the row comes from, for messages"""


# Reading


def read_tasks(source: str | Path, encoding: str | None = None) -> list[Row]:
    """The rows of a task.

    Args:
        source: a .jsonl or .parquet file, also packed as .gz or .zst, or a folder of them; a name
            in `KNOWN_TASKS`; or hf:OWNER/NAME[:CONFIG][#SPLIT] of the Hugging Face hub, where all
            configurations and the split "validation" are the default.
        encoding: of .jsonl files; UTF-8 by default.

    Raises:
        FileNotFoundError, ValueError: no such source, or a row that is not as it should be, named.
        ConnectionError: the hub has no such set, or cannot be reached.
    """
    path = Path(source).expanduser()
    local = str(source) not in KNOWN_TASKS and path.exists()
    found = _file_rows(path, encoding) if local else _hub_rows(str(source))
    rows = [_row_of(row, part, place) for row, part, place in found]
    if not rows:
        raise ValueError(f"tasks={str(source)!r}: no rows in it")
    return rows


def _file_rows(path: Path, encoding: str | None) -> Iterator[tuple[dict[str, Any], str, str]]:
    kinds = (".jsonl", ".parquet")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    known = [file for file in files if unpacked(file).suffix.lower() in kinds]
    if not known:
        raise ValueError(f"tasks={str(path)!r}: expected a .jsonl or .parquet file, or such in it")
    for file in known:
        jsonl = unpacked(file).suffix.lower() == ".jsonl"
        rows = json_rows(file, encoding) if jsonl else parquet_rows(file, "answer")
        for number, row in enumerate(rows, 1):
            yield row, "", f"{file}, row {number:,}"


def _hub_rows(source: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    pattern = r"hf:([^/:#]+/[^/:#]+)(?::([^#]+))?(?:#(.+))?"
    found = re.fullmatch(pattern, KNOWN_TASKS.get(source, source))
    if not found:
        raise FileNotFoundError(
            f"tasks={source!r}: no such file or folder, and no known task; expected a .jsonl or "
            f".parquet file, hf:OWNER/NAME[:CONFIG][#SPLIT], or one of {', '.join(KNOWN_TASKS)}"
        )
    name, config, split = found.groups()
    datasets = library("datasets", f"tasks={name!r} from the Hugging Face hub")
    try:
        configs = [config] if config else datasets.get_dataset_config_names(name)
        sets = {c: datasets.load_dataset(name, c, split=split or "validation") for c in configs}
    except Exception as error:  # each layer of the hub's clients has kinds of its own
        raise ConnectionError(
            f"the tasks {name} could not be loaded from the Hugging Face hub "
            f"({' '.join(str(error).split())[:200]}). Without a connection, give a local file "
            "(--tasks FILE.jsonl)"
        ) from error
    for config, rows in sets.items():
        part = config if len(sets) > 1 else ""
        for number, row in enumerate(rows.to_list(), 1):
            yield row, part, f"{name}{part and ':'}{part}, row {number:,}"


def _blimp(row: dict[str, Any]) -> dict[str, Any]:
    choices = [row["sentence_good"], row["sentence_bad"]]
    return {"context": "", "choices": choices, "answer": 0, "subset": row.get("UID", "")}


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    choices, label = [_plain(ending) for ending in row["endings"]], str(row["label"])
    answer = int(label) if label.isdecimal() else label  # the test split has none
    return {"context": _plain(context), "choices": choices, "answer": answer}


def _plain(text: str) -> str:
    """Without the marks that HellaSwag's texts from WikiHow have."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


_SHAPES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "sentence_good": _blimp,
    "activity_label": _hellaswag,
}
"""column by which a shape is known -> how its rows become ours"""


def _row_of(row: dict[str, Any], part: str, place: str) -> Row:
    """A row as it was read, checked; ValueError says where and what is wrong."""
    convert = next((shape for column, shape in _SHAPES.items() if column in row), None)
    try:
        row = convert(row) if convert else row
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{place}: a column is missing or not text ({error})") from error

    def check(ok: bool, problem: str) -> None:
        if not ok:
            raise ValueError(f"{place}: {problem}; expected {_SHAPE}")

    for key in ("context", "choices", "answer"):
        check(key in row, f"no {key!r} among its columns ({', '.join(map(str, row)):.100})")
    context, choices, answer = row["context"], row["choices"], row["answer"]
    check(isinstance(context, str), f"context is no text but {context!r:.80}")
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    check(texts and len(choices) >= 2, f"choices are not two texts or more but {choices!r:.80}")
    check(all(choice.strip() for choice in choices), f"an empty choice in {choices!r:.80}")
    index = isinstance(answer, int) and not isinstance(answer, bool)
    check(index and 0 <= answer < len(choices), f"answer={answer!r} is not 0 to {len(choices) - 1}")
    subset = str(row.get("subset") or part)
    return Row(valid_unicode(context), [*map(valid_unicode, choices)], answer, subset, place)


# Scoring

Tokens = tuple[list[int], int]  # of context and choice, and how many at the end are the choice's


def _sequences(tokenizer: Any, row: Row, context_length: int) -> Iterator[Tokens]:
    """The tokens of each choice behind its context, the first ones left out where they are many.

    White space at the end of the context belongs to the choice, whose tokens are those of the whole
    text behind the context's own. Where there is no context, <|endoftext|> stands before.
    """
    context = row.context.rstrip()
    between = row.context[len(context) :] + DELIMITER
    before = encode(tokenizer, context)
    for number, choice in enumerate(row.choices):
        tokens = encode(tokenizer, context + between + choice)[len(before) :]
        if not 1 <= len(tokens) <= context_length:
            why = f"choice {number} has {len(tokens)} tokens; expected 1 to {context_length}"
            raise ValueError(f"{row.place}: {why}, the model's context")
        yield (before or [end_of_text_id(tokenizer) or 0]) + tokens, len(tokens)


def score_choices(
    model: BitLM, tokenizer: Any, rows: Sequence[Row], device: Device | None = None
) -> list[list[float]]:
    """Log-likelihood of each choice of each row, in nats: the sum over its tokens.

    Raises:
        ValueError: a choice that is longer than the model's context, or has no tokens.
        FloatingPointError: the model computes no numbers, as one whose training diverged.
    """
    device, limit = device or choose_device(), model.config.max_position_embeddings
    sequences = [pair for row in rows for pair in _sequences(tokenizer, row, limit)]
    if cut := sum(len(tokens) > limit + 1 for tokens, _ in sequences):
        log.warning(
            f"{cut:,} of {len(sequences):,} choices with their context are longer than the model's "
            f"{limit} tokens: their contexts are cut from the left"
        )
    sequences = [(tokens[-limit - 1 :], count) for tokens, count in sequences]
    found = iter(_log_likelihoods(model.to(device.device), sequences, device))
    return [[next(found) for _ in row.choices] for row in rows]


@torch.no_grad()
def _log_likelihoods(model: BitLM, sequences: Sequence[Tokens], device: Device) -> Sequence[float]:
    """Of the last tokens of each sequence, in batches of about one length, the longest first."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    found, start = np.zeros(len(sequences)), 0
    size = BATCH_TOKENS if device.device.type == "cpu" else GPU_BATCH_TOKENS
    bar = {"desc": "scoring", "unit": "choice", "delay": 5, "leave": False}
    with (
        model.hold_weights(device.dtype),
        device.autocast(),
        tqdm(total=len(order), **bar) as shown,
    ):
        while start < len(order):
            count = max(1, size // (len(sequences[order[start]][0]) - 1))
            batch = order[start : start + count]
            found[batch] = _score(model, [sequences[i] for i in batch], device)
            start += len(batch)
            shown.update(len(batch))
    if not np.isfinite(found).all():
        raise FloatingPointError("the model's log-likelihoods are not numbers; did it diverge?")
    return found.tolist()


def _score(model: BitLM, batch: Sequence[Tokens], device: Device) -> np.ndarray:
    """The log-likelihoods of a batch whose first sequence is the longest, (B,)."""
    ids = torch.zeros(len(batch), len(batch[0][0]) - 1, dtype=torch.int64)  # padded behind
    rows, places, targets = [], [], []
    for i, (tokens, count) in enumerate(batch):
        last = len(tokens) - 1
        ids[i, :last] = torch.tensor(tokens[:-1])
        rows += [i] * count
        places += range(last - count, last)
        targets += tokens[-count:]
    x = ids.to(device.device)
    at = torch.arange(x.shape[1], device=device.device)
    hidden = model.blocks(model.embed(x, at), at)[rows, places]  # (N, D)
    target = torch.tensor(targets, device=device.device)[:, None]
    size = max(1, CHUNK_BYTES[x.device.type] // (4 * model.config.vocab_size))
    parts = [
        model.head(h).float().log_softmax(-1).gather(1, t)[:, 0].cpu()
        for h, t in zip(hidden.split(size), target.split(size), strict=True)
    ]
    return np.bincount(rows, torch.cat(parts).double().numpy(), len(batch))


# Reporting


def evaluate_tasks(
    model: BitLM,
    tokenizer: Any,
    source: str | Path,
    *,
    encoding: str | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """How often the model prefers the right one of several choices; see `read_tasks` for `source`.

    Returns:
        rows: their number; acc: share of rows whose right choice has the largest log-likelihood;
        acc_norm and acc_bytes: the largest per character and per byte of UTF-8 of the choice; each
        with its standard error, `acc_stderr` and so on, None of a single row; chance: the share
        that guesses would get. subsets: the same of each, where the task has subsets.

    Raises what `read_tasks` and `score_choices` do.
    """
    rows = read_tasks(source, encoding)
    scores = score_choices(model, tokenizer, rows, device)
    subsets: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        subsets.setdefault(row.subset, []).append(i)
    found = summary(rows, scores)
    if subsets.keys() != {""}:
        found["subsets"] = {
            name: summary([rows[i] for i in part], [scores[i] for i in part])
            for name, part in subsets.items()
        }
    return found


def summary(rows: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What `evaluate_tasks` returns, of the log-likelihoods of each row's choices.

    Of equal ones the first counts, as in lm-evaluation-harness.
    """
    lengths = {
        "acc": lambda choice: 1,
        "acc_norm": len,
        "acc_bytes": lambda choice: len(choice.encode()),
    }
    found: dict[str, Any] = {"rows": len(rows)}
    for name, length in lengths.items():
        right = 0
        for row, values in zip(rows, scores, strict=True):
            sizes = [length(choice) for choice in row.choices]
            right += int(np.argmax(np.divide(values, sizes))) == row.answer
        share = right / len(rows)
        found[name] = share
        error = math.sqrt(share * (1 - share) / (len(rows) - 1)) if len(rows) > 1 else None
        found[f"{name}_stderr"] = error
    return found | {"chance": sum(1 / len(row.choices) for row in rows) / len(rows)}
