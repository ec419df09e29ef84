"""Tokenizers load with `AutoTokenizer` as they are, and the fast encoder gives the tokenizer's own ids."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from gathered import data, documents_of, write
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import PreTrainedTokenizerFast

import nanophi
from nanophi.core.errors import UserError
from nanophi.core.recipe import Tokenizer
from nanophi.data import gather, tokenizer
from nanophi.data.documents import heldout

SHARED = Path(os.environ.get("NANOPHI_SHARED", Path(nanophi.__file__).parent.parent / "shared"))
PHI_2 = SHARED / "tokenizers" / "phi-2"

ODD = ["'s", " ", "  ", "\n", "\t", "a", "Z", "9", "_", "-", "\u2019", "é", "字", "\u00a0", "\x1c", "\x85", "\u2028"]
ODD += ["'ll", "<|endoftext|>", "   ", "\r", "😀", "\u0661", "word", " another", "e\u0301", "ﬁ", "²"]


def build(documents, output, report=print, **section):
    return tokenizer.build(documents, Tokenizer(**section), 0, output, report=report)


def plain_ids(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    generator = np.random.default_rng(0)
    words = ["the", "tokenizer", "reads", "bytes", "naïve", "don't", "merging", "pairs", "42", "end."]
    texts = [" ".join(generator.choice(words, 200)) for _ in range(100)]
    return documents_of(tmp_path_factory.mktemp("tokenizer"), texts)


@pytest.fixture(scope="module")
def trained(documents, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    build(documents, output, vocab_size=300)
    return output


@pytest.fixture(scope="module", params=["trained", "phi_2"])
def folder(request, documents, trained, tmp_path_factory):
    """The tokenizer that was trained here, and phi-2's as a run copies it."""
    if request.param == "trained":
        return trained
    if not PHI_2.is_dir():
        pytest.skip("needs phi-2's tokenizer beside the project")
    output = tmp_path_factory.mktemp("phi")
    build(documents, output, path=str(PHI_2))
    return output


def odd_texts():
    generator = random.Random(0)
    texts = ["".join(generator.choice(ODD) for _ in range(15)) for _ in range(2000)]
    lines = ["é", "\n", "\n", "\n\n", " ", "a", "b.", "\u0661"]
    return texts + ["".join(generator.choice(lines) for _ in range(30)) for _ in range(2000)]


def test_trained_tokenizer_loads_as_it_is_without_a_word(trained, tmp_path):
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


