"""Speed and memory of training and generation on this machine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bitllm.compiling import prepare, why_not_compile
from bitllm.machine import measure_products, memory_in_use
from bitllm.planner import estimate_memory, machine
from bitllm_core import (
    BitLM,
    DataConfig,
    Device,
    ModelConfig,
    Processes,
    SamplingConfig,
    Session,
    TrainConfig,
    choose_device,
    generate_tokens,
)


class _RandomTokens(Processes):
    """One process, and data without end for it; nothing is saved."""

    manifest: ClassVar[dict[str, Any]] = {"train": {"sha256": ""}}

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.choices = np.random.default_rng(0), vocab_size

    def run_on_main(self, work: Any) -> Any:
        return self, None  # instead of preparing data and a tokenizer

    def batch(self, config: TrainConfig, context: int, step: int) -> np.ndarray:
        rng, vocab_size = self.choices
        return rng.integers(vocab_size, size=(config.batch_tokens // context, context + 1))

    def wait(self, session: Session) -> bool:
        return True

    def save_what_is_due(self) -> None: ...


def bench_step(
    model: ModelConfig, device: Device, windows: int, train: TrainConfig | None = None
) -> Callable[[], float]:
    """A function that lets `train`'s loop make one step on random tokens, and returns its seconds.

    With clipping and all else that a step has; without logging, evaluating and saving.
    """
    config = dataclasses.replace(
        train or TrainConfig(),
        batch_tokens=windows * model.max_position_embeddings,
        max_steps=10**9,
        log_every_steps=10**9,
        eval_every_steps=0,
        device=device.device.type,
        dtype=str(device.dtype).removeprefix("torch."),
        compile="off" if why_not_compile(device.device) else "on",
    )
    tokens: Any = _RandomTokens(model.vocab_size)  # and the saver
    configs = {"model": model, "data": DataConfig(), "train": config}
    session = Session(configs, Path(), tokens, ())
    prepare(session)

    def step() -> float:
        start = time.perf_counter()
        session.state.config = dataclasses.replace(config, max_steps=session.state.step + 1)
        session.run(tokens)
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
    seconds = [(ternary(), dense(), measure_products(device)) for _ in range(rounds)]
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
