"""Custom kernels and calls whose insides are opaque.

Those of JAX itself (cuDNN attention, block-scaled matmuls) have rules here, as has
`custom_partitioning`, which brings its own. All others need a rule of the user's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sharding import _jax
from sharding.errors import Problem, RuleError
from sharding.names import Names, names_in, parse
from sharding.rule import (
    REGISTRY,
    Dims,
    Factor,
    Kind,
    Local,
    OpInfo,
    Rule,
    register,
    replicated_rule,
)


def _pallas_name(params: Mapping[str, Any]) -> str:
    return params["name"] or params["jaxpr"].debug_info.func_src_info.split(" ")[0]


# By the primitive's name, since some are loaded only when they are used: how each equation tells
# which kernel it is. One rule for all of them would say nothing.
REGISTRY.opaque.update({
    "pallas_call": _pallas_name,
    "ffi_call": lambda params: params["target_name"],
    "tpu_custom_call": lambda params: params["kernel_name"] or "",
    "mosaic_gpu_p": lambda params: "",
    "cudnn_fusion": lambda params: params["name"],
})  # fmt: skip


# cuDNN attention. Batch and heads pass; so does the sequence of queries, where no mask counts
# positions. Keys, values and the head's own dim are whole.

_BNTH = 1  # jax._src.cudnn: the layout in which heads come before the sequence


def _named(op: OpInfo, inputs: Sequence[str], outputs: Sequence[str], fixed: str,
           combine: Sequence[str] = ()) -> Rule:  # fmt: skip
    names = parse(f"{', '.join(inputs)} -> {', '.join(outputs)}")
    names = replace(names, fixed=frozenset(fixed.split()), combine=tuple(combine))
    return names.rule(op.in_avals, op.out_avals)


def _attention_dims(op: OpInfo) -> tuple[str, str, str, str, str]:
    """Names of query, key, value, result and bias; groups of query heads share a head of keys."""
    query, key = (a.shape for a in op.in_avals[:2])
    first = op.params["layout"] == _BNTH
    at = 1 if first else 2
    heads = "k" if query[at] == key[at] else "(k g)"

    def dims(sequence: str, heads: str, last: str) -> str:
        return f"b {heads} {sequence} {last}" if first else f"b {sequence} {heads} {last}"

    return (
        dims("t", heads, "h"), dims("s", "k", "h"), dims("s", "k", "v"), dims("t", heads, "v"),
        f"b {heads} t s",
    )  # fmt: skip


def _attention_operands(op: OpInfo) -> tuple[list[str], list[str], str]:
    """Names of the first ten operands, of the result and the softmax statistics, and those that
    are fixed. What is not used has no elements."""
    query, key, value, result, bias = _attention_dims(op)
    _, _, _, *shapes = [a.shape for a in op.in_avals[:10]]
    packed = len(shapes[3]) == 2 and shapes[3][1] > 2
    paged = shapes[5] != (0,)
    lengths, offsets = ("b m", "b o") if packed else ("b", "b o")
    if paged:
        key, value = key.replace("b ", "p ").replace("s", "c"), value.replace("b ", "p ")
        value = value.replace("s", "c")
    optional = [bias, lengths, lengths, offsets, offsets, "b 1 q 1", "b 1 q 1"]
    texts = [query, key, value]
    for i, (text, shape) in enumerate(zip(optional, shapes, strict=True)):
        texts.append(f"z{i}" if shape == (0,) else text)
    heads = bias.removeprefix("b ").removesuffix(" t s")
    statistics = f"{'(b m)' if packed else 'b'} {heads} t"
    positions = (
        op.params["mask_type"].name != "NO_MASK" or packed or paged
        or op.params["sliding_window_length"] is not None
    )  # fmt: skip
    fixed = "h v s m o p c q " + " ".join(f"z{i}" for i in range(len(optional)))
    if positions:
        fixed += " t"
    if op.params.get("score_mod") is not None:  # it may ask for positions and heads
        fixed += " t k g"
    return texts, [result, statistics], fixed


@register(*_jax.cudnn("_dot_product_attention_fwd_p_wrapper"))
def _attention(op: OpInfo) -> Rule:
    """No communication. (Dropout is drawn per device, as JAX itself has it.)"""
    if len(op.in_avals) > 10:  # operands of a score_mod: nothing is known of their dims
        return replicated_rule(op)
    inputs, outputs, fixed = _attention_operands(op)
    return _named(op, inputs, outputs[: len(op.out_avals)], fixed)


@register(*_jax.cudnn("_dot_product_attention_bwd_p_wrapper"))
def _attention_backward(op: OpInfo) -> Rule:
    """Cotangents of what shards share are summed: of keys and values over groups of heads and
    queries, of a bias over what it is broadcast along."""
    if len(op.in_avals) > 13:
        return replicated_rule(op)
    inputs, (result, statistics), fixed = _attention_operands(op)
    return _named(
        op, [*inputs, statistics, result, result], inputs[: len(op.out_avals)], fixed,
        ("add",) * len(op.out_avals),
    )  # fmt: skip


def _fp8_fixed(op: OpInfo) -> str:
    return "h v s t" if op.params["use_causal_mask"] else "h v s"


@register(*_jax.cudnn("_dot_product_attention_fp8_fwd_p_wrapper"))
def _attention_fp8(op: OpInfo) -> Rule:
    """As above; the largest absolute values of softmax and result are all-reduced by max."""
    query, key, value, result, bias = _attention_dims(op)
    one = "1 1 1 1"
    statistics = bias.removesuffix(" s")
    outputs = [result, one, one, statistics][: len(op.out_avals)]
    inputs = [query, key, value, *[one] * (len(op.in_avals) - 3)]
    return _named(op, inputs, outputs, _fp8_fixed(op), ("add", "max", "max", "add"))


@register(*_jax.cudnn("_dot_product_attention_fp8_bwd_p_wrapper"))
def _attention_fp8_backward(op: OpInfo) -> Rule:
    query, key, value, result, bias = _attention_dims(op)
    one = "1 1 1 1"
    inputs = [query, key, value, result, result, bias.removesuffix(" s")]
    inputs += [one] * (len(op.in_avals) - len(inputs))
    amax = len(op.out_avals) - 3
    return _named(
        op, inputs, [query, key, value, *[one] * amax], _fp8_fixed(op),
        ("add",) * 3 + ("max",) * amax,
    )  # fmt: skip


@register(*_jax.cudnn("_scaled_matmul_p_wrapper"))
def _scaled_matmul(op: OpInfo) -> Rule:
    """A matmul of blocks that share a scale: blocks are reduced, and not divided."""
    left, right = op.in_avals[2].shape[-1], op.in_avals[3].shape[-1]
    if left != right:
        return _named(op, ["b m c", "b n c", "b m i", "b n j"], ["b m n"], "c i j")
    return _named(op, ["b m (k i)", "b n (k i)", "b m k", "b n k"], ["b m n"], "i")


# custom_partitioning.


@register(_jax.custom_partitioning_p)
def _custom_partitioning(op: OpInfo) -> Rule:
    """As its own `sharding_rule` says. Every shard runs what its `partition` callback returns,
    which reduces on its own: its results are whole."""
    given = op.params["sharding_rule"]
    if callable(given):
        given = _jax.called_sharding_rule(given, op)
    if given is None:
        raise RuleError(
            Problem(
                "a custom_partitioning function without a sharding_rule",
                "its callbacks answer for one sharding at a time; what may be sharded at all is "
                "not known",
                'pass sharding_rule="i j -> i j" to def_partition',
            )
        )
    avals = [*op.in_avals, *op.out_avals]
    mappings = [*given.operand_mappings, *given.result_mappings]
    dims = [_dims(m, a) for m, a in zip(mappings, avals, strict=True)]
    count = len(op.in_avals)
    names = Names(str(given), tuple(dims[:count]), tuple(dims[count:]))
    sizes = {**given.factor_sizes}
    sizes |= {n: size for n, size in names.sizes([a.shape for a in avals]).items()
              if n not in sizes}  # fmt: skip
    shared = frozenset.intersection(*(names_in((d,)) for d in dims[count:]))
    free = (shared & names_in(dims[:count])) | set(given.reduction_factors)
    free -= {*given.need_replication_factors, *given.permutation_factors}
    factors = {n: Factor(size, Kind.PASS if n in free else Kind.FIXED) for n, size in sizes.items()}
    tensors = [_without_ones(d, a) for d, a in zip(dims, avals, strict=True)]
    inputs, outputs = tuple(tensors[:count]), tuple(tensors[count:])
    return Rule(
        inputs, outputs, factors, divided=frozenset(given.reduction_factors),
        local=partial(_partitioned, inputs, outputs), always=True,
    )  # fmt: skip


def _dims(mapping: Sequence[Any], aval: Any) -> Dims:
    """A mapping of Shardy: names, tuples of names, and `…0` for any number of leading dims."""
    found: list[tuple[str, ...]] = []
    for entry in mapping:
        if isinstance(entry, str) and not entry[0].isalpha():
            more = len(aval.shape) - len(mapping) + 1
            found += [(f"batch{entry[1:]}_{i}",) for i in range(more)]
        else:
            found.append((entry,) if isinstance(entry, str) else tuple(entry))
    return tuple(found)


def _without_ones(dims: Dims, aval: Any) -> Dims:
    return tuple(() if n == 1 else d for d, n in zip(dims, aval.shape, strict=True))


def _partitioned(
    inputs: Sequence[Dims], outputs: Sequence[Dims], ctx: Local, op: OpInfo, *operands: Any
) -> Sequence[Any]:
    """The function that the `partition` callback makes for these shards."""
    params = op.params
    outer = jax.sharding.get_abstract_mesh()
    mesh = AbstractMesh(outer.axis_sizes, outer.axis_names)

    def described(avals: Sequence[Any], dims: Sequence[Dims]) -> list[Any]:
        specs = [[sum((ctx.axes(n) for n in names), ()) for names in d] for d in dims]
        return [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, _spec(s)))
            for a, s in zip(avals, specs, strict=True)
        ]

    wanted = described(op.in_avals, inputs)
    made = described(op.out_avals, outputs)
    _, lower, results, arguments = params["partition"](
        *params["static_args"], mesh, params["in_tree"].unflatten(wanted),
        params["out_tree"].unflatten(made),
    )  # fmt: skip
    for got, want in (
        *zip(params["in_tree"].flatten_up_to(arguments), wanted, strict=True),
        *zip(params["out_tree"].flatten_up_to(results), made, strict=True),
    ):
        if not got.is_equivalent_to(want.sharding, len(want.shape)):
            raise RuleError(
                Problem(
                    f"a custom_partitioning function was given {want.sharding.spec} and wants "
                    f"{got.spec}",
                    "its sharding_rule allows what its partition callback does not",
                    "name the dim in need_replication_factors of def_partition",
                )
            )
    return jax.tree.leaves(lower(*params["in_tree"].unflatten(operands)))


def _spec(dims: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*[d[0] if len(d) == 1 else d or None for d in dims])


