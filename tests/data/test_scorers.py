"""What a classifier's outputs mean is defined by its configuration and the recipe, and never guessed."""

import json
import subprocess
import sys

import numpy as np
import pytest

from nanophi.core.errors import UserError
from nanophi.data.scorers import ModelScorer, find_scorer

WORDS = ["alpha", "beta", "gamma", "delta", "good", "bad", "fine", "worse", "text", "about", "things"]
TEXTS = [b"good text", b"bad", b"alpha beta gamma delta things about good text fine", b"worse"]


def classifier(folder, labels, problem=None, decoder=False):
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
    fields = {
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


def logits_of(folder):
    """Each text by itself, without padding: the reference."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        rows = [model(**tokenizer(text.decode(), return_tensors="pt")).logits[0] for text in TEXTS]
    return torch.stack(rows).double().numpy()


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_probability_of_a_label_named(tmp_path, decoder):
    folder = classifier(tmp_path / "model", ["High", "Medium", "Low"], decoder=decoder)
    for index, label in enumerate(("High", "Medium", "Low")):
        scores = ModelScorer(str(folder), label).score(TEXTS)
        assert scores == pytest.approx(softmax(logits_of(folder))[:, index], abs=1e-5)


@pytest.mark.parametrize("names", [[str(n) for n in range(6)], [f"LABEL_{n}" for n in range(6)]])
def test_six_labels_are_worth_their_numbers_on_a_scale(tmp_path, names):
    folder = classifier(tmp_path / "model", names)
    scores = ModelScorer(str(folder), scale=(0, 5)).score(TEXTS)
    assert scores == pytest.approx(softmax(logits_of(folder)) @ np.arange(6), abs=1e-4)


def test_one_output_is_a_number_on_a_scale_or_a_logit(tmp_path):
    regression = classifier(tmp_path / "regression", ["LABEL_0"], "regression")
    logits = logits_of(regression)[:, 0]
    assert ModelScorer(str(regression), scale=(-9, 9)).score(TEXTS) == pytest.approx(logits, abs=1e-5)
    middle = float(np.median(logits))
    clipped = ModelScorer(str(regression), scale=(-9, middle)).score(TEXTS)
    assert clipped == pytest.approx(np.minimum(logits, middle), abs=1e-5)
    for labels, label in ((["good"], None), (["clean", "toxic"], "clean")):  # several labels at once are logits too
        folder = classifier(tmp_path / labels[0], labels, "multi_label_classification")
        expected = 1 / (1 + np.exp(-logits_of(folder)[:, 0]))
        assert find_scorer(str(folder), label).score(TEXTS) == pytest.approx(expected, abs=1e-5)


NUMBERED = [str(number) for number in range(6)]


@pytest.mark.parametrize(
    ("labels", "problem", "label", "scale", "message"),
    [
        (["High", "Low"], None, None, None, r"has the labels High, Low; set quality\.label to the one that [a-z ]*$"),
        (["High", "Low"], None, "high", None, "has no label 'high'; it has High, Low"),
        (["High", "Low"], None, "High", (0, 5), "is a probability; leave out"),
        (NUMBERED, None, None, None, r"or quality\.scale: \[0, 5\] for their expected value"),
        (NUMBERED, None, None, (0, 4), r"labels go from 0 to 5, outside quality\.scale"),
        (NUMBERED, "multi_label_classification", None, (0, 5), r"set quality\.label to the one that [a-z ]*$"),
        (["LABEL_0"], "regression", None, None, r"has one output \(regression\); state its range"),
        (["LABEL_0"], None, "good", (0, 5), "has no label 'good'; it has LABEL_0"),
        (["a", "b"], "regression", "a", None, "2 outputs of a regression"),
    ],
)
def test_what_the_configuration_and_the_recipe_leave_open_is_refused(tmp_path, labels, problem, label, scale, message):
    config = {"model_type": "bert", "id2label": dict(enumerate(labels)), "problem_type": problem}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        find_scorer(f"model:{tmp_path}", label, scale).check()


def test_a_name_that_is_no_scorer_is_refused(tmp_path):
    for name, message in (
        (f"model:{tmp_path / 'nothing'}", r"quality\.scorer: folder .*nothing does not exist"),
        ("column:", "must be 'linear', 'column:<name>', 'model:<hub id or folder>' or 'none'"),
        ("linear", "is fitted first"),
    ):
        with pytest.raises(UserError, match=message):
            find_scorer(name)


def test_a_model_that_was_not_trained_to_classify_is_refused(tmp_path):
    from transformers import BertForSequenceClassification

    folder = classifier(tmp_path / "model", ["bad", "good"])
    BertForSequenceClassification.from_pretrained(folder).bert.save_pretrained(folder)
    with pytest.raises(UserError, match=r"has no weights for classifier\.bias: its scores would be random"):
        ModelScorer(str(folder), "good").score(TEXTS)


def test_a_text_ends_before_its_padding_whatever_the_configuration_pads_with(tmp_path):
    folder = classifier(tmp_path / "model", ["bad", "good"], decoder=True)
    alone = softmax(logits_of(folder))[:, 1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))
    assert ModelScorer(str(folder), "good").score(TEXTS) == pytest.approx(alone, abs=1e-5)


def test_a_recipe_is_checked_without_loading_what_scores():
    """A mistyped recipe is answered at once."""
    script = (
        "import sys, nanophi.data.scorers; print(*{'numpy', 'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "\n"
