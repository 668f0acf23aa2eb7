"""`Settings` as a form of widgets."""

from __future__ import annotations

import html
from dataclasses import fields
from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.notebook.figures import CARD, INK
from bitllm.notebook.settings import Settings
from bitllm_core import PRESETS


class SettingsPanel:
    """`Settings` as a form that shows what each change means; plain text without widgets.

    `settings` holds the form's current values; like `Settings`, it raises ValueError for nonsense.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._given = settings or Settings()
        self._fields: dict[str, Any] = {}

    @property
    def settings(self) -> Settings:
        if not self._fields:
            return self._given
        return Settings(**{name: field.value for name, field in self._fields.items()})

    def show(self) -> None:
        """Display the form; without widgets, print what the settings mean."""
        widgets = kernel.widgets()
        if widgets is None:
            print(self._given.describe())
            return
        from IPython.display import display

        display(self._form(widgets))

    def _form(self, w: Any) -> Any:
        wide = {"style": {"description_width": "140px"}, "layout": w.Layout(width="520px")}
        choices = {"preset": ("auto", *PRESETS), "resume": ("auto", "never")}
        for f in fields(Settings):
            value = getattr(self._given, f.name)
            options = {"value": value, "description": f.name.replace("_", " "), **wide}
            if f.name in choices:
                field = w.Dropdown(options=choices[f.name], **options)
            elif isinstance(value, str):
                field = w.Text(continuous_update=False, **options)
            else:
                field = (w.IntText if isinstance(value, int) else w.FloatText)(**options)
            field.observe(self._show_summary, names="value")
            self._fields[f.name] = field
        own = w.Textarea(description="own text", continuous_update=False, **wide)
        own.observe(
            lambda change: self._use_as_data({"own_text.txt": change["new"].encode()}), "value"
        )
        upload = w.FileUpload(accept=".txt,.jsonl,.parquet", description="upload a text")
        upload.observe(lambda change: self._use_as_data(_uploaded(change["new"])), "value")
        self._summary = w.HTML()
        self._show_summary()
        return w.VBox([*self._fields.values(), own, upload, self._summary])

    def _use_as_data(self, files: dict[str, bytes]) -> None:
        """Save texts given in the form as files, and make the last one the data."""
        for name, content in files.items():
            if content:
                path = Path("texts") / Path(name).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                self._fields["data"].value = path.as_posix()
        self._show_summary()

    def _show_summary(self, change: Any = None) -> None:
        try:
            text, color = self.settings.describe(), INK
        except ValueError as error:
            text, color = f"not possible: {error}", "#b00020"
        self._summary.value = (
            f'<pre style="{CARD};color:{color};white-space:pre-wrap">{html.escape(text)}</pre>'
        )


def _uploaded(value: Any) -> dict[str, bytes]:
    """Names and contents of a FileUpload's files; ipywidgets 7 has a dict, 8 a tuple."""
    if isinstance(value, dict):
        return {name: bytes(item["content"]) for name, item in value.items()}
    return {item["name"]: bytes(item["content"]) for item in value}
