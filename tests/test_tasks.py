"""Multiple choice: the rows, their scores, and the shares of right answers."""

import dataclasses
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import torch

import bitllm
import bitllm_core as bit
from bitllm import tasks
from bitllm.cli import main
from tests import tiny
from tests.test_start_from_hub import with_hub

ROWS = [
    {"context": "1 cats sat", "choices": ["on 2 mats.", "on dogs"], "answer": 0},
    {"context": "Пять ", "choices": ["котов", "mats", "🐱🐱"], "answer": 2},
    {"context": "", "choices": ["4 cats", "cats 4 sat"], "answer": 1},
    {"context": "7 cats sat on 8 mats. " * 4, "choices": ["9", "10 cats on\n"], "answer": 0},
]
EXACT = bit.choose_device("cpu", "float32")


@pytest.fixture(scope="module")
def model():
    net = bit.BitLM(tiny.MODEL, seed=3).freeze()
    net.model.embed_tokens.weight.mul_(20)  # so that its choices are no near ties
    return net


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


FIRST = 7  # stands for the id of <|endoftext|>, which is 0 in this tokenizer


def plain(model, tokenizer, context, choice):
    """The log-likelihood of a choice, by itself and in float32."""
    before = tokenizer.encode(context.rstrip()).ids
    tokens = tokenizer.encode(f"{context} {choice}").ids[len(before) :]
    ids = ((before or [FIRST]) + tokens)[-17:]
    found = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(found[i - len(tokens), t].item() for i, t in enumerate(tokens))


def test_scores_are_those_of_a_plain_computation(model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "end_of_text_id", lambda tokenizer: FIRST)
    rows = tasks.read_tasks(write(tmp_path / "a.jsonl", ROWS))
    expected = [
        [pytest.approx(plain(model, tokenizer, r["context"], c), abs=1e-4) for c in r["choices"]]
        for r in ROWS
    ]
    assert tasks.score_choices(model, tokenizer, rows, EXACT) == expected
    warning = "2 of 9 choices with their context are longer than the model's 16 tokens"
    assert capsys.readouterr().err.count(warning) == 1
    monkeypatch.setattr(tasks, "BATCH_TOKENS", 1)
    monkeypatch.setitem(bit.CHUNK_BYTES, "cpu", 4 * 2 * 300)
    assert tasks.score_choices(model, tokenizer, rows, EXACT) == expected


def test_shares_of_right_answers_by_hand():
    def row(choices, subset):
        return tasks.Row("", choices, 1, subset, "")

    rows = [row(["a", "bb"], "x"), row(["aaa", "é"], "x"), row(["a", "b", "c", "d"], "y")]
    rows.append(row(["a", "cccc"], "y"))
    scores = [[-2.0, -3.0], [-3.0, -1.5], [-1.0, -1.0, -2.0, -3.0], [-2.0, -3.0]]
    found = tasks.summary(rows, scores)
    shares = [found[name] for name in ("rows", "acc", "acc_norm", "acc_bytes")]
    assert shares == [4, 1 / 4, 2 / 4, 3 / 4]  # of equal scores the first counts
    assert found["acc_stderr"] == pytest.approx((1 / 4 * 3 / 4 / 3) ** 0.5)
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
    assert tasks.summary(rows[:1], scores[:1])["acc_stderr"] is None


GOOD = {"context": "a", "choices": ["b", "c"], "answer": 1}
BAD = [
    ({"answer": 2}, "answer=2 is not 0 to 1"),
    ({"answer": -1}, "answer=-1"),
    ({"answer": "1"}, "answer='1'"),
    ({"answer": True}, "answer=True"),
    ({"choices": ["b"]}, "choices are not two texts or more"),
    ({"choices": "bc"}, "choices are not two texts or more"),
    ({"choices": ["b", " "]}, "an empty choice"),
    ({"context": None}, "context is no text"),
    ({"answer": ...}, r"no 'answer' among its columns \(context, choices\)"),
    ({"sentence_good": "a"}, "a column is missing"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_row_is_named(tmp_path, change, message):
    row = {k: v for k, v in {**GOOD, **change}.items() if v is not ...}
    path = write(tmp_path / "a.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 2: {message}"):
        tasks.read_tasks(path)


def test_what_cannot_be_scored_is_named(model, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{**GOOD, "choices": ["b", "7 cats sat on 8 mats. " * 4]}])
    with pytest.raises(ValueError, match=r"row 1: choice 1 has \d\d tokens; expected 1 to 16"):
        bitllm.evaluate_tasks(model, tokenizer, path)
    with pytest.raises(ValueError, match="no rows in it"):
        tasks.read_tasks(write(tmp_path / "a.jsonl", []))
    with pytest.raises(ValueError, match=r"expected a \.jsonl or \.parquet file"):
        tasks.read_tasks(write(tmp_path / "a.txt", [GOOD]))
    with pytest.raises(FileNotFoundError, match="one of blimp, hellaswag"):
        tasks.read_tasks("helaswag")
    broken = bit.BitLM(tiny.MODEL).freeze()
    broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="did it diverge"):
        bitllm.evaluate_tasks(broken, tokenizer, write(tmp_path / "a.jsonl", [GOOD]))


# HellaSwag, BLiMP and the hub


