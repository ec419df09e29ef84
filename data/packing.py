"""Packs documents into rows of exactly `context_length` tokens.

Every document is followed by one end-of-text token; the documents of the training split are shuffled by the seed and
laid end to end; the stream is cut into rows. There is no padding. The tokens that do not fill a last row are counted.
End-of-text never stands for anything but a boundary, so training can find the documents in a row again.

    output/train, output/heldout   `datasets` folders; column `input_ids`, int32 `[context_length]`
    output/heldout-documents.parquet   source, tokens, bytes of each held-out document, in packed order
    output/tokens.json             counts, by split
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, replace_tree, write_json
from nanophi.core.recipe import Data
from nanophi.data import sources
from nanophi.data.documents import batches, ids_to_uint64, shards, uniform_from_id
from nanophi.data.parallel import run_parts
from nanophi.data.tokenizer import Encoder

_BATCH_BYTES = 1 << 20
_WRITE_TOKENS = 1 << 20
LONGEST_TOKEN = 8
"""Bytes per token that no English text exceeds on average; how much text is tokenized for `data.max_tokens`."""


def pack(
    documents: Path, kept: Path, tokenizer: Path, context_length: int, data: Data, seed: int, output: Path
) -> dict[str, Any]:
    """Tokenize and pack.

    Args:
        documents: folder of `corpus.gather`.
        kept: folder of `quality.select`; of the training documents only these are packed. Held-out documents are
            all packed, so that a filtered run and its control are measured on the same text.
        tokenizer: folder of `tokenizer.build`.
        context_length: tokens per row.
        data: the recipe's section, for the sources' weights, the number of workers, and `max_tokens`: the training
            split then has that many tokens, in whole rows, if there are so many.
        seed: of the order of the training documents, of which of them make up `max_tokens`, and of which are repeated
            under a fractional weight.
        output: folder to create; resumes where a killed attempt stopped.

    Returns:
        by split `{documents, bytes, tokens, rows, tail_tokens, tokens_by_source, bytes_per_token, sha256}`. `tokens`
        includes one end-of-text per document, and `tokens == rows * context_length + tail_tokens`. `sha256` is that
        of the whole stream as little-endian int32. `bytes_per_token` is `bytes / tokens`.

    Raises:
        UserError: if a split does not fill one row.
    """
    done = output / "tokens.json"
    if done.exists():
        return read_json(done)
    output.mkdir(parents=True, exist_ok=True)
    # The same folders may hold something else than when this process packed before.
    _encoder.cache_clear()
    _kept_ids.cache_clear()
    work = output / ".parts"
    read = read_json(documents / "documents.json")["sources"]
    # `gather` checked the weights of its day, which may have been changed since.
    origins = {name: source.get("origins", [source["origin"]]) for name, source in read.items()}
    weights = sources.weights(data.sources, origins)
    summary: dict[str, Any] = {"context_length": context_length}
    for split in ("train", "heldout"):
        paths = shards(documents, split)
        train = split == "train"
        limit = data.max_tokens if train else None
        share = (
            1.0 if limit is None else min(1.0, LONGEST_TOKEN * limit / read_json(kept / "quality.json")["kept_bytes"])
        )
        while True:
            parts = [(path, kept / "kept.parquet" if train else None, (share, seed), tokenizer) for path in paths]
            folder = work / (split if share == 1 else f"{split}-part")
            counts = run_parts(_encode_shard, parts, folder, f"tokenizing {split}", data.workers, data.engine)
            stream = _Stream(folder, counts, weights if train else {}, seed, limit)
            if share == 1 or stream.lengths[stream.order].sum() >= (limit or 0):
                break
            share = 1.0  # documents with few, long tokens, or with weights below one
        summary[split] = _write(stream, context_length, output / split, work, split, limit)
    summary["vocab_size"] = _encoder(tokenizer).vocab_size
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
    shard: Path, kept: Path | None, sample: tuple[float, int], tokenizer: Path, path: Path
) -> dict[str, Any]:
    """Write `.tokens` (uint32, end-of-text after each document), `.lengths`, `.bytes` and `.codes`."""
    encoder = _encoder(tokenizer)
    eos = encoder.eos_token_id
    names: dict[str, int] = {}
    lengths: list[int] = []
    sizes: list[int] = []
    codes: list[int] = []
    with path.with_suffix(".tokens").open("wb") as output:
        for batch in batches(shard, ["id", "text", "source"], 128):
            if kept is not None:
                ids = batch.column("id")
                batch = batch.filter(
                    pa.array(
                        np.isin(ids_to_uint64(ids), _kept_ids(kept)) & (uniform_from_id(ids, sample[1]) < sample[0])
                    )
                )
            texts = batch.column("text").to_pylist()
            for ids_of_text in encoder.encode(texts):
                tokens = np.append(ids_of_text, np.uint32(eos))
                if int((tokens == eos).sum()) != 1:
                    raise UserError(f"{tokenizer}: some text became the end-of-text token; mark that as special there")
                output.write(tokens.tobytes())
                lengths.append(len(tokens))
            sizes.extend(len(text.encode()) for text in texts)
            codes.extend(names.setdefault(name, len(names)) for name in batch.column("source").to_pylist())
    np.array(lengths, np.int64).tofile(path.with_suffix(".lengths"))
    np.array(sizes, np.int64).tofile(path.with_suffix(".bytes"))
    np.array(codes, np.int64).tofile(path.with_suffix(".codes"))
    return {"documents": len(lengths), "tokens": sum(lengths), "sources": list(names)}


class _Stream:
    """The documents of a split in the order in which they are packed."""

    def __init__(
        self,
        folder: Path,
        counts: list[dict[str, Any]],
        weights: dict[str, float],
        seed: int,
        limit: int | None = None,
    ) -> None:
        self.paths = [folder / f"{index:05d}" for index in range(len(counts))]
        self.parts = np.repeat(np.arange(len(counts)), [part["documents"] for part in counts])
        lengths = [np.fromfile(path.with_suffix(".lengths"), np.int64) for path in self.paths]
        for path, part, length in zip(self.paths, counts, lengths, strict=True):
            if len(length) != part["documents"] or path.with_suffix(".tokens").stat().st_size != 4 * part["tokens"]:
                raise UserError(f"{path}.tokens is incomplete; delete the run's .work folder and run again")
        self.lengths = np.concatenate(lengths)
        self.starts = np.concatenate([np.cumsum(length) - length for length in lengths])
        self.sizes = np.concatenate([np.fromfile(path.with_suffix(".bytes"), np.int64) for path in self.paths])
        self.sources = sorted({name for part in counts for name in part["sources"]})
        self.codes = np.concatenate(
            [
                np.array([self.sources.index(name) for name in part["sources"]] or [0], np.int64)[
                    np.fromfile(path.with_suffix(".codes"), np.int64)
                ]
                for path, part in zip(self.paths, counts, strict=True)
            ]
        )
        self.order = np.arange(len(self.lengths))
        if weights:
            generator = np.random.default_rng(seed)
            weight = np.array([weights.get(name, 1.0) for name in self.sources])[self.codes]
            times = np.floor(weight + generator.random(len(weight))).astype(np.int64)
            self.order = generator.permutation(np.repeat(self.order, times))
        if limit is not None:
            reached = np.cumsum(self.lengths[self.order])
            self.order = self.order[: np.searchsorted(reached, limit) + 1]

    def blocks(self) -> Any:
        """The token stream, int32, in blocks of about `_WRITE_TOKENS`."""
        tokens = [
            np.memmap(path.with_suffix(".tokens"), np.uint32, "r")
            if path.with_suffix(".tokens").stat().st_size
            else None
            for path in self.paths
        ]
        pending: list[np.ndarray] = []
        size = 0
        for document in self.order:
            start, length = self.starts[document], self.lengths[document]
            part = tokens[self.parts[document]]
            assert part is not None
            pending.append(part[start : start + length])
            size += int(length)
            if size >= _WRITE_TOKENS:
                yield np.concatenate(pending).astype("<i4")
                pending, size = [], 0
        if pending:
            yield np.concatenate(pending).astype("<i4")


def _write(
    stream: _Stream, context_length: int, output: Path, work: Path, split: str, limit: int | None
) -> dict[str, Any]:
    import datasets

    total = int(stream.lengths[stream.order].sum())
    if total < context_length:
        remedy = (
            "keep more (quality.threshold or quality.share) or add sources"
            if split == "train"
            else "raise data.heldout_fraction"
        )
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
            values = pa.array(block[: whole * context_length])
            writer.write_batch(
                pa.record_batch([pa.FixedSizeListArray.from_arrays(values, context_length)], schema=schema)
            )
    if rows * context_length + len(rest) != total:
        raise UserError(f"{split}: {total} tokens went in, {rows * context_length + len(rest)} came out")
    saved = work / f"{split}-saved"
    shutil.rmtree(saved, ignore_errors=True)
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.table.MemoryMappedTable.from_file(str(flat))
        # By default the fingerprint follows from the file's time; this one makes equal tokens equal folders.
        datasets.Dataset(table, fingerprint=digest.hexdigest()[:16]).save_to_disk(str(saved))
    finally:
        if shown:
            datasets.enable_progress_bars()
    flat.unlink()
    replace_tree(saved, output)
    if split == "heldout":
        documents = {
            "source": np.array(stream.sources)[stream.codes[stream.order]],
            "tokens": stream.lengths[stream.order],
            "bytes": stream.sizes[stream.order],
        }
        pq.write_table(pa.table(documents), output.with_name("heldout-documents.parquet"))
    by_source: Counter[str] = Counter()
    sums = np.bincount(stream.codes[stream.order], stream.lengths[stream.order], minlength=len(stream.sources))
    for name, count in zip(stream.sources, sums.tolist(), strict=True):
        by_source[name] = int(count)
    size = int(stream.sizes[stream.order].sum())
    return {
        "documents": len(stream.order),
        "bytes": size,
        "tokens": total,
        "rows": rows,
        "tail_tokens": len(rest),
        "tokens_by_source": dict(by_source),
        "bytes_per_token": round(size / total, 4),
        "sha256": digest.hexdigest(),
    }
