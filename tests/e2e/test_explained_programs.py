"""Explanations of whole programs: every sharded dim of random ones, and remedies written out."""

import dataclasses
import json
import random
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import spmd
import training.config as config
from sharding import ShardingWarning, shard
from sharding.mesh import merge_refs
from spmd.partition.findings import forbid_waste
from tests.e2e.random_case import NAMES, Case
from tests.e2e.test_random_programs import draw
from tests.oracle import P, make_mesh
from training.program import plan


def propagated_of(case: Case) -> spmd.Propagated:
    scope = dict(NAMES)
    exec(case.source, scope)
    function = spmd.jit(
        scope["f"], mesh=make_mesh(**case.mesh), in_shardings=case.in_specs,
        out_shardings=list(case.out_specs),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShardingWarning)
        return function.trace(*case.inputs.values()).propagate()


def unexplained(stage: spmd.Propagated) -> list[str]:
    """Dims whose axes no chain brings from an annotation, and chains that do not hang together."""
    history, mesh, wrong = stage.inspector.history, stage.result.mesh, []
    annotated = {str(v) for v, _ in stage.traced.annotations}
    for value in stage.traced.program.values:
        for d, dim in enumerate(stage.result.of(value).dims):
            chains = history.chains(value, d)
            brought = merge_refs(mesh, tuple(a for chain in chains for a in chain.axes))
            if brought != merge_refs(mesh, dim.axes):
                wrong.append(f"{value} dim {d} is on {dim.axes}, chains bring {brought}")
            for chain in chains:
                first, last = chain.steps[0], chain.steps[-1]
                if first.factor or first.value not in annotated:
                    wrong.append(f"{value} dim {d} begins at {first}")
                if (last.value, last.dim) != (str(value), d):
                    wrong.append(f"{value} dim {d} ends at {last}")
                if not all(step.factor for step in chain.steps[1:]):
                    wrong.append(f"{value} dim {d} has a second annotation: {chain}")
    return wrong


@settings(
    max_examples=24, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.randoms(use_true_random=False))
def test_every_sharded_dim_of_a_random_program_has_a_chain_from_an_annotation(
    rng: random.Random,
) -> None:
    case = draw(rng)
    note(str(case))
    assert unexplained(propagated_of(case)) == []


@settings(
    max_examples=6, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.randoms(use_true_random=False))
def test_every_value_and_collective_of_a_random_program_is_explained(rng: random.Random) -> None:
    case = draw(rng)
    note(str(case))
    partitioned = propagated_of(case).partition()
    for value in partitioned.plan.program.values:
        explained = partitioned.explain(value)
        json.dumps(dataclasses.asdict(explained))
        chosen = [a for v in explained.values for a in v.alternatives if a.chosen]
        rest = [a for v in explained.values for a in v.alternatives]
        assert bool(chosen) == bool(rest)
        assert all(c.cost <= a.cost * (1 + 1e-9) for c in chosen for a in rest)
    for record in partitioned.collectives:
        why = partitioned.why(record)
        json.dumps(dataclasses.asdict(why))
        # A product is reduced by a gather, which is not what the plan counts.
        names = [f"{kind}({'+'.join(record.axes)})" for kind in (record.kind, "all_reduce")]
        told = sum(b for row in why.collectives for step, b in row.steps if step in names)
        assert told >= record.bytes * (1 - 1e-9) or why.collectives[0].steps[0][0] == names[1]


def test_a_remedy_holds_when_it_is_written_out() -> None:
    def accumulate(w, xs, here):
        def body(acc, x):
            return acc + here(x.T @ x), None

        return jax.lax.scan(body, w, xs)[0]

    def partitioned(here: Any) -> spmd.Partitioned:
        shapes = (512, 512), (16, 256, 512)
        function = spmd.jit(
            lambda w, xs: accumulate(w, xs, here), mesh=make_mesh(data=2),
            in_shardings=(P(), P(None, "data")), disable_passes=["loop_sums"],
        )  # fmt: skip
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return function.trace(*args).propagate().partition()

    before = partitioned(lambda x: x)
    (row,) = before.why("all_reduce").collectives
    assert row.remedy is not None and row.remedy.gains
    assert row.remedy.annotation.startswith("shard(x, 'data', None) on the result of dot_general")
    after = partitioned(lambda x: shard(x, "data", None))
    assert after.wire_bytes - before.wire_bytes == row.remedy.wire_bytes < 0
    # 16 all-reduces of 1 MiB; 16 reduce-scatters, or less, and one gather of the sum.
    assert before.wire_bytes == 16 << 20
    assert after.wire_bytes <= (8 << 20) + (1 << 19)


@pytest.mark.parametrize(
    "parallelism, mesh",
    [
        ("data", {"data": 8}), ("fsdp", {"fsdp": 8}), ("tensor", {"data": 2, "tensor": 4}),
        ("tensor_sequence", {"data": 2, "tensor": 4}), ("2d", {"data": 2, "tensor": 4}),
        ("fsdp+tensor", {"fsdp": 4, "tensor": 2}),
    ],
)  # fmt: skip
def test_no_parallelism_of_train_is_refused(parallelism: str, mesh: dict[str, int]) -> None:
    """At sizes where everything is large: parameters of 16 MiB to 128 MiB."""
    run = config.RunConfig()
    model = dataclasses.replace(
        run.model, dtype="float32", embed_dim=1024, mlp_dim=4096, vocab_size=32768, num_heads=8,
        num_kv_heads=4,
    )  # fmt: skip
    given = dataclasses.replace(run.mesh, parallelism=parallelism)
    step = plan(dataclasses.replace(run, model=model, mesh=given), make_mesh(**mesh)).partitioned
    forbid_waste(step.diagnostics)
    # Few tokens: large weights stay in parts where activations can move instead (`moved`).
    kinds = {(d.kind, d.value) for d in step.diagnostics if d.kind != "moved"}
    gathered = {"fsdp": {"fsdp"}, "tensor_sequence": {"tensor"}, "2d": {"tensor"},
                "fsdp+tensor": {"fsdp"}}  # fmt: skip
    assert kinds == {("conflict", axis) for axis in gathered.get(parallelism, ())}


def test_a_large_program_is_explained_at_once() -> None:
    def deep(x, w):
        for _ in range(1500):
            x = jnp.tanh(x @ w) + x
            x = x * 2.0
        return x

    shapes = (64, 64), (64, 64)
    function = spmd.jit(deep, mesh={"data": 2, "tensor": 4}, in_shardings=(P("data"), None))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    partitioned = function.trace(*args).propagate().partition()
    start = time.process_time()
    (first,) = partitioned.explain("result").values
    indexed = time.process_time()
    partitioned.explain("%101")
    line = partitioned.explain(f"test_explained_programs.py:{deep.__code__.co_firstlineno + 2}")
    done = time.process_time()
    # From x through an addition and a product in each step.
    assert len(first.history.chains[0].steps) == 3001
    assert len(line.values) == 64 and line.more == 4500 - 64
    assert indexed - start < 2.0 and done - indexed < 1.0
