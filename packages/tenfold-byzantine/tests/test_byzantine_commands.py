"""`tenfold byzantine ...` through the real command line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import tomli_w
from tenfold.cli import main

GAME = {
    "game": {"n_honest": 5, "n_byzantine": 2, "max_rounds": 8, "seed": 3},
    "honest": {"use": "low-median"},
    "byzantine": {"use": "collude:v=25"},
}
SWEEP = {
    "base": "game.toml",
    "replicates": 4,
    "seed": 5,
    "grid": {"game.n_byzantine": [0, 2]},
    "out": {"dir": "out"},
}


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty workspace: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workspace.toml").write_text("")
    (tmp_path / "game.toml").write_text(tomli_w.dumps(GAME))
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(SWEEP))

    def run(*arguments, check=0):
        code = main(["byzantine", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert code == check, captured.err
        return captured.out, captured.err

    return run


@pytest.fixture
def played(call):
    """An event log, and what was printed as JSON."""
    out, _ = call("run", "game.toml", "--out", "events", "--json")
    return json.loads(out)


def test_run_shows_every_round_and_the_verdict(call):
    out, _ = call("run", "game.toml")
    lines = out.splitlines()
    assert lines[1].split()[1:].count("B") == 2
    assert lines[3].split()[0] == "1"
    assert lines[-1] == "INVALID.captured after 2 rounds, all honest agents hold 25"
    again, _ = call("run", "game.toml")
    assert again == out
    other, _ = call("run", "game.toml", "--seed", "4")
    assert other != out


def test_options_win_over_the_file(call):
    out, _ = call("run", "game.toml", "--byzantine", "silent", "--n-honest", "4", "--n-byzantine",
                  "1", "--value-range", "7,7", "--quota", "4", "--json")  # fmt: skip
    facts = json.loads(out)
    assert (facts["n_honest"], facts["n_byzantine"], facts["decided"]) == (4, 1, 7)
    assert (facts["outcome"], facts["rounds"], facts["events"]) == ("VALID", 1, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.toml"], "there is no game file nowhere.toml"),
        (["run", "--honest", "low-medan"], "did you mean 'low-median'"),
        (["run", "--honest", "mean", "--byzantine", "silent"], "there is no Byzantine agent"),
        (["run", "game.toml", "--byzantine", "split-vote"], "equivocate"),
        (["run", "game.toml", "--honest", "phase-king:f=2"], "phase-king"),
        (["run", "game.toml", "--quota", "9"], "quota is 9 votes, but there are 7 agents"),
        (["run", "game.toml", "--topology", "rings"], "did you mean 'ring'"),
        (["run", "game.toml", "--model", "nowhere"], "no checkpoint folder"),
        (["sweep", "nowhere.toml"], "there is no sweep file"),
        (["sweep", "sweep.toml", "--shard", "4/4"], "0 <= I < K"),
        (["show", "nothing"], "there is no game 'nothing'"),
        (["classify", "nothing"], "no sweep folder, no folder of event logs and no run"),
        (["plot", "trajectorie", "out"], "did you mean 'trajectory'"),
        (["bounds", "--n", "4", "--f", "5"], "n is 4, f 5"),
        (["power", "--p0", "0.5", "--p1", "0.5"], "both 0.5"),
    ],
)
def test_bad_input_is_one_clear_message(call, arguments, message):
    _, err = call(*arguments, check=2)
    assert message in err


def test_language_models_need_a_model(call):
    _, err = call("run", "game.toml", "--honest", "llm", check=3)
    assert "--model FOLDER" in err


def test_sweep_resumes_and_its_files_agree(call, tmp_path):
    out, err = call("sweep", "sweep.toml")
    assert "n_byzantine=2" in out
    assert "report:" in err
    before = (tmp_path / "out/table.csv").read_bytes()
    _, err = call("sweep", "sweep.toml", check=2)
    assert "already holds 8 games" in err
    lines = (tmp_path / "out/games.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out/games.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    facts = json.loads(call("sweep", "sweep.toml", "--resume", "--json")[0])
    assert facts["complete"]
    assert [c["games"] for c in facts["cells"]] == [4, 4]
    assert (tmp_path / "out/table.csv").read_bytes() == before
    page = (tmp_path / "out/report.html").read_text()
    assert "How games ended" in page
    assert "Round by round" in page


def test_shards_and_widths_from_the_command_line(call, tmp_path):
    call("sweep", "sweep.toml", "--out", "parts", "--shard", "0/2")
    facts = json.loads(call("sweep", "sweep.toml", "--out", "parts", "--shard", "1/2", "--json")[0])
    assert facts["complete"]
    call("sweep", "sweep.toml")
    assert (tmp_path / "parts/table.csv").read_bytes() == (tmp_path / "out/table.csv").read_bytes()
    wide = json.loads(call("sweep", "sweep.toml", "--out", "wide", "--until-width", "0.2",
                           "--no-events", "--json")[0])  # fmt: skip
    intervals = [c["valid_interval"] for c in wide["cells"]]
    assert all(high - low <= 0.4 for low, high in intervals)
    assert not (tmp_path / "wide/events").exists()


def test_reproduce_shows_the_papers_rates(call):
    facts = json.loads(
        call("reproduce", "paper-q2", "--honest", "low-median", "--byzantine", "random",
             "--replicates", "2", "--json")[0]
    )  # fmt: skip
    assert [c["published"][0]["valid"] for c in facts["cells"]] == [0.58, 0.4, 0.08, 0.0, 0.0]
    assert facts["folder"] == "runs/paper-q2"
    out, _ = call("report", "runs/paper-q2", "--reference", "paper-q2", "--out", "r.html")
    assert "Qwen3-14B 40 %" in out


def test_show_and_replay_a_game(call, played):
    name = f"events/{played['game_id'][:6]}"
    out, _ = call("show", name)
    assert f"game {played['game_id']}, seed 3: INVALID.captured" in out
    assert "Round 2: 5 hold 25; votes: 5 stop, 2 continue" in out
    out, _ = call("show", name, "--agent", "agent_2", "--round", "1")
    assert "--- agent_2" in out
    assert out.count("---") == 1
    facts = json.loads(call("show", name, "--json")[0])
    assert facts["votes"] == played["votes"]
    out, _ = call("replay", name)
    assert "2 rounds played again, all states equal" in out
    assert json.loads(call("replay", name, "--json")[0])["state_hash"] == played["state_hash"]
    for arguments, message in [
        (["--agent", "agent_9"], "agent_0 to agent_6"), (["--round", "3"], "rounds 1 to 2"),
    ]:  # fmt: skip
        assert message in call("show", name, *arguments, check=2)[1]


def test_a_tampered_game_does_not_replay(call, played, tmp_path):
    path = tmp_path / "events" / f"{played['game_id']}.jsonl"
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"event":"vote"' in line)
    event = json.loads(lines[at])
    event["vote"] = "stop"
    lines[at] = json.dumps(event, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n")
    _, err = call("replay", path, check=1)
    assert "round 1" in err


def test_classify_groups_as_asked(call):
    call("sweep", "sweep.toml")
    facts = json.loads(call("classify", "out", "--taxonomy", "paper-figures", "--json")[0])
    assert facts["games"] == 8
    assert sum(facts["outcomes"].values()) == 8
    assert set(facts["paper-figures"]) <= {"valid", "invalid", "no consensus"}
    logs = json.loads(call("classify", "out/events", "--json")[0])
    assert logs["outcomes"] == facts["outcomes"]


def test_every_plot_is_an_svg_and_exports_have_all_rows(call, played, tmp_path):
    call("sweep", "sweep.toml")
    name = f"events/{played['game_id']}.jsonl"
    for kind, source in [
        ("trajectory", name), ("votes", name), ("blocs", name), ("influence", name),
        ("rates", "out"), ("outcomes", "out"), ("heatmap", "out"), ("survival", "out"),
    ]:  # fmt: skip
        call("plot", kind, source)
        root = ElementTree.parse(tmp_path / f"{kind}.svg").getroot()
        assert root.tag.endswith("svg")
    call("export", "out", "--out", "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    call("report", name, "--out", "game.html")
    assert "Round by round" in (tmp_path / "game.html").read_text()
    _, err = call("export", "out", "--out", "rows.xlsx", check=2)
    assert ".parquet" in err


def test_lists_have_a_line_per_policy_and_network(call):
    agents = {entry["name"] for entry in json.loads(call("agents", "--json")[0])}
    assert {"leader", "mode-minid", "low-median", "dlpsw", "phase-king", "wmsr"} <= agents
    adversaries = {e["name"]: e for e in json.loads(call("adversaries", "--json")[0])}
    assert {"silent", "drift", "split-vote", "mimic", "early-stop"} <= set(adversaries)
    assert adversaries["split-vote"]["powers"] == ["equivocate"]
    kinds = {row["kind"] for row in json.loads(call("topologies", "--json")[0])}
    assert {"complete", "ring", "delaunay", "custom"} <= kinds
    for verb in ("agents", "adversaries", "topologies"):
        assert call(verb)[0].strip()


def test_bounds_power_and_simulation_give_known_numbers(call):
    bounds = {s["name"]: s["holds"] for s in json.loads(
        call("bounds", "--n", "12", "--f", "4", "--json")[0])}  # fmt: skip
    assert not bounds["phase-king"]
    assert bounds["liveness of the vote"]
    power = json.loads(call("power", "--p0", "0.58", "--p1", "0.40", "--json")[0])
    assert (power["games_per_cell"], power["games_per_cell_fisher"]) == (120, 129)
    facts = json.loads(call("simulate", "mode-minid", "--byzantine", "collude:v=25",
                            "--n-byzantine", "2", "--games", "100000", "--json")[0])  # fmt: skip
    assert facts["valid"]["rate"] == pytest.approx(0.354, abs=0.006)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from tenfold.cli import main; main(['byzantine', '--help']);"
        "main(['byzantine', 'sweep', '--help']);"
        "print({'numpy', 'scipy', 'networkx', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
