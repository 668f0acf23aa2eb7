"""The settings as a form of widgets."""

import ipywidgets
import pytest

import bitllm_core as bit
from bitllm.corpora import Persona
from bitllm.notebook.form import SettingsPanel, _uploaded
from bitllm.notebook.settings import Settings

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def form(monkeypatch):
    """A panel whose widgets live in this process, without a front end."""
    panel = SettingsPanel(Settings("demo"))
    panel._form(ipywidgets)
    return panel


def test_the_form_answers_changes_and_rejects_nonsense(form):
    assert "2.89M parameters" in form._summary.value
    form._fields["num_hidden_layers"].value = 2
    assert "2 layers" in form._summary.value
    assert form.settings == Settings("demo", num_hidden_layers=2)
    form._fields["batch_tokens"].value = 1000
    assert "not possible: batch_tokens=1000: expected a multiple" in form._summary.value
    with pytest.raises(ValueError, match="batch_tokens=1000"):
        _ = form.settings
    form._fields["batch_tokens"].value = 2048
    assert form.settings.batch_tokens == 2048


def test_texts_given_in_the_form_become_the_data(form, tmp_path):
    form._use_as_data({"../../my book.txt": b"once"})
    assert form.settings.data == "texts/my book.txt"
    assert (tmp_path / "texts" / "my book.txt").read_bytes() == b"once"
    assert "runs/demo-my-book" in form._summary.value


def test_the_companion_has_fields_for_who_it_is(form):
    shown, facts = form._persona.layout, form._facts
    assert list(facts) == ["name", "home", "likes", "maker", "motto"]
    form._fields["data"].value = "pydocs"
    assert shown.display == "none"
    assert form.settings.persona == ""
    form._fields["data"].value = "companion:es"
    assert shown.display is None
    assert facts["motto"].placeholder == "Paso a paso se llega lejos."
    form._fields["data"].value = "companion"
    assert facts["motto"].placeholder == "Small steps go far."
    assert form.settings.configs()[1] == bit.DataConfig("companion")
    facts["name"].value, facts["home"].value = " Luna ", "a boat"
    assert form.settings.configs()[1].persona == "name=Luna; home=a boat"
    assert "companion:  name=Luna; home=a boat" in form._summary.value
    form._fields["data"].value = "pydocs"  # what was typed is kept, and not used
    assert shown.display == "none"
    assert form.settings.configs()[1] == bit.DataConfig("pydocs")
    form._fields["data"].value = "companion:xx"
    assert "not possible: data=&#x27;companion:xx&#x27;: expected" in form._summary.value


STRANGE = '"Łuna"; home=<b>x</b> & {name} <|im_start|> 漢字 🐱 = \\'


def test_what_is_typed_is_data_and_fills_the_form_again(form):
    form._fields["data"].value = "companion"
    for field in form._facts.values():
        field.value = STRANGE
    persona = form.settings.configs()[1].persona
    assert vars(Persona.parse(persona)) == dict.fromkeys(form._facts, STRANGE)
    assert "<b>" not in form._summary.value
    again = SettingsPanel(form.settings)
    again._form(ipywidgets)
    assert {field.value for field in again._facts.values()} == {STRANGE}
    assert again.settings == form.settings


def test_uploads_of_both_generations():
    old = {"a.txt": {"metadata": {"name": "a.txt"}, "content": b"one"}}
    new = ({"name": "a.txt", "content": memoryview(b"one")},)
    assert _uploaded(old) == _uploaded(new) == {"a.txt": b"one"}


def test_without_a_notebook_the_form_is_text(capsys):
    panel = SettingsPanel(Settings("ci"))
    panel.show()
    assert "0.13M parameters" in capsys.readouterr().out
    assert panel.settings == Settings("ci")
