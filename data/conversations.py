"""Conversations and preferences: read from a recipe's sources, checked, put into a chat template, split.

train.parquet      input_ids and assistant_masks (sft), or prompt, chosen and rejected as messages (dpo)
heldout.parquet    id, source, messages; the prompt as text, ending where an answer begins; the answer

Files are found by `sources.py`; the stage around this, with the base's files, is in `stages.py`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import sha256_of
from nanophi.core.names import shown
from nanophi.core.recipe import Source
from nanophi.core.sample import ANSWER_TOKENS
from nanophi.data import documents, formats, questions, sources

TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- endif -%}
{{- {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message['role']] + ':\\n' -}}
{{- message['content'] | trim + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"""
"""Roles in words, and a turn ends with the end of text, so that no base needs a new token. The stage is keyed by it."""

ROLES = ("system", "user", "assistant")
HELDOUT_SHARE, HELDOUT_MAXIMUM = 0.02, 400

Messages = list[dict[str, str]]


def build(
    given: Sequence[Source], method: str, tokenizer: Any, context: int, base_text: Path | None, output: Path
) -> dict[str, Any]:
    """Write the conversations of some sources to a folder.

    Args:
        given: the recipe's sources.
        method: `sft` or `dpo`.
        tokenizer: with the chat template.
        context: tokens that the model reads; turns beyond it are left out.
        base_text: `data/documents` of the base, whose training text must not hold a held-out answer; None: unknown.
        output: folder to create.

    Returns:
        `{"train", "heldout": counts, "tokens", "sources": {name: {outcome: count}}, "answers_in_base_text": count or
        None, "train_sha256", "heldout_sha256"}`.

    Raises:
        UserError: naming the first row that is no conversation, or a source with nothing to train on.
    """
    rows = _Rows(method, tokenizer, context, split=not any(source.heldout for source in given))
    counts: dict[str, Counter[str]] = {}
    for source in given:
        name = source.embedded or sources.name_of(source)
        count = counts.setdefault(name, Counter())
        for where, row, held in itertools.islice(_read(source), source.max_documents):
            outcome = rows.add(name, where, row, held)
            count.update(["read", *([outcome] if outcome else [])])
        if not count["read"]:
            raise UserError(f"source {name} holds no conversations")
    if not rows.train:
        total = ", ".join(f"{reason} {count}" for reason, count in sum(counts.values(), Counter()).items())
        raise UserError(f"no conversation is left to train on ({total})")
    kept = _hold_out(rows, base_text, counts)
    output.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows.train), output / "train.parquet")
    pq.write_table(pa.Table.from_pylist(kept), output / "heldout.parquet")
    found = sum(count["answer_in_base_text"] for count in counts.values())
    return {
        "train": len(rows.train),
        "heldout": len(kept),
        "tokens": sum(len(row.get("input_ids", ())) for row in rows.train) or None,
        "sources": {name: dict(count) for name, count in counts.items()},
        "answers_in_base_text": None if base_text is None else found,
        "train_sha256": sha256_of(rows.train),
        "heldout_sha256": sha256_of(kept),
    }


class _Rows:
    """What becomes of the rows that are read; `split`: a hash decides which are held out."""

    def __init__(self, method: str, tokenizer: Any, context: int, split: bool) -> None:
        self.method, self.tokenizer, self.context, self.split = method, tokenizer, context, split
        self.train: list[dict[str, Any]] = []
        self.candidates: dict[str, dict[str, Any]] = {}  # to be held out, by the hash of what is asked
        self.learned: set[str] = set()  # answers

    def add(self, name: str, where: str, row: dict[str, Any], held: bool | None) -> str | None:
        """`train`, or the reason why the row is left out; None while it may be held out."""
        prompt, chosen, rejected = conversation(row, where, self.method)
        texts = [turn["content"] for turn in (*prompt, *chosen, *rejected)]
        if any(token in text for token in self.tokenizer.all_special_tokens for text in texts):
            return "special_token"  # it would end a turn in the middle of a text
        if (prompt + chosen)[0]["role"] == "assistant":
            return "nothing_asked"  # no template begins with an answer
        with user_errors(f"{where} does not fit the base's chat template"):
            ids, mask, whole = encode(self.tokenizer, prompt + chosen, self.context)
            if rejected:  # the two have to be compared as they are
                whole &= encode(self.tokenizer, prompt + rejected, self.context)[2]
        if not ids or (rejected and not whole):
            return "too_long"
        asked = (prompt + chosen)[:-1]
        key = sha256_of(asked)
        if held or (held is None and self.split and documents.uniform_from_id([key[:16]])[0] < HELDOUT_SHARE):
            return self._candidate(key, name, asked, chosen[-1]["content"].strip())
        self.learned.update(turn["content"].strip() for turn in chosen if turn["role"] == "assistant")
        if self.method == "dpo":
            self.train.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        else:
            self.train.append({"input_ids": ids, "assistant_masks": mask})
        return "train"

    def _candidate(self, key: str, name: str, asked: Messages, answer: str) -> str | None:
        text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        if len(self.tokenizer(text).input_ids) + ANSWER_TOKENS >= self.context:
            return "too_long"
        row = {"id": key[:16], "source": name, "messages": asked, "prompt": text, "answer": answer}
        return None if self.candidates.setdefault(key, row) is row else "asked_twice"


