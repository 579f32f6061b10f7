"""What the transformer's logical dim names mean on a mesh, for each kind of parallelism.

These tables are all that changes between one kind of parallelism and another: the model, the
loss and the training step stay as they are. A name without a row is not sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd, prod

from models.transformer import TransformerConfig

__all__ = [
    "DIMS",
    "PARALLELISMS",
    "Rules",
    "components",
    "default_mesh",
    "dim_sizes",
    "required_axes",
    "rules_for",
    "shards",
]

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Every name in models/transformer.py.
DIMS = (
    # of every activation, and of the input
    "batch",
    # of parameters
    *("layers", "vocab", "embed", "norm", "kv_heads", "head_groups", "head_dim", "mlp"),
    # of the residual stream, between the sub-layers
    *("residual_sequence", "residual_embed"),
    # inside a sub-layer
    *("sequence", "activation_embed"),
    # of the logits, and of the cache
    *("activation_vocab", "cache_sequence"),
)

_BATCH: Rules = (("batch", ("data", "fsdp")),)

# Megatron: heads and hidden units are divided, so each sub-layer needs one all-reduce.
_TENSOR: Rules = (
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("activation_vocab", "tensor"),
)

PARALLELISMS: dict[str, Rules] = {
    # Replicated parameters; the gradients are all-reduced.
    "data": _BATCH,
    # ZeRO-3: every parameter is sharded, gathered where it is used, its gradient scattered.
    "fsdp": (*_BATCH, ("embed", "fsdp"), ("norm", "fsdp")),
    "tensor": (*_BATCH, *_TENSOR),
    # Between sub-layers the positions are divided: the all-reduces become all-gather and
    # reduce-scatter, and the norms and the saved residual stream take 1/tensor of the memory.
    "tensor_sequence": (*_BATCH, *_TENSOR, ("residual_sequence", "tensor")),
    # GSPMD's 2D sharding in its finalised form: weights on both mesh axes, activations with the
    # batch on the first and the model dims on the second.
    "2d": (
        *_BATCH,
        *_TENSOR,
        ("embed", ("data", "fsdp")),
        ("norm", ("data", "fsdp")),
        ("residual_embed", "tensor"),
        ("activation_embed", "tensor"),
    ),
}

# Each inner tuple is a choice: the mesh needs at least one of its axes.
_REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "data": (("data", "fsdp"),),
    "fsdp": (("fsdp",),),
    "tensor": (("tensor",),),
    "tensor_sequence": (("tensor",),),
    "2d": (("data", "fsdp"), ("tensor",)),
}


def components(parallelism: str) -> tuple[str, ...]:
    """The tables a name such as "fsdp+tensor" mixes; the first table wins where they differ."""
    return tuple(part.strip() for part in parallelism.split("+"))


def rules_for(parallelism: str, mesh_axes: Iterable[str]) -> Rules:
    """Axis rules for `spmd.jit`: each dim with the axes of `parallelism` that the mesh has.

    Raises:
      KeyError: a component of `parallelism` has no table.
    """
    present = set(mesh_axes)
    rules: dict[str, str | tuple[str, ...] | None] = {}
    for name, axes in (rule for part in components(parallelism) for rule in PARALLELISMS[part]):
        wanted = (axes,) if isinstance(axes, str) else axes or ()
        kept = tuple(axis for axis in wanted if axis in present)
        if kept and name not in rules:
            rules[name] = kept[0] if len(kept) == 1 else kept
    return tuple((name, rules.get(name)) for name in DIMS)


def required_axes(parallelism: str) -> tuple[tuple[str, ...], ...]:
    """For each need of `parallelism` the mesh axes of which one must be there."""
    return tuple(need for part in components(parallelism) for need in _REQUIRED[part])


def default_mesh(parallelism: str, devices: int, config: TransformerConfig) -> dict[str, int]:
    """Axis sizes for `devices`: as many on `tensor` as divide the heads, the rest on the batch."""
    mesh: dict[str, int] = {}
    needs = [axis for need in required_axes(parallelism) for axis in need]
    tensor = gcd(devices, config.num_kv_heads) if "tensor" in needs else 1
    batch_axis = "fsdp" if "fsdp" in components(parallelism) else "data"
    if batch_axis in needs or tensor < devices:
        mesh[batch_axis] = devices // tensor
    if "tensor" in needs:
        mesh["tensor"] = tensor
    return mesh


def dim_sizes(config: TransformerConfig, batch: int, sequence: int) -> Mapping[str, int]:
    """The size of each logical dim that a table can shard."""
    return {
        "batch": batch,
        "residual_sequence": sequence,
        "vocab": config.vocab_size,
        "activation_vocab": config.vocab_size,
        "embed": config.embed_dim,
        "norm": config.embed_dim,
        "residual_embed": config.embed_dim,
        "activation_embed": config.embed_dim,
        "kv_heads": config.num_kv_heads,
        "mlp": config.mlp_dim,
    }


def shards(axes: str | tuple[str, ...] | None, mesh: Mapping[str, int]) -> int:
    """How many parts the mesh axes of one rule make."""
    return prod(mesh[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
