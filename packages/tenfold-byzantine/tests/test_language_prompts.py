"""What language-model agents are told and shown, and what is accepted from them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib import resources
from pathlib import Path

import pytest
from tenfold.errors import ConfigError
from tenfold_byzantine.language import LanguageSettings
from tenfold_byzantine.language import context as shown
from tenfold_byzantine.language.replies import json_object, read, schema
from tenfold_byzantine.language.wording import wording
from tenfold_byzantine.rules import AWARENESS, Context

sys.path.insert(0, str(Path(__file__).parent))
from language_cases import GOOD, rules, said, view

PARTS = wording().table["parts"]
PAPER = Context()


# --- Context ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "chars", "expected"),
    [
        ("x" * 50, 50, "x" * 50),
        ("x" * 51, 50, "x" * 47 + "..."),
        ("two\n lines\t here", 50, "two lines here"),
        ("abc", 2, ".."),
        ("", 50, ""),
    ],
)
def test_long_texts_end_in_dots(text, chars, expected):
    assert shown.cut(text, chars) == expected


def test_history_is_newest_first_with_everybody_in_every_line():
    assert shown.history(view(), PAPER, PARTS).splitlines() == [
        "Round 2: agent_0: 5 (again); agent_1: 5 (moved); agent_2: ABSTAINED; agent_3: ABSTAINED",
        "Round 1: agent_0: 5 (first); agent_1: 8 (mine); agent_2: 5 (" + "x" * 47 + "...); "
        "agent_3: ABSTAINED",
    ]
    append = Context(history_order="append", history_rounds=3)
    lines = shown.history(view(), append, PARTS).splitlines()
    assert lines == shown.history(view(), PAPER, PARTS).splitlines()[::-1]


def test_windows_keep_the_newest():
    narrow = Context(history_rounds=1, notes=1)
    assert shown.history(view(), narrow, PARTS).startswith("Round 2")
    assert "Round 1" not in shown.history(view(), narrow, PARTS)
    assert shown.notes(view(), narrow, PARTS) == "round 2: move to five"
    assert shown.notes(view(), PAPER, PARTS) == "round 1: trust nobody\nround 2: move to five"
    empty = view(history=[], notes=[])
    assert shown.history(empty, PAPER, PARTS) == PARTS["no_history"]
    assert shown.notes(empty, PAPER, PARTS) == PARTS["no_notes"]


def test_the_listing_has_the_own_value_first_and_nobody_who_is_silent():
    inbox = (said(0, 5, "a" * 300), said(1, 6, "own words"), said(3, None, "hm"))
    lines = shown.listing(view(phase="vote", inbox=inbox), PAPER, PARTS).splitlines()
    assert lines == ["agent_1 (you): 6", "agent_0: 5 (" + "a" * 197 + "...)"]
    alone = shown.listing(view(phase="vote", inbox=()), PAPER, PARTS).splitlines()
    assert alone == ["agent_1 (you): ABSTAINED", PARTS["nobody"]]


# --- Prompts --------------------------------------------------------------------------------------


def everything(awareness, **changes):
    """All prompts of an awareness, by (phase, role)."""
    found = {}
    for phase in ("decide", "vote"):
        for role in ("honest", "byzantine"):
            one = view(phase=phase, role=role, **changes)
            found[phase, role] = (wording().system(one, awareness), wording().user(one, PAPER))
    return found


@pytest.mark.parametrize("awareness", AWARENESS)
def test_every_prompt_is_filled_in_and_names_its_agent_and_limits(awareness):
    for (phase, role), (system, user) in everything(awareness).items():
        assert "$" not in system + user
        assert system.startswith("You are agent_1")
        assert "Round 3 of 9" in user
        assert "at least 3 of" in system
        if phase == "decide":
            assert "from 0 to 50" in system
            assert ("initial value is 8" in " ".join(system.split())) == (role == "honest")
        for other in ("agent_0", "agent_2", "agent_3"):
            assert other not in system


def test_presets_say_what_they_should_about_byzantine_agents():
    prompts = {a: everything(a) for a in AWARENESS}

    def system(awareness, phase):
        return " ".join(prompts[awareness][phase, "honest"][0].split())

    for phase in ("decide", "vote"):
        assert re.search("(MAY contain|may be) Byzantine", system("may_exist", phase))
        assert "NO Byzantine agents" in system("none_exist", phase)
        assert "yzantine" not in system("minimal", phase)
    assert "Cooperative Consensus Game" in system("none_exist", "decide")
    assert len(system("minimal", "decide").split()) < 150
    assert 250 < len(system("detailed", "decide").split()) < 450
    for behaviour in ("outliers", "inconsistent", "does not match", "breaks a consensus"):
        assert behaviour in system("detailed", "decide")
    for awareness in AWARENESS:
        assert (
            prompts[awareness]["decide", "byzantine"] == prompts["may_exist"]["decide", "byzantine"]
        )


def test_no_prompt_tells_how_many_liars_there_are_or_who():
    for awareness in AWARENESS:
        told = [everything(awareness, rules=rules(faults=faults)) for faults in (0, 1, 3)]
        assert told[0] == told[1] == told[2]


def test_byzantine_voters_see_no_notes_and_deciders_their_allies():
    assert "trust nobody" not in wording().user(view(phase="vote", role="byzantine"), PAPER)
    assert "trust nobody" in wording().user(view(phase="vote"), PAPER)
    plain = wording().user(view(role="byzantine"), PAPER)
    assert "work together" not in plain
    assert "only you have heard" not in plain
    together = view(
        role="byzantine", allies=(2, 3), ally_notes=((3, 1, "say 25"), (2, 2, "say 26")),
        overheard=(said(0, 9, "nine"),),
    )  # fmt: skip
    text = wording().user(together, PAPER)
    assert "You work together with agent_2, agent_3." in text
    assert "agent_2, round 2: say 26\nagent_3, round 1: say 25" in text
    assert "agent_0: 9 (nine)" in text


def test_what_agents_write_is_never_read_as_a_template():
    said_ = (said(0, 1, "$held ${x} $$ {history}"),)
    text = wording().user(view(phase="vote", inbox=said_, notes=[(1, "$initial")]), PAPER)
    assert "$held ${x} $$ {history}" in text
    assert "$initial" in text


def test_the_shared_order_lets_prompts_begin_alike():
    one, two = view(agent=1), view(agent=2)
    for phase in ("decide", "vote"):
        a, b = (wording().system(view(agent=i, phase=phase), "may_exist", "shared") for i in (1, 2))
        same = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        assert same > 0.6 * len(a)
    paper, shared = (wording().system(one, "may_exist", o) for o in ("paper", "shared"))
    assert sorted(paper.split("\n\n")) == sorted(shared.split("\n\n"))
    assert wording().system(two, "may_exist")[:20] != paper[:20]


def test_the_hash_is_that_of_the_file():
    file = resources.files("tenfold_byzantine.language") / "prompts" / "v1.toml"
    assert wording("v1").hash == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=r"no prompts 'v2'; known: v1"):
        wording("v2")


# --- Answers --------------------------------------------------------------------------------------


def decision(**changes):
    return json.dumps({**GOOD, **changes})


@pytest.mark.parametrize(
    ("text", "value", "clamped"),
    [
        (decision(), 7, False),
        (decision(value=51), 50, True),
        (decision(value=-3), 0, True),
        (decision(value="12"), 12, False),
        (decision(value=12.0), 12, False),
        ("Sure!\n```json\n" + decision(value=9) + "\n```", 9, False),
        ("{not this} " + decision(value=3), 3, False),
    ],
)
def test_decisions_are_read_and_clamped(text, value, clamped):
    for role in ("honest", "byzantine"):
        reply = read(text, "decide", role, rules())
        assert (reply.rejected, reply.value, reply.clamped) == ("", value, clamped)
        assert (reply.note, reply.text) == ("stay calm", "seven looks good to me")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ('{"value": 7, "public_rea', "no JSON object"),
        (decision(value=None), "value is missing, no whole number"),
        (decision(value=7.5), "no whole number"),
        (decision(value=True), "no whole number"),
        (decision(value="seven"), "no whole number"),
        (decision(value=10**30), "no whole number"),
        (decision(internal_strategy="  a  "), "internal_strategy is empty"),
        (decision(internal_strategy=5), "internal_strategy is empty"),
        (decision(public_reasoning=" " * 20 + "short"), "public_reasoning is empty"),
        (decision(value="abstain"), "no whole number"),
    ],
)
def test_other_decisions_are_rejected_with_the_reason(text, reason):
    assert reason in read(text, "decide", "honest", rules()).rejected


def test_byzantine_agents_may_abstain_and_say_nothing():
    quiet = json.dumps({"internal_strategy": "hide well", "value": "abstain"})
    reply = read(quiet, "decide", "byzantine", rules())
    assert (reply.rejected, reply.value, reply.text) == ("", None, "")


@pytest.mark.parametrize(
    ("text", "role", "vote"),
    [
        ('{"decision": "stop"}', "honest", "stop"),
        ('{"decision": " CONTINUE "}', "honest", "continue"),
        ('{"decision": "abstain"}', "byzantine", "abstain"),
        ('{"decision": "abstain"}', "honest", None),
        ('{"decision": 1}', "honest", None),
        ("stop", "honest", None),
    ],
)
def test_votes(text, role, vote):
    reply = read(text, "vote", role, rules())
    assert (reply.rejected == "") == (vote is not None)
    assert vote is None or reply.vote == vote


def test_halves_of_surrogates_can_be_written_to_files():
    parsed = json_object('{"a\\ud800": ["\\udfff", {"b": "\\ud83d\\ude00"}]}')
    assert parsed == {"a?": ["?", {"b": "😀"}]}
    json.dumps(parsed, ensure_ascii=False).encode()
    assert json_object("{" * 5000) is None


@pytest.mark.parametrize("bounds", [True, False])
def test_schemas_name_fields_in_order_and_bounds_only_where_asked(bounds):
    for role in ("honest", "byzantine"):
        table = schema("decide", role, rules(low=-5), bounds=bounds)
        assert list(table["properties"]) == list(GOOD)
        text = json.dumps(table)
        assert all((word in text) == bounds for word in ("minimum", "maxLength", "x-guidance"))
        assert ("abstain" in text) == (role == "byzantine")
        assert ("public_reasoning" in table["required"]) == (role == "honest")
        vote = schema("vote", role, rules(), bounds=bounds)
        options = vote["properties"]["decision"]["enum"]
        assert options == ["stop", "continue"] + ["abstain"] * (role == "byzantine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"awareness": "may_exists"}, "did you mean 'may_exist'"),
        ({"vote_mode": "guess"}, "known: generate, score"),
        ({"prompt_order": "papr"}, "did you mean 'paper'"),
        ({"attempts": 0}, "at least 1"),
        ({"temperature": {"decide": 0.5}}, "has no 'vote'"),
        ({"temperature": {"decide": -1, "vote": 0}}, "decide is -1; it must be 0 or more"),
        ({"max_new_tokens": {"decide": 300, "vote": 0}}, "vote is 0; it must be 1 or more"),
    ],
)
def test_wrong_settings_are_explained(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        LanguageSettings(**changes)
