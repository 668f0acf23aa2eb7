"""`Settings` as a form of widgets, which keeps what was typed, and a button that trains."""

from __future__ import annotations

import contextlib
import html
import json
import re
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.companion import recorded_persona
from bitllm.corpora import LANGUAGES, Persona
from bitllm.notebook.card import CARD
from bitllm.notebook.exports import uploaded
from bitllm.notebook.language import retold, say
from bitllm.notebook.launch import Launch
from bitllm.notebook.settings import SHORT_MINUTES, Settings
from bitllm_core import KNOWN_DATA, PRESETS, read_json, write_atomically

FIELDS = {  # name: label, help
    "data": ("text to learn", "a file, a folder, a known data set, or hf:OWNER/NAME"),
    "preset": ("size", "how large a model, on how much text"),
    "minutes": ("minutes", "how long it may train; without a size, they choose one"),
    "hidden_size": ("width", "numbers per token inside the model; larger is slower and better"),
    "num_hidden_layers": ("layers", "how many blocks follow one another"),
    "batch_tokens": ("tokens per step", "how much text the model reads before it changes"),
    "learning_rate": ("learning rate", "how far a step changes the weights, at its highest"),
    "resume": ("a run that is there", "resume continues it; start over moves it aside"),
    "out": ("run folder", "where the model is kept; empty: one for each choice"),
    "mirror": ("copies in", "a second folder for checkpoints, such as one on Google Drive"),
}
ADVANCED = [*FIELDS][3:]
NUMBERS = {"minutes": float, "learning_rate": float}
NUMBERS |= dict.fromkeys(("hidden_size", "num_hidden_layers", "batch_tokens"), int)
HINT = "Paste a text of your own here: 100 kB or more make sense. Empty: what is chosen below."


