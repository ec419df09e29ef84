"""Conversations and preferences: read from a recipe's sources, checked, put into a chat template, split.

train.parquet      input_ids and assistant_masks (sft), or prompt, chosen and rejected as messages (dpo)
heldout.parquet    id, source, messages; the prompt as text, ending where an answer begins; the answer
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanophi.core.errors import UserError, one_line, user_errors
from nanophi.core.files import sha256_of
from nanophi.core.names import shown
from nanophi.core.recipe import Source
from nanophi.core.sample import ANSWER_TOKENS
from nanophi.data import documents, formats, questions, sources

TEXT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- endif -%}
{{- {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message['role']] + ':\\n' -}}
{{- message['content'] | trim + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"""
"""Roles in words, and a turn ends with the end of text, so that no base needs a new token. The stage is keyed by it."""

TEMPLATE = TEXT_TEMPLATE.replace(
    "{{- message['content'] | trim + eos_token -}}",
    """\
{%- set content = message['content'] -%}
{%- if content is not string -%}
{%- if not content or content | rejectattr('type', 'equalto', 'text') | list -%}
{{- raise_exception('a turn of role ' + message['role'] + ' has no text, or not text alone') -}}
{%- endif -%}
{%- set content = content | map(attribute='text') | join -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{- content | trim + eos_token -}}{% endgeneration %}
{%- else -%}{{- content | trim + eos_token -}}{%- endif -%}""",
)
"""What a run is given: it writes the same text, marks what the assistant learns, and joins a turn's content parts."""

ROLES = ("system", "user", "assistant")
HELDOUT_SHARE, HELDOUT_MAXIMUM = 0.02, 400
_EDGE = r"(?:(?<!\w)|(?!\w))"
"""Where a word may begin or end."""

Messages = list[dict[str, str]]


class UnusableError(Exception):
    """A row that cannot be used: the reason under which it is counted, and what is wrong with it."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


def build(
    given: Sequence[Source],
    method: str,
    tokenizer: Any,
    context: int,
    base_text: Path | None,
    output: Path,
    max_dropped: float = 0.2,
) -> dict[str, Any]:
    """Write the conversations of some sources to a folder, in the chat template of `tokenizer`, up to `context` tokens.

    `method` is `sft` or `dpo`; `base_text`, `data/documents` of the base, must not hold a held-out answer.

    Returns:
        `{"train", "heldout": counts, "tokens", "sources": {name: {outcome: count}}, "shortened": {name: count},
        "answers_in_base_text": count or None, "train_sha256", "heldout_sha256"}`.
    """
    rows = _Rows(method, tokenizer, context, split=not any(source.heldout for source in given))
    counts: dict[str, Counter[str]] = {}
    for source in given:
        name = source.embedded or sources.name_of(source)
        count, unusable, first = counts.setdefault(name, Counter()), Counter[str](), list[dict[str, str]]()
        for where, row, held in itertools.islice(_read(source), source.max_documents):
            unusable["read"] += 1
            try:
                outcome = rows.add(name, row, held)
            except UnusableError as problem:
                outcome = problem.reason
                unusable[outcome] += 1
                first = first or [{"document": where, "remedy": str(problem)}]
            count.update(["read", *([outcome] if outcome else [])])
        sources.check_usable(name, unusable, first, max_dropped, "conversations")
    if not rows.train:
        raise UserError(f"no conversation is left to train on ({sources.reasons(sum(counts.values(), Counter()))})")
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
        "shortened": dict(rows.shortened),
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
        self.shortened: Counter[str] = Counter()  # conversations whose last turns do not fit, by source

    def add(self, name: str, row: Any, held: bool | None) -> str | None:
        """`train`, or why the row is left out; None while it may be held out. Raises `UnusableError`."""
        prompt, chosen, rejected = conversation(row, self.method)
        texts = [turn["content"] for turn in (*prompt, *chosen, *rejected)]
        if special := [token for token in self.tokenizer.all_special_tokens if any(token in text for text in texts)]:
            raise UnusableError("special_token", f"a text holds {special[0]}, which would end a turn")
        if (prompt + chosen)[0]["role"] == "assistant":
            raise UnusableError("nothing_asked", "no template begins with an assistant's turn")
        try:
            ids, mask, whole = encode(self.tokenizer, prompt + chosen, self.context)
            if rejected:  # the two have to be compared as they are
                whole = all(self._fits_whole(prompt + answer) for answer in (chosen, rejected))
        except Exception as error:  # a template raises anything
            raise UnusableError("template", f"it does not fit the base's chat template ({one_line(error)})") from error
        if not ids or (rejected and not whole):
            raise UnusableError("too_long", f"it does not fit into {self.context} tokens")
        asked = (prompt + chosen)[:-1]
        key = sha256_of(asked)
        if held or (held is None and self.split and documents.uniform_from_id([key[:16]])[0] < HELDOUT_SHARE):
            return self._candidate(key, name, asked, chosen[-1]["content"].strip())
        self.learned.update(turn["content"].strip() for turn in chosen if turn["role"] == "assistant")
        if self.method == "dpo":
            self.train.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        else:
            self.train.append({"input_ids": ids, "assistant_masks": mask})
            self.shortened.update([] if whole else [name])
        return "train"

    def _fits_whole(self, messages: Messages) -> bool:
        """Whether TRL, which cuts a preference into tokens as one text, has to leave out none of them either."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        length = len(self.tokenizer(text, add_special_tokens=False).input_ids)
        return length <= self.context and encode(self.tokenizer, messages, self.context)[2]

    def _candidate(self, key: str, name: str, asked: Messages, answer: str) -> str | None:
        text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        if len(self.tokenizer(text).input_ids) + ANSWER_TOKENS >= self.context:
            raise UnusableError("too_long", f"its prompt leaves less than {ANSWER_TOKENS} of {self.context} tokens")
        row = {"id": key[:16], "source": name, "messages": asked, "prompt": text, "answer": answer}
        return None if self.candidates.setdefault(key, row) is row else "asked_twice"


