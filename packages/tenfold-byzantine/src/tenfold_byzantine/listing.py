"""`tenfold byzantine agents | adversaries | topologies | bounds | power | simulate`: knowledge."""

from __future__ import annotations

from typing import Any

from tenfold.cli.output import print_json, print_table
from tenfold.errors import EXIT_OK, ConfigError
from tenfold.stats import wilson


def agents(as_json: bool = False) -> int:
    """Scripted honest policies and filters, with what is proven about them."""
    return _policies(("honest", "filter"), as_json)


def adversaries(as_json: bool = False) -> int:
    """Scripted adversaries, with the powers they need of the threat model."""
    return _policies(("byzantine",), as_json)


def _policies(kinds: tuple[str, ...], as_json: bool) -> int:
    from dataclasses import asdict

    from tenfold_byzantine.policies.registry import entries

    found = [entry for kind in kinds for entry in entries(kind)]
    if as_json:
        print_json([asdict(entry) for entry in found])
        return EXIT_OK
    rows = [
        (
            _usage(entry.name, [p.name for p in entry.parameters]),
            entry.summary,
            entry.guarantee or ", ".join(entry.powers),
            entry.bound,
        )
        for entry in found
    ]
    third = "powers" if kinds == ("byzantine",) else "guarantee"
    print_table(("name", "what it does", third, "bound"), rows)
    print("\nllm: a language model, see `tenfold show byzantine:consensus`")
    return EXIT_OK


def _usage(name: str, parameters: list[str]) -> str:
    return f"{name}:{','.join(f'{p}=' for p in parameters)}" if parameters else name


def topologies(as_json: bool = False) -> int:
    """Networks and their parameters."""
    from tenfold_byzantine.networks import RANDOM_KINDS, TOPOLOGIES

    rows = [
        {
            "kind": kind,
            "what": what,
            "parameters": [*parameters, *(["seed"] if kind in RANDOM_KINDS else [])],
        }
        for kind, (what, parameters) in TOPOLOGIES.items()
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("kind", "what", "parameters"),
            [(r["kind"], r["what"], ", ".join(r["parameters"])) for r in rows],
        )
    return EXIT_OK


def bounds(n: int, f: int, values: int = 51, quota: str = "2/3", as_json: bool = False) -> int:
    """What theory says about n agents with f faulty ones."""
    from dataclasses import asdict
    from fractions import Fraction

    from tenfold_byzantine.policies.bounds import bounds as statements
    from tenfold_byzantine.rules import stop_quota

    votes = stop_quota(int(quota) if quota.isdecimal() else quota, n)
    found = statements(n, f, values, votes if votes > 1 else Fraction(votes, n))
    if as_json:
        print_json([asdict(statement) for statement in found])
    else:
        words = {True: "holds", False: "fails"}
        print_table(
            ("about", "", "condition", "says", "source"),
            [(s.name, words[s.holds], s.condition, s.says, s.source) for s in found],
        )
    return EXIT_OK


def power(
    p0: float, p1: float, power: float = 0.8, alpha: float = 0.05, as_json: bool = False
) -> int:
    """How many games per cell tell two rates apart."""
    from tenfold_byzantine.statistics import fisher_power, games_for_fisher, games_per_cell

    n = games_per_cell(p0, p1, power, alpha)
    exact = games_for_fisher(p0, p1, power, alpha)
    facts: dict[str, Any] = {
        "p0": p0, "p1": p1, "power": power, "alpha": alpha, "games_per_cell": n,
        "games_per_cell_fisher": exact,
        "fisher_power_of_25": fisher_power(25, p0, p1, alpha),
        "fisher_power_of_50": fisher_power(50, p0, p1, alpha),
    }  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        shown = "more than 2,000" if exact is None else str(exact)
        print(
            f"{p0:g} against {p1:g} at level {alpha:g} with power {power:g}: {n} games per cell by "
            f"the normal approximation, {shown} for Fisher's exact test\n"
            f"Fisher's test over 25 games per cell has power {facts['fisher_power_of_25']:.2f}, "
            f"over 50 {facts['fisher_power_of_50']:.2f}"
        )
    return EXIT_OK


def simulate(
    honest: str,
    byzantine: str = "silent",
    n_honest: int = 8,
    n_byzantine: int = 0,
    games: int = 1_000_000,
    seed: int = 0,
    stop: str = "rule",
    as_json: bool = False,
) -> int:
    """Plays one-round rules by the million, vectorised."""
    from tenfold_byzantine.policies.montecarlo import simulate as play

    if games < 1:
        raise ConfigError(f"--games is {games}; it must be at least 1")
    found = play(
        honest, byzantine, n_honest=n_honest, n_byzantine=n_byzantine, games=games, seed=seed,
        stop=stop,
    )  # fmt: skip
    rates = {
        name: (getattr(found, name), wilson(getattr(found, name), games))
        for name in ("valid", "captured", "fabricated", "premature", "hull")
    }
    if as_json:
        print_json({"games": games, **{k: {"count": n, "rate": n / games, "interval": i}
                                       for k, (n, i) in rates.items()}})  # fmt: skip
    else:
        print_table(
            ("ending", "games", "rate", "95 % interval"),
            [
                (name, n, f"{n / games:.5f}", f"{i[0]:.5f} – {i[1]:.5f}" if i else "")
                for name, (n, i) in rates.items()
            ],
        )
    return EXIT_OK
