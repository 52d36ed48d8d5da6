"""Stored features are the target's own, and training from them is training online."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tenfold.errors import ConfigError
from tenfold.testing.context import FakeContext
from tenfold_treeflash.features import FeatureStore, read_features, store_features
from tenfold_treeflash.objective import DraftObjective
from tenfold_treeflash.rows import TokenRows
from tenfold_treeflash.target import Target
from tenfold_treeflash.training import DrafterTrainer
from training_cases import SETTINGS, Samples, Texts, small_base
from treeflash_cases import VOCABULARY, llama

LAYERS = [0, 2]


@pytest.fixture(scope="module")
def target():
    return Target(llama())


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    out = TokenRows()
    for length in (9, 5, 14, 3, 8, 8, 20, 4):
        ids = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        out.add(ids, [True] * length)
    return out


def test_a_stored_row_is_what_the_target_says(target, rows, tmp_path):
    store = store_features(target, rows, LAYERS, tmp_path, shard_tokens=20)
    assert len(store) == len(rows) == 8
    # Rows of 9 + 5, 14 + 3, 8 + 8, 20 and 4 tokens: none is split.
    assert len(list(tmp_path.glob("shard-*"))) == 5
    for number in (7, 0, 3, 6, 1, 2, 5, 4):
        states, features = store.row(number)
        ids = rows[number]["input_ids"][None]
        wanted = read_features(target, ids, LAYERS)
        assert torch.equal(states, wanted[0][0])
        assert torch.equal(features, wanted[1][0])
        with torch.no_grad():
            full = target.model(ids, output_hidden_states=True)
        torch.testing.assert_close(features, torch.cat(
            [full.hidden_states[layer + 1][0] for layer in LAYERS], dim=-1
        ))  # fmt: skip
        torch.testing.assert_close(target.head(states), full.logits[0])


def test_batches_are_padded_rows(target, rows, tmp_path):
    store = store_features(target, rows, LAYERS, tmp_path)
    states, features = store.batch([3, 6], 20, "cpu")
    for place, number in enumerate((3, 6)):
        one, many = store.row(number)
        assert torch.equal(states[place, : len(one)], one)
        assert torch.equal(features[place, : len(many)], many)
        assert not states[place, len(one) :].any()


def test_storing_goes_on_where_it_was_interrupted(target, rows, tmp_path):
    whole = store_features(target, rows, LAYERS, tmp_path / "whole", shard_tokens=20)

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_features(target, rows, LAYERS, tmp_path / "cut", shard_tokens=20, advance=stop)
    folder = tmp_path / "cut"
    assert [p.name for p in folder.glob("shard-*")] == ["shard-00000.safetensors"]
    with pytest.raises(ConfigError, match="holds no stored features"):
        FeatureStore(folder)
    before = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    store = store_features(target, rows, LAYERS, folder, shard_tokens=20)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == before
    for number in range(len(rows)):
        for one, other in zip(store.row(number), whole.row(number), strict=True):
            assert torch.equal(one, other)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_features_of_something_else_are_refused(target, rows, tmp_path):
    store_features(target, rows, LAYERS, tmp_path)
    with pytest.raises(ConfigError, match="holds features for other layers"):
        store_features(target, rows, [0, 1], tmp_path)
    with pytest.raises(ConfigError, match="other data, rows"):
        store_features(target, rows.subset([0, 1]), LAYERS, tmp_path)
    with pytest.raises(ConfigError, match="other target"):
        store_features(Target(llama(seed=5)), rows, LAYERS, tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ConfigError, match="delete the folder to store it anew"):
        FeatureStore(tmp_path).row(0)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"lacks shard-00000"):
        FeatureStore(tmp_path)


# --- Training from them ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return small_base()


@pytest.fixture
def losses(monkeypatch):
    """The loss of every call of the objective."""
    seen = []
    plain = DraftObjective.__call__

    def watched(self, drafter, batch):
        loss, values = plain(self, drafter, batch)
        seen.append(float(loss.detach()))
        return loss, values

    monkeypatch.setattr(DraftObjective, "__call__", watched)
    return seen


def trained(base, folder, data, **changes):
    done = DrafterTrainer(base, data, **(SETTINGS | changes)).fit(FakeContext(folder), None, {})
    logs = [
        json.loads((path / "training.json").read_text())["log"]
        for path in (folder / "run/work/phase-dflash/checkpoint", done.path)
    ]
    return load_file(done.path / "model.safetensors"), logs


def test_training_from_one_stored_row_a_step_is_training_online_to_the_bit(base, tmp_path, losses):
    """One row at a time goes through the target in both: equal sums, equal everything."""
    settings = {"batch_size": 1, "eval_rows": 0}
    online = trained(base, tmp_path / "online", Samples(), **settings)
    steps = list(losses)
    losses.clear()
    stored = trained(base, tmp_path / "stored", Samples(), features="stored", **settings)
    assert len(steps) == 20
    assert losses == steps
    assert online[1] == stored[1]
    for name, tensor in online[0].items():
        assert torch.equal(tensor, stored[0][name]), name


@pytest.mark.parametrize("data", [Texts, Samples])
def test_training_from_batches_of_stored_rows_is_training_online(base, tmp_path, data):
    """The same up to the order of sums, held-out rows included."""
    folder = tmp_path / "features"
    online = trained(base, tmp_path / "online", data())
    stored = trained(
        base, tmp_path / "stored", data(), features="stored", features_folder=str(folder)
    )
    assert (folder / "train/features.json").is_file()
    assert (folder / "held-out/features.json").is_file()
    for one, other in zip(online[1], stored[1], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for name, tensor in online[0].items():
        torch.testing.assert_close(tensor, stored[0][name], rtol=0, atol=1e-4)


def test_stored_features_are_not_read_from_the_target_again(base, tmp_path, monkeypatch):
    settings = SETTINGS | {"features": "stored", "features_folder": str(tmp_path / "features")}
    DrafterTrainer(base, Samples(), **settings).fit(FakeContext(tmp_path / "a"), None, {})

    def run(*arguments, **keywords):
        raise AssertionError("the target ran")

    monkeypatch.setattr(type(base.model.model), "forward", run)
    DrafterTrainer(base, Samples(), **settings).fit(FakeContext(tmp_path / "b"), None, {})


def test_a_folder_without_storing_is_refused(base):
    with pytest.raises(ConfigError, match="features_folder is given"):
        DrafterTrainer(base, Texts(), **SETTINGS, features_folder="somewhere")
    with pytest.raises(ConfigError, match="known: online, stored"):
        DrafterTrainer(base, Texts(), **SETTINGS, features="saved")
