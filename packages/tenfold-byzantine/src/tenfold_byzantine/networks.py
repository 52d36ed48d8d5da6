"""Who hears whom, and how reliably (spec, 2.15).

`Topology` names a graph and builds it; `Links` says how long messages take, whether they get lost,
from which round on links are reliable, and over how many hops messages are passed on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.errors import ConfigError, nearest

from tenfold_byzantine.streams import stream
from tenfold_byzantine.tables import Table

if TYPE_CHECKING:
    import random

    import networkx as nx

Neighbours = tuple[tuple[int, ...], ...]
"""Per agent the sorted agents that it is linked with."""

TOPOLOGIES: Mapping[str, tuple[str, Mapping[str, type | tuple[type, ...]]]] = {
    "complete": ("everybody hears everybody", {}),
    "ring": ("k nearest agents on either side", {"k": int}),
    "grid": ("rows x columns, as square as the number of agents allows", {"rows": int}),
    "torus": ("a grid whose opposite edges are joined", {"rows": int}),
    "star": ("agent_0 in the middle", {}),
    "path": ("a line", {}),
    "tree": ("a balanced tree with b children per agent", {"b": int}),
    "erdos-renyi": ("every pair with probability p", {"p": (int, float)}),
    "watts-strogatz": ("ring of k neighbours, rewired with p", {"k": int, "p": (int, float)}),
    "barabasi-albert": ("grown, m links per new agent, preferring hubs", {"m": int}),
    "delaunay": ("Delaunay triangulation of random points in the unit square", {}),
    "random-regular": ("random graph in which everybody has d neighbours", {"d": int}),
    "custom": (
        "own graph: edges, an adjacency matrix, or a file (GraphML or one edge per line)",
        {"edges": list, "adjacency": list, "file": str},
    ),
}
"""Kind → what it is and its parameters; random kinds also take `seed`."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ring": {"k": 1},
    "tree": {"b": 2},
    "erdos-renyi": {"p": 0.5},
    "watts-strogatz": {"k": 4, "p": 0.1},
    "barabasi-albert": {"m": 2},
    "random-regular": {"d": 3},
}
RANDOM_KINDS = frozenset(
    {"erdos-renyi", "watts-strogatz", "barabasi-albert", "delaunay", "random-regular"}
)
_TRIES = 200


