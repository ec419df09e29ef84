"""The one reader of documents: order, columns, samples by id, the held-out order."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanophi.core.errors import UserError
from nanophi.data import documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of five documents, in row groups of two."""
    folder = tmp_path_factory.mktemp("documents")
    for split, shard in (("train", 0), ("train", 1), ("heldout", 0)):
        texts = [f"{split} text {5 * shard + row} é" for row in range(5)]
        ids = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
        table = pa.table({"id": ids, "text": texts, "source": [f"s{row % 2}" for row in range(5)]})
        pq.write_table(table, folder / f"{split}-{shard:05d}.parquet", row_group_size=2)
    return folder


def test_batches_keep_the_order_of_shards_and_rows(folder):
    paths = documents.shards(folder, "train")
    for rows in (1, 3, 256, None):
        texts = [text for batch in documents.batches(paths, ["text"], rows) for text in batch["text"].to_pylist()]
        assert texts == [f"train text {number} é" for number in range(10)]
    assert {len(batch) for batch in documents.batches(paths[0], ["id"], None)} == {1, 2}, "as written"
    assert documents.text_bytes(paths) > sum(len(text.encode()) for text in texts)


def test_problems_name_the_file(folder, tmp_path):
    with pytest.raises(UserError, match=r"holds no heldout-\*\.parquet; run `nanophi prepare`"):
        documents.shards(tmp_path, "heldout")
    with pytest.raises(UserError, match=r"train-00000\.parquet has no column 'x'; it has id, text, source"):
        list(documents.batches(documents.shards(folder, "train"), ["x"]))
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match=r"train-00000\.parquet cannot be read"):
        list(documents.batches(documents.shards(tmp_path, "train"), ["text"]))


def test_draw_depends_on_id_and_seed_alone(folder):
    batches = list(documents.batches(documents.shards(folder, "train"), ["id"]))
    ids = pa.concat_arrays([batch["id"] for batch in batches])
    numbers = documents.uniform_from_id(ids, 1)
    assert ((numbers >= 0) & (numbers < 1)).all() and len(set(numbers)) == 10
    assert np.array_equal(documents.uniform_from_id(ids[3:], 1), numbers[3:])
    assert not np.array_equal(documents.uniform_from_id(ids, 2), numbers)
    many = pa.array([hashlib.sha256(str(n).encode()).hexdigest()[:16] for n in range(4000)])
    assert np.mean(documents.uniform_from_id(many, 5) < 0.25) == pytest.approx(0.25, abs=0.03)
    assert documents.ids_to_uint64(pa.array(["00000000000000ff"])).tolist() == [255]


def test_find_by_id(folder):
    rows = [
        row
        for batch in documents.batches(documents.shards(folder, "train"), ["id", "text"])
        for row in batch.to_pylist()
    ]
    found = documents.find(folder, {rows[7]["id"], rows[1]["id"], "ffffffffffffffff"}, ["text"])
    assert found == {rows[1]["id"]: rows[1], rows[7]["id"]: rows[7]}
    assert documents.find(folder, {rows[7]["id"]}, ["text"], "heldout") == {}


def test_heldout_order_is_the_hash_of_the_ids(folder):
    rows = documents.heldout(folder, ["source", "text"])
    assert [list(row) for row in rows] == [["id", "source", "text"]] * 5
    hashes = [hashlib.sha256(row["id"].encode()).hexdigest() for row in rows]
    assert hashes == sorted(hashes) and {row["text"] for row in rows} == {f"heldout text {n} é" for n in range(5)}
