"""The settings of a game and the file they are read from (spec, Appendix A).

`GameConfig` holds everything that a game is a function of, besides its players' answers. It is
read from TOML or from a table of plain values, says exactly what is wrong with a bad one, and
yields the public `Rules`.
"""

from __future__ import annotations

import json
import math
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from tenfold.errors import ConfigError, TenfoldWarning, nearest

from tenfold_byzantine.contracts import POWERS, Rules
from tenfold_byzantine.networks import Links, Topology
from tenfold_byzantine.tables import Table

AWARENESS = ("may_exist", "none_exist", "minimal", "standard", "detailed")
SCHEDULES = ("synchronous", "fifo", "random", "adversarial")
Abstain = Literal["silent", "repeat"]
Quota = str | int | float


def stop_quota(quota: Quota, agents: int) -> int:
    """Stop votes that end a game of so many agents (spec, 2.3), in exact arithmetic.

    Args:
        quota: a share as text (`"2/3"`, `"0.66"`) or float, read as the decimal that was written;
            or a count as an integer.
        agents: N.

    Raises:
        ConfigError: not a share in (0, 1] or a count from 1 to N.
    """
    allowed = 'a share in (0, 1] such as "2/3" or 0.66, or a whole number of votes'
    if isinstance(quota, bool) or not isinstance(quota, (str, int, float)):
        raise ConfigError(f"quota is {quota!r}; it must be {allowed}")
    if isinstance(quota, int):
        if not 1 <= quota <= agents:
            raise ConfigError(
                f"quota is {quota} votes, but there are {agents} agents",
                hint=f"use 1 to {agents} votes, or {allowed}",
            )
        return quota
    try:
        share = Fraction(str(quota))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"quota is {quota!r}; it must be {allowed}") from None
    if not 0 < share <= 1:
        raise ConfigError(f"quota is {quota}, outside of (0, 1]; it must be {allowed}")
    return math.ceil(share * agents)


@dataclass(frozen=True)
class Threat:
    """What Byzantine agents may do besides saying anything to everybody (spec, 2.5)."""

    equivocate: bool = False
    rushing: bool = False
    collude: bool = False
    suppress: bool = False

    @property
    def powers(self) -> frozenset[str]:
        """The powers that are switched on."""
        return frozenset(name for name in POWERS if getattr(self, name))


@dataclass(frozen=True)
class Context:
    """What of the past an agent is shown (spec, 2.6); the defaults are the paper's.

    Attributes:
        history_rounds: round lines in a prompt.
        stored_rounds: round lines that are kept.
        notes: private notes that are kept.
        note_chars: a note is cut to this.
        line_chars: a message's text in a round line is cut to this.
        listing_chars: a message's text in the listing of the current round is cut to this.
        message_chars: a message's text is cut to this when it is sent.
        history_order: `newest_first` (the paper) or `append` (oldest first).
        history_includes_current: the vote prompt's history already has the current round, as in
            the published code.
    """

    history_rounds: int = 3
    stored_rounds: int = 15
    notes: int = 5
    note_chars: int = 400
    line_chars: int = 50
    listing_chars: int = 200
    message_chars: int = 500
    history_order: str = "newest_first"
    history_includes_current: bool = False


