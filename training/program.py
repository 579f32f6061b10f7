"""From a configuration to compiled programs: plan first (nothing is compiled), then build.

Parameters are created in place: the step's inferred input shardings are the output shardings of
the program that creates them, so no device ever holds more than its part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

import spmd
from models.shardings import Rules, rules_for
from training.config import RunConfig
from training.data import Batch
from training.state import TrainState, evaluate, init_state, train_step

__all__ = ["Plan", "plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step that is partitioned but not compiled.

    Attributes:
      run: the configuration, with nothing left to resolve.
      mesh: of devices.
      rules: what logical dim names mean on the mesh.
      state: the training state as shapes and dtypes.
      state_shardings: one `NamedSharding` for each leaf of `state`.
      batch_sharding: of the [batch, sequence + 1] token ids.
      partitioned: the step, with its `collectives` and its `peak_memory`.
    """

    run: RunConfig
    mesh: Mesh
    rules: Rules
    state: TrainState
    state_shardings: TrainState
    batch_sharding: NamedSharding
    partitioned: Any

    def compile_step(self) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict]]:
        """The compiled training step; it consumes the state that it is given."""
        return self.partitioned.lower().compile()

    def compile_evaluate(self) -> Callable[[Any, jax.Array], jax.Array]:
        """The compiled validation loss of (parameters, batch)."""
        function = self.jit(
            partial(evaluate, self.run),
            in_shardings=(self.state_shardings.params, self.batch_sharding),
        )
        traced = function.trace(self.state.params, _batch_shape(self.run))
        return traced.propagate().partition().lower().compile()

    def init(self) -> TrainState:
        """The state before the first step, created where it stays."""
        function = self.jit(partial(init_state, self.run), out_shardings=self.state_shardings)
        return function(np.uint32(self.run.train.seed))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings: what a checkpoint is restored to."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.state,
            self.state_shardings,
        )

    def put(self, batch: Batch | np.ndarray) -> jax.Array:
        """A batch on the devices that read it.

        Args:
          batch: the same in every process. Of a `Batch` each reads the rows of its own devices.

        Raises:
          DataError: see `training.token_files.Tokens.take`.
        """
        read: dict[tuple, np.ndarray] = {}  # several devices may hold the same rows

        def part(index: Any) -> np.ndarray:
            key = tuple((one.start, one.stop) for one in index)
            if key not in read:
                read[key] = batch[index]
            return read[key]

        return jax.make_array_from_callback(batch.shape, self.batch_sharding, part)

    def jit(self, function: Callable, **options: Any) -> Any:
        """`spmd.jit` with this plan's mesh and rules."""
        return spmd.jit(function, mesh=self.mesh, axis_rules=self.rules, **options)


def plan(run: RunConfig, mesh: Mesh) -> Plan:
    """Infers the sharding of everything, and partitions the training step. Compiles nothing."""
    rules = rules_for(run.mesh.parallelism, mesh.axis_names)
    seed = jax.ShapeDtypeStruct((), np.uint32)
    state = jax.eval_shape(partial(init_state, run), seed)
    batch = _batch_shape(run)
    function = partial(train_step, run)
    inferred = spmd.jit(function, mesh=mesh, axis_rules=rules).trace(state, batch).propagate()
    state_shardings, batch_sharding = inferred.in_shardings
    # The state leaves a step as it entered, so that steps chain without moving anything.
    step = spmd.jit(
        function,
        mesh=mesh,
        axis_rules=rules,
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, None),
        donate_argnums=(0,),
        memory_limit=int(run.mesh.memory_limit * 2**30) or None,
    )
    partitioned = step.trace(state, batch).propagate().partition()
    return Plan(run, mesh, rules, state, state_shardings, batch_sharding, partitioned)


def _batch_shape(run: RunConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((run.train.batch, run.data.sequence + 1), np.int32)
