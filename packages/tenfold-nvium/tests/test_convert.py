"""Conversion: the base bit for bit behind closed gates, exact shares behind finite ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from nvium_bases import KINDS, base_config, base_folder, base_model
from nvium_cases import tiny_model
from tenfold.errors import ConfigError
from tenfold_nvium.convert import CLOSED, convert, convert_folder, gates_are_closed, set_gates
from tenfold_nvium.decode import PiggybackDecoder
from tenfold_nvium.lm import load
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.sampling import Warp
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GraniteConfig


def ids(length=19, rows=2, vocab=97, seed=0):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("final_adapter", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_are_the_base_bit_for_bit(kind, final_adapter):
    base = base_model(kind)
    network = convert(base, exit_layers=[1, 3], final_adapter=final_adapter)
    for length in (1, 2, 7, 33, 129, 256):
        with torch.no_grad():
            wanted = base(ids(length)).logits
            got = network(ids(length), output_exit_logits=True)
        assert torch.equal(got.exit_logits[:, :, -1], wanted)
        assert torch.equal(got.logits, wanted.log_softmax(-1))
        assert got.exit_log_probs.exp()[..., -1].eq(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_bases_through_both_decoders(kind):
    base = base_model(kind)
    network = convert(base, num_exits=3)
    prompt = ids(5, rows=1)
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    wanted = base.generate(prompt, **settings)
    assert torch.equal(network.generate(prompt, **settings), wanted)
    assert len(set(wanted[0].tolist())) > 5
    text = wanted[0, 5:].tolist()
    for policy in ("certified", "sample", "full"):
        decoder = PiggybackDecoder(network, policy, warp=Warp(0.0))
        assert decoder.generate([prompt[0].tolist()], 40).rows[0].tokens == text


def test_finite_gates_start_at_their_share_and_can_learn():
    network = convert(base_model("llama"), exit_layers=[1, 2, 3], gate_init=-4.0)
    output = network(ids(), labels=ids(), compute_penalty=0.0)
    g = torch.tensor(-4.0).sigmoid()
    shares = torch.stack([g, (1 - g) * g, (1 - g) ** 2 * g, (1 - g) ** 3])
    torch.testing.assert_close(output.exit_shares, shares, rtol=1e-6, atol=0)
    output.loss.backward()
    assert all(exit_.router.head.bias.grad.abs().max() > 0 for exit_ in network.exits)
    assert not gates_are_closed(network)


def test_closed_gates_have_no_gradient_and_can_be_set_anew():
    network = convert(base_model("llama"))
    assert gates_are_closed(network)
    network(ids(), labels=ids(), compute_penalty=0.0).loss.backward()
    for exit_ in network.exits:
        assert not exit_.router.head.bias.grad.any()
    set_gates(network, 0.0)
    assert not gates_are_closed(network)
    with torch.no_grad():
        shares = network(ids()).exit_log_probs.exp()[0, 0]
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.125, 0.125]))


def test_router_temperature_does_not_change_the_first_share():
    model = tiny_model(router_temperature=2.5)
    set_gates(model, -3.0)
    with torch.no_grad():
        odds = model(ids(vocab=23)).gate_log_odds
    torch.testing.assert_close(odds, torch.full_like(odds, -3.0))


def test_an_early_exit_starts_as_the_truncated_base():
    """Final norm and head on the state after its layers: the logit lens."""
    base = base_model("qwen2")
    network = convert(base, exit_layers=[2])
    with torch.no_grad():
        got = network(ids(), output_exit_logits=True).exit_logits[:, :, 0]
        state = base(ids(), output_hidden_states=True).hidden_states[2]
        wanted = base.lm_head(base.model.norm(state))
    assert torch.equal(got, wanted)
    ones = convert(base, exit_layers=[2], head_init="ones")
    assert ones.exits[0].norm.weight.eq(1).all()


def test_the_given_model_is_copied_and_stays_as_it_is():
    base = base_model("llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    network = convert(base)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_conversion_is_a_function_of_its_seed():
    base = base_model("llama")
    a, b, c = (convert(base, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["exits.0.adapter.down.weight"], c["exits.0.adapter.down.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_converts_with_everything_beside_the_weights(tmp_path, kind):
    base = base_folder(tmp_path / "base", kind)
    convert_folder(tmp_path / "base", tmp_path / "out", exit_layers=[1, 2])
    lm = load(str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    assert lm.model.config.eos_token_id == [0, 7]
    assert lm.model.generation_config.eos_token_id == [0, 7]
    assert lm.model.generation_config.temperature == 0.7
    assert lm.model.generation_config.do_sample
    old = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert lm.tokenizer.get_vocab() == old.get_vocab()
    assert lm.tokenizer.chat_template == old.chat_template
    assert lm.encode("def add(a): Ünïcode") == old.encode("def add(a): Ünïcode")
    with torch.no_grad():
        wanted = base(ids(vocab=200)).logits
        got = lm.model(ids(vocab=200), output_exit_logits=True)
    assert torch.equal(got.exit_logits[:, :, -1], wanted)


def test_half_precision_is_kept_and_can_be_changed(tmp_path):
    base_folder(tmp_path / "base", dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    network = convert(tmp_path / "base")
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        got = network(ids(), output_exit_logits=True)
        assert torch.equal(got.exit_logits[:, :, -1], base(ids()).logits)
    wide = convert(tmp_path / "base", dtype="float32")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_a_tokenizer_without_its_class_gets_one(tmp_path):
    base_folder(tmp_path / "base", "qwen2")
    settings = tmp_path / "base" / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    del values["tokenizer_class"]
    settings.write_text(json.dumps(values))
    convert_folder(tmp_path / "base", tmp_path / "out")
    old = AutoTokenizer.from_pretrained(tmp_path / "base")
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert new.encode("def add(a):") == old.encode("def add(a):")


def test_sampling_settings_beside_greedy_decoding_can_be_saved(tmp_path):
    """Llama 2's own `generation_config.json`: temperature without `do_sample`."""
    base_folder(tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}))
    convert_folder(tmp_path / "base", tmp_path / "out")
    settings = load(str(tmp_path / "out")).model.generation_config
    assert settings.eos_token_id == 2
    assert not settings.do_sample


