"""Comparison: tests against scipy and simulation, and no verdict where there is only noise."""

import json
import math

import numpy as np
import pytest

from nanophi.eval.catalogue import references
from nanophi.eval.compare import compare
from nanophi.eval.render import to_text
from nanophi.eval.results import FORMAT
from nanophi.eval.statistics import holm
from nanophi.files import UserError, read_json


def result(
    path,
    scores,
    *,
    task="arc_easy",
    metric="acc",
    chance=0.25,
    shots=0,
    prompts="p",
    sources=None,
    model=None,
    **fields,
):
    """A result file with these scores per item, of one source or of those given, of a model named like the file."""
    pairs = isinstance(scores[0], tuple)
    samples = [
        {
            "doc_id": i,
            "doc_hash": f"d{i}",
            "prompt_hash": f"{prompts}{i}",
            "filter": "none",
            metric: score,
            "source": sources[i] if sources else "s",
        }
        for i, score in enumerate(scores)
    ]
    value = -sum(s[0] for s in scores) / sum(s[1] for s in scores) / math.log(2) if pairs else float(np.mean(scores))
    line = {"task": task, "metric": metric, "filter": "none", "num_fewshot": shots, "value": value, "stderr": 0.01}
    line |= {"chance": chance, "higher_is_better": not pairs, "items": len(scores), "of": len(scores), "tasks": [task]}
    content = {"samples": {task: samples}, "lm_eval_version": "0.4.13"}
    identity = {"name": model or path.stem, "sha256": model or path.stem, "dtype": "float32"}
    content["nanophi"] = {"format": FORMAT, "headline": [line], "model": identity, **fields}
    path.write_text(json.dumps(content))
    return path


def bits(path, nats, sizes, sources=None):
    held = {
        "bits_per_byte": 1.0,
        "bz2": {"bits_per_byte": 2.25},
        "by_source": {"s": {"bits_per_byte": 1.0, "bits_per_byte_stderr": 0.1}},
    }
    scores = list(zip(nats.tolist(), sizes.tolist(), strict=True))
    return result(
        path, scores, task="heldout_bits_per_byte", metric="bits_per_byte", chance=None, heldout=held, sources=sources
    )


def test_better_is_found_and_noise_is_not(tmp_path):
    rng = np.random.default_rng(0)
    base = (rng.random(1000) < 0.4).astype(float)
    better = np.maximum(base, rng.random(1000) < 0.15)
    flips = rng.random(1000) < 0.1
    same = np.where(flips, rng.permutation(base), base)
    files = {
        "better": [result(tmp_path / "b.json", better.tolist())],
        "same": [result(tmp_path / "s.json", same.tolist())],
        "control": [result(tmp_path / "c.json", base.tolist())],
    }
    comparison = compare(files, tmp_path / "out")
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
    markdown = (tmp_path / "out/comparison.md").read_text()
    assert "| ARC-Easy (acc, 0-shot) |" in markdown and "measured elsewhere" not in markdown


def test_worse_bits_per_byte(tmp_path):
    rng = np.random.default_rng(1)
    sizes = rng.integers(500, 5000, 80).astype(float)
    control = -sizes * rng.normal(1.3, 0.2, 80)
    worse = control - sizes * rng.normal(0.02, 0.02, 80)
    files = {"a": [bits(tmp_path / "a.json", worse, sizes)], "b": [bits(tmp_path / "b.json", control, sizes)]}
    difference = compare(files, tmp_path)["tasks"]["heldout_bits_per_byte"]["differences"]["a"]
    assert difference["verdict"] == "worse" and difference["value"] > 0
    assert difference["value"] == pytest.approx((control - worse).sum() / sizes.sum() / math.log(2))
    assert "bz2 -9 on the same text" in to_text(read_json(tmp_path / "comparison.json"))


