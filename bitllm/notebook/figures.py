"""The curves of a run as a matplotlib Figure, and the colours of the displays."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

INK, PAPER = "#1f2328", "#ffffff"
"""Text and background of the displays: fixed, to be readable in dark and light themes."""
CARD = f"background:{PAPER};color:{INK};padding:8px 12px;border-radius:6px"
_BLUE, _ORANGE, _GREEN = "#0b5cad", "#b34700", "#1a7f37"


def run_figure(lines: list[dict[str, Any]]) -> Any:
    """The curves of a run as a matplotlib Figure, from the lines of its metrics.jsonl."""
    from matplotlib.figure import Figure

    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "val_loss" in line]
    layered = [line for line in steps if line.get("zero_fraction")]
    # fixed places: computing a layout takes as long as drawing
    figure = Figure(figsize=(9, 4.2), dpi=100, facecolor=PAPER)
    right = 0.5 if layered else 0.93
    loss = figure.add_axes((0.06, 0.46, right - 0.06, 0.47))
    rate = figure.add_axes((0.06, 0.11, right - 0.06, 0.24))
    speed = rate.twinx()
    _curve(loss, steps, "loss", _BLUE, "training")
    _curve(loss, evals, "val_loss", _ORANGE, "validation", marker="o")
    _curve(rate, steps, "learning_rate", _GREEN)
    _curve(speed, steps, "tokens_per_s", _BLUE)
    if steps or evals:
        loss.legend(fontsize=8, frameon=False, labelcolor=INK)
    loss.set_title("loss, nats per token", fontsize=9, color=INK)
    rate.set_title("learning rate", fontsize=9, color=_GREEN, loc="left")
    rate.set_title("tokens/s", fontsize=9, color=_BLUE, loc="right")
    for axes in (loss, rate, speed):
        axes.tick_params(labelcolor=INK, labelsize=8)
    for axes in (rate, speed):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    if layered:
        for bottom, key, title in ((0.6, "zero_fraction", "zeros"), (0.11, "flip_rate", "flips")):
            places = ((0.61, bottom, 0.29, 0.33), (0.91, bottom, 0.015, 0.33))
            axes, scale = map(figure.add_axes, places)
            _heat_map(axes, scale, layered, key)
            axes.set_title(f"{title}, share of trits by layer", fontsize=9, color=INK)
    return figure


def _curve(
    axes: Any, lines: list[dict[str, Any]], key: str, color: str, label: str = "", **style: Any
) -> None:
    if lines:
        xs, ys = zip(*((line["step"], line[key]) for line in lines), strict=True)
        axes.plot(xs, ys, color=color, label=label, linewidth=1.5, markersize=3, **style)


def _heat_map(axes: Any, scale: Any, lines: list[dict[str, Any]], key: str) -> None:
    """Layers upwards, steps to the right, at most 300 columns; `scale` gets the colour bar."""
    lines = lines[:: 1 + len(lines) // 300]
    values = np.array([line[key] for line in lines]).T  # (layers, lines)
    extent = (0, lines[-1]["step"], -0.5, len(values) - 0.5)
    image = axes.imshow(
        values, origin="lower", aspect="auto", extent=extent, interpolation="nearest"
    )
    axes.set_yticks(range(0, len(values), 1 + len(values) // 6))
    axes.figure.colorbar(image, cax=scale)
    for part in (axes, scale):
        part.tick_params(labelcolor=INK, labelsize=8)


def figure_png(figure: Any) -> bytes:
    """A matplotlib Figure as PNG, drawn without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
