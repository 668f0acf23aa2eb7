import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F

import bitllm_core as bit
from tests.conftest import Payload


def ids(config, batch=2, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@pytest.fixture(params=["bitnet", "seed", "dense", "multi-head"])
def variant(request, tiny_config):
    changes = {
        "bitnet": {},
        "dense": {"linear": "dense"},
        "multi-head": {"num_key_value_heads": None},
        "seed": {
            "block": "seed",
            "linear": "weight_only",
            "tie_word_embeddings": False,
            "num_key_value_heads": None,
        },
    }
    return dataclasses.replace(tiny_config, **changes[request.param])


def test_a_token_sees_only_what_is_before_it(variant):
    model = bit.BitLM(variant)
    a = ids(variant)
    b = a.clone()
    b[:, 9:] = (b[:, 9:] + 1) % variant.vocab_size
    before, after = model(a), model(b)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_cached_steps_equal_the_whole(variant):
    model, x = bit.BitLM(variant).eval(), ids(variant)
    whole = model(x)
    cache = bit.KVCache(variant, 2, torch.device("cpu"))
    parts = [model(x[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 13), (13, 16))]
    # an activation on the edge between two 8-bit values may round the other way
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=2e-3)


def test_padding_on_the_left_changes_nothing(variant):
    model, x = bit.BitLM(variant).eval(), ids(variant, length=10)
    alone = model(x[:1, 4:])
    padded = model(x, left_pad=torch.tensor([4, 0]))
    torch.testing.assert_close(padded[:1, 4:], alone, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(padded[1:], model(x[1:]), rtol=1e-3, atol=2e-3)
    assert padded.isfinite().all()


@torch.no_grad()
def test_a_cache_of_one_size_under_a_mask_gives_the_same(variant):
    """As recorded CUDA graphs read it: all of the cache, of which only a part is filled."""
    model, x = bit.BitLM(variant).eval(), ids(variant, length=8)
    whole = model(x)
    cache, at = bit.KVCache(variant, 2, torch.device("cpu")), torch.tensor([7])
    model(x[:, :7], cache)

    class Fixed:
        def append(self, layer, keys, values):
            stored = cache.keys[layer], cache.values[layer]
            for old, new in zip(stored, (keys, values), strict=True):
                old.index_copy_(2, at, new)
            return stored

    mask = (torch.arange(16) <= at).view(1, 1, 1, 16)
    hidden = model.blocks(model.embed(x[:, 7:], at), at, Fixed(), mask)
    torch.testing.assert_close(model.head(hidden), whole[:, 7:], rtol=1e-3, atol=2e-3)


def test_freezing_keeps_the_logits(variant):
    model, x = bit.BitLM(variant).eval(), ids(variant)
    before = model(x).detach()
    with model.hold_weights():
        torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model.freeze()(x), before, rtol=1e-5, atol=1e-5)


def test_names_are_hugging_faces(tiny_config):
    names = set(bit.BitLM(tiny_config).state_dict())
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.1.mlp.ffn_sub_norm.weight" in names
    assert "model.embed_tokens.weight" in names
    assert not any("lm_head" in name for name in names)


def test_too_many_tokens_are_refused(tiny_config):
    with pytest.raises(ValueError, match="max_position_embeddings=16"):
        bit.BitLM(tiny_config)(ids(tiny_config, length=17))


def test_same_seed_same_weights(tiny_config):
    a, b, c = (bit.BitLM(tiny_config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])


def test_an_untrained_model_guesses_uniformly(tiny_config):
    x = ids(tiny_config, batch=16, length=17)
    loss = bit.BitLM(tiny_config).loss(x[:, :-1], x[:, 1:]) / x[:, 1:].numel()
    assert abs(loss.item() - torch.tensor(300.0).log().item()) < 0.2


