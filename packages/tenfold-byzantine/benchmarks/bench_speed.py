"""Speed of consensus games, scripted and with models: writes `speed.md` beside this script.

    python packages/tenfold-byzantine/benchmarks/bench_speed.py            # under 10 minutes
    python packages/tenfold-byzantine/benchmarks/bench_speed.py --quick    # writes nothing

Scripted: eight agents that take the lower median, which end in round 2, as games per CPU-second;
the same game as a Mesa model (`pip install 'mesa>=3.3,<4'`; listed as missing otherwise); rows take
turns over the rounds.

Language models: a small Llama-type model with random weights plays whole games; what a forward
pass costs does not depend on their values. Passes and positions are counted by a hook on the
network. Each row changes one thing; the last is transformers' own `generate`, one agent at a time
and without a schema, as the published code falls back to with mixed groups.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tenfold.files import write_text
from tenfold.lm.model import CausalLM
from tenfold.lm.tokenizer import train_bpe
from tenfold.records import Completion, GenerationConfig
from tenfold_byzantine.contracts import Ballot, Proposal, Rules, View
from tenfold_byzantine.engine import Game
from tenfold_byzantine.events import EventLog
from tenfold_byzantine.language import LanguagePolicy, LanguageSettings
from tenfold_byzantine.play import play_many
from tenfold_byzantine.policies.montecarlo import simulate
from tenfold_byzantine.roster import Roster
from tenfold_byzantine.rules import GameConfig
from transformers import LlamaConfig, LlamaForCausalLM

N = 8
TOKENS = {"decide": 96, "vote": 16}

# --- Scripted games -------------------------------------------------------------------------------


def games(count: int, folder: Path | None = None) -> Iterator[Game]:
    """Games of eight agents that take the lower median."""
    config = GameConfig.from_table(
        {"game": {"n_honest": N, "max_rounds": 10}, "honest": {"use": "low-median"}}
    )
    cast = Roster().cast(config)
    for seed in range(count):
        log = None if folder is None else EventLog(folder, cast.game_id(seed), "none")
        yield Game(config, cast, seed, log=log)


def in_memory(count: int) -> int:
    """The engine; every result is judged, none is kept."""
    rounds = sum(result.rounds for result in play_many(games(count)))
    assert rounds == 2 * count
    return count


def on_disk(count: int) -> int:
    """The engine with an event file per game."""
    with tempfile.TemporaryDirectory() as folder:
        done = sum(1 for _ in play_many(games(count, Path(folder))))
        assert len(list(Path(folder).iterdir())) == done == count
    return count


def monte_carlo(count: int) -> int:
    """One-round rules, vectorised over games."""
    assert simulate("low-median", n_honest=N, games=count).valid == count
    return count


def with_mesa() -> Callable[[int], int] | None:
    """The same game as a Mesa model; None where Mesa is not installed."""
    try:
        import mesa
    except ImportError:
        return None

    class Seat(mesa.Agent):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.value = model.random.randint(0, 50)
            self.stop = False

        def decide(self) -> None:
            if self.model.heard:
                self.value = sorted(self.model.heard)[(N - 1) // 2]

        def vote(self) -> None:
            self.stop = len(set(self.model.heard)) == 1

    class Consensus(mesa.Model):
        def __init__(self, seed: int) -> None:
            super().__init__(seed=seed)
            self.heard: list[int] = []
            for _ in range(N):
                Seat(self)

        def step(self) -> None:
            self.agents.do("decide")
            self.heard = [agent.value for agent in self.agents]
            self.agents.do("vote")
            self.running = 3 * sum(agent.stop for agent in self.agents) < 2 * N

    def play(count: int) -> int:
        for seed in range(count):
            model, rounds = Consensus(seed), 0
            while model.running:
                model.step()
                rounds += 1
            assert rounds == 2
        return count

    return play


def scripted(quick: bool) -> list[list[str]]:
    """Games per CPU-second of each row: median and range over the rounds."""
    rows: dict[str, tuple[Callable[[int], int] | None, int]] = {
        "engine, in memory": (in_memory, 3000),
        "engine, event files on disk": (on_disk, 1000),
        "Monte-Carlo": (monte_carlo, 2_000_000),
        "Mesa": (with_mesa(), 2000),
    }
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(2 if quick else 6):
        for name, (play, count) in rows.items():
            if play is None:
                continue
            started = time.process_time()
            play(count // (10 if quick else 1))
            spent = time.process_time() - started
            if turn:  # the first turn warms up
                rates[name].append(count // (10 if quick else 1) / spent)
    table = []
    for name, found in rates.items():
        if found:
            shown = f"{statistics.median(found):,.0f}"
            table.append([name, shown, f"{min(found):,.0f} to {max(found):,.0f}"])
        else:
            table.append([name, "not installed", ""])
    return table


# --- Language models ------------------------------------------------------------------------------


@dataclass
class Count:
    """Forward passes and the positions they read."""

    passes: int = 0
    positions: int = 0


@contextmanager
def counted(network: torch.nn.Module) -> Iterator[Count]:
    """Counts the calls of a network."""
    count = Count()

    def hook(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", named.get("inputs_embeds"))
        ids = positional[0] if ids is None and positional else ids
        count.passes += 1
        if ids is not None:
            count.positions += int(ids.shape[0] * ids.shape[1])

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


class OneByOne:
    """A policy that asks for one view at a time, as a loop over agents does."""

    powers: frozenset[str] = frozenset()

    def __init__(self, inner: LanguagePolicy) -> None:
        self.inner, self.label = inner, f"{inner.label}, one by one"

    def check(self, rules: Rules) -> None:
        """As the policy behind it."""
        self.inner.check(rules)

    def decide_many(self, views: Sequence[View]) -> list[Proposal]:
        """A call per view."""
        return [proposal for view in views for proposal in self.inner.decide_many([view])]

    def vote_many(self, views: Sequence[View]) -> list[Ballot]:
        """A call per view."""
        return [ballot for view in views for ballot in self.inner.vote_many([view])]


class PlainTransformers:
    """transformers' `generate`, one prompt at a time, without a schema."""

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm

    def generate(self, prompts: Sequence[Any], config: GenerationConfig) -> list[list[Completion]]:
        """Greedy texts."""
        found = []
        for prompt in prompts:
            ids = torch.tensor([self.lm.prompt_ids(_flat(prompt))])
            with torch.no_grad():
                out = self.lm.model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                    max_new_tokens=config.max_new_tokens,
                )  # fmt: skip
            tokens = out[0, ids.shape[1] :].tolist()
            found.append([Completion(self.lm.decode(tokens), tokens, stats={})])
        return found


