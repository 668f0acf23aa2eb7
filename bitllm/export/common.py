"""What all exports share: reading the model, its facts, and replacing files whole."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bitllm_core import (
    END_OF_TEXT,
    NO_COUNTERPART,
    BitLinear,
    BitLM,
    MetricsLog,
    ModelConfig,
    TensorEntry,
    config_from,
    end_of_text_id,
    load_run,
    read_json,
    require,
    safetensors_blocks,
)

_EXPORT_VERSION = 1
CREDITS = ("name", "author", "licence", "data_licence")
_DATA_LICENCES = {
    "pydocs": "PSF-2.0",
    "wikitext-2": "cc-by-sa-3.0",
    "wikitext-103": "cc-by-sa-3.0",
    "tinystories": "cdla-sharing-1.0",
    "fineweb-edu": "odc-by",
    "wikipedia-es": "cc-by-sa-3.0",
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote. It can stand for its path: `open(exported)`, `Path(exported)`."""

    path: Path
    size: int
    """bytes, all files together"""
    bits_per_weight: float
    """bits that a ternary weight takes in the file, its share of the scale included"""
    usage: str
    """how to load it, client by client"""

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class _Source:
    """A model to export and what is known of it."""

    model: BitLM
    tokenizer: Any
    facts: dict[str, Any]


def _write_safetensors(
    path: Path, entries: Sequence[TensorEntry], metadata: dict[str, str]
) -> None:
    with path.open("wb") as file:
        for block in safetensors_blocks(entries, metadata):
            file.write(block)


def _skeleton(settings: dict[str, Any], tensors: int, path: Path) -> BitLM:
    """A frozen model without memory behind it, to compare a stranger's file with."""
    names = {f.name for f in fields(ModelConfig)}
    known = {key: value for key, value in settings.items() if key in names}
    config = config_from(ModelConfig, known, path)
    if config.num_hidden_layers > tensors:
        raise ValueError(f"{path}: {tensors} tensors in it, too few for num_hidden_layers layers")
    with torch.device("meta"):
        return BitLM(config, seed=None).freeze()


def _checked(file: Any, expected: list[TensorEntry], path: Path) -> None:
    """ValueError where the tensors of a safetensors file are not exactly those expected."""
    names = {entry.name for entry in expected}
    for name in sorted(names ^ set(file.keys())):
        raise ValueError(f"{path}: tensor {name} is {'missing' if name in names else 'unknown'}")
    for entry in expected:
        part = file.get_slice(entry.name)
        found = (part.get_dtype(), tuple(part.get_shape()))
        if found != (entry.dtype, entry.shape):
            raise ValueError(
                f"{path}: tensor {entry.name} is {found[0]} {found[1]}, "
                f"expected {entry.dtype} {entry.shape}"
            )


@torch.no_grad()
def _fill(skeleton: BitLM, trits_of: Callable[[str, BitLinear], Any], read: Any) -> BitLM:
    """A frozen model, its trits and scales from `trits_of(name, layer)`, the rest from `read`."""
    model = BitLM(skeleton.config, seed=None).freeze()
    for name, linear in model.bit_linears().items():
        trits, scale = trits_of(name, linear)
        if trits.abs().max() > 1 or not scale.isfinite().all():
            raise ValueError(f"tensor {name} is not ternary, or its scale not finite")
        linear.set_ternary(trits, scale.float().view(()))
    for name, value in model.named_parameters():
        value.copy_(read(name))
    return model


def _read_any(path: Path, checkpoint: str | int) -> _Source:
    """Whatever `load_model` reads, with what is known of it."""
    from bitllm.export.huggingface import _read_hf
    from bitllm.export.packed import _packed_metadata, _read_packed

    if path.suffix == ".gguf":
        raise ValueError(
            f"{path}: a GGUF file runs in llama.cpp; give the run folder, a packed "
            "file or a Hugging Face folder here"
        )
    metadata = _packed_metadata(path)
    if metadata is not None:
        return _read_packed(path, metadata)
    settings = read_json(path / "config.json") or {}
    if "model_type" in settings:
        return _read_hf(path, settings)
    model, tokenizer, told = load_run(path, checkpoint)
    return _Source(model, tokenizer, {"name": path.stem, **_facts(path, told)})


