"""The baselines as components: trained end to end, conformance, exact loss, matched parameters."""

from __future__ import annotations

import json

import pytest
import torch
from baseline_cases import dense_of, tiny_calm, tiny_layerskip
from nvium_cases import TEXTS, Texts
from tenfold.capabilities import TokenBatch
from tenfold.errors import ConfigError
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import GenerationConfig
from tenfold.testing.context import FakeContext
from tenfold_nvium import lm as nvium_lm
from tenfold_nvium.baselines.calm import CalmDecoder
from tenfold_nvium.baselines.layerskip import LayerSkipDecoder
from tenfold_nvium.baselines.lm import CalmLM, LayerSkipLM, load_calm, load_layerskip
from tenfold_nvium.baselines.trainers import CalmPretrainer, LayerSkipPretrainer
from tenfold_nvium.baselines.training import LayerSkipSchedule
from tenfold_nvium.decode import Decodes, PiggybackDecoder
from tenfold_nvium.lm import NviumLM
from tenfold_nvium.trainers import DensePretrainer, Pretrainer

PROMPT = "def add(a, b):"
GREEDY = GenerationConfig(max_new_tokens=25, temperature=0.0)
SAMPLED = GenerationConfig(max_new_tokens=25, temperature=0.8, top_k=9, seed=3, n=2, logprobs=1)


@pytest.fixture(scope="session")
def calm_checkpoint(tmp_path_factory):
    ctx = FakeContext(tmp_path_factory.mktemp("calm"))
    return CalmPretrainer(Texts(), preset="tiny", steps=30, eval_steps=10).fit(ctx, None, {}).path


@pytest.fixture(scope="session")
def layerskip_checkpoint(tmp_path_factory):
    ctx = FakeContext(tmp_path_factory.mktemp("layerskip"))
    trainer = LayerSkipPretrainer(
        Texts(), preset="tiny", steps=30, eval_steps=10, early_exits=[1, 2], layer_dropout=0.3
    )
    return trainer.fit(ctx, None, {}).path


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe(TEXTS, 300)


def random_lm(kind, make, tokenizer, **settings):
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return kind(make(scale=0.15, **ends), tokenizer, **settings)


@pytest.mark.parametrize("name", ["calm", "layerskip"])
def test_the_components_conform(name, request):
    from tenfold.registry import load_registry
    from tenfold.testing.building import Workbench
    from tenfold.testing.kit import check_component

    checkpoint = request.getfixturevalue(f"{name}_checkpoint")
    settings = {
        f"nvium:{name}": {"checkpoint": str(checkpoint)},
        f"nvium:pretrain-{name}": {"preset": "tiny", "steps": 2},
    }
    registry = load_registry(lenient=True, cached=False)
    mine = [c for c in registry.items if c.id in settings]
    assert len(mine) == 2
    with Workbench(registry, settings) as bench:
        findings = [f for component in mine for f in check_component(component, bench)]
    broken = [f for f in findings if f.status == "fail"]
    assert not broken, "\n".join(f.line() for f in broken)
    assert sum(f.subject == f"model nvium:{name}" for f in findings) > 20


# --- Training -----------------------------------------------------------------------------------


def test_training_lowers_every_heads_loss(calm_checkpoint, layerskip_checkpoint):
    for checkpoint, heads in ((calm_checkpoint, 3), (layerskip_checkpoint, 2)):
        record = json.loads((checkpoint / "training.json").read_text())
        losses = [row["eval_loss"] for row in record["log"] if "eval_loss" in row]
        assert losses[-1] < losses[0] < 6.0
        logged = [row for row in record["log"] if "exit-loss-3" in row]
        assert sum(f"exit-loss-{k}" in logged[0] for k in (1, 2, 3)) == heads
        assert logged[-1]["exit-loss-3"] < logged[0]["exit-loss-3"]


def test_parameters_match_the_nvium_and_its_twin():
    """Same preset, same exits: dense, CALM and LayerSkip have one size (CALM: and its norms)."""
    for name in ("tiny", "quickstart", "small", "h768-l24"):
        dense = DensePretrainer(Texts(), preset=name).shape
        calm = CalmPretrainer(Texts(), preset=name).config()
        skip = LayerSkipPretrainer(Texts(), preset=name).config()
        from tenfold_nvium.presets import dense_parameters, dense_twin

        twin = dense_twin(dense.config())
        assert calm.intermediate_size == skip.intermediate_size == twin.intermediate_size
        assert dense_parameters(calm) == dense_parameters(skip) == dense_parameters(twin)
        assert calm.exit_layers == list(dense.exits)
    assert skip.exit_layers == list(range(2, 24, 2))
    assert calm.intermediate_size == 2184


