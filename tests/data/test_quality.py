"""Scorers separate what they should, thresholds keep what they state, and bad scores are refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gathered import data, rows_of, write
from killed import run_killed

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.recipe import Quality
from nanophi.data import gather, linear, quality, quality_report, scoring, sources
from nanophi.data.ngrams import hash_words, ngrams
from nanophi.data.scorers import LinearScorer

GOOD = (
    "the a of in which that is are because however a language reason example people water energy system cell "
    "this theory describes force motion explains history between"
)
POOR = "lol ok yeah u r gonna hey guys dunno brb thx pls wtf omg haha nope hmm apt sudo irc bot join quit"
PROSE, CHAT = GOOD.split(), POOR.split()


def essay(generator, topic):
    sentences = []
    for _ in range(int(generator.integers(5, 12))):
        words = [*generator.choice(PROSE, 12), *(f"{topic}{value}" for value in generator.integers(0, 300, 4))]
        sentences.append(" ".join(generator.permutation(words)).capitalize() + ".")
    return " ".join(sentences)


def chat(generator, topic):
    lines = []
    for _ in range(int(generator.integers(8, 20))):
        words = [*generator.choice(CHAT, 5), f"{topic}{generator.integers(0, 300)}"]
        lines.append(f"<{generator.choice(['bob', 'eve'])}> " + " ".join(generator.permutation(words)))
    return "\n".join(lines)


def rows_about(generator, topics, each, **scores):
    """Essays and chats about each topic, with the scores given for their kinds."""
    return [
        {"text": make(generator, topic), "source": f"{kind}-{topic}"} | ({"score": scores[kind]} if scores else {})
        for kind, make in (("essay", essay), ("chat", chat))
        for topic in topics
        for _ in range(each)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of six sources: essays and chats, two of each to fit on, one of each unseen, with a score column."""
    folder = tmp_path_factory.mktemp("quality")
    write(folder / "in" / "a.parquet", rows_about(np.random.default_rng(0), "xyz", 80, essay=0.9, chat=0.2))
    gather.gather(settings(folder), folder / "documents", "score")
    return folder


def settings(folder, **fields):
    return data({"files": str(folder / "in" / "*.parquet"), "source_column": "source"}, **fields)


LINEAR = Quality(high=["essay-x", "essay-y"], low=["chat-x", "chat-y"])
COLUMN = Quality(scorer="column:score", threshold=0.5)


def score(folder, scorer, output, **fields):
    return scoring.score(folder / "documents", scorer, settings(folder, **fields), 0, output)


@pytest.fixture(scope="module")
def fitted(folder):
    """The scores of a linear scorer, and what is said of it."""
    return folder / "fitted", score(folder, LINEAR, folder / "fitted")


@pytest.fixture(scope="module")
def by_column(folder):
    score(folder, COLUMN, folder / "data" / "scores")
    return folder / "data" / "scores"


def read_scores(folder):
    return pq.read_table(folder / "scores.parquet")


def test_linear_scorer_separates_sources_it_never_saw(fitted):
    from sklearn.metrics import roc_auc_score

    output, summary = fitted
    assert summary["scored"] == 480
    assert summary["roc_auc"] > 0.95
    rows = [row for row in read_scores(output).to_pylist() if row["source"].endswith("-z")]
    assert summary["mean_score"] == round(read_scores(output)["quality_score"].to_numpy().mean(dtype=float), 4)
    assert roc_auc_score([row["source"] == "essay-z" for row in rows], [row["quality_score"] for row in rows]) > 0.95
    assert sorted(path.name for path in output.iterdir()) == ["scorer.json", "scorer.safetensors", "scores.parquet"]


def test_scores_follow_the_documents_and_the_saved_scorer(folder, fitted, tmp_path):
    table = read_scores(fitted[0])
    score(folder, LINEAR, tmp_path / "two", workers=2)
    assert table.equals(read_scores(tmp_path / "two"))
    read = [(split, row) for split in ("train", "heldout") for row in rows_of(folder / "documents", split)]
    texts = [row["text"].encode() for _, row in read]
    assert table["id"].to_pylist() == [row["id"] for _, row in read]
    assert table["split"].to_pylist() == [split for split, _ in read]
    assert table["bytes"].to_pylist() == [len(text) for text in texts]
    scorer = LinearScorer.load(fitted[0])
    assert np.allclose(table["quality_score"].to_numpy(), scorer.score(texts), atol=1e-6)
    score(folder, Quality(scorer=f"model:{fitted[0]}"), tmp_path / "three")
    assert np.array_equal(read_scores(tmp_path / "three")["quality_score"], table["quality_score"])


