"""Steps whose loss or gradient is not finite: skipped inside of the step, and explained."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spmd
from models.shardings import rules_for
from spmd.checking.finite import Watched
from tests.oracle import P, make_mesh
from training import nonfinite
from training.config import RunConfig
from training.data import Corpus, batch_at
from training.errors import DivergedError
from training.nonfinite import first_bad_operation, first_bad_tensor
from training.program import plan
from training.state import (
    init_state,
    learning_rate,
    loss_and_gradients,
    make_optimizer,
    train_step,
)

TEXT = np.arange(1000, dtype=np.uint32).astype(np.uint8)


def small(**train):
    run = RunConfig()
    model = dataclasses.replace(
        run.model, dtype="float32", num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2,
        num_kv_heads=2, head_dim=8,
    )  # fmt: skip
    return dataclasses.replace(
        run, model=model, data=dataclasses.replace(run.data, sequence=8),
        optimizer=dataclasses.replace(run.optimizer, warmup=0.0),
        train=dataclasses.replace(run.train, batch=8, steps=10, **train),
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned():
    return plan(small(), make_mesh(fsdp=4, tensor=2))


@pytest.fixture(scope="module")
def step(planned):
    return planned.compile_step()


def batch(planned, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, (8, 9), np.int32)
    return planned.put(tokens)


@pytest.fixture(scope="module")
def initial(planned):
    return copied(planned.init())


@pytest.fixture
def state(planned, initial):
    """The state before the first step; a step consumes it."""
    return jax.device_put(initial, planned.state_shardings)


def spoilt(planned, state, value):
    """The state with one entry of the embedding set to `value`."""
    box, sharding = state.params["embedding"], planned.state_shardings.params["embedding"].value
    embedding = np.array(box.value)
    embedding[0, 0] = value
    box = box.replace_boxed(jax.device_put(embedding, sharding))
    return state.replace(params={**state.params, "embedding": box})


def copied(tree):
    return jax.tree.map(np.array, tree)


def same_bits(a, b):
    return all(
        x.tobytes() == y.tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_a_bad_step_changes_no_bit_of_parameters_and_optimiser_and_counts(
    planned, step, state, value
):
    state, metrics = step(state, batch(planned))
    assert int(metrics["skipped"]) == 0 and np.isfinite(float(metrics["loss"]))
    state = spoilt(planned, state, value)
    before = copied((state.params, state.opt_state))
    for bad in (1, 2):
        state, metrics = step(state, batch(planned, bad))
        assert not np.isfinite(float(metrics["grad_norm"]))
        assert (int(metrics["skipped"]), int(state.skipped), int(state.step)) == (bad, bad, bad + 1)
        assert same_bits(before, copied((state.params, state.opt_state)))


def test_a_good_step_after_a_bad_one_updates_and_starts_the_count_anew(
    planned, step, initial, state
):
    bad, _ = step(spoilt(planned, state, np.nan), batch(planned))
    assert int(bad.skipped) == 1
    good = jax.device_put(initial.params, planned.state_shardings.params)
    state, metrics = step(bad.replace(params=good), batch(planned))
    assert (int(state.skipped), int(state.step)) == (0, 2)
    assert not any(
        same_bits(a, b) for a, b in zip(jax.tree.leaves(initial.params),
                                        jax.tree.leaves(copied(state.params)), strict=True)
    )  # fmt: skip
    # The schedule did not move while nothing was learnt.
    rate = learning_rate(planned.run.optimizer, planned.run.train.steps)
    assert float(metrics["learning_rate"]) == float(rate(0)) != float(rate(1))


@pytest.mark.parametrize("parallelism", ["data", "fsdp+tensor", "fsdp+tensor_sequence"])
def test_the_guard_sends_nothing(parallelism):
    run = small()

    def unguarded(state, batch_BS):
        loss, grads = loss_and_gradients(run, state, batch_BS)
        optimizer = make_optimizer(run.optimizer, run.train.steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    mesh = make_mesh(data=8) if parallelism == "data" else make_mesh(fsdp=4, tensor=2)
    state = jax.eval_shape(partial(init_state, run), jax.ShapeDtypeStruct((), np.uint32))
    tokens = jax.ShapeDtypeStruct((8, 9), np.int32)
    rules = rules_for(parallelism, mesh.axis_names)

    def sent(function):
        traced = spmd.jit(function, mesh=mesh, axis_rules=rules).trace(state, tokens)
        records = traced.propagate().partition().collectives
        return sorted((r.kind, r.axes, r.count, r.bytes) for r in records)

    assert sent(partial(train_step, run)) == sent(unguarded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.inf, "parameter embedding: 1 of 4,096 values are not finite"),
        (3e38, "loss; parameters are finite, the largest is 3e+38 in embedding"),
    ],
)
def test_the_first_bad_tensor_is_named(planned, state, value, text):
    state = spoilt(planned, state, value)
    found = first_bad_tensor(planned, state, planned.put(np.zeros((8, 9), np.int32)))
    assert found == f"the first bad tensor is the {text}"


@pytest.mark.slow
def test_the_first_bad_operation_is_named_with_its_line(planned, state):
    state = spoilt(planned, state, 3e38)
    text = first_bad_operation(planned, state, planned.put(np.zeros((8, 9), np.int32)))
    lines = text.splitlines()
    assert lines[0].startswith("mul at models/transformer.py:")
    assert "(RMSNorm.__call__) makes 64 NaN of 1,024 values" in lines[0]
    assert any("scan at models/transformer.py" in line and "iteration 0" in line for line in lines)
    made = lines[lines.index("the infinities were made before:") + 1]
    assert made.startswith("mul at models/transformer.py:") and "64 infinite" in made


class Quiet:
    def print(self, *args, **how):
        pass


def test_as_many_in_a_row_as_allowed_end_the_run_with_the_cause(planned, state, monkeypatch):
    """The cause is looked for in the state before the last bad step, with its batch."""

    def cause(plan, state, batch_BS):
        assert int(state.step) == 7
        want = batch_at(TEXT, 0, 7, 8, 8)
        np.testing.assert_array_equal(batch_BS, want)
        return "the embedding"

    monkeypatch.setattr(nonfinite, "first_bad_tensor", cause)
    values = {"loss": 1.0, "grad_norm": np.inf}
    guard = nonfinite.NonFinite(planned, Corpus(TEXT, TEXT, "", 1, ""), Quiet())
    guard.skipped(7, values | {"skipped": 4.0}, state)
    with pytest.raises(DivergedError) as error:
        guard.skipped(8, values | {"skipped": 5.0}, state)
    assert error.value.exit_code == 5
    assert str(error.value) == (
        "the gradient norm was not finite in 5 steps in a row, up to step 8\n"
        "  why: the embedding\n"
        "  fix: use a lower --learning-rate or a longer --warmup, and start from a checkpoint;"
        " --debug-nans names the operation"
    )


# Where a value comes from, in small programs


def origin(function, *args, specs=None):
    """What is found when `function` runs on two devices."""
    mesh = make_mesh(x=2)
    traced = spmd.jit(function, mesh=mesh, in_shardings=specs).trace(*args)
    watched = Watched(traced.program)
    leaves = [*traced.captured, *jax.tree.leaves(args)]
    spmd.jit(lambda *inputs: watched(*inputs), mesh=mesh, in_shardings=specs)(*leaves)
    jax.effects_barrier()
    return watched.origin()


X = np.ones((8, 8), np.float32)


def test_an_overflow_in_a_loop_is_found_behind_the_nan_that_it_makes():
    def f(x, w):
        def body(c, w):
            c = c @ w
            return c, jnp.exp(c)

        _, ys = jax.lax.scan(body, x, w)
        return (ys - ys[::-1]).sum()

    found = origin(f, X, np.full((5, 8, 8), 2, np.float32), specs=(P("x"), None))
    assert (found.op.primitive.name, found.counts) == ("sub", (192, 128))
    before = found.before
    assert (before.op.primitive.name, before.counts, before.before) == ("exp", (0, 64), None)
    [place] = before.where
    assert place.startswith("scan at e2e/test_nonfinite.py") and place.endswith("iteration 1")
    text = str(found).splitlines()
    assert text[0].endswith("makes 192 NaN and 128 infinite of 320 values, f32[5,8,8]")
    assert text[text.index("the infinities were made before:") + 1].startswith("exp at e2e/test_")


def test_what_enters_a_loop_is_followed_to_where_it_was_made():
    """The infinity is made in iteration 0, becomes a NaN in iteration 1."""

    def f(x):
        def body(c, _):
            return jnp.where(jnp.isinf(c), c * 0, c * 1e30), None

        return jax.lax.scan(body, x, length=3)[0]

    found = origin(f, X * 1e10, specs=P("x"))
    assert found.op.primitive.name == "mul" and found.where[0].endswith("iteration 1")
    assert found.before.op.primitive.name == "mul"
    assert found.before.where[0].endswith("iteration 0")


def test_infinities_that_are_meant_are_not_blamed():
    def f(x):
        scores = jnp.where(jnp.tril(jnp.ones((8, 8))) > 0, x, -jnp.inf)
        return jax.nn.softmax(scores).sum() + jnp.log(x - 1).sum()

    found = origin(f, X)
    assert (found.op.primitive.name, found.counts) == ("log", (0, 64))
    assert "reads  f32[8,8] result of sub" in str(found) and "all finite" in str(found)


def test_constants_that_are_no_numbers_are_blamed_only_where_nothing_else_is():
    def f(x):
        return jnp.nansum(jnp.where(x > 2, x, jnp.nan)) + jnp.sqrt(-x).sum()

    assert origin(f, X).op.primitive.name == "sqrt"
    found = origin(lambda x: jnp.where(x > 2, x, jnp.nan) * 2, X)
    assert found.counts.nan and "e2e/test_nonfinite.py" in str(found).splitlines()[0]


def test_an_argument_is_named_and_finite_programs_have_no_origin():
    bad = X.copy()
    bad[3, 3] = np.nan
    assert str(origin(lambda x: x.sum(), bad)) == "x f32[8,8] holds 1 NaN of 64 values"
    assert origin(lambda x: jnp.exp(x).sum(), X) is None
