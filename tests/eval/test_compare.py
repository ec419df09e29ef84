"""Comparison: tests against scipy and simulation, and no verdict where there is only noise."""

import copy
import hashlib
import json
import math
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from lm_eval.api import metrics as lm_metrics

from nanophi.cli import main
from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.eval.catalogue import LEADERBOARD, TASKS, references
from nanophi.eval.compare import (
    TABLES,
    Measured,
    _answered,
    _paired,
    compare_models,
    find_label,
    label_results,
    recompute,
    unsupported,
)
from nanophi.eval.models import model_sha256
from nanophi.eval.render import to_text
from nanophi.eval.results import ANSWER_METRIC, FORMAT
from nanophi.eval.statistics import bits_per_byte_stderr, holm
from nanophi.eval.tasks import heldout
from nanophi.model_card.card import differences
from nanophi.model_card.consistency import _underived, scores


def result(path, scores, *, task="arc_easy", metric=None, chance=0.25, shots=0, prompts="p", sources=None, model=None,
           value=None, answers=None, identity=None, **fields):  # fmt: skip
    """A result file with these scores per item, or per leaf task and item, of a model named like the file.

    `sources` and `answers` (bits per byte of the right answers) are per item; `value` is the score where it is not the
    mean of the items.
    """
    leading = TASKS[task].metric if task in TASKS else "acc,none"
    metric, filter_name = (metric, "none") if metric else leading.split(",")
    pairs = metric == "bits_per_byte"
    of_leaf = scores if isinstance(scores, dict) else {task: scores}
    content = {key: {} for key in ("results", "samples", "n-shot", "n-samples", "higher_is_better")}
    for leaf, items in of_leaf.items():
        content["samples"][leaf] = samples = [
            {"doc_id": i, "doc_hash": f"d{i}", "prompt_hash": f"{prompts}{i}", "filter": filter_name, metric: score}
            | {"source": sources[i] if sources else "s"}
            for i, score in enumerate(items)
        ]
        found, stderr = value, 0.01
        if value is None:
            values = np.array(items, dtype=float)
            found = -values[:, 0].sum() / values[:, 1].sum() / math.log(2) if pairs else float(values.mean())
            if len(items) > 1:
                stderr = bits_per_byte_stderr(*values.T) if pairs else scipy.stats.sem(values)
        content["results"][leaf] = {f"{metric},{filter_name}": found, f"{metric}_stderr,{filter_name}": stderr}
        if answers is not None:
            for sample, answer in zip(samples, answers, strict=True):
                sample[ANSWER_METRIC] = answer
            stderr = scipy.stats.sem(answers) if len(answers) > 1 else 0.1
            figures = {ANSWER_METRIC: np.mean(answers), f"{ANSWER_METRIC}_stderr": stderr}
            content["results"][leaf] |= {f"{name},none": figure for name, figure in figures.items()}
        content["n-shot"][leaf] = shots
        content["n-samples"][leaf] = {"effective": len(items), "original": len(items)}
        content["higher_is_better"][leaf] = {metric: not pairs, ANSWER_METRIC: False}
    identity = {"name": model or path.stem, "sha256": model or path.stem, "dtype": "float32"} | (identity or {})
    line = {task: {"tasks": list(of_leaf), "chance": chance}}
    content["nanophi"] = {"format": FORMAT, "suite": task, "lines": line, "model": identity, **fields}
    path.write_text(json.dumps(content | {"lm_eval_version": "0.4.13"}))
    return path


def bits(path, nats, sizes, sources=None, **fields):
    fields |= {"task": "heldout_bits_per_byte", "metric": "bits_per_byte", "chance": None}
    fields |= {"heldout": {"bits_per_byte": 1.0, "bz2": {"bits_per_byte": 2.25}}, "sources": sources}
    return result(path, np.stack([nats, sizes], axis=1).tolist(), **fields)


