"""Hashes of words and word n-grams for a whole batch of documents at once, in numpy: about 70 MB/s on one core.

A word is a run of ASCII letters and digits, lower-cased, or of other letters' bytes; everything else separates words,
typographic punctuation as its ASCII spelling does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence

import numpy as np

_BASE = 0x9E3779B97F4A7C15
# Small enough that a chunk's arrays (eight bytes per byte of text) stay in the processor's cache.
_CHUNK_BYTES = 256 << 10


_CHARACTERS = np.array(
    [ord(chr(code).lower()) * chr(code).isalnum() if code < 128 else code for code in range(256)], np.uint8
)
"""Byte -> byte of a word in lower case; 0 for what separates words."""


@dataclasses.dataclass(frozen=True)
class Words:
    """Hashed words of a batch: uint64 `hashes`; document `i` has `hashes[offsets[i]:offsets[i + 1]]`."""

    hashes: np.ndarray
    offsets: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Words per document, int64 `[documents]`."""
        return np.diff(self.offsets)

    def take(self, documents: np.ndarray) -> Words:
        """The words of some documents, given as bool `[documents]`."""
        counts = self.counts
        offsets = np.concatenate([[0], np.cumsum(counts[documents])])
        return Words(self.hashes[np.repeat(documents, counts)], offsets)


def hash_words(texts: Sequence[bytes]) -> Words:
    """Hash every word of every document (UTF-8 bytes), the same in every process and batch.

    A word's hash is a polynomial in its bytes modulo 2**64, evaluated by one cumulative product and one segmented sum.
    """
    hashes, counts = [np.zeros(0, np.uint64)], [np.zeros(1, np.int64)]
    chunk: list[bytes] = []
    size = 0
    for number, text in enumerate(texts, 1):
        chunk.append(text)
        size += len(text)
        if number == len(texts) or size + len(texts[number]) > _CHUNK_BYTES:
            chunk_hashes, chunk_counts = _hash_chunk(chunk)
            hashes.append(chunk_hashes)
            counts.append(chunk_counts)
            chunk, size = [], 0
    return Words(np.concatenate(hashes), np.cumsum(np.concatenate(counts)))


_PUNCTUATION = (
    (0xE2, 0x80, 0x00, 0xFF),  # U+2000 to U+203F: spaces, dashes, quotes, ellipsis, marks without width
    (0xE2, 0x81, 0x00, 0xAF),  # U+2040 to U+206F
    (0xE2, 0x88, 0x92, 0x92),  # U+2212: minus
    (0xE3, 0x80, 0x00, 0x83),  # U+3000 to U+3003
    (0xEF, 0xBB, 0xBF, 0xBF),  # U+FEFF
)
"""UTF-8 of punctuation and spaces: first byte, second byte, lowest and highest third byte."""


def _blank_punctuation(characters: np.ndarray, text: np.ndarray) -> None:
    """Make these, and U+0080 to U+00BF (no-break space, angle quotes, signs), separators (in place)."""
    pairs = np.flatnonzero(text[:-1] == 0xC2)
    characters[pairs] = characters[pairs + 1] = 0
    for lead, second, lowest, highest in _PUNCTUATION:
        starts = np.flatnonzero(text[:-2] == lead)  # any text may end in the first bytes of a character
        last = text[starts + 2]
        starts = starts[(text[starts + 1] == second) & (last >= lowest) & (last <= highest)]
        for offset in range(3):
            characters[starts + offset] = 0


def _hash_chunk(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    joined = b"\n".join(texts) + b"\n"
    text = np.frombuffer(joined, np.uint8)
    characters = _CHARACTERS[text]
    if not joined.isascii():
        _blank_punctuation(characters, text)
    inside = characters != 0
    # The text ends in a separator, so every start has an end.
    edges = np.flatnonzero(np.diff(inside, prepend=False))
    starts = edges[0::2]
    if len(starts) == 0:
        return np.zeros(0, np.uint64), np.zeros(len(texts), np.int64)
    power, inverse = _powers(1 << len(characters).bit_length())
    hashes = np.add.reduceat(characters * power[: len(characters)], edges)[0::2] * inverse[starts]
    document_starts = np.cumsum([0] + [len(text) + 1 for text in texts])
    counts = np.diff(np.searchsorted(starts, document_starts))
    return _mix(hashes), counts


@functools.lru_cache(maxsize=2)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """`_BASE**i` and its inverse modulo 2**64 for `i < length`."""
    factors = (_BASE, pow(_BASE, -1, 1 << 64))
    powers = [np.cumprod(np.append(np.uint64(1), np.full(length - 1, factor, np.uint64))) for factor in factors]
    return powers[0], powers[1]


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread the entropy of uint64 values over all bits (in place)."""
    values ^= values >> np.uint64(32)
    values *= np.uint64(0xD6E8FEB86659FD93)
    values ^= values >> np.uint64(32)
    values *= np.uint64(0xD6E8FEB86659FD93)
    values ^= values >> np.uint64(32)
    return values


def ngrams(words: Words, n: int) -> Words:
    """Hashes of the `n`-grams of words within each document; a document of fewer than `n` words has none."""
    return ngrams_of_lengths(words, [n])[n]


def ngrams_of_lengths(words: Words, lengths: Collection[int]) -> dict[int, Words]:
    """`ngrams` for several lengths in one pass."""
    result = {}
    total = len(words.hashes)
    # Words from each one to the end of its document: an n-gram that needs more runs into the next document.
    room = np.repeat(words.offsets[1:], words.counts) - np.arange(total)
    hashes = words.hashes.copy()
    for n in range(1, max(lengths, default=0) + 1):
        if n > 1:
            hashes = hashes[:-1]
            hashes *= np.uint64(0x100000001B3)
            hashes += words.hashes[n - 1 :]
        if n in lengths:
            offsets = np.zeros(len(words.offsets), np.int64)
            np.cumsum(np.maximum(words.counts - (n - 1), 0), out=offsets[1:])
            result[n] = Words(_mix(hashes[room[: len(hashes)] >= n]), offsets)
    return result
