"""The game as a pure state machine (spec, 2.2 to 2.5).

`Game.pending` says what must be answered now, `Game.submit` takes the answers and goes on. A game
is a function of its settings, its seed and the answers; it calls no policy itself, so that many
games can share one call (`play_many`) and a recorded game can be played again (`replay`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import Any, TypeVar

from tenfold.errors import ConfigError

from tenfold_byzantine.answers import checked_ballot, checked_proposal
from tenfold_byzantine.cast import Cast, Players, electorates, hears
from tenfold_byzantine.contracts import (
    Attempt,
    Ballot,
    Message,
    Phase,
    Policy,
    Proposal,
    Role,
    RoundLine,
    View,
    Vote,
)
from tenfold_byzantine.events import EventSink
from tenfold_byzantine.mail import Mail
from tenfold_byzantine.measures import Measures
from tenfold_byzantine.outcome import classify
from tenfold_byzantine.result import GameResult
from tenfold_byzantine.rules import Context, GameConfig
from tenfold_byzantine.streams import initial_values, seats

Asked = list[tuple[Policy, list[View]]]
Answers = Sequence[Sequence[Any]]
"""Per policy that was asked its proposals or ballots, in the order of its views."""
T = TypeVar("T")
Inbox = tuple[Message, ...]
Lines = tuple[RoundLine, ...]

COUNTERS = (
    "messages",
    "lost",
    "calls",
    "prompt_tokens",
    "tokens",
    "parse_failures",
    "retries",
    "forced_abstentions",
    "clamped",
)
"""What is counted about each game; messages are counted per receiver."""


class Game:
    """One game in progress.

    Args:
        config: the settings.
        policies: role → policy or groups of policies; or a `Cast`, which games of the same
            settings can share.
        seed: instead of the settings' own.
        log: where events go.

    Raises:
        ConfigError: players and settings do not fit together (see `Cast`).
    """

    def __new__(cls, config: GameConfig, *args: Any, **named: Any) -> Game:
        """An asynchronous game where the settings ask for one."""
        if cls is Game and config.schedule != "synchronous":
            from tenfold_byzantine.asynchronous import AsynchronousGame

            return object.__new__(AsynchronousGame)
        return object.__new__(cls)

    def __init__(
        self,
        config: GameConfig,
        policies: Mapping[Role, Players] | Mapping[str, Players] | Cast,
        seed: int | None = None,
        *,
        log: EventSink | None = None,
    ) -> None:
        self.cast = cast = policies if isinstance(policies, Cast) else Cast(config, policies)
        self.config = config
        self.seed = config.seed if seed is None else seed
        self.game_id = cast.game_id(self.seed)
        self.rules = cast.rules
        self._log = log
        self._neighbours = cast.network or cast.graph(self.seed)
        self._hears = hears(self._neighbours, config.links.relay)
        self._electorates = electorates(config, self._neighbours)
        self._deal()
        self._start()

    def _deal(self) -> None:
        """Roles, groups and initial values (spec, 2.2)."""
        config, cast, n = self.config, self.cast, self.rules.agents
        byzantine, honest = ([], list(range(n))) if cast.alike else self.dealt(config, self.seed)
        self.roles: tuple[Role, ...] = ("honest",) * n
        self.policies = _seated(cast.seats, honest, byzantine)
        self._contexts = _seated(cast.contexts, honest, byzantine)
        if byzantine:
            marked = set(byzantine)
            self.roles = tuple("byzantine" if a in marked else "honest" for a in range(n))
        if cast.alike and config.initial_values is None:
            values = initial_values(self.seed, honest, config.low, config.high)
            self.initial: tuple[int | None, ...] = tuple(values.values())
            self._byzantine: list[int] = []
            self._groups = cast.groups
            return
        if config.initial_values is not None:
            drawn = dict(zip(sorted(honest), config.initial_values, strict=True))
        else:
            drawn = initial_values(self.seed, honest, config.low, config.high)
        self.initial = tuple([drawn.get(a) for a in range(n)])
        self._byzantine = sorted(byzantine)
        self._groups = grouped(self.policies, range(n))

    @staticmethod
    def dealt(config: GameConfig, seed: int) -> tuple[list[int], list[int]]:
        """Byzantine agents, and honest ones in the order in which groups are dealt."""
        byzantine, honest = seats(seed, config.agents, config.n_byzantine)
        fixed = config.byzantine_agents
        if fixed is not None:
            honest = [a for a in (*byzantine, *honest) if a not in fixed]
            byzantine = list(fixed)
        return byzantine, honest

    def _start(self) -> None:
        n = self.rules.agents
        self.round = 1
        self.phase: Phase = "decide"
        self.finished = False
        self.stopped = False
        self.error = ""
        self.held_rows: list[tuple[int | None, ...]] = []
        self.proposed_rows: list[tuple[int | None, ...]] = []
        self.vote_rows: list[tuple[Vote, ...]] = []
        self.texts: list[tuple[str, ...]] = []
        self.state_hashes: list[str] = []
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.timing = {"decide": 0.0, "vote": 0.0}
        self._held: list[int | None] = list(self.initial)
        self._memory: list[Any] = [None] * n
        self._notes: list[tuple[tuple[int, str], ...]] = [()] * n
        self._last_said: list[Message | None] = [None] * n
        self._exposed: list[list[frozenset[int]] | None] = []
        self._extras: list[tuple[Any, ...]] = []
        self._open: Asked | None = None
        self._result: GameResult | None = None
        self._hash = hashlib.sha256(f"{self.game_id}/{self.seed}".encode()).hexdigest()
        self._key = self._hash[:24]
        self._start_network()
        if self._log is not None:
            self._log.start(self)

    def _start_network(self) -> None:
        self._mail: Mail | None = None
        self._inbox: Inbox = ()
        self._inboxes: list[Inbox] | None = None
        self._history: Lines = ()
        self._histories: list[Lines] | None = None
        self._proposals: dict[int, Proposal] = {}
        self._special: set[int] = set()

    # --- questions -------------------------------------------------------------------------

    def pending(self) -> Asked:
        """Views that must be answered now, by policy; empty once the game is finished.

        All of them are of the same `phase`.
        """
        if self.finished:
            return []
        if self._open is None:
            self._open = self._ask()
        return self._open

    def _ask(self) -> Asked:
        groups = self._groups
        if self.phase == "decide" and "rushing" in self.rules.powers and self._byzantine:
            late = bool(self._proposals)
            agents = [a for a, role in enumerate(self.roles) if (role == "byzantine") == late]
            groups = grouped(self.policies, agents)
        inbox, inboxes, histories = self._inbox, self._inboxes, self._histories
        lines = self._history
        asked: Asked = []
        for policy, agents in groups:
            views = self._views(
                agents,
                self.round,
                self.phase,
                repeat(inbox) if inboxes is None else [inboxes[a] for a in agents],
                repeat(lines) if histories is None else [histories[a] for a in agents],
            )
            asked.append((policy, views))
        return asked

    def _views(
        self,
        agents: Sequence[int],
        round_: int,
        phase: Phase,
        inboxes: Iterable[Inbox],
        histories: Iterable[Lines],
    ) -> list[View]:
        """Views of some agents; histories end with the current round in phase vote."""
        prefix = f"{self._key}/{round_}/{phase}/"
        shown: Iterable[Lines]
        if self.cast.one_context and isinstance(histories, repeat):
            shown = repeat(_shown(next(histories), self._contexts[0], phase))
        else:
            shown = [
                _shown(lines, self._contexts[a], phase)
                for a, lines in zip(agents, histories, strict=False)
            ]
        # One pass in C: views are what a game makes most of.
        views = map(
            View,
            repeat(self.rules),
            agents,
            self._of(agents, self.roles),
            repeat(round_),
            repeat(phase),
            self._of(agents, self.initial),
            self._of(agents, self._held),
            self._of(agents, self._hears),
            inboxes,
            shown,
            self._of(agents, self._notes),
            self._of(agents, self._memory),
            [f"{prefix}{a}" for a in agents],
        )
        if not self.rules.powers:
            return list(views)
        return [self._with_powers(v) if v.role == "byzantine" else v for v in views]

    def _of(self, agents: Sequence[int], everybody: Sequence[T]) -> Sequence[T]:
        """What belongs to some agents."""
        if len(agents) == len(everybody):
            return everybody
        return [everybody[a] for a in agents]

    def _with_powers(self, view: View) -> View:
        extra: dict[str, Any] = {}
        powers = self.rules.powers
        if "rushing" in powers and view.phase == "decide":
            heard = [a for a in sorted(self._proposals) if a in view.neighbours]
            spoken = [self._message(a, self.round, self._proposals[a]) for a in heard]
            extra["overheard"] = tuple(m for m in spoken if m is not None)
        if "collude" in powers:
            allies = tuple(b for b in self._byzantine if b != view.agent)
            extra["allies"] = allies
            extra["ally_notes"] = tuple((b, r, text) for b in allies for r, text in self._notes[b])
        return replace(view, **extra) if extra else view

    # --- answers ---------------------------------------------------------------------------

    def submit(self, answers: Answers) -> None:
        """Takes the answers to `pending`, in its order, and goes on.

        Raises:
            ConfigError: not the answers that were asked for, or one that no agent may give; the
                game stays where it was.
        """
        if self.finished:
            raise ConfigError(f"game {self.game_id} is finished; it takes no more answers")
        asked = self.pending()
        if len(answers) != len(asked):
            raise ConfigError(f"{len(asked)} policies were asked, {len(answers)} answered")
        for (policy, views), replies in zip(asked, answers, strict=True):
            if len(replies) != len(views):
                raise ConfigError(
                    f"policy {policy.label} was asked {len(views)} questions and gave "
                    f"{len(replies)} answers"
                )
        if self.phase == "decide":
            proposals, special = self._checked_proposals(asked, answers)
            self._open = None
            self._decided(proposals, special)
        else:
            votes, ballots = self._checked_ballots(asked, answers)
            self._open = None
            self._voted(votes, ballots)
        if self._log is not None:
            self._log.flush()

    def _checked_proposals(
        self, asked: Asked, answers: Answers
    ) -> tuple[dict[int, Proposal], set[int]]:
        """Proposals by agent, and the agents whose proposals say more than a value and a text."""
        low, high = self.rules.low, self.rules.high
        proposals: dict[int, Proposal] = {}
        special: set[int] = set()
        for (policy, views), replies in zip(asked, answers, strict=True):
            for view, reply in zip(views, replies, strict=True):
                if not (
                    type(reply) is Proposal
                    and type(reply.value) is int
                    and low <= reply.value <= high
                    and reply.memory is None
                    and reply.held is None
                    and reply.payload is None
                    and not (
                        reply.note
                        or reply.attempts
                        or reply.to
                        or reply.withheld
                        or reply.forced
                        or reply.clamped
                    )
                ):
                    reply = checked_proposal(policy, view, reply)
                    special.add(view.agent)
                proposals[view.agent] = reply
        return proposals, special

    def _checked_ballots(
        self, asked: Asked, answers: Answers
    ) -> tuple[dict[int, Vote], dict[int, Ballot]]:
        """Votes by agent, and the ballots that say more than a vote."""
        votes: dict[int, Vote] = {}
        ballots: dict[int, Ballot] = {}
        for (policy, views), replies in zip(asked, answers, strict=True):
            for view, reply in zip(views, replies, strict=True):
                if not (
                    type(reply) is Ballot
                    and (reply.vote == "stop" or reply.vote == "continue")
                    and reply.memory is None
                    and not (reply.attempts or reply.forced)
                ):
                    reply = checked_ballot(policy, view, reply)
                    ballots[view.agent] = reply
                votes[view.agent] = reply.vote
        return votes, ballots

    def _decided(self, proposals: dict[int, Proposal], special: set[int]) -> None:
        if self._proposals:
            proposals, special = self._proposals | proposals, self._special | special
        if len(proposals) < self.rules.agents:
            # Rushing: Byzantine agents still have to speak.
            self._proposals, self._special = proposals, special
            return
        self._proposals, self._special = {}, set()
        n, t = self.rules.agents, self.round
        said: Sequence[Message | None]
        if special or self._log is not None:
            said = [self._message(a, t, proposals[a]) for a in range(n)]
            for a in range(n):
                self._adopt(a, t, proposals[a], said[a], special=a in special)
        else:
            said = self._adopt_plain([proposals[a] for a in range(n)])
        self._broadcast(proposals, special, said)
        self.held_rows.append(tuple(self._held))
        self.proposed_rows.append(tuple([None if m is None else m.value for m in said]))
        self.texts.append(tuple(["" if m is None else m.text for m in said]))
        self.phase = "vote"

    def _adopt_plain(self, proposals: Sequence[Proposal]) -> list[Message | None]:
        """All agents at once where they said a value and a text and no more."""
        values = [p.value for p in proposals]
        texts = [p.text for p in proposals]
        if any(texts):
            texts = [
                text[: context.message_chars]
                for text, context in zip(texts, self._contexts, strict=True)
            ]
        said: list[Message | None] = list(
            map(Message, range(len(values)), repeat(self.round), values, texts)
        )
        self._held = values
        self._memory = [None] * len(values)
        self._last_said = said
        return said

    def _message(self, agent: int, round_: int, proposal: Proposal) -> Message | None:
        """What a proposal says to everybody; None is silence."""
        value, text = proposal.value, proposal.text
        if value is None and proposal.payload is None:
            if self.config.abstain == "silent":
                return None
            before = self._last_said[agent]
            if before is not None:
                return Message(agent, round_, before.value, before.text, before.payload)
            if self._held[agent] is None:
                return None
            value, text = self._held[agent], ""
        if text:
            text = text[: self._contexts[agent].message_chars]
        return Message(agent, round_, value, text, proposal.payload)

    def _adopt(
        self, agent: int, round_: int, proposal: Proposal, message: Message | None, *, special: bool
    ) -> None:
        """What an agent's answer changes about itself."""
        value = proposal.value if proposal.held is None else proposal.held
        if value is not None:
            self._held[agent] = value
        self._memory[agent] = proposal.memory
        if message is not None:
            self._last_said[agent] = message
        if special:
            self._adopt_rest(agent, round_, proposal)
        if self._log is not None:
            self._log.proposal(self, round_, agent, proposal)

    def _adopt_rest(self, agent: int, round_: int, proposal: Proposal) -> None:
        if proposal.note:
            keep = self._contexts[agent].notes
            notes = (*self._notes[agent], (round_, proposal.note))
            self._notes[agent] = notes[-keep:] if keep else ()
        self._count(proposal.attempts, "decide")
        self.counters["forced_abstentions"] += proposal.forced
        self.counters["clamped"] += proposal.clamped
        self._extras.append(
            (
                round_,
                agent,
                "decide",
                proposal.value,
                proposal.note,
                proposal.memory,
                proposal.payload,
                sorted((r, *version) for r, version in proposal.to.items()),
                sorted(proposal.withheld),
                bool(proposal.forced),
                bool(proposal.clamped),
                _digests(proposal.attempts),
            )
        )

    def _broadcast(
        self,
        proposals: Mapping[int, Proposal],
        special: set[int],
        said: Sequence[Message | None],
    ) -> None:
        """Delivery (spec, 2.3 steps 2 and 3)."""
        spoken = tuple([m for m in said if m is not None])
        hears_ = self._hears
        self.counters["messages"] += sum([len(hears_[m.sender]) for m in spoken])
        versions = {
            a: self._versions(a, self.round, proposals[a]) for a in special if proposals[a].to
        }
        if self.rules.complete and not versions:
            self._inbox, self._inboxes = spoken, None
            self._exposed.append(None)
            self._remember(spoken)
            if self._log is not None:
                self._log.delivered(self, self.round, spoken)
            return
        if self._mail is None:
            self._mail = Mail(self._neighbours, self.config.links, self.seed)
        withheld = {a: frozenset(p.withheld) for a in special if (p := proposals[a]).withheld}
        delivered = self._mail.deliver(self.round, said, versions, withheld)
        self.counters["lost"] += len(delivered.lost)
        self._inboxes = delivered.inboxes
        self._exposed.append([self._said_by_byzantine(box) for box in delivered.inboxes])
        self._extras.append((self.round, -1, "inboxes", [seen(b) for b in delivered.inboxes]))
        self._remember_apart(delivered.inboxes)
        if self._log is not None:
            self._log.delivered_apart(self, self.round, delivered)

    def _said_by_byzantine(self, inbox: Inbox) -> frozenset[int]:
        roles = self.roles
        return frozenset(
            m.value for m in inbox if roles[m.sender] == "byzantine" and m.value is not None
        )

    def _versions(self, agent: int, round_: int, proposal: Proposal) -> dict[int, Message | None]:
        """What an equivocating agent says to some receivers instead; None is silence."""
        chars = self._contexts[agent].message_chars
        return {
            receiver: None
            if value is None and proposal.payload is None
            else Message(agent, round_, value, text[:chars], proposal.payload)
            for receiver, (value, text) in sorted(proposal.to.items())
        }

    def _remember(self, inbox: Inbox) -> None:
        if self._histories is None:
            # One more than is shown: a vote leaves out the current round.
            self._history = (*self._history, RoundLine(self.round, inbox))
            if len(self._history) > self.cast.kept_lines + 1:
                self._history = self._history[1:]
        else:
            self._remember_apart([inbox] * self.rules.agents)

    def _remember_apart(self, inboxes: Sequence[Inbox]) -> None:
        histories = self._histories or [self._history] * self.rules.agents
        keep = self.cast.kept_lines
        self._histories = [
            (*(lines[-keep:] if keep else ()), RoundLine(self.round, inbox))
            for lines, inbox in zip(histories, inboxes, strict=True)
        ]

    def _voted(self, votes: dict[int, Vote], ballots: dict[int, Ballot]) -> None:
        for agent in sorted(ballots):
            self._take_ballot(agent, self.round, ballots[agent])
        row = tuple([votes[a] for a in range(self.rules.agents)])
        if self._log is not None:
            for agent, vote in enumerate(row):
                self._log.voted(self, self.round, agent, vote, ballots.get(agent))
        if not self._tally(row):
            self.round += 1
            self.phase = "decide"

    def _take_ballot(self, agent: int, round_: int, ballot: Ballot) -> None:
        if ballot.memory is not None:
            self._memory[agent] = ballot.memory
        self._count(ballot.attempts, "vote")
        self.counters["forced_abstentions"] += ballot.forced
        rest = (ballot.memory, bool(ballot.forced), _digests(ballot.attempts))
        self._extras.append((round_, agent, "vote", *rest))

    def _tally(self, votes: tuple[Vote, ...]) -> bool:
        """Counts the votes of a round; whether the game ends (spec, 2.3 step 5)."""
        self.vote_rows.append(votes)
        if self._electorates is None:
            stop = votes.count("stop") >= self.rules.quota
        else:
            stop = all(
                sum(votes[a] == "stop" for a in piece) >= quota
                for piece, quota in self._electorates
            )
        self._seal(len(self.vote_rows))
        if self._log is not None:
            self._log.tallied(self, len(self.vote_rows), votes, stop)
        if stop or len(self.vote_rows) == self.rules.max_rounds:
            self.stopped = stop
            self._finish()
        return self.finished

    def _seal(self, round_: int) -> None:
        """Extends the chain of state hashes by the round that ends."""
        i = round_ - 1
        rows = (self.held_rows[i], self.proposed_rows[i], self.vote_rows[i])
        extras: list[Any] = []
        if self._extras:
            extras = sorted((e for e in self._extras if e[0] == round_), key=lambda e: e[1:3])
            self._extras = [e for e in self._extras if e[0] != round_]
        texts = self.texts[i] if any(self.texts[i]) else ()
        state = repr((self._hash, round_, rows, texts, extras))
        self._hash = hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()
        self.state_hashes.append(self._hash)

    def _count(self, attempts: Sequence[Attempt], phase: str) -> None:
        if not attempts:
            return
        counters = self.counters
        counters["calls"] += len(attempts)
        counters["retries"] += len(attempts) - 1
        for attempt in attempts:
            counters["tokens"] += attempt.tokens
            counters["prompt_tokens"] += attempt.prompt_tokens
            counters["parse_failures"] += bool(attempt.rejected)
            self.timing[phase] += attempt.seconds

    # --- the end ---------------------------------------------------------------------------

    def fail(self, error: str) -> None:
        """Ends the game because its players' backend died; it is in no rate."""
        self.error = error
        rounds = len(self.vote_rows)
        self.held_rows, self.proposed_rows = self.held_rows[:rounds], self.proposed_rows[:rounds]
        self.texts = self.texts[:rounds]
        self._finish()
        if self._log is not None:
            self._log.flush()

    @contextmanager
    def held_log(self) -> Iterator[None]:
        """Keeps events back until the block is left."""
        if self._log is None:
            yield
            return
        self._log.hold(True)
        yield
        self._log.hold(False)

    def _finish(self) -> None:
        self.finished = True
        self._open = None
        if self._log is not None:
            self._log.end(self, self.result())

    def result(self) -> GameResult:
        """The finished game.

        Raises:
            ConfigError: the game is not finished.
        """
        if not self.finished:
            raise ConfigError(f"game {self.game_id} is not finished: round {self.round}")
        if self._result is None:
            self._result = self._judge()
        return self._result

    def _judge(self) -> GameResult:
        course = {
            "roles": self.roles,
            "initial": self.initial,
            "held": tuple(self.held_rows),
            "proposed": tuple(self.proposed_rows),
            "votes": tuple(self.vote_rows),
            "stopped": self.stopped,
        }
        verdict = classify(
            **course,
            quota=self.rules.quota,
            thresholds=self.config.thresholds,
            exposed=self._exposed,
            rushing="rushing" in self.rules.powers,
            error=self.error,
        )
        return GameResult(
            game_id=self.game_id,
            settings=self.config.settings,
            seed=self.seed,
            **course,
            outcome=verdict.outcome,
            flags=verdict.flags,
            properties=verdict.properties,
            metrics=Measures(**course, max_rounds=self.rules.max_rounds, texts=tuple(self.texts)),
            counters=self.counters,
            error=self.error,
            state_hash=self._hash,
            timing=self.timing,
        )


