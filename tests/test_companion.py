"""The companion as a source of text, and the share of its right answers."""

import itertools
import json
import re

import pytest

import bitllm_core as bit
from bitllm import cli, companion
from bitllm.conversations import as_text
from bitllm.corpora import WHICH, Persona, conversations, questions, shown


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(companion, "COUNTS", {"train": 300, "validation": 20})


@pytest.mark.parametrize("language", ["en", "es"])
def test_its_conversations_are_the_text(few, language):
    source = f"companion:{language}" if language == "es" else "companion"
    expected = itertools.islice(conversations(language, None, seed=0), 300)
    assert list(bit.read_pieces(source)) == [(as_text(talk), True) for talk in expected]
    held = {text for text, _ in bit.read_pieces(source, "validation")}
    assert len(held) <= 20
    assert list(bit.read_pieces(source, "test")) == []


def test_a_wrong_language_is_named():
    with pytest.raises(
        ValueError, match=r"data='companion:xx': expected companion:LANGUAGE, one of"
    ):
        list(bit.read_pieces("companion:xx"))


def test_a_persona_is_learned_and_what_its_file_says_is_recorded(few, tmp_path):
    path, name = tmp_path / "me.json", 'Ünï "{name}" <|im_start|>'
    path.write_text(json.dumps({"name": name}))
    recorded = companion.recorded_persona(str(path))
    assert recorded == f"name={name}"
    config = bit.DataConfig("companion", persona=recorded)
    text = "".join(text for text, _ in bit.read_pieces("companion", "train", config))
    assert name in text
    data, tokenizer = bit.prepare_data(config, 512, 64, tmp_path / "run")
    assert (data.training >= 0).any()
    assert (data.training == ~tokenizer.token_to_id("<|im_start|>")).any()


def test_the_character_of_a_run_is_known_without_its_file(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(companion, "ANSWER_TOKENS", 4)  # of the report after each training
    path, run = tmp_path / "me.json", tmp_path / "run"
    flags = {"data": "companion", "persona": path, "out": run, "preset": "ci", "max_steps": 1}
    flags |= {"max_position_embeddings": 16, "batch_tokens": 16}

    def train(**changes):
        given = {**flags, **changes}.items()
        flag = [x for k, v in given for x in ("--" + k.replace("_", "-"), str(v))]
        return bit.main(["train", *flag], cli.parser()), capsys.readouterr().err

    path.write_text('{"name": "Luna", "home": "a boat"}')
    assert train()[0] == 0
    path.write_text('{"home": "a boat",\n "name": "Luna"}')
    assert train()[0] == train(persona="home=a boat; name=Luna")[0] == 0  # the same character
    path.write_text('{"name": "Lena"}')
    status, said = train()
    assert status == 2
    assert "persona (run: name=Luna; home=a boat, asked: name=Lena)" in said
    path.unlink()
    assert train(persona="name=Luna; home=a boat", max_steps=2)[0] == 0
    asked = []
    monkeypatch.setattr(cli, "right_answers", lambda *a: asked.append(a[3]) or {})
    for more in ([], ["--persona", "name=Lena"], ["--persona", ""]):
        evaluate = ["evaluate", "--model", str(run), "--data", "companion", *more]
        assert bit.main(evaluate, cli.parser()) == 0
    assert asked == ["name=Luna; home=a boat", "name=Lena", None]


@pytest.mark.parametrize(
    ("persona", "says"),
    [
        ("nmae=Luna", "persona='nmae=Luna': 'nmae' is no field; expected name, home, likes, maker"),
        ("name=Luna; hom=x", "'hom' is no field; expected name, home, likes, maker, motto"),
        ("name=Luna; home=", "home='': expected a text that is not empty"),
        ("name=Luna; name=Lena", "name is given twice"),
        ("there_is_none.json", 'expected "name=TEXT; home=TEXT", of name, home, likes, maker'),
        ("Luna " * 1000, 'expected "name=TEXT'),
        ('{"name": 3}', "name=3: expected a text that is not empty"),
        ('{"name"', "cannot be read as .json"),
    ],
)
def test_a_persona_that_cannot_be_read_ends_the_command(persona, says, tmp_path, capsys):
    flags = ["--data", "companion", "--persona", persona, "--out", str(tmp_path / "run")]
    assert bit.main(["train", *flags], cli.parser()) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_the_companion_has_a_persona():
    assert bit.DataConfig("companion:es", persona="name=Luna").persona == "name=Luna"
    with pytest.raises(ValueError, match="persona='name=Luna': expected none with data='pydocs'"):
        bit.DataConfig("pydocs", persona="name=Luna")


def test_a_model_that_knows_no_conversations_is_refused(tokenizer):
    with pytest.raises(ValueError, match="knows no conversations"):
        companion.right_answers(None, tokenizer)


class Parrot:
    """Answers every question rightly, or never, in place of a model."""

    def __init__(self, monkeypatch, tokenizer, right):
        self.answers = {}
        for which in WHICH:
            for question in questions("en", Persona(), which, 6, seed=0):
                ids = tuple(companion.encode_messages(tokenizer, question.messages))
                self.answers[ids] = self.answer_to(question) if right else "no"
        self.tokenizer = tokenizer
        monkeypatch.setattr(companion, "generate_tokens", self.generate)

    @staticmethod
    def answer_to(question):
        return " ".join(group[0] for group in question.needs)

    def generate(self, model, prompts, *_):
        rows = [bit.encode(self.tokenizer, self.answers[tuple(ids)]) for ids in prompts]
        return itertools.zip_longest(*rows)


@pytest.mark.parametrize("right", [True, False])
def test_right_answers_are_counted_by_what_was_held_out(few, monkeypatch, tmp_path, right):
    _, tokenizer = bit.prepare_data(bit.DataConfig("companion"), 512, 64, tmp_path)
    Parrot(monkeypatch, tokenizer, right)
    found = companion.right_answers(None, tokenizer, count=6)
    wrong = found.pop("wrong")
    assert found == dict.fromkeys(WHICH, float(right))
    asked = {which: questions("en", None, which, 6, seed=0) for which in WHICH}
    kinds = {which: {question.kind: 1 for question in asked[which]} for which in WHICH}
    assert wrong == ({which: {} for which in WHICH} if right else kinds)


@pytest.mark.parametrize("language", ["en", "es"])
def test_a_training_ends_with_a_conversation(few, monkeypatch, tmp_path, capsys, language):
    monkeypatch.setattr(companion, "ANSWER_TOKENS", 4)
    run, source = tmp_path / "run", f"companion:{language}"
    flags = ["--preset", "ci", "--data", source, "--max-steps", "2", "--out", str(run)]
    assert cli.main(["train", *flags]) == 0
    told = capsys.readouterr().out
    said = [line[2:] for line in told.splitlines() if line.startswith("> ")]
    assert said == shown(language)
    shares = (
        r"right answers: \d+% to .* training, \d+% to new combinations, \d+% to new phrasings\n"
    )
    assert re.search(shares, told)
    assert f"chat --model {run}\n" in told
    assert told.splitlines()[-1].startswith("complete: 2 steps")
    assert cli.main(["train", *flags, "--max-steps", "3", "--sample-prompt", "who?"]) == 0
    assert "right answers" not in capsys.readouterr().out
    timed = [*flags[:4], "--minutes", "0.02", "--out", str(tmp_path / "timed")]
    assert cli.main(["train", *timed]) == 0  # which the count of right answers would exceed
    told = capsys.readouterr().out
    assert "right answers" not in told
    assert "> " in told
