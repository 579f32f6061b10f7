"""The options of a run, one dataclass for each component that owns them.

A field is at once the attribute, the command-line flag (`--num-layers`), the TOML key
(`num_layers`) and its help text. Nothing here needs JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from models.transformer import TransformerConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "MeshConfig",
    "OptimizerConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "owners",
]


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the help text and the choices of its flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Which devices, and how the program is laid out over them."""

    devices: int = option(8, "CPU devices to simulate where there is no accelerator")
    mesh: str = option("", "axis sizes, e.g. data=2,tensor=4; one may be -1; default: to fit")
    parallelism: str = option(
        "fsdp+tensor", "tables of models/shardings.py, joined by +, e.g. fsdp+tensor_sequence"
    )
    aot: str = option(
        "", "compile the step for this TPU topology, e.g. v5p:4x4x4, without a TPU, and stop"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text that is learnt."""

    data: str = option("", "a file or a folder; default: Python's own standard library")
    pattern: str = option("*.py", "the files of a folder that are read")
    validation: float = option(0.05, "share of the text held out for validation")
    sequence: int = option(128, "bytes per training example")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warm-up and a cosine decay to a tenth of the learning rate."""

    learning_rate: float = option(6e-3, "highest learning rate")
    warmup: float = option(0.1, "share of the steps over which the learning rate rises")
    weight_decay: float = option(0.05, "per step and learning rate, norms left out")
    clip_norm: float = option(1.0, "longest gradient, over all parameters together")
    beta1: float = option(0.9, "decay of the mean gradient")
    beta2: float = option(0.98, "decay of the mean squared gradient")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    batch: int = option(16, "examples per step, over all devices together")
    steps: int = option(400, "steps in all, those before a resume included")
    seed: int = option(0, "of the parameters, the batches and dropout")
    eval_every: int = option(100, "steps between validations; there is always one at the end")
    eval_batches: int = option(8, "batches per validation")
    log_every: int = option(10, "steps between lines of the log")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where the state is kept, and whether a run starts from it."""

    checkpoint_dir: str = option("", "default: a new folder runs/<date>-<time>, made by the run")
    checkpoint_every: int = option(100, "steps between checkpoints; 0: at the end only")
    keep: int = option(3, "newest checkpoints that are kept")
    resume: str = option(
        "auto", "start from a checkpoint if there is one", ("auto", "must", "never")
    )
    elastic: bool = option(
        False, "go on with more or fewer devices than wrote the checkpoint, on a mesh that fits"
    )
    save_failures: int = option(3, "failed saves in a row that end the run")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text generated at the end."""

    sample_bytes: int = option(160, "bytes to generate; 0 for none")
    prompt: str = option("def ", "the text that is continued")
    temperature: float = option(0.8, "0 takes the likeliest byte; 1 draws from the model")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One instance of each component's options."""

    mesh: MeshConfig = MeshConfig()
    model: TransformerConfig = TransformerConfig(dtype="auto")
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()


# The model reads bytes, so this one is no option.
_FIXED = frozenset({"vocab_size"})


def owners(run: RunConfig) -> dict[str, tuple[str, dataclasses.Field]]:
    """Option name -> (component of `RunConfig` that owns it, its field)."""
    return {
        field.name: (component.name, field)
        for component in dataclasses.fields(run)
        for field in dataclasses.fields(getattr(run, component.name))
        if field.name not in _FIXED
    }
