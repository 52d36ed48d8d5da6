"""Event logs, replay and resume (spec, 6.4, 7.2, Appendix C)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import Rule, finish
from record_cases import CONFIGS, players, record
from tenfold.errors import ConfigError
from tenfold_byzantine.cast import Cast
from tenfold_byzantine.contracts import Attempt, Proposal
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventLog, EventWriter, read_events
from tenfold_byzantine.networks import Links
from tenfold_byzantine.replay import Record, ReplayMismatch, recorded_game, replay, resume
from tenfold_byzantine.rules import GameConfig, Threat


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("keep", ["full", "hash", "none"])
def test_a_replayed_game_equals_its_original(tmp_path, config, keep):
    game, path = record(config, tmp_path, keep)
    result = replay(path)
    original = game.result()
    assert result == replace(original, settings=result.settings)
    assert Record(path).result() == result
    assert [e["state"] for e in read_events(path) if e["event"] == "round_end"] == game.state_hashes
    assert len(set(game.state_hashes)) == len(game.state_hashes)


@pytest.mark.parametrize("config", CONFIGS)
def test_roles_stand_only_at_the_start_and_the_end(tmp_path, config):
    _, path = record(config, tmp_path)
    events = list(read_events(path))
    assert events[0]["event"] == "game_start"
    assert events[-1]["event"] == "game_end"
    assert not any("byzantine" in json.dumps(e) or "roles" in e for e in events[1:-1])


def test_a_changed_answer_is_a_mismatch(tmp_path):
    _, path = record(CONFIGS[0], tmp_path)
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        event = json.loads(line)
        if event["event"] == "proposal" and event["round"] == 2 and event["value"] is not None:
            event["value"] = (event["value"] + 1) % 51
            lines[i] = json.dumps(event)
            break
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ReplayMismatch, match="round 2: held differs"):
        replay(path)


def test_a_changed_text_or_seed_is_a_mismatch(tmp_path):
    _, path = record(CONFIGS[0], tmp_path)
    text = path.read_text()
    path.write_text(text.replace("because of 0 messages", "because of no messages", 1))
    with pytest.raises(ReplayMismatch, match="round 1: state differs"):
        replay(path)
    path.write_text(text.replace('"seed":3,"version"', '"seed":4,"version"', 1))
    with pytest.raises(ReplayMismatch, match="game differs"):
        replay(path)


@pytest.mark.parametrize("number", [1, 5, 20])
def test_a_damaged_line_is_named_by_its_number(tmp_path, number):
    _, path = record(CONFIGS[0], tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = lines[number - 1][:-3]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match=f"line {number}: damaged"):
        replay(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(ConfigError, match="no event file"):
        replay(path)
    path.write_text('{"event": "game_start", "schema": "byz-events/9"}\n')
    with pytest.raises(ConfigError, match="line 1: it must be a game_start of schema"):
        replay(path)
    path.write_text("[1]\n")
    with pytest.raises(ConfigError, match="line 1: not an event"):
        replay(path)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[3]])
def test_a_game_killed_at_any_byte_goes_on_and_ends_the_same(tmp_path, config):
    game, path = record(config, tmp_path)
    data = path.read_bytes()
    cuts = sorted({*range(0, len(data), max(len(data) // 40, 1)), 1, len(data) - 1, len(data)})
    for cut in cuts:
        folder = tmp_path / str(cut)
        folder.mkdir()
        target = folder / path.name
        part = folder / f"{path.name}.part"
        part.write_bytes(data[:cut])
        policies = players(config)
        log = EventLog(folder, game.game_id)
        again = Game(config, policies, log=log)
        taken = resume(again, target)
        assert taken > 0 or cut < len(data)
        asked = sum(policies["honest"].calls) + sum(policies["byzantine"].calls)
        assert asked == 0
        finish(again)
        assert target.read_bytes() == data
        assert not part.exists()


def test_a_resumed_game_asks_only_for_what_was_not_answered(tmp_path):
    config = CONFIGS[0]
    game, path = record(config, tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    upto = next(i for i, e in enumerate(map(json.loads, lines)) if e["event"] == "round_end")
    path.with_name(path.name + ".part").write_bytes(
        b"".join(lines[: upto + 1]) + b'{"event": "prop'
    )
    policies = players(config)
    again = Game(config, policies, log=EventLog(tmp_path, game.game_id))
    assert resume(again, path) == 2
    finish(again)
    asked = sum(policies["honest"].calls) + sum(policies["byzantine"].calls)
    assert asked == 2 * 5 * (game.result().rounds - 1)


def test_a_finished_game_is_taken_from_its_record(tmp_path):
    config = CONFIGS[0]
    game, path = record(config, tmp_path)
    before, policies = path.read_bytes(), players(config)
    again = Game(config, policies, log=EventLog(tmp_path, game.game_id))
    assert resume(again, path) == 2 * game.result().rounds
    assert again.finished
    assert sum(policies["honest"].calls) == 0
    assert path.read_bytes() == before


def test_flushing_a_finished_game_again_changes_nothing(tmp_path):
    config = CONFIGS[0]
    log = EventLog(tmp_path, "again")
    game = Game(config, players(config), log=log)
    finish(game)
    before = log.path.read_bytes()
    log.flush()
    assert log.path.read_bytes() == before
    assert not log.part.exists()


def test_resuming_into_another_games_file_is_refused(tmp_path):
    game, path = record(CONFIGS[0], tmp_path)
    path.rename(path.with_name(path.name + ".part"))
    other = Game(CONFIGS[0].with_seed(99), players(CONFIGS[0]))
    with pytest.raises(ConfigError, match=f"is the record of game {game.game_id}"):
        resume(other, path)


def test_an_unfinished_game_is_not_replayed(tmp_path):
    _, path = record(CONFIGS[0], tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ConfigError, match="not finished"):
        replay(path)


def test_a_game_that_died_replays_to_its_error(tmp_path):
    config = CONFIGS[0]
    game = Game(config, players(config))
    game = Game(config, players(config), log=EventLog(tmp_path, game.game_id))
    for _ in range(3):
        game.submit(
            [[p.decide_many, p.vote_many][game.phase == "vote"](v) for p, v in game.pending()]
        )
    game.fail("OSError: gone")
    path = tmp_path / f"{game.game_id}.jsonl"
    assert replay(path) == replace(game.result(), settings=replay(path).settings)
    assert replay(path).error == "OSError: gone"
    again = Game(config, players(config), log=EventLog(tmp_path, game.game_id))
    assert resume(again, path) == 3
    whole = finish(again).result()
    assert not whole.error
    assert replay(path).state_hash == whole.state_hash


def test_recorded_games_are_played_once(tmp_path):
    config = CONFIGS[0]
    cast = Cast(config, players(config))
    game = recorded_game(cast, 3, tmp_path)
    assert isinstance(game, Game)
    first = finish(game).result()
    assert recorded_game(cast, 3, tmp_path) == replace(first, settings=config.settings)
    path = tmp_path / f"{first.game_id}.jsonl"
    data = path.read_bytes()
    path.rename(path.with_name(path.name + ".part"))
    path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
    again = recorded_game(cast, 3, tmp_path)
    assert isinstance(again, Game)
    assert again.round > 1
    finish(again)
    assert path.read_bytes() == data


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from record_cases import CONFIGS, record
for config in CONFIGS:
    record(config, Path(sys.argv[2]))
"""


