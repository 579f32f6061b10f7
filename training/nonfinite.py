"""Steps whose loss or gradient is not finite: when a run ends because of them, and where the
values came from.

The step itself skips the update (`training.state.train_step`), so the state after a bad step has
the parameters from before it, and the step can be run again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from sharding.errors import Problem
from spmd.checking.finite import Watched
from spmd.checking.unsharded import options
from training.config import RunConfig
from training.data import Corpus, batch_at
from training.errors import DivergedError
from training.program import Plan
from training.state import TrainState, loss_and_gradients

__all__ = ["NonFinite", "first_bad_operation", "first_bad_tensor"]


class NonFinite:
    """Counts against the limit of a run, and looks for causes."""

    def __init__(self, plan: Plan, corpus: Corpus, console: Console):
        self._plan, self._corpus, self._console = plan, corpus, console
        self._found = ""

    def skipped(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        """A step was skipped.

        Args:
          values: what it returned.
          state: after it.

        Raises:
          DivergedError: as many in a row as the run allows.
        """
        run, in_a_row = self._plan.run, int(values["skipped"])
        if run.log.debug_nans and (in_a_row == 1 or not self._found):
            self._found = first_bad_operation(self._plan, *self._before(step, state))
            text = f"step {step}, operation by operation: {self._found}"
            self._console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
        if in_a_row < run.train.max_skipped:
            return
        found = self._found
        if not run.log.debug_nans:
            found = first_bad_tensor(self._plan, *self._before(step, state))
        raise DivergedError(_diverged(step, in_a_row, values, found, run.log.debug_nans))

    def _before(self, step: int, state: TrainState) -> tuple[TrainState, jax.Array]:
        """State and batch that step `step` began with."""
        run, sharding = self._plan.run, self._plan.state_shardings.step
        before = state.replace(step=jax.device_put(np.int32(step - 1), sharding))
        tokens, sequence = self._corpus.train, run.data.sequence
        batch = batch_at(tokens, run.train.seed, step - 1, run.train.batch, sequence)
        return before, self._plan.put(batch)


def first_bad_tensor(plan: Plan, state: TrainState, batch_BS: jax.Array) -> str:
    """Says which of parameters, optimiser state, loss, gradients and norm is the first that is not
    finite, with the number of such values; and the largest parameter."""
    shardings = (plan.state_shardings, plan.batch_sharding)
    counts, largest = plan.jit(partial(_bad_counts, plan.run), in_shardings=shardings)(
        state, batch_BS
    )
    like = {
        "parameter": state.params, "optimiser state": state.opt_state, "loss": np.zeros(()),
        "gradient of": state.params, "gradient norm": np.zeros(()),
    }  # fmt: skip
    for kind, tree in like.items():
        bad = [(name, n, x.size) for (name, x), n in zip(_named(tree), _numbers(counts[kind]),
                                                         strict=True) if n]  # fmt: skip
        if not bad:
            continue
        name, count, size = bad[0]
        text = f"the first bad tensor is the {f'{kind} {name}'.strip()}"
        text += f": {count:,.0f} of {size:,} values are not finite" if size > 1 else ""
        text += f"; so it is in {len(bad) - 1} more of its kind" if bad[1:] else ""
        if kind != "parameter":
            names = [name for name, _ in _named(state.params)]
            value, name = max(zip(_numbers(largest), names, strict=True))
            text += f"; parameters are finite, the largest is {value:.3g} in {name}"
        return text
    return "run again by itself, the step has no value that is not finite"


def first_bad_operation(plan: Plan, state: TrainState, batch_BS: jax.Array) -> str:
    """Says which operation of a step makes the first NaN or infinity, with its source line.

    The step is partitioned as it is in training. It takes some two or three times the memory.
    """
    shardings = (plan.state_shardings, plan.batch_sharding)
    traced = plan.jit(partial(_results, plan.run), in_shardings=shardings).trace(state, batch_BS)
    watched = Watched(traced.program)
    leaves = [*traced.captured, *jax.tree.leaves((state, batch_BS))]
    planned = plan.jit(lambda *inputs: watched(*inputs)).trace(*leaves).propagate().partition()
    planned.lower().compile(options())(*leaves)
    jax.effects_barrier()
    if not watched.told:
        return "the first process says which operation it was"
    found = watched.origin()
    return "run again by itself, every operation is finite" if found is None else str(found)


def _results(run: RunConfig, state: TrainState, batch_BS: jax.Array) -> tuple[Any, Any, Any]:
    loss, grads = loss_and_gradients(run, state, batch_BS)
    return loss, grads, optax.tree.norm(grads)


def _bad_counts(run: RunConfig, state: TrainState, batch_BS: jax.Array) -> tuple[Any, Any]:
    """By kind, in the order in which they come about, how many values of each leaf are not finite;
    and the largest magnitude in each parameter."""
    loss, grads, norm = _results(run, state, batch_BS)
    found = {
        "parameter": state.params, "optimiser state": state.opt_state, "loss": loss,
        "gradient of": grads, "gradient norm": norm,
    }  # fmt: skip
    counts = jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32), nn.unbox(found))
    return counts, jax.tree.map(lambda x: jnp.max(jnp.abs(x)), nn.unbox(state.params))


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with names like `layers/mlp/up`."""
    return [
        ("/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(tree))
    ]


def _numbers(tree: Any) -> list[float]:
    return [float(x) for x in jax.tree.leaves(tree)]


def _diverged(
    step: int, limit: int, values: Mapping[str, float], found: str, debugged: bool
) -> Problem:
    kind = "gradient norm" if math.isfinite(values["loss"]) else "loss"
    steps = f"in {limit} steps in a row, up to step {step}" if limit > 1 else f"in step {step}"
    fix = "use a lower --learning-rate or a longer --warmup, and start from a checkpoint"
    fix += "" if debugged else "; --debug-nans names the operation"
    return Problem(f"the {kind} was not finite {steps}", found, fix)
