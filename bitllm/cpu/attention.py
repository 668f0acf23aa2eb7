"""Causal attention in bfloat16, in tiles: see attention.c."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitllm.cpu import build
from bitllm.cpu.products import TILE, call
from bitllm.cpu.products import library as products

SOURCE = Path(__file__).with_name("attention.c")
SIGNATURES = {"attention": "ppppiiiifpppi", "attention_back": "pppppppiiiifppppi"}


@cache
def library() -> Any:
    """The library, or None where that of products is."""
    return build(SOURCE, SIGNATURES, "-march=native", "-fopenmp") if products() else None


def fits(q: Tensor, k: Tensor) -> bool:
    """Whether the library can attend with such queries and keys, (B, H, T, K)."""
    whole = q.shape == k.shape and q.shape[2] % TILE == q.shape[3] % TILE == 0
    return whole and q.dtype == k.dtype == torch.bfloat16


def _rows(*tensors: Tensor) -> tuple[list[Tensor], Tensor]:
    """The tensors, their features beside each other, and their other strides."""
    rows = [t if t.stride(3) == 1 else t.contiguous() for t in tensors]
    return rows, torch.tensor([t.stride()[:3] for t in rows])


def _empty(like: Tensor) -> Tensor:
    """(B, H, T, K), with a token's heads beside each other in the memory."""
    B, H, T, K = like.shape
    return like.new_empty((B, T, H, K)).transpose(1, 2)


def _room(T: int, K: int) -> Tensor:
    """Half of ROOM in attention.c, in numbers of two bytes, for each thread."""
    numbers = 9 * T * K + 130 * T + 8192
    return torch.empty((torch.get_num_threads(), numbers), dtype=torch.int16)


@torch.library.custom_op("bitllm::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention, (B, H, T, K), and the log2 of each row's sum, float32 (B, H, T)."""
    (B, H, T, K), (rows, strides) = q.shape, _rows(q, k, v)
    y, totals = _empty(q), q.new_empty((B, H, T), dtype=torch.float32)
    sizes = B, H, T, K, K**-0.5
    call(library(), "attention", *rows, strides, *sizes, y, totals, _room(T, K))
    return y, totals


@torch.library.custom_op("bitllm::attention_back", mutates_args=())
def attention_back(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    (B, H, T, K), (rows, strides) = q.shape, _rows(dy, q, k, v)
    found = _empty(q), _empty(q), _empty(q)
    sizes = B, H, T, K, K**-0.5
    call(library(), "attention_back", *rows, strides, y, totals, *sizes, *found, _room(T, K))
    return found


@attention.register_fake
def _(q, k, v):
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_back.register_fake
def _(dy, q, k, v, y, totals):
    return _empty(q), _empty(q), _empty(q)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


attention.register_autograd(
    lambda ctx, dy, _: attention_back(dy, *ctx.saved_tensors), setup_context=_keep
)
