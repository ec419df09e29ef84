"""The card: everything in it comes from a record, and nothing is missing."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_records import comparison, leaderboard_results  # type: ignore[import-not-found]
from hub_server import metadata_errors  # type: ignore[import-not-found]
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard import TEMPLATE_MODELCARD_PATH

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.eval.catalogue import TASKS
from nanophi.eval.models import model_sha256
from nanophi.model_card import card, metadata, pages, secrets
from nanophi.model_card import records as shipped
from nanophi.model_card.records import ShippedRecords


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = read_json(path)
    change(content)
    write_json(path, content)


def test_every_field_of_the_hubs_template_is_answered(records):
    text = card.render(published(records))
    assert metadata.problems(text) == [] and metadata_errors(text) == []
    # Field of huggingface_hub's own template -> how this card says it, by a bold name or another mark.
    bold = {"developers": "Developed by", "model_type": "Model type", "language": "Language", "license": "License"}
    bold |= {"base_model": "Trained from scratch", "repo": "Repository", "direct_use": "Direct use"}
    bold |= {"downstream_use": "Downstream use", "out_of_scope_use": "Out of scope", "hours_used": "Hours"}
    bold |= {"bias_risks_limitations": "Limits and bias", "bias_recommendations": "Recommendations"}
    fields = {field: f"**{name}:**" for field, name in {**bold, "hardware_type": "Hardware"}.items()}
    fields |= {"model_summary": "A small English language model with", "model_description": "### Architecture"}
    fields |= {"get_started_code": "## Use", "training_data": "## Training data", "preprocessing": "### Preprocessing"}
    fields |= {"training_regime": "Training regime", "speeds_sizes_times": "| Speed |", "glossary": "*chance* is"}
    fields |= {"testing_data": "The held-out documents", "testing_factors": "bits per byte by source"}
    fields |= {"testing_metrics": "*Bits per byte* is", "results": "| held-out bits per byte |"}
    fields |= {"results_summary": "bits per byte on held-out documents", "model_specs": "A Phi decoder:"}
    fields |= {"compute_infrastructure": "## Environment", "software": "transformers 5.23.0"}
    fields |= {"hardware_requirements": "Any machine that runs transformers", "citation_bibtex": "```bibtex"}
    fields |= {"more_information": "## Reproduce and verify", "model_card_contact": "Questions: the discussions"}
    # What is not known, or would say the developers' name again, is left out instead of filled in.
    left_out = {"funded_by", "shared_by", "paper", "demo", "cloud_provider", "cloud_region", "co2_emitted"}
    left_out |= {"citation_apa", "model_examination", "model_card_authors"}
    asked = re.findall(r"\{\{ (\w+) \|", Path(TEMPLATE_MODELCARD_PATH).read_text())
    assert set(asked) - {"model_id"} == set(fields) | left_out
    assert [field for field, said in fields.items() if said not in text] == []
    assert not re.search(r"^\|(\s*\|)+$|not stated|not metered|not recorded", text, re.MULTILINE)
    assert card.render(records).count(records["recipe.yaml"]["card"]["developers"]) == 1


def published(records: ShippedRecords, repo_id: str = "org/tiny") -> ShippedRecords:
    return {**records, "run.json": {**records["run.json"], "repo_id": repo_id}}


def test_snippets_use_the_folder_until_there_is_a_repository(records):
    text, later = card.render(records), card.render(published(records))
    assert 'model="tiny/release"' in text and "revision=" not in text and "```bibtex" not in text
    assert "nanophi verify tiny/release" in text
    assert 'model="org/tiny"' in later and 'from_pretrained("org/tiny", revision="v1.0", trust_remote_code' in later
    assert "in transformers 5.4 or later" in text


def test_links_and_figures_of_the_card_are_in_the_release(built_release):
    text = (built_release / "README.md").read_text()
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert {"figures/loss.png", "figures/quality.png", "figures/evaluation.png"} <= set(targets)
    for target in targets:
        assert (built_release / target).exists(), target


def test_metadata_is_read_back_by_the_client(records):
    data: Any = ModelCard(card.render(records)).data
    assert (data.language, data.license, data.library_name) == ("en", "apache-2.0", "transformers")
    assert data.pipeline_tag == "text-generation"
    # Held-out text is not a dataset on the Hub, and bits per byte is not a metric that it knows.
    assert data.eval_results is None and data.metrics == ["accuracy"]


def test_numbers_follow_the_records(records, changed):
    text = card.render(records)
    changes: list[tuple[dict, str, Any, str]] = [
        (changed["training.json"]["summary"], "tokens_per_second", 4321.0, "4,321 tokens/s"),
        (changed["training.json"]["summary"], "epochs", 3.25, "3.25"),
        (changed["quality.json"], "kept_documents", 217, "217 of 400 documents"),
        (changed["quality.json"]["scorer"], "roc_auc", 0.8765, "0.876"),
        (changed["documents.json"]["dropped"], "near_duplicate", 77, "77 (near duplicate)"),
        (changed["tokens.json"]["train"], "tokens", 987654, "987,654 tokens"),
        (changed["model.json"], "parameters", 123456, "123,456 parameters"),
        (changed["evals/heldout.json"]["nanophi"]["heldout"], "bits_per_byte", 1.2345, "1.234"),
        (changed["run.json"]["environment"], "processor", "Some other processor", "Some other processor"),
    ]
    for place, key, value, shown in changes:
        place[key] = value
        assert shown not in text and shown in card.render(changed)


def test_the_template_holds_no_result():
    text = "".join((pages.FOLDER / "sections" / f"{name}.md").read_text() for name in card.SECTIONS)
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|```.*?```", "", text, flags=re.DOTALL)
    # What is left may count nothing but versions, names and the protocol of memorisation.
    protocol = ("After 32 tokens", "the next 32", "the 64 tokens", "Carlini et al. 2023", "2202.07646")
    for name in ("transformers 5.4", "bz2", "CO2e", "v1", "apache-2.0", "95 % confidence", *protocol):
        assert name in text
        text = text.replace(name, "")
    assert re.findall(r"\d[\d.,]*", text) == []
    assert not re.search(r"More Information Needed|\b(TODO|TBD|FIXME|nan|None|Undefined)\b", text)


def test_a_value_without_a_record_fails(changed):
    del changed["training.json"]["summary"]["tokens_per_second"]
    with pytest.raises(UserError, match="tokens_per_second"):
        card.render(changed)


def test_problems_are_named():
    headers = {"mit": "'language' is missing", "[": "not valid YAML", "MIT": "'MIT'", "other": "needs license_name"}
    assert "no YAML metadata" in metadata.problems("no metadata at all")[0]
    for licence, wrong in headers.items():
        assert wrong in "; ".join(metadata.problems(f"---\nlicense: {licence}\n---\nx"))


def test_paths_are_cut_whatever_characters_they_have(tmp_path):
    run = tmp_path / "my runs" / "tiny"
    cut = secrets.PathRemover(run)
    paths = ["/home/jane doe/Café (v2)/x.parquet", "~/texts/数据/x.parquet", "C:\\Users\\me\\y.txt", "../../up/z"]
    paths.append("/data")
    assert cut(paths) == ["x.parquet", "x.parquet (2)", "y.txt", "z", "data"]
    named = cut({"sources": {paths[1]: 1}, "scorer": f"model:{paths[0]}"})
    assert named == {"sources": {"x.parquet (2)": 1}, "scorer": "model:x.parquet"}
    assert cut(f"dir={run}/some logs") == "dir=some logs" and cut(f"<{run}/log.txt>") == "<log.txt>"
    kept = ["either/or and /usr too", "https://example.org/a/b", "org/name", "data/*.txt", {"text": "/* a comment */"}]
    assert cut(kept) == kept
    assert cut([float("nan"), float("inf"), 1.5]) == [None, None, 1.5]


def test_records_survive_writing_and_nothing_of_the_machine_is_in_them(records, finished_run, tmp_path):
    shipped.write_records(records, tmp_path)
    assert shipped.read_records(tmp_path) == records
    told = json.dumps(records)
    private = (str(finished_run.parent), "secret.txt", "A best", '"device"')
    assert [text for text in private if text in told] == []


def test_sources_with_weights_and_held_out_ones(changed, records):
    assert "The weight says" not in card.render(records)
    (plain,) = changed["recipe.yaml"]["data"]["sources"]
    web = {**plain, "embedded": None, "name": None, "hub": "org/web", "split": "train", "weight": 0.5}
    others = {"config": "more"}, {"split": "validation", "heldout": True}, {"hub": "org/only-held-out", "heldout": True}
    changed["recipe.yaml"]["data"]["sources"] = [web, *({**web, **other} for other in others)]
    text = card.render(changed)
    assert "The weight says" in text
    assert "| org/web | [org/web](https://huggingface.co/datasets/org/web), split `validation` | held out |" in text
    assert "- **Public datasets:** org/web\n" in text
    data: Any = ModelCard(text).data
    assert data.datasets == ["org/web"]


def test_metered_energy_and_its_price(changed, records):
    assert "co2_eq_emissions" not in ModelCard(card.render(records)).data.to_dict()
    assert "Energy" not in card.render(records) and "Cost" not in card.render(records)
    metered = {"energy_kwh": 20.8123, "co2_grams": 1460.04, "co2_source": "a meter", "co2_region": "FRA"}
    changed["training.json"]["summary"] |= {**metered, "cost_usd": 51.237}
    text = card.render(changed)
    for line in ("**Energy:** 20.8 kWh", "**CO2e:** 1,460 g (a meter)", "**Cost:** 51.2 US dollars", "**Region:** FRA"):
        assert f"- {line}\n" in text
    emissions = {"emissions": 1460.0, "source": "a meter", "training_type": "pre-training"}
    emissions |= {"geographical_location": "FRA", "hardware_used": "A processor, 2 threads, no GPU"}
    assert ModelCard(text).data.to_dict()["co2_eq_emissions"] == emissions
    assert metadata_errors(text) == []
    # Of a small run, and where nobody knows where it ran: no figure is rounded to nothing, no field is empty.
    changed["training.json"]["summary"] |= {"energy_kwh": 0.00123, "co2_grams": 0.0456, "co2_region": None}
    text = card.render(changed)
    assert "- **Energy:** 0.00123 kWh\n" in text and "Region" not in text
    emissions = ModelCard(text).data.to_dict()["co2_eq_emissions"]
    assert emissions["emissions"] == 0.0456 and "geographical_location" not in emissions


def test_a_model_that_began_as_another_is_not_from_scratch(changed):
    changed["recipe.yaml"]["base"] = "org/base@v2"
    text = card.render(changed)
    assert "trained from the weights of org/base\\@v2 on " in text and "**Starting point:** org/base" in text
    assert "from scratch" not in text and "from-scratch" not in text
    data: Any = ModelCard(text).data
    assert data.base_model == "org/base" and "continued-pretraining" in data.tags
    changed["recipe.yaml"]["base"] = "base"  # a folder, of which nothing but its name is shipped
    assert "base_model" not in ModelCard(card.render(changed)).data.to_dict()


def test_contradicting_or_missing_records_fail_the_build(run_copy, tmp_path):
    checkpoint = run_copy / "checkpoints/step-000030/checkpoint.json"
    edit(checkpoint, lambda r: r.update(step=29, tokens_seen=1, eval_loss=9.0))
    edit(run_copy / "training.json", lambda r: r["summary"].update(parameters=5))
    edit(run_copy / "data/quality/quality.json", lambda r: r.update(threshold=0.9))
    with pytest.raises(UserError) as caught:
        card.build(run_copy, tmp_path / "card")
    for named in ("step 29", "tokens seen: 1,", "parameters: 5,", "threshold 0.9"):
        assert named in str(caught.value)
    (run_copy / "training.json").unlink()
    with pytest.raises(UserError, match=r"training\.json"):
        card.build(run_copy, tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_a_loss_of_an_earlier_step_is_not_told(run_copy):
    edit(run_copy / "checkpoints/step-000020/checkpoint.json", lambda r: r.update(eval_step=10))
    assert [entry["eval_loss"] for entry in shipped.revisions(run_copy)] == [5.3, None, 4.3]


def test_results_of_other_weights_are_passed_over(run_copy):
    results = run_copy / "evals" / "step-000030-heldout.json"
    for sha256, suites in ((model_sha256(run_copy / "checkpoints" / "step-000030"), ["heldout"]), ("0" * 64, [])):
        edit(results, lambda r, sha256=sha256: r["nanophi"]["model"].update(sha256=sha256))
        assert list(shipped.evaluations(run_copy, "step-000030")) == [f"evals/{suite}.json" for suite in suites]


def test_card_of_an_earlier_checkpoint(finished_run, run_copy):
    write_json(run_copy / "comparison.json", comparison("tiny"))
    last, earlier = (shipped.collect(run_copy, run_copy / "checkpoints" / f"step-0000{step}") for step in (30, 10))
    # Only the finished model was compared.
    assert "comparison.json" in last and "comparison.json" not in earlier
    text = card.render(published(earlier))
    assert "This revision is the checkpoint at step 10 of 30" in text
    assert 'revision="step-000010"' in text
    assert "2.650 ± 0.050 bits per byte" in text
    assert read_json(finished_run / "sample.json")["text"] not in text


def test_sample_cannot_break_out_of_its_block(changed):
    hostile = "The module\n```\n# Heading\n<script>x</script>\n````\n[link](http://x) None {{ nan }} TODO\x00"
    changed["sample.json"]["text"] = hostile
    changed["recipe.yaml"]["card"]["prompt"] = "title: x\n---\nThe module "
    text = card.render(changed)
    assert ModelCard(text).data.widget == [{"text": "title: x\n---\nThe module "}]
    assert f"`````text\n{hostile[:-1]}\ufffd\n`````\n" in text
    assert metadata.problems(text) == []


def test_comparison_says_what_is_noise(changed, records):
    changed["comparison.json"] = comparison(records["recipe.yaml"]["name"])
    assert "Held-out bits per byte by source</summary>" in card.render(records)
    text = card.render(changed)
    filtered = records["quality.json"]["sources"]["licences"]
    kept = 100 * filtered["kept_bytes"] / filtered["bytes"]
    assert f"| licences | 2.1500 ± 0.0700 | 2.3000 | 20 | {kept:.1f} % |" in text
    assert "Held-out bits per byte by source</summary>" not in text
    answers = "held-out continuation (right answer, bits per byte)"
    assert f'better on "held-out bits per byte", "{answers}"; within noise on "' in text
    assert "| held-out bits per byte | -0.1500 [-0.1700, -0.1300] | 0.0321 | < 0.001 | better |" in text
    assert f"| {answers} | -0.0100 [-0.0300, +0.0100] | 0.0321 | < 0.001 | better |" in text
    assert "| held-out continuation | 1.9000 | 0.0200 | 200 |" in text
    assert "| held-out continuation | 41.00 ± 3.10 | 40.00 ± 3.00 | 25.00 |" in text
    assert "| other | 22.50 | 29.00 | its card |" in text


def test_titles_with_commas_are_told_apart(changed):
    """What a filter keeps and drops are two rows, and the lead must not read as both better and worse on one."""
    compared = changed["comparison.json"] = comparison("tiny")
    whole = compared["tasks"]["heldout_bits_per_byte"]
    parts = {name: f"held-out text, {name} by tiny" for name in ("kept", "dropped")}
    compared["filter"] = {name: {**copy.deepcopy(whole), "part": title} for name, title in parts.items()}
    compared["filter"]["dropped"]["differences"]["tiny"] |= {"value": 0.2, "verdict": "worse"}
    text = card.render(changed)
    assert 'better on "held-out bits per byte", "held-out text, kept by tiny", "' in text
    assert '; worse on "held-out text, dropped by tiny"; within noise on "held-out continuation"' in text


def test_leaderboard_section_and_metadata(records):
    changed = {**records, "evals/open-llm-v1.json": leaderboard_results()}
    text = card.render(changed)
    assert "### Open LLM Leaderboard Evaluation Results" in text
    assert "| Avg. | 24.17 |" in text
    assert "| MMLU (5-Shot) | 25.00 |" in text
    assert len(re.findall(r"^\| subject \d+ \|", text, re.MULTILINE)) == 57
    assert "Indistinguishable from chance: MMLU (5-shot). These scores" in text
    assert "Below chance by more than two standard errors: Winogrande (5-shot). Guessing would do better." in text
    index = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
    found = {tuple(result["dataset"].get(key) for key in ("type", "config", "split")) for result in index}
    whole = {("ai2_arc", "ARC-Challenge", "test"), ("hellaswag", None, "validation"), ("cais/mmlu", "all", "test")}
    whole |= {("truthful_qa", "multiple_choice", "validation"), ("winogrande", "winogrande_xl", "validation")}
    assert whole | {("gsm8k", "main", "test")} <= found
    (entry,) = yaml.safe_load(metadata.eval_results_files(changed)["gsm8k.yaml"])  # of a release without dates
    assert entry.pop("notes") == "5-shot, strict-match, lm-evaluation-harness"
    assert entry == {"dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"}, "value": 0.0}
    # A part of a benchmark is not passed off as the whole.
    changed = {**records, "evals/quick.json": leaderboard_results(scored=40)}
    text = card.render(changed)
    assert "Leaderboard Evaluation Results" not in text and "40 of 100" in text
    data: Any = ModelCard(text).data
    assert data.eval_results is None
    assert metadata.eval_results_files(changed) == {}


def test_results_for_the_hubs_leaderboards_have_a_date_and_a_source(records):
    """Of every task that it has one for, if it was run completely; read back by the client."""
    result = leaderboard_results() | {"date": 1796038000.0}
    for task in ("mmlu_pro", "gpqa_diamond_zeroshot"):
        result["results"][task] = {TASKS[task].metric: 0.125}
        result["n-shot"][task], result["higher_is_better"][task] = 5, {}
        result["n-samples"][task] = {"original": 100, "effective": 100}
        result["nanophi"]["lines"][task] = {"tasks": [task], "chance": None}
    changed = {**records, "evals/open-llm-v1.json": result}
    changed["run.json"] = {**records["run.json"], "repo_id": "org/demo"}
    files = metadata.eval_results_files(changed)
    found = [entry for text in files.values() for entry in parse_eval_result_entries(yaml.safe_load(text))]
    entries = {entry.dataset_id: entry for entry in found}
    assert sorted(files) == ["gpqa_diamond_zeroshot.yaml", "gsm8k.yaml", "mmlu_pro.yaml"]
    assert {entry.task_id for entry in entries.values()} == {"gsm8k", "mmlu_pro", "gpqa_diamond"}
    entry = entries["TIGER-Lab/MMLU-Pro"]
    assert (entry.value, entry.date) == (12.5, "2026-11-30")
    assert entry.source_url == "https://huggingface.co/org/demo/blob/v1.0/records/evals/open-llm-v1.json"
    changed["run.json"] = records["run.json"]  # not on the Hub: the record has no address yet
    assert "source" not in yaml.safe_load(metadata.eval_results_files(changed)["gsm8k.yaml"])[0]


@pytest.mark.parametrize("license_", ["cc0-1.0", None])
def test_what_is_recited_is_stated_and_text_without_a_licence_warned_of(changed, license_):
    (name,) = (name for name in changed if name.startswith("evals/"))
    rows = [("train", "", 200, 12), ("train", "17 or more", 3, 3), ("heldout", "", 200, 0)]
    changed[name]["nanophi"]["memorisation"] = [
        {"split": split, "occurrences": times, "items": items, "seen": 7, "verbatim": found, "near_verbatim": found}
        for split, times, items, found in rows
    ]
    for source in changed["recipe.yaml"]["data"]["sources"]:
        source["license"] = license_
    text = card.render(changed)
    assert "| training | all | 200 | 12 (6.0 %) | 3.5 to 10.2 % | 12 |" in text  # by hand, from Wilson's formula
    assert "| training | 17 or more | 3 | 3 (100.0 %) | 43.9 to 100.0 % | 3 |" in text
    assert "| held out | 7 items occur | 200 | 0 (0.0 %) | 0.0 to 1.9 % | 0 |" in text
    assert ("no licence is stated for" in text) == (license_ is None)
