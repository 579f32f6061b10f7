"""Text to token ids and back: bytes, or a file of the `tokenizers` package."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sharding.errors import Problem
from training.errors import ConfigError, DataError, quoted

__all__ = ["Bytes", "FileTokenizer", "Tokenizer", "load_tokenizer"]

_MAX_BYTES = 2**28  # the largest published ones take a tenth of it


class Tokenizer(Protocol):
    """What a run asks of one.

    Attributes:
      vocab_size: ids are below it.
      name: what texts are called after it: "bytes" or "tokens".
      fingerprint: changes when the ids of some text could.
    """

    vocab_size: int
    name: str
    fingerprint: str

    def encode(self, text: bytes, source: str) -> np.ndarray:
        """Token ids [n], unsigned, of a text that was read from `source`."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """The text of token ids [n]."""
        ...


class Bytes:
    """Each byte is a token."""

    vocab_size = 256
    name = "bytes"
    fingerprint = ""

    def encode(self, text: bytes, source: str) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        return bytes(np.asarray(tokens).astype(np.uint8)).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json. No special tokens are added: texts are learnt as they stand."""

    name = "tokens"

    def __init__(self, tokenizer: Any, fingerprint: str):
        self._tokenizer = tokenizer
        self.fingerprint = fingerprint
        # ids need not be dense
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: bytes, source: str) -> np.ndarray:
        """See `Tokenizer`.

        Raises:
          DataError: the text is not UTF-8.
        """
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = Problem(
                quoted(source),
                f"byte {error.start} is 0x{text[error.start]:02x}, which is not UTF-8 there, and"
                " a tokenizer reads characters",
                "convert the file, or leave it out with --pattern",
            )
            raise DataError(problem) from None
        ids = self._tokenizer.encode(decoded, add_special_tokens=False).ids
        return np.asarray(ids, np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a file; of bytes for "".

    Raises:
      ConfigError: the package `tokenizers` is not installed.
      DataError: the file cannot be read, or is no tokenizer.
    """
    return _load(path) if path else Bytes()


@functools.lru_cache(maxsize=1)
def _load(path: str) -> FileTokenizer:
    given = f"--tokenizer {quoted(path)}"
    try:
        from tokenizers import Tokenizer as Loader
    except ImportError:
        fix = 'pip install -e ".[tokenizers]", or leave it out to learn bytes'
        problem = Problem(given, "the package tokenizers, which reads it, is not installed", fix)
        raise ConfigError(problem) from None
    try:
        size = Path(path).stat().st_size
        if not Path(path).is_file() or size > _MAX_BYTES:
            raise ValueError(f"it is no file of at most {_MAX_BYTES} bytes")
        written = Path(path).read_bytes()
        loaded = Loader.from_str(written.decode("utf-8"))
    except OSError as error:
        why = f"it cannot be read: {error.strerror}"
        raise DataError(Problem(given, why, "name a tokenizer.json")) from None
    except Exception as error:  # tokenizers raises plain Exceptions
        why = f"it is no tokenizer: {quoted(error)}"
        raise DataError(Problem(given, why, "name a tokenizer.json")) from None
    return FileTokenizer(loaded, hashlib.sha256(written).hexdigest()[:16])
