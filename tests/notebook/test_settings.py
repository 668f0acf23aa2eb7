"""What the settings make of a form's values."""

import dataclasses
import json
import re

import pytest

import bitllm_core as bit
from bitllm.machine import estimate_seconds
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


def test_a_time_budget_sets_the_steps_and_a_run_keeps_its_length(tmp_path, monkeypatch):
    settings = Settings("demo", minutes=10)
    model, _, train = settings.configs()
    assert estimate_seconds(model, train, 1e12) == pytest.approx(600, rel=0.01)
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"train": {"max_steps": train.max_steps}}))
    monkeypatch.setattr(
        "bitllm.notebook.settings.product_rate", lambda device: 1.2e12
    )  # another day's measurement
    assert settings.configs()[2].max_steps == train.max_steps
    assert settings.replace(minutes=20).configs()[2].max_steps > 2 * train.max_steps
    assert settings.replace(resume="never").configs()[2].max_steps > train.max_steps


def test_without_gpu_and_choice_a_run_is_short_and_keeps_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(bit.torch.cuda, "is_available", lambda: False)
    assert Settings().configs() == bit.PRESETS["demo"]
    monkeypatch.setattr("bitllm.notebook.settings.product_rate", lambda device: 1e11)
    steps = Settings().configs()[2].max_steps
    assert 40 < steps < 200
    assert "small and short" in Settings().describe()
    assert Settings("demo").configs()[2].max_steps == 640
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"train": {"max_steps": steps}}))
    monkeypatch.setattr("bitllm.notebook.settings.product_rate", lambda device: 1e10)
    assert Settings().configs()[2].max_steps == steps


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
    monkeypatch.setattr("bitllm.notebook.settings.product_rate", lambda device: 3e11)
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
    assert "40 steps of 1,024 tokens, peak learning rate 0.04" in text
    assert "run: new" in text
    model, data, train = settings.configs()
    bit.train(model, data, dataclasses.replace(train, max_steps=2), "run", callbacks=[])
    assert "run: complete (2 of 2 steps)" in settings.describe()
    assert "about" in settings.describe()  # for the preset has more steps
    assert "OTHER SETTINGS" in settings.replace(hidden_size=128).describe()
    assert "moved aside" in settings.replace(resume="never").describe()
