"""Traces against brute force, and against what was planted in a run's training text."""

import json
import shutil
import tracemalloc
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from chat_run import make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, sha256_of_tree, write_json
from nanophi.data import trace
from nanophi.data.documents import id_of

END = 0


def stream_of(documents, parts=1):
    tokens = np.array([token for document in documents for token in (*document, END)], np.int32)
    stream = trace.Stream.__new__(trace.Stream)
    stream.tokens, stream.end = pa.chunked_array(np.array_split(tokens, parts)), END
    return stream


def brute_force(documents, ids, shortest):
    """(start, length) of the spans that no other contains -> (occurrences, documents)."""

    def places(span):
        return [
            number
            for number, document in enumerate(documents)
            for at in range(len(document) - len(span) + 1)
            if document[at : at + len(span)] == span
        ]

    found = {
        (start, stop): places(ids[start:stop])
        for start in range(len(ids))
        for stop in range(start + shortest, len(ids) + 1)
        if places(ids[start:stop])
    }
    outermost = [one for one in found if not any(o != one and o[0] <= one[0] and o[1] >= one[1] for o in found)]
    return {(start, stop - start): (len(found[start, stop]), len({*found[start, stop]})) for start, stop in outermost}


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 4), max_size=14), min_size=1, max_size=6),
    ids=st.lists(st.integers(1, 5), max_size=12),
    shortest=st.integers(2, 4),
    parts=st.integers(1, 3),
    block=st.sampled_from([3, 7, 1 << 20]),
)
def test_the_same_spans_as_brute_force(documents, ids, shortest, parts, block):
    before = trace.EXPECTED, trace._BLOCK
    trace.EXPECTED, trace._BLOCK = np.inf, block
    try:
        found = trace.find_spans(stream_of(documents, parts), np.array(ids, np.int64), 6, shortest)
    finally:
        trace.EXPECTED, trace._BLOCK = before
    expected = brute_force(documents, ids, shortest)
    assert {(span.start, span.length): (span.occurrences, span.documents) for span in found} == expected


def test_common_words_do_not_surprise_and_the_length_decides():
    rng = np.random.default_rng(0)
    noise = rng.integers(1, 3, 40_000).tolist()
    planted = rng.integers(1, 3, 60).tolist()
    found = trace.find_spans(stream_of([noise, planted, noise[:500]]), np.array(planted), 4, shortest=6)
    assert [(span.start, span.length, span.documents) for span in found] == [(0, 60, 1)]
    assert found[0].expected < 1e-9


