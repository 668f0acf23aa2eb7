"""What a training will take: memory by part, and time."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bitllm.compiling import why_not_compile
from bitllm.cpu.products import ready
from bitllm.cpu.training import has_kernels, parts_of
from bitllm.distributed import BUCKET_NUMBERS, MESSAGES_AT_ONCE
from bitllm.machine import estimate_seconds, product_rate
from bitllm.memory import memory_size
from bitllm.muon import BATCH_NUMBERS
from bitllm_core import (
    CHUNK_BYTES,
    CHUNK_COLUMNS,
    MIN_VOCAB_SIZE,
    PRESETS,
    BitLM,
    Device,
    ModelConfig,
    TrainConfig,
    choose_device,
    versions,
)


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"system": platform.platform(), "cores": os.cpu_count(), "gpu": gpu}
    return {**found, **versions(), "threads": torch.get_num_threads()}


@cache
def activation_bytes(model: ModelConfig, dtype: torch.dtype, kernels: bool = False) -> int:
    """Bytes that a token's activations take in one block until the backward pass, uncompiled.

    Measured on the processor: what autograd keeps of 16 tokens in two blocks, less that in one;
    with a CPU's kernels, where they are to be used and there are any.
    """

    def kept(layers: int) -> int:
        config = dataclasses.replace(
            model, num_hidden_layers=layers, vocab_size=MIN_VOCAB_SIZE, tie_word_embeddings=True
        )
        net = BitLM(dataclasses.replace(config, max_position_embeddings=16), seed=None)
        tensors: list[Tensor] = []  # kept alive, so that no address comes twice

        def note(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        ids = torch.zeros(1, 16, dtype=torch.int64)
        with (
            net.hold_weights(dtype),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            Device(torch.device("cpu"), dtype, "").autocast(),
        ):
            net.loss(ids, ids, *(parts_of(net, dtype) if kernels else ()))
            weights = [*net.parameters(), *(layer.held for layer in net.bit_linears().values())]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        for weight in weights:
            found.pop(weight.untyped_storage().data_ptr() if weight is not None else 0, None)
        return sum(found.values())

    return (kept(2) - kept(1)) // 16


COMPILED = 0.45
"""Share of the activations that compiled blocks keep: 0.43 to 0.45 on an H200 (docs/gpu.md)."""


def is_compiled(train: TrainConfig, gpu: bool) -> bool:
    return gpu and train.compile != "off" and not train.fsdp


def memory_parts(
    model: ModelConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    processes: int = 1,
    windows: int = 1,
    gpu: bool = False,
) -> dict[str, int]:
    """Bytes on each of so many devices, by part, at the moment of a step that takes the most.

    That is when the loss of the second micro-batch, of so many windows, is computed: gradients of
    the first and activations of the second. Or the update, where those are small. Only tensors are
    counted, not what an allocator keeps beyond them (docs/scaling.md). On a GPU, that of compiled
    blocks and softmax, and of more logits at once, unless `fsdp` or `compile` forbid it.
    """
    D, V, P = model.hidden_size, model.vocab_size, model.num_parameters
    kv, up = model.num_kv_heads * model.head_dim, 2 if model.block == "seed" else 3
    matrices = model.num_hidden_layers * (2 * D * D + 2 * D * kv + up * D * model.intermediate_size)
    states = 4 * (matrices if train.optimizer == "muon" else 2 * matrices) + 8 * (P - matrices)
    shared = processes if train.fsdp else 1
    always = {
        "weights": 4 * P // shared,
        "gradients": 4 * P // shared,
        "optimizer": states // processes,
    }
    size, tokens = dtype.itemsize, windows * model.max_position_embeddings
    reduced, quantized = size < 4, model.linear != "dense"  # else what multiplies is the weight
    head = size * V * D if reduced or (quantized and not model.tie_word_embeddings) else 0
    held = head + (size * matrices if reduced or quantized else 0)
    logits = min(CHUNK_BYTES["cuda" if gpu else "cpu"], size * V * tokens)
    gradient = logits if gpu else logits * min(CHUNK_COLUMNS, V) // V  # of one block
    kernels = has_kernels(model, dtype) and not (gpu or train.fsdp)
    activations = activation_bytes(model, dtype, kernels) * model.num_hidden_layers * tokens
    if is_compiled(train, gpu):
        activations = int(COMPILED * activations)
    elif kernels:
        gradient = 0  # takes the place of the logits
    else:
        gradient = gradient * (5 + size) // size  # in float32, compared, and in `dtype`
    work = {
        "quantized weights": head if train.fsdp else held,
        "gradient of the head": (4 if kernels and ready(D, dtype) else size) * V * D,
        "loss": logits + gradient + size * tokens * D,  # and d_hidden
        "activations": activations,
    }
    if train.fsdp:
        two, one = (dataclasses.replace(model, num_hidden_layers=n) for n in (2, 1))
        block = two.num_parameters - one.num_parameters
        work["gathered embedding and head"] = 4 * (P - model.num_hidden_layers * block)
        work["gathered blocks"] = 2 * 4 * block  # one, and what another arrived in
        # a block's gradient and that of another on its way; the memory of the loss is free by then
        work["loss"] = max(work["loss"], 3 * 4 * block)
    at_once = min(MESSAGES_AT_ONCE * max(BUCKET_NUMBERS, V * D), P)
    update = {"messages": 4 * at_once if processes > shared else 0}
    if train.optimizer == "muon":
        update["batch of matrices"] = 16 * min(BATCH_NUMBERS, matrices // processes)
    return always | max(work, update, key=lambda parts: sum(parts.values()))


GPUS = {
    "T4": (14.6, 65e12, 0.2, 5e9),
    "A100": (40, 312e12, 0.35, 200e9),
    "H100": (80, 989e12, 0.35, 300e9),
}
"""GiB, FLOP/s of 16-bit products, the assumed share of it, bytes/s assumed from one to another."""


def estimate_memory(model: ModelConfig, train: TrainConfig) -> int:
    """Bytes of weights, gradients and optimizer state in training, float32."""
    matrices = model.num_parameters - model.vocab_size * model.hidden_size
    moments = 2 * model.num_parameters - (matrices if train.optimizer == "muon" else 0)
    return 4 * (2 * model.num_parameters + moments)


def check_memory(model: ModelConfig, train: TrainConfig, world_size: int = 1) -> None:
    """Refuse what cannot fit before anything of it is made; ValueError names both sizes."""
    there, device = memory_size() or math.inf, choose_device(train.device)
    if device.device.type == "cuda":
        there = torch.cuda.mem_get_info()[1]
    needed = estimate_memory(model, train) // (world_size if train.fsdp else 1)
    if needed > there:
        raise ValueError(
            f"{model.num_parameters:,} parameters need {needed / 2**30:,.1f} GiB for weights, "
            f"gradients and optimizer; {device.device} has {there / 2**30:,.1f} GiB. "
            "Choose a smaller hidden_size, num_hidden_layers or vocab_size, or --fsdp on several"
        )


def _time_of(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def plan(model: ModelConfig, config: TrainConfig, gpus: int) -> Iterator[str]:
    """Size, memory by part and time of a training on several GPUs of a kind, line by line."""
    dtype = torch.float32 if config.dtype == "float32" else torch.float16
    context, layers, P = (
        model.max_position_embeddings,
        model.num_hidden_layers,
        model.num_parameters,
    )
    tokens = config.batch_tokens * config.max_steps
    per_token = 6 * P + 6 * layers * context * model.hidden_size  # and causal attention's
    memory = partial(memory_parts, model, config, dtype, gpus, gpu=True)
    parts, window = memory(), activation_bytes(model, dtype) * layers * context
    window *= COMPILED if is_compiled(config, gpu=True) else 1
    share = -(-config.batch_tokens // context // gpus)
    yield f"parameters: {P:,}"
    yield f"tokens: {tokens:,} in {config.max_steps:,} steps of {config.batch_tokens:,}"
    yield f"FLOP: {per_token * tokens:.2e}, {per_token:.2e} per token"
    kind = f"{str(dtype).removeprefix('torch.')} products{', fsdp' if config.fsdp else ''}"
    yield f"memory on each of {gpus}, {kind}, one window of {context} tokens at once:"
    yield from (f"  {name:27} {size / 2**20:8,.0f} MB" for name, size in parts.items() if size)
    yield f"  {'sum':27} {sum(parts.values()) / 2**20:8,.0f} MB"
    yield f"  and for each window more {window / 2**20:,.0f} MB"
    if config.fsdp:
        whole_state = 4 * P + memory_parts(model, config, dtype)["optimizer"]
        yield f"while it saves, in the first's main memory: {whole_state / 2**20:,.0f} MB"
    for name, (gib, peak, used, between) in GPUS.items():
        room = 0.7 * gib * 2**30  # CUDA and the gaps of its allocator are not counted
        fit = max((n for n in range(1, share + 1) if sum(memory(n).values()) <= room), default=0)
        if fit < 1:
            yield f"{gpus} x {name} ({gib} GiB): does not fit"
            continue
        # gradients there and back, and weights; with fsdp weights twice and gradients, each time
        times = -(-share // fit) if config.fsdp else 1
        sent = 12 * P * times * (gpus - 1) / gpus
        seconds = per_token * tokens / (gpus * peak * used) + config.max_steps * sent / between
        yield (
            f"{gpus} x {name} ({gib} GiB): {fit} of {share} windows at once, {_time_of(seconds)}"
        )
    used = ", ".join(f"{n} {share:.0%} of {peak:.3g}" for n, (_, peak, share, _) in GPUS.items())
    yield f"time: an estimate; assumed FLOP per second: {used} (measured: an H200, 28 to 35%)"


def info() -> Iterator[str]:
    """This machine, and size, memory and time of each preset on it, line by line."""
    device = choose_device()
    yield f"device: {device}"
    yield f"torch.compile: {why_not_compile(device.device) or 'available'}"
    yield from (f"{name}: {value}" for name, value in machine().items())
    rate = product_rate(device)
    yield f"\n{'preset':8} {'parameters':>10} {'memory':>8} {'time here':>10}  data"
    for name, (model, data, config) in PRESETS.items():
        memory = estimate_memory(model, config) / 2**20
        minutes = estimate_seconds(model, config, rate) / 60
        yield (
            f"{name:8} {model.num_parameters / 1e6:9.2f}M {memory:5.0f} MB "
            f"{minutes:6.0f} min  {data.data}"
        )
    yield "\nmemory: weights, gradients and optimizer; time: at a quarter of this machine's best"
    yield "matrix product rate, measured now, without compiling and reading the data"
