"""Every optimiser and gradient transformation of optax, with parameters and state sharded.

Three steps give what three unsharded steps give: parameters, state and loss. Only the parameters
are annotated; where the state lies is inferred.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import spmd
from tests.e2e.follow import Run, assert_same, follow
from tests.oracle import P, make_mesh

SHAPES = {"kernel": (2, 3, 4, 8), "matrix": (8, 12), "vector": (12,)}
LAYOUTS = {
    "fsdp": {
        "kernel": P(None, None, "data"), "matrix": P("data"), "vector": P("data"),
    },
    "tensor": {
        "kernel": P(None, None, None, "tensor"), "matrix": P(None, "tensor"),
        "vector": P("tensor"),
    },
    "both": {
        "kernel": P(None, None, "data", "tensor"), "matrix": P("data", "tensor"),
        "vector": P("tensor"),
    },
}  # fmt: skip


def parameters(seed: int, dtype: Any = np.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        x = rng.normal(size=shape)
        return jnp.asarray(x + 1j * rng.normal(size=shape) if dtype == jnp.complex64 else x, dtype)

    return {name: draw(shape) for name, shape in SHAPES.items()}


def only(*names: str) -> dict[str, bool]:
    return {name: name in names for name in SHAPES}


class Case(NamedTuple):
    """A transformation, and what is special about the step that uses it."""

    make: Callable[[], Any]
    dtype: Any = np.float32
    per_example: bool = False  # it takes one gradient per example
    pair: bool = False  # it takes fast and slow parameters
    extra: tuple[str, ...] = ()  # what its update wants besides gradients and parameters


def norm(updates: Any) -> Any:
    return optax.tree.norm(updates)


def _all_matrices(updates: Any) -> Any:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), updates)


LINE_SEARCH = ("value", "grad", "value_fn")
EVERY = {"every_k_schedule": 2}
LABELS = {"kernel": "b", "matrix": "a", "vector": "b"}
TWO = {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)}
OPTAX: dict[str, Case] = {
    "MultiSteps": Case(
        lambda: optax.MultiSteps(optax.adam(0.1), **EVERY).gradient_transformation()
    ),
    "adafactor": Case(lambda: optax.adafactor(0.1, min_dim_size_to_factor=4)),
    "adaptive_grad_clip": Case(lambda: optax.adaptive_grad_clip(0.1)),
    "add_noise": Case(lambda: optax.add_noise(0.1, 0.55, key=jax.random.key(3))),
    "apply_every": Case(lambda: optax.apply_every(2)),
    "apply_if_finite": Case(lambda: optax.apply_if_finite(optax.adam(0.1), 3)),
    "chain": Case(lambda: optax.chain(optax.clip(0.5), optax.trace(0.9), optax.scale(-0.1))),
    "clip": Case(lambda: optax.clip(0.3)),
    "clip_by_block_rms": Case(lambda: optax.clip_by_block_rms(0.3)),
    "clip_by_global_norm": Case(lambda: optax.clip_by_global_norm(1.0)),
    "conditionally_mask": Case(
        lambda: optax.conditionally_mask(optax.adam(0.1), lambda step: step % 2 == 0)
    ),
    "conditionally_transform": Case(
        lambda: optax.conditionally_transform(optax.adam(0.1), lambda step: step % 2 == 0)
    ),
    "ema": Case(lambda: optax.ema(0.9)),
    "flatten": Case(lambda: optax.flatten(optax.adam(0.1))),
    "freeze": Case(lambda: optax.freeze(only("matrix"))),
    "inject_hyperparams": Case(
        lambda: optax.inject_hyperparams(optax.adamw)(
            learning_rate=optax.cosine_decay_schedule(0.1, 10), weight_decay=0.01
        )
    ),
    "inject_stateful_hyperparams": Case(
        lambda: optax.inject_stateful_hyperparams(optax.adam)(
            learning_rate=optax.WrappedSchedule(optax.linear_schedule(0.1, 0.01, 5))
        )
    ),
    "lbfgs": Case(optax.lbfgs, extra=LINE_SEARCH),
    "lookahead": Case(lambda: optax.lookahead(optax.adam(0.1), 2, 0.5), pair=True),
    "masked": Case(lambda: optax.masked(optax.adam(0.1), only("matrix", "vector"))),
    "measure_with_ema": Case(lambda: optax.monitor({"norm": optax.measure_with_ema(norm, 0.9)})),
    "monitor": Case(lambda: optax.chain(optax.sgd(0.1), optax.monitor({"norm": norm}))),
    "multi_transform": Case(lambda: optax.multi_transform(TWO, LABELS)),
    "named_chain": Case(
        lambda: optax.named_chain(("clip", optax.clip(0.5)), ("adam", optax.adam(0.1)))
    ),
    "noisy_sgd": Case(lambda: optax.noisy_sgd(0.1, key=jax.random.key(3))),
    "partition": Case(lambda: optax.partition(TWO, LABELS)),
    "polyak_sgd": Case(optax.polyak_sgd, extra=("value",)),
    "scale": Case(lambda: optax.scale(-0.1)),
    "scale_by_backtracking_linesearch": Case(
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
        extra=LINE_SEARCH,
    ),
    "scale_by_factored_rms": Case(lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=4)),
    "scale_by_polyak": Case(optax.scale_by_polyak, extra=("value",)),
    "scale_by_schedule": Case(
        lambda: optax.scale_by_schedule(optax.warmup_cosine_decay_schedule(0.0, -0.1, 2, 10))
    ),
    "scale_by_zoom_linesearch": Case(
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(10)),
        extra=LINE_SEARCH,
    ),
    "selective_transform": Case(
        lambda: optax.selective_transform(optax.adam(0.1), freeze_mask=only("matrix"))
    ),
    "snapshot": Case(lambda: optax.chain(optax.sgd(0.1), optax.snapshot("norm", norm))),
    "stateless": Case(lambda: optax.stateless(lambda g, p: jax.tree.map(jnp.add, g, p))),
    "stateless_with_tree_map": Case(
        lambda: optax.stateless_with_tree_map(lambda g, p: -0.1 * jnp.sign(g) * p**2)
    ),
    "trace": Case(lambda: optax.trace(0.9, nesterov=True)),
    "with_extra_args_support": Case(lambda: optax.with_extra_args_support(optax.adam(0.1))),
}
CONTRIB: dict[str, Case] = {
    "differentially_private_aggregate": Case(
        lambda: contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(3)),
        per_example=True,
    ),
    "dpsgd": Case(
        lambda: contrib.dpsgd(0.1, 1.0, 0.1, seed=3, momentum=0.9),
        per_example=True,
    ),
    "galore": Case(lambda: contrib.galore(0.1, rank=2, update_proj_gap=2)),
    "hutchinson_estimator_diag_hessian": Case(
        contrib.hutchinson_estimator_diag_hessian, extra=("obj_fn",)
    ),
    "mechanize": Case(lambda: contrib.mechanize(optax.adam(0.1))),
    "momo": Case(contrib.momo, extra=("value",)),
    "momo_adam": Case(contrib.momo_adam, extra=("value",)),
    "reduce_on_plateau": Case(contrib.reduce_on_plateau, extra=("value",)),
    "sam": Case(
        lambda: contrib.sam(
            optax.adam(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05)), opaque_mode=True
        ),
        extra=("grad_fn",),
    ),
    "scale_by_galore": Case(lambda: contrib.scale_by_galore(rank=2, update_proj_gap=2)),
    "scale_by_muon": Case(
        lambda: optax.masked(
            contrib.scale_by_muon(weight_dimension_numbers=_all_matrices),
            only("matrix"),
        )
    ),
    "schedule_free": Case(lambda: contrib.schedule_free(optax.sgd(0.1), 0.1)),
    "sophia": Case(lambda: contrib.sophia(0.1, update_interval=2), extra=("obj_fn",)),
    "split_real_and_imaginary": Case(
        lambda: contrib.split_real_and_imaginary(optax.adam(0.1)), dtype=jnp.complex64
    ),
}
# Public functions that make no gradient transformation.
OTHER = {
    optax: """
        apply_updates bias_correction global_norm incremental_update init_empty_state
        matrix_inverse_pth_root microbatch multi_normal nnls per_example_global_norm_clip
        per_example_layer_norm_clip periodic_update power_iteration safe_increment
        safe_int32_increment safe_norm safe_root_mean_squares scale_gradient skip_large_updates
        skip_not_finite tree_map_params update_infinity_moment update_moment
        update_moment_per_elem_norm value_and_grad_from_state
    """.split(),
    contrib: ["schedule_free_eval_params"],
}


# They factorise whole matrices.
GATHERS = {"galore", "scale_by_galore"}


def public(module: Any) -> dict[str, Any]:
    found = {n: getattr(module, n) for n in dir(module) if not n.startswith("_")}
    return {
        n: f for n, f in found.items()
        if callable(f) and not inspect.isclass(f) and not f.__module__.startswith("typing")
    }  # fmt: skip


def transformations(module: Any, given: dict[str, Case]) -> dict[str, Case]:
    """Every factory of a module: those given, and those whose arguments have defaults."""
    known = {*OTHER[module], *public(optax.losses), *public(optax.schedules)} - set(given)
    cases = dict(given)
    for name, factory in public(module).items():
        if name in known or name in cases:
            continue
        needed = [
            p.name for p in inspect.signature(factory).parameters.values() if p.default is p.empty
        ]
        assert set(needed) <= {"learning_rate"}, f"{name} is new and needs a case: {needed}"
        cases[name] = Case(functools.partial(factory, **{n: 0.1 for n in needed}))
    return cases


CASES = {**transformations(optax, OPTAX), **transformations(contrib, CONTRIB)}


def loss(params: Any, target: Any) -> Any:
    """Convex, with every parameter in it."""

    def one(p: Any, t: Any) -> Any:
        square = jnp.real((p - t) * jnp.conj(p - t))
        return jnp.sum(square + 0.1 * square**2)

    return jax.tree.reduce(jnp.add, jax.tree.map(one, params, target))


def make_step(name: str, case: Case) -> tuple[Any, Callable]:
    optimiser = optax.with_extra_args_support(case.make())

    def step(params: Any, state: Any, target: Any) -> Any:
        of = functools.partial(loss, target=target)
        value, grads = jax.value_and_grad(of)(params.fast if case.pair else params)
        if case.dtype == jnp.complex64:
            grads = jax.tree.map(jnp.conj, grads)
        if case.per_example:
            weights = jnp.arange(1.0, 5.0)
            grads = jax.tree.map(lambda g: jnp.tensordot(weights, g, 0), grads)
        known = {"value": value, "grad": grads, "value_fn": of, "obj_fn": of,
                 "grad_fn": lambda p, _: jax.grad(of)(p)}  # fmt: skip
        extra = {name: known[name] for name in case.extra}
        updates, state = optimiser.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    return optimiser, step


def check_steps(names: Sequence[str], layout: str) -> Run:
    """Three steps of every named case, all in one program: compiling takes the time."""
    steps, params, placed, states, targets = {}, {}, {}, {}, {}
    for name in names:
        case, specs = CASES[name], LAYOUTS[layout]
        optimiser, steps[name] = make_step(name, case)
        params[name], targets[name] = parameters(0, case.dtype), parameters(1, case.dtype)
        placed[name] = specs
        if case.pair:
            params[name] = optax.LookaheadParams.init_synced(params[name])
            placed[name] = optax.LookaheadParams(specs, specs)
        states[name] = optimiser.init(params[name])

    def step(params: Any, states: Any, targets: Any) -> Any:
        done = {n: f(params[n], states[n], targets[n]) for n, f in steps.items()}
        return tuple({n: done[n][i] for n in done} for i in range(3))

    run = follow(
        step, (params, states), (targets,), make_mesh(data=2, tensor=4), (placed, None, None),
        steps=3,
    )  # fmt: skip
    for path, x in jax.tree_util.tree_leaves_with_path(run.carry):
        where = jax.tree_util.keystr(path)
        assert x.size < 12 or not x.sharding.is_fully_replicated, f"{where} is replicated"
    return run


# Their state changes its structure or types after the first step: programs of their own.
APART = ["lbfgs", "measure_with_ema", "monitor", "scale_by_backtracking_linesearch"]
# What other cases are made of.
PARTS = [n for n in CASES if n.removeprefix("scale_by_") in {*CASES} - {n}]
PARTS += ["scale_by_factored_rms", "scale_by_zoom_linesearch", "scale_by_acprop", "trace"]
REST = [n for n in CASES if n not in APART and n not in PARTS]


def groups(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[i : i + size] for i in range(0, len(names), size)]


quiet = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


@quiet
@pytest.mark.parametrize("names", [*groups(APART, 1), *groups(REST, 8)], ids=" ".join)
def test_three_steps_equal_the_unsharded_ones(names: Sequence[str]) -> None:
    check_steps(names, "both")


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", groups(list(CASES), 4), ids=" ".join)
def test_every_layout_equals_the_unsharded_steps(names: Sequence[str], layout: str) -> None:
    run = check_steps(names, layout)
    if not GATHERS & set(names):
        assert not run.partitioned.diagnostics


MODEL = {"embedding": (16, 8), "kernel": (3, 8, 8), "matrix": (8, 12), "vector": (12,)}
MODEL_LAYOUTS = {
    "fsdp": {name: P(None, "data") if name == "kernel" else P("data") for name in MODEL},
    "both": {
        "embedding": P("tensor", "data"), "kernel": P(None, "data", "tensor"),
        "matrix": P("tensor", "data"), "vector": P("data"),
    },
}  # fmt: skip


def model_loss(params: Any, tokens: Any, labels: Any) -> Any:
    x = params["embedding"][tokens]
    x = jax.lax.conv_general_dilated(
        x, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    logits = jax.nn.relu(x) @ params["matrix"] + params["vector"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize(
    "layout, optimiser",
    [
        ("fsdp", optax.chain(
            optax.clip_by_global_norm(0.5),
            optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10), mu_dtype="bfloat16"),
        )),
        ("both", optax.adafactor(0.1, min_dim_size_to_factor=4)),
        ("both", contrib.muon(0.1)),
        pytest.param("fsdp", optax.lbfgs(), marks=pytest.mark.slow),
    ],
    ids=["adamw-fsdp", "adafactor-both", "muon-both", "lbfgs-fsdp"],
)  # fmt: skip
def test_training_of_a_model_equals_the_unsharded_one(layout: str, optimiser: Any) -> None:
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s, scale=0.5), "float32") for n, s in MODEL.items()}
    tokens, labels = rng.integers(0, 16, (4, 6)), rng.integers(0, 12, (4, 6))
    mesh, specs = make_mesh(data=2, tensor=4), MODEL_LAYOUTS[layout]
    optimiser = optax.with_extra_args_support(optimiser)

    def step(params: Any, state: Any, tokens: Any, labels: Any) -> Any:
        of = functools.partial(model_loss, tokens=tokens, labels=labels)
        value, grads = jax.value_and_grad(of)(params)
        updates, state = optimiser.update(
            grads, state, params, value=value, grad=grads, value_fn=of
        )
        return optax.apply_updates(params, updates), state, value

    state = optimiser.init(params)
    made = spmd.jit(optimiser.init, mesh=mesh, in_shardings=(specs,))(params)
    assert_same(made, state, 0)
    batch = (tokens, labels)
    follow(step, (params, made), batch, mesh, (specs, None, P("data"), P("data")), steps=3)
