"""The game as a pure state machine (spec, 2.2 to 2.5).

`Game.pending` says what must be answered now, `Game.submit` takes the answers and goes on. A game
is a function of its settings, its seed and the answers; it calls no policy itself, so that many
games can share one call (`play_many`) and a recorded game can be played again (`replay`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tenfold.errors import ConfigError

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
from tenfold_byzantine.rules import GameConfig
from tenfold_byzantine.streams import initial_values, question_root, seats

Asked = list[tuple[Policy, list[View]]]
Answers = Sequence[Sequence[Any]]
"""Per policy that was asked its proposals or ballots, in the order of its views."""
Inbox = tuple[Message, ...]

_SCALARS = (type(None), bool, int, float, str)


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

    def __init__(
        self,
        config: GameConfig,
        policies: Mapping[Role, Players] | Cast,
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
        self._deal()
        neighbours = cast.network or cast.graph(self.seed)
        self._hears = hears(neighbours, config.links.relay)
        self._electorates = electorates(config, neighbours)
        self._shared = self.rules.complete
        self._mail = None if self._shared else Mail(neighbours, config.links, self.seed)
        self._neighbours = neighbours
        n = self.rules.agents
        self._memory: list[Any] = [None] * n
        self._notes: list[tuple[tuple[int, str], ...]] = [()] * n
        self._inbox: Inbox = ()
        self._inboxes: list[Inbox] | None = None
        self._history: tuple[RoundLine, ...] = ()
        self._histories: list[tuple[RoundLine, ...]] | None = None
        self._begin()

    def _deal(self) -> None:
        """Roles, groups and initial values (spec, 2.2)."""
        config, n = self.config, self.rules.agents
        byzantine, honest = self._dealt_seats()
        self.roles: tuple[Role, ...]
        marked = set(byzantine)
        self.roles = tuple("byzantine" if a in marked else "honest" for a in range(n))
        self.policies: list[Policy] = [None] * n  # ty: ignore[invalid-assignment]
        for agents, policies in (
            (byzantine, self.cast.seats["byzantine"]),
            (honest, self.cast.seats["honest"]),
        ):
            for agent, policy in zip(agents, policies, strict=True):
                self.policies[agent] = policy
        if config.initial_values is not None:
            drawn = dict(zip(sorted(honest), config.initial_values, strict=True))
        else:
            drawn = initial_values(self.seed, honest, config.low, config.high)
        self.initial: tuple[int | None, ...] = tuple(drawn.get(a) for a in range(n))
        self._held: list[int | None] = list(self.initial)
        self._byzantine = sorted(byzantine)
        contexts = {role: config.context(role) for role in ("honest", "byzantine")}
        self._stored = {role: c.stored_rounds for role, c in contexts.items()}
        self._kept_lines = max(self._stored.values())
        self._current_in_history = {r: c.history_includes_current for r, c in contexts.items()}
        self._kept_notes = {role: c.notes for role, c in contexts.items()}
        self._message_chars = {role: c.message_chars for role, c in contexts.items()}
        self._groups = _grouped(self.policies, range(n))

    def _dealt_seats(self) -> tuple[list[int], list[int]]:
        config, n = self.config, self.rules.agents
        byzantine, honest = seats(self.seed, n, config.n_byzantine)
        fixed = config.byzantine_agents
        if fixed is not None:
            honest = [a for a in (*byzantine, *honest) if a not in fixed]
            byzantine = list(fixed)
        return byzantine, honest

    def _begin(self) -> None:
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
        self.counters = dict.fromkeys(
            (
                "messages",
                "lost",
                "calls",
                "prompt_tokens",
                "tokens",
                "parse_failures",
                "retries",
                "forced_abstentions",
                "clamped",
            ),
            0,
        )
        self.timing = {"decide": 0.0, "vote": 0.0}
        self._exposed: list[list[frozenset[int]] | None] = []
        self._proposals: dict[int, Proposal] = {}
        self._extras: list[tuple[Any, ...]] = []
        self._last_said: list[Message | None] = [None] * self.rules.agents
        self._root = question_root(self.game_id, self.seed)
        start = repr((self.game_id, self.seed, self.roles, self.initial, self._hears))
        self._hash = hashlib.sha256(start.encode()).hexdigest()
        self._open: Asked | None = None
        self._late: list[int] = []
        self._result: GameResult | None = None
        if self._log is not None:
            self._log.start(self)

    # --- questions -------------------------------------------------------------------------

    def pending(self) -> Asked:
        """Views that must be answered now, by policy; empty once the game is finished."""
        if self.finished:
            return []
        if self._open is None:
            self._open = self._ask()
        return self._open

    def _ask(self) -> Asked:
        if self.phase == "vote":
            return self._views("vote", self._groups)
        if self.rules.powers and "rushing" in self.rules.powers and self._byzantine:
            late = bool(self._proposals)
            agents = [a for a in range(self.rules.agents) if (self.roles[a] == "byzantine") == late]
            return self._views("decide", _grouped(self.policies, agents))
        return self._views("decide", self._groups)

    def _views(self, phase: Phase, groups: Sequence[tuple[Policy, list[int]]]) -> Asked:
        rules, t, root = self.rules, self.round, self._root
        roles, initial, held, hears_ = self.roles, self.initial, self._held, self._hears
        notes, memory = self._notes, self._memory
        inbox, inboxes = self._inbox, self._inboxes
        prefix = f"{root}/{t}/{phase}/"
        shared = self._histories is None
        lines = {role: self._lines(self._history, role, phase) for role in ("honest", "byzantine")}
        powers = rules.powers
        asked: Asked = []
        for policy, agents in groups:
            views = []
            for a in agents:
                role = roles[a]
                view = View(
                    rules,
                    a,
                    role,
                    t,
                    phase,
                    initial[a],
                    held[a],
                    hears_[a],
                    inbox if inboxes is None else inboxes[a],
                    lines[role] if shared else self._lines(self._histories[a], role, phase),
                    notes[a],
                    memory[a],
                    f"{prefix}{a}",
                )
                if powers and role == "byzantine":
                    view = self._with_powers(view)
                views.append(view)
            asked.append((policy, views))
        return asked

    def _lines(self, lines: tuple[RoundLine, ...], role: str, phase: str) -> tuple[RoundLine, ...]:
        """The stored lines that a side sees: the current round's only where it is set so."""
        if phase == "vote" and lines and not self._current_in_history[role]:
            lines = lines[:-1]
        stored = self._stored[role]
        return lines[-stored:] if stored and len(lines) > stored else lines if stored else ()

    def _with_powers(self, view: View) -> View:
        extra: dict[str, Any] = {}
        powers = self.rules.powers
        if "rushing" in powers and view.phase == "decide":
            heard = set(view.neighbours)
            extra["overheard"] = tuple(
                m
                for m in map(self._message, sorted(self._proposals))
                if m is not None and m.sender in heard
            )
        if "collude" in powers:
            allies = tuple(b for b in self._byzantine if b != view.agent)
            extra["allies"] = allies
            extra["ally_notes"] = tuple((b, r, text) for b in allies for r, text in self._notes[b])
        return replace(view, **extra)

    # --- answers ---------------------------------------------------------------------------

    def submit(self, answers: Answers) -> None:
        """Takes the answers to `pending`, in its order, and goes on.

        Raises:
            ConfigError: not the answers that were asked for, or one that no agent may give; the
                game stays where it was.
        """
        asked = self.pending()
        kind = Proposal if self.phase == "decide" else Ballot
        if len(answers) != len(asked):
            raise ConfigError(f"{len(asked)} policies were asked, {len(answers)} answered")
        for (policy, views), replies in zip(asked, answers, strict=True):
            if len(replies) != len(views):
                raise ConfigError(
                    f"policy {policy.label} was asked {len(views)} questions and gave "
                    f"{len(replies)} answers"
                )
            for view, reply in zip(views, replies, strict=True):
                if not isinstance(reply, kind):
                    raise ConfigError(
                        f"policy {policy.label}: the answer of {view.name} in round {view.round} "
                        f"is {reply!r}; phase {self.phase} needs a {kind.__name__}"
                    )
                if kind is Proposal:
                    self._check_proposal(policy, view, reply)
                elif reply.vote != "stop" and reply.vote != "continue":
                    _check_vote(policy, view, reply)
        self._open = None
        if self.phase == "decide":
            self._decided(asked, answers)
        else:
            self._voted(asked, answers)

    def _check_proposal(self, policy: Policy, view: View, reply: Proposal) -> None:
        low, high = self.rules.low, self.rules.high
        for name, value in (("value", reply.value), ("held", reply.held)):
            if value is None:
                continue
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(
                    f"policy {policy.label}: {view.name} in round {view.round} gave {name} "
                    f"{value!r}; it must be a whole number from {low} to {high}, or None"
                )
        if reply.to or reply.withheld:
            self._check_powers(policy, view, reply)

    def _check_powers(self, policy: Policy, view: View, reply: Proposal) -> None:
        for used, power in ((reply.to, "equivocate"), (reply.withheld, "suppress")):
            if used and (view.role != "byzantine" or power not in self.rules.powers):
                raise ConfigError(
                    f"policy {policy.label}: {view.name} used the power {power} in round "
                    f"{view.round}, which the threat model forbids",
                    hint=f"allow it to Byzantine agents: threat = {{ {power} = true }}",
                )
        low, high = self.rules.low, self.rules.high
        for receiver, (value, _) in sorted(reply.to.items()):
            if receiver == view.agent or not 0 <= receiver < self.rules.agents:
                raise ConfigError(
                    f"policy {policy.label}: {view.name} addressed agent {receiver!r}; other "
                    f"agents are numbered 0 to {self.rules.agents - 1}"
                )
            if value is not None and (type(value) is not int or not low <= value <= high):
                raise ConfigError(
                    f"policy {policy.label}: {view.name} told agent {receiver} {value!r}; it must "
                    f"be a whole number from {low} to {high}, or None"
                )

    def _decided(self, asked: Asked, answers: Answers) -> None:
        for (_, views), replies in zip(asked, answers, strict=True):
            for view, reply in zip(views, replies, strict=True):
                self._proposals[view.agent] = reply
        if len(self._proposals) < self.rules.agents:
            return  # rushing: Byzantine agents still have to speak
        proposals = [self._proposals[a] for a in range(self.rules.agents)]
        said = [self._message(a) for a in range(self.rules.agents)]
        for agent, proposal in enumerate(proposals):
            self._adopt(agent, proposal, said[agent])
        self._proposals = {}
        self._broadcast(proposals, said)
        self.held_rows.append(tuple(self._held))
        self.proposed_rows.append(tuple(m.value if m is not None else None for m in said))
        self.texts.append(tuple(m.text if m is not None else "" for m in said))
        self.phase = "vote"
        if self._log is not None:
            self._log.flush()

    def _message(self, agent: int) -> Message | None:
        """What an agent's proposal of this round says to everybody; None is silence."""
        proposal = self._proposals[agent]
        value, text, payload = proposal.value, proposal.text, proposal.payload
        if value is None and payload is None:
            if self.config.abstain == "silent":
                return None
            before = self._last_said[agent]
            if before is not None:
                return Message(agent, self.round, before.value, before.text, before.payload)
            if self._held[agent] is None:
                return None
            value, text = self._held[agent], ""
        chars = self._message_chars[self.roles[agent]]
        if len(text) > chars:
            text = text[:chars]
        return Message(agent, self.round, value, text, _plain(payload, agent, "payload"))

    def _adopt(self, agent: int, proposal: Proposal, message: Message | None) -> None:
        """What an agent's answer changes about itself."""
        if proposal.held is not None:
            self._held[agent] = proposal.held
        elif proposal.value is not None:
            self._held[agent] = proposal.value
        self._memory[agent] = _plain(proposal.memory, agent, "memory")
        self._last_said[agent] = message or self._last_said[agent]
        if proposal.note:
            keep = self._kept_notes[self.roles[agent]]
            notes = (*self._notes[agent], (self.round, proposal.note))
            self._notes[agent] = notes[-keep:] if keep else ()
        if proposal.attempts:
            self._count(proposal.attempts, "decide")
        self.counters["forced_abstentions"] += proposal.forced
        self.counters["clamped"] += proposal.clamped
        extra = (
            proposal.note,
            self._memory[agent],
            message.payload if message else None,
            sorted((r, list(v)) for r, v in proposal.to.items()),
            sorted(proposal.withheld),
            proposal.forced,
            proposal.clamped,
        )
        if extra != _NOTHING or proposal.attempts:
            self._extras.append((agent, *extra, _digests(proposal.attempts)))
        if self._log is not None:
            self._log.proposal(self, agent, proposal, self._memory[agent])

    def _broadcast(self, proposals: Sequence[Proposal], said: list[Message | None]) -> None:
        """Delivery (spec, 2.3 steps 2 and 3)."""
        versions = {a: self._versions(a, p, said[a]) for a, p in enumerate(proposals) if p.to}
        spoken = [m for m in said if m is not None]
        self.counters["messages"] += sum(len(self._hears[m.sender]) for m in spoken)
        if self._shared and not versions:
            self._inbox, self._inboxes = tuple(spoken), None
            self._exposed.append(None)
            self._remember(self._inbox)
            if self._log is not None:
                self._log.delivered(self, spoken)
            return
        if self._mail is None:
            self._mail = Mail(self._neighbours, self.config.links, self.seed)
        withheld = {a: frozenset(p.withheld) for a, p in enumerate(proposals) if p.withheld}
        delivered = self._mail.deliver(self.round, said, versions, withheld)
        self.counters["lost"] += len(delivered.lost)
        self._inboxes = delivered.inboxes
        marked = set(self._byzantine)
        self._exposed.append(
            [
                frozenset(m.value for m in box if m.sender in marked and m.value is not None)
                for box in delivered.inboxes
            ]
        )
        self._extras.append(
            (-1, [[(m.sender, m.sent_round, m.value) for m in box] for box in delivered.inboxes])
        )
        self._remember_apart(delivered.inboxes)
        if self._log is not None:
            self._log.delivered_apart(self, delivered)

    def _versions(
        self, agent: int, proposal: Proposal, message: Message | None
    ) -> dict[int, Message | None]:
        payload = message.payload if message else None
        chars = self._message_chars[self.roles[agent]]
        return {
            receiver: None
            if value is None and payload is None
            else Message(agent, self.round, value, text[:chars], payload)
            for receiver, (value, text) in sorted(proposal.to.items())
        }

    def _remember(self, inbox: Inbox) -> None:
        line = RoundLine(self.round, inbox)
        if self._histories is None:
            # One more than is shown: a vote leaves out the current round.
            self._history = (*self._history[-self._kept_lines :], line)
        else:
            self._remember_apart([inbox] * self.rules.agents)

    def _remember_apart(self, inboxes: Sequence[Inbox]) -> None:
        if self._histories is None:
            self._histories = [self._history] * self.rules.agents
        self._histories = [
            (*lines[-self._kept_lines :], RoundLine(self.round, inbox))
            for lines, inbox in zip(self._histories, inboxes, strict=True)
        ]

    def _voted(self, asked: Asked, answers: Answers) -> None:
        votes: list[Vote] = ["continue"] * self.rules.agents
        ballots: list[tuple[int, Ballot]] = []
        for (_, views), replies in zip(asked, answers, strict=True):
            for view, ballot in zip(views, replies, strict=True):
                votes[view.agent] = ballot.vote
                if ballot.memory is not None or ballot.attempts or ballot.forced:
                    ballots.append((view.agent, ballot))
        for agent, ballot in sorted(ballots, key=lambda pair: pair[0]):
            self._take_ballot(agent, ballot)
        self._tally(tuple(votes), dict(ballots))

    def _take_ballot(self, agent: int, ballot: Ballot) -> None:
        if ballot.memory is not None:
            self._memory[agent] = _plain(ballot.memory, agent, "memory")
        if ballot.attempts:
            self._count(ballot.attempts, "vote")
        self.counters["forced_abstentions"] += ballot.forced
        memory = None if ballot.memory is None else self._memory[agent]
        self._extras.append((agent, "vote", memory, ballot.forced, _digests(ballot.attempts)))

    def _tally(self, votes: tuple[Vote, ...], ballots: Mapping[int, Ballot]) -> None:
        """Counts the votes of a round and ends the game or goes on (spec, 2.3 step 5)."""
        self.vote_rows.append(votes)
        if self._electorates is None:
            stop = votes.count("stop") >= self.rules.quota
        else:
            stop = all(
                sum(votes[a] == "stop" for a in piece) >= quota
                for piece, quota in self._electorates
            )
        self._seal()
        if self._log is not None:
            self._log.voted(self, votes, ballots, stop)
        if stop or self.round == self.rules.max_rounds:
            self.stopped = stop
            self._finish()
        else:
            self.round += 1
            self.phase = "decide"
        if self._log is not None:
            self._log.flush()

    def _seal(self) -> None:
        """Extends the chain of state hashes by the round that ends."""
        state = repr(
            (
                self._hash,
                self.round,
                self.held_rows[-1],
                self.proposed_rows[-1],
                self.texts[-1],
                self.vote_rows[-1],
                sorted(self._extras, key=lambda extra: (extra[0], extra[1] == "vote")),
            )
        )
        self._extras = []
        self._hash = hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()
        self.state_hashes.append(self._hash)

    def _count(self, attempts: Sequence[Attempt], phase: str) -> None:
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


