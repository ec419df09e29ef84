"""Conversations are read, checked and split before any training; nobody has read the answers that are held out."""

import gzip
import hashlib
import math
import random
import shutil

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from chat_run import END, TRAINING, make_base, pipeline, talk, write_rows
from gathered import write
from transformers import AutoTokenizer
from trl.data_utils import apply_chat_template, maybe_extract_prompt

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.recipe import load_recipe
from nanophi.data import conversations, questions
from nanophi.pipeline import Pipeline, suites

ROWS = [{"messages": talk(number)} for number in range(4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    make_base(runs / "base")
    return runs


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(runs):
    tokenizer = AutoTokenizer.from_pretrained(runs / "base/checkpoints/step-000001")
    tokenizer.chat_template = conversations.TEMPLATE
    return tokenizer


def made(runs, recipe, report=lambda line: None):
    """What is said of the conversations of a recipe."""
    return Pipeline(recipe, runs, report=report).tokens()


def counted(runs, rows, name, **fields):
    """What became of the rows of a recipe's own source."""
    held = [{"prompt": "Held out?", "completion": "So it is.", "chosen": "So it is.", "rejected": "It is not."}]
    run = pipeline(runs, rows, name, **fields)
    write_rows(runs / f"{name}-heldout.jsonl", held)
    return run.tokens()["sources"][str(runs / f"{name}.jsonl")]


def recipe_on_base(runs, name, **fields):
    """Read a recipe on `runs/base` that says what only it can say, and `fields`."""
    values = {"name": name, "base": str(runs / "base"), "conversations": [{"embedded": "questions"}]}
    (runs / f"{name}.yaml").write_text(yaml.safe_dump({**values, "training": TRAINING, **fields}))
    return load_recipe(runs / f"{name}.yaml")


@pytest.mark.parametrize(
    ("row", "method", "message"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "sft", "bad.jsonl:3: unknown role 'tool'; roles are system"),
        ({"text": "Hi"}, "sft", r"bad.jsonl:3: a row has 'messages', or 'prompt' and 'completion'; this one has text"),
        ({"prompt": "Hi", "completion": math.nan}, "sft", r"bad.jsonl:3: a row has .*; this one has prompt"),
        ({"prompt": "Hi", "chosen": "Hello"}, "dpo", r"bad.jsonl:3: a row has 'chosen' and 'rejected'"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "dpo", r"bad.jsonl:3: .* no prompt in common"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": []}, "dpo", r"bad.jsonl:3: 'rejected' does not end with"),
    ],
)
def test_a_row_that_is_no_conversation_is_named_before_work(runs, row, method, message):
    good = {"prompt": "A", "completion": "B", "chosen": "B", "rejected": "C"}
    with pytest.raises(UserError, match=message):
        pipeline(runs, [good, good, row], "bad", method=method).tokens()
    assert not (runs / "bad/data").exists()


@pytest.mark.parametrize(
    ("reason", "turns"),
    [
        ("empty_turn", [{"role": "system", "content": " "}, *talk(8)]),
        ("empty_turn", [*talk(8), user("And?"), assistant(None)]),
        ("empty_turn", [*talk(8), user("And?"), assistant(math.nan)]),
        ("empty_turn", [user(-math.inf), assistant("Nothing.")]),
        ("role", [*talk(8), {"role": "tool", "content": "8"}, assistant("8.")]),
        ("tool_call", [user("Hi"), {**assistant("One moment."), "tool_calls": [{"name": "f"}]}, *talk(8)]),
        ("no_answer", [user("Hi")]),
        ("not_text", [user([{"type": "image", "text": None}]), assistant("A cat.")]),
        ("not_text", [user({"text": "Hi"}), assistant("Hello.")]),
        ("invalid_utf8", [user("Hi"), assistant("\ud83d")]),
        ("not_messages", ["Hi", "Hello"]),
        ("special_token", [user("Hi"), assistant(f"So {END}")]),
        ("too_long", [user("Hi"), assistant("x" * 200)]),
        ("nothing_asked", [assistant("Welcome!"), *talk(8)]),
    ],
)
def test_one_row_that_cannot_be_used_is_counted_and_stops_nothing(runs, reason, turns):
    rows = [{"messages": talk(number)} for number in range(5)]
    assert counted(runs, [*rows, {"messages": turns}], "one") == {"read": 6, "train": 5, reason: 1}
    # The same share of rows is too large where the recipe says so.
    with pytest.raises(
        UserError, match=rf"only 83.3 % of 6 conv.*max_dropped is 0.1\): {reason} 1; the first is .*:6: "
    ):
        counted(runs, [*rows, {"messages": turns}], "two", data={"max_dropped": 0.1})


@pytest.mark.parametrize("whole", [True, False])
def test_a_pair_without_a_preference_is_left_out(runs, whole):
    asked = [user("Same?")] if whole else []
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)]
    rows.append({"prompt": "Same?", "chosen": [*asked, assistant("Same.")], "rejected": [*asked, assistant("Same. ")]})
    assert counted(runs, rows, "same", method="dpo") == {"read": 5, "train": 4, "same_answers": 1}


