"""The language of shardings: one canonical text, validation, sub-axes, axis rules."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from sharding import DimSharding, MeshError, MeshShape, P, Priority, Sharding, SpecError
from sharding.annotate import normalise_rules, parse_spec, resolve
from sharding.mesh import (
    axes_size,
    merge_refs,
    overlap,
    refine,
    refine_refs,
    split_axis,
    split_to_fit,
)
from sharding.spec import MONOIDS, fitted

NAMES = st.sampled_from(["data", "fsdp", "tensor", "p1", "step2", "x_y", "a.b"])


@st.composite
def axis_refs(draw: st.DrawFn) -> list[str]:
    """Distinct references that share no devices: at most one part of every axis."""
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    sub = st.sampled_from(["", ":(1)2", ":(2)4", ":(4)2"])
    return [name + draw(sub) for name in names]


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    refs = draw(axis_refs())
    rank = draw(st.integers(0, 4))
    dims: list[list[str]] = [[] for _ in range(rank)]
    partial, pinned = [], []
    for ref in refs:
        place = draw(st.integers(-2, rank - 1))
        if place == -2:
            partial.append((ref, draw(st.sampled_from(MONOIDS))))
        elif place == -1:
            pinned.append(ref)
        else:
            dims[place].append(ref)
    return Sharding(
        tuple(
            DimSharding(tuple(d), draw(st.booleans()), draw(st.integers(0, 3))) for d in dims
        ),
        tuple(partial),
        tuple(pinned),
    )


@given(shardings())
def test_text_parses_back(sharding: Sharding) -> None:
    assert Sharding.parse(str(sharding)) == sharding


@given(shardings())
def test_equal_shardings_have_equal_text_and_hash(sharding: Sharding) -> None:
    again = Sharding(sharding.dims, sharding.partial[::-1], sharding.pinned[::-1])
    assert again == sharding and hash(again) == hash(sharding) and str(again) == str(sharding)


def test_canonical_text() -> None:
    sharding = Sharding(
        (DimSharding(("data", "fsdp")), DimSharding(), DimSharding(("tensor",), open=True),
         DimSharding(open=True, priority=1)),
        (("stage", "add"),), ("expert",),
    )  # fmt: skip
    assert str(sharding) == "[data+fsdp, -, tensor?, ?@1] partial{stage:add} pinned{expert}"


@given(st.sampled_from([2, 3, 4, 6, 8, 12]), st.sampled_from([2, 3, 4, 6, 8]))
def test_sub_axes_partition_the_axis(size: int, major: int) -> None:
    mesh = MeshShape((("x", size),))
    parts = split_axis(mesh, "x", major)
    if parts is None:
        assert size % major or major >= size
        return
    assert axes_size(mesh, parts) == size
    assert not overlap(*parts) and overlap("x", parts[0]) and overlap("x", parts[1])
    assert merge_refs(mesh, parts) == ("x",)
    refined = refine(mesh, set(parts))
    assert refined.names == parts and refined.size == size
    assert refine_refs(mesh, refined, ("x",)) == parts


@given(st.lists(st.sampled_from([2, 3, 4, 6, 8]), min_size=1, max_size=3), st.integers(1, 48))
def test_split_to_fit_takes_what_divides(sizes: list[int], dim: int) -> None:
    mesh = MeshShape(tuple((f"a{i}", n) for i, n in enumerate(sizes)))
    taken, rest = split_to_fit(mesh, mesh.names, dim)
    assert dim % axes_size(mesh, taken) == 0
    assert axes_size(mesh, taken) * axes_size(mesh, rest) == mesh.size


def test_an_axis_used_twice() -> None:
    with pytest.raises(SpecError) as error:
        Sharding.closed(("data",), ("data",))
    assert str(error.value) == (
        "sharding [data, data] uses axis 'data' twice\n"
        "  why: the devices along one axis can hold the parts of one dim only\n"
        "  fix: keep 'data' in one place and remove it from the others"
    )


def test_a_sub_axis_overlapping_its_axis() -> None:
    with pytest.raises(SpecError, match="twice"):
        Sharding.closed(("tensor",), ("tensor:(1)2",))


def test_text_that_is_no_sharding() -> None:
    with pytest.raises(SpecError) as error:
        Sharding.parse("data, -")
    assert str(error.value) == (
        "sharding text 'data, -'\n"
        "  why: it is not of the form [axis+axis, -, ?] partial{axis:monoid} pinned{axis}\n"
        "  fix: write one entry per dim: axes joined by '+', '-' for none, '?' for open"
    )


def test_a_mesh_with_several_faults_names_them_all() -> None:
    with pytest.raises(MeshError) as error:
        MeshShape((("data", 2), ("data", 0)))
    assert str(error.value) == (
        "2 problems\n"
        "(1) mesh axis 'data' is named at positions 0, 1\n"
        "  why: an annotation that says the name would mean two axes\n"
        "  fix: give every mesh axis a name of its own\n"
        "(2) mesh axis 'data' has size 0\n"
        "  why: every axis holds at least one device\n"
        "  fix: give 'data' a size of 1 or more"
    )


MESH = MeshShape((("data", 2), ("fsdp", 2), ("tensor", 2)))


def resolved(spec: object, rank: int, rules: object = ()) -> str:
    sharding, problems = resolve(parse_spec(spec), rank, MESH, normalise_rules(rules), "x")
    assert not problems, problems
    return str(sharding)


def test_specs_mean_what_jax_says() -> None:
    assert resolved(P("data", None), 3) == "[data, -, -]"
    assert resolved(P(("data", "fsdp"), PartitionSpec.UNCONSTRAINED), 2) == "[data+fsdp, ?]"
    assert resolved((Priority("tensor", 1), None), 2) == "[tensor@1, -]"


def test_axis_rules_follow_flax() -> None:
    rules = [("batch", ("data", "fsdp")), ("embed", "fsdp"), ("mlp", "tensor"), ("norm", None)]
    assert resolved(("batch", "embed", "mlp"), 3, rules) == "[data+fsdp, -, tensor]"
    assert resolved(("embed", "mlp"), 2, rules) == "[fsdp, tensor]"
    assert resolved(("norm", "mlp"), 2, rules) == "[-, tensor]"
    # The first rule whose axes are free wins.
    rules = [("a", "data"), ("b", "data"), ("b", "fsdp")]
    assert resolved(("a", "b"), 2, rules) == "[data, fsdp]"


def test_axis_rules_agree_with_flax_itself() -> None:
    from flax import linen as nn

    rules = (("batch", ("data", "fsdp")), ("embed", "fsdp"), ("mlp", "tensor"), ("kv", "tensor"))
    for names in [("batch", "embed"), ("embed", "mlp"), ("mlp", "kv"), ("kv", "batch", "mlp")]:
        flax = nn.logical_to_mesh_axes(names, rules)
        assert resolved(names, len(names), rules) == resolved(P(*flax), len(names)), names


def test_unknown_names_and_double_axes_are_all_reported() -> None:
    spec = parse_spec(P("dta", "data", "data"))
    _, problems = resolve(spec, 3, MESH, (), "params['w']")
    assert [str(p) for p in problems] == [
        "params['w'] names axis 'dta'\n"
        "  why: the mesh has the axes data=2, fsdp=2, tensor=2 (did you mean 'data'?)\n"
        "  fix: use a mesh axis, or map 'dta' to one with axis_rules=[('dta', ...)]",
        "params['w'] has spec P('dta', 'data', 'data'), which uses axis 'data' twice\n"
        "  why: the devices along one axis can hold the parts of one dim only\n"
        "  fix: keep 'data' in one dim and remove it from the others",
    ]


def test_entries_that_are_no_axes() -> None:
    with pytest.raises(SpecError) as error:
        parse_spec((0, ""))
    assert str(error.value).startswith("2 problems\n(1) entry 0 of the spec is 0\n")


def test_equal_meshes_are_one_object() -> None:
    mesh = MeshShape.of({"data": 2, "tensor": 4})
    again = MeshShape((("data", 2), ("tensor", 4)))
    assert again is mesh is copy.copy(mesh) is copy.deepcopy(mesh)
    assert mesh != MeshShape((("tensor", 4), ("data", 2)))
    assert mesh != MeshShape(mesh.axes, across=(("data", 2),))


@given(st.integers(1, 40), st.lists(st.sampled_from((2, 3, 4, 8)), min_size=1, max_size=3))
def test_dims_of_fewer_elements_than_devices(size: int, sizes: list[int]) -> None:
    mesh = MeshShape(tuple((f"a{i}", n) for i, n in enumerate(sizes)))
    (dim,) = fitted(Sharding.closed(mesh.names), (size,), mesh).dims
    if dim.axes == mesh.names:
        return
    split, left = split_to_fit(mesh, mesh.names, size)
    assert dim.axes == split and axes_size(mesh, split) == size > 1 and axes_size(mesh, left) > 1


def test_fitted_dims() -> None:
    mesh = MeshShape((("data", 2), ("tensor", 8)))
    given = Sharding.parse("[data, tensor?@1, -]")
    for size, text in ((4, "tensor:(1)4?@1"), (8, "tensor?@1"), (6, "tensor?@1"), (9, "tensor?@1"),
                       (1, "tensor?@1"), (2, "tensor:(1)2?@1")):  # fmt: skip
        assert str(fitted(given, (2, size, 3), mesh)) == f"[data, {text}, -]"
    assert str(fitted(Sharding.closed(("data", "tensor")), (4,), mesh)) == "[data+tensor:(1)2]"
