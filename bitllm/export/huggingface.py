"""A folder for transformers' AutoModelForCausalLM and AutoTokenizer, as they are."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitllm.conversations import IM_END, TEMPLATE, can_chat
from bitllm.export.card import model_card
from bitllm.export.common import (
    EXPORT_VERSION,
    NO_COUNTERPART,
    Exported,
    Flag,
    Source,
    check_limits,
    end_id,
    export_format,
    export_limits,
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
from bitllm_core import (
    END_OF_TEXT,
    BitLinear,
    BitLM,
    ModelConfig,
    SamplingConfig,
    check_tokenizer,
    load_tokenizer,
    read_json,
)

_QUANTIZATION = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",  # multiplies by weight_scale; bitlinear divides by it
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}


def pack4(trits: Tensor) -> Tensor:
    """Four trits per byte as transformers reads them: rows r, r + O/4, ..., low bits first."""
    quarters = (trits + 1).to(torch.uint8).view(4, -1, trits.shape[1])  # (4, O/4, I)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack4(packed: Tensor) -> Tensor:
    """The reverse of `pack4`: int8, (O, I)."""
    quarters = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])  # (4, O/4, I)
    return quarters.view(-1, packed.shape[1]).to(torch.int8) - 1


def hf_tensors(model: BitLM, dense: bool) -> dict[str, Tensor]:
    """Name -> tensor, all floats in float32: transformers refuses a mixture."""
    tensors = {}
    for name, linear in model.bit_linears().items():
        if dense:
            tensors[f"{name}.weight"] = linear.effective_weight()
        else:
            tensors[f"{name}.weight"] = pack4(linear.trits)
            tensors[f"{name}.weight_scale"] = linear.weight_scale.view(1)
    tensors |= {name: x.detach().float() for name, x in model.named_parameters()}
    return tensors


def hf_limits(config: ModelConfig) -> list[str]:
    """Why transformers could not hold the model; llama.cpp's widths do not matter here."""
    limits = [limit for limit in export_limits(config) if limit == NO_COUNTERPART]
    kv = config.num_kv_heads * config.head_dim
    if any(n % 4 for n in (config.hidden_size, config.intermediate_size, kv)):
        limits.append("transformers packs four rows per byte: sizes must be multiples of 4")
    return limits


def _read(path: Path) -> Source | None:
    """A folder that `export_hf` wrote, packed or dense, as a frozen model."""
    settings = read_json(path / "config.json") or {}
    if "model_type" not in settings:
        return None
    dense = "quantization_config" not in settings
    _check_settings(settings, dense, path / "config.json")
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; expected the weights of the export")
    with open_tensors(weights) as file:
        skeleton = meta_model(settings, len(file.keys()), path / "config.json")
        if limits := hf_limits(skeleton.config):
            raise ValueError(f"{path / 'config.json'}: {'; '.join(limits)}")
        tokenizer = load_tokenizer(path / "tokenizer.json")
        check_tokenizer(tokenizer, skeleton.config.vocab_size, path)
        check_tensors(file, hf_tensors(skeleton, dense), weights)

        def read_ternary(name: str, linear: BitLinear) -> tuple[Tensor, Tensor]:
            weight = file.get_tensor(f"{name}.weight")
            if not dense:
                return unpack4(weight), file.get_tensor(f"{name}.weight_scale")
            scale = weight.abs().max().clamp(min=1e-12)
            trits = (weight / scale).round()
            if not torch.equal(trits * scale, weight):
                raise ValueError(f"{weights}: {name}.weight is not trits times one scale")
            return trits, scale

        model = fill_model(skeleton.config, read_ternary, file.get_tensor)
    facts = settings.get("bitllm")
    return Source(model, tokenizer, facts if isinstance(facts, dict) else {})


def _check_settings(settings: dict[str, Any], dense: bool, path: Path) -> None:
    wanted = {"model_type": "bitnet", "hidden_act": "silu", "tie_word_embeddings": True}
    if not dense:
        wanted["quantization_config"] = _QUANTIZATION
    for key, value in wanted.items():
        if settings.get(key) != value:
            raise ValueError(
                f"{path}: {key}={settings.get(key)!r}, expected {value!r}; "
                "only folders that this program exported are read"
            )