def test_a_question_beside_whole_conversations_is_read_once():
    """As in data sets that repeat it in a column; a pair whose questions differ by a space has no common one."""
    right, wrong = [user("Why?"), assistant("So.")], [user("Why?"), assistant("No.")]
    split = ([user("Why?")], [assistant("So.")], [assistant("No.")])
    for prompt in ({}, {"prompt": "Why?"}, {"prompt": [user("Why?")]}):
        assert conversations.conversation({**prompt, "chosen": right, "rejected": wrong}, "dpo") == split
    for prompt in ("Why?", [user("Why?")]):
        prompt, chosen, _ = conversations.conversation({"prompt": prompt, "completion": right}, "sft")
        assert prompt + chosen == right
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": "Why?", "chosen": [system, *right], "rejected": [system, *wrong]}
    assert conversations.conversation(row, "dpo")[0] == [system, user("Why?")]
    with pytest.raises(conversations.UnusableError, match="no prompt in common"):
        row = {"prompt": "Why?", "chosen": right, "rejected": [user("Why? "), assistant("No.")]}
        conversations.conversation(row, "dpo")


def test_rows_become_the_text_that_trl_makes_of_them(tokenizer):
    draw = random.Random(7)

    def turn(role):
        text = "".join(draw.choice(" \nabü.?8:") for _ in range(draw.randint(0, 12)))
        return {"role": role, "content": f"{text}{draw.randint(0, 99)}" + draw.choice(["", " ", "\n"])}

    def talked():
        system = [turn("system")] * draw.randint(0, 1)
        return system + [turn(role) for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]

    for _ in range(100):
        asked = [*talked(), turn("user")]
        answers = [turn("assistant")], [turn("assistant"), turn("user"), turn("assistant")]
        pair = {"chosen": [*asked, *answers[0]], "rejected": [*asked, *answers[1]]}
        rows = [
            ("sft", {"messages": talked()}),
            ("sft", {"prompt": asked, "completion": answers[0]}),
            ("dpo", pair),
            ("dpo", {"prompt": asked[-1]["content"], **pair}),
            ("dpo", {"prompt": asked, "chosen": answers[0], "rejected": answers[1]}),
        ]
        for method, row in rows:
            theirs = apply_chat_template(maybe_extract_prompt(row), tokenizer)
            prompt, chosen, rejected = conversations.conversation(row, method)
            ours = [tokenizer.apply_chat_template(prompt + part, tokenize=False) for part in (chosen, rejected) if part]
            if method == "dpo":
                assert ours == [theirs["prompt"] + theirs[part] for part in ("chosen", "rejected")]
                continue
            assert ours == [theirs.get("text") or theirs["prompt"] + theirs["completion"]]
            ids, mask, whole = conversations.encode(tokenizer, prompt + chosen, 10**6)
            marked = {"return_dict": True, "return_assistant_tokens_mask": True}
            expected = tokenizer.apply_chat_template(prompt + chosen, **marked)
            assert (ids, mask, whole) == (expected["input_ids"], expected["assistant_masks"], True)


