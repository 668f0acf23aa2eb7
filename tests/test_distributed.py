"""Several processes that train one model: exact resumes, and one run whatever their number."""

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
from bitllm import distributed, fsdp
from tests import tiny, together, warm
from tests.conftest import ROOT, assert_same_bits, state_of, without_times

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
        started.append(warm.start(command, env=variables, encoding="utf-8", **pipes))
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


def assert_same_run(a, b, begin=1):
    """The same run to rounding: the loss of its first own step, and the curve to its end.

    Float32 sums in another order differ by some 1e-7; steps of a ternary model amplify that.
    """
    a, b = ([x for x in curve(run) if x[0] >= begin] for run in (a, b))
    assert [step for step, _ in a] == [step for step, _ in b]
    assert a[0][1] == pytest.approx(b[0][1], rel=1e-5)
    assert [loss for _, loss in a] == pytest.approx([loss for _, loss in b], rel=0.02)
    assert a[-1][0] == together.TRAIN.max_steps


@pytest.fixture(scope="module")
def runs(tiny_corpus, tmp_path_factory):
    """Runs of two processes, one after the other in one session, and of one."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(tiny_corpus, folder / "text.txt")
    brief = "max_steps=12"  # where no curve is compared
    tasks = ["few:batch_tokens=16", "two", "stopped:stop=5", f"memory:memory=4:{brief}"]
    few = f"fsdp=true:eval_tokens=20:{brief}"
    tasks += [f"nan:nan=4:{brief}", "sharded", "sharded-stopped:stop=5"]
    tasks += [f"sharded-nan:nan=4:{brief}"]
    tasks += ["clocked:minutes=0.02", "sharded-clocked:minutes=0.02"]
    tasks = [f"{t}:fsdp=true" if t.startswith("sharded") else t for t in tasks]
    tasks += [f"whole:{few}", f"again:{few}:stop=5", f"again:{few}"]
    still = "max_steps=1:learning_rate=1e-30:adamw_learning_rate=1e-30"
    tasks += [f"begun:fsdp=true:{still}"]
    mixed = "mixed=true:max_steps=2:eval_every_steps=0"
    tasks += [f"mixed:{mixed}", f"sharded-mixed:{mixed}:fsdp=true"]
    results = run_together(2, folder, *tasks)
    assert [code for code, *_ in results] == [0, 0], results
    train_alone(folder, "one")
    train_alone(folder, f"one-mixed:{mixed}")
    return folder, results


@pytest.fixture(scope="module")
def on_three(runs):
    """What was stopped on two, resumed by three; and FSDP on three from the beginning."""
    folder, _ = runs
    for name in ("stopped", "sharded-stopped"):
        shutil.copytree(folder / name, folder / f"{name}-three")
    # one window at once: four turns for the process with four windows, and so for all
    tasks = ["stopped-three", "sharded-stopped-three:fsdp=true:micro_batch_size=1"]
    results = run_together(3, folder, *tasks, "three:fsdp=true")
    assert [code for code, *_ in results] == [0, 0, 0], results
    return results


@pytest.mark.parametrize("several", ["two", "sharded"])
def test_two_processes_train_as_one(runs, several):
    folder, _ = runs
    assert_same_run(folder / "one", folder / several)
    assert len(curve(folder / "one")) == 20 + 5
    lines = [bit.MetricsLog.read(folder / n / "metrics.jsonl")[0] for n in ("one", several)]
    assert lines[0].keys() == lines[1].keys()
    for name in ("grad_norm", "zero_fraction"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-3)


@pytest.mark.parametrize("several", ["mixed", "sharded-mixed"])
def test_several_processes_read_a_mixture_as_one(runs, several):
    names = ("one-mixed", several)
    one, found = ([x for x in without_times(runs[0] / n) if "loss" in x] for n in names)
    assert [x["source_epochs"] for x in one] == [x["source_epochs"] for x in found]
    assert one[0]["source_loss"] == pytest.approx(found[0]["source_loss"], rel=1e-5)
    assert one[1]["source_loss"] == pytest.approx(found[1]["source_loss"], rel=1e-2)
    assert len(one[0]["source_loss"]) == 2


def test_a_sharded_model_trains_so_where_rows_do_not_share_out_evenly(runs, on_three):
    folder, _ = runs
    assert_same_run(folder / "one", folder / "three")


def test_stopped_on_two_it_resumes_on_one_and_on_three(runs, on_three, capsys):
    folder, results = runs
    for _, told, _ in results:  # the signal came to process 1 alone
        assert "stopped:stop=5 5 0 15" in told
    assert [p.name for p in bit.list_checkpoints(folder / "stopped" / "checkpoints")] == [
        "step_00000003.safetensors",
        "step_00000005.safetensors",
    ]
    train_alone(folder, "stopped")
    alone, three = capsys.readouterr().err, on_three[0][2]
    assert "resuming from step 5" in alone
    assert three.count("resuming from step 5") == 2
    assert "these changed: processes 2 -> 1" in alone
    assert three.count("these changed: processes 2 -> 3") == 2
    assert on_three[1][2] == ""  # the main process logs for all
    for name in ("stopped", "stopped-three"):
        assert_same_run(folder / "two", folder / name, begin=6)


def test_sharded_and_stopped_it_resumes_whole_and_on_three(runs, on_three, capsys):
    folder, results = runs
    for _, told, _ in results:
        assert "sharded-stopped:stop=5:fsdp=true 5 0 15" in told
        assert "sharded-nan:nan=4:max_steps=12:fsdp=true 12 1 0" in told
    train_alone(folder, "sharded-stopped")
    assert "fsdp True -> False" in capsys.readouterr().err
    for name in ("sharded-stopped", "sharded-stopped-three"):
        assert_same_run(folder / "sharded", folder / name, begin=6)


def test_sharded_and_stopped_it_resumes_bit_for_bit(runs):
    """And evaluated on so few tokens that one process has none of them."""
    folder, results = runs
    assert "again:fsdp=true:eval_tokens=20:max_steps=12:stop=5 5 0 15" in results[0][1]
    assert "resuming from step 5" in results[0][2]
    assert_same_bits(state_of(folder / "whole"), state_of(folder / "again"))
    assert without_times(folder / "whole") == without_times(folder / "again")
    flips = [x for x in bit.MetricsLog.read(folder / "again" / "metrics.jsonl") if "loss" in x]
    assert max(x["flip_rate"][0] for x in flips[1:]) > 0


@pytest.fixture
def alone_together(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("linear", ["ternary", "weight_only", "dense"])
def test_a_sharded_model_computes_as_a_whole_one(alone_together, linear):
    config = dataclasses.replace(tiny.MODEL, linear=linear)
    model, plain = fsdp.sharded_model(config, 0, torch.device("cpu")), bit.BitLM(config, seed=0)
    ids = torch.arange(34).view(2, 17)
    losses = [net.loss(ids[:, :-1], ids[:, 1:]) for net in (model, plain)]
    assert losses[0] == losses[1]
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        # the products are float32's, in another order
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_sharded_model_begins_with_the_same_values(runs):
    """At a rate below rounding the first step changes nothing."""
    folder, _ = runs
    found = bit.newest_checkpoint(folder / "begun" / "checkpoints")
    assert found["step"] == 1
    assert_same_bits(dict(bit.BitLM(tiny.MODEL, seed=0).state_dict()), found["model"])


def test_a_killed_process_of_a_sharded_model_ends_the_others(runs):
    folder, _ = runs
    other, killed = run_together(2, folder, "sharded-killed:fsdp=true:kill=8")
    assert (killed[0], other[0]) == (-9, 1)
    assert "another process has ended" in other[2]
    assert "Traceback" not in other[2]
    assert bit.newest_checkpoint(folder / "sharded-killed" / "checkpoints")["step"] == 6


def test_one_process_has_nobody_to_share_a_model_with(runs):
    folder, _ = runs
    with pytest.raises(ValueError, match=r"fsdp=True: expected several processes, as of torchrun"):
        train_alone(folder, "alone:fsdp=true")
    assert not (folder / "alone").exists()


@pytest.mark.parametrize("name", ["clocked", "sharded-clocked"])
def test_all_processes_end_by_the_clock_of_the_first(runs, name):
    folder, _ = runs
    found = bit.load_checkpoint(folder / name)
    assert found["clock_seconds"] >= 60 * 0.02
    final = bit.MetricsLog.read(folder / name / "metrics.jsonl")[-1]
    assert (final["final"], final["step"]) == (True, found["step"])
    assert found["step"] > 2


def test_a_killed_process_ends_the_others(runs):
    folder, _ = runs
    other, killed = run_together(2, folder, "killed:kill=8")
    assert killed[0] == -9
    assert other[0] == 1
    assert "another process has ended" in other[2]
    assert "resumes from the last checkpoint" in other[2]
    assert bit.newest_checkpoint(folder / "killed" / "checkpoints")["step"] == 6


def test_a_hanging_process_is_waited_for_so_long_and_no_longer(runs):
    folder, _ = runs
    first, hanging = run_together(2, folder, "hung:hang=4", TIMEOUT=6)
    assert first[0] == 1
    assert "has not answered for 6 s" in first[2]
    assert hanging[0] == 1


def test_torchrun_starts_it_again_by_itself(runs):
    folder, _ = runs
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), str(folder)]
    result = warm.run(
        [*command, "restarted:kill=8"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (folder / "restarted" / "did-kill.tmp").exists()
    assert "resuming from step 6" in result.stderr
    assert_same_bits(state_of(folder / "two"), state_of(folder / "restarted"))
    assert without_times(folder / "two") == without_times(folder / "restarted")


def test_too_little_memory_in_one_is_too_little_for_all(runs):
    """So that a resume, for which the main process' checkpoint counts, makes the same sums."""
    folder, _ = runs
    saved = [bit.newest_checkpoint(folder / n / "checkpoints") for n in ("two", "memory")]
    assert saved[0]["micro_batch"] > saved[1]["micro_batch"]


