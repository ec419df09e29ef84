"""The tokenizer of a run: one that exists, or a byte-level BPE trained on the run's own documents.

Either is saved so that `AutoTokenizer.from_pretrained(folder)` loads it, without trust and without warnings, in
transformers 4.37.2 and later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BackendTokenizer

from nanophi.data.documents import batches, draw, shards, text_bytes
from nanophi.files import UserError, read_json, write_json
from nanophi.recipe import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# BPE merges hardly change beyond this, and the trainer holds every distinct word in memory.
TRAINING_BYTES = 100_000_000


def build(documents: Path, tokenizer: Tokenizer, seed: int, output: Path) -> dict[str, Any]:
    """Write a tokenizer to `output`.

    Args:
        documents: folder of `corpus.gather`. The training documents before the quality filter are used, so that a
            filtered run and its control share the tokenizer.
        tokenizer: the recipe's section.
        seed: chooses the sample of documents if they exceed `TRAINING_BYTES`.
        output: folder to create.

    Returns:
        `{origin, vocab_size, eos_token, eos_token_id, heldout_bytes, heldout_tokens, bytes_per_token}`; bytes per
        token (the fertility's inverse) are those of the held-out documents, without end-of-text.

    Raises:
        UserError: if `path` cannot be loaded or has no end-of-text token.
    """
    output.mkdir(parents=True, exist_ok=True)
    if tokenizer.path is None:
        _train(documents, tokenizer.vocab_size, seed, output)
    else:
        _copy(tokenizer.path, output)
    encoder = Encoder(output)
    size = tokens = 0
    for batch in batches(shards(documents, "heldout"), ["text"]):
        texts = batch.column("text").to_pylist()
        size += sum(len(text.encode()) for text in texts)
        tokens += sum(map(len, encoder.encode(texts)))
    return {
        "origin": tokenizer.path or "trained on the run's documents",
        "vocab_size": encoder.vocab_size,
        "eos_token": encoder.backend.id_to_token(encoder.eos_token_id),
        "eos_token_id": encoder.eos_token_id,
        "heldout_bytes": size,
        "heldout_tokens": tokens,
        "bytes_per_token": round(size / max(1, tokens), 4),
    }


class Encoder:
    """Text to token ids, for many documents, without special tokens.

    The ids are those of the saved tokenizer, but that no text ever becomes a special token. BPE works within the words
    that the pre-tokenizer cuts, and most words of a corpus are repetitions: for a tokenizer with GPT-2's pre-tokenizer
    the words are cut here and each distinct one is encoded once, which is two to three times as fast.

    Args:
        folder: a saved tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = self.backend.get_vocab_size()
        eos = read_json(folder / "tokenizer_config.json")["eos_token"]
        eos_token_id = self.backend.token_to_id(eos["content"] if isinstance(eos, dict) else eos)
        if eos_token_id is None:
            raise UserError(f"{folder}: the end-of-text token is not in the vocabulary")
        self.eos_token_id: int = eos_token_id
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = [token for token in content["added_tokens"] if not token["special"]]
        self._by_words = (
            content["model"]["type"] == "BPE"
            and not content["model"].get("dropout")
            and content["normalizer"] is None
            and (content["pre_tokenizer"] or {}).get("type") == "ByteLevel"
            and content["pre_tokenizer"]["use_regex"]
            and not content["pre_tokenizer"]["add_prefix_space"]
            and not any(token["single_word"] or token["lstrip"] or token["rstrip"] for token in added)
        )
        self._words = _Words(self.backend)
        self._added = _any_of([token["content"] for token in added])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32 `[tokens]`."""
        if not self._by_words:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        if len(self._words) > _CACHED_WORDS:
            self._words.clear()
        return [np.frombuffer(self._encode(text), np.uint32) for text in texts]

    def _encode(self, text: str) -> bytes:
        # Added tokens (phi-2's runs of spaces) are taken out before anything else sees the text.
        parts = [text] if self._added is None else self._added.split(text)
        ids = self._words.__getitem__
        result: list[bytes] = []
        for number, part in enumerate(parts):
            if number % 2:
                result.append(ids(part))
            elif part.isascii():
                result.extend(map(ids, _ASCII_WORD.findall(part)))
            else:
                # Most lines are ASCII even so. Between two visible characters, line ends are words of their own.
                for place, line in enumerate(_LINE_ENDS.split(part)):
                    cut = list(line) if place % 2 else (_ASCII_WORD if line.isascii() else _WORD).findall(line)
                    result.extend(map(ids, cut))
        return b"".join(result)


class _Words(dict[str, bytes]):
    """Token ids (uint32) by word, filled on demand."""

    def __init__(self, backend: BackendTokenizer) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, word: str) -> bytes:
        ids = self[word] = np.array(self._backend.encode(word, add_special_tokens=False).ids, np.uint32).tobytes()
        return ids


# GPT-2's pre-tokenizer (Radford et al., 2019), the pattern behind `ByteLevel(use_regex=True)`.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# The same for ASCII text, in the standard library's engine, which is twice as fast.
_ASCII_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
_LINE_ENDS = re.compile(r"(?<=[!-~])(\n\n?)(?=[!-~])")
_CACHED_WORDS = 1_000_000


def _any_of(tokens: list[str]) -> Any:
    """A pattern that splits text at any of the tokens, leftmost-longest, and keeps them; None without tokens."""
    if not tokens:
        return None
    characters = "".join(sorted({re.escape(character) for token in tokens for character in token}))
    # Cheap to rule out: most places in a text begin no token.
    guard = f"(?=[{characters}]{{{min(map(len, tokens))}}})"
    return re.compile(f"({guard}(?:{'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))}))")


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
    backend.save(str(output / "tokenizer.json"))
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
    write_json(output / "tokenizer_config.json", config)
    _spell_merges_as_strings(output / "tokenizer.json")


def _sample(documents: Path, seed: int) -> Iterator[list[str]]:
    """Training documents of about `TRAINING_BYTES`, chosen by their ids."""
    paths = shards(documents, "train")
    share = min(1.0, TRAINING_BYTES / max(1, text_bytes(paths)))
    for batch in batches(paths, ["id", "text"]):
        chosen = draw(batch.column("id"), seed) < share
        yield [text for text, keep in zip(batch.column("text").to_pylist(), chosen, strict=True) if keep]


def _copy(path: str, output: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises anything from KeyError to huggingface_hub's errors here
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tokenizer.path: {path} cannot be loaded as a tokenizer ({message})") from None
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer.path: {path} has no fast (Rust) version; use one with a tokenizer.json")
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer.path: {path} has no end-of-text token (eos_token)")
    tokenizer.save_pretrained(output)
    config = read_json(output / "tokenizer_config.json")
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to 4
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # How this copy was loaded says nothing about the tokenizer.
    config = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "backend")}
    write_json(output / "tokenizer_config.json", config)
    _spell_merges_as_strings(output / "tokenizer.json")


def _spell_merges_as_strings(path: Path) -> None:
    """tokenizers 0.23 writes merges as pairs; tokenizers 0.15 (transformers 4.37) reads only `"a b"`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["model"].get("merges")
    if merges and not isinstance(merges[0], str):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)
