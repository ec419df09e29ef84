"""Measuring a model: the result file, resuming after a kill, chance and better than chance, bad input."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
from pathlib import Path

import lm_eval
import lm_eval.utils
import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from lm_eval.loggers import WandbLogger
from lm_eval.models.huggingface import HFLM

import nanophi
from nanophi.cli import main
from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.eval import evaluate as verb
from nanophi.eval import measure as measuring
from nanophi.eval import suites
from nanophi.eval.catalogue import LEADERBOARD, SUITES, Suite
from nanophi.eval.metrics import BitsPerByte
from nanophi.eval.models import load_model
from nanophi.eval.results import (
    answer_scores,
    average_score,
    checkpoint_results,
    every_score,
    leading_scores,
    read_result,
)
from nanophi.eval.scorer import ScorerLM
from nanophi.eval.suites import check_heldout, context_problem, find_data, find_suite, load_suite, sample_of_items


def measure(model, suite, output, report=lambda line: None, **options):
    return measuring.measure(model, suite, output, measuring.Options(**options), report)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(0)


@pytest.fixture(scope="module")
def result(model, heldout, tmp_path_factory):
    output = tmp_path_factory.mktemp("evals") / "model-heldout.json"
    found = measure(model, "heldout", output, heldout=heldout)
    assert json.loads(output.read_text()) == found
    assert not list(output.parent.glob(".*"))
    return found


def test_lm_evals_own_tools_read_the_result_file(model, heldout, tmp_path):
    """Its table, from the file as it is on disk, is that of its own results; its W&B logger finds the scores."""
    path = tmp_path / "results.json"
    verb.evaluate([str(model)], "heldout", None, heldout, path)
    content = json.loads(path.read_text())
    for key in ("versions", "n-shot", "n-samples", "configs", "lm_eval_version"):
        assert content[key]
    assert [score.task for score in leading_scores(content)] == list(content["results"])
    assert content["nanophi"]["model"]["parameters"] == content["config"]["model_num_parameters"] > 0
    sample = content["samples"]["heldout_continuation"][0]
    assert len(sample["filtered_resps"]) == 4
    assert {"acc", "acc_norm", "doc_hash", "prompt_hash", "source", "target"} <= set(sample)
    table = lm_eval.utils.make_table(content)
    for score in leading_scores(content):
        (line,) = [line for line in table.splitlines() if f"|{score.metric} " in line and f"{score.value:.4f}" in line]
        assert ("↓" in line) == (not score.higher_is_better)
    logger = object.__new__(WandbLogger)
    logger.post_init(content)
    _, flat = logger._sanitize_results_dict()
    assert flat["heldout_continuation/acc_norm"] == content["results"]["heldout_continuation"]["acc_norm,none"]


def test_bits_per_byte_is_the_models_loss_in_other_units(result, model, heldout):
    """Against a loop written from the definition: -log2 P(text | BOS) / bytes, in disjoint windows."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loaded = load_suite(find_suite("heldout_bits_per_byte"), heldout=heldout)
    sums = {"all": np.zeros(2)}  # nats, bytes
    for doc in loaded.tasks["heldout_bits_per_byte"].eval_docs:
        tokens, nats = [0, *tokenizer.encode(doc["text"])], 0.0
        for start in range(0, len(tokens) - 1, 256):
            # A last window shorter than the context is filled up with what comes before it.
            scored = min(256, len(tokens) - 1 - start)
            ids = torch.tensor([tokens[max(0, start + scored - 256) : start + scored + 1]])
            with torch.no_grad():
                scores = torch.log_softmax(network(ids[:, :-1]).logits[0], -1)
            nats += float(scores.gather(1, ids[0, 1:, None])[-scored:].sum())
        for part in ("all", doc["source"]):
            sums[part] = sums.get(part, 0) + np.array([nats, len(doc["text"].encode())])
    held = result["nanophi"]["heldout"]
    for part, (nats, size) in sums.items():
        found = held if part == "all" else held["by_source"][part]
        assert found["bits_per_byte"] == pytest.approx(-nats / size / math.log(2), rel=1e-4)
        assert found["bytes"] == size
    score = leading_scores(result)[0]
    assert score.value == pytest.approx(held["bits_per_byte"]) and 0 < score.stderr < 0.5
    assert 1 < held["bz2"]["bits_per_byte"] < 8


