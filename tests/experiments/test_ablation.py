"""The statistics of an ablation: against formulas of their own, on nulls, and where there is no test."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from nanophi.core.errors import UserError
from nanophi.experiments import ablation, ablation_render

NULLS, DECAY_NULLS = (Path(__file__).with_name(f"null_{what}.json") for what in ("items", "decays"))
"""Made by nulls.py of benchmarks/filter_effect and benchmarks/decay_filter: log-likelihoods (a row for each run, by arm
of decays) and sizes of held-out documents."""


def experiment(generator, effects, seeds=3, items=200, seed_deviation=0.01, item_deviation=0.1, rates=(1.0, 0.2)):
    """Runs of which arms differ by `effects` bits per byte; each item has a difficulty that all runs share."""
    sizes = generator.integers(20, 80, items).astype(float)
    difficulty = generator.normal(1.5, 0.4, items)
    runs = {}
    for rate in rates:
        for arm in ablation.ARMS:
            for seed in range(seeds):
                noise = generator.normal(0, seed_deviation) + generator.normal(0, item_deviation, items)
                bits = difficulty + effects.get(arm, 0.0) + noise
                runs[arm, seed, rate] = [(-math.log(2) * bits * sizes, sizes)]
    return ablation.Target("invented text", True, runs)


def analyse(target, **others):
    return ablation.analyse({"primary": target, **others})["primary"]


def test_a_planted_effect_is_found_with_its_sign_and_size():
    effects = {"best": -0.1, "worst": 0.2, "all": -0.02}
    found = analyse(experiment(np.random.default_rng(0), effects))
    for name, expected in (("quality", -0.1), ("repetition", 0.02), ("net", -0.08)):
        for one in found["contrasts"][name]["learning_rates"].values():
            assert one["value"] == pytest.approx(expected, abs=0.03)
            assert one["interval"][0] < expected < one["interval"][1]
    assert found["contrasts"]["quality"]["verdict"] == "better"
    assert found["check"]["verdict"] == "better"
    reverse = analyse(experiment(np.random.default_rng(0), {"best": 0.1}))
    assert reverse["contrasts"]["quality"]["verdict"] == reverse["contrasts"]["net"]["verdict"] == "worse"


def test_a_contrast_against_formulas():
    """With equal sizes, items that do not interact with arms leave an analysis of variance; without seeds, a t test."""
    target = experiment(np.random.default_rng(1), {"best": -0.05}, items=400, item_deviation=0.0, seed_deviation=0.05)
    one = analyse(target)["contrasts"]["quality"]["learning_rates"]["1.0"]
    table = np.array([[ablation.value(target.runs[arm, seed, 1.0]) for seed in range(3)] for arm in ablation.ARMS])
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    stderr = math.sqrt(2 / 3 * (residual**2).sum() / 6)
    assert one["stderr"] == pytest.approx(stderr, rel=1e-6)
    assert one["freedom"] == pytest.approx(6, rel=1e-6)
    half = stderr * scipy.stats.t.ppf(0.975, 6)
    assert one["interval"] == pytest.approx([one["value"] - half, one["value"] + half])
    assert one["p_value"] == pytest.approx(2 * scipy.stats.t.sf(abs(one["value"]) / stderr, 6))
    # The items' part alone: the standard error of the mean difference over items.
    target = experiment(np.random.default_rng(2), {}, items=400)
    bits = {key: -sets[0][0] / sets[0][1] / math.log(2) for key, sets in target.runs.items()}
    runs = {key: [(-math.log(2) * values, np.ones(400))] for key, values in bits.items()}
    one = analyse(ablation.Target("", True, runs))["contrasts"]["quality"]["learning_rates"]["1.0"]
    differences = np.mean([bits["best", seed, 1.0] - bits["random", seed, 1.0] for seed in range(3)], axis=0)
    assert one["value"] == pytest.approx(differences.mean())
    assert one["item_stderr"] == pytest.approx(differences.std(ddof=1) / 20, rel=0.05)


def test_several_sets_count_alike():
    one, other = (
        experiment(np.random.default_rng(n), {"best": e}, items=i) for n, e, i in ((3, -0.1, 50), (4, 0, 400))
    )
    both = ablation.Target("", True, {key: [*one.runs[key], *other.runs[key]] for key in one.runs})
    values = [analyse(t)["contrasts"]["quality"]["learning_rates"]["1.0"]["value"] for t in (one, other, both)]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    assert analyse(both)["items"] == [50, 400]


def test_a_claim_needs_both_learning_rates():
    target = experiment(np.random.default_rng(5), {"best": -0.1})
    plain = experiment(np.random.default_rng(6), {}).runs
    mixed = {key: sets if key[2] == 1.0 else plain[key] for key, sets in target.runs.items()}
    assert analyse(ablation.Target("", True, mixed))["contrasts"]["quality"]["verdict"] == "at one learning rate only"
    opposite = experiment(np.random.default_rng(7), {"best": 0.1}).runs
    mixed = {key: sets if key[2] == 1.0 else opposite[key] for key, sets in target.runs.items()}
    found = analyse(ablation.Target("", True, mixed))["contrasts"]["quality"]
    assert (found["verdict"], found["p_value"]) == ("at one learning rate only", 1.0)
    single = {key: sets for key, sets in target.runs.items() if key[2] == 1.0}
    found = analyse(ablation.Target("", True, single))["contrasts"]["quality"]
    assert found["verdict"] == "one learning rate: a claim needs two"
    assert found["learning_rates"]["1.0"]["interval"]


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"seeds": 1}, "one seed: no interval over seeds exists"),
        ({"items": 7}, "too few items: 7 of the 20 that a test needs"),
    ],
)
def test_without_enough_seeds_or_items_there_is_no_test(fields, verdict):
    quality = analyse(experiment(np.random.default_rng(8), {"best": -0.5}, **fields))["contrasts"]["quality"]
    assert quality["verdict"] == verdict
    for one in quality["learning_rates"].values():
        assert one["value"] == pytest.approx(-0.5, abs=0.1)
        assert one["interval"] is one["p_value"] is one["minimum_detectable_effect"] is None


def test_an_unfinished_experiment_compares_what_is_there():
    target = experiment(np.random.default_rng(10), {"best": -0.1})
    partial = {key: sets for key, sets in target.runs.items() if (key[2] == 1.0 and key[1] < 2) or key[0] == "all"}
    found = analyse(ablation.Target("", True, partial))
    assert found["contrasts"]["quality"]["verdict"] == "not measured yet"
    assert found["contrasts"]["quality"]["learning_rates"]["1.0"]["seeds"] == [0, 1]
    assert found["contrasts"]["quality"]["learning_rates"]["0.2"]["value"] is None


def test_families_are_corrected_by_themselves():
    weak = experiment(np.random.default_rng(11), {"best": -0.03})
    alone = analyse(weak)["contrasts"]["quality"]
    many = {f"other-{n}": ablation.Target("", False, weak.runs) for n in range(5)}
    together = ablation.analyse({"primary": weak, **many})
    assert together["primary"]["contrasts"]["quality"]["p_corrected"] == alone["p_corrected"]
    assert together["other-0"]["contrasts"]["quality"]["p_corrected"] > alone["p_corrected"]


def run_nulls(generator, seeds):
    """Without an effect, dealt from cached runs that differ in their seed alone, on a resample of items."""
    cached = json.loads(NULLS.read_text())
    nats, sizes = np.array(cached["nats"]), np.array(cached["bytes"], float)
    while True:
        dealt = generator.permutation(len(nats))[: len(ablation.ARMS) * seeds].reshape(len(ablation.ARMS), seeds)
        items = generator.integers(0, len(sizes), len(sizes))
        yield {
            (arm, seed, 1.0): [(nats[dealt[row, seed], items], sizes[items])]
            for row, arm in enumerate(ablation.ARMS)
            for seed in range(seeds)
        }


def decay_nulls(generator, seeds):
    """The same of decays that continue a trunk for each seed: which of three texts that differ by chance is whose.

    Without the trunk itself, over which no difference between decays is pooled.
    """
    cached = json.loads(DECAY_NULLS.read_text())
    nats, sizes = np.array([cached[arm] for arm in ablation.ARMS[1:]]), np.array(cached["bytes"], float)
    while True:
        items = generator.integers(0, len(sizes), len(sizes))
        yield {
            (arm, seed, 1.0): [(nats[row, trunk, items], sizes[items])]
            for seed, trunk in enumerate(generator.permutation(nats.shape[1])[:seeds])
            for arm, row in zip(ablation.ARMS[1:], generator.permutation(3), strict=True)
        }


def invented_nulls(deviation):
    def experiments(generator, seeds):
        options = {"seeds": seeds, "items": 150, "seed_deviation": deviation, "rates": (1.0,)}
        while True:
            yield experiment(generator, {}, **options).runs

    return experiments


@pytest.mark.parametrize(
    ("nulls", "seeds", "count", "resamples", "least", "most"),
    [
        *((run_nulls, seeds, 200, 400, 0.02, 0.08) for seeds in (2, 3, 5)),
        *((decay_nulls, seeds, 200, 400, 0.02, 0.06) for seeds in (2, 3, 5)),
        *(
            (invented_nulls(deviation), seeds, 400, 200, 0.015, 0.08)
            for seeds, deviation in ((2, 0.02), (3, 0.005), (3, 0.05), (5, 0.02))
        ),
    ],
)
def test_false_positives(nulls, seeds, count, resamples, least, most, monkeypatch):
    """On runs and decays that were really trained, and whatever invented seeds do; a trunk takes out half and more."""
    monkeypatch.setattr(ablation, "RESAMPLES", resamples)
    found = []
    for runs in itertools.islice(nulls(np.random.default_rng(0), seeds), count):
        draws = ablation.item_draws(runs["best", 0, 1.0], np.random.default_rng(1))
        found.append(ablation.contrast(runs, "best", "random", 1.0, draws))
    assert least <= np.mean([one["p_value"] < 0.05 for one in found]) <= most
    assert nulls is not decay_nulls or np.median([one["paired"] for one in found]) > 0.5


def test_what_pairing_takes_out_against_a_formula():
    generator, arms, seeds = np.random.default_rng(4), ("all", "best", "random"), range(40)
    trunk, own = generator.normal(0, 0.03, 40), generator.normal(0, 0.01, (3, 40))
    size = np.full(30, 50.0)
    runs = {
        (arm, seed, 1.0): [(-math.log(2) * (2 + trunk[seed] + own[row, seed]) * size, size)]
        for row, arm in enumerate(arms)
        for seed in seeds
    }
    draws = ablation.item_draws(runs["all", 0, 1.0], generator)
    one = ablation.contrast(runs, "best", "random", 1.0, draws)
    assert one["paired"] == pytest.approx(0.9, abs=0.05)  # 1 - 0.01^2 / (0.03^2 + 0.01^2)


def test_an_arm_that_shares_no_trunk_is_compared_by_its_own_deviations():
    target = experiment(np.random.default_rng(15), {"best": -0.1}, seed_deviation=0.005)
    generator = np.random.default_rng(16)
    loud = {key: [(sets[0][0] * (1 + generator.normal(0, 0.05)), sets[0][1])] for key, sets in target.runs.items()}
    added = {("own", seed, rate): loud["all", seed, rate] for _, seed, rate in loud}
    both = ablation.Target("", True, {**target.runs, **added})
    contrasts = {**ablation.CONTRASTS, "own": ("own", "all")}
    pools = [["best", "random", "worst"], ablation.ARMS]
    apart = ablation.analyse({"t": both}, contrasts, pools)["t"]["contrasts"]
    pooled = ablation.analyse({"t": both}, contrasts)["t"]["contrasts"]
    branches = {key: sets for key, sets in target.runs.items() if key[0] != "all"}
    for rate in ("1.0", "0.2"):
        alone = analyse(target)["contrasts"]["net"]["learning_rates"][rate]
        assert apart["net"]["learning_rates"][rate]["stderr"] == pytest.approx(alone["stderr"])
        alone = analyse(ablation.Target("", True, branches))["contrasts"]["quality"]["learning_rates"][rate]
        assert apart["quality"]["learning_rates"][rate]["stderr"] == pytest.approx(alone["stderr"])
        assert pooled["quality"]["learning_rates"][rate]["stderr"] > 1.3 * alone["stderr"]
        assert apart["own"]["learning_rates"][rate]["stderr"] > pooled["own"]["learning_rates"][rate]["stderr"]


def records(**changes):
    items = {"heldout_bits_per_byte": {"numbers": [0, 2], "sha256": "a", "values": [[-10.0, 10], [-20.0, 20]]}}
    items["quiz"] = {"numbers": [0], "sha256": "b", "values": [1.5]}
    first = {"run": "x", "arm": "best", "seed": 0, "learning_rate": 0.1, "items": items}
    return [first, {**first, "run": "y", "seed": 1, **changes}]


NAMES = ("answers", "heldout", "kept", "dropped")
PLAN = {"tasks": ["quiz"], "targets": {name: {"title": name, "primary": name == "answers"} for name in NAMES}}
DOCUMENTS = {"heldout": [{"source": "s", "kept": kept} for kept in (True, True, False)]}


def test_targets_are_taken_from_the_records():
    targets = ablation.targets(PLAN, DOCUMENTS, records())
    key = ("best", 1, 0.1)
    assert ablation.value(targets["answers"].runs[key]) == pytest.approx(1.5)
    assert ablation.value(targets["heldout"].runs[key]) == pytest.approx(1 / math.log(2))
    assert targets["kept"].runs[key][0][1].tolist() == [10] and targets["dropped"].runs[key][0][1].tolist() == [20]
    everything = {"heldout": [{"source": "s", "kept": True}] * 3}
    assert "dropped" not in ablation.targets(PLAN, everything, records())


def test_runs_on_other_items_or_another_corpus_are_not_compared():
    other = json.loads(json.dumps(records()[0]["items"]).replace('"a"', '"c"'))
    for changes, line in (
        ({"items": other}, "were not measured on the same items of heldout_bits_per_byte"),
        ({"shared": {"documents": "other"}}, "do not share documents, scores and tokenizer"),
    ):
        with pytest.raises(UserError, match=f"y and x {line}"):
            ablation.targets(PLAN, DOCUMENTS, records(**changes))


def test_the_paragraph_claims_what_was_found_and_no_more():
    def said(target, finished=24):
        plan = {"share": 0.42, "rule": "score > 0.5", "tokens_seen": 2e6, "arms": list(ablation.ARMS)}
        plan |= {"tokens": {"best": 5e5, "all": 1.2e6}, "epochs": {"best": 4.0, "all": 1.68}}
        plan |= {"seeds": [0, 1, 2], "learning_rates": [1.0, 0.2]}
        result = {"plan": plan, "targets": {"t": analyse(target)}, "finished": finished, "flops": 4e13}
        return ablation_render.paragraph(result)

    found = said(experiment(np.random.default_rng(12), {"best": -0.1, "worst": 0.1}))
    assert "the best share needs fewer bits than a random share of the same size (-0." in found
    assert "no difference was found between a random share of the same size and all the text" in found
    assert "Each run took 4e+13 FLOP; published work found that decisions transfer" in found
    assert "The measurement works" in found and "Unfinished" not in found
    nothing = said(experiment(np.random.default_rng(14), {}), finished=23)
    assert nothing.startswith("Unfinished: 23 of 24 runs are done.")
    assert "needs" not in nothing and "may be too coarse" in nothing
    single = said(experiment(np.random.default_rng(13), {"best": -1}, seeds=1))
    assert "one seed: no interval over seeds exists" in single and "needs" not in single
