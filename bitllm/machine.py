"""What the machine can do: the rate of its matrix products, a training's time, memory in use."""

from __future__ import annotations

import math
import re
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

from bitllm_core import Device, ModelConfig, TrainConfig


def measure_products(device: Device) -> float:
    """FLOP a second of 2048³ matrix products in the training's dtype now, the best of six."""
    a = torch.randn(2048, 2048, device=device.device, dtype=device.dtype)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


product_rate = lru_cache(maxsize=4)(measure_products)  # for estimates: measured once


def estimate_seconds(model: ModelConfig, config: TrainConfig, rate: float) -> float:
    """Training time at a quarter of the rate of large products; a guess within a factor of two."""
    return 6 * model.num_parameters * config.batch_tokens * config.max_steps / (rate / 4)


def memory_in_use(device: torch.device) -> int:
    """Most bytes held so far: on the GPU, or by this process; 0 where the system hides it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss, which begins with that of the parent
        return sum(
            int(kB) << 10
            for kB in re.findall(r"VmHWM:\s+(\d+)", status.read_text("ascii", "replace"))
        )
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0
