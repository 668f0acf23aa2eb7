"""Conversations in exports: every client is given our token ids, and answers as we do."""

import json

import bitllm_core as bit
from bitllm.conversations import encode_messages
from bitllm.export import export_gguf, export_hf
from tests.export.helpers import CLIENT_WARNINGS

pytestmark = CLIENT_WARNINGS


def test_transformers_has_our_template_token_ids_and_answers(chat_run, conversations, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export_hf(chat_run, tmp_path / "hf", dense=True).path
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert "im_start" in (out / "chat_template.jinja").read_text()
    own = bit.load_model(chat_run)[1]
    for messages in conversations[:6]:
        for end in (1, 3, 5):
            ids = tokenizer.apply_chat_template(
                messages[:end], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            assert ids["input_ids"][0].tolist() == encode_messages(own, messages[:end])
            with torch.inference_mode():
                new = model.generate(**ids, do_sample=False, max_new_tokens=24)
            answer = tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert answer == messages[end]["content"]


def test_the_chat_endpoint_of_llama_cpp_gives_our_answers(chat_run, conversations, tmp_path):
    """llama.cpp's own server, in this process: 20 conversations of three turns, word for word."""
    import xllamacpp

    from bitllm.export.llama_cpp import _parameters

    path = export_gguf(chat_run, tmp_path / "chat.gguf", kind="TQ2_0").path
    parameters = _parameters(xllamacpp, path)
    parameters.use_jinja = True
    server = xllamacpp.Server(parameters)
    for messages in conversations:
        for end in (1, 3, 5):
            request = {"messages": messages[:end], "temperature": 0, "max_tokens": 24}
            found = server.handle_chat_completions({**request, "stream": False})
            found = json.loads(found) if isinstance(found, str) else found
            assert found["choices"][0]["message"]["content"] == messages[end]["content"]


def test_a_modelfile_lies_beside_the_gguf(chat_run, tmp_path):
    usage = export_gguf(chat_run, tmp_path / "chat.gguf", kind="TQ2_0").usage
    assert "llama-cli" in usage
    assert "builds before" not in usage  # which wrote texts with llama-cli, too
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