def test_features_are_counts_of_hashed_words_and_pairs():
    texts = [b"one two one two.", b"", b"Only\n{code} 42"]
    hashed, statistics = linear.features(texts)
    words = hash_words(texts)
    for row in range(len(texts)):
        parts = (words, ngrams(words, 2))
        mine = [value for part in parts for value in part.hashes[slice(*part.offsets[row : row + 2])].tolist()]
        expected = np.zeros(linear.BUCKETS)
        for value in mine:
            expected[value % linear.BUCKETS] += 1 / np.sqrt(len(mine))
        assert np.allclose(hashed[row].toarray()[0], expected)
    lower, digit = (list(linear._CLASSES).index(name) for name in ("lower", "digit"))
    assert statistics[0, lower] == pytest.approx(12 / 16)
    assert statistics[1, : len(linear._CLASSES)].sum() == 0
    assert statistics[2, digit] == pytest.approx(2 / 14)


def kinds_kept(report):
    """Which kinds of text have kept documents."""
    return {name.partition("-")[0] for name, entry in report["sources"].items() if entry["kept_documents"]}


def test_column_scores_and_threshold(folder, by_column, tmp_path):
    report = scoring.select(folder / "documents", by_column, COLUMN, tmp_path)
    train = rows_of(folder / "documents", "train")
    kept = pq.read_table(tmp_path / "kept.parquet").to_pylist()
    assert [row["id"] for row in kept] == [row["id"] for row in train if row["score"] > 0.5]
    assert report["documents"] == len(train) and report["kept_documents"] == len(kept)
    assert kinds_kept(report) == {"essay"}
    by_threshold = {entry["threshold"]: entry["documents"] for entry in report["sweep"]}
    assert by_threshold[0.0] == len(train) and by_threshold[0.25] == len(kept) and by_threshold[0.9] == 0
    assert sum(report["histogram"]["documents"]) == len(train)
    examples = read_json(tmp_path / "quality.json")["examples"]
    texts = {row["id"]: row["text"] for row in train}
    for entries in examples.values():
        assert entries and all(texts[entry["id"]].startswith(entry["text"]) for entry in entries)
    assert all(entry["quality_score"] == 0.9 for entry in examples["nearest_above"])
    assert all(entry["quality_score"] == 0.2 for entry in examples["nearest_below"])
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "| essay-x |" in (tmp_path / "quality.md").read_text()


def test_a_share_is_kept_and_the_heldout_documents_are_divided_alike(folder, by_column, tmp_path):
    reports = {}
    for select in ("best", "worst", "random"):  # less than the essays' part
        share = Quality(scorer="column:score", share=0.25, select=select)
        reports[select] = scoring.select(folder / "documents", by_column, share, tmp_path / select, seed=1)
    kept = {select: kinds_kept(report) for select, report in reports.items()}
    assert kept == {"best": {"essay"}, "worst": {"chat"}, "random": {"essay", "chat"}}
    best = reports["best"]
    assert abs(best["kept_bytes_fraction"] - 0.25) < 0.01
    assert (best["rule"], best["threshold"]) == ("the best 25.0 % of the bytes", None)
    assert best["cutoff"] == pytest.approx(0.9)
    held = pq.read_table(tmp_path / "best" / "heldout.parquet").to_pylist()
    assert [row["id"] for row in held] == [row["id"] for row in rows_of(folder / "documents", "heldout")]
    assert all(row["kept"] == (row["quality_score"] > 0.5) for row in held)
    assert not (tmp_path / "random" / "heldout.parquet").exists()


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.1, None])
def test_scores_that_are_no_scores_are_refused(tmp_path, bad):
    rows = [{"text": f"document number {number} " * 30, "score": 0.5} for number in range(20)]
    rows[19]["score"] = bad
    section = data(write(tmp_path / "a.parquet", rows))
    if bad is None or bad != bad:
        with pytest.raises(UserError, match=r"a\.parquet:0:19 has no quality score: column 'score' holds (nan|None)"):
            gather.gather(section, tmp_path / "documents", "score")
        return
    gather.gather(section, tmp_path / "documents", "score")
    with pytest.raises(UserError, match=r"document [0-9a-f]{16} has quality score .* numbers from 0 to 1"):
        scoring.score(tmp_path / "documents", COLUMN, section, 0, tmp_path / "scores")
    assert not (tmp_path / "scores" / "scores.parquet").exists()


