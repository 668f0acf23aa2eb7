"""Exports: for transformers, llama.cpp and browsers, and one small file; and reading them back.

    import bitllm
    bitllm.export_gguf("runs/demo", "demo.gguf")

One file per format; `common.py` says what one consists of. Importing a format registers it, so a
new one needs its file and one line below.
"""

from bitllm.export.command import add_export_flags as add_export_flags
from bitllm.export.command import run_export as run_export
from bitllm.export.common import CREDITS as CREDITS
from bitllm.export.common import FORMATS as FORMATS
from bitllm.export.common import Exported as Exported
from bitllm.export.common import export_limits as export_limits
from bitllm.export.common import read_exported as read_exported
from bitllm.export.gguf import GGUF_KINDS as GGUF_KINDS
from bitllm.export.gguf import export_gguf as export_gguf
from bitllm.export.hub import push_to_hub as push_to_hub
from bitllm.export.huggingface import export_hf as export_hf
from bitllm.export.llama_cpp import llama_cpp_stream as llama_cpp_stream
from bitllm.export.packed import export_packed as export_packed
from bitllm.export.repository import publish as publish
from bitllm.export.webpage import export_html as export_html

EXPORT_FORMATS = tuple(FORMATS)
