"""Settings: quota arithmetic, files, and what is wrong with bad ones (spec, 2.3, 6.7, A)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from tenfold.errors import ConfigError, TenfoldWarning
from tenfold_byzantine.rules import Context, GameConfig, Group, Threat, stop_quota

TABLE = {4: 3, 8: 6, 9: 6, 10: 7, 11: 8, 12: 8, 16: 11}


@pytest.mark.parametrize(("agents", "quota"), TABLE.items())
def test_quota_of_two_thirds_is_the_papers_table(agents, quota):
    assert stop_quota("2/3", agents) == quota


@pytest.mark.parametrize(
    ("agents", "thirds", "decimal"), [(50, 34, 33), (53, 36, 35), (56, 38, 37), (59, 40, 39)]
)
def test_66_percent_and_two_thirds_differ_from_fifty_agents_on(agents, thirds, decimal):
    assert stop_quota("2/3", agents) == thirds
    assert stop_quota(0.66, agents) == stop_quota("0.66", agents) == decimal


def test_66_percent_and_two_thirds_agree_below_fifty_agents():
    assert all(stop_quota("2/3", n) == stop_quota(0.66, n) for n in range(1, 50))


def test_quota_is_the_smallest_count_that_reaches_the_share():
    for agents in range(1, 61):
        for share in (Fraction(1, 2), Fraction(2, 3), Fraction(3, 5), Fraction(1), Fraction(1, 7)):
            least = next(k for k in range(agents + 1) if Fraction(k, agents) >= share)
            assert stop_quota(str(share), agents) == least == math.ceil(share * agents)


def test_a_whole_number_is_a_count_of_votes():
    assert stop_quota(1, 8) == 1
    assert stop_quota(8, 8) == 8
    assert stop_quota(1.0, 8) == 8


@pytest.mark.parametrize("quota", [0, 9, -1, 0.0, 1.5, "4/3", "x", "1/0", None, True, [2, 3]])
def test_an_impossible_quota_is_refused(quota):
    with pytest.raises(ConfigError, match="quota"):
        GameConfig(n_honest=8, quota=quota)


FILE = """
[game]
n_honest = 8
n_byzantine = 2
value_range = [0, 50]
max_rounds = 50
quota = "2/3"                 # "2/3" exact rational, or a float, or an integer count
awareness = "may_exist"       # may_exist | none_exist | minimal | standard | detailed
topology = { kind = "complete" }
links = { delay = 0, loss = 0.0 }
threat = { equivocate = false, rushing = false, collude = false }
abstain = "silent"
seed = 7

[honest]
use = "llm"                   # or "low-median", "dlpsw:f=2", "mixed"
filter = "none"               # e.g. "wmsr:F=1"
temperature = { decide = 0.5, vote = 0.3 }
max_new_tokens = { decide = 300, vote = 200 }
retries = { attempts = 3, same_temperature = true }

[honest.context]              # same table allowed under [byzantine]
history_rounds = 3
stored_rounds = 15
notes = 5
note_chars = 400
line_chars = 50
listing_chars = 200
message_chars = 500
history_order = "newest_first"
history_includes_current = false

[byzantine]
use = "llm"                   # or "collude:v=25", "mimic", ...

