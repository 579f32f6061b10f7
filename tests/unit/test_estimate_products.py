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


def _starts(stage: Partitioned, compiler: Compiler = V3) -> dict[str, tuple[int, int]]:
    """Of what is held: the primitive that makes it -> from which line up to which."""
    found = lines(stage.plan)
    kept = held(stage.plan, found, compiler)
    memory = liveness.profile(stage.plan, found, (), kept, compiler)
    made = {b.key.value.op.primitive.name: (b.start, b.end) for b in memory.buffers
            if b.argument < 0 and b.key.value.op and b.bytes and b.start < b.end}  # fmt: skip
    return made


def test_what_leaves_a_product_is_written_and_its_other_operands_end() -> None:
    def f(x, y, z):
        ends = lax.rev(lax.sort(z), (0,))
        made = x @ y + ends
        return lax.sort(made), made * 2

    stage = partition(f, *(shape(2048, 2048),) * 3)
    found = _starts(stage)
    names = [line.op.primitive.name for line in lines(stage.plan) if line.op]
    product, added = names.index("dot_general"), names.index("add")
    assert found["add"][0] == added  # in the product's place, which nobody else reads
    assert found["rev"][1] == added + 1
    assert found["dot_general"] == (product, added)


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
    assert _starts(stage)["max"][0] == names.index("dot_general")


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
        made = jax.nn.gelu(x @ up)
        return made.T @ y

    args = shape(4096, width, dtype=BF16), shape(width, 2048, dtype=BF16)
    stage = partition(f, *args, shape(4096, 512, dtype=BF16))
    assert writes(stage, chip) == ["dot_general"] * (1 if nested else 2)


def test_a_product_that_two_read_is_not_computed_inside_of_either() -> None:
    def f(x, up, y):
        made = x @ up
        return made.T @ y, made.sum()

    args = shape(4096, 128, dtype=BF16), shape(128, 2048, dtype=BF16)
    stage = partition(f, *args, shape(4096, 512, dtype=BF16))
    assert writes(stage)[:2] == ["dot_general"] * 2
