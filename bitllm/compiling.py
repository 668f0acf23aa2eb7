"""torch.compile for the blocks and the softmax of a model."""

from __future__ import annotations

import platform
import shutil
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from bitllm_core import BitLM, token_probabilities


def why_not_compile(device: torch.device) -> str:
    """Why torch.compile cannot work here; empty where it can."""
    if sys.platform == "win32" or device.type == "mps":
        return f"not used on {device.type} under {platform.system()}"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler found"
    return ""


def compiled_loss(model: BitLM) -> Callable[[Tensor, Tensor], Tensor]:
    """`model.loss` with compiled blocks and softmax; ValueError where that cannot work here.

    The blocks are alike, so they are compiled once. The embedding stays eager: on a CPU, its
    compiled gradient is summed by several threads in no fixed order, and so two runs would differ.
    """
    why_not = why_not_compile(next(model.parameters()).device)
    if why_not:
        raise ValueError(why_not)
    blocks = [torch.compile(block, dynamic=False) for block in model.model.layers]
    # dynamic: the last chunk is a smaller one
    probabilities = torch.compile(token_probabilities, dynamic=True)

    def loss(input_ids: Tensor, targets: Tensor) -> Tensor:
        with warnings.catch_warnings():  # the compiler looks at the input's .grad; it has none
            warnings.filterwarnings("ignore", message="The .grad attribute")
            return model.loss(input_ids, targets, blocks, probabilities)

    return loss
