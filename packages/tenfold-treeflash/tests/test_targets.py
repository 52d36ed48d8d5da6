"""Architectures: trees are exact, decoding is the target's own, and the others are refused."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tenfold.errors import ComponentError, ConfigError
from tenfold_treeflash.target import Target, check_tree_attention
from tenfold_treeflash.tree import DraftTree
from treeflash_cases import drafted, drafter_for, plain, prompt

V, H = 32, 16
LLAMA = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MIXED = ["sliding_attention", "full_attention"] * 2
CASES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "qwen2-window": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(
        **LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=8)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(
        **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)),
    "mistral-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=5)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**LLAMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=V, n_embd=H, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3,
        **ENDS)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(
        vocab_size=V, hidden_size=H, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, initializer_range=0.3, **ENDS)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(
        vocab_size=V, n_embd=H, n_layer=4, n_head=4, rotary_dim=4, n_positions=64,
        initializer_range=0.3, tie_word_embeddings=False, **ENDS)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(
        vocab_size=V, hidden_size=H, ffn_dim=24, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=H, init_std=0.3,
        **(ENDS | {"pad_token_id": 1}))),
    "deepseek-v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(
        **(LLAMA | {"num_key_value_heads": 4}), moe_intermediate_size=12, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, kv_lora_rank=8,
        q_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=1)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=5, layer_types=MIXED, query_pre_attn_scalar=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(
        **LLAMA, head_dim=8, sliding_window=5, layer_types=MIXED, query_pre_attn_scalar=8)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(
        **LLAMA, head_dim=8, sliding_window=5, layer_types=MIXED, num_local_experts=4,
        num_experts_per_tok=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**LLAMA)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**LLAMA, logits_scaling=3.0)),
}  # fmt: skip
MOE = ("qwen3-moe", "deepseek-v3", "gpt-oss")


def target_of(name):
    torch.manual_seed(0)
    model = CASES[name]()
    return (model if name in MOE else model.double()).eval()


def drafter_of(model):
    return drafter_for(model, dtype=model.dtype, num_features=2)


@pytest.mark.parametrize("name", CASES)
def test_trees_and_texts_are_exact(name):
    model = target_of(name)
    target = Target(model)
    check_tree_attention(target)
    # Longer than every window, so that what is outside it counts.
    context = prompt(17, vocabulary=V)[0]
    tree = DraftTree(
        [1, 2, 3, 4, 5, 6, 7, 8], [-1, 0, 0, 1, 1, 2, 3, 6], [0, 1, 1, 2, 2, 2, 3, 4], [0.0] * 8
    )
    with torch.inference_mode():
        cache = target.new_cache()
        first = target.prefill(context, cache)
        found = target.verify(tree, cache)
        for node in range(len(tree)):
            ids = context.tolist() + [tree.tokens[i] for i in tree.path(node)]
            wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(found[node], wanted[-1], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(first, wanted[16], atol=2e-4, rtol=2e-4)
    drafter = drafter_of(model)
    for ids in (context[None], prompt(6, rows=3, vocabulary=V)):
        wanted = plain(model, ids, max_new_tokens=24)
        assert drafted(
            model, ids, drafter, draft={"tree_size": 20}, max_new_tokens=24
        ).tolist() == (wanted.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_thousands_of_tokens_are_the_targets_own(name):
    """As far as the positions reach, from several prompts, one by one and side by side."""
    model = target_of(name)
    drafter = drafter_of(model)
    length = 64 if name in ("gpt2", "opt", "gptj") else 120
    ids = prompt(5, seed=9, rows=12, vocabulary=V)
    wanted = plain(model, ids, max_length=length)
    for size in (9, 40):
        found = drafted(model, ids, drafter, draft={"tree_size": size}, max_length=length)
        assert found.tolist() == wanted.tolist()
    for row in (0, 5):
        found = drafted(model, ids[row : row + 1], drafter, max_length=length)
        assert found.tolist() == plain(model, ids[row : row + 1], max_length=length).tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "cohere", "granite", "gemma2"])
def test_the_head_gives_the_models_own_logits(name):
    target, ids = Target(target_of(name)), prompt(5, vocabulary=V)
    from tenfold.lm import architecture

    with torch.no_grad(), architecture.head_inputs(target.model) as seen:
        logits = target.model(input_ids=ids).logits
        torch.testing.assert_close(target.head(seen[0]), logits)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_texts_reach_the_last_learned_position(name):
    model = target_of(name)
    ids = prompt(40, vocabulary=V)
    drafter = drafter_of(model)
    for rows in (ids, ids.repeat(2, 1)):
        wanted = plain(model, rows, max_length=64)
        assert wanted.shape[1] == 64
        found = drafted(model, rows, drafter, draft={"tree_size": 30}, max_length=64)
        assert found.tolist() == wanted.tolist()


def bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(
        vocab_size=V, hidden_size=H, n_layer=2, n_head=4, initializer_range=0.3))  # fmt: skip


def falcon():
    return hf.FalconForCausalLM(hf.FalconConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=2, num_attention_heads=4, alibi=True,
        initializer_range=0.3))  # fmt: skip


def mpt():
    return hf.MptForCausalLM(hf.MptConfig(
        vocab_size=V, d_model=H, n_layers=2, n_heads=4, initializer_range=0.3))  # fmt: skip


def mamba():
    return hf.MambaForCausalLM(hf.MambaConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=2, state_size=4))  # fmt: skip


def neo():
    return hf.GPTNeoForCausalLM(hf.GPTNeoConfig(
        vocab_size=V, hidden_size=H, num_layers=2, num_heads=4, window_size=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64))  # fmt: skip


def llama4():
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(
        **LLAMA, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=24,
        layer_types=["chunked_attention", "full_attention"] * 2))  # fmt: skip


@pytest.mark.parametrize("build", [bloom, falcon, mpt, mamba, neo, llama4])
def test_what_cannot_run_trees_is_refused_with_advice(build):
    torch.manual_seed(0)
    model = build().eval()
    with pytest.raises(ComponentError, match="hint: "):
        check_tree_attention(Target(model))


def test_encoder_decoders_are_refused():
    model = hf.T5ForConditionalGeneration(hf.T5Config(
        vocab_size=V, d_model=H, d_kv=4, d_ff=24, num_layers=2, num_heads=4))  # fmt: skip
    with pytest.raises(ConfigError, match="is an encoder-decoder"):
        Target(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ConfigError, match="no language-model head"):
        Target(hf.LlamaModel(hf.LlamaConfig(**LLAMA)))