def approximately(value):
    if isinstance(value, dict):
        return {key: approximately(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [approximately(inner) for inner in value]
    return pytest.approx(value) if isinstance(value, float) else value


def unpadded(path):
    """A Markdown file without the spaces that align its tables."""
    return re.sub(" +", " ", path.read_text())


def test_better_is_found_and_noise_is_not(tmp_path):
    rng = np.random.default_rng(0)
    base = (rng.random(1000) < 0.4).astype(float)
    better = np.maximum(base, rng.random(1000) < 0.15)
    flips = rng.random(1000) < 0.1
    same = np.where(flips, rng.permutation(base), base)
    scores = {"better": better, "same": same, "control": base}
    files = {name: [result(tmp_path / f"{name}.json", values.tolist())] for name, values in scores.items()}
    comparison = compare_models(files, tmp_path / "out")
    assert comparison["baseline"] == "control"
    differences = comparison["tasks"]["arc_easy"]["differences"]
    assert differences["better"]["verdict"] == "better" and differences["better"]["p_corrected"] < 0.001
    assert differences["same"]["verdict"] == "within noise"
    low, high = differences["better"]["interval"]
    assert low < (better - base).mean() < high and low > 0
    assert differences["better"]["value"] == pytest.approx((better - base).mean())
    assert read_json(tmp_path / "out/comparison.json") == comparison
    assert "better (p < 0.001)" in to_text(comparison).replace("p = <", "p <")
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    markdown = unpadded(tmp_path / "out/comparison.md")
    assert "| ARC-Easy (acc, 0-shot) |" in markdown and "measured elsewhere" not in markdown


def test_bits_per_byte_by_source(tmp_path):
    """Paired within each source: one gets better, one worse, the rest is noise; small ones are put together."""
    rng = np.random.default_rng(5)
    sources = ["manual"] * 60 + ["code"] * 60 + ["prose"] * 60 + ["a", "b", "c"] * 7
    sizes = rng.integers(500, 5000, len(sources)).astype(float)
    control = -sizes * rng.normal(1.3, 0.3, len(sources))
    shift = np.array([{"manual": 0.03, "code": -0.03}.get(source, 0.0) for source in sources])
    ours = control + sizes * (shift + rng.normal(0, 0.02, len(sources)))
    files = {x: [bits(tmp_path / f"{x}.json", nats, sizes, sources)] for x, nats in (("a", ours), ("b", control))}
    comparison = compare_models(files, tmp_path)
    whole, rows = comparison["tasks"]["heldout_bits_per_byte"]["differences"]["a"], comparison["sources"]
    assert whole["value"] == pytest.approx((control - ours).sum() / sizes.sum() / math.log(2))
    assert list(_underived(comparison)) == []
    for table, task in (("sources", "manual"), ("tasks", "heldout_bits_per_byte")):
        turned = copy.deepcopy(comparison)
        turned[table][task]["differences"]["a"]["value"] *= -1
        assert len(list(_underived(turned))) == (1 if table == "sources" else 2), "not what the items give"
    documents = dict.fromkeys(("manual", "code", "prose"), 60) | {"other (3 sources)": 21}
    assert {name: row["documents"] for name, row in rows.items()} == documents
    verdicts = {name: row["differences"]["a"]["verdict"] for name, row in rows.items()}
    assert verdicts["manual"] == "better" and verdicts["code"] == "worse"
    assert rows["code"]["differences"]["a"]["value"] > 0
    assert verdicts["prose"] == verdicts["other (3 sources)"] == "within noise"
    of = np.array([source == "manual" for source in sources])
    exact = (control - ours)[of].sum() / sizes[of].sum() / math.log(2)
    difference = rows["manual"]["differences"]["a"]
    assert difference["value"] == pytest.approx(exact) and difference["interval"][0] < exact < difference["interval"][1]
    assert rows["manual"]["scores"]["b"]["value"] == pytest.approx(-control[of].sum() / sizes[of].sum() / math.log(2))
    corrected = holm([row["differences"]["a"]["p_value"] for row in rows.values()])
    assert [row["differences"]["a"]["p_corrected"] for row in rows.values()] == pytest.approx(corrected)
    assert "bz2 -9 on the same text" in to_text(comparison)
    markdown = unpadded(tmp_path / "comparison.md")
    assert "<summary>Held-out bits per byte by source</summary>" in markdown
    assert "| other (3 sources) | 21 |" in markdown


def test_noise_in_many_small_sources_stays_noise(tmp_path):
    """Documents of heavy-tailed size in sources as small as they may be: at most one comparison in twenty finds any."""
    rng = np.random.default_rng(6)
    sources = [f"source {i % 12}" for i in range(240)]
    found = 0
    for trial in range(60):
        sizes = np.ceil(rng.lognormal(6, 1, 240))
        nats = [-sizes * rng.normal(1.3, 0.2, 240) for _ in range(2)]
        files = {x: [bits(tmp_path / f"{x}.json", n, sizes, sources)] for x, n in zip("ab", nats, strict=True)}
        rows = _compare_quickly(files, tmp_path, trial, "sources")
        assert len(rows) == 12
        found += any(row["differences"]["a"]["verdict"] != "within noise" for row in rows.values())
    assert found <= 7  # of 60; 3 expected at most


def test_models_of_equal_quality_are_rarely_told_apart(tmp_path):
    """Under the null hypothesis at most one comparison in twenty finds a difference anywhere in it."""
    rng = np.random.default_rng(2)
    found = 0
    for trial in range(60):
        files: dict[str, list] = {"a": [], "b": []}
        for task in range(4):
            skill = rng.random(200) * 0.6
            for label in files:
                scores = (rng.random(200) < skill).astype(float).tolist()
                files[label].append(result(tmp_path / f"{label}{task}.json", scores, task=f"task{task}", model=label))
        rows = _compare_quickly(files, tmp_path, trial)
        found += any(row["differences"]["a"]["verdict"] != "within noise" for row in rows.values())
    assert found <= 7  # of 60; 3 expected at most, 8 or more in one of 60 runs


def _compare_quickly(files, folder, seed, table="tasks"):
    from unittest import mock

    with mock.patch("nanophi.eval.render.draw_comparison"), mock.patch("nanophi.eval.statistics.RESAMPLES", 500):
        return compare_models(files, folder, seed=seed)[table]


def test_only_items_with_the_same_prompt_are_paired(tmp_path):
    a = result(tmp_path / "a.json", [1.0] * 20)
    b = result(tmp_path / "b.json", [0.0] * 20, prompts="q")
    comparison = compare_models({"a": [a], "b": [b]}, tmp_path)
    assert comparison["tasks"]["arc_easy"]["differences"] == {}
    assert "no item with the same prompt" in comparison["notes"][0]
    c = result(tmp_path / "c.json", [0.0] * 12)
    comparison = compare_models({"a": [a], "c": [c]}, tmp_path)
    assert comparison["tasks"]["arc_easy"]["differences"]["a"]["items"] == 12
    assert comparison["notes"] == ["arc_easy: a and c are compared on the 12 items that both answered"]


def test_groups_count_by_their_unweighted_mean_and_show_their_parts(tmp_path):
    rng = np.random.default_rng(4)
    files = {}
    for label, skill in (("a", 0.5), ("b", 0.3)):
        scores = {f"mmlu_{x}": (rng.random(n) < skill).astype(float).tolist() for x, n in (("law", 400), ("art", 40))}
        files[label] = [result(tmp_path / f"{label}.json", scores, task="mmlu")]
    comparison = compare_models(files, tmp_path)
    row, parts = comparison["tasks"]["mmlu"], comparison["subjects"]["mmlu"]
    subjects = [parts[f"mmlu_{subject}"]["differences"]["a"]["value"] for subject in ("law", "art")]
    assert row["differences"]["a"]["value"] == pytest.approx(np.mean(subjects))
    assert row["differences"]["a"]["verdict"] == "better"
    markdown = (tmp_path / "comparison.md").read_text()
    assert "MMLU by subject" in markdown and "nano-phi-115M-v0.1" in markdown


def test_every_figure_follows_from_the_items_of_the_comparison(tmp_path):
    """All tables; models on other items, in another order, with repeated questions and a missing subject."""
    rng = np.random.default_rng(21)
    files: dict[str, list] = {"a": [], "b": [], "c": []}
    sizes = rng.integers(200, 900, 70).astype(float)
    sources = [("manual", "code", "rare")[min(i % 7, 2)] for i in range(70)]
    for number, label in enumerate(files):
        group = {leaf: rng.integers(0, 2, 30 - number).astype(float).tolist() for leaf in ("mmlu_x", "mmlu_y")}
        if label == "b":
            del group["mmlu_x"]
        found = [
            result(tmp_path / f"{label}-g.json", group, task="mmlu", shots=5, model=label),
            result(tmp_path / f"{label}-a.json", rng.integers(0, 2, 40).astype(float).tolist(), model=label,
                   answers=rng.gamma(2, 1, 40).tolist()),
            bits(tmp_path / f"{label}-h.json", -sizes * rng.normal(1.3, 0.2, 70), sizes, sources, model=label),
        ]  # fmt: skip
        for path in found:
            content = json.loads(path.read_text())
            for samples in content["samples"].values():
                for sample in samples[:4:2]:  # two questions that are the same
                    sample |= {"doc_hash": "twice", "prompt_hash": "twice"}
                if label != "c" and "acc" in samples[0]:
                    rng.shuffle(samples)
            path.write_text(json.dumps(content))
        files[label] = found
    comparison = compare_models(files, tmp_path / "out")
    again = recompute(read_json(tmp_path / "out/comparison.json"))
    assert {table: again[table] for table in TABLES} == approximately({table: comparison[table] for table in TABLES})
    group = comparison["tasks"]["mmlu"]["differences"]
    assert (group["a"]["items"], group["b"]["items"]) == (56, 28), "what both have, of all subjects"
    assert set(comparison["subjects"]["mmlu"]["mmlu_x"]["differences"]) == {"a"}
    turned = json.loads((tmp_path / "out/comparison.json").read_text())
    difference = turned["tasks"]["heldout_bits_per_byte"]["differences"]["a"]
    difference["value"] *= -1
    assert recompute(turned)["tasks"] == approximately(comparison["tasks"]) != approximately(turned["tasks"])
    shipped = {"recipe.yaml": {"name": "a"}, "comparison.json": read_json(tmp_path / "out/comparison.json")}
    shipped |= {f"evals/{path.stem}.json": read_json(path) for path in files["a"]}
    assert list(_underived(shipped["comparison.json"])) == []
    assert scores(shipped) == ([], "5 of 5 computed again from the items in comparison.json")
    shipped["evals/a-g.json"]["results"]["mmlu_x"]["acc,none"] += 0.01  # a subject that the card does not show
    assert re.match(r"mmlu_x has acc [\d.]+, its items give ", *scores(shipped)[0])
    for table, part, key, value in (
        ("tasks", "scores", "stderr", 0.0), ("answers", "differences", "interval", [0.1, 0.2]),
        ("tasks", "scores", "items", 9), ("sources", "differences", "value", 0.5),
    ):  # fmt: skip
        forged = read_json(tmp_path / "out/comparison.json")
        for row in list(forged[table].values())[:1]:
            row[part]["a"][key] = value
            assert any(f"with {key} {value}, its items give" in line for line in _underived(forged))
    del turned["items"], shipped["comparison.json"]["items"]
    assert recompute(turned) is None, "a comparison of an earlier version"
    assert scores(shipped) == ([], "5, as in lm-eval's results; their items are not shipped, for their size")


@pytest.mark.parametrize("items", [1, 2, 8])
def test_few_items_have_no_interval_without_width(items, tmp_path):
    """Also where nothing changed, or everything in one direction; of one text's bits per byte it is unknown."""
    for theirs in (0.0, 1.0):
        scores = {"a": [1.0] * items, "b": [theirs] * items}
        files = {x: [result(tmp_path / f"{x}.json", y, answers=[0.5] * items)] for x, y in scores.items()}
        comparison = compare_models(files, tmp_path / "out")
        low, high = comparison["tasks"]["arc_easy"]["differences"]["a"]["interval"]
        assert -1 <= low < 1 - theirs <= high <= 1 and high - low > 0.1
        answers = comparison["answers"]["arc_easy"]["differences"]["a"]
        assert answers["interval"] is None and re.search(r" \+0\.0000 +detectable - ", to_text(comparison))


def test_bad_input(tmp_path):
    good = result(tmp_path / "good.json", [1.0, 0.0])

    def problem(files, **options):
        with pytest.raises(UserError) as error:
            compare_models(files, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    (tmp_path / "old.json").write_text(good.read_text().replace(f'"format": {FORMAT}', '"format": 0'))
    assert "has format 0, this version reads 2 and 3" in problem({"a": [tmp_path / "old.json"]})
    (tmp_path / "other.json").write_text("{}")
    assert "is not a result of `nanophi eval`" in problem({"a": [tmp_path / "other.json"]})
    assert "is missing" in problem({"a": [tmp_path / "nowhere.json"]})
    assert "baseline 'c' is not one of a" in problem({"a": [good]}, baseline="c")
    shots = result(tmp_path / "shots.json", [1.0, 0.0], shots=5)
    assert "arc_easy was not measured alike (a: 0-shot acc, b: 5-shot acc)" in problem({"a": [good], "b": [shots]})
    assert "'a' holds results of 2 different models (good, shots)" in problem({"a": [good, shots]})
    assert "nothing to compare" in problem({})


def test_published_scores_add_up_and_name_their_sources():
    published = references()
    assert len(published["models"]) == 9
    for model in published["models"]:
        assert np.mean(list(model["scores"].values())) == pytest.approx(model["average"], abs=0.011)
        assert set(model["scores"]) == set(published["metrics"]) and model["source"]


def test_unlike_shots_have_rows_of_their_own(tmp_path):
    rng = np.random.default_rng(7)
    files = {
        label: [
            result(tmp_path / f"{label}-w.json", rng.integers(0, 2, 30).astype(float).tolist(), task="winogrande",
                   shots=shots, model=label, prompts=f"p{shots}"),
            result(tmp_path / f"{label}-a.json", rng.integers(0, 2, 30).astype(float).tolist(), model=label),
        ]
        for label, shots in (("a", 5), ("b", 0), ("c", 0))
    }  # fmt: skip
    comparison = compare_models(files, tmp_path)
    tasks = comparison["tasks"]
    assert set(tasks) == {"arc_easy", "winogrande:5", "winogrande:0"}
    assert set(tasks["winogrande:5"]["scores"]) == {"a"} and not tasks["winogrande:5"]["differences"]
    assert set(tasks["winogrande:0"]["differences"]) == {"b"} and set(tasks["arc_easy"]["differences"]) == {"a", "b"}
    (note,) = comparison["notes"]
    assert note.startswith("winogrande was not measured alike (a: 5-shot acc, b: 0-shot acc, c: 0-shot acc); only")
    text = to_text(comparison)
    assert "Winogrande (acc, 5-shot)" in text and "Winogrande (acc, 0-shot)" in text and note in text


def test_two_results_of_a_model_count_once_and_a_note_says_which(tmp_path):
    few, many = (result(tmp_path / f"{n}.json", [1.0, 0.0] * n, model="m") for n in (20, 50))
    comparison = compare_models({"m": [few, many], "other": [result(tmp_path / "o.json", [0.0, 1.0] * 50)]}, tmp_path)
    assert comparison["tasks"]["arc_easy"]["scores"]["m"]["items"] == 100
    assert comparison["notes"] == ["arc_easy: m has several results; the one on 100 items counts"]


def test_recited_text_makes_no_other_claim_harder_to_support(tmp_path):
    rng = np.random.default_rng(0)
    files = {"a": [], "b": []}
    for task in ("arc_easy", "sciq", "memorisation_train", "memorisation_heldout"):
        for label, share in (("a", 0.4), ("b", 0.6)):
            scores = (rng.random(80) < share).tolist()
            files[label].append(result(tmp_path / f"{label}-{task}.json", scores, task=task, model=label))
    two, four = (
        compare_models({label: paths[:count] for label, paths in files.items()}, tmp_path / str(count), report=str)
        for count in (2, 4)
    )
    corrected = [
        {task: row["differences"]["a"]["p_corrected"] for task, row in x["tasks"].items()} for x in (two, four)
    ]
    assert len(corrected[1]) == 4 and {task: corrected[1][task] for task in corrected[0]} == corrected[0]


def test_labels_tell_models_apart_and_suites_of_one_model_together(tmp_path):
    def file(name, model, sha256, dtype="float32", task="arc_easy"):
        identity = {"name": model, "sha256": sha256, "dtype": dtype}
        return result(tmp_path / f"{name}.json", [1.0, 0.0], task=task, identity=identity)

    one, two = file("1", "a/release", "1" * 64), file("2", "a/release", "2" * 64)
    other_suite = file("3", "a/release", "1" * 64, task="hellaswag")
    rounded, alone = file("4", "b", "3" * 64, "bfloat16"), file("5", "c", "4" * 64)
    labelled = label_results([one, two, other_suite, rounded, file("6", "b", "3" * 64), alone])
    assert labelled == {
        "a/release (11111111)": [one, other_suite],
        "a/release (22222222)": [two],
        "b bfloat16": [rounded],
        "b float32": [tmp_path / "6.json"],
        "c": [alone],
    }
    assert find_label(labelled, str(two)) == "a/release (22222222)" == find_label(labelled, "a/release (22222222)")
    assert find_label(labelled, "nobody") == "nobody" and find_label(labelled, None) is None
    comparison = compare_models(labelled, tmp_path / "out", baseline=find_label(labelled, str(one)))
    assert comparison["baseline"] == "a/release (11111111)" and not comparison["notes"]
    with pytest.raises(UserError, match=r"1\.json is named twice"):
        label_results([one, one])
    (tmp_path / "curve-quick-1a2b3c4d.json").write_text('{"format": 2, "points": []}')
    assert label_results([one, tmp_path / "curve-quick-1a2b3c4d.json"]) == {"a/release": [one]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no results"):
        label_results([tmp_path / "empty"])


def test_run_directories_of_one_name_and_a_result_of_other_weights(tmp_path):
    for place in ("x", "y"):
        run = tmp_path / place / "demo"
        for step in (1, 2):
            checkpoint = run / f"checkpoints/step-{step:06d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "model.safetensors").write_text(f"{place}{step}")
            (run / "evals").mkdir(exist_ok=True)
            path = result(run / f"evals/step-{step:06d}-quick.json", [1.0, 0.0], model=model_sha256(checkpoint))
    labelled = label_results([tmp_path / "x/demo", tmp_path / "y/demo"])
    assert labelled == {
        f"{place}/demo": [tmp_path / place / "demo/evals/step-000002-quick.json"] for place in ("x", "y")
    }
    assert compare_models(labelled, tmp_path / "out")["baseline"] == "y/demo"
    (checkpoint / "model.safetensors").write_text("trained again")
    with pytest.raises(UserError, match=rf"{path} was measured on other weights than .*step-000002"):
        label_results([tmp_path / "x/demo", tmp_path / "y/demo"])


def test_right_answers_are_compared_beside_the_scores(tmp_path):
    """A shift that accuracy does not show, in a table that is corrected by itself."""
    rng = np.random.default_rng(8)
    base = rng.gamma(2, 1, 200)
    shifted = base - 0.1 + rng.normal(0, 0.2, 200)
    scores = [float(i % 4 == 0) for i in range(200)]
    files = {x: [result(tmp_path / f"{x}.json", scores, answers=y.tolist())] for x, y in (("a", shifted), ("b", base))}
    comparison = compare_models(files, tmp_path)
    difference = comparison["answers"]["arc_easy"]["differences"]["a"]
    assert difference["value"] == pytest.approx((shifted - base).mean()) and difference["verdict"] == "better"
    assert difference["p_value"] >= scipy.stats.ttest_rel(shifted, base).pvalue
    stderr = np.std(shifted - base, ddof=1) / math.sqrt(200)
    assert difference["minimum_detectable_effect"] == pytest.approx(2.82 * stderr, rel=0.05)
    assert comparison["tasks"]["arc_easy"]["differences"]["a"]["verdict"] == "within noise"
    # Nobody answered anything differently: at least six items would have to change before the test could tell.
    assert comparison["tasks"]["arc_easy"]["differences"]["a"]["minimum_detectable_effect"] == 6 / 200
    assert "ARC-Easy (right answer, bits per byte, 0-shot) ↓" in to_text(comparison)
    assert "## Right answers, bits per byte" in (tmp_path / "comparison.md").read_text()


def test_an_effect_of_the_detectable_size_is_mostly_detected(tmp_path):
    """Accuracies whose true difference is what a first comparison called detectable: found in about 4 of 5."""
    rng = np.random.default_rng(9)

    def pair(gain, loss, folder, number):
        draws = rng.random(400)
        scores = {"a": (draws < gain + 0.2), "b": (draws > 1 - loss) | (draws < 0.2)}
        return {x: [result(folder / f"{x}{number}.json", y.astype(float).tolist())] for x, y in scores.items()}

    row = _compare_quickly(pair(0.1, 0.1, tmp_path, 0), tmp_path, 0)["arc_easy"]["differences"]["a"]
    effect = row["minimum_detectable_effect"]
    found = [
        _compare_quickly(pair(0.1 + effect / 2, 0.1 - effect / 2, tmp_path, 1), tmp_path, i)["arc_easy"]
        for i in range(80)
    ]
    share = np.mean([one["differences"]["a"]["verdict"] == "better" for one in found])
    assert 0.6 < share < 0.95


def made_of_all_items():
    """Metric -> items of two models, and lm-eval's own aggregation of them."""
    rng = np.random.default_rng(10)
    nats = -rng.gamma(2, 1, 60)
    gold = rng.integers(0, 2, 60)
    answers = [gold, np.where(rng.random(60) < 0.3, 1 - gold, gold)]
    texts = ("the red one was here", "the blue one was there")
    words = [(texts[0], texts[i % 2]) for i in range(60)]
    sizes = rng.integers(5, 50, 60)
    correct = [list(zip(gold.tolist(), one.tolist(), strict=True)) for one in answers]
    return {
        "perplexity": ([nats.tolist(), (2 * nats).tolist()], lm_metrics.perplexity),
        "word_perplexity": (
            [list(zip(one.tolist(), sizes.tolist(), strict=True)) for one in (nats, 2 * nats)],
            lm_metrics.weighted_perplexity,
        ),
        "mcc": (correct, lm_metrics.matthews_corrcoef),
        "f1": (correct, lm_metrics.f1_score),
        "bleu": ([words, [(a, a) for a, _ in words]], lm_metrics.bleu),
    }


@pytest.mark.parametrize("metric", made_of_all_items())
def test_scores_of_all_items_together_are_shown_and_not_compared(metric, tmp_path):
    items, aggregate = made_of_all_items()[metric]
    values = [float(aggregate(one)) for one in items]
    assert values[0] != pytest.approx(values[1])
    files = {}
    for label, one, value in zip("ab", items, values, strict=True):
        scored = result(tmp_path / f"{label}.json", one, task="t", metric=metric, chance=None, value=value, model=label)
        both = result(tmp_path / f"{label}-acc.json", [1.0, 0.0] * 30, model=label)
        files[label] = [scored, both]
    comparison = compare_models(files, tmp_path / "out")
    row = comparison["tasks"]["t"]
    assert [row["scores"][label]["value"] for label in "ab"] == values and row["differences"] == {}
    assert comparison["notes"] == [f"t: models are not compared, because {metric} is not a mean over items"]
    assert comparison["notes"][0] in to_text(comparison)
    assert set(comparison["tasks"]["arc_easy"]["differences"]) == {"a"}
    shown = "\n".join([to_text(comparison), (tmp_path / "out/comparison.md").read_text()])
    assert shown.count(f"t ({metric}, 0-shot)") == 2, "in the tables of scores, not in those of differences"
    assert set(differences(comparison)["a"][0]) and len(differences(comparison)["a"]) == 1
    # Alone or with nothing else in it, too.
    alone = compare_models({label: paths[:1] for label, paths in files.items()}, tmp_path / "alone")
    assert differences(alone) == {} and (tmp_path / "alone/comparison.png").exists()


def test_a_group_of_bits_per_byte_has_rows_for_its_parts(tmp_path):
    rng = np.random.default_rng(11)
    parts = {"one": rng.integers(20, 60, 30), "two": rng.integers(20, 60, 40)}
    files, expected = {}, {}
    for label, factor in (("a", 1.0), ("b", 1.1)):
        nats = {leaf: -factor * sizes * rng.normal(1.3, 0.01, len(sizes)) for leaf, sizes in parts.items()}
        expected[label] = {leaf: -nats[leaf].sum() / sizes.sum() / math.log(2) for leaf, sizes in parts.items()}
        pairs = {x: list(zip(nats[x].tolist(), sizes.tolist(), strict=True)) for x, sizes in parts.items()}
        files[label] = [result(tmp_path / f"{label}.json", pairs, task="texts", metric="bits_per_byte", chance=None)]
    comparison = compare_models(files, tmp_path / "out")
    rows = comparison["subjects"]["texts"]
    found = {leaf: {label: s["value"] for label, s in row["scores"].items()} for leaf, row in rows.items()}
    assert found == {leaf: {x: pytest.approx(expected[x][leaf]) for x in "ab"} for leaf in parts}
    assert {row["differences"]["a"]["verdict"] for row in rows.values()} == {"better"}
    assert comparison["tasks"]["texts"]["differences"]["a"]["verdict"] == "better"


@pytest.mark.parametrize("items", [1, 2, 4])
def test_groups_of_few_items_each_are_told_apart_as_often_as_chance_says(items, monkeypatch):
    """57 subjects of models of equal quality: a difference in 5 of 100 comparisons, and a true one is found."""
    monkeypatch.setattr("nanophi.eval.statistics.RESAMPLES", 500)
    rng = np.random.default_rng(12)

    def p_value(effect):
        skill = 0.1 + 0.5 * rng.random((57, items))
        scores = []
        for more in (effect, 0.0):
            right = (rng.random(skill.shape) < skill + more).astype(float)
            scores.append(Measured(None, {str(subject): row for subject, row in enumerate(right)}))
        entry, _ = _paired(scores[0], scores[1], rng)
        low, high = entry["interval"]
        quantile = scipy.stats.t.isf(0.025, entry["freedom"])
        assert high - low == pytest.approx(2 * quantile * entry["stderr"], rel=0.15)
        return entry["p_value"]

    found = np.mean([p_value(0.0) < 0.05 for _ in range(600)])
    assert 0.02 <= found <= 0.08
    assert np.mean([p_value(0.35) < 0.05 for _ in range(40)]) > 0.8


def test_few_items_that_all_changed_prove_little(tmp_path):
    """Two tasks of two items, one model right on all four and the other on none: as four heads of a coin."""
    files = {
        label: [result(tmp_path / f"{label}.json", {"one": [score] * 2, "two": [score] * 2}, task="both")]
        for label, score in (("a", 1.0), ("b", 0.0))
    }
    difference = compare_models(files, tmp_path / "out")["tasks"]["both"]["differences"]["a"]
    assert difference["value"] == 1 and difference["p_value"] == pytest.approx(2 * 0.5**4)
    assert difference["verdict"] == "within noise" and difference["interval"][0] < difference["interval"][1] == 1
    assert difference["minimum_detectable_effect"] is None, "six of four items would have to change"
    assert "detectable -" in to_text(read_json(tmp_path / "out/comparison.json"))


@pytest.mark.parametrize("items", [1, 4, 200])
def test_the_average_is_tested_with_the_variances_of_its_tasks(items, tmp_path):
    rng = np.random.default_rng(13)
    files: dict[str, list] = {"a": [], "b": []}
    changes = []
    for task, shots in LEADERBOARD.items():
        scores = {label: rng.integers(0, 2, items).astype(float) for label in files}
        changes.append(scores["a"] - scores["b"])
        for label, one in scores.items():
            path = tmp_path / f"{label}-{task}.json"
            files[label].append(result(path, one.tolist(), task=task, shots=shots, model=label))
    difference = compare_models(files, tmp_path / "out")["tasks"]["average"]["differences"]["a"]
    assert difference["value"] == pytest.approx(np.mean([change.mean() for change in changes]))
    if items == 1:
        expected = scipy.stats.sem(np.concatenate(changes))
        p_value = scipy.stats.ttest_1samp(np.concatenate(changes), 0).pvalue
    else:
        expected = np.sqrt(sum(scipy.stats.sem(change) ** 2 for change in changes)) / 6
        p_value = 2 * scipy.stats.norm.sf(abs(difference["value"]) / expected)
    assert difference["stderr"] == pytest.approx(expected, rel=0.03)
    assert p_value <= difference["p_value"] < p_value + 0.2  # the bootstrap of few items has ties at zero


def test_names_are_not_markup(tmp_path):
    names = ("<script>x</script>|y", "a`*b*")
    compare_models({x: [result(tmp_path / f"{n}.json", [1.0, 0.0])] for n, x in enumerate(names)}, tmp_path)
    markdown = (tmp_path / "comparison.md").read_text()
    assert "<script>" not in markdown.replace("\\<", "") and "\\|y" in markdown


def test_a_comparison_of_other_models_is_replaced_with_a_word(tmp_path):
    files = {name: [result(tmp_path / f"{name}.json", [1.0, 0.0])] for name in "abc"}
    lines: list[str] = []
    for labels, baseline in (("ab", None), ("ab", None), ("ac", None), ("ac", "a")):
        compare_models({x: files[x] for x in labels}, tmp_path / "out", baseline=baseline, report=lines.append)
    assert [line.split("comparison of ")[1][:4] for line in lines] == ["a, b", "a, c"]


def test_the_command_takes_a_label_or_a_path_as_baseline(tmp_path, monkeypatch, capsys):
    files = [str(result(tmp_path / f"{name}.json", [1.0, 0.0])) for name in "ab"]
    for baseline, expected in (("a", "b against a"), (files[1], "a against b"), (None, "a against b")):
        arguments = ["compare", *files, "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["nanophi", *arguments, *(["--baseline", baseline] if baseline else [])])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code and expected in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["nanophi", "compare", *files, "--baseline", "c"])
    with pytest.raises(SystemExit, match="baseline 'c' is not one of a, b"):
        main()


@pytest.mark.parametrize(
    ("ours", "claim", "status", "missing"),
    [
        ([0.9], "better", None, ""),
        ([0.9], "not-worse", None, ""),
        ([0.5], "better", 3, "a is better at none of 1 tasks; the baseline is b"),
        ([0.5], "not-worse", None, ""),
        ([0.1], "not-worse", 3, "a is worse at ARC-Easy; the baseline is b"),
        ([0.9, 0.1], "better", 3, "a is worse at HellaSwag; the baseline is b"),
        ([0.9, 0.5], "better", None, ""),
        (None, "not-worse", 3, "better at none of 0 tasks"),
    ],
)
def test_a_script_is_told_whether_a_claim_is_supported(ours, claim, status, missing, tmp_path, monkeypatch, capsys):
    """By the exit status and one line; the JSON on standard output is that of `comparison.json`."""
    items = np.arange(60)
    for name, shares in (("a", ours or [0.5]), ("b", [0.5, 0.5][: len(ours or [0.5])])):
        (tmp_path / name).mkdir()
        for task, share in zip(("arc_easy", "hellaswag"), shares, strict=False):
            right = ((7 * items) % 60 < 60 * share).astype(float).tolist()
            prompts = "p" if ours else name  # without items in common there is nothing to compare
            result(tmp_path / name / f"{task}.json", right, task=task, model=name, prompts=prompts)
    command = ["compare", "a", "b", "--require", claim, "--json", "--output", "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nanophi", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert (stopped.value.code or None) == status
    assert missing in printed.err and (f"--require {claim}: " in printed.err) == bool(missing)
    written = read_json(tmp_path / "out/comparison.json")
    assert json.loads(printed.out) == {key: value for key, value in written.items() if key != "items"}


def test_what_is_recited_and_a_model_alone_support_no_claim():
    difference = {"a": {"verdict": "better"}}
    comparison = {"labels": ["a", "b"], "baseline": "b"}
    recited = {"memorisation_train": {"task": "memorisation_train", "num_fewshot": 0, "differences": difference}}
    assert "none of 0 tasks" in str(unsupported({**comparison, "tasks": recited}, "better"))
    assert unsupported({"labels": ["b"], "baseline": "b", "tasks": {}}, "not-worse") == "there is only one model"


def test_heldout_text_is_told_apart_by_the_filter_of_a_run(tmp_path):
    """A filtered model may lose on all text and win on what its filter keeps: the comparison tells both."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(200, 400, 120)
    kept = rng.random(120) < 0.3
    nats = -0.9 * sizes * np.exp(rng.normal(0, 0.1, 120))
    ours = nats * np.where(kept, 0.9, 1.1) * (1 + rng.normal(0, 0.01, 120))
    ids = sorted((f"{value:016x}" for value in range(120)), key=lambda key: hashlib.sha256(key.encode()).digest())
    run = tmp_path / "filtered"
    for folder in ("evals", "data/quality", "data/documents"):
        (run / folder).mkdir(parents=True)
    columns = {"id": ids, "source": ["s"] * 120, "text": [f"text {key}" for key in ids]}
    pq.write_table(pa.table(columns).take(rng.permutation(120)), run / "data/documents/heldout-00000.parquet")
    order = rng.permutation(120)
    scores = pa.table({"id": ids, "quality_score": kept * 0.5, "kept": kept}).take(order)
    pq.write_table(scores, run / "data/quality/heldout.parquet")
    hashes = [heldout.doc_hash({"id": key, "source": "s", "text": f"text {key}"}) for key in ids]
    one, two = bits(run / "evals" / "a.json", ours, sizes), bits(tmp_path / "c.json", nats, sizes)
    for path in (one, two):  # neither the number of a document nor the order of the file decides which it is
        content = json.loads(path.read_text())
        samples = content["samples"]["heldout_bits_per_byte"]
        for number, hashed in zip(rng.permutation(120), hashes, strict=True):
            samples[hashes.index(hashed)] |= {"doc_id": int(number), "doc_hash": hashed, "prompt_hash": hashed}
        samples.append({**samples[0], "doc_hash": "of another run", "prompt_hash": "of another run"})
        path.write_text(json.dumps(content))
    files = {"ours": [one], "control": [two]}
    found = compare_models(files, tmp_path / "out")
    assert recompute(found)["filter"] == approximately(found["filter"])
    assert found["tasks"]["heldout_bits_per_byte"]["differences"]["ours"]["verdict"] == "worse"
    rows = list(found["filter"].values())
    assert [row["part"] for row in rows] == ["held-out text, kept by ours", "held-out text, dropped by ours"]
    assert [row["differences"]["ours"]["verdict"] for row in rows] == ["better", "worse"]
    assert [row["documents"] for row in rows] == [kept.sum(), 120 - kept.sum()]
    expected = (nats - ours)[kept].sum() / sizes[kept].sum() / math.log(2)
    assert rows[0]["differences"]["ours"]["value"] == pytest.approx(expected)
    lines = to_text(found).split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("held-out bits per byte"))
    assert lines[first + 2].startswith("held-out text, kept by ours ↓")
    assert "| held-out text, dropped by ours ↓ |" in unpadded(tmp_path / "out/comparison.md")
    # Without a run directory's filter there are no such rows.
    plain = {label: [bits(tmp_path / f"{label}.json", nats, sizes)] for label in ("x", "y")}
    assert compare_models(plain, tmp_path / "plain")["filter"] == {}


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_no_items_of_a_kind_give_no_figure(shape):
    measured = Measured(None, {"task": np.ones(shape)})
    assert measured.part(places=[]) is None and list(_answered(np.ones(shape))) == [True] * 3
