"""Speed and memory of training and generation on this machine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bitllm.compiling import compiled_loss, why_not_compile
from bitllm.machine import memory_in_use, product_rate
from bitllm.planner import estimate_memory, machine
from bitllm_core import (
    BitLM,
    Device,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    apply_gradients,
    choose_device,
    generate_tokens,
    make_optimizers,
    windows_at_once,
)


def bench_step(
    model: ModelConfig, device: Device, windows: int, train: TrainConfig | None = None
) -> Callable[[], float]:
    """A function that makes one optimizer step on random tokens and returns its seconds."""
    tokens = windows * model.max_position_embeddings
    config = dataclasses.replace(train or TrainConfig(), batch_tokens=tokens)
    net = BitLM(model).to(device.device)
    optimizers, scaler = make_optimizers(net, config), device.scaler()
    loss = net.loss if why_not_compile(device.device) else compiled_loss(net)
    shape = (windows, model.max_position_embeddings)
    ids = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    ids, at_once = ids.to(device.device), windows_at_once(model, config, device)

    def step() -> float:
        start = time.perf_counter()
        with net.hold_weights(device.dtype):
            for part in ids.split(at_once):
                with device.autocast():
                    value = loss(part, part) / ids.numel()
                scaler.scale(value).backward()
        apply_gradients(optimizers, scaler, 1.0, 1.0)
        return time.perf_counter() - start

    return step


def bench_generation(model: BitLM, tokens: int, rounds: int = 3) -> float:
    """Tokens per second of one greedy text of `tokens` tokens, the best of some rounds."""
    best = math.inf
    for _ in range(rounds):
        written = generate_tokens(
            model, [[1]], SamplingConfig(max_new_tokens=tokens, temperature=0, seed=0)
        )
        next(written)
        start = time.perf_counter()
        for _ in written:
            pass
        best = min(best, time.perf_counter() - start)
    return (tokens - 1) / best


def bench(quick: bool = False) -> dict[str, Any]:
    """Speeds and memory; ternary and dense steps take turns, so that a busy machine slows both."""
    device = choose_device()
    model = ModelConfig(
        vocab_size=512 if quick else 30_000,
        hidden_size=128 if quick else 512,
        intermediate_size=256 if quick else 1536,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=2 if quick else 8,
        max_position_embeddings=64 if quick else 512,
    )
    windows, rounds = 16, 10 if quick else 4
    ternary = bench_step(model, device, windows)
    first = ternary()
    ternary()
    peak, state = memory_in_use(device.device), estimate_memory(model, TrainConfig())
    dense = bench_step(dataclasses.replace(model, linear="dense"), device, windows)
    dense()
    seconds = [(ternary(), dense(), product_rate(device)) for _ in range(rounds)]
    t, d, rate = (np.array(column) for column in zip(*seconds, strict=True))
    tokens = windows * model.max_position_embeddings
    net = BitLM(model).to(device.device).freeze()
    trits = sum(layer.shape.numel() for layer in net.bit_linears().values())
    packed = sum(layer.packed.numel() for layer in net.bit_linears().values())
    return {
        "train": {
            "ternary_tokens_per_s": tokens / np.median(t),
            "dense_tokens_per_s": tokens / np.median(d),
            "ternary_to_dense": np.median(d / t),
            "flop_utilization": 6 * model.num_parameters * tokens / np.median(t) / rate.max(),
            "product_flop_per_s": rate.max(),
            "first_step_s": first,
            "steps_in_turn": rounds,
        },
        "generate": {
            "tokens_per_s": bench_generation(net, min(256, model.max_position_embeddings - 1)),
            "bits_per_ternary_weight": 8 * packed / trits,
        },
        "memory": {
            "peak_bytes": peak,
            "weights_and_optimizer_bytes": state,
            "ratio": peak / state,
        },
        "machine": {**machine(), "device": str(device), "parameters": model.num_parameters},
    }
