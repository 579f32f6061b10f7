"""What `spmd.jit` was told, as one frozen value."""

from dataclasses import dataclass, field
from typing import Any

from sharding.annotate import AxisRules
from sharding.mesh import MeshShape


@dataclass(frozen=True)
class Options:
    """What `spmd.jit` was told. Hashable, so that it can be part of a cache key."""

    mesh: Any
    axis_rules: AxisRules = ()
    in_shardings: Any = field(default=None, hash=False, compare=False)
    out_shardings: Any = field(default=None, hash=False, compare=False)
    donate_argnums: tuple[int, ...] = ()
    donate_argnames: tuple[str, ...] = ()
    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    keep_unused: bool = False
    fallback: str = "error"
    compiler_options: Any = field(default=None, hash=False, compare=False)

    @property
    def mesh_shape(self) -> MeshShape:
        return MeshShape.of(self.mesh)
