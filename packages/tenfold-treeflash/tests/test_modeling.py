"""The drafter: names and counts of published checkpoints, loading, saving, what a block sees."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.errors import ConfigError
from tenfold_treeflash.checkpoints import load_drafter, read_config, save_drafter
from tenfold_treeflash.configuration import TreeFlashConfig, spread_layers
from tenfold_treeflash.draft_cache import DraftCache
from tenfold_treeflash.modeling import TreeFlashDraftModel, parameter_count
from tenfold_treeflash.target import Target
from treeflash_cases import drafter_for, llama

LAYER = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    "self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    "input_layernorm.weight", "post_attention_layernorm.weight",
)  # fmt: skip
TOP = ("norm.weight", "fc.weight", "hidden_norm.weight")
APPROXIMATOR = ("ug.weight", "ug.bias", "d.weight", "norm.weight")
PUBLISHED = {
    "qwen3-4b": ({
        "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 5,
        "num_target_layers": 36, "vocab_size": 151936,
    }, 124_540_416),
    "qwen3-8b": ({
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 5,
        "num_target_layers": 36, "vocab_size": 151936,
    }, 251_686_912),
    "qwen3-coder-30b-a3b": ({
        "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 8,
        "num_target_layers": 48, "vocab_size": 151936,
    }, 62_928_896),
}  # fmt: skip


def small(**changes):
    """A `config.json` as published, with small numbers."""
    values = {
        "model_type": "qwen3", "architectures": ["TreeFlashDraftModel"],
        "auto_map": {"AutoModel": "tree_flash.TreeFlashDraftModel"}, "dtype": "float32",
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 23,
        "block_size": 6, "num_target_layers": 9, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 256,
        "layer_types": ["full_attention"] * 2, "attention_bias": False,
        "dflash_config": {"mask_token_id": 22, "target_layer_ids": [1, 4, 6]},
        "treeflash_config": {"ar_approximation": "swiglu", "candidate_tokens": 8},
    }  # fmt: skip
    return values | changes


def published_tensors(dflash=False, seed=0):
    """Tensors with the names and shapes of a published checkpoint, made without our classes."""
    torch.manual_seed(seed)
    H, inner, D, heads, groups = 16, 24, 8, 4, 2
    shapes = {"norm.weight": (H,), "fc.weight": (H, 3 * H), "hidden_norm.weight": (H,)}
    sizes = (
        (heads * D, H), (groups * D, H), (groups * D, H), (H, heads * D), (D,), (D,),
        (inner, H), (inner, H), (H, inner), (H,), (H,),
    )  # fmt: skip
    for layer in range(2):
        shapes |= {f"layers.{layer}.{n}": s for n, s in zip(LAYER, sizes, strict=True)}
    prefix = "" if dflash else "model."
    out = {prefix + name: torch.randn(shape) for name, shape in shapes.items()}
    if not dflash:
        extra = {
            "ug.weight": (2 * inner, 2 * H), "ug.bias": (2 * inner,), "d.weight": (H, inner),
        }  # fmt: skip
        extra["norm.weight"] = (H,)
        out |= {f"ar_approximation.{n}": torch.randn(s) for n, s in extra.items()}
    return out


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def treeflash(tmp_path):
    return write(tmp_path / "treeflash", small(), published_tensors())


@pytest.fixture
def dflash(tmp_path):
    config = small(architectures=["DFlashDraftModel"])
    del config["treeflash_config"]
    return write(tmp_path / "dflash", config, published_tensors(dflash=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    fields, approximator = PUBLISHED[name]
    H, inner = fields["hidden_size"], fields["intermediate_size"]
    assert approximator == 5 * inner * H + 2 * inner + H
    config = TreeFlashConfig(
        **fields, dflash_config={"mask_token_id": 151669},
        treeflash_config={"ar_approximation": "swiglu"},
    )  # fmt: skip
    counts = parameter_count(config)
    assert counts["approximator"] == approximator
    D, heads, groups = fields["head_dim"], 32, fields["num_key_value_heads"]
    layer = 2 * heads * D * H + 2 * groups * D * H + 3 * H * inner + 2 * D + 2 * H
    features = len(config.target_layer_ids)
    assert counts["backbone"] == fields["num_hidden_layers"] * layer + features * H * H + 2 * H


def test_names_are_those_of_published_checkpoints():
    model = TreeFlashDraftModel(TreeFlashConfig(**small()))
    names = {f"model.layers.{i}.{n}" for i in range(2) for n in LAYER}
    names |= {f"model.{n}" for n in TOP} | {f"ar_approximation.{n}" for n in APPROXIMATOR}
    assert set(model.state_dict()) == names
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in published_tensors().items()
    }


@pytest.mark.parametrize(
    ("layers", "count", "ids"),
    [
        (36, 5, [1, 9, 17, 25, 33]), (24, 5, [1, 6, 11, 16, 21]), (28, 5, [1, 7, 13, 19, 25]),
        (48, 5, [1, 12, 23, 34, 45]), (64, 10, [1, 8, 14, 21, 28, 34, 41, 48, 54, 61]),
        (9, 3, [1, 4, 6]), (12, 1, [6]),
    ],
)  # fmt: skip
def test_layer_ids_follow_the_published_formula(layers, count, ids):
    assert spread_layers(layers, count) == ids


@pytest.mark.parametrize("layers", range(1, 8))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_small_targets_get_distinct_layers_below_the_last(layers, count):
    ids = spread_layers(layers, count)
    assert ids == sorted(set(ids))
    assert 0 <= ids[0] <= ids[-1] <= max(layers - 2, 0)


def test_a_published_treeflash_folder_loads_every_tensor(treeflash):
    drafter = load_drafter(treeflash)
    for name, tensor in load_file(treeflash / "model.safetensors").items():
        assert torch.equal(drafter.state_dict()[name], tensor)
    assert drafter.config.mask_token_id == 22
    assert drafter.config.target_layer_ids == [1, 4, 6]
    assert drafter.config.candidate_tokens == 8
    assert not drafter.training


def test_a_dflash_folder_loads_as_a_marginal_drafter(dflash):
    drafter = load_drafter(dflash)
    assert drafter.ar_approximation is None
    for name, tensor in load_file(dflash / "model.safetensors").items():
        assert torch.equal(drafter.state_dict()[f"model.{name}"], tensor)


def test_a_dflash_backbone_takes_a_new_approximator_that_does_nothing_yet(dflash):
    drafter = load_drafter(dflash, ar_approximation="swiglu")
    assert drafter.ar_approximation.d.weight.abs().max() == 0
    assert drafter.ar_approximation.ug.weight.abs().max() > 0
    states = torch.randn(3, 16)
    assert torch.equal(drafter.correct(states, torch.randn(3, 1, 16)), states)


def test_newer_layouts_are_understood(tmp_path):
    config = small()
    config["dflash_config"]["block_size"] = config.pop("block_size")
    config |= config.pop("treeflash_config")
    drafter = load_drafter(write(tmp_path / "new", config, published_tensors()))
    assert drafter.config.block_size == 6
    assert drafter.config.ar_approximation == "swiglu"
    assert drafter.config.candidate_tokens == 8


@pytest.mark.parametrize("kind", ["swiglu", "linear", "swiglu2", None])
@pytest.mark.parametrize("mask", [1, None])
def test_saving_and_loading_gives_the_same_drafter(tmp_path, kind, mask):
    drafter = drafter_for(llama(), ar_approximation=kind, mask_token_id=mask)
    save_drafter(drafter, tmp_path / "saved")
    again = load_drafter(tmp_path / "saved")
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in drafter.state_dict().items()
    }
    assert all(torch.equal(again.state_dict()[n], t) for n, t in drafter.state_dict().items())
    for name in ("block_size", "target_layer_ids", "mask_token_id", "ar_approximation", "head_dim"):
        assert getattr(again.config, name) == getattr(drafter.config, name)
    assert again.dtype == drafter.dtype
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == "qwen3"


def test_save_pretrained_writes_the_same_names(tmp_path):
    drafter = drafter_for(llama())
    drafter.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(drafter.state_dict())
    again = TreeFlashDraftModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in drafter.state_dict().items())


def test_weights_in_shards_load(tmp_path):
    tensors = published_tensors()
    names = sorted(tensors)
    write(tmp_path / "whole", small(), tensors)
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small()))
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ours, whole = load_drafter(folder).state_dict(), load_drafter(tmp_path / "whole").state_dict()
    assert all(torch.equal(ours[n], whole[n]) for n in whole)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no b\.safetensors"):
        load_drafter(folder)


@pytest.mark.parametrize("kind", ["swiglu", "linear", "swiglu2"])
def test_a_new_approximator_starts_at_zero(kind):
    drafter = drafter_for(llama(), ar_approximation=kind, shake=0.0)
    assert drafter.ar_approximation.d.weight.abs().max() == 0
    states = torch.randn(5, 16, dtype=torch.float64)
    previous = torch.randn(5, drafter.looks_back, 16, dtype=torch.float64)
    assert torch.equal(drafter.correct(states, previous), states)


def test_the_approximator_is_the_formula():
    drafter = drafter_for(llama())
    part, H = drafter.ar_approximation, 16
    h, e = torch.randn(4, H, dtype=torch.float64), torch.randn(4, H, dtype=torch.float64)

    def norm(x, weight, eps):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    u = norm(h, drafter.model.norm.weight, drafter.config.rms_norm_eps)
    z = torch.cat([norm(e, part.norm.weight, 1e-6), u], -1)
    both = z @ part.ug.weight.T + part.ug.bias
    a, g = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    wanted = h + (g * torch.sigmoid(g) * a) @ part.d.weight.T
    # Norms of the library compute in fp32.
    torch.testing.assert_close(drafter.correct(h, e[:, None]), wanted, atol=1e-5, rtol=1e-5)


def test_slot_zero_is_the_anchor_and_the_others_are_masks():
    target = Target(llama())
    for mask in (1, None):
        drafter = drafter_for(target.model, mask_token_id=mask, input_embedding_scale=2.0)
        block = drafter.block_input(torch.tensor([7]), target.embedding, 4)[0]
        assert torch.equal(block[0], 2 * target.embedding[7])
        row = drafter.mask_embedding if mask is None else 2 * target.embedding[1]
        assert all(torch.equal(block[i], row) for i in (1, 2, 3))


def test_every_slot_sees_all_of_its_block_and_of_the_context():
    drafter = drafter_for(llama())
    torch.manual_seed(0)
    block = torch.randn(1, 4, 16, dtype=torch.float64)
    features = torch.randn(1, 3, drafter.model.fc.in_features, dtype=torch.float64)
    positions = torch.arange(7)[None]
    base = drafter(block, features, positions)
    for slot in range(4):
        changed = block.clone()
        changed[0, slot] += 1
        assert ((drafter(changed, features, positions) - base).abs().amax(-1) > 1e-6).all()
    for token in range(3):
        changed = features.clone()
        changed[0, token] += 1
        assert ((drafter(block, changed, positions) - base).abs().amax(-1) > 1e-6).all()


def test_positions_are_relative_to_each_other_only():
    drafter = drafter_for(llama())
    torch.manual_seed(0)
    block = torch.randn(1, 4, 16, dtype=torch.float64)
    features = torch.randn(1, 3, drafter.model.fc.in_features, dtype=torch.float64)
    base = drafter(block, features, torch.arange(7)[None])
    shifted = drafter(block, features, torch.arange(7)[None] + 40)
    stretched = drafter(block, features, torch.tensor([[0, 1, 2, 5, 6, 7, 8]]))
    torch.testing.assert_close(base, shifted, atol=1e-4, rtol=1e-4)  # angles are fp32
    assert (base - stretched).abs().max() > 1e-3


def test_a_context_added_in_pieces_is_the_context_added_at_once():
    drafter = drafter_for(llama())
    torch.manual_seed(0)
    features = torch.randn(1, 150, drafter.model.fc.in_features, dtype=torch.float64)
    whole, pieces = DraftCache(), DraftCache()
    with torch.no_grad():
        drafter.extend(whole, features, torch.arange(150)[None])
        for start, end in ((0, 1), (1, 60), (60, 65), (65, 66), (66, 150)):
            drafter.extend(pieces, features[:, start:end], torch.arange(start, end)[None])
    for a, b in zip(whole.pairs(), pieces.pairs(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def broken(tmp_path, config=None, drop=(), add=(), reshape=()):
    tensors = published_tensors()
    for name in drop:
        del tensors[name]
    tensors |= {name: torch.zeros(3) for name in add}
    tensors |= {name: torch.zeros(5, 5) for name in reshape}
    return write(tmp_path / "broken", config or small(), tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["model.fc.weight"]}, r"lacks 1 \(model\.fc\.weight\)"),
        ({"drop": ["ar_approximation.d.weight"]}, r"lacks 1 \(ar_approximation\.d\.weight\)"),
        ({"add": ["model.layers.7.mlp.up_proj.weight"]}, "has unknown 1"),
        ({"reshape": ["model.fc.weight"]}, r"has shape \[5, 5\]; its config.json says \[16, 48\]"),
        ({"config": small(block_size=1)}, "block_size is 1; it must be at least 2"),
        ({"config": small(num_target_layers=5)}, r"target_layer_ids \[1, 4, 6\] must increase"),
        (
            {"config": small(treeflash_config={"ar_approximation": "swiglue"})},
            "did you mean 'swiglu'",
        ),
    ],
)
def test_broken_checkpoints_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_drafter(broken(tmp_path, **changes))


def test_folders_without_a_checkpoint_are_named(tmp_path, treeflash):
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        load_drafter(tmp_path / "nowhere")
    (treeflash / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match="damaged or incomplete"):
        load_drafter(treeflash)
    (treeflash / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="weights are missing"):
        load_drafter(treeflash)
    (treeflash / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(treeflash)
    (treeflash / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ConfigError, match="no hidden_size"):
        read_config(treeflash)


def test_embeddings_that_an_exporter_added_are_left_out(tmp_path):
    tensors = published_tensors() | {"embed_tokens.weight": torch.zeros(23, 16)}
    drafter = load_drafter(write(tmp_path / "more", small(), tensors))
    assert "embed_tokens.weight" not in drafter.state_dict()


def test_a_dtype_can_be_asked_for(treeflash):
    assert load_drafter(treeflash, dtype="bfloat16").dtype == torch.bfloat16
    assert load_drafter(treeflash).dtype == torch.float32


def test_casting_a_drafter_keeps_its_rotary_frequencies():
    drafter = TreeFlashDraftModel(TreeFlashConfig(**small()))
    before = drafter.model.rotary_emb.inv_freq.clone()
    drafter.to(torch.bfloat16)
    assert drafter.model.fc.weight.dtype == torch.bfloat16
    assert torch.equal(drafter.model.rotary_emb.inv_freq, before)