def _seated(seats: Mapping[Role, list[T]], honest: list[int], byzantine: list[int]) -> list[T]:
    """What belongs to the seats, by agent."""
    if not byzantine and honest == sorted(honest):
        return seats["honest"]
    dealt = dict(zip(honest, seats["honest"], strict=True))
    dealt |= zip(byzantine, seats["byzantine"], strict=True)
    return [dealt[agent] for agent in range(len(dealt))]


def grouped(policies: Sequence[Policy], agents: Sequence[int]) -> list[tuple[Policy, list[int]]]:
    """Agents by policy, in order of each policy's first agent."""
    groups: dict[int, tuple[Policy, list[int]]] = {}
    for agent in agents:
        policy = policies[agent]
        if id(policy) not in groups:
            groups[id(policy)] = (policy, [])
        groups[id(policy)][1].append(agent)
    return list(groups.values())


def _shown(lines: Lines, context: Context, phase: Phase) -> Lines:
    """The stored lines that an agent sees: the current round's only where it is set so."""
    if phase == "vote" and not context.history_includes_current:
        lines = lines[:-1]
    stored = context.stored_rounds
    return lines[-stored:] if stored else ()


def _digests(attempts: Sequence[Attempt]) -> list[tuple[str, str, int]]:
    return [(a.text, a.rejected, a.tokens) for a in attempts]


def seen(inbox: Inbox) -> list[tuple[int, int, int | None]]:
    """What the state hash knows of an inbox."""
    return [(m.sender, m.sent_round, m.value) for m in inbox]
