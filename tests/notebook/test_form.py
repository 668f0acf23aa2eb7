"""The settings as a form of widgets."""

import ipywidgets
import pytest

import bitllm_core as bit
from bitllm.corpora import Persona
from bitllm.notebook.exports import uploaded
from bitllm.notebook.form import SettingsPanel
from bitllm.notebook.settings import Settings

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def form(monkeypatch):
    """A panel whose widgets live in this process, without a front end."""
    panel = SettingsPanel(Settings("demo"))
    panel._form(ipywidgets)
    return panel


def test_the_form_answers_changes_and_rejects_nonsense(form):
    assert "2.23M parameters" in form._summary.value
    assert form._fields["hidden_size"].placeholder == "256 (demo)"
    form._fields["num_hidden_layers"].value = "2"
    assert "2 layers" in form._summary.value
    assert form.settings == Settings("demo", num_hidden_layers=2)
    assert form._fields["out"].placeholder == "runs/demo-l2"
    form._fields["batch_tokens"].value = "1000"
    assert "tokens per step 1000: use a multiple of the context, 256, such" in form._summary.value
    assert form._train.disabled
    with pytest.raises(ValueError, match="batch_tokens=1000"):
        _ = form.settings
    for name, value, said in (
        ("hidden_size", "250", "width 250: use a multiple of 64, such as 256"),
        ("hidden_size", "big", "width &#x27;big&#x27;: use a whole number"),
        ("minutes", "-1", "minutes -1.0: use 0"),
        ("data", "nofile.txt", "text to learn &#x27;nofile.txt&#x27;: use a file or folder"),
    ):
        form._fields["batch_tokens"].value = ""
        before = form._fields[name].value
        form._fields[name].value = value
        assert said in form._summary.value
        form._fields[name].value = before
    assert not form._train.disabled
    form._fields["batch_tokens"].value = "2,048"
    assert form.settings.batch_tokens == 2048


def test_every_field_explains_itself(form):
    for field in form._fields.values():
        assert getattr(field, "tooltip", None) or field.description_tooltip


def test_what_was_typed_or_pasted_survives_run_all_and_a_new_kernel(monkeypatch):
    monkeypatch.setattr(SettingsPanel, "_last", None)
    panel = SettingsPanel.kept()
    panel._form(ipywidgets)
    panel._fields["preset"].value, panel._fields["hidden_size"].value = "demo", "128"
    panel._own.value = "Once upon a time. " * 500
    assert SettingsPanel.kept() is panel
    monkeypatch.setattr(SettingsPanel, "_last", None)  # a new kernel
    again = SettingsPanel.kept()
    again._form(ipywidgets)
    assert again._own.value == panel._own.value
    assert again.settings == panel.settings
    assert again.settings.run_folder.name == "demo-pasted-Once-upon-a-487c-w128"
    again._own.value = "Another text. " * 500
    assert again.settings.run_folder.name != panel.settings.run_folder.name
    again._own.value = ""
    assert again.settings.data == ""
    assert SettingsPanel.kept(Settings("ci")).settings.preset == "ci"  # what a notebook asks for


def test_texts_given_in_the_form_become_the_data(form, tmp_path):
    form._use_as_data({"../../my book.txt": b"once " * 500})
    assert form.settings.data == "texts/my book.txt"
    assert (tmp_path / "texts" / "my book.txt").read_bytes() == b"once " * 500
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
    assert "text to learn &#x27;companion:xx&#x27;: use companion:LANGUAGE" in form._summary.value


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
    assert uploaded(old) == uploaded(new) == {"a.txt": b"one"}


def test_without_a_notebook_the_form_is_text(capsys):
    panel = SettingsPanel(Settings("ci"))
    panel.show()
    assert "0.13M parameters" in capsys.readouterr().out
    assert panel.settings == Settings("ci")
