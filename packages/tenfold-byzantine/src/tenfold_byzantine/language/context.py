"""What an agent is shown of the past, as text (spec, 2.6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tenfold_byzantine.contracts import Message, RoundLine, View, agent_name
from tenfold_byzantine.rules import Context


def cut(text: str, chars: int) -> str:
    """At most so many characters on one line, the last three dots where something is left out."""
    flat = " ".join(text.split())
    if len(flat) <= chars:
        return flat
    return flat[: max(chars - 3, 0)] + "..."[: min(chars, 3)]


def round_line(line: RoundLine, agents: Sequence[int], chars: int, silent: str) -> str:
    """One past round: per agent its value and what it said; agents without a value abstained."""
    said = {message.sender: message for message in line.messages}
    parts = [_entry(agent, said.get(agent), chars, silent) for agent in agents]
    return f"Round {line.round}: " + "; ".join(parts)


def _entry(agent: int, message: Message | None, chars: int, silent: str) -> str:
    if message is None or message.value is None:
        return f"{agent_name(agent)}: {silent}"
    said = cut(message.text, chars)
    return f"{agent_name(agent)}: {message.value}" + (f" ({said})" if said else "")


def history(view: View, context: Context, parts: Mapping[str, str]) -> str:
    """The last rounds, newest first (or oldest first: `append`)."""
    lines = list(view.history)[-context.history_rounds :] if context.history_rounds else []
    if not lines:
        return parts["no_history"]
    agents = sorted({view.agent, *view.neighbours})
    texts = [round_line(line, agents, context.line_chars, parts["silent"]) for line in lines]
    return "\n".join(texts if context.history_order == "append" else texts[::-1])


def notes(view: View, context: Context, parts: Mapping[str, str]) -> str:
    """The agent's own notes, oldest first."""
    kept = list(view.notes)[-context.notes :] if context.notes else []
    lines = [f"round {number}: {cut(text, context.note_chars)}" for number, text in kept]
    return "\n".join(lines) or parts["no_notes"]


def listing(view: View, context: Context, parts: Mapping[str, str]) -> str:
    """This round's proposals: the own one first, then every other that arrived, by sender."""
    own = [m for m in view.inbox if m.sender == view.agent]
    said = own[0].value if own else None
    lines = [f"{view.name} (you): {parts['silent'] if said is None else said}"]
    others = [m for m in view.inbox if m.sender != view.agent and m.value is not None]
    lines += messages(others, context.listing_chars) or [parts["nobody"]]
    return "\n".join(lines)


def messages(said: Iterable[Message], chars: int) -> list[str]:
    """One line per message."""
    return [_entry(m.sender, m, chars, "") for m in said if m.value is not None]


def ally_notes(view: View, context: Context) -> str:
    """What allies noted, by agent and round."""
    kept = sorted(view.ally_notes)
    return "\n".join(
        f"{agent_name(agent)}, round {number}: {cut(text, context.note_chars)}"
        for agent, number, text in kept
    )