@dataclass(frozen=True)
class Group:
    """So many agents of one side that play alike.

    Attributes:
        count: how many.
        use: policy, e.g. `llm`, `low-median`, `dlpsw:f=2`.
        filter: trimming around the policy, e.g. `wmsr:F=1`, or `none`.
        awareness: preset of prompts instead of the game's; empty: the game's.
        temperature: per phase.
        max_new_tokens: per phase.
        retries: `attempts`, `same_temperature`.
        vote_mode: `generate` or `score`.
        context: see `Context`.
        backend: the model's table instead of the game's; empty: the game's.
    """

    count: int
    use: str = "llm"
    filter: str = "none"
    awareness: str = ""
    temperature: Mapping[str, float] = field(default_factory=lambda: {"decide": 0.5, "vote": 0.3})
    max_new_tokens: Mapping[str, int] = field(default_factory=lambda: {"decide": 300, "vote": 200})
    retries: Mapping[str, Any] = field(
        default_factory=lambda: {"attempts": 3, "same_temperature": True}
    )
    vote_mode: str = "generate"
    context: Context = field(default_factory=Context)
    backend: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Thresholds:
    """Parameters of the classification (spec, 2.4), stored with each result.

    Attributes:
        window: last rounds in which moves are counted.
        near: share of the honest agents that makes a near miss, a fraction as text.
        max_period: longest period of an oscillation that is looked for.
    """

    window: int = 5
    near: str = "2/3"
    max_period: int = 4


@dataclass(frozen=True)
class GameConfig:
    """Everything a game is a function of, besides its players' answers.

    Attributes:
        n_honest: H.
        n_byzantine: B; above N/3 a warning is given.
        value_range: smallest and largest value, both included.
        max_rounds: deadline.
        quota: see `stop_quota`.
        awareness: preset of prompts, one of `AWARENESS`.
        topology: who hears whom.
        links: delay, loss and relays.
        threat: see `Threat`.
        abstain: `silent`, or `repeat` as in the published code: an agent that says nothing is
            heard to repeat what it said before.
        seed: the game's seed.
        faults: Byzantine agents that algorithms are configured for; None: `n_byzantine`.
        vote_scope: `all`, or `component`: each connected component counts its own votes, and the
            game stops when all of them reach their quota.
        schedule: `synchronous`, or the order of an asynchronous game's event queue.
        initial_values: honest agents' values by agent number instead of drawn ones.
        byzantine_agents: numbers of the Byzantine agents instead of drawn ones.
        honest: groups of honest agents.
        byzantine: groups of Byzantine agents.
        backend: the model's table, for whoever builds the players.
        thresholds: see `Thresholds`.

    Raises:
        ConfigError: a value that no game can have; it names the field and what would be right.
    """

    n_honest: int = 8
    n_byzantine: int = 0
    value_range: tuple[int, int] = (0, 50)
    max_rounds: int = 50
    quota: Quota = "2/3"
    awareness: str = "may_exist"
    topology: Topology | str = field(default_factory=Topology)
    links: Links = field(default_factory=Links)
    threat: Threat = field(default_factory=Threat)
    abstain: Abstain = "silent"
    seed: int = 0
    faults: int | None = None
    vote_scope: Literal["all", "component"] = "all"
    schedule: str = "synchronous"
    initial_values: tuple[int, ...] | None = None
    byzantine_agents: tuple[int, ...] | None = None
    honest: tuple[Group, ...] = ()
    byzantine: tuple[Group, ...] = ()
    backend: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_range", tuple(self.value_range))
        if isinstance(self.topology, str):
            object.__setattr__(self, "topology", Topology.parse(self.topology))
        for name in ("initial_values", "byzantine_agents"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        _check(self)
        for side, count in (("honest", self.n_honest), ("byzantine", self.n_byzantine)):
            if not getattr(self, side) and count:
                object.__setattr__(self, side, (Group(count),))

    @property
    def agents(self) -> int:
        """N."""
        return self.n_honest + self.n_byzantine

    @property
    def low(self) -> int:
        """Smallest value."""
        return self.value_range[0]

    @property
    def high(self) -> int:
        """Largest value."""
        return self.value_range[1]

    @property
    def network(self) -> Topology:
        """The topology (never the text it may have been given as)."""
        return cast(Topology, self.topology)

    @cached_property
    def rules(self) -> Rules:
        """What every agent is told."""
        return Rules(
            agents=self.agents,
            faults=self.n_byzantine if self.faults is None else self.faults,
            low=self.low,
            high=self.high,
            max_rounds=self.max_rounds,
            quota=stop_quota(self.quota, self.agents),
            awareness=self.awareness,
            powers=self.threat.powers,
            complete=self.network.kind == "complete"
            and self.links.reliable
            and self.schedule == "synchronous",
        )

    def contexts(self, role: str) -> list[Context]:
        """The contexts of a side's agents, in the order of their seats."""
        groups = self.honest if role == "honest" else self.byzantine
        return [group.context for group in groups for _ in range(group.count)]

    @cached_property
    def canonical(self) -> str:
        """The settings without the seed as canonical JSON, part of every game's id."""
        table = self.to_table()
        del table["game"]["seed"]
        return json.dumps(table, sort_keys=True, separators=(",", ":"), default=str)

    def to_table(self) -> dict[str, Any]:
        """All settings as plain values; `from_table` reads them back."""
        table = asdict(self)
        table["topology"] = self.network.to_table()
        table["links"] = self.links.to_table()
        table["value_range"] = list(self.value_range)
        for name in ("initial_values", "byzantine_agents"):
            if table[name] is None:
                del table[name]
            else:
                table[name] = list(table[name])
        if table["faults"] is None:
            del table["faults"]
        sides = {side: {"group": [dict(g) for g in table.pop(side)]} for side in _SIDES}
        backend, thresholds = table.pop("backend"), table.pop("thresholds")
        file: dict[str, Any] = {"game": table, **{s: t for s, t in sides.items() if t["group"]}}
        return file | ({"backend": backend} if backend else {}) | {"thresholds": thresholds}

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """`to_table`, made once; results of many games share it."""
        return self.to_table()

    def with_seed(self, seed: int) -> GameConfig:
        """The same game with another seed."""
        return replace(self, seed=seed)

    @classmethod
    def from_toml(cls, path: Path | str) -> GameConfig:
        """Reads a game file.

        Raises:
            ConfigError: the file is missing, is not TOML, or a setting is wrong.
        """
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no game file {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the game file {path}: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return cls.from_table(table, source=str(path), folder=path.parent)

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], *, source: str = "game", folder: Path | None = None
    ) -> GameConfig:
        """Settings from the tables of a game file.

        Args:
            table: what the file holds.
            source: its name in error messages.
            folder: where a topology's relative file is looked up.

        Raises:
            ConfigError: a setting is unknown or wrong.
        """
        try:
            return _read_game(Table(table, source), folder or Path())
        except ConfigError as error:
            message = str(error.args[0])
            if message.startswith(source):
                raise
            raise ConfigError(f"{source}: {message}", hint=error.hint) from error


