"""Several processes that train one model: the same run, whatever their number and their fate."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitllm_core as bit
from tests import tiny, together
from tests.conftest import ROOT, assert_same_bits, state_of, without_times
from tools import plan_check

SCRIPT = Path(together.__file__)


def environment(**more):
    quiet = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": ""}
    own = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    return {k: v for k, v in {**own, **quiet, **more}.items() if v}


def run_together(processes, folder, *tasks, **more):
    """Let `tests/together.py` run in so many processes; (exit code, stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
        command = [sys.executable, str(SCRIPT), str(folder), *tasks]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        variables = environment(**{k: str(v) for k, v in world.items()})
        started.append(subprocess.Popen(command, env=variables, encoding="utf-8", **pipes))
    try:
        answers = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:  # those of which one hangs
            process.kill()
            process.communicate()
    return [(p.returncode, *answer) for p, answer in zip(started, answers, strict=True)]


def train_alone(folder, task):
    """The same task in this process."""
    try:
        return together.train(folder, task)
    finally:
        bit.apply_gradients, bit.BitLM.loss = together.plain_apply, together.plain_loss


def curve(folder):
    lines = bit.MetricsLog.read(folder / "metrics.jsonl")
    return [(x["step"], x.get("loss", x.get("val_loss"))) for x in lines]


def assert_same_curve(a, b, rel):
    assert [step for step, _ in a] == [step for step, _ in b]
    assert [loss for _, loss in a] == pytest.approx([loss for _, loss in b], rel=rel)


@pytest.fixture(scope="module")
def runs(tiny_corpus, tmp_path_factory):
    """Runs of two processes, one after the other in one session, and of one."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(tiny_corpus, folder / "text.txt")
    tasks = ["few:batch_tokens=16", "two", "dense2:linear=dense", "stopped:stop=5"]
    tasks += ["memory:memory=4", "nan:nan=4"]
    dense, sharded = "linear=dense:fsdp=true", "fsdp=true:eval_tokens=20"
    tasks += [f"sharded2:{dense}", f"sharded-stopped:{dense}:stop=5", "sharded-nan:nan=4:fsdp=true"]
    tasks += [f"sharded3:{sharded}", f"again3:{sharded}:stop=5", f"again3:{sharded}"]
    still = "max_steps=1:learning_rate=1e-30:adamw_learning_rate=1e-30"
    tasks += [f"begun:fsdp=true:{still}"]
    results = run_together(2, folder, *tasks)
    assert [code for code, *_ in results] == [0, 0], results
    train_alone(folder, "one")
    train_alone(folder, "dense1:linear=dense")
    return folder, results


@pytest.fixture(scope="module")
def on_three(runs):
    """What was stopped on two, gone on with by three."""
    folder, _ = runs
    for name in ("stopped", "sharded-stopped"):
        shutil.copytree(folder / name, folder / f"{name}-three")
    # one window at once: four turns for the process with four windows, and so for all
    task = "sharded-stopped-three:linear=dense:fsdp=true:micro_batch_size=1"
    results = run_together(3, folder, "stopped-three", task, "three:fsdp=true")
    assert [code for code, *_ in results] == [0, 0, 0], results
    return results


@pytest.mark.parametrize(("one", "two"), [("one", "two"), ("dense1", "dense2")])
def test_the_curve_and_the_weights_are_those_of_one_process(runs, one, two):
    """To the bit; an evaluation's loss but for rounding, as it is cut at other places."""
    folder, _ = runs
    assert_same_curve(curve(folder / one), curve(folder / two), rel=1e-6)
    assert len(curve(folder / one)) == 12 + 4
    assert_same_weights(folder / one, folder / two)


def assert_same_weights(a, b, *but):
    """And the optimizers' states; not the counters, which evaluations are in, nor what is named."""
    a, b = state_of(a), state_of(b)
    for name in ("counters", *but):
        del a[name], b[name]
    assert_same_bits(a, b)


def test_stopped_on_two_it_goes_on_with_one_and_with_three(runs, on_three, capsys):
    folder, results = runs
    for _, told, _ in results:  # the signal came to process 1 alone
        assert "stopped:stop=5 5 0 15" in told
    assert [p.name for p in bit.list_checkpoints(folder / "stopped" / "checkpoints")] == [
        "step_00000003.safetensors",
        "step_00000005.safetensors",
    ]
    train_alone(folder, "stopped")
    alone, three = capsys.readouterr().err, on_three[0][2]
    assert "going on from step 5" in alone
    assert three.count("going on from step 5") == 2
    assert "not bit for bit" not in alone
    assert three.count("not bit for bit") == 1  # of the sharded one
    assert on_three[1][2] == ""  # the first speaks for all
    for name in ("stopped", "stopped-three"):
        assert_same_curve(curve(folder / "one"), curve(folder / name), rel=1e-6)
        assert_same_weights(folder / "one", folder / name)


@pytest.mark.parametrize(("whole", "sharded"), [("dense1", "sharded2"), ("one", "sharded3")])
def test_a_sharded_model_learns_as_a_whole_one(runs, whole, sharded):
    """To the bit, ternary too. (FSDP draws a random number, which nothing else does.)"""
    folder, _ = runs
    assert_same_weights(folder / whole, folder / sharded, "rng")
    lines = [bit.MetricsLog.read(folder / n / "metrics.jsonl") for n in (whole, sharded)]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for name in {"loss", "zero_fraction", "flip_rate"} & one.keys():
            assert one[name] == other[name]
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-12)


