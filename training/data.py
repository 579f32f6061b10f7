"""Text as bytes: what is read, what is held out, and which examples a step sees.

A batch is a pure function of (seed, step), so the position in the data is the step number,
whatever the mesh and however often a run was resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sharding.errors import Problem
from training.config import DataConfig
from training.errors import ConfigError

__all__ = ["Corpus", "batch_at", "load_corpus", "unigram_entropy", "validation_batches"]

# Folders of the standard library that hold other packages, or tests that not every build has.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
_FILE_GAP = b"\n"
_FEW_FILES = 100  # with fewer, whole files could make a share far from the one asked for


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text, split.

    Attributes:
      train, validation: uint8 arrays of bytes, with no text in common.
      source: where the text was read.
      num_files: how many files it came from.
      fingerprint: a digest of all bytes in order; equal for equal text.
    """

    train: np.ndarray
    validation: np.ndarray
    source: str
    num_files: int
    fingerprint: str


def load_corpus(config: DataConfig) -> Corpus:
    """Reads all the text there is into memory.

    Of many files whole ones are held out, chosen by a digest of their path, so that one new
    file moves no other. Of a few files the end of the text is held out.

    Raises:
      ConfigError: there is nothing to read, or too little for a single example.
    """
    root, paths = _find_files(config)
    held_out, kept = [], []
    digest = hashlib.sha256()
    for path in paths:
        text = _read(path, config)
        digest.update(text + _FILE_GAP)
        name = path.relative_to(root).as_posix() if path != root else path.name
        (held_out if _is_held_out(name, config.validation) else kept).append(text)
    train = np.frombuffer(_FILE_GAP.join(kept), np.uint8)
    validation = np.frombuffer(_FILE_GAP.join(held_out), np.uint8)
    needed = config.sequence + 1
    if len(paths) < _FEW_FILES or min(len(train), len(validation)) < needed:
        train, validation = _cut(np.concatenate([train, validation]), config.validation)
    if min(len(train), len(validation)) < needed:
        what = f"--data {config.data or root}"
        why = f"its {len(paths)} files give {len(train)} bytes to train on and {len(validation)}"
        why += f" to validate; one example is --sequence {config.sequence} + 1 = {needed} bytes"
        raise ConfigError(Problem(what, why, "name more text, or use a shorter --sequence"))
    return Corpus(train, validation, str(root), len(paths), digest.hexdigest()[:16])


def batch_at(text: np.ndarray, seed: int, step: int, batch: int, sequence: int) -> np.ndarray:
    """The examples of one step: int32 [batch, sequence + 1], each a random piece of `text`."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(text) - sequence, size=batch)
    return text[starts[:, None] + np.arange(sequence + 1)].astype(np.int32)


def validation_batches(
    text: np.ndarray, count: int, batch: int, sequence: int
) -> Iterator[np.ndarray]:
    """`count` batches like those of `batch_at`, the same ones each time, evenly over `text`."""
    starts = np.linspace(0, len(text) - sequence - 1, count * batch).astype(np.int64)
    for part in starts.reshape(count, batch):
        yield text[part[:, None] + np.arange(sequence + 1)].astype(np.int32)


def unigram_entropy(text: np.ndarray) -> float:
    """Entropy of the byte frequencies of `text`, in nats: what knowing no context can reach."""
    shares = np.bincount(text, minlength=256) / len(text)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _find_files(config: DataConfig) -> tuple[Path, list[Path]]:
    root = Path(config.data or sysconfig.get_path("stdlib"))
    if root.is_file():
        return root, [root]
    paths = [path for path in root.rglob(config.pattern) if path.is_file()]
    if not config.data:
        paths = [p for p in paths if not _SKIPPED & set(p.relative_to(root).parts)]
    if not paths:
        why = f"the folder holds no file that matches --pattern {config.pattern}"
        raise ConfigError(
            Problem(f"--data {root}", why, "name a folder with such files, or give a --pattern")
        )
    return root, sorted(paths)


def _read(path: Path, config: DataConfig) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        problem = Problem(
            f"--data {config.data or path}",
            f"{path} cannot be read: {error.strerror}",
            "make it readable, or leave it out with --pattern",
        )
        raise ConfigError(problem) from error


def _is_held_out(name: str, share: float) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _cut(text: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    cut = len(text) - int(len(text) * share)
    return text[:cut], text[cut:]
