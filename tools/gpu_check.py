"""Find out on a GPU whether everything works there, and how fast; made to need minutes.

    python tools/gpu_check.py prepare DIR --data TEXT.txt   # on any machine: tokens for the stages
    python tools/gpu_check.py run DIR --out OUT --minutes 10 # on the GPU; no network, no `datasets`
    python tools/gpu_check.py report OUT                     # tables in Markdown

`run` starts each stage in a process of its own, with a time limit. What a stage finds is appended
to OUT/results.jsonl as it comes; what fails is reported there with its traceback, and the others
run. First come the stages that are not timed, several at once; then the timed ones, one at a time,
in order of worth, until the minutes are used up.
`run --stages NAME,NAME` does only these; `run --rehearse` does them with tiny shapes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gpu_stages import ALONE, DATA, SEED_SHAPE, STAGES, TOGETHER, Job  # noqa: E402

import bitllm_core as core  # noqa: E402


def prepare(folder: Path, text: str) -> None:
    """Tokenizers and tokens of a text, for every shape that the stages use."""
    beginning, pieces = "", core.read_pieces(text)
    while len(beginning) < 200_000 and (piece := next(pieces, None)):
        beginning += piece[0]
    for name, preset in DATA.items():
        model = core.PRESETS[preset][0] if preset else SEED_SHAPE
        if name == "ci":  # the rehearsal's: a beginning will do
            text = str(folder / "beginning.txt")
            Path(text).write_text(beginning[:200_000], encoding="utf-8")
        data = core.PRESETS["demo"][1] if name == "demo" else core.DataConfig(data=text)
        tokens, _ = core.prepare_data(
            data, model.vocab_size, model.max_position_embeddings, folder / name
        )
        print(f"{name}: {len(tokens.training):,} tokens", file=sys.stderr)


def start(job: Job, broken: str) -> subprocess.Popen[str]:
    flags = ["--rehearse"] * job.rehearse + ["--break", broken]
    command = [sys.executable, __file__, "stage", job.name, str(job.data), "--out", str(job.out)]
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: Job, child: subprocess.Popen[str], limit: float) -> None:
    """Wait for a stage and keep its output; one that takes too long or dies is noted."""
    try:
        output, _ = child.communicate(timeout=max(limit, 1))
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        job.note(ok=False, error=f"not done after {limit:.0f} s")
    else:
        if child.returncode not in (0, 1):  # 1: it has noted its own failure
            job.note(ok=False, error=f"ended with {child.returncode}: {output[-1000:]}")
    with (job.out / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"=== {job.name}\n{output[-6000:]}\n")


def run(
    folder: Path, out: Path, minutes: float, rehearse: bool, broken: str, wanted: Sequence[str]
) -> int:
    """The wanted stages; returns 1 where one failed or there was no time for one."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").write_text("", encoding="utf-8")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    end, at_once = time.monotonic() + 60 * minutes, 2 if rehearse else 4
    waiting = [Job(folder, out, name, rehearse) for name in TOGETHER if name in wanted]
    running: list[tuple[Job, subprocess.Popen[str], float]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            running.append((job, start(job, broken), time.monotonic()))
        job, child, began = running.pop(0)
        limit = min(began + STAGES[job.name][1], end) - time.monotonic()
        finish(job, child, limit)
    for name, (_, most) in ALONE.items():
        if name not in wanted:
            continue
        job, left = Job(folder, out, name, rehearse), end - time.monotonic()
        if left < (1 if rehearse else 8):
            job.note(ok=False, error="no time left")
        else:
            finish(job, start(job, broken), min(most, left))
    rows = read(out)
    done = {row["stage"] for row in rows if row.get("ok")}
    for name in wanted:
        error = next((r["error"] for r in rows if r["stage"] == name and "error" in r), "ok")
        print(f"{name}: {'ok' if name in done else error.splitlines()[-1]}", file=sys.stderr)
    return int(done != set(wanted))


def stage(job: Job, broken: str) -> int:
    """One stage, in this process; its failure is a row with the traceback."""
    began = time.perf_counter()
    try:
        if job.name in broken.split(","):
            raise RuntimeError(f"{job.name}: broken on purpose")
        STAGES[job.name][0](job)
    except Exception:
        text = traceback.format_exc()
        print(text, file=sys.stderr)
        job.note(ok=False, seconds=time.perf_counter() - began, error=text[-3000:])
        return 1
    job.note(ok=True, seconds=time.perf_counter() - began)
    return 0


def read(out: Path) -> list[dict[str, Any]]:
    text = (out / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def report(out: Path) -> Iterator[str]:
    """Tables in Markdown of what results.jsonl holds."""
    rows = read(out)
    yield "| stage | result | seconds |\n| --- | --- | --- |"
    for row in rows:
        if "ok" in row:
            last = "ok" if row["ok"] else row["error"].strip().splitlines()[-1]
            yield f"| {row['stage']} | {last} | {row.get('seconds', 0):.0f} |"
    yield "\n| speed | tokens/s | step, ms | FLOP use | memory, MB | planned | first step, s |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        if "flop_use" in row:
            yield (
                f"| {row['stage']} | {row['tokens_per_s']:,.0f} | {1e3 * row['step_s']:.1f} | "
                f"{row['flop_use']:.3f} | {row['memory_bytes'] / 2**20:,.0f} | "
                f"{row['planned_bytes'] / 2**20:,.0f} | "
                f"{row['first_step_s']:.1f} |"
            )
    yield "\n| 100 steps | loss 1 | 10 | 50 | 100 | skipped | loss scale |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        if "dtype" in row:
            losses = [row["losses"][min(n, len(row["losses"])) - 1] for n in (1, 10, 50, 100)]
            numbers = " | ".join(f"{x:.4f}" for x in losses)
            yield f"| {row['dtype']} | {numbers} | {row['skipped']} | {row['scale']:g} |"
    for row in rows:
        if not {"ok", "flop_use", "dtype"} & row.keys():
            name = row.pop("stage")
            yield f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in row.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="tokens for the stages")
    command.add_argument("folder", type=Path)
    command.add_argument("--data", required=True, help="a text or a data set of 10 MB or more")
    for name in ("run", "stage"):
        command = commands.add_parser(name, help=f"{name} on the GPU")
        if name == "stage":
            command.add_argument("name", choices=STAGES)
        command.add_argument("folder", type=Path)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--minutes", type=float, default=10)
        command.add_argument("--rehearse", action="store_true", help="tiny shapes, on a CPU")
        command.add_argument("--stages", default=",".join(STAGES), help="only these, by comma")
        command.add_argument("--break", dest="broken", default="", help="stages to fail, to test")
    command = commands.add_parser("report", help="tables of a run")
    command.add_argument("out", type=Path)
    flags = parser.parse_args(arguments)
    if flags.command == "prepare":
        prepare(flags.folder, flags.data)
    elif flags.command == "run":
        wanted = flags.stages.split(",")
        core.require(set(wanted) <= set(STAGES), "stages", flags.stages, f"of {', '.join(STAGES)}")
        return run(flags.folder, flags.out, flags.minutes, flags.rehearse, flags.broken, wanted)
    elif flags.command == "stage":
        return stage(Job(flags.folder, flags.out, flags.name, flags.rehearse), flags.broken)
    elif not (flags.out / "results.jsonl").exists():
        parser.error(f"{flags.out}: no results.jsonl there; `run FOLDER --out {flags.out}` first")
    else:
        print("\n".join(report(flags.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
