"""The verb `trace`: which spans of a text occur verbatim in a run's training tokens, and in which documents.

One pass over the mapped rows, without an index. Spans never cross a document's end, and count if chance (every token
drawn by its frequency) would give less than `EXPECTED` of them; OLMoTrace (arXiv 2504.07096) ranks likewise.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
import yaml
from typer import Argument, Option

from nanophi.core.errors import UserError
from nanophi.core.jobs import cores
from nanophi.core.names import resolve

SHORTEST = 6
"""Tokens of a span at least."""
EXPECTED = 0.01
EXAMPLES, AROUND = 3, 12
"""Documents that are quoted for each span, and tokens of each on both sides of it."""
_BLOCK = 1 << 20


@dataclasses.dataclass
class Span:
    """Tokens `start` to `start + length` of the text, which are in `documents` documents, by chance in `expected`."""

    start: int
    length: int
    occurrences: int
    documents: int
    expected: float
    places: list[tuple[int, int, int]]  # some of them, with the beginning and the end of their documents


class Stream:
    """Rows of tokens (of `train` and the decay, whose documents count again) as one memory-mapped stream of int32."""

    def __init__(self, tokens: Path, end: int) -> None:
        import datasets

        chunks: list[pa.Array] = []
        decay = tokens.with_name("decay")
        for part in (tokens, *([decay] if tokens.name == "train" and decay.is_dir() else [])):
            chunks += [pa.array([end], pa.int32())] if chunks else []  # no document continues in another text
            rows = datasets.load_from_disk(str(part)).data.column("input_ids")
            chunks += [chunk.flatten() for chunk in rows.chunks]
        self.tokens, self.end = pa.chunked_array(chunks), end

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens `first` to `last` (exclusive), clipped to the stream."""
        first = max(0, first)
        return np.asarray(self.tokens.slice(first, max(0, last - first)).to_numpy())


def find_spans(stream: Stream, ids: np.ndarray, vocabulary: int, shortest: int = SHORTEST) -> list[Span]:
    """The spans of `ids` (int, of a text without special tokens) in the stream that no other has, longest first."""
    if len(ids) < shortest:
        return []
    wanted = np.zeros(vocabulary + 1, bool)
    wanted[ids[ids < vocabulary]] = True
    wanted[stream.end] = False
    grams = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), shortest)
    weights = np.random.default_rng(0).integers(1, 1 << 62, shortest, dtype=np.int64) | 1
    hashes = (grams * weights).sum(1)
    order = np.argsort(hashes, kind="stable")
    keys = hashes[order]
    blocks = range(0, max(0, len(stream) - shortest + 1), _BLOCK)

    def scan(first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Runs of matches that begin in a block: place, start in the text, length; token counts; ends of documents."""
        block = stream.read(first, first + _BLOCK + shortest - 1)
        marked = wanted[block]
        run, length = marked, 1
        while length < shortest:  # doubling: `run[i]` is whether `length` marked tokens follow from i
            step = min(length, shortest - length)
            run, length = run[: len(run) - step] & run[step:], length + step
        places = np.flatnonzero(run)
        own = block[: min(_BLOCK, len(block))]
        counts = np.bincount(own[marked[: len(own)]], minlength=vocabulary + 1)
        ends = np.flatnonzero(own == stream.end) + first
        candidates = (block[places[:, None] + np.arange(shortest)] * weights).sum(1)
        low, high = np.searchsorted(keys, candidates, "left"), np.searchsorted(keys, candidates, "right")
        repeats = high - low
        where = np.repeat(places + first, repeats)
        offsets = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        starts = order[np.repeat(low, repeats) + offsets]
        return where, starts, counts, ends

    with ThreadPoolExecutor(cores()) as threads:
        results = list(threads.map(scan, blocks))
    if not results:
        return []
    where, starts = (np.concatenate([result[part] for result in results]) for part in (0, 1))
    counts = np.sum([result[2] for result in results], axis=0)
    ends = np.concatenate([result[3] for result in results])
    if not len(where):
        return []
    # Matches of n-grams that follow each other on one diagonal are one match.
    diagonal = where - starts
    ranked = np.lexsort((where, diagonal))
    where, starts, diagonal = where[ranked], starts[ranked], diagonal[ranked]
    new = np.r_[True, (np.diff(diagonal) != 0) | (np.diff(where) != 1)]
    first = np.flatnonzero(new)
    lengths = np.diff(np.r_[first, len(where)]) + shortest - 1
    where, starts = where[first], starts[first]
    stops, documents, edges = starts + lengths, np.searchsorted(ends, where), np.r_[-1, ends, len(stream)]
    with np.errstate(divide="ignore"):
        surprise = np.log(counts[np.minimum(ids, vocabulary)] / len(stream))
    found = []
    for start, stop in _outermost(sorted({*zip(starts.tolist(), stops.tolist(), strict=True)})):
        expected = float(np.exp(np.log(len(stream)) + surprise[start:stop].sum()))
        if expected < EXPECTED:
            inside = np.flatnonzero((starts <= start) & (stops >= stop))
            places = where[inside] + start - starts[inside]
            held = documents[inside]
            known = np.column_stack([places, edges[held] + 1, edges[held + 1]])[np.argsort(places)[:64]].tolist()
            found.append(Span(start, stop - start, len(inside), len(np.unique(held)), expected, known))
    return sorted(found, key=lambda span: (-span.length, span.start))


def _outermost(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Of (start, stop) pairs in order those that no other one contains."""
    reached = -1
    for _, group in itertools.groupby(spans, key=lambda span: span[0]):
        start, stop = max(group)
        if stop > reached:
            yield start, stop
            reached = stop


def trace_text(run: Path, text: str, shortest: int = SHORTEST) -> list[dict[str, Any]]:
    """Each span of a text that occurs in a run's training tokens, as JSON, with documents that hold it."""
    for part in ("data/tokens/train", "data/tokenizer/tokenizer.json", "recipe.yaml"):
        if not (run / part).exists():
            raise UserError(f"{run} has no {part}; a trace needs a run directory with its training tokens")
    from transformers import AutoTokenizer

    from nanophi.data.documents import id_of

    tokenizer = AutoTokenizer.from_pretrained(run / "data/tokenizer")
    stream = Stream(run / "data/tokens/train", tokenizer.eos_token_id)
    ids = np.array(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], np.int64)
    rows: list[dict[str, Any]] = []
    for span in find_spans(stream, ids, len(tokenizer), shortest):
        quoted: dict[int, tuple[str, str]] = {}
        for place, first, last in span.places:
            if first not in quoted and len(quoted) < EXAMPLES:
                around = stream.read(max(first, place - AROUND), min(last, place + span.length + AROUND))
                document = str(tokenizer.decode(stream.read(first, last)))
                quoted[first] = id_of(document), str(tokenizer.decode(around))
        row = dataclasses.asdict(span) | {"text": tokenizer.decode(ids[span.start : span.start + span.length])}
        del row["places"]
        rows.append(row | {"examples": list(quoted.values())})
    known = _documents(run, {id_ for row in rows for id_, _ in row["examples"]})
    for row in rows:
        row["examples"] = [known.get(id_, {}) | {"context": context} for id_, context in row["examples"]]
    return rows


