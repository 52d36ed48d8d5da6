"""`LanguagePolicy`: agents that are language models (spec, 2.6-2.9, 6.5).

All views of a call, of many seats and games, become one batch per kind of answer; answers that
are not accepted are asked for again as a batch, with the reason added to their prompts. After the
last attempt a decision is a forced abstention and a vote is to continue.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from tenfold.capabilities import supports
from tenfold.errors import CapabilityError, ConfigError
from tenfold.seeds import content_hash

from tenfold_byzantine.contracts import (
    Attempt,
    Ballot,
    Message,
    Proposal,
    Role,
    RoundLine,
    Rules,
    View,
    Vote,
)
from tenfold_byzantine.language.replies import DECISION, Reply, options, read, schema
from tenfold_byzantine.language.requests import Asker, Request, Response
from tenfold_byzantine.language.settings import LanguageSettings
from tenfold_byzantine.language.wording import wording
from tenfold_byzantine.rules import Group

T = TypeVar("T")
_FILLER = "I see that most agents are close to one value and propose it so that we agree soon. "


class LanguagePolicy:
    """A model that plays any number of seats, honest or Byzantine.

    Args:
        model: anything with `generate`; see `Asker` for what else it uses.
        settings: how it plays.

    Raises:
        CapabilityError: the model cannot do what the settings ask for.
        ConfigError: no such prompts.
    """

    powers: frozenset[str] = frozenset()
    """It tells everybody the same, and uses what it is shown of allies and overheard messages."""

    def __init__(self, model: Any, settings: LanguageSettings | None = None) -> None:
        self.settings = settings or LanguageSettings()
        if not supports(model, "generate"):
            raise CapabilityError(f"{type(model).__name__} cannot generate text; agents must")
        self._asker, self._wording = Asker(model), wording(self.settings.prompts)
        if self.settings.vote_mode == "score" and not supports(model, "score"):
            raise CapabilityError(
                f"{type(model).__name__} cannot score given answers",
                hint='use vote_mode = "generate", or a model with the capability score',
            )
        given = self.settings.bounds
        self._bounds = self._asker.local if given is None else given

    @property
    def model(self) -> Any:
        """The model."""
        return self._asker.model

    @property
    def label(self) -> str:
        """As in game files."""
        return "llm" if self.settings.vote_mode == "generate" else "llm:vote_mode=score"

    @cached_property
    def identity(self) -> str:
        """Hash of the model, the prompts and all settings; part of the game id."""
        model = self.model
        told = getattr(model, "fingerprint", None)
        name = told() if callable(told) else type(model).__name__
        return content_hash([name, self._wording.hash, self.settings.to_json()], 64)

    @property
    def prompt_hash(self) -> str:
        """SHA-256 of the prompts' file."""
        return self._wording.hash

    def check(self, rules: Rules) -> None:
        """Raises ConfigError for an awareness without prompts, or where the longest prompt of
        such a game does not fit the model's context."""
        roles: list[Role] = ["honest", *(["byzantine"] if rules.faults else [])]  # ty: ignore[invalid-assignment]
        for role in roles:
            for phase in ("decide", "vote"):
                view = _longest_view(rules, role, phase, self.settings)
                request = self._request(view, 0, "")
                count = self._asker.count(request)
                if count is None:
                    continue
                context = self.model.context_length
                if count + request.max_new_tokens > context:
                    raise ConfigError(
                        f"with {rules.agents} agents a {role} agent's {phase} prompt has about "
                        f"{count} tokens; with max_new_tokens.{phase} = {request.max_new_tokens} "
                        f"that does not fit the model's context of {context} tokens",
                        hint="show fewer history_rounds or shorter texts (context), lower "
                        "max_new_tokens, or use a model with a longer context",
                    )

    def decide_many(self, views: Sequence[View]) -> list[Proposal]:
        """One proposal per view."""
        return self._answered(views, _proposal)

    def vote_many(self, views: Sequence[View]) -> list[Ballot]:
        """One ballot per view."""
        if self.settings.vote_mode == "score":
            return self._scored(views)
        return self._answered(views, _ballot)

    def _answered(
        self, views: Sequence[View], finish: Callable[[Reply, tuple[Attempt, ...]], T]
    ) -> list[T]:
        """Asks until every answer is accepted or its attempts are spent."""
        attempts: list[list[Attempt]] = [[] for _ in views]
        replies: dict[int, Reply] = {}
        open_ = list(range(len(views)))
        for number in range(self.settings.attempts):
            if not open_:
                break
            reasons = [attempts[i][-1].rejected if number else "" for i in open_]
            requests = [
                self._request(views[i], number, reason)
                for i, reason in zip(open_, reasons, strict=True)
            ]
            responses = self._asker.ask(requests)
            for i, request, response in zip(open_, requests, responses, strict=True):
                view = views[i]
                replies[i] = read(response.text, view.phase, view.role, view.rules)
                attempts[i].append(_attempt(request, response, replies[i]))
            open_ = [i for i in open_ if replies[i].rejected]
        return [finish(replies[i], tuple(attempts[i])) for i in range(len(views))]

    def _request(self, view: View, number: int, reason: str) -> Request:
        settings = self.settings
        awareness = settings.awareness or view.rules.awareness
        user = self._wording.user(view, settings.context)
        return Request(
            system=self._wording.system(view, awareness, settings.prompt_order),
            user=user + self._wording.retry(reason) if reason else user,
            schema=schema(view.phase, view.role, view.rules, bounds=self._bounds),
            temperature=settings.temperature_of(view.phase, number),
            max_new_tokens=int(settings.max_new_tokens[view.phase]),
            key=f"{view.key}/{view.phase}/{number}",
        )

    # --- Votes by scoring ---------------------------------------------------------------------

    def _scored(self, views: Sequence[View]) -> list[Ballot]:
        """Votes drawn from the probabilities of the whole answers, in one call."""
        requests = [self._request(view, 0, "") for view in views]
        prompts = [self._asker.prompt(request) for request in requests]
        pairs = [
            (prompt, json.dumps({DECISION: option}))
            for view, prompt in zip(views, prompts, strict=True)
            for option in options(view.role)
        ]
        totals = iter([scores.total for scores in self.model.score(pairs)])
        ballots = []
        for view, request, prompt in zip(views, requests, prompts, strict=True):
            logs = {option: next(totals) for option in options(view.role)}
            vote = _drawn(view, logs, request.temperature)
            read_tokens = len(prompt) if self._asker.local else 0
            attempt = Attempt(
                request.system, request.user, json.dumps({DECISION: vote}), {DECISION: vote},
                prompt_tokens=read_tokens, scores=_normalised(logs, 1.0),
            )  # fmt: skip
            ballots.append(Ballot(vote, attempts=(attempt,)))
        return ballots