def test_a_given_width_and_exits_are_the_matched_nviums():
    plain = LayerSkipPretrainer(Texts(), preset="quickstart").config()
    other = LayerSkipPretrainer(Texts(), preset="quickstart", early_exits=[1, 3]).config()
    assert other.exit_layers == [1, 3]
    assert other.intermediate_size == plain.intermediate_size
    calm = CalmPretrainer(Texts(), preset="quickstart", exits=[3]).config()
    assert calm.exit_layers == [3]
    assert calm.intermediate_size < plain.intermediate_size


@pytest.mark.parametrize("trainer", [CalmPretrainer, LayerSkipPretrainer])
def test_accumulation_and_interruption_change_nothing(trainer, tmp_path):
    """Nor does checkpointing: dropout, rotation and ramp are functions of step and row alone."""
    settings = {"preset": "tiny", "steps": 8, "save_steps": 3, "eval_rows": 0}
    if trainer is LayerSkipPretrainer:
        settings |= {"layer_dropout": 0.6, "dropout_curriculum": "constant", "early_exits": [1, 2]}
    else:
        settings |= {"exit_ramp": 0.5}

    def trained(folder, on_advance=None, **more):
        ctx = FakeContext(tmp_path / folder, on_advance=on_advance)
        return trainer(Texts(), **settings, **more).fit(ctx, None, {}).path

    def weights(path):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path).state_dict()

    def interrupt(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    whole = weights(trained("whole"))
    parts = weights(trained("parts", gradient_accumulation=4, gradient_checkpointing=True))
    with pytest.raises(KeyboardInterrupt):
        trained("cut", on_advance=interrupt)
    cut = weights(trained("cut"))
    other = weights(trained("other", seed=9))
    for name, value in whole.items():
        assert torch.equal(value, cut[name])
        torch.testing.assert_close(value, parts[name], rtol=0, atol=2e-5)
    assert any(not torch.allclose(v, other[n], atol=1e-3) for n, v in whole.items())


def test_layer_dropout_is_a_function_of_seed_step_and_row():
    model = tiny_layerskip(layer_dropout=0.5, dropout_curriculum="constant")
    one, two = LayerSkipSchedule(model, 10, seed=1), LayerSkipSchedule(model, 10, seed=1)
    for schedule in (one, two):
        schedule.prepare(3, 10)
    rows = torch.arange(2000)
    both = one.layers(rows)
    assert torch.equal(both[:, 700:710], two.layers(rows[700:710]))
    shares = 1 - both.double().mean(-1)
    assert shares.tolist() == pytest.approx(one.rates, abs=0.04)
    two.prepare(4, 10)
    assert not torch.equal(both, two.layers(rows))
    elsewhere = LayerSkipSchedule(model, 10, seed=2)
    elsewhere.prepare(3, 10)
    assert not torch.equal(both, elsewhere.layers(rows))
    still = tiny_layerskip(layer_dropout=0.0)
    quiet = LayerSkipSchedule(still, 10, seed=1)
    quiet.prepare(3, 10)
    assert quiet.layers(rows) is None


# --- Decoding through the component -------------------------------------------------------------


def test_layerskip_writes_the_dense_text(tokenizer):
    speculative = random_lm(LayerSkipLM, tiny_layerskip, tokenizer, exit_layer=1)
    dense = NviumLM(dense_of(speculative.model), tokenizer)
    prompts = [PROMPT, "class A:\n    pass"]
    for got, wanted in zip(
        speculative.generate(prompts, GREEDY), dense.generate(prompts, GREEDY), strict=True
    ):
        assert got[0].token_ids == wanted[0].token_ids
    stats = got[0].stats
    assert stats["kept"] <= stats["drafted"]
    assert 1 <= stats["tokens_per_check"] <= 5


def test_calm_at_one_writes_the_dense_text_and_says_when_it_does_not(tokenizer):
    full = random_lm(CalmLM, tiny_calm, tokenizer, threshold=1.0)
    dense = NviumLM(dense_of(full.model), tokenizer)
    for config in (GREEDY, SAMPLED):
        for got, wanted in zip(
            full.generate([PROMPT], config)[0], dense.generate([PROMPT], config)[0], strict=True
        ):
            assert got.token_ids == wanted.token_ids
            assert not got.stats["approximate"]
    early = CalmLM(full.model, tokenizer, threshold=0.05)
    (done,) = early.generate([PROMPT], GREEDY)[0]
    assert done.stats["approximate"]
    assert done.stats["mean_depth"] < 1
    assert sum(done.stats["exit_histogram"].values()) == len(done.token_ids)
    context = early.encode(PROMPT)
    values, exits = early.decoded_log_probs(context, done.token_ids)
    assert [k + 1 for k in exits] == done.stats["exits"]
    assert sum(values) != pytest.approx(early.score([(PROMPT, done.token_ids)])[0].total, abs=0.1)
    values, _ = full.decoded_log_probs(context, done.token_ids)
    assert values == pytest.approx(full.score([(PROMPT, done.token_ids)])[0].logprobs, abs=1e-9)


@pytest.mark.parametrize(("kind", "make"), [(CalmLM, tiny_calm), (LayerSkipLM, tiny_layerskip)])
def test_loss_hidden_states_and_log_probs_are_the_dense_models(kind, make, tokenizer):
    model = random_lm(kind, make, tokenizer)
    dense = NviumLM(dense_of(model.model), tokenizer)
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = TokenBatch(ids, mask)
    got, wanted = model.token_loss(batch), dense.token_loss(batch)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    a, b = (m.hidden_states(batch, [0, 2, -1]).states for m in (model, dense))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x[1], y[1], rtol=0, atol=1e-12)
    if kind is LayerSkipLM:
        for done in model.generate([PROMPT], SAMPLED)[0]:
            (scores,) = model.score([(PROMPT, done.token_ids)])
            assert done.logprobs == pytest.approx(scores.logprobs, abs=1e-9)


