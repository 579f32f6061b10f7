"""What a rule's functions see: the equation, and the partitioner that asks them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Local(Protocol):
    """What a `local` function may ask of the partitioner. Implemented in `spmd/partition`."""

    def axes(self, factor: str) -> tuple[str, ...]:
        """Mesh axes that shard `factor`, major to minor."""
        ...

    def shards(self, factor: str) -> int:
        """Number of shards of `factor`."""
        ...

    def local_size(self, factor: str) -> int:
        """ceil(size / shards)."""
        ...

    def offset(self, factor: str) -> Any:
        """Traced int32: global index of this device's first element along `factor`."""
        ...

    def local_out(self, result: int) -> tuple[int, ...]:
        """Local shape of a result."""
        ...

    def is_read(self, result: int) -> bool:
        """Whether anything reads a result."""
        ...

    def index(self, axes: tuple[str, ...]) -> Any:
        """Traced int32: this device's place along `axes`, major to minor."""
        ...

    def named(self, axes: Any) -> Any:
        """Manual axes, as the user names them, by the names that collectives take."""
        ...

    def mask(self, x: Any, operand: int, factor: str, fill: Any) -> Any:
        """`x` with the padding of an uneven `factor` replaced by `fill`."""
        ...

    def all_gather(self, x: Any, axes: tuple[str, ...], dim: int) -> Any:
        """Shards along `axes` concatenated on `dim`: partial results, not whole operands."""
        ...

    def all_reduce(self, x: Any, axes: tuple[str, ...], monoid: str = "add") -> Any:
        """`x` reduced over the devices along `axes`."""
        ...

    def fetch(
        self, x: Any, dim: int, axes: tuple[str, ...], size: int, starts: Sequence[int],
        width: int, fill: Any = 0, wrap: bool = False,
    ) -> Any:  # fmt: skip
        """Elements [starts[i], starts[i] + width) along `dim` on shard i, from whoever has them.

        Args:
          x: the local shard; the dim has `size` elements globally, as many per shard as `x`. Or all
            of the array, see `Rule.fetches`.
          axes: mesh axes that shard the dim, major to minor.
          starts: per shard, known before tracing; places outside of [0, size) hold `fill`.
          wrap: places outside are those at the other end instead; the shards must be even.
        """
        ...

    def on_first_device(
        self, fun: Callable[..., Sequence[Any]], *operands: Any
    ) -> Sequence[Any]:
        """Results of `fun`, which runs on one device only and holds no collective, on all."""
        ...

    def bind(self, *operands: Any, **changed: Any) -> Sequence[Any]:
        """The primitive at local shapes, `resize` applied, with `changed` parameters."""
        ...


class OpInfo(Protocol):
    """What a rule function sees of an equation: global shapes and static parameters."""

    primitive: Any
    params: Mapping[str, Any]

    @property
    def in_avals(self) -> Sequence[Any]: ...

    @property
    def out_avals(self) -> Sequence[Any]: ...

    def literal(self, operand: int) -> Any:
        """Value of a literal operand, or None."""
        ...
