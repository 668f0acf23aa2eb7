"""What the settings make of a form's values."""

import dataclasses
import json
import re

import pytest

import bitllm.notebook.settings as settings_module
import bitllm_core as bit
from bitllm import dial
from bitllm.notebook.card import duration
from bitllm.notebook.settings import Settings

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_without_changes_settings_are_the_preset():
    for name, preset in bit.PRESETS.items():
        assert Settings(name).configs() == preset


def test_auto_takes_the_environment_then_what_fits_the_machine(monkeypatch):
    monkeypatch.setattr(bit.torch.cuda, "is_available", lambda: False)
    assert Settings().preset_name == "demo"
    monkeypatch.setattr(bit.torch.cuda, "is_available", lambda: True)
    assert Settings().preset_name == "t4-1h"
    monkeypatch.setenv("BITLLM_PRESET", "ci")
    assert Settings().preset_name == "ci"
    assert Settings("laptop").preset_name == "laptop"
    monkeypatch.setenv("BITLLM_PRESET", "huge")
    with pytest.raises(ValueError, match=r"BITLLM_PRESET='huge': expected ci, demo"):
        Settings()


def test_width_takes_heads_and_feed_forward_with_it():
    model, _, _ = Settings("t4-1h", hidden_size=256, num_hidden_layers=3).configs()
    assert (model.num_attention_heads, model.num_kv_heads, model.head_dim) == (4, 2, 64)
    assert (model.intermediate_size, model.num_hidden_layers) == (768, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "big"}, "preset='big': expected one of auto, ci"),
        ({"hidden_size": 250}, "hidden_size=250: expected a multiple of 64, such as 256"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1: expected at least 1"),
        ({"batch_tokens": 1000}, "a multiple of max_position_embeddings=256, such as 768 or 1024"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1: expected more than 0"),
        ({"minutes": -1}, "minutes=-1: expected 0"),
        (
            {"data": "pydocs", "persona": "name=x"},
            "persona='name=x': expected none with data='pydocs'",
        ),
        ({"data": "companion", "persona": "nme=x"}, "'nme' is no field; expected name, home"),
        ({"data": "companion:xx"}, "data='companion:xx': expected companion:LANGUAGE, one of en"),
        ({"resume": "maybe"}, "resume='maybe': expected auto or never"),
    ],
)
def test_nonsense_is_rejected_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"preset": "demo", **change})


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(bit.torch.cuda, "is_available", lambda: False)


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"word{i % 4000}" for i in range(60_000)))


def saved_run(folder, model, data, train):
    """Settings of a run that has begun in `folder`."""
    parts = {"model": model, "data": data, "train": train}
    text = json.dumps({part: dataclasses.asdict(config) for part, config in parts.items()})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)


@pytest.mark.usefixtures("no_gpu")
def test_without_gpu_and_choice_the_clock_keeps_a_run_short():
    model, data, train = bit.PRESETS["demo"]
    assert Settings().configs() == (model, data, dataclasses.replace(train, minutes=3))
    assert Settings(data="companion:es").configs()[2].minutes == 3
    assert Settings("demo").configs()[2].minutes is None
    assert Settings("demo", minutes=10).configs()[2].minutes == 10
    text = Settings().describe()
    assert "size:       demo (small and short: there is no GPU here)" in text
    assert "training:   3 minutes, 2,048 tokens per step" in text
    assert "time:       3 minutes in all, however often" in text
    assert "640 steps" in Settings("demo").describe()


def test_times_are_those_of_the_dial():
    model, _, train = bit.PRESETS["demo"]
    step = dial.step_seconds(model, settings_module.this_machine(), True, 2048)
    seconds = dial.START_S + dial.COMPILING_S + 640 * step
    assert train.max_steps * train.batch_tokens == 640 * 2048
    assert f"time:       about {duration(seconds)} on this cpu" in Settings("demo").describe()


@pytest.mark.usefixtures("no_gpu", "book")
def test_for_a_text_and_minutes_the_dial_chooses():
    machine = settings_module.this_machine()
    text = dial.size_of(bit.DataConfig("book.txt"))
    for minutes in (0, 10, 60):
        choice = dial.choose(minutes or 3, bit.DataConfig("book.txt"), {}, machine, text)
        settings = Settings(data="book.txt", minutes=minutes)
        assert settings.configs() == (choice.model, choice.data, choice.train)
        assert settings.run_folder.as_posix() == f"runs/auto-book-{minutes or 3}min"
        assert "chosen for this text, these minutes and this machine" in settings.describe()
    wide, _, train = Settings(data="book.txt", hidden_size=512, learning_rate=0.01).configs()
    assert (wide.hidden_size, train.learning_rate, train.minutes) == (512, 0.01, 3)
    assert Settings("demo", data="book.txt", minutes=10).configs()[0] == bit.PRESETS["demo"][0]


@pytest.mark.usefixtures("no_gpu", "book")
def test_a_run_keeps_what_the_dial_chose_on_another_day(tmp_path, monkeypatch):
    settings = Settings(data="book.txt", minutes=10)
    first = settings.configs()
    saved_run(tmp_path / settings.run_folder, *first)
    slow = dataclasses.replace(settings_module.this_machine(), rate=1e10)
    monkeypatch.setattr(settings_module, "this_machine", lambda: slow)
    settings_module._chosen.cache_clear()
    assert settings.configs() == first
    assert settings.replace(resume="never").configs() != first
    longer = Settings(data="book.txt", minutes=20, out=str(settings.run_folder))
    assert longer.configs()[0] == first[0]
    assert longer.configs()[2] == dataclasses.replace(first[2], minutes=20)
    assert Settings(data="book.txt", out=str(settings.run_folder)).configs() == first


