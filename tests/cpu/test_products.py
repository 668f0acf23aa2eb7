"""The gradients of weights in bfloat16 are those of plain products, with AMX and without."""

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


@pytest.mark.parametrize(
    ("rows", "n", "m"),
    [(32, 32, 128), (288, 2080, 160), (544, 1040, 128), (96, 40, 128), (33, 64, 128), (64, 64, 96)],
)
@pytest.mark.parametrize("with_amx", [True, False])
def test_a_weight_s_gradient(monkeypatch, rows, n, m, with_amx):
    if not with_amx:
        monkeypatch.setattr(products, "library", lambda: None)
    dy, x = matrices(rows, n, m)
    expected = exact(dy, x)
    assert (products.weight_gradient(dy, x) - expected).norm() < 0.01 * expected.norm()
    dw = torch.full_like(expected, 3.0)
    products.add_weight_gradient(dw, dy, x)
    assert (dw - 3 - expected).norm() < 0.01 * expected.norm()


def test_sums_do_not_depend_on_the_number_of_threads():
    dy, x = matrices(512, 256, 128)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(products.weight_gradient(dy, x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_library_is_ready_where_the_processor_has_amx():
    info = Path("/proc/cpuinfo")
    has_amx = info.exists() and "amx_bf16" in info.read_text()
    assert products.ready(128, torch.bfloat16) == has_amx
    assert not products.ready(64, torch.bfloat16)
    assert not products.ready(128, torch.float32)


@pytest.mark.parametrize("linear", ["ternary", "dense"])
def test_the_gradients_of_a_model(tiny_config, monkeypatch, linear):
    changes = {"hidden_size": 128, "intermediate_size": 160, "linear": linear}
    model = bit.BitLM(bit.dataclasses.replace(tiny_config, **changes))
    ids = torch.randint(tiny_config.vocab_size, (4, 9))

    def gradients(*parts):
        model.zero_grad()
        with model.hold_weights(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            model.loss(ids[:, :-1], ids[:, 1:], *parts).backward()
        return [p.grad.clone() for p in model.parameters()]

    monkeypatch.setattr(training, "ready", lambda features, dtype: True)
    parts, core = training.parts_of(model, torch.bfloat16), gradients()
    assert parts[0][0].linear is products.linear
    ours = gradients(*parts)
    monkeypatch.setattr(products, "library", lambda: None)
    for with_amx, without, plain in zip(ours, gradients(*parts), core, strict=True):
        assert (with_amx - without).norm() < 0.01 * without.norm()
        assert (with_amx - plain).norm() < 0.1 * plain.norm()
