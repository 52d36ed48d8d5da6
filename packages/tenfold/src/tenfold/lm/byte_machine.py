"""Deterministic automata over bytes, for texts that can always be closed.

A machine is a directed acyclic graph of places with byte edges. A place may be the body of a
JSON string: there a small automaton checks escapes and UTF-8, counts characters, and leaves at
the closing quote. Machines are built as non-deterministic graphs (`Builder`) and determinised.

A state is `(place, inside, chars)`: within a string body, `inside` is the position within a
character (`PLAIN` between two) and `chars` counts finished characters; elsewhere both are 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

QUOTE, BACKSLASH = 0x22, 0x5C
PLAIN = 0
"""Between two characters of a string."""
UNLIMITED = 10**9
"""Longest string where no maximum is given."""
MOST_PLACES = 20_000
"""Larger machines are left to a general grammar."""


class NotInSubset(Exception):
    """What was asked for needs a more general grammar than these machines."""


class State(NamedTuple):
    """See the module."""

    place: int
    inside: int = PLAIN
    chars: int = 0


@dataclass(frozen=True, slots=True)
class Body:
    """A string's body: between `least` and `most` characters, then a quote to `after`."""

    least: int
    most: int
    after: int


# --- Characters of a JSON string ------------------------------------------------------------

_HEX = frozenset(b"0123456789abcdefABCDEF")
_NAMES = (
    "escape", "hex1", "hex2", "hex3", "hex4", "surrogate2", "last", "two", "three",
    "e0", "ed", "f0", "f4",
)  # fmt: skip
_PLACES = {name: i + 1 for i, name in enumerate(_NAMES)}
INSIDES = tuple(range(len(_NAMES) + 1))
"""All values of `State.inside`."""


def _characters() -> list[dict[int, int]]:
    """Per position inside a character, byte → next position; the quote is left out.

    Control characters are excluded, DEL and needless escapes of a slash too, as in llguidance;
    so are escaped surrogates, which may stand alone and then fit into no UTF-8 text.
    """
    p = _PLACES
    edges: list[dict[int, int]] = [{} for _ in INSIDES]

    def add(source: int, values: Iterable[int], target: int) -> None:
        edges[source].update(dict.fromkeys(values, target))

    add(PLAIN, (b for b in range(0x20, 0x7F) if b not in (QUOTE, BACKSLASH)), PLAIN)
    add(PLAIN, [BACKSLASH], p["escape"])
    add(p["escape"], b'"\\bfnrt', PLAIN)
    add(p["escape"], b"u", p["hex1"])
    add(p["hex1"], _HEX - set(b"dD"), p["hex2"])
    add(p["hex1"], b"dD", p["surrogate2"])
    add(p["surrogate2"], b"01234567", p["hex3"])
    add(p["hex2"], _HEX, p["hex3"])
    add(p["hex3"], _HEX, p["hex4"])
    add(p["hex4"], _HEX, PLAIN)
    middle = range(0x80, 0xC0)
    add(PLAIN, range(0xC2, 0xE0), p["last"])
    add(PLAIN, [b for b in range(0xE1, 0xF0) if b != 0xED], p["two"])
    add(PLAIN, range(0xF1, 0xF4), p["three"])
    for byte, name in ((0xE0, "e0"), (0xED, "ed"), (0xF0, "f0"), (0xF4, "f4")):
        add(PLAIN, [byte], p[name])
    add(p["last"], middle, PLAIN)
    add(p["two"], middle, p["last"])
    add(p["three"], middle, p["two"])
    add(p["e0"], range(0xA0, 0xC0), p["last"])
    add(p["ed"], range(0x80, 0xA0), p["last"])
    add(p["f0"], range(0x90, 0xC0), p["two"])
    add(p["f4"], range(0x80, 0x90), p["two"])
    return edges


CHARACTERS = _characters()


# --- The machine ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """A deterministic machine.

    Attributes:
        edges: per place, byte → place; empty for string bodies.
        bodies: place → string body.
        accepting: places where the text may end.
        order: all places, each before those that it leads to; the first is the start.
    """

    edges: tuple[dict[int, int], ...]
    bodies: dict[int, Body]
    accepting: frozenset[int]
    order: tuple[int, ...]

    @property
    def start(self) -> State:
        """Where every text begins."""
        return State(self.order[0])

    def step(self, state: State, byte: int, *, free: bool = False) -> State | None:
        """The state after one more byte, or None; `free` ignores lengths of strings."""
        body = self.bodies.get(state.place)
        if body is None:
            place = self.edges[state.place].get(byte)
            return None if place is None else State(place)
        if state.inside == PLAIN and byte == QUOTE:
            long_enough = free or state.chars >= body.least
            return State(body.after) if long_enough else None
        inside = CHARACTERS[state.inside].get(byte)
        if inside is None or not (free or state.chars < body.most):
            return None
        return State(state.place, inside, state.chars + (inside == PLAIN))

    def run(self, text: bytes, state: State | None = None) -> State | None:
        """The state after a text, or None where it leaves the language."""
        current = self.start if state is None else state
        for byte in text:
            following = self.step(current, byte)
            if following is None:
                return None
            current = following
        return current

    def accepts(self, text: bytes) -> bool:
        """Whether a whole text is in the language."""
        end = self.run(text)
        return end is not None and self.ends(end)

    def ends(self, state: State) -> bool:
        """Whether the text may end here."""
        return state.place in self.accepting

    def only(self, state: State) -> bytes:
        """Bytes that must come next: all up to a choice, a string's body or a possible end."""
        forced = bytearray()
        place = state.place
        while place not in self.accepting and len(self.edges[place]) == 1:
            [(byte, place)] = self.edges[place].items()
            forced.append(byte)
        return bytes(forced)