def test_the_metrics_standard_error_by_the_delta_method():
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 1000, 200)
    nats = -sizes * rng.normal(1.2, 0.1, 200)
    found = BitsPerByte(keep_in_memory=True).compute(predictions=nats.tolist(), references=sizes.tolist())
    expected = np.sqrt(((nats - nats.sum() / sizes.sum() * sizes) ** 2).sum()) / sizes.sum() / math.log(2)
    assert found["bits_per_byte_stderr"] == pytest.approx(expected, rel=0.1)


def answers_of_arc(sample):
    """The text of the right answer and its log-likelihood, read from stock lm-eval's sample."""
    choices = sample["doc"]["choices"]
    index = choices["label"].index(sample["doc"]["answerKey"])
    return choices["text"][index], sample["filtered_resps"][index][0]


def answers_of_winogrande(sample):
    after = sample["doc"]["sentence"].split("_")[1].strip()
    return after, sample["filtered_resps"][int(sample["doc"]["answer"]) - 1][0]


@pytest.mark.parametrize(
    ("named", "task", "shots", "answers"),
    [
        ("arc-easy", "arc_easy", None, answers_of_arc),
        ("winogrande", "winogrande", None, answers_of_winogrande),
        ("winogrande:3", "winogrande", 3, answers_of_winogrande),
    ],
)
def test_same_scores_as_stock_lm_eval(named, task, shots, answers, model, benchmarks, tmp_path):
    """A task that is named by itself runs as lm-eval defines it, a number of shots as `--num_fewshot` there."""
    found = measure(model, named, tmp_path / "ours.json", data=benchmarks)
    tasks = load_suite(find_suite(task), data=benchmarks).tasks
    tasks[task].set_config("num_fewshot", None)  # as in lm-eval's own file
    stock = lm_eval.simple_evaluate(
        HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8),
        tasks=list(tasks.values()),
        num_fewshot=shots,
        bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    assert found["n-shot"][task] == stock["n-shot"][task] == (shots or 0)
    for key in leading_scores(found)[0].metric, "acc":
        assert found["results"][task][f"{key},none"] == pytest.approx(stock["results"][task][f"{key},none"])
    bits = []
    for ours, theirs in zip(found["samples"][task], stock["samples"][task], strict=True):
        assert ours["prompt_hash"] == theirs["prompt_hash"] and ours["doc_hash"] == theirs["doc_hash"]
        scores = [[score for score, _ in sample["filtered_resps"]] for sample in (ours, theirs)]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)
        text, log_likelihood = answers(theirs)
        bits.append(-log_likelihood / len(text.encode()) / math.log(2))
        assert ours["answer_bits_per_byte"] == pytest.approx(bits[-1], abs=1e-3)
    figures = {"value": np.mean(bits), "stderr": np.std(bits, ddof=1) / math.sqrt(len(bits))}
    (score,) = answer_scores(found)
    assert {"value": score.value, "stderr": score.stderr} == pytest.approx(figures, abs=1e-4)
    assert found["results"][task]["answer_bits_per_byte,none"] == pytest.approx(figures["value"], abs=1e-4)


