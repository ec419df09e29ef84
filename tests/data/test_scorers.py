"""What a classifier's outputs mean is said by its configuration and the recipe, and never guessed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanophi.core.errors import UserError
from nanophi.core.recipe import Data, Quality
from nanophi.data import gather, quality, quality_report, scorers
from nanophi.data.scorers import Scorer, find_scorer

WORDS = ["alpha", "beta", "gamma", "delta", "good", "bad", "fine", "worse", "text", "about", "things"]
TEXTS = [b"good text", b"bad", b"alpha beta gamma delta things about good text fine", b"worse"]


def classifier(folder: Path, labels: list[str], problem: str | None = None, decoder: bool = False) -> Path:
    """A tiny text classifier with random weights; a decoder's tokenizer has no padding token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<end>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<end>"} if decoder else {"pad_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", model_max_length=16, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    fields: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
        "problem_type": problem,
    }
    if decoder:
        model = GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **fields))
    else:
        model = BertForSequenceClassification(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **fields)
        )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    model.save_pretrained(folder)
    return folder


def logits_of(folder: Path) -> np.ndarray:
    """Each text by itself, without padding: the reference."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        rows = [model(**tokenizer(text.decode(), return_tensors="pt")).logits[0] for text in TEXTS]
    return torch.stack(rows).double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_probability_of_a_label_named(tmp_path: Path, decoder: bool) -> None:
    folder = classifier(tmp_path / "model", ["High", "Medium", "Low"], decoder=decoder)
    for index, label in enumerate(("High", "Medium", "Low")):
        scores = Scorer("model", str(folder), label).score(TEXTS)
        assert scores == pytest.approx(softmax(logits_of(folder))[:, index], abs=1e-5)
    with pytest.raises(UserError, match=r"has the labels High, Medium, Low; set quality\.label to the one") as caught:
        find_scorer(f"model:{folder}").check_choice()
    assert "scale" not in str(caught.value)
    with pytest.raises(UserError, match="has no label 'high'; it has High, Medium, Low"):
        find_scorer(str(folder), "high").check_choice()
    with pytest.raises(UserError, match="is a probability; leave out"):
        find_scorer(str(folder), "High", (0, 5)).check_choice()


@pytest.mark.parametrize("names", [[str(n) for n in range(6)], [f"LABEL_{n}" for n in range(6)]])
def test_six_labels_are_worth_their_numbers_on_a_scale(tmp_path: Path, names: list[str]) -> None:
    folder = classifier(tmp_path / "model", names)
    scores = Scorer("model", str(folder), scale=(0, 5)).score(TEXTS)
    assert scores == pytest.approx(softmax(logits_of(folder)) @ np.arange(6), abs=1e-4)
    with pytest.raises(UserError, match=r"or quality\.scale: \[0, 5\] for their expected value"):
        find_scorer(str(folder)).check_choice()
    with pytest.raises(UserError, match=r"labels go from 0 to 5, outside quality\.scale"):
        find_scorer(str(folder), scale=(0, 4)).check_choice()


def test_one_output_is_a_number_on_a_scale_or_a_logit(tmp_path: Path) -> None:
    regression = classifier(tmp_path / "regression", ["LABEL_0"], "regression")
    logits = logits_of(regression)[:, 0]
    assert Scorer("model", str(regression), scale=(-9, 9)).score(TEXTS) == pytest.approx(logits, abs=1e-5)
    middle = float(np.median(logits))
    clipped = Scorer("model", str(regression), scale=(-9, middle)).score(TEXTS)
    assert clipped == pytest.approx(np.minimum(logits, middle), abs=1e-5)
    with pytest.raises(UserError, match=r"has one output \(regression\); say from which number to which it goes"):
        find_scorer(str(regression)).check_choice()
    logit = classifier(tmp_path / "logit", ["good"], "multi_label_classification")
    expected = 1 / (1 + np.exp(-logits_of(logit)[:, 0]))
    assert find_scorer(str(logit)).score(TEXTS) == pytest.approx(expected, abs=1e-5)


def test_several_labels_at_once(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", ["clean", "toxic"], "multi_label_classification")
    expected = 1 / (1 + np.exp(-logits_of(folder)[:, 0]))
    assert find_scorer(str(folder), "clean").score(TEXTS) == pytest.approx(expected, abs=1e-5)
    outputs = classifier(tmp_path / "outputs", ["a", "b"], "regression")
    with pytest.raises(UserError, match="2 outputs of a regression"):
        find_scorer(str(outputs), "a").check_choice()
    with pytest.raises(UserError, match=r"quality\.scorer: folder .*nothing does not exist"):
        find_scorer(f"model:{tmp_path / 'nothing'}").check_choice()


def test_a_model_that_was_not_trained_to_classify_is_refused(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    folder = classifier(tmp_path / "model", ["bad", "good"])
    BertForSequenceClassification.from_pretrained(folder).bert.save_pretrained(folder)
    with pytest.raises(UserError, match=r"has no weights for classifier\.bias: .* its scores would be random"):
        Scorer("model", str(folder), "good").score(TEXTS)


def test_a_text_ends_before_its_padding_whatever_the_configuration_pads_with(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", ["bad", "good"], decoder=True)
    alone = softmax(logits_of(folder))[:, 1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))
    assert Scorer("model", str(folder), "good").score(TEXTS) == pytest.approx(alone, abs=1e-5)


def test_a_recipe_says_label_and_scale_where_they_mean_something() -> None:
    for fields, message in (
        ({"label": "x"}, "label is for a scorer 'model:"),
        ({"scale": [0, 5], "threshold": 3}, "scale is for a scorer"),
        ({"scorer": "column:q", "scale": [5, 0], "threshold": 3}, "from a smaller to a larger"),
        ({"scorer": "column:q", "scale": [0, 5]}, "say the threshold between 0 and 5"),
        ({"scorer": "column:q", "threshold": 3}, r"outside the scale of the scores, 0 to 1; if .* scale: \[0, 5\]"),
        ({"scorer": "column:q", "scale": [0, 5], "threshold": 6}, "threshold 6 is outside the scale"),
    ):
        with pytest.raises(ValueError, match=message):
            Quality.model_validate(fields)
    assert Quality.model_validate({"scorer": "column:q", "scale": [0, 5], "share": 0.4}).threshold is None


def test_a_column_with_another_scale_and_one_of_our_names(tmp_path: Path) -> None:
    lines = [{"text": f"Document number {n} of those that are scored " * 5, "source": n % 6} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    section = Quality.model_validate({"scorer": "column:source", "scale": [0, 5], "threshold": 3})
    data = Data.model_validate(
        {
            "sources": [{"files": str(tmp_path / "a.jsonl"), "name": "mine"}],
            "deduplication": {"near": False},
            "workers": 1,
        }
    )
    gather.gather(data, tmp_path / "documents", "source")
    quality.score(tmp_path / "documents", section, data, 0, tmp_path / "scores")
    report = quality.select(tmp_path / "documents", tmp_path / "scores", section, tmp_path / "quality")
    assert report["scale"] == [0, 5] and report["rule"] == "score > 3 on a scale from 0 to 5"
    assert set(report["sources"]) == {"mine"}
    assert report["histogram"]["edges"][-1] == 5 and sum(report["histogram"]["documents"]) == report["documents"]
    assert {step["threshold"]: step["documents"] for step in report["sweep"]}[3.0] == report["kept_documents"]
    with pytest.raises(UserError, match=r"scores must be numbers from 0 to 1; if they have another range"):
        wrong = Quality.model_validate({"scorer": "column:source"})
        quality.score(tmp_path / "documents", wrong, data, 0, tmp_path / "other")


# On files


def write_documents(folder: Path) -> None:
    for name in ("good", "low"):
        for number in range(15):
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = f"{name} words of the document {number} in a sentence of its own. " * 4
            (folder / name / f"{number}.txt").write_text(text if name == "good" else text.upper())


def test_commands_replace_only_what_they_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path)
    (tmp_path / "good" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match=r"good holds 0\.txt, which `nanophi quality fit` did not write"):
        quality.fit_files(["good/*.txt"], ["low/*.txt"], Path("good"))
    assert (tmp_path / "good" / "notes.txt").read_text() == "keep"
    with pytest.raises(UserError, match=r"notes\.txt is a file; `nanophi quality fit` writes a folder"):
        quality.fit_files(["good/*.txt"], ["low/*.txt"], Path("good/notes.txt"))
    (tmp_path / "good" / "notes.txt").unlink()
    for _ in range(2):
        quality.fit_files(["good"], ["low/*.txt"], Path("scorer"))
    with pytest.raises(UserError, match=r"low/\*\.txt is named as high and as low quality"):
        quality.fit_files(["good/*.txt", "low/*.txt"], ["low/*.txt"], Path("scorer"))
    scorer = find_scorer("model:scorer")
    (tmp_path / "mine.parquet").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"mine\.parquet was not written by `nanophi quality score`"):
        quality.score_files("good", scorer, Path("mine.parquet"))
    with pytest.raises(UserError, match="folder is a folder; `nanophi quality score` writes a file"):
        quality.score_files("good", scorer, Path("folder"))
    for _ in range(2):
        summary = quality.score_files("good", scorer, Path("scores.parquet"))
    assert summary["documents"] == 15
    (tmp_path / "quality").mkdir()
    (tmp_path / "quality" / "quality.md").write_text("my own notes")
    with pytest.raises(UserError, match=r"quality holds quality\.md, which `nanophi quality report` did not write"):
        quality_report.report_files(Path("scores.parquet"), None, Path("quality"))
    for _ in range(2):
        report = quality_report.report_files(Path("scores.parquet"), None, Path("report"))
    assert report["threshold"] == 0.5
    assert (tmp_path / "mine.parquet").read_bytes() == b"mine"


def test_files_are_scored_by_a_column_or_a_classifier(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"number {n}", "q": n / 2}) for n in range(10)]
    (tmp_path / "10:30.jsonl").write_text("\n".join([*lines, '{"text": "", "q": 0}', "broken"]))
    output = tmp_path / "scores.parquet"
    scorer = find_scorer("column:q", scale=(0, 5))
    summary = quality.score_files(str(tmp_path / "*.jsonl"), scorer, output)
    assert summary == {"documents": 10, "mean_score": 2.25, "dropped": {"empty": 1, "not_json": 1}}
    report = quality_report.report_files(output, 2.0, tmp_path / "report")
    assert report["kept_documents"] == 5 and list(report["sources"]) == [str(tmp_path / "10:30.jsonl")]
    with pytest.raises(UserError, match=r"--threshold 7 lies outside the scale of the scores, 0 to 5"):
        quality_report.report_files(output, 7, tmp_path / "report")
    folder = classifier(tmp_path / "model", ["bad", "good"])
    summary = quality.score_files(str(tmp_path / "*.jsonl"), find_scorer(f"model:{folder}", "good"), output)
    assert 0 < summary["mean_score"] < 1
    assert scorers.find_scorer(str(folder)).kind == "model"


def test_names_from_the_data_are_never_markup() -> None:
    assert quality_report._plain("<img src=x>|`b`") == "&lt;img src=x&gt;\\|'b'"