def test_two_processes_with_other_hash_seeds_write_the_same_bytes(tmp_path):
    logs = []
    for seed in ("1", "4711"):
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        arguments = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), str(folder)]
        subprocess.run(arguments, env=environment, check=True)
        logs.append({p.name: p.read_bytes() for p in sorted(folder.iterdir())})
    assert len(logs[0]) == len(CONFIGS)
    assert logs[0] == logs[1]


def test_times_stand_apart_and_are_no_part_of_the_state(tmp_path):
    def timed(seconds):
        call = Attempt("s", "u", "t", {}, seconds=seconds)
        return Rule(lambda view: Proposal(1, attempts=(call,)))

    lines, states = [], []
    for seconds in (0.5, 0.75):
        writer = EventWriter()
        game = finish(Game(GameConfig(n_honest=2), {"honest": timed(seconds)}, log=writer))
        events = [json.loads(line) for line in writer.lines]
        taken = [event.pop("timing", None) for event in events]
        assert any(taken)
        lines.append(events)
        states.append(game.result().state_hash)
        assert game.result().timing["decide"] == pytest.approx(2 * seconds)
    assert lines[0] == lines[1]
    assert states[0] == states[1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_replay_equals_the_original_on_random_games(tmp_path_factory, data):
    n_honest = data.draw(st.integers(1, 6))
    config = GameConfig(
        n_honest=n_honest,
        n_byzantine=data.draw(st.integers(0, n_honest // 2)),
        max_rounds=data.draw(st.integers(1, 5)),
        abstain=data.draw(st.sampled_from(["silent", "repeat"])),
        quota=data.draw(st.sampled_from(["2/3", "1", 1, 0.5])),
        topology=data.draw(st.sampled_from(["complete", "ring:k=2", "star", "path"])),
        links=Links(loss=data.draw(st.sampled_from([0.0, 0.3]))),
        schedule=data.draw(st.sampled_from(["synchronous", "fifo", "random", "adversarial"])),
        threat=Threat(collude=data.draw(st.booleans())),
        seed=data.draw(st.integers(0, 2**40)),
    )
    game, path = record(config, tmp_path_factory.mktemp("games"))
    assert replay(path).state_hash == game.result().state_hash
