"""The Fisher: equals brute force, ignores batching, knows where it comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.errors import CapabilityError, ConfigError
from tenfold.lm.batching import scored_positions
from tenfold.records import Completion
from tenfold_dabgo.batches import sample_means, token_batch
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.fisher import FisherDiagonal, FisherFacts
from tenfold_dabgo.fisher_estimate import draw_texts, estimate_fisher
from tenfold_dabgo.weights import fingerprint, select_parameters


def brute(model, dataset, reduction="mean"):
    total, count = {}, 0
    for i in range(len(dataset)):
        if not dataset.scorable[i]:
            continue
        batch = token_batch(dataset, [i], 0)
        model.module().zero_grad()
        sample_means(model.token_loss(batch), batch, reduction)[0].backward()
        count += 1
        for name, p in model.module().named_parameters():
            total[name] = total.get(name, 0) + p.grad.square()
    return {name: value / count for name, value in total.items()}


def assert_same(a, b, rtol=1e-9):
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("route", ["capture", "loop"])
@pytest.mark.parametrize("kind", ["sample_mean", "sample_sum"])
def test_fisher_equals_a_loop_over_samples(model64, make, kind, route):
    dataset = make.corpus(7)
    got = estimate_fisher(model64, dataset, kind, route=route)
    assert_same(got.values, brute(model64, dataset, kind.removeprefix("sample_")))
    assert got.facts.n_samples == 7
    assert got.facts.n_tokens == int(dataset.n_scored.sum())


def test_fisher_does_not_depend_on_batch_size_padding_or_order(make):
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(9)
    reference = estimate_fisher(model, dataset, token_budget=4096)
    for budget in (1, 40, 100):
        assert_same(estimate_fisher(model, dataset, token_budget=budget).values, reference.values)
    order = np.random.default_rng(1).permutation(len(dataset))
    assert_same(estimate_fisher(model, dataset.subset(order)).values, reference.values)


def test_sum_fisher_is_t_squared_times_mean_fisher_at_equal_length(make):
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(5, low=11, high=11)
    mean, total = (estimate_fisher(model, dataset, f"sample_{k}") for k in ("mean", "sum"))
    assert_same({n: 100 * v for n, v in mean.values.items()}, total.values)


def test_squares_are_taken_per_sample_not_per_batch(make):
    """(mean gradient of the batch)^2 is what a per-batch square would give."""
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(8)
    batch = token_batch(dataset, range(8), 0)
    model.module().zero_grad()
    sample_means(model.token_loss(batch), batch).mean().backward()
    per_batch = sum(float(p.grad.square().sum()) for p in model.module().parameters())
    per_sample = sum(float(v.sum()) for v in estimate_fisher(model, dataset).values.values())
    assert per_sample > 2 * per_batch


def test_token_fisher_equals_per_token_gradients_where_tokens_do_not_mix(make):
    """With attention's output silenced, every token's loss has its own gradient."""
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(4)
    with torch.no_grad():
        for block in model.model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.attn.c_proj.bias.zero_()
    got = estimate_fisher(model, dataset, "token").values
    name = "transformer.h.1.mlp.c_fc.weight"
    total, count = 0.0, 0
    for i in range(len(dataset)):
        batch = token_batch(dataset, [i], 0)
        for t in range(1, batch.input_ids.shape[1]):
            model.module().zero_grad()
            model.token_loss(batch)[0, t].backward()
            total = total + dict(model.module().named_parameters())[name].grad.square()
            count += 1
    torch.testing.assert_close(got[name], total / count)


def test_token_fisher_refuses_layers_it_cannot_see(make):
    model = make.gpt2()
    model.model.extra = torch.nn.Parameter(torch.ones(16))
    plain = model.model.transformer.ln_f.forward
    model.model.transformer.ln_f.forward = lambda x: plain(x) * torch.exp(model.model.extra)
    with pytest.raises(CapabilityError, match="layer by layer"):
        estimate_fisher(model, make.corpus(3), "token")


def test_subset_is_random_but_fixed_by_the_seed(make):
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(12)
    a, b = (estimate_fisher(model, dataset, max_samples=5, seed=3) for _ in range(2))
    assert a.facts.n_samples == 5
    assert_same(a.values, b.values)
    other = estimate_fisher(model, dataset, max_samples=5, seed=4)
    assert any(not torch.equal(a.values[n], other.values[n]) for n in a.values)


def test_estimate_leaves_the_model_as_it_was(make):
    model = make.gpt2()
    model.module().train()
    model.model.transformer.wte.weight.requires_grad_(False)
    before = fingerprint(model)
    estimate_fisher(model, make.corpus(4))
    assert fingerprint(model) == before
    assert model.module().training
    assert not model.model.transformer.wte.weight.requires_grad
    assert model.model.transformer.wpe.weight.requires_grad
    assert all(p.grad is None for p in model.module().parameters())


def test_interrupted_estimate_goes_on_and_gives_the_same(make, tmp_path, monkeypatch):
    monkeypatch.setattr("tenfold_dabgo.fisher_estimate.SAVE_EVERY", 1)
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(10)
    seen, path = [], tmp_path / "partial.safetensors"

    def stop(n):
        seen.append(n)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, dataset, token_budget=20, advance=stop, resume=path)
    assert path.exists()
    rest = []
    got = estimate_fisher(model, dataset, token_budget=20, advance=rest.append, resume=path)
    assert sum(rest) + sum(seen) == 10
    assert not path.exists()
    for name, value in estimate_fisher(model, dataset, token_budget=20).values.items():
        assert torch.equal(got.values[name], value)


def test_sampled_fisher_draws_texts_from_the_model(make):
    """Different texts for equal prompts, of the corpus's lengths, fixed by the seed."""
    model, dataset = make.gpt2(), make.corpus(6)
    with pytest.raises(CapabilityError, match="generate"):
        estimate_fisher(model, dataset, "sampled")
    calls = []

    def generate(prompts, config):
        calls.append(config)
        generator = np.random.default_rng(config.seed)
        return [
            [
                Completion("", generator.integers(0, 48, config.max_new_tokens).tolist())
                for _ in range(config.n)
            ]
            for _ in prompts
        ]

    model.generate = generate
    same = TokenDataset.from_ids([[1, *range(2, 2 + n)] for n in (4, 6, 8)])
    drawn = draw_texts(model, same, seed=0)
    assert [len(drawn.ids(i)) for i in range(3)] == [5, 7, 9]
    assert all(drawn.ids(i)[0] == 1 for i in range(3))
    assert len({drawn.ids(i)[:5].tobytes() for i in range(3)}) == 3
    assert all(c.temperature == 1.0 for c in calls)
    assert estimate_fisher(model, same, "sampled").facts.n_samples == 3


