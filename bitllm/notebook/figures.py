"""The curves of a run as matplotlib Figures that suit light and dark themes, and their colours."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from bitllm.notebook.language import say

INK = "var(--jp-content-font-color1, var(--colab-primary-text-color, inherit))"
ACCENT = "var(--jp-brand-color1, #3a8fd0)"
"""Text and marks of the displays: the theme's own, in JupyterLab and in Colab."""
BLUE, ORANGE, GREEN, GREY = "#3a8fd0", "#d0701a", "#46994f", "#888888"
"""Of the figures, whose ground is transparent: readable on white and on the dark themes."""
WIDTH = 9.0  # inches; a hundred pixels each on the page
MIN_POINTS = 3  # of a curve; fewer look like a fault


def loss_figure(lines: list[dict[str, Any]], max_steps: int) -> Any:
    """Training and validation loss by step, to the end of the run; None before there are points."""
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "val_loss" in line and not line.get("final")]
    if len(steps) < MIN_POINTS:
        return None
    figure = new_figure(2.6)
    axes = figure.add_axes((0.07, 0.18, 0.915, 0.78))
    _curve(axes, steps, "loss", BLUE, say("text it learns from"))
    _curve(axes, evals, "val_loss", ORANGE, say("text it has not seen"), marker="o")
    axes.set_xlim(0, max_steps)
    axes.set_xlabel(say("step"), fontsize=9, color=GREY)
    axes.set_ylabel(say("loss, nats per token"), fontsize=9, color=GREY)
    axes.legend(fontsize=9, frameon=False, labelcolor=GREY)
    plain(axes)
    return figure


def ternary_figure(lines: list[dict[str, Any]], max_steps: int) -> Any:
    """Zeros and flips of the ternary weights by layer, learning rate; None without such lines."""
    layered = [line for line in lines if line.get("zero_fraction")]
    if len(layered) < MIN_POINTS:
        return None
    figure = new_figure(2.6)
    places = (0.05, "zero_fraction", say("weights that are 0"), (0.2, 0.4))
    more = (0.4, "flip_rate", say("weights that changed since the last point"), (0.0, 0.15))
    for left, key, title, limits in (places, more):
        axes = figure.add_axes((left, 0.18, 0.24, 0.7))
        scale = figure.add_axes((left + 0.245, 0.18, 0.01, 0.7))
        _heat_map(axes, scale, layered, key, limits)
        axes.set_xlim(0, max_steps)
        axes.set_title(title, fontsize=9, color=GREY)
        axes.set_ylabel(say("layer"), fontsize=9, color=GREY)
        axes.set_xlabel(say("step"), fontsize=9, color=GREY)
    axes = figure.add_axes((0.77, 0.18, 0.215, 0.7))
    _curve(axes, [line for line in lines if "loss" in line], "learning_rate", GREEN)
    axes.set_xlim(0, max_steps)
    axes.set_ylim(0, None)
    axes.set_title(say("learning rate"), fontsize=9, color=GREY)
    axes.set_xlabel(say("step"), fontsize=9, color=GREY)
    plain(axes)
    return figure


def new_figure(height: float) -> Any:
    """A figure of the page's width with a transparent ground, sharp on a high-density screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=200)
    figure.patch.set_alpha(0)
    return figure


def plain(axes: Any) -> None:
    """Axes without a box, in grey, on the page's ground."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=GREY, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def _curve(
    axes: Any, lines: list[dict[str, Any]], key: str, color: str, label: str = "", **style: Any
) -> None:
    if lines:
        xs, ys = zip(*((line["step"], line[key]) for line in lines), strict=True)
        axes.plot(xs, ys, color=color, label=label, linewidth=1.5, markersize=4, **style)


def _heat_map(
    axes: Any, scale: Any, lines: list[dict[str, Any]], key: str, limits: tuple[float, float]
) -> None:
    """Layers upwards, steps to the right, at most 300 columns; `scale` gets the colour bar."""
    lines = lines[:: 1 + len(lines) // 300]
    values = np.array([line[key] for line in lines]).T  # (layers, lines)
    extent = (0, lines[-1]["step"], -0.5, len(values) - 0.5)
    style = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(values, extent=extent, vmin=limits[0], vmax=limits[1], **style)
    axes.set_yticks(range(0, len(values), 1 + len(values) // 6))
    axes.figure.colorbar(image, cax=scale)
    for part in (axes, scale):
        plain(part)


def figure_png(figure: Any) -> bytes:
    """A matplotlib Figure as PNG, drawn without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
