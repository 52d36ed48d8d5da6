"""r-robustness and (r, s)-robustness of graphs by exhaustion (LeBlanc et al. 2013; §2.13).

A graph is r-robust if of any two disjoint non-empty sets of nodes at least one has a node with r
or more neighbours outside of its own set. W-MSR tolerates F liars beside every agent on
(2F+1)-robust graphs; F in all, that tell everybody the same, exactly on (F+1, F+1)-robust ones.
Sets are bit masks; the work grows as n·2^n for r and as 3^n for (r, s).
"""

from __future__ import annotations

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from tenfold.errors import ConfigError

MAX_NODES = 12
"""Graphs up to this many nodes are exhausted."""


def robustness(graph: nx.Graph) -> int:
    """The largest r for which the graph is r-robust; 0 for disconnected graphs and single nodes.

    Raises:
        ConfigError: more than `MAX_NODES` nodes.
    """
    reach = outside_degrees(graph).max(axis=0)  # [sets]: best node of each set
    n, full = graph.number_of_nodes(), len(reach) - 1
    if n == 1:
        return 0
    # smallest[M]: the least reach of a non-empty set inside M
    smallest = reach.copy()
    smallest[0] = n
    for bit in range(n):
        step = 1 << bit
        inside = np.arange(len(smallest)) & step != 0
        smallest[inside] = np.minimum(smallest[inside], smallest[np.flatnonzero(inside) ^ step])
    sets = np.arange(1, full)
    # Of two sets the better one counts, and the graph is as robust as its worst pair.
    return int(np.maximum(reach[sets], smallest[full ^ sets]).min())


def is_robust(graph: nx.Graph, r: int, s: int = 1) -> bool:
    """Whether the graph is (r, s)-robust; with s = 1, r-robust.

    For any two disjoint non-empty sets, with X_i the nodes of S_i that have r or more neighbours
    outside of S_i: X_1 = S_1, or X_2 = S_2, or |X_1| + |X_2| ≥ s.

    Raises:
        ConfigError: more than `MAX_NODES` nodes.
    """
    degrees = outside_degrees(graph)
    able = (degrees >= r).sum(axis=0)
    members = np.array([mask.bit_count() for mask in range(degrees.shape[1])])
    masks = np.arange(degrees.shape[1])
    weak = masks[(able < members) & (masks > 0)]  # sets that are not all able
    for first in weak:
        rivals = weak[(weak & first) == 0]
        if np.any(able[first] + able[rivals] < s):
            return False
    return True


def tolerates(graph: nx.Graph, F: int, equivocate: bool = False) -> bool:
    """Whether W-MSR is proven to converge on the graph.

    With F liars in all that tell everybody the same: (F+1, F+1)-robust. Under equivocation:
    (2F+1)-robust, which leaves the honest agents (F+1)-robust among themselves.
    """
    return is_robust(graph, 2 * F + 1) if equivocate else is_robust(graph, F + 1, F + 1)


def outside_degrees(graph: nx.Graph) -> NDArray[np.int64]:
    """`[nodes, sets]`: neighbours of a member outside of the set; -1 for non-members."""
    n = graph.number_of_nodes()
    if not 1 <= n <= MAX_NODES:
        raise ConfigError(
            f"robustness is found by exhaustion for 1 to {MAX_NODES} nodes; the graph has {n}"
        )
    nodes = sorted(graph)
    place = {node: i for i, node in enumerate(nodes)}
    masks = np.arange(1 << n)
    degrees = np.full((n, 1 << n), -1, dtype=np.int64)
    for node in nodes:
        near = sum(1 << place[other] for other in graph[node] if other != node)
        inside = masks >> place[node] & 1 == 1
        degrees[place[node], inside] = np.bitwise_count(near & ~masks[inside])
    return degrees
