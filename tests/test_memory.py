"""Memory that training has freed."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

FAULTS = """
import resource, sys, torch
from bitllm import memory
if sys.argv[1] == "keep":
    memory.keep_freed_memory()
for round in range(18):  # the heap grows in the first seven at most, around small blocks
    torch.ones(16 << 20)  # 64 MB
    if round == 11:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a switch of glibc")
@pytest.mark.parametrize(
    ("how", "variables", "kept"),
    [
        ("keep", {}, True),
        ("plain", {}, False),
        ("keep", {"MALLOC_MMAP_THRESHOLD_": "65536"}, False),
        ("keep", {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, False),
    ],
)
def test_pages_that_are_kept_are_not_asked_for_again(how, variables, kept):
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", FAULTS, how]
    options = {"env": environment, "capture_output": True, "text": True, "check": True}
    faults = int(subprocess.run(command, **options).stdout)  # of 6 x 16,384 pages
    if kept:
        assert faults <= 16_384 + 1000  # the heap may grow once more
    else:
        assert faults > 5000  # huge pages would make them fewer
