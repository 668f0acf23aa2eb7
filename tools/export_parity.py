"""Run exported models in the real clients and compare what they compute with what we compute.

    python tools/export_parity.py --model runs/demo --data valid.txt

It needs requirements-test.txt. One JSON object per client goes to stdout: size of the export, bits
per ternary weight, and the figures of `compare`. The export tests use the same functions.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # transformers would compile its small functions

import bitllm_core as bit
from bitllm.export import GGUF_KINDS, export_gguf, export_hf, export_packed


class Ours:
    """`bitllm_core`, with the methods that every client here has."""

    def __init__(self, path):
        self.model, self.tokenizer = bit.load_model(path)

    def encode(self, text):
        return bit.encode(self.tokenizer, text)

    @torch.no_grad()
    def logits(self, windows):
        """(B, T, V)"""
        with self.model.hold_weights():
            return torch.cat([self.model(part) for part in windows.split(8)])

    def log_probs(self, windows):
        """One per token of each window but the first, (B, T - 1)."""
        found = self.logits(windows)[:, :-1].log_softmax(-1)
        return found.gather(2, windows[:, 1:, None]).squeeze(2)

    def greedy(self, prompt, count):
        config = bit.SamplingConfig(temperature=0, max_new_tokens=count)
        return [row[0] for row in bit.generate_tokens(self.model, [prompt], config)]


class Transformers(Ours):
    """AutoModelForCausalLM and AutoTokenizer, called as their documentation says."""

    def __init__(self, path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def logits(self, windows):
        return torch.cat([self.model(part).logits for part in windows.split(8)])

    def greedy(self, prompt, count):
        ids = torch.tensor([prompt])
        # the card's sampling settings do not go with do_sample=False
        options = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        text = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options
        )
        return text[0, len(prompt) :].tolist()


class LlamaCpp(Ours):
    """llama.cpp in this process, through xllamacpp."""

    def __init__(self, path):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity, params.warmup = os.fspath(path), -1, False
        params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)
        self.letter = self.encode("a")[0]

    def encode(self, text):
        from urllib.request import Request, urlopen

        body = json.dumps({"content": text, "parse_special": False, "add_special": False})
        address = self.server.listening_address + "/tokenize"
        with urlopen(
            Request(address, body.encode(), {"Content-Type": "application/json"})
        ) as answer:
            return json.load(answer)["tokens"]

    def complete(self, ids, **options):
        """The log-probabilities that llama.cpp gives with each new token."""
        request = {"prompt": ids, "temperature": 0, "logprobs": 1, **options}
        found = self.server.handle_completions(request)["choices"][0]["logprobs"]
        return found["content"] if found else []  # none for a token that is part of a character

    def log_probs(self, windows):
        """A bias makes llama.cpp choose the text's own token; what it reports is from before it."""
        rows = []
        for window in windows.tolist():
            row = []
            for end in range(1, len(window)):
                token = window[end]
                found = self.complete(window[:end], max_tokens=1, logit_bias=[[token, 1e9]])
                if found:
                    assert found[0]["id"] == token
                    row.append(found[0]["logprob"])
                else:
                    row.append(self.distribution(window[:end])[token])
            rows.append(row)
        return torch.tensor(rows)

    def distribution(self, ids):
        """Log-probabilities of all tokens after `ids`, (V)."""
        letter = [[self.letter, 1e9]]  # a whole character, or nothing would be reported
        first = self.complete(ids, max_tokens=1, logprobs=1 << 20, logit_bias=letter)[0]
        found = sorted((token["id"], token["logprob"]) for token in first["top_logprobs"])
        assert [i for i, _ in found] == list(range(len(found)))
        return torch.tensor([value for _, value in found])

    def greedy(self, prompt, count):
        return [token["id"] for token in self.complete(prompt, max_tokens=count)]


def compare(ours, client, windows, prompts, count=48):
    """Compare a client with ours on `windows`, (B, T), and on greedy text after `prompts`.

    Returns:
        perplexity, perplexity_ratio (client / ours); max_delta_logit: for transformers over all
        logits, for llama.cpp over all log-probabilities at 16 places; greedy_same: how many of the
        prompts are continued with the same `count` tokens.
    """
    nats = [-model.log_probs(windows).double().mean().item() for model in (ours, client)]
    if isinstance(client, LlamaCpp):
        reference, delta = ours.logits(windows).log_softmax(-1), 0.0
        for row in range(16):
            row %= len(windows)
            at = (row + 1) * (windows.shape[1] - 2) // 16
            found = client.distribution(windows[row, : at + 1].tolist())
            delta = max(delta, (found - reference[row, at]).abs().max().item())
    else:
        delta = (client.logits(windows) - ours.logits(windows)).abs().max().item()
    same = [ours.greedy(prompt, count) == client.greedy(prompt, count) for prompt in prompts]
    return {
        "perplexity": math.exp(nats[1]),
        "perplexity_ratio": math.exp(nats[1] - nats[0]),
        "max_delta_logit": delta,
        "greedy_same": f"{sum(same)} of {len(same)}",
    }


def text_windows(ours, text, tokens, length):
    """The first `tokens` of a text in windows, (B, length), int64."""
    ids = ours.encode(text[: tokens * 12])[: tokens // length * length]
    return torch.tensor(ids).view(-1, length)


def exports_of(run, folder):
    """Name, client and result of each export of `run`, one after the other."""
    yield "packed", Ours, export_packed(run, folder / "m.safetensors")
    yield "packed int8", Ours, export_packed(run, folder / "8.safetensors", embedding="int8")
    yield "hf", Transformers, export_hf(run, folder / "hf")
    yield "hf dense", Transformers, export_hf(run, folder / "dense", dense=True)
    for kind in GGUF_KINDS:
        yield kind, LlamaCpp, export_gguf(run, folder / f"{kind}.gguf", kind=kind)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="run folder")
    parser.add_argument("--data", required=True, help="a text file the model has not seen")
    parser.add_argument("--tokens", type=int, default=4096)
    flags = parser.parse_args()
    ours = Ours(flags.model)
    length = ours.model.config.max_position_embeddings // 2
    text = Path(flags.data).read_text(encoding="utf-8")
    windows = text_windows(ours, text, flags.tokens, length)
    prompts = [window[:16].tolist() for window in windows[:8]]
    vocab, hidden = ours.model.config.vocab_size, ours.model.config.hidden_size
    trits = sum(layer.trits.numel() for layer in ours.model.bit_linears().values())
    limit = (trits * math.log2(3) + vocab * hidden * 16) / 8
    print(json.dumps({"limit_bytes": round(limit), "tokens": windows.numel(), "trits": trits}))
    with tempfile.TemporaryDirectory() as folder:
        for name, client, exported in exports_of(flags.model, Path(folder)):
            figures = compare(ours, client(exported.path), windows, prompts)
            sizes = {"size": exported.size, "bits_per_weight": round(exported.bits_per_weight, 4)}
            print(json.dumps({"export": name, **sizes, **figures}), flush=True)


if __name__ == "__main__":
    main()
