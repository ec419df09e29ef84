"""What a machine reads of a card: its YAML header with `model-index`, and the Hub's evaluation result files.

The Hub's specification: https://huggingface.co/docs/hub/model-cards and .../docs/hub/eval-results
"""

import datetime
import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from nanophi.core.licenses import license_problem
from nanophi.core.names import is_hub_id, split_revision
from nanophi.eval.catalogue import TASKS, scale
from nanophi.model_card.records import ShippedRecords, hardware, leading_scores, training_sources

# lm-eval's metrics that the Hub has a page for, and its names of them.
HUB_METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "exact_match": "exact_match", "f1": "f1"}
# What a card links -> its key in the header; only the last one is the Hub's own.
LINKS = {"scorer": "quality_scorer", "control": "control_model", "space": "demo_space", "new_version": "new_version"}


def header(records: ShippedRecords) -> ModelCardData:
    """The card's YAML header."""
    recipe, results = records["recipe.yaml"], _model_index(records)
    card, run, summary = recipe["card"], records["run.json"], records["training.json"].get("summary", {})
    links = run.get("links", {})
    extra: dict[str, Any] = {"widget": [{"text": card["prompt"]}]}
    extra |= {key: links[part] for part, key in LINKS.items() if part in links}
    chat, origin, base = records.get("conversations.json"), "pretrained-from-scratch", None
    if chat is not None:
        origin, base = recipe["method"], chat["repo_id"]
        extra["widget"] = [{"messages": records["sample.json"]["prompt"]}]
    elif recipe.get("base"):
        origin, (base, _) = "continued-pretraining", split_revision(recipe["base"])
    if base and is_hub_id(base):
        extra |= {"base_model": base, "base_model_relation": "finetune"}
    if summary.get("co2_grams") is not None:
        region = summary.get("co2_region")
        extra["co2_eq_emissions"] = {
            "emissions": float(f"{summary['co2_grams']:.4g}"),
            "source": summary["co2_source"],
            "training_type": "pre-training" if chat is None else "fine-tuning",
            **({} if region is None else {"geographical_location": region}),
            "hardware_used": hardware(records),
        }
    metrics = {HUB_METRICS[score.metric] for score in leading_scores(records) if score.metric in HUB_METRICS}
    return ModelCardData(
        language="en",
        license=card["license"],
        license_name=card.get("license_name"),
        license_link=card.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["phi", "nanophi", "small-language-model", origin],
        datasets=[*public_datasets(records), *([links["data"]] if "data" in links else [])] or None,
        metrics=sorted(metrics) or None,
        model_name=run["repo_id"].rpartition("/")[2] if results else None,
        eval_results=results or None,
        **extra,
    )


def public_datasets(records: ShippedRecords) -> list[str]:
    """Hub ids of the datasets that the model and the chain of its bases were trained on, each once."""
    recipe, chain = records["recipe.yaml"], records.get("conversations.json", {}).get("bases", [])
    own = [source["hub"] for source in recipe.get("conversations", []) if not source.get("heldout")]
    named = [source["hub"] for source in training_sources(recipe)] + own + [x for b in chain for x in b.get("hub", [])]
    return list(dict.fromkeys(name for name in named if name and is_hub_id(name)))


def _model_index(records: ShippedRecords) -> list[EvalResult]:
    """The scores on whole benchmarks that are datasets of the Hub, where they stand beside others' scores."""
    results = []
    for score in leading_scores(records):
        hub = TASKS[score.task].hub if score.task in TASKS else None
        if hub is None or score.items != score.of:
            continue
        factor, places = scale(score.metric)
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=hub.id,
                dataset_name=hub.name if score.shots is None else f"{hub.name} ({score.shots}-Shot)",
                dataset_config=hub.config,
                dataset_split=hub.split,
                dataset_args={"num_few_shot": score.shots} if score.shots is not None else None,
                metric_type=score.metric,
                metric_name=hub.metric,
                metric_value=round(factor * score.value, places),
            )
        )
    return results


def eval_results_files(records: ShippedRecords) -> dict[str, str]:
    """`.eval_results/*.yaml` for the benchmarks that the Hub takes there: file name -> YAML."""
    files, run = {}, records["run.json"]
    place = f"{run['repo_id']}/blob/{run['tag'] if run['final'] else run['revision']}/records"
    for name in (name for name in records if name.startswith("evals/")):
        for score in leading_scores({name: records[name]}):
            benchmark = TASKS[score.task].benchmark if score.task in TASKS else None
            if benchmark is None or score.items != score.of:
                continue
            facts = {"notes": f"{score.shots}-shot, {score.filter}, lm-evaluation-harness"}
            if (date := records[name].get("date")) is not None:  # not in releases of 0.1
                facts["date"] = datetime.datetime.fromtimestamp(date, datetime.UTC).date().isoformat()
                if is_hub_id(run["repo_id"]):
                    facts |= {
                        "source_url": f"https://huggingface.co/{place}/{name}",
                        "source_name": "Evaluation record",
                    }
            # lm-eval's own figure, in which a group's tasks may weigh by their size.
            value = records[name]["results"][score.task][f"{score.metric},{score.filter}"]
            entry = EvalResultEntry(benchmark["id"], benchmark["task"], round(100 * value, 2), **facts)
            files[f"{score.task}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def problems(text: str) -> list[str]:
    """What in a card's header the Hub would refuse, one line each."""
    parts = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)  # a text within it may have such a line, indented
    try:
        metadata = yaml.safe_load(parts[1]) if parts else None
    except yaml.YAMLError as error:
        return [f"the metadata is not valid YAML ({' '.join(str(error).split())})"]
    if not isinstance(metadata, dict):
        return ["no YAML metadata between '---' lines at the top"]
    required = ("language", "license", "library_name", "pipeline_tag", "tags")
    wrong = [f"metadata key '{key}' is missing" for key in required if not metadata.get(key)]
    licence = license_problem(metadata.get("license"), metadata.get("license_name"), metadata.get("license_link"))
    return [*wrong, licence] if licence else wrong
