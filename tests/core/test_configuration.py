import dataclasses

import pytest

import bitllm_core as bit


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_attention_heads", 5, "divisor of hidden_size"),
        ("num_key_value_heads", 3, "divisor of num_attention_heads"),
        ("vocab_size", 256, "at least 257"),
        ("max_position_embeddings", 1, "at least 2"),
        ("hidden_size", 0, "at least 1"),
        ("linear", "binary", "one of ternary"),
        ("block", "llama", "one of bitnet, seed"),
    ],
)
def test_wrong_model_sizes_name_field_value_and_remedy(tiny_config, field, value, says):
    with pytest.raises(ValueError, match=says) as error:
        dataclasses.replace(tiny_config, **{field: value})
    assert field in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0),
        ("learning_rate", -1.0),
        ("dtype", "int8"),
        ("schedule", "step"),
        ("cooldown_fraction", 1.5),
        ("save_every_minutes", -1),
    ],
)
def test_wrong_training_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        bit.TrainConfig(**{field: value})


def test_batch_and_context_must_fit():
    with pytest.raises(ValueError, match=r"batch_tokens=1000.*896 or 1024"):
        bit.check_configs(bit.ModelConfig(), bit.TrainConfig(batch_tokens=1000))
    with pytest.raises(ValueError, match=r"micro_batch_size=3.*divisor of the 32 windows"):
        bit.check_configs(bit.ModelConfig(), bit.TrainConfig(micro_batch_size=3))


@pytest.mark.parametrize("name", bit.PRESETS)
def test_presets_fit_and_count_their_parameters(name):
    model, _, train = bit.PRESETS[name]
    bit.check_configs(model, train)
    built = bit.BitLM(model, seed=None)
    assert sum(p.numel() for p in built.parameters()) == model.num_parameters


def test_preset_sizes_are_the_promised_ones():
    size = {name: model.num_parameters / 1e6 for name, (model, _, _) in bit.PRESETS.items()}
    assert size["ci"] < 0.5
    assert 2 <= size["demo"] <= 5
    assert 10 <= size["laptop"] <= 20
    assert 20 <= size["t4-1h"] <= 35
    assert 33 <= size["t4-3h"] <= 60
    assert round(size["seed"], 2) == 49.87