@pytest.mark.parametrize(
    ("task", "dataset", "config", "column", "metric"),
    [
        ("lambada_standard", "cimec/lambada", "default", "text", "acc"),
        pytest.param(
            *("wikitext", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "page", "bits_per_byte"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_figure_that_can_be_compared_leads_before_a_perplexity(
    task, dataset, config, column, metric, model, write_dataset, tmp_path
):
    """lm-eval lists the perplexities of these tasks first."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["the", "of", "to", "and", "one", "two", "red"], k=9)) for _ in range(8)]
    splits = dict.fromkeys(("train", "validation", "test"), pyarrow.table({column: texts}))
    write_dataset(tmp_path / dataset, config, splits)
    result = measure(model, task, tmp_path / "m.json", data=tmp_path)
    (score,) = leading_scores(result)
    assert score.metric == metric and score.value == result["results"][task][f"{metric},none"]
    if metric == "bits_per_byte":
        pairs = [sample["bits_per_byte"] for sample in result["samples"][task]]
        assert score.value == pytest.approx(-sum(a for a, _ in pairs) / sum(b for _, b in pairs) / math.log(2))
        assert not score.higher_is_better and 0 < score.stderr < 1


@pytest.mark.parametrize("unknown", [None, "mmlu"])
def test_the_leaderboards_average_of_tasks_with_and_without_a_standard_error(unknown, result):
    def score(task, shots):
        stderr = None if task == unknown else 0.03
        return dataclasses.replace(
            leading_scores(result)[1], task=task, shots=shots, value=0.1 * len(task), stderr=stderr, items=7, of=9
        )

    six = [score(task, shots) for task, shots in LEADERBOARD.items()]
    average = average_score([*six, score("arc_easy", 0)])
    assert average.value == pytest.approx(np.mean([score.value for score in six]))
    assert average.stderr == (None if unknown else pytest.approx(0.03 / math.sqrt(6)))
    assert (average.items, average.of, average.title, average.percent) == (42, 54, "average", True)
    assert average_score(six[1:]) is None
    assert average_score([score("arc_challenge", 5), *six[1:]]) is None, "not at the board's shots"


def test_files_of_format_2_give_the_figures_of_their_headline():
    """A file that an earlier version wrote: what it has twice is read once."""
    old = read_result(Path(__file__).with_name("format_2.json"))
    answers = {score.task: {"value": score.value, "stderr": score.stderr} for score in answer_scores(old)}
    names = {"num_fewshot": "shots", "tasks": "leaves"}
    for score, line in zip(leading_scores(old), old["nanophi"]["headline"], strict=True):
        assert line.pop("answer_bits_per_byte") == answers.get(score.task)
        assert {key: getattr(score, names.get(key, key)) for key in line} == line | {"tasks": tuple(line["tasks"])}
    average = average_score(leading_scores(old))
    assert {"value": average.value, "stderr": average.stderr}.items() <= old["nanophi"]["average"].items()
    subjects = [score for score in every_score(old) if score.task.startswith("mmlu_")]
    assert len(subjects) == 2 * 3 and all(score.leaves == (score.task,) for score in subjects)


def test_results_of_a_checkpoint_by_suite_whatever_its_name(make_model, heldout, tmp_path):
    checkpoint_of(tmp_path / "run", make_model(4), 100)
    checkpoint = tmp_path / "run/checkpoints/step-000100"
    for name, sha256 in (("heldout_order", None), ("stale", "0" * 64)):
        path = tmp_path / f"run/evals/step-000100-{name}.json"
        found = measure(checkpoint, "heldout_order", path, heldout=heldout, limit=4)
        if sha256:
            found["nanophi"]["model"]["sha256"] = sha256
            path.write_text(json.dumps(found))
    assert list(checkpoint_results(checkpoint)) == ["heldout_order"]


def test_number_of_shots(tmp_path):
    def entries(*arguments):
        return [(entry.task, entry.shots) for entry in find_suite(*arguments).entries]

    assert entries("winogrande:5, arc-easy") == [("winogrande", 5), ("arc_easy", None)]
    assert entries("winogrande:0,arc_easy", 2) == [("winogrande", 0), ("arc_easy", 2)]
    assert find_suite("winogrande:5, arc-easy").name == "winogrande:5,arc_easy"
    assert entries("heldout,arc_easy")[-2:] == [("heldout_order", 0), ("arc_easy", None)]
    for name, count, problem in (
        ("quick", 5, "suite 'quick' fixes its number of shots"),
        ("winogrande:many", None, "'winogrande:many' does not name a number of shots"),
        ("arc_easy,arc-easy:5", None, "task 'arc_easy' is named twice"),
    ):
        with pytest.raises(UserError, match=problem):
            find_suite(name, count)
    with pytest.raises(UserError, match="task 'heldout_order' is zero-shot by its definition"):
        load_suite(find_suite("heldout_order:5"), heldout=folder_of_documents(tmp_path))


def folder_of_documents(folder):
    sentences = [f"{word.capitalize()} went to the market place with all of them. " for word in ("she", "he", "it")]
    texts = [
        f"Opening number {i} of a long text, which says little and is not over. " * 2 + "".join(sentences) for i in "ab"
    ]
    rows = [{"id": str(i), "source": "s", "text": text} for i, text in enumerate(texts)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "heldout-00000.parquet")
    return folder


@pytest.mark.slow
def test_a_tag_means_all_of_lm_evals_tasks():
    """Also where only some of them are in the folders that are looked at first."""
    stock = set(suites._everything().task_index["math_word_problems"].tags)
    entries = {"math_word_problems": len(stock), "mmlu": 57, "blimp": 67}
    for name, count in entries.items():
        assert len(find_data(find_suite(name))) == count > 1


def test_signal_tasks_from_a_folder(model, write_dataset, tmp_path):
    def words(count):
        return " ".join(random.Random(count).choices(["the", "of", "to", "and", "one", "two", "red"], k=3 + count % 3))

    tables = {
        "baber/piqa": {"goal": 1, "sol1": 2, "sol2": 3, "label": None},
        "EleutherAI/lambada_openai": {"text": 1},
        "nyu-mll/blimp": {"sentence_good": 1, "sentence_bad": 2},
    }
    for dataset, columns in tables.items():
        rows = [{k: i % 2 if n is None else words(7 * i + n) for k, n in columns.items()} for i in range(6)]
        splits = dict.fromkeys(("train", "validation", "test"), pyarrow.Table.from_pylist(rows))
        config = "causative" if dataset.endswith("blimp") else "default"
        write_dataset(tmp_path / "data" / dataset, config, splits)
    assert {"sciq", "piqa", "lambada_openai", "blimp"} <= {entry.task for entry in find_suite("signal").entries}
    tasks = "piqa,lambada_openai,blimp_causative"
    result = measure(model, tasks, tmp_path / "m.json", data=tmp_path / "data")
    assert [(score.metric, score.chance) for score in leading_scores(result)] == [("acc", x) for x in (0.5, None, 0.5)]
    answers = {score.task: score.value for score in answer_scores(result)}
    assert list(answers) == tasks.split(",")
    # lambada's answer is the last word, without the space before it.
    texts = [words(7 * i + 1) for i in range(6)]
    scores = [sample["filtered_resps"][0][0] for sample in result["samples"]["lambada_openai"]]
    expected = [-score / math.log(2) / len(text.split()[-1]) for score, text in zip(scores, texts, strict=True)]
    assert answers["lambada_openai"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(
    ("names", "context", "said"),
    [
        (["heldout"], 256, ""),
        (["heldout", "arc_easy"], 128, ""),
        (["heldout", "open-llm-v1", "signal"], 1024, ""),
        (["heldout", "quick"], 256, "task 'gsm8k' (suite 'quick') generates 256 tokens after a question"),
        (["gsm8k:2"], 200, "task 'gsm8k' (suite 'gsm8k:2') generates 256 tokens"),
        (["arc_easy", "hellaswag"], 64, "task 'hellaswag' (suite 'hellaswag') has answers of about 78 tokens"),
        (["heldout"], 32, "task 'heldout_continuation' (suite 'heldout') has answers of about 46 tokens"),
    ],
)
def test_suites_against_the_context_before_training(names, context, said):
    found = context_problem(names, context)
    assert found.startswith(said) and bool(found) == bool(said)
    assert not found or f"too many for a context of {context} tokens" in found


def test_held_out_answers_against_the_context_before_training(model, make_model, heldout, tmp_path):
    """The shortest context that is accepted is the shortest one in which the scorer takes every answer."""
    longest = {}
    for task in ("heldout_continuation", "heldout_order"):
        with pytest.raises(UserError) as refused:
            check_heldout([task, "arc_easy"], heldout, model, 8)
        said = str(refused.value)
        assert said.startswith(f"evaluation.suites: an answer of task '{task}' has ")
        assert said.endswith("choose other evaluation.suites, or a larger model.max_position_embeddings")
        longest[task] = int(re.findall("[0-9]+", said)[0])
        check_heldout([task], heldout, model, longest[task])
        with pytest.raises(UserError, match=f"has {longest[task]} tokens, too many for a context of "):
            check_heldout(["arc_easy", task], heldout, model, longest[task] - 1)
    check_heldout(["heldout"], heldout, model, max(longest.values()))
    task, tokens = max(longest.items(), key=lambda item: item[1])
    options = {"heldout": heldout}
    fits, narrow = (make_model(12, max_position_embeddings=tokens - less) for less in (0, 1))
    measure(fits, task, tmp_path / "fits.json", **options)
    with pytest.raises(UserError, match=f"an answer has {tokens} tokens, too many for a context of {tokens - 1} "):
        measure(narrow, task, tmp_path / "narrow.json", **options)


def test_held_out_tasks_that_cannot_be_made_are_found_before_training(model, tmp_path):
    folder = folder_of_documents(tmp_path)
    check_heldout(["heldout_bits_per_byte,heldout_order"], folder, model, 256)
    check_heldout(["quick"], tmp_path / "nowhere", tmp_path / "nowhere", 1)  # it needs no held-out documents
    with pytest.raises(UserError, match=r"evaluation\.suites: heldout_continuation: too few documents of 600"):
        check_heldout(["quick", "heldout"], folder, model, 256)
    rows = [{"id": "1", "source": "s", "text": "One sentence, and no end of it " * 30}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "heldout-00000.parquet")
    with pytest.raises(UserError, match=r"^heldout_order: too few documents with five sentences; name other suites"):
        load_suite(find_suite("heldout_order"), heldout=folder)


def test_leaderboard_tasks_on_real_items(make_model, tmp_path):
    """All six tasks and ARC-Easy load from a local copy, run at their shots, and score as stock lm-eval scores them."""
    data = Path(os.environ.get("NANOPHI_SHARED", Path(nanophi.__file__).parent.parent / "shared")) / "benchmarks"
    if not data.is_dir():
        pytest.skip(f"no copy of the benchmarks in {data}")
    folder = make_model(0, max_position_embeddings=320)
    # One MMLU subject stands for the 57: they differ in nothing but the data.
    entries = [entry for entry in SUITES["open-llm-v1"].entries if entry.task != "mmlu"]
    entries.append(dataclasses.replace(SUITES["open-llm-v1"].entries[2], task="mmlu_anatomy"))
    network, tokenizer, _ = load_model(folder)
    stock = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=4)
    ours = ScorerLM(network, tokenizer)
    loaded = load_suite(Suite("all", tuple(entries)), data=data)
    shots = {name: task.config.num_fewshot for name, task in loaded.tasks.items()}
    assert shots == {entry.task: entry.shots for entry in entries}
    for name, task in loaded.tasks.items():
        indices = sample_of_items(task, 1 if name == "gsm8k" else 3)
        found, expected = (measuring.run_task(lm, name, task, indices) for lm in (ours, Stock(stock)))
        assert found["task_hashes"] == expected["task_hashes"]
        for a, b in zip(found["samples"][name], expected["samples"][name], strict=True):
            values = [[sample[metric] for metric in sample["metrics"]] for sample in (a, b)]
            assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert ours.overflowing > 20


class Stock:
    """Stock `HFLM` with the one attribute that `run_task` reads beside lm-eval's own."""

    def __init__(self, lm):
        self.lm, self.overflowing = lm, 0

    def __getattr__(self, name):
        return getattr(self.lm, name)


def test_killed_evaluation_goes_on(model, heldout, tmp_path, monkeypatch):
    output, ran = tmp_path / "evals/m-heldout.json", []
    original = measuring.run_task

    def dies_at_the_second(lm, name, *rest):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(name)
        return original(lm, name, *rest)

    monkeypatch.setattr(measuring, "run_task", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        measure(model, "heldout", output, heldout=heldout, limit=8)
    assert not output.exists()
    parts = shutil.copytree(output.with_name(f".{output.name}.partial"), tmp_path / ".other.json.partial")
    monkeypatch.setattr(measuring, "run_task", lambda lm, name, *rest: ran.append(name) or original(lm, name, *rest))
    lines: list[str] = []
    found = measure(model, "heldout", output, heldout=heldout, limit=8, report=lines.append)
    assert ran == ["heldout_bits_per_byte", "heldout_continuation", "heldout_order"]
    assert "1 of 3 tasks were finished before" in lines
    assert parts.exists() and measure(model, "heldout", tmp_path / "other.json", heldout=heldout, limit=6)
    assert len(ran) == 6, "the parts of another limit are not used"
    monkeypatch.undo()
    again = measure(model, "heldout", tmp_path / "again.json", heldout=heldout, limit=8)
    assert again["results"] == found["results"] and again["samples"] == found["samples"]
    assert measure(model, "heldout", output, heldout=heldout, limit=8, report=lines.append) == found
    assert lines[-1] == f"{output.name} is up to date"


def test_limit_is_a_fixed_sample_spread_over_the_task(model, benchmarks, heldout):
    task = load_suite(find_suite("arc_easy"), data=benchmarks).tasks["arc_easy"]
    few, more = sample_of_items(task, 10), sample_of_items(task, 40)
    assert few is not None and more is not None and set(few) < set(more) and few == sorted(few)
    assert max(few) > 60
    assert sample_of_items(task, 120) is None


def test_heldout_items_are_sound(heldout):
    loaded = load_suite(find_suite("heldout"), heldout=heldout)
    texts = {doc["id"]: doc["text"] for doc in loaded.tasks["heldout_bits_per_byte"].eval_docs}
    for name in ("heldout_continuation", "heldout_order"):
        docs = list(loaded.tasks[name].eval_docs)
        assert len(docs) > 40
        assert len({doc["gold"] for doc in docs}) == 4, "the right answer takes every position"
        for doc in docs:
            assert len(set(doc["choices"])) == 4
            follows = [(doc["context"] + choice) in " ".join(texts[doc["id"]].split()) for choice in doc["choices"]]
            assert follows[doc["gold"]] and sum(follows) == 1


def test_untrained_model_is_at_chance(make_model, heldout, benchmarks, tmp_path):
    model = make_model(5)
    tasks = "arc_easy,heldout_order,heldout_continuation"
    found = measure(model, tasks, tmp_path / "m.json", heldout=heldout, data=benchmarks)
    for score in leading_scores(found):
        assert abs(score.value - score.chance) < 3 * score.stderr, score


def test_the_meter_moves(make_model, benchmarks, tmp_path):
    """A model trained on a benchmark's test items for a while scores far above chance on it."""
    folder = make_model(3, hidden_size=64, intermediate_size=128)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    docs = load_suite(find_suite("arc_easy"), data=benchmarks).tasks["arc_easy"].eval_docs
    rows = []
    for doc in docs:
        answer = doc["choices"]["text"][doc["choices"]["label"].index(doc["answerKey"])]
        rows.append(tokenizer.encode(f"Question: {doc['question']}\nAnswer: {answer}"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    rng = random.Random(0)
    for _ in range(250):
        batch = rng.sample(rows, 24)
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch])
        network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = tmp_path / "trained"
    network.save_pretrained(trained)
    tokenizer.save_pretrained(trained)
    found = measure(trained, "arc_easy", tmp_path / "m.json", data=benchmarks)
    (score,) = leading_scores(found)
    assert score.value > 0.6 and score.value - 5 * score.stderr > score.chance


def checkpoint_of(folder, model, step):
    shutil.copytree(model, folder / f"checkpoints/step-{step:06d}")
    state = folder / f"checkpoints/step-{step:06d}/checkpoint.json"
    state.write_text(json.dumps({"step": step, "tokens_seen": 1000 * step}))


def test_curve_over_checkpoints_with_a_line_for_each_run(make_model, heldout, tmp_path):
    for step in (200, 100):
        checkpoint_of(tmp_path / "a/run", make_model(step), step)
    evals, runs = tmp_path / "evals", [str(tmp_path / name) for name in ("a/run", "b/run")]
    verb.evaluate(runs[:1], "heldout_order", None, heldout, evals, 8)
    (path,) = evals.glob("curve-*.json")
    points = read_json(path)["points"]
    assert [(point["run"], point["tokens_seen"]) for point in points] == [("run", 100_000), ("run", 200_000)]
    first = read_json(next(evals.glob("run-step-000100-*.json")))["results"]["heldout_order"]
    assert points[0]["scores"]["heldout_order"]["value"] == first["acc,none"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    checkpoint_of(tmp_path / "b/run", make_model(7), 100)
    verb.evaluate(runs, "heldout_order", None, heldout, evals, 8)
    (both,) = set(evals.glob("curve-*.json")) - {path}
    assert [point["run"] for point in read_json(both)["points"]] == ["a/run", "a/run", "b/run"]


def test_every_measurement_has_a_file_of_its_own(make_model, heldout, benchmarks, tmp_path):
    """Same folder name, other suite, other limit, other dtype, other shots: nothing is replaced."""
    for number in (1, 2):
        shutil.copytree(make_model(number), tmp_path / f"m{number}/release")
    lines: list[str] = []
    models, folder = [tmp_path / "m1/release", tmp_path / "m2/release"], tmp_path / "evals"

    def measure_again(suite, output=folder, limit=4, models=models[:1], **options):
        options |= {"heldout": heldout, "data": benchmarks, "report": lines.append}
        for model in models:
            measure(model, suite, output, limit=limit, **options)

    measure_again("heldout_order", models=models)
    measure_again("heldout_order", limit=5)
    measure_again("heldout_order", dtype="bfloat16")
    measure_again("arc_easy")
    measure_again("arc_easy:2")
    names = [re.sub("-[0-9a-f]{8}.json", "", path.name) for path in folder.glob("*.json")]
    expected = ["arc_easy", "arc_easy-2", *["heldout_order"] * 3]
    assert sorted(names) == [*(f"m1-release-{suite}" for suite in expected), "m2-release-heldout_order"]
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))
    measure_again("heldout_order")
    assert "is up to date" in lines[-1] and len(list(folder.glob("*.json"))) == 6
    for limit in (4, 5):
        measure_again("heldout_order", tmp_path / "result.json", limit)
    assert "result.json holds another measurement, which this one will replace" in lines


def test_a_named_file_is_of_one_model_and_of_this_command(make_model, heldout, tmp_path, monkeypatch, capsys):
    """Two models get a file each beside one another; a file of another command or model is left alone."""
    monkeypatch.chdir(tmp_path)
    models = [str(make_model(seed)) for seed in (21, 22)]

    def run(*arguments):
        options = ["--suite", "heldout_order", "--heldout", str(heldout), "--limit", "4"]
        monkeypatch.setattr("sys.argv", ["nanophi", "eval", *arguments, *options])
        with pytest.raises(SystemExit) as stopped:
            main()
        return str(stopped.value.code or "")

    assert not run(*models, "--output", "both.json")
    names = sorted(path.name for path in tmp_path.glob("*.json"))
    assert [name[:-14] for name in names] == ["both-model-21", "both-model-22"]
    assert {read_result(tmp_path / name)["nanophi"]["model"]["name"] for name in names} == {"model-21", "model-22"}
    own = {"package.json": '{"nanophi": "my own", "lines": 1}', "notes.json": "not JSON", "one.json": None}
    assert not run(models[0], "--output", "one.json")
    for name, text in own.items():
        text = text or (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        assert f"{name} was not written by `nanophi eval {models[1]}`" in run(models[1], "--output", name)
        assert (tmp_path / name).read_text() == text
    assert not run(models[0], "--output", "one.json")
    for name in ("notes.json/of-tasks", "notes.json/a.json"):
        assert f"{name} cannot be written; choose another name for the output" in run(models[0], "--output", name)


@pytest.mark.parametrize(
    ("value", "stderr", "items", "expected"),
    [
        (0.33, 0.02, 500, "above"),
        (0.28, 0.02, 500, "within"),
        (0.17, 0.02, 500, "below"),
        (0.0, 0.0, 8, "within"),  # eight wrong answers, by chance in one of ten
        (0.0, 0.0, 20, "below"),
        (0.5, 0.1, 8, "within"),
        (1.0, None, 1, "within"),
    ],
)
def test_scores_against_chance(value, stderr, items, expected, result):
    score = dataclasses.replace(leading_scores(result)[1], value=value, stderr=stderr, items=items)
    assert score.chance == 0.25 and score.against_chance == expected
    assert dataclasses.replace(score, chance=None).against_chance is None


@pytest.mark.parametrize(
    ("suite", "problem"),
    [
        ("of-mine.yaml", "'of-mine.yaml' is a file; tasks are named, not read from YAML"),
        ("heldoot", "unknown suite or task 'heldoot'; did you mean 'heldout'"),
        ("arc-easyy", "unknown suite or task 'arc_easyy'; did you mean .*'arc_easy'"),
        ("hellaswag", "task 'hellaswag' needs the dataset Rowan/hellaswag, which is not in .*looked for .*hellaswag"),
        ("heldout", "needs held-out documents"),
    ],
)
def test_bad_suites(suite, problem, model, benchmarks, tmp_path):
    with pytest.raises(UserError, match=problem):
        measure(model, suite, tmp_path / "m.json", data=benchmarks)
    assert not list(tmp_path.iterdir())


def test_bad_models(model, make_model, benchmarks, heldout, tmp_path, tokenizer):
    def problem(broken, suite="arc_easy", **options):
        with pytest.raises(UserError) as error:
            measure(broken, suite, tmp_path / "m.json", data=benchmarks, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in problem(tmp_path / "nothing")
    assert "no config.json" in problem(tmp_path)
    encoder = tmp_path / "encoder"
    transformers.T5Config(d_model=8, num_layers=1, num_heads=1, vocab_size=512).save_pretrained(encoder)
    assert "'t5' is not a causal language model" in problem(encoder)
    small = make_model(9, vocab_size=300)
    assert "the tokenizer has 448 tokens but the weights only 300 rows" in problem(small)
    unloadable = tmp_path / "unloadable"
    shutil.copytree(model, unloadable)
    (unloadable / "model.safetensors").write_bytes(b"nonsense")
    assert f"cannot load {unloadable}" in problem(unloadable)
    damaged = transformers.AutoModelForCausalLM.from_pretrained(model)
    damaged.lm_head.bias.data.fill_(math.nan)
    damaged.save_pretrained(tmp_path / "damaged")
    tokenizer.save_pretrained(tmp_path / "damaged")
    assert "not finite numbers; its weights are damaged" in problem(tmp_path / "damaged")
    assert "dtype 'float8' is not one of" in problem(model, dtype="float8")
    narrow = make_model(11, max_position_embeddings=24)
    longest = "task 'heldout_continuation': an answer has [0-9]+ tokens, too many for a context of 24 tokens"
    assert re.match(longest, problem(narrow, "heldout_continuation", heldout=heldout))
    assert not (tmp_path / "m.json").exists()
