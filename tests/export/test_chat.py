"""Conversations in exports: every client is given our token ids, and answers as we do."""

import json

import pytest

import bitllm_core as bit
from bitllm import chat
from bitllm.conversations import encode_messages
from bitllm.export import export_gguf, export_hf
from tests.export.helpers import CLIENT_WARNINGS
from tests.test_conversations import turns

pytestmark = CLIENT_WARNINGS
SOUNDS = {"duck": "quack", "cow": "moo", "dog": "woof", "cat": "meow", "sheep": "baa", "owl": "hoo"}
GREEDY = bit.SamplingConfig(temperature=0, max_new_tokens=24)
QUESTIONS = [[f"what does a {a} say?", f"and a {b}?"] for a in SOUNDS for b in SOUNDS if a != b][
    :20
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model, wide enough for llama.cpp's ternary blocks, that knows six animals."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [
        turns(f"what does a {a} say?", f"A {a} says {s}.", f"and a {b}?", f"A {b} says {t}.")
        for a, s in SOUNDS.items()
        for b, t in SOUNDS.items()
    ]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows * 10))
    model = bit.ModelConfig(320, 256, 256, 2, 4, 2, 128)
    config = bit.TrainConfig(60, 2048, eval_every_steps=0, compile="off", warmup_steps=4)
    bit.train(model, bit.DataConfig(str(path)), config, folder / "run", callbacks=())
    return folder / "run"


@pytest.fixture(scope="module")
def ours(run):
    """Our greedy answers to each question of each conversation."""
    model, tokenizer = bit.load_model(run)
    found = []
    for questions in QUESTIONS:
        talk = chat.Chat(model, tokenizer, GREEDY)
        for question in questions:
            talk.answer(question)
        found.append(talk.messages)
    assert found[0][1]["content"] == "A duck says quack."
    assert found[0][3]["content"] == "A cow says moo."
    return found


def test_transformers_has_our_template_token_ids_and_answers(run, ours, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export_hf(run, tmp_path / "hf", dense=True).path
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert "im_start" in (out / "chat_template.jinja").read_text()
    own = bit.load_model(run)[1]
    for messages in ours[:6]:
        for end in (1, 3):
            ids = tokenizer.apply_chat_template(
                messages[:end], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            assert ids["input_ids"][0].tolist() == encode_messages(own, messages[:end])
            with torch.inference_mode():
                new = model.generate(**ids, do_sample=False, max_new_tokens=24)
            answer = tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert answer == messages[end]["content"]


def test_the_chat_endpoint_of_llama_cpp_gives_our_answers(run, ours, tmp_path):
    """llama.cpp's own server, in this process: 20 conversations of two turns, word for word."""
    import xllamacpp

    from bitllm.export.llama_cpp import _parameters

    path = export_gguf(run, tmp_path / "chat.gguf", kind="TQ2_0").path
    parameters = _parameters(xllamacpp, path)
    parameters.use_jinja = True
    server = xllamacpp.Server(parameters)
    for messages in ours:
        for end in (1, 3):
            request = {"messages": messages[:end], "temperature": 0, "max_tokens": 24}
            found = server.handle_chat_completions({**request, "stream": False})
            found = json.loads(found) if isinstance(found, str) else found
            assert found["choices"][0]["message"]["content"] == messages[end]["content"]


def test_a_modelfile_lies_beside_the_gguf(run, tmp_path):
    export_gguf(run, tmp_path / "chat.gguf", kind="TQ2_0")
    text = (tmp_path / "chat.Modelfile").read_text()
    assert text.startswith("FROM ./chat.gguf\nTEMPLATE ")
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n" in text
    assert "PARAMETER stop <|im_end|>\n" in text


def test_a_base_model_has_no_template(wide_run, tmp_path):
    out = export_hf(wide_run, tmp_path / "hf").path
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert not (out / "chat_template.jinja").exists()
    export_gguf(wide_run, tmp_path / "a.gguf", kind="TQ2_0")
    assert "TEMPLATE {{ .Prompt }}" in (tmp_path / "a.Modelfile").read_text()
