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


PUNCTUATION = re.compile("[\u0080-\u00bf\u2000-\u206f\u2212\u3000-\u3003\ufeff]")


def words_of(text):
    return re.findall(rb"[a-z0-9\x80-\xff]+", PUNCTUATION.sub(" ", text.decode()).encode().lower())


def test_equal_words_have_equal_hashes_and_others_do_not():
    hashed = hash_words(TEXTS)
    expected = [word for text in TEXTS for word in words_of(text)]
    assert hashed.counts.tolist() == [len(words_of(text)) for text in TEXTS]
    by_word = {}
    for word, value in zip(expected, hashed.hashes.tolist(), strict=True):
        assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)


def test_hashes_do_not_depend_on_the_batch(monkeypatch):
    together = hash_words(TEXTS)
    monkeypatch.setattr(ngrams, "_CHUNK_BYTES", 40)
    assert np.array_equal(hash_words(TEXTS).hashes, together.hashes)
    for index, text in enumerate(TEXTS):
        alone = hash_words([text]).hashes
        assert np.array_equal(alone, together.hashes[together.offsets[index] : together.offsets[index + 1]])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 13])
def test_ngrams_stay_within_documents(n):
    hashed = ngrams_of_lengths(hash_words(TEXTS), [n, 2])[n]
    by_gram = {}
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


@pytest.mark.parametrize(
    ("typographic", "plain"),
    [
        ("\u201cIt\u2019s\u201d \u2014 he said\u2026", '"It\'s" - he said...'),
        ("\u00abnon\u00bb\u00a0! \u2039oui\u203a", '"non" ! "oui"'),
        ("pages 3\u20135,\u202f7\u22128 \u2018x\u2019", "pages 3-5, 7-8 'x'"),
        ("\ufeffbegin\u3000end", "begin end"),
    ],
)
def test_typographic_punctuation_is_like_its_ascii_spelling(typographic, plain):
    assert np.array_equal(hash_words([typographic.encode()]).hashes, hash_words([plain.encode()]).hashes)


def test_take_keeps_the_chosen_documents():
    hashed = hash_words(TEXTS)
    chosen = np.array([True, False, False, True, False, True])
    taken = hashed.take(chosen)
    expected = hash_words([text for text, keep in zip(TEXTS, chosen, strict=True) if keep])
    assert np.array_equal(taken.hashes, expected.hashes)
    assert np.array_equal(taken.offsets, expected.offsets)