KILLED = """
from nanophi.data import scoring
from nanophi.core.recipe import Data, Quality

documents, output, settings, scorer = arguments
scorer = Quality.model_validate_json(scorer)
scoring.score(Path(documents), scorer, Data.model_validate_json(settings), 0, Path(output))
"""


def test_killed_and_started_again(tmp_path, monkeypatch):
    generator = np.random.default_rng(1)
    for number in range(4):
        write(tmp_path / "in" / f"{number}.parquet", rows_about(generator, "x", 30))
    section, scorer = settings(tmp_path), Quality(high=["essay-x"], low=["chat-x"])
    monkeypatch.setattr(sources, "PART_BYTES", 1)  # a shard for each file
    gather.gather(section, tmp_path / "documents")
    output, whole = tmp_path / "scores", tmp_path / "whole"
    run_killed(KILLED, tmp_path / "documents", output, section.model_dump_json(), scorer.model_dump_json(), survive=3)
    assert not (output / "scores.parquet").exists()
    finished = [path for mark in (output / ".parts").glob("*.json") for path in (mark, mark.with_suffix(".parquet"))]
    before = {path: path.stat().st_mtime_ns for path in (*finished, *output.glob("scorer.*"))}
    assert len(before) == 8
    with monkeypatch.context() as patch:
        patch.setattr(scoring.shutil, "rmtree", lambda folder, ignore_errors: None)
        resumed = score(tmp_path, scorer, output)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was finished is not done again"
    assert resumed == score(tmp_path, scorer, output) == score(tmp_path, scorer, whole)
    for name in ("scores.parquet", "scorer.json", "scorer.safetensors"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_labels_must_name_sources(folder, tmp_path):
    with pytest.raises(UserError, match="names source 'novel'; there is chat-x"):
        score(folder, Quality(high=["novel"], low=["chat-x"]), tmp_path)


def test_report_of_a_run_counts_tokens(folder, by_column, capsys):
    scoring.select(folder / "documents", by_column, COLUMN, folder / "data" / "quality")
    quality.report(folder)
    assert "tokens" not in capsys.readouterr().out
    write_json(folder / "data" / "tokens" / "tokens.json", {"train": {"bytes_per_token": 4.0}})
    quality.report(folder)
    assert "tokens, about" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not a run whose documents were selected"):
        quality.report(folder / "data")
    with pytest.raises(UserError, match="a run has its own report"):
        quality.report(folder, output=folder / "report")


# On files


def write_texts(folder, **texts):
    generator = np.random.default_rng(3)
    for name, make in texts.items():
        write(folder / f"{name}.jsonl", [make(generator, name) for _ in range(60)])


def test_the_report_of_a_run_before_01_is_the_page_that_it_has(tmp_path, capsys):
    write_json(tmp_path / "data/quality/quality.json", {"threshold": 0.5, "documents": 2, "kept_documents": 1})
    (tmp_path / "data/quality/quality.md").write_text("1 of 2 documents kept")
    quality.report(tmp_path)
    assert capsys.readouterr().out == "1 of 2 documents kept\n"


def test_fit_score_and_report_on_files(tmp_path, capsys):
    write_texts(tmp_path, good=essay, poor=chat, mine=essay)
    scorer, mine = tmp_path / "scorer", str(tmp_path / "mine.jsonl")
    quality.fit(scorer, [str(tmp_path / "good.jsonl")], [str(tmp_path / "poor.jsonl")])
    fitted = read_json(scorer / "scorer.json")
    assert fitted["roc_auc"] > 0.95 and f"ROC curve {fitted['roc_auc']} on" in capsys.readouterr().out
    scores = tmp_path / "scores.parquet"
    quality.score(mine, f"model:{scorer}", scores)
    assert capsys.readouterr().out == f"{scores}: 60 documents\n"
    assert pq.read_table(scores)["quality_score"].to_numpy().mean() > 0.7
    quality.report(scores, 0.5, tmp_path / "report")
    report = read_json(tmp_path / "report" / "quality.json")
    assert report["documents"] == 60 and report["kept_fraction"] > 0.9
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    for name, message in (("broken", "cannot be read"), ("other", "was not written by")):
        with pytest.raises(UserError, match=message):
            quality.report(tmp_path / f"{name}.parquet", 0.5, tmp_path / "report")
    (scorer / "scorer.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a linear scorer"):
        quality.score(mine, f"model:{scorer}", tmp_path / "again.parquet")
    assert not (tmp_path / "again.parquet").exists()


def test_commands_replace_only_what_they_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path, good=essay, poor=chat)
    for name in ("mine", "report"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "quality.md").write_text("my own notes")
    (tmp_path / "mine.parquet").write_bytes(b"mine")
    for _ in range(2):
        quality.fit(Path("scorer"), ["good.jsonl"], ["poor*"])
        quality.score("good.jsonl", "scorer", Path("scores.parquet"))
        quality.report(Path("scores.parquet"))
    assert read_json(tmp_path / "quality" / "quality.json")["threshold"] == 0.5
    refused = [
        (quality.fit, (Path("mine"), ["good.jsonl"], ["poor*"]), r"mine holds quality\.md, which `nanophi quality"),
        (quality.fit, (Path("good.jsonl"), ["good.jsonl"], ["poor*"]), "`nanophi quality fit` writes a folder"),
        (quality.fit, (Path("scorer"), ["good.jsonl", "poor*"], ["poor*"]), r"poor\* is named as high and as low"),
        (quality.score, ("poor*", "scorer", Path("mine.parquet")), "was not written by `nanophi quality score`"),
        (quality.fit, (Path("good.jsonl/a"), ["good.jsonl"], ["poor*"]), "^good.jsonl/a cannot be written; choose an"),
        (quality.score, ("poor*", "scorer", Path("mine.parquet/a")), "^mine.parquet/a cannot be written; choose an"),
        (quality.score, ("poor*", "scorer", Path("mine")), "`nanophi quality score` writes a file"),
        (quality.report, (Path("scores.parquet"), None, Path("report")), r"report holds quality\.md, which `nanophi"),
    ]
    for verb, arguments, message in refused:
        with pytest.raises(UserError, match=message):
            verb(*arguments)
    assert (tmp_path / "mine.parquet").read_bytes() == b"mine"