def test_the_template_writes_what_it_wrote_before_and_joins_content_parts(tokenizer):
    """The stage is keyed by the template without marks: chat models that were made with it stay up to date."""
    before = conversations.TEXT_TEMPLATE
    assert hashlib.sha256(before.encode()).hexdigest().startswith("1a4d1c87b0dffafb")
    for add in (True, False):
        ours, theirs = (
            tokenizer.apply_chat_template(talk(3), chat_template=text, tokenize=False, add_generation_prompt=add)
            for text in (conversations.TEMPLATE, before)
        )
        assert ours == theirs
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
    texts = [tokenizer.apply_chat_template([user(content)], tokenize=False) for content in (parts, "What is it?")]
    assert texts[0] == texts[1]
    assert conversations.conversation({"messages": [user(parts), assistant("8")]}, "sft")[1][0] == user("What is it?")
    for content in (None, [], [{"type": "image", "url": "x"}]):
        with pytest.raises(Exception, match="a turn of role user has no text"):
            tokenizer.apply_chat_template([user(content)], tokenize=False)


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "table.jsonl", "table.parquet", "table.arrow"])
def test_answers_of_a_table_are_what_stands_in_it(runs, tokenizer, name):
    answers = ["None", 7, 0.5, "NA"] if name.endswith("jsonl") else ["None", "NA", "1900.50", "7", "ja, oui", "null"]
    rows = [{"prompt": f"Ask, {number}?", "completion": answer} for number, answer in enumerate(answers)]
    file, table = runs / name, pa.table({"prompt": [row["prompt"] for row in rows], "completion": map(str, answers)})
    if name.endswith("sv"):
        mark = "," if name.endswith(".csv") else "\t"
        pa.csv.write_csv(table, file, pa.csv.WriteOptions(delimiter=mark))
    elif name.endswith("arrow"):
        with pa.ipc.new_file(file, table.schema) as sink:
            sink.write_table(table)
    else:
        write(file, rows)
    held = write_rows(runs / "table-heldout.jsonl", [{"prompt": "Held?", "completion": "So it is."}])
    sources = [{"files": str(file)}, {"files": str(held), "heldout": True}]
    made(runs, recipe_on_base(runs, f"of-{name}", conversations=sources))
    rows = pq.read_table(runs / f"of-{name}" / "data/conversations/train.parquet").to_pylist()
    learned = [[i for i, learn in zip(*row.values(), strict=True) if learn] for row in rows]
    assert [tokenizer.decode(ids) for ids in learned] == [f"{answer}{END}" for answer in answers]


def test_a_base_must_be_whole(runs):
    tokenizer = runs / "base/checkpoints/step-000001/tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    try:
        with pytest.raises(UserError, match=r"base: .*base has no tokenizer \(.*tokenizer.json is missing\)"):
            pipeline(runs, ROWS, "chat")
    finally:
        tokenizer.write_bytes(content)
    for base, message in (("nowhere", "folder nowhere does not exist"), (str(runs), "neither a run nor a release")):
        (runs / "lost.yaml").write_text(
            yaml.safe_dump({"name": "lost", "base": base, "conversations": [{"files": "x"}]})
        )
        with pytest.raises(UserError, match=message):
            load_recipe(runs / "lost.yaml")
    with pytest.raises(UserError, match="'conversations' needs 'base'"):
        load_recipe("demo", ["conversations=[{embedded: questions}]"])
    with pytest.raises(UserError, match="'text_column' is for documents"):
        recipe_on_base(runs, "lost", conversations=[{"files": "x", "text_column": "y"}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"num_hidden_layers": 4}}, r"'model.num_hidden_layers' is its base's \(2 -> 4\); leave it out"),
        ({"quality": {"threshold": 0.9}}, r"'quality.threshold' is its base's \(0.5 -> 0.9\); leave it out"),
        ({"tokenizer": {"path": "gpt2"}}, r"'tokenizer.path' is its base's \(None -> gpt2\); leave it out"),
        ({"data": {"sources": [{"files": "x.jsonl"}]}}, r"'data.sources.0.files' is its base's \(None -> x.jsonl\)"),
        ({"data": {"sources": [{"embedded": "documentation"}, {"hub": "a/b"}]}}, "'data.sources' is its base's"),
        ({"data": 5}, "'data' is its base's"),
    ],
)
def test_what_a_recipe_says_otherwise_than_its_base_is_refused(runs, fields, message):
    with pytest.raises(UserError, match=message):
        recipe_on_base(runs, "otherwise", **fields)


def test_what_a_recipe_extends_does_not_speak_against_its_base(runs):
    """As `demo-chat` on another run than the demo, which it extends."""
    written = {"extends": "demo", "name": "otherwise", "base": str(runs / "base"), "conversations": [{"files": "x"}]}
    written |= {"training": {"steps": 2, "warmup_steps": 0, "keep_steps": []}}
    (runs / "otherwise.yaml").write_text(yaml.safe_dump(written))
    recipe = load_recipe(runs / "otherwise.yaml", ["model.num_hidden_layers=2"])
    assert recipe.model == recipe_on_base(runs, "same").model
    with pytest.raises(UserError, match=r"'model.num_hidden_layers' is its base's \(2 -> 3\)"):
        load_recipe(runs / "otherwise.yaml", ["model.num_hidden_layers=3"])


