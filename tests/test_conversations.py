"""Conversations: which tokens are learned, that the mathematics is the plain one, and the chat."""

import dataclasses
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import bitllm_core as bit
from bitllm import chat
from bitllm import conversations as talk
from tests import tiny
from tests.conftest import assert_same_bits, state_of, without_times
from tests.tiny import StopAt

STRANGE = 'x <|im_start|>system\n"quoted" {braces} <|im_end|> \ufdd0 \ufdd1 🐱'
MODEL = dataclasses.replace(tiny.MODEL, max_position_embeddings=32)
TRAIN = dataclasses.replace(tiny.TRAIN, warmup_steps=2)


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("talk") / "a.jsonl"
    animals = {"duck": "quack", "cow": "moo", "dog": "woof", "cat": "meow"}
    rows = [turns(f"what does a {a} say?", f"A {a} says {s}.") for a, s in animals.items()]
    path.write_text("".join(json.dumps({"id": "x", "messages": r}) + "\n" for r in rows * 100))
    return path


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    return bit.prepare_data(bit.DataConfig(str(source)), 300, 32, out)[1]


def test_only_answers_are_learned_with_their_end(tokenizer):
    ids = talk.encode_batch(
        tokenizer, [(talk.as_text(turns("hello", "A dog", "bye", "A cat")), True)]
    )[0]
    learned = [token if token >= 0 else None for token in ids]
    end = tokenizer.token_to_id("<|im_end|>")
    answers = [token for token in learned if token is not None]
    assert answers == [*bit.encode(tokenizer, "A dog"), end, *bit.encode(tokenizer, "A cat"), end]
    assert ids[-1] == ~bit.end_of_text_id(tokenizer)
    whole = tokenizer.decode([t if t >= 0 else ~t for t in ids], skip_special_tokens=False)
    assert whole == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nA dog<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nA cat<|im_end|>\n<|endoftext|>"
    )


def test_what_is_written_in_a_turn_is_data_never_markup(tokenizer):
    ids = talk.encode_messages(tokenizer, turns(STRANGE))
    marks = [ids.count(tokenizer.token_to_id(name)) for name in talk.SPECIAL]
    assert marks == [2, 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert STRANGE.replace("\ufdd0", "\ufffd").replace("\ufdd1", "\ufffd") in text


def test_token_ids_are_those_of_transformers_chat_template(tokenizer):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    theirs.chat_template = talk.TEMPLATE
    for texts in (
        ("hello",),
        ("a dog?", "A dog.", " and now\n\n a cat \n"),
        ("", "x", "é 漢字 🐱"),
    ):
        messages = turns(*texts)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
        expected = expected if isinstance(expected, list) else expected["input_ids"]
        assert talk.encode_messages(tokenizer, messages) == expected


@pytest.mark.parametrize("shape", ["jsonl", "parquet", "from and value"])
def test_rows_of_either_shape_become_conversations(tmp_path, shape):
    messages = turns("hello", "A dog")
    expected = [(talk.as_text(messages), True)]
    path = tmp_path / ("a.parquet" if shape == "parquet" else "a.jsonl")
    if shape == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"messages": [messages], "n": [1]}), path)
    elif shape == "jsonl":
        path.write_text(json.dumps({"messages": messages, "text": "not this"}))
    else:
        names = {"user": "human", "assistant": "gpt"}
        old = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
        path.write_text(json.dumps({"conversations": old}))
    assert list(bit.read_pieces(str(path))) == expected


def test_conversations_without_an_answer_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"messages": turns("hello")})] * 30
    path.write_text("\n".join(rows))
    with pytest.raises(
        ValueError, match=r"text_column='messages': .*turns of an assistant.*a\.jso"
    ):
        list(bit.read_pieces(str(path)))


def test_tokens_lie_signed_in_the_run_folder(source, tmp_path, tokenizer):
    data, _ = bit.prepare_data(bit.DataConfig(str(source)), 300, 32, tmp_path)
    assert data.training.dtype == np.int32
    text = talk.as_text(turns("what does a duck say?", "A duck says quack."))
    [expected] = talk.encode_batch(tokenizer, [(text, True)])
    assert data.training[: len(expected)].tolist() == expected
    assert bit.prepare_data(bit.DataConfig(str(source)), 300, 32, tmp_path)[1].to_str()


def test_conversations_and_plain_texts_in_one_batch_are_as_if_alone(tokenizer):
    talks = [talk.as_text(turns("hello", f"A {animal}")) for animal in ("dog", "cat")]
    pieces = [(talks[0], True), ("plain text", True), (talks[1][5:], False), ("", True)]
    alone = [talk.encode_batch(tokenizer, [piece])[0] for piece in pieces]
    assert [ids for ids, _ in bit.encode_pieces(tokenizer, pieces)] == alone
    assert min(alone[0]) < 0
    assert min(alone[1]) >= 0
    assert alone[3] == [bit.end_of_text_id(tokenizer)]


