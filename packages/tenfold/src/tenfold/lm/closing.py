"""Constraints that always close: which tokens keep a text closable within the tokens left.

From each state of a byte machine, tokens are grouped by the state that they lead to, and each
state knows its exact distance: the fewest tokens of this vocabulary that finish the text. A token
is allowed if the distance after it is at most the number of tokens then left, so that every text
is whole at any limit that is at least the first state's distance.

Where only one run of bytes can follow, the tokenizer's own tokens of that run are prescribed
(unless the limit is too near for them), so that models see text split as they know it and
decoders can write such tokens without asking the model.

Within a string's body groups do not depend on how many characters were written: a group says how
many its tokens add, and the lengths are checked per state. Shapes: `V` vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tenfold.lm.byte_machine import INSIDES, PLAIN, UNLIMITED, Body, Machine, State

NEVER = 1 << 40
"""Distance of a state that no tokens of the vocabulary finish."""
_MASK_BYTES = 1 << 26
"""Size of the masks kept per constraint."""


class Vocabulary:
    """The bytes of every token.

    Args:
        tokens: per id its bytes; empty for special tokens and unused ids.
        end_ids: tokens that end a text; the first is the one that is prescribed.
        encode: a tokenizer's own tokens for some bytes.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        end_ids: Sequence[int],
        encode: Callable[[bytes], list[int]],
    ) -> None:
        self.tokens, self.end_ids, self.encode = list(tokens), list(end_ids), encode
        ends = frozenset(end_ids)
        ids = [i for i, token in enumerate(self.tokens) if token and i not in ends]
        self._sorted = sorted(ids, key=lambda i: (self.tokens[i], i))
        self._texts = [self.tokens[i] for i in self._sorted]
        self.longest = max(map(len, self._texts), default=1)

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokens)

    def walk(self, machine: Machine, start: State) -> Iterator[tuple[int, State]]:
        """Tokens that can follow a state, and where they lead. The length of the string that
        `start` is in is left aside; strings that begin later have the lengths they must have."""
        states: list[State] = [start]  # after each byte of the previous token
        previous, at = b"", 0
        while at < len(self._texts):
            token = self._texts[at]
            shared = _shared(previous, token, len(states) - 1)
            del states[shared + 1 :]
            for place in range(shared, len(token)):
                last = states[-1]
                following = machine.step(last, token[place], free=last.place == start.place)
                if following is None:
                    at = bisect_left(self._texts, _successor(token[: place + 1]), at + 1)
                    break
                states.append(following)
            else:
                yield self._sorted[at], states[-1]
                at += 1
            previous = token


def _shared(a: bytes, b: bytes, most: int) -> int:
    count, most = 0, min(most, len(a), len(b))
    while count < most and a[count] == b[count]:
        count += 1
    return count


def _successor(prefix: bytes) -> bytes:
    """The least text that is greater than everything with this prefix."""
    trimmed = prefix.rstrip(b"\xff")
    if not trimmed:
        return prefix + b"\xff" * 4096
    return trimmed[:-1] + bytes([trimmed[-1] + 1])


@dataclass(frozen=True, slots=True)
class Effect:
    """What a group of tokens does: `added` characters to the string that it began in (0 outside
    of strings), then `state`, whose own count is right unless `stays` in that string."""

    added: int
    stays: bool
    state: State


@dataclass(frozen=True, slots=True)
class _Effects:
    """Groups of tokens at a state."""

    group: np.ndarray  # [V] index of the token's effect, -1 where forbidden
    list: tuple[Effect, ...]


