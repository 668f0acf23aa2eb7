"""What the notebooks share: settings and their form, live display, Drive, prompt box.

ipywidgets, matplotlib and IPython are imported where they are used; where there is no notebook
everything has a form in plain text.
"""

from bitllm.notebook.boxes import chat_box, download_button, prompt_box
from bitllm.notebook.display import LiveDisplay
from bitllm.notebook.drive import mount_drive
from bitllm.notebook.form import SettingsPanel
from bitllm.notebook.runs import furthest_run, newest_run, read_metrics, saved_step, show_run
from bitllm.notebook.settings import Settings
from bitllm.notebook.setup import environment_report

__all__ = [
    "LiveDisplay",
    "Settings",
    "SettingsPanel",
    "chat_box",
    "download_button",
    "environment_report",
    "furthest_run",
    "mount_drive",
    "newest_run",
    "prompt_box",
    "read_metrics",
    "saved_step",
    "show_run",
]