def test_a_gradient_that_is_not_finite_in_one_is_skipped_by_all(runs):
    _, results = runs
    for _, told, _ in results:
        assert "nan:nan=4:max_steps=12 12 1 0" in told


def test_more_processes_than_windows_are_refused(runs):
    folder, results = runs
    for _, told, _ in results:
        assert "refused: WORLD_SIZE=2: expected at most the 1 windows" in told
    assert not (folder / "few").exists()


def test_work_is_shared_evenly_and_completely():
    model = bit.BitLM(bit.PRESETS["ci"][0])
    optimizers = bit.make_optimizers(model, bit.TrainConfig())
    parameters = bit.parameters_of(optimizers)
    for size in (1, 2, 3, 8, 50):
        owners = distributed.assign_owners(optimizers, size)
        assert len(owners) == len(parameters)
        assert set(owners.values()) == set(range(min(size, len(owners))))
    cost = [0, 0]
    for p, owner in distributed.assign_owners(optimizers, 2).items():
        cost[owner] += p.numel() * min(p.shape) if p.dim() == 2 and len(p) != 512 else 0
    assert max(cost) / sum(cost) < 0.6


@pytest.mark.parametrize("sharded", [False, True])
def test_windows_are_shared_out_completely(sharded):
    kind = fsdp.ShardedProcesses if sharded else distributed.DistributedProcesses
    processes, seen = object.__new__(kind), []
    processes.world_size, x = 3, torch.arange(10)[:, None]
    for processes.rank in range(3):
        parts = processes.micro_batches(x, x, 2)
        assert len(parts) == 2 or not sharded
        seen += [i for _, y in parts for i in y.flatten().tolist() if i != -100]
    assert seen == list(range(10))
