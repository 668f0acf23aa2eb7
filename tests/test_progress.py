"""The terminal: its end or its code page ends no training."""

import itertools
import os
import subprocess
import sys
import time

import pytest

import bitllm_core as bit
from bitllm import compiling, progress
from bitllm.cli import main
from bitllm.progress import Terminal
from tests import warm
from tests.conftest import ROOT

TRAIN = [sys.executable, str(ROOT / "bitllm_core.py"), "train", "--preset", "ci"]
TRAIN += ["--max-steps", "30", "--eval-every-steps", "10", "--compile", "off", "--out"]


def test_silence_is_broken_where_nobody_may_be_watching(monkeypatch, tiny_corpus, tmp_path, capsys):
    """`colab run` takes a command for dead after 30 seconds of silence; compiling takes longer."""

    def slow(session):
        time.sleep(1)
        raise ValueError("compiled")

    monkeypatch.setattr(compiling, "prepare", slow)
    command = ["train", "--preset", "ci", "--data", str(tiny_corpus), "--vocab-size", "300"]
    command += ["--out", str(tmp_path / "r")]
    for pulse, terminal, broken in ((0.2, False, True), (0.2, True, False), (12, False, False)):
        monkeypatch.setattr(progress, "PULSE_S", pulse)
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer)
        assert main(command) == 2
        _, said = capsys.readouterr().err.split("training tokens")
        assert said.endswith("error: compiled\n")
        assert (said.count("still at work") > 1) == broken


def test_only_silence_is_broken(capsys):
    """A line that was logged, and the progress bar, are no silence."""

    class Over:
        """What happens in each wait for the end of the command."""

        waits = iter([lambda: bit.log.info("a"), lambda: bar.write("b"), lambda: None])

        def wait(self, seconds):
            return not [happens() for happens in itertools.islice(self.waits, 1)]

    bar = Terminal(sys.stderr)
    bit.log_to(sys.stderr)
    with progress.never_silent():
        progress.SPOKEN.clear()
        progress.break_silence(Over())
    assert capsys.readouterr().err == "a\nbstill at work\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_the_log_that_is_gone_ends_no_training(tmp_path, unbuffered):
    reading, writing = os.pipe()
    out, environment = str(tmp_path / "r"), {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    run = warm.start([*TRAIN, out], stdout=subprocess.DEVNULL, stderr=writing, env=environment)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)  # from here on, writing is an error
    assert run.wait(120) == 0
    assert bit.load_checkpoint(out)["step"] == 30


def test_what_a_code_page_lacks_is_replaced(tmp_path):
    out, environment = str(tmp_path / "r"), {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [*TRAIN, out, "--sample-prompt", "naïve → 日本"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "naïve ? ??".encode("cp1252") in done.stdout
