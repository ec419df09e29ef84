"""Planted duplicates are found, unrelated documents stay, and signatures estimate Jaccard similarity."""

import itertools

import numpy as np
import pytest
from gathered import data
from hypothesis import given, settings
from hypothesis import strategies as st

from nanophi.core.errors import UserError
from nanophi.data import deduplication
from nanophi.data.gather import CONTAMINATED, EXACT, HELDOUT, HELDOUT_NEAR, NEAR, TRAIN, decide
from nanophi.data.ngrams import hash_words, ngrams

VOCABULARY = [f"w{number}" for number in range(5000)]


def document(generator, length):
    # Zipf's law, so that unrelated documents share as many words as real ones do.
    return [VOCABULARY[index] for index in np.minimum(generator.zipf(1.3, length), 4999)]


def changed(words, generator, share):
    words = list(words)
    for index in generator.choice(len(words), max(1, round(share * len(words))), replace=False):
        words[index] = VOCABULARY[generator.integers(5000)]
    return words


def leaders(texts, similarity=0.5):
    matrix = deduplication.signatures(hash_words([text.encode() for text in texts]))
    return deduplication.near_duplicates(matrix, np.ones(len(texts), bool), similarity)


def test_planted_duplicates_with_five_percent_of_words_changed():
    generator = np.random.default_rng(0)
    originals = [document(generator, int(generator.integers(100, 1500))) for _ in range(1500)]
    chosen = generator.choice(len(originals), 1000, replace=False)
    planted = [changed(originals[index], generator, 0.05) for index in chosen]
    found = leaders([" ".join(words) for words in originals + planted])
    recall = np.mean(found[len(originals) :] == chosen)
    unrelated_dropped = np.mean(found[: len(originals)] != np.arange(len(originals)))
    assert recall >= 0.95
    assert unrelated_dropped <= 0.01


def test_exact_duplicates_point_to_the_first():
    hashes = np.array([5, 7, 5, 9, 7, 5], np.uint64)
    assert deduplication.exact_duplicates(hashes).tolist() == [0, 1, 0, 3, 1, 0]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_signatures_estimate_the_jaccard_similarity(share):
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


def test_short_and_wordless_documents():
    found = leaders(["two words", "Two, words!", "other words", "???", "!!!", "", "one"])
    assert found.tolist() == [0, 0, 2, 3, 4, 5, 6]


DOCUMENTS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 2), st.booleans(), st.booleans()), min_size=3, max_size=25
)
"""Family (texts that are near-duplicates), variant (texts that are equal), and of a text and a document, by chance:
whether it holds an evaluation item, and whether its source is held out."""


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=DOCUMENTS, exact=st.booleans(), near=st.booleans(), held_sources=st.booleans())
def test_decisions_against_brute_force(rows, exact, near, held_sources):
    """Whatever the order and the reason of dropping: what is recorded as kept is kept, and a cluster is one."""
    texts = [(family, variant) for family, variant, _, _ in rows]
    items = {text for text, row in zip(texts, rows, strict=True) if row[2] and text[1]}
    matrix = np.zeros((len(rows), deduplication.PERMUTATIONS), np.uint32)
    for row, (family, variant) in enumerate(texts):
        matrix[row] = 1000 * (family + 1) + np.arange(deduplication.PERMUTATIONS)
        matrix[row, 16 * variant : 16 * variant + 16] += 500
    ids = np.array([hash(text) % 2**64 for text in texts], np.uint64)
    held = np.array([row[3] and held_sources for row in rows])
    contaminated = np.array([text in items for text in texts])
    section = data("x", deduplication={"exact": exact, "near": near, "similarity": 0.7}, heldout_fraction=0.3)
    try:
        decisions, leaders = decide(section, ids, matrix, contaminated, held)
    except UserError:
        return
    same = [text if exact and not near else text[0] if near else row for row, text in enumerate(texts)]
    for row, text in enumerate(texts):
        others = [other for other in range(len(rows)) if same[other] == same[row]]
        keeper = next((other for other in others if not contaminated[other]), None)
        if contaminated[row]:
            assert decisions[row] == CONTAMINATED
        elif row == keeper or (not exact and keeper is not None and text == texts[keeper]):
            assert decisions[row] in (TRAIN, HELDOUT, HELDOUT_NEAR) and leaders[row] == row
        else:
            assert decisions[row] in (NEAR, EXACT, HELDOUT_NEAR)
            assert leaders[row] == keeper
            assert (decisions[row] == EXACT) <= (text in texts[:row]) and (decisions[row] == NEAR) <= near
    kept = {texts[row] for row in np.flatnonzero((decisions == TRAIN) | (decisions == HELDOUT))}
    for row in np.flatnonzero((decisions == NEAR) | (decisions == EXACT)):
        assert texts[leaders[row]] in kept
    for code, other in itertools.permutations((TRAIN, HELDOUT)):
        families = {texts[row][0] for row in np.flatnonzero(decisions == code)}
        assert not families & {texts[row][0] for row in np.flatnonzero(decisions == other)}
    if exact and near:
        sizes = [same.count(family) for family in set(same)]
        clean = [size for size, family in zip(sizes, set(same), strict=True) if size > 1]
        counted = deduplication.cluster_counts(leaders)
        assert counted == {"clusters": len(clean), "largest": max(sizes)}
