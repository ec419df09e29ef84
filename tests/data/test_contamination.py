"""Planted evaluation items are found, in every form in which they may stand in a document."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nanophi
from nanophi.core.errors import UserError
from nanophi.data import contamination
from nanophi.data.ngrams import hash_words

SHARED = Path(os.environ.get("NANOPHI_SHARED", Path(nanophi.__file__).parent.parent / "shared"))


def write_benchmark(folder, **configs):
    """A dataset in Hub layout: rows by config and split."""
    lines = []
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        lines.append(f"- config_name: {config}\n  data_files:\n")
        for split, rows in splits.items():
            pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-0.parquet")
            lines.append(f"  - split: {split}\n    path: {config}/{split}-*.parquet\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n# A benchmark\n")


def words(name, count=20):
    return " ".join(f"{name}{number}" for number in range(count))


def filler(generator, words):
    return " ".join(f"filler{number}" for number in generator.integers(0, 10_000, words))


@pytest.fixture
def questions():
    generator = np.random.default_rng(0)
    rows = []
    for number in range(100):
        question = " ".join(f"q{value}" for value in generator.integers(0, 3000, int(generator.integers(4, 30)))) + "?"
        choices = [" ".join(f"c{value}" for value in generator.integers(0, 3000, 4)) for _ in range(4)]
        rows.append({"id": f"item-{number}", "question": question, "choices": {"text": choices, "label": list("ABCD")}})
    return rows


def find(index, text):
    return contamination.find(index, hash_words([text.encode()]))[0]


def test_every_planted_item_is_found(tmp_path, questions):
    write_benchmark(tmp_path / "org" / "quiz", default={"test": questions})
    index = contamination.load_benchmarks(tmp_path, 13)
    assert index.names == ["org/quiz"]
    generator = np.random.default_rng(1)
    for number, row in enumerate(questions):
        before, after = filler(generator, 200), filler(generator, 200)
        choices = row["choices"]["text"]
        forms = [f"{row['question']}\nAnswer: {choices[1]}" if len(row["question"].split()) >= 8 else None]
        forms += [f"{row['question']} {choices[1]}", f"{row['question']}\n" + "\n".join(choices)]
        forms += [row["question"].upper() if len(row["question"].split()) >= 8 else None]
        for form in filter(None, forms):
            assert number in find(index, f"{before}\n{form}\n{after}"), form
    assert find(index, filler(generator, 5000)) == []


def test_a_question_of_five_words_alone_is_not_an_item(tmp_path):
    row = {"question": "Which of these is true?", "choices": ["yes", "no"]}
    write_benchmark(tmp_path / "quiz", default={"test": [row]})
    index = contamination.load_benchmarks(tmp_path, 13)
    assert index.too_short == [1]
    assert find(index, "I wonder which of these is true and which is not") == []


def test_blanks_are_filled_in(tmp_path):
    sentence = "The trophy does not fit into the brown suitcase because the _ is too large."
    row = {"sentence": sentence, "option1": "trophy", "option2": "suitcase"}
    write_benchmark(tmp_path / "schema", default={"test": [row]})
    index = contamination.load_benchmarks(tmp_path, 13)
    assert find(index, sentence.replace("_", "trophy")) == [0]


def test_only_the_scored_split_is_looked_for_and_subjects_are_one_benchmark(tmp_path):
    names = [f"subject{number}" for number in range(12)]
    configs = {name: {split: [{"question": words(f"{name}{split}")}] for split in ("test", "dev")} for name in names}
    write_benchmark(tmp_path / "org" / "subjects", **configs)
    index = contamination.load_benchmarks(tmp_path, 13)
    assert (index.names, index.items) == (["org/subjects"], [12])
    assert find(index, words("subject3dev")) == []
    report = contamination.report(index, [("00ff", "books", find(index, words("subject3test")))])
    assert report["org/subjects"]["items_found"] == report["org/subjects"]["documents"] == 1
    assert report["org/subjects"]["examples"][0]["document"] == "00ff"


def test_every_split_that_may_be_scored_is_looked_for(tmp_path):
    """lm-eval scores the validation of HellaSwag, whose test has no answers, and the one split of BLiMP."""
    splits = {split: [{"ctx": words(split), "endings": ["one", "two"]}] for split in ("train", "validation", "test")}
    write_benchmark(tmp_path / "swag", default=splits)
    pair = {f"sentence_{kind}": f"{kind} {words('blimp', 12)}" for kind in ("good", "bad")}
    write_benchmark(tmp_path / "pairs", default={"train": [pair]})
    index = contamination.load_benchmarks(tmp_path, 13)
    assert dict(zip(index.names, index.items, strict=True)) == {"swag": 2, "pairs": 1}
    assert [len(find(index, words(split))) for split in ("train", "validation", "test")] == [0, 1, 1]
    assert len(find(index, pair["sentence_good"])) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"text": words("w", 70)},
        {"question": "Which one of these is it?", "support": "", "correct_answer": " ".join("abcdefghi")},
        {"goal": "How to do it well", "sol1": " ".join("abcdefghi"), "sol2": " ".join("jklmnopqr")},
    ],
    ids=["lambada", "sciq", "piqa"],
)
def test_columns_of_the_suites_own_tasks_are_known(tmp_path, row):
    write_benchmark(tmp_path / "task", default={"test": [row]})
    index = contamination.load_benchmarks(tmp_path, 13)
    assert index.too_short == [0]
    planted = row.get("text") or " ".join(value for key, value in row.items() if key not in ("support", "sol2"))
    assert find(index, f"before {planted} after") == [0]


def test_an_item_of_two_benchmarks_counts_in_both(tmp_path):
    text = words("word", 30)
    for name in ("one", "two"):
        write_benchmark(tmp_path / name, default={"test": [{"question": text}, {"question": f"{name} {text}"}]})
    index = contamination.load_benchmarks(tmp_path, 13)
    found = find(index, text)
    assert found == [0, 1, 2, 3]
    report = contamination.report(index, [("00ff", "books", found)])
    assert [report[name]["items_found"] for name in ("one", "two")] == [2, 2]


def test_what_is_no_benchmark_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        contamination.load_benchmarks(tmp_path / "nowhere", 13)
    with pytest.raises(UserError, match="holds no dataset"):
        contamination.load_benchmarks(tmp_path, 13)
    write_benchmark(tmp_path / "quiz", default={"test": [{"question": "x"}]})
    (tmp_path / "quiz" / "default" / "test-0.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"test-0\.parquet cannot be read as parquet"):
        contamination.load_benchmarks(tmp_path, 13)
    (tmp_path / "quiz" / "README.md").write_text("---\nconfigs: [{\n---\n")
    with pytest.raises(UserError, match=r"README\.md: the metadata is not a dataset card's"):
        contamination.load_benchmarks(tmp_path, 13)
