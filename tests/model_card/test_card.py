"""The card: everything in it comes from a record, and nothing is missing."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_records import comparison, leaderboard_results  # type: ignore[import-not-found]
from hub_server import metadata_errors  # type: ignore[import-not-found]
from huggingface_hub import ModelCard
from huggingface_hub.repocard import TEMPLATE_MODELCARD_PATH

from nanophi.core.errors import UserError
from nanophi.core.files import read_json, write_json
from nanophi.core.names import final_checkpoint
from nanophi.eval.models import model_sha256
from nanophi.model_card import card, metadata, pages, secrets
from nanophi.model_card import records as shipped
from nanophi.model_card.records import ShippedRecords


@pytest.fixture(scope="module")
def records(finished_run: Path) -> ShippedRecords:
    return shipped.collect(finished_run, final_checkpoint(finished_run))


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A run that a test may change; the weights are links."""
    return Path(
        shutil.copytree(finished_run, tmp_path / finished_run.name, ignore=shutil.ignore_patterns("release", "card"))
    )


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = read_json(path)
    change(content)
    write_json(path, content)


def test_every_field_of_the_hubs_template_is_answered(records: ShippedRecords) -> None:
    text = card.render(published(records))
    assert metadata.problems(text) == [] and metadata_errors(text) == []
    # Section or field of huggingface_hub's own template -> how this card says it; the rest is said in prose.
    fields = {
        "model_summary": "A small English language model with",
        "model_description": "### Architecture",
        "developers": "**Developed by:**",
        "model_type": "**Model type:**",
        "language": "**Language:**",
        "license": "**License:**",
        "base_model": "**Trained from scratch:**",
        "repo": "**Repository:**",
        "direct_use": "**Direct use:**",
        "downstream_use": "**Downstream use:**",
        "out_of_scope_use": "**Out of scope:**",
        "bias_risks_limitations": "**Limits and bias:**",
        "bias_recommendations": "**Recommendations:**",
        "get_started_code": "## Use",
        "training_data": "## Training data",
        "preprocessing": "### Preprocessing",
        "training_regime": "Training regime",
        "speeds_sizes_times": "| Speed |",
        "testing_data": "The held-out documents",
        "testing_factors": "bits per byte by source",
        "testing_metrics": "*Bits per byte* is",
        "results": "| held-out bits per byte |",
        "results_summary": "bits per byte on held-out documents",
        "hardware_type": "**Hardware:**",
        "hours_used": "**Hours:**",
        "model_specs": "A Phi decoder:",
        "compute_infrastructure": "## Environment",
        "hardware_requirements": "Any machine that runs transformers",
        "software": "transformers 5.23.0",
        "citation_bibtex": "```bibtex",
        "glossary": "*chance* is",
        "more_information": "## Reproduce and verify",
        "model_card_contact": "Questions: the discussions",
    }
    # What is not known, or would say the developers' name again, is left out instead of filled in.
    left_out = {"funded_by", "shared_by", "paper", "demo", "cloud_provider", "cloud_region", "co2_emitted"}
    left_out |= {"citation_apa", "model_examination", "model_card_authors"}
    asked = re.findall(r"\{\{ (\w+) \|", Path(TEMPLATE_MODELCARD_PATH).read_text())
    assert set(asked) - {"model_id"} == set(fields) | left_out
    for field, said in fields.items():
        assert said in text, field


def test_key_value_tables_have_headers_and_nothing_is_filled_in(records: ShippedRecords) -> None:
    text = card.render(records)
    assert not re.search(r"^\|(\s*\|)+$", text, re.MULTILINE)
    assert not re.search(r"not stated|not metered|not recorded", text)
    assert text.count(records["recipe.yaml"]["card"]["developers"]) == 1


def published(records: ShippedRecords, repo_id: str = "org/tiny") -> ShippedRecords:
    return {**records, "run.json": {**records["run.json"], "repo_id": repo_id}}