def test_loss_and_gradients_are_those_of_ignore_index():
    """Against plain torch: the mean over the tokens of the step that count."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(300, (4, 33), generator=generator)
    hidden = torch.rand(4, 33, generator=generator) < 0.7
    windows = torch.where(hidden, ~windows, windows)
    plain, ours = bit.BitLM(MODEL), bit.BitLM(MODEL)
    x, y = torch.where(windows < 0, ~windows, windows)[:, :-1], windows[:, 1:].clone()
    y[y < 0] = -100
    expected = torch.nn.functional.cross_entropy(plain(x).flatten(0, 1), y.flatten())
    expected.backward()
    session = object.__new__(bit.Session)
    session.config = dataclasses.replace(TRAIN, batch_tokens=128)
    session.device = bit.choose_device("cpu", "float32")
    session.processes, session.micro_batch = bit.Processes(), 1
    session.loss, session.hold = ours.loss, ours.hold_weights
    session.state = bit.TrainState(
        ours, [], torch.amp.GradScaler("cpu", enabled=False), session.config
    )
    loss = session.gradients(windows)
    talk.mean_of_counted(loss, ours.parameters(), windows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_step_without_an_answer_changes_nothing_and_is_no_error():
    model = bit.BitLM(MODEL)
    windows = ~torch.randint(300, (2, 33))
    x, y = bit.read_signed(windows[:, :-1], windows[:, 1:])
    loss = model.loss(x, y)
    loss.backward()
    assert loss.item() == 0
    talk.mean_of_counted(loss.detach(), model.parameters(), windows)
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    config = dataclasses.replace(TRAIN, max_steps=150, batch_tokens=512, eval_every_steps=50)
    state = bit.train(MODEL, bit.DataConfig(str(source)), config, out, callbacks=())
    return out, state


def test_a_run_on_conversations_resumes_to_the_same_bits(source, tmp_path):
    def train(out, **options):
        return bit.train(MODEL, bit.DataConfig(str(source)), TRAIN, tmp_path / out, **options)

    train("whole", callbacks=())
    train("cut", callbacks=[StopAt(5)])
    train("cut", callbacks=())
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "cut")


def test_it_answers_and_keeps_the_history(run):
    talker = chat.Chat(
        *bit.load_model(run[0]), bit.SamplingConfig(temperature=0, max_new_tokens=24)
    )
    assert talker.answer("what does a cow say?") == "A cow says moo."
    pieces = list(talker.reply("what does a duck say?"))
    assert len(pieces) > 1
    assert talker.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert [m["role"] for m in talker.messages] == ["user", "assistant"] * 2
    talker.new()
    assert talker.messages == []


def test_a_conversation_longer_than_the_context_drops_its_oldest_turns_and_says_so_once(
    run, capsys
):
    talker = chat.Chat(*bit.load_model(run[0]), bit.SamplingConfig(temperature=0, max_new_tokens=8))
    for _ in range(4):
        talker.answer("what does a duck say?")
    assert capsys.readouterr().err.count("its first turns are left out") == 1
    start = talk.encode_messages(talker.tokenizer, turns("what"))[:2]
    talker.messages.append({"role": "user", "content": "what?"})
    assert talker.prompt()[:2] == start  # whole turns: it begins with a user's
    assert len(talker.messages) == 9  # all are kept, to be shown


def test_what_knows_no_conversations_says_what_to_do(tokenizer, tiny_corpus, tmp_path):
    plain = bit.train_tokenizer([tiny_corpus.read_text("utf-8")], 300)
    with pytest.raises(ValueError, match=r"knows no conversations.*use generate"):
        chat.Chat(bit.BitLM(MODEL), plain)


def test_the_command_line_talks(run, run_cli):
    typed = "what does a dog say?\n/new\n/help\nwhat does a cat say?\n/quit\nnever\n"
    flags = ("chat", "--model", run[0], "--temperature", 0)
    done = run_cli(*flags, input=typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["A dog says woof.", chat.HELP, "A cat says meow."]


def test_help_shows_the_defaults_of_a_conversation():
    from bitllm.cli import parser

    [commands] = [a for a in parser()._actions if isinstance(a.choices, dict)]
    assert "(default: 0.3)" in commands.choices["chat"].format_help()
    assert "(default: 0.8)" in commands.choices["generate"].format_help()
    assert "latin-1" in commands.choices["evaluate"].format_help()


def test_evaluate_counts_the_answers_only(run, source):
    found = bit.evaluate(*bit.load_model(run[0]), source)
    assert found["loss"] < 0.2
    assert found["tokens"] == sum(
        token >= 0
        for ids in talk.encode_batch(bit.load_model(run[0])[1], bit.read_pieces(str(source)))
        for token in ids
    )
