"""What a sharded model saves by gathering its ternary weights as trits, four in a byte.

    torchrun --nproc-per-node=2 tools/gather_trits.py                       # t4-1h
    torchrun --nproc-per-node=2 tools/gather_trits.py hidden_size=1024 intermediate_size=2816 \
        num_attention_heads=16 num_key_value_heads=8 max_position_embeddings=128

Forward and backward passes of two models, in turn, on this machine's processor: one is gathered as
training does it, the other in float32 and quantized by each process. Both must give the same loss.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bitllm_core as bit  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="of t4-1h's ModelConfig")
    flags = parser.parse_args()
    changes = {name: int(value) for name, _, value in (x.partition("=") for x in flags.changes)}
    config = dataclasses.replace(bit.PRESETS["t4-1h"][0], **changes)
    cpu = torch.device("cpu")
    world = bit.World.of_environment(cpu)
    as_trits, _ = bit.sharded_model(config, 0, cpu)
    with mock.patch.object(bit.TritGather, "attach", return_value=False):
        as_numbers, _ = bit.sharded_model(config, 0, cpu)
    ids = torch.randint(config.vocab_size, (flags.windows, config.max_position_embeddings + 1))
    seconds = []
    for turn in range(flags.turns + 1):
        taken, losses = [], []
        for model in (as_numbers, as_trits):
            world.total(0)  # all begin
            start = time.perf_counter()
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            world.total(0)
            taken.append(time.perf_counter() - start)
            losses.append(loss.item())
            model.zero_grad()
        assert losses[0] == losses[1], losses
        if turn:  # the first makes what is kept
            seconds.append(taken)
    if world.rank == 0:
        numbers, trits = (statistics.median(x) for x in zip(*seconds, strict=True))
        ratios = sorted(b / a for a, b in seconds)
        print(
            f"{config.num_parameters / 1e6:.0f}M, {ids[:, 1:].numel()} tokens in each of "
            f"{world.size} processes, forward and backward: {numbers:.2f} s gathered in float32, "
            f"{trits:.2f} s as trits; ratio {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} turns)"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
