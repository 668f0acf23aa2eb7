"""One row of a table: a variant, trained with one seed and measured."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import bitllm_core as bit
from tools.experiment_patches import PATCHES, replaced
from tools.experiment_tables import SEED_SCRIPT, Table, Variant

SAMPLE = bit.SamplingConfig(max_new_tokens=80, seed=0)
"""of the text that each row keeps"""


@dataclass(frozen=True)
class Clock:
    """Seconds since a run's process started: of the wall clock, or of CPU time ("cpu")."""

    kind: str = "wall"
    started: float = field(default_factory=time.time)

    def seconds(self) -> float:
        return time.time() - self.started if self.kind == "wall" else sum(os.times()[:4])


# -----------------------------------------------------------------------------
# Texts


def cut_text(source: Path, size: int, folder: Path) -> Path:
    """A file with the first `size` bytes of a text, cut at the end of a line; 0: `source`."""
    if not size:
        return source
    path = folder / f"{source.stem}-{size}.txt"
    if not path.is_file():
        data = source.read_bytes()[:size]
        bit.write_atomically(path, data[: data.rfind(b"\n") + 1])
    return path


def python_texts(folder: Path) -> tuple[Path, Path]:
    """The documentation that comes with Python in two files; every tenth topic validates."""
    train, valid = folder / "pydocs-train.txt", folder / "pydocs-valid.txt"
    if not (train.is_file() and valid.is_file()):
        topics = [text for text, _ in bit.read_pieces("pydocs", "train", bit.DataConfig())]
        bit.write_atomically(valid, "".join(topics[::10]).encode())
        del topics[::10]
        bit.write_atomically(train, "".join(topics).encode())
    return train, valid


# -----------------------------------------------------------------------------
# What is trained