class Closer:
    """A machine over a vocabulary.

    Not changed by use, but for what it remembers; rows share one.
    """

    def __init__(self, machine: Machine, vocabulary: Vocabulary) -> None:
        self.machine, self.vocabulary = machine, vocabulary
        self._effects: dict[tuple[int, int], _Effects] = {}
        self._places: dict[int, int] = {}
        self._closings: dict[int, _Closings] = {}
        self._worst: dict[int, int] = {}
        self._masks: OrderedDict[tuple[object, ...], np.ndarray] = OrderedDict()
        self._runs: dict[int, int | None] = {}
        for place in reversed(machine.order):  # what a place leads to is known before it
            body = machine.bodies.get(place)
            if body is None:
                self._places[place] = self._place_distance(place)
                self._worst[place] = self._places[place]
            else:
                self._closings[place] = _Closings(self, place)
                self._worst[place] = self._worst_in(place, body)

    @property
    def start(self) -> State:
        """Where every text begins."""
        return self.machine.start

    @cached_property
    def least_tokens(self) -> int:
        """Fewest tokens of a whole text, its end token left out; `NEVER` if none has one."""
        return self.distance(self.start)

    def distance(self, state: State) -> int:
        """Fewest tokens from a state to the end of the text (end token left out)."""
        body = self.machine.bodies.get(state.place)
        if body is None:
            return self._places[state.place]
        return self._closings[state.place].distance(
            state.inside, max(body.least - state.chars, 0), body.most - state.chars
        )

    def mask(self, state: State, left: int) -> np.ndarray:
        """`[V]` bool, read-only: tokens that keep the text closable when `left` may follow."""
        effects = self.effects(state)
        key = self._key(state, left, effects)
        found = self._masks.get(key)
        if found is not None:
            self._masks.move_to_end(key)
            return found
        good = np.zeros(len(effects.list) + 1, dtype=bool)  # the last one is for forbidden tokens
        for i, effect in enumerate(effects.list):
            after = self._after(state, effect)
            good[i] = after is not None and self.distance(after) <= left - 1
        mask = good[effects.group]
        if self.machine.ends(state):
            mask[self.vocabulary.end_ids] = True
        mask.setflags(write=False)
        self._masks[key] = mask
        if len(self._masks) * self.vocabulary.size > _MASK_BYTES:
            self._masks.popitem(last=False)
        return mask

    def advance(self, state: State, token: int) -> State | None:
        """The state after a token, or None where it is not allowed (whatever the limit)."""
        effects = self.effects(state)
        group = int(effects.group[token])
        return None if group < 0 else self._after(state, effects.list[group])

    def prescribed(self, state: State, left: int) -> int | None:
        """The one token that is written next, where the bytes to come leave no choice."""
        if state.place in self.machine.bodies:
            return None
        if state.place not in self._runs:
            self._runs[state.place] = self._first_of_run(state)
        token = self._runs[state.place]
        if token is None or token in self.vocabulary.end_ids:
            return token
        after = self.advance(state, token)
        return token if after is not None and self.distance(after) <= left - 1 else None

    def allowed(self, state: State, left: int) -> np.ndarray | int:
        """What may be written next when `left` tokens may follow: a mask `[V]`, or the one token
        that is prescribed."""
        token = self.prescribed(state, left)
        return self.mask(state, left) if token is None else token

    def effects(self, state: State) -> _Effects:
        """Groups of tokens at a state; the same for all numbers of characters."""
        key = (state.place, state.inside)
        if key not in self._effects:
            self._effects[key] = self._group(State(*key))
        return self._effects[key]

    def _group(self, start: State) -> _Effects:
        group = np.full(self.vocabulary.size, -1, dtype=np.int32)
        numbers: dict[Effect, int] = {}
        body = self.machine.bodies.get(start.place)
        for token, end in self.vocabulary.walk(self.machine, start):
            if body is None:
                effect = Effect(0, False, end)
            elif end.place == start.place:
                effect = Effect(end.chars, True, State(end.place, end.inside))
            else:
                effect = Effect(self._written(start, token), False, end)
            group[token] = numbers.setdefault(effect, len(numbers))
        return _Effects(group, tuple(numbers))

    def _written(self, state: State, token: int) -> int:
        """Characters that a token adds to the string that it closes."""
        place, last = state.place, state
        for byte in self.vocabulary.tokens[token]:
            following = self.machine.step(last, byte, free=True)
            assert following is not None
            if following.place != place:
                break
            last = following
        return last.chars

    def _after(self, state: State, effect: Effect) -> State | None:
        """Where an effect leads from a state, lengths checked."""
        body = self.machine.bodies.get(state.place)
        if body is None:
            return effect.state
        chars = state.chars + effect.added
        if effect.stays:
            after = State(state.place, effect.state.inside, chars)
            if chars + (after.inside != PLAIN) > body.most:
                return None
            # Where no maximum is near, longer strings are all alike.
            return after if body.most < UNLIMITED else after._replace(chars=min(chars, body.least))
        return effect.state if body.least <= chars <= body.most else None

    # --- Distances ----------------------------------------------------------------------------

    def _place_distance(self, place: int) -> int:
        if place in self.machine.accepting:
            return 0
        reached = {effect.state for effect in self.effects(State(place)).list}
        return min([NEVER, *(1 + self.distance(state) for state in reached)])

    def _worst_in(self, place: int, body: Body) -> int:
        """The largest distance of a state in a string."""
        closings = self._closings[place]
        worst = 0
        for inside in sorted({effect.state.inside for effect in closings.stays} | {PLAIN}):
            begun = int(inside != PLAIN)
            for chars in range(body.least + 1):
                if body.most - chars >= begun:
                    found = closings.distance(inside, body.least - chars, body.most - chars)
                    worst = max(worst, found)
            if body.most - body.least >= begun:
                worst = max(worst, closings.distance(inside, 0, begun))
        return worst

    def _key(self, state: State, left: int, effects: _Effects) -> tuple[object, ...]:
        """Equal for states and limits whose masks are equal."""
        worst = max((self._worst[effect.state.place] for effect in effects.list), default=0)
        far = worst <= left - 1
        body = self.machine.bodies.get(state.place)
        if body is None or not far:
            return (state, min(left, worst + 1))
        reach = self.vocabulary.longest + 1
        need, room = body.least - state.chars, body.most - state.chars
        return (state.place, state.inside, min(max(need, 0), reach), min(room, reach))

    # --- Prescribed tokens --------------------------------------------------------------------

    def _first_of_run(self, state: State) -> int | None:
        if self.machine.ends(state):
            return None if self.machine.edges[state.place] else self.vocabulary.end_ids[0]
        run = self.machine.only(state)
        if not run:
            return None
        ids = self.vocabulary.encode(run)
        tokens = self.vocabulary.tokens
        whole = b"".join(tokens[i] for i in ids if 0 <= i < len(tokens))
        return ids[0] if ids and whole == run else None