_SIDES = ("honest", "byzantine")
_GROUP_KEYS = tuple(f.name for f in fields(Group) if f.name not in ("count", "context"))


def _check(config: GameConfig) -> None:
    _check_numbers(config)
    for name, allowed in (
        ("awareness", AWARENESS),
        ("abstain", ("silent", "repeat")),
        ("vote_scope", ("all", "component")),
        ("schedule", SCHEDULES),
    ):
        value = getattr(config, name)
        if value not in allowed:
            raise ConfigError(
                f"{name} is {value!r}; it must be one of {', '.join(allowed)}"
                f"{nearest(str(value), allowed)}"
            )
    if config.schedule != "synchronous" and config.links.timed:
        raise ConfigError(
            f"links have a delay or gst, but the schedule is {config.schedule}",
            hint="an asynchronous game has no rounds to count delays in: its event queue decides "
            "the order of messages; loss is allowed",
        )
    stop_quota(config.quota, config.agents)
    _check_thresholds(config.thresholds)
    for side, count in (("honest", config.n_honest), ("byzantine", config.n_byzantine)):
        _check_groups(side, getattr(config, side), count)
    _check_fixed(config)
    if 3 * config.n_byzantine > config.agents:
        warnings.warn(
            f"{config.n_byzantine} of {config.agents} agents are Byzantine: outside the paper's "
            "f <= 1/3",
            TenfoldWarning,
            stacklevel=4,
        )