def test_snippets_use_the_folder_until_there_is_a_repository(records: ShippedRecords) -> None:
    text, later = card.render(records), card.render(published(records))
    assert 'model="tiny/release"' in text and "revision=" not in text and "```bibtex" not in text
    assert "nanophi verify tiny/release" in text
    assert 'model="org/tiny"' in later and 'from_pretrained("org/tiny", revision="v1.0", trust_remote_code' in later
    assert "in transformers 5.4 or later" in text


def test_links_and_figures_of_the_card_are_in_the_release(built_release: Path) -> None:
    text = (built_release / "README.md").read_text()
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert {"figures/loss.png", "figures/quality.png", "figures/evaluation.png"} <= set(targets)
    for target in targets:
        assert (built_release / target).exists(), target


def test_metadata_is_read_back_by_the_client(records: ShippedRecords) -> None:
    data: Any = ModelCard(card.render(records)).data
    assert (data.language, data.license, data.library_name) == ("en", "apache-2.0", "transformers")
    assert data.pipeline_tag == "text-generation"
    # Held-out text is no dataset of the Hub, and bits per byte no metric that it knows.
    assert data.eval_results is None and data.metrics == ["accuracy"]


@pytest.mark.parametrize(
    ("name", "path", "value", "shown"),
    [
        ("training.json", ("summary", "tokens_per_second"), 4321.0, "4,321 tokens/s"),
        ("training.json", ("summary", "epochs"), 3.25, "3.25"),
        ("quality.json", ("kept_documents",), 217, "217 of 400 documents"),
        ("quality.json", ("scorer", "roc_auc"), 0.8765, "0.876"),
        ("documents.json", ("dropped", "near_duplicate"), 77, "77 (near duplicate)"),
        ("tokens.json", ("train", "tokens"), 987654, "987,654 tokens"),
        ("model.json", ("parameters",), 123456, "123,456 parameters"),
        ("evals/heldout.json", ("nanophi", "heldout", "bits_per_byte"), 1.2345, "1.234"),
        ("run.json", ("environment", "processor"), "Some other processor", "Some other processor"),
    ],
)
def test_numbers_follow_the_records(records: ShippedRecords, name: str, path: tuple, value: Any, shown: str) -> None:
    changed = copy.deepcopy(records)
    place = changed[name]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert shown not in card.render(records)
    assert shown in card.render(changed)


def test_the_template_holds_no_result() -> None:
    text = "".join((pages.FOLDER / "sections" / f"{name}.md").read_text() for name in card.SECTIONS)
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|```.*?```", "", text, flags=re.DOTALL)
    # What is left may count nothing but versions and names.
    for name in ("transformers 5.4", "bz2", "CO2e", "v1", "apache-2.0", "95 % confidence"):
        assert name in text
        text = text.replace(name, "")
    assert re.findall(r"\d[\d.,]*", text) == []
    assert not re.search(r"More Information Needed|\b(TODO|TBD|FIXME|nan|None|Undefined)\b", text)


def test_a_value_without_a_record_fails(records: ShippedRecords) -> None:
    changed = copy.deepcopy(records)
    del changed["training.json"]["summary"]["tokens_per_second"]
    with pytest.raises(UserError, match="tokens_per_second"):
        card.render(changed)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("checkpoints/step-000030/checkpoint.json", lambda r: r.update(step=29), "step 29"),
        ("checkpoints/step-000030/checkpoint.json", lambda r: r.update(tokens_seen=1), "tokens seen: 1,"),
        ("checkpoints/step-000030/checkpoint.json", lambda r: r.update(eval_loss=9.0), "9.0"),
        ("training.json", lambda r: r["summary"].update(parameters=5), "parameters: 5,"),
        ("data/quality/quality.json", lambda r: r.update(threshold=0.9), "threshold 0.9"),
    ],
)
def test_contradicting_records_fail_the_build(
    run_copy: Path, tmp_path: Path, file: str, change: Any, named: str
) -> None:
    edit(run_copy / file, change)
    with pytest.raises(UserError, match=named):
        card.build(run_copy, tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_missing_record_is_named(run_copy: Path, tmp_path: Path) -> None:
    (run_copy / "training.json").unlink()
    with pytest.raises(UserError, match=r"training\.json"):
        card.build(run_copy, tmp_path / "card")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("no metadata at all", "metadata"),
        ("---\nlicense: mit\n---\n" + "x" * 300, "'language' is missing"),
        ("---\nlicense: [\n---\n" + "x" * 300, "not valid YAML"),
        ("---\nlicense: MIT\n---\n" + "x" * 300, "'MIT'"),
        ("---\nlicense: other\n---\nx", "needs license_name and license_link"),
    ],
)
def test_problems_are_named(text: str, wrong: str) -> None:
    assert any(wrong in line for line in metadata.problems(text))


