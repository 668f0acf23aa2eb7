"""The smallest file: five trits per byte, with tokenizer and settings inside."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitllm.export.common import (
    EXPORT_VERSION,
    Exported,
    Flag,
    Source,
    check_limits,
    export_format,
    generate_usage,
    open_source,
    replacing,
    result_of,
)
from bitllm.export.tensors import (
    check_tensors,
    fill_model,
    meta_model,
    open_tensors,
    ternary_bytes,
    write_tensors,
)
from bitllm_core import BitLinear, BitLM, ModelConfig, check_tokenizer, require, tokenizer_from

_EMBEDDINGS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_FORMAT = "bitllm-packed"
_POWERS = (1, 3, 9, 27, 81)


def pack5(trits: Tensor) -> Tensor:
    """Trits, any shape, five per byte, row after row: 1.6 bits each, where log2 3 = 1.585."""
    digits = F.pad((trits + 1).flatten().to(torch.uint8), (0, -trits.numel() % 5)).view(-1, 5)
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=trits.device)
    return (digits * powers).sum(1, dtype=torch.uint8)


def unpack5(packed: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of `pack5`: int8."""
    digits = np.arange(256)[:, None] // np.array(_POWERS) % 3 - 1
    table = torch.from_numpy(digits.astype(np.int8))  # (256, 5)
    return table[packed.int()].flatten()[: shape.numel()].view(shape)


def packed_tensors(model: BitLM, embedding: str) -> dict[str, Tensor]:
    """Name -> tensor: packed trits, the embedding in `embedding`, the rest in float32."""
    tensors = {}
    for name, linear in model.bit_linears().items():
        tensors[f"{name}.trits"] = pack5(linear.trits)
        tensors[f"{name}.weight_scale"] = linear.weight_scale
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        dtype = _EMBEDDINGS[embedding] if "embed" in name else torch.float32
        if dtype == torch.int8:
            scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            tensors[f"{name}_scale"] = scale
            value = (value / scale).round()
        tensors[name] = value.to(dtype)
    return tensors


def _check_ternary(config: ModelConfig) -> None:
    if config.linear == "dense":
        check_limits(config, "packed", ["its weights are not ternary"])


def _read(path: Path) -> Source | None:
    """One of our packed files as a frozen model; sizes are compared before memory is taken."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            return None
        settings, tokenizer, embedding, facts = _read_metadata(metadata, path)
        skeleton = meta_model(settings, len(file.keys()), path)
        _check_ternary(skeleton.config)
        check_tokenizer(tokenizer, skeleton.config.vocab_size, path)
        check_tensors(file, packed_tensors(skeleton, embedding), path)

        def read_ternary(name: str, linear: BitLinear) -> tuple[Tensor, Tensor]:
            packed = file.get_tensor(f"{name}.trits")
            if packed.max() > 242:
                raise ValueError(f"{path}: {name}.trits holds bytes that are not five trits")
            return unpack5(packed, linear.shape), file.get_tensor(f"{name}.weight_scale")

        def read(name: str) -> Tensor:
            value = file.get_tensor(name).float()
            scaled = embedding == "int8" and "embed" in name
            return value * file.get_tensor(f"{name}_scale") if scaled else value

        return Source(fill_model(skeleton.config, read_ternary, read), tokenizer, facts)


def _read_metadata(metadata: dict[str, str], path: Path) -> tuple[Any, Any, str, dict[str, Any]]:
    """Settings, tokenizer, type of the embedding, and facts."""
    version = metadata.get("format_version")
    if version != str(EXPORT_VERSION):
        raise ValueError(f"{path}: format {version}; this program reads {EXPORT_VERSION}")
    try:
        settings, facts = json.loads(metadata["config"]), json.loads(metadata["facts"])
        tokenizer, embedding = tokenizer_from(metadata["tokenizer"], path), metadata["embedding"]
        require(embedding in _EMBEDDINGS, "embedding", embedding, ", ".join(_EMBEDDINGS))
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is not that of a model ({error})") from error
    return settings, tokenizer, embedding, facts if isinstance(facts, dict) else {}


_EMBEDDING_FLAG = Flag("--embedding", "float16 (default), int8 or float32", tuple(_EMBEDDINGS))


@export_format("packed", flags={"embedding": _EMBEDDING_FLAG}, read=_read)
def export_packed(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    embedding: str = "float16",
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write this program's smallest file: five trits per byte, tokenizer and settings inside.

    Args:
        source: whatever `load_model` reads.
        out: the file, *.safetensors; it appears whole or not at all.
        checkpoint: of a run folder: "last", "best" or a step.
        embedding: float16, int8 (one scale per row; smallest) or float32 (the same logits, bit for
            bit).
        overwrite: replace an existing file.
        credits: name, author, licence, data_licence (of the text): noted in what is written.

    Raises:
        ValueError, FileNotFoundError: no such model, a dense one, or `out` exists.
    """
    out = Path(out)
    require(embedding in _EMBEDDINGS, "embedding", embedding, f"one of {', '.join(_EMBEDDINGS)}")
    require(out.suffix == ".safetensors", "out", str(out), "a name that ends in .safetensors")
    with replacing(out, overwrite, folder=False) as beside:
        opened = open_source(source, checkpoint, credits)
        model = opened.model
        _check_ternary(model.config)
        metadata = {
            "format": _FORMAT,
            "format_version": str(EXPORT_VERSION),
            "embedding": embedding,
            "config": json.dumps(asdict(model.config)),
            "tokenizer": opened.tokenizer.to_str(),
            "facts": json.dumps(opened.facts),
        }
        tensors = packed_tensors(model, embedding)
        write_tensors(beside, tensors, metadata)
    return result_of(out, ternary_bytes(model, tensors), model, generate_usage(out.as_posix()))