@pytest.fixture
def seed_checkpoint(tmp_path, seed_script):
    torch.manual_seed(3)
    model = seed_script.MiLLM(400, 64, 8, 128, 3, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "mi_llm_checkpoint.pth"
    contents = {"epoch": 0, "batch": 999, "model_state_dict": model.state_dict()}
    torch.save({**contents, "optimizer_state_dict": optimizer.state_dict()}, path)
    return model, path


def test_a_seed_checkpoint_gives_the_seeds_logits(seed_checkpoint):
    reference, path = seed_checkpoint
    model = bit.import_seed_checkpoint(path)
    x = torch.randint(400, (2, 32))
    assert (model(x) - reference(x)).abs().max() < 1e-4
    assert (model.freeze()(x) - reference(x)).abs().max() < 1e-4


def test_the_seed_preset_is_the_seeds_model(seed_script):
    reference = seed_script.MiLLM(30_000, 512, 8, 2048, 6, 512)
    counted = sum(p.numel() for p in reference.parameters())
    assert counted == bit.PRESETS["seed"][0].num_parameters


def test_a_foreign_file_is_an_error_and_never_executed(tmp_path):
    proof = tmp_path / "executed"
    for name, write in {
        "payload.pth": lambda p: torch.save({"model_state_dict": Payload(proof)}, p),
        "pickle.pth": lambda p: p.write_bytes(pickle.dumps(Payload(proof))),
        "text.pth": lambda p: p.write_text("hello"),
        "other.pth": lambda p: torch.save({"weights": {}}, p),
        "empty.pth": lambda p: p.touch(),
        "half.pth": lambda p: torch.save({"model_state_dict": {"a": torch.ones(2)}}, p),
    }.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match=r"not a checkpoint of the seed script"):
            bit.import_seed_checkpoint(tmp_path / name)
    assert not proof.exists()
    with pytest.raises(FileNotFoundError, match="no such file"):
        bit.import_seed_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [None, lambda dw, dy, x: dw.add_(dy.T @ x)])
def test_the_chunked_loss_is_the_whole_one(tiny_config, monkeypatch, tied, dtype, add):
    """Value and gradients, whatever the chunks; and no chunk has more rows than it may."""
    model = bit.BitLM(dataclasses.replace(tiny_config, tie_word_embeddings=tied), seed=3)
    x = torch.randint(tiny_config.vocab_size, (5, 17))
    inputs, targets = x[:, :-1], x[:, 1:]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters()]

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(inputs).flatten(0, 1).float()
        whole = gradients(F.cross_entropy(logits, targets.flatten(), reduction="sum"))
        shapes, log_total = [], bit.log_total
        noted = lambda logits: (shapes.append(tuple(logits.shape)), log_total(logits))[1]  # noqa: E731
        monkeypatch.setitem(bit.CHUNK_BYTES, "cpu", dtype.itemsize * tiny_config.vocab_size * 40)
        monkeypatch.setattr(bit, "CHUNK_COLUMNS", 200)
        softmax = (noted, bit.logits_gradient, add)
        chunked = gradients(model.loss(inputs, targets, softmax=softmax))
    widths = [
        min(200, tiny_config.vocab_size - start) for start in range(0, tiny_config.vocab_size, 200)
    ]
    assert shapes == [(rows, width) for rows in [32, 32, 16] for width in widths]
    assert len(widths) > 1
    close = 1e-5 if dtype == torch.float32 else 2e-2  # bfloat16 has 8 bits
    for a, b in zip(whole, chunked, strict=True):
        assert (a - b).abs().max() <= close * b.abs().max()


@pytest.mark.parametrize("ignored", [[], [0, 5, 6, 30], list(range(32))])
def test_ignored_targets_add_neither_loss_nor_gradient(tiny_config, monkeypatch, ignored):
    model = bit.BitLM(tiny_config, seed=3)
    x = torch.randint(tiny_config.vocab_size, (4, 17))
    inputs, targets = x[:, :-1], x[:, 1:].clone()
    targets.view(-1)[ignored] = -100
    logits = model(inputs).flatten(0, 1)
    whole = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    expected = torch.autograd.grad(whole, list(model.parameters()))
    monkeypatch.setitem(bit.CHUNK_BYTES, "cpu", 4 * tiny_config.vocab_size * 40)
    monkeypatch.setattr(bit, "CHUNK_COLUMNS", 200)
    loss = model.loss(inputs, targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, whole)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(model.loss(inputs, targets), whole)


@pytest.mark.parametrize("linear", ["ternary", "weight_only", "dense"])
def test_held_weights_learn_as_those_quantized_at_every_call(tiny_config, linear):
    model = bit.BitLM(dataclasses.replace(tiny_config, linear=linear), seed=3)
    x = torch.randint(tiny_config.vocab_size, (2, 9))

    def gradients():
        model.zero_grad()
        model.loss(x[:, :-1], x[:, 1:]).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    with model.hold_weights():
        held = gradients()
    assert all(torch.equal(a, b) for a, b in zip(expected, held, strict=True))
    assert all(a.abs().sum() > 0 for a in held)
