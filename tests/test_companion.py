"""The companion as a source of text, and the share of its right answers."""

import itertools
import json

import pytest

import bitllm_core as bit
from bitllm import companion
from bitllm.conversations import as_text
from bitllm.corpora import WHICH, Persona, conversations, questions


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


def test_a_persona_is_learned_from_a_file(few, tmp_path):
    path, name = tmp_path / "me.json", 'Ünï "{name}" <|im_start|>'
    path.write_text(json.dumps({"name": name}))
    config = bit.DataConfig("companion", persona=str(path))
    text = "".join(text for text, _ in bit.read_pieces("companion", "train", config))
    assert name in text
    data, tokenizer = bit.prepare_data(config, 512, 64, tmp_path / "run")
    assert (data.training >= 0).any()
    assert (data.training == ~tokenizer.token_to_id("<|im_start|>")).any()


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
    assert set(found) == set(WHICH)
    assert found == dict.fromkeys(WHICH, float(right))
