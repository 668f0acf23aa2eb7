"""Text that comes in while training runs: nothing lost or doubled, whatever the network does."""

import dataclasses
import hashlib
import json
import os
import random
import sys
import threading
import time

import numpy as np
import pytest

import bitllm_core as bit
from bitllm import streaming
from tests import warm
from tests.conftest import ROOT, assert_same_bits, state_of, without_times
from tests.core.test_training import DieAt, StopAt
from tests.hub import Hub

BUDGET = 20_000


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A folder of three parquet files with some 60,000 tokens."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("stories")
    for k in range(3):
        texts = [f"{k} of {i}: " + f"cats sat on {i % 7} mats. " * (i % 5 + 1) for i in range(2000)]
        path = folder / f"train-{k:05d}-of-00003.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    return folder


def streamed(source, out, budget=BUDGET):
    config = bit.DataConfig(data=str(source), max_train_tokens=budget)
    return bit.prepare_data(config, 300, 16, out)


def wait(data, tokenizer, until=lambda data: data.ended, seconds=60):
    with data.coming(tokenizer):
        end = time.monotonic() + seconds
        while not until(data) and not data.error and time.monotonic() < end:
            time.sleep(0.01)
            data.refresh()
    return data


def bytes_of(out):
    return (out / "data" / "train.bin").read_bytes()


@pytest.fixture(scope="module")
def whole(stories, tmp_path_factory):
    """The stream brought in without a break, and its tokenizer."""
    out = tmp_path_factory.mktemp("whole")
    data, tokenizer = streamed(stories, out)
    return wait(data, tokenizer), tokenizer, out


def test_the_tokens_are_the_texts_in_their_order_up_to_the_budget(whole, stories):
    data, tokenizer, _ = whole
    assert len(data.training) == BUDGET
    eot = bit.end_of_text_id(tokenizer)
    ids = []
    for text, _ in bit.read_pieces(str(stories)):
        ids += [*bit.encode(tokenizer, text), eot]
    held = data.validation.tolist()
    assert held == ids[: len(held)]
    assert data.training.tolist() == ids[len(held) : len(held) + BUDGET]
    parts = bit.read_json(data.folder / "progress.json")["parts"]
    assert len(parts) > 8  # that training does not wait for all


def test_broken_off_anywhere_it_goes_on_exactly(whole, stories, tmp_path):
    data, tokenizer = streamed(stories, tmp_path)
    for count in (1, 9_000, 15_000):
        wait(data, tokenizer, lambda data, count=count: len(data.training) >= count)
        with (tmp_path / "data" / "train.bin").open("ab") as file:
            file.write(b"what a kill may leave")
        data, tokenizer = streamed(stories, tmp_path)
        assert not data.ended
    wait(data, tokenizer)
    assert data.training.tolist() == whole[0].training.tolist()


def test_a_stream_of_an_earlier_version_is_read_again_to_the_same_tokens(whole, stories, tmp_path):
    data, tokenizer = streamed(stories, tmp_path)
    wait(data, tokenizer, lambda data: len(data.training) > 5000)
    path = tmp_path / "data" / "progress.json"
    progress = bit.read_json(path)
    for part in progress["parts"]:
        part["state"] |= {"column": "text", "rows": {"examples_iterable": {"shard_idx": 0}}}
    path.write_text(json.dumps(progress))
    again, tokenizer = streamed(stories, tmp_path)
    assert again.manifest["train"]["sha256"] == data.manifest["train"]["sha256"]
    assert len(again.training) == 0
    assert wait(again, tokenizer).training.tolist() == whole[0].training.tolist()


