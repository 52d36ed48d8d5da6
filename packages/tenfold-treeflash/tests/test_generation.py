"""`generate` as transformers' users know it: outputs, streams, refusals, native DFlash."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from tenfold.errors import ConfigError
from tenfold_treeflash.assistant import as_hf_dflash_assistant
from tenfold_treeflash.custom_generate import write_custom_generate
from tenfold_treeflash.generation import TreeGenerateOutput, tree_decoding
from tenfold_treeflash.published import spec_generate
from transformers import GPT2Config, GPT2LMHeadModel, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer
from treeflash_cases import drafted, drafter_for, letters, llama, plain, prompt


@pytest.fixture(scope="module")
def target():
    return llama()


@pytest.fixture(scope="module")
def drafter(target):
    return drafter_for(target, block_size=8)


@pytest.mark.parametrize("sample", [False, True])
def test_scores_and_logits_are_transformers(target, drafter, sample):
    settings = {
        "max_new_tokens": 20, "do_sample": sample, "temperature": 0.7 if sample else None,
        "repetition_penalty": 1.2, "return_dict_in_generate": True, "output_scores": True,
        "output_logits": True,
    }  # fmt: skip
    wanted = plain(target, prompt(), seed=1, **settings)
    found = drafted(target, prompt(), drafter, seed=1, **settings)
    assert isinstance(found, TreeGenerateOutput)
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for name in ("scores", "logits"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert len(ours) == len(theirs) == 20
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert drafted(target, prompt(), drafter, max_new_tokens=3, guidance_scale=1.0).shape == (1, 12)
    plain_dict = drafted(target, prompt(), drafter, max_new_tokens=3, return_dict_in_generate=True)
    assert plain_dict.scores is None
    assert plain_dict.logits is None


class Heard(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_hears_what_plain_generate_says(target, drafter):
    ours, theirs = Heard(), Heard()
    plain(target, prompt(), max_new_tokens=25, streamer=theirs)
    drafted(target, prompt(), drafter, max_new_tokens=25, streamer=ours)
    assert ours.puts == theirs.puts
    assert ours.ended == theirs.ended == 1


def test_a_text_iterator_comes_to_its_end(target, drafter):
    streamer = TextIteratorStreamer(letters(), skip_prompt=True, timeout=20)
    work = threading.Thread(
        target=drafted, args=(target, prompt(), drafter),
        kwargs={"max_new_tokens": 15, "streamer": streamer},
    )  # fmt: skip
    work.start()
    text = "".join(streamer)
    work.join()
    wanted = plain(target, prompt(), max_new_tokens=15)[0, 9:]
    assert text.replace(" ", "") == letters().decode(wanted).replace(" ", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "num_beams = 3"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"use_cache": False}, "use_cache = False"),
        ({"past_key_values": object()}, "past_key_values cannot be decoded"),
        ({"inputs_embeds": torch.zeros(1, 2, 16)}, "inputs_embeds cannot be decoded"),
        ({"position_ids": torch.zeros(1, 9)}, "position_ids cannot be decoded"),
        ({"stop_strings": "ab"}, "stop_strings needs the tokenizer"),
    ],
)
def test_options_without_an_answer_are_named(target, drafter, settings, message):
    with pytest.raises(ConfigError, match=message):
        drafted(target, prompt(), drafter, max_new_tokens=3, **settings)


def test_greedy_copies_and_streams_of_batches_are_refused(target, drafter):
    with pytest.raises(ValueError, match="num_return_sequences"):
        drafted(target, prompt(), drafter, max_new_tokens=3, num_return_sequences=2)
    with pytest.raises(ConfigError, match="one text at a time"):
        drafted(target, prompt(rows=2), drafter, max_new_tokens=3, streamer=Heard())
    with pytest.raises(ConfigError, match="the prompt is empty"):
        drafted(target, torch.zeros((1, 0), dtype=torch.int64), drafter, max_new_tokens=3)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=23, n_embd=16, n_layer=4, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )).double().eval()  # fmt: skip


@pytest.mark.parametrize("build", [llama, gpt2])
def test_transformers_own_dflash_decoding_takes_the_same_drafter(build):
    target = build()
    drafter = drafter_for(target)
    assistant = as_hf_dflash_assistant(drafter)
    calls = []

    def watched(**arguments):
        calls.append(assistant(**arguments))
        return calls[-1]

    watcher = type("Watcher", (), {
        "config": assistant.config, "device": assistant.device,
        "__call__": lambda self, **arguments: watched(**arguments),
    })()  # fmt: skip
    for length in (30, 12):
        wanted = plain(target, prompt(), max_new_tokens=length)
        found = target.generate(
            prompt(), max_new_tokens=length, assistant_model=watcher, speculation_type="dflash"
        )
        assert found.tolist() == wanted.tolist()
    # The last call's states are those of a block drafted from scratch.
    text = plain(target, prompt(), max_new_tokens=30)
    assert calls
    states = calls[0].last_hidden_state
    with torch.no_grad():
        hidden = target(text[:, :9], output_hidden_states=True).hidden_states
        features = torch.cat([hidden[i + 1] for i in drafter.config.target_layer_ids], -1)
        block = drafter.block_input(text[:, 9], target.get_input_embeddings().weight, 6)
        torch.testing.assert_close(states, drafter(block, features, torch.arange(15)[None]))


def test_a_learned_mask_has_no_place_in_transformers_own_decoding(target):
    with pytest.raises(ConfigError, match="needs a mask token"):
        as_hf_dflash_assistant(drafter_for(target, mask_token_id=None))


@pytest.mark.parametrize("sample", [False, True])
def test_a_loop_for_custom_generate_is_generate(target, drafter, sample):
    settings = {"max_new_tokens": 20, "do_sample": sample, "eos_token_id": 4}
    wanted = plain(target, prompt(), seed=1, **settings)
    loop = tree_decoding(target, drafter)
    found = plain(target, prompt(), seed=1, custom_generate=loop, **settings)
    assert found.tolist() == wanted.tolist()
    with pytest.raises(ConfigError, match="num_beams = 2"):
        target.generate(prompt(), custom_generate=loop, num_beams=2)


@pytest.mark.parametrize("mode", [{}, {"is_chain": True}, {"is_vanilla": True}])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_published_entry_point_writes_the_targets_text(target, drafter, mode, temperature):
    rule = {"do_sample": True, "temperature": temperature} if temperature else {}
    rule |= {"top_k": 0} if temperature else {}
    free = plain(target, prompt(), seed=2, max_new_tokens=25, **rule)
    stop = int(free[0, 9 + 12])
    wanted = plain(target, prompt(), seed=2, max_new_tokens=25, eos_token_id=stop, **rule)
    heard = []
    torch.manual_seed(2)
    out = spec_generate(
        drafter, target, prompt(), 25, [stop], temperature, return_stats=True,
        token_callback=heard.append, **mode,
    )  # fmt: skip
    assert out.output_ids.tolist() == wanted.tolist()
    assert heard == wanted[0, 9:].tolist()
    assert (out.num_input_tokens, out.num_output_tokens) == (9, len(heard))
    assert out.time_to_first_token > 0
    assert sum(out.acceptance_lengths) + 1 >= len(heard)
    torch.manual_seed(2)
    ids = spec_generate(drafter, target, prompt(), 25, [stop], temperature, **mode)
    assert ids.tolist() == wanted.tolist()


def test_the_published_entry_point_names_what_it_cannot_do(target, drafter):
    for arguments, message in (
        ((prompt(rows=2),), "takes one prompt, not 2"), ((prompt(), 0), "max_new_tokens is 0"),
        ((prompt(), 5, None, -1.0), "temperature is -1.0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            spec_generate(drafter, target, *arguments)


def test_a_folder_for_custom_generate_is_generate(target, drafter, tmp_path, monkeypatch):
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", [*sys.path])
    write_custom_generate(tmp_path / "drafter")
    settings = {"max_new_tokens": 20, "stop_strings": "q", "tokenizer": letters()}
    wanted, ours, theirs = plain(target, prompt(), **settings), Heard(), Heard()
    plain(target, prompt(), streamer=theirs, **settings)
    found = target.generate(
        prompt(), custom_generate=str(tmp_path / "drafter"), trust_remote_code=True,
        drafter=drafter, streamer=ours, **settings,
    )  # fmt: skip
    assert found.tolist() == wanted.tolist()
    assert ours.puts == theirs.puts
    with pytest.raises(ConfigError, match="needs a drafter"):
        target.generate(prompt(), custom_generate=str(tmp_path / "drafter"), trust_remote_code=True)