def _hold_out(rows: _Rows, base_text: Path | None, counts: dict[str, Counter[str]]) -> list[dict[str, Any]]:
    """The candidates whose answers nobody has read, counted by source. Raises `UserError` if there are none."""
    answers = {row["answer"] for row in rows.candidates.values()}
    known = set() if base_text is None else _in_text(base_text, answers)
    read = known | rows.learned
    kept: list[dict[str, Any]] = []
    found: Counter[str] = Counter()
    for _, row in sorted(rows.candidates.items()):
        outcome = "heldout"
        if len(kept) == HELDOUT_MAXIMUM:
            outcome = "not_needed"
        elif row["answer"] in read:
            outcome = "answer_in_base_text" if row["answer"] in known else "answer_learned"
        else:
            kept.append(row)
        found[outcome] += 1
        counts[row["source"]][outcome] += 1
    if not kept:
        why = f" ({sources.reasons(found)})" if found else ""
        raise UserError(f"no conversation is left to be held out{why}; add a source with heldout: true")
    return kept


def heldout(run: Path, count: int = 5) -> list[dict[str, Any]]:
    """The first held-out conversations of a run: `messages` to answer, and the reference `answer`."""
    rows = pq.read_table(run / "data/conversations/heldout.parquet", columns=["messages", "answer"])
    return list(rows.slice(0, count).to_pylist())


def check(run: Path, recorded: dict[str, str]) -> None:
    """Check that a run's conversations are those whose SHA-256 `build` returned, by split. Raises `UserError`."""
    remedy = "delete it and run `nanophi prepare` on the recipe; it writes it again and leaves the checkpoints alone"
    for split, sha256 in recorded.items():
        path = run / f"data/conversations/{split}.parquet"
        with user_errors(f"{path} cannot be read; {remedy}"):
            rows = pq.read_table(path).to_pylist()
        if sha256_of(rows) != sha256:
            raise UserError(f"{path} holds other conversations than data/tokens/tokens.json records; {remedy}")


def conversation(row: Any, method: str) -> tuple[Messages, Messages, Messages]:
    """A row's prompt, its (chosen) completion and, for `dpo`, its rejected one. Raises `UnusableError`.

    A prompt that is given beside whole conversations, which begin with it, is not read again.
    """
    if isinstance(row, formats.Unusable):
        raise UnusableError(row.reason, "its line cannot be read")
    row = {key: value for key, value in row.items() if not _missing(value)} if isinstance(row, dict) else {}
    needed = {"dpo": ["chosen", "rejected"], "sft": ["messages"] if "messages" in row else ["prompt", "completion"]}
    if not set(needed[method]) <= set(row):
        what = "'chosen' and 'rejected'" if method == "dpo" else "'messages', or 'prompt' and 'completion'"
        raise UnusableError("columns", f"a row has {what}; this one has {', '.join(row)}")
    prompt = _turns(row["prompt"], "user") if "prompt" in row and "messages" not in needed[method] else []
    if method == "dpo":
        return _preference(prompt, row)
    chosen = _turns(row[needed[method][-1]], "user" if "messages" in row else "assistant")
    if prompt and _begins(chosen, prompt, row["prompt"]):
        prompt = []
    while chosen and chosen[-1]["role"] != "assistant":
        chosen.pop()  # nobody answers it
    if not chosen:
        raise UnusableError("no_answer", "the conversation has no assistant's turn")
    return prompt, chosen, []


