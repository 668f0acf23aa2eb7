"""The terminal: its end or its code page ends no training."""

import os
import subprocess
import sys

import pytest

import bitllm_core as bit
from tests import warm
from tests.conftest import ROOT

TRAIN = [sys.executable, str(ROOT / "bitllm_core.py"), "train", "--preset", "ci"]
TRAIN += ["--max-steps", "30", "--eval-every-steps", "10", "--compile", "off", "--out"]


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
