"""The hub, as a stand-in on this machine: up in one repository, and down again anywhere."""

import dataclasses
import json
from unittest import mock

import huggingface_hub
import pytest

import bitllm
import bitllm_core as bit
from bitllm.export import publish, push_to_hub
from bitllm.export.repository import export_repository
from bitllm.start import weights_hash
from tests.export.helpers import train_tiny
from tests.hub import Hub

MAIN = """
import json, os, sys
from bitllm.cli import main
for command in json.loads(sys.argv[1]):
    print("status", main(command), flush=True)
"""
HASH = """
from bitllm import load_model
from bitllm.start import weights_hash
print("weights", weights_hash(load_model("hf:me/stories")[0]))
"""


def commands(*lines):
    return json.dumps([[str(word) for word in line] for line in lines])


def statuses(done):
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line[:7] == "status "]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model of conversations, wide enough for llama.cpp, trained for two steps."""
    folder = tmp_path_factory.mktemp("talker")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    row = json.dumps({"messages": turns}) + "\n"
    (folder / "talk.jsonl").write_text(row * 300)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 64}
    return train_tiny(folder / "run", folder / "talk.jsonl", **sizes)


@pytest.fixture(scope="module")
def hub(talker, runtime, tmp_path_factory):
    """`talker` as the command line publishes it, after a failed try, beside a file of before."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "notes.txt").write_text("mine")
    asked = ["export", "--model", talker, "--author", "A. Author", "--push-to-hub"]
    asked = commands(
        [*asked, "me/broken", "--runtime", folder], [*asked, "me/stories", "--runtime", runtime]
    )
    with Hub(folder).running() as hub:
        hub.done = hub.python(tmp_path_factory.mktemp("home"), MAIN, asked)
        hub.requests.clear()
        yield hub


def test_nothing_is_uploaded_where_a_form_fails(hub):
    """Here the page, which comes last: its runtime is not where the flag says."""
    assert statuses(hub.done)[0] == 2
    assert [created["name"] for created in hub.created] == ["stories"]


def test_one_repository_has_a_card_and_the_model_for_every_program(hub, talker):
    assert statuses(hub.done)[1:] == [0], hub.done.stderr
    assert f"uploaded: {hub.address}/me/stories" in hub.done.stdout
    files = {path.name for path in hub.folder.iterdir()}
    assert files == {
        *("README.md", "config.json", "tokenizer.json", "model.safetensors"),
        *("tokenizer_config.json", "generation_config.json", "chat_template.jinja"),
        *("stories-TQ2_0.gguf", "stories-TQ2_0.Modelfile", "template", "params", "index.html"),
        "notes.txt",  # another's
    }
    card = (hub.folder / "README.md").read_text("utf-8")
    for line in (
        'AutoModelForCausalLM.from_pretrained("me/stories")',
        "ollama run hf.co/me/stories:TQ2_0",
        "llama-cli --hf-repo me/stories --hf-file stories-TQ2_0.gguf -cnv",
        "hf download me/stories index.html",
        "bitllm chat --model hf:me/stories",
        "| author | A. Author |",
        "| trained on | talk.jsonl |",
        "# stories\n",
    ):
        assert line in card
    parameters = json.loads((hub.folder / "params").read_text())
    assert parameters["stop"] == ["<|im_end|>", "<|endoftext|>"]
    assert parameters["num_ctx"] == 64
    assert "range .Messages" in (hub.folder / "template").read_text()


def test_an_upload_is_private_and_its_token_stays_secret(hub, tmp_path):
    assert hub.tokens - {None} == {"Bearer hf_secret"}
    assert hub.created[0]["visibility"] == "private"
    assert "hf_secret" not in hub.done.stdout + hub.done.stderr
    for file in hub.folder.iterdir():
        assert b"hf_secret" not in file.read_bytes()


def test_an_empty_machine_chats_exports_and_trains_on(hub, talker, tiny_corpus, tmp_path):
    name, home = "hf:me/stories", tmp_path / "home"
    asked = commands(
        ["chat", "--model", name, "--temperature", 0, "--max-new-tokens", 5],
        ["export", "--model", name, "--to", "packed", "--out", "p.safetensors"],
        ["evaluate", "--model", name, "--data", tiny_corpus],
        ["info", "--model", name],
        [
            *("train", "--init-from", name, "--data", tiny_corpus, "--out", "run"),
            *("--max-steps", 1, "--batch-tokens", 64, "--compile", "off"),
        ],
    )
    (tmp_path / "empty").mkdir()
    options = {"input": "hello\n/quit\n", "cwd": tmp_path / "empty"}
    done = hub.python(home, MAIN + HASH, asked, **options)
    assert statuses(done) == [0] * 5, done.stderr
    assert not [r for r in hub.requests if "gguf" in r or "index.html" in r]
    net, tokenizer = bit.load_model(talker)
    assert f"weights {weights_hash(net)}" in done.stdout
    again, _ = bit.load_model(tmp_path / "empty" / "p.safetensors")
    assert again.config == dataclasses.replace(net.config, num_key_value_heads=4)
    answer = bitllm.Chat(net, tokenizer, bit.SamplingConfig(5, temperature=0)).answer("hello")
    assert f"\n{answer}\n" in done.stdout
    assert "trained on: talk.jsonl" in done.stdout
    assert (
        bit.read_json(tmp_path / "empty" / "run" / "config.json")["start"]["name"] == "me/stories"
    )
    lines = commands(["info", "--model", name], ["info", "--model", "hf:me/other"])
    for variable, value, why in (
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE is set, and it is not in the cache"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "no answer from the hub, and not in the cache"),
    ):
        done = hub.python(home, MAIN, lines, variables={variable: value})
        assert statuses(done) == [0, 1], done.stderr
        assert done.stderr.count("\n") == 1
        assert f"error: the model me/other could not be loaded from the hub ({why}" in done.stderr


