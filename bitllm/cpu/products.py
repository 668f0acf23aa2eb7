"""Products of 8-bit integers and trits, and gradients of weights, in tiles: see products.c.

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
SIGNATURES = {
    "kind": "p",
    "weight_gradient": "pppiiiiippi",
    "ternary_linear": "pppiiippi",
}
TILE, DEPTH, WIDTH = 32, 256, 1024  # the last two as in products.c
AMX = 2  # of the kinds in products.c
BYTES = 64  # of a tile's line
LEAST = 128  # features for which packing pays


@cache
def _built() -> tuple[Any, int]:
    """The library and its kind, as in products.c."""
    built, kind = build(SOURCE, SIGNATURES, "-march=native", "-fopenmp"), ctypes.c_int(0)
    if built:
        built.kind(ctypes.addressof(kind))
    return built, kind.value


def library() -> Any:
    """The library, or None without AVX-512 for bfloat16 or a C compiler that has OpenMP."""
    built, kind = _built()
    return built if kind else None


def has_amx() -> bool:
    """Whether the library multiplies with AMX."""
    return _built()[1] == AMX


def ready(features: int, dtype: torch.dtype) -> bool:
    """Whether the library is there, and worth while for so many."""
    return features >= LEAST and dtype == torch.bfloat16 and library() is not None


def call(library: Any, name: str, *arguments: Any) -> None:
    """Call a function of a library, with tensors as pointers."""
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(library, name)(*pointers, torch.get_num_threads())


def spread(integers: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that integers, (..., m), stand for: of each row one is worth its step, (...)."""
    return (integers * steps.unsqueeze(-1)).to(dtype)


def add_weight_gradient(
    dw: Tensor, dy: Tensor, x: Tensor, steps: Tensor | None = None, more: bool = True
) -> None:
    """Add dy^T x to dw, (n, m) in float32; without `more`, set it to that.

    dy is (rows, n), x is (rows, m); with `steps`, (rows), x is integers.
    """
    (rows, n), m = dy.shape, x.shape[1]
    fits = rows % TILE == m % TILE == 0 and ready(m, dy.dtype)
    whole = n // TILE * TILE if fits else 0
    if whole:
        dy, x, room = dy.contiguous(), x.contiguous(), dy.new_empty(DEPTH * (WIDTH + m))
        sizes = rows, whole, n, m, more
        call(library(), "weight_gradient", dy, x, steps, *sizes, dw, room)
    if whole < n:
        x = x if steps is None else spread(x, steps, dy.dtype)
        product = dy[:, whole:].T @ x
        dw[whole:].add_(product) if more else dw[whole:].copy_(product)


@torch.library.custom_op("bitllm::weight_gradient", mutates_args=())
def weight_gradient(dy: Tensor, x: Tensor, steps: Tensor | None) -> Tensor:
    """dy^T x of dy, (rows, n), and x, (rows, m), in float32; see add_weight_gradient."""
    dw = dy.new_empty((dy.shape[1], x.shape[1]), dtype=torch.float32)
    add_weight_gradient(dw, dy, x, steps, more=False)
    return dw


@weight_gradient.register_fake
def _(dy, x, steps):
    return dy.new_empty((dy.shape[1], x.shape[1]), dtype=torch.float32)


@torch.library.custom_op("bitllm::ternary_linear", mutates_args=())
def ternary_linear(integers: Tensor, steps: Tensor, held: Tensor) -> Tensor:
    """F.linear of what the integers, (..., m), stand for by `held`, (n, m) of 0, s and -s."""
    n, m = held.shape
    if steps.numel() % TILE or n % TILE or m % BYTES or not ready(m, held.dtype):
        return F.linear(spread(integers, steps, held.dtype), held)
    y, room = held.new_empty((*steps.shape, n)), held.new_empty((n, m), dtype=torch.int8)
    call(library(), "ternary_linear", integers, steps, held, steps.numel(), n, m, y, room)
    return y


@ternary_linear.register_fake
def _(integers, steps, held):
    return held.new_empty((*steps.shape, len(held)))


class _Linear(torch.autograd.Function):
    """F.linear by `held`, whose gradient is the weight's."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, integers: Tensor, steps: Tensor, held: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.rounded = steps.numel() > 0
        ctx.save_for_backward(integers if ctx.rounded else y, steps, held)
        return ternary_linear(integers, steps, held) if ctx.rounded else F.linear(y, held)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        (dy,), (x, steps, held) = grad, ctx.saved_tensors
        by = steps.flatten() if ctx.rounded else None
        dw = weight_gradient(dy.flatten(0, -2), x.flatten(0, -2), by)
        return dy @ held, None, None, None, dw


def linear(layer: BitLinear, y: Tensor, integers: Tensor, steps: Tensor) -> Tensor:
    """What the layer, whose weight is held, makes of what a norm gives: see training.norm."""
    return _Linear.apply(y, integers, steps, layer.held, layer.weight)