class FailsOnce:
    """A tokenizer of which one row of one batch cannot be had at first."""

    def __init__(self, tokenizer):
        self.tokenizer, self.batches = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode_batch_fast(self, texts, **options):
        encoded = self.tokenizer.encode_batch_fast(texts, **options)
        self.batches += 1
        if self.batches == 5:
            encoded[len(encoded) // 2] = None
        return encoded


def test_what_fails_amid_some_rows_doubles_none_of_them(whole, stories, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "RETRY_S", (0.01, 0.05, 3))
    data, tokenizer = streamed(stories, tmp_path)
    failing = FailsOnce(tokenizer)
    assert len(wait(data, failing).training) == BUDGET
    assert failing.batches > 5
    assert bytes_of(tmp_path) == bytes_of(whole[2])


def test_damage_is_noticed_and_read_again(whole, stories, tmp_path, caplog):
    data, tokenizer = streamed(stories, tmp_path)
    wait(data, tokenizer)
    damaged = bytearray(bytes_of(tmp_path))
    damaged[BUDGET] ^= 1
    del data
    (tmp_path / "data" / "train.bin").write_bytes(damaged)
    data, tokenizer = streamed(stories, tmp_path)
    assert "damaged after token" in caplog.text
    data.refresh()
    wait(data, tokenizer)
    assert data.training.tolist() == whole[0].training.tolist()


def test_a_batch_is_the_same_whenever_its_tokens_came(whole, stories, tmp_path):
    config = bit.TrainConfig(batch_tokens=64)
    data, tokenizer = streamed(stories, tmp_path)
    seen = {}

    def look(data):
        step = len(seen)
        if data.ready(config, 16, step):
            seen[step] = data.batch(config, 16, step)
        return data.ended

    wait(data, tokenizer, look)
    assert 0 < len(seen) < BUDGET // 64
    for step, batch in seen.items():
        assert np.array_equal(batch, whole[0].batch(config, 16, step))


def test_every_window_comes_once_an_epoch_and_epochs_differ(whole):
    config = bit.TrainConfig(batch_tokens=160)  # 1,250 windows: 125 steps
    stream, epochs = whole[0], []
    for epoch in range(2):
        steps = range(epoch * 125, (epoch + 1) * 125)
        epochs.append(np.concatenate([stream.batch(config, 16, s)[:, :-1] for s in steps]))
    for windows in epochs:
        assert sorted(map(bytes, windows)) == sorted(
            map(bytes, stream.training.astype(np.int64).reshape(-1, 16))
        )
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0].ravel(), stream.training)


def test_a_source_that_ends_before_the_budget(stories, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"held out for validation.*leave max_train_tokens out"):
        streamed(stories, tmp_path, budget=10**7)
    monkeypatch.setattr(streaming, "VALIDATION_CHARS", 10_000)
    data, tokenizer = streamed(stories, tmp_path, budget=10**7)
    assert not data.ready(bit.TrainConfig(), 16, 10**6)
    wait(data, tokenizer)
    assert data.ended
    assert 30_000 < len(data.training) < 10**6
    assert data.ready(bit.TrainConfig(), 16, 10**6)
    assert data.batch(bit.TrainConfig(batch_tokens=64), 16, 10**6).shape == (4, 17)


def test_training_stops_dies_and_goes_on_bit_for_bit(tiny_config, tiny_train, stories, tmp_path):
    def run(out, *callbacks):
        data = bit.DataConfig(data=str(stories), max_train_tokens=BUDGET)
        return bit.train(tiny_config, data, tiny_train, out, callbacks=callbacks)

    run(tmp_path / "whole")
    run(tmp_path / "parts", StopAt(3))
    with pytest.raises(RuntimeError, match="machine"):
        run(tmp_path / "parts", DieAt(8))
    for name in ("train.bin", "progress.json"):  # as on a machine that has the checkpoint alone
        (tmp_path / "parts" / "data" / name).unlink()
    run(tmp_path / "parts")
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


def test_a_mirror_does_not_wait_for_the_stream(tiny_config, tiny_train, stories, tmp_path):
    data = bit.DataConfig(data=str(stories), max_train_tokens=BUDGET)

    def run(out, *callbacks):
        mirror = tmp_path / "mirror"
        return bit.train(tiny_config, data, tiny_train, out, mirror=mirror, callbacks=callbacks)

    run(tmp_path / "one", StopAt(5))
    assert run(tmp_path / "another machine").step == 12
    bit.train(tiny_config, data, tiny_train, tmp_path / "whole", callbacks=())
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "another machine"))


