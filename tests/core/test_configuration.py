import dataclasses
import math
import re

import numpy as np
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


@pytest.mark.parametrize(
    ("value", "taken"),
    [(4.0, 4), (np.int64(4), 4), (np.float32(4), 4), (True, None), (4.5, None), ("4", None)],
)
def test_numbers_of_other_types_are_taken_over_or_refused_by_name(value, taken):
    """A float for a number of steps was trained with, and then could not be resumed."""
    if taken is None:
        with pytest.raises(ValueError, match=rf"max_steps={re.escape(repr(value))}: expected int"):
            bit.TrainConfig(max_steps=value)
    else:
        found = bit.TrainConfig(max_steps=value).max_steps
        assert (type(found), found) == (int, taken)


def test_paths_and_flags_are_taken_over_and_nonsense_refused(tmp_path):
    assert bit.DataConfig(tmp_path / "a.txt").data == str(tmp_path / "a.txt")
    assert bit.TrainConfig(save_every_epoch=np.bool_(True)).save_every_epoch is True
    assert type(bit.TrainConfig(save_every_minutes=5).save_every_minutes) is float
    for field, value in (("save_every_epoch", 1), ("device", None), ("learning_rate", math.nan)):
        with pytest.raises(ValueError, match=field):
            bit.TrainConfig(**{field: value})
    with pytest.raises(ValueError, match="weight_decay=inf: expected a finite number"):
        bit.TrainConfig(weight_decay=math.inf)


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
    assert 5 <= size["laptop"] <= 15
    assert 20 <= size["t4-1h"] <= 35
    assert 33 <= size["t4-3h"] <= 60
    assert round(size["seed"], 2) == 49.87
