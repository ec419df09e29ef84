"""Every token of every kept document is in the rows once, in an order that the seed alone decides."""

import hashlib

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from gathered import data as data_of
from gathered import rows_of, write
from killed import run_killed

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree
from nanophi.core.recipe import Quality, Tokenizer
from nanophi.data import gather, packing, scoring, tokenizer
from nanophi.data.documents import shards
from nanophi.data.stages import read_tokens

CONTEXT = 64


def settings(folder, weights=(1.0, 1.0), phases=("all", "all"), **fields):
    sources = [
        {"files": str(folder / f"{name}*.parquet"), "name": name, "weight": weight, "phase": phase}
        for name, weight, phase in zip("ab", weights, phases, strict=True)
    ]
    return data_of(*sources, heldout_fraction=0.2, **fields)


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
        rows = [{"text": text, "score": score} for text, score in zip(texts, generator.random(40), strict=True)]
        write(folder / f"{name}.parquet", rows)
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


@pytest.fixture(scope="module")
def encoder(folder):
    return tokenizer.Encoder(folder / "tokenizer")


@pytest.fixture(scope="module")
def packed(folder):
    """What every test compares with: the kept documents, packed as they are."""
    pack(folder, folder / "tokens")
    return folder / "tokens"


def pack(folder, output, seed=0, context=CONTEXT, kept="quality", **fields):
    inputs = (folder / name for name in ("documents", kept, "tokenizer"))
    return packing.pack(*inputs, context, settings(folder, **fields), seed, output)


def rows(output, split):
    return np.array(datasets.load_from_disk(str(output / split))["input_ids"], np.int32)


def expected_documents(folder, split):
    documents = rows_of(folder / "documents", split)
    return [row["text"] for row in documents if split == "heldout" or np.float32(row["score"]) > 0.3]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_hold_exactly_the_kept_documents(folder, packed, encoder, split):
    summary, stream = read_json(packed / "tokens.json")[split], rows(packed, split)
    assert stream.shape == (summary["rows"], CONTEXT)
    assert summary["tokens"] == summary["rows"] * CONTEXT + summary["tail_tokens"]
    texts = expected_documents(folder, split)
    assert summary["documents"] == len(texts)
    assert summary["bytes"] == sum(len(text.encode()) for text in texts)
    encoded = [encoding.ids for encoding in encoder.backend.encode_batch(texts, add_special_tokens=False)]
    assert summary["tokens"] == sum(len(ids) + 1 for ids in encoded)
    assert summary["bytes_per_token"] == pytest.approx(summary["bytes"] / summary["tokens"], abs=1e-4)
    # Cut the stream at end-of-text: the documents come back, each as often as it is there.
    documents = documents_of(packed, split, encoder.eos_token_id)
    assert all(document[-1] == encoder.eos_token_id for document in documents)
    assert sorted(document[:-1] for document in documents) == sorted(map(tuple, encoded))
    assert summary["sha256"] == hashlib.sha256(np.array([*sum(documents, ())], "<i4").tobytes()).hexdigest()
    assert read_tokens(packed)["tokenizer_sha256"] == sha256_of_tree(folder / "tokenizer")


def test_heldout_documents_are_known_by_source_in_packed_order(folder, packed, encoder):
    texts = rows_of(folder / "documents", "heldout")
    documents = documents_of(packed, "heldout", encoder.eos_token_id)
    decoded = [encoder.backend.decode(list(ids[:-1]), skip_special_tokens=False) for ids in documents]
    assert decoded == [row["text"] for row in texts]
    assert pq.read_table(packed / "heldout-documents.parquet").to_pylist() == [
        {"source": row["source"], "tokens": len(ids), "bytes": len(row["text"].encode())}
        for row, ids in zip(texts, documents, strict=True)
    ]
    assert {row["source"] for row in texts} == {"a", "b"}
    assert not (packed / "train-documents.parquet").exists()


def test_workers_change_nothing_and_the_seed_changes_the_order(folder, packed, tmp_path):
    one, three = read_json(packed / "tokens.json"), pack(folder, tmp_path / "three", workers=3)
    other = pack(folder, tmp_path / "other", seed=1)
    assert one == three
    for path in packed.rglob("*.arrow"):
        assert path.read_bytes() == (tmp_path / "three" / path.relative_to(packed)).read_bytes()
    assert one["train"]["sha256"] != other["train"]["sha256"]
    assert one["heldout"] == other["heldout"], "held-out text is the same for every seed"
    assert {**one["train"], "sha256": None} == {**other["train"], "sha256": None}


def test_weights_repeat_documents(folder, packed, tmp_path):
    plain = read_json(packed / "tokens.json")["train"]["tokens_by_source"]
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


