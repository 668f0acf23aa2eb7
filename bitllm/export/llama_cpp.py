"""Text from a GGUF file, by llama.cpp in this process."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitllm_core import END_OF_TEXT, SamplingConfig, first_line, library


def llama_cpp_stream(
    path: str | Path, prompt: str, sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """Yield the continuation of `prompt`, piece by piece, as llama.cpp generates it.

    Args:
        path: a GGUF file. Its tokenizer reads the prompt; "<|endoftext|>" in it ends a document.

    Raises:
        FileNotFoundError, ValueError: no such file, or llama.cpp refuses it or the prompt.
        ImportError: the package xllamacpp is not installed.
    """
    xllamacpp, path = library("xllamacpp", "running a GGUF file"), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a GGUF file")
    request = _request(prompt, sampling or SamplingConfig())
    if not request["max_tokens"]:  # a server that got no request can hang when it is closed
        return
    try:
        server = xllamacpp.Server(_parameters(xllamacpp, path))
    except Exception as error:
        raise ValueError(f"{path}: llama.cpp does not load it ({first_line(error)})") from error
    pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
    closed = threading.Event()  # the reader wants no more

    def receive(piece: Any) -> bool:
        pieces.put(piece)
        return closed.is_set()

    def work() -> None:
        try:
            server.handle_completions(request, receive)
        except Exception as error:
            pieces.put({"error": error})
        pieces.put(None)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            if "error" in piece:
                raise ValueError(f"{path}: llama.cpp refuses the prompt ({piece['error']})")
            if text := piece["choices"][0]["text"]:
                yield text
    finally:
        closed.set()
        worker.join()


def _parameters(xllamacpp: Any, path: Path) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.warmup = str(path), -1, False
    params.n_parallel, params.ctx_shift = 1, True
    threads = max(1, (os.cpu_count() or 1) // 2)  # they wait by spinning: leave cores to others
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return params


def _request(prompt: str, sampling: SamplingConfig) -> dict[str, Any]:
    """Our sampling in llama.cpp's terms and, with `samplers`, in our order."""
    return {
        "prompt": prompt or END_OF_TEXT,
        "stream": True,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": 1 << 16,  # the whole text, as ours
        "samplers": ["penalties", "temperature", "top_k", "top_p"],
        **({} if sampling.seed is None else {"seed": sampling.seed}),
    }
