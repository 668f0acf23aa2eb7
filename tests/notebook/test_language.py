"""The form, the display and the boxes in Spanish."""

import ast
import itertools
import re
import types
from dataclasses import fields, replace
from string import Formatter

import ipywidgets
import pytest

import bitllm
import bitllm_core as bit
from bitllm.corpora import Persona
from bitllm.notebook import boxes, display, exports, form
from bitllm.notebook.card import card, details, duration, verdict
from bitllm.notebook.exports import export_box
from bitllm.notebook.language import LANGUAGES, retold, say, speak
from bitllm.notebook.runs import RunStatus, run_facts
from bitllm.notebook.settings import Settings
from bitllm.notebook.setup import environment_report
from bitllm.notebook.spanish import MESSAGES, TEXTS
from tests import tiny
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("empty_folder")

FACTS = ("step", "loss", "tokens/s", "memory", "time left", "last save")
FACTS += ("validation loss", "validated at")
TABLES = {  # what is given to `say` under a name: the texts that it can be
    "label": [label for label, _ in (*form.FIELDS.values(), *boxes.HELP.values())],
    "FIELDS[found[1]][0]": [],  # the same
    "tip": [tip for _, tip in (*form.FIELDS.values(), *boxes.HELP.values())]
    + [tip for _, tip in exports.FORMATS.values()],
    "HINT": [form.HINT],
    "name": [*display.BUTTONS, *exports.FORMATS, *(x.name for x in fields(Persona)), *FACTS],
    "k": [*FACTS, "mirror"],
}


