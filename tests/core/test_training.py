"""The loop: it learns, it stops anywhere, and resumes as if it had not."""

import dataclasses
import io
import math
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bitllm_core as bit
from bitllm import machine
from bitllm.aside import check_run_folder
from tests.conftest import ROOT, assert_same_bits, state_of, weights_of, without_times
from tests.tiny import StopAt


class DieAt(StopAt):
    def on_step(self, state, metrics):
        if state.step == self.step:
            raise RuntimeError("as if the machine had gone")


def test_loss_falls(run, tmp_path):
    state = run(tmp_path / "run", max_steps=120, save_every_steps=0)
    lines = bit.MetricsLog.read(tmp_path / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 5
    assert losses[-1] < 3
    assert state.val_loss < 3


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_stopping_and_resuming_changes_no_bit(run, tmp_path, capsys, stop):
    run(tmp_path / "whole")
    stopped = run(tmp_path / "parts", callbacks=[StopAt(stop)])
    assert stopped.step == stop
    run(tmp_path / "parts")
    assert "not bit for bit" not in capsys.readouterr().err
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


@pytest.mark.parametrize("die", [2, 5, 8])
def test_dying_and_resuming_changes_no_bit(run, tmp_path, die):
    run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="machine"):
        run(tmp_path / "parts", callbacks=[DieAt(die)])
    run(tmp_path / "parts")
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


def test_another_optimizer_and_epoch_ends_resume_too(run, tmp_path):
    options = {"optimizer": "adamw", "max_steps": 90, "save_every_epoch": True}
    options |= {"eval_every_steps": 30, "micro_batch_size": 2}  # and accumulation
    run(tmp_path / "whole", **options)
    run(tmp_path / "parts", callbacks=[StopAt(47)], **options)
    run(tmp_path / "parts", **options)
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert bit.list_checkpoints(tmp_path / "whole" / "checkpoints", "epoch")


@pytest.mark.parametrize(("linear", "steps"), [("ternary", 1), ("dense", 3)])
def test_the_micro_batch_does_not_change_the_mathematics(run, tmp_path, tiny_config, linear, steps):
    """In float32. From the second step on, rounding puts trits on either side of a threshold."""
    model = dataclasses.replace(tiny_config, linear=linear)
    for size in (1, 4, 8):
        changes = {"micro_batch_size": size, "callbacks": [StopAt(steps)], "dtype": "float32"}
        run(tmp_path / str(size), model=model, **changes)
    one, four, eight = (weights_of(tmp_path / str(size)) for size in (1, 4, 8))
    for name in one:
        torch.testing.assert_close(one[name], eight[name], rtol=0.01, atol=1e-3, msg=name)
        torch.testing.assert_close(four[name], eight[name], rtol=0.01, atol=1e-3, msg=name)


def test_micro_batches_accumulate_the_same_gradient(run, tmp_path, tiny_config):
    model = bit.BitLM(tiny_config)
    x = torch.randint(300, (8, 17), generator=torch.Generator().manual_seed(0))

    def gradient(size):
        model.zero_grad()
        for part in x.split(size):
            (model.loss(part[:, :-1], part[:, 1:]) / 128).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, parts = gradient(8), gradient(2)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6, msg=name)


def test_out_of_memory_halves_the_micro_batch_within_the_step(run, tmp_path, monkeypatch, capsys):
    run(tmp_path / "small", micro_batch_size=2, max_steps=4)
    loss, seen = bit.BitLM.loss, []

    def too_much(self, input_ids, targets, **parts):
        if torch.is_grad_enabled() and len(input_ids) > 2:
            seen.append(input_ids)
            if len(seen) == 2:  # the first half's gradient is there already
                raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, input_ids, targets, **parts)

    monkeypatch.setattr(bit.BitLM, "loss", too_much)
    run(tmp_path / "halved", micro_batch_size=4, max_steps=4)
    assert "2 windows at once" in capsys.readouterr().err
    assert_same_bits(weights_of(tmp_path / "small"), weights_of(tmp_path / "halved"))


