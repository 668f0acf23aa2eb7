"""What a logged line of training holds besides the core's numbers."""

from __future__ import annotations

import numpy as np
import torch

from bitllm.machine import memory_in_use
from bitllm_core import METRICS, TrainState, weight_quant


def memory_metrics(state: TrainState) -> dict[str, int]:
    """Most memory held so far: of the GPU, or of this process."""
    return {"memory_bytes": memory_in_use(next(state.model.parameters()).device)}


def ternary_metrics(state: TrainState) -> dict[str, list[float]]:
    """Per layer: share of zeros, and of trits that changed since the last logged line."""
    config, processes = state.model.config, state.processes
    zeros, flips, sizes = (np.zeros(config.num_hidden_layers) for _ in range(3))
    for name, linear in state.model.bit_linears().items() if config.linear != "dense" else ():
        weight = processes.whole({name: linear.weight.detach()}).get(name)
        if name == "lm_head" or weight is None or not processes.is_main:
            continue
        layer, trits = int(name.split(".")[2]), weight_quant(weight)[0].to("cpu", torch.int8)
        zeros[layer] += (trits == 0).sum().item()
        flips[layer] += (trits != state.trits.get(name, trits)).sum().item()
        sizes[layer] += trits.numel()
        state.trits[name] = trits
    found = {"zero_fraction": zeros, "flip_rate": flips} if sizes.any() else {}
    return {name: (counts / sizes).round(6).tolist() for name, counts in found.items()}


METRICS.extend((memory_metrics, ternary_metrics))
