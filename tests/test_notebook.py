"""What the notebooks share: settings, form, display, buttons, Drive."""

import base64
import dataclasses
import json
import shutil
import sys
import types
import zipfile

import ipywidgets
import pytest

import bitllm_core as bit
from tests.conftest import ROOT
from tests.faults import Fault, inject
from tests.kernels import KERNELS, Cell, kernel, new_subshell, python_of

BEGIN = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bitllm_core as bit\n"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITLLM_PRESET", raising=False)
    monkeypatch.setattr(bit, "product_rate", lambda device: 1e12)  # measuring takes a second


# settings


def test_without_changes_settings_are_the_preset():
    for name, preset in bit.PRESETS.items():
        assert bit.Settings(name).configs() == preset


def test_auto_takes_the_environment_then_what_fits_the_machine(monkeypatch):
    monkeypatch.setattr(bit.torch.cuda, "is_available", lambda: False)
    assert bit.Settings().preset_name == "demo"
    monkeypatch.setattr(bit.torch.cuda, "is_available", lambda: True)
    assert bit.Settings().preset_name == "t4-1h"
    monkeypatch.setenv("BITLLM_PRESET", "ci")
    assert bit.Settings().preset_name == "ci"
    assert bit.Settings("laptop").preset_name == "laptop"
    monkeypatch.setenv("BITLLM_PRESET", "huge")
    with pytest.raises(ValueError, match=r"BITLLM_PRESET='huge': expected ci, demo"):
        bit.Settings()


def test_width_takes_heads_and_feed_forward_with_it():
    model, _, _ = bit.Settings("t4-1h", hidden_size=256, num_hidden_layers=3).configs()
    assert (model.num_attention_heads, model.num_kv_heads, model.head_dim) == (4, 2, 64)
    assert (model.intermediate_size, model.num_hidden_layers) == (768, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "big"}, "preset='big': expected one of auto, ci"),
        ({"hidden_size": 250}, "a divisor of hidden_size=250"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1: expected at least 1"),
        ({"batch_tokens": 1000}, "a multiple of max_position_embeddings=128, such as 896 or 1024"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1: expected a positive number"),
        ({"minutes": -1}, "minutes=-1: expected 0"),
        ({"resume": "maybe"}, "resume='maybe': expected auto or never"),
    ],
)
def test_nonsense_is_rejected_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        bit.Settings(**{"preset": "demo", **change})


def test_a_time_budget_sets_the_steps_and_a_run_keeps_its_length(tmp_path, monkeypatch):
    settings = bit.Settings("demo", minutes=10)
    model, _, train = settings.configs()
    assert bit.estimate_seconds(model, train, 1e12) == pytest.approx(600, rel=0.01)
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"train": {"max_steps": train.max_steps}}))
    monkeypatch.setattr(bit, "product_rate", lambda device: 1.2e12)  # another day's measurement
    assert settings.configs()[2].max_steps == train.max_steps
    assert settings.replace(minutes=20).configs()[2].max_steps > 2 * train.max_steps
    assert settings.replace(resume="never").configs()[2].max_steps > train.max_steps


def test_without_gpu_and_choice_a_run_is_short_and_keeps_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(bit.torch.cuda, "is_available", lambda: False)
    assert bit.Settings().configs() == bit.PRESETS["demo"]
    monkeypatch.setattr(bit, "product_rate", lambda device: 1e11)
    steps = bit.Settings().configs()[2].max_steps
    assert 40 < steps < 200
    assert "small and short" in bit.Settings().describe()
    assert bit.Settings("demo").configs()[2].max_steps == 400
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"train": {"max_steps": steps}}))
    monkeypatch.setattr(bit, "product_rate", lambda device: 1e10)
    assert bit.Settings().configs()[2].max_steps == steps


def test_other_data_has_another_folder_and_a_mirror_is_passed_on():
    assert bit.Settings("ci").run_folder.as_posix() == "runs/ci"
    assert bit.Settings("ci", data="a/My book.txt").run_folder.as_posix() == "runs/ci-My-book"
    assert bit.Settings("ci", data="a.txt", out="x").run_folder.as_posix() == "x"
    assert bit.Settings("ci").options == {"resume": "auto"}
    assert bit.Settings("ci", mirror="m").options == {"resume": "auto", "mirror": "m"}


def test_settings_are_described_with_what_the_folder_holds(tiny_corpus):
    settings = bit.Settings("ci", data=str(tiny_corpus), out="run")
    text = settings.describe()
    assert "0.13M parameters: 2 layers of width 64" in text
    assert "40 steps of 1,024 tokens, peak learning rate 0.04" in text
    assert "run: new" in text
    model, data, train = settings.configs()
    bit.train(model, data, dataclasses.replace(train, max_steps=2), "run", callbacks=[])
    assert "has come to step 2 of 2; goes on" in settings.describe()
    assert "OTHER SETTINGS" in settings.replace(hidden_size=128).describe()
    assert "set aside" in settings.replace(resume="never").describe()


