"""What all exports share: the registry of formats, the model to export, and writing files whole.

A new format is one file here and one line in `__init__.py`:

    @export_format("toy")
    def export_toy(source, out, *, checkpoint="last", overwrite=False, **credits):
        with replacing(Path(out), overwrite, folder=False) as beside:
            opened = open_source(source, checkpoint, credits)
            ...  # write `opened.model` to `beside`
        return result_of(Path(out), ternary_bytes, opened.model, "how to load it")

The command line, reading back and overwriting follow from what it registers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bitllm.export.hub import on_this_disk
from bitllm_core import (
    END_OF_TEXT,
    BitLM,
    MetricsLog,
    ModelConfig,
    end_of_text_id,
    load_masters,
    require,
)

EXPORT_VERSION = 1
"""of what packed files and Hugging Face folders hold"""
CREDITS = ("name", "author", "licence", "data_licence")
"""what a user may state about a model; each export notes it in what it writes"""
BASE = ("name", "sha256", "data", "data_licence")
"""what is told of the model that a training started from, each with base_ before it"""
NO_COUNTERPART = "only block=bitnet, linear=ternary and a tied embedding have a counterpart"
_DATA_LICENCES = {
    "pydocs": "PSF-2.0",
    "wikitext-2": "cc-by-sa-3.0",
    "wikitext-103": "cc-by-sa-3.0",
    "tinystories": "cdla-sharing-1.0",
    "fineweb-edu": "odc-by",
    "wikipedia-es": "cc-by-sa-3.0",
    "smol-smoltalk": "apache-2.0",
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote. It can stand for its path: `open(exported)`, `Path(exported)`."""

    path: Path
    size: int
    """bytes, all files together"""
    bits_per_weight: float
    """bits per ternary weight in the file, its share of the scale included"""
    usage: str
    """how to load it, client by client"""

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Source:
    """A model to export, and what is known about it."""

    model: BitLM
    tokenizer: Any
    facts: dict[str, Any]


@dataclass(frozen=True)
class Flag:
    """The command-line flag of an option that only one format has."""

    name: str
    """as typed, such as --embedding"""
    help: str
    choices: Sequence[str] | None = None
    metavar: str | None = None
    switch: bool = False
    """takes no value"""


@dataclass(frozen=True)
class Format:
    """One way to write a model."""

    name: str
    """what follows --to"""
    export: Callable[..., Exported]
    flags: dict[str, Flag] = field(default_factory=dict)
    """parameter of `export` -> its flag"""
    read: Callable[[Path], Source | None] = lambda path: None
    """reads back what `export` wrote; None where the path is something else"""
    is_export: Callable[[Path], bool] = lambda folder: False
    """whether a folder is an export of this format, which another export may replace"""


_Export = TypeVar("_Export", bound=Callable[..., Exported])
FORMATS: dict[str, Format] = {}
"""name -> format, filled by `export_format`"""


def export_format(name: str, **parts: Any) -> Callable[[_Export], _Export]:
    """Decorator: register a function as the export to format `name`.

    Args:
        parts: the other fields of `Format`.

    The function takes `source`, `out` and the keywords `checkpoint`, `overwrite`, one for each of
    its flags, and the `CREDITS`.
    """

    def register(export: _Export) -> _Export:
        FORMATS[name] = Format(name, export, **parts)
        return export

    return register


# The model


