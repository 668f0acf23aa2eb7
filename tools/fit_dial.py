"""Fit the law of bitllm/dial.py to the runs in docs/results.jsonl, and print what it misses.

    python tools/fit_dial.py

Only ternary runs on WikiText-2, no patches; some are of earlier recipes and learned a little less.
Exponents are published ones; E, A, B and G of `bits_per_byte` are fitted: E and B by least squares,
A and G from a grid. REPEATED is given: docs/log.md tells what others miss.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bitllm import dial  # noqa: E402
from bitllm_core import PRESETS, DataConfig, Device, ModelConfig  # noqa: E402
from tools.experiment_figures import read_rows  # noqa: E402
from tools.experiment_tables import TABLES  # noqa: E402

TEXT = 10.8e6
"""bytes of WikiText-2's training text"""
USED = {
    "recipe": ("adamw_learning_rate 0.015",),
    "longer": ("adamw_learning_rate 0.015",),
    "shape": ("vocab_size 2048", "vocab_size 8192", "vocab_size 16384"),
    "ten-minutes": ("ternary, 5.4M",),
    "gap-14M": ("ternary",),
    "laptop": ("batch_tokens 4096",),
}
"""Tables and variants of docs/results.jsonl."""
OTHERS: list[tuple[str, ModelConfig, float, float]] = [
    ("an hour", ModelConfig(8192, 512, 1024, 6, 8, 4, 256), 6_144_000, 1.356),
    ("laptop to its end", ModelConfig(16_384, 256, 512, 8, 4, 2, 256), 11_468_800, 1.341),
    ("one minute", ModelConfig(16_384, 256, 512, 2, 4, 2, 128), 443_392, 1.727),
    ("two minutes", ModelConfig(16_384, 256, 512, 2, 4, 2, 128), 1_310_720, 1.556),
    ("three minutes", ModelConfig(8192, 256, 512, 2, 4, 2, 128), 2_058_240, 1.553),
    ("three minutes", ModelConfig(16_384, 256, 512, 2, 4, 2, 128), 2_351_104, 1.489),
    ("three minutes", ModelConfig(16_384, 256, 512, 3, 4, 2, 128), 1_931_264, 1.497),
    ("five minutes", ModelConfig(16_384, 256, 512, 3, 4, 2, 256), 3_051_520, 1.426),
    ("ten minutes", ModelConfig(16_384, 256, 512, 5, 4, 2, 256), 6_306_475, 1.351),
    ("ten minutes", ModelConfig(16_384, 256, 512, 2, 4, 2, 128), 6_010_880, 1.442),
    ("ten minutes, AVX-512", ModelConfig(16_384, 256, 512, 4, 4, 2, 256), 4_070_000, 1.386),
    ("ten minutes, AVX-512", ModelConfig(16_384, 256, 512, 5, 4, 2, 256), 3_575_808, 1.399),
    ("an hour of one core", ModelConfig(16_384, 256, 512, 8, 4, 2, 256), 12_800_000, 1.328),
    ("ten minutes' steps", ModelConfig(16_384, 256, 512, 5, 4, 2, 256), 1879 * 4096, 1.359),
    ("ten minutes' steps", ModelConfig(16_384, 256, 512, 6, 4, 2, 256), 1675 * 4096, 1.336),
    ("ten minutes' steps", ModelConfig(16_384, 256, 512, 8, 4, 2, 256), 1357 * 4096, 1.353),
    ("ten minutes' steps", ModelConfig(16_384, 384, 768, 3, 6, 3, 256), 1520 * 4096, 1.343),
    ("ten minutes' steps", ModelConfig(16_384, 512, 1024, 2, 8, 4, 256), 1340 * 4096, 1.361),
]
"""Runs that have no row there: name, shape, tokens, bits per byte. Ten minutes' steps are
those that each shape makes with AMX."""
STEPS = [
    ("AMX", 16_384, 2, 128, 1024, False, 2.09e12, 100),
    ("AMX", 2048, 2, 128, 1024, False, 2.09e12, 57),
    ("AMX", 16_384, 5, 256, 4096, False, 2.09e12, 396),
    ("AMX", 2048, 2, 128, 2048, True, 2.09e12, 70),
    ("AMX", 8192, 2, 128, 2048, True, 2.09e12, 96),
    ("AMX", 16_384, 2, 128, 2048, True, 2.09e12, 133),
    ("AMX", 16_384, 3, 128, 2048, True, 2.09e12, 155),
    ("AMX", 16_384, 5, 256, 4096, True, 2.09e12, 333),
    ("AVX-512", 16_384, 2, 128, 1024, False, 0.423e12, 150),
    ("AVX-512", 2048, 2, 128, 2048, True, 0.423e12, 101),
    ("AVX-512", 16_384, 2, 128, 2048, True, 0.423e12, 247),
    ("AVX-512", 16_384, 3, 256, 4096, True, 0.423e12, 516),
    ("AVX-512", 16_384, 5, 256, 4096, True, 0.423e12, 625),
]
"""Steps, width 256: machine, vocabulary, layers, context, tokens, whether compiled, FLOP/s, and
what one took, ms: the median of some, in turns."""
MACHINES = {
    "AMX": dial.Machine(Device(torch.device("cpu"), torch.bfloat16, ""), 1.9e12, True, amx=True),
    "AVX-512": dial.Machine(Device(torch.device("cpu"), torch.bfloat16, ""), 0.42e12, True),
    "AVX2": dial.Machine(Device(torch.device("cpu"), torch.float32, ""), 0.17e12, True),
    "T4": dial.Machine(Device(torch.device("cuda"), torch.float16, ""), 25e12, True),
}
TEXTS = {"200 kB": 200e3, "WikiText-2": TEXT}
PLANNED = {
    "laptop": (20, "AMX", TEXT),
    "t4-1h": (60, "T4", math.inf),
    "t4-3h": (180, "T4", math.inf),
}
"""Presets: minutes, machine, bytes of text."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: what it was, what it learned from and how well."""

    name: str
    model: ModelConfig
    learned: float
    """bytes, see `dial.learned_bytes`"""
    bits: float


