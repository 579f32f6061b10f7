"""What a run carries from step to step, and the step itself, written for one device.

Shape suffixes: B batch, S position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from models.loss import cross_entropy
from models.transformer import Transformer, TransformerConfig
from sharding import shard
from training.config import OptimizerConfig, RunConfig

__all__ = [
    "TrainState",
    "evaluate",
    "init_state",
    "learning_rate",
    "loss_and_gradients",
    "make_optimizer",
    "train_step",
]


class TrainState(struct.PyTreeNode):
    """All that the next step depends on, besides its batch.

    Attributes:
      step: int32 scalar, the number of steps done; with the seed it is the position in the data.
      params: the parameters, in the boxes that carry their logical dim names.
      opt_state: of the optimiser, boxed likewise.
      key: key data of the random stream; step n draws from `fold_in(key, n)`.
      skipped: int32 scalar, how many steps in a row, up to this one, were not finite and changed
        neither parameters nor optimiser.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    skipped: jax.Array


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
        skipped=jnp.zeros((), jnp.int32),
    )


def train_step(
    run: RunConfig, state: TrainState, batch_BS: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; none where the loss or the gradient is not finite.

    Args:
      batch_BS: token ids [batch, sequence + 1]; each position predicts the next.

    Returns:
      The next state, and scalars: float32 "loss" in nats per token, "grad_norm" and
      "learning_rate"; int32 "skipped" of the next state.
    """
    loss, grads = loss_and_gradients(run, state, batch_BS)
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    grad_norm = optax.tree.norm(grads)
    # Both are there already and whole on every device, so the guard asks for no communication.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, opt_state = jax.tree.map(
        partial(jnp.where, finite),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    # Not `state.step`: the schedule waits while steps are skipped.
    rate = learning_rate(run.optimizer, run.train.steps)(_updates_done(state.opt_state))
    metrics = {
        "loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "skipped": skipped,
    }  # fmt: skip
    return state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, skipped=skipped
    ), metrics


def loss_and_gradients(
    run: RunConfig, state: TrainState, batch_BS: jax.Array
) -> tuple[jax.Array, Any]:
    """The loss of a step in nats per token, and its gradient by the parameters."""
    batch_BS = shard(batch_BS, "batch", None)
    drop_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    def loss_of(params: Any) -> jax.Array:
        return _loss(run.model, params, batch_BS, drop_key)

    return jax.value_and_grad(loss_of)(state.params)


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


def _updates_done(opt_state: Any) -> jax.Array:
    """The optimiser's own count, int32 scalar."""
    [(_, count), *_] = optax.tree.get_all_with_path(opt_state, "count")
    return count


def _decays(params: Any) -> Any:
    def decays(path: tuple, _: Any) -> bool:
        return "scale" not in jax.tree_util.keystr(path)

    # The boxes stay, so that the mask has the structure of what it masks.
    return jax.tree_util.tree_map_with_path(decays, params)
