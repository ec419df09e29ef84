"""Hashed words and n-grams against a plain Python reading of their definition."""

import re

import numpy as np
import pytest

from nanophi.data import ngrams
from nanophi.data.ngrams import hash_words, ngrams_of_lengths

TEXTS = [
    b"The quick brown fox -- the QUICK brown-fox, 42 times!",
    b"",
    b"  ... !? ",
    "naïve café Ünïcode “quotes” 中文".encode(),
    b"one",
    b"x" * 1000 + b" " + b"y" * 5,
]


def words_of(text: bytes) -> list[bytes]:
    return re.findall(rb"[a-z0-9\x80-\xff]+", text.lower())


def test_equal_words_have_equal_hashes_and_others_do_not() -> None:
    hashed = hash_words(TEXTS)
    expected = [word for text in TEXTS for word in words_of(text)]
    assert hashed.counts.tolist() == [len(words_of(text)) for text in TEXTS]
    by_word: dict[bytes, int] = {}
    for word, value in zip(expected, hashed.hashes.tolist(), strict=True):
        assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)


def test_hashes_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    together = hash_words(TEXTS)
    monkeypatch.setattr(ngrams, "_CHUNK_BYTES", 40)
    assert np.array_equal(hash_words(TEXTS).hashes, together.hashes)
    for index, text in enumerate(TEXTS):
        alone = hash_words([text]).hashes
        assert np.array_equal(alone, together.hashes[together.offsets[index] : together.offsets[index + 1]])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 13])
def test_ngrams_stay_within_documents(n: int) -> None:
    hashed = ngrams_of_lengths(hash_words(TEXTS), [n, 2])[n]
    by_gram: dict[tuple[bytes, ...], int] = {}
    position = 0
    for text, count in zip(TEXTS, hashed.counts.tolist(), strict=True):
        words = words_of(text)
        grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        assert count == len(grams)
        for gram in grams:
            assert by_gram.setdefault(gram, int(hashed.hashes[position])) == int(hashed.hashes[position])
            position += 1
    assert position == len(hashed.hashes)
    assert len(set(by_gram.values())) == len(by_gram)


def test_order_of_words_matters() -> None:
    forward, backward = (ngrams.ngrams(hash_words([text]), 3).hashes for text in (b"a b c", b"c b a"))
    assert forward.tolist() != backward.tolist()


def test_take_keeps_the_chosen_documents() -> None:
    hashed = hash_words(TEXTS)
    chosen = np.array([True, False, False, True, False, True])
    taken = hashed.take(chosen)
    expected = hash_words([text for text, keep in zip(TEXTS, chosen, strict=True) if keep])
    assert np.array_equal(taken.hashes, expected.hashes)
    assert np.array_equal(taken.offsets, expected.offsets)
