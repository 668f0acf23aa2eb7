"""Runs on disk: the latest numbers of one, its whole curve, and which one is the newest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.notebook.figures import figure_png, run_figure
from bitllm_core import MetricsLog, checkpoint_step, list_checkpoints, read_json


def run_facts(lines: list[dict[str, Any]], max_steps: int, batch_tokens: int) -> dict[str, str]:
    """The latest numbers of a run as text, by name."""
    step = max((line["step"] for line in lines), default=0)
    facts = {"step": f"{step:,} of {max_steps:,}"}
    last = next((line for line in reversed(lines) if "loss" in line), None)
    evaluation = next((line for line in reversed(lines) if "val_loss" in line), None)
    if last:
        left = (max_steps - step) * batch_tokens / max(last["tokens_per_s"], 1)
        facts["loss"] = f"{last['loss']:.3f}"
        facts["tokens/s"] = f"{last['tokens_per_s']:,.0f}"
        if "memory_bytes" in last:  # the core alone does not measure it
            facts["memory"] = f"{last['memory_bytes'] / 2**30:.2f} GiB"
        facts["time left"] = f"{left // 60:.0f} min {left % 60:02.0f} s"
    if evaluation:
        facts["validation loss"] = f"{evaluation['val_loss']:.3f} at step {evaluation['step']:,}"
    return facts


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; those with "loss" are steps, with "val_loss" evals."""
    return MetricsLog.read(Path(out) / "metrics.jsonl")


def show_run(out: str | Path, handle: Any = None) -> None:
    """Draw the whole curve of a run from its metrics.jsonl; outside a notebook, print one line.

    Args:
        handle: IPython's handle of an earlier display, to draw there again.

    Raises:
        FileNotFoundError: there is no run in `out`.
    """
    out = Path(out)
    saved = read_json(out / "config.json")
    if saved is None:
        raise FileNotFoundError(f"{out}: not a run folder (no config.json in it)")
    lines = read_metrics(out)
    facts = run_facts(lines, saved["train"]["max_steps"], saved["train"]["batch_tokens"])
    text = ", ".join(f"{name} {value}" for name, value in facts.items())
    if not kernel.in_notebook():
        print(text)
        return
    from IPython.display import display

    show = handle.update if handle else display
    show({"image/png": figure_png(run_figure(lines)), "text/plain": text}, raw=True)


def saved_step(out: str | Path) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    checkpoints = list_checkpoints(Path(out) / "checkpoints")
    return checkpoint_step(checkpoints[-1]) if checkpoints else 0


def furthest_run(folder: str | Path, name: str) -> Path | None:
    """The run called `name` below `folder` that was saved at the highest step; None without one."""
    runs = [path.parent for path in sorted(Path(folder).rglob("checkpoints"))]
    saved = [path for path in runs if path.name == name and saved_step(path)]
    return max(saved, key=saved_step, default=None)


def newest_run(folder: str | Path = "runs") -> Path | None:
    """The run in `folder` that was trained last; None if there is none."""
    runs = [p.parent for p in Path(folder).glob("*/metrics.jsonl")]
    return max(runs, key=lambda p: (p / "metrics.jsonl").stat().st_mtime, default=None)
