"""The smallest file: five trits a byte, with tokenizer and settings inside."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitllm.export.common import (
    _EXPORT_VERSION,
    Exported,
    _check_exportable,
    _checked,
    _fill,
    _open_source,
    _replacing,
    _result,
    _skeleton,
    _Source,
    _write_safetensors,
)
from bitllm_core import (
    BitLinear,
    BitLM,
    TensorEntry,
    check_tokenizer,
    first_line,
    require,
    tokenizer_from,
)

_EMBEDDINGS = {"float32": "F32", "float16": "F16", "int8": "I8"}
_PACKED_FORMAT = "bitllm-packed"


def _pack5(trits: Tensor) -> Tensor:
    """Five trits a byte, row after row: 1.6 bits each, where log2 3 = 1.585 is the limit."""
    digits = F.pad((trits + 1).flatten().to(torch.uint8), (0, -trits.numel() % 5)).view(-1, 5)
    return (digits * torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack5(packed: Tensor, shape: torch.Size) -> Tensor:
    digits = np.arange(256)[:, None] // np.array([1, 3, 9, 27, 81]) % 3 - 1
    table = torch.from_numpy(digits.astype(np.int8))  # (256, 5)
    return table[packed.int()].flatten()[: shape.numel()].view(shape)


def _packed_entries(model: BitLM, embedding: str) -> list[TensorEntry]:
    """Our smallest form: trits five a byte, the embedding in `embedding`, the rest in float32."""
    entries = []
    for name, linear in model.bit_linears().items():
        size = -(-linear.shape.numel() // 5)
        entries.append(
            TensorEntry(f"{name}.trits", "U8", (size,), partial(lambda x: _pack5(x.trits), linear))
        )
        scale = linear.weight_scale
        entries.append(TensorEntry(f"{name}.weight_scale", "F32", (), lambda s=scale: s))
    for name, value in model.named_parameters():
        shape = tuple(value.shape)
        dtype = _EMBEDDINGS[embedding] if "embed" in name else "F32"
        if dtype == "I8":
            scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            rows = partial(lambda v, s: (v / s).round().to(torch.int8), value, scale)
            entries.append(TensorEntry(name, dtype, shape, rows))
            entries.append(TensorEntry(f"{name}_scale", "F32", (shape[0], 1), lambda s=scale: s))
        else:
            entries.append(TensorEntry(name, dtype, shape, lambda v=value: v))
    return entries


def _packed_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of one of our packed files; None for any other file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file ({first_line(error)})") from error
    return metadata if metadata.get("format") == _PACKED_FORMAT else None


def _read_packed(path: Path, metadata: dict[str, str]) -> _Source:
    """Our packed file as a frozen model; sizes are compared before memory is taken."""
    from safetensors import safe_open

    version = metadata.get("format_version")
    if version != str(_EXPORT_VERSION):
        raise ValueError(f"{path}: format {version}; this program reads {_EXPORT_VERSION}")
    try:
        settings, facts = json.loads(metadata["config"]), json.loads(metadata["facts"])
        tokenizer = tokenizer_from(metadata["tokenizer"], path)
        embedding = metadata["embedding"]
        require(embedding in _EMBEDDINGS, "embedding", embedding, ", ".join(_EMBEDDINGS))
    except Exception as error:
        raise ValueError(f"{path}: its metadata is not that of a model ({error})") from error
    with safe_open(path, framework="pt") as file:
        skeleton = _skeleton(settings, len(file.keys()), path)
        check_tokenizer(tokenizer, skeleton.config.vocab_size, path)
        _checked(file, _packed_entries(skeleton, embedding), path)

        def trits_of(name: str, linear: BitLinear) -> tuple[Tensor, Tensor]:
            packed = file.get_tensor(f"{name}.trits")
            if packed.max() > 242:
                raise ValueError(f"{path}: {name}.trits holds bytes that are not five trits")
            return _unpack5(packed, linear.shape), file.get_tensor(f"{name}.weight_scale")

        def read(name: str) -> Tensor:
            value = file.get_tensor(name).float()
            scaled = embedding == "int8" and "embed" in name
            return value * file.get_tensor(f"{name}_scale") if scaled else value

        return _Source(_fill(skeleton, trits_of, read), tokenizer, facts)


def export_packed(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    embedding: str = "float16",
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write this program's smallest file: five trits a byte, tokenizer and settings inside.

    Args:
        source: whatever `load_model` reads.
        out: the file, *.safetensors; it appears whole or not at all.
        checkpoint: of a run folder: "last", "best" or a step.
        embedding: float16, int8 (a scale a row; smallest) or float32 (the same logits bit for bit).
        overwrite: replace an existing file.
        credits: name, author, licence, data_licence (of the text): noted in what is written.

    Raises:
        ValueError, FileNotFoundError: no such model, a dense one, or `out` exists.
    """
    out = Path(out)
    require(embedding in _EMBEDDINGS, "embedding", embedding, f"one of {', '.join(_EMBEDDINGS)}")
    require(out.suffix == ".safetensors", "out", str(out), "a name that ends in .safetensors")
    with _replacing(out, overwrite, folder=False) as beside:
        opened = _open_source(Path(source), checkpoint, credits)
        model = opened.model
        if model.config.linear == "dense":
            _check_exportable(model.config, "packed")
        metadata = {
            "format": _PACKED_FORMAT,
            "format_version": str(_EXPORT_VERSION),
            "embedding": embedding,
            "config": json.dumps(asdict(model.config)),
            "tokenizer": opened.tokenizer.to_str(),
            "facts": json.dumps(opened.facts),
        }
        entries = _packed_entries(model, embedding)
        _write_safetensors(beside, entries, metadata)
    ternary = sum(e.size for e in entries if "embed" not in e.name and "norm" not in e.name)
    usage = f'  this program   python bitllm_core.py generate --model {out} --prompt "..."'
    return _result(out, ternary, model, usage)
