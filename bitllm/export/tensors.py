"""Tensors of safetensors files: checked before memory is taken, and made a model again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitllm_core import BitLinear, BitLM, ModelConfig, config_from, first_line

_CODES = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8"}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that others may read, as far as the umask lets them.

    The library's own `save_file` would leave it readable for its owner only.
    """
    from safetensors.torch import save

    path.write_bytes(save({name: x.contiguous() for name, x in tensors.items()}, metadata))


def open_tensors(path: Path) -> Any:
    """A safetensors file, to be used in a `with` statement; ValueError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({first_line(error)})") from error


def ternary_bytes(model: BitLM, tensors: dict[str, Tensor]) -> int:
    """Bytes of the tensors that stand for ternary matrices, their scales included."""
    linears = model.bit_linears()
    return sum(x.nbytes for name, x in tensors.items() if name.rpartition(".")[0] in linears)


def meta_model(settings: Any, num_tensors: int, path: Path) -> BitLM:
    """A frozen model on the meta device, which an unknown file is compared with."""
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its settings are not a JSON object")
    names = {f.name for f in fields(ModelConfig)}
    known = {key: value for key, value in settings.items() if key in names}
    config = config_from(ModelConfig, known, path)
    if config.num_hidden_layers > num_tensors:
        raise ValueError(
            f"{path}: num_hidden_layers={config.num_hidden_layers}, but only {num_tensors} tensors"
        )
    with torch.device("meta"):
        return BitLM(config, seed=None).freeze()


def check_tensors(file: Any, expected: dict[str, Tensor], path: Path) -> None:
    """ValueError where names, types or shapes in a safetensors file differ from those expected."""
    for name in sorted(expected.keys() ^ set(file.keys())):
        raise ValueError(f"{path}: tensor {name} is {'missing' if name in expected else 'unknown'}")
    for name, tensor in expected.items():
        part = file.get_slice(name)
        found = (part.get_dtype(), tuple(part.get_shape()))
        wanted = (_CODES[tensor.dtype], tuple(tensor.shape))
        if found != wanted:
            raise ValueError(
                f"{path}: tensor {name} is {found[0]} {found[1]}, expected {wanted[0]} {wanted[1]}"
            )


@torch.no_grad()
def fill_model(
    config: ModelConfig,
    read_ternary: Callable[[str, BitLinear], tuple[Tensor, Tensor]],
    read: Callable[[str], Tensor],
) -> BitLM:
    """A frozen model made of a file's tensors.

    Args:
        read_ternary: (name, layer) -> trits, int8 (O, I), and their scale, one number.
        read: name of a parameter -> its values.
    """
    model = BitLM(config, seed=None).freeze()
    for name, linear in model.bit_linears().items():
        trits, scale = read_ternary(name, linear)
        if trits.abs().max() > 1 or not scale.isfinite().all():
            raise ValueError(f"tensor {name} is not ternary, or its scale is not finite")
        linear.set_ternary(trits, scale.float().view(()))
    for name, value in model.named_parameters():
        value.copy_(read(name))
    return model
