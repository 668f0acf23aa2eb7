"""What it would save to gather a sharded model's ternary weights as trits, four in a byte.

    torchrun --nproc-per-node=2 tools/gather_trits.py                       # t4-1h's blocks
    torchrun --nproc-per-node=2 tools/gather_trits.py --windows 4 hidden_size=1024 \
        intermediate_size=2816 num_attention_heads=16 num_key_value_heads=8

Two ways to the weights that multiply, of one block, in turn, on a processor: float32 rows
are gathered and the whole is quantized in each process, as training does; or each process
quantizes and packs its own rows, and bytes are gathered and unpacked. Then a whole forward and
backward pass as it is, in which that happens twice for each block. Medians over the turns. The rows
must share out evenly.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bitllm_core as bit  # noqa: E402


def gathered(rows: Tensor) -> Tensor:
    """All processes' rows, of which each has as many."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def by_numbers(matrices: list[Tensor]) -> list[Tensor]:
    """As training does: gathered in one message, then quantized."""
    whole = gathered(torch.cat([rows.flatten() for rows in matrices]))
    sizes = [rows.numel() for rows in matrices]
    parts = whole.view(dist.get_world_size(), -1).split(sizes, dim=1)
    products = []
    for part, rows in zip(parts, matrices, strict=True):
        trits, scale = bit.weight_quant(part.reshape(-1, rows.shape[1]))
        products.append(trits * scale)
    return products


def by_trits(matrices: list[Tensor]) -> list[Tensor]:
    """Each process' rows quantized by the mean of all, packed, gathered, unpacked."""
    world = dist.get_world_size()
    sums = torch.stack([rows.abs().sum(dtype=torch.float64) for rows in matrices])
    dist.all_reduce(sums)  # real training would do it once a step, for all matrices
    scales = [
        (total / (rows.numel() * world)).float().clamp(min=1e-5)
        for total, rows in zip(sums, matrices, strict=True)
    ]
    packed = [
        bit.pack_trits((rows / scale).round().clamp(-1, 1).to(torch.int8))
        for rows, scale in zip(matrices, scales, strict=True)
    ]
    whole = gathered(torch.cat([rows.flatten() for rows in packed]))
    parts = whole.view(world, -1).split([rows.numel() for rows in packed], dim=1)
    return [
        bit.unpack_trits(part.reshape(-1, codes.shape[1]), rows.shape[1]).float() * scale
        for part, codes, rows, scale in zip(parts, packed, matrices, scales, strict=True)
    ]


def seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="of t4-1h's ModelConfig")
    flags = parser.parse_args()
    changes = {name: int(value) for name, _, value in (x.partition("=") for x in flags.changes)}
    config = dataclasses.replace(bit.PRESETS["t4-1h"][0], **changes)
    bit.World.of_environment(torch.device("cpu"))
    model, _ = bit.sharded_model(config, 0, torch.device("cpu"))
    block = [layer for name, layer in model.bit_linears().items() if ".layers.0." in name]
    matrices = [bit.own_rows(layer.weight.detach()) for layer in block]
    with torch.no_grad():
        pairs = zip(by_numbers(matrices), by_trits(matrices), strict=True)
        other = sum(((a - b).abs() > b.abs().max() / 2).sum().item() for a, b in pairs)
        ways = [
            [seconds(lambda w=w: w(matrices)) for w in (by_numbers, by_trits)]
            for _ in range(flags.turns)
        ]
    ids = torch.randint(config.vocab_size, (flags.windows, config.max_position_embeddings + 1))
    passes = []
    for _ in range(max(flags.turns // 6, 3)):
        passes.append(seconds(lambda: model.loss(ids[:, :-1], ids[:, 1:]).backward()))
        model.zero_grad()
    if dist.get_rank() == 0:
        numbers, trits = (statistics.median(x) for x in zip(*ways, strict=True))
        saved = statistics.median(2 * config.num_hidden_layers * (a - b) for a, b in ways)
        weights = sum(rows.numel() for rows in matrices) * dist.get_world_size()
        whole = statistics.median(passes)
        print(
            f"{other} trits differ, as the mean of rows' means is rounded otherwise\n"
            f"{config.num_parameters / 1e6:.0f}M, a block of {weights:,} weights: "
            f"{4 * weights:,} bytes in {1000 * numbers:.1f} ms, "
            f"{weights // 4:,} in {1000 * trits:.1f} ms ({numbers / trits:.2f} times as fast)\n"
            f"forward and backward of {ids[:, 1:].numel()} tokens: {whole:.2f} s, of which trits "
            f"would save {saved:.2f} s ({saved / whole:.0%})"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
