"""Rematerialisation under every policy: what is saved, offloaded and computed again stays so."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import spmd
from tests.oracle import P, check, kinds, make_mesh


def arr(*shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape)).normal(size=shape) * 0.5).astype(np.float32)


policies = jax.checkpoint_policies
POLICIES: dict[str, Any] = {
    "default": None,
    "everything": policies.everything_saveable,
    "nothing": policies.nothing_saveable,
    "dots": policies.dots_saveable,
    "no batch dims": policies.dots_with_no_batch_dims_saveable,
    "names": policies.save_only_these_names("h"),
    "other names": policies.save_anything_except_these_names("h"),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["g"], names_which_can_be_offloaded=["h"],
        offload_src="device", offload_dst="pinned_host",
    ),
    "offload dots": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "both": policies.save_from_both_policies(
        policies.dots_saveable, policies.save_only_these_names("h")
    ),
}  # fmt: skip


def rematted(policy: Any, **options: Any) -> Callable:
    @partial(jax.checkpoint, policy=policy, **options)
    def layer(w: Any, x: Any) -> Any:
        h = checkpoint_name(jnp.sin(x @ w), "h")
        return checkpoint_name(jnp.cos(h @ w.T), "g") @ w

    return jax.value_and_grad(lambda w, x: (layer(w, layer(w, x)) ** 2).sum())


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_recomputes_what_jax_does(policy: str) -> None:
    """Values, and as many products, sines and cosines as without shards, behind as many barriers:
    XLA cannot merge the recomputation with the forward pass."""
    f, args, mesh = rematted(POLICIES[policy]), (arr(8, 8), arr(4, 8)), make_mesh(x=2, y=4)
    check(f, args, mesh, (P(None, "y"), P("x")))
    options = {"disable_passes": ["keep_products"]}  # it has barriers of its own
    function = spmd.jit(f, mesh=mesh, in_shardings=(P(), P("x")), **options)
    ours, theirs = function.lower(*args).as_text(), jax.jit(f).lower(*args).as_text()
    for operation in ("dot_general", "sine", "cosine", "optimization_barrier"):
        text = f"stablehlo.{operation} "
        assert ours.count(text) == theirs.count(text) > 0, operation


def test_remat_keeps_flags_per_operand() -> None:
    f = rematted(None, prevent_cse=(True, False))
    made = check(f, (arr(8, 8), arr(4, 8)), make_mesh(x=2, y=4), (P(None, "y"), P("x")))
    assert "prevent_cse=(True, " in str(made.jaxpr)


def test_offloaded_residuals_go_to_the_host_and_back() -> None:
    f, args = rematted(POLICIES["offload"]), (arr(8, 8), arr(4, 8))
    text = str(check(f, args, make_mesh(x=2, y=4), (P(None, "y"), P("x"))).jaxpr)
    assert text.count("MemorySpace.Host") == text.count("MemorySpace.Device") == 2


def test_memory_of_several_arrays_at_once() -> None:
    host, device = jax.memory.Space.Host, jax.memory.Space.Device

    def f(a: Any, b: Any) -> Any:
        kept = jax.device_put({"a": a, "b": b}, host)
        back = jax.device_put(kept, device)
        return back["a"] @ back["b"]

    made = check(f, (arr(8, 6), arr(6, 4)), make_mesh(x=2, y=4), (P("x"), P(None, "y")))
    assert kinds(made) == {}
    assert str(made.jaxpr).count("MemorySpace.Host") == 2