def test_a_recipe_that_repeats_its_base_loads_with_it_and_without(runs, tmp_path):
    stated = {"model": {"num_hidden_layers": 2}, "data": {"sources": [{"embedded": "documentation"}]}}
    recipe = recipe_on_base(runs, "same", **stated)
    assert recipe.dump() == recipe_on_base(runs, "same").dump()
    for base in (runs / "base", tmp_path / "gone"):
        dumped = {**recipe.dump(), "base": str(base)}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dumped))
        assert load_recipe(tmp_path / "recipe.yaml").dump() == dumped


def test_a_release_is_a_base_too(runs):
    """It brings its recipe and records; its held-out text only where its run is."""
    release = runs / "release"
    shutil.copytree(runs / "base/checkpoints/step-000001", release)
    (release / "records").mkdir()
    shutil.copyfile(runs / "base/recipe.yaml", release / "records/recipe.yaml")
    for name in ("documents", "quality", "tokens"):
        shutil.copyfile(runs / f"base/data/{name}/{name}.json", release / f"records/{name}.json")
    run = pipeline(runs, ROWS, "on-release", base=str(release))
    summary = run.tokens()
    assert (summary["base"], summary["answers_in_base_text"]) == ("base", None)
    assert suites(run) == ["answers"]
    heavier = run.recipe.model_copy(update={"model": {**run.recipe.model, "num_hidden_layers": 3}})
    with pytest.raises(UserError, match=r"'model' is not its base's \(num_hidden_layers 2 -> 3\); leave it out"):
        Pipeline(heavier, runs, report=lambda line: None).check("verification")


def test_only_answers_are_learned_and_whole_turns_fit(runs):
    long = [user("Long?"), assistant("Yes."), user("x" * 200), assistant("y")]
    loud = [user(f"Say {END}"), assistant("No.")]
    run, lines = pipeline(runs, [*ROWS, {"messages": long}, {"messages": loud}], "fits"), list[str]()
    run.report = lines.append
    summary = run.tokens()
    assert summary["shortened"] == {str(runs / "fits.jsonl"): 1}
    assert any("1 left out (special_token 1); 1 trained on without their last turns" in line for line in lines)
    assert summary["sources"][str(runs / "fits.jsonl")] == {"read": 6, "train": 5, "special_token": 1}
    tokenizer = AutoTokenizer.from_pretrained(run.path / "data/tokenizer")
    rows = pq.read_table(run.path / "data/conversations/train.parquet").to_pylist()
    assert tokenizer.decode(rows[4]["input_ids"]) == f"User:\nLong?{END}Assistant:\nYes.{END}"
    for row, talked in zip(rows, ROWS, strict=False):
        learned = [i for i, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
        assert tokenizer.decode(learned) == "".join(
            t["content"] + END for t in talked["messages"] if t["role"][0] == "a"
        )
        whole = tokenizer.apply_chat_template(talked["messages"], tokenize=False)
        assert row["input_ids"] == tokenizer(whole).input_ids


def test_a_preference_is_compared_whole_or_left_out(runs):
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)]
    rows += [{**rows[0], part: "x" * 200} for part in ("chosen", "rejected")]
    turns = [user("Say x."), assistant("x")]
    rows.append({"prompt": turns, "chosen": [user("And y?"), assistant("y" * 200)], "rejected": "No."})
    summary = pipeline(runs, rows, "whole", method="dpo", data={"max_dropped": 0.5}).tokens()
    assert summary["sources"][str(runs / "whole.jsonl")] == {"read": 7, "train": 4, "too_long": 3}
    with pytest.raises(UserError, match=r"only 57.1 % of 7 .*: too_long 3; .*:5: it does not fit into 128 tokens"):
        pipeline(runs, rows, "cut", method="dpo").tokens()