def _open_source(path: Path, checkpoint: str | int, credits: dict[str, Any]) -> _Source:
    """A model to export; the user's `credits` go before what is known of it."""
    for key in credits:
        require(key in CREDITS, "credits", key, f"one of {', '.join(CREDITS)}")
    source = _read_any(path, checkpoint)
    known = source.facts if isinstance(source.facts, dict) else {}  # a stranger's may be anything
    given = {key: value for key, value in credits.items() if value is not None}
    return dataclasses.replace(source, facts={**known, **given})


def _facts(run: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint and the run folder around it tell: data, steps, tokens, losses."""
    saved, step = told.get("config") or {}, told.get("step")
    data = saved.get("data", {}).get("data")
    if data is not None and data not in _DATA_LICENCES and not data.startswith("hf:"):
        data = Path(data).name  # where it lay on this machine is nobody's business
    facts = {"data": data, "data_licence": _DATA_LICENCES.get(data or "")}
    facts["prompt"] = saved.get("train", {}).get("sample_prompt")
    if step is None:
        return facts
    lines = MetricsLog.read(run / "metrics.jsonl") if run.is_dir() else told["metrics"] or []
    lines = [line for line in lines if line["step"] <= step]
    for name in ("loss", "val_loss", "val_perplexity"):
        facts[name] = next((line[name] for line in reversed(lines) if name in line), None)
    batch = saved.get("train", {}).get("batch_tokens")
    return {**facts, "steps": step, "tokens": batch and batch * step}


def _check_exportable(config: ModelConfig, to: str) -> None:
    """ValueError with all reasons why no client of this format could hold the model."""
    limits = config.export_limits
    if to in ("hf", "F16"):  # without ternary blocks, any width will do
        limits = [limit for limit in limits if limit == NO_COUNTERPART]
    kv = config.num_kv_heads * config.head_dim
    if to == "hf" and any(n % 4 for n in (config.hidden_size, config.intermediate_size, kv)):
        limits = [*limits, "transformers packs four rows a byte: sizes must be multiples of 4"]
    if limits:
        raise ValueError(
            f"this model cannot be exported to {to}: {'; '.join(limits)}. It has "
            f"block={config.block}, linear={config.linear}, "
            f"tie_word_embeddings={config.tie_word_embeddings}. "
            + ("It has no ternary form" if config.linear == "dense" else "Export it as packed")
        )


@contextlib.contextmanager
def _replacing(out: Path, overwrite: bool, folder: bool) -> Iterator[Path]:
    """A path beside `out` to write to; it gets its name when all is written and on the disk.

    An existing target is only replaced when asked to, and only by its own kind: a file by a file,
    a folder by a folder if it is empty or itself an export.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise ValueError(f"{out}: exists already; choose another path, or ask to overwrite it")
        if folder != out.is_dir() or (folder and not _may_replace(out)):
            kind = "an exported folder" if folder else "a file"
            raise ValueError(f"{out}: not {kind}, so it is not overwritten; choose another path")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (out.with_name(f"{out.name}.{word}") for word in ("exporting", "replaced"))
    _remove(beside)  # of an export that was killed
    if folder:
        beside.mkdir()
    try:
        yield beside
        for file in beside.iterdir() if folder else [beside]:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        if folder and out.exists():
            _remove(old)
            out.replace(old)  # no system replaces a folder that is not empty
        beside.replace(out)
        _remove(old if folder else beside)
    finally:
        _remove(beside)


def _may_replace(folder: Path) -> bool:
    from bitllm.export.webpage import _PAGE_FILES

    names = {path.name for path in folder.iterdir()}
    ours = "bitllm" in (read_json(folder / "config.json") or {})
    return not names or ours or names == _PAGE_FILES


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _result(path: Path, ternary_bytes: int, model: BitLM, usage: str) -> Exported:
    files = path.iterdir() if path.is_dir() else [path]
    weights = sum(linear.shape.numel() for linear in model.bit_linears().values())
    size = sum(file.stat().st_size for file in files)
    return Exported(path, size, 8 * ternary_bytes / weights, usage)


def _end_id(tokenizer: Any) -> int:
    end = end_of_text_id(tokenizer)
    if end is None:
        raise ValueError(
            f"the tokenizer has no {END_OF_TEXT}, which clients need; export as packed"
        )
    return end