def test_compiled_and_eager_agree(run, tmp_path, monkeypatch, capsys):
    losses = {}
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: False)  # Muon rounds to 1/256 there
    for mode in ("on", "off"):
        run(tmp_path / mode, compile=mode, max_steps=3, log_every_steps=1)
        losses[mode] = [x["loss"] for x in without_times(tmp_path / mode) if "loss" in x]
    assert "torch.compile: off" not in capsys.readouterr().err
    assert losses["on"][0] == pytest.approx(losses["off"][0], rel=1e-5)  # other order of sums,
    assert losses["on"] == pytest.approx(losses["off"], rel=5e-3)  # which turns some trits


def test_compiled_runs_resume_bit_for_bit(run, tmp_path, capsys):
    run(tmp_path / "whole", compile="on", dtype="bfloat16")
    run(tmp_path / "parts", compile="on", dtype="bfloat16", callbacks=[StopAt(5)])
    torch._dynamo.reset()
    run(tmp_path / "parts", compile="on", dtype="bfloat16")
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert "torch.compile: off" not in capsys.readouterr().err


def test_a_failing_compiler_is_one_line_and_eager(run, tmp_path, monkeypatch, capsys):
    def broken(function, **options):
        return lambda *a: (_ for _ in ()).throw(RuntimeError("no compiler today"))

    monkeypatch.setattr(torch, "compile", broken)
    state = run(tmp_path / "run", compile="on")
    assert state.step == 12
    assert "torch.compile: off (RuntimeError: no compiler today)" in capsys.readouterr().err


def test_float16_scales_its_loss(run, tmp_path):
    run(tmp_path / "whole", dtype="float16", max_steps=6)
    run(tmp_path / "parts", dtype="float16", max_steps=6, callbacks=[StopAt(2)])
    state = run(tmp_path / "parts", dtype="float16", max_steps=6)
    assert state.scaler.is_enabled()
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_skipped_steps_are_counted_and_end_the_run(run, tmp_path, monkeypatch):
    class Poison(bit.Callback):
        def on_step(self, state, metrics):
            assert state.skipped == max(0, state.step - 3)
            if state.step == 3:
                state.model.model.norm.weight.data[0] = math.nan

    with pytest.raises(FloatingPointError, match="25 steps in a row"):
        run(tmp_path / "run", max_steps=100, eval_every_steps=0, callbacks=[Poison()])


def test_other_settings_are_refused_before_any_work(run, tmp_path, tiny_config):
    out = tmp_path / "run"
    run(out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    other = dataclasses.replace(tiny_config, hidden_size=64)
    with pytest.raises(ValueError, match=r"hidden_size \(run: 32, asked: 64\)"):
        run(out, model=other)
    with pytest.raises(ValueError, match=r"batch_tokens \(run: 128, asked: 64\)"):
        run(out, batch_tokens=64)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ValueError, match="resume='must'"):
        run(tmp_path / "none", resume="must")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder"):
        run(tmp_path / "file")
    with pytest.raises(ValueError, match=r"not a run folder.*thesis\.tex"):
        run(tmp_path / "mine")


