"""Documents that contain evaluation items: they share one `ngram` (13 words by default) with an item of a scored split.

As in GPT-3 (Brown et al., 2020, appendix C), items of 8 to `ngram - 1` words must occur as a whole. An item's question
is searched for alone, with each choice, and with all of them. Items too short in every form are counted.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nanophi.core.errors import UserError, user_errors
from nanophi.core.names import walk
from nanophi.data.ngrams import Words, hash_words, ngrams, ngrams_of_lengths

SHORTEST = 8
_QUESTIONS = ("question", "ctx", "sentence", "query", "prompt", "goal", "text")
_CHOICES = (
    *("choices", "endings", "options", "option1", "option2", "mc1_targets", "mc2_targets", "answer"),
    *("sol1", "sol2", "correct_answer", "distractor1", "distractor2", "distractor3", "sentence_good", "sentence_bad"),
)


@dataclasses.dataclass(frozen=True)
class BenchmarkIndex:
    """Hashed n-grams of evaluation items.

    `names` are benchmarks (`dataset id[/config]`), with their number of `items`, and of those that are `too_short` to
    be found; by n, `grams` are sorted uint64 hashes and `owners` uint32 indices (over all benchmarks) of their items.
    """

    names: list[str]
    items: list[int]
    too_short: list[int]
    grams: dict[int, np.ndarray]
    owners: dict[int, np.ndarray]

    @functools.cached_property
    def tables(self) -> dict[int, tuple[np.ndarray, np.uint64]]:
        """By n, which leading bits (all but `shift`) any n-gram has: rules out most of a text's without a search."""
        result = {}
        for length, known in self.grams.items():
            bits = max(10, (16 * len(known)).bit_length())
            shift = np.uint64(64 - bits)
            result[length] = np.zeros(1 << bits, bool), shift
            result[length][0][known >> shift] = True
        return result

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Benchmark `b` owns items `starts[b]:starts[b + 1]`, int64 `[names + 1]`."""
        return np.concatenate([[0], np.cumsum(self.items)])


def load_benchmarks(folder: Path, ngram: int) -> BenchmarkIndex:
    """Index the items of every benchmark in a folder of Hub-layout datasets, of the splits that may be scored."""
    if not folder.is_dir():
        raise UserError(f"data.decontamination.benchmarks: {folder} is not a folder")
    index, shortest = BenchmarkIndex([], [], [], {}, {}), min(SHORTEST, ngram)
    pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = collections.defaultdict(list)
    for name, files in _benchmarks(folder):
        items, too_short = 0, 0
        for rows in (rows for file in files for rows in _rows(file)):
            renderings = [_renderings(row, ngram) for row in rows]
            item = np.repeat(np.arange(len(rows)), [len(texts) for texts in renderings])
            words = hash_words([text.encode() for texts in renderings for text in texts])
            for length in range(shortest, ngram + 1):
                chosen = words.counts == length if length < ngram else words.counts >= length
                hashed = ngrams(words.take(chosen), length)
                owners = np.repeat(item[chosen] + sum(index.items) + items, hashed.counts).astype(np.uint32)
                pairs[length].append((hashed.hashes, owners))
            too_short += len(rows) - len(np.unique(item[words.counts >= shortest]))
            items += len(rows)
        index.names.append(name)
        index.items.append(items)
        index.too_short.append(too_short)
    if not index.names:
        raise UserError(f"data.decontamination.benchmarks: {folder} holds no dataset (with README.md and parquet)")
    for length, found in pairs.items():
        values, owners = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((owners, values))
        if len(order):
            # An n-gram of several items is there once for each.
            values, owners = values[order], owners[order]
            new = np.append(True, (np.diff(values) != 0) | (np.diff(owners) != 0))
            index.grams[length], index.owners[length] = values[new], owners[new]
    return index


def find(index: BenchmarkIndex, words: Words) -> list[list[int]]:
    """For each document the items (indices over all benchmarks, ascending) that it shares an n-gram with."""
    hits: list[set[int]] = [set() for _ in range(len(words.offsets) - 1)]
    for length, hashed in ngrams_of_lengths(words, index.grams).items():
        known, (table, shift) = index.grams[length], index.tables[length]
        maybe = np.flatnonzero(table[hashed.hashes >> shift])
        values, owners = hashed.hashes[maybe], index.owners[length]
        first, last = np.searchsorted(known, values), np.searchsorted(known, values, side="right")
        hit = np.flatnonzero(first < last)
        document = np.searchsorted(hashed.offsets, maybe[hit], side="right") - 1
        for where, low, high in zip(document.tolist(), first[hit], last[hit], strict=True):
            hits[where].update(owners[low:high].tolist())
    return [sorted(items) for items in hits]


def report(index: BenchmarkIndex, hits: list[tuple[str, str, list[int]]]) -> dict[str, Any]:
    """Hits by benchmark: `{name: {items, too_short, items_found, documents, examples}}`.

    `hits` are `(document id, source, items)` of every contaminated document.
    """
    found: list[dict[int, dict[str, Any]]] = [{} for _ in index.names]
    documents: collections.Counter[int] = collections.Counter()
    for document, source, items in hits:
        benchmarks = (np.searchsorted(index.starts, items, side="right") - 1).tolist()
        documents.update(set(benchmarks))
        for benchmark, item in zip(benchmarks, items, strict=True):
            number = item - int(index.starts[benchmark])
            found[benchmark].setdefault(number, {"item": number, "document": document, "source": source})
    return {
        name: {
            "items": index.items[number],
            "too_short": index.too_short[number],
            "items_found": len(found[number]),
            "documents": documents[number],
            "examples": [example for _, example in sorted(found[number].items())[:20]],
        }
        for number, name in enumerate(index.names)
    }


def _benchmarks(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """`(name, files of the splits that may be scored)` of every dataset config below a folder, sorted."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import metadata_load

    for readme in (path for path in walk(folder) if path.name == "README.md"):
        root = readme.parent
        with user_errors(f"{readme}: the metadata is not a dataset card's"):
            configs = MetadataConfigs.from_dataset_card_data(metadata_load(readme) or {})
        found: dict[str, list[Path]] = collections.defaultdict(list)
        for config, fields in configs.items():
            splits = sanitize_patterns(fields.get("data_files", {}))
            # Of HellaSwag, Winogrande and PIQA `test` has no answers, and `validation` is scored; BLiMP has one split.
            scored = splits if len(splits) == 1 else [split for split in ("test", "validation") if split in splits]
            files = sorted(file for split in scored for pattern in splits[split] for file in root.glob(pattern))
            # Many configs are the subjects of one benchmark (MMLU), a few are different benchmarks (ARC).
            inner = f"/{config}" if config != "default" and len(configs) <= 10 else ""
            found[root.relative_to(folder).as_posix() + inner] += files
        yield from ((name, files) for name, files in found.items() if files)


def _rows(file: Path) -> Iterator[list[dict[str, Any]]]:
    if file.suffix != ".parquet":
        raise UserError(f"{file}: benchmarks are read from parquet files")
    with user_errors(f"{file} cannot be read as parquet"), pq.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=512):
            yield batch.to_pylist()


def _renderings(row: dict[str, Any], ngram: int) -> list[str]:
    """The forms in which an item may occur in a document, without n-grams that an earlier form has."""
    question = " ".join(text for key in _QUESTIONS for text in _strings(row.get(key)))
    choices = [text for key in _CHOICES for text in _strings(row.get(key))]
    if "_" in question.split():
        return [question.replace("_", choice) for choice in choices]
    # Of a long question only its end makes new n-grams with what follows. A piece between spaces may be no word to
    # `hash_words`, or several, so this takes more of them than needed.
    end = " ".join(question.split()[-2 * ngram :])
    forms = [question, *(f"{end} {choice}" for choice in choices), " ".join([end, *choices])]
    return list(dict.fromkeys(forms))


def _strings(value: Any) -> Iterator[str]:
    """Texts in a value of a benchmark's column; labels (`A`, `1`) are no texts."""
    if isinstance(value, str):
        yield from [value] if len(value) > 1 else []
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)
