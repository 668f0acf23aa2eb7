"""The GPU check does every stage on a CPU, and one that fails does not stop the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"
sys.path.append(str(ROOT / "tools"))
import gpu_check  # noqa: E402


def run(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return warm.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    text = folder / "text.txt"
    lines = [f"{i} cats sat on {i % 50} mats, and {i * 7 % 31} dogs.\n" for i in range(6_000)]
    text.write_text("".join(lines), encoding="utf-8")
    result = run("prepare", folder / "data", "--data", text)
    assert result.returncode == 0, result.stderr
    return folder / "data"


def ended(out):
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return rows, {row["stage"]: row for row in rows if "ok" in row}


ALL_STAGES = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import gpu_check
for name in gpu_check.STAGES:
    gpu_check.stage(gpu_check.Job(Path(sys.argv[3]), Path(sys.argv[4]), name, True), "")
"""


def test_every_stage_passes_with_tiny_shapes(prepared, tmp_path):
    """All in one process: to start one for each takes longer than the stages."""
    command = [sys.executable, "-c", ALL_STAGES, ROOT, ROOT / "tools", prepared, tmp_path]
    done = warm.run(command, capture_output=True, text=True, check=False, timeout=300)
    rows, last = ended(tmp_path)
    assert [name for name, row in last.items() if not row["ok"]] == [], done.stderr
    assert set(last) == set(gpu_check.STAGES)
    for name in last:
        assert any(row["stage"] == name and "ok" not in row for row in rows), name
    tables = run("report", tmp_path).stdout
    assert all(f"| {name} |" in tables for name in last)


def test_a_report_of_nothing_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["report", str(tmp_path)])
    assert "`run FOLDER --out " in capsys.readouterr().err


def test_a_stage_that_is_broken_stops_no_other(prepared, tmp_path):
    together, alone = list(gpu_check.TOGETHER)[:2], list(gpu_check.ALONE)[:1]
    wanted, broken = [*together, *alone], together[0]
    flags = ["--rehearse", "--minutes", "4", "--break", broken, "--stages", ",".join(wanted)]
    result = run("run", prepared, "--out", tmp_path / "out", *flags)
    assert result.returncode == 1
    _, last = ended(tmp_path / "out")
    assert {name: row["ok"] for name, row in last.items()} == {n: n != broken for n in wanted}
    assert f"{broken}: RuntimeError: {broken}: broken on purpose" in result.stderr
    assert run("run", prepared, "--out", tmp_path, "--stages", "nonsense").returncode == 1


@pytest.mark.parametrize("name", gpu_check.STAGES)
def test_a_stage_that_is_broken_is_reported(prepared, tmp_path, name):
    assert gpu_check.stage(gpu_check.Job(prepared, tmp_path, name, True), name) == 1
    error = ended(tmp_path)[1][name]["error"]
    assert "Traceback" in error
    assert f"{name}: broken on purpose" in error


def test_the_versions_are_noted(prepared, tmp_path):
    assert gpu_check.stage(gpu_check.Job(prepared, tmp_path, "versions", True), "") == 0
    assert ended(tmp_path)[1]["versions"]["ok"]


def test_a_stage_that_hangs_is_ended(prepared, tmp_path):
    job = gpu_check.Job(prepared, tmp_path, "versions", True)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    gpu_check.finish(job, child, 1)
    assert gpu_check.read(tmp_path)[-1]["error"].startswith("not done after 1 s")