@dataclass(frozen=True)
class Topology:
    """A kind of graph with its parameters.

    Attributes:
        kind: one of `TOPOLOGIES`.
        params: its parameters, by name.
        seed: seed of a random graph; None: each game's own seed draws one.

    Raises:
        ConfigError: an unknown kind or parameter, or a parameter out of range.
    """

    kind: str = "complete"
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in TOPOLOGIES:
            raise ConfigError(
                f"topology {self.kind!r} is unknown{nearest(str(self.kind), TOPOLOGIES)}",
                hint=f"known: {', '.join(TOPOLOGIES)}",
            )
        known = TOPOLOGIES[self.kind][1]
        for name, value in self.params.items():
            if name not in known:
                raise ConfigError(
                    f"topology {self.kind} has no parameter {name!r}{nearest(name, known)}",
                    hint=f"it takes: {', '.join(known) or 'none'}",
                )
            if isinstance(value, bool) or not isinstance(value, known[name]):
                raise ConfigError(f"topology {self.kind}: {name} is {value!r}, of the wrong type")
        merged = {**_DEFAULTS.get(self.kind, {}), **self.params}
        object.__setattr__(self, "params", merged)
        for name in ("k", "b", "m", "d", "rows"):
            if name in merged and merged[name] < 1:
                raise ConfigError(
                    f"topology {self.kind}: {name} is {merged[name]}; it must be at least 1"
                )
        if "p" in merged and not 0 <= merged["p"] <= 1:
            raise ConfigError(f"topology {self.kind}: p is {merged['p']}; it must be in [0, 1]")
        if self.kind == "custom" and len(merged) != 1:
            raise ConfigError("topology custom needs exactly one of edges, adjacency and file")
        if "file" in merged:
            # Its links, not its path, are what a game is a function of.
            object.__setattr__(self, "params", {"edges": _read_edges(Path(merged["file"]))})

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads `ring:k=2` or `erdos-renyi:p=0.4,seed=7`."""
        kind, _, rest = text.partition(":")
        table: dict[str, Any] = {"kind": kind.strip()}
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise ConfigError(f"topology {text!r}: {part!r} is not name=value")
            table[name.strip()] = _number(value.strip())
        return cls.read(table, "topology", Path())

    @classmethod
    def read(cls, value: Any, where: str, folder: Path) -> Topology:
        """From a settings table, or text as in `parse`; relative files are below `folder`."""
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Mapping) or "kind" not in value:
            raise ConfigError(
                f'{where} is {value!r}; it must be a table such as {{ kind = "ring" }}'
            )
        params = {k: v for k, v in value.items() if k not in ("kind", "seed")}
        seed = value.get("seed")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ConfigError(f"{where}.seed is {seed!r}; it must be a whole number")
        if isinstance(params.get("file"), str) and not Path(params["file"]).is_absolute():
            params = {**params, "file": str(folder / params["file"])}
        try:
            return cls(value["kind"], params, seed)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.args[0]}", hint=error.hint) from error

    def to_table(self) -> dict[str, Any]:
        """As in a settings file."""
        table = {"kind": self.kind, **self.params}
        return table if self.seed is None else {**table, "seed": self.seed}

    @property
    def drawn(self) -> bool:
        """Whether each game draws its own graph."""
        return self.kind in RANDOM_KINDS and self.seed is None

    def neighbours(self, agents: int, seed: int = 0, *, connected: bool = True) -> Neighbours:
        """Builds the graph.

        Args:
            agents: N.
            seed: the game's seed, for random graphs without one of their own.
            connected: refuse graphs in more than one piece; random kinds are drawn again until
                they are connected.

        Raises:
            ConfigError: no such graph exists for so many agents, or it is not connected.
        """
        if self.kind == "complete":
            everybody = range(agents)
            return tuple(tuple(j for j in everybody if j != i) for i in everybody)
        seed = seed if self.seed is None else self.seed
        tries = _TRIES if connected and self.kind in RANDOM_KINDS else 1
        for attempt in range(tries):
            found = self._build(agents, stream(seed, "topology", attempt))
            pieces = components(found)
            if len(pieces) == 1 or not connected:
                return found
        small = min(pieces, key=len)
        raise ConfigError(
            f"topology {self.kind} is not connected: agents {list(small)} cannot reach the others"
            + (f" (in {_TRIES} draws)" if tries > 1 else ""),
            hint='add links, or set vote_scope = "component" to let every part vote for itself',
        )

    def _build(self, agents: int, rng: random.Random) -> Neighbours:
        import networkx as nx

        try:
            graph = _graph(self.kind, self.params, agents, rng)
        except nx.NetworkXError as error:
            raise ConfigError(
                f"topology {self.kind} with {dict(self.params)} does not exist for "
                f"{agents} agents: {error}"
            ) from error
        return tuple(tuple(sorted(graph.neighbors(i))) for i in range(agents))


def components(neighbours: Neighbours) -> list[tuple[int, ...]]:
    """Connected components, each sorted, in order of their smallest agent."""
    seen: set[int] = set()
    found = []
    for start in range(len(neighbours)):
        if start in seen:
            continue
        piece, edge = {start}, [start]
        while edge:
            edge = sorted({j for i in edge for j in neighbours[i]} - piece)
            piece.update(edge)
        seen |= piece
        found.append(tuple(sorted(piece)))
    return found


def _graph(kind: str, p: Mapping[str, Any], n: int, rng: random.Random) -> nx.Graph:
    import networkx as nx

    match kind:
        case "ring":
            links = [(i, (i + d) % n) for i in range(n) for d in range(1, p["k"] + 1)]
            return _from_edges(n, [(i, j) for i, j in links if i != j])
        case "path":
            return nx.path_graph(n)
        case "star":
            return nx.star_graph(n - 1)
        case "tree":
            return _from_edges(n, [((i - 1) // p["b"], i) for i in range(1, n)])
        case "grid" | "torus":
            return _lattice(n, p.get("rows"), wrapped=kind == "torus")
        case "erdos-renyi":
            return nx.gnp_random_graph(n, p["p"], seed=rng)
        case "watts-strogatz":
            return nx.watts_strogatz_graph(n, p["k"], p["p"], seed=rng)
        case "barabasi-albert":
            return nx.barabasi_albert_graph(n, p["m"], seed=rng)
        case "random-regular":
            return nx.random_regular_graph(p["d"], n, seed=rng)
        case "delaunay":
            return _delaunay(n, rng)
        case _:
            return _custom(p, n)


def _from_edges(n: int, edges: Iterable[tuple[int, int]]) -> nx.Graph:
    import networkx as nx

    graph = nx.empty_graph(n)
    graph.add_edges_from(edges)
    return graph


def _lattice(n: int, rows: int | None, *, wrapped: bool) -> nx.Graph:
    if rows is None:
        rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    if n % rows:
        raise ConfigError(f"topology grid: {n} agents do not fill {rows} rows evenly")
    columns = n // rows
    edges = []
    for i in range(n):
        row, column = divmod(i, columns)
        if column + 1 < columns or wrapped:
            edges.append((i, row * columns + (column + 1) % columns))
        if row + 1 < rows or wrapped:
            edges.append((i, (row + 1) % rows * columns + column))
    return _from_edges(n, [(i, j) for i, j in edges if i != j])


def _delaunay(n: int, rng: random.Random) -> nx.Graph:
    if n < 4:
        return _from_edges(n, [(i, j) for i in range(n) for j in range(i)])
    from scipy.spatial import Delaunay

    triangles = Delaunay([(rng.random(), rng.random()) for _ in range(n)]).simplices
    edges = [(int(t[i]), int(t[j])) for t in triangles for i in range(3) for j in range(i)]
    return _from_edges(n, edges)


def _custom(p: Mapping[str, Any], n: int) -> nx.Graph:
    if "adjacency" in p:
        return _from_edges(n, _adjacency(p["adjacency"], n))
    edges = []
    for pair in p["edges"]:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ConfigError(f"topology custom: {pair!r} is not a link [agent, agent]")
        for end in pair:
            if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < n:
                raise ConfigError(
                    f"topology custom: link {list(pair)} names {end!r}; agents are numbered "
                    f"0 to {n - 1}"
                )
        if pair[0] == pair[1]:
            raise ConfigError(f"topology custom: link {list(pair)} joins an agent with itself")
        edges.append((pair[0], pair[1]))
    return _from_edges(n, edges)


def _adjacency(matrix: Sequence[Any], n: int) -> list[tuple[int, int]]:
    if len(matrix) != n or any(not isinstance(r, Sequence) or len(r) != n for r in matrix):
        raise ConfigError(f"topology custom: adjacency must be {n} rows of {n} zeros and ones")
    for i in range(n):
        if matrix[i][i]:
            raise ConfigError(f"topology custom: adjacency has agent {i} as its own neighbour")
        for j in range(i):
            if bool(matrix[i][j]) != bool(matrix[j][i]):
                raise ConfigError(
                    f"topology custom: adjacency is not symmetric at ({j}, {i}): "
                    f"{matrix[j][i]} there, {matrix[i][j]} at ({i}, {j})"
                )
    return [(j, i) for i in range(n) for j in range(i) if matrix[i][j]]


def _read_edges(path: Path) -> list[list[int]]:
    import networkx as nx

    try:
        if path.suffix.lower() in (".graphml", ".xml"):
            graph = nx.read_graphml(path, node_type=int)
            return [[int(a), int(b)] for a, b in graph.edges()]
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"topology custom: there is no file {path}") from None
    except Exception as error:  # whatever an XML reader raises on a damaged file
        raise ConfigError(f"topology custom: cannot read {path}: {error}") from error
    edges = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            a, b = map(int, words)
        except ValueError:
            raise ConfigError(
                f"{path}, line {number}: {line.strip()!r} is not two agent numbers"
            ) from None
        edges.append([a, b])
    return edges


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Links:
    """How messages travel; every link draws on its own.

    Attributes:
        delay: rounds that a message takes: a number; `uniform:D`, 0 to D; or `geometric:p`, which
            waits another round with probability 1 - p.
        loss: probability that a message never arrives.
        gst: from this round on links neither delay nor lose; what was still under way arrives.
        relay: links that a message may pass in its round; 1: neighbours only.

    Raises:
        ConfigError: a value out of range.
    """

    delay: int | str = 0
    loss: float = 0.0
    gst: int | None = None
    relay: int = 1

    def __post_init__(self) -> None:
        self._sampler()
        if isinstance(self.loss, bool) or not isinstance(self.loss, (int, float)):
            raise ConfigError(f"links.loss is {self.loss!r}; it must be a number in [0, 1]")
        if not 0 <= self.loss <= 1:
            raise ConfigError(f"links.loss is {self.loss}; it must be in [0, 1]")
        for name in ("gst", "relay"):
            value = getattr(self, name)
            if value is None and name == "gst":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"links.{name} is {value!r}; it must be a whole number from 1")

    @classmethod
    def read(cls, table: Table) -> Links:
        """From a settings table."""
        table.only("delay", "loss", "gst", "relay")
        values = dict(table.values)
        delay = values.get("delay")
        if isinstance(delay, Mapping):
            if len(delay) != 1:
                raise ConfigError(f"{table.name('delay')} is {delay!r}; {_DELAYS}")
            values["delay"] = ":".join(str(part) for part in next(iter(delay.items())))
        return cls(**values)

    def to_table(self) -> dict[str, Any]:
        """As in a settings file."""
        table: dict[str, Any] = {"delay": self.delay, "loss": self.loss, "relay": self.relay}
        return table if self.gst is None else {**table, "gst": self.gst}

    @property
    def timed(self) -> bool:
        """Whether messages may arrive in a later round."""
        return self.delay != 0 or self.gst is not None

    @property
    def reliable(self) -> bool:
        """Whether every message arrives in its round."""
        return self.delay == 0 and self.loss == 0

    def reliable_in(self, round_: int) -> bool:
        """Whether messages of that round arrive in it."""
        return self.reliable or (self.gst is not None and round_ >= self.gst)

    def arrival(self, round_: int, rng: random.Random) -> int | None:
        """Round in which a message of `round_` arrives; None: lost. Always draws alike."""
        lost = rng.random() < self.loss
        sample = self._sampler()
        delay = sample(rng)
        if self.reliable_in(round_):
            return round_
        if lost:
            return None
        arrives = round_ + delay
        return arrives if self.gst is None else min(arrives, max(self.gst, round_))

    def _sampler(self) -> Any:
        delay = self.delay
        if isinstance(delay, int) and not isinstance(delay, bool) and delay >= 0:
            return lambda rng: delay
        if isinstance(delay, str):
            kind, _, text = delay.partition(":")
            value = _number(text)
            if kind == "uniform" and isinstance(value, int) and value >= 0:
                return lambda rng: rng.randrange(value + 1)
            if kind == "geometric" and isinstance(value, (int, float)) and 0 < value <= 1:
                return lambda rng: _geometric(rng, value)
        raise ConfigError(f"links.delay is {delay!r}; {_DELAYS}")


_DELAYS = 'it must be a whole number from 0, "uniform:D" or "geometric:p" with 0 < p <= 1'


def _geometric(rng: random.Random, p: float) -> int:
    if p == 1:
        return 0
    return math.floor(math.log(1 - rng.random()) / math.log(1 - p))


def reach(
    neighbours: Neighbours,
    source: int,
    hops: int,
    withheld: Mapping[int, frozenset[int]] | None = None,
) -> tuple[int, ...]:
    """Agents that a message of `source` reaches over at most `hops` links.

    Args:
        neighbours: the graph.
        source: sender.
        hops: links it may pass.
        withheld: per relay the senders whose messages it does not pass on.
    """
    seen, edge = {source}, [source]
    for _ in range(hops):
        relays = [
            i
            for i in edge
            if i == source or not withheld or source not in withheld.get(i, frozenset())
        ]
        edge = sorted({j for i in relays for j in neighbours[i]} - seen)
        if not edge:
            break
        seen.update(edge)
    return tuple(sorted(seen - {source}))
