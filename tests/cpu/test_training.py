"""Training's kernels for a CPU compute what plain torch does, and its gradients, to rounding."""

import pytest
import torch
import torch.nn.functional as F

import bitllm_core as bit
from bitllm import compiling
from bitllm.cpu import training

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of norms; bfloat16 has 8 bits
both_types = pytest.mark.parametrize("dtype", ROUNDING)


@pytest.fixture(autouse=True)
def _need_a_compiler():
    torch.manual_seed(0)
    assert training.library(torch.float32) is not None, "no C compiler? .ci/run's machine has one"


def computed(function, tensors, *options):
    """The output, in float32, and the gradients of a weighted sum of it."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors, *options).float()
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(t.grad.float() for t in tensors)]


def assert_alike(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


@both_types
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (63, 7), (65, 64), (130, 515)])
def test_a_norm_that_also_rounds(dtype, rounded, rows, n):
    x = torch.randn(2, rows, n) * torch.logspace(-6, 3, rows)[:, None]
    weight = torch.rand(n) + 0.5

    def plain(x, weight):
        y = F.rms_norm(x, (n,), weight, 1e-5)
        return bit.quantize_input(y, "ternary" if rounded else "dense").to(dtype)

    def ours(x, weight):
        return training.norm(x, weight, 1e-5, int(rounded), dtype)[0]

    assert_alike(computed(ours, (x, weight)), computed(plain, (x, weight)), ROUNDING[dtype])


@both_types
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(3, 16), (65, 64), (130, 515)])
def test_a_gate_and_the_norm_of_it(dtype, rounded, rows, n):
    gate, up = 9 * torch.randn(2, rows, n).to(dtype), torch.randn(2, rows, n).to(dtype)
    gate[0, 0, 0], weight = -500.0, torch.rand(n) + 0.5

    def plain(gate, up, weight):
        y = F.rms_norm(F.silu(gate.float()) * up.float(), (n,), weight, 1e-5)
        return bit.quantize_input(y, "ternary" if rounded else "dense").to(dtype)

    def ours(gate, up, weight):
        return training.gated(gate, up, weight, 1e-5, int(rounded))[0]

    tensors = (gate, up, weight)
    assert_alike(computed(ours, tensors), computed(plain, tensors), ROUNDING[dtype])


def test_sums_do_not_depend_on_the_number_of_threads():
    x, weight, threads = torch.randn(999, 64), torch.rand(64), torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(
            computed(
                lambda *t: training.norm(*t, 1e-5, training.ROUNDED, torch.float32)[0], (x, weight)
            )
        )
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@both_types
def test_head_and_loss(dtype):
    logits = (20 * torch.randn(70, 300)).to(dtype)
    target = torch.randint(-300, 600, (70, 1))  # negative and too large: of another block
    total = bit.log_total(logits)
    assert torch.allclose(training.log_total(logits), total, rtol=1e-6, atol=1e-5)
    expected = bit.logits_gradient(logits, total, target)
    found = training.logits_gradient(logits.clone(), total, target)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-6)


def exactly(q, k, v, mask, causal):
    q, k, v = q.double(), k.double(), v.double()
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


@pytest.mark.parametrize(("T", "in_parts"), [(8, True), (512, True), (10, False), (516, False)])
def test_attention_in_parts_is_that_in_one(monkeypatch, T, in_parts):
    tensors = [torch.randn(2, 3, T, 16).bfloat16() for _ in range(3)]
    whole = []
    monkeypatch.setattr(training, "attend", lambda *a: (whole.append(1), bit.attend(*a))[1])
    found = computed(training.attend_in_parts, tensors, None, True)
    assert bool(whole) != in_parts
    assert_alike(found, computed(exactly, tensors, None, True), 0.02)


def test_no_query_sees_a_later_key():
    q, k, v = (torch.randn(1, 2, 16, 8).bfloat16() for _ in range(3))
    before = training.attend_in_parts(q, k, v, None, True)
    k[:, :, 9:], v[:, :, 9:] = 7, 7
    after = training.attend_in_parts(q, k, v, None, True)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:], after[:, :, 9:])


def test_float32_and_what_is_not_causal_attend_as_in_the_core():
    tensors = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    for causal in (True, False):
        plain = bit.attend(*tensors, None, causal)
        assert torch.equal(training.attend_in_parts(*tensors, None, causal), plain)
        tensors = [t.bfloat16() for t in tensors]


@both_types
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("linear", ["ternary", "weight_only", "dense"])
def test_the_loss_and_its_gradients(tiny_config, monkeypatch, dtype, compiled, linear):
    """The trits of two ways to sum differ where they are close to half, and bfloat16 more."""
    monkeypatch.setattr(torch, "compile", lambda part, **options: part)
    config = bit.dataclasses.replace(tiny_config, linear=linear)
    model, ids = bit.BitLM(config), torch.randint(tiny_config.vocab_size, (2, 17))
    blocks, softmax = training.parts_of(model, dtype)
    ours = compiling.compiled_loss(model, blocks, softmax)
    if not compiled:
        ours = lambda x, y: model.loss(x, y, blocks, softmax)  # noqa: E731
    found = []
    for loss in (model.loss, ours):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(ids[:, :-1], ids[:, 1:])
        value.backward()
        found.append([value, *(p.grad.clone() for p in model.parameters())])
    assert_alike(*found, 1e-4 if (linear, dtype) == ("dense", torch.float32) else 0.1)


def test_without_a_compiler_the_core_s_own(tiny_config, monkeypatch):
    model = bit.BitLM(tiny_config)
    assert isinstance(training.parts_of(model, torch.float32)[0][0], training.FusedBlock)
    monkeypatch.setattr(training, "library", lambda dtype: None)
    blocks, softmax = training.parts_of(model, torch.float32)
    assert softmax is None
    assert all(map(lambda a, b: a is b, blocks, model.model.layers))
