"""The plugin's components: conformance, exact scores, exits, training end to end."""

from __future__ import annotations

import json

import pytest
import torch
from nvium_cases import TEXTS, Texts, tiny_model
from tenfold.capabilities import TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import GenerationConfig
from tenfold.testing.context import FakeContext
from tenfold_nvium.lm import NviumLM, load, load_dense
from tenfold_nvium.trainers import DensePretrainer, Pretrainer
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = "def add(a, b):"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny trained N-vium."""
    ctx = FakeContext(tmp_path_factory.mktemp("nvium"))
    trainer = Pretrainer(Texts(), preset="tiny", steps=30, eval_steps=10)
    return trainer.fit(ctx, None, {}).path


@pytest.fixture(scope="session")
def lm(checkpoint) -> NviumLM:
    return load(str(checkpoint))


@pytest.fixture(scope="session")
def exact_lm(tmp_path_factory) -> NviumLM:
    """Random fp64 weights with the tokenizer of the toy texts: every exit matters."""
    tokenizer = train_bpe(TEXTS, 300)
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return NviumLM(model, tokenizer)


def test_the_plugin_conforms(checkpoint):
    """Every law of the conformance kit that applies, on the trained tiny model."""
    from tenfold.testing import check_plugin

    findings = check_plugin(
        "nvium",
        params={
            "nvium:causal-lm": {"checkpoint": str(checkpoint)},
            "nvium:finetune": {"checkpoint": str(checkpoint), "steps": 2, "context_length": 32},
            "nvium:pretrain": {"preset": "tiny", "steps": 2},
            "nvium:pretrain-dense": {"preset": "tiny", "steps": 2},
        },
    )
    broken = [f for f in findings if f.status == "fail"]
    assert not broken, "\n".join(f.line() for f in broken)
    passed = {f.law for f in findings if f.subject == "model nvium:causal-lm"}
    assert len(passed) > 20


def test_greedy_text_is_the_argmax_of_the_mixture(exact_lm):
    config = GenerationConfig(max_new_tokens=25, temperature=0.0)
    (done,) = exact_lm.generate([PROMPT], config)[0]
    text = exact_lm.encode(PROMPT) + done.token_ids
    with torch.no_grad():
        logits = exact_lm.model(torch.tensor([text])).logits[0]
    start = len(exact_lm.encode(PROMPT)) - 1
    assert logits[start:-1].argmax(-1).tolist() == done.token_ids
    assert done.stats["policy"] == "certified"


def test_sampled_text_ignores_batch_neighbours_and_deferral(exact_lm):
    config = GenerationConfig(max_new_tokens=20, temperature=1.0, seed=3, n=2)
    prompts = [PROMPT, "x", "class A:\n    pass"]
    together = exact_lm.generate(prompts, config)
    for rows, limit in ((3, None), (2, 2), (1, 1)):
        other = NviumLM(exact_lm.model, exact_lm.tokenizer, decode_rows=rows, max_deferred=limit)
        again = other.generate(prompts[::-1], config)[::-1]
        for a, b in zip(together, again, strict=True):
            assert [c.token_ids for c in a] == [c.token_ids for c in b]


def test_log_probs_are_the_mixtures_own(exact_lm):
    config = GenerationConfig(max_new_tokens=12, temperature=0.8, logprobs=1, top_k=9)
    (done,) = exact_lm.generate([PROMPT], config)[0]
    (scores,) = exact_lm.score([(PROMPT, done.token_ids)])
    assert done.logprobs == pytest.approx(scores.logprobs, abs=1e-6)


def test_stats_tell_the_exits(exact_lm):
    config = GenerationConfig(max_new_tokens=30, temperature=1.0, seed=1)
    (done,) = exact_lm.generate([PROMPT], config)[0]
    exits = done.stats["exits"]
    assert len(exits) == len(done.token_ids)
    assert done.stats["exit_histogram"] == {str(k): exits.count(k) for k in range(1, 5)}
    assert done.stats["mean_depth"] == pytest.approx(sum(exits) / len(exits) / 4)
    assert len(set(exits)) > 1


def test_mixture_scope_warps_the_whole_mixture(exact_lm):
    exact = NviumLM(exact_lm.model, exact_lm.tokenizer, warp_scope="mixture")
    config = GenerationConfig(max_new_tokens=15, temperature=0.5, seed=2)
    (done,) = exact.generate([PROMPT], config)[0]
    assert done.stats["policy"] == "full"
    plain = GenerationConfig(max_new_tokens=15, temperature=1.0, seed=2)
    assert exact.generate([PROMPT], plain)[0][0].stats["policy"] == "sample"


def test_constrained_text_obeys_and_runs_at_full_depth(exact_lm):
    config = GenerationConfig(max_new_tokens=20, constraint={"choice": ["return", "pass"]})
    assert exact_lm.generate([PROMPT], config)[0][0].text in ("return", "pass")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_tokens_without_passes_change_no_text(exact_lm, temperature):
    value = {"type": "integer", "minimum": 0, "maximum": 50}
    schema = {
        "type": "object", "properties": {"value": value}, "required": ["value"],
        "additionalProperties": False,
    }  # fmt: skip
    config = GenerationConfig(
        max_new_tokens=24, temperature=temperature, seed=1, constraint={"json_schema": schema}
    )
    written = []
    for jump in (True, False):
        exact_lm.jump_forward = jump
        written.append([row[0] for row in exact_lm.generate([PROMPT, "x = "], config)])
    exact_lm.jump_forward = True
    assert [c.token_ids for c in written[0]] == [c.token_ids for c in written[1]]
    for fast, slow in zip(*written, strict=True):
        assert fast.stats["forward_passes"] < slow.stats["forward_passes"]


def test_exit_scores_mix_to_the_loss_under_padding(exact_lm):
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = TokenBatch(ids, mask)
    scores, loss = exact_lm.exit_scores(batch), exact_lm.token_loss(batch)
    mixed = -(scores.log_weights + scores.log_probs).logsumexp(-1)
    scored = torch.zeros_like(mask, dtype=torch.bool)
    scored[0, 5:], scored[1, 1:] = True, True
    torch.testing.assert_close(mixed[scored], loss[scored], rtol=0, atol=1e-12)
    assert loss[~scored].eq(0).all()
    assert scores.depths == (0.25, 0.5, 0.75, 1.0)
    with torch.no_grad():
        alone = exact_lm.token_loss(TokenBatch(ids[:1, 4:], mask[:1, 4:]))
    torch.testing.assert_close(alone[0], loss[0, 4:].detach(), rtol=0, atol=1e-12)


def test_hidden_states_are_the_layers_outputs(exact_lm):
    ids = torch.arange(1, 7)[None]
    batch = TokenBatch(ids, torch.ones_like(ids))
    states = exact_lm.hidden_states(batch, [0, 2, -1])
    assert states.layers == (0, 2, 4)
    assert torch.equal(states.states[0], exact_lm.model.model.embed_tokens(ids))
    full = exact_lm.model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states.states[2], full[4])
    with pytest.raises(ConfigError, match="layer 5"):
        exact_lm.hidden_states(batch, [5])


def test_training_lowers_the_loss_and_leaves_a_complete_checkpoint(checkpoint, lm):
    record = json.loads((checkpoint / "training.json").read_text())
    losses = [row["eval_loss"] for row in record["log"] if "eval_loss" in row]
    assert losses[-1] < losses[0] < 6.0
    assert {"exit-share-1", "expected-depth", "compute-penalty"} <= set(record["log"][0])
    curve = json.loads((checkpoint / "baseline.json").read_text())
    assert len(curve["values"]) == len(losses)
    assert lm.model.num_exits == 3
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


def test_dense_twin_then_controller(tmp_path):
    """The baseline's curve steers the N-vium's penalty; interrupted, it resumes to the same
    weights and the same beta."""
    dense = DensePretrainer(Texts(), preset="tiny", steps=20, eval_steps=5)
    baseline = dense.fit(FakeContext(tmp_path / "dense"), None, {}).path
    assert load_dense(str(baseline)).model.num_exits == 1
    settings = {
        "preset": "tiny", "steps": 20, "eval_steps": 5, "save_steps": 5,
        "controller": str(baseline / "baseline.json"), "compute_penalty": 0.3,
    }  # fmt: skip
    whole = Pretrainer(Texts(), **settings).fit(FakeContext(tmp_path / "whole"), None, {}).path

    def interrupt(done: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    ctx = FakeContext(tmp_path / "cut", on_advance=interrupt)
    with pytest.raises(KeyboardInterrupt):
        Pretrainer(Texts(), **settings).fit(ctx, None, {})
    cut = Pretrainer(Texts(), **settings).fit(FakeContext(tmp_path / "cut"), None, {}).path
    logs = [json.loads((p / "training.json").read_text())["log"] for p in (whole, cut)]
    betas = [[row["compute-penalty"] for row in log if "compute-penalty" in row] for log in logs]
    assert betas[0][-1] != 0.3
    assert betas[0] == betas[1]
    states = [load(str(p)).model.state_dict() for p in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_baseline_of_other_text_is_refused(tmp_path):
    dense = DensePretrainer(Texts(), preset="tiny", steps=2, eval_steps=1)
    baseline = dense.fit(FakeContext(tmp_path / "dense"), None, {}).path / "baseline.json"
    other = Pretrainer(Texts(TEXTS[1:]), preset="tiny", steps=2, controller=str(baseline))
    with pytest.raises(ConfigError, match="measured with another"):
        other.fit(FakeContext(tmp_path / "other"), None, {})


def test_a_given_tokenizer_is_used(checkpoint, tmp_path):
    trainer = Pretrainer(Texts(TEXTS[2:]), preset="tiny", steps=1, tokenizer=str(checkpoint))
    again = load(str(trainer.fit(FakeContext(tmp_path), None, {}).path))
    assert again.vocabulary_hash == load(str(checkpoint)).vocabulary_hash


def test_bad_checkpoints_and_settings_are_one_clear_error(tmp_path, checkpoint):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(str(tmp_path))
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    base.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'llama' model without routers"):
        load(str(tmp_path))
    with pytest.raises(ConfigError, match="has 3 exits"):
        load_dense(str(checkpoint))
    with pytest.raises(ConfigError, match="did you mean 'certified'"):
        load(str(checkpoint), policy="certifed")
    with pytest.raises(ConfigError, match="warp_scope"):
        load(str(checkpoint), warp_scope="token")
    with pytest.raises(ConfigError, match=r"outside 1\.\.2"):
        Pretrainer(Texts(), preset="tiny", exits=[3])
    with pytest.raises(ConfigError, match="cannot read the baseline"):
        Pretrainer(Texts(), preset="tiny", controller=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="no compute penalty to control"):
        Pretrainer(Texts(), preset="tiny", dense=True, controller=str(tmp_path / "x.json"))
