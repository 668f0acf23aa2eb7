"""Attention as compiled training has it."""

import pytest
import torch
import torch.nn.functional as F

import bitllm_core as bit
from bitllm import compiling


@pytest.fixture
def compiles(monkeypatch):
    """As while torch.compile reads the code, which is then run as it is."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda part, **options: part)


def computed(attend, tensors, causal=True):
    """The output, in float32, and gradients."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = attend(*tensors, None, causal).float()
    y.square().sum().backward()
    return [y.detach(), *(t.grad.float() for t in tensors)]


@pytest.mark.parametrize(("T", "in_parts"), [(8, True), (512, True), (10, False), (516, False)])
def test_attention_in_parts_is_that_in_one(compiles, monkeypatch, T, in_parts):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, T, 16).bfloat16() for _ in range(3)]

    def exact(q, k, v, mask, causal):
        q, k, v = q.double(), k.double(), v.double()
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    whole = []
    monkeypatch.setattr(compiling, "attend", lambda *a: (whole.append(1), bit.attend(*a))[1])
    found = computed(compiling.attend_in_parts, tensors)
    assert bool(whole) != in_parts
    for ours, expected in zip(found, computed(exact, tensors), strict=True):
        assert (ours - expected).norm() < 0.02 * expected.norm()  # bfloat16 has 8 bits


def test_only_what_is_compiled_goes_in_parts(monkeypatch):
    tensors = [torch.randn(1, 2, 8, 4).bfloat16() for _ in range(3)]
    plain = bit.attend(*tensors, None, True)
    assert torch.equal(compiling.attend_in_parts(*tensors, None, True), plain)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not torch.equal(compiling.attend_in_parts(*tensors, None, True), plain)
    tensors = [t.float() for t in tensors]
    plain = bit.attend(*tensors, None, True)
    assert torch.equal(compiling.attend_in_parts(*tensors, None, True), plain)


def test_a_compiled_loss_attends_in_parts(compiles, tiny_config, monkeypatch):
    model, seen = bit.BitLM(tiny_config), []
    ids = torch.randint(tiny_config.vocab_size, (2, 17))
    x, y = ids[:, :-1], ids[:, 1:]
    in_parts = compiling.attend_in_parts
    monkeypatch.setattr(compiling, "attend_in_parts", lambda *a: (seen.append(1), in_parts(*a))[1])
    expected = model.loss(x, y)
    loss = compiling.compiled_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(x, y)
    assert len(seen) == tiny_config.num_hidden_layers
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
