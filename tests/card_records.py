"""Records that a card may have beside those of the finished run in miniature."""

from __future__ import annotations

from typing import Any

from nanophi.eval.catalogue import LEADERBOARD


def comparison(ours: str) -> dict[str, Any]:
    """What `nanophi compare` writes for the fixture and a control."""

    def entry(value: float, verdict: str) -> dict[str, Any]:
        interval = [value - 0.02, value + 0.02]
        p_value = 0.4 if verdict == "within noise" else 0.0004
        found = {"value": value, "interval": interval, "p_corrected": p_value, "verdict": verdict, "items": 50}
        return {**found, "minimum_detectable_effect": 0.0321}

    bits, choice = 2.9 - 30 / 40, 0.26 + 30 / 200
    return {
        "labels": [ours, "control"],
        "baseline": "control",
        "tasks": {
            "heldout_bits_per_byte": {
                "metric": "bits_per_byte",
                "num_fewshot": 0,
                "chance": None,
                "higher_is_better": False,
                "scores": {
                    ours: {"value": bits, "stderr": 0.05, "items": 50},
                    "control": {"value": 2.3, "stderr": 0.05, "items": 50},
                },
                "differences": {ours: entry(-0.15, "better")},
            },
            "heldout_continuation": {
                "metric": "acc_norm",
                "num_fewshot": 0,
                "chance": 0.25,
                "higher_is_better": True,
                "scores": {
                    ours: {"value": choice, "stderr": 0.031, "items": 200},
                    "control": {"value": 0.4, "stderr": 0.03, "items": 200},
                },
                "differences": {ours: entry(0.01, "within noise")},
            },
        },
        "answers": {
            "heldout_continuation": {
                "metric": "answer_bits_per_byte",
                "num_fewshot": 0,
                "chance": None,
                "higher_is_better": False,
                "scores": {ours: {"value": 1.9, "stderr": 0.02, "items": 200}},
                "differences": {ours: entry(-0.01, "better")},
            },
        },
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


def leaderboard_results() -> Any:
    """A complete `open-llm-v1` result: five tasks and MMLU's 57 subjects."""
    subjects = [f"mmlu_subject_{number}" for number in range(57)]
    leaves = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "truthfulqa_mc2": "acc", "winogrande": "acc"}
    results = {task: {f"{metric},none": 0.3, f"{metric}_stderr,none": 0.01} for task, metric in leaves.items()}
    results["gsm8k"] = {"exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.0}
    results |= {task: {"acc,none": 0.25, "acc_stderr,none": 0.03} for task in subjects}
    metrics = {**leaves, "gsm8k": "exact_match", "mmlu": "acc"}
    chance = {"arc_challenge": 0.25, "hellaswag": 0.25, "mmlu": 0.25, "winogrande": 0.5}
    values = {"mmlu": 0.25, "gsm8k": 0.0}
    headline = [
        {
            "task": task,
            "metric": metrics[task],
            "filter": "strict-match" if task == "gsm8k" else "none",
            "num_fewshot": 5,
            "value": values.get(task, 0.3),
            "stderr": 0.01,
            "chance": chance.get(task),
            "higher_is_better": True,
            "items": 100,
            "of": 100,
            "tasks": subjects if task == "mmlu" else [task],
        }
        for task in LEADERBOARD
    ]
    value = sum(values.get(task, 0.3) for task in LEADERBOARD) / 6
    average = {"value": value, "stderr": 0.004, "tasks": list(LEADERBOARD)}
    return {
        "results": {**results, "mmlu": {"acc,none": 0.25}},
        "groups": {"mmlu": {"acc,none": 0.25}},
        "n-shot": dict.fromkeys([*results, "mmlu"], 5),
        "n-samples": {task: {"original": 100, "effective": 100} for task in results},
        "lm_eval_version": "0.4.13",
        "nanophi": {"format": 2, "suite": "open-llm-v1", "headline": headline, "average": average},
    }
