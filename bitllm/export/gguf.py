"""A GGUF file for llama.cpp and what is built on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitllm.export.common import (
    Exported,
    _check_exportable,
    _end_id,
    _open_source,
    _replacing,
    _result,
    _Source,
)
from bitllm_core import END_OF_TEXT, BitLM, ModelConfig, SamplingConfig, library, require

GGUF_KINDS = {"TQ2_0": 37, "TQ1_0": 36, "F16": 1}  # and llama.cpp's number for general.file_type
_GGUF_NAMES = [
    ("model.layers.", "blk."),
    ("self_attn.attn_sub_norm", "attn_sub_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"),
    ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attn_norm"),
    ("mlp.ffn_sub_norm", "ffn_sub_norm"),
    ("mlp.", "ffn_"),
    ("_proj", ""),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
]


def _gguf_name(name: str) -> str:
    for old, new in _GGUF_NAMES:
        name = name.replace(old, new)
    return name


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    kind: str = "TQ2_0",
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write a GGUF file that stock llama.cpp and what is built on it load, tokenizer included.

    Args:
        source, checkpoint, overwrite: as `export_packed`.
        out: the file, *.gguf; it appears whole or not at all.
        kind: of the ternary matrices: TQ2_0 (2.06 bits a weight, fastest), TQ1_0 (1.69 bits) or
            F16 (any width; activations are then not rounded to 8 bits).
        credits: as `export_packed`.

    Raises:
        ValueError, FileNotFoundError: no such model, one that llama.cpp has no counterpart of
            (the message says why), or `out` exists.
        ImportError: the package gguf is not installed.
    """
    out = Path(out)
    require(kind in GGUF_KINDS, "kind", kind, f"one of {', '.join(GGUF_KINDS)}")
    require(out.suffix == ".gguf", "out", str(out), "a name that ends in .gguf")
    library("gguf", "a GGUF export")
    with _replacing(out, overwrite, folder=False) as beside:
        opened = _open_source(Path(source), checkpoint, credits)
        ternary = _write_gguf(beside, opened, kind)
    return _result(out, ternary, opened.model, _gguf_usage(out.as_posix(), opened.model.config))


def _write_gguf(path: Path, source: _Source, kind: str) -> int:
    """Returns the bytes of the ternary tensors."""
    gguf = library("gguf", "a GGUF export")
    _check_exportable(source.model.config, kind)
    vocabulary = _gguf_vocabulary(source.tokenizer, source.model.config.vocab_size)
    writer = gguf.GGUFWriter(path, "bitnet")
    try:
        _gguf_metadata(writer, source, kind)
        _gguf_tokenizer(writer, vocabulary, _end_id(source.tokenizer))
        return _gguf_tensors(writer, source.model, kind)
    finally:
        writer.close()


def _gguf_metadata(writer: Any, source: _Source, kind: str) -> None:
    config, facts, sampling = source.model.config, source.facts, SamplingConfig()
    writer.add_file_type(GGUF_KINDS[kind])
    writer.add_quantization_version(2)
    writer.add_name(facts.get("name") or "A ternary language model")
    writer.add_author(facts.get("author") or "")
    writer.add_license(facts.get("licence") or "")
    writer.add_size_label(f"{config.num_parameters / 1e6:.1f}M")
    if facts.get("data"):
        licence = facts.get("data_licence") or "licence not stated"
        writer.add_description(f"Trained from scratch on {facts['data']} ({licence}).")
        writer.add_dataset_count(1)
        writer.add_dataset_name(0, facts["data"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_sampling_temp(sampling.temperature)
    writer.add_sampling_top_k(sampling.top_k)
    writer.add_sampling_top_p(sampling.top_p)
    writer.add_sampling_min_p(0.0)


def _gguf_vocabulary(tokenizer: Any, rows: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges; as many tokens as the embedding has rows."""
    described = json.loads(tokenizer.to_str())
    model, before = described["model"], described["pre_tokenizer"] or {}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if model["type"] != "BPE" or described["normalizer"] or plain.items() - before.items():
        raise ValueError(
            f"the tokenizer is {model['type']} after {before.get('type')}: a GGUF file can hold "
            "byte-level BPE with GPT-2's regular expression only; export to hf or packed"
        )
    added = {token["id"] for token in described["added_tokens"]}
    by_id = {i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [3 if i in added else 1 if i in by_id else 5 for i in range(rows)]
    return tokens, kinds, [" ".join(merge) for merge in model["merges"]]


def _gguf_tokenizer(writer: Any, vocabulary: Any, end: int) -> None:
    tokens, kinds, merges = vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # "default" splits words and numbers in other places
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _gguf_tensors(writer: Any, model: BitLM, kind: str) -> int:
    """Announce all tensors, then make and write one at a time; returns bytes of ternary ones."""
    gguf = library("gguf", "a GGUF export")
    quantized, F32 = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    made: list[tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]] = []
    for name, linear in model.bit_linears().items():
        # blocks of scale 1 hold the trits; the scale stays exact in float32 beside them
        trits = partial(lambda x: gguf.quantize(x.trits.numpy().astype("f4"), quantized), linear)
        name, shape = _gguf_name(name), tuple(linear.shape)
        made.append((f"{name}.weight", shape, quantized, trits))
        scale = linear.weight_scale
        made.append((f"{name}.scale", (1,), F32, lambda s=scale: s.view(1).numpy()))
    for name, value in model.named_parameters():
        half = "embed" in name
        float_type = gguf.GGMLQuantizationType.F16 if half else F32
        array = partial(lambda v, t: v.numpy().astype(t), value, "f2" if half else "f4")
        made.append((_gguf_name(name), tuple(value.shape), float_type, array))
    ternary = 0
    for name, shape, dtype, _ in made:
        block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype("f4"), size, raw_dtype=dtype)
        ternary += size if "norm" not in name and "embd" not in name else 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for *_, array in made:
        writer.write_tensor_data(array())
    return ternary


def _gguf_usage(path: str, config: ModelConfig) -> str:
    """Commands with `generate`'s sampling. The file itself names the token that ends a text."""
    s, context = SamplingConfig(), config.max_position_embeddings
    penalty = s.repetition_penalty
    return f"""\
  llama.cpp      llama-completion -m "{path}" -no-cnv -p "..." -n {s.max_new_tokens} \
-c {context} --temp {s.temperature} --top-k {s.top_k} --top-p {s.top_p} --min-p 0 \
--repeat-penalty {penalty}
                 (builds before December 2025: llama-cli, with the same arguments)
  this program   python bitllm_core.py generate --model "{path}" --prompt "..."
  ollama         ollama create NAME -f Modelfile, these lines in the file Modelfile:
                 FROM "{path}"
                 TEMPLATE {{{{ .Prompt }}}}
                 PARAMETER stop {END_OF_TEXT}
                 PARAMETER num_ctx {context}
                 PARAMETER num_predict {s.max_new_tokens}
                 PARAMETER temperature {s.temperature}
                 PARAMETER top_k {s.top_k}
                 PARAMETER top_p {s.top_p}
                 PARAMETER min_p 0.0
                 PARAMETER repeat_penalty {penalty}"""
