"""`core:hf`: checkpoints from folders, and one clear message for each that is not one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file
from tenfold.builtin.hf import load
from tenfold.errors import ComponentError, ConfigError
from tenfold.records import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import KINDS, causal_lm, network, save, tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_back_the_model_that_was_saved(kind, tmp_path):
    save(tmp_path / kind, kind)
    loaded, made = load(str(tmp_path / kind)), causal_lm(kind)
    config = GenerationConfig(max_new_tokens=8)
    assert loaded.generate(["def", "hé"], config) == made.generate(["def", "hé"], config)
    assert loaded.vocabulary_hash == made.vocabulary_hash
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


def test_settings_reach_the_model(checkpoint):
    model = load(str(checkpoint), dtype="bfloat16", attention="eager", batch_tokens=7)
    assert model.model.dtype == torch.bfloat16
    assert model.model.config._attn_implementation == "eager"
    assert model.batch_tokens == 7
    assert load(str(checkpoint)).model.dtype == torch.float32
    assert load(str(checkpoint)).device == torch.device("cpu")


def test_the_fingerprint_follows_the_files_and_the_dtype(checkpoint, folder):
    first = load(str(checkpoint)).fingerprint()
    assert load(str(folder)).fingerprint() == first
    assert load(str(folder), dtype="bfloat16").fingerprint() != first
    network(seed=5).save_pretrained(folder)
    assert load(str(folder)).fingerprint() != first


def test_a_sharded_checkpoint_loads_and_misses_no_part(tmp_path):
    network().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert load(str(tmp_path / "m")).model.num_parameters() == network().num_parameters()
    lost = min((tmp_path / "m").glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(ConfigError, match=f"lacks 1 of .* weight files, such as {lost.name}"):
        load(str(tmp_path / "m"))


def remove(pattern):
    def change(folder):
        for path in folder.glob(pattern):
            path.unlink()

    return change


def pickled_weights(folder):
    remove("*.safetensors")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def lost_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path, {"format": "pt"})


def wrong_shape(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, path, {"format": "pt"})


def unknown_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (remove("config.json"), ConfigError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ConfigError, "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ConfigError, "must hold a JSON object"),
        (remove("*.safetensors"), ConfigError, r"has no \*.safetensors weights"),
        (pickled_weights, ConfigError, "pickled weights are not read"),
        (remove("tokenizer*"), ConfigError, "has no tokenizer files"),
        (lost_tensor, ConfigError, "lacks 1 of its model's weights, such as model.norm.weight"),
        (wrong_shape, ComponentError, "cannot load the checkpoint"),
        (unknown_type, ComponentError, "cannot load the checkpoint"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), ComponentError, "cannot load"),
    ],
    ids=["no-config", "bad-config", "list-config", "no-weights", "pickle", "no-tokenizer",
         "lost-tensor", "wrong-shape", "unknown-type", "torn-weights"],
)  # fmt: skip
def test_an_incomplete_folder_is_explained(folder, change, error, message):
    change(folder)
    with pytest.raises(error, match=message) as caught:
        load(str(folder))
    assert "a checkpoint folder holds config.json, *.safetensors" in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/folder/here", "./missing", "/missing", "owner/name"])
def test_a_missing_folder_is_explained(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=f"no checkpoint folder {name}") as caught:
        load(name)
    assert "offline = false" in str(caught.value)


def test_the_hub_is_asked_only_when_allowed(monkeypatch, checkpoint):
    from tenfold.lm import loading

    asked = []

    class Hub:
        @staticmethod
        def from_pretrained(source, **settings):
            asked.append((source, settings["local_files_only"], settings["revision"]))
            raise OSError("no network")

    monkeypatch.setattr(loading, "_tokenizer_class", lambda folder: Hub)
    with pytest.raises(ComponentError, match="no network"):
        load("owner/name", offline=False, revision="v1")
    with pytest.raises(ComponentError, match="no network"):
        load(str(checkpoint), offline=False)
    assert asked == [("owner/name", False, "v1"), (str(checkpoint), True, None)]


def test_remote_code_is_never_run_unasked(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ComponentError, match="cannot load the checkpoint"):
        load(str(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_device_is_explained(checkpoint):
    with pytest.raises(ConfigError, match="device 'cuda' is not available here"):
        load(str(checkpoint), device="cuda")


def test_an_adapter_folder_is_checked(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"is no adapter: it must hold adapter_config\.json"):
        load(str(checkpoint), adapter=str(tmp_path))


def test_an_adapter_is_merged(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    base = network()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model = load(str(checkpoint), adapter=str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model.model(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert model.fingerprint() != load(str(checkpoint)).fingerprint()
    apart = load(str(checkpoint), adapter=str(tmp_path / "adapter"), merge_adapter=False)
    torch.testing.assert_close(apart.model(input_ids=ids).logits, adapted(input_ids=ids).logits)
    names = [name for name, _ in apart.module().named_parameters() if "lora_" in name]
    assert names
    assert not any("lora_" in name for name, _ in model.module().named_parameters())


def test_a_folders_own_tokenizer_is_read_as_it_is(tmp_path):
    """transformers' automatic choice would give it the splitting rules of the original Qwen 2."""
    save(tmp_path / "m", "qwen2")
    text = "x  =  12345\n\n  e\u0301"  # digits, runs of spaces and an accent that NFC would merge
    assert load(str(tmp_path / "m")).encode(text) == causal_lm().encode(text)
