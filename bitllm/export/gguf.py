"""A GGUF file for stock llama.cpp and what is built on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitllm.chat import SAMPLING
from bitllm.conversations import IM_END, TEMPLATE, can_chat
from bitllm.export.common import (
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
from bitllm.export.llama_vocabulary import Vocabulary, llama_vocabulary
from bitllm_core import (
    END_OF_TEXT,
    BitLinear,
    BitLM,
    ModelConfig,
    SamplingConfig,
    library,
    require,
)

GGUF_KINDS = {"TQ2_0": 37, "TQ1_0": 36, "Q2_0": 41, "F16": 1}
"""type of the ternary matrices -> llama.cpp's number for general.file_type"""
_Q2_0, _Q2_0_BLOCK = 42, 64  # llama.cpp's number and trits per block; gguf 0.19 does not know it
_NAMES = [  # ours -> llama.cpp's, replaced in this order
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
    for old, new in _NAMES:
        name = name.replace(old, new)
    return name


def _read(path: Path) -> Source | None:
    if path.suffix == ".gguf":
        raise ValueError(
            f"{path}: a GGUF file runs in llama.cpp; give the run folder, a packed file or a "
            "Hugging Face folder here"
        )
    return None


@export_format(
    "gguf",
    flags={"kind": Flag("--gguf-type", "type of the matrices (default: TQ2_0)", tuple(GGUF_KINDS))},
    read=_read,
)
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
        kind: type of the ternary matrices: TQ2_0 (2.06 bits per weight, fastest on a CPU), TQ1_0
            (1.69 bits), Q2_0 (2.25 bits; also for CUDA and Metal, widths that are multiples of 64)
            or F16 (any width, but activations are not rounded to 8 bits; also for dense models).
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
    with replacing(out, overwrite, folder=False) as beside:
        opened = open_source(source, checkpoint, credits)
        ternary = write_gguf(beside, opened, kind)
    chats = can_chat(opened.tokenizer)
    modelfile = _modelfile(out.name, opened.model.config, chats)
    out.with_suffix(".Modelfile").write_text(modelfile, encoding="utf-8")
    usage = _usage(out.as_posix(), opened.model.config, chats)
    return result_of(out, ternary, opened.model, usage)


def _limits(config: ModelConfig, kind: str) -> list[str]:
    """Why the matrices of such a model could not have a type."""
    if kind == "F16" and config.linear == "dense":  # the same network without scales
        config = dataclasses.replace(config, linear="ternary")
    limits = export_limits(config)
    if kind.startswith("TQ"):
        return limits
    limits = [limit for limit in limits if limit == NO_COUNTERPART]
    for name in ("hidden_size", "intermediate_size"):
        if kind == "Q2_0" and getattr(config, name) % _Q2_0_BLOCK:
            limits.append(f"Q2_0's blocks need {name} to be a multiple of {_Q2_0_BLOCK}")
    return limits


def write_gguf(path: Path, source: Source, kind: str) -> int:
    """Write the file; return the bytes of its ternary tensors, or of a dense model's matrices."""
    gguf, config = library("gguf", "a GGUF export"), source.model.config
    check_limits(config, kind, _limits(config, kind))
    vocabulary = llama_vocabulary(source.tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, "bitnet")
    try:
        writer.add_file_type(GGUF_KINDS[kind])
        _add_description(writer, source)
        _add_shape(writer, config)
        _add_tokenizer(writer, vocabulary, end_id(source.tokenizer))
        if can_chat(source.tokenizer):
            writer.add_chat_template(TEMPLATE)
            writer.add_eot_token_id(source.tokenizer.token_to_id(IM_END))
        return _add_tensors(writer, source.model, kind)
    finally:
        writer.close()


def _add_description(writer: Any, source: Source) -> None:
    facts, base = source.facts, source.facts.get("base_name")
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, str(base))
    writer.add_quantization_version(2)
    writer.add_name(facts.get("name") or "A ternary language model")
    writer.add_author(facts.get("author") or "")
    writer.add_license(facts.get("licence") or "")
    writer.add_size_label(f"{source.model.config.num_parameters / 1e6:.1f}M")
    if facts.get("data"):
        licence = facts.get("data_licence") or "licence not stated"
        how = f"Tuned from {base}" if base else "Trained from scratch"
        writer.add_description(f"{how} on {facts['data']} ({licence}).")
        writer.add_dataset_count(1)
        writer.add_dataset_name(0, facts["data"])


def _add_shape(writer: Any, config: ModelConfig) -> None:
    """Sizes, and `generate`'s sampling as the default."""
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
    sampling = SamplingConfig()
    writer.add_sampling_temp(sampling.temperature)
    writer.add_sampling_top_k(sampling.top_k)
    writer.add_sampling_top_p(sampling.top_p)
    writer.add_sampling_min_p(0.0)


def _add_tokenizer(writer: Any, vocabulary: Vocabulary, end: int) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)


