"""What is recorded for a GPU computes the same; here, on a CPU, each replay is a call."""

import contextlib
import dataclasses

import pytest
import torch

import bitllm_core as bit
from bitllm import cuda
from tests import tiny


@pytest.fixture
def recorded_on_a_cpu(monkeypatch):
    monkeypatch.setitem(bit.DECODERS, "cpu", cuda.RecordedDecoder)
    monkeypatch.setattr(bit, "KERNELS", [])


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7, 8], [9], [10, 11]]])
def test_a_recorded_decoder_writes_the_same_tokens(recorded_on_a_cpu, monkeypatch, prompts):
    """Beyond the context too, where the older half is dropped and the step is recorded again."""
    net = bit.BitLM(tiny.MODEL).freeze()
    sampling = bit.SamplingConfig(max_new_tokens=40, seed=1)
    recorded = list(bit.generate_tokens(net, prompts, sampling))
    monkeypatch.delitem(bit.DECODERS, "cpu")
    assert recorded == list(bit.generate_tokens(net, prompts, sampling))


def test_a_recorded_decoder_is_used(recorded_on_a_cpu, monkeypatch):
    calls = []
    step = cuda.RecordedDecoder._step
    monkeypatch.setattr(cuda.RecordedDecoder, "_step", lambda self: calls.append(1) or step(self))
    net = bit.BitLM(tiny.MODEL).freeze()
    list(bit.generate_tokens(net, [[5, 6]], bit.SamplingConfig(max_new_tokens=6, seed=0)))
    assert len(calls) == 5  # the first token comes from reading the prompt


def micro_step(net, batch_tokens=100):
    def step(x, y):
        loss = net.loss(x, y) / batch_tokens
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.parametrize("linear", ["ternary", "weight_only", "dense"])
def test_weights_held_in_batches_are_those_held_one_by_one(linear):
    net = bit.BitLM(dataclasses.replace(tiny.MODEL, linear=linear))
    layers = net.bit_linears().values()
    with net.hold_weights(torch.bfloat16):
        expected = [layer.held for layer in layers]
    with cuda.hold_in_batches(net, torch.bfloat16):
        for layer, held in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer.held, held)
    assert all(layer.held is None for layer in layers)


@pytest.mark.parametrize(("at_once", "recordings"), [(3, 2), (7, 1)])
def test_recorded_micro_steps_add_up_the_same_gradients(at_once, recordings):
    """Of several micro-batches, a smaller last one, or all at once; and over optimizer steps."""
    net, plain = bit.BitLM(tiny.MODEL), bit.BitLM(tiny.MODEL)
    parameters = list(net.parameters())
    recorded = cuda.RecordedStep(micro_step(net), net, torch.float32, parameters, windows=7)
    windows, places = torch.randint(tiny.MODEL.vocab_size, (7, 17)), set()
    for _ in range(2):
        for part in windows.split(at_once):
            x, y = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            with plain.hold_weights():
                expected = micro_step(plain)(x, y)
            assert torch.equal(recorded(x, y), expected)
        for a, b in zip(parameters, plain.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
            places.add(a.grad.data_ptr())
            with torch.no_grad():
                a -= 0.1 * a.grad
                b -= 0.1 * b.grad
            a.grad = b.grad = None
    assert len(recorded.recordings) == recordings
    assert len(places) == len(parameters)  # a recorded update reads them where they were


def test_what_cannot_be_recorded_is_called(monkeypatch, caplog):
    def fail(self, reset, warm_up):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda.Recording, "_record", fail)
    recording = cuda.Recording(lambda: 7, torch.device("cuda"), lambda: None)
    with caplog.at_level("WARNING"):
        assert recording.replay() == 7


def test_only_work_that_can_be_made_smaller_fails_for_want_of_memory(monkeypatch):
    def fail(self, reset, warm_up):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cuda.Recording, "_record", fail)
    gpu = torch.device("cuda")
    with pytest.raises(torch.OutOfMemoryError):
        cuda.Recording(lambda: 7, gpu)
    assert cuda.Recording(lambda: 7, gpu, warm_up=0).replay() == 7


def test_a_run_with_recorded_steps_equals_one_without(tiny_corpus, tmp_path, monkeypatch):
    from bitllm import compiling

    def prepare(session):
        parameters = bit.parameters_of(session.state.optimizers)
        step, dtype = session.micro_step, session.device.dtype
        session.micro_step = cuda.RecordedStep(step, session.state.model, dtype, parameters, 4)
        session.hold = contextlib.nullcontext

    data, runs = bit.DataConfig(data=str(tiny_corpus)), []
    train = dataclasses.replace(tiny.TRAIN, micro_batch_size=4)
    for name, how in (("plain", lambda session: None), ("recorded", prepare)):
        monkeypatch.setattr(compiling, "prepare", how)  # without a CPU's kernels
        state = bit.train(tiny.MODEL, data, train, tmp_path / name, callbacks=[])
        runs.append(state.model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_recorded_update_takes_each_step_at_its_rate():
    """As the plain optimizers do; and it leaves their groups as they were, for checkpoints."""
    nets = [bit.BitLM(tiny.MODEL) for _ in range(2)]
    plain, recorded = (bit.make_optimizers(net, tiny.TRAIN) for net in nets)
    updates = [cuda.RecordedUpdate(optimizer) for optimizer in recorded]
    groups = [[dict(group) for group in optimizer.param_groups] for optimizer in recorded]
    for step, factor in enumerate((1.0, 0.3, 0.0, 0.7)):
        for net, optimizers in zip(nets, (plain, recorded), strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
        before = [parameter.clone() for parameter in nets[1].parameters()]
        for optimizer, update in zip(plain, updates, strict=True):
            optimizer.step()
            update()
        for a, b in zip(*(net.parameters() for net in nets), strict=True):
            torch.testing.assert_close(a, b)
        moved = [not torch.equal(a, b) for a, b in zip(before, nets[1].parameters(), strict=True)]
        assert all(moved) if factor else not any(moved)
    for optimizer, old in zip(recorded, groups, strict=True):
        assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
        left = [{**group, "lr": 0.0} for group in optimizer.param_groups]
        assert left == [{**group, "lr": 0.0} for group in old]
    assert updates[0].recording is not None