def test_only_damaged_checkpoints_are_not_begun_over(run, tmp_path):
    run(tmp_path)
    for path in (tmp_path / "checkpoints").glob("step_*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="--resume never"):
        run(tmp_path)


def test_a_finished_run_comes_back_at_once_and_can_be_extended(run, tmp_path, capsys):
    first = run(tmp_path)
    again = run(tmp_path)
    assert again.val_loss == first.val_loss
    assert run(tmp_path, max_steps=15).step == 15
    assert "max_steps: 12 -> 15" in capsys.readouterr().err


def test_a_moved_run_folder_goes_on(run, tmp_path):
    run(tmp_path / "a", callbacks=[StopAt(5)])
    (tmp_path / "a").rename(tmp_path / "b")
    assert run(tmp_path / "b").step == 12
    model, tokenizer = bit.load_model(tmp_path / "b")
    assert bit.generate(model, tokenizer, "1 cats", bit.SamplingConfig(seed=0))
    assert bit.load_model(tmp_path / "b", "best")


def test_callbacks_hear_of_everything(run, tmp_path):
    heard = []

    class Ear(bit.Callback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                heard.append(name)
            return super().__getattribute__(name)

    run(tmp_path, callbacks=[Ear()])
    assert heard.count("on_step") == 12
    assert heard.count("on_eval") == 4  # at 4, 8, 12, and on everything
    assert heard.count("on_sample") == 3
    assert heard.count("on_checkpoint") == 4
    assert heard[0] == "on_start"
    assert heard[-1] == "on_end"


def test_a_save_asked_for_comes_after_the_running_step(run, tmp_path):
    class SaveAt(StopAt):
        saved = ()

        def on_step(self, state, metrics):
            state.save_requested |= state.step == self.step

        def on_checkpoint(self, state, path):
            self.saved += (bit.checkpoint_step(path),)

    callback = SaveAt(5)
    run(tmp_path, save_every_steps=0, callbacks=[callback])
    assert callback.saved == (5, 12)


def test_training_does_not_wait_for_the_disk(run, tmp_path, monkeypatch):
    """Writing and reading back are a thread's; only a second save waits for them."""
    disk, plain, steps = threading.Event(), bit.Folder.write, []

    def slow(self, name, fill):
        disk.wait(30)
        plain(self, name, fill)

    class Watch(bit.Callback):
        def on_step(self, state, metrics):
            steps.append(state.last_saved_step)
            if state.step == 7:
                disk.set()

    monkeypatch.setattr(bit.Folder, "write", slow)
    run(tmp_path, save_every_steps=4, eval_every_steps=0, callbacks=[Watch()])
    assert steps[4:7] == [0, 0, 0]  # it was saving step 4 all the time
    assert [p.stem[-2:] for p in bit.list_checkpoints(tmp_path / "checkpoints")] == ["08", "12"]


def overfitting(changes):
    """So fast a rate on so short a text that the validation loss soon rises."""
    options = {"max_steps": 60, "eval_every_steps": 3, "patience": 3, "save_every_steps": 4}
    return {**options, "learning_rate": 0.1, "adamw_learning_rate": 0.05, **changes}


def test_a_run_that_only_overfits_ends_early_and_keeps_its_best(run, tmp_path, capsys):
    state = run(tmp_path, **overfitting({}))
    losses = [x["val_loss"] for x in without_times(tmp_path) if "val_loss" in x]
    evaluations, final = losses[:-1], losses[-1]
    best = min(range(len(evaluations)), key=evaluations.__getitem__)
    assert len(evaluations) == best + 1 + 3
    assert state.step == 3 * len(evaluations) < 60
    assert state.val_loss == final
    assert state.best_step == 3 * (best + 1)
    said = f"ended early at step {state.step} of 60: no better validation loss in 3 evaluations"
    assert said in capsys.readouterr().err
    model, _ = bit.load_model(tmp_path, "best")
    tokens = np.fromfile(tmp_path / "data" / "validation.bin", "uint16")
    loss = bit.total_loss(model, tokens, 0, bit.choose_device("cpu", "float32"))
    assert loss / len(tokens) == pytest.approx(evaluations[best], rel=1e-5)
    assert run(tmp_path, **overfitting({})).step == state.step  # complete: nothing to do
    assert run(tmp_path, **overfitting({"patience": 0})).step == 60


@pytest.mark.parametrize("back", [1, 5])
def test_patience_survives_a_death(run, tmp_path, back):
    last = run(tmp_path / "whole", **overfitting({})).step
    with pytest.raises(RuntimeError, match="machine"):
        run(tmp_path / "parts", callbacks=[DieAt(last - back)], **overfitting({}))
    assert run(tmp_path / "parts", **overfitting({})).step == last
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


class PauseAt(StopAt):
    """Pauses for a second, asks for a checkpoint meanwhile, then continues or stops."""

    def __init__(self, step, stop=False):
        super().__init__(step)
        self.stop, self.saved, self.waits = stop, [], 0
        self.ended = {0: time.perf_counter()}  # step -> when

    def on_step(self, state, metrics):
        state.paused = state.step == self.step
        self.since = self.ended[state.step] = time.perf_counter()

    def on_pause(self, state):
        self.waits += 1
        state.save_requested = self.waits == 1
        if time.perf_counter() - self.since > 1:
            state.paused = self.stop
            state.stop_signal = signal.SIGINT if self.stop else 0

    def on_checkpoint(self, state, path):
        self.saved.append(bit.checkpoint_step(path))


def test_a_pause_changes_no_bit_and_counts_as_no_training(run, tmp_path):
    run(tmp_path / "whole", save_every_steps=0)
    callback = PauseAt(5)
    run(tmp_path / "paused", save_every_steps=0, callbacks=[callback])
    assert callback.saved == [5, 12]
    assert callback.waits > 3
    assert_same_bits(weights_of(tmp_path / "whole"), weights_of(tmp_path / "paused"))
    lines = [x for x in bit.MetricsLog.read(tmp_path / "paused" / "metrics.jsonl") if "loss" in x]
    wall = {step: when - callback.ended[0] for step, when in callback.ended.items()}
    assert lines[-1]["train_seconds"] < wall[12] - 1
    assert lines[2]["step"] == 6
    assert 2 * 128 / lines[2]["tokens_per_s"] < wall[6] - wall[4] - 0.95


def test_stop_works_while_paused(run, tmp_path):
    state = run(tmp_path, save_every_steps=0, callbacks=[PauseAt(5, stop=True)])
    assert state.step == 5
    assert state.stop_signal == signal.SIGINT


def test_metrics_hold_what_they_promise(run, tmp_path):
    run(tmp_path)
    lines = bit.MetricsLog.read(tmp_path / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10, 12]
    for line in steps:
        assert 0.2 < np.mean(line["zero_fraction"]) < 0.5  # a third, for normal-like weights
        assert len(line["flip_rate"]) == 2
        assert {"learning_rate", "grad_norm", "tokens_per_s", "memory_bytes"} <= line.keys()
    assert max(steps[1]["flip_rate"]) > 0
    assert [x["step"] for x in lines if "val_loss" in x] == [4, 8, 12, 12]


def test_evaluate_against_a_hand_computed_case(tmp_path, tiny_config, tokenizer):
    text = "3 cats sat on 4 mats.\nПять котов\n" * 4
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="\n")
    model = bit.BitLM(tiny_config).eval()
    ids = bit.encode(tokenizer, text)
    assert len(ids) > 40
    nats, sequence = 0.0, [bit.end_of_text_id(tokenizer), *ids]
    for i in range(len(ids)):  # each token from those before it in its window of 16
        window = sequence[i // 16 * 16 : i + 1]
        nats -= model(torch.tensor([window]))[0, -1].log_softmax(-1)[ids[i]].item()
    device = bit.choose_device("cpu", "float32")
    for size in (1, 3, 16):
        result = bit.evaluate(model, tokenizer, tmp_path / "a.txt", batch_size=size, device=device)
        assert result["loss"] == pytest.approx(nats / len(ids), rel=1e-4)
    assert result["tokens"] == len(ids)
    assert result["words"] == 4 * (6 + 2 + 2)
    assert result["bytes"] == len(text.encode())
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-4)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / 40), rel=1e-3)


