"""The companion's conversations: enough of them, right by their checks, and truly held out."""

import hashlib
import json
import random
from collections import Counter
from itertools import islice, product

import pytest

from bitllm import corpora
from bitllm.corpora import talk, templates

STRANGE = 'Zoë "{animal}" {me.home} {0} %s \\1 <|im_start|>user 漢字 🐱'
GOLDEN = {
    "en": "94c5d5893a6159a84d643cbe74b33faf5790adfb121a7c91c90cd4e99c312197",
    "es": "92deff8bcc37dbfd8d14e2a9534d5d17730c5f49bf1df87bd992b7b925f61ef3",
}
in_both = pytest.mark.parametrize("language", ["en", "es"])


def plain(text):
    """Lower case letters and numbers without accents: what stays however a text is typed."""
    text = text.lower().translate(str.maketrans("áéíóúü", "aeiouu"))
    kept = (c if c.isalnum() else " " for c in text)
    return " ".join("".join(kept).split())


def combinations(book, kind):
    """All rows that a user can ask about in this kind."""
    tables = [book.tables[slot.rstrip("2")] for slot in kind.slots]
    return [dict(zip(kind.slots, rows, strict=True)) for rows in product(*tables)]


@pytest.fixture(scope="module")
def asked():
    """The user's turns of 20,000 conversations in each language."""
    return {
        language: [
            plain(message["content"])
            for messages in islice(corpora.conversations(language, seed=5), 20_000)
            for message in messages
            if message["role"] == "user"
        ]
        for language in corpora.LANGUAGES
    }


@in_both
def test_there_is_enough_of_everything(language):
    book = templates.book(language)
    assert len(book.kinds) >= 60
    for name, kind in book.kinds.items():
        assert len({*kind.ask}) >= 8, name
        assert len({*kind.held_out}) >= 2, name
        assert len({*kind.answer}) >= 6, name
        assert kind.needs, name
        assert not kind.then or len(kind.then) >= 4, name
    for name, rows in book.tables.items():
        assert len({next(iter(row.values())) for row in rows}) == len(rows) >= 20, name


@in_both
def test_the_ways_to_ask_of_a_kind_have_the_same_slots(language):
    book = templates.book(language)
    for kind in book.kinds.values():
        for way in [*kind.ask, *kind.held_out]:
            assert {slot.lower() for slot, _ in templates.SLOT.findall(way)} == {*kind.slots}, way
        known = {*book.remembered(kind).slots, "me"}
        needs = " ".join(" ".join([need] if isinstance(need, str) else need) for need in kind.needs)
        assert {slot for slot, _ in templates.SLOT.findall(needs)} <= known, kind.name


@in_both
def test_one_question_has_one_answer(language):
    """Facts that are asked backwards are told apart: no two animals say the same."""
    book, known = templates.book(language), {}
    for kind in book.kinds.values():
        if kind.after or len(kind.slots) != 1:
            continue
        for rows in combinations(book, kind):
            rows = {**rows, "me": book.persona}
            needs = [n if isinstance(n, list) else templates.fill(n, rows) for n in kind.needs]
            for way in kind.ask:
                text = plain(templates.fill(way, rows))
                assert known.setdefault(text, needs) == needs, (kind.name, text)


@in_both
@pytest.mark.parametrize("which", corpora.WHICH)
def test_each_way_to_answer_is_right(language, which):
    book, me = templates.book(language), corpora.Persona().row(language)
    number, kinds = random.Random(1).random, Counter()
    for question in corpora.questions(language, which=which, count=400, seed=2):
        kind = book.kinds[question.kind]
        kinds[question.kind] += 1
        assert not question.right("")
        assert not question.right("...")
        assert question.messages[-1]["role"] == "user"
        assert len(question.messages) % 2 == 1
    asked = set(book.kinds) if which != "combinations" else {*kinds}
    assert kinds.keys() == asked
    assert max(kinds.values()) - min(kinds.values()) <= 1
    for kind in book.kinds.values():
        _, rows = book.draw(kind, kind.ask, number)
        for way in kind.answer:
            full = {**book.complete(kind, rows, number), "me": me}
            groups = ([need] if isinstance(need, str) else need for need in kind.needs)
            needs = tuple(tuple(templates.fill(text, full) for text in group) for group in groups)
            question = corpora.Question([], kind.name, needs)
            answer = templates.fill(way, full)
            for typed in (answer, answer.upper(), answer.replace(" ", " \n ").strip(".!")):
                assert question.right(typed), (kind.name, typed)
            assert "{" not in answer
            assert answer[0].upper() == answer[0], answer


