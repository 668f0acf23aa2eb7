"""The experiment tool: rows that exist are not run again, and every patch changes the outcome."""

import dataclasses
import inspect
import json
import re

import pytest

import bitllm_core as bit
from tests.conftest import ROOT
from tools import experiment_runs, experiments
from tools.experiment_figures import add_row, read_rows, report
from tools.experiment_patches import PATCHES
from tools.experiment_tables import SEED_SCRIPT, TABLES, Table, Variant

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "batch_tokens": 64,
    "warmup_steps": 1,
    "weight_decay": 0.1,  # so that a patch of it shows
    "compile": "off",
    "dtype": "float32",
}
PLAIN = Variant("plain")
TABLE = Table("a test", TINY, [PLAIN], tokens=512, valid_bytes=2000)


def run_in(work, corpus, table=TABLE, variant=PLAIN, seed=0, clock=None):
    run = experiment_runs.Run(table, variant, seed, corpus, corpus, work)
    return experiment_runs.run_one(run, clock or experiment_runs.Clock(), work / "runs" / "one")


@pytest.fixture
def run(tiny_corpus, tmp_path):
    return lambda *args, **kwargs: run_in(tmp_path, tiny_corpus, *args, **kwargs)


@pytest.fixture(scope="module")
def plain_loss(tiny_corpus, tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("plain"), tiny_corpus)["loss"]


def test_a_row_holds_what_evaluate_returns(run, tiny_corpus, tmp_path):
    row = run()
    assert row["steps"] == 8
    assert row["trained_tokens"] == 512
    assert [point[0] for point in row["curve"]] == [128, 256, 384, 512]
    words = (tmp_path / f"{tiny_corpus.stem}-2000.txt").read_text("utf-8")
    assert row["words"] == len(words.split()) + words.count("\n")
    assert row["device"] == str(bit.choose_device())
    assert row == {**run(), **{k: row[k] for k in ("curve", "seconds", "train_seconds")}}
    assert run(seed=1)["loss"] != row["loss"]


def test_every_patch_changes_the_outcome_and_leaves_nothing_behind(run, plain_loss):
    parameters = inspect.signature(bit.BitLM.loss).parameters
    for name in PATCHES:
        with PATCHES[name]():  # compiled training passes all of them
            inspect.signature(bit.BitLM.loss).bind(*parameters)
        assert run(variant=Variant(name, {}, name))["loss"] != plain_loss, name
    assert run()["loss"] == plain_loss


def without_times(row):
    curve = [[tokens, loss] for tokens, _, loss in row["curve"]]
    return {**row, "curve": curve, "seconds": 0, "train_seconds": 0}


@pytest.mark.parametrize(("variant", "steps"), [(PLAIN, 8), (Variant("patch", {}, "NorMuon"), 13)])
def test_a_row_that_was_stopped_resumes_if_it_has_no_patch(run, monkeypatch, variant, steps):
    whole, done = run(variant=variant), []

    class Stopping(experiment_runs.Recorder):
        def on_step(self, state, metrics):
            super().on_step(state, metrics)
            done.append(self.trained_at)
            state.stop_signal = 2 * (len(done) == 5)

    monkeypatch.setattr(experiment_runs, "Recorder", Stopping)
    with pytest.raises(SystemExit, match="stopped after 5 steps; the same command resumes"):
        run(variant=variant)
    assert without_times(run(variant=variant)) == without_times(whole)
    assert len(done) == steps


def test_a_row_that_resumes_adds_its_time_to_the_time_before(tiny_corpus, tmp_path):
    row = run_in(tmp_path, tiny_corpus)
    record = tmp_path / "runs" / "one" / "recorded.json"
    recorder = experiment_runs.Recorder(record.parent, experiment_runs.Clock("cpu"))
    before = recorder.seconds()
    recorder.curve += row["curve"]
    record.parent.mkdir()
    recorder.on_checkpoint(None, record)
    again = experiment_runs.Recorder(record.parent, experiment_runs.Clock("cpu"))
    assert again.curve == row["curve"]
    assert again.seconds() >= 2 * before > 0


