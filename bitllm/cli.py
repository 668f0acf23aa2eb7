"""The whole command line: `bitllm COMMAND`, `python -m bitllm`, `python bitllm_core.py`."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

import bitllm_core as core
from bitllm.chat import SAMPLING as CHAT_SAMPLING
from bitllm.chat import Chat, chat
from bitllm.companion import is_companion, recorded_persona, right_answers, talk
from bitllm.conversations import can_chat
from bitllm.dial import BY_CLOCK, dial
from bitllm.export import add_export_flags, export_limits, llama_cpp_stream, run_export
from bitllm.export.card import card_rows
from bitllm.export.common import open_source
from bitllm.mixture import describe, is_mixture
from bitllm.progress import ProgressBar, Terminal, never_silent
from bitllm.requests import Requests
from bitllm_core import PRESETS, DataConfig, ModelConfig, SamplingConfig, TrainConfig, require

_CONFIGS = {kind.__name__: kind for kind in (ModelConfig, DataConfig, TrainConfig, SamplingConfig)}
_HELP = {
    "out": "run folder (required)",
    "preset": "settings to begin from; default: those of the run, or demo's for a new one",
    "resume": "auto (default), never or must",
    "mirror": "second folder for the checkpoints",
    "model": "run folder, export, hf:OWNER/NAME or seed .pth (required)",
    "checkpoint": "last (default), best or a step",
    "prompt": "beginning of the text",
    "data": "file, folder or name of a data set",
    "text_column": "column of .jsonl, .parquet or hub rows",
    "encoding": "of local text, such as latin-1",
    "document_separator": "a line that ends a document of a .txt",
    "stride": "tokens the context moves; default: all of it",
    "dtype": "auto (default: the fast one here), float32, bfloat16 or float16",
}


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag, and exit 2; flags are explained when help is asked for."""

    def format_help(self) -> str:
        _add_help(self)  # not for every command: it reads the configurations' source
        return super().format_help()

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The core's commands, and those of the package."""
    whole, commands = core.command_parser(partial(_Parser, prog="bitllm"))
    whole.usage = "%(prog)s COMMAND [--FLAG VALUE] ..."
    whole.description = "Train and use ternary language models."
    train, generate = commands.choices["train"], commands.choices["generate"]
    train.add_argument("--tensorboard", action="store_true", help="curves in OUT/tensorboard too")
    text = "curves at Weights & Biases too (default: bitllm)"
    train.add_argument("--wandb", nargs="?", const="bitllm", metavar="PROJECT", help=text)
    train.set_defaults(run=_train)
    generate.set_defaults(run=_generate)
    evaluate = commands.choices["evaluate"]
    evaluate.set_defaults(run=_evaluate)
    text = 'who the companion is: a .json or "name=Luna; home=a boat"; default: as the run has it'
    evaluate.add_argument("--persona", help=text)
    text = (
        "multiple choice, instead of --data: a .jsonl or .parquet file, blimp, hellaswag or hf:NAME"
    )
    evaluate.add_argument("--tasks", help=text)
    evaluate._option_string_actions["--data"].required = False
    model = {"--model": {"required": True}, "--checkpoint": {"default": "last"}}
    core.add_command(commands, "chat", _chat, model, SamplingConfig)
    add_export_flags(core.add_command(commands, "export", _export, model))
    quick = {"action": "store_true", "help": "a small shape, seconds"}
    core.add_command(commands, "bench", _bench, {"--quick": quick})
    flags: dict[str, Any] = {
        "--preset": {"choices": [*PRESETS], "help": "plan this, as the other flags change it"}
    }
    gpus = {"type": int, "default": 1, "metavar": "N", "help": "plan for so many GPUs"}
    flags["--gpus"] = gpus
    about = {"--model": {"help": "print what is known about this model"}, **flags}
    for name, run, more in (("plan", _plan, flags), ("info", _info, about)):
        core.add_command(commands, name, run, more, ModelConfig, DataConfig, TrainConfig)
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


def _add_help(command: argparse.ArgumentParser) -> None:
    """Explain the core's flags; a field's by the string under it, which Python itself forgets."""
    for group in command._action_groups:
        texts, defaults = _HELP, {}
        if config := _CONFIGS.get(str(group.title)):
            with contextlib.suppress(OSError):  # no source file, as in a notebook cell
                texts = field_help(config)
            if config is SamplingConfig:  # elsewhere a preset or the run changes them
                known = vars(CHAT_SAMPLING if command.prog.endswith(" chat") else SamplingConfig())
                defaults = {k: f" (default: {v})" for k, v in known.items() if v is not None}
        for action in group._group_actions:
            if not action.help and action.dest in texts:
                text = texts[action.dest] + defaults.get(action.dest, "")
                action.help = text.replace("%", "%%")


