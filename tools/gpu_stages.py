"""The stages of tools/gpu_check.py: what each does, and what it notes.

A stage takes a `Job` and notes rows of figures; an exception is its failure. All train through
`train` itself, on tokens that `gpu_check.py prepare` made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from t4_guard import T4Guard, as_on_t4

import bitllm
import bitllm_core as core
from bitllm.companion import right_answers, talk

ROOT = Path(__file__).resolve().parents[1]
DATA = {"t4-1h": "t4-1h", "t4-3h": "t4-3h", "demo": "demo", "seed-shape": None, "ci": "ci"}
"""Folder of tokens -> the preset whose vocabulary and context it has; None: SEED_SHAPE."""
SEED_SHAPE = core.ModelConfig(
    vocab_size=30_000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    max_position_embeddings=512,
)
"""What `bench` and the seed script are compared in; the script's feed-forward is 2,048 wide."""
T4_BYTES = int(14.6 * 2**30)


@dataclasses.dataclass(frozen=True)
class Job:
    """One stage's surroundings."""

    data: Path
    out: Path
    name: str
    rehearse: bool

    def note(self, **row: Any) -> None:
        """Append a row to results.jsonl, in one write, since several processes do."""
        line = json.dumps({"stage": self.name, **row}) + "\n"
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)

    def steps(self, count: int, tiny: int = 4) -> int:
        return tiny if self.rehearse else count

    def shape(self, name: str, **changes: Any) -> tuple[core.ModelConfig, core.TrainConfig]:
        """Model and training of a preset (or SEED_SHAPE), `ci`'s in a rehearsal."""
        if self.rehearse:
            model, _, train = core.PRESETS["ci"]
            if name == "demo":  # its tokens are conversations in both
                demo = core.PRESETS[name][0]
                sizes = {"vocab_size", "max_position_embeddings"}
                model = dataclasses.replace(model, **{size: getattr(demo, size) for size in sizes})
            train = dataclasses.replace(train, compile="off", device="cpu")
            changes = {**changes, "batch_tokens": 256}
        elif name == "seed-shape":
            model, train = SEED_SHAPE, core.TrainConfig(batch_tokens=16 * 512)
        else:
            model, _, train = core.PRESETS[name]
        mine = {f.name for f in dataclasses.fields(model)} & changes.keys()
        model = dataclasses.replace(model, **{key: changes.pop(key) for key in mine})
        quiet = {"eval_every_steps": 0, "save_every_minutes": 0.0, "log_every_steps": 10}
        return model, dataclasses.replace(train, **{**quiet, **changes})

    @contextlib.contextmanager
    def run_folder(self, name: str) -> Iterator[Path]:
        """A new run folder with the tokens of `name` in it."""
        with tempfile.TemporaryDirectory() as folder:
            tiny = self.rehearse and name != "demo"
            shutil.copytree(self.data / ("ci" if tiny else name), folder + "/run")
            yield Path(folder, "run")


class Enough(Exception):
    """Ends a training from a callback, without its last evaluation and checkpoint."""