def _documents(run: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Source, score and licence of some of a run's training documents, by id; what is not known is left out."""
    import pyarrow.parquet as pq

    path = run / "data/scores/scores.parquet"
    if not ids or not path.is_file():
        return {}
    sources = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["data"]["sources"]
    licenses = {source["name"] or source["hub"] or source["files"]: source.get("license") for source in sources}
    found = pq.read_table(path, columns=["id", "source", "quality_score"], filters=[("id", "in", ids)]).to_pylist()
    return {row["id"]: row | {"license": licenses.get(row["source"])} for row in found}


def trace(
    run: Annotated[Path, Argument(metavar="RUN", help="Run directory with its training tokens.")],
    text: Annotated[str, Argument(help="Text to look for, or with --generate the prompt of one.")],
    generate: Annotated[bool, Option("--generate", help="Trace what the run's model writes after the text.")] = False,
    shortest: Annotated[int, Option(min=2, help="Tokens of a span at least.")] = SHORTEST,
    as_json: Annotated[bool, Option("--json", help="Print the spans as JSON.")] = False,
) -> None:
    """Find which parts of a text occur verbatim in a run's training text, and where.

    Example: nanophi trace runs/demo "The default value is None"

    What the model itself writes: nanophi trace runs/demo --generate "The function returns"
    """
    named = resolve(run)
    if named.folder is None:
        raise UserError(f"{run} is on the Hub; a trace needs a run directory with its training tokens")
    if generate:
        from nanophi.core import sample

        text = sample.generate(named.model(), [text])[0]
    spans = trace_text(named.folder, text, shortest)
    if as_json:
        typer.echo(json.dumps({"text": text, "spans": spans}, indent=2, ensure_ascii=False))
        return
    typer.echo(f"{text}\n" if generate else "", nl=generate)
    for span in spans:
        chance = 10 ** math.floor(math.log10(span["expected"])) if span["expected"] > 1e-300 else 0
        typer.echo(
            f"{span['length']} tokens in {span['documents']:,} documents ({chance:.0e} by chance): {span['text']!r}"
        )
        for one in span["examples"]:
            known = [str(one[key]) for key in ("source", "id", "license") if one.get(key)]
            known += [f"score {one['quality_score']:.2f}"] if one.get("quality_score") is not None else []
            typer.echo(f"    {', '.join(known) or 'document'}: {one['context']!r}")
    if not spans:
        typer.echo(f"no span of {shortest} tokens or more that would surprise")
