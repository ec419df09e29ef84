"""Records that a card may have beside those of the finished run in miniature."""

from typing import Any

from nanophi.eval.catalogue import LEADERBOARD, TASKS


def comparison(ours: str) -> dict[str, Any]:
    """What `nanophi compare` writes for the fixture and a control."""

    def entry(value: float, verdict: str) -> dict[str, Any]:
        interval = [value - 0.02, value + 0.02]
        p_value = 0.4 if verdict == "within noise" else 0.0004
        found = {"value": value, "interval": interval, "p_corrected": p_value, "verdict": verdict, "items": 50}
        return {**found, "minimum_detectable_effect": 0.0321}

    def row(metric: str, chance: float | None, ours_: Any, theirs: Any, difference: dict[str, Any]) -> dict[str, Any]:
        facts = {"metric": metric, "num_fewshot": 0, "chance": chance, "higher_is_better": metric == "acc_norm"}
        scores = {ours: ours_} | ({"control": theirs} if theirs else {})
        scores = {name: dict(zip(("value", "stderr", "items"), score, strict=True)) for name, score in scores.items()}
        return {**facts, "scores": scores, "differences": {ours: difference}}

    bits, choice = 2.9 - 30 / 40, 0.26 + 30 / 200
    whole = row("bits_per_byte", None, (bits, 0.05, 50), (2.3, 0.05, 50), entry(-0.15, "better"))
    continued = row("acc_norm", 0.25, (choice, 0.031, 200), (0.4, 0.03, 200), entry(0.01, "within noise"))
    answers = row("answer_bits_per_byte", None, (1.9, 0.02, 200), None, entry(-0.01, "better"))
    return {
        "labels": [ours, "control"],
        "baseline": "control",
        "tasks": {"heldout_bits_per_byte": whole, "heldout_continuation": continued},
        "answers": {"heldout_continuation": answers},
        "subjects": {},
        "heldout": {
            ours: {"by_source": {"licences": {"bits_per_byte": bits, "bits_per_byte_stderr": 0.07, "documents": 20}}},
            "control": {"by_source": {"licences": {"bits_per_byte": 2.3, "bits_per_byte_stderr": 0, "documents": 1}}},
        },
        "published": {
            "metrics": {"arc_challenge": "acc_norm, 25-shot"},
            "models": [{"name": "other", "scores": {"arc_challenge": 22.5}, "average": 29.0, "source": "its card"}],
        },
        "method": "paired bootstrap",
        "notes": [],
    }


def leaderboard_results(scored: int = 100) -> Any:
    """An `open-llm-v1` result: five tasks and MMLU's 57 subjects, each with 100 items, of which `scored` were run."""
    subjects = [f"mmlu_subject_{number}" for number in range(57)]
    results = {task: {f"{TASKS[task].metric}": 0.3} for task in LEADERBOARD if task != "mmlu"}
    results |= {"gsm8k": {TASKS["gsm8k"].metric: 0.0}} | {task: {"acc,none": 0.25} for task in subjects}
    errors = {task: {key.replace(",", "_stderr,"): 0.01 for key in metrics} for task, metrics in results.items()}
    chance = {"arc_challenge": 0.25, "hellaswag": 0.25, "mmlu": 0.25, "winogrande": 0.5}
    lines = {task: subjects if task == "mmlu" else [task] for task in LEADERBOARD}
    return {
        "results": {**{task: results[task] | errors[task] for task in results}, "mmlu": {"acc,none": 0.25}},
        "groups": {"mmlu": {"acc,none": 0.25}},
        "n-shot": {**dict.fromkeys(subjects, 5), **LEADERBOARD},
        "n-samples": {task: {"original": 100, "effective": scored} for task in results},
        "higher_is_better": {task: {} for task in results},
        "lm_eval_version": "0.4.13",
        "nanophi": {
            "format": 3,
            "suite": "open-llm-v1",
            "lines": {task: {"tasks": leaves, "chance": chance.get(task)} for task, leaves in lines.items()},
        },
    }
