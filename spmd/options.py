"""What `spmd.jit` was told, as one frozen value."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jax.experimental.layout import Format
from jax.sharding import PartitionSpec, Sharding

from sharding._jax import jit as _jit
from sharding.annotate import AxisRules, Spec
from sharding.mesh import MeshShape

# What can be switched off, by `disable_passes`.
PASSES = (
    "own_steps", "moved_axes", "shared_sums", "shared_gathers", "direct_moves", "loop_sums",
    "loop_invariants", "late_broadcasts", "saved_gathers", "regathers", "transposed_sums",
    "split_scatters", "own_stacks", "keep_products", "combine_small", "streams",
    "async_collectives", "bounded_schedule",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Options:
    """What `spmd.jit` was told. Hashable, so that it can be part of a cache key.

    Attributes:
      across: of a mesh without devices, the axes between slices or nodes, as `MeshShape` has them.
    """

    mesh: Any
    axis_rules: AxisRules = ()
    in_shardings: Any = None
    out_shardings: Any = None
    donate_argnums: tuple[int, ...] = ()
    donate_argnames: tuple[str, ...] = ()
    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    keep_unused: bool = False
    fallback: str = "error"
    on_gather: str = "plan"
    compiler_options: tuple[tuple[str, Any], ...] = ()
    strict: bool = False
    disable_passes: tuple[str, ...] = ()
    memory_limit: int | None = None
    across: tuple[tuple[str, int], ...] = ()

    def on(self, name: str) -> bool:
        """Whether one of `PASSES` is on."""
        return name not in self.disable_passes

    @property
    def mesh_shape(self) -> MeshShape:
        found = MeshShape.of(self.mesh)
        return replace(found, across=self.across) if self.across else found

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return (
            self.mesh, self.axis_rules, _flat(self.in_shardings), _flat(self.out_shardings),
            self.donate_argnums, self.donate_argnames, self.static_argnums, self.static_argnames,
            self.keep_unused, self.fallback, self.on_gather, self.compiler_options,
            self.strict, self.disable_passes, self.memory_limit, self.across,
        )  # fmt: skip

    @cached_property
    def entries(self) -> list[Any]:
        """Every entry of `in_shardings` and `out_shardings`, None aside."""
        given = (self.in_shardings, self.out_shardings)
        return [e for e in jax.tree.leaves(given, is_leaf=is_entry) if e is not None]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def is_entry(x: Any) -> bool:
    """Whether `x` is one sharding in a pytree of shardings."""
    return x is None or isinstance(x, (PartitionSpec, Sharding, Format, Spec))


def sharding_of(entry: Any) -> Any:
    """The sharding in an entry: a `Format` has a layout besides."""
    return entry.sharding if isinstance(entry, Format) else entry


def _flat(tree: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_entry)
    return tuple(leaves), structure


def free_memory(entry: Any) -> bool:
    """Whether what was given for an array says nothing of the kind of memory that it is in."""
    return sharding_of(entry) is None or isinstance(sharding_of(entry), PartitionSpec)


def memory(entry: Any) -> str | None:
    """That kind of memory, where it is not the device's own."""
    return _jit.special_memory(sharding_of(entry))
