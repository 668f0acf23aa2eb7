"""A folder for transformers' AutoModelForCausalLM and AutoTokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitllm.export.common import (
    _EXPORT_VERSION,
    Exported,
    _check_exportable,
    _checked,
    _end_id,
    _fill,
    _open_source,
    _replacing,
    _result,
    _skeleton,
    _Source,
    _write_safetensors,
)
from bitllm_core import (
    END_OF_TEXT,
    KNOWN_DATA,
    BitLinear,
    BitLM,
    SamplingConfig,
    TensorEntry,
    first_line,
    load_tokenizer,
)

_QUANTIZATION = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}


def _pack4(trits: Tensor) -> Tensor:
    """Four trits a byte, as transformers reads them: rows r, r + O/4, ... low bits first."""
    quarters = (trits + 1).to(torch.uint8).view(4, -1, trits.shape[1])  # (4, O/4, I)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def _unpack4(packed: Tensor) -> Tensor:
    quarters = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])  # (4, O/4, I)
    return quarters.view(-1, packed.shape[1]).to(torch.int8) - 1


def _hf_entries(model: BitLM, dense: bool) -> list[TensorEntry]:
    """Hugging Face's tensors, all floats in float32: transformers refuses a mixture."""
    entries = []
    for name, linear in model.bit_linears().items():
        rows, columns = linear.shape
        if dense:
            weight = linear.effective_weight
            entries.append(TensorEntry(f"{name}.weight", "F32", (rows, columns), weight))
            continue
        packed = partial(lambda layer: _pack4(layer.trits), linear)
        entries.append(TensorEntry(f"{name}.weight", "U8", (rows // 4, columns), packed))
        scale = linear.weight_scale.view(1)  # it multiplies: autobitlinear, not bitlinear
        entries.append(TensorEntry(f"{name}.weight_scale", "F32", (1,), lambda s=scale: s))
    for name, value in model.named_parameters():
        entries.append(TensorEntry(name, "F32", tuple(value.shape), lambda v=value: v))
    return entries


def _read_hf(path: Path, settings: dict[str, Any]) -> _Source:
    """A Hugging Face folder that `export_hf` wrote, packed or dense, as a frozen model."""
    from safetensors import safe_open

    dense = "quantization_config" not in settings
    wanted = {"model_type": "bitnet", "hidden_act": "silu", "tie_word_embeddings": True}
    if not dense:
        wanted["quantization_config"] = _QUANTIZATION
    for key, value in wanted.items():
        if settings.get(key) != value:
            raise ValueError(
                f"{path / 'config.json'}: {key}={settings.get(key)!r}, expected {value!r}; "
                "only folders that this program exported are read"
            )
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; expected the weights of the export")
    try:
        opened = safe_open(weights, framework="pt")
    except Exception as error:
        raise ValueError(f"{weights}: not a safetensors file ({first_line(error)})") from error
    with opened as file:
        skeleton = _skeleton(settings, len(file.keys()), path / "config.json")
        _checked(file, _hf_entries(skeleton, dense), weights)

        def trits_of(name: str, linear: BitLinear) -> tuple[Tensor, Tensor]:
            weight = file.get_tensor(f"{name}.weight")
            if not dense:
                return _unpack4(weight), file.get_tensor(f"{name}.weight_scale")
            scale = weight.abs().max().clamp(min=1e-12)
            trits = (weight / scale).round()
            if not torch.equal(trits * scale, weight):
                raise ValueError(f"{weights}: {name}.weight is not trits times one scale")
            return trits, scale

        model = _fill(skeleton, trits_of, file.get_tensor)
    return _Source(model, load_tokenizer(path / "tokenizer.json"), settings.get("bitllm", {}))


def export_hf(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    dense: bool = False,
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write a folder for transformers' AutoModelForCausalLM and AutoTokenizer, as they are.

    Args:
        source, checkpoint, overwrite: as `export_packed`.
        out: the folder; it appears whole or not at all.
        dense: full float32 weights, t * s, for four trits a byte: sixteen times larger, needs no
            extra package to load, but its activations are no longer rounded to 8 bits.
        credits: as `export_packed`.

    Raises:
        ValueError, FileNotFoundError: no such model, one that transformers has no counterpart of
            (the message says why), or `out` exists.
    """
    out = Path(out)
    with _replacing(out, overwrite, folder=True) as beside:
        opened = _open_source(Path(source), checkpoint, credits)
        model, tokenizer = opened.model, opened.tokenizer
        _check_exportable(model.config, "hf")
        files = _hf_files(opened, dense)
        entries = _hf_entries(model, dense)
        _write_safetensors(beside / "model.safetensors", entries, {"format": "pt"})
        ternary = sum(e.size for e in entries if "_proj." in e.name)
        for file, contents in files.items():
            (beside / file).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        (beside / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        size = sum(file.stat().st_size for file in beside.iterdir())
        card = _model_card(opened, size, dense)
        (beside / "README.md").write_text(card, encoding="utf-8")
    return _result(out, ternary, model, _hf_usage(out.as_posix(), dense))


def _hf_files(source: _Source, dense: bool) -> dict[str, dict[str, Any]]:
    """config.json and the like. Most of Hugging Face's defaults differ, so all is spelled out."""
    config, size, sampling = (
        source.model.config,
        source.tokenizer.get_vocab_size(),
        SamplingConfig(),
    )
    end = _end_id(source.tokenizer)
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    settings = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **{k: v for k, v in asdict(config).items() if k not in ("linear", "block")},
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        # transformers 4 reads rope_theta only, 5 either
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **ends,
        "torch_dtype": "float32",
        **({} if dense else {"quantization_config": _QUANTIZATION}),
        "bitllm": {"format_version": _EXPORT_VERSION, **source.facts},
    }
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special tokens inside a text are text, as in training
        "model_max_length": config.max_position_embeddings,
    }
    generation = {
        **ends,
        "do_sample": True,
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")},
        "max_new_tokens": sampling.max_new_tokens,
    }
    if size < config.vocab_size:  # rows of the head that stand for no token
        generation["suppress_tokens"] = list(range(size, config.vocab_size))
    return {
        "config.json": settings,
        "tokenizer_config.json": tokens,
        "generation_config.json": generation,
    }


def _hf_usage(folder: str, dense: bool) -> str:
    packages = "transformers" if dense else "transformers accelerate"
    return "\n".join(
        [
            f"  transformers   pip install {packages}",
            f'                 model = AutoModelForCausalLM.from_pretrained("{folder}")',
            f'                 tokenizer = AutoTokenizer.from_pretrained("{folder}")',
            f'  this program   python bitllm_core.py generate --model {folder} --prompt "..."',
        ]
    )


def _model_card(source: _Source, size: int, dense: bool) -> str:
    config, facts = source.model.config, source.facts
    trits = sum(linear.shape.numel() for linear in source.model.bit_linears().values())
    known = KNOWN_DATA.get(facts.get("data") or "")
    rows = {
        "author": facts.get("author"),
        "licence": facts.get("licence"),
        "trained on": facts.get("data"),
        "licence of that text": facts.get("data_licence"),
        "optimizer steps": facts.get("steps"),
        "training tokens": facts.get("tokens"),
        "loss of the last logged batch, nats per token": facts.get("loss"),
        "validation loss, nats per token": facts.get("val_loss"),
        "validation perplexity": facts.get("val_perplexity"),
        "parameters": config.num_parameters,
        "of which ternary": trits,
        "context, tokens": config.max_position_embeddings,
        "size of the files, bytes": size,
    }
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"license: {json.dumps(facts['licence'])}"] if facts.get("licence") else []
    front += ["datasets:", f"- {known.name}"] if known else []
    table = "\n".join(f"| {key} | {_told(value)} |" for key, value in rows.items())
    compiler = "" if dense else _COMPILER_NOTE
    return (
        "---\n"
        + "\n".join(front)
        + f"""
---
# {facts.get("name") or "A ternary language model"}

A ternary (BitNet b1.58) language model, trained from scratch with `bitllm_core.py`. It continues
text; it was not taught to follow instructions or to be right.

| | |
| --- | --- |
{table}

## Loading it

```
{_hf_usage(".", dense)}
```

All floats are float32; load it in that dtype, transformers' default for this folder.{compiler}

llama.cpp, ollama and LM Studio read a GGUF file, which `bitllm_core.py` makes of this folder:
`python bitllm_core.py export --model . --to gguf --out ../model.gguf`. llama.cpp's own converter
does not: it takes the scale of the weights anew.
"""
    )


_COMPILER_NOTE = """
On a CPU, loading compiles code: it needs a C++ compiler, or TORCHDYNAMO_DISABLE=1 in the
environment."""


def _told(value: Any) -> str:
    if value is None:
        return "not stated"
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
