"""Documents that contain evaluation items, found by shared word n-grams.

Protocol: a document is contaminated if it shares one `ngram` (13 words by default) with an item of a benchmark's scored
splits, as in GPT-3 (Brown et al., 2020, appendix C), which also uses shorter n-grams, down to 8, for short items. An
item is searched for in several forms: its question, the question followed by each choice (or with the choice in its
blank), and followed by all of them. A form of 8 to `ngram - 1` words must occur as a whole. Items that are shorter in
every form are counted as too short.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from nanophi.core.errors import UserError
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

    Attributes:
        names: benchmarks, `dataset id[/config]`.
        items: items per benchmark; `too_short`: how many of these are too short to be found.
        grams: by n, sorted uint64 n-gram hashes.
        owners: by n, uint32 index of the item that each n-gram came from (over all benchmarks).
        starts: int64 `[names + 1]`; benchmark `b` owns items `starts[b]:starts[b + 1]`.
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
            table = np.zeros(1 << bits, bool)
            table[known >> shift] = True
            result[length] = table, shift
        return result

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.items)])

    def save(self, path: Path) -> None:
        """Write to an `.npz` file (plain arrays)."""
        arrays: dict[str, Any] = {
            "names": np.array(self.names),
            "items": np.array(self.items),
            "too_short": np.array(self.too_short),
        }
        for length in self.grams:
            arrays[f"grams-{length}"], arrays[f"owners-{length}"] = self.grams[length], self.owners[length]
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> BenchmarkIndex:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            lengths = sorted(int(name.removeprefix("grams-")) for name in arrays if name.startswith("grams-"))
            return cls(
                arrays["names"].tolist(),
                arrays["items"].tolist(),
                arrays["too_short"].tolist(),
                {length: arrays[f"grams-{length}"] for length in lengths},
                {length: arrays[f"owners-{length}"] for length in lengths},
            )


def load_benchmarks(folder: Path, ngram: int) -> BenchmarkIndex:
    """Read every benchmark in a folder of Hub-layout datasets and index the items of the splits that may be scored.

    Those are `test` and `validation`, or the only one that the dataset has.

    Raises:
        UserError: if the folder is missing or holds no benchmark.
    """
    if not folder.is_dir():
        raise UserError(f"data.decontamination.benchmarks: {folder} is not a folder")
    names, items, too_short = [], [], []
    grams: dict[int, list[np.ndarray]] = {}
    owners: dict[int, list[np.ndarray]] = {}
    first = 0
    for name, files in _benchmarks(folder):
        names.append(name)
        items.append(0)
        too_short.append(0)
        for rows in (rows for file in files for rows in _rows(file)):
            renderings = [_renderings(row, ngram) for row in rows]
            item = np.repeat(np.arange(len(rows)), [len(texts) for texts in renderings])
            words = hash_words([text.encode() for texts in renderings for text in texts])
            found = np.zeros(len(rows), bool)
            for length in range(min(SHORTEST, ngram), ngram + 1):
                chosen = words.counts == length if length < ngram else words.counts >= length
                hashed = ngrams(words.take(chosen), length)
                grams.setdefault(length, []).append(hashed.hashes)
                owners.setdefault(length, []).append(np.repeat(item[chosen] + first, hashed.counts).astype(np.uint32))
                found[item[chosen]] = True
            items[-1] += len(rows)
            too_short[-1] += int((~found).sum())
            first += len(rows)
    if not names:
        raise UserError(
            f"data.decontamination.benchmarks: {folder} holds no dataset (folders with README.md and parquet)"
        )
    index = BenchmarkIndex(names, items, too_short, {}, {})
    for length in grams:
        values, items_of = np.concatenate(grams[length]), np.concatenate(owners[length])
        order = np.lexsort((items_of, values))
        values, items_of = values[order], items_of[order]
        if len(values):
            # An n-gram of several items is there once for each.
            new = np.append(True, (np.diff(values) != 0) | (np.diff(items_of) != 0))
            index.grams[length], index.owners[length] = values[new], items_of[new]
    return index


def find(index: BenchmarkIndex, words: Words) -> list[list[int]]:
    """For each document the items (indices over all benchmarks, ascending) that it shares an n-gram with."""
    hits: list[set[int]] = [set() for _ in range(len(words.offsets) - 1)]
    for length, hashed in ngrams_of_lengths(words, index.grams).items():
        known, (table, shift) = index.grams[length], index.tables[length]
        maybe = np.flatnonzero(table[hashed.hashes >> shift])
        values = hashed.hashes[maybe]
        first = np.searchsorted(known, values)
        count = np.searchsorted(known, values, side="right") - first
        document = np.repeat(np.searchsorted(hashed.offsets, maybe, side="right") - 1, count)
        position = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        for owner, where in zip(index.owners[length][position].tolist(), document.tolist(), strict=True):
            hits[where].add(owner)
    return [sorted(items) for items in hits]


def report(index: BenchmarkIndex, hits: list[tuple[str, str, list[int]]]) -> dict[str, Any]:
    """Hits by benchmark.

    Args:
        index: the items that were searched for.
        hits: `(document id, source, items)` of every contaminated document.

    Returns:
        `{benchmark: {items, too_short, items_found, documents, examples}}`.
    """
    starts = index.starts
    result: dict[str, Any] = {}
    found: list[dict[int, tuple[str, str]]] = [{} for _ in index.names]
    documents = [0] * len(index.names)
    for document, source, items in hits:
        benchmarks = np.searchsorted(starts, items, side="right") - 1
        for benchmark in set(benchmarks.tolist()):
            documents[benchmark] += 1
        for benchmark, item in zip(benchmarks.tolist(), items, strict=True):
            found[benchmark].setdefault(item - int(starts[benchmark]), (document, source))
    for number, name in enumerate(index.names):
        examples = [
            {"item": item, "document": document, "source": source}
            for item, (document, source) in sorted(found[number].items())[:20]
        ]
        result[name] = {
            "items": index.items[number],
            "too_short": index.too_short[number],
            "items_found": len(found[number]),
            "documents": documents[number],
            "examples": examples,
        }
    return result


def _benchmarks(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """`(name, files of the splits that may be scored)` of every dataset config below a folder, sorted."""
    for readme in (path for path in walk(folder) if path.name == "README.md"):
        root = readme.parent
        text = readme.read_text(encoding="utf-8")
        parts = text.split("---", 2)
        try:
            card = yaml.safe_load(parts[1]) if text.startswith("---") and len(parts) == 3 else {}
        except yaml.YAMLError:
            raise UserError(f"{readme}: the metadata is not valid YAML") from None
        configs = (card or {}).get("configs", [])
        found: dict[str, list[Path]] = {}
        for config in configs:
            splits = {
                entry["split"]: entry["path"] for entry in config.get("data_files", []) if isinstance(entry, dict)
            }
            # Of HellaSwag, Winogrande and PIQA `test` has no answers, and `validation` is scored; BLiMP has one split.
            scored = [name for name in ("test", "validation") if name in splits]
            if len(splits) == 1:
                scored = list(splits)
            wanted = [splits[name] for name in scored]
            patterns = [pattern for paths in wanted for pattern in (paths if isinstance(paths, list) else [paths])]
            files = sorted(file for pattern in patterns for file in root.glob(pattern))
            name = root.relative_to(folder).as_posix()
            config_name = config.get("config_name", "default")
            # Many configs are the subjects of one benchmark (MMLU), a few are different benchmarks (ARC).
            if config_name != "default" and len(configs) <= 10:
                name = f"{name}/{config_name}"
            found.setdefault(name, []).extend(files)
        yield from ((name, files) for name, files in found.items() if files)


def _rows(file: Path) -> Iterator[list[dict[str, Any]]]:
    if file.suffix != ".parquet":
        raise UserError(f"{file}: benchmarks are read from parquet files")
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=512):
                yield batch.to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as parquet ({error})") from None


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
        if len(value) > 1:
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
