"""Whatever goes wrong at whatever moment: no run lost, no other result, no crash by the mirror."""

import dataclasses
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import bitllm_core as bit
from bitllm import mirror as mirroring
from tests import tiny, warm
from tests.conftest import ROOT, assert_same_bits, state_of, without_times
from tests.faults import corrupt, inject, killed_run, matrix

TRAIN = dataclasses.replace(
    tiny.TRAIN, max_steps=6, batch_tokens=64, eval_every_steps=3, eval_tokens=64, save_every_steps=2
)


def train(folder, corpus, mirror=True, **changes):
    return bit.train(
        tiny.MODEL,
        bit.DataConfig(data=str(corpus)),
        dataclasses.replace(TRAIN, **changes),
        folder / "run",
        mirror=folder / "mirror" if mirror else None,
        callbacks=(),
    )


def result_of(run):
    return state_of(run), without_times(run)


def assert_same_result(a, b):
    assert_same_bits(a[0], b[0])
    assert a[1] == b[1]


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(mirroring, "RETRY_S", (0.01, 0.05))
    monkeypatch.setattr(bit, "SAVE_RETRY_S", 0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_corpus):
    """What a run ends with where nothing fails, and how often it called each operation."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with inject(folder) as calls:
        train(folder, tiny_corpus)
    return result_of(folder / "run"), calls.calls


def message_of(folder, corpus) -> str:
    """Train; what the command line would say in one line, or nothing."""
    try:
        train(folder, corpus)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def endure(folder: Path, corpus: Path, place: str, fault, expected) -> str:
    """Train under a fault, then without it, then from the mirror alone; return what happened.

    AssertionError where a run was lost, ended with other bits, or fell over the mirror.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with inject(folder / place, fault) as injection:
        message = message_of(folder, corpus)
    refused = "is not known" in message  # nothing local yet, and the mirror cannot be looked at
    assert place == "run" or refused or not message, f"training ended: {message}"
    train(folder, corpus)
    assert_same_result(result_of(folder / "run"), expected)
    shutil.rmtree(folder / "run")
    train(folder, corpus)
    assert_same_result(result_of(folder / "run"), expected)
    if not injection.struck:
        return "not reached"
    return "refused to start" if refused else "ended with a message" if message else "continued"


@pytest.mark.parametrize("place", ["run", "mirror"])
def test_faults_at_any_call_lose_nothing(tmp_path, tiny_corpus, undisturbed, place):
    expected, calls = undisturbed
    seed = random.randrange(10**6)
    faults = random.Random(seed).sample(list(matrix(calls, most=20)), 12)
    for number, fault in enumerate(faults):
        print("seed", seed, fault)
        endure(tmp_path / str(number), tiny_corpus, place, fault, expected)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run", "mirror"])
def test_every_fault_at_every_call_loses_nothing(tmp_path, tiny_corpus, undisturbed, place):
    expected, calls = undisturbed
    for number, fault in enumerate(matrix(calls, most=12)):
        print(fault)
        endure(tmp_path / str(number), tiny_corpus, place, fault, expected)
        shutil.rmtree(tmp_path / str(number))


def outlived(folder: Path, corpus: Path, damaged: list[Path], expected) -> str:
    """Go on with damaged files; return what happened. AssertionError for another end."""
    message = message_of(folder, corpus)
    if message:  # a damaged tokenizer or configuration is named, not used
        assert str(folder / "run") in message
        return "refused, naming the file"
    found = result_of(folder / "run")
    assert_same_bits(found[0], expected[0])
    # a digit of a log's last line, or of a count in the tokens' manifest, has nothing to tell it by
    if all(path.parent.name == "checkpoints" or path.suffix == ".bin" for path in damaged):
        assert found[1] == expected[1]
    return "the same end"


def test_damaged_files_are_passed_over_or_refused(tmp_path, tiny_corpus, undisturbed):
    """Any damage to local files: the mirror, or an older checkpoint, gives the same end."""
    expected, _ = undisturbed
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", tiny_corpus)
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for number in range(15):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        paths = sorted((folder / "run").rglob("*"))
        files = [p for p in paths if p.is_file() and not p.name.startswith(".")]
        damaged = chance.sample(files, 3)
        for path in damaged:
            print("seed", seed, path.relative_to(folder), corrupt(path, chance))
        assert outlived(folder, tiny_corpus, damaged, expected)


CLI = ["train", "--preset", "ci", "--save-every-steps", "3", "--eval-every-steps", "10"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "whole"
    command = [sys.executable, str(ROOT / "bitllm_core.py"), *CLI, "--out", str(out)]
    warm.run([sys.executable, "-c", ""])  # so that the time is without the first import of torch
    start = time.monotonic()
    assert killed_run(command, random.Random(), rounds=0) == [0]
    return out, time.monotonic() - start


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_goes_on_bit_for_bit(tmp_path, uninterrupted, number):
    (whole, seconds), seed = uninterrupted, random.randrange(10**6)
    command = [sys.executable, str(ROOT / "bitllm_core.py"), *CLI, "--out", str(tmp_path / "run")]
    command += ["--mirror", str(tmp_path / "mirror")]
    rounds = 12 if number == signal.SIGKILL else 4
    codes = killed_run(command, random.Random(seed), rounds, number, seconds)
    print("seed", seed, "exit codes", codes)
    expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
    # -number or 1: while Python was still importing, before the program began
    assert set(codes) <= {0, expected, -number, 1}
    assert codes[-1] == 0
    assert_same_result(result_of(whole), result_of(tmp_path / "run"))
    best = [bit.newest_checkpoint(p / "checkpoints", "best") for p in (whole, tmp_path / "run")]
    assert best[0]["val_loss"] == best[1]["val_loss"]


@pytest.mark.slow
def test_a_hundred_kills_change_no_bit(tmp_path, uninterrupted):
    (whole, seconds), seed, kills = uninterrupted, random.randrange(10**6), 0
    chance = random.Random(seed)
    for number in range(100):
        run = tmp_path / str(number % 5)
        command = [sys.executable, str(ROOT / "bitllm_core.py"), *CLI, "--out", str(run)]
        codes = killed_run(command, chance, 100 - kills, seconds=seconds)
        kills += codes.count(-signal.SIGKILL)
        print("seed", seed, run, codes)
        assert_same_result(result_of(whole), result_of(run))
        shutil.rmtree(run)
        if kills >= 100:
            break
