"""`Settings` as a form of widgets."""

from __future__ import annotations

import contextlib
import html
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.companion import recorded_persona
from bitllm.corpora import LANGUAGES, Persona
from bitllm.notebook.figures import CARD, INK
from bitllm.notebook.settings import Settings
from bitllm_core import KNOWN_DATA, PRESETS


class SettingsPanel:
    """`Settings` as a form that shows what each change means; plain text without widgets.

    `settings` holds the form's current values; like `Settings`, it raises ValueError for nonsense.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._given = settings or Settings()
        self._fields: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}  # who the companion is, by name

    @property
    def settings(self) -> Settings:
        if not self._fields:
            return self._given
        asked = {name: field.value for name, field in self._fields.items()}
        facts = {name: field.value.strip() for name, field in self._facts.items()}
        persona = Persona(**{name: text for name, text in facts.items() if text})
        return Settings(**asked, persona=persona.spelled() if self._language() else "")

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
        rest = asdict(self._given)
        persona = Persona.parse(recorded_persona(rest.pop("persona")) or "")
        for name, value in rest.items():
            options = {"value": value, "description": name.replace("_", " "), **wide}
            self._fields[name] = field = _field(w, name, options)
            field.observe(self._show_summary, names="value")
        for name, value in asdict(persona).items():
            field = w.Text(value=value, description=name, continuous_update=False, **wide)
            field.observe(self._show_summary, names="value")
            self._facts[name] = field
        own = w.Textarea(description="own text", continuous_update=False, **wide)
        own.observe(
            lambda change: self._use_as_data({"own_text.txt": change["new"].encode()}), "value"
        )
        upload = w.FileUpload(accept=".txt,.jsonl,.parquet", description="upload a text")
        upload.observe(lambda change: self._use_as_data(_uploaded(change["new"])), "value")
        self._summary = w.HTML()
        title = w.HTML("Who the companion is; what is empty stays as shown in grey:")
        self._persona = w.VBox([title, *self._facts.values()])
        self._show_summary()
        shown = [*self._fields.values(), own, upload, self._summary]
        shown.insert(1 + shown.index(self._fields["data"]), self._persona)
        return w.VBox(shown)

    def _use_as_data(self, files: dict[str, bytes]) -> None:
        """Save texts given in the form as files, and make the last one the data."""
        for name, content in files.items():
            if content:
                path = Path("texts") / Path(name).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                self._fields["data"].value = path.as_posix()
        self._show_summary()

    def _language(self) -> str | None:
        """The companion's, where that is the data as it is now."""
        with contextlib.suppress(ValueError):
            return Settings(*(self._fields[name].value for name in ("preset", "data"))).language
        return None

    def _show_summary(self, change: Any = None) -> None:
        language, persona = self._language(), ""
        try:
            text, color = self.settings.describe(), INK
            persona = self.settings.configs()[1].persona or ""
        except ValueError as error:
            text, color = f"not possible: {error}", "#b00020"
        self._persona.layout.display = None if language else "none"
        for name, value in Persona.parse(persona).row(language).items() if language else ():
            self._facts[name].placeholder = value
        self._summary.value = (
            f'<pre style="{CARD};color:{color};white-space:pre-wrap">{html.escape(text)}</pre>'
        )


def _field(w: Any, name: str, options: dict[str, Any]) -> Any:
    """The widget for a setting; its kind follows from its value, but for what is chosen."""
    choices = {"preset": ("auto", *PRESETS), "resume": ("auto", "never")}
    if name in choices:
        return w.Dropdown(options=choices[name], **options)
    if name == "data":
        languages = [f"companion:{language}" for language in LANGUAGES if language != "en"]
        known = ["companion", *languages, "pydocs", *KNOWN_DATA]
        return w.Combobox(options=known, continuous_update=False, **options)
    if isinstance(options["value"], str):
        return w.Text(continuous_update=False, **options)
    return (w.IntText if isinstance(options["value"], int) else w.FloatText)(**options)


def _uploaded(value: Any) -> dict[str, bytes]:
    """Names and contents of a FileUpload's files; ipywidgets 7 has a dict, 8 a tuple."""
    if isinstance(value, dict):
        return {name: bytes(item["content"]) for name, item in value.items()}
    return {item["name"]: bytes(item["content"]) for item in value}
