"""Token files: what a batch reads, what is checked, and what changes the fingerprint."""

import json
import os

import numpy as np
import pytest

from training import token_files
from training.config import DataConfig
from training.data import batch_at, load_corpus, unigram_entropy, validation_batches, vocabulary
from training.errors import CheckpointError, ConfigError, DataError
from training.folders import make_folder


def ids(count, seed=0, vocab=1000):
    return np.random.default_rng(seed).integers(0, vocab, count)


def write(folder, **arrays):
    """Files of token ids; their suffixes by dtype: uint16 and uint32 .bin, else .npy."""
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        if array.dtype in (np.uint16, np.uint32):
            array.tofile(folder / f"{name}.bin")
            (folder / f"{name}.json").write_text(json.dumps({"dtype": str(array.dtype)}))
        else:
            np.save(folder / f"{name}.npy", array)
    return folder


def configured(path, **options):
    options = {"vocab_size": 1000, "pattern": "*.[bn][ip][ny]", "sequence": 16, **options}
    return DataConfig(data=str(path), **options)


@pytest.fixture
def mixed(tmp_path):
    """Four files of three dtypes, one of them empty; and all their ids in order."""
    parts = [ids(n, seed=n) for n in (500, 7, 0, 900)]
    dtypes = (np.uint16, np.int64, np.uint16, np.uint32)
    arrays = [part.astype(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
    folder = write(tmp_path / "tokens", **dict(zip("abcd", arrays, strict=True)))
    return folder, np.concatenate(parts)


def test_batches_of_several_files_are_those_of_all_ids_in_memory(mixed):
    folder, everything = mixed
    corpus = load_corpus(configured(folder, validation=0.25))
    train, held_out = everything[:1056], everything[1056:]  # 1407 - int(1407 * 0.25)
    assert (len(corpus.train), len(corpus.validation)) == (len(train), len(held_out))
    for step in range(20):
        np.testing.assert_array_equal(
            batch_at(corpus.train, 3, step, 8, 16), batch_at(train, 3, step, 8, 16)
        )
    pairs = zip(
        validation_batches(corpus.validation, 3, 4, 16),
        validation_batches(held_out, 3, 4, 16),
        strict=True,
    )
    for found, expected in pairs:
        np.testing.assert_array_equal(found, expected)
        assert np.asarray(found).dtype == np.int32
    assert unigram_entropy(corpus.validation) == pytest.approx(unigram_entropy(held_out))
    assert (corpus.num_files, corpus.unit, corpus.tokenizer) == (4, "tokens", None)


def test_a_piece_that_spans_three_files(tmp_path):
    folder = write(tmp_path, a=ids(20), b=ids(3, 1), c=ids(50, 2))
    corpus = load_corpus(configured(folder, validation=0.4))
    [piece] = corpus.train.take(np.array([10]), 33)
    np.testing.assert_array_equal(piece, np.concatenate([ids(20), ids(3, 1), ids(50, 2)])[10:43])


def test_a_batch_reads_its_own_bytes_only(tmp_path, monkeypatch):
    folder = write(tmp_path, a=ids(2_000_000).astype(np.uint16))
    monkeypatch.setattr(token_files, "_SAMPLED", 4 * 2**16)
    read, pread = [], os.pread
    monkeypatch.setattr(
        os, "pread", lambda *given: (read.append(given[1]), pread(*given))[1]
    )
    corpus = load_corpus(configured(folder))
    assert sum(read) <= 4 * 2**16  # of 4 MB
    read.clear()
    np.asarray(batch_at(corpus.train, 0, 0, 8, 16))
    assert sum(read) == 8 * 17 * 2


def test_the_fingerprint_changes_with_contents_names_and_sizes(tmp_path):
    def fingerprint(name, **arrays):
        return load_corpus(configured(write(tmp_path / name, **arrays))).fingerprint

    same = [fingerprint(name, a=ids(900), b=ids(70)) for name in "xy"]
    changed = ids(900).copy()
    changed[450] += 1
    others = [
        fingerprint("1", a=changed, b=ids(70)),
        fingerprint("2", a=ids(900), c=ids(70)),
        fingerprint("3", a=ids(900), b=ids(69)),
        fingerprint("4", a=ids(900).astype(np.uint16), b=ids(70)),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 5


def test_the_fingerprint_of_a_large_file_samples_it(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_SAMPLED", 8 * 2**16)
    array = ids(1_000_000).astype(np.uint16)
    config = configured(write(tmp_path, a=array))
    before = load_corpus(config).fingerprint
    seen = {}
    for at in (0, 999_999, 40_000):
        changed = array.copy()
        changed[at] ^= 1
        write(tmp_path, a=changed)
        seen[at] = load_corpus(config).fingerprint != before
    # the first and the last block are among the eight; the second of 31 is not
    assert seen == {0: True, 999_999: True, 40_000: False}


def test_an_id_between_the_samples_is_refused_by_the_batch_that_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_SAMPLED", 2 * 2**16)
    array = np.zeros(200_000, np.uint32)
    array[70_000] = 1000
    corpus = load_corpus(configured(write(tmp_path, a=array)))
    corpus.train.take(np.array([69_980]), 17)
    with pytest.raises(DataError) as error:
        corpus.train.take(np.array([0, 69_990]), 17)
    assert str(error.value) == (
        f"{tmp_path}/a.bin, token 70000 (byte 280000), has the id 1000\n"
        "  why: the vocabulary has 1000 ids, 0 to 999\n"
        "  fix: use the tokenizer that made the file, a larger --vocab-size, or the right"
        " --token-dtype"
    )


def test_a_file_cut_short_while_the_run_goes_on(tmp_path):
    folder = write(tmp_path, a=ids(1000).astype(np.uint16))
    corpus = load_corpus(configured(folder))
    os.truncate(folder / "a.bin", 400)
    corpus.train.take(np.array([100]), 17)
    with pytest.raises(DataError) as error:
        corpus.train.take(np.array([190]), 17)
    assert str(error.value) == (
        f"{folder}/a.bin was cut short\n"
        "  why: it had 2000 bytes when the run began and has 400\n"
        "  fix: put the whole file back; --resume must then goes on from the last checkpoint"
    )
    assert error.value.exit_code == 3


def test_a_file_removed_while_the_run_goes_on(tmp_path):
    folder = write(tmp_path, a=ids(1000).astype(np.uint16))
    corpus = load_corpus(configured(folder))
    (folder / "a.bin").unlink()
    with pytest.raises(DataError) as error:
        np.asarray(batch_at(corpus.train, 0, 0, 4, 16))
    assert str(error.value) == (
        f"{folder}/a.bin\n  why: it cannot be read: No such file or directory\n"
        "  fix: put it back, or make it readable; --resume must then goes on from the last"
        " checkpoint"
    )


def test_all_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0" * 7)
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY\x01\0nonsense")
    (tmp_path / "c.npy").write_bytes(b"PK\x03\x04")
    np.save(tmp_path / "d.npy", ids(100).reshape(10, 10))
    with pytest.raises(DataError) as error:
        load_corpus(configured(tmp_path, token_dtype="uint16"))
    assert [problem.what.rpartition("/")[2] for problem in error.value.problems] == [
        "a.bin", "b.npy", "c.npy", "d.npy"
    ]  # fmt: skip
    assert error.value.problems[3].why == (
        "it holds int64[10, 10], and token ids are integers in one dim"
    )


def test_no_descriptor_stays_open(mixed):
    before = len(os.listdir("/proc/self/fd"))
    corpus = load_corpus(configured(mixed[0]))
    for step in range(5):
        np.asarray(batch_at(corpus.train, 0, step, 8, 16))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_vocabulary_is_what_the_data_needs(tmp_path):
    folder = write(tmp_path / "tokens", a=ids(100).astype(np.uint16))
    (tmp_path / "text.py").write_text("x")
    assert vocabulary(DataConfig(data=str(tmp_path / "text.py"))) == 256
    assert vocabulary(DataConfig(data=str(tmp_path / "text.py"), vocab_size=512)) == 512
    with pytest.raises(ConfigError, match="give --vocab-size"):
        vocabulary(configured(folder, vocab_size=0))
    (folder / "a.json").write_text('{"dtype": "uint16", "vocab_size": 1000}')
    assert vocabulary(configured(folder, vocab_size=0)) == 1000
    assert vocabulary(configured(folder, vocab_size=1024)) == 1024
    with pytest.raises(ConfigError, match="has 1000 ids"):
        vocabulary(configured(folder, vocab_size=999))


def test_the_folder_of_a_run_is_for_its_owner_only(tmp_path):
    folder = tmp_path / "runs" / "a"
    make_folder(folder)
    make_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as error:
        make_folder(tmp_path / "file" / "a")
    assert str(error.value) == (
        f"--checkpoint-dir {tmp_path}/file/a\n  why: the folder cannot be made: File exists\n"
        "  fix: name a folder that can be written"
    )
