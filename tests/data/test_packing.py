"""Every token of every kept document is in the rows once, in an order that the seed alone decides."""

import hashlib
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killed import run_killed

from nanophi.core.errors import UserError
from nanophi.core.recipe import Data, Quality, Tokenizer
from nanophi.data import gather, packing, scoring, tokenizer
from nanophi.data.documents import shards

CONTEXT = 64


def settings(
    folder,
    workers=1,
    weights=(1.0, 1.0),
    phases=("all", "all"),
    **limits,
):
    sources = [
        {"files": str(folder / f"{name}*.parquet"), "name": name, "weight": weight, "phase": phase}
        for name, weight, phase in zip("ab", weights, phases, strict=True)
    ]
    values = {"sources": sources, "workers": workers, **limits}
    return Data.model_validate({**values, "deduplication": {"near": False}, "heldout_fraction": 0.2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four files of documents, some of which hold the end-of-text token's name, scored and with a tokenizer."""
    folder = tmp_path_factory.mktemp("packing")
    generator = np.random.default_rng(0)
    vocabulary = ["packing", "rows", "of", "tokens", "<|endoftext|>", "naïve", "end\n\n", "  x"]
    for number, name in enumerate(("a0", "a1", "b0", "b1")):
        texts = [
            f"{number} {row} " + " ".join(generator.choice(vocabulary, int(generator.integers(1, 150))))
            for row in range(40)
        ]
        scores = generator.random(40)
        pq.write_table(pa.table({"text": texts, "score": scores}), folder / f"{name}.parquet")
    data = settings(folder)
    gather.gather(data, folder / "documents", "score")
    scorer = Quality(scorer="column:score", threshold=0.3)
    scoring.score(folder / "documents", scorer, data, 0, folder / "scores")
    for name, threshold in (("quality", 0.3), ("everything", 0.0)):
        for phase, where in (("all", name), ("decay", f"{name}-decay")):
            chosen = scorer.model_copy(update={"threshold": threshold, "phase": phase})
            scoring.select(folder / "documents", folder / "scores", chosen, folder / where)
    tokenizer.build(folder / "documents", Tokenizer(vocab_size=300), 0, folder / "tokenizer")
    return folder


def pack(
    folder,
    output,
    seed=0,
    context=CONTEXT,
    kept="quality",
    **kwargs,
):
    inputs = (folder / name for name in ("documents", kept, "tokenizer"))
    return packing.pack(*inputs, context, settings(folder, **kwargs), seed, output)


def rows(output, split):
    return np.array(datasets.load_from_disk(str(output / split))["input_ids"], np.int32)


def expected_documents(folder, split):
    table = pa.concat_tables([pq.read_table(path) for path in shards(folder / "documents", split)]).to_pylist()
    return [row["text"] for row in table if split == "heldout" or np.float32(row["score"]) > 0.3]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_hold_exactly_the_kept_documents(folder, tmp_path, split):
    summary = pack(folder, tmp_path / "tokens")[split]
    stream = rows(tmp_path / "tokens", split)
    assert stream.shape == (summary["rows"], CONTEXT)
    assert summary["tokens"] == summary["rows"] * CONTEXT + summary["tail_tokens"]
    encoder = tokenizer.Encoder(folder / "tokenizer")
    texts = expected_documents(folder, split)
    assert summary["documents"] == len(texts)
    assert summary["bytes"] == sum(len(text.encode()) for text in texts)
    encoded = [encoding.ids for encoding in encoder.backend.encode_batch(texts, add_special_tokens=False)]
    assert summary["tokens"] == sum(len(ids) + 1 for ids in encoded)
    assert summary["bytes_per_token"] == pytest.approx(summary["bytes"] / summary["tokens"], abs=1e-4)
    # Cut the stream at end-of-text: but for what the tail holds, the documents come back, each as often as it is there.
    flat = stream.ravel()
    pieces = np.split(flat, np.flatnonzero(flat == encoder.eos_token_id) + 1)
    *whole, last = [piece[piece != encoder.eos_token_id].tolist() for piece in pieces]
    for piece in whole:
        encoded.remove(piece)
    assert sum(len(ids) + 1 for ids in encoded) - len(last) == summary["tail_tokens"]
    assert any(ids[: len(last)] == last for ids in [*encoded, []])


def test_heldout_documents_are_known_by_source_in_packed_order(folder, tmp_path):
    summary = pack(folder, tmp_path / "tokens")["heldout"]
    stream = rows(tmp_path / "tokens", "heldout").ravel()
    encoder = tokenizer.Encoder(folder / "tokenizer")
    table = pa.concat_tables([pq.read_table(p) for p in shards(folder / "documents", "heldout")]).to_pylist()
    source_of = {row["text"]: row["source"] for row in table}
    documents = pq.read_table(tmp_path / "tokens" / "heldout-documents.parquet").to_pylist()
    assert not (tmp_path / "tokens" / "train-documents.parquet").exists()
    assert len(documents) == summary["documents"] == len(source_of)
    assert sum(document["bytes"] for document in documents) == summary["bytes"]
    start = 0
    for document in documents:
        piece = stream[start : start + document["tokens"]]
        start += document["tokens"]
        if start > len(stream):
            break
        text = encoder.backend.decode(piece[:-1].tolist(), skip_special_tokens=False)
        assert piece[-1] == encoder.eos_token_id
        assert source_of[text] == document["source"]
        assert len(text.encode()) == document["bytes"]
    assert sum(document["tokens"] for document in documents) == len(stream) + summary["tail_tokens"]
    assert {document["source"] for document in documents} == {"a", "b"}


def test_workers_change_nothing_and_the_seed_changes_the_order(folder, tmp_path):
    one, three = pack(folder, tmp_path / "one"), pack(folder, tmp_path / "three", workers=3)
    other = pack(folder, tmp_path / "other", seed=1)
    assert one == three
    for path in (tmp_path / "one").rglob("*.arrow"):
        assert path.read_bytes() == (tmp_path / "three" / path.relative_to(tmp_path / "one")).read_bytes()
    assert one["train"]["sha256"] != other["train"]["sha256"]
    assert one["heldout"] == other["heldout"], "held-out text is the same for every seed"
    assert {**one["train"], "sha256": None} == {**other["train"], "sha256": None}


def test_sha256_is_that_of_the_stream(folder, tmp_path):
    summary = pack(folder, tmp_path / "tokens")["heldout"]
    encoder = tokenizer.Encoder(folder / "tokenizer")
    texts = encoder.encode(expected_documents(folder, "heldout"))
    stream = [token for ids in texts for token in (*ids, encoder.eos_token_id)]
    assert summary["sha256"] == hashlib.sha256(np.array(stream, "<i4").tobytes()).hexdigest()
    assert rows(tmp_path / "tokens", "heldout").ravel().tolist() == stream[: summary["rows"] * CONTEXT]


def test_weights_repeat_documents(folder, tmp_path):
    plain = pack(folder, tmp_path / "plain")["train"]["tokens_by_source"]
    weighted = pack(folder, tmp_path / "weighted", weights=(3.0, 0.5))["train"]
    assert weighted["tokens_by_source"]["a"] == 3 * plain["a"]
    assert 0.25 * plain["b"] < weighted["tokens_by_source"]["b"] < 0.75 * plain["b"]
    assert weighted["tokens"] == sum(weighted["tokens_by_source"].values())


KILLED = """
from nanophi.data import packing
from nanophi.core.recipe import Data

folder, output, settings = arguments
inputs = [Path(folder, name) for name in ("documents", "quality", "tokenizer")]
packing.pack(*inputs, 64, Data.model_validate_json(settings), 0, Path(output))
"""


def test_killed_and_started_again(folder, tmp_path, monkeypatch):
    output = tmp_path / "tokens"
    run_killed(KILLED, folder, output, settings(folder).model_dump_json(), survive=2)
    assert len(list((output / ".parts" / "train-documents").glob("*.json"))) == 2
    encoded = []
    encode = packing._encode_shard

    def counting(shard, *args):
        encoded.append(shard)
        return encode(shard, *args)

    monkeypatch.setattr(packing, "_encode_shard", counting)
    resumed = pack(folder, output)
    count = sum(len(shards(folder / "documents", split)) for split in ("train", "heldout"))
    assert len(encoded) == count - 2, "finished shards are not tokenized again"
    monkeypatch.undo()
    assert resumed == pack(folder, tmp_path / "whole")
    assert json.loads((output / "tokens.json").read_text()) == resumed


def test_too_few_tokens_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="less than one row of 10000000"):
        pack(folder, tmp_path / "tokens", context=10_000_000)
    assert not (tmp_path / "tokens" / "tokens.json").exists()


def test_max_tokens_is_a_random_part_in_whole_rows(folder, tmp_path, monkeypatch):
    everything = pack(folder, tmp_path / "all")["train"]
    limit = everything["tokens"] // 3
    encoded = []
    monkeypatch.setattr(packing, "LONGEST_TOKEN", 2)  # so that a part is tokenized: 300 tokens are short
    encode = packing._encode_shard
    monkeypatch.setattr(packing, "_encode_shard", lambda *args: encoded.append(encode(*args)) or encoded[-1])
    kept = set()
    for seed in (0, 1):
        encoded.clear()
        summary = pack(folder, tmp_path / str(seed), seed=seed, max_tokens=limit)["train"]
        assert summary["rows"] == limit // CONTEXT
        assert summary["rows"] * CONTEXT + summary["tail_tokens"] == summary["tokens"] >= limit
        assert rows(tmp_path / str(seed), "train").shape == (limit // CONTEXT, CONTEXT)
        assert (
            sum(part["documents"] for part in encoded[: len(shards(folder / "documents", "train"))])
            < (everything["documents"])
        )
        kept.add(summary["sha256"])
    assert len(kept) == 2
    monkeypatch.setattr(packing, "LONGEST_TOKEN", 0.2)  # too little is tokenized at first
    assert pack(folder, tmp_path / "again", max_tokens=limit)["train"]["rows"] == limit // CONTEXT
    beyond = pack(folder, tmp_path / "beyond", max_tokens=10 * everything["tokens"])["train"]
    assert beyond["sha256"] == everything["sha256"]


def documents_of(output, split, folder):
    """The whole documents of a packed text, as tokens, in their order."""
    eos = tokenizer.Encoder(folder / "tokenizer").eos_token_id
    rest = np.fromfile(output / f"{split}-rest.bin", "<i4")
    flat = np.concatenate([rows(output, split).ravel(), rest])
    pieces = np.split(flat, np.flatnonzero(flat == eos) + 1)
    return [tuple(piece.tolist()) for piece in pieces if len(piece)]


def test_a_filter_of_the_decay_alone_leaves_the_text_before_it_and_what_is_held_out(folder, tmp_path):
    everything, filtered = pack(folder, tmp_path / "all", kept="everything"), pack(folder, tmp_path / "filtered")
    both = pack(folder, tmp_path / "both", kept="quality-decay")
    assert both["train"] == everything["train"] and both["heldout"] == everything["heldout"] == filtered["heldout"]
    before, decay = (documents_of(tmp_path / "both", split, folder) for split in ("train", "decay"))
    assert sorted(decay) == sorted(documents_of(tmp_path / "filtered", "train", folder)) and len(decay) < len(before)
    place = iter(before)
    assert all(document in place for document in decay), "in the order of the text before it"
    assert both["decay"]["documents"] == filtered["train"]["documents"]
    held = {*documents_of(tmp_path / "both", "heldout", folder)}
    assert held and not held & {*before, *decay}


def test_a_filter_of_the_decay_that_keeps_everything_gives_one_text(folder, tmp_path):
    for limit in (None, 2000):
        plain = pack(folder, tmp_path / f"plain-{limit}", kept="everything", max_tokens=limit)
        phased = pack(folder, tmp_path / f"phased-{limit}", kept="everything-decay", max_tokens=limit)
        assert phased == plain and not (tmp_path / f"phased-{limit}/decay").exists()


def test_the_decay_has_its_own_number_of_tokens_from_the_documents_before_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LONGEST_TOKEN", 3)  # so that a part is tokenized
    limits = {"max_tokens": 20 * CONTEXT, "max_decay_tokens": 8 * CONTEXT}
    plain = pack(folder, tmp_path / "plain", kept="everything", max_tokens=limits["max_tokens"])
    both = pack(folder, tmp_path / "both", kept="quality-decay", **limits)
    assert both["train"] == plain["train"], "whatever is read while the rate decays"
    assert (both["train"]["rows"], both["decay"]["rows"]) == (20, 8)
    before, decay = ({*documents_of(tmp_path / "both", split, folder)} for split in ("train", "decay"))
    assert len(decay - before) <= 1  # the last one, of which the text before it may hold no more
    # More than a sample has: the other documents are tokenized too, and the text before the decay stays as it is.
    monkeypatch.setattr(packing, "LONGEST_TOKEN", 2)
    limits["max_decay_tokens"] = 100 * CONTEXT
    more = pack(folder, tmp_path / "more", kept="quality-decay", **limits)
    assert more["decay"]["rows"] == 100 and more["train"]["rows"] == 20


def test_sources_are_read_in_their_phases(folder, tmp_path):
    def read(*phases):
        summary = pack(folder, tmp_path / "-".join(phases), kept="everything", phases=phases)
        texts = (summary["train"], summary.get("decay", summary["train"]))
        return [{name for name, count in text["tokens_by_source"].items() if count} for text in texts]

    assert read("all", "decay") == [{"a"}, {"a", "b"}]
    assert read("stable", "decay") == [{"a"}, {"b"}]
    assert read("all", "none") == [{"a"}, {"a"}]
    assert read("stable", "all") == [{"a", "b"}, {"b"}]
