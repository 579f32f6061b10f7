"""Every loss and projection of optax, and functions around them, with sharded arguments.

Values and gradients are those of the unsharded function. The batch is sharded, or the classes.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import losses, projections, tree_utils

from tests.e2e.follow import check_group
from tests.oracle import P

B, C = 8, 12


class Case(NamedTuple):
    """A function, what it is differentiated by, and what else it takes."""

    fun: Callable
    given: Sequence[Any]
    rest: Sequence[Any] = ()


def real(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def shares(*shape: int, seed: int = 1) -> np.ndarray:
    e = np.exp(real(*shape, seed=seed))
    return e / e.sum(-1, keepdims=True)


def ids(*shape: int, n: int = C) -> np.ndarray:
    return np.random.default_rng(n).integers(0, n, shape).astype(np.int32)


def signs(*shape: int) -> np.ndarray:
    return np.sign(real(*shape, seed=2))


def bits(*shape: int) -> np.ndarray:
    return (real(*shape, seed=3) > 0).astype(np.float32)


def _pair(fun: Callable, **kwargs: Any) -> Case:
    """Of two arrays of one shape."""
    return Case(lambda x, y: fun(x, y, **kwargs), (real(B, C), real(B, C, seed=4)))


def _logits(fun: Callable, targets: Any, **kwargs: Any) -> Case:
    return Case(lambda x, y: fun(x, y, **kwargs), (real(B, C),), (targets,))


def _logs(fun: Callable, targets: Any, **kwargs: Any) -> Case:
    return Case(lambda x, y: fun(x, y, **kwargs), (np.log(shares(B, C, seed=5)),), (targets,))


def _ctc(fun: Callable) -> Case:
    pads = (np.arange(6) >= 5) * np.ones((B, 1))
    label_pads = (np.arange(3) >= 2) * np.ones((B, 1))
    return Case(
        fun, (real(B, 6, C),), (pads.astype("f4"), 1 + ids(B, 3, n=C - 1), label_pads.astype("f4"))
    )


WHERE = np.tile(np.arange(C) % 5 > 0, (B, 1))
LOSSES: dict[str, Case] = {
    "binary_dice_loss": _logits(losses.binary_dice_loss, bits(B, C)),
    "convex_kl_divergence": _logs(losses.convex_kl_divergence, shares(B, C)),
    "cosine_distance": _pair(losses.cosine_distance, epsilon=1e-3),
    "cosine_similarity": _pair(losses.cosine_similarity, epsilon=1e-3),
    "ctc_loss": _ctc(losses.ctc_loss),
    "ctc_loss_with_forward_probs": _ctc(losses.ctc_loss_with_forward_probs),
    "dice_loss": Case(losses.dice_loss, (real(B, 3, 5, C),), (shares(B, 3, 5, C),)),
    "generalized_kl_divergence": _logs(losses.generalized_kl_divergence, shares(B, C)),
    "hinge_loss": _logits(losses.hinge_loss, signs(B, C)),
    "huber_loss": _pair(losses.huber_loss, delta=0.5),
    "kl_divergence": _logs(losses.kl_divergence, shares(B, C), where=WHERE),
    "kl_divergence_with_log_targets": _logs(
        losses.kl_divergence_with_log_targets, np.log(shares(B, C))
    ),
    "l2_loss": _pair(losses.l2_loss),
    "log_cosh": _pair(losses.log_cosh),
    "make_fenchel_young_loss": _logits(
        losses.make_fenchel_young_loss(jax.nn.logsumexp), shares(B, C)
    ),
    "multiclass_generalized_dice_loss": Case(
        losses.multiclass_generalized_dice_loss, (real(B, 3, 5, C),), (shares(B, 3, 5, C),)
    ),
    "multiclass_hinge_loss": _logits(losses.multiclass_hinge_loss, ids(B)),
    "multiclass_perceptron_loss": _logits(losses.multiclass_perceptron_loss, ids(B)),
    "multiclass_sparsemax_loss": _logits(losses.multiclass_sparsemax_loss, ids(B)),
    "ntxent": Case(losses.ntxent, (real(B, C),), (ids(B, n=3),)),
    "perceptron_loss": _logits(losses.perceptron_loss, signs(B, C)),
    "poly_loss_cross_entropy": _logits(losses.poly_loss_cross_entropy, shares(B, C)),
    "ranking_softmax_loss": _logits(
        losses.ranking_softmax_loss,
        shares(B, C),
        weights=shares(B, C, seed=6),
        where=WHERE,
    ),
    "safe_softmax_cross_entropy": _logits(losses.safe_softmax_cross_entropy, shares(B, C)),
    "sigmoid_binary_cross_entropy": _logits(losses.sigmoid_binary_cross_entropy, bits(B, C)),
    "sigmoid_focal_loss": _logits(losses.sigmoid_focal_loss, bits(B, C), alpha=0.25),
    "smooth_labels": Case(lambda x: losses.smooth_labels(x, 0.1), (shares(B, C),)),
    "softmax_cross_entropy": _logits(losses.softmax_cross_entropy, shares(B, C), where=WHERE),
    "softmax_cross_entropy_with_integer_labels": _logits(
        losses.softmax_cross_entropy_with_integer_labels, ids(B)
    ),
    "sparsemax_loss": _logits(losses.sparsemax_loss, bits(B, C)),
    "squared_error": _pair(losses.squared_error),
    "triplet_margin_loss": Case(
        losses.triplet_margin_loss, [real(B, C, seed=seed) for seed in (7, 8, 9)]
    ),
}
TREE = {"a": real(B, C), "b": real(C)}
OTHER_TREE = {"a": real(B, C, seed=1), "b": real(C, seed=1)}
SHIFTED = jax.tree.map(lambda x: x / 2 - 0.3, OTHER_TREE)
PROJECTIONS: dict[str, Case] = {
    "projection_hypercube": Case(projections.projection_hypercube, (real(B, C),)),
    "projection_box": Case(
        lambda x: projections.projection_box(x, SHIFTED, jax.tree.map(lambda y: y + 1, SHIFTED)),
        (TREE,),
    ),
    "projection_halfspace": Case(
        lambda x, a: projections.projection_halfspace(x, a, 0.5), (TREE, OTHER_TREE)
    ),
    "projection_hyperplane": Case(
        lambda x, a: projections.projection_hyperplane(x, a, 0.5), (TREE, OTHER_TREE)
    ),
    "projection_vector": Case(projections.projection_vector, (TREE, OTHER_TREE)),
}
for name in ("l1_ball", "l1_sphere", "l2_ball", "l2_sphere", "linf_ball",
             "non_negative", "simplex"):  # fmt: skip
    PROJECTIONS[f"projection_{name}"] = Case(getattr(projections, f"projection_{name}"), (TREE,))


def _tree_utilities(x: Any, y: Any, key: Any) -> Any:
    scaled = tree_utils.tree_add_scale(x, 0.5, tree_utils.tree_mul(x, y))
    noise = tree_utils.tree_random_like(key, x)
    sums = [tree_utils.tree_norm(x, ord=o) for o in (1, 2, "inf")]
    sums += [tree_utils.tree_sum(y), tree_utils.tree_vdot(x, y), tree_utils.tree_max(scaled)]
    chosen = tree_utils.tree_where(sums[0] > 1, tree_utils.tree_clip(scaled, -1, 1), y)
    moment = tree_utils.tree_update_infinity_moment(x, y, 0.9, 1e-6)
    return chosen, noise, sums, tree_utils.tree_bias_correction(moment, 0.9, 3)


def _microbatched(x: Any) -> Any:
    return optax.microbatch(lambda rows: jnp.sum(jnp.tanh(rows), 0), 0, 2)(x)


def _periodic(new: Any, old: Any) -> Any:
    averaged = optax.incremental_update(new, old, 0.1)
    return optax.periodic_update(new, averaged, jnp.asarray(4, jnp.int32), 2)


def _roots(x: Any) -> Any:
    spd = x @ x.T + jnp.eye(B)
    root, _ = optax.matrix_inverse_pth_root(spd, 4)
    return root, optax.power_iteration(spd, v0=jnp.ones(B))


def _pick(key: Any, x: Any) -> Any:
    def best(scores: Any) -> Any:
        return jax.nn.one_hot(jnp.argmax(scores, -1), C)

    return optax.perturbations.make_perturbed_fun(best, num_samples=16)(key, x)


KEY = jax.random.key(0)
FUNCTIONS: dict[str, Case] = {
    "hungarian_algorithm": Case(optax.assignment.hungarian_algorithm, (), (real(B, C),)),
    "matrix_inverse_pth_root": Case(_roots, (), (real(B, C),)),
    "microbatch": Case(_microbatched, (real(B, C),)),
    "nnls": Case(lambda a, b: optax.nnls(a, b, 5), (real(B, C), real(B, seed=1))),
    "per_example_clip": Case(
        lambda x: (
            optax.per_example_global_norm_clip(x, 1.0), optax.per_example_layer_norm_clip(x, 1.0)
        ),
        (), ([real(B, C), real(B, 3)],),
    ),
    "periodic_update": Case(_periodic, (TREE, OTHER_TREE)),
    "perturbations": Case(lambda x, key: _pick(key, x), (real(B, C),), (KEY,)),
    "safe_norm": Case(
        lambda x: (optax.safe_norm(x, 1e-3, axis=-1), optax.safe_root_mean_squares(x, 1e-3)),
        (real(B, C),),
    ),
    "tree_utils": Case(_tree_utilities, (TREE, OTHER_TREE), (KEY,)),
}  # fmt: skip


def public(module: Any) -> set[str]:
    found = {n: getattr(module, n) for n in dir(module) if not n.startswith("_")}
    return {n for n, f in found.items() if inspect.isfunction(f) or hasattr(f, "lower")}


def test_no_loss_or_projection_is_left_out() -> None:
    assert public(losses) == set(LOSSES)
    assert public(projections) == set(PROJECTIONS)


def place(layout: str, x: Any) -> P:
    """The first dim over `data`, or the last one (the classes) over `tensor`."""
    shape = np.shape(x)
    spec: list[str | None] = [None] * len(shape)
    if layout == "batch" and shape and shape[0] % 2 == 0:
        spec[0] = "data"
    if layout == "classes" and shape and shape[-1] == C:
        spec[-1] = "tensor"
    return P(*spec)


ALL = {**LOSSES, **PROJECTIONS, **FUNCTIONS}
NAMES = list(ALL)
GROUPS = [NAMES[i : i + 10] for i in range(0, len(NAMES), 10)]


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("layout", ["batch", "classes"])
@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_values_and_gradients_equal_the_unsharded_ones(names: list[str], layout: str) -> None:
    check_group({n: ALL[n] for n in names}, lambda x: place(layout, x))
