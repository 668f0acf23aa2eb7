"""float16 training uses only what a T4 has; and the guard that checks it refuses the rest."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bitllm_core as bit
from tests import tiny

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from t4_guard import NotOnT4, T4Guard, as_on_t4


def train(tiny_corpus, folder, **changes):
    settings = {"max_steps": 2, "dtype": "float16", "eval_every_steps": 1, **changes}
    training = bit.dataclasses.replace(tiny.TRAIN, **settings)
    data = bit.DataConfig(data=str(tiny_corpus))
    return bit.train(tiny.MODEL, data, training, folder, callbacks=[])


def test_a_float16_run_has_only_what_a_t4_has(tiny_corpus, tmp_path):
    guard = T4Guard()
    with as_on_t4(), guard:
        state = train(tiny_corpus, tmp_path / "run")
    assert state.step == 2
    assert state.skipped == 0
    assert guard.seen["mm"] > 0  # matrix products were seen, so the guard saw the training


def test_a_bfloat16_run_is_refused(tiny_corpus, tmp_path):
    with as_on_t4(), T4Guard(), pytest.raises(NotOnT4, match="bfloat16"):
        train(tiny_corpus, tmp_path / "run", dtype="bfloat16")


def test_the_optimizer_of_newer_hardware_is_refused(tiny_corpus, tmp_path, monkeypatch):
    """A Muon iteration in bfloat16 once ran emulated on hardware that lacks it."""
    monkeypatch.setattr(bit, "has_bfloat16", lambda device: True)
    with T4Guard(), pytest.raises(NotOnT4, match="bfloat16"):
        train(tiny_corpus, tmp_path / "run")


@pytest.mark.parametrize("name", ["_scaled_dot_product_flash_attention", "_scaled_mm"])
def test_an_operator_of_newer_hardware_is_refused(name):
    """A stand-in of the name, since a CPU does not have the operator itself."""

    @torch.library.custom_op(f"t4_test::{name}", mutates_args=())
    def stand_in(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    assert stand_in(torch.ones(1)) == 1
    with T4Guard(), pytest.raises(NotOnT4, match=r"8\.0"):
        stand_in(torch.ones(1))


def test_triton_matrix_products_are_refused(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.max_autotune", True)
    with pytest.raises(NotOnT4, match="Triton"):
        T4Guard().__enter__()


def test_float16_attention_passes():
    q = torch.randn(1, 2, 8, 16, dtype=torch.float16)
    with T4Guard() as guard:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert guard.seen
