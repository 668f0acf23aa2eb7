"""What is planned is what training takes."""

import dataclasses
import re
import sys

import pytest
import torch

import bitllm_core as bit
from bitllm.cli import main
from bitllm.planner import activation_bytes, memory_parts
from tools import plan_check


def test_the_plan_counts_what_training_holds(tiny_config):
    model, config = bit.BitLM(tiny_config), bit.TrainConfig()
    optimizers = bit.make_optimizers(model, config)
    ids = torch.randint(300, (4, 16))
    with model.hold_weights(torch.float32):
        model.loss(ids, ids).backward()
        held = [layer.held for layer in model.bit_linears().values()]
        held_bytes = sum(weight.nbytes for weight in held)
    gradients = sum(p.grad.nbytes for p in model.parameters())
    bit.apply_gradients(optimizers, torch.amp.GradScaler("cpu", enabled=False), 1.0, 1.0)
    states = [t for o in optimizers for state in o.state.values() for t in state.values()]
    parts = memory_parts(tiny_config, config, torch.float32, windows=16)
    assert parts["weights"] == parts["gradients"] == gradients
    assert parts["quantized weights"] == held_bytes
    assert parts["optimizer"] == sum(t.nbytes for t in states if t.dim())
    three = memory_parts(tiny_config, config, torch.float32, 3)
    assert three["optimizer"] == parts["optimizer"] // 3
    shared = memory_parts(tiny_config, bit.TrainConfig(fsdp=True), torch.float32, 3, 16)
    for name in ("weights", "gradients", "optimizer"):
        assert shared[name] == parts[name] // 3
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert shared["gathered blocks"] == 2 * block
    assert shared["gathered embedding and head"] == gradients - 2 * block


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the memory of a process")
def test_the_plan_is_what_training_takes():
    assert max(map(abs, plan_check.compare(plan_check.QUICK))) < 0.1


def test_the_plan_of_activations_is_what_autograd_keeps(tiny_config):
    config = dataclasses.replace(tiny_config, num_hidden_layers=5, max_position_embeddings=64)
    model, kept = bit.BitLM(config), {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # and alive
        return tensor

    ids = torch.randint(300, (8, 64))
    with (
        model.hold_weights(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        model.loss(ids, ids)
        weights = [*model.parameters(), *(m.held for m in model.bit_linears().values())]
    for weight in weights:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    planned = activation_bytes(config, torch.float32) * 5 * ids.numel()
    assert planned == pytest.approx(found, rel=0.1)  # embedding, last norm and head besides


@pytest.mark.parametrize("command", ["plan", "info"])
def test_a_training_is_planned_for_several_gpus(capsys, command):
    assert main([command, "--preset", "ci", "--hidden-size", "128", "--gpus", "2"]) == 0
    told = capsys.readouterr().out
    size = dataclasses.replace(bit.PRESETS["ci"][0], hidden_size=128).num_parameters
    assert f"parameters: {size:,}" in told
    assert "memory on each of 2" in told
    assert "2 x T4" in told
    assert main([command, "--preset", "ci", "--gpus", "2", "--fsdp"]) == 0
    assert "gathered blocks" in capsys.readouterr().out
    assert main([command, "--fsdp"]) == 2
    assert "gpus=1: expected several with fsdp" in capsys.readouterr().err
    assert main([command, "--gpus", "0"]) == 2
    assert "gpus=0: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "time"), [(1, "s"), (2500, "minutes"), (25_000, "hours")])
def test_a_short_training_is_planned_in_minutes(capsys, steps, time):
    assert main(["plan", "--preset", "t4-1h", "--max-steps", str(steps)]) == 0
    line = re.search(r"1 x T4 .*, ([\d.]+) (\w+)$", capsys.readouterr().out, re.MULTILINE)
    assert line[2] == time
    assert 1 <= float(line[1]) < 120


@pytest.mark.parametrize(
    ("preset", "windows", "megabytes"),
    [("t4-1h", 128, 12_205), ("t4-1h", 64, 6755), ("t4-1h", 32, 3581), ("t4-3h", 128, 15_073)],
)
def test_a_compiled_training_on_a_gpu_takes_what_is_planned(preset, windows, megabytes):
    """As measured on an H200 in bfloat16: docs/gpu.md."""
    model, _, train = bit.PRESETS[preset]
    parts = memory_parts(model, train, torch.bfloat16, windows=windows, gpu=True)
    assert sum(parts.values()) / 2**20 == pytest.approx(megabytes, rel=0.02)


def test_half_of_a_gpus_free_memory_is_for_a_micro_batch(monkeypatch):
    t4 = int(14.6 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (t4, t4))
    device = bit.Device(torch.device("cuda"), torch.float16, "")
    for preset in ("t4-1h", "t4-3h"):
        model, _, train = bit.PRESETS[preset]
        assert bit.windows_at_once(model, train, device) == 64
        parts = memory_parts(model, train, device.dtype, windows=64, gpu=True)
        assert sum(parts.values()) < 0.7 * t4