@pytest.mark.parametrize("length", [1, 9, 16, 17, 50])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_a_sliding_context_predicts_each_token_once(tiny_config, length, stride):
    tokens = np.random.default_rng(0).integers(0, 300, length)
    model = bit.BitLM(tiny_config).eval()
    sequence, nats = [7, *tokens], 0.0
    for i in range(length):  # token i from those before it in the first window it is in
        seen = sequence[max(0, -(-(i - 15) // stride)) * stride : i + 1]
        assert len(seen) >= min(i + 1, 16 - stride + 1)
        nats -= model(torch.tensor([seen]))[0, -1].log_softmax(-1)[tokens[i]].item()
    device = bit.choose_device("cpu", "float32")
    for size in (1, 3, 64):
        total = bit.total_loss(model, tokens, 7, device, size, stride)
        assert total == pytest.approx(nats, rel=1e-4)


def test_evaluate_slides_where_asked(tmp_path, tiny_config, tokenizer):
    (tmp_path / "a.txt").write_text("3 cats sat on 4 mats.\n" * 9, encoding="utf-8", newline="\n")
    model, options = bit.BitLM(tiny_config).eval(), {"device": bit.choose_device("cpu", "float32")}
    plain = bit.evaluate(model, tokenizer, tmp_path / "a.txt", **options)
    slid = bit.evaluate(model, tokenizer, tmp_path / "a.txt", stride=1, **options)
    assert plain["tokens"] == slid["tokens"]
    assert plain["loss"] != slid["loss"]
    with pytest.raises(ValueError, match="stride=17: expected 1 to 16 tokens"):
        bit.evaluate(model, tokenizer, tmp_path / "a.txt", stride=17, **options)


@pytest.mark.parametrize(("optimizer", "golden"), [("adamw", 5.507880), ("muon", 5.46117)])
def test_three_golden_steps(run, tmp_path, monkeypatch, optimizer, golden):
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: False)  # the same on every processor
    run(tmp_path, optimizer=optimizer, log_every_steps=1, callbacks=[StopAt(3)])
    loss = [line["loss"] for line in without_times(tmp_path) if "loss" in line][-1]
    # float32 sums come in another order on another processor
    assert loss == pytest.approx(golden, rel=5e-4), (
        "the numbers of training have changed. New ones are legitimate only in a commit that "
        "means to change them (initialisation, quantizers, data order, optimizer, schedule) and "
        "says so with the loss before and after; or where a new release of tokenizers or numpy "
        "gives another tokenizer or shuffle"
    )


def test_a_loaded_model_has_the_trained_ones_logits(run, tmp_path):
    state = run(tmp_path)
    model, _ = bit.load_model(tmp_path)
    assert all(layer.frozen for layer in model.bit_linears().values())
    x = torch.arange(32).view(2, 16)
    torch.testing.assert_close(model(x), state.model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the memory of a process")
def test_memory_is_the_process_own_peak():
    """And not what a large process that started it had used."""
    cpu = bit.choose_device("cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = machine.memory_in_use(cpu.device)
    with mmap.mmap(-1, 64 << 20) as pages:  # malloc may have kept some that was freed
        for start in range(0, 64 << 20, 4096):
            pages[start] = 1
    grown = machine.memory_in_use(cpu.device) - before
    assert 50 << 20 < grown < 100 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP what it has read")
@pytest.mark.parametrize(("given", "used"), [({}, 10_000), ({"GOMP_SPINCOUNT": "77"}, 77)])
def test_threads_do_not_spin_long_while_they_wait(given, used):
    unset = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment = {**unset, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT), **given}
    command = [sys.executable, "-c", "import bitllm_core"]
    options = {"env": environment, "capture_output": True, "text": True, "check": True}
    assert f"GOMP_SPINCOUNT = '{used}'" in subprocess.run(command, **options).stderr


def test_messages_go_to_one_stream(capsys):
    streams = [io.StringIO(), io.StringIO()]
    for stream in streams:
        bit.log_to(stream)
        bit.log.info("hello")
    assert [stream.getvalue() for stream in streams] == ["hello\n", "hello\n"]
    assert capsys.readouterr() == ("", "")


def test_names_that_were_here_before_come_from_the_package():
    """Notebooks of earlier versions, in many Drives, have them as bitllm_core's."""
    import bitllm

    assert bit.Settings is bitllm.Settings
    assert bit.export_packed is bitllm.export_packed
    with pytest.raises(AttributeError, match="module 'bitllm_core' has no attribute 'nonsense'"):
        _ = bit.nonsense


def test_what_a_run_shortens_or_keeps_is_said(
    tiny_config, tiny_train, tiny_corpus, tmp_path, capsys
):
    config = dataclasses.replace(
        tiny_train, max_steps=4, warmup_steps=20, save_every_epoch=True, batch_tokens=2048
    )
    bit.train(tiny_config, bit.DataConfig(str(tiny_corpus)), config, tmp_path / "run")
    said = capsys.readouterr().err
    assert "warmup_steps: 20 -> 2, in so short a run" in said
    assert "a checkpoint of every epoch is kept, up to" in said


def test_files_that_systems_leave_do_not_make_a_folder_full(tmp_path):
    for name in (".DS_Store", "desktop.ini", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "lost+found").mkdir()
    check_run_folder(tmp_path)
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(ValueError, match="not a run folder"):
        check_run_folder(tmp_path)


def test_another_number_of_threads_is_noted(run, tmp_path, capsys):
    run(tmp_path, callbacks=[StopAt(5)])
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        run(tmp_path)
    finally:
        torch.set_num_threads(before)
    assert f"threads {before} -> {before + 1}" in capsys.readouterr().err