class _ExportNotes(core.Callback):
    """Say before a training why not every program could load the model."""

    def on_start(self, state: core.TrainState) -> None:
        for limit in export_limits(state.model.config):
            core.log.info(f"note: not every client will load this model: {limit}")


def _program() -> str:
    """How this program was started."""
    script = Path(sys.argv[0])
    return f"python {script}" if script.suffix == ".py" and script.stem[0] != "_" else "bitllm"


def _saved_data(path: str) -> dict[str, Any]:
    """DataConfig of a run folder as it was saved; empty where there is none."""
    saved = (core.read_json(Path(path, "config.json")) or {}).get("data")
    return saved if isinstance(saved, dict) else {}


def _report(out: str, state: core.TrainState) -> None:
    """Print what the trained model says, and how its training went."""
    which, prompt = "best" if state.out_of_patience else "last", state.config.sample_prompt
    model, tokenizer = core.load_model(out, which)
    data = _saved_data(out)
    if is_companion(source := str(data.get("data"))) and not prompt:
        print("", *talk(model, tokenizer, source), "", sep="\n")
        if not state.config.minutes:  # it would take half a minute of them
            right = right_answers(model, tokenizer, source, data.get("persona"))
            print(
                f"right answers: {right['seen']:.0%} to questions as in training, "
                f"{right['combinations']:.0%} to new combinations, {right['phrasings']:.0%} to new "
                "phrasings"
            )
        print(f"talk with it: {_program()} chat --model {out}\n")
    elif can_chat(tokenizer):
        question = prompt or "hello"
        print(f"\n> {question}\n{Chat(model, tokenizer, CHAT_SAMPLING).answer(question)}\n")
    else:
        print(f"\n{prompt}{core.generate(model, tokenizer, prompt, SamplingConfig(120, seed=0))}\n")
    perplexity, vocab = math.exp(min(state.val_loss, 700)), model.config.vocab_size
    print(
        f"{state.skipped} steps skipped, {state.tokens:,} tokens, "
        f"{state.tokens / (state.train_seconds or math.inf):,.0f} tokens/s\n"
        f"training loss {state.loss:.4f}, perplexity {perplexity:.1f} (a uniform guess: {vocab})\n"
        f"checkpoint: {core.list_checkpoints(Path(out, 'checkpoints'))[-1]}; "
        f"the text above is from --checkpoint {which}"
    )


def _given(flags: argparse.Namespace) -> dict[str, Any]:
    """The fields of model and training that were given as flags, but the minutes."""
    names = {item.name for kind in (ModelConfig, TrainConfig) for item in fields(kind)}
    return {k: v for k, v in vars(flags).items() if k in names - {"minutes"}}


def _set_by_minutes(flags: argparse.Namespace) -> None:
    """With --minutes, set the flags that were not given as the dial chooses, for a new run."""
    saved = [] if flags.resume == "never" else filter(None, [flags.mirror, flags.out])
    saved = [found for place in saved if (found := core.read_json(Path(place, "config.json")))]
    minutes = getattr(flags, "minutes", None)
    if saved and not flags.preset:
        train = saved[0].get("train")
        minutes = minutes or (train.get("minutes") if isinstance(train, dict) else None)
    clash = minutes is not None and "max_steps" in flags
    require(not clash, "max_steps", getattr(flags, "max_steps", ""), BY_CLOCK)
    if "minutes" in flags and not saved and not flags.preset:
        _, data, _ = PRESETS["demo"]
        for config in dial(flags.minutes, core.from_flags(data, flags), **_given(flags)):
            vars(flags).update(vars(config))


def _train(flags: argparse.Namespace) -> int:
    from bitllm.loggers import TensorBoard, WandB

    callbacks: list[core.Callback] = [ProgressBar(), _ExportNotes(), Requests(flags.out)]
    callbacks += [TensorBoard(flags.out)] if flags.tensorboard else []
    callbacks += [WandB(flags.out, flags.wandb)] if flags.wandb else []
    if "persona" in flags:
        flags.persona = recorded_persona(flags.persona)
    err, out = Terminal(sys.stderr), Terminal(sys.stdout)
    redirected = contextlib.redirect_stderr(err), contextlib.redirect_stdout(out)
    with never_silent(), redirected[0], redirected[1]:
        _set_by_minutes(flags)
        return core.train_command(flags, callbacks, partial(_report, flags.out))