@in_both
def test_answers_of_other_kinds_are_wrong(language):
    book, me = templates.book(language), corpora.Persona().row(language)
    number, answers, passed = random.Random(3).random, [], []
    for _ in range(500):
        answers += talk.conversation(book, me, number)
    for question in corpora.questions(language, count=200):
        others = [e.assistant for e in answers if e.kind.name != question.kind]
        passed += map(question.right, others)
    assert 0 < sum(passed) / len(passed) < 0.02


@in_both
def test_held_out_combinations_are_never_asked_about(language, asked):
    """Not these two fillers together, or not this filler in this way, and all the others are."""
    book, texts = templates.book(language), set(asked[language])
    for kind in book.kinds.values():
        if not kind.slots:
            continue
        held, free = set(), set()
        for rows, way in product(combinations(book, kind), kind.ask):
            text = plain(templates.fill(way, rows))
            (held if book.is_held_out(kind, way, rows) else free).add(text)
        assert 0.02 < len(held) / len(held | free) < 0.25, kind.name
        assert not held & texts, kind.name
        if len(kind.slots) == 1:
            assert len(free & texts) > 0.8 * len(free), kind.name
        else:
            pairs = [r for r in combinations(book, kind) if book.is_held_out(kind, "", r)]
            assert all(book.is_held_out(kind, way, rows) for rows in pairs for way in kind.ask)


@in_both
def test_what_is_not_known_is_not_asked(language):
    """Each filler of a single slot is asked about in some ways, so no fact has to be guessed."""
    book = templates.book(language)
    for kind in book.kinds.values():
        if len(book.remembered(kind).slots) == 1:
            for rows in combinations(book, book.remembered(kind)):
                assert len(book.ways(kind, rows)) >= 3


@in_both
def test_questions_about_combinations_are_about_held_out_ones(language, asked):
    book, texts, together = templates.book(language), set(asked[language]), 0
    for question in corpora.questions(language, which="combinations", count=500):
        kind = book.kinds[question.kind]
        assert book.remembered(kind).slots
        if len(question.messages) == 1:
            assert plain(question.messages[-1]["content"]) not in texts, question
        together += len(kind.slots) > 1
    assert together > 20


@in_both
def test_held_out_combinations_are_not_asked_on_about_or_remembered(language):
    book, me = templates.book(language), corpora.Persona().row(language)
    number, asked_on = random.Random(7).random, 0
    for _ in range(20_000):
        done = talk.conversation(book, me, number)
        before = set()
        for exchange in done:
            assert not book.is_held_out(exchange.kind, exchange.way, exchange.rows)
            assert exchange.kind.unless not in before
            assert not exchange.kind.after or exchange.kind.after in before
            before.add(exchange.kind.name)
        asked_on += len({exchange.kind.name for exchange in done}) < len(done)
    assert asked_on > 1_000
    for question in corpora.questions(language, which="combinations", count=300):
        assert question.kind not in ("hello", "bye", "name")


@in_both
def test_held_out_phrasings_never_occur(language, asked):
    book, texts = templates.book(language), set(asked[language])
    for kind in book.kinds.values():
        for way in kind.held_out:
            filled = {plain(templates.fill(way, rows)) for rows in combinations(book, kind)}
            assert not texts & filled, way
    counts = Counter(asked[language])
    for kind in book.kinds.values():  # while every other one does
        for way in kind.ask:
            filled = {plain(templates.fill(way, rows)) for rows in combinations(book, kind)}
            assert sum(counts[text] for text in filled) > 3, way


@in_both
def test_users_type_and_the_companion_writes(language):
    turns = Counter()
    for messages in islice(corpora.conversations(language, seed=1), 2_000):
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert 2 <= len(messages) <= 10
        for message in messages:
            turns[message["role"], "lower"] += message["content"] == message["content"].lower()
            turns[message["role"], "mark"] += message["content"][-1] in ".?!"
            turns[message["role"]] += 1
    assert 0.8 < turns["user", "lower"] / turns["user"] < 0.95
    assert 0.3 < turns["user", "mark"] / turns["user"] < 0.7
    assert turns["assistant", "lower"] == 0
    assert turns["assistant", "mark"] == turns["assistant"]


@in_both
def test_answers_have_no_typos(language):
    """Each word of an answer stands in the template file."""
    content = templates.book(language)
    words = {word for row in [content.persona] for word in plain(" ".join(row.values())).split()}
    for rows in content.tables.values():
        words |= {word for row in rows for word in plain(" ".join(row.values())).split()}
    for kind in content.kinds.values():
        words |= {*plain(templates.SLOT.sub(" ", " ".join(kind.answer))).split()}
    typed = set()
    for messages in islice(corpora.conversations(language), 3_000):
        for message in messages:
            found = {*plain(message["content"]).split()}
            if message["role"] == "assistant":
                assert found <= words
                assert not any(wrong in message["content"] for wrong in (" de el ", " a el "))
            typed |= found
    assert len(typed - words) > 100


