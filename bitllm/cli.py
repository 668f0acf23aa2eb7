"""The whole command line: `bitllm COMMAND`, `python -m bitllm`, `python bitllm_core.py`."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

import torch.distributed as dist

import bitllm_core as core
from bitllm.export import add_export_flags, export_limits, llama_cpp_stream, run_export
from bitllm_core import DataConfig, ModelConfig, SamplingConfig, TrainConfig, require


def parser() -> argparse.ArgumentParser:
    """The core's commands, and those of the package."""
    whole, commands = core.command_parser("bitllm")
    train = commands.choices["train"]
    train.add_argument("--tensorboard", action="store_true", help="curves in DIR/tensorboard too")
    text = "curves at Weights & Biases too (default: bitllm)"
    train.add_argument("--wandb", nargs="?", const="bitllm", metavar="PROJECT", help=text)
    train.set_defaults(run=_train)
    _add_help(train, (ModelConfig, DataConfig, TrainConfig), defaults=False)
    commands.choices["generate"].set_defaults(run=_generate)
    _add_help(commands.choices["generate"], (SamplingConfig,), defaults=True)

    export = commands.add_parser("export", help="write a model for other programs")
    core.add_model_flags(export)
    add_export_flags(export)
    export.set_defaults(run=_export)

    bench = commands.add_parser("bench", help="speeds on this machine, as one JSON object")
    bench.add_argument("--quick", action="store_true", help="a small shape, seconds")
    bench.set_defaults(run=_bench)

    text = "memory, time and cost of a training"
    plan = commands.add_parser("plan", help=text)
    plan.set_defaults(run=_plan)
    info = commands.add_parser("info", help="device, versions and presets; or, with flags, a plan")
    info.set_defaults(run=_info)
    for command in (plan, info):
        command.add_argument("--preset", help="plan this, or what the flags change in it")
        command.add_argument("--gpus", type=int, metavar="N", help="plan for so many GPUs")
        for config in (ModelConfig, TrainConfig):
            core.add_fields(command, config)
        _add_help(command, (ModelConfig, TrainConfig), defaults=False)
    return whole


def field_help(config: type) -> dict[str, str]:
    """The string under each field of a configuration. OSError: its source is not there."""
    body = ast.parse(inspect.getsource(config)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for item, after in itertools.pairwise(body.body):
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(item.target, ast.Name)
            assert isinstance(after.value, ast.Constant)
            found[item.target.id] = str(after.value.value)
    return found


class _ExportNotes(core.Callback):
    """Say before a training why not every program could load the model."""

    def on_start(self, state: core.TrainState) -> None:
        for limit in export_limits(state.model.config):
            core.log.info(f"note: not every client will load this model: {limit}")


def _train(flags: argparse.Namespace) -> int:
    from bitllm.loggers import TensorBoard, WandB

    callbacks: list[core.Callback] = [_ExportNotes()]
    callbacks += [TensorBoard(flags.out)] if flags.tensorboard else []
    callbacks += [WandB(flags.out, flags.wandb)] if flags.wandb else []
    return core.train_command(flags, callbacks)


def _generate(flags: argparse.Namespace) -> int:
    if not flags.model.endswith(".gguf"):
        return core.generate_command(flags)
    sampling = core.from_flags(SamplingConfig, flags)
    core.print_text(flags.prompt, llama_cpp_stream(flags.model, flags.prompt, sampling))
    return 0


def _export(flags: argparse.Namespace) -> int:
    return run_export(flags, core.checkpoint_flag(flags))


def _bench(flags: argparse.Namespace) -> int:
    from bitllm.bench import bench

    print(json.dumps(bench(flags.quick)))
    return 0


def _plan(flags: argparse.Namespace) -> int:
    from bitllm.planner import plan

    model, _, config = core.preset("demo" if flags.preset is None else flags.preset)
    model = core.from_flags(ModelConfig, flags, model)
    config = core.from_flags(TrainConfig, flags, config)
    core.check_configs(model, config)
    gpus = 1 if flags.gpus is None else flags.gpus
    require(gpus >= 1, "gpus", gpus, "at least 1")
    require(gpus > 1 or not config.fsdp, "gpus", gpus, "several with fsdp")
    for line in plan(model, config, gpus):
        print(line)
    return 0


def _info(flags: argparse.Namespace) -> int:
    from bitllm.planner import info

    names = {item.name for kind in (ModelConfig, TrainConfig) for item in fields(kind)}
    if flags.preset is not None or flags.gpus is not None or names & vars(flags).keys():
        return _plan(flags)
    for line in info():
        print(line)
    return 0


def _add_help(command: argparse.ArgumentParser, configs: Sequence[type], defaults: bool) -> None:
    """Give each field's flag the comment behind the field, which Python itself forgets."""
    texts, values = {}, {}
    for config in configs:
        with contextlib.suppress(OSError):  # no source file, as in a notebook cell
            texts |= field_help(config)
        values |= {item.name: item.default for item in fields(config)}
    for action in command._actions:
        if action.dest in texts:
            default = f" (default: {values[action.dest]})" if defaults else ""
            action.help = (texts[action.dest] + default).replace("%", "%%")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a user's mistake, 130 after Ctrl-C."""
    status = core.run_command(parser(), arguments)
    if dist.is_available() and dist.is_initialized():
        # gloo's threads abort a process that ends in order, and NCCL's may wait for the dead
        sys.stdout.flush()
        os._exit(status)
    return status
