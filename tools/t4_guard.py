"""Run a training as a T4 would have to, on any machine, and refuse what a T4 cannot do.

A T4 (compute capability 7.5) has float16 tensor cores and no bfloat16; torch emulates the latter,
many times slower. `T4Guard` looks at every operator that torch dispatches and raises on

- a bfloat16 tensor, as input or output;
- flash and cuDNN attention, which need compute capability 8.0 [1, 2]: on a T4
  `scaled_dot_product_attention` has the memory-efficient kernel and the plain products;
- 8-bit float and block-scaled products, which need 8.9 or 9.0 [3], and flex_attention, whose
  template is a Triton matrix product.

Triton's own matrix products (`max_autotune`) fall to plain multiply-adds below 8.0 [4]. The
compiler makes them only where its settings ask for them, so `T4Guard` checks those settings.

[1] pytorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_sm_version: flash attention
    from sm80 on.
[2] the same file, check_cudnn_hardware_support: sm80 on; memory-efficient attention: sm50 on.
[3] pytorch, aten/src/ATen/native/cuda/ScaledBlas.cpp: _scaled_mm wants 8.9, 9.0 or 9.4+.
[4] triton 3.3 release notes: tensor-core support for Turing removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bitllm_core as core

REFUSED = (
    "_scaled_dot_product_flash_attention",  # not ..._for_cpu, which has another name
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_cudnn_attention_forward",
    "_scaled_mm",
    "_scaled_grouped_mm",
    "_grouped_mm",
    "flex_attention",
    "flex_attention_backward",
)


class NotOnT4(RuntimeError):
    """An operator or a dtype that a T4 does not have."""


class T4Guard(TorchDispatchMode):
    """A context in which every operator is checked; `seen` counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __enter__(self) -> T4Guard:
        import torch._inductor.config as settings

        for name in ("max_autotune", "max_autotune_gemm"):
            if getattr(settings, name, False):
                raise NotOnT4(f"torch._inductor.config.{name}: Triton matrix products")
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] = self.seen.get(name, 0) + 1
        if name in REFUSED:
            raise NotOnT4(f"{name}: needs compute capability 8.0 or more")
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bfloat16:
                raise NotOnT4(f"{name}: a bfloat16 tensor {tuple(leaf.shape)}")
        return out


@contextlib.contextmanager
def as_on_t4() -> Iterator[None]:
    """No bfloat16 hardware, and on a GPU memory-efficient attention only."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(core, "has_bfloat16", return_value=False))
        if torch.cuda.is_available():
            stack.enter_context(sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]))
        yield