@pytest.fixture
def encoded(monkeypatch):
    """What became of each shard that is tokenized."""
    counts, encode = [], packing._encode_shard
    monkeypatch.setattr(packing, "_encode_shard", lambda *args: counts.append(encode(*args)) or counts[-1])
    return counts


def test_killed_and_started_again(folder, packed, tmp_path, encoded):
    output = tmp_path / "tokens"
    run_killed(KILLED, folder, output, settings(folder).model_dump_json(), survive=2)
    assert len(list((output / ".parts" / "train-documents").glob("*.json"))) == 2
    resumed = pack(folder, output)
    count = sum(len(shards(folder / "documents", split)) for split in ("train", "heldout"))
    assert len(encoded) == count - 2, "finished shards are not tokenized again"
    assert resumed == read_json(packed / "tokens.json") == read_json(output / "tokens.json")


def test_too_few_tokens_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="less than one row of 10000000"):
        pack(folder, tmp_path / "tokens", context=10_000_000)
    assert not (tmp_path / "tokens" / "tokens.json").exists()


def test_max_tokens_is_a_random_part_in_whole_rows(folder, packed, tmp_path, encoded, monkeypatch):
    everything = read_json(packed / "tokens.json")["train"]
    limit = everything["tokens"] // 3
    monkeypatch.setattr(packing, "LONGEST_TOKEN", 2)  # so that a part is tokenized: 300 tokens are short
    kept = set()
    for seed in (0, 1):
        encoded.clear()
        summary = pack(folder, tmp_path / str(seed), seed=seed, max_tokens=limit)["train"]
        assert summary["rows"] == limit // CONTEXT
        assert summary["rows"] * CONTEXT + summary["tail_tokens"] == summary["tokens"] >= limit
        assert rows(tmp_path / str(seed), "train").shape == (limit // CONTEXT, CONTEXT)
        training = encoded[: len(shards(folder / "documents", "train"))]
        assert sum(part["documents"] for part in training) < everything["documents"]
        kept.add(summary["sha256"])
    assert len(kept) == 2
    monkeypatch.setattr(packing, "LONGEST_TOKEN", 0.2)  # too little is tokenized at first
    assert pack(folder, tmp_path / "again", max_tokens=limit)["train"]["rows"] == limit // CONTEXT
    beyond = pack(folder, tmp_path / "beyond", max_tokens=10 * everything["tokens"])["train"]
    assert beyond["sha256"] == everything["sha256"]


def documents_of(output, split, eos):
    """The documents of a packed text, as tokens, in their order."""
    flat = np.concatenate([rows(output, split).ravel(), np.fromfile(output / f"{split}-rest.bin", "<i4")])
    pieces = np.split(flat, np.flatnonzero(flat == eos) + 1)
    return [tuple(piece.tolist()) for piece in pieces if len(piece)]


def test_a_filter_of_the_decay_alone_leaves_the_text_before_it_and_what_is_held_out(folder, packed, encoder, tmp_path):
    everything, filtered = pack(folder, tmp_path / "all", kept="everything"), read_json(packed / "tokens.json")
    both = pack(folder, tmp_path / "both", kept="quality-decay")
    assert both["train"] == everything["train"] and both["heldout"] == everything["heldout"] == filtered["heldout"]
    eos = encoder.eos_token_id
    before, decay, held = (documents_of(tmp_path / "both", split, eos) for split in ("train", "decay", "heldout"))
    assert sorted(decay) == sorted(documents_of(packed, "train", eos)) and len(decay) < len(before)
    place = iter(before)
    assert all(document in place for document in decay), "in the order of the text before it"
    assert both["decay"]["documents"] == filtered["train"]["documents"]
    assert held and not {*held} & {*before, *decay}


def test_a_filter_of_the_decay_that_keeps_everything_gives_one_text(folder, tmp_path):
    for limit in (None, 2000):
        plain = pack(folder, tmp_path / f"plain-{limit}", kept="everything", max_tokens=limit)
        phased = pack(folder, tmp_path / f"phased-{limit}", kept="everything-decay", max_tokens=limit)
        assert phased == plain and not (tmp_path / f"phased-{limit}/decay").exists()


def test_the_decay_has_its_own_number_of_tokens_from_the_documents_before_it(folder, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LONGEST_TOKEN", 3)  # so that a part is tokenized
    limits = {"max_tokens": 20 * CONTEXT, "max_decay_tokens": 8 * CONTEXT}
    plain = pack(folder, tmp_path / "plain", kept="everything", max_tokens=limits["max_tokens"])
    both = pack(folder, tmp_path / "both", kept="quality-decay", **limits)
    assert both["train"] == plain["train"], "whatever is read while the rate decays"
    assert (both["train"]["rows"], both["decay"]["rows"]) == (20, 8)
    eos = encoder.eos_token_id
    before, decay = ({*documents_of(tmp_path / "both", split, eos)} for split in ("train", "decay"))
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
