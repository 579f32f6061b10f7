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
    "LogConfig",
    "MeshConfig",
    "OptimizerConfig",
    "ProcessConfig",
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

    devices: int = option(
        8, "CPU devices to simulate where there is no accelerator, over all processes together"
    )
    mesh: str = option(
        "",
        "axis sizes, e.g. data=2,tensor=4; one may be -1; data=2@dcn,fsdp=4 puts data between"
        " slices or nodes; default: to fit",
    )
    parallelism: str = option(
        "fsdp+tensor", "tables of models/shardings.py, joined by +, e.g. fsdp+tensor_sequence"
    )
    aot: str = option(
        "", "compile the step for this TPU topology, e.g. v5p:4x4x4, without a TPU, and stop"
    )
    memory_limit: float = option(
        0.0,
        "GiB that a step may take per device, of which what is left is used to gather weights once;"
        " 0: what the device has, where that is known, and each layer gathers",
    )
    ignore_memory_limit: bool = option(False, "go on where the predicted memory is over the limit")


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """The processes of a run on several hosts; see spmd/runtime/README.md."""

    cluster: str = option(
        "auto", "what starts the processes: auto, none, or one of JAX's cluster environments"
    )
    coordinator: str = option("", "host:port on which they meet; default: as the cluster says")
    num_processes: int = option(0, "how many there are; 0: as the cluster says")
    process_id: int = option(-1, "the number of this one; -1: as the cluster says")
    coordinator_bind: str = option(
        "", "address on which process 0 listens; default: the coordinator's own"
    )
    start_timeout: float = option(120.0, "seconds to wait for all processes to start")
    peer_timeout: float = option(20.0, "seconds without a sign of life until a process is lost")
    exit_timeout: float = option(20.0, "seconds to wait for all processes to end")
    step_timeout: float = option(1800.0, "seconds for one step until a run that hangs is ended")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learnt: text, or token ids in .bin and .npy files."""

    data: str = option("", "a file or a folder; default: Python's own standard library")
    pattern: str = option("*.py", "the files of a folder that are read, e.g. *.txt or *.bin")
    tokenizer: str = option("", "a tokenizer.json (needs the extra tokenizers); default: bytes")
    token_dtype: str = option(
        "auto", "of .bin files; auto: as the .json beside them says", ("auto", "uint16", "uint32")
    )
    vocab_size: int = option(0, "number of token ids of the model; 0: as many as the data needs")
    validation: float = option(0.05, "share of the text held out for validation")
    sequence: int = option(128, "tokens per training example, bytes without a tokenizer")
    allow_data_change: bool = option(False, "resume although the data is not what it was")


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
    max_skipped: int = option(
        5, "steps in a row whose loss or gradient is not finite, after which the run ends"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where the state is kept, and whether a run starts from it."""

    checkpoint_dir: str = option("", "default: the folder --run-name in --output-root")
    output_root: str = option("runs", "where runs have their folders")
    run_name: str = option("", "default: date and time")
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
class LogConfig:
    """What is recorded beside metrics.jsonl."""

    tensorboard: bool = option(False, "write files for TensorBoard too; needs tensorboardX")
    profile: str = option("", "write a trace of these steps, e.g. 10:12, both included")
    debug_nans: bool = option(
        False,
        "run a step that is not finite again, operation by operation, and name the first bad one;"
        " steps do not overlap then",
    )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text generated at the end."""

    sample_bytes: int = option(160, "bytes to generate, tokens with a tokenizer; 0 for none")
    prompt: str = option("def ", "the text that is continued")
    temperature: float = option(0.8, "0 takes the likeliest token; 1 draws from the model")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One instance of each component's options."""

    processes: ProcessConfig = ProcessConfig()
    mesh: MeshConfig = MeshConfig()
    model: TransformerConfig = TransformerConfig(dtype="auto")
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()


# Follows from the data.
_FIXED = frozenset({("model", "vocab_size")})


def owners(run: RunConfig) -> dict[str, tuple[str, dataclasses.Field]]:
    """Option name -> (component of `RunConfig` that owns it, its field)."""
    return {
        field.name: (component.name, field)
        for component in dataclasses.fields(run)
        for field in dataclasses.fields(getattr(run, component.name))
        if (component.name, field.name) not in _FIXED
    }
