"""What is learnt: what is read, what is held out, and which examples a step sees.

A batch is a pure function of (seed, step), so the position in the data is the step number,
whatever the mesh, the number of processes, and however often a run was resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sharding.errors import Problem
from training.config import DataConfig
from training.errors import ConfigError, DataError, quoted
from training.files import Files, find_files
from training.token_files import Tokens, open_tokens, sidecar
from training.tokenizer import Bytes, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "batch_at",
    "load_corpus",
    "unigram_entropy",
    "validation_batches",
    "vocabulary",
]

_FILE_GAP = b"\n"
_FEW_FILES = 100  # with fewer, whole files could make a share far from the one asked for
_COUNTED = 2**24  # tokens whose frequencies are counted


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The data, split.

    Attributes:
      train, validation: token ids [n], with no text in common; of token files a view that reads
        them when a batch needs them.
      source: where it was read.
      num_files: how many files it came from.
      fingerprint: a digest; equal for equal data. Of texts it covers all bytes and the
        tokenizer, of token files what `training.token_files.open_tokens` says.
      tokenizer: how ids become text; None where nothing says so.
      unit: what a token is called: "bytes" or "tokens".
    """

    train: np.ndarray | Tokens
    validation: np.ndarray | Tokens
    source: str
    num_files: int
    fingerprint: str
    tokenizer: Tokenizer | None = Bytes()
    unit: str = "bytes"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples that are read when they are asked for: int32 [len(starts), length].

    It has a `shape`, and parts by two slices without a step, `batch[2:4, :]`, of which only what is
    asked for is read.

    Attributes:
      text: of which each example is a piece.
      starts: of the pieces, in tokens.
      length: of each.
    """

    text: np.ndarray | Tokens
    starts: np.ndarray
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts), self.length

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        """Raises DataError, see `Tokens.take`."""
        rows, columns = part
        assert columns.step in (None, 1), "every token of an example is read"
        first, end, _ = columns.indices(self.length)
        starts = self.starts[rows] + first
        if isinstance(self.text, Tokens):
            return self.text.take(starts, end - first)
        return self.text[starts[:, None] + np.arange(end - first)].astype(np.int32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:, :], dtype)


def vocabulary(config: DataConfig) -> int:
    """The number of token ids that a model of this data needs, or the `--vocab-size` above it.

    Raises:
      ConfigError: `--vocab-size` is needed, or too small.
      DataError: the files, a tokenizer or a sidecar cannot be read.
    """
    given, needed = config.vocab_size, 0
    if not (config.tokenizer or config.data):
        needed, source = Bytes.vocab_size, "text without a --tokenizer"
    elif config.tokenizer:
        needed = load_tokenizer(config.tokenizer).vocab_size
        source = f"--tokenizer {quoted(config.tokenizer)}"
    else:
        files = find_files(config)
        source = f"--data {quoted(config.data)}"
        if not files.tokens:
            needed, source = Bytes.vocab_size, "text without a --tokenizer"
        else:
            needed = max(sidecar(path).get("vocab_size", 0) for path in files.paths)
            if not needed and not given:
                why = "neither --tokenizer nor a .json beside the files says how many ids there are"
                fix = 'give --vocab-size, or write {"vocab_size": N} into tokens.json'
                raise ConfigError(Problem(source, why, fix))
    if given and given < needed:
        why = f"{source} has {needed} ids"
        fix = f"use --vocab-size {needed} or more, or leave it out"
        raise ConfigError(Problem(f"--vocab-size {given}", why, fix))
    return given or needed


def load_corpus(config: DataConfig) -> Corpus:
    """Reads texts into memory; of token files a sample, to check and to recognise them.

    Of many texts whole ones are held out, chosen by a digest of their path, so that one new
    file moves no other. Of a few texts, and of token files, the end is held out.

    Raises:
      ConfigError: an option does not go with the data.
      DataError: there is nothing to read, too little for an example, or it is no data.
    """
    files = find_files(config)
    corpus = _load_tokens(files, config) if files.tokens else _load_texts(files, config)
    needed = config.sequence + 1
    if min(len(corpus.train), len(corpus.validation)) < needed:
        unit, count = corpus.unit, corpus.num_files
        why = f"its {count} files give {len(corpus.train)} {unit} to train on and"
        why += f" {len(corpus.validation)} to validate; one example is --sequence"
        why += f" {config.sequence} + 1 = {needed} {unit}"
        fix = "name more data, or use a shorter --sequence"
        raise DataError(Problem(f"--data {quoted(config.data or files.root)}", why, fix))
    return corpus


def batch_at(
    text: np.ndarray | Tokens, seed: int, step: int, batch: int, sequence: int
) -> Batch:
    """The examples of one step, [batch, sequence + 1], each a random piece of `text`."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(text) - sequence, size=batch)
    return Batch(text, starts, sequence + 1)


def validation_batches(
    text: np.ndarray | Tokens, count: int, batch: int, sequence: int
) -> Iterator[Batch]:
    """`count` batches like those of `batch_at`, the same ones each time, evenly over `text`."""
    starts = np.linspace(0, len(text) - sequence - 1, count * batch).astype(np.int64)
    for part in starts.reshape(count, batch):
        yield Batch(text, part, sequence + 1)


def unigram_entropy(text: np.ndarray | Tokens) -> float:
    """Entropy of the token frequencies of `text`, or of its first 2^24 tokens, in nats: what
    knowing no context can reach."""
    count = min(len(text), _COUNTED)
    first = text[:count] if isinstance(text, np.ndarray) else text.take(np.zeros(1, int), count)
    shares = np.bincount(first.reshape(-1)) / count
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _load_tokens(files: Files, config: DataConfig) -> Corpus:
    tokens, fingerprint = open_tokens(files, config.token_dtype, vocabulary(config))
    cut = len(tokens) - int(len(tokens) * config.validation)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    return Corpus(
        tokens.part(0, cut), tokens.part(cut, len(tokens)), str(files.root), len(files.paths),
        fingerprint, tokenizer, "tokens",
    )  # fmt: skip


def _load_texts(files: Files, config: DataConfig) -> Corpus:
    tokenizer = load_tokenizer(config.tokenizer)
    held_out, kept = [], []
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for path in files.paths:
        text = _read(path, config)
        digest.update(text + _FILE_GAP)
        is_held_out = _is_held_out(files.name(path), config.validation)
        (held_out if is_held_out else kept).append(tokenizer.encode(text, str(path)))
    gap = tokenizer.encode(_FILE_GAP, "the gap between files")
    train, validation = _joined(kept, gap), _joined(held_out, gap)
    few = len(files.paths) < _FEW_FILES
    if few or min(len(train), len(validation)) < config.sequence + 1:
        train, validation = _cut(np.concatenate([train, validation]), config.validation)
    return Corpus(
        train, validation, str(files.root), len(files.paths), digest.hexdigest()[:16], tokenizer,
        tokenizer.name,
    )  # fmt: skip


def _joined(texts: list[np.ndarray], gap: np.ndarray) -> np.ndarray:
    parts = [part for text in texts for part in (gap, text)][1:]
    return np.concatenate(parts) if parts else gap[:0]


def _read(path: Path, config: DataConfig) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        problem = Problem(
            f"--data {quoted(config.data or path)}",
            f"{quoted(path)} cannot be read: {error.strerror}",
            "make it readable, or leave it out with --pattern",
        )
        raise DataError(problem) from error


def _is_held_out(name: str, share: float) -> bool:
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _cut(text: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    cut = len(text) - int(len(text) * share)
    return text[:cut], text[cut:]