class SettingsPanel:
    """`Settings` as a form that shows what each change means; plain text without widgets.

    `settings` holds the form's current values; like `Settings`, it raises ValueError for nonsense.
    """

    _last: SettingsPanel | None = None

    def __init__(self, settings: Settings | None = None) -> None:
        self._given = settings or Settings()
        self._fields: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}  # who the companion is, by name
        self._whole: Any = None
        self._file: Path | None = None  # what was typed, so that it survives a new kernel too

    @classmethod
    def kept(cls, settings: Settings | None = None) -> SettingsPanel:
        """The form as it was left, in this kernel or the one before; else a new one.

        `settings` are what a new form begins with; with others there is another form.
        """
        number = zlib.crc32(json.dumps(asdict(settings)).encode()) if settings else 0
        path = Path("runs", f"form-{number:08x}.json")
        if cls._last is None or cls._last._file != path:
            cls._last = cls(settings)
            cls._last._file = path
            with contextlib.suppress(ValueError, TypeError):  # of another version
                if (found := read_json(path)) is not None:
                    cls._last._given = Settings(**found)
        return cls._last

    @property
    def settings(self) -> Settings:
        if not self._fields:
            return self._given
        asked = {name: self._value(name) for name in self._fields}
        facts = {name: field.value.strip() for name, field in self._facts.items()}
        persona = Persona(**{name: text for name, text in facts.items() if text})
        return Settings(**asked, persona=persona.spelled() if self._language() else "")

    def show(self) -> None:
        """Display the form; without widgets, print what the settings mean."""
        widgets = kernel.widgets()
        if widgets is None:
            print(self._given.describe())
            return
        if self._whole is None:
            self._whole = self._form(widgets)
        text = say("a form: run this cell to see it")
        kernel.show(self._whole, f"{text}\n\n{self._given.describe()}")

    def _form(self, w: Any) -> Any:
        given = asdict(self._given)
        persona = Persona.parse(recorded_persona(given.pop("persona")) or "")
        self._fields = {name: _field(w, name, given[name]) for name in FIELDS}
        for name, value in asdict(persona).items():
            self._facts[name] = w.Text(value=value, description=say(name), **_wide(w))
        for field in (*self._fields.values(), *self._facts.values()):
            if field.has_trait("continuous_update"):
                field.continuous_update = False
            field.observe(self._show_summary, names="value")
        self._own = w.Textarea(placeholder=say(HINT), rows=5, continuous_update=False, **_wide(w))
        self._own.description = say("your own text")
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if self._given.data.startswith("texts/pasted"):
                self._own.value = Path(self._given.data).read_text(encoding="utf-8")[:1_000_000]
        self._own.observe(lambda change: self._paste(change["new"]), "value")
        upload = w.FileUpload(accept=".txt,.jsonl,.parquet", description=say("or upload a text"))
        upload.layout = w.Layout(width="220px", margin="2px 2px 2px 138px")
        upload.observe(lambda change: self._use_as_data(uploaded(change["new"])), "value")
        self._summary, self._train = w.HTML(), w.Button(description=say("Train"))
        self._train.button_style = "primary"
        title = w.HTML(say("Who the companion is; empty fields stay as shown in grey:"))
        self._persona = w.VBox([title, *self._facts.values()])
        advanced = w.Accordion(children=[w.VBox([self._fields[name] for name in ADVANCED])])
        advanced.selected_index, advanced.layout = None, w.Layout(width="620px", max_width="100%")
        advanced.set_title(0, say("Advanced"))
        below = w.VBox([])
        launch = Launch(below, self._train)
        self._train.on_click(lambda _: launch.start(lambda: self.settings))
        hint = w.HTML(say("or Run all: the notebook trains what is chosen here"))
        rows = [self._own, upload, self._fields["data"], self._persona, self._fields["preset"]]
        rows += [self._fields["minutes"], advanced, self._summary]
        self._show_summary()
        return w.VBox([*rows, w.HBox([self._train, hint], layout={"flex_flow": "row wrap"}), below])

    def _value(self, name: str) -> Any:
        """A field's value; ValueError in the form's own terms where it is no number."""
        value = self._fields[name].value
        if name not in NUMBERS:
            return value.strip()
        try:
            return NUMBERS[name](value.replace(",", "").strip() or 0)
        except ValueError:
            kind = "a number" if NUMBERS[name] is float else "a whole number"
            raise ValueError(f"{name}={value!r}: expected {kind}") from None

    def _paste(self, text: str) -> None:
        """A folder of its own for each text that was pasted."""
        if text.strip():
            words = "-".join(re.findall(r"\w+", text)[:3])[:30]
            number = zlib.crc32(text.encode("utf-8", "replace")) & 0xFFFF
            self._use_as_data({f"pasted-{words}-{number:04x}.txt": text.encode("utf-8", "replace")})
        elif self._fields["data"].value.startswith("texts/pasted"):
            self._fields["data"].value = ""

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
        language, persona, wrong = self._language(), "", ""
        try:
            settings = self.settings
            text, persona = settings.describe(), settings.configs()[1].persona or ""
            self._show_presets_values(settings)
            self._keep(settings)
        except ValueError as error:
            text, wrong = _in_terms_of_the_form(str(error)), "color:#d1242f;font-weight:600"
        self._train.disabled = bool(wrong)
        self._persona.layout.display = None if language else "none"
        for name, value in Persona.parse(persona).row(language).items() if language else ():
            self._facts[name].placeholder = value
        self._summary.value = (
            f'<pre style="{CARD};background:none;white-space:pre-wrap;{wrong}">'
            f"{html.escape(text)}</pre>"
        )

    def _show_presets_values(self, settings: Settings) -> None:
        """In grey, what an empty field means."""
        bare = Settings(settings.preset, settings.data, minutes=settings.minutes)
        model, data, config = bare.configs() if bare.is_dialed else PRESETS[bare.preset_name]
        chosen = say("chosen") if bare.is_dialed else bare.preset_name
        if bare.is_fallback:
            steps = say("{minutes:g}, without a GPU", minutes=SHORT_MINUTES)
        else:
            steps = say("{steps:,} steps", steps=config.max_steps)
        rate = config.learning_rate or 0.04
        known = {"data": data.data, "minutes": steps, "hidden_size": model.hidden_size}
        known |= {"num_hidden_layers": model.num_hidden_layers, "batch_tokens": config.batch_tokens}
        known |= {"learning_rate": rate}
        known["out"] = settings.replace(out="").run_folder.as_posix()
        for name, value in known.items():
            self._fields[name].placeholder = f"{value} ({chosen})"
        self._fields["out"].placeholder = known["out"]
        self._fields["mirror"].placeholder = say("none")

    def _keep(self, settings: Settings) -> None:
        """Write down what was typed, for the next kernel."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(exist_ok=True)
                write_atomically(self._file, json.dumps(asdict(settings)).encode())


def _wide(w: Any) -> dict[str, Any]:
    return {
        "style": {"description_width": "130px"},
        "layout": w.Layout(width="620px", max_width="calc(100% - 4px)"),
    }


def _field(w: Any, name: str, value: Any) -> Any:
    """The widget for a setting, with its label and help."""
    label, tip = FIELDS[name]
    options = {"description": say(label), **_wide(w)}
    if name == "preset":
        sizes = [(say("what suits this machine"), "auto")]
        for key, (model, *_) in PRESETS.items():
            million = model.num_parameters / 1e6
            sizes.append((say("{name}: {million:.1f}M parameters", name=key, million=million), key))
        field = w.Dropdown(options=sizes, **options)
        field.value = value
    elif name == "resume":
        choices = [(say("resume it"), "auto"), (say("start over"), "never")]
        field = w.Dropdown(options=choices, value=value, **options)
    elif name == "data":
        languages = [f"companion:{language}" for language in LANGUAGES if language != "en"]
        known = ["companion", *languages, "pydocs", *KNOWN_DATA]
        field = w.Combobox(options=known, value=value, **options)
    else:
        field = w.Text(
            value=f"{value:g}" if value and name in NUMBERS else str(value or ""), **options
        )
    field.set_trait("tooltip" if field.has_trait("tooltip") else "description_tooltip", say(tip))
    return field


def _in_terms_of_the_form(error: str) -> str:
    """An error with the form's labels for the names of fields."""
    found = re.fullmatch(r"(\w+)=(.*): expected (.*)", error, re.DOTALL)
    if not found or found[1] not in FIELDS:
        return say("not possible: {error}", error=error)
    expected = retold(found[3]).replace("max_position_embeddings=", "the context, ")
    label = say(FIELDS[found[1]][0])
    return say("{label} {value}: use {expected}", label=label, value=found[2], expected=expected)
