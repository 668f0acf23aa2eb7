"""What the notebooks share: settings and their form, live display, Drive, prompt box.

ipywidgets, matplotlib and IPython are imported where they are used; where there is no notebook
everything has a form in plain text.
"""

from bitllm.notebook.beside import compare
from bitllm.notebook.boxes import chat_box, first_words, prompt_box, try_out
from bitllm.notebook.display import LiveDisplay
from bitllm.notebook.drive import mount_drive
from bitllm.notebook.exports import download_button, export_box, show_page, upload_box, write_export
from bitllm.notebook.form import SettingsPanel
from bitllm.notebook.kernel import brief_errors
from bitllm.notebook.language import speak
from bitllm.notebook.runs import (
    find_model,
    furthest_run,
    newest_run,
    read_metrics,
    saved_step,
    show_run,
)
from bitllm.notebook.settings import Settings
from bitllm.notebook.setup import check_gpu, environment_report, show_environment
from bitllm.notebook.watch import is_training, watch

__all__ = [
    "LiveDisplay",
    "Settings",
    "SettingsPanel",
    "brief_errors",
    "chat_box",
    "check_gpu",
    "compare",
    "download_button",
    "environment_report",
    "export_box",
    "find_model",
    "first_words",
    "furthest_run",
    "is_training",
    "mount_drive",
    "newest_run",
    "prompt_box",
    "read_metrics",
    "saved_step",
    "show_environment",
    "show_page",
    "show_run",
    "speak",
    "try_out",
    "upload_box",
    "watch",
    "write_export",
]
