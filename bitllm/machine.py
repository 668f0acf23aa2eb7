"""What the machine can do: the rate of its matrix products, and what follows for a training."""

from __future__ import annotations

import math
import time
from functools import lru_cache

import torch

from bitllm_core import Device, ModelConfig, TrainConfig


@lru_cache(maxsize=4)
def product_rate(device: Device) -> float:
    """FLOP a second of 2048³ matrix products in the training's dtype, the best of five."""
    a = torch.randn(2048, 2048, device=device.device, dtype=device.dtype)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def estimate_seconds(model: ModelConfig, config: TrainConfig, rate: float) -> float:
    """Training time at a quarter of the rate of large products; a guess within a factor of two."""
    return 6 * model.num_parameters * config.batch_tokens * config.max_steps / (rate / 4)