def pack_q2_0(trits: np.ndarray) -> np.ndarray:
    """Trits, (O, I), in llama.cpp's blocks of scale 1, (O, I / 64 * 18), uint8.

    A block is the scale in float16, then 64 trits plus 1 in two bits each, the first lowest.

    Source: llama.cpp, `block_q2_0` in ggml-common.h and `dequantize_row_q2_0` in ggml-quants.c.
    """
    codes = (trits + 1).astype(np.uint8).reshape(-1, _Q2_0_BLOCK // 4, 4)
    packed = (codes << np.arange(0, 8, 2, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    scales = np.ones((len(packed), 1), "<f2").view(np.uint8)
    return np.concatenate([scales, packed], 1).reshape(len(trits), -1)


def _add_tensors(writer: Any, model: BitLM, kind: str) -> int:
    """Announce all tensors, then write them one at a time; return the bytes of the ternary ones.

    Blocks of scale 1 hold the trits. The scale stays beside them, exact in float32: inside the
    blocks it would be rounded to float16.
    """
    gguf = library("gguf", "a GGUF export")
    types, ternary = gguf.GGMLQuantizationType, 0
    matrix = _Q2_0 if kind == "Q2_0" else types[kind]
    sizes = {**gguf.GGML_QUANT_SIZES, _Q2_0: (_Q2_0_BLOCK, _Q2_0_BLOCK // 4 + 2)}

    def blocks(linear: BitLinear) -> np.ndarray:
        if linear.linear == "dense":
            return linear.weight.detach().numpy().astype("f2")
        trits = linear.trits.numpy()
        return pack_q2_0(trits) if kind == "Q2_0" else gguf.quantize(trits.astype("f4"), matrix)

    arrays: list[Callable[[], np.ndarray]] = []

    def announce(name: str, shape: tuple[int, ...], dtype: Any, array: Any) -> int:
        block, block_bytes = sizes[dtype]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype("f4"), size, raw_dtype=dtype)
        arrays.append(array)
        return size

    matrices = model.bit_linears()
    for name, linear in matrices.items():
        scale = partial(lambda x: x.weight_scale.view(1).numpy(), linear)
        name = _gguf_name(name)
        ternary += announce(f"{name}.weight", tuple(linear.shape), matrix, partial(blocks, linear))
        if linear.linear != "dense":
            ternary += announce(f"{name}.scale", (1,), types.F32, scale)
    for name, value in model.named_parameters():
        if name.removesuffix(".weight") in matrices:
            continue
        dtype, code = (types.F16, "f2") if "embed" in name else (types.F32, "f4")
        array = partial(lambda x, code: x.detach().numpy().astype(code), value, code)
        announce(_gguf_name(name), tuple(value.shape), dtype, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in arrays:
        writer.write_tensor_data(array())
    return ternary


_OLLAMA_CHAT = """\
{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def ollama_settings(config: ModelConfig, chats: bool) -> tuple[str, dict[str, Any]]:
    """How ollama makes a prompt, a Go template, and its parameters: our sampling."""
    s = SAMPLING if chats else SamplingConfig()
    return _OLLAMA_CHAT if chats else "{{ .Prompt }}", {
        "stop": [IM_END, END_OF_TEXT] if chats else [END_OF_TEXT],
        "num_ctx": config.max_position_embeddings,
        "num_predict": s.max_new_tokens,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_p": 0.0,
        "repeat_penalty": s.repetition_penalty,
    }


def _modelfile(name: str, config: ModelConfig, chats: bool) -> str:
    """What `ollama create` reads."""
    template, parameters = ollama_settings(config, chats)
    lines = [f"FROM ./{name}", f'TEMPLATE """{template}"""' if chats else f"TEMPLATE {template}"]
    lines += [f"PARAMETER stop {stop}" for stop in parameters.pop("stop")]
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    return "\n".join(lines) + "\n"


def llama_command(config: ModelConfig, chats: bool, source: str) -> str:
    """A command of llama.cpp with our sampling, for `source`: -m and a path, or a repository."""
    s, context = SAMPLING if chats else SamplingConfig(), config.max_position_embeddings
    program = f"llama-cli {source} -cnv" if chats else f'llama-completion {source} -no-cnv -p "..."'
    return (
        f"{program} -n {s.max_new_tokens} -c {context} --temp {s.temperature} --top-k {s.top_k} "
        f"--top-p {s.top_p} --min-p 0 --repeat-penalty {s.repetition_penalty}"
    )


def _usage(path: str, config: ModelConfig, chats: bool) -> str:
    """Commands with our sampling. The file itself names the token that ends a text or an answer."""
    older = f"\n{' ' * 17}(builds before December 2025: llama-cli, with the same arguments)"
    return f"""\
  llama.cpp      {llama_command(config, chats, f'-m "{path}"')}{"" if chats else older}
{generate_usage(path)}
  ollama         ollama create NAME -f "{Path(path).with_suffix(".Modelfile").as_posix()}\""""