def test_a_sharded_model_learns_so_where_rows_do_not_share_out_evenly(runs, on_three):
    """Gathered in float32 then. The last bit of AdamW's state may be another."""
    folder, _ = runs
    assert_same_curve(curve(folder / "one"), curve(folder / "three"), rel=1e-6)


@pytest.fixture
def alone_together(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("linear", ["ternary", "weight_only", "dense"])
def test_a_sharded_ternary_weight_is_gathered_as_trits(alone_together, linear):
    config = dataclasses.replace(tiny.MODEL, linear=linear)
    model, _ = bit.sharded_model(config, 0, torch.device("cpu"))
    layer = model.bit_linears()["model.layers.1.mlp.down_proj"]
    mesh, rows = layer.weight.device_mesh, layer.weight._local_tensor
    if linear == "dense":
        assert not hasattr(rows, "fsdp_pre_all_gather")
        return
    (packed,), scale = rows.fsdp_pre_all_gather(mesh, None, None, None, None)
    assert (packed.dtype, packed.shape) == (torch.uint8, (32, 64 // 4))
    whole, _ = rows.fsdp_post_all_gather((packed,), scale, torch.float32)
    trits, expected = bit.weight_quant(rows)
    assert torch.equal(scale, expected)
    assert torch.equal(whole, trits * expected)
    ids = torch.arange(34).view(2, 17)
    plain = bit.BitLM(config, seed=0)
    assert model.loss(ids[:, :-1], ids[:, 1:]) == plain.loss(ids[:, :-1], ids[:, 1:])


def test_a_sharded_model_begins_with_the_same_values(runs):
    """At a rate below rounding the first step changes nothing."""
    folder, _ = runs
    found = bit.newest_checkpoint(folder / "begun" / "checkpoints")
    assert found["step"] == 1
    assert_same_bits(dict(bit.BitLM(tiny.MODEL, seed=0).state_dict()), found["model"])


def test_sharded_it_stops_and_goes_on_whole_and_on_three(runs, on_three, capsys):
    folder, results = runs
    for _, told, _ in results:
        assert "sharded-stopped:linear=dense:fsdp=true:stop=5 5 0 15" in told
        assert "sharded-nan:nan=4:fsdp=true 12 1 0" in told
    train_alone(folder, "sharded-stopped:linear=dense")
    assert "these changed: fsdp True -> False" in capsys.readouterr().err
    assert "these changed: processes 2 -> 3" in on_three[0][2]
    for name in ("sharded-stopped", "sharded-stopped-three"):
        assert_same_curve(curve(folder / "dense1"), curve(folder / name), rel=1e-5)


def test_sharded_and_stopped_it_goes_on_bit_for_bit(runs):
    """Ternary; and evaluated on so few tokens that one process has none of them."""
    folder, results = runs
    assert "again3:fsdp=true:eval_tokens=20:stop=5 5 0 15" in results[0][1]
    assert "going on from step 5" in results[0][2]
    assert_same_bits(state_of(folder / "sharded3"), state_of(folder / "again3"))
    assert without_times(folder / "sharded3") == without_times(folder / "again3")
    flips = [x for x in bit.MetricsLog.read(folder / "again3" / "metrics.jsonl") if "loss" in x]
    assert min(x["flip_rate"][0] for x in flips[1:]) > 0


def test_a_killed_process_of_a_sharded_model_ends_the_others(runs):
    folder, _ = runs
    other, killed = run_together(2, folder, "sharded-killed:linear=dense:fsdp=true:kill=8")
    assert (killed[0], other[0]) == (-9, 1)
    assert "another process has ended" in other[2]
    assert "Traceback" not in other[2]
    assert bit.newest_checkpoint(folder / "sharded-killed" / "checkpoints")["step"] == 6
    train_alone(folder, "sharded-killed:linear=dense")
    assert_same_curve(curve(folder / "dense1"), curve(folder / "sharded-killed"), rel=1e-5)


def test_one_process_has_nobody_to_share_a_model_with(runs):
    folder, _ = runs
    with pytest.raises(ValueError, match=r"fsdp=True: expected several processes, as of torchrun"):
        train_alone(folder, "alone:fsdp=true")
    assert not (folder / "alone").exists()


@pytest.mark.parametrize("count", [0, 1, 16, 17, 250, 256, 257, 520])
def test_calls_of_an_evaluation_are_foreseen(tiny_config, monkeypatch, count):
    calls, loss = [], bit.BitLM.loss
    monkeypatch.setattr(bit.BitLM, "loss", lambda *args: calls.append(1) or loss(*args))
    tokens = torch.randint(300, (count,)).numpy()
    bit.total_loss(bit.BitLM(tiny_config), tokens, 0, bit.choose_device("cpu", "float32"))
    assert bit.loss_calls(count, 16) == len(calls)


def test_a_killed_process_ends_the_others(runs):
    folder, _ = runs
    other, killed = run_together(2, folder, "killed:kill=8")
    assert killed[0] == -9
    assert other[0] == 1
    assert "another process has ended" in other[2]
    assert "goes on from the last checkpoint" in other[2]
    assert bit.newest_checkpoint(folder / "killed" / "checkpoints")["step"] == 6


def test_a_hanging_process_is_waited_for_so_long_and_no_longer(runs):
    folder, _ = runs
    first, hanging = run_together(2, folder, "hung:hang=4", TIMEOUT=8)
    assert first[0] == 1
    assert "has not answered for 8 s" in first[2]
    assert hanging[0] == 1


def test_torchrun_starts_it_again_by_itself(runs):
    folder, _ = runs
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), str(folder)]
    result = subprocess.run(
        [*command, "again:kill=8"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (folder / "again" / "did-kill.tmp").exists()
    assert "going on from step 6" in result.stderr
    assert_same_bits(state_of(folder / "two"), state_of(folder / "again"))
    assert without_times(folder / "two") == without_times(folder / "again")


def test_too_little_memory_in_one_is_told_to_all(runs):
    folder, results = runs
    assert "another process is out of memory: 1 windows at once" in results[0][2]
    saved = bit.newest_checkpoint(folder / "memory" / "checkpoints")
    assert (
        saved["micro_batch"] < bit.newest_checkpoint(folder / "two" / "checkpoints")["micro_batch"]
    )


def test_a_gradient_that_is_not_finite_in_one_is_skipped_by_all(runs):
    _, results = runs
    for _, told, _ in results:
        assert "nan:nan=4 12 1 0" in told


def test_more_processes_than_windows_are_refused(runs):
    folder, results = runs
    for _, told, _ in results:
        assert "refused: WORLD_SIZE=2: expected at most the 1 windows" in told
    assert not (folder / "few").exists()


def test_work_is_shared_evenly_and_completely():
    model = bit.BitLM(bit.PRESETS["ci"][0])
    optimizers = bit.make_optimizers(model, bit.TrainConfig())
    for size in (1, 2, 3, 8, 50):
        world = bit.World()
        world.size = size
        parts = []
        for world.rank in range(size):
            part = world.part(10)
            parts += range(part.start, part.stop)
        assert parts == list(range(10))
        owners = world.owners(optimizers)
        assert len(owners) == len(list(model.parameters()))
        assert set(owners) == set(range(min(size, len(owners))))
    world.size = 2
    cost = [0, 0]
    for owner, p in zip(world.owners(optimizers), bit.parameters_of(optimizers), strict=True):
        cost[owner] += p.numel() * min(p.shape) if p.dim() == 2 and len(p) != 512 else 0
    assert max(cost) / sum(cost) < 0.6


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
    parts = bit.memory_parts(tiny_config, config, torch.float32)
    assert parts["weights"] == parts["gradients"] == gradients
    assert parts["quantized weights"] == held_bytes
    assert parts["optimizer"] == sum(t.nbytes for t in states if t.dim())
    three = bit.memory_parts(tiny_config, config, torch.float32, 3)
    assert three["optimizer"] == parts["optimizer"] // 3
    shared = bit.memory_parts(tiny_config, bit.TrainConfig(fsdp=True), torch.float32, 3)
    for name in ("weights", "gradients", "optimizer"):
        assert shared[name] == parts[name] // 3
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert shared["gathered blocks"] == block + block // 16  # trits come in
    dense = dataclasses.replace(tiny_config, linear="dense")
    shared = bit.memory_parts(dense, bit.TrainConfig(fsdp=True), torch.float32, 3)
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
    planned = bit.activation_bytes(config, torch.float32) * 5 * ids.numel()
    assert planned == pytest.approx(found, rel=0.1)  # embedding, last norm and head besides


def test_info_plans_for_several_gpus(capsys):
    assert bit.main(["info", "--preset", "ci", "--hidden-size", "128", "--gpus", "2"]) == 0
    told = capsys.readouterr().out
    size = dataclasses.replace(bit.PRESETS["ci"][0], hidden_size=128).num_parameters
    assert f"parameters: {size:,}" in told
    assert "memory on each of 2" in told
    assert "2 x T4" in told
    assert bit.main(["info", "--preset", "ci", "--gpus", "2", "--fsdp"]) == 0
    assert "gathered blocks" in capsys.readouterr().out
    assert bit.main(["info", "--fsdp"]) == 2
    assert "gpus=1: expected several with fsdp" in capsys.readouterr().err
    assert bit.main(["info", "--gpus", "0"]) == 2
    assert "gpus=0: expected at least 1" in capsys.readouterr().err
