"""Norms, gates and rounding of compiled training on a CPU: plain C, one pass over each row.

torch's compiler makes four to six passes through the memory of each, and more on the way back. The
operators here are torch's own kind, so that a compiled block can call them and be differentiated.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitllm.cpu import attention, build
from bitllm.cpu.products import BYTES, add_weight_gradient, call, linear, ready
from bitllm_core import BitLinear, BitLM, Block, ModelConfig, attend

SOURCE = Path(__file__).with_name("training.c")
PART = 64  # rows, as in training.c
PLAIN, ROUNDED, INTEGERS = range(3)  # the forms in which norms give what layers read
SIGNATURES = {
    "norm": "ppfiiippppi",
    "norm_back": "ppppiippi",
    "gated": "pppfiiippppi",
    "gated_back": "pppppiipppi",
    "causal_softmax": "pfiiiipi",
    "causal_softmax_back": "ppfiiiipi",
    "log_total": "piipi",
    "logits_gradient": "pppiii",
}
TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t"}


@cache
def library(dtype: torch.dtype) -> Any:
    """The library for activations of `dtype`; None without a C compiler that has OpenMP."""
    if dtype not in TYPES:
        return None
    flags = ["-march=native", "-fopenmp", "-ffp-contract=fast", f"-DNUMBER={TYPES[dtype]}"]
    choices = ([*flags, "-mprefer-vector-width=512"], flags)
    return next(filter(None, (build(SOURCE, SIGNATURES, *choice) for choice in choices)), None)


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    call(library(dtype), name, *arguments)


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _sums(x: Tensor) -> Tensor:
    """Room for the partial sums of a weight's gradient."""
    rows, n = _rows(x)
    return x.new_zeros((-(-rows // PART), n), dtype=torch.float32)


Read = tuple[Tensor, Tensor, Tensor, Tensor]


def _read(x: Tensor, form: int, dtype: torch.dtype) -> Read:
    """Room for the output of a norm of x, (..., n).

    That is y; or 8-bit integers and each row's step, for which y stands without memory, so that
    they have a gradient; and each row's factor.
    """
    rows, integers = x.shape[:-1], form == INTEGERS
    y = x.new_empty((1,) * x.ndim if integers else x.shape, dtype=dtype).expand(x.shape)
    whole = x.new_empty(x.shape if integers else (0,), dtype=torch.int8)
    steps = x.new_empty(rows if integers else (0,), dtype=torch.float32)
    return y, whole, steps, x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("bitllm::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, eps: float, form: int, dtype: torch.dtype) -> Read:
    """RMSNorm of x, float32 (..., n), as `dtype` in this form: y, integers, steps, factors."""
    x, read = x.contiguous(), _read(x, form, dtype)
    _call("norm", dtype, x, weight, eps, form, *_rows(x), *read)
    return read


@torch.library.custom_op("bitllm::norm_back", mutates_args=())
def norm_back(dy: Tensor, x: Tensor, weight: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, sums = torch.empty_like(x), _sums(x)
    _call("norm_back", dy.dtype, dy, x, weight, factors, *_rows(x), dx, sums)
    return dx, sums.sum(0)


@torch.library.custom_op("bitllm::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, weight: Tensor, eps: float, form: int) -> Read:
    """The same of silu(gate) * up, in their type."""
    gate, up, read = gate.contiguous(), up.contiguous(), _read(gate, form, gate.dtype)
    _call("gated", gate.dtype, gate, up, weight, eps, form, *_rows(gate), *read)
    return read


@torch.library.custom_op("bitllm::gated_back", mutates_args=())
def gated_back(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate, up and the weight."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up, sums = torch.empty_like(gate), torch.empty_like(up), _sums(gate)
    tensors = (dy, gate, up, weight, factors)
    _call("gated_back", dy.dtype, *tensors, *_rows(gate), d_gate, d_up, sums)
    return d_gate, d_up, sums.sum(0)


@norm.register_fake
def _(x, weight, eps, form, dtype):
    return _read(x, form, dtype)


@norm_back.register_fake
def _(dy, x, weight, factors):
    return torch.empty_like(x), torch.empty_like(weight)


@gated.register_fake
def _(gate, up, weight, eps, form):
    return _read(gate, form, gate.dtype)


@gated_back.register_fake
def _(dy, gate, up, weight, factors):
    return torch.empty_like(gate), torch.empty_like(up), torch.empty_like(weight)


def _keep(count: int) -> Any:
    """Save the first `count` inputs and the rows' factors for the way back."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:count], output[3])

    return setup_context


norm.register_autograd(
    lambda ctx, dy, *_: (*norm_back(dy, *ctx.saved_tensors), None, None, None),
    setup_context=_keep(2),
)
gated.register_autograd(
    lambda ctx, dy, *_: (*gated_back(dy, *ctx.saved_tensors), None, None),
    setup_context=_keep(3),
)


@torch.library.custom_op("bitllm::causal_softmax", mutates_args=())
def causal_softmax(scores: Tensor, scale: float, first: int) -> Tensor:
    """Softmax of scale * scores, (B, H, Q, K), of the queries from `first` on, up to themselves."""
    scores, (Q, K) = scores.contiguous(), scores.shape[2:]
    p = torch.empty_like(scores)
    _call("causal_softmax", p.dtype, scores, scale, first, Q, p.numel() // K, K, p)
    return p


@torch.library.custom_op("bitllm::causal_softmax_back", mutates_args=())
def causal_softmax_back(dp: Tensor, p: Tensor, scale: float, first: int) -> Tensor:
    """The gradient of the scores."""
    dp, (Q, K) = dp.contiguous(), p.shape[2:]
    d = torch.empty_like(p)
    _call("causal_softmax_back", p.dtype, dp, p, scale, first, Q, p.numel() // K, K, d)
    return d


@causal_softmax.register_fake
def _(scores, scale, first):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@causal_softmax_back.register_fake
def _(dp, p, scale, first):
    return torch.empty_like(p)


def _keep_p(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.options = inputs[1:]


causal_softmax.register_autograd(
    lambda ctx, dp: (causal_softmax_back(dp, *ctx.saved_tensors, *ctx.options), None, None),
    setup_context=_keep_p,
)


def log_total(logits: Tensor) -> Tensor:
    """The core's."""
    totals = logits.new_empty((len(logits), 1), dtype=torch.float32)
    _call("log_total", logits.dtype, logits, *_rows(logits), totals)
    return totals


def logits_gradient(logits: Tensor, total: Tensor, target: Tensor) -> Tensor:
    """The core's, in place."""
    _call("logits_gradient", logits.dtype, logits, total, target.contiguous(), *_rows(logits))
    return logits


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention in plain products of bfloat16, up to 512 tokens, where they are faster.

    A quarter of the queries at a time, against the keys up to its end.
    """
    T = q.shape[2]
    if not (causal and q.dtype == k.dtype == torch.bfloat16 and T <= 512 and T % 4 == 0):
        return attend(q, k, v, mask, causal)
    parts = []
    for start in range(0, T, T // 4):
        end = start + T // 4
        scores = q[:, :, start:end] @ k[:, :, :end].mT
        parts.append(causal_softmax(scores, q.shape[3] ** -0.5, start) @ v[:, :, :end])
    return torch.cat(parts, 2)


def attend_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention in tiles, of which there is the library, where the shapes allow it."""
    if causal and attention.fits(q, k):
        return attention.attention(q, k, v)[0]
    return attend_in_parts(q, k, v, mask, causal)


def attention_here() -> Any:
    """The fastest attention on this processor."""
    return attend_by_heads if attention.library() else attend_in_parts


class FusedBlock(nn.Module):
    """A block of a model in training, whose norms also round for what reads them."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.block: Any = block
        self.dtype = dtype  # of products
        self.ternary = block.mlp.up_proj.linear == "ternary"
        self.tiles = ready(block.self_attn.q_proj.in_features, dtype)
        self.attend = attention_here()

    def form(self, features: int) -> int:
        """The form in which layers with so many inputs read them."""
        if not self.ternary:
            return PLAIN
        return INTEGERS if self.tiles and features % BYTES == 0 else ROUNDED

    def read(self, x: Tensor, by: Any) -> Read:
        """What a block's layers read of x through the norm `by`."""
        return norm(x.float(), by.weight, by.eps, self.form(x.shape[-1]), self.dtype)

    def linear(self, layer: BitLinear, read: Read) -> Tensor:
        return linear(layer, *read[:3]) if self.tiles else layer(read[0])

    def forward(self, x: Tensor, rope: Tensor, cache: None, mask: None) -> Tensor:
        attn, mlp = self.block.self_attn, self.block.mlp
        y = self.read(x, self.block.input_layernorm)
        projected = [self.linear(layer, y) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
        y = attn.mix(projected, rope, cache, mask, self.attend)
        x = x + self.linear(attn.o_proj, self.read(y, attn.attn_sub_norm))
        y = self.read(x, self.block.post_attention_layernorm)
        gate, up = self.linear(mlp.gate_proj, y), self.linear(mlp.up_proj, y)
        by = mlp.ffn_sub_norm
        y = gated(gate, up, by.weight, by.eps, self.form(gate.shape[-1]))
        return x + self.linear(mlp.down_proj, y)


def has_kernels(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether there are any for such a model here, on the CPU."""
    return config.block == "bitnet" and library(dtype) is not None


def parts_of(model: BitLM, dtype: torch.dtype) -> tuple[list[Any], Any]:
    """The blocks and softmax for `model.loss` in `dtype` here: the core's own without kernels."""
    layers, cpu = list(model.model.layers), next(model.parameters()).device.type == "cpu"
    if not cpu or not has_kernels(model.config, dtype):
        return layers, None
    add = add_weight_gradient if ready(model.config.hidden_size, dtype) else None
    return [FusedBlock(layer, dtype) for layer in layers], (log_total, logits_gradient, add)
