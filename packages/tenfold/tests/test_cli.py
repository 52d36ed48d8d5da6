"""The command line: one message and the right exit code for each mistake, clean stdout."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tomllib

import pytest
from tenfold import __version__
from tenfold.cli import COMMANDS, main
from tenfold.cli.completion import completion_script
from tenfold.cli.snippet import snippet, toml_value
from tenfold.errors import ConfigError
from tenfold.host import Host
from tenfold.registry import load_registry
from tenfold.tomledit import set_member

VERBS = """
from tenfold import CommandSpec, ComponentSpec, Param, PluginInfo, hookimpl

@hookimpl
def tenfold_plugin():
    return PluginInfo("{name}", "Has commands")

@hookimpl
def tenfold_commands():
    return [
        CommandSpec("add", "{module}:add", "adds 100 % of numbers", (
            Param("numbers", "list[int]", positional=True, help="what to add"),
            Param("scale", "float", 1.0, "a factor", minimum=0),
            Param("tags", "list[str]", ()),
            Param("round", "bool", False),
            Param("mode", "str", "sum", choices=("sum", "product")),
        )),
        CommandSpec("leave", "{module}:leave", "returns 7", ()),
        CommandSpec("fail", "{module}:fail", "fails", (Param("message", "str"),)),
        CommandSpec("nowhere", "{module}:nowhere", "has no target", ()),
        CommandSpec("told", "{module}:told", "prints by itself", (Param("code", "int", 0),)),
    ]

def add(numbers, scale, tags, round, mode):
    total = sum(numbers) * scale
    return {"total": int(total) if round else total, "tags": list(tags), "mode": mode}

def leave():
    return 7

def told(code, as_json=False):
    print("json" if as_json else "plain")
    return code

def fail(message):
    from tenfold.errors import RunFailed
    raise RunFailed(message, hint="try again")
"""


@pytest.fixture
def call(site, capsys, monkeypatch):
    """Runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("TENFOLD_NO_PLUGINS", "1")

    def run(*arguments):
        monkeypatch.setenv("TENFOLD_PLUGINS", ",".join(site.names))
        if site.names:
            monkeypatch.delenv("TENFOLD_NO_PLUGINS", raising=False)
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_repeats_each_module_s_own_summary(name):
    module, summary = COMMANDS[name]
    assert summary == importlib.import_module(module).SUMMARY


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself(name, call):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert out.startswith(f"usage: tenfold {name}")
    assert "--json" in out


def test_help_lists_every_command_and_goes_to_stdout(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert call() == (code, out, err)
    assert call("help", "list")[1] == call("list", "--help")[1]


def test_version_is_the_package_s(call):
    assert call("--version") == (0, f"tenfold {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lits"], "unknown command 'lits'; did you mean 'list'?"),
        (["--jsn", "list"], "unknown option --jsn; did you mean '--json'?"),
        (["-C"], "-C needs a folder"),
        (["-C", "no/such/folder", "list"], "cannot work in 'no/such/folder'"),
        (["list", "--capabilty", "grad"], "did you mean '--capability'?"),
        (["list", "--cap", "grad"], "unknown argument '--cap'"),
        (["list", "modles"], "did you mean 'models'?"),
        (["list", "--capability", "gradd"], "did you mean 'grad'?"),
        (["plugins", "shwo"], "shwo"),
        (["plugins", "disable", "core"], "always loaded"),
        (["init"], "ACTION"),
        (["init", "plugin", "Bad Name"], "lower-case"),
        (["init", "plugin", "core"], "taken"),
        (["completion", "csh"], "csh"),
        (["recipes", "show", "quick"], "plugin:recipe"),
    ],
)
def test_usage_errors_are_one_message_and_exit_code_2(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "core:no-such-thing"], "core:no-such-thing"),
        (["plugins", "show", "no-such-plugin"], "no plugin 'no-such-plugin'"),
        (["plugins", "check", "no-such-plugin"], "no plugin 'no-such-plugin'"),
        (["plugins", "disable", "no-such-plugin"], "no plugin 'no-such-plugin'"),
        (["recipes", "show", "core:no-such-recipe"], "unknown recipe"),
    ],
)
def test_missing_components_exit_with_3(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (3, "")
    assert message in err


def test_a_folder_is_entered_and_left(call, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "workspace.toml").write_text('[paths]\nruns = "elsewhere"\n')
    for arguments in (["-C", other, "workspace", "check"], ["workspace", "check", "-C", other]):
        code, out, _ = call(*arguments, "--json")
        assert code == 0
        assert json.loads(out)["root"] == str(other)
    assert json.loads(call("--json", "workspace", "check")[1])["root"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["plugins"],
        ["plugins", "list"],
        ["plugins", "show", "core"],
        ["plugins", "check"],
        ["list"],
        ["list", "models"],
        ["show", "core:echo"],
        ["recipes"],
        ["workspace"],
        ["doctor", "--no-gpu"],
        ["completion", "bash"],
    ],
)
def test_json_is_all_that_is_on_stdout(call, arguments):
    for line in ([*arguments, "--json"], ["--json", *arguments]):
        code, out, _ = call(*line)
        assert code == 0
        assert isinstance(json.loads(out), dict | list)
    text = call(*arguments)
    assert text[0] == 0
    assert text[1]


