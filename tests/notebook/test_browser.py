"""A real JupyterLab in a real browser: run all, stop, resume, and write text."""

import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest

import bitllm_core as bit
from tests import warm
from tests.conftest import ROOT
from tests.notebook.kernels import put_package, shorten_companion
from tools.page_in_browsers import QUIET, Chromium

SHOTS = ROOT / "artefacts"


@pytest.fixture(scope="module")
def browser():
    if Chromium.path is None:
        pytest.skip("no chromium on the path")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=Chromium.path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory):
    """A server; its folder, and the address of a notebook in it, token included."""
    folder = tmp_path_factory.mktemp("lab")
    home = folder / ".jupyter"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}"]
    command += [f"--IdentityProvider.token={token}"]
    command += ["--LabApp.extension_manager=readonly"]
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "IPYTHONDIR": str(home / "ipython"),
        "BITLLM_PRESET": "ci",
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "server.log").open("w") as log:
        server = warm.start(command, env=environment, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(lambda: _answers(f"{address}/api?token={token}"), 90)
        yield folder, lambda notebook: f"{address}/lab/tree/{notebook}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


def _answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _wait_for(found, timeout):
    end = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < end, f"not within {timeout} s"
        time.sleep(0.3)
    return value


@pytest.fixture
def place(jupyterlab, request):
    """A folder of its own for a test's notebook, with the package."""
    folder = jupyterlab[0] / request.node.name
    folder.mkdir()
    put_package(folder)
    shorten_companion(folder)
    return folder


class Lab:
    """A notebook open in JupyterLab."""

    def __init__(self, browser, jupyterlab, notebook, theme):
        folder, address_of = jupyterlab
        for name, values in settings(theme).items():
            path = folder / ".jupyter/settings/@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")
        address = address_of(notebook.relative_to(folder).as_posix())
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.page.set_default_timeout(90_000)
        self.page.goto(address)
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_selector("#jp-main-statusbar >> text=| Idle")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0]:
            print(self.output())
            self.shot("at_failure")
        self.page.close()

    def menu(self, menu, item):
        self.page.click(f'.lm-MenuBar-itemLabel:text-is("{menu}")')
        self.page.click(f'.lm-Menu-itemLabel:text-is("{item}")')

    def output(self):
        return "\n".join(self.page.locator(".jp-OutputArea-output").all_inner_texts())

    def step(self):
        """The step in the last live display, which is drawn while the cell runs."""
        found = re.findall(r"^step ([\d,]+) of [\d,]+", self.output(), re.MULTILINE)
        return int(found[-1].replace(",", "")) if found else 0

    def shot(self, name, target=None):
        SHOTS.mkdir(exist_ok=True)
        if target:
            self.page.locator(target).last.scroll_into_view_if_needed()
        self.page.screenshot(path=SHOTS / f"{name}.png")


