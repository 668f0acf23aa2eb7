"""A training session that continues with smaller micro-batches when a GPU runs out of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from bitllm_core import Session, log


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