def test_listing_filters_by_kind_capability_tag_and_plugin(call):
    def ids(*arguments):
        return [row["id"] for row in json.loads(call("list", *arguments, "--json")[1])]

    models = ids("models")
    assert "core:hf" in models
    assert set(ids("model")) == set(models)
    assert set(models) < set(ids())
    grad = ids("models", "--capability", "grad")
    assert "core:hf" in grad
    assert "core:echo" not in grad
    assert "core:hf" in ids("--capability", "loss")  # grad brings loss
    assert ids("--capability", "text", "datasets")
    assert ids("--plugin", "core") == ids()
    assert ids("--tag", "no-such-tag") == []


def test_every_snippet_plans_as_it_stands_or_says_what_to_change():
    """With the plugins that are really installed."""
    registry = load_registry(lenient=True)
    host = Host(registry=registry)
    for component in registry.items:
        text = snippet(component, registry)
        table = tomllib.loads(text)
        assert component.id in json.dumps(table), text
        if "change me" not in text:
            host.plan(host.resolve(table)).require_fit()
    planned = [c.id for c in registry.items if "change me" not in snippet(c, registry)]
    assert {"core:echo", "core:tiny-lm", "core:perplexity", "core:python-stdlib"} <= set(planned)


@pytest.mark.parametrize(
    "value",
    [True, 3, 0.5, 'a "b" \\ \n é \x7f', [1, "x"], {"a": {"b c": [1]}}, {}, [], 1e300],
)
def test_inline_toml_reads_back(value):
    assert tomllib.loads(f"v = {toml_value(value)}")["v"] == value


