"""Compare the memory that `info` plans with what training takes; on Linux.

Each case trains in processes of its own, on the CPU in float32: one step and the gradients of a
second, in two micro-batches each. The measured figure is the peak memory of the first process
(VmHWM) less what it held before training. A small model is trained in it first, so that all
libraries are loaded; their code (RssFile) is not counted. glibc is told to return each freed block
(mmap_threshold); with --glibc, a second figure shows what it takes by itself.

    python tools/plan_check.py                                     # the cases of docs/scaling.md
    python tools/plan_check.py --preset t4-1h --windows 3          # one of your own
    python tools/plan_check.py --preset t4-1h --processes 2 --fsdp hidden_size=768
"""

import argparse
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bitllm_core as bit  # noqa: E402
from bitllm.planner import memory_parts  # noqa: E402

TUNABLES = "glibc.malloc.mmap_threshold=65536"
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
LARGE = {  # 0.3 billion parameters
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
}


@dataclasses.dataclass(frozen=True)
class Case:
    preset: str = "t4-1h"
    windows: int = 1
    """per micro-batch in each process; a step has two micro-batches"""
    processes: int = 1
    fsdp: bool = False
    changes: dict[str, int | str] = dataclasses.field(default_factory=dict)
    """fields of the preset's ModelConfig"""

    def configs(self) -> tuple[bit.ModelConfig, bit.TrainConfig]:
        model, _, train = bit.PRESETS[self.preset]
        model = dataclasses.replace(model, **self.changes)
        tokens = 2 * self.processes * self.windows * model.max_position_embeddings
        return model, dataclasses.replace(
            train,
            batch_tokens=tokens,
            micro_batch_size=self.windows,
            save_every_minutes=0,  # a save gathers everything in the first process
            fsdp=self.fsdp,
            device="cpu",
            dtype="float32",
            compile="off",
        )

    def __str__(self) -> str:
        model, _ = self.configs()
        changes = "".join(f" {k}={v}" for k, v in self.changes.items())
        if self.changes == LARGE:
            changes = " (see LARGE)"
        return (
            f"{self.preset}{changes}, {model.num_parameters / 1e6:.0f}M, {self.windows} x "
            f"{model.max_position_embeddings} tokens in {self.processes} "
            f"process{'es' * (self.processes > 1)}" + " with fsdp" * self.fsdp
        )


CASES = [
    Case("seed"),
    Case("t4-1h"),
    Case("t4-1h", windows=3),
    Case("t4-1h", processes=2),
    Case("t4-1h", processes=2, fsdp=True),
    Case("t4-1h", windows=3, processes=2, fsdp=True),
    Case(processes=2, fsdp=True, changes=LARGE),
]
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024, "vocab_size": 4096}
QUICK = [Case(windows=2, changes=SHAPE), Case(processes=2, fsdp=True, changes=SHAPE)]


def held(name: str) -> int:
    """Bytes of this process as Linux counts them, such as VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def train_and_print(case: Case, folder: Path) -> None:
    """Train in this process, print its memory at the second update and end there."""
    model, train = case.configs()
    data = bit.DataConfig(data=str(folder / "text.txt"))
    small = dataclasses.replace(model, **SMALL)
    warm = dataclasses.replace(train, max_steps=1, batch_tokens=16 * 16, micro_batch_size=1)
    bit.train(small, data, warm, folder / "warm", callbacks=())
    if os.environ["RANK"] == "0":
        bit.prepare_data(data, model.vocab_size, model.max_position_embeddings, folder / "run")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, updates = held("RssAnon"), 0

    def at_update(optimizer, *_):
        nonlocal updates
        updates += isinstance(optimizer, torch.optim.AdamW)  # there is one in each update
        if updates == 2:
            print(json.dumps(held("VmHWM") - held("RssFile") - before), flush=True)
            if dist.is_initialized():
                dist.barrier()  # until the other processes have come as far
            os._exit(0)

    register_optimizer_step_pre_hook(at_update)
    bit.train(model, data, train, folder / "run", callbacks=())


def measure(case: Case, glibc: bool = False) -> int:
    """Bytes that training took; `glibc`: with the freed memory that glibc keeps."""
    words = random.Random(0).choices([f"w{i:x}" for i in range(4000)], k=20_000)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        Path(folder, "text.txt").write_text(" ".join(words))
        free.bind(("127.0.0.1", 0))
        port, started = free.getsockname()[1], []
        free.close()
        for rank in range(case.processes):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.processes}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            world |= {} if glibc else {"GLIBC_TUNABLES": TUNABLES}
            command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(case))]
            started.append(
                subprocess.Popen(
                    [*command, folder],
                    env=os.environ | {name: str(value) for name, value in world.items()},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        answers = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(answers[0][1])
    return json.loads(answers[0][0])


def planned(case: Case) -> int:
    model, train = case.configs()
    parts = memory_parts(model, train, torch.float32, case.processes, case.windows)
    return sum(parts.values())


def compare(cases: list[Case], glibc: bool = False) -> list[float]:
    """Print a line for each case; return the errors of the plan, as shares of what is measured."""
    errors = []
    for case in cases:
        plan, measured = planned(case), measure(case)
        errors.append(plan / measured - 1)
        print(
            f"{case}: planned {plan / 2**20:,.0f} MB, measured {measured / 2**20:,.0f} MB, "
            f"{errors[-1]:+.1%}" + (f", {measure(case, True) / 2**20:,.0f} MB" if glibc else ""),
            flush=True,
        )
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--preset", help="one case of this preset")
    parser.add_argument("--windows", type=int, default=1, help="per micro-batch in each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--glibc", action="store_true", help="also without the malloc setting")
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="of ModelConfig")
    flags = parser.parse_args()
    if flags.child:
        train_and_print(Case(**json.loads(flags.child)), Path(flags.changes[0]))
    elif flags.preset:
        pairs = [item.partition("=") for item in flags.changes]
        changes = {k: int(v) if v.isdecimal() else v for k, _, v in pairs}
        case = Case(flags.preset, flags.windows, flags.processes, flags.fsdp, changes)
        compare([case], flags.glibc)
    else:
        compare(CASES, flags.glibc)


if __name__ == "__main__":
    main()