def _check_numbers(config: GameConfig) -> None:
    for name, least in (("n_honest", 1), ("n_byzantine", 0), ("max_rounds", 1), ("seed", None)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number")
        if least is not None and value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if config.faults is not None and not 0 <= config.faults <= config.agents:
        raise ConfigError(
            f"faults is {config.faults}; it must be between 0 and the {config.agents} agents"
        )
    bounds = config.value_range
    if len(bounds) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in bounds):
        raise ConfigError(
            f"value_range is {list(bounds)}; it must be two whole numbers, e.g. [0, 50]"
        )
    if bounds[0] > bounds[1]:
        raise ConfigError(
            f"value_range is {list(bounds)}, which is empty",
            hint=f"put the smaller number first: [{bounds[1]}, {bounds[0]}]",
        )


def _check_thresholds(thresholds: Thresholds) -> None:
    for name in ("window", "max_period"):
        if not isinstance(getattr(thresholds, name), int) or getattr(thresholds, name) < 1:
            raise ConfigError(
                f"thresholds.{name} is {getattr(thresholds, name)!r}; it must be at least 1"
            )
    try:
        share = Fraction(str(thresholds.near))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(
            f'thresholds.near is {thresholds.near!r}; it must be a share in (0, 1] such as "2/3"'
        )


def _check_groups(side: str, groups: Sequence[Group], count: int) -> None:
    for group in groups:
        if isinstance(group.count, bool) or not isinstance(group.count, int) or group.count < 1:
            raise ConfigError(f"{side}.group: count is {group.count!r}; it must be at least 1")
        if group.awareness and group.awareness not in AWARENESS:
            raise ConfigError(
                f"{side}: awareness is {group.awareness!r}; it must be one of "
                f"{', '.join(AWARENESS)}{nearest(group.awareness, AWARENESS)}"
            )
        if group.vote_mode not in ("generate", "score"):
            raise ConfigError(
                f"{side}: vote_mode is {group.vote_mode!r}; it must be generate or score"
            )
        _check_calls(side, group)
        _check_context(side, group.context)
    total = sum(group.count for group in groups)
    if groups and total != count:
        raise ConfigError(
            f"the {side} groups have {' + '.join(str(g.count) for g in groups)} = {total} agents, "
            f"but n_{side} is {count}",
            hint=f"make the counts add up to {count}, or set n_{side} = {total}",
        )


def _check_calls(side: str, group: Group) -> None:
    """The settings of a language model's calls."""
    for phase, value in group.temperature.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(
                f"{side}: temperature.{phase} is {value!r}; it must be a number from 0"
            )
    counts = {f"max_new_tokens.{phase}": n for phase, n in group.max_new_tokens.items()}
    for name, value in {**counts, "retries.attempts": group.retries.get("attempts", 1)}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{side}: {name} is {value!r}; it must be a whole number from 1")
    same = group.retries.get("same_temperature", True)
    if not isinstance(same, bool):
        raise ConfigError(f"{side}: retries.same_temperature is {same!r}; it is true or false")


def _check_context(side: str, context: Context) -> None:
    for f in fields(Context):
        value = getattr(context, f.name)
        if f.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(
                f"{side}.context: {f.name} is {value!r}; it must be a whole number from 0"
            )
    if not isinstance(context.history_includes_current, bool):
        raise ConfigError(
            f"{side}.context: history_includes_current is {context.history_includes_current!r}; "
            "it is true or false"
        )
    if context.history_order not in ("newest_first", "append"):
        raise ConfigError(
            f"{side}.context: history_order is {context.history_order!r}; "
            "it must be newest_first or append"
        )


