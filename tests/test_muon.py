"""Muon in batches, against its reference and torch's."""

import math

import pytest
import torch

import bitllm_core as bit
from bitllm import muon
from bitllm.muon import Muon, orthogonalize


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
    Muon(weights, lr=0.1, momentum=0.9).step()
    for weight, old, gradient in zip(weights, before, gradients, strict=True):
        rows, columns = weight.shape
        expected = newton_schulz((0.1 + 0.9 * 0.1) * gradient) * math.sqrt(max(1, rows / columns))
        assert relative((old - weight) / 0.1, expected) < tolerance


def test_muon_is_torchs_but_for_the_normalization(monkeypatch):
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: True)
    pair = [matrices(*SHAPES) for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "ns_steps": 3}
    kinds = (Muon, torch.optim.Muon)
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
    monkeypatch.setattr(muon, "BATCH_NUMBERS", numbers)
    together, alone = matrices(*SHAPES), matrices(*SHAPES)
    for weights in (together, alone):
        give_gradients(weights, 0)
    Muon(together, lr=0.1).step()
    for weight in alone:
        Muon([weight], lr=0.1).step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums come in another order


@pytest.mark.parametrize("fast", [True, False])
def test_muon_keeps_off_emulated_bfloat16(monkeypatch, fast):
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: fast)
    dtype = torch.bfloat16 if fast else torch.float32
    assert orthogonalize(torch.ones(2, 3, 4), 3).dtype == dtype