class _Closings:
    """Distances within one string.

    `exact(inside, c)` is the fewest tokens to the end of the text when exactly `c` more
    characters are written in the string; a state's distance is its minimum over allowed `c`.
    """

    def __init__(self, closer: Closer, place: int) -> None:
        self._closer, self._place = closer, place
        self._tables: dict[int, list[int]] = {}
        self._found: dict[tuple[int, int, int], int] = {}
        self._longest = closer.vocabulary.longest
        self.stays: set[Effect] = set()
        self._moves: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
        waiting = [PLAIN]
        while waiting:
            inside = waiting.pop()
            if inside in self._moves:
                continue
            self._moves[inside] = self._moves_from(inside)
            waiting.extend(target for _, target in self._moves[inside][0])
        leaves = [cost for _, away in self._moves.values() for _, cost in away]
        self._nearest = min(leaves, default=NEVER)
        self._order = self._by_progress()

    def _moves_from(self, inside: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """`(added, inside)` of tokens that stay, `(added, tokens in all)` of those that leave."""
        stays, leaves = set(), {}
        for effect in self._closer.effects(State(self._place, inside)).list:
            if effect.stays:
                self.stays.add(effect)
                stays.add((effect.added, effect.state.inside))
            else:
                cost = min(1 + self._closer.distance(effect.state), NEVER)
                leaves[effect.added] = min(cost, leaves.get(effect.added, NEVER))
        return sorted(stays), sorted(leaves.items())

    def _by_progress(self) -> list[int]:
        """Positions such that tokens that finish no character lead to earlier ones."""
        order: list[int] = []

        def visit(inside: int) -> None:
            if inside in order:
                return
            for added, target in self._moves[inside][0]:
                if added == 0:
                    visit(target)
            order.append(inside)

        for inside in sorted(self._moves):
            visit(inside)
        return order

    def distance(self, inside: int, need: int, room: int) -> int:
        """Fewest tokens to the end with at least `need` and at most `room` more characters."""
        if inside not in self._moves:
            return NEVER
        # Once there are enough characters, a shortest way passes each position once at most.
        room = min(room, need + (len(INSIDES) + 1) * self._longest)
        key = (inside, need, room)
        if key not in self._found:
            self._found[key] = self._search(inside, need, room)
        return self._found[key]

    def _search(self, inside: int, need: int, room: int) -> int:
        best, count = NEVER, need
        # A token adds at most `longest` characters, so more of them cost more in the end.
        while count <= room and self._at_least(count) < best:
            best = min(best, self._exact(inside, count))
            count += 1
        return best

    def _at_least(self, count: int) -> int:
        return max(1, -(-count // self._longest)) - 1 + self._nearest

    def _exact(self, inside: int, count: int) -> int:
        while len(self._tables.get(PLAIN, ())) <= count:
            self._extend()
        return self._tables[inside][count]

    def _extend(self) -> None:
        """One more character count for all positions."""
        count = len(self._tables.get(PLAIN, ()))
        for inside in self._order:
            stays, leaves = self._moves[inside]
            table = self._tables.setdefault(inside, [])
            best = min((cost for added, cost in leaves if added == count), default=NEVER)
            for added, target in stays:
                if added <= count:
                    best = min(best, 1 + self._tables[target][count - added])
            table.append(min(best, NEVER))