# --- Vocabulary ---------------------------------------------------------------------------------

RESAVE = """
import sys, torch
from safetensors.torch import load_file, save_file
import tenfold_nvium.modeling
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = load_file(sys.argv[1] + "/ids.safetensors")["ids"]
with torch.no_grad():
    save_file({"logits": model(ids, output_exit_logits=True).exit_logits}, sys.argv[2])
"""


@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # free and tied embeddings
@pytest.mark.parametrize("tying", ["lm_head", "embeddings", "none"])
def test_resizing_keeps_every_head_and_its_tying(tmp_path, tying, kind, grow):
    size = 105 if grow else 91
    network = convert(base_model(kind), exit_layers=[1, 2], gate_init=-1.0, exit_head_tying=tying)
    with torch.no_grad():
        if tying == "none":
            for k, exit_ in enumerate(network.exits):
                exit_.head.weight.add_(0.1 * (k + 1))  # no longer copies of one another
    before = [network.head_weight(k).detach().clone() for k in range(3)]
    network.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, 97)
    for k in range(3):
        weight = network.head_weight(k)
        assert weight.shape[0] == size
        assert torch.equal(weight[:kept], before[k][:kept])
    shared = {"lm_head": network.lm_head.weight, "embeddings": network.model.embed_tokens.weight}
    for k in range(2):
        own = network.exits[k].head
        assert (own is None) == (tying != "none")
        if tying != "none":
            assert network.head_weight(k) is shared[tying]
    # What training changes in the shared weight shows in every tied head.
    tokens = ids(vocab=kept)
    loss = network(tokens, labels=tokens).loss
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
        network.eval()
        logits = network(tokens, output_exit_logits=True).exit_logits
    network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, NviumForCausalLM)
    assert loaded.config.vocab_size == size
    with torch.no_grad():
        assert torch.equal(loaded(tokens, output_exit_logits=True).exit_logits, logits)


@pytest.mark.parametrize("tying", ["lm_head", "embeddings", "none"])
def test_resized_heads_survive_a_fresh_process(tmp_path, tying):
    from safetensors.torch import load_file, save_file

    network = convert(base_model("llama"), exit_layers=[2], gate_init=-1.0, exit_head_tying=tying)
    network.resize_token_embeddings(104)
    network.save_pretrained(tmp_path)
    save_file({"ids": ids(vocab=104)}, tmp_path / "ids.safetensors")
    command = [sys.executable, "-c", RESAVE, str(tmp_path), str(tmp_path / "out.safetensors")]
    subprocess.run(command, check=True, timeout=120)
    with torch.no_grad():
        wanted = network(ids(vocab=104), output_exit_logits=True).exit_logits
    # Another process may use another number of threads, which changes sums in the last bits.
    got = load_file(tmp_path / "out.safetensors")["logits"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


# --- What is refused ----------------------------------------------------------------------------


class Carrier:
    """A model as far as the checks of a configuration look."""

    def __init__(self, config):
        self.config = config


GRANITE = {"logits_scaling": 6.0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GemmaConfig(), "supported: llama, mistral, qwen2, qwen3"),
        (GraniteConfig(**GRANITE), "logits_scaling"),
        (base_config("mistral", sliding_window=8), "window 8"),
        (base_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
         "sliding_attention"),
        (base_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4,
                     "factor": 2.0}), "'dynamic'"),
        (base_config("llama", rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 4,
            "short_factor": [1.0] * 4, "original_max_position_embeddings": 64}), "'longrope'"),
        (base_config("llama", quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
    ],
)  # fmt: skip
def test_bases_that_exits_would_get_wrong_are_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        convert(Carrier(config))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exit_layers": [3, 1]}, "strictly increasing"),
        ({"exit_layers": [1, 4]}, r"outside 1\.\.3"),
        ({"exit_layers": [1], "num_exits": 2}, "both given"),
        ({"num_exits": 5}, "do not fit into 4 layers"),
        ({"gate_init": "open"}, "'closed' or a finite number"),
        ({"gate_init": float("nan")}, "'closed' or a finite number"),
        ({"head_init": "random"}, "copy_final_norm, ones"),
        ({"exit_head_tying": "lmhead"}, "exit_head_tying"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, words):
    with pytest.raises(ConfigError, match=words):
        convert(base_model("llama"), **settings)


def test_bad_folders_are_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        convert(tmp_path / "nowhere")
    base_folder(tmp_path / "base")
    convert_folder(tmp_path / "base", tmp_path / "out", gate_init=CLOSED)
    with pytest.raises(ConfigError, match="already is an N-vium"):
        convert(tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        convert_folder(tmp_path / "base", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="current folder"):
        convert_folder(tmp_path / "base", ".")
    with pytest.raises(ConfigError, match="is a file"):
        convert_folder(tmp_path / "base", tmp_path / "file")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ConfigError, match="cannot read"):
        convert(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        convert(tmp_path / "base")


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    base_folder(tmp_path / "base")

    def fail(source, target):
        raise RuntimeError("power cut")

    monkeypatch.setattr("tenfold_nvium.convert.copy_tokenizer", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        convert_folder(tmp_path / "base", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_base_without_all_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 .*up_proj"):
        convert(tmp_path)
