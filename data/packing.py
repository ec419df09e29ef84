"""Packs documents into rows of exactly `context_length` tokens.

Every document is followed by one end-of-text token; the documents of the training split are shuffled by the seed and
laid end to end; the stream is cut into rows. There is no padding. The tokens that do not fill a last row are counted.
End-of-text never stands for anything but a boundary, so training can find the documents in a row again.
Both phases of a training have their documents in one order: if a filter drops none of them, there is one text.

    output/train, output/heldout   `datasets` folders; column `input_ids`, int32 `[context_length]`
    output/decay                   another text for the steps in which the learning rate decays, if there is one
    output/train-rest.bin, ...     the last tokens, which filled no row, as little-endian int32
    output/heldout-documents.parquet   source, tokens, bytes of each held-out document, in packed order
    output/tokens.json             counts, by split, and the SHA-256 of the tokenizer's files
"""

import functools
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, replace_tree, sha256_of_tree, write_json
from nanophi.core.recipe import Data, Source
from nanophi.data import sources
from nanophi.data.documents import batches, ids_to_uint64, shards, uniform_from_id
from nanophi.data.parallel import run_parts
from nanophi.data.tokenizer import Encoder

_WRITE_TOKENS = 1 << 20
_DOCUMENTS = pa.schema([("source", pa.string()), ("tokens", pa.int64()), ("bytes", pa.int64())])
_ENCODED = _DOCUMENTS.append(pa.field("kept", pa.bool_()))
LONGEST_TOKEN = 8
"""Bytes per token that no English text exceeds on average; how much text is tokenized for `data.max_tokens`."""


def pack(
    documents: Path, kept: Path, tokenizer: Path, context_length: int, data: Data, seed: int, output: Path
) -> dict[str, Any]:
    """Tokenize the training documents in `kept` (the folder of `scoring.select`) and all held-out ones, and pack.

    It resumes after a kill. With `data.max_tokens` the training split has that many tokens, in whole rows, if there are
    so many. The seed orders the training documents and chooses those of `max_tokens` and of a fractional weight.
    What a filter of the decay alone keeps is `decay` beside the two splits.

    Returns by split `{documents, bytes, tokens, rows, tail_tokens, tokens_by_source, bytes_per_token, sha256}`, tokens
    with one end-of-text per document, and the SHA-256 of the whole stream as little-endian int32. Beside the splits are
    `context_length`, `vocab_size` and `tokenizer_sha256`.
    """
    done, work = output / "tokens.json", output / ".parts"
    if done.exists():
        return read_json(done)
    output.mkdir(parents=True, exist_ok=True)
    # The same folders may hold something else than when this process packed before.
    _encoder.cache_clear()
    _kept_ids.cache_clear()
    of_name = sources.of_documents(data.sources, documents)
    filtered = read_json(kept / "quality.json") if (kept / "quality.json").exists() else {}
    decay = filtered.get("phase") == "decay"
    summary: dict[str, Any] = {"context_length": context_length}
    share, order = 1.0, np.empty(0, int)
    limits = {"train": data.max_tokens, "decay": data.max_decay_tokens or data.max_tokens, "heldout": None}
    for text, limit in limits.items():
        split, train = ("heldout", False) if text == "heldout" else ("train", True)
        if text == "decay" and not (decay or data.two_phases):
            continue
        if text != "decay":  # whose documents are taken from those of the other phase, if there are enough
            share = (
                1.0 if limit is None else min(1.0, LONGEST_TOKEN * limit / filtered["bytes" if decay else "kept_bytes"])
            )
        while True:
            ids = kept / "kept.parquet" if train else None
            parts = [(path, ids, decay, share, seed, tokenizer) for path in shards(documents, split)]
            folder = work / f"{split}-{'documents' if share == 1 else 'sample'}"
            counts = run_parts(_encode_shard, parts, folder, f"tokenizing {split}", data.workers, data.engine)
            stream = _Stream(folder, len(counts), of_name if train else {}, text, seed, limit)
            if share == 1 or stream.total >= (limit or 0):
                break
            share = 1.0  # documents with few, long tokens, or with weights below one
        if text != "decay" or not np.array_equal(stream.order, order):
            summary[text] = _write(stream, context_length, output / text, work, text, limit)
        order = stream.order
    summary |= {"vocab_size": _encoder(tokenizer).vocab_size, "tokenizer_sha256": sha256_of_tree(tokenizer)}
    write_json(done, summary)
    shutil.rmtree(work)
    return summary


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: Path) -> Encoder:
    return Encoder(tokenizer)


