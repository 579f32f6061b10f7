"""The history of propagation, as data: why every value is sharded as it is, and what lost."""

from typing import NamedTuple


class Event(NamedTuple):
    """Axes were added to one dim of a value.

    Attributes:
      value: id of the value.
      dim: its dim.
      axes: what was appended.
      link: index of the link (equation or data-flow edge) it came along; -1 for an annotation.
      source: id of the value it came from; -1 for an annotation.
      factor: the rule's factor that carried it; the annotated value's name for an annotation.
      level: propagation level (`sharding.decide.LEVELS`).
    """

    value: int
    dim: int
    axes: tuple[str, ...]
    link: int
    source: int
    factor: str
    level: int


class Rejection(NamedTuple):
    """Axes that an equation proposed and that were not taken.

    Attributes:
      value: id of the value that would have been sharded.
      dim: its dim.
      axes: what was proposed.
      link: index of the link.
      source: id of the value it came from.
      reason: why not.
    """

    value: int
    dim: int
    axes: tuple[str, ...]
    link: int
    source: int
    reason: str