def test_bits_per_byte_by_source(tmp_path):
    """Paired within each source: one gets better, one worse, the rest is noise; small ones are put together."""
    rng = np.random.default_rng(5)
    sources = ["manual"] * 60 + ["code"] * 60 + ["prose"] * 60 + ["a", "b", "c"] * 7
    sizes = rng.integers(500, 5000, len(sources)).astype(float)
    control = -sizes * rng.normal(1.3, 0.3, len(sources))
    shift = np.array([{"manual": 0.03, "code": -0.03}.get(source, 0.0) for source in sources])
    ours = control + sizes * (shift + rng.normal(0, 0.02, len(sources)))
    files = {
        "a": [bits(tmp_path / "a.json", ours, sizes, sources)],
        "b": [bits(tmp_path / "b.json", control, sizes, sources)],
    }
    comparison = compare(files, tmp_path)
    rows = comparison["sources"]
    assert {name: row["documents"] for name, row in rows.items()} == {
        "manual": 60,
        "code": 60,
        "prose": 60,
        "other (3 sources)": 21,
    }
    verdicts = {name: row["differences"]["a"]["verdict"] for name, row in rows.items()}
    assert verdicts["manual"] == "better" and verdicts["code"] == "worse"
    assert verdicts["prose"] == verdicts["other (3 sources)"] == "within noise"
    of = np.array([source == "manual" for source in sources])
    exact = (control - ours)[of].sum() / sizes[of].sum() / math.log(2)
    difference = rows["manual"]["differences"]["a"]
    assert difference["value"] == pytest.approx(exact) and difference["interval"][0] < exact < difference["interval"][1]
    assert rows["manual"]["scores"]["b"]["value"] == pytest.approx(-control[of].sum() / sizes[of].sum() / math.log(2))
    corrected = holm([row["differences"]["a"]["p_value"] for row in rows.values()])
    assert [row["differences"]["a"]["p_corrected"] for row in rows.values()] == pytest.approx(corrected)
    markdown = (tmp_path / "comparison.md").read_text()
    assert (
        "<summary>Held-out bits per byte by source</summary>" in markdown and "| other (3 sources) | 21 |" in markdown
    )


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
        return compare(files, folder, seed=seed)[table]


def test_only_items_with_the_same_prompt_are_paired(tmp_path):
    a = result(tmp_path / "a.json", [1.0] * 20)
    b = result(tmp_path / "b.json", [0.0] * 20, prompts="q")
    comparison = compare({"a": [a], "b": [b]}, tmp_path)
    assert comparison["tasks"]["arc_easy"]["differences"] == {}
    assert "no item with the same prompt" in comparison["notes"][0]
    c = result(tmp_path / "c.json", [0.0] * 12)
    comparison = compare({"a": [a], "c": [c]}, tmp_path)
    assert comparison["tasks"]["arc_easy"]["differences"]["a"]["items"] == 12


def test_groups_count_by_their_unweighted_mean_and_show_their_parts(tmp_path):
    rng = np.random.default_rng(4)
    files = {}
    for label, skill in (("a", 0.5), ("b", 0.3)):
        path = result(tmp_path / f"{label}.json", [0.0])
        content = json.loads(path.read_text())
        content["samples"] = {
            f"mmlu_{subject}": [
                {
                    "doc_id": i,
                    "doc_hash": f"d{i}",
                    "prompt_hash": "p",
                    "filter": "none",
                    "acc": float(rng.random() < skill),
                }
                for i in range(size)
            ]
            for subject, size in (("law", 400), ("art", 40))
        }
        means = [np.mean([s["acc"] for s in samples]) for samples in content["samples"].values()]
        line = content["nanophi"]["headline"][0]
        line |= {"task": "mmlu", "tasks": list(content["samples"]), "value": float(np.mean(means)), "items": 440}
        path.write_text(json.dumps(content))
        files[label] = [path]
    comparison = compare(files, tmp_path)
    row, parts = comparison["tasks"]["mmlu"], comparison["subjects"]["mmlu"]
    subjects = [parts[f"mmlu_{subject}"]["differences"]["a"]["value"] for subject in ("law", "art")]
    assert row["differences"]["a"]["value"] == pytest.approx(np.mean(subjects))
    assert row["differences"]["a"]["verdict"] == "better"
    markdown = (tmp_path / "comparison.md").read_text()
    assert "MMLU by subject" in markdown and "nano-phi-115M-v0.1" in markdown


def test_bad_input(tmp_path):
    good = result(tmp_path / "good.json", [1.0, 0.0])

    def problem(files, **options):
        with pytest.raises(UserError) as error:
            compare(files, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    old = json.loads(good.read_text())
    old["nanophi"]["format"] = 0
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert "has format 0, this version reads 2" in problem({"a": [tmp_path / "old.json"]})
    (tmp_path / "other.json").write_text("{}")
    assert "is not a result of `nanophi eval`" in problem({"a": [tmp_path / "other.json"]})
    assert "is missing" in problem({"a": [tmp_path / "nowhere.json"]})
    assert "baseline 'c' is not one of a" in problem({"a": [good]}, baseline="c")
    shots = result(tmp_path / "shots.json", [1.0, 0.0], shots=5)
    assert "arc_easy was not measured alike (a: 0-shot acc, b: 5-shot acc)" in problem({"a": [good], "b": [shots]})
    assert "nothing to compare" in problem({})


def test_published_scores_add_up_and_name_their_sources():
    published = references()
    assert len(published["models"]) == 9
    for model in published["models"]:
        assert np.mean(list(model["scores"].values())) == pytest.approx(model["average"], abs=0.011)
        assert set(model["scores"]) == set(published["metrics"]) and model["source"]
