"""Does the filter help? The statistics of an ablation: contrasts of arms over seeds and items.

Every run of an experiment is one arm, one seed and one learning rate, measured on the same items. A target is a figure
in bits per byte (lower is better) over one or more sets of items; with several, the unweighted mean of their figures.

    quality    = best - random    the same amount of text, repeated as often: only which text differs
    repetition = random - all     the same mixture of text, less of it and repeated more often
    net        = best - all       what a user of the filter gets: their sum
    check      = best - worst     whether the measurement sees a difference that must be there

At each learning rate a contrast is the mean over the seeds. Its error has two sources, and the hierarchical bootstrap
draws both: the items, resampled with replacement and alike for all runs, since all are measured on the same ones; and
the seeds, whose deviations are those of a table of arms by seeds without the means of its rows and columns (a seed's
initialisation and order are common to all arms). The deviations are pooled over the arms (over those alone that
continue a trunk if both do), for three seeds give no usable variance, and what the items explain of them is taken out,
so that it is not counted twice. The interval is Student's, with Satterthwaite's degrees of freedom (1946, Biometrics
Bulletin 2): with few seeds a bootstrap's quantiles are too narrow.

A contrast is claimed only if its sign is the same at both learning rates and the larger of the two p-values, corrected
by Holm's method for all contrasts of its family, is below 0.05. The primary target is one family; the others together
are another.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from nanophi.core.errors import UserError
from nanophi.eval.statistics import SIGNIFICANCE, effective_items, holm, minimum_detectable_effect

ARMS = ("all", "best", "random", "worst")
CONTRASTS = {"quality": ("best", "random"), "repetition": ("random", "all"), "net": ("best", "all")}
CHECK = ("best", "worst")
MIN_ITEMS = 20
"""Items that a set needs for a test: a resample of fewer says little about others of their kind."""
RESAMPLES = 2000
FIGURES = (
    *("value", "seeds", "by_seed", "stderr", "seed_stderr", "item_stderr", "freedom", "interval", "p_value"),
    *("minimum_detectable_effect", "paired"),
)
"""What is known of a contrast at one learning rate, or None; `paired`: share of the variance that shared seeds take."""

Items = tuple[np.ndarray, np.ndarray]
"""Of one set: log-likelihood in nats and size in bytes, each of shape (items,)."""
Key = tuple[str, int, float]
"""A run: arm, seed, learning rate."""


def keys_of(plan: Mapping[str, Any]) -> list[Key]:
    """Arm, seed and learning rate of every run, in the order in which they are made."""
    return [(arm, seed, rate) for seed in plan["seeds"] for rate in plan["learning_rates"] for arm in plan["arms"]]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is measured; one is `primary`, fixed in advance as the one that decides.

    `runs` has each run's sets of items. The items of a set are the same, in the same order, in all runs.
    """

    title: str
    primary: bool
    runs: Mapping[Key, Sequence[Items]]


