"""Attention in tiles, or what stands for it, is that of float64, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F

import bitllm_core as bit
from bitllm.cpu import attention, products, training

ROUNDING = 0.012  # of norms, in bfloat16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(B, H, T, K):
    """Queries, keys, values and a gradient, each laid out in its own way."""
    q, v = (torch.randn(B, T, H, K).mul(2).bfloat16().transpose(1, 2) for _ in range(2))
    k, dy = (torch.randn(B, H, T, K).bfloat16() for _ in range(2))
    return q, k, v.mT.contiguous().mT, dy


def computed(attend, q, k, v, dy):
    q, k, v = (t.detach().clone(memory_format=torch.preserve_format) for t in (q, k, v))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    y = attend(*tensors)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in tensors)]


def exact(q, k, v):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)


def here(q, k, v):
    return training.attention_here()(q, k, v, None, True)


WHOLE = [(2, 3, 32, 32), (1, 2, 96, 64), (2, 1, 160, 32), (1, 2, 512, 64), (1, 1, 288, 128)]


@pytest.mark.parametrize("shape", [*WHOLE, (1, 2, 40, 32), (1, 2, 64, 48)])  # two not in tiles
def test_output_and_gradients(shape):
    tensors = inputs(*shape)
    for ours, theirs in zip(computed(here, *tensors), computed(exact, *tensors), strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() < ROUNDING * theirs.norm()


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, dy = inputs(1, 1, 64, 32)
    found = computed(here, 40 * q, 40 * k, v, dy)
    assert all(t.isfinite().all() for t in found)
    assert torch.allclose(found[0].double(), exact(40 * q, 40 * k, v), rtol=0.02, atol=0.02)


def test_no_query_sees_a_later_key():
    q, k, v, dy = inputs(1, 2, 96, 32)
    before = computed(here, q, k, v, dy)
    k[:, :, 41:], v[:, :, 41:] = 7, 7
    after = computed(here, q, k, v, dy)
    assert torch.equal(before[0][:, :, :41], after[0][:, :, :41])
    assert not torch.equal(before[0][:, :, 41:], after[0][:, :, 41:])
    assert torch.equal(before[1][:, :, :41], after[1][:, :, :41])


def test_sums_do_not_depend_on_the_number_of_threads():
    if attention.library() is None:
        return  # torch's products do not promise that
    tensors, threads, found = inputs(2, 3, 160, 32), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(computed(here, *tensors))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_it_is_used_where_there_are_products_and_the_shapes_are_whole(tiny_config, monkeypatch):
    q, k, *_ = inputs(1, 2, 64, 32)
    assert attention.fits(q, k)
    assert not attention.fits(q[:, :, :40], k[:, :, :40])
    assert not attention.fits(q[:, :, -1:], k)
    assert not attention.fits(q.float(), k.float())
    has_tiles = products.library() is not None
    assert (training.attention_here() is training.attend_by_heads) == has_tiles
    layers, _ = training.parts_of(bit.BitLM(tiny_config), torch.bfloat16)
    assert layers[0].attend is training.attention_here()
    used = []
    monkeypatch.setattr(attention, "attention", lambda *t: (used.append(1), (exact(*t),))[1])
    training.attend_by_heads(q, k, q, None, True)
    assert used
    training.attend_by_heads(q, k, q, None, False)
    assert used == [1]