def _is_export(folder: Path) -> bool:
    return "bitllm" in (read_json(folder / "config.json") or {})


@export_format(
    "hf",
    flags={"dense": Flag("--dense", "unpacked float32 weights", switch=True)},
    read=_read,
    is_export=_is_export,
)
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
        dense: full float32 weights, t * s, instead of four trits per byte: sixteen times larger.
            They load without an extra package, but activations are not rounded to 8 bits.
        credits: as `export_packed`.

    Raises:
        ValueError, FileNotFoundError: no such model, one that transformers has no counterpart of
            (the message says why), or `out` exists.
    """
    out = Path(out)
    with replacing(out, overwrite, folder=True) as beside:
        opened = open_source(source, checkpoint, credits)
        model = opened.model
        check_limits(model.config, "hf", hf_limits(model.config))
        texts = _json_files(opened, dense)
        tensors = hf_tensors(model, dense)
        write_tensors(beside / "model.safetensors", tensors, {"format": "pt"})
        texts["tokenizer.json"] = opened.tokenizer.to_str(pretty=True)
        for name, text in texts.items():
            (beside / name).write_text(text, encoding="utf-8")
        size = sum(file.stat().st_size for file in beside.iterdir())
        loading = _LOADING.format(usage=_usage(".", dense), note="" if dense else COMPILER_NOTE)
        (beside / "README.md").write_text(model_card(opened, size, loading), encoding="utf-8")
    usage = _usage(out.as_posix(), dense)
    return result_of(out, ternary_bytes(model, tensors), model, usage)


def _json_files(source: Source, dense: bool) -> dict[str, str]:
    """File name -> text. Most of Hugging Face's defaults differ, so everything is spelled out."""
    config, end = source.model.config, end_id(source.tokenizer)
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    chats = can_chat(source.tokenizer)
    settings = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **{k: v for k, v in asdict(config).items() if k not in ("linear", "block")},
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        # transformers 4 reads rope_theta only, 5 reads either
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **ends,
        "torch_dtype": "float32",
        **({} if dense else {"quantization_config": _QUANTIZATION}),
        "bitllm": {"format_version": EXPORT_VERSION, **source.facts},
    }
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        # special tokens inside a text are text, as in training; a template's have to be marks
        "split_special_tokens": not chats,
        "model_max_length": config.max_position_embeddings,
        **({"chat_template": TEMPLATE} if chats else {}),
    }
    sampling, size = SamplingConfig(), source.tokenizer.get_vocab_size()
    generation = {
        **ends,
        **({"eos_token_id": [end, source.tokenizer.token_to_id(IM_END)]} if chats else {}),
        "do_sample": True,
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")},
        "max_new_tokens": sampling.max_new_tokens,
    }
    if size < config.vocab_size:  # rows of the embedding without a token
        generation["suppress_tokens"] = list(range(size, config.vocab_size))
    files = {
        "config.json": settings,
        "tokenizer_config.json": tokens,
        "generation_config.json": generation,
    }
    texts = {name: json.dumps(values, indent=1) + "\n" for name, values in files.items()}
    return {**texts, **({"chat_template.jinja": TEMPLATE} if chats else {})}


def _usage(folder: str, dense: bool) -> str:
    packages = "transformers" if dense else "transformers accelerate"
    return f"""\
  transformers   pip install {packages}
                 model = AutoModelForCausalLM.from_pretrained("{folder}")
                 tokenizer = AutoTokenizer.from_pretrained("{folder}")
{generate_usage(folder)}"""


COMPILER_NOTE = """
On a CPU, loading compiles code: it needs a C++ compiler, or TORCHDYNAMO_DISABLE=1 in the
environment."""
_LOADING = """\
## Loading it

```
{usage}
```

All floats are float32; load the model in that dtype, transformers' default for this folder.{note}

llama.cpp, ollama and LM Studio read a GGUF file, which bitllm makes from this folder:
`bitllm export --model . --to gguf --out ../model.gguf`. llama.cpp's own converter does not work:
it computes the scale from the weights again.
"""
