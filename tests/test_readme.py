"""README's commands and figures are those of the code."""

import re
from pathlib import Path

import bitllm_core as bit
from bitllm.cli import parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_both_commands_and_ci_runs_the_second():
    for name in ("main", "test"):
        command = re.search(rf"<!-- {name} command -->\n```bash\n(.+?)\n```", TEXT, re.DOTALL)
        assert command
        assert "\n" not in command[1]
        assert "requirements.txt" in command[1]
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_commands_shown_are_valid():
    shown = re.findall(r"^.*?python bitllm_core\.py (.+?)(?: +#.*)?$", TEXT, re.MULTILINE)
    assert len(shown) >= 8
    for line in shown:
        words = re.findall(r'"[^"]*"|\S+', line)
        parser().parse_args([word.strip('"') for word in words])


def test_the_table_of_presets_matches_the_code():
    for name, (model, data, train) in bit.PRESETS.items():
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        size = float(cells[2].removesuffix("M"))
        assert abs(size - model.num_parameters / 1e6) <= 0.05, (name, model.num_parameters)
        assert cells[3] == data.data
        assert int(cells[4].replace(",", "")) == train.max_steps


def test_the_files_in_the_table_exist():
    table = TEXT.split("## Files")[1].split("##")[0]
    for name in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_torch_is_bounded_above_the_last_version_tested():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch>=2\.9,<2\.14\.2$", lines, re.MULTILINE)