def split_fields(changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of each of the three configurations; ValueError for a field of none."""
    kinds = (bit.ModelConfig, bit.DataConfig, bit.TrainConfig)
    names = [{item.name for item in dataclasses.fields(kind)} for kind in kinds]
    for key in changes:
        bit.require(any(key in n for n in names), "changes", key, "a field of a configuration")
    return [{k: v for k, v in changes.items() if k in n} for n in names]


@dataclass(frozen=True)
class Run:
    """A variant and a seed, the texts that were given, and the folder for files."""

    table: Table
    variant: Variant
    seed: int
    train_text: Path
    valid_text: Path
    work: Path

    def texts(self) -> tuple[Path, Path]:
        """Training text, and the part of the validation text that the final evaluation reads."""
        train, valid = self.train_text, self.valid_text
        if self.table.pydocs:
            train, valid = python_texts(self.work)
        return (
            cut_text(train, self.table.train_bytes, self.work),
            cut_text(valid, self.table.valid_bytes, self.work),
        )

    def configs(self) -> tuple[bit.ModelConfig, bit.DataConfig, bit.TrainConfig]:
        """The core's defaults, then the table's base, then the variant's changes."""
        valid = python_texts(self.work)[1] if self.table.pydocs else self.valid_text
        changes = {
            "data": str(self.texts()[0]),
            "validation_data": str(cut_text(valid, 30_000, self.work)),
            "eval_tokens": 8192,
            "keep_checkpoints": 1,
            "seed": self.seed,
            **self.table.base,
            **self.variant.changes,
        }
        model_part, data_part, train_part = split_fields(changes)
        train = bit.TrainConfig(**train_part)
        steps, every = 1_000_000, 0
        if self.table.tokens:
            steps = self.table.tokens // train.batch_tokens
            every = max(steps // 4, 1)
        train = dataclasses.replace(train, max_steps=steps, eval_every_steps=every)
        return bit.ModelConfig(**model_part), bit.DataConfig(**data_part), train

    def token_files(self) -> Path:
        """The folder of the text's tokens, which all runs that read it so share."""
        model, data, _ = self.configs()
        size, context = model.vocab_size, model.max_position_embeddings
        folder = self.work / "tokens" / f"{Path(data.data).stem}-{size}-{context}"
        bit.prepare_data(data, size, context, folder)
        return folder

    def prepare(self) -> None:
        """Make the files that runs share, so that no two runs write the same file at a time."""
        self.configs()
        self.texts()
        if self.table.tokens:
            self.token_files()


# -----------------------------------------------------------------------------
# Training


class Recorder(bit.Callback):
    """Keeps the curve: tokens, seconds, validation loss on a fixed slice.

    With a deadline, evaluates ten times at equal intervals and stops the run when time is up.
    What earlier processes of a resumed run recorded is in a file beside their checkpoint.
    """

    def __init__(self, out: Path, clock: Clock, deadline: float = 0.0) -> None:
        self.out, self.clock, self.deadline = out, clock, deadline
        self.file = out / "recorded.json"
        recorded = self.file.read_text("utf-8") if self.file.exists() else "[0.0, []]"
        self.before, self.curve = json.loads(recorded)
        self.trained_at = 0.0

    def seconds(self) -> float:
        return self.before + self.clock.seconds()

    def on_checkpoint(self, state, path):
        bit.write_atomically(self.file, json.dumps([self.seconds(), self.curve]).encode())

    def on_step(self, state, metrics):
        self.trained_at = self.seconds()
        if not self.deadline:
            return
        if self.trained_at > self.deadline * (len(self.curve) + 1) / 10:
            tokens = np.fromfile(self.out / "data" / "validation.bin", "uint16")[:8192]
            device = bit.choose_device()
            loss = bit.total_loss(state.model, tokens, 0, device) / len(tokens)
            self.add(state, loss)
        if self.clock.seconds() >= self.deadline:
            state.stop_signal = 2

    def on_eval(self, state, metrics):
        if not metrics.get("final"):
            self.add(state, metrics["val_loss"])

    def add(self, state, loss):
        self.curve.append([state.tokens, round(self.seconds(), 1), round(loss, 4)])


@contextlib.contextmanager
def rate_by_the_clock(minutes: float, clock: Clock) -> Iterator[None]:
    """Schedule the learning rate by the share of the time that has passed, not of the steps."""
    start: list[float] = []
    scale = 1 << 20

    def make(factor):
        def by_clock(config, step, *_):
            if step < config.warmup_steps:
                return factor(config, step)
            now = clock.seconds()
            start.append(now)
            share = (now - start[0]) / max(minutes * 60 - start[0], 1)
            timed = dataclasses.replace(config, max_steps=scale, warmup_steps=0)
            return factor(timed, min(int(share * scale), scale - 1))

        return by_clock

    with replaced(bit, "learning_rate_factor", make):
        yield


def link_data(shared: Path, out: Path) -> None:
    (out / "data").mkdir(parents=True)
    for name in ("tokenizer.json", "data/train.bin", "data/validation.bin", "data/manifest.json"):
        os.link(shared / name, out / name)


def run_one(run: Run, clock: Clock, out: Path) -> dict[str, Any]:
    """Train in the folder `out` and measure; what the row in the results file holds.

    A run that was stopped resumes there if its budget is in tokens. One with a patch begins anew,
    for what patches remember is in no checkpoint. SystemExit if the run is stopped now.
    """
    model, data, train = run.configs()
    resumes = run.table.tokens and not run.variant.patch
    if not (resumes and (out / "data" / "manifest.json").exists()):
        shutil.rmtree(out, ignore_errors=True)
        if run.table.tokens:  # with a clock, tokenizing is part of the run
            link_data(run.token_files(), out)
    if run.variant.patch == SEED_SCRIPT:
        return run_seed_script(run, clock, out)
    train = dataclasses.replace(train, save_every_minutes=10.0 if resumes else 0.0)
    recorder = Recorder(out, clock, run.table.minutes * 60)
    with contextlib.ExitStack() as stack:
        callbacks: list[bit.Callback] = [recorder]
        if run.variant.patch:
            more = stack.enter_context(PATCHES[run.variant.patch]())
            callbacks += [more] if more else []
        if run.table.minutes:
            stack.enter_context(rate_by_the_clock(run.table.minutes, clock))
        state = bit.train(model, data, train, out, callbacks=callbacks)
        if run.table.tokens and state.stop_signal:
            raise SystemExit(f"stopped after {state.step} steps; the same command resumes")
        tokenizer = bit.load_tokenizer(out / "tokenizer.json")
        result = bit.evaluate(state.model, tokenizer, run.texts()[1])
        text = bit.generate(state.model, tokenizer, "", SAMPLE)
        trained = state.tokens  # as the patch counts them
    shutil.rmtree(out, ignore_errors=True)
    return {
        **{key: round(value, 5) for key, value in result.items()},
        "parameters": model.num_parameters,
        "steps": state.step,
        "trained_tokens": trained,
        "seconds": round(recorder.trained_at, 1),
        "train_seconds": round(state.train_seconds, 1),
        "curve": recorder.curve,
        "clock": clock.kind,
        "device": str(bit.choose_device()),
        "text": text,
    }


def run_seed_script(run: Run, clock: Clock, out: Path) -> dict[str, Any]:
    """The seed guide's script in the same time: its model, order of windows and AdamW.

    Its classes come from tests/seed_model.py. Left out are what it prints and saves on its way and
    its data loader's processes, whose cost is too small to measure.
    """
    from tests import seed_model

    torch.manual_seed(run.seed)
    train_text, valid_text = run.texts()
    out.mkdir(parents=True)
    lines = [x for x in train_text.read_text("utf-8").splitlines(keepends=True) if x.strip()]
    tokenizer = bit.train_tokenizer(lines, 30_000, kind="wordpiece")
    tokenizer.save(str(out / "tokenizer.json"))
    encoded = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
    ids = torch.tensor([i for line in encoded for i in line.ids])
    windows = ids.unfold(0, 513, 1)  # (N, 513): they overlap, and the script reads them in order
    model = seed_model.MiLLM(30_000, 512, 8, 2048, 6, 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step, now = 0, 0.0
    while now < run.table.minutes * 60:
        batch = windows[step * 16 : step * 16 + 16]
        optimizer.zero_grad()
        logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        step, now = step + 1, clock.seconds()
        print(f"seed script: step {step}, {now:.0f} s", file=sys.stderr)
    path = out / "mi_llm_checkpoint.pth"
    torch.save({"epoch": 0, "batch": step, "model_state_dict": model.state_dict()}, path)
    loaded = bit.load_model(path)
    result = bit.evaluate(*loaded, valid_text)
    text = bit.generate(*loaded, "", SAMPLE)
    shutil.rmtree(out, ignore_errors=True)
    return {
        **{key: round(value, 5) for key, value in result.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "trained_tokens": step * 16 * 512,
        "seconds": round(now, 1),
        "train_seconds": round(now, 1),
        "curve": [],
        "clock": clock.kind,
        "device": "cpu, float32",
        "text": text,
    }
