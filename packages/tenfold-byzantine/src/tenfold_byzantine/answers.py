"""What an answer may be; a bad one is refused before the game changes (spec, 2.5, 2.8)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tenfold.errors import ConfigError

from tenfold_byzantine.contracts import Ballot, Policy, Proposal, View

_SCALARS = (bool, int, float, str)


def checked_proposal(policy: Policy, view: View, reply: Any) -> Proposal:
    """A proposal whose values are allowed and whose memory and payload are plain.

    Raises:
        ConfigError: no proposal, a value out of range, or a power that the threat model forbids.
    """
    if not isinstance(reply, Proposal):
        raise _wrong_kind(policy, view, reply, "Proposal")
    for name, value in (("value", reply.value), ("held", reply.held)):
        _check_value(policy, view, f"gave {name}", value)
    if reply.to or reply.withheld:
        _check_powers(policy, view, reply)
    memory = plain(reply.memory, view, "memory")
    payload = plain(reply.payload, view, "payload")
    if memory is reply.memory and payload is reply.payload:
        return reply
    return replace(reply, memory=memory, payload=payload)


def checked_ballot(policy: Policy, view: View, reply: Any) -> Ballot:
    """A ballot whose vote is the agent's to cast and whose memory is plain.

    Raises:
        ConfigError: no ballot, or another vote.
    """
    if not isinstance(reply, Ballot):
        raise _wrong_kind(policy, view, reply, "Ballot")
    allowed = ["stop", "continue"] + ["abstain"] * (view.role == "byzantine")
    if reply.vote not in allowed:
        raise ConfigError(
            f"policy {policy.label}: {view.name} in round {view.round} voted {reply.vote!r}; it "
            f"may vote {' or '.join(allowed)}"
        )
    memory = plain(reply.memory, view, "memory")
    return reply if memory is reply.memory else replace(reply, memory=memory)


def plain(value: Any, view: View, what: str) -> Any:
    """A value as it comes back from a record, so that live and replayed games see the same."""
    if value is None or type(value) in _SCALARS:
        return value
    try:
        return json.loads(json.dumps(value, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the {what} of {view.name} cannot be recorded: {error}",
            hint="use None, numbers, text, lists and dicts with text keys",
        ) from error


def _wrong_kind(policy: Policy, view: View, reply: Any, kind: str) -> ConfigError:
    return ConfigError(
        f"policy {policy.label}: the answer of {view.name} in round {view.round} is {reply!r}; "
        f"phase {view.phase} needs a {kind}"
    )


def _check_value(policy: Policy, view: View, what: str, value: Any) -> None:
    low, high = view.rules.low, view.rules.high
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise ConfigError(
            f"policy {policy.label}: {view.name} in round {view.round} {what} {value!r}; it must "
            f"be a whole number from {low} to {high}, or None"
        )


def _check_powers(policy: Policy, view: View, reply: Proposal) -> None:
    for used, power in ((reply.to, "equivocate"), (reply.withheld, "suppress")):
        if used and (view.role != "byzantine" or power not in view.rules.powers):
            raise ConfigError(
                f"policy {policy.label}: {view.name} used the power {power} in round "
                f"{view.round}, which the threat model forbids",
                hint=f"allow it to Byzantine agents: threat = {{ {power} = true }}",
            )
    for receiver, (value, _) in sorted(reply.to.items()):
        if receiver == view.agent or not 0 <= receiver < view.rules.agents:
            raise ConfigError(
                f"policy {policy.label}: {view.name} addressed agent {receiver!r}; other agents "
                f"are numbered 0 to {view.rules.agents - 1}"
            )
        _check_value(policy, view, f"told agent {receiver}", value)
