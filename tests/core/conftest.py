"""A tiny run."""

import dataclasses

import pytest

import bitllm_core as bit


@pytest.fixture
def run(tiny_config, tiny_train, tiny_corpus):
    def train(out, *, resume="auto", callbacks=(), model=None, **changes):
        return bit.train(
            model or tiny_config,
            bit.DataConfig(data=str(tiny_corpus)),
            dataclasses.replace(tiny_train, **changes),
            out,
            resume=resume,
            callbacks=callbacks,
        )

    return train