def test_files_are_scored_by_a_column(tmp_path, capsys):
    lines = write(tmp_path / "10:30.jsonl", [*({"text": f"number {n}", "q": n / 2} for n in range(10)), {"text": ""}])
    lines.write_text(lines.read_text() + "broken")
    output = tmp_path / "scores.parquet"
    quality.score(str(tmp_path / "*.jsonl"), "column:q", output, scale=(0, 5))
    assert capsys.readouterr().out == f"{output}: 10 documents; dropped: empty 1, not_json 1\n"
    assert pq.read_table(output)["quality_score"].to_pylist() == [n / 2 for n in range(10)]
    quality.report(output, 2.0, tmp_path / "report")
    report = read_json(tmp_path / "report" / "quality.json")
    assert report["kept_documents"] == 5 and list(report["sources"]) == [str(lines)]
    with pytest.raises(UserError, match=r"--threshold 7 lies outside the scale of the scores, 0 to 5"):
        quality.report(output, 7, tmp_path / "report")


def test_names_and_texts_from_the_data_are_never_markup(folder, tmp_path):
    table = pa.table({"id": ["0" * 16], "source": ["<img src=x>|`b`"], "bytes": [9], "quality_score": [0.7]})
    table = table.set_column(1, "source", table["source"].combine_chunks().dictionary_encode())
    table = table.append_column("kept", pa.array([True]))
    quality_report.write(table, Quality(), {"scorer": "column:`"}, lambda ids: {"0" * 16: "a`b"}, tmp_path)
    page = (tmp_path / "quality.md").read_text()
    assert r"| \<img src=x\>\|\`b\` |" in page and "``a`b``" in page and "`` column:` ``" in page
