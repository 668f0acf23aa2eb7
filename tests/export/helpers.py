"""What the tests of several formats share."""

import json

import pytest

import bitllm_core as bit
from tests.test_conversations import turns
from tools.export_parity import LlamaCpp, Transformers

CLIENT_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
"""the clients' own, for `pytestmark`"""
GREEDY_TOKENS = 8
PERPLEXITY_WITHIN = {Transformers: 1e-3, LlamaCpp: 5e-3}
"""of 1. Measured: 2e-5 (transformers) and 1e-4 (llama.cpp); wrong conventions: 6e-2 or more."""
LARGEST_DELTA = 1.0
"""of a logit. An activation that rounds to the neighbouring 8-bit step moves logits by hundredths,
0.1 at most where it was measured; a wrong row of a tensor moves them by whole units."""


def agrees(figures, client):
    """The check that every export passes and every wrong one fails."""
    same = figures["greedy_same"].split(" of ")
    close = abs(figures["perplexity_ratio"] - 1) < PERPLEXITY_WITHIN[client]
    return same[0] == same[1] and close and figures["max_delta_logit"] < LARGEST_DELTA


def train_tiny(out, corpus, tokenizer="bpe", **changes):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    model = bit.ModelConfig(
        **{**sizes, "num_hidden_layers": 1, "max_position_embeddings": 16, **changes}
    )
    training = bit.TrainConfig(2, batch_tokens=64, optimizer="adamw", compile="off")
    data = bit.DataConfig(data=str(corpus), tokenizer=tokenizer)
    bit.train(model, data, training, out, callbacks=[])
    return out


SOUNDS = {"duck": "quack", "cow": "moo", "dog": "woof", "cat": "meow", "sheep": "baa", "owl": "hoo"}


def train_chat(folder):
    """A model, wide enough for llama.cpp's ternary blocks, that knows six animals."""
    rows = [
        turns(
            *(f"what does a {a} say?", f"A {a} says {SOUNDS[a]}."),
            *(f"and a {b}?", f"A {b} says {SOUNDS[b]}."),
            *(f"and a {c}?", f"A {c} says {SOUNDS[c]}."),
        )
        for a in SOUNDS
        for b in SOUNDS
        for c in SOUNDS
    ]
    folder.mkdir(exist_ok=True)
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows * 2))
    model = bit.ModelConfig(320, 256, 256, 2, 4, 2, 128)
    config = bit.TrainConfig(60, 1024, eval_every_steps=0, compile="off", warmup_steps=4)
    bit.train(model, bit.DataConfig(str(path)), config, folder / "run", callbacks=())


def started(kind):
    """A browser, where it is installed."""
    if kind.path is None:
        pytest.skip(f"no {kind.__name__} on the path")
    return kind()


def mutate(exported, out, how):
    """The packed file `exported` with one convention changed, as a model to export."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from bitllm.export.packed import pack5

    tensors = load_file(exported.path)
    with safe_open(exported.path, framework="pt") as file:
        metadata = file.metadata()
    model, _ = bit.load_model(exported.path)
    for name, linear in model.bit_linears().items():
        scale = tensors[f"{name}.weight_scale"]
        if how == "scale inverted":
            tensors[f"{name}.weight_scale"] = 1 / scale
        elif how == "mean re-taken":
            tensors[f"{name}.weight_scale"] = scale * linear.trits.float().abs().mean()
        elif how == "q/k permuted" and name.endswith(("q_proj", "k_proj")):
            rows = linear.trits.view(-1, 2, 32, 256).transpose(1, 2).reshape(-1, 256)
            tensors[f"{name}.trits"] = pack5(rows)
    save_file(tensors, out, metadata)
    return out


def rewrite(path, out, change):
    """A safetensors file with `change(header, body)` applied to its JSON header and its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    change(header, body)
    head = json.dumps(header).encode()
    out.write_bytes(len(head).to_bytes(8, "little") + head + body)
    return out
