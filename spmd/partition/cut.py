"""Minimum cuts of small graphs: the cheapest way to part what must stay together from the rest."""

import math
from collections.abc import Hashable, Iterable, Sequence

Edge = tuple[Hashable, Hashable, float]


def source_side(edges: Iterable[Edge], source: Hashable, sink: Hashable) -> set[Hashable]:
    """The nodes on the source's side of a minimum cut; of several such cuts the one next to it.

    Blocking flows over shortest paths (Dinic, 1970), for graphs of some thousand edges.

    Args:
      edges: (from, to, capacity); a capacity of infinity is never cut. No path of such edges
        alone leads from the source to the sink.
    """
    graph = _Graph(edges, source, sink)
    graph.send_by_one()
    while True:
        steps = graph.reached()
        if steps[_SINK] < 0:
            return {node for node, at in graph.number.items() if steps[at] >= 0}
        graph.saturate(steps)


_SOURCE, _SINK = 0, 1


class _Graph:
    """Nodes by number, the source first and then the sink, and what capacity is left.

    Attributes:
      number: of each node.
      out: per node its edges, by the node that they lead to; every edge has one back, `edge ^ 1`.
      ends, left: per edge where it leads to, and its capacity.
    """

    def __init__(self, edges: Iterable[Edge], source: Hashable, sink: Hashable):
        self.number: dict[Hashable, int] = {source: _SOURCE, sink: _SINK}
        self.out: list[dict[int, int]] = [{}, {}]
        self.ends: list[int] = []
        self.left: list[float] = []
        for a, b, capacity in edges:
            if not capacity:
                continue
            i, j = self._numbered(a), self._numbered(b)
            edge = self.out[i].get(j)
            if edge is None:
                edge = self.out[i][j] = len(self.ends)
                self.out[j][i] = edge + 1
                self.ends += (j, i)
                self.left += (0.0, 0.0)
            self.left[edge] += capacity
        # Less is rounding.
        self.least = 1e-9 * max((c for c in self.left if c < math.inf), default=0.0)

    def _numbered(self, node: Hashable) -> int:
        found = self.number.setdefault(node, len(self.out))
        if found == len(self.out):
            self.out.append({})
        return found

    def send_by_one(self) -> None:
        """Sends what it can through one node alone."""
        for at, edge in self.out[_SOURCE].items():
            on = self.out[at].get(_SINK)
            if on is not None and (flow := min(self.left[edge], self.left[on])) > 0:
                self._send((edge, on), flow)

    def reached(self) -> list[int]:
        """Per node its steps from the source; -1 where no capacity is left to it, or where it is
        further than the sink."""
        steps = [-1] * len(self.out)
        steps[_SOURCE], left, least = 0, self.left, self.least
        front, far = [_SOURCE], 0
        while front and steps[_SINK] < 0:
            far += 1
            following = []
            for at in front:
                for to, edge in self.out[at].items():
                    if steps[to] < 0 and left[edge] > least:
                        steps[to] = far
                        following.append(to)
            front = following
        return steps

    def saturate(self, steps: Sequence[int]) -> None:
        """Sends along shortest paths until none has capacity left."""
        left, ends, least = self.left, self.ends, self.least
        # Per node that was reached the edges that may lead on; the last is tried next.
        ways: list[list[int] | None] = [None] * len(self.out)
        path: list[int] = []  # of edges
        while True:
            at = ends[path[-1]] if path else _SOURCE
            if at == _SINK:
                flow = min(left[edge] for edge in path)
                assert flow < math.inf, "infinite edges lead from the source to the sink"
                self._send(path, flow)
                del path[next(i for i, edge in enumerate(path) if left[edge] <= least) :]
                continue
            tried = ways[at]
            if tried is None:
                further = steps[at] + 1
                tried = ways[at] = [
                    edge for to, edge in self.out[at].items()
                    if steps[to] == further and left[edge] > least
                ]  # fmt: skip
            while tried and left[tried[-1]] <= least:
                tried.pop()
            if tried:
                path.append(tried[-1])
            elif not path:
                return
            else:
                before = ways[ends[path.pop() ^ 1]]
                assert before
                before.pop()

    def _send(self, path: Iterable[int], flow: float) -> None:
        for edge in path:
            self.left[edge] -= flow
            self.left[edge ^ 1] += flow
