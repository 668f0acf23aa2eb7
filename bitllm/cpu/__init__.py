"""Two-bit kernels for generation on a CPU: plain C, compiled at the first use.

No torch operation multiplies by two-bit weights, and torch's own norm takes eight operations, most
of the time of a small model. Importing this module registers the kernels; without a C compiler
they are never ready, and plain torch computes the same bits.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bitllm_core import KERNELS, BitLinear

SOURCE = Path(__file__).with_name("kernels.c")
FEW_ROWS = 8  # above, unpacking once for a product of matrices is faster


LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}
INFERENCE = {"ternary_linear": "piiipppppi", "rms_norm": "ppfiip"}
"""What each function of kernels.c takes: pointers, integers, floats."""


def build(source: Path, signatures: dict[str, str], *flags: str) -> Any:
    """A library, compiled with more flags; None where there is no C compiler or it refuses."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform == "win32":
        return None
    base = [compiler, "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", *flags]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.so")
        command = [*base, str(source), "-o", str(file), "-lm"]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        library = ctypes.CDLL(str(file))
    for name, letters in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [LETTERS[letter] for letter in letters], None
    return library


@cache
def compiled() -> Any:
    """The library for this processor, or None.

    Compiling takes a fraction of a second, so nothing is cached on disk: a compiled file from
    elsewhere could have been made for another processor, or by somebody else.
    """
    choices = (["-march=native", "-fopenmp"], ["-march=native"], [])
    built = (build(SOURCE, INFERENCE, *flags) for flags in choices)
    return next(filter(None, built), None)


class _Call:
    """The arguments of `ternary_linear` for layers that share an input.

    They are made once, since making them takes longer than the kernel.
    """

    def __init__(self, layers: Sequence[BitLinear]) -> None:
        n, self.sizes = len(layers), [layer.out_features for layer in layers]
        self.packed = [layer.packed for layer in layers]  # keeps their memory where it is
        self.arguments = (
            *(layers[0].in_features, n),
            (ctypes.c_void_p * n)(*[packed.data_ptr() for packed in self.packed]),
            (ctypes.c_float * n)(*[layer.weight_scale.item() for layer in layers]),
            (ctypes.c_int * n)(*self.sizes),
        )
        self.width = sum(self.sizes)

    def fits(self, layers: Sequence[BitLinear]) -> bool:
        """Whether the layers still hold the weights that the arguments point to."""
        return len(self.packed) == len(layers) and all(
            packed is layer.packed for packed, layer in zip(self.packed, layers, strict=True)
        )

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        x, (*batch, size) = x.float().contiguous(), x.shape
        y = torch.empty((*batch, self.width))
        room = torch.empty(size + 3, dtype=torch.int8)
        compiled().ternary_linear(
            *(x.data_ptr(), x.numel() // size, *self.arguments),
            *(y.data_ptr(), room.data_ptr(), torch.get_num_threads()),
        )
        return y.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (y,)


class CpuKernels:
    """What `bitllm_core.KERNELS` asks for: a few rows on a CPU, where a C compiler is there."""

    def __init__(self) -> None:
        self._calls: WeakKeyDictionary[BitLinear, _Call] = WeakKeyDictionary()

    def ready(self, x: Tensor) -> bool:
        few = x.numel() <= FEW_ROWS * x.shape[-1] and x.device.type == "cpu"
        return few and compiled() is not None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight, size = x.float().contiguous(), weight.float(), x.shape[-1]
        y = torch.empty_like(x)
        pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
        compiled().rms_norm(*pointers[:2], eps, x.numel() // size, size, pointers[2])
        return y

    def ternary_linear(self, x: Tensor, layers: Sequence[BitLinear]) -> Sequence[Tensor]:
        call = self._calls.get(layers[0])
        if call is None or not call.fits(layers):
            call = self._calls[layers[0]] = _Call(layers)
        return call(x)


KERNELS.append(CpuKernels())
