"""What is read from run folders on disk."""

import json

from bitllm.notebook.runs import (
    expected_steps,
    furthest_run,
    read_metrics,
    run_facts,
    run_status,
    saved_step,
)

LINE = {"learning_rate": 0.02, "tokens_per_s": 100.0, "memory_bytes": 1 << 30}


def test_facts_say_how_long_it_will_take():
    facts = run_facts([{"step": 10, "loss": 5.0, **LINE}], 100, 200)
    assert facts["time left"] == "about 3 min 00 s left"  # 90 steps of 200 tokens at 100 a second
    assert facts["memory"] == "1.00 GiB"
    assert run_facts([], 100, 200) == {"step": "0 of 100"}


def test_a_run_that_the_clock_ends_has_as_many_steps_as_it_seems():
    train = {"max_steps": 200, "minutes": 10}
    line = {"step": 300, "loss": 1.0, "train_seconds": 200.0}
    assert expected_steps({"max_steps": 200, "minutes": None}, [line]) == 200
    assert expected_steps(train, []) == 1
    assert expected_steps(train, [line]) == 900
    assert expected_steps(train, [line, {"step": 310, "val_loss": 1.0, "final": True}]) == 310


def test_the_run_saved_furthest_is_found_below_a_folder(tmp_path):
    for place, name in {
        "a/runs/ci": "step_00000009.safetensors",
        "b/c/ci": "step_00000010.safetensors",
        "b/other": "step_00000099.safetensors",
        "d/ci": "nothing",
    }.items():
        (tmp_path / place / "checkpoints").mkdir(parents=True)
        (tmp_path / place / "checkpoints" / name).touch()
    assert saved_step(tmp_path / "a" / "runs" / "ci") == 9
    assert saved_step(tmp_path / "d" / "ci") == saved_step(tmp_path / "none") == 0
    assert furthest_run(tmp_path, "ci") == tmp_path / "b" / "c" / "ci"
    assert furthest_run(tmp_path, "demo") is None
    assert furthest_run(tmp_path / "none", "ci") is None


def test_metrics_are_read_line_by_line(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0}\n{"step": 1, "val_loss": 4}\n'
    )
    assert [sorted(line) for line in read_metrics(tmp_path)] == [
        ["loss", "step"],
        ["step", "val_loss"],
    ]


def test_new_stopped_ended_early_and_finished_runs_are_told_apart_by_their_checkpoint(tmp_path):
    assert run_status(tmp_path) is None
    train = {"max_steps": 40, "patience": 3}
    (tmp_path / "config.json").write_text(json.dumps({"train": train}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 30, "loss": 1.0}\n')  # not the checkpoint's
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000031.safetensors").touch()
    assert str(run_status(tmp_path)) == "31 of 40 steps done; will resume"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "val_loss": 1.0, "final": true}\n')
    assert str(run_status(tmp_path)) == "ended early (31 of 40 steps)"
    (tmp_path / "checkpoints" / "step_00000040.safetensors").touch()
    assert str(run_status(tmp_path)) == "complete (40 of 40 steps)"
