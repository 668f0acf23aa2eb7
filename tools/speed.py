"""Measure what docs/performance.md reports; prints one JSON object.

    python tools/speed.py                          # all parts, half an hour on two slow cores
    python tools/speed.py seed generation          # some of them
    python tools/speed.py growth --figure growth.png

Things that are compared take turns in one process, so that a busy machine slows both; ratios are
medians over the turns. Each part runs in a process of its own, so that memory and compiled code of
one do not count in another.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bitllm_core as bit  # noqa: E402
from bitllm import bench as steps  # noqa: E402
from bitllm import dial as choosing  # noqa: E402
from bitllm import estimate_memory, export_hf  # noqa: E402
from bitllm.machine import memory_in_use  # noqa: E402
from bitllm.planner import machine  # noqa: E402
from tests.seed_model import MiLLM  # noqa: E402

SHAPE = {  # for the comparison with the seed script, whose feed-forward is 2048 wide, not gated
    "vocab_size": 30_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
DIAL = ((16_384, 2, 256), (16_384, 4, 256), (16_384, 8, 256), (8192, 4, 256), (16_384, 3, 512))
"""vocabulary, layers, width"""


def median_ratio(rounds, slow, fast):
    pairs = [(slow(), fast()) for _ in range(rounds)]
    return statistics.median(a / b for a, b in pairs), pairs


def seed(rounds=4):
    """A step of the seed script's model, in its float32, and one of ours."""
    net = MiLLM(30_000, 512, 8, 2048, 6, 512)
    optimizer, loss = torch.optim.AdamW(net.parameters(), lr=1e-4), torch.nn.CrossEntropyLoss()
    ids = torch.randint(30_000, (16, 512))

    def theirs():
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(net(ids).view(-1, 30_000), ids.view(-1)).backward()
        optimizer.step()
        return time.perf_counter() - start

    ours = steps.bench_step(bit.ModelConfig(**SHAPE), bit.choose_device(), 16)
    theirs()
    ours()
    ratio, pairs = median_ratio(rounds, theirs, ours)
    speeds = [8192 / statistics.median(column) for column in zip(*pairs, strict=True)]
    return {"ratio": ratio, "seed_tokens_per_s": speeds[0], "tokens_per_s": speeds[1]}


