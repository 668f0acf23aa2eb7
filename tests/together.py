"""What each process of a test does that trains with several: `python together.py FOLDER TASK ...`.

A task is NAME or NAME:KEY=VALUE:...; its run goes to FOLDER/NAME. KEY is a field of TrainConfig,
`linear`, `mixed` (a mixture with pydocs), or what shall go wrong in process 1: `kill`, `stop`,
`hang`, `memory`, `nan`=STEP.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import bitllm_core as bit
from bitllm import clock, distributed
from tests import tiny

TRAIN = dataclasses.replace(
    tiny.TRAIN,
    max_steps=20,
    batch_tokens=160,  # 10 windows: no whole share for three
    log_every_steps=1,
    eval_every_steps=5,
    eval_tokens=250,
    learning_rate=0.005,  # slow enough for a curve that rounding does not change much
    adamw_learning_rate=0.002,
)
TROUBLES = ("kill", "stop", "hang", "memory", "nan")
plain_apply, plain_loss = bit.apply_gradients, bit.BitLM.loss


class Trouble(bit.Callback):
    """Makes process 1 fail at a step, as asked; once, where a file can tell that it did."""

    def __init__(self, out: Path, asked: dict[str, int]) -> None:
        self.out, self.asked, self.step = out, asked, 0

    def now(self, name: str) -> bool:
        here = os.environ.get("RANK") == "1" and self.asked.get(name) == self.step + 1
        mark = self.out / f"did-{name}.tmp"
        if not here or mark.exists():
            return False
        mark.touch()
        return True

    def apply(self, optimizers, *rest):
        if self.now("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.now("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.now("hang"):
            time.sleep(10)
        self.step += 1
        return plain_apply(optimizers, *rest)

    def loss(self, model, input_ids, targets, **parts):
        if torch.is_grad_enabled() and len(input_ids) > 1 and self.now("memory"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        nats = plain_loss(model, input_ids, targets, **parts)
        return nats * float("nan") if torch.is_grad_enabled() and self.now("nan") else nats


def train(folder: Path, task: str) -> bit.TrainState:
    name, *options = task.split(":")
    asked = {key: value for key, _, value in (option.partition("=") for option in options)}
    trouble = Trouble(folder / name, {k: int(asked.pop(k)) for k in TROUBLES if k in asked})
    bit.apply_gradients = trouble.apply
    bit.BitLM.loss = lambda *arguments, **parts: trouble.loss(*arguments, **parts)
    model = dataclasses.replace(tiny.MODEL, linear=asked.pop("linear", "ternary"))
    mixed = asked.pop("mixed", "false") == "true"
    changes = {key: json.loads(value) for key, value in asked.items()}
    config = dataclasses.replace(TRAIN, **changes)
    text = str(folder / "text.txt")
    data = bit.DataConfig(data=f"{text}:0.7,pydocs:0.3" if mixed else text)
    return bit.train(model, data, config, folder / name, callbacks=())


def end_group() -> None:
    """Or gloo's threads may abort a process that ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> int:
    folder = Path(sys.argv[1])
    bit.log_to(sys.stderr)
    clock.AFTERWARDS_S = 0.0  # or nothing is left of a second for steps
    distributed.TIMEOUT_S = float(os.environ.get("TIMEOUT", "300"))
    for task in sys.argv[2:]:
        try:
            state = train(folder, task)
        except ValueError as error:
            print(task, f"refused: {error}", flush=True)
        except OSError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            end_group()
            return 1
        else:
            print(task, state.step, state.skipped, state.stop_signal, flush=True)
    end_group()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # as the command line does: gloo's threads may abort one that ends in order
