"""FSDP: processes that each hold a part of every parameter, for a model too large for one GPU.

Blocks are gathered one by one as they compute, and freed again; embedding and head stay for a
forward and backward pass. Gradients are summed where they are reduced.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bitllm.distributed import DistributedProcesses
from bitllm.muon import Muon, orthogonalize
from bitllm_core import (
    BitLinear,
    BitLM,
    ModelConfig,
    TrainConfig,
    has_bfloat16,
    initialize,
    make_optimizers,
    weight_quant,
)


class _Recomputed(torch.autograd.Function):
    """F.linear by a weight whose memory FSDP frees between forward and backward pass.

    Autograd would keep what multiplies, quantized or cast, of every block: in the end a whole
    model. Here it is made of the weight again, which FSDP has gathered again by then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: str) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.linear, ctx.dtype, x = linear, x.dtype, x.to(dtype)
        ctx.save_for_backward(x, weight)
        with torch.autocast(kind, enabled=False):
            return F.linear(x, _Recomputed.multiplier(weight, linear, dtype))

    @staticmethod
    def multiplier(weight: Tensor, linear: str, dtype: torch.dtype) -> Tensor:
        if linear != "dense":
            ternary, scale = weight_quant(weight.detach())
            weight = ternary.mul_(scale)
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        d_y = grad[0]
        d_x = d_y @ _Recomputed.multiplier(weight, ctx.linear, x.dtype)
        d_weight = d_y.flatten(0, -2).T @ x.flatten(0, -2)
        return d_x.to(ctx.dtype), d_weight.to(weight.dtype), None


class ShardedBitLinear(BitLinear):
    """A BitLinear of a sharded model: nothing is held, the weight is quantized as it is used."""

    def forward(self, input: Tensor) -> Tensor:
        return _Recomputed.apply(input, self.weight, self.linear)

    def hold(self, dtype: torch.dtype) -> None:
        pass


class ShardedBitLM(BitLM):
    """A BitLM of which no process holds all."""

    @contextlib.contextmanager
    def hold_weights(self, dtype: torch.dtype = torch.float32) -> Iterator[None]:
        try:
            yield
        finally:
            if not torch.is_grad_enabled():  # gathered, and no backward pass frees it
                for part in (*self.model.layers, self):
                    part.reshard()  # type: ignore[operator]


def sharded_model(config: ModelConfig, seed: int, device: torch.device) -> BitLM:
    """`BitLM(config, seed)` of which each process holds its rows of every parameter (FSDP2).

    It is made without memory and filled one parameter at a time: no process ever holds all of it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    with torch.device("meta"):
        model = ShardedBitLM(config, seed=None)
    for layer in model.bit_linears().values():
        layer.__class__ = ShardedBitLinear
    parts: list[Any] = [*model.model.layers, model]
    for part in parts:
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)  # the loss is divided by the step's tokens
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device=device)
    model.fill_rope()
    model.rope = model.rope.to(device)

    def keep(parameter: Tensor, values: Tensor) -> None:
        parameter.copy_(shard(parameter, values))

    initialize(model, torch.Generator().manual_seed(seed), keep)
    return model


@torch.no_grad()
def shard(parameter: Any, values: Tensor) -> Tensor:
    """`values`, whole, as a DTensor like the parameter; those of another shape as they are."""
    if not is_sharded(parameter) or values.shape != parameter.shape:  # AdamW's count of steps
        return values.clone()
    sharded: Any = torch.empty_like(parameter, dtype=values.dtype)
    rows = _rows_of(parameter)[parameter.device_mesh.get_local_rank()]
    sharded.to_local().copy_(values[rows])
    return sharded


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, whose module is slow to import."""
    return hasattr(tensor, "full_tensor")


def _rows_of(tensor: Any) -> list[slice]:
    """Which rows each process holds, as FSDP shares them out: the last may have fewer or none."""
    count, size = len(tensor), tensor.device_mesh.size()
    most = -(-count // size)
    return [slice(min(r * most, count), min((r + 1) * most, count)) for r in range(size)]


class ShardedProcesses(DistributedProcesses):
    """Every process holds and updates its rows of every parameter."""

    sharded = True

    def build_model(self, config: ModelConfig, seed: int, device: torch.device) -> BitLM:
        return sharded_model(config, seed, device)

    def make_optimizers(self, model: BitLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
        return make_optimizers(model, config, ShardedMuon)

    def owns(self, parameter: Tensor) -> bool:
        return True

    def micro_batches(self, x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Equally many for all, since blocks are gathered in each: targets of -100 fill up."""
        parts = super().micro_batches(x, y, size)
        most = math.ceil(math.ceil(len(x) / self.world_size) / size)
        empty = torch.zeros_like(x[:1]), torch.full_like(y[:1], -100)
        return [*parts, *[empty] * (most - len(parts))]

    def reduce_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        dist.all_reduce(loss)  # the gradients are sums already
        return loss

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        norm: Any = super().norm(gradients)
        return norm.full_tensor()

    def step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.step()

    def scatter(self, parameter: Tensor, values: Tensor) -> Tensor:
        return shard(parameter, values)

    def gather(self, tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
        return self.whole(tensors)

    def whole(self, tensors: dict[Any, Any]) -> dict[Any, Tensor]:
        """Gathered one at a time, to the main process' CPU."""
        found = {}
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
            if self.is_main:
                found[name] = tensor.detach().cpu()
        return found

    def whole_model(self, model: BitLM) -> BitLM | None:
        weights = self.whole(model.state_dict())
        if not weights:
            return None
        with torch.device("meta"):
            whole = BitLM(model.config, seed=None)
        whole.load_state_dict(weights, assign=True)
        del weights  # each goes as its layer is packed
        whole.fill_rope()
        return whole.freeze()


class ShardedMuon(Muon):
    """Muon for matrices of which each process holds some rows.

    The iteration needs whole ones. So of each batch, every process receives the rows of some
    matrices, makes those orthogonal and sends the rows back: the work is shared out.
    """

    def updates(self, directions: list[Any], steps: int) -> list[Any]:
        from torch.distributed.tensor import DTensor

        like, count = directions[0], len(directions)
        mesh, rows = like.device_mesh, [part.stop - part.start for part in _rows_of(like)]
        size, rank, (height, width) = mesh.size(), mesh.get_local_rank(), like.to_local().shape
        dtype = torch.bfloat16 if has_bfloat16(like.device) else torch.float32
        local = torch.stack([direction.to_local() for direction in directions]).to(dtype)
        shares = [len(range(r, count, size)) for r in range(size)]  # matrices of each process
        flat = torch.cat([local[r::size].flatten() for r in range(size)])
        there = [share * height * width for share in shares]
        here = [shares[rank] * n * width for n in rows]
        received = flat.new_empty(sum(here))
        dist.all_to_all_single(received, flat, here, there, mesh.get_group())
        parts = [
            p.view(shares[rank], n, width) for p, n in zip(received.split(here), rows, strict=True)
        ]
        if shares[rank]:
            whole = orthogonalize(torch.cat(parts, dim=1), steps).to(dtype)
            received = torch.cat([part.flatten() for part in whole.split(rows, dim=1)])
        dist.all_to_all_single(flat, received, there, here, mesh.get_group())
        for r, part in enumerate(flat.split(there)):
            local[r::size] = part.view(shares[r], height, width)
        options: Any = {"shape": like.shape, "stride": like.stride(), "run_check": False}
        return [
            DTensor.from_local(part, mesh, like.placements, **options)
            for part in local.to(like.dtype)
        ]
