"""Measure what docs/reliability.md reports: kills, faults, damage, and the cost of saving.

    python tools/reliability.py                    # everything, some 40 minutes on two slow cores
    python tools/reliability.py --kills 20 --calls 3 --damages 20

Prints a table in Markdown. Exits with 1 if a run was lost, ended with other bits, or was ended by
an error of its mirror. Prints the seed of all random choices; --seed repeats them.
"""

import argparse
import contextlib
import dataclasses
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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bitllm_core as bit  # noqa: E402
from bitllm import mirror  # noqa: E402
from bitllm.planner import machine  # noqa: E402
from tests import test_reliability as trial  # noqa: E402
from tests.faults import corrupt, inject, killed_run, matrix  # noqa: E402

TEXT = "".join(f"{i} cats sat on {i + 1} mats.\n\n" for i in range(250))


def print_row(*cells):
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def counts(outcomes: Counter[str]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))


def kills(folder: Path, chance: random.Random, wanted: int) -> int:
    """SIGKILL a real process at random moments, `wanted` times; return the number of failures."""
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
    print_row(f"SIGKILL at random moments of {runs} runs", done, f"{wrong} runs with other bits")
    return wrong


def faults(folder: Path, text: Path, calls: int) -> int:
    """Every fault at each call of a save, in the run folder and in the mirror."""
    mirror.RETRY_S, bit.SAVE_RETRY_S = (0.01, 0.05), 0.0
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
            shown = "run folder" if place == "run" else "mirror"
            print_row(f"{kind}, {shown}", reached, counts(found))
    return wrong


def damages(folder: Path, text: Path, chance: random.Random, times: int) -> int:
    """Damage three files of a run at random places and resume it."""
    (folder / "whole").mkdir()
    trial.train(folder / "whole", text)
    expected, found = trial.result_of(folder / "whole" / "run"), Counter()
    for _ in range(times):
        case = folder / "case"
        shutil.copytree(folder / "whole", case)
        paths = sorted((case / "run").rglob("*"))
        files = [p for p in paths if p.is_file() and not p.name.startswith(".")]  # no lock
        damaged = chance.sample(files, 3)
        for path in damaged:
            corrupt(path, chance)
        try:
            found[trial.outlived(case, text, damaged, expected)] += 1
        except Exception as error:
            found["LOST"] += 1
            print(repr(error), file=sys.__stderr__)
        shutil.rmtree(case)
    print_row("three files damaged at random", times, counts(found))
    return found["LOST"]


def saving(folder: Path, text: Path) -> None:
    """What saving the seed preset (50M parameters) costs: the training, and the thread."""
    saves = 3
    model, _, train = bit.PRESETS["seed"]
    train = dataclasses.replace(
        train,
        max_steps=2 * saves,
        batch_tokens=1024,
        save_every_steps=2,
        eval_every_steps=0,
        dtype="float32",
        compile="off",
    )
    data, run = bit.DataConfig(data=str(text)), folder / "run"
    state = bit.train(model, data, train, run, callbacks=())
    size = bit.list_checkpoints(run / "checkpoints")[-1].stat().st_size
    seconds = state.save_seconds / saves
    print_row(f"training waits for a save of {size / 1e6:.0f} MB", saves, f"{seconds:.2f} s")
    contents, taken = state.state_dict(), []
    for contents["step"] in range(1, saves + 1):
        start = time.perf_counter()
        bit.save_checkpoint(folder / "checkpoints", contents)
        taken.append(time.perf_counter() - start)
    print_row("until it is safe on the disk", saves, f"{statistics.median(taken):.2f} s")
    start = time.perf_counter()
    bit.newest_checkpoint(folder / "checkpoints")
    print_row("reading it", "1", f"{time.perf_counter() - start:.2f} s")


def starting(folder: Path, text: Path) -> None:
    """Seconds from the start of a process to its first step, for the seed preset's shape."""
    shape = ["train", "--preset", "seed", "--data", str(text), "--batch-tokens", "512"]
    shape += ["--compile", "off", "--dtype", "float32", "--eval-every-steps", "0"]
    command = [sys.executable, str(ROOT / "bitllm_core.py"), *shape, "--out", str(folder / "run")]
    for name, steps in (("the first start", "1"), ("resuming from 617 MB", "2")):
        options = ["--max-steps", steps, "--log-every-steps", "1"]
        start, log = time.time(), folder / "run" / "metrics.jsonl"
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            lines = bit.MetricsLog.read(log)
            if any("loss" in line and line["step"] == int(steps) for line in lines):
                break
            time.sleep(0.05)
        print_row(f"{name}, until a step is done", "1", f"{time.time() - start:.1f} s")
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="0: none")
    parser.add_argument("--calls", type=int, default=12, help="of each operation, at most")
    parser.add_argument("--damages", type=int, default=200, help="0: none")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    flags = parser.parse_args()
    chance, wrong = random.Random(flags.seed), 0
    print(f"seed {flags.seed}; {machine()}\n")
    print_row("what", "times", "outcome")
    print_row("---", "---", "---")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, long = folder / "text.txt", folder / "long.txt"
        text.write_text(TEXT, encoding="utf-8")
        long.write_text(TEXT * 20, encoding="utf-8")
        for part in ("kills", "faults", "damages", "saving", "starting"):
            (folder / part).mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            wrong += kills(folder / "kills", chance, flags.kills) if flags.kills else 0
            wrong += faults(folder / "faults", text, flags.calls) if flags.calls else 0
            if flags.damages:
                wrong += damages(folder / "damages", text, chance, flags.damages)
            saving(folder / "saving", long)
            starting(folder / "starting", long)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
