"""Quantizers against the authors' reference, and the layer's three forms against each other."""

import pytest
import torch
from torch.nn import functional as F

import bitllm_core as bit


# The functions in "The Era of 1-bit LLMs: Training Tips, Code and FAQ",
# https://github.com/microsoft/unilm/blob/master/bitnet/The-Era-of-1-bit-LLMs__Training_Tips_Code_FAQ.pdf
def reference_activation_quant(x):
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


def reference_weight_quant(w):
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1.0, 1e4])
def test_quantizers_agree_with_the_reference(factor):
    x = torch.randn(7, 33) * factor
    torch.testing.assert_close(bit.activation_quant(x), reference_activation_quant(x))
    ternary, scale = bit.weight_quant(x)
    assert set(ternary.unique().tolist()) <= {-1.0, 0.0, 1.0}
    torch.testing.assert_close(ternary * scale, reference_weight_quant(x))


@pytest.mark.parametrize("seed", range(3))
def test_trits_and_scale_are_the_seed_scripts_to_the_bit(seed):
    """A scale that rounds differently flips the trits of weights on an edge."""
    weight = torch.empty(512, 2048).uniform_(generator=torch.Generator().manual_seed(seed)) - 0.5
    ternary, scale = bit.weight_quant(weight)
    assert torch.equal(scale, weight.abs().mean())
    assert torch.equal(ternary, torch.round(weight / scale).clamp(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiny_and_zero_rows_stay_finite_in_half_precision(dtype):
    x = torch.tensor([[0.0, 0.0], [1e-4, -1e-5], [3e4, 1.0]]).to(dtype)
    assert bit.activation_quant(x).isfinite().all()


def test_an_8_bit_row_has_at_most_255_values():
    row = bit.activation_quant(torch.randn(1, 10_000))
    assert row.unique().numel() <= 255


def test_zero_weights_stay_zero():
    ternary, scale = bit.weight_quant(torch.zeros(3, 4))
    assert not ternary.any()
    assert scale == torch.tensor(1e-5)


def test_only_a_matrix_has_a_ternary_form():
    with pytest.raises(ValueError, match="matrix"):
        bit.weight_quant(torch.ones(3))
    with pytest.raises(ValueError, match="dense"):
        bit.BitLinear(2, 2, linear="dense").ternary()


def test_gradients_pass_straight_through():
    layer = bit.BitLinear(8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    quantized = bit.quantize_input(x, "ternary")
    up = torch.randn(5, 4)
    layer(quantized).backward(up)
    ternary, scale = bit.weight_quant(layer.weight.detach())
    torch.testing.assert_close(layer.weight.grad, up.T @ bit.activation_quant(x.detach()))
    torch.testing.assert_close(x.grad, up @ (ternary * scale))


@pytest.mark.parametrize("linear", ["ternary", "weight_only", "dense"])
def test_the_inference_form_computes_the_same(linear):
    layer = bit.BitLinear(64, 32, linear)
    x = bit.quantize_input(torch.randn(9, 64), linear)
    before = layer(x)
    layer.freeze()
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)  # float rounding
    if linear != "dense":
        assert layer.trits.dtype == torch.int8
        assert "weight" not in dict(layer.named_parameters())


def test_the_three_forms_differ():
    layers = {kind: bit.BitLinear(64, 32, kind) for kind in ("ternary", "weight_only", "dense")}
    weight = torch.randn(32, 64)
    x = torch.randn(9, 64)
    out = {}
    for kind, layer in layers.items():
        layer.weight.data.copy_(weight)
        out[kind] = layer(bit.quantize_input(x, kind))
    torch.testing.assert_close(out["dense"], F.linear(x, weight))
    assert not torch.allclose(out["weight_only"], out["dense"], atol=0.1)
    assert not torch.equal(out["ternary"], out["weight_only"])


def test_quantizing_twice_is_not_quantizing_once():
    """The trap that broke other exports: the mean of t * s is smaller than s."""
    ternary, scale = bit.weight_quant(torch.randn(64, 64))
    again = bit.weight_quant(ternary * scale)[1]
    assert again < 0.9 * scale


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 64), (32, 1023)])
def test_two_bits_hold_a_trit(size):
    trits = torch.randint(-1, 2, size, dtype=torch.int8)
    layer = bit.BitLinear(size[1], size[0])
    layer.set_ternary(trits, torch.tensor(1.0))
    assert layer.packed.dtype == torch.uint8
    assert layer.packed.shape == (size[0], -(-size[1] // 4))
    assert torch.equal(layer.trits, trits)