@pytest.mark.usefixtures("no_gpu")
def test_a_run_of_steps_stays_one_until_it_is_given_minutes(tmp_path):
    saved_run(tmp_path / "runs" / "demo", *bit.PRESETS["demo"])
    assert Settings().configs()[2].minutes is None  # of the command line, say
    assert Settings(minutes=10).configs()[2].minutes == 10
    assert Settings(resume="never").configs()[2].minutes == 3


def test_other_data_has_another_folder_and_a_mirror_is_passed_on():
    assert Settings("ci").run_folder.as_posix() == "runs/ci"
    assert Settings("ci", data="a/My book.txt").run_folder.as_posix() == "runs/ci-My-book"
    books = ["红楼梦.txt", "Преступление и наказание.txt", "idiot: a?.txt"]
    names = [Settings("ci", data=name).run_folder.name for name in books]
    assert names == ["ci-红楼梦", "ci-Преступление-и-наказание", "ci-idiot-a-"]
    assert Settings("ci", data="a.txt", out="x").run_folder.as_posix() == "x"
    assert Settings("ci").options == {"resume": "auto"}
    assert Settings("ci", mirror="m").options == {"resume": "auto", "mirror": "m"}


def test_each_choice_has_a_run_folder_of_its_own():
    assert Settings("demo", hidden_size=512).run_folder.name == "demo-w512"
    several = Settings("demo", num_hidden_layers=2, batch_tokens=4096, learning_rate=0.01)
    assert several.run_folder.name == "demo-l2-b4096-r0.01"
    names = {
        Settings("demo", persona=f"name=Luna{more}").run_folder.name for more in ("", "; home=x")
    }
    assert len(names) == 2
    assert all(name.startswith("demo-Luna-") for name in names)
    assert Settings("demo", minutes=5).run_folder.name == "demo"  # longer, but the same run


def test_a_short_text_is_not_read_again_and_again(tmp_path):
    (tmp_path / "page.txt").write_text("word " * 1000)
    settings = Settings("demo", data="page.txt")
    assert settings.configs()[2].max_steps == 60
    text = settings.describe()
    assert "SHORT: about 1,666 tokens, which will be read 74 times and learned by heart" in text
    (tmp_path / "page.txt").write_text("word " * 100_000)
    assert settings.configs()[2].max_steps == 640
    assert "SHORT" not in settings.describe()
    (tmp_path / "page.txt").write_text("word")
    with pytest.raises(ValueError, match="expected a text of 1,024 characters or more; 100 kB"):
        settings.describe()
    with pytest.raises(ValueError, match=r"data='nofile.txt': expected a file or folder that is"):
        Settings("demo", data="nofile.txt").describe()


def test_hours_are_hours(monkeypatch):
    slow = dataclasses.replace(settings_module.this_machine(), rate=3e11)
    monkeypatch.setattr(settings_module, "this_machine", lambda: slow)
    assert re.search(r"time: +about [\d.]+ (hours|days) on this cpu", Settings("t4-1h").describe())


def test_a_run_keeps_its_character_and_a_file_is_needed_once(tmp_path):
    (tmp_path / "me.json").write_text('{"home": "a boat", "name": "Luna"}')
    settings = Settings("ci", data="companion", persona="me.json", mirror="drive")
    model, data, train = settings.configs()
    assert data == bit.DataConfig("companion", persona="name=Luna; home=a boat")
    assert settings.language == "en"
    (tmp_path / "me.json").unlink()
    again = Settings("ci", data="companion", mirror="drive")
    assert again.configs()[1].persona is None
    (tmp_path / "drive").mkdir()  # on a new machine it is all there is
    saved = {"model": model, "data": data, "train": train}
    text = json.dumps({part: dataclasses.asdict(config) for part, config in saved.items()})
    (tmp_path / "drive" / "config.json").write_text(text)
    assert again.configs()[1] == data
    assert "companion:  name=Luna; home=a boat" in again.describe()
    assert "0 of 40 steps done; will resume, from drive" in again.describe()
    assert again.replace(resume="never").configs()[1].persona is None
    assert again.replace(data="companion:es").configs()[1].persona is None
    assert "OTHER SETTINGS" in again.replace(persona="name=Lena").describe()


def test_settings_are_described_with_what_the_folder_holds(tiny_corpus):
    settings = Settings("ci", data=str(tiny_corpus), out="run")
    text = settings.describe()
    assert "0.13M parameters: 2 layers of width 64" in text
    assert "40 steps, 1,024 tokens per step, peak learning rate 0.04" in text
    assert "run: new" in text
    model, data, train = settings.configs()
    bit.train(model, data, dataclasses.replace(train, max_steps=2), "run", callbacks=[])
    assert "run: complete (2 of 2 steps)" in settings.describe()
    assert "about" in settings.describe()  # for the preset has more steps
    assert "OTHER SETTINGS" in settings.replace(hidden_size=128).describe()
    assert "moved aside" in settings.replace(resume="never").describe()