@dataclass(slots=True)
class Builder:
    """A non-deterministic machine under construction."""

    edges: list[list[tuple[int, int]]] = field(default_factory=list)
    empty: list[list[int]] = field(default_factory=list)
    bodies: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def place(self) -> int:
        """A new place."""
        if len(self.edges) >= MOST_PLACES:
            raise NotInSubset("too many places")
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1

    def skip(self, source: int, target: int) -> None:
        """An edge without a byte."""
        self.empty[source].append(target)

    def text(self, source: int, text: str | bytes, target: int) -> None:
        """The bytes of a text from one place to another."""
        raw = text.encode() if isinstance(text, str) else text
        for byte in raw[:-1]:
            following = self.place()
            self.edges[source].append((byte, following))
            source = following
        if raw:
            self.edges[source].append((raw[-1], target))
        else:
            self.skip(source, target)

    def any_of(self, source: int, values: Iterable[int], target: int) -> None:
        """Any one of some bytes."""
        self.edges[source].extend((byte, target) for byte in values)

    def string(self, source: int, least: int, most: int, target: int) -> None:
        """A JSON string with its quotes."""
        body = self.place()
        self.text(source, b'"', body)
        self.bodies[body] = (least, most, target)

    def build(self, start: int, end: int) -> Machine:
        """The deterministic machine of all texts between two places.

        Raises:
            NotInSubset: a string that could also be something else.
        """
        return _Determiniser(self, end).run(start)


class _Determiniser:
    """Subset construction."""

    def __init__(self, builder: Builder, end: int) -> None:
        self._builder, self._end = builder, end
        self._numbers: dict[frozenset[int], int] = {}
        self._waiting: list[tuple[frozenset[int], int]] = []

    def run(self, start: int) -> Machine:
        edges: dict[int, dict[int, int]] = {}
        bodies: dict[int, Body] = {}
        accepting = set()
        first = self._number({start})
        while self._waiting:
            places, number = self._waiting.pop()
            if self._end in places:
                accepting.add(number)
            edges[number] = self._edges(places, number, bodies)
        successors = [
            [*edges[i].values(), *([bodies[i].after] if i in bodies else [])]
            for i in range(len(edges))
        ]
        ordered = tuple(_topological(first, successors))
        table = tuple(edges[i] for i in range(len(edges)))
        return Machine(table, bodies, frozenset(accepting), ordered)

    def _edges(
        self, places: frozenset[int], number: int, bodies: dict[int, Body]
    ) -> dict[int, int]:
        held = [place for place in places if place in self._builder.bodies]
        if held:
            if len(places) > 1:
                raise NotInSubset("a string that could also be something else")
            least, most, after = self._builder.bodies[held[0]]
            bodies[number] = Body(least, most, self._number({after}))
            return {}
        targets: dict[int, set[int]] = {}
        for place in places:
            for byte, target in self._builder.edges[place]:
                targets.setdefault(byte, set()).add(target)
        return {byte: self._number(targets[byte]) for byte in sorted(targets)}

    def _number(self, places: set[int]) -> int:
        closed = frozenset(self._closure(places))
        if closed not in self._numbers:
            if len(self._numbers) >= MOST_PLACES:
                raise NotInSubset("too many places")
            self._numbers[closed] = len(self._numbers)
            self._waiting.append((closed, self._numbers[closed]))
        return self._numbers[closed]

    def _closure(self, places: set[int]) -> set[int]:
        found, waiting = set(places), list(places)
        while waiting:
            for target in self._builder.empty[waiting.pop()]:
                if target not in found:
                    found.add(target)
                    waiting.append(target)
        return found


def _topological(start: int, successors: list[list[int]]) -> list[int]:
    """Places before their successors; the graph has no cycles."""
    done: list[int] = []
    seen = {start}
    stack = [(start, iter(successors[start]))]
    while stack:
        place, following = stack[-1]
        for target in following:
            if target not in seen:
                seen.add(target)
                stack.append((target, iter(successors[target])))
                break
        else:
            stack.pop()
            done.append(place)
    return done[::-1]
