"""The kernels for a CPU compute the same bits as plain torch, and only where they may."""

import sys
from pathlib import Path

import pytest
import torch

import bitllm_core as bit
from bitllm import cpu
from tests import warm
from tests.conftest import ROOT

CPUINFO = Path("/proc/cpuinfo")  # only Linux has it
FEATURES = CPUINFO.read_text().split() if CPUINFO.is_file() else []
FLAGS = [(), *[("-mavx2",)] * ("avx2" in FEATURES)]
FLAGS += [("-mavx512bw", "-mavx512vnni")] * ("avx512_vnni" in FEATURES)


@pytest.fixture(autouse=True)
def _need_a_compiler():
    assert cpu.compiled() is not None, "no C compiler? .ci/run's machine has one"


def frozen_layers(in_features, *out_features):
    layers = [bit.BitLinear(in_features, size) for size in out_features]
    for layer in layers:
        layer.weight.data.normal_(std=0.05)
        layer.freeze()
    return layers


@torch.no_grad()
@pytest.mark.parametrize("in_features", [1, 6, 64, 515, 1536])
@pytest.mark.parametrize("rows", [1, 2, cpu.FEW_ROWS])
def test_the_kernel_computes_the_same_bits_as_torch(in_features, rows):
    """Sums of whole numbers are exact in any order, and the rest is the same arithmetic."""
    layers = frozen_layers(in_features, 48, 3, 17)
    x = torch.randn(rows, 1, in_features) * torch.logspace(-7, 2, rows)[:, None, None]
    assert bit.kernels_for(x) is not None
    for y, layer in zip(bit.project(x, layers), layers, strict=True):
        assert torch.equal(y, layer(x))
        layer.hold(torch.float32)
        assert torch.equal(y, layer(x))
    assert torch.equal(bit.project(torch.zeros_like(x), layers)[0], torch.zeros(rows, 1, 48))


@torch.no_grad()
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("in_features", [4, 131, 1028])
def test_the_products_for_any_processor_are_the_same(flags, in_features, monkeypatch):
    """Largest numbers of one sign, which sixteen bits would not hold if they were added up."""
    kernels = cpu.build(cpu.SOURCE, cpu.INFERENCE, *flags)
    monkeypatch.setattr(cpu, "compiled", lambda: kernels)
    layer = bit.BitLinear(in_features, 3)
    layer.set_ternary(torch.ones(3, in_features, dtype=torch.int8), torch.tensor(0.5))
    for x in (torch.ones(1, in_features), -torch.ones(1, in_features), torch.randn(2, in_features)):
        assert torch.equal(bit.project(x, [layer])[0], layer(x))


@torch.no_grad()
def test_layers_with_new_weights_are_not_computed_with_the_old_ones():
    layers, x = frozen_layers(64, 8, 8), torch.randn(1, 64)
    before = bit.project(x, layers)[1].clone()
    layers[1].set_ternary(*[t.clone() for t in frozen_layers(64, 8)[0].ternary()])
    after = bit.project(x, layers)[1]
    assert torch.equal(after, layers[1](x))
    assert not torch.equal(after, before)


@torch.no_grad()
def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    cpu.compiled.cache_clear()
    try:
        assert cpu.compiled() is None
        layers, x = frozen_layers(64, 8), torch.randn(1, 64)
        assert torch.equal(bit.project(x, layers)[0], layers[0](x))
    finally:
        cpu.compiled.cache_clear()


@pytest.mark.parametrize("size", [1, 7, 64, 1537])
def test_the_norm_of_a_few_rows_is_that_of_many(size):
    norm = bit.RMSNorm(size, 1e-5)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 3, size) * torch.logspace(-6, 6, 3)[:, None]
    expected = norm(x)  # torch's own, as there is something to learn
    with torch.no_grad():
        assert bit.kernels_for(x) is not None
        torch.testing.assert_close(norm(x), expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(norm(x.bfloat16().float()), norm(x.bfloat16()), rtol=0, atol=0)
        assert bit.kernels_for(x.expand(9, -1, -1, -1)) is None


def test_packed_weights_write_the_same_as_unpacked_ones(tiny_config, monkeypatch):
    """While generating, only two bits per weight are held; the text is the same to the bit."""
    model = bit.BitLM(tiny_config, seed=1).freeze()
    held = []
    hold = bit.BitLinear.hold
    monkeypatch.setattr(bit.BitLinear, "hold", lambda *a: (held.append(a), hold(*a)))
    sampling = bit.SamplingConfig(max_new_tokens=40, seed=5)  # beyond the context of 16
    prompts = [[3, 4, 5], [9]]
    packed = list(bit.generate_tokens(model, prompts, sampling))
    assert not held
    weights = sum(layer.shape.numel() for layer in model.bit_linears().values())
    assert sum(layer.packed.numel() for layer in model.bit_linears().values()) * 8 / weights <= 2.1
    monkeypatch.setattr(bit, "KERNELS", [])
    assert list(bit.generate_tokens(model, prompts, sampling)) == packed
    assert held


@torch.no_grad()
def test_a_compiled_model_reads_a_few_rows_without_the_kernels(tiny_config):
    model = bit.BitLM(tiny_config).freeze()
    ids = torch.tensor([[1, 2, 3]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_kernels_are_compiled_at_the_first_use_and_never_asked_where_a_gradient_is_wanted():
    code = (
        "import torch, bitllm_core as bit; from bitllm import cpu; x = torch.ones(1, 8);"
        "assert cpu.compiled.cache_info().currsize == 0;"
        "assert bit.kernels_for(x) is None and cpu.compiled.cache_info().currsize == 0;"
        "torch.set_grad_enabled(False); assert bit.kernels_for(x) is bit.KERNELS[0];"
        "assert cpu.compiled.cache_info().currsize == 1"
    )
    warm.run([sys.executable, "-c", code], check=True, cwd=ROOT)
