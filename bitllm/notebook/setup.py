"""The machine that a notebook runs on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from pathlib import Path

import torch

from bitllm_core import choose_device, versions, why_not_compile


def environment_report(folder: str | Path = ".") -> str:
    """GPU, memory, disk, precision and versions, a line each."""
    device, disk = choose_device(), shutil.disk_usage(folder)
    gpu = "none, so the processor trains. In Colab: Runtime > Change runtime type > T4 GPU"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, {_free_of(*torch.cuda.mem_get_info())}"
    memory = "unknown"
    with contextlib.suppress(ImportError):  # every notebook kernel brings it
        import psutil

        memory = _free_of(psutil.virtual_memory().available, psutil.virtual_memory().total)
    installed = versions()
    for name in ("tokenizers", "datasets", "ipykernel", "ipywidgets", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    report = {
        "GPU": gpu,
        "memory": f"{memory}, {os.cpu_count()} cores",
        "disk": _free_of(disk.free, disk.total),
        "precision": str(device),
        "torch.compile": why_not_compile(device) or "available",
        "versions": ", ".join(f"{name} {version}" for name, version in installed.items()),
    }
    return "\n".join(f"{name + ':':15}{value}" for name, value in report.items())


def _free_of(free: int, total: int) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