def _check_fixed(config: GameConfig) -> None:
    values = config.initial_values
    if values is not None:
        if len(values) != config.n_honest:
            raise ConfigError(
                f"initial_values has {len(values)} values, but n_honest is {config.n_honest}"
            )
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"initial_values has {value!r}; values are whole numbers")
            if not config.low <= value <= config.high:
                raise ConfigError(
                    f"initial_values has {value}, outside of value_range {list(config.value_range)}"
                )
    agents = config.byzantine_agents
    if agents is not None:
        wrong = [a for a in agents if not isinstance(a, int) or not 0 <= a < config.agents]
        if wrong or len(set(agents)) != len(agents) or len(agents) != config.n_byzantine:
            raise ConfigError(
                f"byzantine_agents is {list(agents)}; it must name {config.n_byzantine} different "
                f"agents from 0 to {config.agents - 1}"
            )


def _read_game(file: Table, folder: Path) -> GameConfig:
    file.only("game", "honest", "byzantine", "backend", "thresholds")
    game = file.table("game")
    plain = [
        f.name
        for f in fields(GameConfig)
        if f.name
        not in ("topology", "links", "threat", "honest", "byzantine", "backend", "thresholds")
    ]
    game.only(*plain, "topology", "links", "threat")
    values: dict[str, Any] = {name: game.values[name] for name in plain if name in game.values}
    for name in ("value_range", "initial_values", "byzantine_agents"):
        if name in values:
            values[name] = tuple(game.sequence(name))
    if "topology" in game.values:
        values["topology"] = Topology.read(game.values["topology"], game.name("topology"), folder)
    if "links" in game.values:
        values["links"] = Links.read(game.table("links"))
    if "threat" in game.values:
        values["threat"] = Threat(**game.table("threat").flags(*(f.name for f in fields(Threat))))
    if "thresholds" in file.values:
        thresholds = file.table("thresholds")
        thresholds.only(*(f.name for f in fields(Thresholds)))
        values["thresholds"] = Thresholds(**thresholds.values)
    values["backend"] = dict(file.table("backend").values)
    for side in _SIDES:
        default = GameConfig.__dataclass_fields__[f"n_{side}"].default
        values[side] = _read_side(file.table(side), values.get(f"n_{side}", default))
    return GameConfig(**values)


def _read_side(side: Table, count: Any) -> tuple[Group, ...]:
    side.only(*_GROUP_KEYS, "context", "group")
    if "group" not in side.values:
        if side.values.get("use") == "mixed":
            raise ConfigError(
                f'{side.where} says use = "mixed", but has no [[{side.where_key}.group]] tables',
                hint="give each group count = ... and use = ...",
            )
        return (_read_group(side, {}, count),) if count else ()
    shared = {k: v for k, v in side.values.items() if k not in ("group", "use")}
    groups = []
    for table in side.tables("group"):
        table.only("count", "context", *_GROUP_KEYS)
        if "count" not in table.values:
            raise ConfigError(f"{table.where} has no count; it says how many agents play that way")
        groups.append(_read_group(table, shared, table.values["count"]))
    return tuple(groups)


def _read_group(table: Table, shared: Mapping[str, Any], count: Any) -> Group:
    merged = {**shared, **table.values}
    values = {k: merged[k] for k in _GROUP_KEYS if k in merged}
    for name in ("use", "filter", "awareness", "vote_mode"):
        if name in values and not isinstance(values[name], str):
            raise ConfigError(f"{table.name(name)} is {values[name]!r}; it must be text")
    standard = Group(1)
    for name in ("temperature", "max_new_tokens", "retries", "backend"):
        if name not in values:
            continue
        given = Table({name: values[name]}, table.source, table.path).table(name)
        base = dict(getattr(standard, name))
        if base:
            given.only(*base)
        values[name] = base | dict(given.values)
    context = Table({"context": merged.get("context", {})}, table.source, table.path)
    context = context.table("context")
    context.only(*(f.name for f in fields(Context)))
    return Group(count=count, context=Context(**context.values), **values)
