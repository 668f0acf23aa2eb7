"""Exports: to transformers, llama.cpp, one small file and a web page, and back."""

from bitllm.export.common import CREDITS, Exported
from bitllm.export.gguf import GGUF_KINDS, export_gguf
from bitllm.export.hub import push_to_hub
from bitllm.export.huggingface import export_hf
from bitllm.export.llama_cpp import llama_cpp_stream
from bitllm.export.packed import export_packed
from bitllm.export.webpage import export_html

__all__ = [
    "CREDITS",
    "EXPORT_FORMATS",
    "GGUF_KINDS",
    "Exported",
    "export_gguf",
    "export_hf",
    "export_html",
    "export_packed",
    "llama_cpp_stream",
    "push_to_hub",
    "read_exported",
]

EXPORT_FORMATS = ("hf", "gguf", "packed", "html")


def read_exported(path):
    from bitllm.export.common import _read_any

    source = _read_any(path, "last")
    return source.model, source.tokenizer, source.facts
