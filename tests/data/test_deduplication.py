"""Planted duplicates are found, unrelated documents stay, and signatures estimate Jaccard similarity."""

import numpy as np
import pytest

from nanophi.data import deduplication
from nanophi.data.ngrams import hash_words, ngrams

VOCABULARY = [f"w{number}" for number in range(5000)]


def document(generator: np.random.Generator, length: int) -> list[str]:
    # Zipf's law, so that unrelated documents share as many words as real ones do.
    return [VOCABULARY[index] for index in np.minimum(generator.zipf(1.3, length), 4999)]


def changed(words: list[str], generator: np.random.Generator, share: float) -> list[str]:
    words = list(words)
    for index in generator.choice(len(words), max(1, round(share * len(words))), replace=False):
        words[index] = VOCABULARY[generator.integers(5000)]
    return words


def leaders(texts: list[str], similarity: float = 0.5) -> np.ndarray:
    matrix = deduplication.signatures(hash_words([text.encode() for text in texts]))
    return deduplication.near_duplicates(matrix, np.ones(len(texts), bool), similarity)


def test_planted_duplicates_with_five_percent_of_words_changed() -> None:
    generator = np.random.default_rng(0)
    originals = [document(generator, int(generator.integers(100, 1500))) for _ in range(1500)]
    chosen = generator.choice(len(originals), 1000, replace=False)
    planted = [changed(originals[index], generator, 0.05) for index in chosen]
    found = leaders([" ".join(words) for words in originals + planted])
    recall = np.mean(found[len(originals) :] == chosen)
    unrelated_dropped = np.mean(found[: len(originals)] != np.arange(len(originals)))
    assert recall >= 0.95
    assert unrelated_dropped <= 0.01


def test_exact_duplicates_point_to_the_first() -> None:
    hashes = np.array([5, 7, 5, 9, 7, 5], np.uint64)
    assert deduplication.exact_duplicates(hashes).tolist() == [0, 1, 0, 3, 1, 0]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_signatures_estimate_the_jaccard_similarity(share: float) -> None:
    generator = np.random.default_rng(1)
    errors = []
    for _ in range(30):
        first = document(generator, 800)
        second = changed(first, generator, share)
        words = hash_words([" ".join(first).encode(), " ".join(second).encode()])
        grams = ngrams(words, deduplication.NGRAM)
        a, b = (set(grams.hashes[grams.offsets[row] : grams.offsets[row + 1]].tolist()) for row in range(2))
        matrix = deduplication.signatures(words)
        errors.append((matrix[0] == matrix[1]).mean() - len(a & b) / len(a | b))
    # The standard error of 128 draws is at most 0.044, of their mean over 30 documents 0.008.
    assert abs(np.mean(errors)) < 0.025
    assert np.std(errors) < 0.06


def test_short_and_wordless_documents() -> None:
    found = leaders(["two words", "Two, words!", "other words", "???", "!!!", "", "one"])
    assert found.tolist() == [0, 0, 2, 3, 4, 5, 6]


def test_documents_that_are_no_candidates_stay_alone() -> None:
    matrix = deduplication.signatures(hash_words([b"a b c d e f g"] * 3))
    assert deduplication.near_duplicates(matrix, np.array([True, False, True]), 0.5).tolist() == [0, 1, 0]
    assert deduplication.near_duplicates(matrix[:0], np.zeros(0, bool), 0.5).tolist() == []


def test_a_chain_of_many_copies_is_one_cluster() -> None:
    generator = np.random.default_rng(2)
    base = document(generator, 400)
    texts = [" ".join(changed(base, generator, 0.02)) for _ in range(40)]
    found = leaders(texts)
    assert (found == 0).mean() >= 0.95
    assert deduplication.cluster_counts(found)["largest"] >= 38