def point(name: str, model: ModelConfig, tokens: float, bits: float) -> Point:
    read = tokens * dial.bytes_per_token(model.vocab_size)
    return Point(name, model, dial.learned_bytes(read, TEXT), bits)


def points() -> list[Point]:
    """The runs of USED and OTHERS; seeds are averaged."""
    found = [point(*other) for other in OTHERS]
    fields = {item.name for item in dataclasses.fields(ModelConfig)}
    for table, names in USED.items():
        rows = read_rows(ROOT / "docs" / "results.jsonl", table)
        for variant in (v for v in TABLES[table].variants if v.name in names):
            own = [row for row in rows if row["variant"] == variant.name]
            settings: dict[str, Any] = {**TABLES[table].base, **variant.changes}
            model = ModelConfig(**{k: v for k, v in settings.items() if k in fields})
            tokens, bits = (
                np.mean([r[k] for r in own]) for k in ("trained_tokens", "bits_per_byte")
            )
            found.append(point(f"{table}: {variant.name}", model, float(tokens), float(bits)))
    return found


def term(model: ModelConfig, learned: float, size: float, vocabulary: float) -> float:
    """What multiplies B: the law without E, with A as a multiple of B."""
    inner = dial.inner_parameters(model) / 1e6
    text = learned / 1e6 * (model.vocab_size / 8192) ** vocabulary
    return (size * inner ** (-dial.ALPHA / dial.BETA) + 1 / text) ** dial.BETA


def fit(runs: list[Point]) -> tuple[float, ...]:
    """E, A, B, G and the root of the mean square error."""
    best = (math.inf,) * 5
    bits = np.array([run.bits for run in runs])
    for size in np.geomspace(0.005, 0.5, 40):
        for vocabulary in np.arange(0.0, 1.0, 0.02):
            terms = [term(run.model, run.learned, size, vocabulary) for run in runs]
            columns = np.stack([np.ones(len(runs)), terms], 1)
            (e, b), *_ = np.linalg.lstsq(columns, bits, rcond=None)
            error = float(np.sqrt(np.mean((columns @ [e, b] - bits) ** 2)))
            if error < best[-1]:
                inner = float(b) ** (1 / dial.BETA)
                best = (float(e), size * inner, inner, float(vocabulary), error)
    return best


