import copy
import dataclasses
import math

import pytest
import torch

import bitllm_core as bit


def test_wsd_warms_up_stays_and_cools_down():
    config = bit.TrainConfig(max_steps=100, warmup_steps=10, cooldown_fraction=0.4)
    factors = [bit.learning_rate_factor(config, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:61] == [1.0] * 52
    assert factors[80] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.03


def test_cosine_ends_at_a_tenth():
    config = bit.TrainConfig(max_steps=100, warmup_steps=10, schedule="cosine")
    factors = [bit.learning_rate_factor(config, step) for step in range(100)]
    assert max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 <= factors[99] < 0.11


def test_a_micro_batch_divides_the_share_of_a_process():
    model, train = bit.PRESETS["demo"][0], bit.TrainConfig(batch_tokens=4096)
    cpu = bit.choose_device("cpu", "float32")
    sizes = [bit.windows_at_once(model, train, cpu, processes) for processes in (1, 2, 3, 4, 16)]
    assert sizes == [16, 16, 11, 8, 2]
    asked = dataclasses.replace(train, micro_batch_size=16)
    sizes = [bit.windows_at_once(model, asked, cpu, processes) for processes in (1, 2, 3, 32)]
    assert sizes == [16, 16, 11, 1]


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
    model = bit.BitLM(tiny_config)
    optimizers = bit.make_optimizers(model, bit.TrainConfig())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = bit.clip_gradients(optimizers, 1.0, bit.Processes())
    assert norm == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())))
    muon, adamw = ([p.grad for g in o.param_groups for p in g["params"]] for o in optimizers)
    assert torch.nn.utils.get_total_norm(adamw) == pytest.approx(1.0, rel=1e-4)
    assert all((grad == 1).all() for grad in muon)


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
def test_muon_in_float32_is_torchs_but_for_its_bfloat16(shape):
    weights = [torch.nn.Parameter(torch.randn(shape, generator=seeded(0))) for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    pair = [kind([w], **options) for kind, w in zip(MUONS, weights, strict=True)]
    for step in range(3):
        for optimizer, weight in zip(pair, weights, strict=True):
            weight.grad = torch.randn(shape, generator=seeded(step + 1))
            optimizer.step()
    # an update's entries are about 0.1 * 1 / sqrt(48); bfloat16 keeps 8 bits of them
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-3)
    assert not torch.equal(weights[0], weights[1])
    pair[1].load_state_dict(pair[0].state_dict())  # a run goes on on other hardware


MUONS = (torch.optim.Muon, bit.Float32Muon)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fast", [True, False])
def test_muon_keeps_off_emulated_bfloat16(tiny_config, monkeypatch, fast):
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: fast)
    muon, _ = bit.make_optimizers(bit.BitLM(tiny_config), bit.TrainConfig())
    assert isinstance(muon, bit.Float32Muon) == (not fast)


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