def bench():
    """`bitllm_core.py bench`: ternary and dense, share of the machine's FLOP/s, memory."""
    command = [sys.executable, str(ROOT / "bitllm_core.py"), "bench"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def start():
    """Seconds that compiling adds to the first step of `demo`: empty cache, filled cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        return {
            name: in_process("first_step", environment=environment)
            for name in ("compiled", "compiled_again")
        }


def first_step():
    """Of `demo`: seconds that the first step takes longer than others, tokens/s of these."""
    step = steps.bench_step(bit.PRESETS["demo"][0], bit.choose_device(), 32)
    first, others = step(), [step() for _ in range(4)]
    return {"seconds": first - min(others), "tokens_per_s": 4096 / min(others)}


def dial(rounds=12, windows=32):
    """Microseconds per token of shapes that the dial chooses, in turns, and what it expects."""
    here, found, turns = choosing.measure(), {}, {}
    for vocabulary, layers, width in DIAL:
        given = {"vocab_size": vocabulary, "num_hidden_layers": layers, "hidden_size": width}
        given["max_position_embeddings"] = 128
        [model] = choosing.shapes(choosing.Text(1e9, "any"), given)
        seconds = choosing.step_seconds(model, here, here.compiles, windows * 128) / windows / 128
        name = f"{vocabulary:,}, {layers} x {width}"
        found[name] = {"expected": 1e6 * seconds}
        turns[name] = steps.bench_step(model, here.device, windows)
    times = [[step() for step in turns.values()] for _ in range(rounds)]
    for name, column in zip(found, zip(*times, strict=True), strict=True):
        found[name]["measured"] = 1e6 * statistics.median(column) / (windows * 128)
    return {"flop_per_s": here.rate, **found}


def importing(rounds=5):
    """Seconds that `import bitllm_core` takes after `import torch`."""
    code = (
        "import time, torch\nstart = time.perf_counter()\nimport bitllm_core\n"
        "print(time.perf_counter() - start)"
    )
    run = [sys.executable, "-c", code]
    return {
        "seconds": statistics.median(
            float(subprocess.run(run, capture_output=True, check=True, cwd=ROOT).stdout)
            for _ in range(rounds)
        )
    }


def text_of(megabytes):
    """The documentation that comes with Python, repeated up to so many megabytes."""
    pieces = bit.read_pieces("pydocs", "train", bit.DataConfig())
    text = "".join(piece for piece, _ in pieces)
    return (text * (1 + int(megabytes * 1e6) // len(text)))[: int(megabytes * 1e6)]


def tokenising(source=None, megabytes=10.0, rounds=3):
    """`prepare_data`, from text file to token files, and the library's call on the same text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "text.txt"
        if source:
            path.write_bytes(Path(source).read_bytes())
        else:
            path.write_text(text_of(megabytes), encoding="utf-8")
        config = bit.DataConfig(data=str(path))
        pieces = [p for p, _ in bit.read_pieces(str(path), "train", config)]
        tokenizer = bit.train_tokenizer(pieces, 8192)
        size, count = path.stat().st_size / 1e6, itertools.count()

        def ours():
            out = folder / f"run{next(count)}"
            out.mkdir()
            tokenizer.save(str(out / "tokenizer.json"))  # which is used, not trained again
            begin = time.perf_counter()
            bit.prepare_data(config, 8192, 512, out)
            return time.perf_counter() - begin

        def library():
            begin = time.perf_counter()
            tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            return time.perf_counter() - begin

        with contextlib.redirect_stderr(io.StringIO()):
            ratio, pairs = median_ratio(rounds, library, ours)
        return {"ratio": ratio, "megabytes": size, "mb_per_s": size / min(p[1] for p in pairs)}


def waiting():
    """Shares of the training time that batches and saves take, in 40 steps of `demo`."""
    model, data, train = bit.PRESETS["demo"]
    train = replace(train, max_steps=40, eval_every_steps=0, save_every_steps=20)
    spent, batch = [], bit.TokenData.batch

    def timed(*arguments):
        begin = time.perf_counter()
        result = batch(*arguments)
        spent.append(time.perf_counter() - begin)
        return result

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(bit.TokenData, "batch", timed),
    ):
        state = bit.train(model, data, train, Path(folder, "run"))
    return {
        "data_share": sum(spent) / state.train_seconds,
        "save_s": state.save_seconds / 2,
        "save_share_at_5_minutes": state.save_seconds / 2 / 300,
    }


def saving():
    """Bytes of a checkpoint of the `seed` preset, and seconds that training waits for it."""
    model, _, train = bit.PRESETS["seed"]
    small = {"max_steps": 3, "batch_tokens": 512, "eval_every_steps": 0, "compile": "off"}
    train = replace(train, save_every_steps=1, **small)
    with tempfile.TemporaryDirectory() as folder:
        state = bit.train(model, bit.DataConfig("pydocs"), train, Path(folder, "run"))
        newest = max(Path(folder, "run", "checkpoints").glob("*.safetensors"))
        return {"bytes": newest.stat().st_size, "seconds": state.save_seconds / 3}


def memory():
    """Peak memory of training the `seed` preset / its weights, gradients and optimizer."""
    device = bit.choose_device()
    before = memory_in_use(device.device)
    model, _, train = bit.PRESETS["seed"]
    step = steps.bench_step(model, device, 16, train)
    for _ in range(2):
        step()
    state, peak = estimate_memory(model, train), memory_in_use(device.device)
    return {
        "peak_bytes": peak,
        "bytes_before_the_model": before,
        "weights_gradients_optimizer_bytes": state,
        "ratio": peak / state,
        "ratio_without_libraries": (peak - before) / state,
        "threads": torch.get_num_threads(),
    }