def settings(theme):
    return {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/themes": {"theme": f"JupyterLab {theme}"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }


CARD = 'img[alt^="loss by step"]'
SAY = 'input[placeholder="Say something"]'


def with_settings(text, **changes):
    """The training notebook, whose form begins with these settings."""
    changes = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    assert text.count("SettingsPanel.kept()") == 1
    return text.replace("SettingsPanel.kept()", f"SettingsPanel.kept(bit.Settings({changes}))")


SLOW = """
class Slow(bit.Callback):
    def on_step(self, state, metrics):
        time.sleep(0.2)
"""


def slowed_down(text):
    """The training notebook with long steps, which leave the processor to the other tests."""
    book = nbformat.reads(text, 4)
    [cell] = [cell for cell in book.cells if "callbacks=[display]" in cell.source]
    cell.source = f"import time\n{SLOW}" + cell.source.replace("[display]", "[display, Slow()]")
    return nbformat.writes(book)


def same_twice(step):
    """The step, if it is the same four seconds later."""
    before = step()
    time.sleep(4)
    return before if step() == before else None


def watch_and_interrupt(other, lab):
    """See in `other` the training that `lab` has lost sight of, pause it, and stop it by ■."""
    other.menu("Run", "Run All Cells")
    _wait_for(lambda: "Training in runs/demo" in other.output(), 60)
    _wait_for(lambda: other.page.locator(CARD).count(), 60)
    other.shot("watch_light", CARD)
    other.page.click('button:text-is("Pause")')
    still = _wait_for(lambda: same_twice(other.step), 60)
    other.page.click('button:text-is("Continue")')
    _wait_for(lambda: other.step() > still, 60)
    lab.page.click('[data-command="notebook:interrupt-kernel"], [title^="Interrupt"]')
    _wait_for(lambda: "Stopped: " in other.output(), 60)


def test_run_all_stop_reload_watch_and_resume(browser, jupyterlab, place):
    text = (ROOT / "notebooks" / "01_train.ipynb").read_text(encoding="utf-8")
    small = {"preset": "demo", "hidden_size": 64, "num_hidden_layers": 1, "batch_tokens": 256}
    text = slowed_down(with_settings(text, **small))
    (place / "01_train.ipynb").write_text(text, encoding="utf-8")
    cell = nbformat.v4.new_code_cell("import bitllm as bit\nbit.watch('runs/demo-w64-l1-b256')")
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    book = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
    nbformat.write(book, place / "watch.ipynb")
    run, whole = place / "runs" / "demo-w64-l1-b256", bit.PRESETS["demo"][2].max_steps
    with Lab(browser, jupyterlab, place / "01_train.ipynb", "Light") as lab:
        lab.shot("01_first_screen_light")
        lab.menu("Run", "Run All Cells")
        first = _wait_for(lab.step, 120)
        lab.page.wait_for_selector(CARD)
        before = lab.page.locator(CARD).get_attribute("src")
        _wait_for(lambda: lab.page.locator(CARD).get_attribute("src") != before, 120)  # it grows
        lab.shot("01_running_light", CARD)
        lab.page.click('button:text-is("Stop")')  # before the first evaluation
        _wait_for(lambda: "To resume, run this cell again" in lab.output(), 60)
        lab.page.wait_for_selector(SAY)  # the cells below have run, and it has answered
        lab.shot("01_stopped_light", SAY)
        for error in ("Traceback", "Error"):
            assert error not in lab.output()
        lines = bit.MetricsLog.read(run / "metrics.jsonl")
        stopped = bit.newest_checkpoint(run / "checkpoints")["step"]
        assert first < stopped < whole
        assert lines[-1]["step"] <= stopped
        assert not [line for line in lines if "val_loss" in line]
        assert re.search(rf"on text it has not seen, step {stopped}\b", lab.output())

        minutes = lab.page.locator(".widget-text", has_text="minutes").locator("input")
        minutes.fill("soon")
        minutes.press("Enter")
        _wait_for(lambda: "minutes 'soon': use a number" in lab.output(), 30)
        assert lab.page.locator('button:text-is("Train")').is_disabled()
        lab.shot("01_form_light", ".widget-upload")
        lab.menu("File", "Save Notebook")
        lab.page.reload()
        lab.page.wait_for_selector(CARD)  # what was drawn survives
        lab.menu("Kernel", "Restart Kernel and Run All Cells…")
        lab.page.click('.jp-Dialog button:has-text("Restart")')
        _wait_for(lambda: f"from step {stopped} of {whole}" in lab.output(), 120)
        _wait_for(lambda: lab.step() > stopped + 10, 120)
        lab.menu("File", "Save Notebook")
        lab.page.reload()  # in the middle of it: the page stands still, the training goes on
        with Lab(browser, jupyterlab, place / "watch.ipynb", "Light") as other:
            watch_and_interrupt(other, lab)
    resumed = bit.newest_checkpoint(run / "checkpoints")["step"]
    assert resumed > stopped + 10
    steps = [x["step"] for x in bit.MetricsLog.read(run / "metrics.jsonl") if "loss" in x]
    assert steps == list(range(10, resumed + 1, 10))  # the curve is whole


def test_sliders_and_streaming_text_in_the_dark_theme(browser, jupyterlab, place):
    shutil.copy(ROOT / "notebooks" / "02_use.ipynb", place)
    model, data, train = bit.PRESETS["ci"]  # a text; where no model is found, demo is trained
    bit.train(model, data, train, place / "runs" / "ci", callbacks=[])
    with Lab(browser, jupyterlab, place / "02_use.ipynb", "Dark") as lab:
        lab.menu("Run", "Run All Cells")
        _wait_for(lambda: "all of it in fp16" in lab.output(), 120)
        answer = lab.page.locator(".widget-vbox .widget-html div").first
        assert len(answer.inner_text()) > 20  # it has written once
        lab.page.click(".jp-OutputArea-output >> text=How it chooses its words")
        temperature = lab.page.locator(".widget-slider", has_text="temperature")
        assert temperature.locator(".widget-readout").inner_text() == "0.80"
        temperature.locator(".noUi-handle").press("Home")
        _wait_for(lambda: temperature.locator(".widget-readout").inner_text() == "0.00", 20)
        length = lab.page.locator(".widget-slider", has_text="length")
        length.locator(".noUi-handle").press("PageDown")
        lab.page.click('button:text-is("Write")')
        written = settled(answer.inner_text)
        begun = lab.page.locator(".widget-textarea", has_text="beginning").locator("textarea")
        assert written.startswith(begun.input_value())
        assert len(written) > len(begun.input_value())
        lab.shot("02_written_dark", 'button:text-is("Write")')
        lab.page.click('button:text-is("Write")')
        assert settled(answer.inner_text) == written  # temperature 0 has no choice
        temperature.locator(".noUi-handle").press("End")
        _wait_for(lambda: temperature.locator(".widget-readout").inner_text() == "2.00", 20)
        lab.page.click('button:text-is("Write")')
        _wait_for(lambda: answer.inner_text() != written, 60)


def test_a_character_a_talk_and_a_text_of_ones_own_in_the_dark_theme(browser, jupyterlab, place):
    text = (ROOT / "notebooks" / "01_train.ipynb").read_text(encoding="utf-8")
    text = with_settings(text, data="companion", persona="name=Łuna; home=a boat")
    (place / "01_train.ipynb").write_text(text, encoding="utf-8")
    with Lab(browser, jupyterlab, place / "01_train.ipynb", "Dark") as lab:
        lab.page.set_viewport_size({"width": 800, "height": 1000})
        lab.menu("Run", "Run All Cells")
        _wait_for(lambda: "Done in " in lab.output(), 180)
        lab.page.wait_for_selector(SAY)
        lab.shot("01_done_dark", SAY)
        home, motto = (
            lab.page.locator(".widget-text", has_text=name).locator("input")
            for name in ("home", "motto")
        )
        assert home.input_value() == "a boat"
        assert motto.get_attribute("placeholder") == "Small steps go far."
        home.fill("<b>x</b>")
        home.press("Enter")
        _wait_for(lambda: "companion:  name=Łuna; home=<b>x</b>" in lab.output(), 30)
        lab.shot("01_character_dark", "input[list]")

        say = lab.page.locator(SAY)
        bubbles = lab.page.locator(".widget-vbox .widget-html span")
        assert bubbles.nth(0).inner_text() == "hello"
        assert bubbles.count() == 2  # it has answered once
        for number, words in enumerate(("hello", "<i>who</i> are you?"), 2):
            say.fill(words)
            say.press("Enter") if number == 2 else lab.page.click('button:text-is("Say")')
            _wait_for(lambda count=2 * number: bubbles.count() >= count, 60)
            assert bubbles.nth(2 * number - 2).inner_text() == words
            settled(bubbles.last.inner_text)
        lab.shot("01_talk_dark", 'button:text-is("Say")')
        lab.page.click('button:text-is("New conversation")')
        _wait_for(lambda: not bubbles.count(), 30)

        own = lab.page.locator(".widget-textarea", has_text="your own text").locator("textarea")
        own.fill("Once upon a time there was a fish. " * 300)
        home.press("Tab")  # leaves the field
        _wait_for(lambda: "learned by heart" in lab.output(), 30)
        _wait_for(lambda: not home.is_visible(), 30)
        lab.page.click('button:text-is("Train")')
        lab.page.wait_for_selector('button:text-is("Write")')  # it has written below the form
        lab.shot("01_own_text_dark", 'button:text-is("Write")')
        assert lab.page.locator('.widget-html:has-text("Done in")').count()
    [run] = place.glob("runs/ci-pasted-Once-upon-a-*")
    assert bit.newest_checkpoint(run / "checkpoints")["step"] == 40


def settled(text):
    """The text once it has not changed for two seconds."""
    while True:
        before = text()
        time.sleep(2)
        if text() == before:
            return before