# form


@pytest.fixture
def form(monkeypatch):
    """A panel whose widgets live in this process, without a front end."""
    panel = bit.SettingsPanel(bit.Settings("demo"))
    panel._form(ipywidgets)
    return panel


def test_the_form_answers_changes_and_rejects_nonsense(form):
    assert "3.94M parameters" in form._message.value
    form._fields["num_hidden_layers"].value = 2
    assert "2 layers" in form._message.value
    assert form.settings == bit.Settings("demo", num_hidden_layers=2)
    form._fields["batch_tokens"].value = 1000
    assert "cannot be: batch_tokens=1000: expected a multiple" in form._message.value
    with pytest.raises(ValueError, match="batch_tokens=1000"):
        _ = form.settings
    form._fields["batch_tokens"].value = 2048
    assert form.settings.batch_tokens == 2048


def test_texts_given_in_the_form_become_the_data(form, tmp_path):
    form._take({"../../my book.txt": b"once"})
    assert form.settings.data == "texts/my book.txt"
    assert (tmp_path / "texts" / "my book.txt").read_bytes() == b"once"
    assert "runs/demo-my-book" in form._message.value


def test_uploads_of_both_generations():
    old = {"a.txt": {"metadata": {"name": "a.txt"}, "content": b"one"}}
    new = ({"name": "a.txt", "content": memoryview(b"one")},)
    assert bit._uploaded(old) == bit._uploaded(new) == {"a.txt": b"one"}


def test_without_a_notebook_the_form_is_text(capsys):
    panel = bit.SettingsPanel(bit.Settings("ci"))
    panel.show()
    assert "0.13M parameters" in capsys.readouterr().out
    assert panel.settings == bit.Settings("ci")


# display


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("color", [bit.INK, bit._BLUE, bit._ORANGE, bit._GREEN])
def test_the_display_brings_its_own_ground_with_enough_contrast(color):
    """So it reads alike in dark and light themes; 4.5 is WCAG's AA for small text."""
    assert (luminance(bit.PAPER) + 0.05) / (luminance(color) + 0.05) >= 4.5
    assert f"background:{bit.PAPER};color:{bit.INK}" in bit.CARD
    figure = bit.run_figure([])
    assert figure.get_facecolor() == (1, 1, 1, 1)


LINE = {"learning_rate": 0.02, "tokens_per_s": 100.0, "memory_bytes": 1 << 30}


def test_the_figure_shows_every_line_of_the_log():
    lines = [
        {"step": s, "loss": 5 - s / 100, "zero_fraction": [0.3, 0.4], "flip_rate": [0, 0.1], **LINE}
        for s in range(10, 101, 10)
    ]
    lines.append({"step": 50, "val_loss": 4.0})
    figure = bit.run_figure(lines)
    training, validation = figure.axes[0].get_lines()
    assert list(training.get_xdata()) == list(range(10, 101, 10))
    assert list(validation.get_ydata()) == [4.0]
    maps = [axes.get_images()[0].get_array().shape for axes in figure.axes if axes.get_images()]
    assert maps == [(2, 10), (2, 10)]
    assert bit.figure_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("lines", [[], [{"step": 10, "loss": 5.0, **LINE}]])
def test_the_figure_of_a_young_or_dense_run_has_no_heat_map(lines):
    figure = bit.run_figure(lines)
    assert len(figure.axes) == 3
    assert bit.figure_png(figure).startswith(b"\x89PNG")


def test_facts_say_how_long_it_will_take():
    facts = bit.run_facts([{"step": 10, "loss": 5.0, **LINE}], 100, 200)
    assert facts["time left"] == "3 min 00 s"  # 90 steps of 200 tokens at 100 a second
    assert facts["memory"] == "1.00 GiB"
    assert bit.run_facts([], 100, 200) == {"step": "0 of 100"}


def test_without_a_notebook_the_display_is_a_progress_bar(tmp_path, tiny_corpus, capsys):
    model, data, train = bit.Settings("ci", data=str(tiny_corpus)).configs()
    train = dataclasses.replace(train, max_steps=2)
    bit.train(model, data, train, "run", callbacks=[bit.LiveDisplay("run")])
    assert "2/2" in capsys.readouterr().err
    bit.show_run("run")
    assert "step 2 of 2, loss" in capsys.readouterr().out
    assert bit.newest_run(".").name == "run"
    assert bit.newest_run("none") is None
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        bit.show_run("none")


