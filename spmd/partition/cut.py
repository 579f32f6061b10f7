"""Minimum cuts of small graphs: the cheapest way to part what must stay together from the rest."""

import math
from collections import deque
from collections.abc import Hashable, Iterable

Edge = tuple[Hashable, Hashable, float]


def source_side(edges: Iterable[Edge], source: Hashable, sink: Hashable) -> set[Hashable]:
    """The nodes on the source's side of a minimum cut; of several such cuts the one next to it.

    Shortest augmenting paths (Edmonds and Karp, 1972), for graphs of some hundred edges.

    Args:
      edges: (from, to, capacity); a capacity of infinity is never cut. No path of such edges
        alone leads from the source to the sink.
    """
    left: dict[Hashable, dict[Hashable, float]] = {source: {}, sink: {}}
    for a, b, capacity in edges:
        left.setdefault(a, {})
        left[a][b] = left[a].get(b, 0.0) + capacity
        left.setdefault(b, {}).setdefault(a, 0.0)
    finite = [c for out in left.values() for c in out.values() if c < math.inf]
    least = 1e-9 * max(finite, default=0.0)  # less is rounding
    while True:
        came = _reached(left, source, least)
        if sink not in came:
            return set(came)
        path = [sink]
        while path[-1] != source:
            path.append(came[path[-1]])
        pairs = list(zip(path[1:], path[:-1], strict=True))
        flow = min(left[a][b] for a, b in pairs)
        assert flow < math.inf, "infinite edges lead from the source to the sink"
        for a, b in pairs:
            left[a][b] -= flow
            left[b][a] += flow


def _reached(
    left: dict[Hashable, dict[Hashable, float]], source: Hashable, least: float
) -> dict[Hashable, Hashable]:
    """Nodes that capacity is left to, each with the one before it."""
    came: dict[Hashable, Hashable] = {source: source}
    queue = deque((source,))
    while queue:
        at = queue.popleft()
        for to, capacity in left[at].items():
            if capacity > least and to not in came:
                came[to] = at
                queue.append(to)
    return came