def test_a_stream_that_stays_broken_saves_and_says_so(
    tiny_config, tiny_train, stories, tmp_path, monkeypatch
):
    plain = streaming.stream_pieces

    def broken(config, state=None):
        for number, item in enumerate(plain(config, state)):
            if number == 4 and threading.current_thread().name == "stream":
                raise OSError("the network is gone")
            yield item

    monkeypatch.setattr(streaming, "stream_pieces", broken)
    monkeypatch.setattr(streaming, "RETRY_S", (0.01, 0.01, 0))
    data = bit.DataConfig(data=str(stories), max_train_tokens=BUDGET)
    config = dataclasses.replace(tiny_train, max_steps=300, save_every_steps=0, eval_every_steps=0)
    with pytest.raises(ConnectionError, match=r"network is gone.*last step is saved"):
        bit.train(tiny_config, data, config, tmp_path / "run", callbacks=())
    assert 0 < bit.newest_checkpoint(tmp_path / "run" / "checkpoints")["step"] < 300


HUB_SCRIPT = """
import json, sys, time
import bitllm_core as bit
from bitllm import machine, streaming
from tests.test_streaming import streamed, wait
streaming.RETRY_S = (0.1, 1.0, 20)
budget, start, told = int(sys.argv[2]), time.monotonic(), []
device = bit.choose_device("cpu", "float32")

def look(data):
    if len(data.training) >= budget * (len(told) + 1) // 4:
        told.append((time.monotonic() - start, machine.memory_in_use(device.device)))
    return data.ended

data, tokenizer = streamed("hf:me/stories", sys.argv[1], budget)
began = time.monotonic() - start
wait(data, tokenizer, look, seconds=1000)
result = {"tokens": len(data.training), "error": str(data.error or "")}
print(json.dumps({**result, "began": began, "told": told}))
"""


def from_hub(hub, out, budget=BUDGET):
    variables = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(out / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",  # less than a stall
        "HF_HUB_ETAG_TIMEOUT": "2",
        "PYTHONPATH": str(ROOT),
    }
    result = warm.run(
        [sys.executable, "-c", HUB_SCRIPT, str(out / "run"), str(budget)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("failing", [0.0, 0.3])
def test_the_hub_itself_with_faults_on_the_way(stories, whole, tmp_path, failing):
    with Hub(stories, failing, seed=3).running() as hub:
        result = from_hub(hub, tmp_path)
    assert (result["tokens"], result["error"]) == (BUDGET, "")
    there, here = (hashlib.sha256(bytes_of(out)) for out in (tmp_path / "run", whole[2]))
    assert there.hexdigest() == here.hexdigest()
    files = [r for r in hub.requests if ".parquet" in r]
    assert files
    assert not [r for r in files if "train-00002" in r]  # the budget does not need it
    assert bool(hub.faults) == bool(failing)


@pytest.mark.slow
def test_ten_million_tokens_with_one_request_in_twenty_failing(tmp_path):
    import pyarrow
    import pyarrow.parquet

    chance, folder = random.Random(0), tmp_path / "stories"
    folder.mkdir()
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 9))) for _ in range(2000)]
    for k in range(40):
        texts = [" ".join(chance.choices(words, k=200)) for _ in range(900)]
        path = folder / f"train-{k:05d}-of-00040.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    budget, answers, digests = 10_000_000, [], set()
    for failing in (0.0, 0.05):
        out = tmp_path / str(failing)
        with Hub(folder, failing).running() as hub:
            answers.append(from_hub(hub, out, budget))
        print(failing, answers[-1], len(hub.requests), hub.faults)
        digests.add(hashlib.sha256(bytes_of(out / "run")).hexdigest())
    assert len(digests) == 1
    for answer in answers:
        assert (answer["tokens"], answer["error"]) == (budget, "")
        memory = [held for _, held in answer["told"]]
        assert memory[-1] - memory[0] < 64 << 20  # 10 million tokens are 20 MB, their text 60