def test_constraints_hold_at_full_depth(tokenizer):
    config = GenerationConfig(max_new_tokens=20, constraint={"choice": ["return", "pass"]})
    for kind, make in ((CalmLM, tiny_calm), (LayerSkipLM, tiny_layerskip)):
        assert random_lm(kind, make, tokenizer).generate([PROMPT], config)[0][0].text in (
            "return",
            "pass",
        )


def test_one_interface_for_all_methods(tokenizer):
    """`trace` answers alike for dense, N-vium, CALM and LayerSkip."""
    calm = random_lm(CalmLM, tiny_calm, tokenizer, threshold=0.3)
    skip = random_lm(LayerSkipLM, tiny_layerskip, tokenizer)
    dense = NviumLM(dense_of(calm.model), tokenizer)
    decoders: list[Decodes] = [
        PiggybackDecoder(dense.model),
        CalmDecoder(calm.model),
        LayerSkipDecoder(skip.model),
    ]
    for decoder in decoders:
        done = decoder.generate([[1, 2], [3]], 5, seeds=[4, 5], eos_ids=[0], log_probs=True)
        assert [len(row.log_probs) for row in done.rows] == [len(r.tokens) for r in done.rows]
    for model in (dense, calm, skip):
        done = model.trace(model.encode(PROMPT), GenerationConfig(max_new_tokens=12))
        summary = done.trace.summary()
        assert summary["tokens"] == len(done.rows[0].tokens)
        assert len(summary["launches"]) == len(done.trace.depths)
        assert summary["prefill_s"] > 0


# --- Bad input ----------------------------------------------------------------------------------


def test_wrong_checkpoints_are_one_clear_error(
    calm_checkpoint, layerskip_checkpoint, tmp_path_factory
):
    ctx = FakeContext(tmp_path_factory.mktemp("other"))
    nvium = Pretrainer(Texts(), preset="tiny", steps=1).fit(ctx, None, {}).path
    ctx = FakeContext(tmp_path_factory.mktemp("dense"))
    dense = DensePretrainer(Texts(), preset="tiny", steps=1).fit(ctx, None, {}).path
    with pytest.raises(ConfigError, match="'nvium-calm' model; this component loads 'nvium'") as e:
        nvium_lm.load(str(calm_checkpoint))
    assert "nvium:calm" in e.value.hint
    with pytest.raises(ConfigError, match="'nvium-layerskip' model; this component loads"):
        load_calm(str(layerskip_checkpoint))
    with pytest.raises(ConfigError, match="'nvium' model; this component loads 'nvium-calm'"):
        load_calm(str(nvium))
    with pytest.raises(ConfigError, match="mixture of 3 exits"):
        load_layerskip(str(nvium))
    with pytest.raises(ConfigError, match="no trained one"):
        load_layerskip(str(dense))
    assert load_layerskip(str(dense), exit_layer=1).exit_layer == 1
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_calm(str(tmp_path_factory.mktemp("empty")))


def test_bad_settings_are_one_clear_error(calm_checkpoint, layerskip_checkpoint, tokenizer):
    with pytest.raises(ConfigError, match="measure 'margn'"):
        load_calm(str(calm_checkpoint), measure="margn")
    with pytest.raises(ConfigError, match=r"threshold is -0\.1"):
        load_calm(str(calm_checkpoint), threshold=-0.1)
    with pytest.raises(ConfigError, match="draft_length is 0"):
        load_layerskip(str(layerskip_checkpoint), draft_length=0)
    with pytest.raises(ConfigError, match=r"exit_layer is 3; .*1\.\.2"):
        load_layerskip(str(layerskip_checkpoint), exit_layer=3)
    with pytest.raises(ConfigError, match="trained at depths 1, 3"):
        random_lm(LayerSkipLM, tiny_layerskip, tokenizer, exit_layer=2)
    with pytest.raises(ConfigError, match=r"outside 1\.\.2"):
        LayerSkipPretrainer(Texts(), preset="tiny", early_exits=[3])
    with pytest.raises(ConfigError, match="exit_weights 'deep'"):
        CalmPretrainer(Texts(), preset="tiny", exit_weights="deep")
