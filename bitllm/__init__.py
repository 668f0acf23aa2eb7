"""Train, use and export ternary language models: the names of the core and of the package.

    import bitllm
    bitllm.train(*bitllm.PRESETS["demo"], "runs/demo")
    bitllm.export_packed("runs/demo", "demo.safetensors")

Each name is imported where it is first used, so that `import bitllm` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

import bitllm_core

__version__ = "1.0.0"

_MODULES = {
    "chat": ("Chat", "chat", "respond"),
    "conversations": ("can_chat",),
    "dial": ("dial",),
    "export": (
        "Exported",
        "export_gguf",
        "export_hf",
        "export_html",
        "export_limits",
        "export_packed",
        "llama_cpp_stream",
        "publish",
        "push_to_hub",
    ),
    "loggers": ("TensorBoard", "WandB"),
    "machine": ("estimate_seconds", "product_rate"),
    "notebook": (
        "LiveDisplay",
        "Settings",
        "SettingsPanel",
        "brief_errors",
        "chat_box",
        "check_gpu",
        "compare",
        "download_button",
        "environment_report",
        "export_box",
        "find_model",
        "first_words",
        "furthest_run",
        "is_training",
        "mount_drive",
        "newest_run",
        "prompt_box",
        "read_metrics",
        "saved_step",
        "show_environment",
        "show_page",
        "show_run",
        "speak",
        "try_out",
        "upload_box",
        "watch",
        "write_export",
    ),
    "planner": ("estimate_memory", "info", "memory_parts", "plan"),
    "requests": ("Requests", "ask"),
    "streaming": ("StreamedData",),
    "tasks": ("evaluate_tasks",),
}
_PLACES = {name: f"bitllm.{module}" for module, names in _MODULES.items() for name in names}

__all__ = sorted({*bitllm_core.__all__, *_PLACES, "log_to"})  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name in bitllm_core.__all__ or name == "log_to":
        return getattr(bitllm_core, name)
    raise AttributeError(f"module 'bitllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


for _module in ("cpu", "cuda", "telemetry"):  # they register what is faster, or logged besides
    importlib.import_module(f"bitllm.{_module}")
