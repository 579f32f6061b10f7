"""Replica groups in every form XLA prints, and the mesh axes they span."""

import pytest

from sharding.errors import ArgumentError
from spmd.reporting.hlo import mesh_axes_of
from spmd.reporting.hlo_groups import connected, permute_axes_of, replica_groups
from tests.unit.hlo_programs import only, program

ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))  # groups along the minor axis of a 2x4 mesh
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))  # and along the major one
MESH = {"data": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("printed", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{{0}}", ((0,),)),
        ("{}", (tuple(range(8)),)),
        ("[2,4]<=[8]", ROWS),
        # ids [[0..3],[4..7]] transposed: 0 4 1 5 2 6 3 7, in rows of two
        ("[4,2]<=[2,4]T(1,0)", COLUMNS),
        # [2,2,2] with the middle dim first: 0 1 4 5 2 3 6 7
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ROWS),
        ("mesh['a'=2,'b'=4] {'a'}", COLUMNS),
        ("mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("mesh['a'=2,'b'=4,'c'=1] {'a','c'}", COLUMNS),
        # b splits in 2 x 2: the major half pairs b = 0 with 2 and 1 with 3
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['b:(1)2'=2,'b:(2)4'=4] {'b:(2)4'}", ROWS),
        ("mesh['b:(1)2'=2,'b:(2)4'=4] {'b:(1)2'}", COLUMNS),
        ("mesh['a'=2,'b:(2)4'=4] {'b:(2)4':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
        ("@mesh<a=2,b=4> {b}", ROWS),
    ],
)
def test_replica_groups_in_every_form(printed, groups):
    assert (
        replica_groups(f", channel_id=1, replica_groups={printed}, dimensions={{0}}", 8) == groups
    )


def test_a_form_of_replica_groups_that_is_not_known():
    with pytest.raises(ArgumentError) as error:
        replica_groups(", replica_groups=V9(0..7)", 8)
    assert str(error.value) == (
        "replica groups printed as 'replica_groups=V9(0..7)'\n"
        "  why: this is none of the forms that the reader of HLO text knows\n"
        "  fix: read the form in `replica_groups` of spmd/reporting/hlo_groups.py"
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (ROWS, ("tensor",)),
        (COLUMNS, ("data",)),
        ([list(range(8))], ("data", "tensor")),
        ([[i] for i in range(8)], ()),
        (((0, 2, 1, 3), (4, 5, 6, 7)), ("tensor",)),  # the order within a group is free
        (((0, 1), (2, 3), (4, 5), (6, 7)), None),  # half of the tensor axis
        (((0, 1, 2, 3),), None),  # the other half of the mesh is missing
        (((0, 1, 2), (3, 4, 5, 6, 7)), None),
        (((0, 8), (1, 9)), None),  # outside the mesh
        ((), None),
    ],
)
def test_mesh_axes_of_groups(groups, axes):
    assert mesh_axes_of(groups, MESH) == axes


def test_axes_of_size_one_are_never_spanned():
    assert mesh_axes_of(ROWS, {"data": 2, "expert": 1, "tensor": 4}) == ("tensor",)


def test_mesh_axes_of_a_permute():
    ring = ((0, 1), (1, 2), (2, 3), (3, 0))
    assert permute_axes_of(ring, MESH) == ("tensor",)
    assert permute_axes_of(((0, 5), (5, 0)), MESH) == ("data", "tensor")
    assert permute_axes_of(((0, 9),), MESH) is None
    line = "%r = f32[8,4] collective-permute(%x), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}"
    found = only(program(line))
    assert (found.mesh_axes(MESH), found.group_size) == (("data",), 2)


def test_devices_linked_by_pairs():
    assert connected(((4, 5), (0, 1), (1, 2))) == ((0, 1, 2), (4, 5))
    assert connected(((3, 3),)) == ((3,),)