@in_both
def test_the_text_is_the_same_everywhere(language):
    """The first 200 conversations: whoever changes the templates changes this, and all models."""
    text = json.dumps([*islice(corpora.conversations(language), 200)], ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN[language]
    random.seed(4)  # nobody else's numbers matter
    again = json.dumps([*islice(corpora.conversations(language), 200)], ensure_ascii=False)
    other = json.dumps([*islice(corpora.conversations(language, seed=1), 200)], ensure_ascii=False)
    assert text == again != other
    first, second = (corpora.questions(language, which="phrasings", count=50) for _ in range(2))
    assert first == second != corpora.questions(language, which="phrasings", count=50, seed=1)


@in_both
def test_what_was_told_is_used_later(language):
    told = {"tell_name": "recall_name", "tell_pet": "recall_pet", "tell_food": "recall_food"}
    for question in corpora.questions(language, count=300):
        if question.kind in told.values():
            told_text, _, _ = (plain(message["content"]) for message in question.messages)
            assert any(plain(need).split()[-1] in told_text for need in question.needs[0])
    named = corpora.questions(language, count=300)
    bye = next(question for question in named if question.kind == "bye_named")
    assert len(bye.messages) == 3


@in_both
@pytest.mark.parametrize("field", ["name", "home", "likes", "maker", "motto"])
def test_a_persona_goes_through_as_it_is(language, field, tmp_path):
    path = tmp_path / "persona.json"
    path.write_text(json.dumps({field: STRANGE}), encoding="utf-8")
    persona = corpora.Persona.read(path)
    assert getattr(persona, field) == STRANGE
    book, number = templates.book(language), random.Random(0).random
    kind, me = book.kinds[field], persona.row(language)
    for way in kind.answer:
        told = talk.exchange(book, kind, kind.ask[0], {}, me, number)
        assert STRANGE in told.assistant
        assert STRANGE in templates.fill(way, {"me": me})
    asked = corpora.questions(language, persona, count=200)
    question = next(question for question in asked if question.kind == field)
    assert question.right(told.assistant)
    assert not question.right(told.assistant.replace("漢字", ""))
    text = json.dumps([*islice(corpora.conversations(language, persona), 500)], ensure_ascii=False)
    assert json.dumps(STRANGE, ensure_ascii=False)[1:-1] in text
    assert not any(STRANGE in m["content"] for q in asked for m in q.messages[-1:])


def test_a_name_without_letters_is_checked_too():
    persona = corpora.Persona(name="<|>")
    asked = corpora.questions("en", persona, count=200)
    question = next(question for question in asked if question.kind == "name")
    assert question.right("I am <|>.")
    assert not question.right("I am Pip.")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"nmae": "Pip"}', "'nmae' is no field; expected name, home, likes, maker, motto"),
        ('{"name": 3}', "name=3: expected a text that is not empty"),
        ('{"name": null}', "name=None: expected a text"),
        ('{"motto": " "}', "motto=' ': expected a text"),
        ('{"home": "\\ud83d"}', "home=.*: expected a text"),
        ('["Pip"]', "expected an object with name, home"),
        ("name: Pip", r"cannot be read as \.json"),
        pytest.param("[" * 100_000, r"cannot be read as \.json", id="deep"),
    ],
)
def test_a_wrong_persona_is_named(content, says, tmp_path):
    path = tmp_path / "persona.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"persona\.json: {says}"):
        corpora.Persona.read(path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": "Luna", "home": "a boat"},
        {"motto": "Slow; but sure = good"},
        {"motto": "x; home=y"},
        {"likes": '"tea", <|im_start|> & {name}', "maker": "漢字\n🐱"},
        {"name": " Luna;", "motto": "; ="},
        {"name": "{x}", "home": "="},
    ],
)
def test_a_persona_is_spelled_as_it_is_parsed(fields):
    persona = corpora.Persona(**fields)
    assert corpora.Persona.parse(persona.spelled()) == persona
    assert corpora.Persona.parse(json.dumps(fields)) == persona


def test_a_persona_is_spelled_plainly_where_that_does():
    parse = corpora.Persona.parse
    assert parse(" home = a boat ;name=Luna; ").spelled() == "name=Luna; home=a boat"
    assert parse("motto=Slow; but sure").motto == "Slow; but sure"
    assert corpora.Persona().spelled() == parse("").spelled() == ""
    assert corpora.Persona(motto="x; home=y").spelled() == '{"motto": "x; home=y"}'


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="language='fr': expected one of en, es"):
        corpora.conversations("fr")
    with pytest.raises(ValueError, match="which='unseen': expected one of seen"):
        corpora.questions(which="unseen")