def told():
    """Every text that the package gives to `say`."""
    for path in sorted((ROOT / "bitllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "say":
                if isinstance(node.args[0], ast.Constant):
                    yield node.args[0].value
                else:
                    yield from TABLES[ast.unparse(node.args[0])]


def placeholders(text):
    return sorted((name, spec) for _, name, spec, _ in Formatter().parse(text) if name)


def test_every_text_has_its_spanish_and_no_entry_is_unused():
    assert set(told()) == set(TEXTS)
    for english, spanish in {**TEXTS, **MESSAGES}.items():
        assert placeholders(spanish) == placeholders(english)
        assert english[-1:] == spanish[-1:] or english[-1] not in ".;:"
        assert spanish.strip()


def test_a_language_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="language='fr': expected one of en, es"):
        bitllm.speak("fr")
    assert say("Train") == "Train"  # as before


def in_language(code):
    """What each part shows in a language, as one text."""
    speak(code)
    lines = [
        {"step": step, "loss": 3.0, "learning_rate": 0.02, "tokens_per_s": 9.0}
        | {"zero_fraction": [0.3, 0.4], "flip_rate": [0, 0.1]}
        for step in range(10, 41, 10)
    ]
    lines += [{"step": 30, "val_loss": 2.0}, {"step": 40, "val_loss": 2.5}]
    facts = run_facts(lines, 100, 2048) | {"last save": "14:02", "mirror": "x"}
    shown = [card("head", facts, lines, 100, [(10, [(True, "hi")])]), details(lines, 100)]
    shown += [verdict(lines, 1024), duration(1e4), str(RunStatus(1, 2, True))]
    shown += [Settings("demo").describe(), environment_report()]
    return re.sub(r'src="[^"]*"', "", "\n".join(shown))


def test_without_a_choice_or_after_english_all_is_english():
    assert say("step {step:,}", step=1000) == "step 1,000"
    english = in_language("en")
    assert "what it says at step 10" in english
    assert "on text it has not seen, step 40" in english
    spanish = in_language("es")
    assert "lo que dice en el paso 10" in spanish
    assert "en texto que no ha visto, paso 40" in spanish
    assert "tasa de aprendizaje" in spanish
    assert "(random guessing: 1,024)" in english
    assert "(al azar: 1\N{NO-BREAK SPACE}024)" in spanish  # 1,024 would be a little more than one
    assert "tasa de aprendizaje máxima 0,03" in spanish
    assert in_language("en").splitlines()[0] == english.splitlines()[0]
    words = set(re.findall(r"[a-z]{3,}", re.sub(r"<[^>]*>", " ", spanish.lower())))
    left = words & {"the", "step", "steps", "loss", "learning", "text", "run", "time", "weights"}
    assert not left


@pytest.fixture
def panel():
    speak("es")
    panel = form.SettingsPanel(Settings("demo", data="companion:es"))
    panel._form(ipywidgets)
    return panel


def test_the_form_is_spanish_and_its_values_reach_the_settings(panel):
    fields = {name: field.description for name, field in panel._fields.items()}
    assert fields["data"] == "texto que aprende"
    assert fields["hidden_size"] == "anchura"
    assert panel._own.description == "tu propio texto"
    assert panel._train.description == "Entrenar"
    assert [field.description for field in panel._facts.values()][:2] == ["nombre", "casa"]
    assert "2,23M de parámetros: 3 capas de anchura 256" in panel._summary.value
    panel._fields["hidden_size"].value, panel._fields["resume"].value = "128", "never"
    panel._facts["name"].value = "Luna"
    asked = Settings("demo", "companion:es", 128, resume="never", persona="name=Luna")
    assert panel.settings == asked
    assert "carpeta:    runs/demo-companion-es-w128-Luna-" in panel._summary.value


def test_an_error_is_in_the_forms_own_terms(panel):
    for name, value, said in (
        ("hidden_size", "250", "anchura 250: usa un múltiplo de 64, por ejemplo 256"),
        ("hidden_size", "big", "anchura &#x27;big&#x27;: usa un número entero"),
        ("num_hidden_layers", "-1", "capas -1: usa 1 o más"),
        ("learning_rate", "-1", "tasa de aprendizaje -1.0: usa más de 0"),
        ("learning_rate", "x", "tasa de aprendizaje &#x27;x&#x27;: usa un número"),
        ("batch_tokens", "1000", "usa un múltiplo del contexto, 256, por ejemplo 768 o 1024"),
        ("minutes", "-1", "minutos -1.0: usa 0 (los pasos del preset) o más"),
        ("minutes", "inf", "minutos inf: usa un número finito"),
        ("data", "no.txt", "texto que aprende &#x27;no.txt&#x27;: usa un archivo o una carpeta"),
        ("data", "companion:xx", "usa companion:IDIOMA, uno de "),
    ):
        before = panel._fields[name].value
        panel._fields[name].value = value
        assert said in panel._summary.value, (name, value)
        assert panel._train.disabled
        panel._fields[name].value = before
    assert not panel._train.disabled


def test_the_settings_own_errors_stay_as_they_are():
    """A program may read them; the form alone tells them in its language."""
    speak("es")
    with pytest.raises(ValueError, match="hidden_size=250: expected a multiple of 64, such as 256"):
        Settings("demo", hidden_size=250)


def test_a_message_that_is_not_known_stays_as_it_is():
    assert retold("step 5 is in copies") == "step 5 is in copies"
    speak("es")
    assert retold("step 5 is in copies") == "el paso 5 está en copies"
    assert retold("failing since 14:02") == "failing since 14:02"
    assert LANGUAGES["en"] == ({}, {})


class Talk:
    """A conversation that needs no model."""

    sampling, messages = bit.SamplingConfig(), ()

    def reply(self, question):
        yield question


def words_of(widget):
    """What is written on a widget and those in it."""
    said = [getattr(widget, name, "") for name in ("description", "placeholder", "tooltip")]
    said += [widget.value] if isinstance(widget, ipywidgets.HTML) else []
    said += [widget.get_title(0)] if isinstance(widget, ipywidgets.Accordion) else []
    for child in getattr(widget, "children", ()):
        said += words_of(child)
    return [text for text in said if text]


def test_the_boxes_are_spanish(monkeypatch, tmp_path):
    speak("es")
    shown = []
    monkeypatch.setattr("bitllm.notebook.kernel.widgets", lambda: ipywidgets)
    monkeypatch.setattr("bitllm.notebook.kernel.show", lambda *given: shown.append(given))
    monkeypatch.setattr(boxes, "stream", lambda *given: [" mats"])
    monkeypatch.setattr(boxes, "can_chat", lambda tokenizer: tokenizer == "talks")
    monkeypatch.setattr(boxes, "Chat", lambda *given: Talk())
    export_box(tmp_path)
    boxes.prompt_box(None, "writes", "El gato")
    boxes.prompt_box(None, "talks")
    said = [words_of(widget) for widget, *_ in shown]
    assert said[0][0] == "Página web"
    assert {"Escribir", "Parar", "comienzo", "longitud", "Cómo elige sus palabras"} <= {*said[1]}
    assert {"Enviar", "Parar", "Nueva conversación", "Di algo"} <= {*said[2]}
    text = " ".join(itertools.chain(*said, (text for _, text, *_ in shown)))
    assert not {"the", "this", "cell", "Stop", "for"} & {*re.findall(r"\w+", text)}


def test_the_display_ends_in_spanish(monkeypatch, tmp_path):
    speak("es")
    live = display.LiveDisplay(tmp_path / "run")
    config = replace(tiny.TRAIN, max_steps=40)
    model = types.SimpleNamespace(config=tiny.MODEL)
    state = types.SimpleNamespace(step=3, stop_signal=0, paused=False, finished=False)
    vars(state).update(config=config, model=model, out_of_patience=False, train_seconds=5.0)
    heads = [display._headline(live, state)]
    state.paused = True
    heads.append(display._headline(live, state))
    state.stop_signal, live.ended = 2, True
    heads.append(display._headline(live, state))
    state.finished, live.handle = True, object()
    heads.append(display._headline(live, state))
    place = (tmp_path / "run").as_posix()
    assert heads == [
        "Preparando: el primer paso es el que más tarda.",
        "En pausa: pulsa Continuar.",
        f"Parado en el paso 3 de 40, guardado en {place}. Para continuar, ejecuta de nuevo esta "
        "celda.",
        f"Listo en 5 s.  Guardado en {place}. Pruébalo abajo.",
    ]