def choices() -> Iterator[str]:
    """What the dial chooses, as a table in Markdown."""
    yield "| text | minutes | " + " | ".join(MACHINES) + " |"
    yield "| --- " * (2 + len(MACHINES)) + "|"
    for text, size in TEXTS.items():
        rows: dict[tuple[str, ...], list[int]] = {}
        for minutes in (1, 3, 10, 60):
            cells = []
            for machine in MACHINES.values():
                choice = dial.choose(minutes, DataConfig(), {}, machine, dial.Text(size, text))
                model, tokens = choice.model, choice.train.max_steps * choice.train.batch_tokens
                cells.append(
                    f"{model.num_parameters / 1e6:.1f}M, {model.vocab_size:,}, "
                    f"{model.num_hidden_layers} x {model.hidden_size}, {tokens / 1e6:.2f}M"
                )
            rows.setdefault(tuple(cells), []).append(minutes)
        for cells, times in rows.items():
            often = " to ".join(map(str, dict.fromkeys((times[0], times[-1]))))
            yield f"| {' | '.join((text, often, *cells))} |"


def presets() -> Iterator[str]:
    """What the law expects of a preset, and of the best choice for its time; in Markdown."""
    yield "| preset | minutes | it | bits per byte | by the law | bits per byte |"
    yield "| --- " * 6 + "|"
    for name, (minutes, machine, size) in PLANNED.items():
        model, _, train = PRESETS[name]
        text = dial.Text(size, name)
        choice = dial.choose(minutes, DataConfig(), {}, MACHINES[machine], text)
        cells = []
        for shape, plan in ((model, train), (choice.model, choice.train)):
            tokens = plan.max_steps * plan.batch_tokens
            read = tokens * dial.bytes_per_token(shape.vocab_size)
            cells.append(
                f"{shape.num_parameters / 1e6:.1f}M, {shape.vocab_size:,}, "
                f"{shape.num_hidden_layers} x {shape.hidden_size}, {tokens / 1e6:.0f}M tokens "
                f"| {dial.bits_per_byte(shape, dial.learned_bytes(read, size)):.3f}"
            )
        yield f"| `{name}` | {minutes} | {' | '.join(cells)} |"


def step_milliseconds() -> Iterator[tuple[str, float, float]]:
    """Of STEPS: what it was, measured and expected."""
    for kind, vocabulary, layers, context, tokens, compiled, rate, measured in STEPS:
        model = ModelConfig(vocabulary, 256, 512, layers, 4, 2, context)
        machine = dataclasses.replace(MACHINES[kind], rate=rate)
        how = "" if compiled else ", not compiled"
        name = f"{kind}: {vocabulary:,}, {layers} x 256, {tokens:,}{how}"
        yield name, measured, 1e3 * dial.step_seconds(model, machine, compiled, tokens)


def main() -> int:
    runs = points()
    *constants, error = fit(runs)
    print("E, A, B, G =", ", ".join(f"{value:.3g}" for value in constants))
    print(f"misses {error:.3f} bits per byte (root of the mean square); in the dial:\n")
    print("| run | parameters | learned from | measured | expected |")
    print("| --- | --- | --- | --- | --- |")
    for run in runs:
        expected = dial.bits_per_byte(run.model, run.learned)
        size = run.model.num_parameters / 1e6
        print(
            f"| {run.name} | {size:.2f}M | {run.learned / 1e6:.2f} MB | {run.bits:.3f} "
            f"| {expected:.3f} |"
        )
    print("\n| machine: vocabulary, layers x width, tokens per step | ms per step | expected |")
    print("| --- | --- | --- |")
    for name, measured, expected in step_milliseconds():
        print(f"| {name} | {measured} | {expected:.0f} |")
    print("", *choices(), "", *presets(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