[backend]
use = "transformers"          # transformers | openai | replay | fake | host:<component>
model = "path-or-name"
dtype = "auto"
device = "auto"
"""


def read(tmp_path, text):
    path = tmp_path / "game.toml"
    path.write_text(text, encoding="utf-8")
    return GameConfig.from_toml(path)


def test_the_specs_game_file_reads_as_the_defaults(tmp_path):
    config = read(tmp_path, FILE)
    assert config == GameConfig(
        n_honest=8,
        n_byzantine=2,
        seed=7,
        backend={"use": "transformers", "model": "path-or-name", "dtype": "auto", "device": "auto"},
    )
    assert config.honest == (Group(8),)
    assert config.byzantine == (Group(2),)
    assert config.contexts("honest") == [Context()] * 8
    rules = config.rules
    assert (rules.agents, rules.quota, rules.faults, rules.complete) == (10, 7, 2, True)


def test_settings_survive_the_way_through_a_table():
    config = GameConfig(
        n_honest=5,
        n_byzantine=1,
        quota=0.8,
        topology="ring:k=2",
        threat=Threat(equivocate=True),
        initial_values=(1, 2, 3, 4, 5),
        honest=(Group(2, "mode-min"), Group(3, context=Context(notes=2))),
    )
    again = GameConfig.from_table(config.to_table())
    assert again == config
    assert again.canonical == config.canonical


def test_the_canonical_form_leaves_out_the_seed_only():
    config = GameConfig(seed=1)
    assert config.canonical == config.with_seed(2).canonical
    assert config.canonical != GameConfig(seed=1, max_rounds=49).canonical


def test_mixed_groups_inherit_their_sides_settings(tmp_path):
    text = """
    [game]
    n_honest = 5
    [honest]
    use = "mixed"
    temperature = { decide = 0.9 }
    [[honest.group]]
    count = 2
    use = "low-median"
    [[honest.group]]
    count = 3
    use = "llm"
    temperature = { decide = 0.1, vote = 0.2 }
    backend = { use = "openai" }
    """
    first, second = read(tmp_path, text).honest
    assert (first.count, first.use, first.temperature) == (
        2,
        "low-median",
        {"decide": 0.9, "vote": 0.3},
    )
    assert (second.count, second.temperature) == (3, {"decide": 0.1, "vote": 0.2})
    assert second.backend == {"use": "openai"}


BAD = [
    ("[game]\nn_honest = 0", "n_honest is 0; it must be at least 1"),
    ("[game]\nn_byzantine = -1", "n_byzantine is -1"),
    ("[game]\nn_honest = 2.5", "n_honest is 2.5; it must be a whole number"),
    ("[game]\nvalue_range = [5, 4]", "value_range is \\[5, 4\\], which is empty"),
    ("[game]\nvalue_range = [5]", "two whole numbers"),
    ("[game]\nmax_rounds = 0", "max_rounds is 0"),
    ('[game]\nawareness = "may_exists"', "did you mean 'may_exist'"),
    ("[game]\nn_onest = 3", "game.n_onest is not a setting; did you mean 'n_honest'"),
    ('[game]\ntopology = { kind = "rign" }', "did you mean 'ring'"),
    ('[game]\ntopology = { kind = "ring", q = 2 }', "no parameter 'q'"),
    ("[game]\nlinks = { loss = 1.5 }", "links.loss is 1.5"),
    ('[game]\nlinks = { delay = "sometimes" }', "links.delay is 'sometimes'"),
    ("[game]\nthreat = { rushed = true }", "threat.rushed is not a setting; did you mean"),
    ("[game]\nthreat = { rushing = 1 }", "must be true or false"),
    ('[game]\nabstain = "loud"', "abstain is 'loud'"),
    ("[game]\nseed = true", "seed is True"),
    ('[honest]\nuse = "mixed"', "has no \\[\\[honest.group\\]\\]"),
    ("[[honest.group]]\ncount = 3", "= 3 agents, but n_honest is 8"),
    ("[[honest.group]]\nuse = 'llm'", "has no count"),
    ("[honest.context]\nnote_char = 3", "did you mean 'note_chars'"),
    ("[honest.context]\nnotes = -1", "notes is -1"),
    ("[honest.context]\nhistory_includes_current = 1", "history_includes_current is 1"),
    ("[honest]\ntemperature = { vote = -1 }", "honest: temperature.vote is -1"),
    ("[honest]\nmax_new_tokens = { vote = 0 }", "honest: max_new_tokens.vote is 0"),
    ("[honest]\nretries = { attempts = 0 }", "honest: retries.attempts is 0"),
    ('[honest]\nretries = { same_temperature = "no" }', "retries.same_temperature is 'no'"),
    ('[honest.context]\nhistory_order = "random"', "history_order"),
    ("[honest]\ntemperature = { decde = 1 }", "did you mean 'decide'"),
    ('[honest]\nvote_mode = "guess"', "vote_mode"),
    ("[game]\ninitial_values = [1, 2]", "has 2 values, but n_honest is 8"),
    ("[game]\nn_honest = 1\ninitial_values = [99]", "outside of value_range"),
    ("[game]\nbyzantine_agents = [1]", "must name 0 different"),
    ("[thresholds]\nnear = '3/2'", "thresholds.near"),
    ("[thresholds]\nwindow = 0", "thresholds.window"),
    ("[gmae]\nn_honest = 3", "gmae is not a setting; did you mean 'game'"),
    ("game = 3", "must be a table"),
    ("[stop]\nmax_games_per_cell = 3", "stop is not a setting"),
    ("[game", "not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_setting_is_named_with_its_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    assert "game.toml" in str(caught.value)


def test_a_missing_file_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match="there is no game file"):
        GameConfig.from_toml(tmp_path / "none.toml")


def test_more_than_a_third_byzantine_is_a_warning():
    with pytest.warns(TenfoldWarning, match="outside the paper's f <= 1/3"):
        GameConfig(n_honest=4, n_byzantine=3)
