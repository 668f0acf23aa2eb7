"""Several processes that train one model together, started by torchrun.

Each holds the whole model, takes its share of a step's windows, and updates its share of the
parameters, which the others receive. With FSDP (bitllm/fsdp.py) each holds a part of the model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bitllm_core import (
    BitLM,
    ModelConfig,
    Processes,
    TrainConfig,
    choose_device,
    extension,
    first_line,
    log,
    make_optimizers,
    parameters_of,
    require,
)

TIMEOUT_S = 600.0
"""Seconds without an answer from another process after which this one gives up."""
BUCKET_NUMBERS = 1 << 23
"""Numbers per message between processes, 32 MB; a larger tensor is one message."""
MESSAGES_AT_ONCE = 4


def join(model: ModelConfig, config: TrainConfig) -> Processes:
    """Meet the other processes that torchrun started, once in the life of this one.

    Raises:
        ValueError: too few GPUs, or windows in a step, for so many processes; or there is only one.
        ConnectionError: the others are not there.
    """
    size, windows = int(os.environ.get("WORLD_SIZE", "1")), config.batch_tokens
    windows //= model.max_position_embeddings
    several = "several processes, as of torchrun --nproc-per-node=2 bitllm_core.py train ..."
    require(size > 1 or not config.fsdp, "fsdp", True, several)
    require(size <= windows, "WORLD_SIZE", size, f"at most the {windows} windows of a step")
    meet(config.device)
    if config.fsdp:
        return extension("fsdp", "--fsdp").ShardedProcesses()
    return DistributedProcesses()


def meet(device: str = "auto") -> None:
    """Join the group of processes, where that is not done yet. ConnectionError, ValueError."""
    if not dist.is_initialized():
        with connection_errors():
            _init_process_group(choose_device(device).device)
    if dist.get_rank():
        log.setLevel(logging.CRITICAL)  # the main process logs for all


def _init_process_group(device: torch.device) -> None:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend, timeout = "gloo", timedelta(seconds=TIMEOUT_S)
    if device.type == "cuda":
        backend, local = "cpu:gloo,cuda:nccl", int(os.environ.get("LOCAL_RANK", "0"))
        count = torch.cuda.device_count()
        require(local < count, "LOCAL_RANK", local, f"one of this machine's {count} GPUs")
        torch.cuda.set_device(local)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a restart, with the addresses of dead processes in it
        store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)


@contextlib.contextmanager
def connection_errors() -> Iterator[None]:
    """Raise ConnectionError where an error means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            f"another process has ended or has not answered for {TIMEOUT_S:.0f} s "
            f"({first_line(error)}). The same command resumes from the last checkpoint"
        ) from error


class DistributedProcesses(Processes):
    """Every process has the whole model and steps the optimizers of its share of it."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.owners: dict[Tensor, int] = {}

    def guard(self) -> Any:
        return connection_errors()

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return _all_reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        return _all_reduce(values, dist.ReduceOp.MAX)

    def broadcast(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """The others wait as long as it takes, beyond the timeout, and end where it fails."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        if self.is_main:
            threading.Thread(target=run, name="main", daemon=True).start()
        while any(self.all_reduce_max([self.is_main and not future.done()])):
            time.sleep(0.05)
        failed = any(self.all_reduce_max([self.is_main and future.exception() is not None]))
        if self.is_main:
            return future.result()
        if failed:
            raise ChildProcessError("the main process could not begin; its message shows why")
        return None

    def share(self, count: int) -> slice:
        """Which of `count` things in a row are for this process."""
        rank, size = self.rank, self.world_size
        return slice(rank * count // size, (rank + 1) * count // size)

    def micro_batches(self, x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        part = self.share(len(x))
        return super().micro_batches(x[part], y[part], size) if part.stop > part.start else []

    def make_optimizers(self, model: BitLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
        optimizers = make_optimizers(model, config)
        self.owners = assign_owners(optimizers, self.world_size)
        return optimizers

    def owns(self, parameter: Tensor) -> bool:
        return self.owners[parameter] == self.rank

    def reduce_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        _exchange((bucket, dist.all_reduce) for bucket in _buckets([*gradients, loss]))
        return loss

    def step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        parameters = parameters_of(optimizers)
        for parameter in parameters:
            if not self.owns(parameter):
                parameter.grad = None  # the optimizer passes over it
        super().step(optimizers)
        with torch.no_grad():
            for rank in range(self.world_size):
                owned = (p for p in parameters if self.owners[p] == rank)
                _exchange((bucket, partial(dist.broadcast, src=rank)) for bucket in _buckets(owned))

    def gather(self, tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """The tensors of the others arrive on the CPU."""
        lists: list[Any] = [None] * self.world_size
        own = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        dist.all_gather_object(lists, own)
        found = dict(tensors)
        for rank in range(1, self.world_size):
            for name, shape, dtype in lists[rank]:
                if self.is_main:
                    found[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(found[name], rank)
                elif self.rank == rank:
                    dist.send(tensors[name].cpu(), 0)
        return found


def assign_owners(
    optimizers: Sequence[torch.optim.Optimizer], world_size: int
) -> dict[Tensor, int]:
    """Which process updates each parameter, so that all have about as much to do.

    Muon's Newton-Schulz multiplies a matrix by its square, which costs its size times its shorter
    side; AdamW passes over its numbers once.
    """
    cost: dict[Tensor, int] = {}
    for optimizer in optimizers:
        once = isinstance(optimizer, torch.optim.AdamW)
        for p in parameters_of([optimizer]):
            cost[p] = p.numel() * (1 if once else min(p.shape))
    load, owners = [0] * world_size, {}
    for parameter in sorted(cost, key=lambda p: -cost[p]):  # stable: the same in all processes
        owners[parameter] = min(range(world_size), key=load.__getitem__)
        load[owners[parameter]] += cost[parameter]
    return owners


def _all_reduce(values: Sequence[float], operation: Any) -> list[float]:
    tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _exchange(messages: Iterable[tuple[list[Tensor], Callable[..., Any]]]) -> None:
    """Send each bucket as one tensor and copy back what arrives; a few are under way at once."""

    def receive(bucket: list[Tensor], flat: Tensor, work: Any) -> None:
        work.wait()
        for tensor, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(values.view_as(tensor))

    sent: list[tuple[list[Tensor], Tensor, Any]] = []
    for bucket, send in messages:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        sent.append((bucket, flat, send(flat, async_op=True)))
        if len(sent) == MESSAGES_AT_ONCE:
            receive(*sent.pop(0))
    for message in sent:
        receive(*message)
