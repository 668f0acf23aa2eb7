"""Memory of a training: micro-batches that fit, smaller when a GPU is full; kept for reuse."""

from __future__ import annotations

import ctypes
import math
import os
import sys

import torch
from torch import Tensor

from bitllm_core import Device, ModelConfig, Session, log


def memory_size() -> int:
    """Bytes of main memory that the machine has; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    return math.prod(map(os.sysconf, ("SC_PAGE_SIZE", "SC_PHYS_PAGES")))


def windows_that_fit(model: ModelConfig, device: Device, world_size: int = 1) -> int:
    """Windows of a micro-batch that the memory holds: the more, the faster (docs/log.md). What
    blocks keep for backward takes about a sixth of it in all, or half of a GPU's free
    (docs/gpu.md).
    """
    free = torch.cuda.mem_get_info()[0] if device.device.type == "cuda" else 0
    room = free // 2 or ((round(memory_size() / 2**30) or 8) << 26) // world_size
    numbers = model.num_hidden_layers * (8 * model.hidden_size + 3 * model.intermediate_size)
    return room // (device.dtype.itemsize * numbers * model.max_position_embeddings)


def halve_when_full(session: Session) -> None:
    """Let a step that does not fit be made again with half the micro-batch, then the same in all.

    Not where processes share out the parameters: they would wait for one another.

    Args:
        session: the core's; its `gradients` is replaced.
    """
    plain = session.gradients

    def gradients(windows: Tensor) -> Tensor:
        while True:
            try:
                loss = plain(windows)
            except torch.OutOfMemoryError:
                if session.micro_batch == 1:
                    raise
            else:
                # as small in all processes, so that a resume, with the main one's, adds up alike
                [less] = session.processes.all_reduce_max([-session.micro_batch])
                session.micro_batch = -int(less)
                return loss
            session.micro_batch //= 2
            log.warning(f"out of GPU memory: {session.micro_batch} windows at once from here on")
            session.state.model.zero_grad()
            torch.cuda.empty_cache()

    if not session.processes.sharded:
        session.gradients = gradients


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next step; until the process ends.

    By default it gives tensors of megabytes back to the system, which clears every page again when
    the next step asks for it: a sixth of `demo`'s time (docs/log.md). Only glibc has this switch;
    elsewhere nothing changes, nor where a variable already says what malloc shall do.
    """
    asked = any(name.startswith("MALLOC_") for name in os.environ)
    if asked or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)