def test_a_verb_gets_its_parameters_as_described(call, site):
    site.add("verbs", VERBS)
    arguments = ["verbs", "add", "1", "2,3", "--scale", "2", "--tags", "a,b", "--tags", "c"]
    code, out, _ = call(*arguments, "--round", "--mode", "product")
    assert code == 0
    assert json.loads(out) == {"total": 12, "tags": ["a", "b", "c"], "mode": "product"}
    code, out, _ = call("verbs", "add", "1")
    assert json.loads(out) == {"total": 1.0, "tags": [], "mode": "sum"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "x"], "NUMBERS"),
        (["add", "1", "--scale", "-1"], "--scale is -1.0"),
        (["add", "1", "--scale=-1"], "--scale is -1.0"),
        (["add", "1", "--mode", "summ"], "--mode is 'summ'; did you mean 'sum'?"),
        (["add", "1", "--scal", "2"], "did you mean '--scale'?"),
        (["fail"], "--message"),
        (["ad"], "did you mean 'add'?"),
    ],
)
def test_a_verb_s_bad_arguments_are_usage_errors(call, site, arguments, message):
    site.add("verbs", VERBS)
    code, out, err = call("verbs", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_verb_decides_its_exit_code(call, site):
    site.add("verbs", VERBS)
    assert call("verbs", "leave")[0] == 7
    code, _, err = call("verbs", "fail", "--message", "no luck")
    assert (code, err) == (1, "error: no luck\n  hint: try again\n")
    assert call("verbs", "nowhere")[0] == 3


def test_a_verb_that_wants_to_know_is_told_about_json(call, site):
    site.add("verbs", VERBS)
    assert call("verbs", "told", "--code", "1") == (1, "plain\n", "")
    assert call("verbs", "told", "--json") == (0, "json\n", "")
    assert call("--json", "verbs", "told") == (0, "json\n", "")


def test_verbs_are_in_the_help_once_indexed(site):
    site.add("verbs", VERBS)
    assert "verbs add" not in site.tenfold("--help").stdout
    assert "add      adds 100 % of numbers" in " ".join(
        line.strip() for line in site.tenfold("verbs", "--help").stdout.splitlines()
    )
    assert "adds 100 % of numbers" in site.tenfold("--help").stdout
    assert "a factor; a number, at least 0; default 1.0" in " ".join(
        site.tenfold("verbs", "add", "--help").stdout.split()
    )


def test_a_broken_plugin_costs_one_line_and_its_verbs_say_why(call, site):
    site.add("wrecked", "raise ValueError('no good')")
    code, out, err = call("list", "--json")
    assert code == 0
    json.loads(out)
    assert err.count("\n") == 1
    assert "no good" in err
    code, _, err = call("wrecked", "go")
    assert code == 3
    assert "error: plugin 'wrecked'" in err


def test_strict_policy_exits_with_3_but_plugins_still_explains(call, site, monkeypatch):
    site.add("wrecked", "raise ValueError('no good')")
    monkeypatch.setenv("TENFOLD_STRICT", "1")
    code, out, err = call("list")
    assert (code, out) == (3, "")
    assert "no good" in err
    assert call("plugins")[0] == 0
    code, out, _ = call("plugins", "check")
    assert code == 3
    assert "no good" in out


def test_disable_and_enable_edit_the_policy_and_nothing_else(site, tmp_path):
    site.add("one")
    site.add("two")
    file = tmp_path / "work" / "plugins.toml"
    text = '# mine\n[policy]\nenable = "all" # everything\n\n[plugins.one]\npaper = "x"\n'
    file.write_text(text)
    environment = {"TENFOLD_PLUGINS": ""}
    done = site.tenfold("plugins", "disable", "one", **environment)
    assert done.returncode == 0, done.stderr
    assert file.read_text() == text.replace("[policy]\n", '[policy]\ndisable = ["one"]\n')
    names = json.loads(site.tenfold("plugins", "--json", **environment).stdout)["disabled"]
    assert names == ["one"]
    assert "already" in site.tenfold("plugins", "disable", "one", **environment).stdout
    assert site.tenfold("plugins", "enable", "one", **environment).returncode == 0
    assert tomllib.loads(file.read_text())["policy"] == {"enable": "all", "disable": []}
    wrong = site.tenfold("plugins", "disable", "onee", **environment)
    assert wrong.returncode == 3
    assert "did you mean 'one'?" in wrong.stderr


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[policy]",
        '[policy]\ndisable = ["b"] # why\n',
        '[policy]\ndisable = [\n  "b", # first\n  "c",\n]\n[plugins.b]\npath = "x"\n',
        "[policy]\ndisable = [\n  'b',\n  \"c\" # last\n]\n",
        '[policy]\r\nenable = "all"\r\ndisable = ["b"]\r\n',
        '[plugins.x]\nsummary = "[policy]"\n\n[policy] # here\ndisable=[]\n',
    ],
)
def test_an_edit_changes_one_member_and_keeps_every_comment(text):
    added = set_member(text, "policy", "disable", "a", present=True)
    before = tomllib.loads(text).get("policy", {}).get("disable", [])
    assert tomllib.loads(added)["policy"]["disable"] == [*before, "a"]
    assert set_member(added, "policy", "disable", "a", present=True) == added
    removed = set_member(added, "policy", "disable", "a", present=False)
    assert tomllib.loads(removed)["policy"]["disable"] == before
    for name in before:
        without = set_member(added, "policy", "disable", name, present=False)
        assert name not in tomllib.loads(without)["policy"]["disable"]
    for comment in [line.partition("#")[2] for line in text.splitlines() if "#" in line]:
        assert comment.strip() in added
        assert comment.strip() in removed


