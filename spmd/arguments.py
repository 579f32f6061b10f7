"""Arguments of a call: flat leaves, names a user recognises, and every annotation they carry."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
from jax.sharding import NamedSharding

from sharding._jax import jit as _jit
from sharding.annotate import DimSpec, Spec, metadata_spec, spec_of
from sharding.errors import ArgumentError, ArgumentTypeError, DonationError, Problem
from sharding.mesh import MeshShape
from spmd.options import is_entry


@dataclass(frozen=True)
class Arguments:
    """The dynamic arguments of one call.

    Attributes:
      leaves: flat arrays, scalars or ShapeDtypeStructs.
      tree: of (args, kwargs), without static arguments.
      names: per leaf, such as `params['layers']['wq']`.
      static: the static arguments, part of what a program is compiled for.
      boxes: per leaf, the annotation of the flax metadata around it, or None.
      specs: per leaf, the annotation that it carries on the mesh (committed NamedSharding, flax
        metadata); None where there is none. Filled in by `on`.
      memories: per leaf, the kind of memory that it was put into on purpose, or None. As `specs`.
    """

    leaves: tuple[Any, ...]
    tree: Any
    names: tuple[str, ...]
    static: tuple[tuple[int | str, Any], ...] = ()
    boxes: tuple[Spec | None, ...] = ()
    specs: tuple[Spec | None, ...] = ()
    memories: tuple[str | None, ...] = ()

    @cached_property
    def avals(self) -> tuple[Any, ...]:
        """Types of the leaves.

        Raises:
          ArgumentTypeError: with every leaf that is no array.
        """
        problems: list[Problem] = []
        found = []
        for leaf, name in zip(self.leaves, self.names, strict=True):
            try:
                found.append(_jit.abstractify(leaf))
            except TypeError:
                problems.append(_no_array(name, leaf))
            except OverflowError:
                raise OverflowError(str(_too_large(name, leaf))) from None
        if problems:
            raise ArgumentTypeError(*problems)
        return tuple(found)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What a traced program depends on; `specs` and `memories` besides, for its partitioning.

        Raises:
          ArgumentError: a static argument is not hashable.
        """
        check_hashable(self.static)
        # 2 == 2.0, but they make different programs.
        static = tuple((where, type(value), value) for where, value in self.static)
        return self.avals, self.tree, static

    @cached_property
    def placed(self) -> list[Any]:
        """Per leaf, the sharding that it was put on on purpose, or None."""
        return list(map(_jit.committed_sharding, self.leaves))

    def on(self, mesh: Any) -> "Arguments":
        """With the annotations that the arguments carry on a mesh."""
        shape = MeshShape.of(mesh)
        specs = tuple(
            spec_on(shape, sharding, len(aval.shape)) or box
            for sharding, aval, box in zip(self.placed, self.avals, self.boxes, strict=True)
        )
        found = copy.copy(self)  # with what is cached
        object.__setattr__(found, "specs", specs)
        object.__setattr__(found, "memories", tuple(map(_jit.special_memory, self.placed)))
        return found

    def abstract(self) -> "Arguments":
        """Without the arrays, so that nothing that is kept keeps them alive."""
        return replace(self, leaves=self.avals)

    @property
    def keywords(self) -> list[str]:
        """Names of the dynamic keyword arguments."""
        return list(jax.tree.unflatten(self.tree, self.leaves)[1])


