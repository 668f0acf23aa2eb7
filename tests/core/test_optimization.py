import copy
import dataclasses
import itertools
import math
import sys

import pytest
import torch

import bitllm_core as bit
from bitllm import memory


def test_wsd_warms_up_stays_and_cools_down():
    config = bit.TrainConfig(max_steps=100, warmup_steps=10, cooldown_fraction=0.4)
    factors = [bit.learning_rate_factor(config, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:61] == [1.0] * 52
    assert factors[80] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.03


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 10, 30])
def test_a_warm_up_longer_than_the_run_is_shortened_without_a_jump(schedule, steps):
    """The rate rose to the last step, or fell from a half of its peak at once."""
    config = bit.TrainConfig(max_steps=steps, warmup_steps=20, schedule=schedule)
    factors = [bit.learning_rate_factor(config, step) for step in range(steps)]
    assert max(factors) == 1.0
    top = factors.index(1.0)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if steps == 30:
        assert max(abs(a - b) for a, b in itertools.pairwise(factors)) < 0.2


def test_cosine_ends_at_a_tenth():
    config = bit.TrainConfig(max_steps=100, warmup_steps=10, schedule="cosine")
    factors = [bit.learning_rate_factor(config, step) for step in range(100)]
    assert max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 <= factors[99] < 0.11


def test_a_micro_batch_divides_the_share_of_a_process(monkeypatch):
    model, train = bit.ModelConfig(), bit.TrainConfig(batch_tokens=4096)
    cpu = bit.choose_device("cpu", "float32")
    assert memory.memory_size() > 1 << 30
    for gib, expected in ((8, [32, 16, 11, 8, 2]), (1, [4, 2, 1, 1, 1])):  # shared
        monkeypatch.setattr(memory, "memory_size", lambda gib=gib: gib << 30)
        sizes = [bit.windows_at_once(model, train, cpu, number) for number in (1, 2, 3, 4, 16)]
        assert sizes == expected
    monkeypatch.setattr(memory, "memory_size", lambda: 0)  # Windows does not say: as if 8 GiB
    assert bit.windows_at_once(model, train, cpu) == 32
    asked = dataclasses.replace(train, micro_batch_size=16)
    sizes = [bit.windows_at_once(model, asked, cpu, processes) for processes in (1, 2, 3, 32)]
    assert sizes == [16, 16, 11, 1]
    monkeypatch.setitem(sys.modules, "bitllm.memory", None)  # the core alone
    long = dataclasses.replace(model, max_position_embeddings=1024)
    assert [bit.windows_at_once(m, train, cpu) for m in (model, long)] == [32, 4]
    more = dataclasses.replace(train, batch_tokens=32_768)
    assert [bit.windows_at_once(m, more, cpu) for m in (model, long)] == [64, 8]


def test_muon_has_the_matrices_and_adamw_the_rest(tiny_config):
    model = bit.BitLM(tiny_config)
    muon, adamw = bit.make_optimizers(model, bit.TrainConfig())
    assert len(muon.param_groups[0]["params"]) == 2 * 7
    both = [p for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in both} == {id(p) for p in model.parameters()}
    assert len(both) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_non_finite_gradient_changes_nothing(tiny_config, optimizer):
    model = bit.BitLM(tiny_config)
    optimizers = bit.make_optimizers(model, bit.TrainConfig(optimizer=optimizer))
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.model.norm.weight.grad[0] = torch.inf
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    _, norm = bit.apply_gradients(optimizers, scaler, 1.0, 1.0)
    assert norm == torch.inf
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_loss_scaling_gives_the_same_step(tiny_config):
    stepped = []
    for enabled in (False, True):
        model = bit.BitLM(tiny_config)
        optimizers = bit.make_optimizers(model, bit.TrainConfig())
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        x = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
        scaler.scale(model.loss(x[:, :-1], x[:, 1:])).backward()
        bit.apply_gradients(optimizers, scaler, 1.0, 1.0)
        stepped.append(model.state_dict())
    for name, value in stepped[0].items():
        torch.testing.assert_close(value, stepped[1][name], msg=name)


def test_clipping_bounds_adamw_only(tiny_config):
    model, seen = bit.BitLM(tiny_config), []
    optimizers = bit.make_optimizers(model, bit.TrainConfig())

    class Watch(bit.Processes):
        def step(self, optimizers):
            seen.extend([p.grad.clone() for p in bit.parameters_of([o])] for o in optimizers)

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    _, norm = bit.apply_gradients(optimizers, scaler, 1.0, 1.0, None, Watch())
    assert norm == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())))
    muon, adamw = seen
    assert torch.nn.utils.get_total_norm(adamw) == pytest.approx(1.0, rel=1e-4)
    assert all((grad == 1).all() for grad in muon)


def test_gains_that_agree_move_together_and_others_apart(tiny_config):
    """A part moves at AdamW's rate, and the size of all at twice that besides."""
    model = bit.BitLM(tiny_config)
    optimizers = bit.make_optimizers(model, bit.TrainConfig())
    norms = {n: p for n, p in model.named_parameters() if "norm" in n}
    assert len(norms) == 2 * 4 + 1
    together, apart = model.model.norm.weight, model.model.layers[0].input_layernorm.weight
    for _ in range(50):
        for p in norms.values():
            p.grad = torch.zeros_like(p)
        together.grad += 1.0
        apart.grad[::2], apart.grad[1::2] = 1.0, -1.0
        bit.apply_gradients(optimizers, torch.amp.GradScaler("cpu", enabled=False), 0.1, 0.0)
    rate = 0.1 * optimizers[1].param_groups[0]["initial_lr"]
    assert together.detach().log().mean() == pytest.approx(-50 * 3 * rate, rel=0.1)
    assert together.max() == together.min()
    assert (apart[1::2] / apart[::2]).mean().item() == pytest.approx(1 + 2 * 50 * rate, rel=0.005)
    untouched = model.model.layers[1].mlp.ffn_sub_norm.weight
    assert (untouched == 1).all()


def test_each_form_has_its_own_rate_where_none_is_set(tiny_config):
    dense = dataclasses.replace(tiny_config, linear="dense")
    rates = {linear: bit.peak_rates(linear, bit.TrainConfig()) for linear in (tiny_config, dense)}
    assert rates[tiny_config][0] > rates[dense][0]  # a trit moves only across a threshold
    for model, pair in rates.items():
        muon, adamw = bit.make_optimizers(bit.BitLM(model), bit.TrainConfig())
        assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == pair
        asked = bit.TrainConfig(learning_rate=0.3, optimizer="adamw")
        assert bit.peak_rates(model, asked) == (0.3, 0.3)
        asked = bit.TrainConfig(learning_rate=0.3, adamw_learning_rate=0.1)
        assert bit.peak_rates(model, asked) == (0.3, 0.1)
