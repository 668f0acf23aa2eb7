"""Rows of the results file, and the tables and figures that they make."""

import contextlib
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import bitllm_core as bit
from bitllm import export_packed
from tools.experiment_runs import split_fields
from tools.experiment_tables import FIRST, SHORT, TABLES


def read_rows(path: Path, table: str) -> list[dict[str, Any]]:
    """The rows of one table, without lines that a kill cut short."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if row["table"] == table]


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row in one write; after a line that was cut short, on a new line."""
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(row) + "\n")


def mean_and_range(values: list[float], digits: int) -> str:
    """mean ± half the range."""
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{half}"


def report(name: str, rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, its variants in order: mean over the seeds ± half the range."""
    lines = [
        "| variant | seeds | parameters | steps | tokens "
        "| loss | bits per byte | word perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in TABLES[name].variants:
        found = [row for row in rows if row["variant"] == variant.name]
        if not found:
            continue
        cells = [
            mean_and_range([row[key] for row in found], digits)
            for key, digits in (("loss", 3), ("bits_per_byte", 3), ("word_perplexity", 0))
        ]
        steps, tokens = (
            f"{statistics.mean(row[key] for row in found):,.0f}"
            for key in ("steps", "trained_tokens")
        )
        size = f"{found[0]['parameters'] / 1e6:.2f}M"
        lines.append(
            "| " + " | ".join([variant.name, str(len(found)), size, steps, tokens, *cells]) + " |"
        )
    return "\n".join(lines)


def draw(name: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte against tokens and, where the budget is minutes, against time.

    Lines are means over the seeds, areas ranges. The curve holds losses on a slice of the text;
    they become bits per byte, since vocabularies differ, by the ratio of the final evaluation. With
    a clock, the points of several seeds are at almost the same tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["thousand training tokens"]
    if TABLES[name].minutes:
        names.append("seconds, everything counted")
    figure, places = plt.subplots(
        1,
        len(names),
        figsize=(5 * len(names) + 1, 4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for variant in TABLES[name].variants:
        found = [row for row in rows if row["variant"] == variant.name and row["curve"]]
        if not found:
            continue
        shared = min(len(row["curve"]) for row in found)
        points = np.array([row["curve"][:shared] for row in found])  # (seeds, points, 3)
        scales = np.array([row["bits_per_byte"] / row["loss"] for row in found])
        bits = points[:, :, 2] * scales[:, None]
        for axes, column in zip(places[0], (0, 1), strict=False):
            x = points[:, :, column].mean(0) / (1000 if column == 0 else 1)
            (line,) = axes.plot(x, bits.mean(0), ".-", label=variant.name)
            axes.fill_between(x, bits.min(0), bits.max(0), alpha=0.25, color=line.get_color())
    for axes, label in zip(places[0], names, strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    places[0][0].set_ylabel("validation, bits per byte")
    places[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def costs(train_text: Path, work: Path) -> str:
    """Bytes and generation speed of ternary models and their dense twins, in Markdown.

    Neither depends on the training, so each model trains for one step of one window.
    """
    lines = [
        "| model | linear | parameters | bytes | tokens/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, shape in {"ten minutes": SHORT, "first defaults": FIRST}.items():
        for linear in ("ternary", "dense"):
            model_part, _, _ = split_fields({**shape, "linear": linear})
            model = bit.ModelConfig(**model_part)
            out = work / "runs" / f"{os.getpid()}-{linear}"
            window = model.max_position_embeddings
            train = bit.TrainConfig(max_steps=1, batch_tokens=window, eval_tokens=window)
            bit.train(model, bit.DataConfig(data=str(train_text)), train, out, callbacks=[])
            size = 2 * model.num_parameters  # float16
            if linear == "ternary":
                size = export_packed(out, out / "packed.safetensors").size
            net, _ = bit.load_model(out)
            speed = tokens_per_second(net)
            shutil.rmtree(out, ignore_errors=True)
            lines.append(
                f"| {name} | {linear} | {model.num_parameters / 1e6:.2f}M | {size:,} "
                f"| {speed:.0f} |"
            )
    return "\n".join(lines)


def tokens_per_second(model: bit.BitLM) -> float:
    """Of a text of 100 tokens, prompt included; the best of three."""
    sampling, taken = bit.SamplingConfig(max_new_tokens=100, seed=0), []
    for _ in range(3):
        start = time.perf_counter()
        count = len(list(bit.generate_tokens(model, [[0]], sampling)))
        taken.append((time.perf_counter() - start) / count)
    return 1 / min(taken)
