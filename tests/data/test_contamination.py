"""Planted evaluation items are found, in every form in which they may stand in a document."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nanophi
from nanophi.core.errors import UserError
from nanophi.data import contamination
from nanophi.data.ngrams import hash_words

SHARED = Path(os.environ.get("NANOPHI_SHARED", Path(nanophi.__file__).parent.parent / "shared"))


def write_benchmark(folder: Path, rows: list[dict[str, Any]], split: str = "test", config: str = "default") -> None:
    (folder / config).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-0.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: " + config + "\n  data_files:\n"
        f"  - split: {split}\n    path: {config}/{split}-*.parquet\n---\n# A benchmark\n"
    )


def filler(generator: np.random.Generator, words: int) -> str:
    return " ".join(f"filler{number}" for number in generator.integers(0, 10_000, words))


@pytest.fixture
def questions() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(100):
        question = " ".join(f"q{value}" for value in generator.integers(0, 3000, int(generator.integers(4, 30)))) + "?"
        choices = [" ".join(f"c{value}" for value in generator.integers(0, 3000, 4)) for _ in range(4)]
        rows.append({"id": f"item-{number}", "question": question, "choices": {"text": choices, "label": list("ABCD")}})
    return rows


def find(index: contamination.BenchmarkIndex, text: str) -> list[int]:
    return contamination.find(index, hash_words([text.encode()]))[0]


def test_every_planted_item_is_found(tmp_path: Path, questions: list[dict[str, Any]]) -> None:
    write_benchmark(tmp_path / "org" / "quiz", questions)
    contamination.load_benchmarks(tmp_path, 13).save(tmp_path / "index.npz")
    index = contamination.BenchmarkIndex.load(tmp_path / "index.npz")
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


def test_a_question_of_five_words_alone_is_not_an_item(tmp_path: Path) -> None:
    write_benchmark(tmp_path / "quiz", [{"question": "Which of these is true?", "choices": ["yes", "no"]}])
    index = contamination.load_benchmarks(tmp_path, 13)
    assert index.too_short == [1]
    assert find(index, "I wonder which of these is true and which is not") == []


def test_blanks_are_filled_in(tmp_path: Path) -> None:
    sentence = "The trophy does not fit into the brown suitcase because the _ is too large."
    write_benchmark(tmp_path / "schema", [{"sentence": sentence, "option1": "trophy", "option2": "suitcase"}])
    index = contamination.load_benchmarks(tmp_path, 13)
    assert find(index, sentence.replace("_", "trophy")) == [0]


def test_only_the_scored_split_is_looked_for_and_subjects_are_one_benchmark(tmp_path: Path) -> None:
    folder = tmp_path / "org" / "subjects"
    entries = []
    for number in range(12):
        name = f"subject{number}"
        (folder / name).mkdir(parents=True)
        for split in ("test", "dev"):
            text = " ".join(f"{name}{split}{word}" for word in range(20))
            pq.write_table(pa.table({"question": [text]}), folder / name / f"{split}-0.parquet")
        entries.append(
            f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*.parquet\n"
            f"  - split: dev\n    path: {name}/dev-*.parquet\n"
        )
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
    index = contamination.load_benchmarks(tmp_path, 13)
    assert (index.names, index.items) == (["org/subjects"], [12])
    assert find(index, " ".join(f"subject3dev{word}" for word in range(20))) == []
    hits = find(index, " ".join(f"subject3test{word}" for word in range(20)))
    report = contamination.report(index, [("00ff", "books", hits)])
    assert report["org/subjects"]["items_found"] == report["org/subjects"]["documents"] == 1
    assert report["org/subjects"]["examples"][0]["document"] == "00ff"


def test_every_split_that_may_be_scored_is_looked_for(tmp_path: Path) -> None:
    """lm-eval scores the validation of HellaSwag, whose test has no answers, and the one split of BLiMP."""
    entries = []
    for split in ("train", "validation", "test"):
        text = " ".join(f"{split}{word}" for word in range(20))
        (tmp_path / "swag").mkdir(exist_ok=True)
        pq.write_table(pa.table({"ctx": [text], "endings": [["one", "two"]]}), tmp_path / "swag" / f"{split}.parquet")
        entries.append(f"  - split: {split}\n    path: {split}.parquet\n")
    header = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    (tmp_path / "swag" / "README.md").write_text(header + "".join(entries) + "---\n")
    pair = {f"sentence_{kind}": f"{kind} " + " ".join(f"blimp{word}" for word in range(12)) for kind in ("good", "bad")}
    write_benchmark(tmp_path / "pairs", [pair], split="train")
    index = contamination.load_benchmarks(tmp_path, 13)
    assert dict(zip(index.names, index.items, strict=True)) == {"swag": 2, "pairs": 1}
    for split, hits in (("train", 0), ("validation", 1), ("test", 1)):
        assert len(find(index, " ".join(f"{split}{word}" for word in range(20)))) == hits
    assert len(find(index, pair["sentence_good"])) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"text": " ".join(f"w{word}" for word in range(70))},
        {"question": "Which one of these is it?", "support": "", "correct_answer": " ".join("abcdefghi")},
        {"goal": "How to do it well", "sol1": " ".join("abcdefghi"), "sol2": " ".join("jklmnopqr")},
    ],
    ids=["lambada", "sciq", "piqa"],
)
def test_columns_of_the_suites_own_tasks_are_known(tmp_path: Path, row: dict[str, Any]) -> None:
    write_benchmark(tmp_path / "task", [row])
    index = contamination.load_benchmarks(tmp_path, 13)
    assert index.too_short == [0]
    planted = row.get("text") or " ".join(value for key, value in row.items() if key not in ("support", "sol2"))
    assert find(index, f"before {planted} after") == [0]


def test_an_item_of_two_benchmarks_counts_in_both(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(30))
    for name in ("one", "two"):
        write_benchmark(tmp_path / name, [{"question": text}, {"question": f"{name} {text}"}])
    index = contamination.load_benchmarks(tmp_path, 13)
    found = find(index, text)
    assert found == [0, 1, 2, 3]
    report = contamination.report(index, [("00ff", "books", found)])
    assert [report[name]["items_found"] for name in ("one", "two")] == [2, 2]


def test_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        contamination.load_benchmarks(tmp_path / "nowhere", 13)
    with pytest.raises(UserError, match="holds no dataset"):
        contamination.load_benchmarks(tmp_path, 13)


@pytest.mark.skipif(not (SHARED / "benchmarks").is_dir(), reason="needs the benchmarks beside the project")
def test_two_hundred_real_items_are_found() -> None:
    index = contamination.load_benchmarks(SHARED / "benchmarks", 13)
    generator = np.random.default_rng(0)
    planted, expected = [], []
    wanted = {"hellaswag": ("ctx", "validation"), "ai2_arc": ("question", "test"), "gsm8k": ("question", "test")}
    for (name, files), start in zip(
        contamination._benchmarks(SHARED / "benchmarks"), index.starts.tolist(), strict=False
    ):
        column = next((column for key, (column, _) in wanted.items() if key in name), None)
        rows = [row for file in files for row in pq.read_table(file).to_pylist()] if column else []
        long = [number for number, row in enumerate(rows) if len(row[column].split()) >= 14]
        for number in generator.choice(long, 50, replace=False) if long else []:
            planted.append(f"{filler(generator, 300)} {rows[number][column]} {filler(generator, 300)}".encode())
            expected.append(start + number)
    assert len(planted) == 200
    found = contamination.find(index, hash_words(planted))
    assert all(item in items for item, items in zip(expected, found, strict=True))
