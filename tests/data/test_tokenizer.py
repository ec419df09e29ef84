"""Tokenizers load with `AutoTokenizer` as they are, and the fast encoder gives the tokenizer's own ids."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nanophi
from nanophi.data import gather, tokenizer
from nanophi.data.documents import heldout
from nanophi.files import UserError
from nanophi.recipe import Data, Tokenizer

SHARED = Path(os.environ.get("NANOPHI_SHARED", Path(nanophi.__file__).parent.parent / "shared"))
PHI_2 = SHARED / "tokenizers" / "phi-2"

ODD = ["'s", " ", "  ", "\n", "\t", "a", "Z", "9", "_", "-", "\u2019", "é", "字", "\u00a0", "\x1c", "\x85", "\u2028"]
ODD += ["'ll", "<|endoftext|>", "   ", "\r", "😀", "\u0661", "word", " another", "e\u0301", "ﬁ", "²"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    generator = np.random.default_rng(0)
    words = ["the", "tokenizer", "reads", "bytes", "naïve", "don't", "merging", "pairs", "42", "end."]
    lines = [json.dumps({"text": " ".join(generator.choice(words, 200))}) for _ in range(100)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    source = {"files": str(folder / "a.jsonl")}
    data = Data.model_validate({"sources": [source], "deduplication": {"near": False}, "workers": 1})
    gather.gather(data, folder / "documents")
    return folder / "documents"


@pytest.fixture(scope="module")
def trained(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "tokenizer"
    tokenizer.build(documents, Tokenizer(vocab_size=300), 0, output)
    return output


@pytest.fixture(scope="module")
def phi_2(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PHI_2.is_dir():
        pytest.skip("needs phi-2's tokenizer beside the project")
    output = tmp_path_factory.mktemp("phi") / "tokenizer"
    tokenizer.build(documents, Tokenizer(path=str(PHI_2)), 0, output)
    return output


def odd_texts() -> list[str]:
    generator = random.Random(0)
    texts = ["".join(generator.choice(ODD) for _ in range(15)) for _ in range(2000)]
    lines = ["é", "\n", "\n", "\n\n", " ", "a", "b.", "\u0661"]
    return texts + ["".join(generator.choice(lines) for _ in range(30)) for _ in range(2000)]


def test_trained_tokenizer_loads_as_it_is_without_a_word(trained: Path, tmp_path: Path) -> None:
    script = (
        "import sys, json; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "ids = t('word ' * 5000)['input_ids']; "
        "print(json.dumps([len(t), t.bos_token, t.eos_token, t.eos_token_id, t.decode(t('Naïve end.')['input_ids'])]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script, str(trained)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == [300, "<|endoftext|>", "<|endoftext|>", 0, "Naïve end."]


def test_merges_are_strings_for_older_transformers(trained: Path) -> None:
    content = json.loads((trained / "tokenizer.json").read_text())
    assert content["model"]["merges"] and all(isinstance(merge, str) for merge in content["model"]["merges"])
    assert json.loads((trained / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_training_is_deterministic_and_reported(documents: Path, trained: Path, tmp_path: Path) -> None:
    summary = tokenizer.build(documents, Tokenizer(vocab_size=300), 0, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()
    texts = [row["text"] for row in heldout(documents, ["text"])]
    tokens = sum(map(len, tokenizer.Encoder(trained).encode(texts)))
    size = sum(len(text.encode()) for text in texts)
    assert (summary["heldout_bytes"], summary["heldout_tokens"]) == (size, tokens)
    assert summary["bytes_per_token"] == pytest.approx(size / tokens, abs=1e-4)
    assert summary["vocab_size"] == 300


KILLED = """
import os, signal, sys
from pathlib import Path
from nanophi.data import tokenizer
from nanophi.recipe import Tokenizer

tokenizer.write_json = lambda path, value: os.kill(os.getpid(), signal.SIGKILL)
tokenizer.build(Path(sys.argv[1]), Tokenizer(vocab_size=300), 0, Path(sys.argv[2]))
"""


def test_killed_and_started_again(documents: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokenizer"
    assert subprocess.run([sys.executable, "-c", KILLED, str(documents), str(output)]).returncode == -9
    assert [path.name for path in output.iterdir()] == ["tokenizer.json"], "killed between its two files"
    tokenizer.build(documents, Tokenizer(vocab_size=300), 0, output)
    for path in trained.iterdir():
        assert path.read_bytes() == (output / path.name).read_bytes()
    assert len(list(output.iterdir())) == len(list(trained.iterdir()))


def test_sampling_takes_about_what_it_may(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [text for batch in tokenizer._sample(documents, 0) for text in batch]
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", sum(map(len, everything)) // 2)
    samples = [[text for batch in tokenizer._sample(documents, seed) for text in batch] for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert 0.2 * len(everything) < len(samples[0]) < 0.8 * len(everything)


@pytest.mark.parametrize("which", ["trained", "phi_2"])
def test_encoder_gives_the_tokenizers_ids(which: str, request: pytest.FixtureRequest) -> None:
    encoder = tokenizer.Encoder(request.getfixturevalue(which))
    assert encoder._by_words
    texts = odd_texts() + [
        f"a{chr(code)} b  {chr(code)}\n {chr(code)}1" for code in [*range(0x3000), *range(0x1F600, 0x1F680)]
    ]
    expected = [encoding.ids for encoding in encoder.backend.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in encoder.encode(texts)] == expected
    assert [ids.tolist() for ids in encoder.encode(texts[:50])] == expected[:50], "also when every word is known"
    decoded = [encoder.backend.decode(ids, skip_special_tokens=False) for ids in expected]
    assert decoded == texts


@pytest.mark.parametrize("which", ["trained", "phi_2"])
def test_end_of_text_in_a_text_is_only_text(which: str, request: pytest.FixtureRequest) -> None:
    encoder = tokenizer.Encoder(request.getfixturevalue(which))
    ids = encoder.encode(["before<|endoftext|>after <|endoftext|>"])[0].tolist()
    assert encoder.eos_token_id not in ids
    assert encoder.backend.decode(ids) == "before<|endoftext|>after <|endoftext|>"


def test_another_pre_tokenizer_takes_the_plain_way(trained: Path, tmp_path: Path) -> None:
    content = json.loads((trained / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text((trained / "tokenizer_config.json").read_text())
    encoder = tokenizer.Encoder(tmp_path)
    assert not encoder._by_words
    assert encoder.encode(["the end."])[0].tolist() == encoder.backend.encode("the end.", add_special_tokens=False).ids


def test_words_are_forgotten_when_there_are_too_many(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_CACHED_WORDS", 10)
    encoder = tokenizer.Encoder(trained)
    for text in odd_texts()[:200]:
        assert encoder.encode([text])[0].tolist() == encoder.backend.encode(text, add_special_tokens=False).ids
    assert len(encoder._words) < 40


def test_phi_2_keeps_its_tokens(phi_2: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = AutoTokenizer.from_pretrained(phi_2), AutoTokenizer.from_pretrained(PHI_2)
    assert len(ours) == len(theirs) == 50_295
    for text in odd_texts()[:300]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_what_is_no_tokenizer_is_refused(documents: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded as a tokenizer") as caught:
        tokenizer.build(documents, Tokenizer(path=str(tmp_path / "nowhere")), 0, tmp_path / "out")
    assert "\n" not in str(caught.value)
    config = json.loads((trained / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "plain" / "tokenizer.json").write_text((trained / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="no end-of-text token"):
        tokenizer.build(documents, Tokenizer(path=str(tmp_path / "plain")), 0, tmp_path / "out")
