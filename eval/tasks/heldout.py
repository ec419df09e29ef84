"""Items made from a run's held-out documents: the data behind the `heldout_*.yaml` tasks.

Items depend on the documents only, and are drawn by the hash of a document's id: all models that are measured on the
same documents get the same items, so their results can be paired.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from nanophi.core.errors import UserError
from nanophi.data.documents import heldout as read_heldout

if TYPE_CHECKING:
    import datasets

MAX_BYTES = 1 << 20  # of text for bits per byte: a minute for a small model on a CPU
MAX_DOCUMENT_BYTES = 8192  # so that a few long documents do not make up the whole sample
CONTEXT_CHARACTERS = 400
CONTINUATION_CHARACTERS = 120
SENTENCES_CHARACTERS = 400  # of three sentences; suites.check_heldout says whether they fit a model's context
MAX_ITEMS = 400
CHOICES = 4
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)")


def documents(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Documents in the order of their hash, up to `MAX_BYTES` of UTF-8 text, with columns id, source, text."""
    rows: list[dict[str, Any]] = []
    total = 0
    for row in texts(heldout):
        total += len(row["text"].encode())
        if rows and total > MAX_BYTES:
            break
        rows.append(row)
    return _table(rows)


def texts(heldout: str) -> Iterator[dict[str, Any]]:
    """Every document as it is scored: id, source, and the beginning of its text."""
    for row in _read(heldout):
        yield {**row, "text": row["text"].encode()[:MAX_DOCUMENT_BYTES].decode(errors="ignore")}


def doc_hash(row: dict[str, Any]) -> str:
    """What lm-eval writes as `doc_hash` of an item."""
    return hashlib.sha256(json.dumps(row, indent=2, ensure_ascii=False).encode()).hexdigest()


def kept_and_dropped(results: Mapping[str, Sequence[Path]], hashes: Sequence[str]) -> dict[str, list[int]]:
    """Positions in lm-eval's `hashes` of documents, of those that a run's filter keeps, and of those that it drops.

    A filtered model may be worse on all held-out text and better on the text that it was made for. The filter is that
    of the first run with one that any result file belongs to.
    """
    for label, files in results.items():
        for run in {Path(file).resolve().parent.parent for file in files}:
            scores, own = run / "data/quality/heldout.parquet", run / "data/documents"
            if scores.exists() and own.is_dir():
                kept = {row["id"]: bool(row["kept"]) for row in pq.read_table(scores).to_pylist()}
                of = {doc_hash(row): kept[row["id"]] for row in texts(str(own))}
                parts = {f"held-out text, kept by {label}": True, f"held-out text, dropped by {label}": False}
                return {name: [n for n, x in enumerate(hashes) if of.get(x) is keep] for name, keep in parts.items()}
    return {}


def continuation(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """A context and four passages, of which passage `gold` follows it in the document.

    The other three are from the same position in other documents of the same source, chosen for a similar length.
    All are cut at word boundaries, and a choice starts with its space.
    """
    rows: list[dict[str, Any]] = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in _read(heldout):
        split = _cut(row["text"])
        if split is not None and len(rows) < 2 * MAX_ITEMS:
            rows.append({**row, "context": split[0], "passage": split[1]})
            groups.setdefault(row["source"], []).append(rows[-1])
    items = []
    for row in rows:
        others = [other for other in groups[row["source"]] if other["passage"] != row["passage"]]
        # Nearest in length among a few drawn by hash, so that no passage of unusual length serves everywhere.
        others = sorted(others, key=lambda other: _draw(row, other["id"]))[: 4 * CHOICES]
        others.sort(key=lambda other: abs(len(other["passage"]) - len(row["passage"])))
        if len({other["passage"] for other in others[: CHOICES - 1]}) == CHOICES - 1:
            items.append(_item(row, row["context"], row["passage"], [o["passage"] for o in others[: CHOICES - 1]]))
    return _dataset(items, "heldout_continuation: too few documents of 600 characters or more in any one source")


def order(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """A context and the three sentences that follow it, in their true order (`gold`) and in three others."""
    items = []
    for row in _read(heldout):
        sentences = SENTENCE_END.split(" ".join(row["text"].split()))
        start = next((i for i in range(1, len(sentences)) if sum(map(len, sentences[:i])) >= 100), None)
        if start is None or len(sentences) < start + 3:
            continue
        a, b, c = following = sentences[start : start + 3]
        if len({*following}) < 3 or min(map(len, following)) < 20 or sum(map(len, following)) > SENTENCES_CHARACTERS:
            continue
        shuffled = sorted(([a, c, b], [b, a, c], [b, c, a], [c, a, b], [c, b, a]), key=lambda o: _draw(row, "".join(o)))
        context = " ".join(sentences[:start])[-CONTEXT_CHARACTERS:]
        items.append(_item(row, context, " " + " ".join(following), [" " + " ".join(o) for o in shuffled[:3]]))
    return _dataset(items, "heldout_order: too few documents with five sentences")


def _read(heldout: str) -> list[dict[str, Any]]:
    return read_heldout(Path(heldout), ["id", "source", "text"])


def _draw(row: dict[str, Any], salt: str) -> bytes:
    return hashlib.sha256(f"{row['id']}:{salt}".encode()).digest()


def _cut(text: str) -> tuple[str, str] | None:
    """A context and what follows it, both cut at a space. None if the text is too short."""
    middle = text.find(" ", CONTEXT_CHARACTERS)
    end = text.find(" ", middle + CONTINUATION_CHARACTERS)
    if middle < 0 or end < 0 or end - middle > 2 * CONTINUATION_CHARACTERS or not text[middle:end].strip():
        return None
    return text[:middle][-2 * CONTEXT_CHARACTERS :], text[middle:end]


def _item(row: dict[str, Any], context: str, true: str, false: list[str]) -> dict[str, Any]:
    choices = sorted([true, *false], key=lambda choice: _draw(row, choice))
    item = {"id": row["id"], "source": row["source"], "context": context}
    return {**item, "choices": choices, "gold": choices.index(true)}


def _dataset(items: list[dict[str, Any]], problem: str) -> dict[str, datasets.Dataset]:
    if not items:
        raise UserError(f"{problem}; name other suites or tasks, or hold out more text")
    return _table(items[:MAX_ITEMS])


def _table(rows: list[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    import datasets  # not for whoever only compares

    return {"test": datasets.Dataset.from_list(rows)}
