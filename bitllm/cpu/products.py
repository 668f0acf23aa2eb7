"""The gradients of weights in bfloat16 on processors with AMX: see products.c.

torch's products are at least as fast for everything else, and for all of it elsewhere.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitllm.cpu import build
from bitllm_core import BitLinear

SOURCE = Path(__file__).with_name("products.c")
SIGNATURES = {"permitted": "p", "weight_gradient": "ppiiiiippi"}
TILE, DEPTH, WIDTH = 32, 256, 1024  # the last two as in products.c
LEAST = 128  # features for which packing pays


@cache
def library() -> Any:
    """The library, or None where there is no AMX or no C compiler that has OpenMP."""
    built, answer = build(SOURCE, SIGNATURES, "-march=native", "-fopenmp"), ctypes.c_int(0)
    if built:
        built.permitted(ctypes.addressof(answer))
    return built if answer.value else None


def ready(features: int, dtype: torch.dtype) -> bool:
    """Whether the library is there, and worth while for so many."""
    return features >= LEAST and dtype == torch.bfloat16 and library() is not None


def add_weight_gradient(dw: Tensor, dy: Tensor, x: Tensor, more: bool = True) -> None:
    """Add dy^T x to dw, (n, m) in float32; without `more`, set it to that."""
    (rows, n), m = dy.shape, x.shape[1]
    fits = rows % TILE == m % TILE == 0 and ready(m, dy.dtype)
    whole = n // TILE * TILE if fits else 0
    if whole:
        dy, x, room = dy.contiguous(), x.contiguous(), dy.new_empty(DEPTH * (WIDTH + m))
        pointers = [t.data_ptr() for t in (dy, x, dw, room)]
        sizes = rows, whole, n, m, more
        library().weight_gradient(*pointers[:2], *sizes, *pointers[2:], torch.get_num_threads())
    if whole < n:
        product = dy[:, whole:].T @ x
        dw[whole:].add_(product) if more else dw[whole:].copy_(product)


@torch.library.custom_op("bitllm::weight_gradient", mutates_args=())
def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x of dy, (rows, n), and x, (rows, m), in float32."""
    dw = dy.new_empty((dy.shape[1], x.shape[1]), dtype=torch.float32)
    add_weight_gradient(dw, dy, x, more=False)
    return dw


@weight_gradient.register_fake
def _(dy, x):
    return dy.new_empty((dy.shape[1], x.shape[1]), dtype=torch.float32)


class _Linear(torch.autograd.Function):
    """F.linear by `held`, whose gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, held)
        return F.linear(x, held)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        (dy,), (x, held) = grad, ctx.saved_tensors
        return dy @ held, None, weight_gradient(dy.flatten(0, -2), x.flatten(0, -2))


def linear(layer: BitLinear, x: Tensor) -> Tensor:
    """What the layer makes of x, which is rounded; its weight's gradient by the library."""
    if layer.held is None or layer.held.dtype != x.dtype:
        return layer(x)
    return _Linear.apply(x, layer.held, layer.weight)
