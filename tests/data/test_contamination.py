"""Planted evaluation items are found, in every form in which they may stand in a document."""

import numpy as np
import pytest
from gathered import write

from nanophi.core.errors import UserError
from nanophi.data import contamination
from nanophi.data.ngrams import hash_words


def write_benchmark(folder, **configs):
    """A dataset in Hub layout: rows by config and split."""
    lines = []
    for config, splits in configs.items():
        lines.append(f"- config_name: {config}\n  data_files:\n")
        for split, rows in splits.items():
            write(folder / config / f"{split}-0.parquet", rows)
            lines.append(f"  - split: {split}\n    path: {config}/{split}-*.parquet\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n# A benchmark\n")


def indexed(folder, **configs):
    """The index of one benchmark."""
    write_benchmark(folder / "org" / "quiz", **configs)
    return contamination.load_benchmarks(folder, 13)


def words(name, count=20):
    return " ".join(f"{name}{number}" for number in range(count))


def filler(generator, words):
    return " ".join(f"filler{number}" for number in generator.integers(0, 10_000, words))


def find(index, text):
    return contamination.find(index, hash_words([text.encode()]))[0]


def test_every_planted_item_is_found(tmp_path):
    generator = np.random.default_rng(0)
    rows = []
    for number in range(100):
        question = " ".join(f"q{value}" for value in generator.integers(0, 3000, int(generator.integers(4, 30)))) + "?"
        choices = [" ".join(f"c{value}" for value in generator.integers(0, 3000, 4)) for _ in range(4)]
        rows.append({"id": f"item-{number}", "question": question, "choices": {"text": choices, "label": list("ABCD")}})
    index = indexed(tmp_path, default={"test": rows})
    assert index.names == ["org/quiz"]
    generator = np.random.default_rng(1)
    for number, row in enumerate(rows):
        question, choices = row["question"], row["choices"]["text"]
        forms = [f"{question} {choices[1]}", f"{question}\n" + "\n".join(choices)]
        if len(question.split()) >= 8:
            forms += [f"{question}\nAnswer: {choices[1]}", question.upper()]
        for form in forms:
            assert number in find(index, f"{filler(generator, 200)}\n{form}\n{filler(generator, 200)}"), form
    assert find(index, filler(generator, 5000)) == []


def test_a_question_of_five_words_alone_is_not_an_item(tmp_path):
    index = indexed(tmp_path, default={"test": [{"question": "Which of these is true?", "choices": ["yes", "no"]}]})
    assert index.too_short == [1]
    assert find(index, "I wonder which of these is true and which is not") == []


def test_blanks_are_filled_in(tmp_path):
    sentence = "The trophy does not fit into the brown suitcase because the _ is too large."
    index = indexed(tmp_path, default={"test": [{"sentence": sentence, "option1": "trophy", "option2": "suitcase"}]})
    assert find(index, sentence.replace("_", "trophy")) == [0]


def test_only_the_scored_split_is_looked_for_and_subjects_are_one_benchmark(tmp_path):
    names = [f"subject{number}" for number in range(12)]
    configs = {name: {split: [{"question": words(f"{name}{split}")}] for split in ("test", "dev")} for name in names}
    index = indexed(tmp_path, **configs)
    assert (index.names, index.items) == (["org/quiz"], [12])
    assert find(index, words("subject3dev")) == []
    report = contamination.report(index, [("00ff", "books", find(index, words("subject3test")))])["org/quiz"]
    assert report["items_found"] == report["documents"] == 1
    assert report["examples"][0]["document"] == "00ff"


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
    index = indexed(tmp_path, default={"test": [row]})
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
    for folder in ("damaged", "unreadable", "nothing"):
        write_benchmark(tmp_path / folder, default={"test": [{"question": "x"}]})
    (tmp_path / "damaged" / "default" / "test-0.parquet").write_text("no table")
    (tmp_path / "unreadable" / "README.md").write_text("---\nconfigs: [{\n---\n")
    (tmp_path / "nothing" / "README.md").unlink()
    for folder, message in (
        ("nowhere", "is not a folder"),
        ("nothing", "holds no dataset"),
        ("damaged", r"test-0\.parquet cannot be read as parquet"),
        ("unreadable", r"README\.md: the metadata is not a dataset card's"),
    ):
        with pytest.raises(UserError, match=message):
            contamination.load_benchmarks(tmp_path / folder, 13)
