"""Products of integers and trits are exact, and weights' gradients those of plain products."""

from pathlib import Path

import pytest
import torch

import bitllm_core as bit
from bitllm.cpu import products, training


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def matrices(rows, n, m):
    return torch.randn(rows, n).bfloat16(), torch.randn(rows, m).bfloat16()


def exact(dy, x):
    return (dy.double().T @ x.double()).float()


def integers_and_trits(rows, n, m):
    """8-bit integers, each row's step, and weights 0, s, -s and -0, in bfloat16."""
    integers = torch.randint(-127, 128, (rows, m), dtype=torch.int8)
    trits = torch.randint(-1, 2, (n, m)).float()
    trits[0] = -0.0
    return integers, torch.rand(rows) + 0.01, (trits * 0.0234375).bfloat16()


with_and_without = pytest.mark.parametrize("with_tiles", [True, False])


@with_and_without
@pytest.mark.parametrize(
    ("rows", "n", "m"), [(32, 32, 128), (96, 160, 192), (64, 48, 128), (33, 64, 128), (64, 64, 160)]
)
def test_integers_by_trits(monkeypatch, rows, n, m, with_tiles):
    if not with_tiles:
        monkeypatch.setattr(products, "library", lambda: None)
    integers, steps, held = integers_and_trits(rows, n, m)
    expected = (integers.double() @ held.double().T * steps.double()[:, None]).bfloat16()
    found = products.ternary_linear(integers, steps, held)
    if products.library() and not (rows % 32 or n % 32 or m % 64):  # exact, but for how it is held
        assert torch.allclose(found, expected, rtol=2**-8, atol=0)
    else:
        assert (found - expected).norm() < 0.01 * expected.norm()


def test_only_zeros_make_zeros():
    integers, steps, held = integers_and_trits(32, 32, 128)
    assert not products.ternary_linear(integers, steps, torch.zeros_like(held)).any()
    assert not products.ternary_linear(torch.zeros_like(integers), steps, held).any()


@with_and_without
@pytest.mark.parametrize(("rows", "n", "m"), [(288, 1056, 160), (96, 40, 128), (33, 64, 128)])
def test_a_weight_s_gradient_from_integers(monkeypatch, rows, n, m, with_tiles):
    if not with_tiles:
        monkeypatch.setattr(products, "library", lambda: None)
    (integers, steps, _), (dy, _) = integers_and_trits(rows, n, m), matrices(rows, n, m)
    x = (integers * steps[:, None]).bfloat16()
    found = products.weight_gradient(dy, integers, steps)
    assert torch.equal(found, products.weight_gradient(dy, x, None))


@pytest.mark.parametrize(
    ("rows", "n", "m"),
    [(32, 32, 128), (288, 2080, 160), (544, 1040, 128), (96, 40, 128), (33, 64, 128), (64, 64, 96)],
)
@with_and_without
def test_a_weight_s_gradient(monkeypatch, rows, n, m, with_tiles):
    if not with_tiles:
        monkeypatch.setattr(products, "library", lambda: None)
    dy, x = matrices(rows, n, m)
    expected = exact(dy, x)
    assert (products.weight_gradient(dy, x, None) - expected).norm() < 0.01 * expected.norm()
    dw = torch.full_like(expected, 3.0)
    products.add_weight_gradient(dw, dy, x)
    assert (dw - 3 - expected).norm() < 0.01 * expected.norm()


def test_sums_do_not_depend_on_the_number_of_threads():
    dy, x = matrices(512, 256, 128)
    arguments = integers_and_trits(512, 256, 128)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            gradient = products.weight_gradient(dy, x, None)
            found.append((gradient, products.ternary_linear(*arguments)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_the_library_is_ready_where_the_processor_has_tiles_or_wide_products():
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    assert products.has_amx() == ({"amx_bf16", "amx_int8"} <= flags)
    assert products.ready(128, torch.bfloat16) == ({"avx512_bf16", "avx512_vnni"} <= flags)
    assert not products.ready(64, torch.bfloat16)
    assert not products.ready(128, torch.float32)


@pytest.mark.parametrize(
    ("linear", "size", "tolerance"),
    [("ternary", 192, 0.05), ("ternary", 160, 0.05), ("dense", 160, 0.01)],  # 8 bits, not 16
)
def test_the_gradients_of_a_model(tiny_config, monkeypatch, linear, size, tolerance):
    changes = {"hidden_size": 128, "intermediate_size": size, "linear": linear}
    model = bit.BitLM(bit.dataclasses.replace(tiny_config, **changes))
    ids = torch.randint(tiny_config.vocab_size, (4, 17))

    def gradients(*parts):
        model.zero_grad()
        with model.hold_weights(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            model.loss(ids[:, :-1], ids[:, 1:], *parts).backward()
        return [p.grad.clone() for p in model.parameters()]

    monkeypatch.setattr(training, "ready", lambda features, dtype: True)
    parts, core = training.parts_of(model, torch.bfloat16), gradients()
    forms = {"dense": (training.PLAIN,) * 2, "ternary": (training.INTEGERS, training.ROUNDED)}
    assert tuple(map(parts[0][0].form, (128, 160))) == forms[linear]
    ours = gradients(*parts)
    monkeypatch.setattr(products, "library", lambda: None)
    for with_tiles, without, plain in zip(ours, gradients(*parts), core, strict=True):
        assert (with_tiles - without).norm() < tolerance * without.norm()
        assert (with_tiles - plain).norm() < 0.1 * plain.norm()
