"""Language models as agents: batches, retries, seeds, scoring, endpoints, whole games."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tenfold.errors import CapabilityError, ConfigError, RunFailed, TenfoldWarning
from tenfold_byzantine.contracts import Policy
from tenfold_byzantine.engine import Game
from tenfold_byzantine.language import LanguagePolicy, LanguageSettings, from_group
from tenfold_byzantine.language.wording import wording
from tenfold_byzantine.play import play, play_many, players
from tenfold_byzantine.policies.registry import with_filter
from tenfold_byzantine.rules import GameConfig, Group

sys.path.insert(0, str(Path(__file__).parent))
from language_cases import GOOD, SHORT, Scripted, Server, chat, rules, tiny_lm, view

VIEWS = [view(agent=i) for i in range(3)]
VOTES = [view(agent=i, phase="vote") for i in range(3)]


def untimed(answers):
    """Answers without what depends on the clock."""
    return [
        replace(a, attempts=tuple(replace(t, seconds=0.0) for t in a.attempts)) for a in answers
    ]


# --- Batches and retries, on a scripted model ---------------------------------------------------


def test_all_agents_are_asked_in_one_call_and_mixed_roles_in_two():
    model = Scripted(lambda prompt, seed: GOOD)
    policy = LanguagePolicy(model)
    assert isinstance(policy, Policy)
    policy.decide_many(VIEWS * 5)
    assert [len(prompts) for prompts, _ in model.calls] == [15]
    model.calls.clear()
    mixed = [*VIEWS, view(agent=3, role="byzantine"), view(agent=0)]
    answers = policy.decide_many(mixed)
    assert [len(prompts) for prompts, _ in model.calls] == [4, 1]
    assert [a.value for a in answers] == [7] * 5
    config = model.calls[0][1]
    assert (config.temperature, config.max_new_tokens, config.constraint) == (0.5, 300, None)
    assert answers[0].note == "stay calm"
    assert answers[0].attempts[0].tokens == 3
    assert policy.decide_many([]) == []


def test_only_rejected_answers_are_asked_again_with_the_reason():
    def answer(prompt, seed):
        asked = prompt[1]["content"]
        if "agent_1 " in prompt[0]["content"] or "agent_1," in prompt[0]["content"]:
            return GOOD if "no JSON object" in asked else "I think seven"
        return GOOD

    model = Scripted(answer)
    policy = LanguagePolicy(model, LanguageSettings(same_temperature=False))
    answers = policy.decide_many(VIEWS)
    assert [len(prompts) for prompts, _ in model.calls] == [3, 1]
    assert [config.temperature for _, config in model.calls] == [0.5, 0.8]
    assert [len(a.attempts) for a in answers] == [1, 2, 1]
    first, second = answers[1].attempts
    assert (first.rejected, second.rejected) == ("no JSON object", "")
    assert first.text == "I think seven"
    assert second.user.startswith(first.user)
    assert "previous answer was invalid (no JSON object)" in second.user
    model.calls.clear()
    LanguagePolicy(model).decide_many(VIEWS)
    assert [config.temperature for _, config in model.calls] == [0.5, 0.5]


def test_after_the_last_attempt_an_agent_abstains_or_continues():
    policy = LanguagePolicy(Scripted(lambda prompt, seed: "no"), LanguageSettings(attempts=2))
    [proposal] = policy.decide_many(VIEWS[:1])
    assert (proposal.value, proposal.forced, len(proposal.attempts)) == (None, True, 2)
    [ballot] = policy.vote_many(VOTES[:1])
    assert (ballot.vote, ballot.forced, len(ballot.attempts)) == ("continue", True, 2)


def test_values_outside_the_range_are_clamped_and_told():
    policy = LanguagePolicy(Scripted(lambda prompt, seed: {**GOOD, "value": 99}))
    [proposal] = policy.decide_many(VIEWS[:1])
    assert (proposal.value, proposal.clamped, proposal.forced) == (50, True, False)


def test_an_answer_is_a_function_of_its_view_alone():
    """Equal prompts in different games are drawn apart; batches change nothing."""

    def answer(prompt, seed):
        return {**GOOD, "value": seed % 51} if seed % 3 else "nonsense"

    policy = LanguagePolicy(Scripted(answer))
    views = [replace(v, key=f"game{g}-{v.agent}") for g in range(6) for v in VIEWS]
    together = untimed(policy.decide_many(views))
    assert together == [untimed(policy.decide_many([v]))[0] for v in views]
    assert together == untimed(policy.decide_many(views[::-1]))[::-1]
    assert len({a.value for a in together}) > 5
    assert max(len(a.attempts) for a in together) > 1


def test_the_identity_follows_model_prompts_and_settings():
    model = Scripted(lambda prompt, seed: GOOD)
    base = LanguagePolicy(model)
    other = LanguagePolicy(model, LanguageSettings(temperature={"decide": 1.0, "vote": 0.3}))
    assert base.identity == LanguagePolicy(model).identity != other.identity
    assert base.label == "llm"
    assert base.prompt_hash == wording().hash


def test_settings_come_from_game_files():
    group = Group(
        1, awareness="detailed", retries={"attempts": 5, "same_temperature": False},
        temperature={"decide": 0.1, "vote": 0.2}, context=SHORT,
    )  # fmt: skip
    policy = from_group(Scripted(lambda prompt, seed: GOOD), group, "honest")
    settings = policy.settings
    assert (settings.attempts, settings.same_temperature) == (5, False)
    assert (settings.awareness, settings.context) == ("detailed", SHORT)
    [proposal] = policy.decide_many(VIEWS[:1])
    assert "WARNING" in proposal.attempts[0].system
    assert "Round 1" not in proposal.attempts[0].user


def test_models_that_cannot_are_refused():
    with pytest.raises(CapabilityError, match="cannot generate"):
        LanguagePolicy(object())
    with pytest.raises(CapabilityError, match="cannot score"):
        LanguagePolicy(Scripted(lambda p, s: GOOD), LanguageSettings(vote_mode="score"))


def test_games_of_scripted_answers_end_as_they_should():
    """Everybody says 7, which nobody began with, and votes stop: fabricated."""

    def answer(prompt, seed):
        return {"decision": "stop"} if "time to vote" in prompt[0]["content"] else GOOD

    config = GameConfig(n_honest=4, n_byzantine=0, seed=5, max_rounds=5)
    result = play(config, honest=LanguagePolicy(Scripted(answer)))
    assert 7 not in result.initial
    assert (result.rounds, result.outcome) == (1, "INVALID.fabricated")
    assert result.counters["calls"] == 8
    filtered = with_filter(LanguagePolicy(Scripted(answer)), "wmsr:F=1")
    assert play(config, honest=filtered).outcome == "INVALID.fabricated"


# --- A real network -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def short(**changes):
    given = {"context": SHORT, "max_new_tokens": {"decide": 70, "vote": 30}}
    return LanguageSettings(**{**given, **changes})


def counting(model):
    passes = []
    return passes, model.model.register_forward_pre_hook(lambda *_: passes.append(1))


def test_a_local_model_always_answers_in_its_schema(lm):
    policy = LanguagePolicy(lm, short(temperature={"decide": 2.0, "vote": 2.0}))
    views = [*VIEWS, view(agent=3, role="byzantine")]
    values = set()
    for proposal in policy.decide_many(views):
        for attempt in proposal.attempts:
            assert list(attempt.parsed)[:2] == ["internal_strategy", "value"]
            assert attempt.prompt_tokens > 300
            assert attempt.tokens <= 70
        values.add(proposal.value)
    assert len(values) > 1
    for ballot in policy.vote_many([*VOTES, view(agent=3, phase="vote", role="byzantine")]):
        assert len(ballot.attempts) == 1
        assert not ballot.forced


def test_batches_change_no_answer(lm):
    policy = LanguagePolicy(lm, short())
    together = untimed(policy.decide_many(VIEWS))
    assert together == [untimed(policy.decide_many([v]))[0] for v in VIEWS]
    assert untimed(policy.decide_many(VIEWS)) == together


def test_agents_together_need_n_fold_fewer_passes_than_one_by_one(lm):
    """Against `transformers.generate` for each agent, as the published code falls back to."""
    views = [replace(v, key=f"{g}{v.key}") for g in range(3) for v in VIEWS]
    policy = LanguagePolicy(lm, short(attempts=1))
    passes, handle = counting(lm)
    try:
        policy.decide_many(views)
        together = len(passes)
        passes.clear()
        lm.jump_forward = False
        for one in views:
            policy.decide_many([one])
        apart = len(passes)
        passes.clear()
        lm.jump_forward = True
        policy.vote_many([replace(v, phase="vote") for v in views])
        votes = len(passes)
    finally:
        handle.remove()
        lm.jump_forward = True
    assert apart >= len(views) * together * 0.9
    assert votes <= 4  # one for shared beginnings, and the letters that differ


def test_scored_votes_are_the_models_own_probabilities(lm):
    policy = LanguagePolicy(lm, short(vote_mode="score", temperature={"decide": 1, "vote": 1}))
    ballots = policy.vote_many([replace(VOTES[0], key=f"g{i}") for i in range(300)])
    attempt = ballots[0].attempts[0]
    prompt = lm.encode(
        lm.render_chat(
            [
                {"role": "system", "content": attempt.system},
                {"role": "user", "content": attempt.user},
            ]
        )
    )
    totals = {
        option: lm.score([(prompt, f'{{"decision": "{option}"}}')])[0].total
        for option in ("stop", "continue")
    }
    chance = 1 / (1 + math.exp(totals["continue"] - totals["stop"]))
    assert attempt.scores["stop"] == pytest.approx(chance, rel=1e-4)
    assert sum(attempt.scores.values()) == pytest.approx(1)
    assert attempt.parsed == {"decision": ballots[0].vote}
    seen = Counter(ballot.vote for ballot in ballots)["stop"] / 300
    assert abs(seen - chance) < 4 * math.sqrt(chance * (1 - chance) / 300) + 1e-9
    greedy = LanguagePolicy(lm, short(vote_mode="score", temperature={"decide": 0, "vote": 0}))
    [ballot] = greedy.vote_many(VOTES[:1])
    assert ballot.vote == ("stop" if chance > 0.5 else "continue")


def test_a_context_too_small_is_told_with_the_count_before_any_call():
    model = tiny_lm(context=1024)
    model.model.forward = None  # nothing may be computed
    policy = LanguagePolicy(model)
    with pytest.raises(
        ConfigError, match=r"with 16 agents a honest agent's decide prompt has about \d{4,} tokens"
    ):
        policy.check(rules(agents=16))
    with pytest.raises(ConfigError, match=r"a prompt of \d+ tokens and an answer of up to 300"):
        policy.decide_many([view(notes=[(1, "much to say " * 60)] * 5)])
    LanguagePolicy(tiny_lm(context=32768)).check(rules())


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.content }}]{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        (TEMPLATE, "<system>You are", "<assistant><think></think>"),
        (NO_SYSTEM, "[You are", "]"),
        (None, "system: You are", "assistant:"),
    ],
)
def test_prompts_go_through_the_models_own_template(template, start, end):
    model = tiny_lm()
    model.tokenizer.chat_template = template
    seen = []
    write = model.generate
    model.generate = lambda prompts, config: seen.extend(prompts) or write(prompts, config)
    LanguagePolicy(model, short()).vote_many(VOTES[:1])
    text = model.decode(seen[0])
    assert text.startswith(start)
    assert text.endswith(end)
    assert "Round 3 of 9" in text


# --- An endpoint ----------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    pytest.importorskip("httpx2")
    from tenfold.builtin.openai import OpenAI

    servers = []

    def make(answer, **settings):
        servers.append(Server(answer))
        quick = {"model": "m", "base_url": servers[-1].url, "backoff_s": 0.01, "retries": 3}
        return OpenAI(**{**quick, **settings}), servers[-1]

    yield make
    for server in servers:
        server.close()


def test_endpoints_get_messages_schemas_without_bounds_and_seeds_of_their_own(endpoint):
    model, server = endpoint(lambda body, number: (200, chat(GOOD)))
    views = [replace(v, key=f"{g}-{v.key}") for g in range(2) for v in VIEWS]
    answers = LanguagePolicy(model).decide_many(views)
    assert [a.value for a in answers] == [7] * 6
    assert (answers[0].attempts[0].tokens, answers[0].attempts[0].prompt_tokens) == (5, 12)
    body = server.bodies[0]
    sent = body["response_format"]["json_schema"]["schema"]
    assert "maxLength" not in json.dumps(sent)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert (body["temperature"], body["max_tokens"]) == (0.5, 300)
    assert len({body["seed"] for body in server.bodies}) == 6
    again, second = endpoint(lambda body, number: (200, chat(GOOD)))
    LanguagePolicy(again).decide_many(views)
    assert sorted(b["seed"] for b in second.bodies) == sorted(b["seed"] for b in server.bodies)


@pytest.mark.parametrize("trouble", [(429, {}), (500, {}), (200, b'{"choices": [')])
def test_passing_trouble_of_an_endpoint_is_waited_out(endpoint, trouble):
    model, server = endpoint(lambda body, number: trouble if number == 1 else (200, chat(GOOD)))
    [proposal] = LanguagePolicy(model).decide_many(VIEWS[:1])
    assert (proposal.value, len(proposal.attempts), len(server.bodies)) == (7, 1, 2)


def test_slow_answers_time_out_and_are_asked_again(endpoint):
    def answer(body, number):
        time.sleep(0.6 if number == 1 else 0)
        return 200, chat(GOOD)

    model, server = endpoint(answer, timeout_s=0.2)
    [proposal] = LanguagePolicy(model).decide_many(VIEWS[:1])
    assert (proposal.value, len(server.bodies)) == (7, 2)


def test_trouble_that_stays_is_an_error_of_the_backend(endpoint):
    model, _ = endpoint(lambda body, number: (500, {}), retries=1)
    with pytest.raises(RunFailed):
        LanguagePolicy(model).decide_many(VIEWS[:1])
    config = GameConfig(n_honest=3, seed=1)
    game = Game(config, players(config, LanguagePolicy(model)))
    [result] = play_many([game])
    assert result.outcome == "ERROR.backend"
    assert "RunFailed" in result.error


def refuses_schemas(body, number):
    if "response_format" in body:
        return 400, {"error": {"message": "response_format json_schema is not supported"}}
    return 200, chat("Here you are: " + json.dumps(GOOD))


def ignores_schemas(body, number):
    return 200, chat("Here you are: " + json.dumps(GOOD))


@pytest.mark.parametrize("answer", [refuses_schemas, ignores_schemas])
def test_endpoints_without_schemas_are_read_from_free_text(endpoint, answer):
    model, server = endpoint(answer)
    policy = LanguagePolicy(model)
    with pytest.warns(TenfoldWarning, match="answers are read from free text"):
        answers = policy.decide_many(VIEWS)
    assert [a.value for a in answers] == [7] * 3
    before = len(server.bodies)
    policy.decide_many(VIEWS)
    assert len(server.bodies) == before + 3
    assert "response_format" not in server.bodies[-1]


def test_half_json_is_rejected_and_asked_again(endpoint):
    half = json.dumps(GOOD)[:30]

    def answer(body, number):
        return 200, chat(half if "invalid" not in body["messages"][1]["content"] else GOOD)

    model, _ = endpoint(answer)
    policy = LanguagePolicy(model)
    policy._asker.constrains = False
    [proposal] = policy.decide_many(VIEWS[:1])
    assert (proposal.value, len(proposal.attempts)) == (7, 2)


# --- The core's trivial models ----------------------------------------------------------------


def test_echo_and_replay_play_too(tmp_path):
    from tenfold.builtin.echo import Echo
    from tenfold.builtin.replay import Replay

    [proposal] = LanguagePolicy(Echo(json.dumps(GOOD))).decide_many(VIEWS[:1])
    assert proposal.value == 7
    attempt = proposal.attempts[0]
    prompt = [
        {"role": "system", "content": attempt.system}, {"role": "user", "content": attempt.user},
    ]  # fmt: skip
    record = tmp_path / "answers.jsonl"
    row = {"prompt": prompt, "completion": json.dumps({**GOOD, "value": 11})}
    record.write_text(json.dumps(row) + "\n", encoding="utf-8")
    [replayed] = LanguagePolicy(Replay(path=record)).decide_many(VIEWS[:1])
    assert replayed.value == 11


def test_whole_games_repeat_exactly(lm):
    config = GameConfig(n_honest=2, n_byzantine=1, max_rounds=2, seed=3)
    results = [
        play(config, honest=LanguagePolicy(lm, short()), byzantine="mimic") for _ in range(2)
    ]
    assert results[0].state_hash == results[1].state_hash
    assert results[0].counters["calls"] >= 2 * 2 * results[0].rounds
