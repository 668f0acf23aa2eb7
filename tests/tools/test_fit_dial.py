"""The constants of the law are those that its tool finds, and the docs show what they miss."""

import numpy as np
import pytest
import torch

import bitllm_core as bit
from bitllm import dial
from bitllm_core import Device
from tests.conftest import ROOT
from tools import fit_dial


def test_the_constants_are_those_of_the_rows():
    runs = fit_dial.points()
    e, a, b, g, error = fit_dial.fit(runs)
    assert error < 0.02
    assert (e, a, b, g) == pytest.approx((dial.E, dial.A, dial.B, dial.G), rel=0.02)
    misses = [dial.bits_per_byte(run.model, run.learned) - run.bits for run in runs]
    assert np.abs(misses).max() < 0.05


def test_a_step_takes_what_the_dial_expects():
    misses = [expected / measured - 1 for _, measured, expected in fit_dial.step_milliseconds()]
    assert np.abs(misses).max() < 0.1
    gpu = dial.Machine(Device(torch.device("cuda"), torch.bfloat16, ""), 792e12, True)
    for name, measured in (("t4-1h", 0.0429), ("t4-3h", 0.0647)):  # an H200: docs/gpu.md
        model, _, train = bit.PRESETS[name]
        expected = dial.step_seconds(model, gpu, True, train.batch_tokens)
        assert expected == pytest.approx(measured, rel=0.1)


def test_the_docs_show_the_tables(capsys):
    assert fit_dial.main() == 0
    page = (ROOT / "docs" / "dial.md").read_text(encoding="utf-8")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 20
    assert [line for line in lines if line not in page] == []


def test_the_preset_for_laptops_is_what_the_law_chooses():
    minutes, machine, size = fit_dial.PLANNED["laptop"]
    text = dial.Text(size, "WikiText-2")
    choice = dial.choose(minutes, bit.DataConfig(), {}, fit_dial.MACHINES[machine], text)
    model, _, train = bit.PRESETS["laptop"]
    assert choice.model == model
    for name in ("batch_tokens", "adamw_learning_rate", "weight_decay"):
        assert getattr(choice.train, name) == getattr(train, name), name
    assert choice.train.learning_rate == pytest.approx(train.learning_rate, rel=0.05)
    assert choice.train.max_steps == pytest.approx(train.max_steps, rel=0.1)  # as the machine is
