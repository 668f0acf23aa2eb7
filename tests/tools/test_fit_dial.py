"""The constants of the law are those that its tool finds, and the docs show what they miss."""

import numpy as np
import pytest

from bitllm import dial
from tests.conftest import ROOT
from tools import fit_dial


def test_the_constants_are_those_of_the_rows():
    runs = fit_dial.points()
    e, a, b, g, error = fit_dial.fit(runs)
    assert error < 0.02
    assert (e, a, b, g) == pytest.approx((dial.E, dial.A, dial.B, dial.G), rel=0.02)
    misses = [dial.bits_per_byte(run.model, run.learned) - run.bits for run in runs]
    assert np.abs(misses).max() < 0.05


def test_the_docs_show_the_tables(capsys):
    assert fit_dial.main() == 0
    page = (ROOT / "docs" / "dial.md").read_text(encoding="utf-8")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 20
    assert [line for line in lines if line not in page] == []
