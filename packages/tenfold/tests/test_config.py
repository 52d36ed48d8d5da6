"""Run files: extends, settings, shares, variables, and every mistake in one clear message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold.config import apply_settings, merge, parse_setting, read_run_file, resolve
from tenfold.errors import ConfigError
from tenfold.sweeps import expand_sweep
from tenfold.workspace import find_workspace

BASE = {
    "schema": "tenfold-run/1",
    "model": {"use": "toy:upper"},
    "dataset": {"use": "toy:numbers"},
    "evaluator": {"use": "toy:lengths"},
}


@pytest.fixture
def workspace(workspace_dir):
    return find_workspace()


def test_model_is_the_role_model(workspace):
    config = resolve(BASE, workspace)
    assert config.models == {"model": {"use": "toy:upper"}}
    assert config.datasets == {"dataset": {"use": "toy:numbers"}}


def test_table_gives_the_same_configuration_again(workspace):
    config = resolve({**BASE, "seed": 9, "limits": {"max_failures": 2}}, workspace)
    again = resolve(config.table(), workspace)
    assert again == config
    assert again.digest() == config.digest()


def test_digest_ignores_scale_and_limits(workspace):
    one = resolve(BASE, workspace)
    two = resolve({**BASE, "scale": {"processes": 2}, "limits": {"max_failures": 3}}, workspace)
    other = resolve({**BASE, "seed": 1}, workspace)
    assert one.digest() == two.digest() != other.digest()


def test_extends_merges_and_the_child_wins(tmp_path):
    (tmp_path / "base.toml").write_text(
        'schema = "tenfold-run/1"\nseed = 1\n[evaluator]\nuse = "a:b"\nx = 1\ny = 2\n'
    )
    child = tmp_path / "child.toml"
    child.write_text('extends = "base.toml"\n[evaluator]\ny = 3\n')
    table, _ = read_run_file(child)
    assert table["seed"] == 1
    assert table["evaluator"] == {"use": "a:b", "x": 1, "y": 3}


def test_another_component_drops_the_old_parameters():
    base = {"evaluator": {"use": "a:b", "x": 1}}
    assert merge(base, {"evaluator": {"use": "a:c"}}) == {"evaluator": {"use": "a:c"}}
    assert merge(base, {"evaluator": {"use": "a:b", "y": 2}})["evaluator"]["x"] == 1


def test_circular_extends_is_an_error(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(ConfigError, match="circle"):
        read_run_file(tmp_path / "a.toml")


def test_file_variable_is_the_folder_of_the_file_that_holds_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/base.toml").write_text('[dataset]\nuse = "x:y"\npath = "${file}/d.txt"\n')
    (tmp_path / "run.toml").write_text('extends = "sub/base.toml"\n')
    table, _ = read_run_file(tmp_path / "run.toml")
    assert table["dataset"]["path"] == f"{tmp_path}/sub/d.txt"


def test_environment_stays_out_of_the_configuration(workspace, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    table = {**BASE, "model": {"use": "toy:upper", "prefix": "${env:SECRET}"}}
    config = resolve(table, workspace)
    assert config.models["model"]["prefix"] == "${env:SECRET}"


def test_environment_reaches_the_component_but_not_the_record(host, table, monkeypatch):
    from tenfold.run import Options

    monkeypatch.setenv("SECRET", "s3cr3t")
    model = {"use": "toy:upper", "prefix": "${env:SECRET}"}
    outcome = host.run(table(model=model), options=Options(progress=False))
    assert outcome.metrics[0].value == len("s3cr3t") + 1
    for path in outcome.run_dir.rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes(), path


def test_run_variable_reads_another_run(host, table):
    from tenfold.run import Options

    first = host.run(table(), options=Options(progress=False))
    model = {"use": "toy:upper", "prefix": "${run:toy.metrics.mean_length}"}
    config = host.resolve(table(model=model))
    assert config.models["model"]["prefix"] == "1.0"
    model["prefix"] = "${run:toy.path}"
    assert host.resolve(table(model=model)).models["model"]["prefix"] == str(first.run_dir)
    model["prefix"] = "${run:toy.metrics.meen_length}"
    with pytest.raises(ConfigError, match=r"no metric 'meen_length'; did you mean 'mean_length'"):
        host.resolve(table(model=model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, r"unknown key 'modle'; did you mean 'model'"),
        ({"schema": "tenfold-run/9"}, 'schema is .*write schema = "tenfold-run/1"'),
        ({"trainer": {"use": "a:b"}}, "both .evaluator. and .trainer."),
        ({"model": {"usee": "toy:upper"}}, r"names no component.*did you mean 'usee'"),
        ({"model": 3}, "must be a table with use"),
        ({"models": {"model": {"use": "x:y"}}}, "are the same role"),
        ({"seed": "x"}, "seed is 'x'; it must be an integer"),
        ({"seed": True}, "seed is True; it must be an integer"),
        ({"name": "a/b"}, "name is 'a/b'; use letters"),
        ({"scale": {"processes": 0}}, "scale.processes is 0; at least 1"),
        ({"scale": {"processes": "2"}}, "must be of type int"),
        ({"scale": {"proceses": 2}}, r"unknown key scale.proceses; did you mean 'processes'"),
        ({"scale": {"launcher": "torchrum"}}, r"did you mean 'torchrun'"),
        ({"scale": {"launcher": "none", "processes": 2}}, "starts one process"),
        ({"limits": {"max_failure": 2}}, r"did you mean 'max_failures'"),
        ({"model": {"share": "modle"}}, r"no such component; did you mean 'model'|circle"),
        ({"models": {"a": {"share": "b"}, "b": {"share": "a"}}}, "goes in a circle"),
        ({"models": {"a": {"share": "dataset", "x": 1}}}, "has share and .'x'."),
        ({"summary": "${shell:ls}"}, r"cannot resolve \$\{shell:ls\}; known"),
        ({"summary": "${env:NO_SUCH_VARIABLE}"}, "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_mistake_is_one_clear_message(workspace, change, message):
    with pytest.raises(ConfigError, match=message):
        resolve({**BASE, **change}, workspace)


def test_neither_evaluator_nor_trainer_is_an_error(workspace):
    table = {key: value for key, value in BASE.items() if key != "evaluator"}
    with pytest.raises(ConfigError, match="add one"):
        resolve(table, workspace)


def test_share_copies_a_nested_table(workspace):
    table = {
        **BASE,
        "models": {
            "honest": {"use": "toy:twice", "base": {"use": "toy:upper", "prefix": "p"}},
            "byzantine": {"share": "honest.base"},
        },
    }
    config = resolve(table, workspace)
    assert config.models["byzantine"] == {"use": "toy:upper", "prefix": "p"}


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("a.b=1", ["a", "b"], 1),
        ("a=1.5", ["a"], 1.5),
        ("a=true", ["a"], True),
        ("a=hello", ["a"], "hello"),
        ('a="1"', ["a"], "1"),
        ("a=[1,2]", ["a"], [1, 2]),
        ("a=x=y", ["a"], "x=y"),
        ("a=", ["a"], ""),
        ('a={use="x:y"}', ["a"], {"use": "x:y"}),
    ],
)
def test_settings_are_toml_or_text(text, path, value):
    assert parse_setting(text) == (path, value)


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ""])
def test_setting_without_a_key_is_an_error(text):
    with pytest.raises(ConfigError, match=r"table\.key=value"):
        parse_setting(text)


@pytest.mark.parametrize("key", ["model.x", "models.model.x"])
@pytest.mark.parametrize("written", [{"model": {}}, {"models": {"model": {}}}])
def test_setting_finds_the_role_model_however_it_is_written(key, written):
    changed = apply_settings(written, [f"{key}=1"])
    assert list(changed) == list(written)
    assert (changed.get("model") or changed["models"]["model"]) == {"x": 1}


def test_setting_below_a_value_is_an_error():
    with pytest.raises(ConfigError, match=r"evaluator\.x is a value, not a table"):
        apply_settings({"evaluator": {"x": 1}}, ["evaluator.x.y=2"])


@given(st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3))
def test_merging_nothing_changes_nothing(table):
    assert merge(table, {}) == table == merge({}, table)


def test_grid_is_the_product_and_zip_goes_together():
    table = {
        **BASE,
        "sweep": {"grid": {"seed": [1, 2]}, "zip": {"evaluator": {"x": [3, 4], "y": [5, 6]}}},
    }
    points = expand_sweep(table)
    seen = [(p.table["seed"], p.table["evaluator"]["x"], p.table["evaluator"]["y"]) for p in points]
    assert seen == [(1, 3, 5), (2, 3, 5), (1, 4, 6), (2, 4, 6)]
    assert all("sweep" not in p.table for p in points)


def test_replicates_have_different_seeds():
    points = expand_sweep({**BASE, "sweep": {"replicates": 5}})
    assert len({p.table["seed"] for p in points}) == 5


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"gird": {}}, r"did you mean 'grid'"),
        ({"zip": {"a": [1], "b": [1, 2]}}, "equally long"),
        ({"grid": {"a": []}}, "non-empty list"),
        ({"replicates": 0}, "at least 1"),
    ],
)
def test_sweep_mistake_is_one_clear_message(sweep, message):
    with pytest.raises(ConfigError, match=message):
        expand_sweep({**BASE, "sweep": sweep})


def test_workspace_mistakes_name_file_and_key(tmp_path):
    path = tmp_path / "workspace.toml"
    for text, message in (
        ("[defaults]\nsede = 1", r"unknown key defaults.sede; did you mean 'seed'"),
        ("[defaults]\nseed = 'x'", "defaults.seed is 'x'; it must be of type int"),
        ("[pathz]\nruns = 'x'", r"unknown table \[pathz\]; did you mean 'paths'"),
        ("a = [", "is not valid TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            find_workspace(tmp_path)
