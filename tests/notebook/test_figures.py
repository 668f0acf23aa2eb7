"""The curves of a run."""

import pytest

from bitllm.notebook import figures
from bitllm.notebook.figures import CARD, INK, PAPER, figure_png, run_figure


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("color", [INK, figures._BLUE, figures._ORANGE, figures._GREEN])
def test_the_display_brings_its_own_ground_with_enough_contrast(color):
    """So it reads alike in dark and light themes; 4.5 is WCAG's AA for small text."""
    assert (luminance(PAPER) + 0.05) / (luminance(color) + 0.05) >= 4.5
    assert f"background:{PAPER};color:{INK}" in CARD
    figure = run_figure([])
    assert figure.get_facecolor() == (1, 1, 1, 1)


LINE = {"learning_rate": 0.02, "tokens_per_s": 100.0, "memory_bytes": 1 << 30}


def test_the_figure_shows_every_line_of_the_log():
    lines = [
        {"step": s, "loss": 5 - s / 100, "zero_fraction": [0.3, 0.4], "flip_rate": [0, 0.1], **LINE}
        for s in range(10, 101, 10)
    ]
    lines.append({"step": 50, "val_loss": 4.0})
    figure = run_figure(lines)
    training, validation = figure.axes[0].get_lines()
    assert list(training.get_xdata()) == list(range(10, 101, 10))
    assert list(validation.get_ydata()) == [4.0]
    maps = [axes.get_images()[0].get_array().shape for axes in figure.axes if axes.get_images()]
    assert maps == [(2, 10), (2, 10)]
    assert figure_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("lines", [[], [{"step": 10, "loss": 5.0, **LINE}]])
def test_the_figure_of_a_young_or_dense_run_has_no_heat_map(lines):
    figure = run_figure(lines)
    assert len(figure.axes) == 3
    assert figure_png(figure).startswith(b"\x89PNG")
