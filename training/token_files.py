"""Token ids in files of any size: read where a batch needs them, checked wherever they are read.

Files are read by position instead of being mapped: a page of a mapped file that was cut short
ends the process with SIGBUS, and no message; a short read is an error that names the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sharding.errors import Problem
from training.errors import DataError, quoted
from training.files import Files

__all__ = ["TokenFile", "Tokens", "open_tokens", "sidecar"]

_BLOCK = 2**16  # bytes that are hashed at a time
_SAMPLED = 2**26  # bytes that are read at the start, of all files together
_MAX_SIDECAR = 100_000  # bytes


class TokenFile(NamedTuple):
    """One file.

    Attributes:
      name: relative to the folder that was named.
      offset: of the first token, in bytes.
      size: of the file, in bytes.
      start: number of tokens in the files before it.
    """

    path: Path
    name: str
    dtype: np.dtype
    offset: int
    size: int
    start: int

    @property
    def count(self) -> int:
        """Number of tokens."""
        return (self.size - self.offset) // self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A part of the tokens of several files, as if they were one after the other.

    Attributes:
      files: all of them.
      vocab_size: ids are below it.
      start, stop: the part, in tokens.
    """

    files: tuple[TokenFile, ...]
    vocab_size: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Tokens:
        """The tokens from `start` to `stop` of this part."""
        return dataclasses.replace(self, start=self.start + start, stop=self.start + stop)

    def take(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int32 [len(starts), length]: that many tokens from each of `starts` on.

        Raises:
          DataError: a file is gone or shorter than at the start, or holds an id outside of the
            vocabulary.
        """
        taken = np.empty((len(starts), length), np.int32)
        firsts = np.array([file.start for file in self.files])
        with ExitStack() as stack:
            opened: dict[int, int] = {}
            for row, start in enumerate(np.asarray(starts) + self.start):
                done = 0
                index = int(np.searchsorted(firsts, start, "right")) - 1
                while done < length:
                    file = self.files[index]
                    if index not in opened:
                        opened[index] = _open(file, stack)
                    position = int(start) + done - file.start
                    count = min(length - done, file.count - position)
                    ids = _read(file, opened[index], position, count)
                    check_ids(file, position, ids, self.vocab_size)
                    taken[row, done : done + count] = ids
                    done, index = done + count, index + 1
        return taken


def open_tokens(files: Files, token_dtype: str, vocab_size: int) -> tuple[Tokens, str]:
    """All tokens of `files`, and a fingerprint.

    The fingerprint covers names, sizes and dtypes, and the contents: all of them where they are
    small, else blocks at even distances, the first and the last among them. A change between two
    blocks that keeps the size is not seen. The ids that are read for it are checked.

    Args:
      token_dtype: of .bin files: "uint16", "uint32", or "auto": as their sidecars say.
      vocab_size: ids are below it.

    Raises:
      DataError: a file cannot be read, or holds something else than ids; all such files, but for
        ids outside of the vocabulary, of which the first is named.
    """
    found: list[TokenFile] = []
    problems: list[Problem] = []
    for path in files.paths:
        start = found[-1].start + found[-1].count if found else 0
        try:
            found.append(_describe(path, files.name(path), token_dtype, start))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    # Where a file is empty, the next one has the tokens.
    kept = tuple(file for file in found if file.count)
    digest = hashlib.sha256()
    for file in found:
        digest.update(f"{file.name}\0{file.dtype.str}\0{file.count}\n".encode(errors="replace"))
        _sample(file, max(_SAMPLED // len(found), 2 * _BLOCK), vocab_size, digest)
    total = sum(file.count for file in kept)
    return Tokens(kept, vocab_size, 0, total), digest.hexdigest()[:16]


def sidecar(path: Path) -> dict[str, Any]:
    """What the .json beside a token file says: of its own, `NAME.json`, or `tokens.json` of the
    folder. Keys: `dtype`, `vocab_size`.

    Raises:
      DataError: it cannot be read, or says something else.
    """
    for beside in (path.with_suffix(".json"), path.with_name("tokens.json")):
        if os.path.isfile(beside):
            return _read_sidecar(beside)
    return {}


def check_ids(file: TokenFile, position: int, ids: np.ndarray, vocab_size: int) -> None:
    """Raises DataError for the first of `ids`, read from `position` on, outside of [0, vocab)."""
    if not len(ids) or (0 <= ids.min() and ids.max() < vocab_size):
        return
    at = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
    byte = file.offset + (position + at) * file.dtype.itemsize
    problem = Problem(
        f"{quoted(file.path)}, token {position + at} (byte {byte}), has the id {ids[at]}",
        f"the vocabulary has {vocab_size} ids, 0 to {vocab_size - 1}",
        "use the tokenizer that made the file, a larger --vocab-size, or the right --token-dtype",
    )
    raise DataError(problem)


def _describe(path: Path, name: str, token_dtype: str, start: int) -> TokenFile:
    try:
        size = path.stat().st_size
        if path.suffix == ".npy":
            dtype, offset, size = _npy_header(path)
        else:
            dtype, offset = _bin_dtype(path, token_dtype), 0
    except OSError as error:
        raise DataError(_unreadable(path, error)) from None
    if size % dtype.itemsize and not offset:
        why = f"its {size} bytes are no multiple of the {dtype.itemsize} of a {dtype}"
        fix = "write it again if it was cut short, or give the right --token-dtype"
        raise DataError(Problem(quoted(path), why, fix))
    return TokenFile(path, name, dtype, offset, size, start)


def _bin_dtype(path: Path, token_dtype: str) -> np.dtype:
    said = sidecar(path).get("dtype") if token_dtype == "auto" else token_dtype
    if said is None:
        why = "a .bin file does not say whether its ids are uint16 or uint32"
        fix = 'give --token-dtype uint16, or write {"dtype": "uint16"} into '
        fix += quoted(path.with_suffix(".json").name)
        raise DataError(Problem(quoted(path), why, fix))
    return np.dtype(said).newbyteorder("<")


def _npy_header(path: Path) -> tuple[np.dtype, int, int]:
    """dtype, offset of the data, and where it ends."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a header can be wrong in any way
        mapped = error
    if not isinstance(mapped, np.memmap):
        why = f"it is no whole .npy file: {quoted(mapped)}"
        raise DataError(Problem(quoted(path), why, "write it with numpy.save"))
    if mapped.ndim != 1 or mapped.dtype.kind not in "iu":
        why = f"it holds {mapped.dtype}{list(mapped.shape)}, and token ids are integers in one dim"
        fix = "save ids.reshape(-1).astype(numpy.uint16), or uint32"
        raise DataError(Problem(quoted(path), why, fix))
    return mapped.dtype, mapped.offset, mapped.offset + mapped.nbytes


def _read_sidecar(path: Path) -> dict[str, Any]:
    fix = 'write it like {"dtype": "uint16", "vocab_size": 32000}'
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_MAX_SIDECAR).decode("utf-8"))
    except OSError as error:
        raise DataError(_unreadable(path, error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(quoted(path), f"it is no JSON: {quoted(error)}", fix)) from None
    if not isinstance(said, dict):
        raise DataError(Problem(quoted(path), f"it holds a {type(said).__name__}", fix))
    if said.get("dtype", "uint16") not in ("uint16", "uint32"):
        why = f"dtype is {quoted(said['dtype'])}, and ids are uint16 or uint32"
        raise DataError(Problem(quoted(path), why, fix))
    vocab_size = said.get("vocab_size", 1)
    if type(vocab_size) is not int or not 1 <= vocab_size < 2**31:
        why = f"vocab_size is {quoted(vocab_size)}, and it must be a whole number from 1 to 2^31-1"
        raise DataError(Problem(quoted(path), why, fix))
    return said


def _sample(file: TokenFile, budget: int, vocab_size: int, digest: Any) -> None:
    block = _BLOCK // file.dtype.itemsize
    blocks = -(-file.count // block)
    most = budget // _BLOCK
    chosen = range(blocks) if blocks <= most else np.linspace(0, blocks - 1, most).astype(int)
    with ExitStack() as stack:
        opened = _open(file, stack)
        for index in chosen:
            position = int(index) * block
            ids = _read(file, opened, position, min(block, file.count - position))
            digest.update(ids.tobytes())
            check_ids(file, position, ids, vocab_size)


def _open(file: TokenFile, stack: ExitStack) -> int:
    try:
        opened = os.open(file.path, os.O_RDONLY)
    except OSError as error:
        raise DataError(_unreadable(file.path, error)) from None
    stack.callback(os.close, opened)
    return opened


def _read(file: TokenFile, opened: int, position: int, count: int) -> np.ndarray:
    """`count` ids from `position` on."""
    begin, needed = file.offset + position * file.dtype.itemsize, count * file.dtype.itemsize
    parts: list[bytes] = []
    while needed:
        try:
            part = os.pread(opened, needed, begin)
        except OSError as error:
            raise DataError(_unreadable(file.path, error)) from None
        if not part:
            size = os.fstat(opened).st_size
            why = f"it had {file.size} bytes when the run began and has {size}"
            fix = "put the whole file back; --resume must then goes on from the last checkpoint"
            raise DataError(Problem(f"{quoted(file.path)} was cut short", why, fix))
        parts.append(part)
        begin, needed = begin + len(part), needed - len(part)
    return np.frombuffer(b"".join(parts), file.dtype)


def _unreadable(path: Path, error: OSError) -> Problem:
    fix = "put it back, or make it readable; --resume must then goes on from the last checkpoint"
    return Problem(quoted(path), f"it cannot be read: {error.strerror or error}", fix)