def flatten(
    fun: Callable, args: Sequence[Any], kwargs: dict[str, Any],
    static_argnums: Sequence[int], static_argnames: Sequence[str],
) -> Arguments:  # fmt: skip
    """The dynamic leaves of a call, with their names."""
    static_at = {i % len(args) if args else i for i in static_argnums if i < len(args)}
    dynamic = tuple(a for i, a in enumerate(args) if i not in static_at)
    static = tuple((i, args[i]) for i in sorted(static_at))
    static += tuple((k, kwargs[k]) for k in sorted(kwargs) if k in static_argnames)
    dynamic_kw = {k: v for k, v in kwargs.items() if k not in static_argnames}
    paths, tree = jax.tree_util.tree_flatten_with_path((dynamic, dynamic_kw))
    positions = [i for i in range(len(args)) if i not in static_at]
    names = parameter_names(fun, len(args))
    names = [names[i] for i in positions]
    called = tuple(_name(path, names) for path, _ in paths)
    leaves = tuple(leaf for _, leaf in paths)
    boxes = tuple(_metadata((dynamic, dynamic_kw)))
    return Arguments(leaves, tree, called, static, boxes)


def rebuild(
    arguments: Arguments, leaves: Sequence[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """args and kwargs with `leaves` in place of the dynamic ones and the static ones restored."""
    dynamic, kwargs = jax.tree.unflatten(arguments.tree, leaves)
    args = list(dynamic)
    for where, value in arguments.static:
        if isinstance(where, int):
            args.insert(where, value)
        else:
            kwargs = {**kwargs, where: value}
    return args, kwargs


def check_hashable(static: Sequence[tuple[int | str, Any]]) -> None:
    """Raises ArgumentError with every static argument that cannot be part of a cache key."""
    problems = []
    for where, value in static:
        try:
            hash(value)
        except TypeError:
            problems.append(_unhashable(where, value))
    if problems:
        raise ArgumentError(*problems)


def suspicious(args: Any, donates: bool) -> bool:
    """Whether a leaf of `args` was deleted or, where some are donated, is there twice."""
    if _jit.any_deleted(args):
        return True
    if not donates:
        return False
    arrays = [id(x) for x in jax.tree.leaves(args) if _jit.is_array(x)]
    return len(set(arrays)) != len(arrays)


def check_buffers(arguments: Arguments, donated: Sequence[bool]) -> None:
    """Raises DonationError with every leaf that was deleted or donated, or is donated twice."""
    problems: list[Problem] = []
    names: dict[int, list[str]] = {}
    for leaf, name in zip(arguments.leaves, arguments.names, strict=True):
        names.setdefault(id(leaf), []).append(name)
        if _jit.deleted(leaf):
            problems.append(_gone(name, leaf))
    for leaf, flag in zip(arguments.leaves, donated, strict=True):
        shared = names[id(leaf)]
        if flag and _jit.is_array(leaf) and len(shared) > 1 and not _jit.deleted(leaf):
            problems.append(_shared(shared, leaf))
            names[id(leaf)] = []
    if problems:
        raise DonationError(*problems)


def broadcast(prefix: Any, tree: Any, what: str) -> list[Any]:
    """One entry of a pytree prefix per leaf of `tree`; None entries stand for "infer".

    Raises:
      ArgumentError: the prefix does not match the tree.
    """
    found: list[Any] = []

    def spread(entry: Any, below: Any) -> None:
        found.extend([entry] * len(jax.tree.leaves(below)))

    try:
        jax.tree.map(spread, prefix, tree, is_leaf=is_entry)
    except ValueError as error:
        check_no_tuple_spec(prefix, what)
        reason = " ".join(str(error).split())
        raise ArgumentError(
            Problem(
                f"{what} has structure {jax.tree.structure(prefix, is_leaf=is_entry)}",
                f"it must be a prefix of {jax.tree.structure(tree)}: {reason}",
                f"give {what} one entry per {_part(what)}, or one for all of them",
            )
        ) from None
    return found


def check_no_tuple_spec(prefix: Any, what: str) -> None:
    """Raises ArgumentError where a pytree of shardings holds a tuple of axis names: a spec."""

    def is_names(x: Any) -> bool:
        return isinstance(x, str) or type(x) is tuple and all(isinstance(n, str) for n in x)

    def is_spec(x: Any) -> bool:
        return type(x) is tuple and any(x) and all(n is None or is_names(n) for n in x)

    for given in jax.tree.leaves(prefix, is_leaf=is_spec):
        if is_spec(given):
            problem = Problem(
                f"{what} holds the tuple {given}",
                "a tuple is a pytree of shardings, with one for each part of an argument",
                f"for one sharding write P{given if len(given) > 1 else f'({given[0]!r})'}",
            )
            raise ArgumentError(problem)


def _part(what: str) -> str:
    return "positional argument" if what == "in_shardings" else "result"


def parameter_names(fun: Callable, count: int) -> list[str]:
    """Names of the first `count` positional parameters; `args[i]` where there is no name."""
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        return [f"args[{i}]" for i in range(count)]
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            first = len(names)
            names += [f"{parameter.name}[{i - first}]" for i in range(first, count)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count] + [f"args[{i}]" for i in range(len(names), count)]


def output_names(tree: Any) -> list[str]:
    """A name per leaf of a result: `result['loss']`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(
        jax.tree.unflatten(tree, range(tree.num_leaves))
    )
    return ["result" + jax.tree_util.keystr(path) for path, _ in paths]


def _name(path: Sequence[Any], names: Sequence[str]) -> str:
    which, first, rest = path[0], path[1], tuple(path[2:])
    if which.idx == 0:
        return f"{names[first.idx]}{jax.tree_util.keystr(rest)}"
    return f"{first.key}{jax.tree_util.keystr(rest)}"


def _gone(name: str, leaf: Any) -> Problem:
    return Problem(
        f"{name}, {leaf.aval.str_short()}, has been deleted",
        "it was donated to an earlier call, whose result took its memory, or deleted by hand",
        "use the result of that call, or do not donate it",
    )


def _shared(names: Sequence[str], leaf: Any) -> Problem:
    return Problem(
        f"{' and '.join(names)} are one array, {leaf.aval.str_short()}, and it is donated",
        "its memory can be donated once, and nothing else may read it in that call",
        f"pass a copy, jnp.copy({names[-1]}), or do not donate it",
    )


def _no_array(name: str, leaf: Any) -> Problem:
    return Problem(
        f"{name} is {leaf!r}, a {type(leaf).__name__}",
        "arguments of a compiled function are arrays, scalars, or pytrees of them",
        "pass an array, make the argument static (static_argnums, static_argnames), or register "
        "its class as a pytree",
    )


def _too_large(name: str, leaf: Any) -> Problem:
    return Problem(
        f"{name} is {leaf!r}",
        "Python integers become int32 arrays, which cannot hold it",
        f"pass a float, make {name} static, or enter jax.enable_x64(True)",
    )


def _unhashable(where: int | str, value: Any) -> Problem:
    name = f"static argument {where!r}"
    return Problem(
        f"{name} is {value!r}, a {type(value).__name__}",
        "a static argument is part of what a program is compiled for, and must be hashable",
        "pass a tuple, a string, a number or a frozen object, or do not make it static",
    )


@lru_cache(maxsize=8192)
def spec_on(mesh: MeshShape, sharding: Any, rank: int) -> Spec | None:
    """What a NamedSharding says, where it is over a mesh like this one."""
    if isinstance(sharding, NamedSharding) and MeshShape.of(sharding.mesh).like(mesh):
        return trimmed(spec_of(sharding, rank))
    return None


def trimmed(spec: Spec | None) -> Spec | None:
    """Without unsharded dims at the end, so that specs that mean the same are equal."""
    if spec is None:
        return None
    dims = list(spec.dims)
    while dims and dims[-1] == DimSpec():
        dims.pop()
    return Spec(tuple(dims))


def _metadata(tree: Any) -> list[Spec | None]:
    """Per leaf, the spec of the flax partitioning box around it."""
    boxes = jax.tree.leaves(tree, is_leaf=lambda x: metadata_spec(x) is not None)
    specs: list[Spec | None] = []
    for box in boxes:
        specs += [metadata_spec(box)] * len(jax.tree.leaves(box))
    return specs