def _hold_out(rows: _Rows, base_text: Path | None, counts: dict[str, Counter[str]]) -> list[dict[str, Any]]:
    """The candidates whose answers nobody has read, counted by source. Raises `UserError` if there are none."""
    answers = {row["answer"] for row in rows.candidates.values()}
    known = set() if base_text is None else _in_text(base_text, answers)
    kept: list[dict[str, Any]] = []
    for _, row in sorted(rows.candidates.items()):
        if len(kept) == HELDOUT_MAXIMUM:
            outcome = "not_needed"
        elif row["answer"] in known:
            outcome = "answer_in_base_text"
        elif row["answer"] in rows.learned:
            outcome = "answer_learned"
        else:
            outcome = "heldout"
            kept.append(row)
        counts[row["source"]][outcome] += 1
    if not kept:
        raise UserError(
            "no conversation is left to be held out; add a source with heldout: true whose answers are not among those "
            "to train on"
        )
    return kept


def heldout(run: Path, count: int = 5) -> list[dict[str, Any]]:
    """The first held-out conversations of a run: `messages` to answer, and the reference `answer`."""
    rows = pq.read_table(run / "data/conversations/heldout.parquet", columns=["messages", "answer"])
    return list(rows.slice(0, count).to_pylist())


def conversation(row: dict[str, Any], where: str, method: str) -> tuple[Messages, Messages, Messages]:
    """A row's prompt, its (chosen) completion and, for `dpo`, its rejected one. Raises `UserError` if it lacks any."""
    row = {key: value for key, value in row.items() if value is not None}
    if method == "dpo":
        if not {"chosen", "rejected"} <= set(row):
            raise UserError(f"{where}: a preference has 'chosen' and 'rejected'; the row has {', '.join(row)}")
        prompt = _turns(row["prompt"], where, "user") if "prompt" in row else []
        chosen, rejected = (_turns(row[key], where, "assistant") for key in ("chosen", "rejected"))
        if not prompt:  # two whole conversations, which part ways somewhere
            pairs = zip(chosen, rejected, strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        for name, turns in (("chosen", chosen), ("rejected", rejected)):
            if not turns or turns[-1]["role"] != "assistant":
                raise UserError(f"{where}: '{name}' does not end with an assistant's turn of its own")
        if not prompt:
            raise UserError(f"{where}: 'chosen' and 'rejected' have no prompt in common")
        return prompt, chosen, rejected
    if "messages" in row:
        prompt, chosen = [], _turns(row["messages"], where, "user")
    elif {"prompt", "completion"} <= set(row):
        prompt, chosen = _turns(row["prompt"], where, "user"), _turns(row["completion"], where, "assistant")
    else:
        raise UserError(f"{where}: a row has 'messages', or 'prompt' and 'completion'; this one has {', '.join(row)}")
    while chosen and chosen[-1]["role"] != "assistant":
        chosen.pop()  # nobody answers it
    if not chosen:
        raise UserError(f"{where}: the conversation has no assistant's turn")
    return prompt, chosen, []


def _turns(value: Any, where: str, role: str) -> Messages:
    """Messages, from a list of them or from one text of `role`."""
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: messages are a list of objects with 'role' and 'content'")
    for turn in turns:
        if turn.get("role") not in ROLES:
            raise UserError(f"{where}: unknown role {turn.get('role')!r}; roles are {', '.join(ROLES)}")
        if not isinstance(turn.get("content"), str) or not turn["content"].strip():
            raise UserError(f"{where}: a turn of role '{turn['role']}' has no text as its 'content'")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def encode(tokenizer: Any, messages: Messages, context: int) -> tuple[list[int], list[int], bool]:
    """A conversation in its template, up to the last answer that ends within `context` tokens.

    As in inference, a prompt and its answer are cut into tokens apart.

    Returns:
        token ids; 1 where the assistant speaks, the end of its turn included; whether this is all of it.
    """
    ids, mask, text = list[int](), list[int](), ""
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not before.startswith(text) or not after.startswith(before):
            raise UserError("it writes earlier turns in another way once later ones follow")
        parts = [
            tokenizer(part, add_special_tokens=False).input_ids for part in (before[len(text) :], after[len(before) :])
        ]
        if len(ids) + sum(map(len, parts)) > context:
            return ids, mask, False
        ids += parts[0] + parts[1]
        mask += [0] * len(parts[0]) + [1] * len(parts[1])
        text = after
    return ids, mask, True


def _read(source: Source) -> Iterator[tuple[str, dict[str, Any], bool | None]]:
    """Where a row is, the row, and whether it is held out (None: its hash decides, unless a whole source is)."""
    if source.embedded:
        for number, (held, question, answer) in enumerate(questions.conversations(), 1):
            yield f"questions:{number}", {"prompt": question, "completion": answer}, held
        return
    import datasets

    for file in sources.locate(source).files:
        reader = formats.reader_of(file)
        if reader is None or reader.builder is None:
            raise UserError(f"source {shown(file)}: conversations are not read from text files")
        with user_errors(f"{shown(file)} cannot be read"):
            try:
                rows = iter(datasets.load_dataset(reader.builder, data_files=[file], split="train", streaming=True))
            except StopIteration:  # there is no first row to see columns in
                continue
        for number in itertools.count(1):
            with user_errors(f"{shown(file)} cannot be read after row {number - 1}"):
                row = next(rows, None)
            if row is None:
                break
            yield f"{shown(file)}:{number}", row, True if source.heldout else None


def _in_text(folder: Path, answers: Collection[str]) -> set[str]:
    """Which answers are in the training documents, white space apart; holds a few MB of them at a time."""
    left = {answer: " ".join(answer.split()) for answer in answers}
    for batch in documents.batches(documents.shards(folder, "train"), ["text"], None):
        base = "\n".join(" ".join(text.split()) for text in batch.column("text").to_pylist())
        left = {answer: squeezed for answer, squeezed in left.items() if squeezed not in base}
    return set(answers) - left.keys()
