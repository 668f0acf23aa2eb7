"""Train lists of configurations, several seeds each, and make the tables of docs/results.md.

    python tools/experiments.py run rates --train train.txt --valid valid.txt
    python tools/experiments.py report rates          # its table, in Markdown
    python tools/experiments.py draw rates            # rates.png: against tokens, or against time
    python tools/experiments.py costs                 # bytes and generation speed
    python tools/experiments.py list

Texts are local files: the figures in the docs are WikiText-2's, unpacked with `gzip -dk`. Each run
is a process of its own and adds a row to the results file when it ends. A row that is there is not
run again, so you can stop a list at any time and add variants or seeds later; a row that was
stopped resumes if its budget is in tokens and it has no patch. `--jobs 2` runs two at a time. A
budget is in tokens (equal work), or in minutes from the start of the process to the last step, with
import, tokenizer and compiling. Minutes are wall-clock; with --clock cpu they are CPU time of one
thread, which other work on the machine does not affect.

The tables are in experiment_tables.py. What only experiments try is a patch of the core
(experiment_patches.py), not one of its settings.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bitllm.planner import machine  # noqa: E402
from bitllm_core import require  # noqa: E402
from tools.experiment_figures import add_row, costs, draw, read_rows, report  # noqa: E402
from tools.experiment_runs import Clock, Run, run_one  # noqa: E402
from tools.experiment_tables import TABLES  # noqa: E402


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_row(name: str, run: Run, flags: argparse.Namespace) -> bool:
    """Run one row in a process of its own and add it to the results file; False if it failed."""
    variant, seed = run.variant.name, run.seed
    command = [sys.executable, __file__, "one", name, "--variant", variant]
    command += ["--seed", str(seed), "--train", str(flags.train)]
    command += ["--valid", str(flags.valid), "--work", str(flags.work)]
    command += ["--clock", flags.clock, "--started", str(time.time())]
    threads = 1 if flags.clock == "cpu" or flags.jobs > 1 else run.table.threads
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    key = {"table": name, "variant": variant, "seed": seed, "commit": commit()}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{variant}, seed {seed}: exit {done.returncode}", file=sys.stderr)
        return False
    row = {**key, **json.loads(done.stdout.splitlines()[-1])}
    add_row(flags.results, row)
    print(f"{variant}, seed {seed}: {row['loss']:.4f}", flush=True)
    return True


def run_table(name: str, flags: argparse.Namespace) -> bool:
    """Run every variant and seed without a row, `--jobs` at a time; False if one failed."""
    table = TABLES[name]
    there = {(row["variant"], row["seed"]) for row in read_rows(flags.results, name)}
    pool, rows = ThreadPoolExecutor(flags.jobs), []
    try:
        for seed in range(flags.seeds or table.seeds):  # the first seed of all, then the second
            for variant in table.variants:
                if flags.only not in variant.name or (variant.name, seed) in there:
                    continue
                run = Run(table, variant, seed, flags.train, flags.valid, flags.work)
                run.prepare()
                rows.append(pool.submit(run_row, name, run, flags))
        done = [row.result() for row in rows]
    finally:  # after Ctrl-C, too, no further row starts
        pool.shutdown(cancel_futures=True)
    return all(done)


def run_this_process(flags: argparse.Namespace) -> None:
    """Run one row and print it as the last line."""
    table = TABLES[flags.table[0]]
    variant = next(v for v in table.variants if v.name == flags.variant)
    run = Run(table, variant, flags.seed, flags.train, flags.valid, flags.work)
    out = flags.work / "runs" / re.sub(r"\W+", "-", f"{flags.table[0]} {variant.name} {run.seed}")
    row = run_one(run, Clock(flags.clock, flags.started), out)
    print(json.dumps({**row, "machine": machine()}))


def check(flags: argparse.Namespace) -> None:
    """ValueError for flags that cannot work, before anything is run or written."""
    for name in flags.table:
        require(name in TABLES, "table", name, f"one of {', '.join(TABLES)}")
    require(flags.jobs >= 1, "jobs", flags.jobs, "at least 1")
    require(flags.seeds is None or flags.seeds >= 1, "seeds", flags.seeds, "at least 1")
    names = flags.table or list(TABLES)
    if flags.command == "run":
        known = [variant.name for name in names for variant in TABLES[name].variants]
        there = any(flags.only in name for name in known)
        require(there, "only", flags.only, f"a part of one of: {'; '.join(known)}")
    read = {"run": ("train", "valid"), "costs": ("valid",)}.get(flags.command, ())
    if flags.command == "run" and all(TABLES[name].pydocs for name in names):
        read = ()  # it comes with Python
    for name in read:
        path = getattr(flags, name)
        require(path.is_file(), name, str(path), "a text file, such as WikiText-2's")
    if flags.command == "draw":
        require(bool(flags.table), "table", "", f"one of {', '.join(TABLES)}")
        folder = (flags.out or Path()).parent
        require(folder.is_dir(), "out", str(flags.out), "a file in an existing folder")
        known = [variant.name for name in flags.table for variant in TABLES[name].variants]
        wrong = set(flags.variants or ()) - set(known)
        require(not wrong, "variants", wrong, f"some of: {'; '.join(known)}")
    if flags.command in ("report", "draw"):
        for name in flags.table:
            there = bool(read_rows(flags.results, name))
            require(there, "results", str(flags.results), f"rows of {name}; run {name} first")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the tables of docs/results.md.")
    parser.add_argument("command", choices=("run", "one", "report", "draw", "costs", "list"))
    parser.add_argument("table", nargs="*", help=", ".join(TABLES))
    parser.add_argument("--train", type=Path, default=Path("train.txt"), help="training text")
    parser.add_argument("--valid", type=Path, default=Path("valid.txt"), help="validation text")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="for its files")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in --work")
    parser.add_argument("--seeds", type=int, help="how many; default: the table's")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of minutes")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, of one thread each")
    parser.add_argument("--only", default="", help="variants with this in their name")
    parser.add_argument("--out", type=Path, help="of draw: the .png file")
    parser.add_argument("--variants", nargs="+", help="of draw: these lines only")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    flags.results = flags.results or flags.work / "results.jsonl"
    try:
        check(flags)
    except ValueError as error:
        parser().error(str(error))
    flags.work.mkdir(parents=True, exist_ok=True)
    if flags.command == "list":
        for name, table in TABLES.items():
            print(f"{name}: {table.about}; {len(table.variants)} variants")
    elif flags.command == "one":
        run_this_process(flags)
    elif flags.command == "costs":
        print(costs(flags.valid, flags.work))
    elif flags.command == "draw":
        for name in flags.table:
            rows = read_rows(flags.results, name)
            rows = [row for row in rows if row["variant"] in (flags.variants or [row["variant"]])]
            draw(name, rows, flags.out or Path(f"{name}.png"))
    elif flags.command == "run":
        done = [run_table(name, flags) for name in flags.table or TABLES]
        return 0 if all(done) else 1
    else:
        for name in flags.table or TABLES:
            if rows := read_rows(flags.results, name):
                print(f"\n### {name}: {TABLES[name].about}\n")
                print(report(name, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
