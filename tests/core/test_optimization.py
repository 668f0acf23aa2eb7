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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def matrices(*shapes):
    return [torch.nn.Parameter(torch.randn(s, generator=seeded(i))) for i, s in enumerate(shapes)]


def give_gradients(weights, step):
    for i, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=seeded(100 * step + i))


def newton_schulz(update):
    """Jordan's reference in float32: github.com/KellerJordan/Muon/blob/f90a42b/muon.py#L5."""
    x = update.T if len(update) > update.shape[1] else update
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(update) > update.shape[1] else x


SHAPES = [(24, 48), (48, 24), (32, 32), (48, 24), (24, 48), (24, 48)]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("fast", "tolerance"), [(True, 2e-2), (False, 1e-3)])
def test_an_update_of_muon_is_the_references(monkeypatch, fast, tolerance):
    """bfloat16 keeps 8 bits of a number, of which 3 steps lose some; float32 24."""
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: fast)
    weights = matrices(*SHAPES)
    give_gradients(weights, 0)
    gradients = [weight.grad.clone() for weight in weights]
    before = [weight.detach().clone() for weight in weights]
    bit.Muon(weights, lr=0.1, momentum=0.9).step()
    for weight, old, gradient in zip(weights, before, gradients, strict=True):
        rows, columns = weight.shape
        expected = newton_schulz((0.1 + 0.9 * 0.1) * gradient) * math.sqrt(max(1, rows / columns))
        assert relative((old - weight) / 0.1, expected) < tolerance


def test_muon_is_torchs_but_for_the_normalization(monkeypatch):
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: True)
    pair = [matrices(*SHAPES) for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "ns_steps": 3}
    kinds = (bit.Muon, torch.optim.Muon)
    optimizers = [kind(ws, **options) for kind, ws in zip(kinds, pair, strict=True)]
    for step in range(3):
        for optimizer, weights in zip(optimizers, pair, strict=True):
            give_gradients(weights, step)
            optimizer.step()
    for ours, theirs, first in zip(*pair, matrices(*SHAPES), strict=True):
        assert relative(ours - first, theirs - first) < 2e-2  # both round to 8 bits, elsewhere
    states = [
        [o.state[w]["momentum_buffer"] for w in weights]
        for o, weights in zip(optimizers, pair, strict=True)
    ]
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("numbers", [1, 2 * 24 * 48, 1 << 24])
def test_what_is_in_a_batch_of_muon_does_not_matter(monkeypatch, numbers):
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(bit.Muon, "BATCH_NUMBERS", numbers)
    together, alone = matrices(*SHAPES), matrices(*SHAPES)
    for weights in (together, alone):
        give_gradients(weights, 0)
    bit.Muon(together, lr=0.1).step()
    for weight in alone:
        bit.Muon([weight], lr=0.1).step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums come in another order


@pytest.mark.parametrize("fast", [True, False])
def test_muon_keeps_off_emulated_bfloat16(monkeypatch, fast):
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: fast)
    dtype = torch.bfloat16 if fast else torch.float32
    assert bit.orthogonalize(torch.ones(2, 3, 4), 3).dtype == dtype


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