@functools.lru_cache(maxsize=1)
def _kept_ids(path: Path) -> np.ndarray:
    return np.sort(ids_to_uint64(pq.read_table(path, columns=["id"])["id"]))


def _encode_shard(
    shard: Path, kept: Path | None, every: bool, share: float, seed: int, tokenizer: Path, path: Path
) -> dict[str, Any]:
    """Write `.tokens` (uint32, end-of-text after each document) and `.parquet` (source, tokens, bytes, kept of each).

    Of the documents whose ids are in `kept` (None: of all); with `every` of the others too.
    """
    encoder = _encoder(tokenizer)
    eos = encoder.eos_token_id
    columns: dict[str, list[Any]] = {"source": [], "tokens": [], "bytes": [], "kept": []}
    with path.with_suffix(".tokens").open("wb") as output:
        for batch in batches(shard, ["id", "text", "source"], 128):
            mine = np.ones(len(batch), bool)
            if kept is not None:
                ids = batch.column("id")
                mine = np.isin(ids_to_uint64(ids), _kept_ids(kept))
                chosen = (mine | every) & (uniform_from_id(ids, seed) < share)
                batch, mine = batch.filter(pa.array(chosen)), mine[chosen]
            columns["kept"].extend(mine.tolist())
            texts = batch.column("text").to_pylist()
            for ids_of_text in encoder.encode(texts):
                tokens = np.append(ids_of_text, np.uint32(eos))
                if int((tokens == eos).sum()) != 1:
                    raise UserError(f"{tokenizer}: some text became the end-of-text token; use another tokenizer")
                output.write(tokens.tobytes())
                columns["tokens"].append(len(tokens))
            columns["bytes"].extend(len(text.encode()) for text in texts)
            columns["source"].extend(batch.column("source").to_pylist())
    pq.write_table(pa.table(columns, schema=_ENCODED), path.with_suffix(".parquet"))
    return {"documents": len(columns["tokens"]), "tokens": sum(columns["tokens"])}


class _Stream:
    """The documents of a split in the order in which they are packed: source, tokens and bytes of each.

    Of training documents, whose sources are given by name, those of a text: `train`, or `decay`.
    """

    def __init__(
        self, folder: Path, parts: int, of_name: dict[str, Source], text: str, seed: int, limit: int | None
    ) -> None:
        paths = [folder / f"{index:05d}" for index in range(parts)]
        self._files = [path.with_suffix(".tokens") for path in paths]
        tables = [pq.read_table(path.with_suffix(".parquet"), read_dictionary=["source"]) for path in paths]
        documents = pa.concat_tables(tables).unify_dictionaries()
        order = np.arange(len(documents))
        if of_name:
            generator = np.random.default_rng(seed)
            column = documents["source"].combine_chunks()
            sources = [of_name[name] for name in column.dictionary.to_pylist()]
            weight = np.array([source.weight for source in sources])[column.indices]
            times = np.floor(weight + generator.random(len(weight))).astype(np.int64)
            order = generator.permutation(np.repeat(order, times))
            phase = "decay" if text == "decay" else "stable"
            read = np.array([source.reads(phase) for source in sources], bool)[column.indices]
            if phase == "decay":
                read &= documents["kept"].to_numpy()
            order = order[read[order]]
        if limit is not None:
            reached = np.cumsum(documents["tokens"].to_numpy()[order])
            order = order[: np.searchsorted(reached, limit) + 1]
        self.order, self.documents = order, documents.take(order)
        self.total = int(self.documents["tokens"].to_numpy().sum())
        starts = [np.cumsum(tokens) - tokens for tokens in (table["tokens"].to_numpy() for table in tables)]
        self._starts = np.concatenate(starts)[order]
        self._parts = np.repeat(np.arange(len(tables)), [len(table) for table in tables])[order]

    def blocks(self) -> Iterator[np.ndarray]:
        """The token stream, int32, in blocks of about `_WRITE_TOKENS`."""
        # An empty file cannot be mapped, and no document lies in it.
        tokens = [np.memmap(file, np.uint32, "r") if file.stat().st_size else np.zeros(0, int) for file in self._files]
        pending: list[np.ndarray] = []
        size = 0
        for part, start, length in zip(self._parts, self._starts, self.documents["tokens"].to_numpy(), strict=True):
            pending.append(tokens[part][start : start + length])
            size += int(length)
            if size >= _WRITE_TOKENS:
                yield np.concatenate(pending).astype("<i4")
                pending, size = [], 0
        if pending:
            yield np.concatenate(pending).astype("<i4")


