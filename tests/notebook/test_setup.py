"""The report on the machine."""

from bitllm.notebook.setup import environment_report


def test_the_report_names_what_decides_speed_and_bits():
    report = environment_report()
    for word in ("GPU:", "memory:", "disk:", "precision:", "torch.compile:", "ipywidgets"):
        assert word in report