def _generate(flags: argparse.Namespace) -> None:
    if not flags.model.endswith(".gguf"):
        return core.generate_command(flags)
    sampling = core.from_flags(SamplingConfig(), flags)
    pieces = llama_cpp_stream(flags.model, flags.prompt, sampling)
    for piece in itertools.chain([flags.prompt], pieces, ["\n"]):
        print(piece, end="", flush=True)


def _evaluate(flags: argparse.Namespace) -> None:
    """print the loss on a text, or shares of right answers, as one JSON object"""
    if bool(flags.data) == bool(flags.tasks):
        raise ValueError("evaluate needs either --data TEXT or --tasks FILE")
    if flags.tasks:
        return _evaluate_tasks(flags)
    if not is_companion(flags.data):
        return core.evaluate_command(flags)
    if flags.persona is None:
        persona = _saved_data(flags.model).get("persona")
    else:
        persona = recorded_persona(flags.persona)
    model, tokenizer = core.load_model(flags.model, flags.checkpoint)
    print(json.dumps(right_answers(model, tokenizer, flags.data, persona)))


def _evaluate_tasks(flags: argparse.Namespace) -> None:
    from bitllm.tasks import evaluate_tasks

    device = core.choose_device(dtype=TrainConfig(dtype=flags.dtype).dtype)
    more = {"encoding": flags.encoding, "device": device}
    model, tokenizer = core.load_model(flags.model, flags.checkpoint)
    print(json.dumps(evaluate_tasks(model, tokenizer, flags.tasks, **more)))


def _step(name: str) -> str | int:
    return int(name) if name.isdecimal() else name


def _chat(flags: argparse.Namespace) -> None:
    """talk with a model that was trained on conversations"""
    chat(flags.model, _step(flags.checkpoint), core.from_flags(CHAT_SAMPLING, flags))


def _export(flags: argparse.Namespace) -> int:
    """write a model for other programs"""
    return run_export(flags, _step(flags.checkpoint))


def _bench(flags: argparse.Namespace) -> None:
    """print the speeds on this machine, as one JSON object"""
    from bitllm.bench import bench

    print(json.dumps(bench(flags.quick)))


def _plan(flags: argparse.Namespace) -> None:
    """memory, time and cost of a training"""
    from bitllm.planner import plan

    configs: Any = PRESETS[flags.preset or "demo"]
    if "minutes" in flags and not flags.preset:
        configs = dial(flags.minutes, core.from_flags(configs[1], flags), **_given(flags))
    model, config = core.from_flags(configs[0], flags), core.from_flags(configs[2], flags)
    core.check_configs(model, config)
    require(flags.gpus >= 1, "gpus", flags.gpus, "at least 1")
    require(flags.gpus > 1 or not config.fsdp, "gpus", flags.gpus, "several with fsdp")
    data = core.from_flags(configs[1], flags).data
    tokens = config.max_steps * config.batch_tokens
    mixed = [f"data: {data}", *describe(data, tokens)] if is_mixture(data) else []
    print(*mixed, *plan(model, config, flags.gpus), sep="\n")


def _info(flags: argparse.Namespace) -> None:
    """device, versions and presets; or, with flags, a model's facts or a plan"""
    from bitllm.planner import info

    if flags.model:
        rows = card_rows(open_source(flags.model, "last", {}))
        return print(*(f"{name}: {value}" for name, value in rows.items()), sep="\n")
    names = {item.name for kind in (ModelConfig, TrainConfig) for item in fields(kind)}
    names |= {"data"}
    if flags.preset or flags.gpus != 1 or names & vars(flags).keys():
        return _plan(flags)
    print(*info(), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a user's mistake, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # what a code page lacks becomes a question mark
        getattr(stream, "reconfigure", dict)(errors="replace")
    status = core.main(arguments, parser())
    try:
        sys.stderr.flush()
    except OSError:  # its reader is gone; Python's own flush at the end would make it a failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    if dist.is_available() and dist.is_initialized():
        # gloo's threads abort a process that ends in order, and NCCL's may wait for the dead
        sys.stdout.flush()
        os._exit(status)
    return status
