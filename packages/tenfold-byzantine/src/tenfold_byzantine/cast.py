"""Which policy plays which seat, checked once for all games of the same settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tenfold.errors import ConfigError
from tenfold.seeds import content_hash

from tenfold_byzantine.contracts import POWERS, Policy, Role
from tenfold_byzantine.networks import Neighbours, components, reach
from tenfold_byzantine.rules import Context, GameConfig, stop_quota

Players = Policy | Sequence[tuple[int, Policy]]
"""One policy for a whole side, or counts and policies of its groups."""


class Cast:
    """The players of a kind of game.

    Building one checks every policy against the rules and the threat model; games that share it
    share that work.

    Args:
        config: the settings.
        policies: role → policy of all agents of that side, or `(count, policy)` per group.

    Raises:
        ConfigError: a side has no policy, counts do not add up, a policy needs a power that the
            threat model forbids, or the rules are outside of its bounds.
    """

    def __init__(
        self, config: GameConfig, policies: Mapping[Role, Players] | Mapping[str, Players]
    ) -> None:
        self.config = config
        self.rules = config.rules
        sides: dict[str, Players] = dict(policies.items())
        self.seats: dict[Role, list[Policy]] = {
            "honest": _seats("honest", sides.get("honest"), config.n_honest),
            "byzantine": _seats("byzantine", sides.get("byzantine"), config.n_byzantine),
        }
        self._check()
        self.network: Neighbours | None = None
        if not config.network.drawn:
            self.network = self.graph(config.seed)
        self.contexts: dict[Role, list[Context]] = {
            "honest": config.contexts("honest"),
            "byzantine": config.contexts("byzantine"),
        }
        everybody = [*self.contexts["honest"], *self.contexts["byzantine"]]
        self.kept_lines = max(context.stored_rounds for context in everybody)
        # Nothing to draw where every agent plays the same.
        honest = self.seats["honest"]
        self.one_context = all(context == everybody[0] for context in everybody)
        self.alike = self.one_context and not config.n_byzantine and len(_distinct(honest)) == 1
        self.groups = [(honest[0], list(range(len(honest))))]

    def _check(self) -> None:
        allowed = self.config.threat.powers
        for role, policies in self.seats.items():
            for policy in _distinct(policies):
                unknown = sorted(policy.powers - POWERS)
                if unknown:
                    raise ConfigError(
                        f"policy {policy.label} declares unknown powers: {', '.join(unknown)}",
                        hint=f"known: {', '.join(sorted(POWERS))}",
                    )
                if role == "honest" and policy.powers:
                    raise ConfigError(
                        f"policy {policy.label} needs {', '.join(sorted(policy.powers))}; "
                        "honest agents have no such power",
                        hint="let it play the Byzantine side",
                    )
                missing = sorted(policy.powers - allowed)
                if missing:
                    raise ConfigError(
                        f"adversary {policy.label} needs {', '.join(missing)}, "
                        "which the threat model forbids",
                        hint="allow it: threat = { "
                        + ", ".join(f"{name} = true" for name in missing)
                        + " }, or choose another adversary",
                    )
                policy.check(self.rules)

    def graph(self, seed: int) -> Neighbours:
        """The network of a game."""
        return self.config.network.neighbours(
            self.config.agents, seed, connected=self.config.vote_scope == "all"
        )

    @cached_property
    def identity(self) -> str:
        """Hash of settings and players, without the seed."""
        players = {
            role: [_identity(policy) for policy in policies]
            for role, policies in self.seats.items()
        }
        return content_hash([self.config.canonical, players], 64)

    def game_id(self, seed: int) -> str:
        """Names a game: hash of settings, players and seed."""
        return hashlib.sha256(f"{self.identity}/{seed}".encode()).hexdigest()[:16]


def hears(neighbours: Neighbours, relay: int) -> Neighbours:
    """Whom each agent hears: its neighbours, and with relays those beyond."""
    if relay == 1:
        return neighbours
    return tuple(reach(neighbours, agent, relay) for agent in range(len(neighbours)))


def electorates(
    config: GameConfig, neighbours: Neighbours
) -> list[tuple[tuple[int, ...], int]] | None:
    """Components and their quotas where they vote apart; None where all vote together."""
    if config.vote_scope == "all":
        return None
    quota = config.quota
    if isinstance(quota, int):
        return [(piece, min(quota, len(piece))) for piece in components(neighbours)]
    return [(piece, stop_quota(quota, len(piece))) for piece in components(neighbours)]


def _seats(role: Role, players: Players | None, count: int) -> list[Policy]:
    if count == 0:
        return []
    if players is None:
        raise ConfigError(
            f"{count} agents are {role}, but no policy plays them",
            hint=f"give a policy for {role} agents",
        )
    if not isinstance(players, Sequence):
        return [players] * count
    seats = [policy for number, policy in players for _ in range(number)]
    if len(seats) != count:
        raise ConfigError(
            f"the {role} groups have {len(seats)} agents, but n_{role} is {count}",
            hint=f"make the counts add up to {count}",
        )
    return seats


def _distinct(policies: Sequence[Policy]) -> list[Policy]:
    return list({id(policy): policy for policy in policies}.values())


def _identity(policy: Policy) -> Any:
    """Label, and what else distinguishes a policy (a model, its prompts), where it says so."""
    return [policy.label, getattr(policy, "identity", None)]
