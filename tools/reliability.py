"""Measure what docs/reliability.md reports: kills, faults, damage, and what saving costs.

    python tools/reliability.py                    # all of it, some 40 minutes on two slow cores
    python tools/reliability.py --kills 20 --calls 3 --damages 20

Prints a table in Markdown and exits with 1 where a run was lost, ended with other bits, or was
ended by its mirror. The seed of everything random is printed, and --seed repeats it.
"""

import argparse
import contextlib
import io
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bitllm_core as bit  # noqa: E402
from tests import test_reliability as trial  # noqa: E402
from tests.faults import corrupt, inject, killed_run, matrix  # noqa: E402

TEXT = "".join(f"{i} cats sat on {i + 1} mats.\n\n" for i in range(250))


def say(*cells):
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def kills(folder: Path, chance: random.Random, wanted: int) -> int:
    """SIGKILL a real process at random moments, `wanted` times in all; return the failures."""
    command = [sys.executable, str(ROOT / "bitllm_core.py"), *trial.CLI, "--out"]
    whole = folder / "whole"
    start = time.monotonic()
    killed_run([*command, str(whole)], chance, rounds=0)
    seconds = time.monotonic() - start
    expected, done, runs, wrong = trial.result_of(whole), 0, 0, 0
    while done < wanted:
        run = folder / str(runs)
        mirror = ["--mirror", str(folder / f"mirror{runs}")] if runs % 2 else []
        codes = killed_run([*command, str(run), *mirror], chance, wanted - done, seconds=seconds)
        done += codes.count(-signal.SIGKILL)
        runs += 1
        try:
            trial.assert_same_result(trial.result_of(run), expected)
        except (AssertionError, TypeError):
            wrong += 1
        shutil.rmtree(run)
    say(f"SIGKILL at random moments of {runs} runs", done, f"{wrong} runs with another end")
    return wrong


def faults(folder: Path, text: Path, calls: int) -> int:
    """Every fault at every call of a save, in the run folder and in the mirror."""
    bit.MIRROR_RETRY_S, bit.SAVE_RETRY_S = (0.01, 0.05), 0.0
    (folder / "plain").mkdir()
    with inject(folder / "plain") as counted:
        trial.train(folder / "plain", text)
    expected, wrong = trial.result_of(folder / "plain" / "run"), 0
    for place in ("run", "mirror"):
        outcomes: dict[str, Counter[str]] = {}
        for fault in matrix(counted.calls, most=calls):
            where = folder / "case"
            try:
                outcome = trial.endure(where, text, place, fault, expected)
            except Exception as error:
                outcome, wrong = "LOST", wrong + 1
                print(fault, repr(error), file=sys.__stderr__)
            outcomes.setdefault(fault.kind, Counter())[outcome] += 1
            shutil.rmtree(where, ignore_errors=True)
        for kind, found in outcomes.items():
            reached = sum(found.values()) - found.pop("not reached", 0)
            told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(found.items()))
            say(f"{kind}, {'run folder' if place == 'run' else 'mirror'}", reached, told)
    return wrong


def damages(folder: Path, text: Path, chance: random.Random, times: int) -> int:
    """Damage three files of a run at random places, and go on."""
    (folder / "whole").mkdir()
    trial.train(folder / "whole", text)
    expected, found = trial.result_of(folder / "whole" / "run"), Counter()
    for _ in range(times):
        case = folder / "case"
        shutil.copytree(folder / "whole", case)
        files = sorted(p for p in (case / "run").rglob("*") if p.is_file())
        damaged = chance.sample(files, 3)
        for path in damaged:
            corrupt(path, chance)
        try:
            found[trial.outlived(case, text, damaged, expected)] += 1
        except Exception as error:
            found["LOST"] += 1
            print(repr(error), file=sys.__stderr__)
        shutil.rmtree(case)
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(found.items()))
    say("three files damaged at random", times, told)
    return found["LOST"]


def costs(folder: Path) -> None:
    """What a save of the seed preset (50M parameters) costs training."""
    model_config, _, train_config = bit.PRESETS["seed"]
    model = bit.BitLM(model_config)
    optimizers = bit.make_optimizers(model, train_config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = bit.TrainState(model, optimizers, scaler, train_config)
    state.trits = {name: layer.ternary()[0] for name, layer in model.bit_linears().items()}
    writer = bit.CheckpointWriter(folder / "checkpoints", {"step": 2})
    stalls, whole = [], []
    for state.step in range(1, 6):
        start = time.perf_counter()
        writer.save(state.state_dict())
        stalls.append(time.perf_counter() - start)
        writer.finished(wait=True)
        whole.append(time.perf_counter() - start)
    size = bit.list_checkpoints(folder / "checkpoints")[-1].stat().st_size
    say(
        f"training waits for a save of {size / 1e6:.0f} MB",
        "5",
        f"{statistics.median(stalls):.2f} s",
    )
    say("until it is safe on the disk", "5", f"{statistics.median(whole):.2f} s")
    start = time.perf_counter()
    bit.newest_checkpoint(folder / "checkpoints")
    say("reading it", "1", f"{time.perf_counter() - start:.2f} s")


def start_time(folder: Path, text: Path) -> None:
    """Seconds from the start of a process to its first step, for the seed preset's shape."""
    text.write_text(TEXT * 20, encoding="utf-8")
    shape = ["train", "--preset", "seed", "--data", str(text), "--batch-tokens", "512"]
    shape += ["--compile", "off", "--dtype", "float32", "--eval-every-steps", "0"]
    command = [sys.executable, str(ROOT / "bitllm_core.py"), *shape, "--out", str(folder / "run")]
    for name, steps in (("the first start", "1"), ("going on from 617 MB", "2")):
        options = ["--max-steps", steps, "--log-every-steps", "1"]
        start, log = time.time(), folder / "run" / "metrics.jsonl"
        process = subprocess.Popen([*command, *options], stdout=-3, stderr=-3)
        while process.poll() is None:
            lines = bit.MetricsLog.read(log)
            if any("loss" in line and line["step"] == int(steps) for line in lines):
                break
            time.sleep(0.05)
        say(f"{name}, until a step is done", "1", f"{time.time() - start:.1f} s")
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--calls", type=int, default=12, help="of each operation, at most")
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    flags = parser.parse_args()
    chance, wrong = random.Random(flags.seed), 0
    print(f"seed {flags.seed}; {bit.machine()}\n")
    say("what", "times", "outcome")
    say("---", "---", "---")
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        for part in ("kills", "faults", "damages", "costs", "start"):
            (Path(name) / part).mkdir()
        silent = io.StringIO()
        with contextlib.redirect_stderr(silent):
            wrong += kills(Path(name) / "kills", chance, flags.kills) if flags.kills else 0
            wrong += faults(Path(name) / "faults", text, flags.calls) if flags.calls else 0
            wrong += damages(Path(name) / "damages", text, chance, flags.damages)
            costs(Path(name) / "costs")
            start_time(Path(name) / "start", Path(name) / "long.txt")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
