"""What a run carries from step to step, and the step itself, written for one device.

Shape suffixes: B batch, S position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from models.loss import cross_entropy
from models.transformer import Transformer, TransformerConfig
from sharding import shard
from training.config import OptimizerConfig, RunConfig

__all__ = ["TrainState", "evaluate", "init_state", "learning_rate", "make_optimizer", "train_step"]


class TrainState(struct.PyTreeNode):
    """All that the next step depends on, besides its batch.

    Attributes:
      step: int32 scalar, the number of steps done; with the seed it is the position in the data.
      params: the parameters, in the boxes that carry their logical dim names.
      opt_state: of the optimiser, boxed likewise.
      key: key data of the random stream; step n draws from `fold_in(key, n)`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The learning rate at each step: a linear rise, then a cosine down to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=int(config.warmup * steps),
        decay_steps=steps,
        end_value=config.learning_rate / 10,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on gradients clipped by their global norm; norm scales do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=_decays,
        ),
    )


def init_state(run: RunConfig, seed: jax.Array) -> TrainState:
    """The state before the first step, a function of `seed` (int32 scalar) alone."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    tokens_BS = jnp.zeros((1, 8), jnp.int32)
    params = Transformer(run.model).init(init_key, tokens_BS)["params"]
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(run_key),
    )


def train_step(
    run: RunConfig, state: TrainState, batch_BS: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      batch_BS: token ids [batch, sequence + 1]; each position predicts the next.

    Returns:
      The next state, and float32 scalars: "loss" in nats per token, and "grad_norm".
    """
    batch_BS = shard(batch_BS, "batch", None)
    drop_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    def loss_of(params: Any) -> jax.Array:
        return _loss(run.model, params, batch_BS, drop_key)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def evaluate(run: RunConfig, params: Any, batch_BS: jax.Array) -> jax.Array:
    """The loss on one batch without dropout, in nats per token."""
    return _loss(run.model, params, shard(batch_BS, "batch", None), None)


def _loss(
    model: TransformerConfig, params: Any, batch_BS: jax.Array, drop_key: jax.Array | None
) -> jax.Array:
    rngs = {} if drop_key is None else {"dropout": drop_key}
    inputs_BS, targets_BS = batch_BS[:, :-1], batch_BS[:, 1:]
    logits_BSV, _ = Transformer(model).apply(
        {"params": params}, inputs_BS, train=drop_key is not None, rngs=rngs
    )
    return cross_entropy(logits_BSV, targets_BS)


def _decays(params: Any) -> Any:
    def decays(path: tuple, _: Any) -> bool:
        return "scale" not in jax.tree_util.keystr(path)

    # The boxes stay, so that the mask has the structure of what it masks.
    return jax.tree_util.tree_map_with_path(decays, params)