def test_merges_are_strings_for_older_transformers(trained):
    content = json.loads((trained / "tokenizer.json").read_text())
    assert content["model"]["merges"] and all(isinstance(merge, str) for merge in content["model"]["merges"])
    assert json.loads((trained / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_training_is_deterministic_and_reported(documents, trained, tmp_path):
    summary = build(documents, tmp_path / "again", vocab_size=300)
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
from nanophi.core.recipe import Tokenizer

tokenizer.write_json = lambda path, value: os.kill(os.getpid(), signal.SIGKILL)
tokenizer.build(Path(sys.argv[1]), Tokenizer(vocab_size=300), 0, Path(sys.argv[2]))
"""


def test_killed_and_started_again(documents, trained, tmp_path):
    output = tmp_path / "tokenizer"
    assert subprocess.run([sys.executable, "-c", KILLED, str(documents), str(output)]).returncode == -9
    assert [path.name for path in output.iterdir()] == ["tokenizer.json"], "killed between its two files"
    build(documents, output, vocab_size=300)
    contents = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (output, trained))
    assert next(contents) == next(contents)


def test_sampling_takes_about_what_it_may(documents, monkeypatch):
    everything = [text for batch in tokenizer._sample(documents, 0) for text in batch]
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", sum(map(len, everything)) // 2)
    samples = [[text for batch in tokenizer._sample(documents, seed) for text in batch] for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert 0.2 * len(everything) < len(samples[0]) < 0.8 * len(everything)


def test_encoder_gives_the_tokenizers_ids(folder):
    encoder = tokenizer.Encoder(folder)
    assert encoder._by_words
    reference = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True
    codes = [*range(0x3000), *range(0x1F600, 0x1F680)]
    texts = odd_texts() + [f"a{chr(code)} b  {chr(code)}\n {chr(code)}1" for code in codes]
    expected = [encoding.ids for encoding in reference.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in encoder.encode(texts)] == expected
    assert [ids.tolist() for ids in encoder.encode(texts[:50])] == expected[:50], "also when every word is known"
    decoded = [encoder.backend.decode(ids, skip_special_tokens=False) for ids in expected]
    assert decoded == texts
    (ids,) = encoder.encode([text := "before<|endoftext|>after <|endoftext|>"])
    assert encoder.eos_token_id not in ids
    assert encoder.backend.decode(ids.tolist()) == text, "end-of-text in a text is only text"


def test_end_of_text_that_a_unigram_model_finds_in_a_text_is_spelled(documents, tmp_path):
    backend = BackendTokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {"special_tokens": ["</s>", "<unk>"], "unk_token": "<unk>", "show_progress": False}
    trainer = trainers.UnigramTrainer(vocab_size=200, initial_alphabet=list("</>"), **special)
    backend.train_from_iterator([row["text"] for row in heldout(documents, ["text"])] * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    encoder, text = tokenizer.Encoder(tmp_path), "the </s>reads</s> bytes"
    assert encoder.eos_token_id in plain_ids(encoder.backend, text)
    ids = encoder.encode([text, "the bytes"])
    assert encoder.eos_token_id not in ids[0]
    assert encoder.backend.decode(ids[0].tolist()).replace("< /", "</") == text  # each part begins a word
    assert ids[1].tolist() == plain_ids(encoder.backend, "the bytes")


def test_another_pre_tokenizer_takes_the_plain_way(trained, tmp_path):
    backend = BackendTokenizer.from_file(str(trained / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoder = tokenizer.Encoder(save(tmp_path / "prefixed", backend, eos_token="<|endoftext|>"))
    assert not encoder._by_words
    assert encoder.encode(["the end."])[0].tolist() == plain_ids(encoder.backend, "the end.")


def test_words_are_forgotten_when_there_are_too_many(trained, monkeypatch):
    monkeypatch.setattr(tokenizer, "_CACHED_WORDS", 10)
    encoder = tokenizer.Encoder(trained)
    for text in odd_texts()[:200]:
        assert encoder.encode([text])[0].tolist() == plain_ids(encoder.backend, text)
    assert encoder._word.cache_info().currsize < 40


def test_what_is_no_tokenizer_is_refused(documents, trained, tmp_path):
    plain = save(tmp_path / "plain", BackendTokenizer.from_file(str(trained / "tokenizer.json")), eos_token=None)
    backend = bpe()
    backend.model.dropout = 0.1
    random = save(tmp_path / "random", backend)
    wrong = {tmp_path / "nowhere": "cannot be loaded as a tokenizer", plain: "no end-of-text token"}
    for path, message in (wrong | {random: r"at random \(dropout 0.1\), .*; set \"dropout\" to null in"}).items():
        with pytest.raises(UserError, match=message) as caught:
            build(documents, tmp_path / "out", path=str(path))
        assert "\n" not in str(caught.value)


# Tokenizers of any kind

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]
SENTENCES = ["the cat sat on the mat .", "a <s> in a page </s> is text <pad> too", "</s>", "x</s>y <unk>"] * 5


def save(folder, backend, **config):
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def bpe():
    backend = BackendTokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return backend


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>", "$A"])
def test_a_prompt_is_tokenized_as_in_training(documents, tmp_path, template):
    from transformers import AutoTokenizer

    backend = bpe()
    tokens = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    folder = save(tmp_path / "theirs", backend, bos_token="<s>")
    lines = []
    build(documents, tmp_path / "ours", lines.append, path=str(folder))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in ("the cat", "a page", ""):
        assert loaded(text)["input_ids"] == tokenizer.Encoder(tmp_path / "ours").encode([text])[0].tolist()
    added = [name for name in ("<s>", "</s>") if name in template]
    assert len(lines) == bool(added)
    if added:
        assert lines[0].startswith(f"{folder} adds {' and '.join(added)} to a prompt;")
    assert loaded.eos_token == "</s>" and len(loaded) == backend.get_vocab_size()


def test_a_word_of_a_million_letters_does_not_hang_the_training(tmp_path):
    generator = random.Random(1)
    long = "".join(generator.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=1_000_000))
    texts = [f"data:image/png;base64,{long}", "\n" * 1_000_000 + "end"]
    texts += [f"words of a text {n} " * 9 for n in range(20)]
    documents = documents_of(tmp_path, texts)
    sample = [text for batch in tokenizer._sample(documents, 0) for text in batch]
    assert max(map(len, sample)) < 5000
    tokenizer._train(documents, 400, 0, tmp_path)
    assert BackendTokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() <= 400


# What `prepare` checks


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Documents of two sources, one of which is half Greek, with `the` and `;` among its words."""
    folder = tmp_path_factory.mktemp("mixed")
    generator = random.Random(3)
    sources = []
    for name, words in (("plain", "the cat; sat on a mat;"), ("greek", "the λέξη; sat γάτα on;")):
        texts = [" ".join(generator.choices(words.split(), k=60)) for _ in range(60)]
        sources.append({"files": str(write(folder / f"{name}.jsonl", texts)), "name": name})
    gather.gather(data(*sources), folder / "documents")
    return folder / "documents"


def byte_level(alphabet):
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat; sat on a mat;"] * 9, trainer)
    return backend


@pytest.mark.parametrize("roles", [{}, {"pad_token": "the"}, {"pad_token": ";"}, {"unk_token": "cat"}])
def test_no_word_is_missing_whatever_role_it_has(mixed, tmp_path, roles):
    folder = save(tmp_path / "theirs", byte_level(pre_tokenizers.ByteLevel.alphabet()), **roles)
    build(mixed, tmp_path / "ours", path=str(folder))
    lines = []
    checked = tokenizer.check(mixed, tmp_path / "ours", 0.0, lines.append)
    assert (checked["lost"], checked["changed"], lines) == (0, 0, [])
    assert checked["documents"] >= 100


def test_letters_that_no_token_holds_are_counted_and_limited(mixed, tmp_path):
    folder = save(tmp_path / "theirs", byte_level([]))
    build(mixed, tmp_path / "ours", path=str(folder))
    with pytest.raises(UserError, match=r"% of the bytes of source 'greek' are in no token, such as '.', .*max_lost"):
        tokenizer.check(mixed, tmp_path / "ours", 0.01, print)
    lines = []
    checked = tokenizer.check(mixed, tmp_path / "ours", 1.0, lines.append)
    texts = [unicodedata.normalize("NFKD", text) for _, text in tokenizer._sample_of_sources(mixed)]
    greek = sum(len(letter.encode()) for text in texts for letter in text if letter > "\u02ff")
    assert checked["lost"] == pytest.approx(greek / sum(len(text.encode()) for text in texts), abs=1e-4)
    assert len(lines) == 1 and checked["changed"]


def test_other_ids_than_the_tokenizers_are_refused(mixed, trained, monkeypatch):
    monkeypatch.setattr(tokenizer.Encoder, "encode", lambda self, texts: [np.array([5, 6])] * len(texts))
    with pytest.raises(UserError, match=r"the run's tokens are .*, AutoTokenizer's"):
        tokenizer.check(mixed, trained, 1.0, print)
