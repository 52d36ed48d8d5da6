"""Delivery on networks where receivers do not all get the same (spec, 2.15).

On reliable links an inbox holds the messages of the round, so that silence is seen as silence. On
links with delay or loss silence cannot be told from a late message: a receiver keeps the newest
message that it has of every sender, and sees its age.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenfold_byzantine.contracts import Message
from tenfold_byzantine.networks import Links, Neighbours, reach
from tenfold_byzantine.streams import stream

Versions = Mapping[int, Message | None]
"""Receiver → what an equivocating sender tells it instead."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a round brought.

    Attributes:
        inboxes: per receiver, by sender, its own message included.
        arrivals: `(receiver, message)` that arrived, by receiver and sender.
        lost: `(sender, receiver)` that never will.
    """

    inboxes: list[tuple[Message, ...]]
    arrivals: list[tuple[int, Message]]
    lost: list[tuple[int, int]]


class Mail:
    """The post of one game.

    Args:
        neighbours: the graph.
        links: how messages travel.
        seed: the game's seed.
    """

    def __init__(self, neighbours: Neighbours, links: Links, seed: int) -> None:
        self._neighbours = neighbours
        self._links = links
        self._seed = seed
        self._reached = tuple(reach(neighbours, i, links.relay) for i in range(len(neighbours)))
        self._newest: list[dict[int, Message]] = [{} for _ in neighbours]
        self._silent: list[dict[int, int]] = [{} for _ in neighbours]
        self._under_way: dict[int, list[tuple[int, Message]]] = {}

    def deliver(
        self,
        round_: int,
        said: Sequence[Message | None],
        versions: Mapping[int, Versions] | None = None,
        withheld: Mapping[int, frozenset[int]] | None = None,
    ) -> Delivered:
        """Sends a round's messages and hands out what arrives in it.

        Args:
            round_: the round.
            said: per sender its message; None is silence.
            versions: sender → receiver → another message.
            withheld: relay → senders that it does not pass on.
        """
        versions = versions or {}
        lost = self._send(round_, said, versions, withheld)
        arrivals = sorted(
            self._under_way.pop(round_, []), key=lambda a: (a[0], a[1].sender, a[1].sent_round)
        )
        self._receive(arrivals)
        for agent, message in enumerate(said):
            if message is None:
                self._newest[agent].pop(agent, None)
            else:
                self._newest[agent][agent] = message
        inboxes = [tuple(box[s] for s in sorted(box)) for box in self._newest]
        return Delivered(inboxes, arrivals, lost)

    def _send(
        self,
        round_: int,
        said: Sequence[Message | None],
        versions: Mapping[int, Versions],
        withheld: Mapping[int, frozenset[int]] | None,
    ) -> list[tuple[int, int]]:
        links = self._links
        rng = None if links.reliable else stream(self._seed, "links", round_)
        certain = links.reliable_in(round_)
        lost: list[tuple[int, int]] = []
        for sender, message in enumerate(said):
            own = versions.get(sender, {})
            passed: tuple[int, ...] = self._reached[sender]
            if withheld:
                passed = reach(self._neighbours, sender, links.relay, withheld)
            for receiver in self._reached[sender]:
                # Every link draws, also for silence: what one agent does must not shift the
                # fortune of another's messages.
                arrives = round_ if rng is None else links.arrival(round_, rng)
                told = own.get(receiver, message)
                if told is None or receiver not in passed:
                    if certain:
                        self._silence(receiver, sender, round_)
                elif arrives is None:
                    lost.append((sender, receiver))
                else:
                    self._under_way.setdefault(arrives, []).append((receiver, told))
        return lost

    def _silence(self, receiver: int, sender: int, round_: int) -> None:
        self._newest[receiver].pop(sender, None)
        self._silent[receiver][sender] = round_

    def _receive(self, arrivals: Sequence[tuple[int, Message]]) -> None:
        for receiver, message in arrivals:
            box, sender = self._newest[receiver], message.sender
            before = box.get(sender)
            newest = before.sent_round if before else self._silent[receiver].get(sender, 0)
            if message.sent_round > newest:
                box[sender] = message