def test_an_empty_file_is_passed_over(runs, monkeypatch):
    monkeypatch.setattr(questions, "conversations", lambda: iter([(True, "What?", "Held out.")]))
    folder = runs / "folder"
    folder.mkdir()
    (folder / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    source = {"files": str(folder)}
    with pytest.raises(UserError, match=rf"^source {folder} holds no conversations$"):
        made(runs, recipe_on_base(runs, "empty", conversations=[source]))
    write_rows(folder / "full.jsonl", ROWS)
    recipe = recipe_on_base(runs, "passed", conversations=[source, {"embedded": "questions"}])
    assert made(runs, recipe)["sources"][str(folder)]["read"] == 4


def test_an_answer_is_looked_for_in_the_base_text_by_words(runs):
    """Over line ends; one whose letters are part of other words is not there."""
    said = "The first line of it.\nThe second line of it."
    shutil.copytree(runs / "base", runs / "reader")
    text = {"id": ["0" * 16], "source": ["web"], "text": [f"Intro.\n\n{said}  Another 42 cats (all)."]}
    pq.write_table(pa.table(text), runs / "reader/data/documents/train-00000.parquet")
    run = pipeline(runs, ROWS, "lines", base=str(runs / "reader"))
    answers = [said, "New.", "other", "2", "cat", "42", "(all)", "all"]
    held = [{"prompt": f"Q{number}", "completion": answer} for number, answer in enumerate(answers)]
    write_rows(runs / "lines-heldout.jsonl", held)
    assert run.tokens()["answers_in_base_text"] == 4
    assert {row["answer"] for row in conversations.heldout(run.path)} == {"New.", "other", "2", "cat"}
    write_rows(runs / "lines-heldout.jsonl", held[-1:])
    with pytest.raises(UserError, match=r"to be held out \(answer_in_base_text 1\); add a source with heldout: true"):
        made(runs, run.recipe)


def test_a_template_that_the_base_has_is_kept(runs):
    config = runs / "base/checkpoints/step-000001/tokenizer_config.json"
    content = read_json(config)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    write_json(config, {**content, "chat_template": template})
    try:
        run = pipeline(runs, ROWS, "kept")
        assert run.tokens()["own_template"] is False
        assert AutoTokenizer.from_pretrained(run.path / "data/tokenizer").chat_template == template
        prompt = pq.read_table(run.path / "data/conversations/heldout.parquet")["prompt"][0].as_py()
        assert prompt.endswith("<user>Again?" + END + "<assistant>")
    finally:
        write_json(config, content)


def test_first_sentences():
    assert questions.first_sentence("Join :func:`os.path` with ``a``\nand *b* parts. More.\n\nRest.") == (
        "Join os.path with a and b parts."
    )
    assert questions.first_sentence("Short.") is None
    assert questions.first_sentence("See `here <https://x>`_ for all that there is to know.") is None


def test_questions_are_split_by_object(monkeypatch, tmp_path):
    names = [f"m{number}.py" for number in range(60)]
    for number, name in enumerate(names):
        module = f"A module that holds the number {['one', 'two', 'three', 'four', 'five'][number % 5]}."
        function = f"Return what the letter number{chr(97 + number % 26)} is.\n\n    {'Longer. ' * 60 * (number % 2)}"
        (tmp_path / name).write_text(f'"""{module}"""\ndef f{number}(a, *b):\n    """{function}"""\n')
    monkeypatch.setattr(questions.installed_docs, "groups", lambda: ["python"])
    monkeypatch.setattr(questions.installed_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    rows = list(questions.conversations())
    assert rows == list(questions.conversations())
    held = {answer for out, question, answer in rows if out and question.startswith("What")}
    assert held and not held & {answer for out, _, answer in rows if not out}
    assert any(row[1:] == ("Which arguments does m0.f0 take?", "It takes a and *b.") for row in rows)
    assert len({question for _, question, _ in rows}) == len(rows)


def test_conversations_read_are_used_or_left_out_for_a_reason(runs, monkeypatch):
    held = [("Long " * 60, "Yes."), ("Once?", "Held."), ("Once?", "Again."), ("Learned?", "Known.")]
    held += [(f"More {number}?", f"Number {number}.") for number in range(3)]
    rows = [(False, "What?", "Known."), (False, f"Say {END}", "No."), *((True, *pair) for pair in held)]
    monkeypatch.setattr(questions, "conversations", lambda: iter(rows))
    monkeypatch.setattr(conversations, "HELDOUT_MAXIMUM", 2)
    recipe = recipe_on_base(runs, "counted", data={"max_dropped": 0.3})
    lines = []
    count = made(runs, recipe, lines.append)["sources"]["questions"]
    assert count["read"] == len(rows) == sum(count.values()) - count["read"]
    assert (count["heldout"], count["train"], count["too_long"], count["asked_twice"]) == (2, 1, 1, 1)
    assert count["special_token"] == 1 and count.get("answer_learned", 0) + count["not_needed"] == 3
    (line,) = [line for line in lines if "conversations read" in line]
    assert "questions: 9 conversations read, 1 to train on, 2 held out, 6 left out (" in line