class Stopwatch(core.Callback):
    """Times each step and keeps its loss; ends the training after `steps`, if asked to."""

    def __init__(self, steps: int | None) -> None:
        self.steps, self.times, self.losses = steps, [time.perf_counter()], []
        self.skipped, self.scale = 0, 1.0
        self.evals: list[tuple[float, int, float]] = []

    def on_start(self, state: core.TrainState) -> None:
        self.times = [time.perf_counter()]

    def on_step(self, state: core.TrainState, metrics: Any) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(state.loss)
        self.skipped, self.scale = state.skipped, state.scaler.get_scale()
        if self.steps and len(self.losses) >= self.steps:
            raise Enough

    def on_eval(self, state: core.TrainState, metrics: dict[str, Any]) -> None:
        self.evals.append((state.train_seconds, state.step, metrics["val_loss"]))

    def seconds(self) -> float:
        """Of one step, the median of all but the first third."""
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(steps[len(steps) // 3 :])


def trained(
    job: Job, name: str, steps: int | None, callbacks: Sequence[Any] = (), **changes: Any
) -> tuple[Stopwatch, core.ModelConfig, core.TrainConfig]:
    """Train so many steps of a preset (None: to its end) through `train` itself."""
    model, train = job.shape(name, **changes)
    watch = Stopwatch(steps)
    with job.run_folder(name) as run, contextlib.suppress(Enough):
        core.train(model, prepared_data(run), train, run, callbacks=[*callbacks, watch])
    return watch, model, train


def prepared_data(run: Path) -> core.DataConfig:
    manifest = json.loads((run / "data" / "manifest.json").read_text(encoding="utf-8"))
    return core.DataConfig(**manifest["asked"]["data"])


def peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def product_rate(dtype: torch.dtype, n: int) -> float:
    """FLOP/s of n x n x n products, the best of twelve times four."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, best = torch.randn(n, n, device=device, dtype=dtype), float("inf")
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(4):
            b = a @ a
        b[0, 0].item()
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * n**3 / best


def versions(job: Job) -> None:
    """Versions, the device and its product rates."""
    size, gpu = 256 if job.rehearse else 8192, torch.cuda.is_available()
    job.note(
        device=torch.cuda.get_device_name() if gpu else "cpu",
        capability=list(torch.cuda.get_device_capability()) if gpu else None,
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if gpu else 0,
        chosen=str(core.choose_device()),
        python=sys.version.split()[0],
        torch=torch.__version__,
        bfloat16_flop_per_s=product_rate(torch.bfloat16, size),
        float16_flop_per_s=product_rate(torch.float16, size),
        float32_flop_per_s=product_rate(torch.float32, size // 2),
    )


def precision(job: Job, dtype: str) -> None:
    """Losses of 100 steps of t4-1h; float16 as a T4 takes it."""
    on_t4 = as_on_t4() if dtype == "float16" else contextlib.nullcontext()
    with on_t4:
        watch, _, _ = trained(job, "t4-1h", job.steps(100), dtype=dtype, batch_tokens=16_384)
    job.note(dtype=dtype, losses=watch.losses, skipped=watch.skipped, scale=watch.scale)


def guard(job: Job) -> None:
    """Two steps of float16 training in which every operator is one that a T4 has."""
    on_guard = T4Guard()
    with as_on_t4(), on_guard:
        watch, _, _ = trained(
            job, "t4-1h", 2, dtype="float16", compile="off", batch_tokens=2048, max_steps=9
        )
    job.note(operators=len(on_guard.seen), losses=watch.losses)


def resume(job: Job) -> None:
    """Stopped and resumed, twice in a row: the same bits with `deterministic`; how far without."""
    small = {"max_steps": job.steps(24), "batch_tokens": 16_384}
    for deterministic in (True, False):
        model, train = job.shape("t4-1h", deterministic=deterministic, **small)
        half = dataclasses.replace(train, save_every_steps=train.max_steps // 2)
        found = []
        for stops in (False, True):
            with job.run_folder("t4-1h") as run:
                first = Stopwatch(half.max_steps // 2 + 1 if stops else None)
                data = prepared_data(run)
                with contextlib.suppress(Enough):
                    core.train(model, data, half, run, callbacks=[first])
                if stops:
                    core.train(model, data, half, run, callbacks=[], resume="must")
                found.append(core.load_checkpoint(run))
        a, b = (state["model"] for state in found)
        far = max((a[n] - b[n]).abs().max().item() for n in a)
        losses = [state["loss"] for state in found]
        job.note(deterministic=deterministic, equal=far == 0, largest=far, losses=losses)
        assert far == 0 or not deterministic, f"weights differ by {far} after a resume"


def out_of_memory(job: Job) -> None:
    """A micro-batch that does not fit is halved until it does; real on a GPU, faked on a CPU."""
    model, train = job.shape("t4-1h", compile="off")
    windows = train.batch_tokens // model.max_position_embeddings
    real, calls = torch.cuda.is_available() and not job.rehearse, []
    with contextlib.ExitStack() as stack:
        if real:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(6 * 2**30 / total)
        else:
            loss = core.BitLM.loss

            def too_large(self: Any, ids: Any, *rest: Any, **options: Any) -> Any:
                calls.append(len(ids))
                if len(ids) > windows // 2:
                    raise torch.OutOfMemoryError
                return loss(self, ids, *rest, **options)

            stack.enter_context(mock.patch.object(core.BitLM, "loss", too_large))
        watch, _, _ = trained(
            job, "t4-1h", job.steps(4), compile="off", micro_batch_size=windows, dtype="auto"
        )
    job.note(real=real, windows=windows, losses=watch.losses, memory_bytes=peak_memory())


def companion(job: Job) -> None:
    """`demo` to its end: seconds, validation loss, shares of right answers, a conversation."""
    model, train = job.shape("demo", **({"max_steps": 4} if job.rehearse else {}))
    with job.run_folder("demo") as run:
        start = time.perf_counter()
        state = core.train(model, prepared_data(run), train, run, callbacks=[])
        trained_s = time.perf_counter() - start
        found = core.load_model(run)
        right = right_answers(*found, count=job.steps(200, 2))
        seconds = time.perf_counter() - start
        said = list(talk(*found))
    job.note(
        trained_s=trained_s,
        seconds=seconds,
        steps=state.step,
        val_loss=state.val_loss,
        right=right,
        text=said,
    )


def speed(job: Job, preset: str, **changes: Any) -> None:
    """Tokens per second of the training loop, its FLOP use and memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    device, (model, train) = core.choose_device(), job.shape(preset, **changes)
    windows = core.windows_at_once(model, train, device)  # now: it depends on what is free
    watch, _, _ = trained(job, preset, job.steps(40), **changes)
    rate = product_rate(device.dtype, 256 if job.rehearse else 8192)
    tokens = train.batch_tokens / watch.seconds()
    planned = bitllm.memory_parts(model, train, device.dtype, windows=windows, gpu=True)
    job.note(
        preset=preset,
        changes=changes,
        parameters=model.num_parameters,
        tokens_per_s=tokens,
        step_s=watch.seconds(),
        first_step_s=watch.times[1] - watch.times[0],
        flop_use=6 * model.num_parameters * tokens / rate,
        product_flop_per_s=rate,
        memory_bytes=peak_memory(),
        windows=windows,
        planned_bytes=sum(planned.values()),
        loss=watch.losses[-1],
    )


def speed_as_on_t4(job: Job, preset: str) -> None:
    """float16 with a T4's kernels and a T4's memory: what the planner must foresee."""

    def memory(device: Any = None) -> tuple[int, int]:
        return T4_BYTES - torch.cuda.memory_allocated(), T4_BYTES

    with as_on_t4(), mock.patch.object(torch.cuda, "mem_get_info", memory):
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(T4_BYTES / total)
        speed(job, preset, dtype="float16")


def seed_script(job: Job) -> None:
    """The seed script's step against ours, in the shape both are compared in."""
    from tests.seed_model import MiLLM

    model, train = job.shape("seed-shape")
    device = core.choose_device().device
    V, T, B = model.vocab_size, model.max_position_embeddings, train.batch_tokens
    theirs = MiLLM(V, model.hidden_size, model.num_attention_heads, 2048, 6, T).to(device)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    ids = torch.randint(V, (B // T, T + 1)).to(device)
    times = []
    for _ in range(job.steps(12)):
        start = time.perf_counter()
        optimizer.zero_grad()
        logits = theirs(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - start)
    script = B / statistics.median(times[len(times) // 3 :])
    del theirs, optimizer
    watch, _, _ = trained(job, "seed-shape", job.steps(60), compile="off" if job.rehearse else "on")
    ours = B / watch.seconds()
    job.note(seed_tokens_per_s=script, tokens_per_s=ours, ratio=ours / script)


def micro_batches(job: Job) -> None:
    """t4-1h with several numbers of windows at once."""
    for windows in (1, 2) if job.rehearse else (32, 64):
        speed(job, "t4-1h", micro_batch_size=windows)


def ten_minutes(job: Job) -> None:
    """As many steps of t4-1h as ten minutes of a T4 are planned to make: loss against time."""
    count = job.steps(417, 8)
    model, train = job.shape("t4-1h", max_steps=count, eval_every_steps=max(count // 8, 1))
    watch = Stopwatch(None)
    with job.run_folder("t4-1h") as run:
        core.train(model, prepared_data(run), train, run, callbacks=[watch])
        net, tokenizer = core.load_model(run)
        texts = [
            core.generate(net, tokenizer, p, core.SamplingConfig(seed=0, max_new_tokens=80))
            for p in ("The ", "In 19")
        ]
        job.note(curve=watch.evals, skipped=watch.skipped, texts=texts)
        export(job, run)


def export(job: Job, run: Path) -> None:
    """What was trained there, exported there; the packed file is brought home."""
    # float32: float16 may round one of two near tokens above the other
    path, options = job.out / "trained.safetensors", {"embedding": "float32", "overwrite": True}
    packed = bitllm.export_packed(run, path, **options)
    hf = bitllm.export_hf(run, run.parent / "hf")
    net, tokenizer = core.load_model(packed.path)
    greedy = core.SamplingConfig(temperature=0, max_new_tokens=20)
    texts = [core.generate(net, tokenizer, "The ", greedy)]
    texts.append(core.generate(*core.load_model(run), "The ", greedy))
    job.note(packed_bytes=packed.size, hf_bytes=hf.size, greedy=texts)
    assert texts[0] == texts[1], "the exported model writes another text"


def display(job: Job) -> None:
    """The notebook's display against none, in turns, in a real kernel where there is one."""
    try:
        from jupyter_client.manager import start_new_kernel
    except ImportError:
        job.note(in_notebook=False, slower_by=None)
        return
    manager, client = start_new_kernel()
    try:
        paths = [str(ROOT), str(ROOT / "tools")]
        fields = [str(job.data), str(job.out), job.name, job.rehearse]
        code = (
            f"import sys; sys.path[:0] = {paths}; import gpu_stages; gpu_stages.in_turns({fields})"
        )
        reply = client.execute_interactive(code, timeout=300, output_hook=lambda message: None)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    content = reply["content"]
    assert content["status"] == "ok", "\n".join(content.get("traceback", []))


def in_turns(fields: Sequence[Any]) -> None:
    """The part of `display` that runs in the kernel."""
    job = Job(Path(fields[0]), Path(fields[1]), *fields[2:])
    times: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(2):
        for kind, found in times.items():
            with tempfile.TemporaryDirectory() as folder:
                live = [bitllm.LiveDisplay(folder)] if kind == "with" else []
                watch, _, _ = trained(job, "t4-1h", job.steps(150, 6), live)
                found.append(watch.times[-1] - watch.times[len(watch.times) // 3])
    slower = statistics.mean(times["with"]) / statistics.mean(times["without"]) - 1
    job.note(in_notebook=True, slower_by=slower, times=times)


def generation(job: Job) -> None:
    """Tokens per second of greedy texts, with and without CUDA graphs."""
    device, (model, _) = core.choose_device().device, job.shape("t4-1h")
    net = core.BitLM(model).to(device).freeze()
    sampling = core.SamplingConfig(max_new_tokens=job.steps(200, 8), temperature=0)
    texts = []
    for graphs, decoders in ((True, core.DECODERS), (False, {})):
        with mock.patch.object(core, "DECODERS", decoders):
            for rows in (1, 16):
                written = core.generate_tokens(net, [[1]] * rows, sampling)
                texts.append([next(written)[0], next(written)[0]])  # the second is recorded
                start = time.perf_counter()
                texts[-1] += [row[0] for row in written]
                speed = rows * (len(texts[-1]) - 2) / (time.perf_counter() - start)
                job.note(graphs=graphs, rows=rows, tokens_per_s=speed)
    job.note(same_tokens=texts[0] == texts[2] and texts[1] == texts[3])


Stage = Callable[[Job], None]
TOGETHER: dict[str, tuple[Stage, int]] = {
    "versions": (versions, 60),
    "guard": (guard, 60),
    "float32": (lambda job: precision(job, "float32"), 150),
    "bfloat16": (lambda job: precision(job, "bfloat16"), 150),
    "float16": (lambda job: precision(job, "float16"), 150),
    "resume": (resume, 150),
    "memory": (out_of_memory, 90),
    "companion": (companion, 120),
}
ALONE: dict[str, tuple[Stage, int]] = {
    "t4-3h": (lambda job: speed(job, "t4-3h"), 60),
    "t4-1h": (lambda job: speed(job, "t4-1h"), 60),
    "t4-3h dense": (lambda job: speed(job, "t4-3h", linear="dense"), 60),
    "seed": (seed_script, 60),
    "ten minutes": (ten_minutes, 120),
    "t4-1h as on a T4": (lambda job: speed_as_on_t4(job, "t4-1h"), 60),
    "t4-3h as on a T4": (lambda job: speed_as_on_t4(job, "t4-3h"), 60),
    "micro-batches": (micro_batches, 90),
    "t4-1h dense": (lambda job: speed(job, "t4-1h", linear="dense"), 60),
    "generation": (generation, 60),
    "t4-1h eager": (lambda job: speed(job, "t4-1h", compile="off"), 60),
    "display": (display, 90),
}
STAGES = TOGETHER | ALONE