def from_group(model: Any, group: Group, role: Role) -> LanguagePolicy:
    """The policy of a group of a game file.

    Raises:
        CapabilityError, ConfigError: settings that the model or the prompts cannot follow.
    """
    del role
    return LanguagePolicy(
        model,
        LanguageSettings(
            awareness=group.awareness,
            context=group.context,
            temperature=group.temperature,
            max_new_tokens=group.max_new_tokens,
            attempts=int(group.retries.get("attempts", 3)),
            same_temperature=bool(group.retries.get("same_temperature", True)),
            vote_mode=group.vote_mode,
        ),
    )


def _attempt(request: Request, response: Response, reply: Reply) -> Attempt:
    return Attempt(
        request.system,
        request.user,
        response.text,
        reply.parsed,
        reply.rejected,
        tokens=response.tokens,
        prompt_tokens=response.prompt_tokens,
        seconds=response.seconds,
    )


def _proposal(reply: Reply, attempts: tuple[Attempt, ...]) -> Proposal:
    if reply.rejected:
        return Proposal(None, attempts=attempts, forced=True)
    return Proposal(reply.value, reply.text, reply.note, attempts=attempts, clamped=reply.clamped)


def _ballot(reply: Reply, attempts: tuple[Attempt, ...]) -> Ballot:
    if reply.rejected:
        return Ballot("continue", attempts=attempts, forced=True)
    return Ballot(reply.vote, attempts=attempts)


def _normalised(logs: dict[Vote, float], temperature: float) -> dict[str, float]:
    """Probabilities from log-probabilities, at a temperature above 0."""
    top = max(logs.values())
    weights = {option: math.exp((value - top) / temperature) for option, value in logs.items()}
    total = sum(weights.values())
    return {option: weight / total for option, weight in weights.items()}


def _drawn(view: View, logs: dict[Vote, float], temperature: float) -> Vote:
    """A vote; at temperature 0 the most probable one, the first of equals."""
    if temperature == 0:
        return max(logs, key=lambda option: logs[option])
    mark = view.draws("vote").random()
    for option, share in _normalised(logs, temperature).items():
        mark -= share
        if mark < 0:
            return option  # ty: ignore[invalid-explicit-return]
    return next(reversed(logs))


def _longest_view(rules: Rules, role: Role, phase: Any, settings: LanguageSettings) -> View:
    """A late view in which every text is as long as it may be."""
    context = settings.context
    text = _FILLER * (context.message_chars // len(_FILLER) + 1)
    said = tuple(
        Message(agent, rules.max_rounds, rules.high, text[: context.message_chars])
        for agent in range(rules.agents)
    )
    lines = [RoundLine(rules.max_rounds, said)] * context.history_rounds
    note = (_FILLER * (context.note_chars // len(_FILLER) + 1))[: context.note_chars]
    own = rules.agents - 1
    view = View(
        rules=rules,
        agent=own,
        role=role,
        round=rules.max_rounds,
        phase=phase,
        initial=rules.high if role == "honest" else None,
        held=rules.high,
        neighbours=tuple(range(own)),
        inbox=said,
        history=lines,
        notes=[(rules.max_rounds, note)] * context.notes,
        memory=None,
        key="longest",
    )
    if role == "honest" or phase == "vote":
        return view
    allies = tuple(range(max(rules.faults - 1, 0))) if "collude" in rules.powers else ()
    kept = [(ally, rules.max_rounds, note) for ally in allies for _ in range(context.notes)]
    overheard = said if "rushing" in rules.powers else ()
    return replace(view, allies=allies, ally_notes=tuple(kept), overheard=overheard)