TRAIN = """
import dataclasses, signal, torch
torch.set_num_threads(1)
model, data, train = bit.PRESETS["ci"]
class After(bit.Callback):
    def on_step(self, state, metrics):
        state.stop_signal = signal.SIGINT if state.step == stop else 0
    def on_start(self, state):
        if stop == 30:
            display.on_mirror(state, "mirror: <failing> since 14:02")
def go(until, **changes):
    global stop, display
    stop, display = until, bit.LiveDisplay("run")
    changed = dataclasses.replace(train, **changes)
    return bit.train(model, data, changed, "run", callbacks=[display, After()])
"""


def test_the_display_in_a_kernel_and_after_it_died(tmp_path):
    with kernel(sys.executable, tmp_path) as client:
        Cell(client, BEGIN + TRAIN + "go(20)").listen_until(lambda c: c.done)
    with kernel(sys.executable, tmp_path) as client:  # the first one was killed
        cell = Cell(client, BEGIN + TRAIN + "go(30)\nprint(len(display.lines), display.buttons)")
        cell.listen_until(lambda c: c.done)
        assert "going on from step 20" in cell.text
        card = cell.displays[-1]
        page = card["text/html"]
        assert "step <b>30 of 40</b>" in page
        assert "mirror <b>&lt;failing&gt; since 14:02</b>" in page
        assert "saved; run this cell again to go on" in page
        assert "last save <b>step 30 at " in page
        figure = base64.b64decode(page.split("base64,")[1].split('"')[0])
        assert figure.startswith(b"\x89PNG")
        assert "6 {" not in cell.text  # 6 training lines and an evaluation
        assert "7 {'Stop'" in cell.text
        shown = Cell(client, "bit.show_run('run')").listen_until(lambda c: c.done)
        assert "step 30 of 40, loss" in shown.displays[0]["text/plain"]
        assert base64.b64decode(shown.displays[0]["image/png"]).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", KERNELS)
def test_buttons_work_while_the_cell_runs(tmp_path, name):
    with kernel(python_of(name), tmp_path) as client:
        subshell = new_subshell(client)
        assert (subshell is None) == (name == "colab")
        run = 'state = go(0, max_steps=5000, eval_every_steps=500, compile="off")\n'
        end = 'print("came to", state.step, bit.list_checkpoints("run/checkpoints")[-1].stem)'
        cell = Cell(client, BEGIN + TRAIN.replace("else 0", "else state.stop_signal") + run + end)
        cell.listen_until(lambda c: len(c.displays) > 3)
        client.execute("print('the cell', 'below')")  # as run all sends it
        cell.click("Save now", subshell)
        cell.listen_until(lambda c: "last save" in c.displays[-1].get("text/plain", ""))
        cell.click("Pause", subshell)
        cell.listen_until(lambda c: "paused" in c.displays[-1].get("text/plain", ""))
        assert not cell.done
        cell.click("Pause", subshell)
        cell.listen_until(lambda c: "paused" not in c.displays[-1].get("text/plain", ""))
        cell.click("Stop", subshell)
        cell.listen_until(lambda c: c.done)
        came_to = int(cell.text.split("came to ")[1].split()[0])
        assert 0 < came_to < 5000
        assert f"step_{came_to:08d}" in cell.text
        cell.listen_until(lambda c: "the cell below" in c.text)


@pytest.mark.parametrize("name", KERNELS)
def test_form_and_prompt_box_are_made_of_widgets_that_both_generations_have(tmp_path, name):
    with kernel(python_of(name), tmp_path) as client:
        code = 'state = go(0, max_steps=2)\nbit.SettingsPanel(bit.Settings("ci")).show()\n'
        code += 'bit.prompt_box(*bit.load_model("run"), "The")\nprint("shown")'
        cell = Cell(client, BEGIN + TRAIN + code).listen_until(lambda c: c.done)
        assert "shown" in cell.text, cell.text
        views = [x for x in cell.displays if "application/vnd.jupyter.widget-view+json" in x]
        assert len(views) == 3 + 1  # form, prompt box, buttons, the bar of tokenizing
        Cell(client, "").listen_until(lambda c: c.done)
        cell.click("Write", new_subshell(client))
        cell.listen_until(lambda c: "&#x27;" in str(c.states) or "<pre" in str(c.states))


BROKEN = """
def broken(lines):
    raise RuntimeError("no fonts")
After.on_start = lambda self, state: setattr(bit, "run_figure", broken)
print("came to", go(0, max_steps=4).step)
"""


def test_a_display_that_cannot_be_drawn_does_not_end_the_training(tmp_path):
    with kernel(sys.executable, tmp_path) as client:
        cell = Cell(client, BEGIN + TRAIN + BROKEN).listen_until(lambda c: c.done)
    assert "display: not drawn (RuntimeError: no fonts)" in cell.text
    assert "came to 4" in cell.text


