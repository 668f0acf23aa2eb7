import dataclasses

import pytest
import torch

import bitllm_core as bit


@pytest.fixture
def model(tiny_config):
    return bit.BitLM(tiny_config, seed=1).freeze()


GREEDY = bit.SamplingConfig(max_new_tokens=10, temperature=0)


def tokens_of(model, prompts, sampling):
    columns = list(bit.generate_tokens(model, prompts, sampling))
    return [list(row) for row in zip(*columns, strict=True)]


def uncached(model, prompt, count):
    """What the docstring promises, the slow way."""
    row, limit = list(prompt), model.config.max_position_embeddings
    start = max(0, len(row) - limit)
    for _ in range(count):
        if len(row) - start > limit:
            start = len(row) - limit // 2
        row.append(int(model(torch.tensor([row[start:]]))[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("length", [1, 6, 15, 16, 17, 40])
def test_cached_generation_equals_the_full_forward_also_past_the_context(model, length):
    prompt = [(7 * i) % 300 for i in range(length)]
    sampling = dataclasses.replace(GREEDY, max_new_tokens=40)
    assert tokens_of(model, [prompt], sampling)[0] == uncached(model, prompt, 40)


def test_a_batch_writes_what_each_prompt_alone_would(model):
    prompts = [[5], [9, 8, 7, 6, 5, 4], [1, 2, 3]]
    together = tokens_of(model, prompts, GREEDY)
    assert together == [tokens_of(model, [p], GREEDY)[0] for p in prompts]


def test_same_seed_same_text(model, tokenizer):
    def write(seed):
        sampling = bit.SamplingConfig(max_new_tokens=30, temperature=1.5, seed=seed)
        return bit.generate(model, tokenizer, "1 cats", sampling)

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_streamed_pieces_join_to_the_whole(model, tokenizer):
    sampling = bit.SamplingConfig(max_new_tokens=40, temperature=1.0, seed=3)
    whole = bit.generate(model, tokenizer, "Пять", sampling)
    assert whole == "".join(bit.stream(model, tokenizer, "Пять", sampling))
    assert bit.generate(model, tokenizer, ["Пять"], sampling) == [whole]


def test_empty_prompts_and_no_tokens(model, tokenizer):
    assert isinstance(bit.generate(model, tokenizer, "", GREEDY), str)
    none = bit.SamplingConfig(max_new_tokens=0)
    assert bit.generate(model, tokenizer, "a", none) == ""
    assert bit.generate(model, tokenizer, [], GREEDY) == []
    assert bit.generate(model, tokenizer, ["a", "b"], none) == ["", ""]


def test_it_stops_where_a_document_ends(model):
    first = tokens_of(model, [[5]], GREEDY)[0]
    written = list(bit.generate_tokens(model, [[5]], GREEDY, end_id=first[3]))
    stop = first.index(first[3])
    assert written == [[t] for t in first[:stop]] + [[None]]


def choose(logits, seen=((0,),), **options):
    config = bit.SamplingConfig(**{"top_k": 0, "temperature": 1.0, **options})
    counts = torch.zeros(len(logits))
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        token = bit._choose(torch.tensor([logits]), torch.tensor(seen), config, generator)
        counts[token] += 1
    return counts / 400


def test_top_k_top_p_and_temperature():
    logits = [2.0, 1.0, 0.0, -1.0]  # probabilities .644 .237 .087 .032
    assert (choose(logits) > 0).sum() >= 3
    assert (choose(logits, top_k=2) > 0).tolist() == [True, True, False, False]
    assert (choose(logits, top_p=0.6) > 0).tolist() == [True, False, False, False]
    assert (choose(logits, top_p=0.7) > 0).tolist() == [True, True, False, False]
    assert choose(logits, temperature=0)[0] == 1
    assert choose(logits, temperature=0.3)[0] > choose(logits, temperature=3.0)[0] + 0.3


def test_repetition_penalty_lowers_what_is_there():
    logits = [2.0, 1.9, -1.0]
    assert choose(logits, seen=[[0]], temperature=0, repetition_penalty=1.5)[1] == 1
    penalised = choose([-1.0, -1.2, -9.0], seen=[[0]], temperature=0, repetition_penalty=1.5)
    assert penalised[1] == 1


def test_generating_leaves_training_alone(tiny_config, tokenizer):
    model = bit.BitLM(tiny_config).train()
    state = torch.get_rng_state()
    bit.generate(model, tokenizer, "a", bit.SamplingConfig(max_new_tokens=3, seed=0))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.held is None for layer in model.bit_linears().values())


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1), ("top_p", 0), ("top_k", -1), ("max_new_tokens", -2)]
)
def test_wrong_sampling_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        bit.SamplingConfig(**{field: value})
