"""The curves of a run, and the card around them."""

import pytest

from bitllm.notebook import figures
from bitllm.notebook.card import card, duration, verdict
from bitllm.notebook.figures import figure_png, loss_figure, ternary_figure


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("ground", ["#ffffff", "#111111", "#383838"])
def test_figures_are_readable_on_light_and_dark_pages(ground):
    """Their ground is the page's: white, JupyterLab's or Colab's dark; 3 is WCAG's for graphics."""
    for color in (figures.BLUE, figures.ORANGE, figures.GREEN, figures.GREY):
        darker, lighter = sorted((luminance(color), luminance(ground)))
        assert (lighter + 0.05) / (darker + 0.05) >= 3, color
    figure = loss_figure(LINES, 200)
    assert figure.patch.get_alpha() == 0
    assert all(axes.patch.get_alpha() == 0 for axes in figure.axes)


LINE = {"learning_rate": 0.02, "tokens_per_s": 100.0, "memory_bytes": 1 << 30}
LINES = [
    {"step": s, "loss": 5 - s / 100, "zero_fraction": [0.3, 0.4], "flip_rate": [0, 0.1], **LINE}
    for s in range(10, 101, 10)
]
LINES += [{"step": 50, "val_loss": 4.0}, {"step": 100, "val_loss": 3.0, "final": True}]


def test_the_figure_shows_every_line_of_the_log_and_the_steps_to_come():
    figure = loss_figure(LINES, 200)
    training, validation = figure.axes[0].get_lines()
    assert list(training.get_xdata()) == list(range(10, 101, 10))
    assert list(validation.get_ydata()) == [4.0]  # the last one is of other text
    assert figure.axes[0].get_xlim() == (0, 200)
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == (
        "step",
        "loss, nats per token",
    )
    assert figure_png(figure).startswith(b"\x89PNG")
    folded = ternary_figure(LINES, 200)
    maps = [axes.get_images()[0] for axes in folded.axes if axes.get_images()]
    assert [image.get_array().shape for image in maps] == [(2, 10), (2, 10)]
    assert [image.get_clim() for image in maps] == [(0.2, 0.4), (0.0, 0.15)]  # no rainbow of noise


@pytest.mark.parametrize("lines", [[], LINES[:2]])
def test_nothing_is_drawn_before_there_are_three_points(lines):
    assert loss_figure(lines, 200) is None
    assert ternary_figure(lines, 200) is None
    assert "<img" not in card("Training", {"step": "1 of 2"}, lines, 200, [])


def test_the_card_has_tiles_and_three_samples_and_brings_no_ground():
    samples = [(step, [(True, "<b>Hi"), (False, f"answer {step}")]) for step in range(5)]
    page = card("Training", {"step": "100 of 200", "loss": "2.1"}, LINES, 200, samples, "a hint")
    for text in ("step 100 of 200", "width:50%", "answer 0", "answer 2", "answer 4", "a hint"):
        assert text in page
    assert "answer 1" not in page
    assert "&lt;b&gt;Hi" in page
    assert "var(--jp-content-font-color1, var(--colab-primary-text-color, inherit))" in page
    assert "#fff;" not in page


def test_times_and_results_are_for_people():
    told = {59: "59 s", 125: "2 min 05 s", 1000: "17 min", 2136 * 60: "35.6 hours", 3e5: "3.5 days"}
    assert {seconds: duration(seconds) for seconds in told} == told
    assert (
        verdict([{"step": 1, "val_loss": 0.0}], 1024) == "Perplexity 1.0 (random guessing: 1,024)."
    )
    worse = [{"step": 1, "val_loss": 2.0}, {"step": 2, "val_loss": 3.0}]
    assert "learn its text by heart" in verdict(worse, 1024)
    assert "heart" not in verdict([*worse[:1], {**worse[1], "final": True}], 1024)  # other text
    assert verdict([], 1024) == ""
