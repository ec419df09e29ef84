"""Items made from a run's tokens: the data behind `memorisation_train` and `memorisation_heldout`.

Does the model continue 32 tokens of a document with the next 32, greedily? The share of training documents for which it
does is the extraction rate of Carlini et al. 2023 (arXiv 2202.07646); the same of held-out documents is what can be
guessed. Documents, and the place in each, are drawn by hash. A run's tokens are needed; its text is not.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from nanophi.core.errors import UserError
from nanophi.data.stages import read_tokens
from nanophi.data.trace import Stream

ITEMS = 200
PROMPT, TARGET = 32, 32
NEAR = 0.1
"""Nearly verbatim: at most this share of the target's words and signs is inserted, deleted or replaced."""
WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_BLOCK = 1 << 20


def train(heldout: str, **_: Any) -> dict[str, Any]:
    """Items of documents that were trained on, with how often their tokens occur in the training stream."""
    return _items(Path(heldout), "train")


def heldout(heldout: str, **_: Any) -> dict[str, Any]:
    """Items of held-out documents. Some occur in the training stream too: what many documents share."""
    return _items(Path(heldout), "heldout")


def results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the generated text begins with the target, and whether it nearly does."""
    target = doc["target"].lstrip()  # some tokenizers do not decode white space at the beginning
    found, words = results[0].lstrip()[: len(target)], WORDS.findall(target)
    return {
        "verbatim": float(found == target),
        "near_verbatim": float(edit_distance(words, WORDS.findall(found)) <= NEAR * len(words)),
    }


def edit_distance(a: list[str], b: list[str]) -> int:
    """Fewest insertions, deletions and replacements that make `b` of `a` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def occurrences(stream: Stream, windows: np.ndarray) -> np.ndarray:
    """How often each window (int [windows, tokens]) occurs in a stream, by a polynomial hash modulo 2^64."""
    size = windows.shape[1]
    base = np.uint64(0x9E3779B97F4A7C15)
    inverse = np.uint64(pow(int(base), -1, 1 << 64))
    powers, inverses = (np.cumprod(np.r_[np.uint64(1), np.full(_BLOCK + size, x, np.uint64)]) for x in (base, inverse))
    hashes = (windows.astype(np.uint64) * powers[:size]).sum(1)
    keys, place = np.unique(hashes, return_inverse=True)
    marked = np.zeros(1 << 16, bool)
    marked[keys >> np.uint64(48)] = True
    counts = np.zeros(len(keys), np.int64)
    for first in range(0, len(stream) - size + 1, _BLOCK):
        block = stream.read(first, first + _BLOCK + size - 1).astype(np.uint64)
        sums = np.cumsum(np.r_[np.uint64(0), block * powers[: len(block)]])
        found = (sums[size:] - sums[:-size]) * inverses[: len(block) - size + 1]
        found = found[marked[found >> np.uint64(48)]]
        at = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
        counts += np.bincount(at[keys[at] == found], minlength=len(keys))
    return counts[place]


def _items(tokens: Path, split: str) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    read_tokens(tokens)
    tokenizer = AutoTokenizer.from_pretrained(tokens.parent / "tokenizer")
    stream = Stream(tokens / split, tokenizer.eos_token_id)
    size = PROMPT + TARGET
    rows: dict[bytes, dict[str, Any]] = {}
    for _, start, stop in sorted(_documents(stream, size)):
        ids = stream.read(start, stop)
        place = int.from_bytes(hashlib.sha256(b"place" + ids.tobytes()).digest()[:8]) % (len(ids) - size + 1)
        window = ids[place : place + size]
        prompt, text = (str(tokenizer.decode(part)) for part in (window[:PROMPT], window))
        encoded = tokenizer([prompt, text], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if encoded == [window[:PROMPT].tolist(), window.tolist()] and text.startswith(prompt):
            rows[window.tobytes()] = {"prompt": prompt, "target": text[len(prompt) :]}
        if len(rows) == ITEMS:
            break
    if not rows:
        raise UserError(f"memorisation: no document of {size} tokens or more in {tokens / split}; leave this suite out")
    windows = np.array([np.frombuffer(window, np.int32) for window in rows])
    counts = occurrences(Stream(tokens / "train", tokenizer.eos_token_id), windows)
    items = [{**row, "occurrences": int(count)} for row, count in zip(rows.values(), counts, strict=True)]
    return {"test": datasets.Dataset.from_list(items)}


def _documents(stream: Stream, size: int) -> list[tuple[bytes, int, int]]:
    """Of each document of `size` tokens or more: a hash of its first tokens, and where it begins and ends."""
    parts = range(0, len(stream), _BLOCK)
    ends = [np.flatnonzero(stream.read(first, first + _BLOCK) == stream.end) + first for first in parts]
    stops = np.r_[np.concatenate(ends), len(stream)]
    starts = np.r_[0, stops[:-1] + 1]
    long = stops - starts >= size
    return [
        (hashlib.sha256(stream.read(start, start + size).tobytes()).digest(), start, stop)
        for start, stop in zip(starts[long].tolist(), stops[long].tolist(), strict=True)
    ]
