"""`tenfold treeflash generate | inspect | verify | calibrate | info`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tenfold.builtin.hf import load as load_base
from tenfold.cli.output import note, print_json, print_table
from tenfold.errors import EXIT_OK, EXIT_RUN_FAILED, ConfigError
from tenfold.lm.model import CausalLM
from tenfold.records import GenerationConfig

from tenfold_treeflash.costs import calibrate as measure
from tenfold_treeflash.drawing import tree_text
from tenfold_treeflash.lm import TreeDecoder
from tenfold_treeflash.lm import load as load_checkpoint
from tenfold_treeflash.modeling import parameter_count
from tenfold_treeflash.target import Target, check_pair


def _base(target: str, device: str | None, dtype: str | None) -> CausalLM:
    return load_base(target, device=device, dtype=dtype)


def _pair(
    target: str,
    drafter: str,
    method: str,
    tree_size: str,
    device: str | None,
    dtype: str | None,
) -> TreeDecoder:
    """A model with its drafter, which takes the model's device and number type."""
    return TreeDecoder(
        _base(target, device, dtype), load_checkpoint(drafter), method=method, tree_size=tree_size
    )


def _prompt(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt


def generate(
    target: str,
    drafter: str,
    prompt: str,
    method: str = "tree",
    tree_size: str = "auto",
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Writes one text."""
    model = _pair(target, drafter, method, tree_size, device, dtype)
    text = _prompt(prompt)
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    [[done]] = model.generate([text], config)
    accepted: Any = done.stats["accepted"]
    if as_json:
        print_json({"prompt": text, "text": done.text, "token_ids": done.token_ids, **done.stats})
        return EXIT_OK
    print(text + done.text)
    if accepted:
        mean = sum(accepted) / len(accepted)
        note(f"{len(done.token_ids)} tokens in {len(accepted)} rounds, {mean:.2f} per round")
    return EXIT_OK


def inspect(
    target: str,
    drafter: str,
    prompt: str,
    method: str = "tree",
    tree_size: str = "auto",
    rounds: int = 3,
    seed: int = 0,
    temperature: float = 0.0,
    device: str | None = None,
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Draws the first rounds of a text."""
    model = _pair(target, drafter, method, tree_size, device, dtype)
    model.rounds = []
    config = GenerationConfig(
        max_new_tokens=1 + rounds * (model.settings.block_size or 64), temperature=temperature,
        seed=seed,
    )  # fmt: skip
    model.generate([_prompt(prompt)], config)
    shown = model.rounds[:rounds]

    def piece(token: int) -> str:
        return model.base.decode([token])

    if as_json:
        print_json(
            [
                {
                    "tokens": r.tree.tokens, "parents": r.tree.parents,
                    "log_probs": r.tree.log_probs, "accepted": r.path, "next": r.token,
                }
                for r in shown
            ]
        )  # fmt: skip
        return EXIT_OK
    for number, round_ in enumerate(shown, start=1):
        print(
            f"round {number}: {len(round_.tree)} nodes, {len(round_.path)} accepted (*), then "
            f"{piece(round_.token)!r}"
        )
        print(tree_text(round_.tree, round_.path, piece))
    return EXIT_OK


def verify(
    target: str,
    drafter: str,
    method: str = "tree",
    tree_size: str = "auto",
    num_prompts: int = 4,
    max_new_tokens: int = 48,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Compares with the model alone, greedy and sampled; exit code 1 where texts differ."""
    model = _pair(target, drafter, method, tree_size, device, dtype)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_prompts):
        ids = torch.randint(model.base.vocabulary_size, (12,), generator=generator).tolist()
        for temperature in (0.0, 1.0):
            config = GenerationConfig(
                max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + number
            )
            [[ours]] = model.generate([ids], config)
            [[plain]] = model.base.generate([ids], config)
            rows.append(_compared(model, ids, ours.token_ids, plain.token_ids, temperature, number))
    ok = all(row["equal"] or row["tie"] for row in rows)
    if as_json:
        print_json({"ok": ok, "checks": rows})
    else:
        print_table(
            ("prompt", "temperature", "result", "what"),
            [(r["prompt"], r["temperature"], _word(r), r["note"]) for r in rows],
        )
    return EXIT_OK if ok else EXIT_RUN_FAILED


def _word(row: dict[str, Any]) -> str:
    return "ok" if row["equal"] else ("tie" if row["tie"] else "DIFFERS")


@torch.no_grad()
def _compared(
    model: TreeDecoder,
    ids: list[int],
    ours: list[int],
    plain: list[int],
    temperature: float,
    number: int,
) -> dict[str, Any]:
    """One comparison; at the first difference the gap between the best two logits."""
    row = {"prompt": number, "temperature": temperature, "equal": ours == plain, "tie": False}
    if ours == plain:
        return {**row, "note": f"{len(plain)} tokens"}
    shared = 0
    while shared < min(len(ours), len(plain)) and ours[shared] == plain[shared]:
        shared += 1
    text = torch.tensor([ids + plain[:shared]], device=model.target.device)
    best = model.target.model(text).logits[0, -1].float().topk(2).values
    gap = float(best[0] - best[1])
    tie = temperature == 0 and gap < 1e-3
    note_ = f"differ at token {shared}; best two logits are {gap:.2g} apart"
    return {**row, "tie": tie, "note": note_}


def calibrate(
    target: str,
    drafter: str,
    out: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Measures rounds of each size."""
    pair = Target(_base(target, device, dtype).module())
    network = load_checkpoint(drafter).network.to(device=pair.device, dtype=pair.dtype)
    check_pair(pair, network)
    costs = measure(pair, network)
    if out is not None:
        costs.save(Path(out).expanduser())
    if as_json:
        print_json(costs.to_json())
        return EXIT_OK
    one = costs.verify[1]
    rows = [(size, f"{1000 * s:.2f}", f"{s / one:.2f}") for size, s in sorted(costs.verify.items())]
    print_table(("nodes", "ms", "of one"), rows)
    print(f"drafting a round: {1000 * costs.draft:.2f} ms")
    return EXIT_OK


def info(
    drafter: str,
    target: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Describes a drafter."""
    network = load_checkpoint(drafter).network
    config = network.config
    facts: dict[str, Any] = {
        "drafter": drafter,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "block_size": config.block_size,
        "target_layers": config.target_layer_ids,
        "approximation": config.ar_approximation or "none (marginals)",
        "mask": "learned" if config.mask_token_id is None else config.mask_token_id,
        **{f"{part} parameters": n for part, n in parameter_count(config).items()},
    }
    if target is not None:
        try:
            check_pair(Target(_base(target, device, dtype).module()), network)
        except ConfigError as error:
            facts["fits the model"] = f"no: {error}"
        else:
            facts["fits the model"] = "yes"
    if as_json:
        print_json(facts)
    else:
        print_table(
            ("", drafter), [(k, f"{v:,}" if isinstance(v, int) else v) for k, v in facts.items()]
        )
    return EXIT_OK
