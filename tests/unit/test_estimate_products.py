"""What is held of products, and of what is made of them, for the TPU compiler."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh

import spmd
from spmd.chips import CHIPS
from spmd.estimate import liveness
from spmd.estimate.fusion import Compiler, held
from spmd.estimate.work import lines
from spmd.stages import Partitioned

F32, BF16 = jnp.float32, jnp.bfloat16
MIB = 2**20
V3, V5E, V6E = (Compiler.of(CHIPS[name]) for name in ("v3", "v5e", "v6e"))


def shape(*dims: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def partition(f: Any, *args: Any) -> Partitioned:
    return spmd.jit(f, mesh=AbstractMesh((1,), ("x",))).trace(*args).propagate().partition()


def peak(stage: Partitioned, compiler: Compiler = V3) -> float:
    return liveness.peak_bytes(stage.plan, (), compiler) / MIB


def over_rows(x: Any, y: Any) -> Any:
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())))


def writes(stage: Partitioned, compiler: Compiler = V3) -> list[str]:
    """The primitives whose results are in memory."""
    found = lines(stage.plan)
    kept = held(stage.plan, found, compiler).writes
    return [line.op.primitive.name for line, keys in zip(found, kept, strict=True)
            if keys and line.op]  # fmt: skip


def test_what_is_made_of_a_product_is_there_beside_its_operands() -> None:
    def f(x, y):
        made = (x + 1) @ jnp.sort(y)  # the sorted operand ends with the product
        return made, jnp.maximum(made, 0)

    x = shape(512, 512)
    stage = partition(f, x, x)
    assert peak(stage) == 2 + 1 + 2
    assert peak(stage, Compiler(into_dots=False)) == 2 + 2 + 1  # x + 1 is held instead


def test_what_is_made_of_a_product_takes_no_place_but_the_products() -> None:
    def f(x, y, z):
        ends = lax.sort(z)
        made = x @ y
        return made, made + ends  # while the product runs, the sorted operand is read

    stage = partition(f, *(shape(512, 512),) * 3)
    found = lines(stage.plan)
    for compiler, size in ((V3, 3 + 1 + 2), (Compiler(into_dots=False), 3 + 2)):
        kept = held(stage.plan, found, compiler)
        assert liveness.profile(stage.plan, found, (), kept, compiler).peak == size * MIB


def _lives(stage: Partitioned) -> dict[str, tuple[int, int]]:
    """Of temporaries: the primitive that makes one -> from which line up to which."""
    found = lines(stage.plan)
    memory = liveness.profile(stage.plan, found, (), held(stage.plan, found, V3), V3)
    return {b.key.value.op.primitive.name: (b.start, b.end) for b in memory.buffers
            if b.argument < 0 and b.key.value.op}  # fmt: skip


def test_what_leaves_a_product_is_written_and_its_other_operands_end() -> None:
    def f(x, y, z):
        made = (x @ y) * 2 + lax.sort(z)  # the last of what each alone reads of the product
        return made.sum(0), jnp.square(made).sum(1)

    stage = partition(f, *(shape(2048, 2048),) * 3)
    assert writes(stage) == ["dot_general", "sort", "add", "reduce_sum", "reduce_sum"]
    names = [line.op.primitive.name for line in lines(stage.plan) if line.op]
    product, added = names.index("dot_general"), names.index("add")
    lives = _lives(stage)
    assert lives["sort"][1] == added + 1
    assert lives["dot_general"] == (product, added)  # whose place the sum takes
    assert lives["add"][0] == added


def test_what_is_made_of_a_product_that_others_read_too_is_not_written_with_it() -> None:
    def f(x, y, z):
        made = x @ y
        added = made + z
        return added.sum(0), jnp.square(added).sum(1), made.sum()

    stage = partition(f, *(shape(2048, 2048),) * 3)
    assert writes(stage) == ["dot_general", *["reduce_sum"] * 3]


def test_what_is_wider_than_a_product_is_not_written_with_it() -> None:
    def f(x, y):
        wide = (x @ y).astype(F32)
        return jnp.sin(wide), jnp.cos(wide)

    x = shape(2048, 2048, dtype=BF16)
    assert writes(partition(f, x, x)) == ["dot_general", "sin", "cos"]


def test_what_is_made_of_what_leaves_a_product_leaves_with_it() -> None:
    def f(x, y, z):
        added = x @ y + z
        return lax.sort(added), lax.sort(jnp.maximum(added, 0))

    stage = partition(f, *(shape(2048, 2048),) * 3)
    names = [line.op.primitive.name for line in lines(stage.plan) if line.op]
    assert _lives(stage)["max"][0] == names.index("dot_general")


@pytest.mark.parametrize("chip, width, nested", [
    # multiplying takes 2 x width / peak per element; writing and reading it 4 bytes / bandwidth
    (V3, 256, True),  # 8.3 against 8.9 ps
    (V3, 512, False),
    (V6E, 1024, True),  # 2.2 against 2.4 ps
    (V6E, 2048, False),
    (V5E, 1024, False),  # 10.4 against 4.9 ps
])  # fmt: skip
def test_a_product_that_is_quick_is_computed_inside_of_its_only_reader(
    chip: Compiler, width: int, nested: bool
) -> None:
    def f(x, up, y):
        return over_rows(jnp.sin(x @ up), y)

    args = shape(4096, width, dtype=BF16), shape(width, 2048, dtype=BF16)
    stage = partition(f, *args, shape(4096, 512, dtype=BF16))
    apart = ["dot_general", "sin", "dot_general"]  # the sine takes the place of the product
    assert writes(stage, chip) == (["dot_general"] if nested else apart)


@pytest.mark.parametrize("f, held", [
    (lambda made, y: (over_rows(made, y), over_rows(made, -y)), ["dot_general"] * 3),
    (lambda made, y: (over_rows(made, y), made), ["dot_general"] * 2),
    (lambda made, y: (over_rows(jnp.sin(made), y), made), ["dot_general"] * 2),
    (lambda made, y: jnp.sort(made) @ jnp.ones((2048, 8), BF16), ["dot_general", "sort"]),
])  # fmt: skip
def test_products_that_others_need_are_not_computed_inside_of_a_reader(
    f: Any, held: list[str]
) -> None:
    args = shape(4096, 128, dtype=BF16), shape(128, 2048, dtype=BF16)
    stage = partition(lambda x, up, y: f(x @ up, y), *args, shape(4096, 512, dtype=BF16))
    assert writes(stage)[: len(held)] == held


def test_what_is_made_of_a_product_and_returned_is_not_computed_twice() -> None:
    def f(x, up, y):
        made = jnp.sin(x @ up)
        return made, over_rows(made, y)

    args = shape(4096, 128, dtype=BF16), shape(128, 2048, dtype=BF16)
    stage = partition(f, *args, shape(4096, 512, dtype=BF16))
    assert writes(stage) == ["dot_general", "sin", "dot_general"]


def test_convolutions_are_not_computed_inside_of_their_reader() -> None:
    def f(x, k):
        dims = ("NHWC", "HWIO", "NHWC")
        made = lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=dims)
        return over_rows(made.reshape(-1, 16), x.reshape(-1, 16))

    stage = partition(f, shape(8, 64, 64, 16), shape(1, 1, 16, 16))
    assert writes(stage)[::2] == ["conv_general_dilated", "dot_general"]