def test_a_prompt_with_a_line_of_dashes_does_not_end_the_metadata(records: ShippedRecords) -> None:
    changed = copy.deepcopy(records)
    changed["recipe.yaml"]["card"]["prompt"] = "title: x\n---\nThe module "
    text = card.render(changed)
    assert "\n    ---\n" in text
    assert metadata.problems(text) == []
    assert ModelCard(text).data.widget == [{"text": "title: x\n---\nThe module "}]


def test_nothing_of_the_machine_is_shipped(records: ShippedRecords, finished_run: Path) -> None:
    told = json.dumps(records)
    assert str(finished_run.parent) not in told
    assert "secret.txt" not in told and "A best" not in told
    assert '"device"' not in told


def test_paths_are_cut_whatever_characters_they_have(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "tiny"
    cut = secrets.PathRemover(run)
    paths = [
        "/home/jane doe/Café (v2)/x.parquet",
        "~/texts/数据/x.parquet",
        "C:\\Users\\me\\y.txt",
        "../../up/z",
        "/data",
    ]
    assert cut(paths) == ["x.parquet", "x.parquet (2)", "y.txt", "z", "data"]
    assert cut({"sources": {paths[1]: 1}, "scorer": f"model:{paths[0]}"}) == {
        "sources": {"x.parquet (2)": 1},
        "scorer": "model:x.parquet",
    }
    assert cut(f"dir={run}/some logs") == "dir=some logs" and cut(f"<{run}/log.txt>") == "<log.txt>"
    kept = ["either/or and /usr too", "https://example.org/a/b", "org/name", "data/*.txt", {"text": "/* a comment */"}]
    assert cut(kept) == kept
    assert cut([float("nan"), float("inf"), 1.5]) == [None, None, 1.5]


def test_records_survive_writing(records: ShippedRecords, tmp_path: Path) -> None:
    shipped.write_records(records, tmp_path)
    again = shipped.read_records(tmp_path)
    assert again == records
    assert card.render(again) == card.render(records)


def test_sources_with_weights_and_held_out_ones(records: ShippedRecords) -> None:
    changed = copy.deepcopy(records)
    assert "The weight says" not in card.render(records)
    (plain,) = changed["recipe.yaml"]["data"]["sources"]
    web = {**plain, "embedded": None, "name": None, "hub": "org/web", "split": "train", "weight": 0.5}
    changed["recipe.yaml"]["data"]["sources"] = [
        web,
        {**web, "config": "more"},
        {**web, "split": "validation", "heldout": True},
        {**web, "hub": "org/only-held-out", "heldout": True},
    ]
    text = card.render(changed)
    assert "The weight says" in text
    assert "| org/web | [org/web](https://huggingface.co/datasets/org/web), split `validation` | held out |" in text
    assert "- **Public datasets:** org/web\n" in text
    data: Any = ModelCard(text).data
    assert data.datasets == ["org/web"]


def test_metered_energy_and_its_price(records: ShippedRecords) -> None:
    assert "co2_eq_emissions" not in ModelCard(card.render(records)).data.to_dict()
    assert "Energy" not in card.render(records) and "Cost" not in card.render(records)
    changed = copy.deepcopy(records)
    metered = {"energy_kwh": 20.8123, "co2_grams": 1460.04, "co2_source": "a meter", "co2_region": "FRA"}
    changed["training.json"]["summary"] |= {**metered, "cost_usd": 51.237}
    text = card.render(changed)
    for line in ("**Energy:** 20.8 kWh", "**CO2e:** 1,460 g (a meter)", "**Cost:** 51.2 US dollars", "**Region:** FRA"):
        assert f"- {line}\n" in text
    data = ModelCard(text).data.to_dict()
    assert data["co2_eq_emissions"] == {
        "emissions": 1460.0,
        "source": "a meter",
        "training_type": "pre-training",
        "geographical_location": "FRA",
        "hardware_used": "A processor, 2 threads, no GPU",
    }
    assert metadata_errors(text) == []
    # Of a small run, and where nobody knows where it ran: no figure is rounded to nothing, no field is empty.
    changed["training.json"]["summary"] |= {"energy_kwh": 0.00123, "co2_grams": 0.0456, "co2_region": None}
    text = card.render(changed)
    assert "- **Energy:** 0.00123 kWh\n" in text and "Region" not in text
    emissions = ModelCard(text).data.to_dict()["co2_eq_emissions"]
    assert emissions["emissions"] == 0.0456 and "geographical_location" not in emissions


def test_a_model_that_began_as_another_is_not_from_scratch(records: ShippedRecords) -> None:
    changed = copy.deepcopy(records)
    changed["recipe.yaml"]["base"] = "org/base@v2"
    text = card.render(changed)
    assert "trained from the weights of org/base\\@v2 on " in text and "**Starting point:** org/base" in text
    assert "from scratch" not in text and "from-scratch" not in text
    data: Any = ModelCard(text).data
    assert data.base_model == "org/base" and "continued-pretraining" in data.tags
    changed["recipe.yaml"]["base"] = "base"  # a folder, of which nothing but its name is shipped
    assert "base_model" not in ModelCard(card.render(changed)).data.to_dict()


def test_query_key_layernorm_needs_a_later_transformers(records: ShippedRecords) -> None:
    changed = copy.deepcopy(records)
    changed["model.json"]["config"]["qk_layernorm"] = True
    assert "transformers 4.37.2 or later" in card.render(records)
    assert "transformers 4.48 or later" in card.render(changed)


def test_a_loss_of_an_earlier_step_is_not_told(run_copy: Path) -> None:
    edit(run_copy / "checkpoints/step-000020/checkpoint.json", lambda r: r.update(eval_step=10))
    assert [entry["eval_loss"] for entry in shipped.revisions(run_copy)] == [5.3, None, 4.3]


def test_results_of_other_weights_are_passed_over(run_copy: Path) -> None:
    results = run_copy / "evals" / "step-000030-heldout.json"
    for sha256, suites in ((model_sha256(run_copy / "checkpoints" / "step-000030"), ["heldout"]), ("0" * 64, [])):
        edit(results, lambda r, sha256=sha256: r["nanophi"]["model"].update(sha256=sha256))
        assert list(shipped.evaluations(run_copy, "step-000030")) == [f"evals/{suite}.json" for suite in suites]


def test_card_of_an_earlier_checkpoint(finished_run: Path) -> None:
    text = card.render(published(shipped.collect(finished_run, finished_run / "checkpoints" / "step-000010")))
    assert "This revision is the checkpoint at step 10 of 30" in text
    assert 'revision="step-000010"' in text
    assert "2.650 ± 0.050 bits per byte" in text
    assert read_json(finished_run / "sample.json")["text"] not in text


def test_only_the_finished_model_has_the_comparison(run_copy: Path) -> None:
    write_json(run_copy / "comparison.json", comparison("tiny"))
    last, earlier = (run_copy / "checkpoints" / name for name in ("step-000030", "step-000010"))
    assert "comparison.json" in shipped.collect(run_copy, last)
    assert "comparison.json" not in shipped.collect(run_copy, earlier)


def test_sample_cannot_break_out_of_its_block(records: ShippedRecords) -> None:
    changed = copy.deepcopy(records)
    hostile = "The module\n```\n# Heading\n<script>x</script>\n````\n[link](http://x) None {{ nan }} TODO\x00"
    changed["sample.json"]["text"] = hostile
    text = card.render(changed)
    assert f"`````text\n{hostile[:-1]}\ufffd\n`````\n" in text
    assert metadata.problems(text) == []


def test_comparison_says_what_is_noise(records: ShippedRecords) -> None:
    changed = copy.deepcopy(records)
    changed["comparison.json"] = comparison(records["recipe.yaml"]["name"])
    assert "Held-out bits per byte by source</summary>" in card.render(records)
    text = card.render(changed)
    filtered = records["quality.json"]["sources"]["licences"]
    kept = 100 * filtered["kept_bytes"] / filtered["bytes"]
    assert f"| licences | 2.1500 ± 0.0700 | 2.3000 | 20 | {kept:.1f} % |" in text
    assert "Held-out bits per byte by source</summary>" not in text
    lead = (
        'better on "held-out bits per byte", "held-out continuation (right answer, bits per byte)"; within noise on "'
    )
    assert lead in text
    assert "| held-out bits per byte | -0.1500 [-0.1700, -0.1300] | 0.0321 | < 0.001 | better |" in text
    answers = "held-out continuation (right answer, bits per byte)"
    assert f"| {answers} | -0.0100 [-0.0300, +0.0100] | 0.0321 | < 0.001 | better |" in text
    assert "| held-out continuation | 1.9000 | 0.0200 | 200 |" in text
    assert "| held-out continuation | 41.00 ± 3.10 | 40.00 ± 3.00 | 25.00 |" in text
    assert "| other | 22.50 | 29.00 | its card |" in text


def test_titles_with_commas_are_told_apart(records: ShippedRecords) -> None:
    """What a filter keeps and drops are two rows, and the lead must not read as both better and worse on one."""
    changed = copy.deepcopy({**records, "comparison.json": comparison("tiny")})
    compared = changed["comparison.json"]
    whole = compared["tasks"]["heldout_bits_per_byte"]
    parts = {name: f"held-out text, {name} by tiny" for name in ("kept", "dropped")}
    compared["filter"] = {name: {**copy.deepcopy(whole), "part": title} for name, title in parts.items()}
    compared["filter"]["dropped"]["differences"]["tiny"] |= {"value": 0.2, "verdict": "worse"}
    text = card.render(changed)
    assert 'better on "held-out bits per byte", "held-out text, kept by tiny", "' in text
    assert '; worse on "held-out text, dropped by tiny"; within noise on "held-out continuation"' in text


def test_leaderboard_section_and_metadata(records: ShippedRecords) -> None:
    changed = {**records, "evals/open-llm-v1.json": leaderboard_results()}
    text = card.render(changed)
    assert "### Open LLM Leaderboard Evaluation Results" in text
    assert "| Avg. | 24.17 |" in text
    assert "| MMLU (5-Shot) | 25.00 |" in text
    assert len(re.findall(r"^\| subject \d+ \|", text, re.MULTILINE)) == 57
    assert "Indistinguishable from chance: MMLU (5-shot). These scores" in text
    assert "Below chance by more than two standard errors: Winogrande (5-shot). Guessing would do better." in text
    index = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
    found = {
        (result["dataset"]["type"], result["dataset"].get("config"), result["dataset"].get("split")) for result in index
    }
    assert {
        ("ai2_arc", "ARC-Challenge", "test"),
        ("hellaswag", None, "validation"),
        ("cais/mmlu", "all", "test"),
        ("truthful_qa", "multiple_choice", "validation"),
        ("winogrande", "winogrande_xl", "validation"),
        ("gsm8k", "main", "test"),
    } <= found
    files = metadata.eval_results_files(changed)
    assert yaml.safe_load(files["gsm8k.yaml"])[0]["dataset"]["id"] == "openai/gsm8k"


def test_a_part_of_a_benchmark_is_not_passed_off_as_the_whole(records: ShippedRecords) -> None:
    changed = {**records, "evals/quick.json": leaderboard_results(scored=40)}
    text = card.render(changed)
    assert "Leaderboard Evaluation Results" not in text and "40 of 100" in text
    data: Any = ModelCard(text).data
    assert data.eval_results is None
    assert metadata.eval_results_files(changed) == {}
