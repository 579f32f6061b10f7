"""What annotations say of values that they do not name: those that elementwise operations tie to
an annotated one."""

from sharding.mesh import split_ref
from sharding.program import Value
from sharding.propagation import Propagated
from sharding.rule import Kind

Node = tuple[int, int]  # value id, dim


class Ties:
    """Groups of dims that pointwise operations, reshapes and data-flow edges tie together."""

    def __init__(self, propagated: Propagated):
        self.parent: dict[Node, Node] = {}
        for link in propagated.links:
            rule = link.rule
            if not rule.early:
                continue
            for name, places in rule.where.items():
                if rule.factors[name].kind is Kind.PASS:
                    nodes = [(link.values[t].id, d) for t, d in places]
                    for node in nodes[1:]:
                        self.parent[self.root(node)] = self.root(nodes[0])
        self._whole = {
            self.root((v.id, d))
            for v in propagated.program.values
            for d, dim in enumerate(propagated.of(v).dims)
            if not dim.open and not dim.axes and v.shape[d] > 1
        }
        self._axes: dict[Node, set[str]] = {}
        for event in propagated.events:
            if event.link < 0:
                names = {split_ref(a)[0] for a in event.axes}
                self._axes.setdefault(self.root((event.value, event.dim)), set()).update(names)

    def root(self, node: Node) -> Node:
        """The dim that stands for a group."""
        parent = self.parent
        while (above := parent.get(node, node)) != node:
            parent[node] = parent.get(above, above)
            node = parent[node]
        return node

    def meant_whole(self, value: Value, d: int) -> bool:
        """Whether an annotation says of the group of a dim that it is on no axis."""
        return self.root((value.id, d)) in self._whole

    def meant_on(self, value: Value, axis: str) -> bool:
        """Whether an annotation puts the group of some dim of a value on an axis."""
        roots = (self.root((value.id, d)) for d in range(value.rank))
        return any(split_ref(axis)[0] in self._axes.get(root, ()) for root in roots)