@pytest.mark.parametrize(
    "text", ['policy = { disable = ["b"] }', 'policy.disable = ["b"]', "x = ["]
)
def test_an_edit_refuses_layouts_it_cannot_keep(text):
    with pytest.raises(ConfigError):
        set_member(text, "policy", "disable", "a", present=True)


def test_workspace_check_compares_files_with_what_is_installed(site, tmp_path):
    site.add("one")
    work = tmp_path / "work"
    (work / "runs").write_text("a file")
    (work / "workspace.toml").write_text("")
    (work / "plugins.toml").write_text(
        '[policy]\ndisable = ["typo"]\n'
        '[plugins.one]\ndistribution = "other-dist"\npapper = "x"\n'
        '[plugins.later]\nstatus = "planned"\n[plugins.absent]\n'
    )
    done = site.tenfold("workspace", "check", "--json", TENFOLD_PLUGINS="")
    assert done.returncode == 2
    found = {(c["what"], c["status"]): c["found"] for c in json.loads(done.stdout)["checks"]}
    assert "is a file" in found["paths.runs", "fail"]
    assert "no plugin 'typo'" in found["policy.disable", "fail"]
    assert "the file says other-dist" in found["plugins.one", "fail"]
    assert found["plugins.later", "ok"] == "planned, not installed"
    assert "not installed" in found["plugins.absent", "warn"]
    (work / "workspace.toml").write_text("[paths]\nrunz = 'x'\n")
    done = site.tenfold("workspace", "check")
    assert done.returncode == 2
    assert "did you mean 'runs'?" in done.stderr


def test_doctor_reports_broken_plugins(site):
    site.add("wrecked", "raise ValueError('no good')")
    done = site.tenfold("doctor", "--no-gpu", "--json")
    assert done.returncode == 3
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert rows["plugin wrecked"]["status"] == "fail"
    assert rows["python"]["found"].startswith(".".join(map(str, sys.version_info[:3])))
    assert int(rows["cores"]["found"]) >= 1


def test_completion_scripts_are_valid_shell(call):
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = call("completion", shell)
        assert code == 0
        assert "plugins" in out
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=out, text=True, check=True)


def test_bash_completes_commands_and_actions():
    script = completion_script("bash", {"plugins": ("list", "show"), "run": ()})
    probe = f"""{script}
COMP_WORDS=(tenfold plugins sh); COMP_CWORD=2; _tenfold; echo "${{COMPREPLY[@]}}"
COMP_WORDS=(tenfold pl); COMP_CWORD=1; _tenfold; echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["show", "plugins"]


def test_a_closed_pipe_is_no_error(site):
    command = f"{sys.executable} -m tenfold list | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env=site.environment(TENFOLD_NO_PLUGINS="1"),
        cwd=site.path,
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_interruption_exits_with_130(call, site, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tenfold.cli.components.load_registry", interrupt)
    code, out, err = call("list")
    assert (code, out, err) == (130, "", "interrupted\n")


def test_the_module_is_the_same_program_as_the_script(site):
    script = shutil.which("tenfold", path=str(sys.prefix) + "/bin")
    if script is None:
        pytest.skip("the tenfold script is not installed beside this Python")
    one = site.tenfold("--help").stdout
    two = subprocess.run(
        [script, "--help"], capture_output=True, text=True, env=site.environment(), check=True
    )
    assert two.stdout == one
