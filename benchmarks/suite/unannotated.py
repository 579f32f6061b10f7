"""Models as flax users write them: arguments are sharded by a rule of thumb, nothing inside is.

    python -m benchmarks.suite --target cpu --programs benchmarks.suite.unannotated

The suite's own programs are annotated where an expert would. These are not: the batch lies over
`data`, parameters and the optimiser's state lie as the name says, and all else is inferred:

    _fsdp           every parameter along its largest dim that `data` divides
    _both           along the largest over `data`, along the next over `tensor`
    _zero1          parameters whole, the optimiser's state as in _fsdp
    _columns        Megatron's columns and rows over `tensor`
    _columns_fsdp   these, and the largest dim left over `data`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, Size, array, everywhere, normal
from benchmarks.suite.programs.optimizers import cross_entropy, training_case

VOCAB, HEADS = 256, 4


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm."""

    width: int
    masked: bool = True

    @nn.compact
    def __call__(self, x: Any, context: Any = None) -> Any:
        mask = nn.make_causal_mask(x[..., 0]) if self.masked else None
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(h, mask=mask)
        if context is not None:
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), context)
        h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(h)


class Gpt(nn.Module):
    """Learned positions, tied embeddings: tokens [batch, length] -> logits."""

    width: int
    layers: int = 2
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(VOCAB, self.width)
        places = self.param("places", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        x = embed(tokens) + places
        block = nn.remat(Block) if self.remat else Block
        for _ in range(self.layers):
            x = block(self.width)(x)
        return embed.attend(nn.LayerNorm()(x))


class _Scanned(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
        return Block(self.width)(x), None


class ScannedGpt(nn.Module):
    """The same with its layers in a loop, and a head of its own."""

    width: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(VOCAB, self.width)(tokens)
        loop = nn.scan(nn.remat(_Scanned), variable_axes={"params": 0},
                       split_rngs={"params": True}, length=3)  # fmt: skip
        x, _ = loop(self.width)(x, None)
        return nn.Dense(VOCAB)(nn.LayerNorm()(x))


def patches(images: Any, width: int) -> Any:
    """Of images [batch, h, w, 3] squares of 4 x 4, as [batch, patches, width]; for a module."""
    x = nn.Conv(width, (4, 4), strides=(4, 4))(images)
    return x.reshape(x.shape[0], -1, width)


class Vit(nn.Module):
    """Patches, a class token, position embeddings: images [batch, h, w, 3] -> logits."""

    width: int

    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = patches(images, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("places", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        for _ in range(2):
            x = Block(self.width, masked=False)(x)
        return nn.Dense(VOCAB)(nn.LayerNorm()(x)[:, 0])


class ResNet(nn.Module):
    """Residual convolutions with group norms: images [batch, h, w, 3] -> logits."""

    width: int

    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(self.width, (3, 3))(images)
        for stage in range(3):
            features = self.width << stage
            y = nn.Conv(features, (3, 3), strides=(2, 2))(nn.relu(nn.GroupNorm(4)(x)))
            y = nn.Conv(features, (3, 3))(nn.relu(nn.GroupNorm(4)(y)))
            x = nn.Conv(features, (1, 1), strides=(2, 2))(x) + y
        return nn.Dense(VOCAB)(x.mean((1, 2)))


class Translator(nn.Module):
    """An encoder and a decoder that reads it: tokens [batch, length] -> logits."""

    width: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(VOCAB, self.width)
        source, x = embed(tokens[:, ::-1]), embed(tokens)
        for _ in range(2):
            source = Block(self.width, masked=False)(source)
        for _ in range(2):
            x = Block(self.width)(x, source)
        return nn.Dense(VOCAB)(nn.LayerNorm()(x))


class Mixer(nn.Module):
    """Layers over tokens and over channels in turn: images [batch, h, w, 3] -> logits."""

    width: int

    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = patches(images, self.width)
        for _ in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(2 * x.shape[1])(y)))
            x = x + jnp.swapaxes(y, 1, 2)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(VOCAB)(x.mean(1))


class Gru(nn.Module):
    """Two recurrent layers: tokens [batch, length] -> logits."""

    width: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(VOCAB, self.width)(tokens)
        for _ in range(2):
            found: Any = nn.RNN(nn.GRUCell(self.width))(x)
            x = found
        return nn.Dense(VOCAB)(x)


class AutoEncoder(nn.Module):
    """Convolutions down and transposed ones up: images -> an error per example."""

    width: int

    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = images
        for features in (self.width, 2 * self.width):
            x = nn.relu(nn.Conv(features, (3, 3), strides=(2, 2))(x))
        shape = x.shape
        code = nn.Dense(2 * self.width)(x.reshape(shape[0], -1))
        mean, spread = jnp.split(code, 2, axis=-1)
        noise = jax.random.normal(jax.random.key(0), mean.shape, mean.dtype)
        x = nn.Dense(shape[1] * shape[2] * shape[3])(mean + jnp.exp(spread) * noise)
        x = x.reshape(shape)
        for features in (self.width, 3):
            x = nn.ConvTranspose(features, (3, 3), strides=(2, 2))(nn.relu(x))
        gap = jnp.square(x - images).sum((1, 2, 3))
        return gap + (jnp.square(mean) + jnp.exp(2 * spread) - 2 * spread).sum(-1)


# --- shardings ------------------------------------------------------------------------------------


def largest(path: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> P:
    """The largest dim over `data`, and the next over `tensor` if there is one; vectors whole."""
    order = sorted(range(len(shape)), key=lambda d: (-shape[d], d))
    placed: dict[int, str] = {}
    for axis, size in mesh.items():
        fits = [d for d in order if d not in placed and shape[d] % size == 0 and shape[d] > size]
        if fits and len(shape) > 1:
            placed[fits[0]] = axis
    return P(*(placed.get(d) for d in range(len(shape))))


def columns(path: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> P:
    """As Megatron has it: what widens over `tensor` by columns, what narrows by rows."""
    last = len(shape) - 1
    if not path.endswith("['kernel']") or last < 1:
        return P()
    if "MultiHead" in path:  # heads: [width, heads, head] and [heads, head, width]
        return P("tensor") if "['out']" in path else P(None, "tensor")
    widens = shape[last] > shape[last - 1] or "Dense_0" in path
    return P(*(None,) * (last if widens else last - 1), "tensor")


def columns_fsdp(path: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> P:
    """So, and of what is left the largest dim over `data`."""
    spec = columns(path, shape, mesh)
    dims = [*spec, *(None,) * (len(shape) - len(spec))]
    free = [d for d, axis in enumerate(dims) if axis is None and shape[d] % mesh["data"] == 0]
    if free and len(shape) > 1:
        dims[max(free, key=lambda d: shape[d])] = "data"
    return P(*dims)


def whole_params(case: Case) -> Case:
    """ZeRO-1: the optimiser's state stays where it is, parameters are whole on every device."""
    whole = everywhere(case.args[0])
    return dataclasses.replace(
        case, in_specs=(whole, *case.in_specs[1:]), out_specs=(whole, *case.out_specs[1:])
    )


Placing = Callable[[str, tuple[int, ...], Mapping[str, int]], P]


def _model(
    module: Callable[[int], nn.Module], images: bool, mesh: Mapping[str, int], place: Placing,
    change: Callable[[Case], Case] = lambda case: case,
) -> Callable[[Size], Case]:  # fmt: skip
    def make(size: Size) -> Case:
        width, batch, length = size.pick((64, 16, 32), (1024, 64, 512))
        axes = {**mesh, "data": size.devices // mesh.get("tensor", 1)}
        inputs = (batch, 32, 32, 3) if images else (batch, length)
        shape = array(*inputs, dtype=size.dtype if images else jnp.int32)
        labels = array(*inputs[: 1 if images else 2], dtype=jnp.int32)
        model = module(width)
        found = jax.eval_shape(model.init, jax.random.key(0), shape)
        params = jax.tree.map(lambda a: array(*a.shape, dtype=size.dtype), found)
        specs = jax.tree_util.tree_map_with_path(
            lambda path, leaf: place(jax.tree_util.keystr(path), leaf.shape, axes), params
        )

        def loss(params: Any, x: Any, labels: Any) -> Any:
            out: Any = model.apply(params, x)
            return out.mean() if out.ndim == 1 else cross_entropy(out, labels)

        def values(rng: np.random.Generator) -> tuple[Any, ...]:
            tokens = rng.integers(0, VOCAB, inputs, dtype=np.int32)
            drawn = normal(rng, inputs, size.dtype) if images else tokens
            return drawn, rng.integers(0, VOCAB, labels.shape, dtype=np.int32)

        return change(training_case(
            loss, optax.adamw(1e-3), params, specs, (shape, labels), (P("data"), P("data")),
            mesh=axes, batch_values=values,
        ))  # fmt: skip

    return make


_ONE, _TWO = {"data": 8}, {"data": 4, "tensor": 2}
_KINDS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "gpt": (Gpt, False),
    "gpt_remat": (lambda width: Gpt(width, remat=True), False),
    "gpt_scanned": (ScannedGpt, False),
    "vit": (Vit, True),
    "resnet": (ResNet, True),
    "translator": (Translator, False),
    "mixer": (Mixer, True),
    "gru": (Gru, False),
    "autoencoder": (AutoEncoder, True),
}
_LAYERED = ("gpt", "vit", "translator", "mixer")

PROGRAMS = (
    *(Program(f"{name}_fsdp", "largest dims over data", _model(*kind, _ONE, largest))
      for name, kind in _KINDS.items()),
    *(Program(f"{name}_both", "largest dims over data and tensor", _model(*kind, _TWO, largest))
      for name, kind in _KINDS.items()),
    *(Program(f"{name}_zero1", "state sharded, parameters whole",
              _model(*_KINDS[name], _ONE, largest, whole_params)) for name in _LAYERED),
    *(Program(f"{name}_columns", "columns and rows over tensor",
              _model(*_KINDS[name], _TWO, columns)) for name in _LAYERED),
    *(Program(f"{name}_columns_fsdp", "columns and rows over tensor, the rest over data",
              _model(*_KINDS[name], _TWO, columns_fsdp)) for name in _LAYERED),
)  # fmt: skip
