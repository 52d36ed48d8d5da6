"""Topologies, links and delivery (spec, 2.15)."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import networkx as nx
import pytest
from scipy.stats import chisquare

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import Rule, low_median, never, played, votes_at
from tenfold.errors import ConfigError
from tenfold_byzantine.contracts import Message, Proposal
from tenfold_byzantine.engine import Game
from tenfold_byzantine.mail import Mail
from tenfold_byzantine.networks import TOPOLOGIES, Links, Topology, components, reach
from tenfold_byzantine.rules import GameConfig, Threat
from tenfold_byzantine.streams import stream


def graph(text: str, n: int, seed: int = 1) -> nx.Graph:
    neighbours = Topology.parse(text).neighbours(n, seed)
    found = nx.empty_graph(n)
    found.add_edges_from((i, j) for i, others in enumerate(neighbours) for j in others)
    assert all(i in neighbours[j] for i, others in enumerate(neighbours) for j in others)
    assert all(list(others) == sorted(set(others) - {i}) for i, others in enumerate(neighbours))
    return found


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("complete", 6, nx.complete_graph(6)),
        ("ring", 7, nx.cycle_graph(7)),
        ("ring:k=2", 9, nx.circulant_graph(9, [1, 2])),
        ("ring:k=3", 6, nx.complete_graph(6)),
        ("path", 5, nx.path_graph(5)),
        ("star", 6, nx.star_graph(5)),
        ("tree:b=2", 7, nx.balanced_tree(2, 2)),
        ("grid", 12, nx.grid_2d_graph(3, 4)),
        ("grid:rows=2", 12, nx.grid_2d_graph(2, 6)),
        ("torus", 12, nx.grid_2d_graph(3, 4, periodic=True)),
    ],
)
def test_fixed_topologies_are_those_of_the_graph_library(text, n, expected):
    found = graph(text, n)
    assert nx.is_isomorphic(found, nx.convert_node_labels_to_integers(expected))


RANDOM = ["erdos-renyi:p=0.4", "watts-strogatz:k=4,p=0.3", "barabasi-albert:m=2", "delaunay",
          "random-regular:d=3"]  # fmt: skip


@pytest.mark.parametrize("text", RANDOM)
def test_random_topologies_are_connected_and_follow_their_seed(text):
    graphs = [graph(text, 10, seed) for seed in range(6)]
    assert all(nx.is_connected(g) for g in graphs)
    assert [set(g.edges) for g in graphs] == [set(graph(text, 10, s).edges) for s in range(6)]
    assert len({frozenset(g.edges) for g in graphs}) > 1
    fixed = f"{text}{',' if ':' in text else ':'}seed=5"
    assert set(graph(fixed, 10, 1).edges) == set(graph(fixed, 10, 2).edges)
    assert set(graph(fixed, 10, 1).edges) == set(graph(text, 10, 5).edges)


def test_random_topologies_have_their_defining_numbers():
    assert {d for _, d in graph("random-regular:d=3", 10).degree} == {3}
    assert graph("barabasi-albert:m=2", 10).number_of_edges() == 2 * 8
    assert graph("watts-strogatz:k=4,p=0.3", 10).number_of_edges() == 20
    assert nx.check_planarity(graph("delaunay", 12))[0]
    edges = sum(graph("erdos-renyi:p=0.4", 20, s).number_of_edges() for s in range(30))
    assert edges / (30 * 190) == pytest.approx(0.4, abs=0.03)  # three standard deviations


def test_each_game_draws_its_own_random_graph():
    config = GameConfig(n_honest=8, topology="erdos-renyi:p=0.4")
    games = [Game(config, {"honest": Rule(low_median)}, seed) for seed in range(5)]
    assert len({g._hears for g in games}) > 1


def test_own_graphs_come_from_edges_matrices_and_files(tmp_path):
    wanted = {(0, 1), (1, 2), (2, 3)}
    listed = Topology("custom", {"edges": [[0, 1], [2, 1], [2, 3]]})
    matrix = [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
    (tmp_path / "g.txt").write_text("0 1\n# a comment\n1, 2\n\n3 2  # the last\n")
    nx.write_graphml(nx.path_graph(4), tmp_path / "g.graphml")
    for topology in (
        listed,
        Topology("custom", {"adjacency": matrix}),
        Topology("custom", {"file": str(tmp_path / "g.txt")}),
        Topology("custom", {"file": str(tmp_path / "g.graphml")}),
    ):
        neighbours = topology.neighbours(4)
        edges = {(i, j) for i, others in enumerate(neighbours) for j in others if i < j}
        assert edges == wanted
        assert Topology.read(topology.to_table(), "t", tmp_path) == topology


LOWER = [[0, 1, 0, 1], [0, 0, 1, 0]]


def test_a_files_links_and_not_its_path_make_the_game(tmp_path):
    (tmp_path / "g.txt").write_text("0 1\n1 2\n")
    text = '[game]\nn_honest = 3\ntopology = { kind = "custom", file = "g.txt" }'
    (tmp_path / "game.toml").write_text(text)
    config = GameConfig.from_toml(tmp_path / "game.toml")
    assert str(tmp_path) not in config.canonical
    assert config.network.neighbours(3) == ((1,), (0, 2), (1,))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "custom", "edges": [[0, 9]]}, r"names 9; agents are numbered 0 to 3"),
        ({"kind": "custom", "edges": [[1, 1]]}, "joins an agent with itself"),
        ({"kind": "custom", "edges": [[1, 2, 3]]}, "is not a link"),
        ({"kind": "custom", "edges": [[0, 1], [2, 3]]}, r"not connected: agents \[0, 1\]"),
        ({"kind": "custom", "adjacency": [[0, 1], [1, 0]]}, "4 rows of 4"),
        (
            {"kind": "custom", "adjacency": [[0, 1, 0, 0], [0, 0, 1, 0], *LOWER]},
            r"not symmetric at \(0, 1\): 1 there, 0 at \(1, 0\)",
        ),
        (
            {"kind": "custom", "adjacency": [[1, 1, 0, 0], [1, 0, 1, 0], *LOWER]},
            "agent 0 as its own neighbour",
        ),
        ({"kind": "custom"}, "exactly one of edges, adjacency and file"),
        ({"kind": "custom", "file": "none.txt"}, "there is no file"),
        ({"kind": "ring", "k": 0}, "k is 0; it must be at least 1"),
        ({"kind": "ring", "k": "two"}, "of the wrong type"),
        ({"kind": "erdos-renyi", "p": 1.5}, "p is 1.5"),
        ({"kind": "erdos-renyi", "p": 0.0}, r"not connected.*\(in 200 draws\)"),
        ({"kind": "random-regular", "d": 9}, "does not exist for 4 agents"),
        ({"kind": "grid", "rows": 3}, "4 agents do not fill 3 rows"),
        ({"kind": "ring", "seed": "x"}, "seed is 'x'"),
        ({"k": 3}, "must be a table such as"),
    ],
)  # fmt: skip
def test_a_bad_topology_is_one_clear_error(tmp_path, table, message):
    with pytest.raises(ConfigError, match=message):
        Topology.read(table, "game.topology", tmp_path).neighbours(4)


def test_a_damaged_edge_list_is_named_by_its_line(tmp_path):
    (tmp_path / "g.txt").write_text("0 1\n0 one\n")
    with pytest.raises(ConfigError, match=r"g\.txt, line 2: '0 one' is not two agent numbers"):
        Topology("custom", {"file": str(tmp_path / "g.txt")})
    (tmp_path / "g.graphml").write_text("<graphml")
    with pytest.raises(ConfigError, match="cannot read"):
        Topology("custom", {"file": str(tmp_path / "g.graphml")})


def test_every_topology_is_described_and_parsed():
    for kind, (summary, _) in TOPOLOGIES.items():
        assert summary
        if kind != "custom":
            assert Topology.parse(kind).neighbours(8, 3)
    with pytest.raises(ConfigError, match="is not name=value"):
        Topology.parse("ring:2")


def test_components_and_reach_equal_the_graph_librarys():
    rng = stream(1, "graphs")
    for _ in range(50):
        g = nx.gnp_random_graph(8, 0.25, seed=rng)
        neighbours = tuple(tuple(sorted(g[i])) for i in range(8))
        expected = sorted(tuple(sorted(c)) for c in nx.connected_components(g))
        assert sorted(components(neighbours)) == expected
        for hops in (1, 2, 3):
            near = nx.single_source_shortest_path_length(g, 0, cutoff=hops)
            assert reach(neighbours, 0, hops) == tuple(sorted(set(near) - {0}))


def test_relays_that_withhold_cut_paths_but_not_their_own_link():
    path = ((1,), (0, 2), (1, 3), (2,))
    assert reach(path, 0, 3) == (1, 2, 3)
    assert reach(path, 0, 3, {2: frozenset({0})}) == (1, 2)
    assert reach(path, 0, 3, {2: frozenset({1})}) == (1, 2, 3)
    assert reach(path, 0, 3, {0: frozenset({0})}) == (1, 2, 3)


def say(round_, values):
    return [None if v is None else Message(a, round_, v) for a, v in enumerate(values)]


def heard(delivered, agent):
    return [(m.sender, m.sent_round, m.value) for m in delivered.inboxes[agent]]


PAIR = ((1,), (0,))


def test_reliable_links_show_silence_as_silence():
    mail = Mail(PAIR, Links(), 1)
    assert heard(mail.deliver(1, say(1, [5, 6])), 1) == [(0, 1, 5), (1, 1, 6)]
    assert heard(mail.deliver(2, say(2, [None, 7])), 1) == [(1, 2, 7)]


def test_late_messages_keep_their_age_and_older_ones_never_replace_newer():
    mail = Mail(PAIR, Links(delay=2), 1)
    assert heard(mail.deliver(1, say(1, [5, 6])), 0) == [(0, 1, 5)]
    assert heard(mail.deliver(2, say(2, [7, 8])), 0) == [(0, 2, 7)]
    assert heard(mail.deliver(3, say(3, [9, None])), 0) == [(0, 3, 9), (1, 1, 6)]
    assert heard(mail.deliver(4, say(4, [9, None])), 0) == [(0, 4, 9), (1, 2, 8)]
    assert heard(mail.deliver(5, say(5, [9, None])), 0) == [(0, 5, 9), (1, 2, 8)]
    for seed in range(30):
        mail = Mail(PAIR, Links(delay="uniform:4"), seed)
        ages = []
        for t in range(1, 20):
            delivered = mail.deliver(t, say(t, [t, t]))
            ages.append([m.sent_round for m in delivered.inboxes[0] if m.sender == 1])
            assert all(m.sent_round <= t for m in delivered.inboxes[0])
        newest = [a[0] for a in ages if a]
        assert newest == sorted(newest)
        assert [t for t, a in enumerate(ages, 1) if a and a[0] < t - 4] == []


def test_lost_messages_are_reported_and_never_arrive():
    mail = Mail(PAIR, Links(loss=1.0), 1)
    delivered = mail.deliver(1, say(1, [5, 6]))
    assert delivered.lost == [(0, 1), (1, 0)]
    assert heard(delivered, 0) == [(0, 1, 5)]
    assert delivered.arrivals == []


def test_the_share_of_lost_messages_and_of_delays_is_the_set_one():
    rng = stream(3, "test")
    links = Links(delay="uniform:3", loss=0.25)
    arrivals = [links.arrival(10, rng) for _ in range(4000)]
    lost = sum(a is None for a in arrivals)
    assert chisquare([lost, 4000 - lost], [1000, 3000]).pvalue > 0.001
    counts = Counter(a for a in arrivals if a is not None)
    assert sorted(counts) == [10, 11, 12, 13]
    assert chisquare(list(counts.values())).pvalue > 0.001
    geometric = Links(delay="geometric:0.5")
    waits = Counter(min(geometric.arrival(0, rng), 4) for _ in range(4000))
    expected = [2000, 1000, 500, 250, 250]
    assert chisquare([waits[d] for d in range(5)], expected).pvalue > 0.001


def test_from_gst_on_links_are_reliable_and_what_was_under_way_arrives():
    for seed in range(20):
        mail = Mail(PAIR, Links(delay=50, loss=0.5, gst=4), seed)
        for t in (1, 2, 3):
            assert heard(mail.deliver(t, say(t, [5, 6])), 0) == [(0, t, 5)]
        at_gst = mail.deliver(4, say(4, [5, 6]))
        assert heard(at_gst, 0) == [(0, 4, 5), (1, 4, 6)]
        late = [m.sent_round for r, m in at_gst.arrivals if r == 0]
        assert late == sorted(late)
        assert set(late) <= {1, 2, 3, 4}
        assert heard(mail.deliver(5, say(5, [5, None])), 0) == [(0, 5, 5)]


def test_what_one_agent_says_does_not_shift_the_fortune_of_others_messages():
    complete = Topology().neighbours(5)
    links = Links(delay="uniform:2", loss=0.3)
    quiet, loud = Mail(complete, links, 7), Mail(complete, links, 7)
    for t in range(1, 8):
        first = quiet.deliver(t, say(t, [None, 1, 2, 3, 4]))
        second = loud.deliver(t, say(t, [0, 1, 2, 3, 4]))
        assert first.arrivals == [a for a in second.arrivals if a[1].sender != 0]
        assert first.lost == [pair for pair in second.lost if pair[0] != 0]


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ({"delay": -1}, "links.delay is -1"),
        ({"delay": "uniform:x"}, "links.delay"),
        ({"delay": "geometric:0"}, "links.delay"),
        ({"loss": 1.01}, "links.loss"),
        ({"loss": "no"}, "links.loss"),
        ({"gst": 0}, "links.gst"),
        ({"relay": 0}, "links.relay"),
    ],
)
def test_bad_links_are_refused(links, message):
    with pytest.raises(ConfigError, match=message):
        Links(**links)


def test_delay_may_be_a_table():
    table = {"game": {"links": {"delay": {"uniform": 3}}}}
    assert GameConfig.from_table(table).links == Links(delay="uniform:3")


def test_agents_hear_their_neighbours_only():
    config = GameConfig(n_honest=4, topology="path", max_rounds=1, initial_values=(1, 2, 3, 4))
    views = []
    played(config, Rule(low_median, lambda v: views.append(v) or "continue"))
    assert [v.values() for v in views] == [[1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]
    assert [v.neighbours for v in views] == [(1,), (0, 2), (1, 3), (2,)]
    assert not views[0].rules.complete


def test_relayed_messages_come_from_farther_away_and_suppression_stops_them():
    def views_of(powers, withheld, relay=2):
        views = []
        config = GameConfig(
            n_honest=3,
            n_byzantine=1,
            byzantine_agents=(1,),
            topology="path",
            links=Links(relay=relay),
            threat=Threat(suppress=True),
            max_rounds=1,
            initial_values=(1, 3, 4),
        )
        relay_policy = Rule(lambda view: Proposal(2, withheld=withheld), never, powers=powers)
        played(config, Rule(low_median, lambda v: views.append(v) or "continue"), relay_policy)
        return {v.agent: v.values() for v in views}

    assert views_of((), ()) == {0: [1, 2, 3], 2: [1, 2, 3, 4], 3: [2, 3, 4]}
    assert views_of(("suppress",), (0,)) == {0: [1, 2, 3], 2: [2, 3, 4], 3: [2, 3, 4]}
    assert views_of((), (), relay=1) == {0: [1, 2], 2: [2, 3, 4], 3: [3, 4]}


def test_components_vote_apart_only_where_it_is_set_so():
    two = Topology("custom", {"edges": [[0, 1], [1, 2], [3, 4]]})
    with pytest.raises(ConfigError, match="not connected"):
        Game(GameConfig(n_honest=5, topology=two), {"honest": Rule(low_median)})

    def stopped(voters, quota="2/3"):
        config = GameConfig(
            n_honest=5, topology=two, vote_scope="component", max_rounds=1, quota=quota
        )
        vote = Rule(lambda v: 1, lambda v: "stop" if v.agent in voters else "continue")
        return played(config, vote).result().stopped

    assert stopped({0, 1, 3, 4})
    assert not stopped({0, 1, 2, 3})  # two of three suffice, but one of two does not
    assert stopped({0, 3}, quota=1)


def test_votes_of_all_count_in_every_topology():
    config = GameConfig(n_honest=6, topology="ring", max_rounds=1)
    vote = Rule(lambda v: 1, lambda v: "stop" if v.agent < 4 else "continue")
    assert played(config, vote).result().stopped
    assert played(config, Rule(lambda v: 1, votes_at(2))).result().stopped is False
