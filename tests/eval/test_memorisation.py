"""Memorisation: items against brute force, and a planted text that is recited the more often it was seen."""

from pathlib import Path

import nltk
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import CONTEXT, EOS, VOCAB, add_sources, make_run, stream_hash, train, write_rows

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.data.trace import Stream, trace_text
from nanophi.eval.measure import Options, measure
from nanophi.eval.tasks import memorisation


def stream_of(tokens: list[int]) -> Stream:
    stream = Stream.__new__(Stream)
    stream.tokens, stream.end = pa.chunked_array(np.array_split(np.array(tokens, np.int32), 3)), 0
    return stream


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=80),
    windows=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=6),
    block=st.sampled_from([5, 16, 1 << 20]),
)
def test_occurrences_are_those_of_brute_force(tokens: list[int], windows: list[list[int]], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memorisation, "_BLOCK", block)
        found = memorisation.occurrences(stream_of(tokens), np.array(windows, np.int32))
    expected = [sum(tokens[at : at + 4] == window for at in range(len(tokens) - 3)) for window in windows]
    assert found.tolist() == expected


@given(a=st.lists(st.sampled_from("abc"), max_size=12), b=st.lists(st.sampled_from("abc"), max_size=12))
def test_edit_distance_is_that_of_nltk(a: list[str], b: list[str]) -> None:
    assert memorisation.edit_distance(a, b) == nltk.edit_distance(a, b)


def test_verbatim_and_nearly_verbatim() -> None:
    doc = {"target": "one two three four five six seven eight nine ten"}
    assert memorisation.results(doc, [doc["target"] + " and more"]) == {"verbatim": 1.0, "near_verbatim": 1.0}
    assert memorisation.results(doc, [doc["target"].replace("six", "SIX")]) == {"verbatim": 0.0, "near_verbatim": 1.0}
    assert memorisation.results(doc, ["one two"]) == {"verbatim": 0.0, "near_verbatim": 0.0}
    assert memorisation.results(doc, [""]) == {"verbatim": 0.0, "near_verbatim": 0.0}


REPEATS = (1, 4, 16, 64)


def run_with(path: Path, planted: list[np.ndarray], noise: list[np.ndarray]) -> Path:
    """A tiny run whose training text has each planted document as often as `REPEATS` states, between noise."""
    documents = [doc for doc, times in zip(planted, REPEATS * 2, strict=True) for _ in range(times)] + noise
    order = np.random.default_rng(1).permutation(len(documents))
    # What fills no last row is cut off: some more noise.
    stream = np.concatenate([np.append(document, EOS) for document in [*(documents[i] for i in order), noise[0]]])
    run = add_sources(make_run(path))
    recorded = read_json(run / "data/tokens/tokens.json")
    for split, rows in (("train", stream), ("heldout", np.concatenate([np.append(doc, EOS) for doc in noise[:10]]))):
        write_rows(run / "data/tokens" / split, rows[: len(rows) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
        recorded[split] |= {"sha256": stream_hash(run / "data/tokens" / split)}
    write_json(run / "data/tokens/tokens.json", recorded)
    return run


@pytest.mark.slow
def test_what_was_planted_is_recited_the_more_often_it_was_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planted = [rng.integers(1, VOCAB, 66) for _ in range(8)]
    noise = [rng.integers(1, VOCAB, 66) for _ in range(60)]
    found = {}
    for name, documents in (("with", planted), ("without", [rng.integers(1, VOCAB, 66) for _ in range(8)])):
        run = run_with(tmp_path / name, documents, noise)
        train(run, steps=400, warmup_steps=10, save_steps=400, keep_steps=[], eval_steps=400, spike_threshold=None)
        data = tmp_path / "with/data/documents"
        data.mkdir(exist_ok=True)
        options = Options(heldout=data)
        result = measure(run / "checkpoints/step-000400", "memorisation", tmp_path / f"{name}.json", options, str)
        found[name] = {
            row["occurrences"]: row["verbatim"] / row["items"]
            for row in result["nanophi"]["memorisation"]
            if row["split"] == "train"
        }
    (tmp_path / "with/recipe.yaml").write_text("data: {sources: []}")
    for document, times in zip(planted, REPEATS * 2, strict=True):
        (span,) = trace_text(tmp_path / "with", " ".join(f"w{token}" for token in document))
        assert (span["length"], span["occurrences"], span["documents"]) == (66, times, times)
    assert found["with"]["17 or more"] == 1 and found["with"]["1"] < 0.1
    assert found["with"]["5 to 16"] >= found["with"]["2 to 4"] >= found["with"]["1"]
    assert set(found["without"].values()) == {0.0}


def test_items_are_not_made_with_another_tokenizer_than_the_tokens(tmp_path: Path) -> None:
    tokens = make_run(tmp_path) / "data/tokens"
    write_json(tokens / "tokens.json", read_json(tokens / "tokens.json") | {"tokenizer_sha256": "0" * 64})
    for items in (memorisation.train, memorisation.heldout):
        with pytest.raises(UserError, match="data/tokenizer is not the tokenizer that"):
            items(str(tokens))


def test_a_run_without_its_tokens_is_named(tmp_path: Path) -> None:
    (tmp_path / "data/documents").mkdir(parents=True)
    with pytest.raises(UserError, match="needs the data/documents folder of a run with data/tokens"):
        measure(tmp_path, "memorisation", tmp_path / "out.json", Options(heldout=tmp_path / "data/documents"), str)
