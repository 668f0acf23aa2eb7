"""Norms, gates and rounding of compiled training on a CPU: plain C, one pass over each row.

torch's compiler makes four to six passes through the memory of each, and more on the way back. The
operators here are torch's own kind, so that a compiled block can call them and be differentiated.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitllm.cpu import build
from bitllm.cpu.products import add_weight_gradient, linear, ready
from bitllm_core import BitLinear, BitLM, Block, ModelConfig, attend

SOURCE = Path(__file__).with_name("training.c")
PART = 64  # rows, as in training.c
SIGNATURES = {
    "norm": "ppfiiippi",
    "norm_back": "ppppiippi",
    "gated": "pppfiiippi",
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
    """Call a function of the library, with tensors as pointers."""
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(library(dtype), name)(*pointers, torch.get_num_threads())


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _sums(x: Tensor) -> Tensor:
    """Room for the partial sums of a weight's gradient."""
    rows, n = _rows(x)
    return x.new_zeros((-(-rows // PART), n), dtype=torch.float32)


@torch.library.custom_op("bitllm::norm", mutates_args=())
def norm(
    x: Tensor, weight: Tensor, eps: float, rounded: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x, float32 (..., n), in 8 bits if `rounded`, as `dtype`; and each row's factor."""
    x = x.contiguous()
    y, factors = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1])
    _call("norm", dtype, x, weight, eps, rounded, *_rows(x), y, factors)
    return y, factors


@torch.library.custom_op("bitllm::norm_back", mutates_args=())
def norm_back(dy: Tensor, x: Tensor, weight: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, sums = torch.empty_like(x), _sums(x)
    _call("norm_back", dy.dtype, dy, x, weight, factors, *_rows(x), dx, sums)
    return dx, sums.sum(0)


@torch.library.custom_op("bitllm::gated", mutates_args=())
def gated(
    gate: Tensor, up: Tensor, weight: Tensor, eps: float, rounded: bool
) -> tuple[Tensor, Tensor]:
    """The same of silu(gate) * up, in their type."""
    gate, up = gate.contiguous(), up.contiguous()
    y, factors = torch.empty_like(gate), weight.new_empty(gate.shape[:-1])
    _call("gated", gate.dtype, gate, up, weight, eps, rounded, *_rows(gate), y, factors)
    return y, factors


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
def _(x, weight, eps, rounded, dtype):
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1])


@norm_back.register_fake
def _(dy, x, weight, factors):
    return torch.empty_like(x), torch.empty_like(weight)


@gated.register_fake
def _(gate, up, weight, eps, rounded):
    return torch.empty_like(gate), weight.new_empty(gate.shape[:-1])


@gated_back.register_fake
def _(dy, gate, up, weight, factors):
    return torch.empty_like(gate), torch.empty_like(up), torch.empty_like(weight)


def _keep(count: int) -> Any:
    """Save the first `count` inputs and the rows' factors for the way back."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:count], output[1])

    return setup_context


norm.register_autograd(
    lambda ctx, dy, _: (*norm_back(dy, *ctx.saved_tensors), None, None, None),
    setup_context=_keep(2),
)
gated.register_autograd(
    lambda ctx, dy, _: (*gated_back(dy, *ctx.saved_tensors), None, None),
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


class FusedBlock(nn.Module):
    """A block of a model in training, whose norms also round for what reads them."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.block: Any = block
        self.dtype = dtype  # of products
        features = block.self_attn.q_proj.in_features
        self.linear = linear if ready(features, dtype) else BitLinear.__call__

    def read(self, x: Tensor, by: Any) -> Tensor:
        """What a block's layers read of x through the norm `by`."""
        rounded = self.block.mlp.up_proj.linear == "ternary"
        return norm(x.float(), by.weight, by.eps, rounded, self.dtype)[0]

    def forward(self, x: Tensor, rope: Tensor, cache: None, mask: None) -> Tensor:
        attn, mlp = self.block.self_attn, self.block.mlp
        y = self.read(x, self.block.input_layernorm)
        projected = [self.linear(layer, y) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
        y = attn.mix(projected, rope, cache, mask, attend_in_parts)
        x = x + self.linear(attn.o_proj, self.read(y, attn.attn_sub_norm))
        y = self.read(x, self.block.post_attention_layernorm)
        gate, up = self.linear(mlp.gate_proj, y), self.linear(mlp.up_proj, y)
        by = mlp.ffn_sub_norm
        y, _ = gated(gate, up, by.weight, by.eps, mlp.up_proj.linear == "ternary")
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
