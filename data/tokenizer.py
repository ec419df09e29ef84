"""The tokenizer of a run: one that exists, or a byte-level BPE trained on the run's own documents.

Either is saved so that `AutoTokenizer.from_pretrained(folder)` of transformers 4.37.2 and later loads it without trust.
"""

import functools
import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BackendTokenizer

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json, write_json, write_text
from nanophi.core.formatting import percent
from nanophi.core.names import local
from nanophi.core.recipe import Tokenizer
from nanophi.data.documents import SPLITS, batches, find, shards, text_bytes, uniform_from_id

END_OF_TEXT = "<|endoftext|>"
# BPE merges hardly change beyond this, and the trainer holds every distinct word in memory.
TRAINING_BYTES = 100_000_000
# Encoded data in one line is no word to learn from, and the trainer's time grows with a word's length times the merges.
LONGEST_WORD = 1000
_CHECKED_DOCUMENTS = 256
_CHECKED_CHARACTERS = 5000
_LONG_WORD = re.compile(rf"(\S{{{LONGEST_WORD}}})\S*|(\s{{{LONGEST_WORD}}})\s*")


def build(
    documents: Path,
    tokenizer: Tokenizer,
    seed: int,
    output: Path,
    revision: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write a tokenizer to `output`; `report` gets a line if a copied one had to be changed.

    One is trained on the documents before the quality filter; `seed` chooses a sample of `TRAINING_BYTES`.

    Returns `{origin, vocab_size, eos_token, eos_token_id, heldout_bytes, heldout_tokens, bytes_per_token}`; bytes per
    token are those of the held-out documents, without end-of-text.
    """
    output.mkdir(parents=True, exist_ok=True)
    if tokenizer.path is None:
        _train(documents, tokenizer.vocab_size, seed, output)
    elif added := _copy(tokenizer.path, revision, output):
        report(
            f"{tokenizer.path} adds {' and '.join(added)} to a prompt; documents are trained on without, so the run's "
            "copy no longer adds anything"
        )
    encoder = Encoder(output)
    size = tokens = 0
    for batch in batches(shards(documents, "heldout"), ["text"]):
        texts = batch.column("text").to_pylist()
        size += sum(len(text.encode()) for text in texts)
        tokens += sum(map(len, encoder.encode(texts)))
    return {
        "origin": tokenizer.path or "trained on the run's documents",
        "vocab_size": encoder.vocab_size,
        "eos_token": encoder.eos_token,
        "eos_token_id": encoder.eos_token_id,
        "heldout_bytes": size,
        "heldout_tokens": tokens,
        "bytes_per_token": round(size / max(1, tokens), 4),
    }


def check(documents: Path, folder: Path, max_lost: float, report: Callable[[str], None]) -> dict[str, Any]:
    """Compare `Encoder` with `AutoTokenizer` on a sample of every source, and the decoded tokens with the text.

    A character is lost if it does not come back, but for its case, compatibility form, and which white space it is.
    Returns `{documents, bytes, lost (share of the bytes), changed (documents)}`; raises `UserError` for other ids, or
    if more than `max_lost` of a source's bytes is lost.
    """
    from transformers import AutoTokenizer

    encoder, theirs = Encoder(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = read_json(folder / "tokenizer.json")["model"]
    unknown = model.get("unk_id") if model.get("unk_token") is None else encoder.backend.token_to_id(model["unk_token"])
    sizes: Counter[str] = Counter()
    missing: defaultdict[str, Counter[str]] = defaultdict(Counter)
    count = changed = 0
    for source, text in _sample_of_sources(documents):
        ours = encoder.encode([text])[0].tolist()
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if ours != expected and encoder.eos_token not in text:
            at = next((n for n, pair in enumerate(zip(ours, expected, strict=False)) if pair[0] != pair[1]), 0)
            tokens = [theirs.convert_ids_to_tokens(ids[at : at + 4]) for ids in (ours, expected)]
            wrong = f"the run's tokens are {tokens[0]}, AutoTokenizer's {tokens[1]}"
            raise UserError(f"tokenizer: for {text[:40]!r} {wrong}")
        known = [token for token in ours if token != unknown]
        decoded = str(theirs.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        count += 1
        sizes[source] += _bytes(_characters(text))
        if decoded != text:
            changed += 1
            missing[source] += _characters(text) - _characters(decoded)
    total = sum(missing.values(), Counter())
    result = {"documents": count, "bytes": sizes.total(), "lost": round(_bytes(total) / max(1, sizes.total()), 6)}
    for source, characters in missing.items():
        share = _bytes(characters) / sizes[source]
        if characters:
            often = ", ".join(repr(character) for character, _ in characters.most_common(3))
            line = f"{percent(share, 2)} of the bytes of source '{source}' are in no token, such as {often}"
            if share > max_lost:
                raise UserError(f"tokenizer: {line}; the limit is data.max_lost, {percent(max_lost, 2)}")
            report(line)
    return result | {"changed": changed}


def _sample_of_sources(documents: Path) -> Iterator[tuple[str, str]]:
    """Source and beginning of some documents of every source, chosen by their ids, of both splits."""
    for split in SPLITS:
        ids: dict[str, list[str]] = {}
        for batch in batches(shards(documents, split), ["id", "source"], None):
            for name, id_ in zip(batch["source"].to_pylist(), batch["id"].to_pylist(), strict=True):
                ids.setdefault(name, []).append(id_)
        each = max(1, _CHECKED_DOCUMENTS // len(ids))
        wanted = [id_ for names in ids.values() for id_ in heapq.nsmallest(each, names)]
        for row in find(documents, wanted, ["source", "text"], split).values():
            yield row["source"], row["text"][:_CHECKED_CHARACTERS]


def _characters(text: str) -> Counter[str]:
    return Counter(re.sub(r"\s", " ", unicodedata.normalize("NFKD", text).casefold()))


def _bytes(characters: Counter[str]) -> int:
    return sum(len(character.encode()) * count for character, count in characters.items())


class Encoder:
    """Text to token ids, for many documents; no name of a special token in a text becomes that token.

    BPE works within the words that the pre-tokenizer cuts, and most words are repetitions: for a tokenizer with GPT-2's
    pre-tokenizer the words are cut here and each distinct one is encoded once, which is 2.8 times as fast.
    """

    def __init__(self, folder: Path) -> None:
        content, config = (read_json(folder / f"{name}.json") for name in ("tokenizer", "tokenizer_config"))
        self.backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # as text
        vocabulary, eos = self.backend.get_vocab(), config["eos_token"]
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_token = str(eos["content"] if isinstance(eos, dict) else eos)
        self.eos_token_id = vocabulary[self.eos_token]
        added = [token for token in content["added_tokens"] if not token["special"]]
        self._added = _any_of([token["content"] for token in added])
        gpt_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        self._by_words = (
            content["model"]["type"] == "BPE"
            and not content["model"].get("dropout")
            and content["normalizer"] is None
            and gpt_2.items() <= (content["pre_tokenizer"] or {}).items()
            and not any(token["single_word"] or token["lstrip"] or token["rstrip"] for token in added)
        )
        self._word = functools.cache(lambda word: np.array(self._ids_of(word), np.uint32).tobytes())

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32 `[tokens]`."""
        if self._by_words:
            if self._word.cache_info().currsize > _CACHED_WORDS:
                self._word.cache_clear()
            return [np.frombuffer(self._encode(text), np.uint32) for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array(self._spelled(text) if self.eos_token_id in encoding.ids else encoding.ids, np.uint32)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _spelled(self, text: str) -> list[int]:
        """Token ids of a text in which a model (Unigram) finds the name of end-of-text, cut after its first letter."""
        parts = text.replace(self.eos_token, f"{self.eos_token[0]}\0{self.eos_token[1:]}").split("\0")
        return [token for part in parts for token in self._ids_of(part)]

    def _ids_of(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _encode(self, text: str) -> bytes:
        # Added tokens (phi-2's runs of spaces) are taken out before anything else sees the text.
        parts = [text] if self._added is None else self._added.split(text)
        result: list[bytes] = []
        for number, part in enumerate(parts):
            words = [part] if number % 2 else (_ASCII_WORD if part.isascii() else _WORD).findall(part)
            result.extend(map(self._word, words))
        return b"".join(result)


# GPT-2's pre-tokenizer (Radford et al., 2019), the pattern behind `ByteLevel(use_regex=True)`.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# The same for ASCII text, in the standard library's engine, which is twice as fast.
_ASCII_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
_CACHED_WORDS = 1_000_000


def _any_of(tokens: list[str]) -> re.Pattern[str] | None:
    """A pattern that splits text at any of the tokens, longest first, and keeps them; None without tokens."""
    characters = "".join(sorted({re.escape(character) for token in tokens for character in token}))
    longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    # A cheap test first: most positions of a text begin no token.
    return re.compile(f"((?=[{characters}]{{{min(map(len, tokens))}}})(?:{longest_first}))") if tokens else None


def _train(documents: Path, vocab_size: int, seed: int, output: Path) -> None:
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(documents, seed), trainer)
    config = {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        # "No limit", as transformers spells it: documents are cut into rows, not refused.
        "model_max_length": int(1e30),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": END_OF_TEXT,
    }
    _write(output, json.loads(backend.to_str()), config)


def _sample(documents: Path, seed: int) -> Iterator[list[str]]:
    """Training documents of about `TRAINING_BYTES`, chosen by their ids."""
    paths = shards(documents, "train")
    share = min(1.0, TRAINING_BYTES / max(1, text_bytes(paths)))
    for batch in batches(paths, ["id", "text"]):
        chosen = uniform_from_id(batch.column("id"), seed) < share
        texts = batch.column("text").to_pylist()
        yield [_LONG_WORD.sub(r"\1\2", text) for text, keep in zip(texts, chosen, strict=True) if keep]


def load(path: str, revision: str | None) -> Any:
    """The transformers tokenizer of a folder or Hub id. Raises `UserError` if it cannot serve."""
    from transformers import AutoTokenizer

    name = local(path) if local(path).exists() else path
    with user_errors(f"tokenizer.path: {path} cannot be loaded as a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, revision=revision)
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer.path: {path} has no fast (Rust) version; use one with a tokenizer.json")
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer.path: {path} has no end-of-text token (eos_token)")
    if dropout := getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        cause = f"tokenizer.path: {path} leaves out merges at random (dropout {dropout:g})"
        raise UserError(f'{cause}, so that a text has other tokens each time; set "dropout" to null in tokenizer.json')
    return tokenizer


def _copy(path: str, revision: str | None, output: Path) -> list[str]:
    """Save a tokenizer so that it adds nothing to a prompt, as documents are trained on; returns what it added."""
    tokenizer = load(path, revision)
    plain, whole = (tokenizer("The end", add_special_tokens=special)["input_ids"] for special in (False, True))
    added = [token for token in whole if token not in plain] or whole[len(plain) :]
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(added)]
    tokenizer.save_pretrained(output)
    del tokenizer  # its tables take as much room as what is read now
    content, config = (read_json(output / f"{name}.json") for name in ("tokenizer", "tokenizer_config"))
    if added:
        processor = content["post_processor"] or {}
        steps = [step for step in processor.get("processors", [processor]) if step.get("type") == "ByteLevel"]
        content["post_processor"] = steps[0] if steps else None
        config |= {"add_bos_token": False, "add_eos_token": False}
    # Classes of one model's tokenizer may add tokens by themselves; transformers 4 does not know 5's name.
    if added or config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only", "backend"):  # how this copy was loaded
        config.pop(key, None)
    _write(output, content, config)
    return names


def _write(output: Path, content: dict[str, Any], config: dict[str, Any]) -> None:
    """tokenizers 0.23 has merges as pairs; tokenizers 0.15 (transformers 4.37) reads only `"a b"`."""
    merges = content["model"].get("merges")
    if merges and not isinstance(merges[0], str):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    write_text(output / "tokenizer.json", json.dumps(content, ensure_ascii=False))
    write_json(output / "tokenizer_config.json", config)