def test_a_clock_ends_a_run_and_cools_it_down(run, monkeypatch):
    clocked = dataclasses.replace(TABLE, tokens=0, minutes=1)
    rates, factor = [], bit.learning_rate_factor

    class Clock:
        """Each step takes 0.7 seconds, and nothing else takes any."""

        kind = "wall"

        def seconds(self):
            return 0.7 * len(rates)

    class Watching(experiment_runs.Recorder):
        def on_step(self, state, metrics):
            group = state.optimizers[0].param_groups[0]
            rates.append(group["lr"] / group["initial_lr"])
            super().on_step(state, metrics)

    monkeypatch.setattr(experiment_runs, "Recorder", Watching)
    row = run(clocked, clock=Clock())
    assert row["steps"] == len(rates) == 86  # the first to reach a minute
    assert row["seconds"] == 60.2
    assert len(row["curve"]) == 10
    assert max(rates) == pytest.approx(1)
    assert rates[-1] < 0.15
    assert bit.learning_rate_factor is factor


def test_the_documentation_of_python_is_split_by_topics(run, plain_loss, tmp_path):
    assert run(dataclasses.replace(TABLE, pydocs=True))["loss"] != plain_loss
    texts = [(tmp_path / f"pydocs-{part}.txt").read_text("utf-8") for part in ("train", "valid")]
    topics = [text for text, _ in bit.read_pieces("pydocs", "train", bit.DataConfig())]
    assert sum(map(len, texts)) == sum(map(len, topics))
    assert texts[1].startswith(topics[0])
    assert topics[0] not in texts[0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_list_resumes_where_it_was_stopped(tiny_corpus, tmp_path, monkeypatch, jobs):
    results, done = tmp_path / "results.jsonl", []

    def process(command, **options):
        if "one" not in command:  # git
            return subprocess_run(command, **options)
        flag = {name: command[command.index(name) + 1] for name in ("--variant", "--seed")}
        done.append((flag["--variant"], flag["--seed"]))
        # what rows share is made before any row starts
        assert list((tmp_path / "tokens").glob("*/data/manifest.json"))
        assert {path.stem.split("-")[-1] for path in tmp_path.glob("*-*.txt")} == {"2000", "30000"}
        row = dict.fromkeys(
            ("loss", "bits_per_byte", "word_perplexity", "seconds", "steps", "trained_tokens"), 2.0
        )
        row |= {"parameters": 1_000_000, "curve": [[64, 1.0, 5.0], [128, 2.0, 4.0]]}
        stdout = f"noise\n{json.dumps(row)}\n"
        return experiments.subprocess.CompletedProcess(command, 0, stdout)

    subprocess_run = experiments.subprocess.run
    monkeypatch.setattr(experiments.subprocess, "run", process)
    two = dataclasses.replace(TABLE, variants=[PLAIN, Variant("other")], seeds=2)
    monkeypatch.setitem(TABLES, "two", two)
    arguments = ["--work", str(tmp_path), "--train", str(tiny_corpus), "--valid", str(tiny_corpus)]
    arguments += ["--jobs", str(jobs)]
    assert experiments.main(["run", "two", *arguments]) == 0
    expected = [("plain", "0"), ("other", "0"), ("plain", "1"), ("other", "1")]
    assert (done if jobs == 1 else sorted(done)) == (expected if jobs == 1 else sorted(expected))
    rows = read_rows(results, "two")
    assert all(row["commit"] for row in rows)
    kept = [row for row in rows if (row["variant"], row["seed"]) != ("plain", 1)]
    results.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    experiments.main(["run", "two", *arguments])
    assert done[4:] == [("plain", "1")]
    rows = read_rows(results, "two")
    assert "| other | 2 | 1.00M | 2 | 2 | 2.000 ± 0.000 |" in report("two", rows)
    experiments.main(["draw", "two", "--out", str(tmp_path / "a.png"), *arguments])
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_failed_row_is_reported_and_not_kept(tiny_corpus, tmp_path, monkeypatch, capsys):
    unknown = dataclasses.replace(TABLE, variants=[Variant("broken")])
    monkeypatch.setitem(TABLES, "two", unknown)  # but not in the row's own process
    arguments = ["--work", str(tmp_path), "--train", str(tiny_corpus), "--valid", str(tiny_corpus)]
    assert experiments.main(["run", "two", *arguments]) == 1
    assert "broken, seed 0: exit 2" in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "table='nothing': expected one of rates, "),
        (["run", "gap", "--train", "no.txt"], "train='no.txt': expected a text file"),
        (["costs", "--valid", "no.txt"], "valid='no.txt': expected a text file"),
        (["run", "pydocs", "--only", "dens!"], "only='dens!': expected a part of one of: defaults"),
        (["run", "pydocs", "--jobs", "0"], "jobs=0: expected at least 1"),
        (["run", "pydocs", "--seeds", "0"], "seeds=0: expected at least 1"),
        (["report", "gap"], "expected rows of gap; run gap first"),
        (["draw"], "expected one of rates, "),
        (["draw", "gap", "--out", "no/gap.png"], "gap.png': expected a file in an existing folder"),
        (["draw", "gap", "--variants", "none"], "variants={'none'}: expected some of: ternary; "),
    ],
)
def test_wrong_flags_end_it_before_any_work(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        experiments.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_row_that_was_cut_short_is_run_again(tmp_path):
    path, row = tmp_path / "results.jsonl", {"table": "gap", "variant": "dense", "seed": 0}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "seed": 1})[:-3], "utf-8")
    assert read_rows(path, "gap") == [row]
    add_row(path, {**row, "seed": 2})
    assert [row["seed"] for row in read_rows(path, "gap")] == [0, 2]


