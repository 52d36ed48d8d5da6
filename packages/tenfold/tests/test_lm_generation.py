"""Generation: transformers' own tokens, whatever the batch; sampling by one seed per row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tenfold.errors import ConfigError
from tenfold.lm.generation import generation_batches
from tenfold.lm.sampling import GenerationRow, GumbelMax
from tenfold.records import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent / "support"))
from lm_models import CONTEXT, KINDS, causal_lm, tokenizer

PROMPTS = ["def add(a, b):", "hé", "", "for i in range(10):\n    print", "你好 🎉"]
GREEDY = GenerationConfig(max_new_tokens=12, logprobs=1)
SAMPLED = GenerationConfig(max_new_tokens=12, temperature=0.8, top_p=0.95, top_k=30, n=3, seed=5)


@pytest.fixture(scope="module")
def model():
    return causal_lm()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_that_of_transformers(kind):
    model = causal_lm(kind)
    for prompt, [completion] in zip(PROMPTS, model.generate(PROMPTS, GREEDY), strict=True):
        ids = torch.tensor([model.prompt_ids(prompt)])
        expected = model.model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0
        )[0, ids.shape[1] :]
        assert completion.token_ids == expected.tolist()
        written = [i for i in completion.token_ids if i != 0]
        assert completion.text == model.decode(written)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_neighbours_change_nothing(kind, config):
    model = causal_lm(kind)

    def rows(prompts):
        return [[c.token_ids for c in row] for row in model.generate(prompts, config)]

    together = rows(PROMPTS)
    assert rows(PROMPTS[::-1]) == together[::-1]
    assert [rows([prompt])[0] for prompt in PROMPTS] == together
    model.batch_tokens = 1  # every row by itself
    assert rows(PROMPTS) == together


def test_a_sample_depends_on_seed_prompt_and_number_alone(model):
    def texts(**changes):
        config = GenerationConfig(**{"max_new_tokens": 8, "temperature": 1.0, "seed": 1, **changes})
        return [c.token_ids for c in model.generate(["def"], config)[0]]

    assert texts(n=4)[:2] == texts(n=2)
    assert len({tuple(t) for t in texts(n=8)}) > 1
    assert texts(n=2) != texts(n=2, seed=2)
    assert texts(seed=None) == texts(seed=None)


def test_text_and_its_ids_are_the_same_prompt(model):
    ids = model.prompt_ids("def add")
    assert model.generate(["def add"], SAMPLED) == model.generate([ids], SAMPLED)
    assert model.generate(["def add"], SAMPLED) == model.generate([torch.tensor(ids)], SAMPLED)


def test_greedy_repeats_one_text_n_times(model):
    [row] = model.generate(["def"], GenerationConfig(max_new_tokens=5, n=3))
    assert len(row) == 3
    assert row[0] == row[1] == row[2]


def test_gumbel_max_draws_from_the_distribution():
    log_probs = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0]).log()
    noisy = GumbelMax([7])
    draws = 8000
    counts = torch.zeros(5)
    for _ in range(draws):
        counts[int(noisy(torch.zeros(1, 0), log_probs[None]).argmax())] += 1
    assert counts[4] == 0
    expected = log_probs[:4].exp() * draws
    chi_square = float(((counts[:4] - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 99.9 % quantile with 3 degrees of freedom


def test_truncation_keeps_to_the_likeliest_tokens(model):
    config = GenerationConfig(max_new_tokens=1, temperature=1.0, top_k=3, n=40, seed=0)
    [row] = model.generate(["def"], config)
    _, output = model.start(torch.tensor([model.prompt_ids("def")]))
    best = set(output.logits[0, -1].topk(3).indices.tolist())
    seen = {c.token_ids[0] for c in row}
    assert seen <= best
    assert len(seen) > 1
    [row] = model.generate(["def"], GenerationConfig(1, temperature=1.0, top_p=1e-6, n=5, seed=0))
    assert {c.token_ids[0] for c in row} == {int(output.logits[0, -1].argmax())}


@pytest.mark.parametrize("config", [GREEDY, GenerationConfig(9, 1.0, n=2, seed=3, logprobs=1)])
def test_logprobs_are_the_models_own_scores(model, config):
    for prompt, row in zip(PROMPTS, model.generate(PROMPTS, config), strict=True):
        for completion in row:
            [scores] = model.score([(prompt, completion.token_ids)])
            assert completion.logprobs == pytest.approx(scores.logprobs, abs=1e-4)


def test_generation_ends_before_a_stop_string(model):
    [[whole]] = model.generate(["def add"], GenerationConfig(max_new_tokens=30))
    middle = whole.text[6:9]
    [[cut]] = model.generate(["def add"], GenerationConfig(max_new_tokens=30, stop=(middle, "zzz")))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert middle in model.decode(cut.token_ids)
    assert middle not in model.decode(cut.token_ids[:-1])


def test_an_end_token_ends_the_row_and_stays_in_its_ids(model):
    [[whole]] = model.generate(["def add"], GenerationConfig(max_new_tokens=12))
    token = whole.token_ids[3]
    ended = causal_lm()
    ended.model.generation_config.eos_token_id = [0, token]
    ended = type(ended)(ended.model, ended.tokenizer)
    [[cut]] = ended.generate(["def add"], GenerationConfig(max_new_tokens=12))
    assert cut.finish_reason == "eos"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert cut.text == model.decode(cut.token_ids[:-1])


def test_the_checkpoints_sampling_defaults_do_not_leak_in(model):
    before = model.generate(["def add"], GREEDY)
    model.model.generation_config.repetition_penalty = 5.0
    try:
        assert model.generate(["def add"], GREEDY) == before
        assert model.model.generation_config.repetition_penalty == 5.0
    finally:
        model.model.generation_config.repetition_penalty = None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_end_where_the_context_is_full(kind):
    """Also next to rows that have room left: learned positions have none beyond the context."""
    model = causal_lm(kind, context=24)
    model._eos_ids = frozenset()
    config = GenerationConfig(max_new_tokens=20)
    prompts = [[5] * 22, [6, 7], [8] * 10, [9] * 23]
    rows = [row[0] for row in model.generate(prompts, config)]
    assert [(len(r.token_ids), r.finish_reason) for r in rows] == [
        (2, "length"), (20, "length"), (14, "length"), (1, "length"),
    ]  # fmt: skip
    assert rows == [model.generate([p], config)[0][0] for p in prompts]
    with pytest.raises(ConfigError, match=r"24 tokens leaves no room .* context of 24"):
        model.generate([[5] * 24], config)


def test_batches_respect_budget_and_context():
    rows = [GenerationRow([1] * n, m, 0) for n, m in [(5, 5), (9, 1), (1, 9), (2, 2), (3, 3)]]
    for budget, context in [(1, 100), (30, 12), (1000, 10), (1000, 100)]:
        batches = generation_batches(rows, budget, context)
        assert sorted(i for b in batches for i in b) == list(range(5))
        for batch in batches:
            size = max(len(rows[i].ids) for i in batch) + max(rows[i].limit for i in batch)
            assert len(batch) == 1 or (size <= context and size * len(batch) <= budget)
    assert len(generation_batches(rows, 1000, 100)) == 1


def test_chat_messages_follow_the_template():
    templated = tokenizer()
    templated.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    model = type(causal_lm())(causal_lm().model, templated)
    messages = [{"role": "user", "content": "def"}]
    assert model.generate([messages], GREEDY) == model.generate(["<def>"], GREEDY)
    plain = GenerationConfig(max_new_tokens=12, logprobs=1, chat=False)
    expected = model.generate(["user: def\nassistant:"], GREEDY)
    assert model.generate([messages], plain) == expected


def test_nothing_gives_nothing(model):
    assert model.generate([], GREEDY) == []
    assert model.generate([""], GREEDY) == model.generate([[0]], GREEDY)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([10**6], "outside the vocabulary"), ([-1], "outside the vocabulary"), (7, "got 7"),
     (["a"], "list with 'a'"), ([True], "list with True"), ([{"role": "user"}], "'content'")],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(model, prompt, message):
    with pytest.raises(ConfigError, match=message):
        model.generate([prompt], GREEDY)


def test_context_length_is_the_models(model):
    assert model.context_length == CONTEXT
    assert model.vocabulary_size == model.model.config.vocab_size