def _flat(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt)


def model(quick: bool) -> CausalLM:
    """A small model with random weights, and a tokenizer that knows the prompts' words."""
    config = GameConfig.from_table({"game": {"n_honest": N}, "honest": {"use": "llm"}})
    texts: list[str] = []

    class Listener:
        def generate(self, prompts: Sequence[Any], config: GenerationConfig) -> Any:
            texts.extend(map(_flat, prompts))
            return [[Completion("{}")] for _ in prompts]

    cast = {"honest": LanguagePolicy(Listener(), LanguageSettings(attempts=1))}
    game = Game(config, cast, 0)
    for asked, views in game.pending():
        asked.decide_many(views)
    tokenizer = train_bpe(texts * 4, 600 if quick else 2000)
    torch.manual_seed(0)
    size = 32 if quick else 256
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=3 * size,
            num_hidden_layers=2 if quick else 4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16384,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    return CausalLM(network, tokenizer, batch_tokens=65536)


def language(quick: bool) -> list[list[str]]:
    """Calls, passes, positions and seconds per game of each row."""
    lm = model(quick)
    rounds, count = (1, 2) if quick else (3, 4)
    config = GameConfig.from_table(
        {"game": {"n_honest": N, "max_rounds": rounds}, "honest": {"use": "llm"}}
    )
    once = LanguageSettings(max_new_tokens=TOKENS, attempts=1)
    votes = LanguageSettings(max_new_tokens=TOKENS, attempts=1, vote_mode="score")
    shared = LanguageSettings(max_new_tokens=TOKENS, attempts=1, prompt_order="shared")
    rows: list[tuple[str, Any, int, bool]] = [
        ("all games in one wave", LanguagePolicy(lm, once), count, True),
        ("votes by scoring", LanguagePolicy(lm, votes), count, True),
        ("prompts that begin alike", LanguagePolicy(lm, shared), count, True),
        ("without jump-forward", LanguagePolicy(lm, once), count, False),
        ("one game at a time", LanguagePolicy(lm, once), 1, True),
        ("one agent at a time", OneByOne(LanguagePolicy(lm, once)), 1, True),
        ("transformers' `generate`, one agent at a time, no schema",
         LanguagePolicy(PlainTransformers(lm), once), 1, True),
    ]  # fmt: skip
    table = []
    for name, player, width, jump in rows:
        lm.jump_forward = jump
        started, cpu = time.perf_counter(), time.process_time()
        with counted(lm.model) as seen:
            waiting = [Game(config, {"honest": player}, seed) for seed in range(count)]
            results = list(play_many(waiting, width=width, raise_errors=True))
        wall, spent = time.perf_counter() - started, time.process_time() - cpu
        calls = sum(r.counters["calls"] for r in results)
        failed = sum(r.counters["parse_failures"] for r in results)
        table.append(
            [name, f"{calls / count:.0f}", f"{seen.passes / count:,.1f}",
             f"{seen.positions / count:,.0f}", f"{wall / count:.2f}", f"{spent / count:.2f}",
             f"{100 * (calls - failed) / calls:.0f} %"]
        )  # fmt: skip
        print(table[-1], flush=True)
    lm.jump_forward = True
    return table


# --- Report ---------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    """Measures and writes, or prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="small sizes, writes nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    first, second = scripted(quick), language(quick)
    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("torch", "transformers", "mesa")
        if name != "mesa" or first[-1][1] != "not installed"
    )
    text = f"""# Speed

One CPU thread, Python {platform.python_version()}, {versions}. Written by `bench_speed.py`.

## Scripted games

Eight agents take the lower median; games end in round 2. Games per CPU-second: median, and range
over five rounds in which the rows take turns.

{markdown(["what", "games/s", "range"], first)}

## Language-model games

A random Llama-type model plays {N} honest agents. Per game; a pass may hold many prompts, positions
are what passes read, padding included.

{
        markdown(
            ["how", "calls", "forward passes", "positions", "wall s", "CPU s", "answers accepted"],
            second,
        )
    }
"""
    if quick:
        print(text)
    else:
        write_text(Path(__file__).with_name("speed.md"), text)


if __name__ == "__main__":
    main()