def _write(
    stream: _Stream, context_length: int, output: Path, work: Path, split: str, limit: int | None
) -> dict[str, Any]:
    """Cut the stream into rows; returns the split's counts (see `pack`)."""
    total = stream.total
    if total < context_length:
        more = "keep more (quality.threshold or quality.share) or add sources"
        remedy = "raise data.heldout_fraction" if split == "heldout" else more
        raise UserError(f"the {split} split has {total} tokens, less than one row of {context_length}; {remedy}")
    schema = pa.schema([("input_ids", pa.list_(pa.int32(), context_length))])
    digest = hashlib.sha256()
    rows, most = 0, (total if limit is None else min(total, limit)) // context_length
    rest = np.zeros(0, np.int32)
    flat = work / f"{split}.arrow"
    with flat.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for block in stream.blocks():
            digest.update(block.tobytes())
            block = np.concatenate([rest, block])
            whole = min(len(block) // context_length, most - rows)
            rest = block[whole * context_length :]
            rows += whole
            cut = pa.FixedSizeListArray.from_arrays(pa.array(block[: whole * context_length]), context_length)
            writer.write_batch(pa.record_batch([cut], schema=schema))
    if rows * context_length + len(rest) != total:
        raise UserError(f"{split}: {total} tokens went in, {rows * context_length + len(rest)} came out")
    _save_dataset(flat, digest.hexdigest()[:16], work / f"{split}-saved", output)
    output.with_name(f"{split}-rest.bin").write_bytes(rest.astype("<i4").tobytes())
    documents = stream.documents
    if split == "heldout":
        known = documents.select(_DOCUMENTS.names).cast(_DOCUMENTS)
        pq.write_table(known, output.with_name("heldout-documents.parquet"))
    by_source = dict.fromkeys(sorted(documents["source"].combine_chunks().dictionary.to_pylist()), 0)
    for row in documents.group_by("source").aggregate([("tokens", "sum")]).to_pylist():
        by_source[row["source"]] = row["tokens_sum"]
    size = int(documents["bytes"].to_numpy().sum())
    return {
        "documents": len(documents),
        "bytes": size,
        "tokens": total,
        "rows": rows,
        "tail_tokens": len(rest),
        "tokens_by_source": by_source,
        "bytes_per_token": round(size / total, 4),
        "sha256": digest.hexdigest(),
    }


def _save_dataset(flat: Path, fingerprint: str, saved: Path, output: Path) -> None:
    """Make a `datasets` folder of an Arrow stream, which is removed; equal fingerprints make equal folders."""
    import datasets

    shutil.rmtree(saved, ignore_errors=True)
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.table.MemoryMappedTable.from_file(str(flat))
        datasets.Dataset(table, fingerprint=fingerprint).save_to_disk(str(saved))
    finally:
        if shown:
            datasets.enable_progress_bars()
    flat.unlink()
    replace_tree(saved, output)