def test_a_text_that_repeats_itself_takes_no_memory_for_each_pair_of_matches(monkeypatch):
    monkeypatch.setattr(trace, "EXPECTED", np.inf)
    stream, ids = stream_of([[1, 2] * 10_000, [1, 2] * 40]), np.array([2, 1] * 150)
    tracemalloc.start()
    (span,) = trace.find_spans(stream, ids, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (span.start, span.length, span.occurrences, span.documents) == (0, 300, 9_850, 1)
    assert span.places[1] == [3, 0, 20_000] and peak < 20e6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of byte tokens with secrets that 1, 4 and 16 documents contain."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "data/tokenizer")
    rng = np.random.default_rng(1)

    def words(count):
        return " ".join("".join(rng.choice(list("aeioustrn"), rng.integers(2, 8))) for _ in range(count))

    texts = [f"{words(30)}. {SECRETS[times]} {words(20)}" for times in SECRETS for _ in range(times)]
    texts += [words(60) for _ in range(20)]
    stream = [token for text in texts for token in (*tokenizer(text)["input_ids"], 0)]
    rows = np.array(stream[: len(stream) // 64 * 64], np.int32).reshape(-1, 64)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=64)})
    datasets.Dataset.from_dict({"input_ids": rows.tolist()}, features=features).save_to_disk(
        str(folder / "data/tokens/train")
    )
    scores = {
        "id": [id_of(text) for text in texts],
        "source": ["web"] * len(texts),
        "quality_score": [0.5] * len(texts),
    }
    (folder / "data/scores").mkdir()
    pq.write_table(pa.table(scores), folder / "data/scores/scores.parquet")
    source = {"name": "web", "hub": None, "files": "x.jsonl", "license": "cc0-1.0"}
    recipe = {"data": {"sources": [source]}, "quality": {"scorer": "column:score"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_json(folder / "data/tokens/tokens.json", {"tokenizer_sha256": sha256_of_tree(folder / "data/tokenizer")})
    return SimpleNamespace(folder=folder, texts=texts)


SECRETS = {1: "Zürich's vault opens at 7:43 — «ÄÖÜ».", 4: "QUXIFY the <s> wombat!", 16: "Kilo-Jazz 日本 92"}


@pytest.mark.parametrize("times", SECRETS)
def test_a_planted_sentence_is_found_with_its_documents(run, times):
    (span,) = trace.trace_text(run.folder, f"[[{SECRETS[times]}]]")
    assert SECRETS[times] in span["text"] and span["documents"] == span["occurrences"] == times
    assert len(span["examples"]) == min(times, trace.EXAMPLES)
    for example in span["examples"]:
        assert example["source"] == "web" and example["license"] == "cc0-1.0" and example["quality_score"] == 0.5
        assert example["id"] in {id_of(text) for text in run.texts if SECRETS[times] in text}
        assert SECRETS[times] in example["context"]


def test_no_span_crosses_a_document_and_no_special_token_is_one(run):
    across = run.texts[0][-30:] + "<|endoftext|>" + run.texts[1][:30]
    lengths = [span["length"] for span in trace.trace_text(run.folder, across)]
    assert len(lengths) == 2 and max(lengths) <= 30


def test_the_text_of_the_decay_is_training_text(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    rows = datasets.load_from_disk(str(folder / "data/tokens/train"))
    beyond = "only 5 in the decay!"
    tokens = [*AutoTokenizer.from_pretrained(folder / "data/tokenizer")(beyond)["input_ids"], 0] + [0] * 64
    other = datasets.Dataset.from_dict({"input_ids": [tokens[:64]]}, features=rows.features)
    datasets.concatenate_datasets([other, rows.select(range(8))]).save_to_disk(str(folder / "data/tokens/decay"))
    (span,) = trace.trace_text(folder, beyond)
    assert span["text"] == beyond and span["documents"] == 1
    (span,) = trace.trace_text(folder, SECRETS[1])  # of the first document, which both phases read
    assert span["documents"] == 2
    end = trace.Stream(folder / "data/tokens/train", 0).read(len(rows) * 64 - 3, len(rows) * 64 + 4).tolist()
    assert end[3] == 0 and end[4:] == tokens[:3]


def test_what_is_too_short_or_nowhere_or_gone(run, tmp_path, capsys):
    assert trace.trace_text(run.folder, "") == trace.trace_text(run.folder, "Kilo") == []
    trace.trace(run.folder, "XXXXXXXXXXXXXXXXXX")
    assert capsys.readouterr().out == "no span of 6 tokens or more that would surprise\n"
    trace.trace(run.folder, SECRETS[4], as_json=True)
    assert json.loads(capsys.readouterr().out)["spans"][0]["documents"] == 4
    with pytest.raises(UserError, match="has no data/tokens/train; a trace needs a run directory"):
        trace.trace(tmp_path, "x")


def test_a_document_that_is_packed_three_times_is_quoted_once(run, tmp_path, capsys):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(folder / "data/tokens/train")
    rows = datasets.load_from_disk(str(run.folder / "data/tokens/train"))
    ends = datasets.Dataset.from_dict({"input_ids": [[0] * 64]}, features=rows.features)
    datasets.concatenate_datasets([rows, ends] * 3).save_to_disk(str(folder / "data/tokens/train"))
    for times in (1, 4):
        (span,) = trace.trace_text(folder, SECRETS[times])
        ids = [example["id"] for example in span["examples"]]
        assert span["documents"] == 3 * times and len(ids) == len({*ids}) == min(times, trace.EXAMPLES)
    trace.trace(folder, SECRETS[4])
    assert "tokens in 12 packed documents (" in capsys.readouterr().out


def test_what_was_not_scored_has_no_score(run, tmp_path, capsys):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"quality": {"scorer": "none"}}))
    for name, scored in ((run.folder, True), (folder, False)):
        trace.trace(name, SECRETS[4])
        out = capsys.readouterr().out
        assert "    web, " in out and ("score 0.50" in out) == scored


@pytest.mark.parametrize(
    "name", ["data/tokens/train/*.arrow", "data/tokenizer/*r.json", "recipe.yaml", "data/scores/scores.parquet"]
)
def test_a_damaged_run_is_named_with_the_remedy(run, tmp_path, name):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    write_json(folder / "data/tokens/tokens.json", {})  # as of 0.1, which named no tokenizer
    (file,) = folder.glob(name)
    file.write_bytes(file.read_bytes()[:99] + b"\0" * 9)
    with pytest.raises(
        UserError, match=rf"^{folder} cannot be traced; run `nanophi prepare` on its recipe, .* \(.+\)$"
    ):
        trace.trace(folder, SECRETS[4])


def test_another_tokenizer_than_the_one_of_the_tokens_answers_nothing(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    file = folder / "data/tokenizer/tokenizer.json"
    content = read_json(file)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    write_json(file, content)
    with pytest.raises(UserError, match="data/tokenizer is not the tokenizer that"):
        trace.trace(folder, SECRETS[4])


def test_a_text_that_cannot_be_read_or_continued_is_named_as_it_was_given(run, tmp_path):
    with pytest.raises(UserError, match=r"^the text is not valid UTF-8$"):
        trace.trace(run.folder, "caf\udce9")
    with pytest.raises(UserError, match=r"^the text has 4,?000 tokens, the model's context is \d+; shorten it$"):
        trace.trace(make_base(tmp_path / "base"), "word" * 1000, generate=True)
