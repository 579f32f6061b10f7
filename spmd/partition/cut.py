"""Minimum cuts of small graphs: the cheapest way to part what must stay together from the rest."""

import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence

Edge = tuple[Hashable, Hashable, float]
_Left = dict[Hashable, dict[Hashable, float]]


def source_side(edges: Iterable[Edge], source: Hashable, sink: Hashable) -> set[Hashable]:
    """The nodes on the source's side of a minimum cut; of several such cuts the one next to it.

    Blocking flows over shortest paths (Dinic, 1970), for graphs of some thousand edges.

    Args:
      edges: (from, to, capacity); a capacity of infinity is never cut. No path of such edges
        alone leads from the source to the sink.
    """
    left: _Left = {source: {}, sink: {}}
    for a, b, capacity in edges:
        left.setdefault(a, {})
        left[a][b] = left[a].get(b, 0.0) + capacity
        left.setdefault(b, {}).setdefault(a, 0.0)
    finite = [c for out in left.values() for c in out.values() if c < math.inf]
    least = 1e-9 * max(finite, default=0.0)  # less is rounding
    for at, capacity in list(left[source].items()):  # through one node alone
        flow = min(capacity, left[at].get(sink, 0.0))
        if flow > 0:
            _send(left, (source, at, sink), flow)
    while True:
        steps = _reached(left, source, least)
        if sink not in steps:
            return set(steps)
        _saturate(left, steps, source, sink, least)


def _reached(left: _Left, source: Hashable, least: float) -> dict[Hashable, int]:
    """Nodes that capacity is left to, each with its steps from the source."""
    steps: dict[Hashable, int] = {source: 0}
    queue = deque((source,))
    while queue:
        at = queue.popleft()
        for to, capacity in left[at].items():
            if capacity > least and to not in steps:
                steps[to] = steps[at] + 1
                queue.append(to)
    return steps


def _saturate(
    left: _Left, steps: dict[Hashable, int], source: Hashable, sink: Hashable, least: float
) -> None:
    """Sends along shortest paths until none has capacity left."""
    ways = {at: list(left[at]) for at in steps}  # those that may lead on; the last is tried next
    path = [source]
    while path:
        at = path[-1]
        if at == sink:
            flow = _send(left, path)
            pairs = zip(path, path[1:], strict=False)
            full = next(i for i, (a, b) in enumerate(pairs) if left[a][b] <= least)
            assert flow < math.inf, "infinite edges lead from the source to the sink"
            del path[full + 1 :]
            continue
        while ways[at]:
            to = ways[at][-1]
            if left[at][to] > least and steps.get(to) == steps[at] + 1:
                path.append(to)
                break
            ways[at].pop()
        else:
            path.pop()
            if path:
                ways[path[-1]].pop()


def _send(left: _Left, path: Sequence[Hashable], flow: float | None = None) -> float:
    """Sends what a path has capacity for, or `flow` of it."""
    pairs = list(zip(path, path[1:], strict=False))
    if flow is None:
        flow = min(left[a][b] for a, b in pairs)
    for a, b in pairs:
        left[a][b] -= flow
        left[b][a] += flow
    return flow
