"""`tenfold nvium ...` through the real command line."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys

import pytest
import torch
from nvium_bases import base_folder
from nvium_cases import tiny_config, tiny_model
from tenfold.cli import main
from tenfold_nvium import exactness, verify
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.lm import load
from tenfold_nvium.model_info import describe, info_rows, parameters_by_component, weights_per_token
from tenfold_nvium.presets import PRESETS, dense_twin, nvium_parameters, preset
from tenfold_nvium.sampling import Warp
from tenfold_nvium.terminal import exit_styles, printable
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def call(capsys):
    """Runs a command line in this process: exit code, stdout, stderr."""

    def run(*arguments):
        code = main(["nvium", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base_folder(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def nvium(base, tmp_path_factory):
    """A converted model with random exits: every depth occurs."""
    folder = tmp_path_factory.mktemp("nvium") / "model"
    assert main(["nvium", "convert", str(base), str(folder), "--gate-init", "-0.5"]) == 0
    return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A model of five tokens: all its short texts can be listed."""
    folder = tmp_path_factory.mktemp("letters")
    vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    tiny_model(vocab_size=5, dtype=torch.float32).save_pretrained(folder)
    return folder


# --- convert ------------------------------------------------------------------------------------


def test_convert_says_what_it_chose(base, tmp_path, call):
    code, out, _ = call("convert", base, tmp_path / "a", "--exits", "1,2", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["exit_layers"] == [1, 2]
    assert facts["gates"] == "closed"
    lm = load(facts["checkpoint"])
    assert facts["parameters"] == sum(p.numel() for p in lm.model.parameters())
    early = sum(p.numel() for p in lm.model.exits.parameters())
    assert facts["added_parameters"] == early
    code, out, _ = call("convert", base, tmp_path / "b", "--gate-init", "-4", "--tying", "none")
    assert code == 0
    assert "early exits after 1, 2, 3," in out
    assert "log-odds -4" in out
    assert load(str(tmp_path / "b")).model.exits[0].head is not None


def test_export_writes_a_folder_with_its_own_code(nvium, tmp_path, call):
    code, out, _ = call("export", nvium, tmp_path / "a", "--json")
    assert code == 0
    files = json.loads(out)["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_nvium.py"} <= set(files)
    code, out, _ = call("export", nvium, tmp_path / "b")
    assert code == 0
    assert "trust_remote_code=True" in out


# --- info ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "quickstart", "small", "h128-l6", "h768-l24"])
def test_components_add_up_to_the_formula(name):
    config = preset(name).config()
    assert sum(parameters_by_component(config).values()) == nvium_parameters(config)


def test_work_per_token_is_that_of_the_specification():
    """275 M against 202 M weights per token at 226 M parameters: 36 % more; 10 % at 1.49 B."""
    ratios = {}
    for name in ("h768-l24", "h1536-l48"):
        config = PRESETS[name].config()
        ratios[name] = weights_per_token(config) / weights_per_token(dense_twin(config))
    config = PRESETS["h768-l24"].config()
    assert weights_per_token(config) == pytest.approx(275e6, rel=0.003)
    assert weights_per_token(dense_twin(config)) == pytest.approx(202e6, rel=0.003)
    assert ratios["h768-l24"] == pytest.approx(1.36, abs=0.005)
    assert ratios["h1536-l48"] == pytest.approx(1.10, abs=0.005)


def test_work_per_token_is_what_the_matrices_really_multiply():
    """Counted by hooks on a real forward pass of one token."""
    model = tiny_model(exit_head_tying="none", router_num_layers=2)
    seen = []
    for name, module in model.named_modules():
        head = name == "lm_head" or (name.endswith(".head") and "router" not in name)
        if isinstance(module, torch.nn.Linear) and not head:
            module.register_forward_hook(lambda m, *_: seen.append(m.weight.numel()))
    model(torch.tensor([[1]]))
    heads = 4 * model.config.vocab_size * model.config.hidden_size
    assert weights_per_token(model.config) == sum(seen) + heads


def test_info_of_a_preset(call):
    code, out, _ = call("info", "--preset", "h768-l24", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"] == 226_149_894
    assert facts["dense_twin"]["intermediate_size"] == 2184
    assert facts["dense_twin"]["parameters"] == 226_579_200
    assert facts["training"]["tokens"] == 17251 * 256 * 1024
    assert facts["training"]["tokens_per_parameter"] == pytest.approx(20, abs=0.01)
    assert facts["uniform"] == {"mean_depth": 0.625, "bound": 1.6}
    code, out, _ = call("info", "--preset", "h768-l24")
    assert code == 0
    assert "226,149,894" in out
    assert "+36.3% against the twin: data and parameters match, compute does not" in out


def test_info_of_a_checkpoint_with_measured_shares(nvium, tmp_path, call):
    code, out, _ = call("info", nvium, "--json")
    facts = json.loads(out)
    assert code == 0
    assert "measured" not in facts
    assert facts["parameters"] == sum(p.numel() for p in load(str(nvium)).model.parameters())
    log = [{"step": s, **{f"exit-share-{k}": v for k, v in enumerate(row, 1)}}
           for s, row in ((1, (1, 0, 0, 0)), (2, (0.5, 0.25, 0, 0.25)))]  # fmt: skip
    config = NviumConfig.from_pretrained(nvium)
    config.save_pretrained(tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({"log": [*log, {"step": 3}]}))
    code, out, _ = call("info", tmp_path, "--json")
    measured = json.loads(out)["measured"]
    depth = 0.5 * 0.25 + 0.25 * 0.5 + 0.25
    assert measured["shares"] == [0.5, 0.25, 0, 0.25]
    assert measured["mean_depth"] == pytest.approx(depth)
    assert measured["bound"] == pytest.approx(1 / depth)


def test_a_dense_model_has_no_twin():
    facts = describe(tiny_config(exit_layers=[], final_adapter=False))
    assert "dense_twin" not in facts
    assert facts["uniform"] == {"mean_depth": 1.0, "bound": 1.0}
    assert all(isinstance(value, str) for row in info_rows(facts) for value in row)


# --- generate -----------------------------------------------------------------------------------


def one_call(folder, prompt, new, seed, policy="sample", warp=None, **settings):
    """What the decoder writes in a single call."""
    lm = load(str(folder))
    decoder = PiggybackDecoder(lm.model, policy, warp=warp, **settings)
    ids = lm.prompt_ids(prompt)
    return lm, decoder.generate([ids], new, seeds=[seed], eos_ids=sorted(lm._eos_ids))


@pytest.mark.parametrize("limit", [None, 2])
def test_the_streamed_text_and_trace_are_those_of_one_call(nvium, tmp_path, call, limit):
    extra = [] if limit is None else ["--max-deferred", limit]
    code, out, _ = call(
        "generate", nvium, "--prompt", "def add(a):", "--seed", 5, "--max-new-tokens", 40,
        "--trace", tmp_path / "trace.json", "--json", *extra,
    )  # fmt: skip
    lm, done = one_call(nvium, "def add(a):", 40, 5, max_deferred=limit)
    got, row = json.loads(out), done.rows[0]
    assert code == 0
    assert got["token_ids"] == row.tokens
    assert got["exits"] == [k + 1 for k in row.exits]
    assert len(set(got["exits"])) == 4
    assert got["text"] == lm.decode(row.tokens)
    assert got["mean_depth"] == done.trace.mean_depth
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["format"] == "nvium-trace/1"
    assert {"policy", "model", "dtype", "device", "seed"} <= set(trace)
    totals = trace["totals"]
    assert totals["launches"] == done.trace.launches
    assert totals["flushes"] == done.trace.flushes
    assert (totals["flushes"] > 0) == (limit is not None)
    assert totals["mean_width"] == done.trace.mean_width
    assert totals["exit_shares"] == got["exit_shares"]
    for a, b in zip(trace["tokens"], done.trace.tokens, strict=True):
        assert [a[k] for k in ("row", "position", "token", "exit", "flushed")] == [
            b.row, b.position, b.token, b.exit, b.flushed
        ]  # fmt: skip
        assert a["segment_widths"] == list(b.widths)
        odds = torch.tensor(b.log_odds, dtype=torch.float64)
        assert a["gates"] == pytest.approx(odds.sigmoid().tolist(), abs=1e-12)
    times = [t for row in trace["tokens"] for t in (row["t_start"], row["t_end"])]
    assert times == sorted(times)
    assert totals["prefill_s"] + totals["decode_s"] == pytest.approx(times[-1], abs=0.05)


def test_plain_output_is_the_text_and_the_shares_go_to_stderr(nvium, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def add(a):"))
    code, out, err = call("generate", nvium, "--prompt", "-", "--seed", 5,
                          "--max-new-tokens", 12)  # fmt: skip
    lm, done = one_call(nvium, "def add(a):", 12, 5)
    assert (code, out) == (0, lm.decode(done.rows[0].tokens) + "\n")
    assert "12 tokens, sample; left after layer 1:" in err


def test_greedy_text_is_certified(nvium, call):
    code, out, _ = call("generate", nvium, "--prompt", "x", "--temperature", 0, "--json",
                        "--max-new-tokens", 15)  # fmt: skip
    _, done = one_call(nvium, "x", 15, 0, "full", Warp(0.0))
    got = json.loads(out)
    assert (code, got["policy"]) == (0, "certified")
    assert got["token_ids"] == done.rows[0].tokens


def test_a_text_ends_at_its_end_token_or_its_length(letters, call):
    lm = load(str(letters))
    reasons = set()
    for seed in range(9):
        code, out, _ = call("generate", letters, "--prompt", "a", "--seed", seed, "--json",
                            "--max-new-tokens", 3)  # fmt: skip
        got = json.loads(out)
        assert code == 0
        assert (got["token_ids"][-1] == lm.eos_id) == (got["finish_reason"] == "eos")
        assert lm.eos_id not in got["token_ids"][:-1]
        reasons.add(got["finish_reason"])
    assert reasons == {"eos", "length"}


def test_a_text_ends_with_the_context(nvium, call):
    lm = load(str(nvium))
    prompt = "x" * 300
    while len(lm.encode(prompt)) > 250:
        prompt = prompt[1:]
    code, out, _ = call("generate", nvium, "--prompt", prompt, "--json")
    got = json.loads(out)
    assert (code, got["finish_reason"]) == (0, "length")
    # The last token is drawn and never read, so it needs no position.
    assert len(got["token_ids"]) == 256 - len(lm.encode(prompt)) + 1


def test_a_terminal_gets_colours_and_a_legend(nvium, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        code = main(["nvium", "generate", str(nvium), "--prompt", "def add(a):", "--seed", "5",
                     "--max-new-tokens", "20"])  # fmt: skip
        monkeypatch.undo()
        terminal.flush()
        shown = b""
        while select.select([leader], [], [], 0.2)[0]:
            shown += os.read(leader, 65536)
        text = shown.decode()
    os.close(leader)
    assert code == 0
    assert "\x1b[2mdef add(a):\x1b[0m" in text
    assert "\x1b[32m" in text
    assert "exit 4 after layer 4:" in text


def test_what_a_terminal_would_obey_is_replaced():
    assert printable("a\x1b[31mb\n\tc\x07é") == "a\ufffd[31mb\n\tc\ufffdé"
    assert exit_styles(4) == ["green", "cyan", "blue", ""]
    assert exit_styles(1) == [""]
    assert len(exit_styles(12)) == 12


# --- verify -------------------------------------------------------------------------------------


def test_verify_agrees_with_a_right_decoder(nvium, letters, call):
    code, out, _ = call("verify", letters, "--json", "--max-deferred", 2, "--max-new-tokens", 12)
    report = json.loads(out)
    assert code == 0
    assert report["ok"]
    assert [check["ok"] for check in report["checks"]] == [True] * 4
    values = {check["check"]: check["value"] for check in report["checks"]}
    assert values["sequence coupling"] == "4/4"
    assert 0 < values["keys and values"] < 1e-11
    assert values["sampled texts"] > 0.001
    code, out, _ = call("verify", nvium, "--prompt", "def add(a):", "--num-prompts", 1,
                        "--max-new-tokens", 8)  # fmt: skip
    assert code == 0
    assert "2/2" in out
    assert "too large to list all texts" in out


@pytest.mark.parametrize("where", ["coupling", "cache", "likelihood", "nan"])
def test_verify_notices_a_defect(letters, call, monkeypatch, where):
    if where == "coupling":
        noise = exactness.PositionNoise
        monkeypatch.setattr(exactness, "PositionNoise", lambda seed, k: noise(seed + 1, k))
    elif where == "cache":
        real = exactness.cache_difference
        monkeypatch.setattr(exactness, "cache_difference", lambda *a: real(*a) + 1e-6)
    else:
        value = float("nan") if where == "nan" else 1e-4
        monkeypatch.setattr(exactness, "logprob_difference", lambda *a: value)
    code, out, _ = call("verify", letters, "--draws", 0)
    assert code == 1
    assert out.count("DIFFERS") == 1


def test_verify_notices_a_sampler_of_another_distribution(letters, call, monkeypatch):
    """Exits drawn right, tokens from a truncated head."""

    class Truncated(PiggybackDecoder):
        def __init__(self, *args, **settings):
            super().__init__(*args, **{**settings, "warp": Warp(top_k=2)})

    network = load(str(letters)).model
    expected = verify.text_probabilities(network, 3)
    assert len(expected) == 125
    assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
    good = verify.sampled_texts(PiggybackDecoder(network), 3, 3000, 0)
    bad = verify.sampled_texts(Truncated(network), 3, 3000, 0)
    assert verify.chi_square(good, expected) > 0.001
    assert verify.chi_square(bad, expected) < 1e-6
    monkeypatch.setattr(exactness, "PiggybackDecoder", Truncated)
    code, out, _ = call("verify", letters, "--num-prompts", 0)
    assert code == 1
    assert "sampled texts" in out


def test_p_values_are_uniform_for_right_samples():
    """Of the approximation itself: 400 samples from a known distribution."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(40, generator=generator) + 0.02
    expected = {(i,): float(w / weights.sum()) for i, w in enumerate(weights)}
    values = []
    for _ in range(400):
        drawn = torch.multinomial(weights, 600, replacement=True, generator=generator)
        counts = {(i,): int(n) for i, n in enumerate(drawn.bincount(minlength=40))}
        values.append(verify.chi_square(counts, expected))
    for q in (0.1, 0.5, 0.9):
        share = sum(v < q for v in values) / len(values)
        assert share == pytest.approx(q, abs=0.08)


def test_a_policy_that_does_not_sample_the_mixture_gets_no_chi_square(letters, call):
    code, out, _ = call("verify", letters, "--policy", "fixed:1", "--num-prompts", 2)
    assert code == 0
    assert "does not sample the mixture" in out


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "{base}"], 2, "OUT"),
        (["convert", "{none}", "{new}"], 2, "no config.json"),
        (["convert", "{base}", "{nvium}"], 2, "not empty"),
        (["convert", "{nvium}", "{new}"], 2, "already is an N-vium"),
        (["convert", "{base}", "{new}", "--exits", "2,1"], 2, "strictly increasing"),
        (["convert", "{base}", "{new}", "--exits", "x"], 2, "--exits"),
        (["convert", "{base}", "{new}", "--gate-init", "open"], 2, "'closed' or a finite number"),
        (["convert", "{base}", "{new}", "--tying", "lm"], 2, "--tying"),
        (["convert", "{broken}", "{new}"], 3, "cannot load the checkpoint"),
        (["export", "{base}", "{new}"], 2, "not an N-vium"),
        (["export", "{none}", "{new}"], 2, "no config.json"),
        (["export", "{nvium}", "{base}"], 2, "not empty"),
        (["info"], 2, "--preset NAME"),
        (["info", "{nvium}", "--preset", "tiny"], 2, "one of them"),
        (["info", "--preset", "tinny"], 2, "did you mean 'tiny'"),
        (["info", "{base}"], 2, "not an N-vium"),
        (["info", "{none}"], 2, "no config.json"),
        (["generate", "{nvium}"], 2, "--prompt"),
        (["generate", "{base}", "--prompt", "x"], 2, "without routers"),
        (["generate", "{nvium}", "--prompt", "x", "--policy", "deep"], 2, "unknown decode policy"),
        (["generate", "{nvium}", "--prompt", "x", "--temperature", "-1"], 2, "--temperature"),
        (["generate", "{nvium}", "--prompt", "x", "--max-new-tokens", "0"], 2, "at least 1"),
        (["generate", "{nvium}", "--prompt", "{long}"], 2, "give a shorter prompt"),
        (["generate", "{nvium}", "--prompt", "x", "--trace", "{none}/t.json"], 2, "no such folder"),
        (["verify", "{none}"], 2, "no config.json"),
        (["verify", "{nvium}", "--policy", "greedy"], 2, "unknown decode policy"),
        (["verify", "{nvium}", "--num-prompts", "0", "--draws", "0"], 2, "nothing to check"),
        (["verfy", "{nvium}"], 2, "did you mean 'verify'"),
    ],
)
def test_bad_input_is_one_clear_error(base, nvium, tmp_path, call, arguments, code, message):
    broken = tmp_path / "broken"
    base_folder(broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    places = {"base": base, "nvium": nvium, "none": tmp_path / "none", "new": tmp_path / "new",
              "broken": broken, "long": "word " * 400}  # fmt: skip
    got, out, err = call(*(a.format(**places) for a in arguments))
    assert (got, out) == (code, "")
    lines = [line for line in err.splitlines() if line.startswith(("error:", "  hint:"))]
    assert lines[0].startswith("error: ")
    assert message in err
    assert len(lines) <= 2
    assert not (tmp_path / "new").exists()


def test_the_modules_of_commands_are_imported_when_invoked():
    probe = "import sys; import tenfold_nvium.plugin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