def _preference(prompt: Messages, row: dict[str, Any]) -> tuple[Messages, Messages, Messages]:
    chosen, rejected = (_turns(row[key], "assistant") for key in ("chosen", "rejected"))
    pairs = zip(chosen, rejected, strict=False)
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    texts = [[(turn["role"], turn["content"].strip()) for turn in turns] for turns in (chosen, rejected)]
    if texts[0] == texts[1]:
        raise UnusableError("same_answers", "'chosen' and 'rejected' are the same")
    if not prompt or _begins(shared, prompt, row["prompt"]):
        prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1]["role"] != "assistant":
            raise UnusableError("no_answer", f"'{name}' does not end with an assistant's turn of its own")
        if not prompt or prompt[-1]["role"] == turns[0]["role"] == "user":
            raise UnusableError("no_prompt", "'chosen' and 'rejected' have no prompt in common")
    return prompt, chosen, rejected


def _begins(turns: Messages, prompt: Messages, given: Any) -> bool:
    """Whether turns begin with the prompt: with its messages or, where a text was given, with anybody's question."""
    return turns[: len(prompt)] == prompt if isinstance(given, list) else bool(turns) and turns[0]["role"] != ROLES[2]


def _turns(value: Any, role: str) -> Messages:
    """Messages, from a list of them or from one text of `role`."""
    turns = value if isinstance(value, list) else [{"role": role, "content": value}]
    if isinstance(value, dict) or not all(isinstance(turn, dict) for turn in turns):
        raise UnusableError("not_messages", "messages are a list of objects with 'role' and 'content'")
    for turn in turns:
        if turn.get("tool_calls") or turn.get("function_call"):
            raise UnusableError("tool_call", "a turn calls a tool, which the chat template cannot write")
        if turn.get("role") not in ROLES:
            raise UnusableError("role", f"unknown role {str(turn.get('role'))[:40]!r}; roles are {', '.join(ROLES)}")
    return [{"role": turn["role"], "content": _text(turn.get("content"), turn["role"])} for turn in turns]


def _missing(value: Any) -> bool:
    """Whether a value is none: a table has NaN, or an infinity, where it lacks one."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _text(content: Any, role: str) -> str:
    """A turn's text: a string, a number of a table, or content parts that are text."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type", "text") == "text" for part in content
    ):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    elif isinstance(content, bytes):
        content = content.decode(errors="surrogateescape")
    elif isinstance(content, int | float):
        content = "" if _missing(content) else str(content)
    if not isinstance(content, str | None):
        raise UnusableError("not_text", f"a turn of role '{role}' has no text as its 'content'")
    cleaned = formats.clean(content or "")
    if isinstance(cleaned, formats.Unusable):
        reason = "empty_turn" if cleaned.reason == "empty" else cleaned.reason
        raise UnusableError(reason, f"a turn of role '{role}' has no text as its 'content'")
    return str(content)


def encode(tokenizer: Any, messages: Messages, context: int) -> tuple[list[int], list[int], bool]:
    """Token ids of a conversation up to the last answer that ends in `context` tokens; 1 where the assistant speaks,
    the end of its turn included; whether this is all of it. As in inference, prompt and answer are cut apart.
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


def _read(source: Source) -> Iterator[tuple[str, Any, bool | None]]:
    """Where a row is, the row, and whether it is held out (None: its hash decides, unless a whole source is)."""
    if source.embedded:
        for number, (held, question, answer) in enumerate(questions.conversations(), 1):
            yield f"questions:{number}", {"prompt": question, "completion": answer}, held
        return
    every_column = source.model_copy(update={"text_column": ""})
    for file in sources.locate(source):
        reader = sources.reader(every_column, file)
        if reader.one_document:
            raise UserError(f"source {shown(file)}: conversations are not read from text files")
        for piece in reader.pieces():
            for where, row in sources.guarded(file, reader.records(piece)):
                yield where, row, source.heldout or None


def _in_text(folder: Path, answers: Collection[str]) -> set[str]:
    """Which answers are in the training documents as whole words, white space apart; holds a few MB at a time."""
    left = {answer: " ".join(answer.split()) for answer in answers}
    for batch in documents.batches(documents.shards(folder, "train"), ["text"], None):
        base = "\n".join(" ".join(text.split()) for text in batch.column("text").to_pylist())
        left = {
            answer: words
            for answer, words in left.items()
            if words not in base or not re.search(_EDGE + re.escape(words) + _EDGE, base)
        }
    return set(answers) - left.keys()
