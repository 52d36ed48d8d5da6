"""Games without common rounds (spec, 2.15): an event queue delivers one message at a time.

Every agent has a round of its own. Having spoken, it waits until it has heard from all but f of
those that it can hear (itself included) in that round, votes, and begins its next round at once;
messages that come later are no part of that round for it. The environment counts the votes of a
round when all agents have cast them; a game that stops forgets what faster agents said since,
though their messages and calls were made and stay counted.

The queue's order is `fifo`, `random`, or `adversarial`: liars first, then small values first to
agents with even numbers and large values first to the others, so that they hear different n - f.
Where the queue is empty and everybody waits (too many are silent, or messages were lost), all
waiting agents go on with what they have.
"""

from __future__ import annotations

import heapq

from tenfold.errors import ConfigError

from tenfold_byzantine.contracts import Ballot, Message, Phase, Proposal, RoundLine, Vote
from tenfold_byzantine.engine import Asked, Game, Inbox, Lines, grouped, seen
from tenfold_byzantine.mail import Delivered
from tenfold_byzantine.streams import stream

Entry = tuple[tuple[float, ...], int, int, Message]
"""Order, number in the queue, receiver, message."""


class AsynchronousGame(Game):
    """A game in which agents move on as soon as they have heard from all but f."""

    def _start_network(self) -> None:
        refused = sorted(self.rules.powers & {"rushing", "suppress"})
        if refused:
            raise ConfigError(
                f"threat allows {', '.join(refused)}, but the schedule is {self.config.schedule}",
                hint="an asynchronous game has neither rounds to rush in nor relays; its "
                "adversarial schedule is stronger than rushing",
            )
        n = self.rules.agents
        self._local = [1] * n
        self._ready: dict[Phase, list[int]] = {"decide": list(range(n)), "vote": []}
        self._waiting: set[int] = set()
        self._boxes: list[dict[int, dict[int, Message]]] = [{} for _ in range(n)]
        self._inbox_of: list[Inbox] = [()] * n
        self._lines_of: list[Lines] = [()] * n
        self._queue: list[Entry] = []
        self._sent = 0
        self._order = stream(self.seed, "schedule")
        self._rows: dict[int, _Row] = {}

    # --- questions -------------------------------------------------------------------------

    def _ask(self) -> Asked:
        if not self._ready["decide"] and not self._ready["vote"]:
            self._run_queue()
        self.phase = "decide" if self._ready["decide"] else "vote"
        agents = sorted(self._ready[self.phase])
        asked: Asked = []
        for policy, members in grouped(self.policies, agents):
            views = []
            for a in members:
                inbox, lines = [self._inbox_of[a]], [self._lines_of[a]]
                views += self._views([a], self._local[a], self.phase, inbox, lines)
            asked.append((policy, views))
        return asked

    def _run_queue(self) -> None:
        """Delivers messages until somebody can act."""
        while self._queue and not self._ready["vote"]:
            _, _, receiver, message = heapq.heappop(self._queue)
            box = self._boxes[receiver].setdefault(message.sent_round, {})
            box[message.sender] = message
            if self._log is not None:
                arrived = Delivered([], [(receiver, message)], [])
                self._log.delivered_apart(self, self._local[receiver], arrived)
            if receiver in self._waiting and self._heard_enough(receiver):
                self._close_round(receiver)
        if not self._ready["vote"]:
            for agent in sorted(self._waiting):
                self._close_round(agent)

    def _heard_enough(self, agent: int) -> bool:
        needed = max(len(self._hears[agent]) + 1 - self.rules.faults, 1)
        return len(self._boxes[agent].get(self._local[agent], ())) >= needed

    def _close_round(self, agent: int) -> None:
        """What the agent has now is what it hears of its round."""
        round_ = self._local[agent]
        box = self._boxes[agent].pop(round_, {})
        for past in [r for r in self._boxes[agent] if r < round_]:
            del self._boxes[agent][past]
        inbox = tuple(box[s] for s in sorted(box))
        self._inbox_of[agent] = inbox
        keep = self.cast.kept_lines
        past_lines = self._lines_of[agent][-keep:] if keep else ()
        self._lines_of[agent] = (*past_lines, RoundLine(round_, inbox))
        self._row(round_).exposed[agent] = self._said_by_byzantine(inbox)
        self._extras.append((round_, agent, "inbox", seen(inbox)))
        self._waiting.discard(agent)
        self._ready["vote"].append(agent)

    # --- answers ---------------------------------------------------------------------------

    def _decided(self, proposals: dict[int, Proposal], special: set[int]) -> None:
        self._ready["decide"] = []
        for agent in sorted(proposals):
            proposal, round_ = proposals[agent], self._local[agent]
            message = self._message(agent, round_, proposal)
            self._adopt(agent, round_, proposal, message, special=agent in special)
            row = self._row(round_)
            row.held[agent] = self._held[agent]
            row.proposed[agent] = None if message is None else message.value
            row.texts[agent] = "" if message is None else message.text
            self._waiting.add(agent)
            self._send(agent, round_, proposal, message)
        for agent in sorted(proposals):
            if self._heard_enough(agent):
                self._close_round(agent)

    def _send(self, agent: int, round_: int, proposal: Proposal, message: Message | None) -> None:
        versions = self._versions(agent, round_, proposal) if proposal.to else {}
        loss = self.config.links.loss
        rng = stream(self.seed, "links", round_, agent) if loss else None
        if message is not None:
            self.counters["messages"] += len(self._hears[agent])
            self._boxes[agent].setdefault(round_, {})[agent] = message
        lost = []
        for receiver in self._hears[agent]:
            told = versions.get(receiver, message)
            fails = rng is not None and rng.random() < loss
            if told is None:
                continue
            if fails:
                lost.append((agent, receiver))
                continue
            self._sent += 1
            order = self._rank(receiver, told)
            heapq.heappush(self._queue, (order, self._sent, receiver, told))
        if lost:
            self.counters["lost"] += len(lost)
            if self._log is not None:
                self._log.delivered_apart(self, round_, Delivered([], [], lost))

    def _rank(self, receiver: int, message: Message) -> tuple[float, ...]:
        """Where a message stands in the queue; the number of its sending breaks ties."""
        match self.config.schedule:
            case "random":
                return (self._order.random(),)
            case "adversarial":
                honest = self.roles[message.sender] == "honest"
                value = self.rules.low if message.value is None else message.value
                return (message.sent_round, honest, value if receiver % 2 == 0 else -value)
            case _:
                return ()

    def _voted(self, votes: dict[int, Vote], ballots: dict[int, Ballot]) -> None:
        self._ready["vote"] = []
        for agent in sorted(votes):
            round_ = self._local[agent]
            if agent in ballots:
                self._take_ballot(agent, round_, ballots[agent])
            self._row(round_).votes[agent] = votes[agent]
            if self._log is not None:
                self._log.voted(self, round_, agent, votes[agent], ballots.get(agent))
            if round_ < self.rules.max_rounds:
                self._local[agent] += 1
                self._ready["decide"].append(agent)
        while not self.finished and self._complete(self.round):
            self._count_round(self.round)
            self.round += not self.finished

    def _complete(self, round_: int) -> bool:
        return len(self._row(round_).votes) == self.rules.agents

    def _count_round(self, round_: int) -> None:
        row, n = self._rows.pop(round_), self.rules.agents
        self.held_rows.append(tuple(row.held[a] for a in range(n)))
        self.proposed_rows.append(tuple(row.proposed[a] for a in range(n)))
        self.texts.append(tuple(row.texts[a] for a in range(n)))
        self._exposed.append([row.exposed[a] for a in range(n)])
        self._tally(tuple(row.votes[a] for a in range(n)))

    def _row(self, round_: int) -> _Row:
        return self._rows.setdefault(round_, _Row())


class _Row:
    """A round that not everybody has finished, by agent."""

    def __init__(self) -> None:
        self.held: dict[int, int | None] = {}
        self.proposed: dict[int, int | None] = {}
        self.texts: dict[int, str] = {}
        self.exposed: dict[int, frozenset[int]] = {}
        self.votes: dict[int, Vote] = {}
