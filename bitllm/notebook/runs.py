"""Runs on disk: the latest numbers of one, its whole curve, and which one is the newest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.notebook.card import card, duration
from bitllm.notebook.language import number, say
from bitllm.notebook.samples import read_samples
from bitllm_core import MetricsLog, checkpoint_step, list_checkpoints, read_json


def run_facts(lines: list[dict[str, Any]], max_steps: int, batch_tokens: int) -> dict[str, str]:
    """The latest numbers of a run as text, by name."""
    step = max((line["step"] for line in lines), default=0)
    facts = {"step": say("{step:,} of {steps:,}", step=step, steps=max_steps)}
    last = next((line for line in reversed(lines) if "loss" in line), None)
    evaluation = next((line for line in reversed(lines) if "val_loss" in line), None)
    if last:
        left = (max_steps - step) * batch_tokens / max(last["tokens_per_s"], 1)
        facts["loss"] = number(last["loss"], ".3f")
        facts["tokens/s"] = number(last["tokens_per_s"], ",.0f")
        if "memory_bytes" in last:  # the core alone does not measure it
            facts["memory"] = number(last["memory_bytes"] / 2**30, ".2f") + " GiB"
        facts["time left"] = say("about {time} left", time=duration(left)) if left else ""
    if evaluation:
        facts["validation loss"] = number(evaluation["val_loss"], ".3f")
        facts["validated at"] = say("step {step:,}", step=evaluation["step"])
    return facts


def expected_steps(train: dict[str, Any], lines: list[dict[str, Any]]) -> int:
    """How many steps a run will have; of one that the clock ends, as many as it seems by now.

    train: a TrainConfig, as a dict.
    """
    if not train.get("minutes"):
        return train["max_steps"]
    last = next((line for line in reversed(lines) if "train_seconds" in line), None)
    step = max((line["step"] for line in lines), default=1)
    if last is None or any(line.get("final") for line in lines):
        return step
    return max(step, round(last["step"] * 60 * train["minutes"] / max(last["train_seconds"], 1)))


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; those with "loss" are steps, with "val_loss" evals."""
    return MetricsLog.read(Path(out) / "metrics.jsonl")


@dataclass(frozen=True)
class RunStatus:
    """How far a run has come, by its newest checkpoint."""

    step: int
    max_steps: int
    finished: bool  # there is no step left to do: all are done, or more would only overfit

    def __str__(self) -> str:
        steps = say("{step:,} of {steps:,} steps", step=self.step, steps=self.max_steps)
        if not self.finished:
            return say("{steps} done; will resume", steps=steps)
        if self.step >= self.max_steps:
            return say("complete ({steps})", steps=steps)
        return say("ended early ({steps})", steps=steps)


def run_status(out: str | Path) -> RunStatus | None:
    """How far the run in `out` has come; None where none has begun."""
    saved = read_json(Path(out) / "config.json")
    if saved is None:
        return None
    lines, step, train = read_metrics(out), saved_step(out), saved["train"]
    steps = expected_steps(train, lines)
    ended = step > 0 and any(line.get("final") and line["step"] == step for line in lines)
    if train.get("minutes"):
        return RunStatus(step, max(steps, step), ended)
    return RunStatus(step, steps, step >= steps or (ended and bool(train.get("patience"))))


def drawing(out: str | Path, head: str = "", hint: str = "") -> dict[str, str]:
    """A run on disk as the live display shows it, in HTML and in plain text.

    Raises:
        FileNotFoundError: there is no run in `out`.
    """
    out = Path(out)
    saved = read_json(out / "config.json")
    if saved is None:
        raise FileNotFoundError(f"{out}: not a run folder (no config.json in it)")
    lines = read_metrics(out)
    max_steps = expected_steps(saved["train"], lines)
    facts = run_facts(lines, max_steps, saved["train"]["batch_tokens"])
    text = ", ".join(f"{say(name)} {value}" for name, value in facts.items() if value)
    return {
        "text/html": card(head or out.as_posix(), facts, lines, max_steps, read_samples(out), hint)
    } | {"text/plain": text}


def show_run(out: str | Path, handle: Any = None) -> None:
    """Draw the whole curve of a run from its metrics.jsonl; outside a notebook, print one line.

    Args:
        handle: IPython's handle of an earlier display, to draw there again.

    Raises:
        FileNotFoundError: there is no run in `out`.
    """
    page = drawing(out)
    if not kernel.in_notebook():
        print(page["text/plain"])
        return
    from IPython.display import display

    show = handle.update if handle else display
    show(page, raw=True)


def saved_step(out: str | Path) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    checkpoints = list_checkpoints(Path(out) / "checkpoints")
    return checkpoint_step(checkpoints[-1]) if checkpoints else 0


def furthest_run(folder: str | Path, name: str) -> Path | None:
    """The run called `name` below `folder` that was saved at the highest step; None without one."""
    runs = [path.parent for path in sorted(Path(folder).rglob("checkpoints"))]
    saved = [path for path in runs if path.name == name and saved_step(path)]
    return max(saved, key=saved_step, default=None)


PLACES = ("runs", "../runs", "models")


def newest_run(folder: str | Path = "runs") -> Path | None:
    """The run in `folder` that was trained last; None if there is none."""
    runs = [p.parent for p in Path(folder).glob("*/metrics.jsonl")]
    return max(runs, key=lambda p: (p / "metrics.jsonl").stat().st_mtime, default=None)


def find_model(where: str = "", drive: Path | None = None) -> Path | None:
    """A model for `load_model`: a path as it is, hf:OWNER/NAME as it is fetched; empty: the newest.

    The newest is looked for in PLACES (the notebook's runs, the command line's, what was uploaded)
    and in `drive`; None where there is none.

    Raises:
        FileNotFoundError: there is nothing at `where`.
        ConnectionError: the hub cannot be reached, or has no such model.
    """
    if where.startswith("hf:"):
        from bitllm.export.hub import on_this_disk  # the one-cell notebook has no exports

        return on_this_disk(where)
    if where:
        if not Path(where).expanduser().exists():
            raise FileNotFoundError(f"{where}: nothing there; give a run folder, a file or hf:NAME")
        return Path(where).expanduser()
    found = []
    for place in (*map(Path, PLACES), *([drive] if drive else [])):
        found += [path.parent for path in place.glob("*/checkpoints") if saved_step(path.parent)]
        found += [*place.glob("*.safetensors"), *place.glob("*.gguf")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
