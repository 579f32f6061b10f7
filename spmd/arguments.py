"""Arguments of a call: flat leaves, names a user recognises, and every annotation they carry."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sharding import _jax
from sharding.annotate import DimSpec, Spec, metadata_spec, spec_of
from sharding.errors import ArgumentError, Problem


@dataclass(frozen=True)
class Arguments:
    """The dynamic arguments of one call.

    Attributes:
      leaves: flat arrays, scalars or ShapeDtypeStructs.
      tree: of (args, kwargs), without static arguments.
      names: per leaf, such as `params['layers']['wq']`.
      specs: per leaf, the annotation that the argument itself carries (committed NamedSharding,
        flax metadata); None where there is none.
      static: the static arguments, part of what a program is compiled for.
    """

    leaves: tuple[Any, ...]
    tree: Any
    names: tuple[str, ...]
    specs: tuple[Spec | None, ...]
    static: tuple[Any, ...]

    @cached_property
    def avals(self) -> tuple[Any, ...]:
        return tuple(map(_jax.abstractify, self.leaves))

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What a traced program depends on; `specs` besides, for its partitioning.

        Raises:
          ArgumentError: a static argument is not hashable.
        """
        for where, value in self.static:
            try:
                hash(value)
            except TypeError:
                raise ArgumentError(_unhashable(where, value)) from None
        # 2 == 2.0, but they make different programs.
        static = tuple((where, type(value), value) for where, value in self.static)
        return self.avals, self.tree, static

    @property
    def keywords(self) -> bool:
        """Whether there are dynamic keyword arguments."""
        return bool(jax.tree.unflatten(self.tree, self.leaves)[1])


def flatten(
    fun: Callable, args: Sequence[Any], kwargs: dict[str, Any],
    static_argnums: Sequence[int], static_argnames: Sequence[str], mesh_names: Sequence[str],
) -> Arguments:  # fmt: skip
    """The dynamic leaves of a call with names and annotations.

    Args:
      mesh_names: a committed NamedSharding counts as an annotation when its axes are these.
    """
    static_at = {i % len(args) if args else i for i in static_argnums if i < len(args)}
    dynamic = tuple(a for i, a in enumerate(args) if i not in static_at)
    static = tuple((i, args[i]) for i in sorted(static_at))
    static += tuple((k, kwargs[k]) for k in sorted(kwargs) if k in static_argnames)
    dynamic_kw = {k: v for k, v in kwargs.items() if k not in static_argnames}
    paths, tree = jax.tree_util.tree_flatten_with_path((dynamic, dynamic_kw))
    positions = [i for i in range(len(args)) if i not in static_at]
    names = parameter_names(fun, len(args))
    called = tuple(_name(path, [names[i] for i in positions]) for path, _ in paths)
    leaves = tuple(leaf for _, leaf in paths)
    boxed = _metadata((dynamic, dynamic_kw))
    specs = tuple(
        _committed_spec(leaf, mesh_names) or box for leaf, box in zip(leaves, boxed, strict=True)
    )
    return Arguments(leaves, tree, called, specs, static)


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


def broadcast(prefix: Any, tree: Any, what: str) -> list[Any]:
    """One entry of a pytree prefix per leaf of `tree`; None entries stand for "infer".

    Raises:
      ArgumentError: the prefix does not match the tree.
    """
    found: list[Any] = []

    def spread(entry: Any, below: Any) -> None:
        found.extend([entry] * len(jax.tree.leaves(below)))

    try:
        jax.tree.map(spread, prefix, tree, is_leaf=_is_entry)
    except ValueError as error:
        raise ArgumentError(
            Problem(
                f"{what} has structure {jax.tree.structure(prefix, is_leaf=_is_entry)}",
                f"it must be a prefix of {jax.tree.structure(tree)}: {error}",
                f"give {what} one entry per {_part(what)}, or one for all of them",
            )
        ) from None
    return found


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


def _unhashable(where: int | str, value: Any) -> Problem:
    name = f"static argument {where!r}"
    return Problem(
        f"{name} is {value!r}, a {type(value).__name__}",
        "a static argument is part of what a program is compiled for, and must be hashable",
        "pass a tuple, a string, a number or a frozen object, or do not make it static",
    )


def _is_entry(x: Any) -> bool:
    return x is None or isinstance(x, (PartitionSpec, jax.sharding.Sharding, Spec))


def _committed_spec(leaf: Any, mesh_names: Sequence[str]) -> Spec | None:
    sharding = _jax.committed_sharding(leaf)
    if isinstance(sharding, NamedSharding) and tuple(sharding.mesh.axis_names) == tuple(mesh_names):
        return trimmed(spec_of(sharding, len(leaf.shape)))
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
