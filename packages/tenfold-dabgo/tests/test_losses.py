"""The loss pass: equals the model's own loss, ignores batching, survives interruptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_dabgo.corpus import TokenDataset
from tenfold_dabgo.losses import LossPass
from tenfold_dabgo.shards import ShardStore
from tenfold_dabgo.weights import borrowed, copy_of


def run(model, dataset, variants=None, token_budget=8192, precision="float32", **options):
    with borrowed(model, grad=False) as params:
        variants = variants or {"base": copy_of(params)}
        return LossPass(model, params, dataset, variants, token_budget, precision).run(**options)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_loss_pass_equals_the_hugging_face_loss_per_sample(make, arch):
    model, dataset = getattr(make, arch)(), make.corpus(9)
    got = run(model, dataset).means["base"]
    for i in range(len(dataset)):
        ids = torch.from_numpy(dataset.ids(i)[None].astype(np.int64))
        assert got[i] == pytest.approx(float(model.model(ids, labels=ids).loss.detach()), abs=1e-5)


def test_loss_pass_does_not_depend_on_batches_padding_or_order(make):
    model, dataset = make.llama(), make.corpus(11)
    reference = run(model, dataset).means["base"]
    for options in ({"token_budget": 1}, {"token_budget": 50}, {"shard_samples": 3}):
        np.testing.assert_allclose(
            run(model, dataset, **options).means["base"], reference, atol=1e-5
        )
    order = np.random.default_rng(0).permutation(11)
    np.testing.assert_allclose(
        run(model, dataset.subset(order)).means["base"], reference[order], atol=1e-5
    )


def test_mean_of_token_losses_is_the_sample_loss(make):
    model, dataset = make.gpt2(dtype=torch.float64), make.corpus(6)
    table = run(model, dataset, per_token=True)
    for i, values in table.tokens["base"].items():
        assert len(values) == dataset.lengths[i]
        assert np.isnan(values[0])
        assert np.mean(values[1:], dtype=np.float64) == pytest.approx(
            table.means["base"][i], abs=1e-6
        )


def test_samples_without_a_scored_token_are_nan(make):
    dataset = TokenDataset.from_ids([[1, 2, 3], [4], [], [5, 6]])
    table = run(make.gpt2(), dataset, per_token=True)
    assert np.isnan(table.means["base"]).tolist() == [False, True, True, False]
    assert sorted(table.tokens["base"]) == [0, 3]


def test_every_weight_set_gets_its_own_losses_and_the_model_stays(make):
    model, dataset = make.gpt2(), make.corpus(5)
    other = {n: p.detach() * 1.5 for n, p in model.module().named_parameters()}
    base = copy_of(dict(model.module().named_parameters()))
    table = run(model, dataset, {"base": base, "other": other})
    np.testing.assert_array_equal(table.means["base"], run(model, dataset).means["base"])
    assert np.abs(table.means["base"] - table.means["other"]).min() > 1e-4
    for name, p in model.module().named_parameters():
        assert torch.equal(p, base[name])


def test_a_killed_pass_goes_on_and_gives_identical_losses(make, tmp_path):
    model, dataset = make.gpt2(), make.corpus(12)
    reference = run(model, dataset, shard_samples=3, per_token=True)
    store, calls = ShardStore.open(tmp_path / "s", "key"), []

    def stop(n):
        calls.append(n)
        if sum(calls) >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, dataset, shard_samples=3, per_token=True, store=store, advance=stop)
    assert len(list((tmp_path / "s").glob("*.npz"))) == 2
    store.path(1).write_bytes(store.path(1).read_bytes()[:40])  # torn by a power cut
    evaluated = []
    plain, model.token_loss = model.token_loss, None
    model.token_loss = lambda batch: evaluated.append(len(batch.input_ids)) or plain(batch)
    got = run(model, dataset, shard_samples=3, per_token=True, store=store)
    assert sum(evaluated) == 9
    np.testing.assert_array_equal(got.means["base"], reference.means["base"])
    for i in range(12):
        np.testing.assert_array_equal(got.tokens["base"][i], reference.tokens["base"][i])


def test_shards_of_another_corpus_or_model_are_refused(tmp_path):
    ShardStore.open(tmp_path / "s", "one")
    ShardStore.open(tmp_path / "s", "one")
    with pytest.raises(ConfigError, match="key one, now two"):
        ShardStore.open(tmp_path / "s", "two")


def test_disk_full_is_one_message_and_keeps_finished_shards(make, tmp_path, monkeypatch):
    import errno

    from tenfold.errors import RunFailed

    model, dataset = make.gpt2(), make.corpus(8)
    store = ShardStore.open(tmp_path / "s", "key")
    plain, calls = np.savez, []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(RunFailed, match="no space left"):
        run(model, dataset, shard_samples=3, store=store)
    monkeypatch.setattr(np, "savez", plain)
    got = run(model, dataset, shard_samples=3, store=store).means["base"]
    np.testing.assert_array_equal(got, run(model, dataset, shard_samples=3).means["base"])


def test_unknown_precision_is_refused(make):
    with pytest.raises(ConfigError, match="known: float32, bfloat16, float16"):
        run(make.gpt2(), make.corpus(2), precision="int8")
    with pytest.raises(ConfigError, match="at least 1"):
        run(make.gpt2(), make.corpus(2), token_budget=0)
