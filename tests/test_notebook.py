"""What the notebooks share: settings, form, display, buttons, Drive."""

import pytest

from tests.conftest import ROOT
from tests.kernels import KERNELS, Cell, kernel, new_subshell, python_of

LONG_RUN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
import dataclasses
import bitllm_core as bit
model, data, train = bit.PRESETS["ci"]
train = dataclasses.replace(train, max_steps=5000, eval_every_steps=500, compile="off")
state = bit.train(model, data, train, "run", callbacks=[bit.LiveDisplay("run")])
print("came to", state.step, "saved", bit.list_checkpoints("run/checkpoints")[-1].stem)
"""


@pytest.mark.parametrize("name", KERNELS)
def test_buttons_work_while_the_cell_runs(tmp_path, name):
    with kernel(python_of(name), tmp_path) as client:
        subshell = new_subshell(client)
        assert (subshell is None) == (name == "colab")
        cell = Cell(client, LONG_RUN)
        cell.listen_until(lambda c: len(c.displays) > 3)
        cell.click("Save now", subshell)
        cell.listen_until(lambda c: "last save" in c.displays[-1].get("text/plain", ""))
        cell.click("Pause", subshell)
        cell.listen_until(lambda c: "paused" in c.displays[-1].get("text/plain", ""))
        assert not cell.done
        cell.click("Pause", subshell)
        cell.listen_until(lambda c: "paused" not in c.displays[-1].get("text/plain", ""))
        cell.click("Stop", subshell)
        cell.listen_until(lambda c: c.done)
    came_to = int(cell.text.split("came to ")[1].split()[0])
    assert 0 < came_to < 5000
    assert f"step_{came_to:08d}" in cell.text