_NOTHING = ("", None, None, [], [], False, False)


def _grouped(policies: Sequence[Policy], agents: Sequence[int]) -> list[tuple[Policy, list[int]]]:
    """Agents by policy, in order of each policy's first agent."""
    groups: dict[int, tuple[Policy, list[int]]] = {}
    for agent in agents:
        groups.setdefault(id(policies[agent]), (policies[agent], []))[1].append(agent)
    return list(groups.values())


def _plain(value: Any, agent: int, what: str) -> Any:
    """A value as it comes back from a record, so that live and replayed games see the same."""
    if value is None or type(value) in _SCALARS:
        return value
    try:
        return json.loads(json.dumps(value, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the {what} of agent_{agent} cannot be recorded: {error}",
            hint="use None, numbers, text, lists and dicts with text keys",
        ) from error


def _digests(attempts: Sequence[Attempt]) -> list[tuple[str, str, str, int]]:
    return [(a.digest, a.text, a.rejected, a.tokens) for a in attempts]


def _check_vote(policy: Policy, view: View, reply: Ballot) -> None:
    if reply.vote == "abstain" and view.role == "byzantine":
        return
    allowed = "stop or continue" + (" or abstain" if view.role == "byzantine" else "")
    raise ConfigError(
        f"policy {policy.label}: {view.name} in round {view.round} voted {reply.vote!r}; it may "
        f"vote {allowed}"
    )