def generation(tokens=248):
    """Tokens/s of ours, of transformers with the exported model, and of the seed script."""
    from transformers import AutoModelForCausalLM

    model, _, train = bit.PRESETS["t4-1h"]
    model = replace(model, max_position_embeddings=256, vocab_size=4096)
    train = replace(train, max_steps=1, batch_tokens=1024, eval_every_steps=0, compile="off")
    with tempfile.TemporaryDirectory() as folder:
        bit.train(model, bit.DataConfig(data="pydocs"), train, Path(folder, "run"))
        net, _ = bit.load_model(Path(folder, "run"))
        exported = export_hf(Path(folder, "run"), Path(folder, "hf"))
        theirs = AutoModelForCausalLM.from_pretrained(exported.path).eval()
    script = MiLLM(30_000, 512, 8, 2048, 6, 512).eval()
    ids = torch.tensor([[1]])

    def transformers():
        begin = time.perf_counter()
        theirs.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return tokens / (time.perf_counter() - begin)

    @torch.no_grad()
    def no_cache(tokens=24):
        """The script reads the whole text for each token, here 232 to 256 tokens."""
        text, begin = torch.ones(1, 232, dtype=torch.int64), time.perf_counter()
        for _ in range(tokens):
            text = torch.cat([text, script(text)[:, -1:].argmax(-1)], dim=1)
        return tokens / (time.perf_counter() - begin)

    transformers()
    ours, hf, loop = zip(
        *[(steps.bench_generation(net, tokens, 1), transformers(), no_cache()) for _ in range(3)],
        strict=True,
    )
    return {
        "parameters": model.num_parameters,
        "tokens_per_s": max(ours),
        "transformers_tokens_per_s": max(hf),
        "seed_loop_tokens_per_s": max(loop),
        "to_transformers": statistics.median(a / b for a, b in zip(ours, hf, strict=True)),
        "to_seed_loop": statistics.median(a / b for a, b in zip(ours, loop, strict=True)),
    }


WIDTHS = {3: (192, 4), 10: (384, 5), 30: (640, 6), 100: (1024, 8)}  # millions: hidden, layers


def growth(figure=None):
    """Tokens/s and peak memory by parameters, context and batch; eager, a process for each."""
    measured = partial(in_process, "eager_step")
    contexts, batches = (128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32)
    found = {
        "parameters": [measured(hidden=h, layers=n) for h, n in WIDTHS.values()],
        "context": [[c, *measured(context=c, windows=2048 // c)[1:]] for c in contexts],
        "batch": [[w * 256, *measured(windows=w)[1:]] for w in batches],
    }
    if figure:
        draw(found, figure)
    return found


def eager_step(hidden=256, layers=4, context=256, windows=4):
    """Parameters, tokens/s and peak bytes of one shape, not compiled."""
    device = bit.choose_device()
    model = bit.ModelConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=context,
    )
    with mock.patch.object(steps, "why_not_compile", return_value="eager"):
        step = steps.bench_step(model, device, windows)
    step()
    speed = windows * context / min(step() for _ in range(2))
    return [model.num_parameters, speed, memory_in_use(device.device)]


def draw(found, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex="col")
    labels = {"parameters": "parameters", "context": "context", "batch": "tokens per step"}
    for column, (name, points) in zip(rows.T, found.items(), strict=True):
        x, speed, peak = zip(*points, strict=True)
        column[0].loglog(x, speed, "o-", label="measured")
        if name == "parameters":
            line = [speed[0] * x[0] / n for n in x]
            column[0].loglog(x, line, "--", color="grey", label="1 / parameters")
            column[0].legend()
        column[1].loglog(x, [p / 2**20 for p in peak], "o-")
        column[1].set_xlabel(labels[name])
    rows[0][0].set_ylabel("tokens/s")
    rows[1][0].set_ylabel("peak memory, MiB")
    figure.savefig(path, dpi=110)


PARTS = {
    part.__name__: part
    for part in (
        *(seed, bench, start, dial, importing, tokenising),
        *(waiting, saving, memory, generation, growth),
    )
}


def in_process(name, environment=None, **options):
    """What a function of this file returns in a process of its own."""
    command = [sys.executable, __file__, name, "--options", json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--text", help="file to tokenise; default: Python's documentation")
    parser.add_argument("--figure", help="PNG file for the part growth")
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)  # see in_process
    flags = parser.parse_args()
    if flags.options is not None:
        with contextlib.redirect_stdout(sys.stderr):
            found = globals()[flags.parts[0]](**flags.options)
        print(json.dumps(found))
        return
    for name in flags.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}: expected some of {', '.join(PARTS)}")
    options = {"tokenising": {"source": flags.text}, "growth": {"figure": flags.figure}}
    result = {}
    for name in flags.parts or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result[name] = in_process(name, **options.get(name, {}))
    print(json.dumps({**result, "machine": machine()}, indent=1))


if __name__ == "__main__":
    main()
