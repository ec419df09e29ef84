"""The verb `trace`: which spans of a text occur verbatim in a run's training tokens, and in which documents.

One pass over the mapped rows, without an index. Spans never cross a document's end, and count if chance (every token
drawn by its frequency) would give less than `EXPECTED` of them; OLMoTrace (arXiv 2504.07096) ranks likewise.
"""

import dataclasses
import functools
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

from nanophi.core.errors import UserError, user_errors
from nanophi.core.jobs import cores
from nanophi.core.names import resolve
from nanophi.core.sample import check_text
from nanophi.data.stages import read_tokens

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

    def take(self, places: np.ndarray) -> np.ndarray:
        """Tokens at ascending places of the stream."""
        chunk = np.searchsorted(self._starts, places, "right") - 1
        tokens = [np.zeros(0, np.int32)]
        for number in np.unique(chunk).tolist():  # a slice of each, which copies no other
            tokens.append(self.tokens.chunk(number).to_numpy()[places[chunk == number] - self._starts[number]])
        return np.concatenate(tokens)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.tokens.chunks)])


def find_spans(stream: Stream, ids: np.ndarray, vocabulary: int, shortest: int = SHORTEST) -> list[Span]:
    """The spans of `ids` (int, of a text without special tokens) in the stream that no other has, longest first."""
    if len(ids) < shortest:
        return []
    ids = ids.astype(np.int64)
    wanted = np.zeros(vocabulary + 1, bool)
    wanted[ids[ids < vocabulary]] = True
    wanted[stream.end] = False
    weights = np.random.default_rng(0).integers(1, 1 << 62, shortest, dtype=np.int64) | 1
    keys, grams = np.unique(_hashes(ids, np.arange(len(ids) - shortest + 1), weights), return_inverse=True)
    blocks = range(0, max(0, len(stream) - shortest + 1), _BLOCK)

    def scan(first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """n-grams of the text that begin in a block: place, which; token counts; ends of documents."""
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
        which, there = _among(keys, _hashes(block, places, weights))
        return places[there] + first, which[there], counts, ends

    with ThreadPoolExecutor(cores()) as threads:
        results = list(threads.map(scan, blocks))
    if not results:
        return []
    places, found, ends = (np.concatenate([result[part] for result in results]) for part in (0, 1, 3))
    counts = np.sum([result[2] for result in results], axis=0)
    edges = np.r_[-1, ends, len(stream)]
    with np.errstate(divide="ignore"):
        surprise = np.log(counts[np.minimum(ids, vocabulary)] / len(stream))
    spans = []
    for start, length, at in _outermost(stream, ids, grams, places, found, shortest):
        expected = float(np.exp(np.log(len(stream)) + surprise[start : start + length].sum()))
        if expected < EXPECTED:
            held = np.searchsorted(ends, at)
            known = np.column_stack([at, edges[held] + 1, edges[held + 1]])[:64].tolist()
            spans.append(Span(start, length, len(at), len(np.unique(held)), expected, known))
    return sorted(spans, key=lambda span: (-span.length, span.start))


def _outermost(
    stream: Stream, ids: np.ndarray, grams: np.ndarray, places: np.ndarray, found: np.ndarray, length: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Start, length and places in the stream of the spans of the text that no other one contains.

    `grams[i]` numbers the `length` tokens of the text from `i`, `found` those of the stream from `places`. All grow by
    one token at a time: of a text that repeats itself, a pair of each start and each place would not fit into memory.
    """
    starts, scale = np.arange(len(grams)), int(ids.max()) + 2
    starts, grams = (one[np.isin(grams, found)] for one in (starts, grams))
    while len(starts):
        more = starts + length < len(ids)
        keys, longer = np.unique(grams[more] * scale + ids[starts[more] + length], return_inverse=True)
        within = places + length < len(stream)
        following = stream.take(places[within] + length)
        which, there = _among(keys, found[within] * scale + np.minimum(following, scale - 1))
        there &= following != stream.end
        next_places, next_found = places[within][there], which[there]
        goes_on = np.bincount(next_found, minlength=len(keys))[longer] > 0
        next_starts = starts[more][goes_on]
        last = np.bincount(np.r_[next_starts, next_starts + 1], minlength=len(ids))[starts] == 0
        for start, gram in zip(starts[last].tolist(), grams[last].tolist(), strict=True):
            yield start, length, places[found == gram]
        starts, grams, places, found = next_starts, longer[goes_on], next_places, next_found
        length += 1


def _hashes(tokens: np.ndarray, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of as many tokens from each place as there are weights, int64 `[places]`."""
    return np.asarray(sum(tokens[places + offset] * weight for offset, weight in enumerate(weights)))


def _among(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each value is among sorted keys, and whether it is there."""
    at = np.minimum(np.searchsorted(keys, values), max(0, len(keys) - 1))
    return at, keys[at] == values if len(keys) else np.zeros(len(values), bool)


def trace_text(run: Path, text: str, shortest: int = SHORTEST) -> list[dict[str, Any]]:
    """Each span of a text that occurs in a run's training tokens, as JSON, with documents that hold it."""
    for part in ("data/tokens/train", "data/tokens/tokens.json", "data/tokenizer/tokenizer.json", "recipe.yaml"):
        if not (run / part).exists():
            raise UserError(f"{run} has no {part}; a trace needs a run directory with its training tokens")
    read_tokens(run / "data/tokens")
    with user_errors(f"{run} cannot be traced; run `nanophi prepare` on its recipe, which makes again what is damaged"):
        return _trace(run, text, shortest)


def _trace(run: Path, text: str, shortest: int) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    from nanophi.data.documents import id_of

    tokenizer = AutoTokenizer.from_pretrained(run / "data/tokenizer")
    stream = Stream(run / "data/tokens/train", tokenizer.eos_token_id)
    ids = np.array(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], np.int64)
    rows: list[dict[str, Any]] = []
    for span in find_spans(stream, ids, len(tokenizer), shortest):
        quoted: dict[str, str] = {}  # by id: the stream has a document as often as its source's weight says
        seen = set[int]()
        for place, first, last in span.places:
            if first not in seen and len(quoted) < EXAMPLES:
                seen.add(first)
                around = stream.read(max(first, place - AROUND), min(last, place + span.length + AROUND))
                document = str(tokenizer.decode(stream.read(first, last)))
                quoted.setdefault(id_of(document), str(tokenizer.decode(around)))
        row = dataclasses.asdict(span) | {"text": tokenizer.decode(ids[span.start : span.start + span.length])}
        del row["places"]
        rows.append(row | {"examples": list(quoted.items())})
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
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    sources = recipe["data"]["sources"]
    licenses = {source["name"] or source["hub"] or source["files"]: source.get("license") for source in sources}
    measured = [] if recipe["quality"]["scorer"] == "none" else ["quality_score"]
    found = pq.read_table(path, columns=["id", "source", *measured], filters=[("id", "in", ids)]).to_pylist()
    return {row["id"]: row | {"license": licenses.get(row["source"])} for row in found}


def trace(
    run: Annotated[Path, Argument(metavar="RUN", help="Run directory with its training tokens.")],
    text: Annotated[str, Argument(help="Text to look for, or with --generate the prompt of one.")],
    generate: Annotated[bool, Option("--generate", help="Trace what the run's model writes after the text.")] = False,
    shortest: Annotated[int, Option(min=2, help="Tokens of a span at least.")] = SHORTEST,
    as_json: Annotated[bool, Option("--json", help="Print the spans as JSON.")] = False,
) -> None:
    """Find which parts of a text occur verbatim in a run's training text, and where.

    A document that the recipe repeats (weight, phase) counts as often as it is packed. Sources are found by the hash of
    the text: not with a tokenizer that changes it, to lower case for instance.

    Example: nanophi trace runs/demo "The default value is None"

    What the model itself writes: nanophi trace runs/demo --generate "The function returns"
    """
    named = resolve(run)
    if named.folder is None:
        raise UserError(f"{run} is on the Hub; a trace needs a run directory with its training tokens")
    check_text(text, "the text")
    if generate:
        from nanophi.core import sample

        with user_errors(f"{run} cannot be loaded"):
            text = sample.generate(named.model(), [text], what="the text")[0]
    spans = trace_text(named.folder, text, shortest)
    if as_json:
        typer.echo(json.dumps({"text": text, "spans": spans}, indent=2, ensure_ascii=False))
        return
    typer.echo(f"{text}\n" if generate else "", nl=generate)
    for span in spans:
        chance = 10 ** math.floor(math.log10(span["expected"])) if span["expected"] > 1e-300 else 0
        where = f"{span['documents']:,} packed documents ({chance:.0e} by chance)"
        typer.echo(f"{span['length']} tokens in {where}: {span['text']!r}")
        for one in span["examples"]:
            known = [str(one[key]) for key in ("source", "id", "license") if one.get(key)]
            known += [f"score {one['quality_score']:.2f}"] if one.get("quality_score") is not None else []
            typer.echo(f"    {', '.join(known) or 'document'}: {one['context']!r}")
    if not spans:
        typer.echo(f"no span of {shortest} tokens or more that would surprise")