def read_exported(path: str | Path) -> tuple[BitLM, Any, dict[str, Any]]:
    """Read an export back.

    Args:
        path: a packed file or a Hugging Face folder that this program wrote, or hf:OWNER/NAME.

    Returns:
        the frozen model, its tokenizer, and what is known about it (data, steps, losses, ...).

    Raises:
        ValueError, FileNotFoundError: anything else. Files are only data: nothing in them is
            executed, and their sizes are checked before memory is taken.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    source = _read(on_this_disk(path))
    if source is None:
        raise ValueError(f"{path}: expected a packed file or a folder that this program exported")
    return source.model, source.tokenizer, source.facts


def _read(path: Path) -> Source | None:
    found = (source for form in FORMATS.values() if (source := form.read(path)) is not None)
    return next(found, None)


def open_source(
    path: str | Path, checkpoint: str | int, credits: dict[str, Any], frozen: bool = True
) -> Source:
    """The model to export. What the user states in `credits` replaces what is known.

    With `frozen` False, the model of a run or a seed script's file has its master weights.
    """
    for key in credits:
        require(key in CREDITS, "credits", key, f"one of {', '.join(CREDITS)}")
    path = on_this_disk(path)
    source = _read(path)
    if source is None:
        model, tokenizer, told = load_masters(path, checkpoint)
        model = model.freeze() if frozen else model
        source = Source(model, tokenizer, {"name": path.stem, **_facts(path, told)})
    given = {key: value for key, value in credits.items() if value is not None}
    return dataclasses.replace(source, facts={**source.facts, **given})


def _facts(path: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Data, steps, tokens and losses, from a checkpoint and the run folder around it."""
    saved, step = told.get("config") or {}, told.get("step")
    data = saved.get("data", {}).get("data")
    if data is not None and data not in _DATA_LICENCES and not data.startswith("hf:"):
        data = Path(data).name  # do not publish the folders of this machine
    facts = {"data": data, "data_licence": _DATA_LICENCES.get(data or "")}
    facts["prompt"] = saved.get("train", {}).get("sample_prompt")
    if isinstance(start := saved.get("start"), dict):  # what it was tuned from
        facts |= {f"base_{key}": start.get(key) for key in BASE}
    if step is None:
        return facts
    run = path if path.is_dir() else path.parent.parent
    lines = [x for x in MetricsLog.read(run / "metrics.jsonl") if x["step"] <= step]
    for name in ("loss", "val_loss", "val_perplexity"):
        values = [line[name] for line in lines if name in line]
        facts[name] = values[-1] if values else told.get(name)
    batch = saved.get("train", {}).get("batch_tokens")
    return {**facts, "steps": step, "tokens": batch and batch * step}


def export_limits(config: ModelConfig) -> list[str]:
    """Why an export of such a model would not run everywhere; empty where it would."""
    found = []
    if config.block != "bitnet" or not config.tie_word_embeddings or config.linear != "ternary":
        found.append(NO_COUNTERPART)
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % 256:
            more = "(of 64 with --gguf-type Q2_0)"
            found.append(f"llama.cpp's ternary blocks need {name} to be a multiple of 256 {more}")
    if config.head_dim not in (64, 128):
        found.append(f"head width {config.head_dim} is neither 64 nor 128")
    return found


def check_limits(config: ModelConfig, to: str, limits: Sequence[str]) -> None:
    """ValueError with all reasons why a format cannot hold the model, where there are any."""
    if limits:
        dense = config.linear == "dense"
        raise ValueError(
            f"this model cannot be exported to {to}: {'; '.join(limits)}. It has "
            f"block={config.block}, linear={config.linear}, "
            f"tie_word_embeddings={config.tie_word_embeddings}. "
            + ("It has no ternary form" if dense else "Export it as packed")
        )


def end_id(tokenizer: Any) -> int:
    """The id of <|endoftext|>; ValueError where the tokenizer has none."""
    end = end_of_text_id(tokenizer)
    if end is None:
        raise ValueError(
            f"the tokenizer has no {END_OF_TEXT}, which clients need; export as packed"
        )
    return end


# Files


@contextlib.contextmanager
def replacing(out: Path, overwrite: bool, folder: bool) -> Iterator[Path]:
    """A path beside `out` to write to; it is renamed once all of it is on the disk.

    An existing target is replaced only where `overwrite` is set, and only by its own kind: a file
    by a file, and a folder by a folder if it is empty or itself an export.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise ValueError(f"{out}: exists already; choose another path, or give --overwrite")
        if folder != out.is_dir() or (folder and not _may_replace(out)):
            kind = "an exported folder" if folder else "a file"
            raise ValueError(f"{out}: not {kind}, so it is not overwritten; choose another path")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (out.with_name(f"{out.name}.{word}") for word in ("exporting", "replaced"))
    _remove(beside)  # left by an export that was killed
    if folder:
        beside.mkdir()
    try:
        yield beside
        for file in beside.iterdir() if folder else [beside]:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        if folder and out.exists():
            _remove(old)
            out.replace(old)  # no system renames over a folder that is not empty
        beside.replace(out)
        _remove(old if folder else beside)
    finally:
        _remove(beside)


def _may_replace(folder: Path) -> bool:
    return not any(folder.iterdir()) or any(form.is_export(folder) for form in FORMATS.values())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def result_of(path: Path, ternary_bytes: int, model: BitLM, usage: str) -> Exported:
    """The result of an export whose ternary weights take `ternary_bytes` of what is at `path`."""
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return Exported(path, size, 8 * ternary_bytes / num_ternary_weights(model), usage)


def num_ternary_weights(model: BitLM) -> int:
    return sum(linear.shape.numel() for linear in model.bit_linears().values())


def generate_usage(path: str) -> str:
    """How this program itself loads an export."""
    return (
        f'  bitllm         bitllm generate --model "{path}" --prompt "..."\n'
        "                 (in a checkout: python bitllm_core.py generate ...)"
    )