def preprocess(text):
    """As in lm-evaluation-harness, lm_eval/tasks/hellaswag/utils.py."""
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    text = text.replace("  ", " ")
    return text


def test_hellaswag_and_blimp_become_rows(tmp_path):
    swag = {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "[header] How to do it [title] Look.",
        "ctx_b": "she [step] starts",
        "endings": ["is using  wrap.", "[substeps] is ripping.", " is holding. ", "[title] is up."],
        "label": "3",
    }
    blimp = {"sentence_good": "Cats sit.", "sentence_bad": "Cats sits.", "UID": "agreement"}
    table = pyarrow.Table.from_pylist([swag])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", [blimp])
    found, pair = tasks.read_tasks(tmp_path)
    assert found.context == preprocess(
        f"{swag['activity_label']}: {swag['ctx_a']} {swag['ctx_b'].capitalize()}"
    )
    assert found.choices == [preprocess(ending) for ending in swag["endings"]]
    assert (found.answer, found.subset) == (3, "")
    assert (pair.context, pair.choices) == ("", ["Cats sit.", "Cats sits."])
    assert (pair.answer, pair.subset) == (0, "agreement")
    with pytest.raises(ValueError, match=r"row 1: answer='' is not 0 to 3"):
        tasks.read_tasks(write(tmp_path / "b.jsonl", [{**swag, "label": ""}]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_corpus):
    out = tmp_path_factory.mktemp("tasks") / "run"
    data = bit.DataConfig(data=str(tiny_corpus))
    bit.train(tiny.MODEL, data, dataclasses.replace(tiny.TRAIN, max_steps=1), out, callbacks=[])
    return out


def test_every_part_of_a_hub_set_is_scored(saved, tmp_path):
    served = tmp_path / "hub"
    parts = {"island": ("4 cats sat.", "mats 4"), "npi": ("on", "котов")}
    card = ["---", "configs:"]
    for name, (good, bad) in parts.items():
        table = pyarrow.Table.from_pylist([{"sentence_good": good, "sentence_bad": bad}] * 3)
        (served / name).mkdir(parents=True)
        pyarrow.parquet.write_table(table, served / name / "train.parquet")
        card += [f"- config_name: {name}", "  data_files:", "  - split: train"]
        card += [f"    path: {name}/train.parquet"]
    (served / "README.md").write_text("\n".join([*card, "---", ""]))
    flags = ["--model", saved, "--tasks", "hf:me/stories#train", "--dtype", "float32"]
    done, _ = with_hub(served, tmp_path / "home", "evaluate", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["chance"]) == (6, 0.5)
    assert {name: part["rows"] for name, part in found["subsets"].items()} == {
        "island": 3,
        "npi": 3,
    }
    rows = [tasks.Row("", pair, 0, "", "") for pair in parts.values()]
    net, tokenizer = bit.load_model(saved)
    for part, row in zip(found["subsets"].values(), rows, strict=True):
        good, bad = tasks.score_choices(net, tokenizer, [row], EXACT)[0]
        assert part["acc"] == (good > bad)


def test_known_names_lead_to_the_hub(monkeypatch):
    import datasets

    def load_dataset(name, config, *, split):
        row = {"sentence_good": "a", "sentence_bad": "b", "UID": config}
        return datasets.Dataset.from_list([row | {"place": f"{name} {split}"}])

    asked = {"blimp": ["nyu-mll/blimp"], "hellaswag": ["Rowan/hellaswag"]}
    for task, names in asked.items():
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: [name, "x"])
        rows = tasks.read_tasks(task)
        assert [row.subset for row in rows] == [*names, "x"]
        assert rows[1].place == f"{names[0]}:x, row 1"


def test_a_hub_out_of_reach_names_the_alternative():
    with pytest.raises(ConnectionError, match=r"tasks nyu-mll/blimp .*--tasks FILE\.jsonl"):
        tasks.read_tasks("blimp")


# The command line


def test_evaluate_prints_the_shares_of_runs_and_exports(saved, tmp_path, capsys, monkeypatch):
    row = {"context": "", "choices": ["é", "mats"], "answer": 1}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(GOOD), "latin-1")
    packed = bitllm.export_packed(saved, tmp_path / "m.safetensors", embedding="float32")
    score, dtypes, found = tasks.score_choices, [], []

    def noting(*arguments):
        dtypes.append(arguments[-1].dtype)
        return score(*arguments)

    monkeypatch.setattr(tasks, "score_choices", noting)
    for model in (saved, packed.path):
        flags = ["--model", str(model), "--tasks", str(path)]
        assert main(["evaluate", *flags, "--dtype", "bfloat16", "--encoding", "latin-1"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert dtypes == [torch.bfloat16] * 2
    assert found[0] == found[1]
    keys = {f"{name}{end}" for name in ("acc", "acc_norm", "acc_bytes") for end in ("", "_stderr")}
    assert found[0].keys() == keys | {"rows", "chance"}
    assert found[0]["rows"] == 2


@pytest.mark.parametrize("flags", [[], ["--data", "a.txt", "--tasks", "b.jsonl"]])
def test_evaluate_needs_a_text_or_tasks(flags, capsys):
    assert main(["evaluate", "--model", "run", *flags]) == 2
    assert "either --data TEXT or --tasks FILE" in capsys.readouterr().err
