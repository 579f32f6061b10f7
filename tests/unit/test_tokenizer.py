"""A tokenizer file in place of bytes."""

import numpy as np
import pytest

from training.config import DataConfig
from training.data import load_corpus, vocabulary
from training.errors import DataError
from training.tokenizer import Bytes, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["the cat sat on the mat\n" * 40, "naïve café, 日本語\n" * 30]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A byte-level BPE, with one special token."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    trained.train_from_iterator(TEXTS, trainer)
    found = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(found))
    return found


def write(folder, texts=TEXTS):
    for name, text in zip("ab", texts, strict=True):  # neither is held out by its name
        (folder / f"{name}.txt").write_text(text)
    return DataConfig(data=str(folder), pattern="*.txt", sequence=16)


def test_texts_become_ids_and_come_back(path, tmp_path):
    tokenizer = load_tokenizer(str(path))
    for text in TEXTS:
        encoded = tokenizer.encode(text.encode(), "a text")
        assert tokenizer.decode(encoded) == text
        assert len(encoded) < len(text.encode()) and encoded.max() < tokenizer.vocab_size
    assert tokenizer.vocab_size == tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()


def test_a_corpus_of_ids_is_the_texts_one_after_the_other(path, tmp_path):
    config = write(tmp_path)
    config = DataConfig(**{**vars(config), "tokenizer": str(path)})
    corpus = load_corpus(config)
    loaded = tokenizers.Tokenizer.from_file(str(path))
    gap, *texts = [loaded.encode(t, add_special_tokens=False).ids for t in ("\n", *TEXTS)]
    both = np.concatenate([corpus.train, corpus.validation])
    np.testing.assert_array_equal(both, [*texts[0], *gap, *texts[1]])
    assert (corpus.unit, both.dtype) == ("tokens", np.uint16)
    assert vocabulary(config) == loaded.get_vocab_size()


def test_another_tokenizer_is_another_fingerprint(path, tmp_path):
    bytes_config = write(tmp_path)
    config = DataConfig(**{**vars(bytes_config), "tokenizer": str(path)})
    changed = tmp_path / "changed.json"
    changed.write_text(path.read_text().replace("<s>", "<t>"))
    other = DataConfig(**{**vars(config), "tokenizer": str(changed)})
    found = [load_corpus(each).fingerprint for each in (bytes_config, config, other)]
    assert len(set(found)) == 3
    assert load_corpus(config).fingerprint == found[1]


def test_a_text_that_is_no_utf_8_is_named_with_the_byte(path, tmp_path):
    config = write(tmp_path)
    (tmp_path / "2.txt").write_bytes(b"ab\xff")
    assert load_corpus(config).tokenizer.vocab_size == Bytes.vocab_size  # bytes take anything
    with pytest.raises(DataError) as error:
        load_corpus(DataConfig(**{**vars(config), "tokenizer": str(path)}))
    assert str(error.value) == (
        f"{tmp_path}/2.txt\n  why: byte 2 is 0xff, which is not UTF-8 there, and a tokenizer reads"
        " characters\n  fix: convert the file, or leave it out with --pattern"
    )