FOREIGN = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "bitnet": {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]},
    "lora": None,
    "ggufs": None,
    "empty": None,
}
SAID = {
    "llama": "hf:me/llama: found a model of another program (model_type llama, LlamaForCausalLM). "
    "Readable here: what bitllm exported, a transformers folder or one packed .safetensors. "
    "Use this one with transformers, or train one with its tokenizer: --tokenizer hf:me/llama",
    "bitnet": "another program (model_type bitnet, BitNetForCausalLM)",
    "lora": "hf:me/lora: found no model, only adapter_config.json, adapter_model.safetensors",
    "ggufs": "found only GGUF files. Readable here: what bitllm exported, a transformers folder or "
    "one packed .safetensors. Run it with llama.cpp: llama-cli -hf me/ggufs",
    "empty": "hf:me/empty: found no files",
    "gated": "gated: ask for access at https://huggingface.co/me/gated, then set HF_TOKEN",
    "none": "not found: check the name, and set HF_TOKEN if it is private",
}


def test_what_is_not_there_or_not_ours_is_one_line(tmp_path):
    others = {name: tmp_path / name for name in FOREIGN}
    for name, config in FOREIGN.items():
        others[name].mkdir()
        if config:
            (others[name] / "config.json").write_text(json.dumps(config))
            (others[name] / "model-00001-of-00002.safetensors").write_bytes(b"gigabytes")
            (others[name] / "tokenizer.json").write_text("{}")
    (others["lora"] / "adapter_config.json").write_text("{}")
    (others["lora"] / "adapter_model.safetensors").write_bytes(b"megabytes")
    (others["ggufs"] / "a-Q4_K_M.gguf").write_bytes(b"GGUF")
    asked = commands(*(["generate", "--model", f"hf:me/{name}"] for name in SAID))
    with Hub(tmp_path / "empty", others=others).running() as hub:
        done = hub.python(tmp_path / "home", MAIN, asked)
    assert statuses(done) == [2, 2, 2, 2, 2, 1, 1]
    lines = done.stderr.splitlines()
    assert len(lines) == len(SAID), done.stderr
    for line, (name, said) in zip(lines, SAID.items(), strict=True):
        assert line.startswith("error: "), name
        assert said in line
    fetched = {r.split()[1].rpartition("/")[2] for r in hub.requests if "/resolve/" in r}
    assert fetched == {"config.json"}


# Models that not every program can load


def test_a_repository_has_what_the_model_allows(tiny_run, tiny_corpus, tmp_path, capsys):
    export_repository(tiny_run, tmp_path / "narrow", "me/narrow", licence="mit")
    files = {path.name for path in (tmp_path / "narrow").iterdir()}
    assert files >= {"narrow-F16.gguf", "model.safetensors", "params"}
    assert "index.html" not in files
    assert "without web page, and F16 in the GGUF file: llama.cpp's tern" in capsys.readouterr().err
    card = (tmp_path / "narrow" / "README.md").read_text("utf-8")
    assert "ollama run hf.co/me/narrow:F16" in card
    assert 'license: "mit"' in card
    assert "index.html" not in card
    seed = train_tiny(tmp_path / "run", tiny_corpus, tie_word_embeddings=False)
    export_repository(seed, tmp_path / "untied", "me/untied")
    files = {path.name for path in (tmp_path / "untied").iterdir()}
    assert files == {"untied.safetensors", "README.md"}
    card = (tmp_path / "untied" / "README.md").read_text("utf-8")
    assert 'bitllm generate --prompt "..." --model hf:me/untied' in card
    assert "transformers" not in card


def test_a_wrong_upload_is_explained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="repo_id='model': expected OWNER/NAME"):
        push_to_hub(tmp_path, "model")
    with pytest.raises(ValueError, match="repo_id='me/': expected OWNER/NAME"):
        publish(tmp_path, "me/")
    with pytest.raises(FileNotFoundError, match="export first"):
        push_to_hub(tmp_path / "none", "me/model")
    refusal = RuntimeError("403")
    refusal.response = mock.Mock(status_code=403)
    for error, said in (
        (refusal, "refused: HF_TOKEN is missing or wrong"),
        (ConnectionError("[Errno 111]"), "no answer from the hub"),
        (RuntimeError("other\nlines"), r"other\)$"),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", mock.Mock(side_effect=error))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with pytest.raises(ConnectionError, match=rf"was not uploaded to me/model \({said}"):
            push_to_hub(tmp_path, "me/model")