# environment and Drive


def test_the_report_names_what_decides_speed_and_bits():
    report = bit.environment_report()
    for word in ("GPU:", "memory:", "disk:", "precision:", "torch.compile:", "ipywidgets"):
        assert word in report


@pytest.fixture
def colab(monkeypatch):
    """A stand-in for google.colab; `colab.mount` is what drive.mount does."""
    drive = types.SimpleNamespace(mount=None)
    package = types.ModuleType("google.colab")
    package.drive = drive
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    return drive


def test_drive_mounts(colab, tmp_path, capsys):
    asked = {}

    def mount(point, timeout_ms):
        asked[point] = timeout_ms
        (tmp_path / "drive" / "MyDrive").mkdir(parents=True)

    colab.mount = mount
    folder = bit.mount_drive(str(tmp_path / "drive"), timeout_s=5)
    assert folder == tmp_path / "drive" / "MyDrive" / "bitllm"
    assert folder.is_dir()
    assert list(asked.values()) == [5000]
    assert "mounted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        type("MessageError", (Exception,), {})("Error: credential propagation was unsuccessful"),
        ValueError("mount failed"),
        TimeoutError("timed out"),
        OSError(107, "Transport endpoint is not connected"),
    ],
)
def test_drive_refused_or_timed_out_is_one_line(colab, capsys, error):
    def mount(point, timeout_ms):
        raise error

    colab.mount = mount
    assert bit.mount_drive() is None
    text = capsys.readouterr().out
    assert type(error).__name__ in text
    assert "run this cell once more" in text


def test_a_mounted_but_broken_drive_is_one_line(colab, tmp_path, capsys):
    colab.mount = lambda point, timeout_ms: None
    (tmp_path / "drive").write_text("a file where the folder should be")
    assert bit.mount_drive(str(tmp_path / "drive")) is None
    assert "not mounted" in capsys.readouterr().out


class Stop(bit.Callback):
    def on_step(self, state, metrics):
        state.stop_signal = 2 * (state.step == 20)


def test_a_drive_that_breaks_in_the_run_and_a_new_machine_the_next_day(
    colab, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(bit, "MIRROR_RETRY_S", (0.01, 0.05))
    colab.mount = lambda point, timeout_ms: (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    drive = bit.mount_drive(str(tmp_path / "drive"))
    settings = bit.Settings("ci", mirror=str(drive / "ci"))
    model, data, train = settings.configs()
    train = dataclasses.replace(train, save_every_steps=5)
    broken = Fault("ENOTCONN", "write", at=10, times=10**9)
    with inject(drive, broken):
        state = bit.train(model, data, train, "runs/ci", callbacks=[Stop()], **settings.options)
    assert state.step == 20
    assert "Errno 107" in capsys.readouterr().err
    first = bit.MetricsLog.read(tmp_path / "runs" / "ci" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "runs")  # the machine is gone, and with it all but the Drive
    assert "goes on with the run of 40 steps" in settings.describe()
    state = bit.train(model, data, train, "runs/ci", callbacks=(), **settings.options)
    assert state.step == 40
    steps = [x["step"] for x in bit.MetricsLog.read(tmp_path / "runs" / "ci" / "metrics.jsonl")]
    assert steps[: len(first)] == [line["step"] for line in first]  # the curve is whole
    assert bit.list_checkpoints(drive / "ci" / "checkpoints")[-1].stem == "step_00000040"


def test_downloads_are_offered_and_a_folder_as_a_zip(colab, tmp_path, monkeypatch, capsys):
    (tmp_path / "model-hf").mkdir()
    (tmp_path / "model-hf" / "config.json").write_text("{}")
    bit.download_button(tmp_path / "model-hf")  # no notebook: its path
    assert str(tmp_path / "model-hf.zip") in capsys.readouterr().out
    assert zipfile.ZipFile(tmp_path / "model-hf.zip").namelist() == ["config.json"]
    asked, shown = [], []
    sys.modules["google.colab"].files = types.SimpleNamespace(download=asked.append)
    monkeypatch.setattr(bit, "_widgets", lambda: ipywidgets)
    monkeypatch.setattr("IPython.display.display", lambda x, **options: shown.append(x))
    bit.download_button(tmp_path / "model-hf.zip")
    assert not asked  # Run all downloads nothing by itself
    shown[0].click()
    assert asked == [str(tmp_path / "model-hf.zip")]
    del sys.modules["google.colab"].files
    bit.download_button(tmp_path / "model-hf.zip")
    assert 'model-hf.zip" download' in shown[1]["text/html"]


def test_without_colab_there_is_no_drive(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "google.colab", None)
    assert bit.mount_drive() is None
    assert "not Colab" in capsys.readouterr().out