def test_file_round_trip_keeps_values_and_facts(make, tmp_path):
    model, dataset = make.gpt2(), make.corpus(4)
    fisher = estimate_fisher(model, dataset)
    fisher.save(tmp_path / "f.safetensors")
    again = FisherDiagonal.load(tmp_path / "f.safetensors")
    assert again.facts == fisher.facts
    assert_same(again.values, fisher.values, rtol=0)
    again.check(fingerprint(model), dataset.content_hash(), len(dataset), force=False)
    assert 0 < fisher.quantiles()[0.1] < fisher.quantiles()[0.9]


def test_fisher_of_another_model_or_corpus_is_refused_unless_forced(make):
    model, dataset = make.gpt2(), make.corpus(4)
    fisher = estimate_fisher(model, dataset)
    other = make.corpus(5)
    with pytest.raises(ConfigError, match="corpus of 4 samples, now 5"):
        fisher.check(fingerprint(model), other.content_hash(), len(other), force=False)
    with pytest.raises(ConfigError, match="estimated on something else: model"):
        fisher.check("0000", dataset.content_hash(), len(dataset), force=False)
    fisher.check("0000", dataset.content_hash(), len(dataset), force=True)
    assert "estimated on something else" in fisher.warnings[0]


def test_fisher_with_missing_or_misshapen_weights_names_them(make):
    params = select_parameters(make.gpt2().module())
    values = {n: torch.ones_like(p) for n, p in params.items()}
    name = "transformer.wpe.weight"
    for broken, message in (
        ({n: v for n, v in values.items() if n != name}, rf"1 missing \({name}\)"),
        ({**values, name: torch.ones(3)}, rf"{name}: \(3,\) for \(32, 16\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            FisherDiagonal(broken, FisherFacts("file", 1, 1)).aligned(params)


@pytest.mark.parametrize(
    ("damping", "message"),
    [
        (-1e-6, "0 or more"),
        ("relative:-1", "0 or more"),
        ("some", "number or 'relative"),
        (0.0, "zero and the damping is 0"),
        (float("nan"), "0 or more"),
    ],
)
def test_damping_that_cannot_work_is_refused(damping, message):
    fisher = FisherDiagonal({"w": torch.tensor([0.0, 1.0])}, FisherFacts("file", 1, 1))
    with pytest.raises(ConfigError, match=message):
        fisher.precondition({"w": torch.zeros(2)}, damping)


def test_relative_damping_is_a_multiple_of_the_mean():
    fisher = FisherDiagonal({"w": torch.tensor([1.0, 3.0])}, FisherFacts("file", 1, 1))
    scale, epsilon = fisher.precondition({"w": torch.zeros(2)}, "relative:1.5")
    assert epsilon == 3.0
    torch.testing.assert_close(scale["w"], torch.tensor([1 / 4, 1 / 6]))


def test_bad_fisher_files_are_one_clear_message(tmp_path):
    with pytest.raises(ConfigError, match="no Fisher file"):
        FisherDiagonal.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not it")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        FisherDiagonal.load(tmp_path / "bad.safetensors")
    negative = FisherDiagonal({"w": torch.tensor([-1.0])}, FisherFacts("file", 1, 1))
    negative.save(tmp_path / "neg.safetensors")
    with pytest.raises(ConfigError, match="w has negative or non-finite"):
        FisherDiagonal.load(tmp_path / "neg.safetensors")


def test_a_corpus_without_scorable_samples_has_no_fisher(make):
    dataset = TokenDataset.from_ids([[1], [2]])
    with pytest.raises(ConfigError, match="no training sample has two tokens"):
        estimate_fisher(make.gpt2(), dataset)
    with pytest.raises(ConfigError, match="cannot be estimated"):
        estimate_fisher(make.gpt2(), make.corpus(2), "file")


def test_scored_positions_need_a_real_token_before_them(make):
    dataset = TokenDataset.from_ids([[1, 2, 3], [4, 5]])
    assert scored_positions(token_batch(dataset, [0, 1], 0)).tolist() == [
        [False, True, True],
        [False, True, False],
    ]