@pytest.mark.parametrize(
    ("name", "page", "number"),
    [("ten-minutes", "results.md", 10), ("gap-14M", "results.md", 4), ("recipe", "recipe.md", 12)],
)
def test_the_pages_of_results_show_rows_of_the_reports(name, page, number):
    lines = report(name, read_rows(ROOT / "docs" / "results.jsonl", name)).splitlines()
    text = (ROOT / "docs" / page).read_text("utf-8")
    table = next(t for t in text.split("\n\n") if t.startswith(lines[0]) and lines[2] in t)
    shown = table.splitlines()
    assert len(shown) >= number
    assert set(shown) <= set(lines)


@pytest.mark.parametrize("name", TABLES)
def test_the_page_of_the_recipe_names_every_list_that_has_rows(name):
    assert read_rows(ROOT / "docs" / "results.jsonl", name)
    pages = [(ROOT / "docs" / page).read_text("utf-8") for page in ("results.md", "recipe.md")]
    assert re.search(rf"`(run |report )?{name}\b", "".join(pages))


def test_a_figure_has_only_the_variants_asked_for(tmp_path):
    rows = ["--results", str(ROOT / "docs" / "results.jsonl")]
    few, all_of_them = tmp_path / "few.png", tmp_path / "all.png"
    assert experiments.main(["draw", "gap", *rows, "--out", str(all_of_them)]) == 0
    assert experiments.main(["draw", "gap", *rows, "--out", str(few), "--variants", "dense"]) == 0
    assert few.stat().st_size < all_of_them.stat().st_size


@pytest.mark.parametrize("name", TABLES)
def test_every_variant_is_a_possible_configuration(name):
    table = TABLES[name]
    assert len({variant.name for variant in table.variants}) == len(table.variants)
    for variant in table.variants:
        parts = experiment_runs.split_fields({**table.base, **variant.changes})
        kinds = (bit.ModelConfig, bit.DataConfig, bit.TrainConfig)
        model, _, train = (kind(**part) for kind, part in zip(kinds, parts, strict=True))
        bit.check_configs(model, train)


def test_every_patch_has_a_variant_and_every_variant_its_patch():
    named = {variant.patch for table in TABLES.values() for variant in table.variants}
    assert named == {"", SEED_SCRIPT, *PATCHES}