def analyse(
    targets: Mapping[str, Target],
    contrasts: Mapping[str, Sequence[str]] = CONTRASTS,
    pools: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """All contrasts of all targets, with what may be claimed.

    Deviations are pooled over the first of `pools` that holds both arms (over these two, if none does; None: over all).
    Per target `items` (of each set), `values` (per learning rate and arm, the mean over seeds), `contrasts` and
    `check`. A contrast has `learning_rates` (each: see `contrast`), `p_value` (the larger one), `p_corrected` and
    `verdict`: `better`, `worse`, `not found`, `at one learning rate only`, or why there is no test.
    """
    result: dict[str, Any] = {}
    for name, target in targets.items():
        tests = sum(other.primary == target.primary for other in targets.values()) * len(contrasts)
        rates = sorted({rate for _, _, rate in target.runs}, reverse=True)
        sets = next(iter(target.runs.values()))
        draws = item_draws(sets, np.random.default_rng(0))
        values: dict[str, dict[str, float]] = {str(rate): {} for rate in rates}
        for rate, arm in itertools.product(rates, dict.fromkeys([*ARMS, *(arm for arm, _, _ in target.runs)])):
            if of_seeds := [value(items) for (a, _, r), items in target.runs.items() if (a, r) == (arm, rate)]:
                values[str(rate)][arm] = float(np.mean(of_seeds))
        found = {}
        for label, (ours, theirs) in {**contrasts, "check": CHECK}.items():
            size = 1 if label == "check" else tests
            pool = next((pool for pool in pools if {ours, theirs} <= {*pool}), [ours, theirs])
            runs = {key: items for key, items in target.runs.items() if key[0] in pool or not pools}
            by_rate = {str(rate): contrast(runs, ours, theirs, rate, draws, size) for rate in rates}
            found[label] = {"arms": [ours, theirs], "learning_rates": by_rate, **_both(list(by_rate.values()))}
        check = found.pop("check")
        result[name] = {"title": target.title, "primary": target.primary, "items": [len(sizes) for _, sizes in sets]}
        result[name] |= {"values": values, "contrasts": found, "check": check}
        _correct([check])
    for primary in (True, False):
        _correct([c for entry in result.values() if entry["primary"] == primary for c in entry["contrasts"].values()])
    return result


def targets(
    plan: Mapping[str, Any], items: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Target]:
    """The plan's targets, from `items.json` and the records of finished runs; one without items is left out.

    Raises `UserError` if two runs were not trained on the same corpus, or not measured on the same items.
    """
    runs: dict[str, dict[Key, list[Items]]] = {name: {} for name in plan["targets"]}
    for record in records:
        _check_comparable(record, records[0])
        heldout = record["items"]["heldout_bits_per_byte"]
        if max(heldout["numbers"]) >= len(items["heldout"]):
            raise UserError(f"items.json has fewer documents than {record['run']} was measured on; put it back")
        documents = [items["heldout"][number] for number in heldout["numbers"]]
        for name, target in plan["targets"].items():
            if name == "answers":
                answers = [np.array(record["items"][task]["values"], float) for task in plan["tasks"]]
                sets = [(-math.log(2) * bits, np.ones(len(bits))) for bits in answers]
            else:
                pairs = np.array(heldout["values"], float)[[_belongs(one, name, target) for one in documents]]
                sets = [(pairs[:, 0], pairs[:, 1])] if len(pairs) else []
            if sets:
                runs[name][record["arm"], record["seed"], record["learning_rate"]] = sets
    return {
        name: Target(each["title"], each["primary"], runs[name]) for name, each in plan["targets"].items() if runs[name]
    }


def _belongs(document: Mapping[str, Any], name: str, target: Mapping[str, Any]) -> bool:
    """Whether a held-out document is one of a target's."""
    if name in ("kept", "dropped"):
        return bool(document["kept"]) == (name == "kept")
    return name == "heldout" or document["source"] == target["source"]


def _check_comparable(record: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    ours, theirs = (dict(each.get("shared") or {}) for each in (record, first))
    if {record["arm"], first["arm"]} - {*ARMS}:  # a candidate may have another scorer
        ours["scores"] = theirs["scores"] = None
    if ours != theirs:
        raise UserError(
            f"{record['run']} and {first['run']} do not share documents, scores and tokenizer; name another --output"
        )
    for task, measured in record["items"].items():
        if any(first["items"].get(task, {}).get(key) != measured[key] for key in ("sha256", "numbers")):
            pair = f"{record['run']} and {first['run']}"
            raise UserError(f"{pair} were not measured on the same items of {task}; evaluate one of them again")


def value(sets: Sequence[Items]) -> float:
    """A target's figure for one run: bits per byte of each set, averaged over the sets."""
    return float(np.mean([-nats.sum() / sizes.sum() / math.log(2) for nats, sizes in sets]))


def item_draws(sets: Sequence[Items], rng: np.random.Generator) -> list[np.ndarray]:
    """How often each item is drawn in each resample: per set, uint8 of shape (RESAMPLES, items)."""

    def draw(count: int) -> np.ndarray:
        return np.bincount(rng.integers(0, count, count), minlength=count).astype(np.uint8)

    return [np.array([draw(len(sizes)) for _ in range(RESAMPLES)]) for _, sizes in sets]


def contrast(
    runs: Mapping[Key, Sequence[Items]],
    ours: str,
    theirs: str,
    rate: float,
    draws: Sequence[np.ndarray],
    tests: int = 1,
) -> dict[str, Any]:
    """One contrast of arms at one learning rate: `ours - theirs`, in bits per byte.

    Of `runs` (see `Target`) seeds that not all arms have at this learning rate are left out; `draws` are those of
    `item_draws`; `tests` is the size of the family, for the minimum detectable effect. `no_test` of the result is why
    there is no test (None: there is one), and its `interval` of 95 %.
    """
    arms = sorted({arm for arm, _, r in runs if r == rate})
    seeds = sorted({s for _, s, r in runs if r == rate and all((arm, s, rate) in runs for arm in arms)})
    result: dict[str, Any] = {**dict.fromkeys(FIGURES), "seeds": seeds, "by_seed": []}
    if ours not in arms or theirs not in arms or not seeds:
        return {**result, "no_test": "not measured yet"}
    # Figures of runs (arms, seeds), and the same in every resample of the items (RESAMPLES, arms, seeds).
    table = np.array([[value(runs[arm, s, rate]) for s in seeds] for arm in arms])
    sets = [[runs[arm, s, rate][index] for arm in arms for s in seeds] for index in range(len(draws))]
    ratios = sum(_resampled(drawn, items) / len(draws) for drawn, items in zip(draws, sets, strict=True))
    resampled = np.asarray(ratios).reshape(RESAMPLES, len(arms), len(seeds))
    plus, minus = arms.index(ours), arms.index(theirs)
    by_seed = table[plus] - table[minus]
    item_variance = float((resampled[:, plus] - resampled[:, minus]).mean(axis=1).var())
    result |= {"value": float(by_seed.mean()), "by_seed": by_seed.tolist(), "item_stderr": math.sqrt(item_variance)}
    if few := [drawn.shape[1] for drawn in draws if drawn.shape[1] < MIN_ITEMS]:
        return {**result, "no_test": f"too few items: {few[0]} of the {MIN_ITEMS} that a test needs"}
    if len(seeds) < 2:
        return {**result, "no_test": "one seed: no interval over seeds exists"}
    items = max(1.0, sum(effective_items(runs_of_set[0][1]) - 1 for runs_of_set in sets))
    return {**result, **_test(result["value"], table, resampled, item_variance, items, tests), "no_test": None}


def _test(
    mean: float, table: np.ndarray, resampled: np.ndarray, item_variance: float, items: float, tests: int
) -> dict[str, Any]:
    """Standard error, interval and p-value of a contrast, from the tables of `contrast` and the number of its items."""
    arms, seeds = table.shape
    free = (arms - 1) * (seeds - 1)
    # A contrast is a mean over seeds of the difference of two runs: twice a run's variance over the seeds' number.
    factor = 2 / seeds
    spread = factor * float(np.square(_deviations(table)).sum()) / free
    alone = factor * float(table.var(axis=1, ddof=1).mean())
    noise = factor * float(np.square(_deviations(resampled - table)).sum(axis=(1, 2)).mean()) / free
    seed_variance = max(0.0, spread - noise)
    variance, stderr = seed_variance + item_variance, math.sqrt(seed_variance + item_variance)
    # How well the variance is known: the seeds' part from few deviations, the rest from many items.
    scatter = spread**2 / free + item_variance**2 / items
    freedom = variance**2 / scatter if scatter else math.inf
    distribution = scipy.stats.t(freedom)
    half = float(stderr * distribution.isf(SIGNIFICANCE / 2))
    return {
        "stderr": stderr,
        "seed_stderr": math.sqrt(seed_variance),
        "freedom": float(freedom),
        "interval": [mean - half, mean + half],
        "p_value": float(2 * distribution.sf(abs(mean) / stderr)) if stderr else float(mean == 0),
        "minimum_detectable_effect": minimum_detectable_effect(stderr, tests=tests, freedom=freedom),
        "paired": 1 - spread / alone if alone else None,
    }


def _resampled(drawn: np.ndarray, runs: Sequence[Items]) -> np.ndarray:
    """Bits per byte of each run on a set's items, in every resample: (RESAMPLES, runs)."""
    columns = np.stack([*(nats for nats, _ in runs), runs[0][1]], axis=1)
    # In blocks of rows, since the counts are small integers that must become float64 first.
    sums = np.concatenate([block.astype(np.float64) @ columns for block in np.array_split(drawn, 20)])
    return sums[:, :-1] / sums[:, -1:] / -math.log(2)


def _deviations(table: np.ndarray) -> np.ndarray:
    """Tables (..., arms, seeds) without the means of their rows and columns."""
    rows, columns = table.mean(axis=-1, keepdims=True), table.mean(axis=-2, keepdims=True)
    return table - rows - columns + rows.mean(axis=-2, keepdims=True)


def _both(by_rate: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the learning rates say together: the larger p-value, and 1 if their signs differ."""
    reasons = [entry["no_test"] for entry in by_rate if entry["no_test"]]
    if len(by_rate) < 2:
        reasons.append("one learning rate: a claim needs two")
    if reasons:
        return {"p_value": None, "no_test": reasons[0]}
    agree = len({entry["value"] > 0 for entry in by_rate}) == 1
    return {"p_value": max(entry["p_value"] for entry in by_rate) if agree else 1.0, "no_test": None}


def _correct(family: Sequence[dict[str, Any]]) -> None:
    """Holm's correction over the contrasts that have a test, and every contrast's verdict."""
    tested = [entry for entry in family if entry["no_test"] is None]
    for entry in family:
        entry |= {"p_corrected": None, "verdict": entry["no_test"]}
    for entry, p_value in zip(tested, holm([entry["p_value"] for entry in tested]), strict=True):
        rates = list(entry["learning_rates"].values())
        entry["p_corrected"] = p_value
        if p_value < SIGNIFICANCE:
            entry["verdict"] = "better" if rates[0]["value"] < 0 else "worse"
        elif any(rate["p_value"] < SIGNIFICANCE / len(tested) for rate in rates):
            entry["verdict"] = "at one learning rate only"
        else:
            entry["verdict"] = "not found"
