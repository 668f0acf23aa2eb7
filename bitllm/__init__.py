"""Ternary language models: the core's names and the package's, imported when they are used."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any, TextIO

import bitllm_core

PLACES = {
    "bitllm.notebook": (
        "LiveDisplay",
        "Settings",
        "SettingsPanel",
        "download_button",
        "environment_report",
        "furthest_run",
        "mount_drive",
        "newest_run",
        "prompt_box",
        "read_metrics",
        "saved_step",
        "show_run",
    ),
}
_MODULES = {name: module for module, names in PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in bitllm_core.__all__:
        return getattr(bitllm_core, name)
    raise AttributeError(f"module 'bitllm' has no attribute {name!r}")


def log_to(stream: TextIO | None = None) -> None:
    """Print the log of the library on one stream, messages alone."""
    log = logging.getLogger("bitllm")
    handler = logging.StreamHandler(stream or sys.stderr)
    log.handlers = [handler]
    log.setLevel(logging.INFO)
