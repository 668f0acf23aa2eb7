"""torch.compile for the blocks and the softmax of a model, and CUDA graphs for its micro-steps."""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitllm.cpu import training
from bitllm.memory import halve_when_full, keep_freed_memory
from bitllm_core import (
    BitLM,
    Session,
    extension,
    first_line,
    log,
    log_total,
    logits_gradient,
    parameters_of,
)


def why_not_compile(device: torch.device) -> str:
    """Why torch.compile cannot work here; empty where it can."""
    if sys.platform == "win32" or device.type == "mps":
        return f"not used on {device.type} under {platform.system()}"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler found"
    return ""


def compiled_loss(
    model: BitLM, layers: Sequence[Any], softmax: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """`model.loss` with compiled blocks, of `layers`, and softmax, compiled unless it is given.

    ValueError where that cannot work here.

    The blocks are alike, so they are compiled once. The embedding stays eager: on a CPU, its
    compiled gradient is summed by several threads in no fixed order, and so two runs would differ.
    """
    why_not = why_not_compile(next(model.parameters()).device)
    if why_not:
        raise ValueError(why_not)
    blocks = [torch.compile(block, dynamic=False) for block in layers]
    if softmax is None:
        # dynamic: the last chunk is smaller; a GPU takes twice as long to divide by what may vary
        dynamic = None if next(model.parameters()).is_cuda else True
        parts = [torch.compile(part, dynamic=dynamic) for part in (log_total, logits_gradient)]
        softmax = (*parts, None)

    def loss(input_ids: Tensor, targets: Tensor) -> Tensor:
        with warnings.catch_warnings():  # the compiler looks at the input's .grad; it has none
            warnings.filterwarnings("ignore", message="The .grad attribute")
            return model.loss(input_ids, targets, blocks, softmax)

    return loss


def prepare(session: Session) -> None:
    """Compile a training session's loss, record its micro-step, and fit it into the memory.

    Compiling takes up to a minute where the compiler's cache is empty. One micro-step of zeros
    shows whether it works; where it does not, the session stays eager and the log says why.

    Args:
        session: the core's `Session`; its `loss`, `micro_step`, `gradients` and `hold` may be
            replaced.
    """
    halve_when_full(session)
    config, model, device = session.config, session.state.model, session.device.device
    if device.type == "cpu":
        keep_freed_memory()
    worth = 1e15 if device.type == "cuda" else 5e12  # a minute's work, guessed
    work = 6 * model.config.num_parameters * config.batch_tokens * config.max_steps
    if session.processes.sharded:
        return
    layers, softmax = training.parts_of(model, session.device.dtype)
    session.loss = eager = partial(model.loss, blocks=layers, softmax=softmax)
    if config.compile == "off":
        return
    if config.compile == "on" or work > worth:
        try:
            session.loss = compiled_loss(model, layers, softmax)
            log.info("torch.compile: on; that takes up to a minute the first time, later seconds")
            zeros = torch.zeros(session.micro_batch, session.context, dtype=torch.int64)
            with contextlib.suppress(torch.OutOfMemoryError):  # the first step will halve it
                with session.hold(session.device.dtype):
                    session.micro_step(zeros.to(device), zeros.to(device))
        except Exception as error:  # of whatever kind: it also imports the compiler
            log.warning(f"torch.compile: off ({type(error).__name__}: {first_line(error)})")
            session.loss = eager
        model.zero_grad()
    if device.type == "cuda":
        parameters = parameters_of(session.state.optimizers)
        cuda = extension("cuda", "CUDA graphs")
        step, dtype = session.micro_step, session.device.dtype
        windows = config.batch_tokens // session.context // session.processes.world_size
        session.micro_step = cuda.RecordedStep(step, model, dtype, parameters, windows)
        session.hold = contextlib.nullcontext  # the recording holds the weights itself
        for optimizer in session.state.optimizers:
            optimizer.step = cuda.RecordedUpdate(optimizer)
