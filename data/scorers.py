"""Scorers: what gives a document its quality score.

`LinearScorer` is fitted here on examples of good and of low-quality text; `Classifier` runs a transformers text
classifier; a column came with the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix, hstack, vstack

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import permit
from nanophi.core.names import local, resolve, split_revision
from nanophi.data.ngrams import hash_words, ngrams

BUCKETS = 1 << 18
EXCERPT_BYTES = 16_000
"""How much of a document the linear scorer reads."""
FIT_BYTES = 12_000_000
"""Excerpts of each label that the linear scorer is fitted on."""
TEST_SHARE = 0.2
_FIT_BATCH = 64
_CLASSES = ("lower", "upper", "digit", "newline", "space", "sentence", "quote", "markup", "other", "beyond_ascii")


def _class_table() -> np.ndarray:
    table = np.full(256, _CLASSES.index("other"), np.uint8)
    for name, characters in {
        "lower": "abcdefghijklmnopqrstuvwxyz",
        "upper": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "digit": "0123456789",
        "newline": "\n",
        "space": " \t",
        "sentence": ".,;?!",
        "quote": "'\"`()-",
        "markup": "<>{}[]\\|$#_*=/@^~&%+:",
    }.items():
        table[[ord(character) for character in characters]] = _CLASSES.index(name)
    table[128:] = _CLASSES.index("beyond_ascii")
    return table


_CLASS_TABLE = _class_table()


def features(texts: Sequence[bytes]) -> tuple[csr_matrix, np.ndarray]:
    """What the linear scorer sees of each document's first `EXCERPT_BYTES`.

    Returns:
        hashed words and word pairs, float32 `[documents, BUCKETS]`, counts over the square root of their sum; and
        statistics, float32 `[documents, len(_CLASSES) + 2]`: shares of character classes, mean word and line length.
    """
    excerpts = [text[:EXCERPT_BYTES] for text in texts]
    words = hash_words(excerpts)
    pairs = ngrams(words, 2)
    counts = words.counts + pairs.counts
    offsets = np.concatenate([[0], np.cumsum(counts)])
    indices = np.empty(offsets[-1], np.int32)
    # Each document's words, then its pairs.
    target = np.repeat(offsets[:-1] - words.offsets[:-1], words.counts) + np.arange(len(words.hashes))
    indices[target] = (words.hashes % np.uint64(BUCKETS)).astype(np.int32)
    target = np.repeat(offsets[:-1] + words.counts - pairs.offsets[:-1], pairs.counts) + np.arange(len(pairs.hashes))
    indices[target] = (pairs.hashes % np.uint64(BUCKETS)).astype(np.int32)
    values = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts).astype(np.float32)
    hashed = csr_matrix((values, indices, offsets), shape=(len(texts), BUCKETS))

    classes = _CLASS_TABLE[np.frombuffer(b"".join(excerpts), np.uint8)].astype(np.int64)
    lengths = np.array([len(text) for text in excerpts])
    classes += np.repeat(np.arange(len(texts)), lengths) * len(_CLASSES)
    tallies = np.bincount(classes, minlength=len(texts) * len(_CLASSES)).reshape(len(texts), len(_CLASSES))
    shares = tallies / np.maximum(lengths, 1)[:, None]
    word_length = np.log1p((tallies[:, 0] + tallies[:, 1]) / np.maximum(words.counts, 1))
    line_length = np.log1p(lengths / (tallies[:, _CLASSES.index("newline")] + 1))
    return hashed, np.column_stack([shares, word_length, line_length]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LinearScorer:
    """Logistic regression on `features`.

    Attributes:
        weights: float32 `[BUCKETS]`; `statistic_weights`, `mean`, `scale`: float32 `[len(_CLASSES) + 2]`.
        intercept: float.
    """

    weights: np.ndarray
    statistic_weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    intercept: float

    def score(self, texts: Sequence[bytes]) -> np.ndarray:
        """Probability that each document (UTF-8) is good, float32 `[documents]`."""
        hashed, statistics = features(texts)
        logits = hashed @ self.weights + _clip(statistics, self.mean, self.scale) @ self.statistic_weights
        return (1 / (1 + np.exp(-np.clip(logits + self.intercept, -30, 30)))).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `scorer.safetensors`."""
        arrays = {field: getattr(self, field) for field in ("weights", "statistic_weights", "mean", "scale")}
        save_file({**arrays, "intercept": np.array([self.intercept], np.float32)}, folder / "scorer.safetensors")
        permit(folder / "scorer.safetensors")

    @classmethod
    def load(cls, folder: Path) -> LinearScorer:
        """Read what `save` wrote."""
        try:
            arrays = load_file(folder / "scorer.safetensors")
            intercept = float(arrays.pop("intercept")[0])
            if arrays["weights"].shape != (BUCKETS,):
                raise KeyError("weights")
            return cls(intercept=intercept, **arrays)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no scorer.safetensors") from None
        except Exception as error:
            raise UserError(f"{folder}/scorer.safetensors is not a linear scorer ({type(error).__name__})") from None


def _clip(statistics: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # A document far outside what was seen must not be decided by one statistic.
    return np.clip((statistics - mean) / scale, -4, 4)


def fit(
    texts: Sequence[bytes], good: np.ndarray, sources: Sequence[str], seed: int
) -> tuple[LinearScorer, dict[str, Any]]:
    """Fit a linear scorer.

    Labels weigh the same, and so do the sources within a label, so that a large source does not become the definition
    of its label.

    Args:
        texts: documents, UTF-8.
        good: bool `[documents]`.
        sources: of each document.
        seed: of the split into documents to fit on and, `TEST_SHARE`, to test on.

    Returns:
        the scorer, and `{documents, test_documents, roc_auc, brier, calibration}` on the documents left out of the fit.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import brier_score_loss, roc_auc_score

    weight = np.zeros(len(texts))
    names = np.array(sources)
    for label in (False, True):
        mine = sorted({name for name, is_good in zip(sources, good, strict=True) if is_good == label})
        for name in mine:
            chosen = (names == name) & (good == label)
            weight[chosen] = len(texts) / (2 * len(mine) * chosen.sum())
    test = np.random.default_rng(seed).random(len(texts)) < TEST_SHARE
    for label in (False, True):
        for part in (test, ~test):
            if not (part & (good == label)).any():
                raise UserError(
                    "the linear scorer needs at least ten documents of each label (quality.high, quality.low)"
                )
    # In small batches: on the way to its features a text takes some thirty times its size.
    batches = [features(texts[start : start + _FIT_BATCH]) for start in range(0, len(texts), _FIT_BATCH)]
    statistics = np.concatenate([batch for _, batch in batches])
    mean, scale = statistics[~test].mean(axis=0), statistics[~test].std(axis=0) + 1e-4
    fitted, left_out = [], []
    for start in range(0, len(texts), _FIT_BATCH):
        hashed, batch = batches.pop(0)
        hashed.sum_duplicates()
        rows = hstack([hashed, csr_matrix(_clip(batch, mean, scale) * _STATISTIC_SCALE)], format="csr")
        unseen = test[start : start + _FIT_BATCH]
        fitted.append(rows[~unseen])
        left_out.append(rows[unseen])
    inputs, test_inputs = vstack(fitted, format="csr"), vstack(left_out, format="csr")
    del fitted, left_out
    model = LogisticRegression(C=_REGULARISATION, max_iter=300, tol=1e-3)
    model.fit(inputs, good[~test], sample_weight=weight[~test])
    weights = model.coef_[0].astype(np.float32)
    scorer = LinearScorer(
        weights[:BUCKETS],
        weights[BUCKETS:] * np.float32(_STATISTIC_SCALE),
        mean.astype(np.float32),
        scale.astype(np.float32),
        float(model.intercept_[0]),
    )
    scores = model.predict_proba(test_inputs)[:, 1]
    calibration = []
    for low in np.arange(0, 1, 0.1):
        inside = (scores >= low) & (scores < low + 0.1 + (low > 0.85))
        if inside.any():
            share = np.average(good[test][inside], weights=weight[test][inside])
            calibration.append(
                {
                    "mean_score": round(float(np.average(scores[inside], weights=weight[test][inside])), 4),
                    "share_good": round(float(share), 4),
                    "documents": int(inside.sum()),
                }
            )
    return scorer, {
        "documents": int((~test).sum()),
        "test_documents": int(test.sum()),
        "roc_auc": round(float(roc_auc_score(good[test], scores, sample_weight=weight[test])), 4),
        "brier": round(float(brier_score_loss(good[test], scores, sample_weight=weight[test])), 4),
        "calibration": calibration,
    }


# Chosen on sources left out of the fit; benchmarks/data_speed.py prints the area under the curve they give.
_REGULARISATION = 10.0
_STATISTIC_SCALE = 0.3


# Classifiers and columns


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Which scorer a recipe or command chooses, as it is handed to the processes that score.

    Attributes:
        kind: `linear` (`name` is the folder of a `LinearScorer`), `column`, or `model` (a transformers classifier).
        name: folder, column or Hub id.
        label: of a classifier, the name of the label whose probability is the score.
        scale: lowest and highest score; None: 0 to 1.
        revision: of a classifier on the Hub.
    """

    kind: str
    name: str
    label: str | None = None
    scale: tuple[float, float] | None = None
    revision: str | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest score."""
        return self.scale or (0.0, 1.0)

    def check_choice(self) -> None:
        """Raise `UserError` if a classifier's configuration shows that it cannot be used as it was chosen."""
        if self.kind == "model":
            label_values(self)

    def score(self, texts: Sequence[bytes], values: Sequence[float] | None = None) -> np.ndarray:
        """Scores of documents (UTF-8), float32 `[documents]`; `values` are those of a `column` scorer."""
        if self.kind == "column":
            assert values is not None
            return np.array(values, np.float32)
        if self.kind == "linear":
            return linear(self.name).score(texts)
        return classifier(self).score(texts)

    def check(self, scores: np.ndarray, ids: Sequence[str]) -> None:
        """Raise `UserError` naming the first document whose score is not a number within the scale."""
        low, high = self.range
        bad = np.flatnonzero(~((scores >= low) & (scores <= high)))
        if len(bad):
            hint = "" if self.scale else "; if they have another range, say it, for example quality.scale: [0, 5]"
            raise UserError(
                f"document {ids[bad[0]]} has quality score {scores[bad[0]]:g} ({len(bad)} such documents); "
                f"scores must be numbers from {low:g} to {high:g}{hint}"
            )


def find_scorer(
    name: str, label: str | None = None, scale: tuple[float, float] | None = None, revision: str | None = None
) -> Scorer:
    """The scorer that `column:NAME`, `model:FOLDER_OR_ID` or a bare folder or id stands for.

    An id on the Hub may be followed by `@REVISION`; `revision` comes before that.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind == "column" and rest:
        return Scorer("column", rest, None, scale)
    if name == "linear":
        raise UserError("a linear scorer is fitted first: `nanophi quality fit`; then name its folder, model:FOLDER")
    folder_or_id, at = split_revision(rest if colon and kind == "model" else name)
    revision = revision or at
    folder = local(folder_or_id) if local(folder_or_id).exists() else _published(folder_or_id, revision)
    if folder is not None and (folder / "scorer.safetensors").exists():
        if label is not None or scale is not None:
            raise UserError(
                f"{folder_or_id} is a linear scorer, whose score is a probability; leave out label and scale"
            )
        return Scorer("linear", str(folder))
    return Scorer("model", folder_or_id, label, scale, revision)


def _published(repo_id: str, revision: str | None) -> Path | None:
    """Where the linear scorer that a repository on the Hub holds was downloaded to; None if it holds none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    resolve(repo_id, "quality.scorer")
    # Where the Hub does not answer, loading a classifier says so.
    with contextlib.suppress(HfHubHTTPError, OSError):
        return Path(hf_hub_download(repo_id, "scorer.safetensors", revision=revision)).parent
    return None


def forget() -> None:
    """Load scorers again: a folder may hold another one than when this process last looked."""
    linear.cache_clear()
    classifier.cache_clear()


@functools.lru_cache(maxsize=1)
def linear(folder: str) -> LinearScorer:
    """A saved linear scorer."""
    return LinearScorer.load(Path(folder))


@functools.lru_cache(maxsize=1)
def classifier(scorer: Scorer) -> Classifier:
    """A text classifier, loaded."""
    return Classifier(scorer)


class Classifier:
    """A transformers text classifier. What its outputs mean is said by its configuration and by the recipe.

    One output without a `problem_type`, or with `regression`, is a number on `scale`; another single output is a
    logit. Of several labels the score is the probability of `label` or, with `scale`, the expected value of the
    numbers that the labels' names end in (`0` to `5`, `LABEL_0` to `LABEL_5`).

    Raises:
        UserError: if it cannot be loaded, or if that leaves open what a good score is.
    """

    def __init__(self, scorer: Scorer) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        values = label_values(scorer)
        name = local(scorer.name) if local(scorer.name).exists() else scorer.name
        with user_errors(f"quality.scorer: {scorer.name} cannot be loaded as a text classifier"):
            arguments: dict[str, Any] = {"trust_remote_code": False, "revision": scorer.revision}
            tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True, **arguments
            )
        if info["missing_keys"]:
            raise UserError(
                f"quality.scorer: {scorer.name} has no weights for {min(info['missing_keys'])}: it is a model that was "
                "not trained to classify text, and its scores would be random"
            )
        self.range = scorer.range
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer = model.eval().to(self.device), tokenizer
        self.values = None if values is None else torch.tensor(values, device=self.device)
        self.limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)
        tokenizer.padding_side = "right"
        self.batch_size = 32
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            self.batch_size = 1
        else:
            # Decoders find a text's last token by it, whatever the configuration says that they were padded with.
            model.config.pad_token_id = tokenizer.pad_token_id

    def score(self, texts: Sequence[bytes]) -> np.ndarray:
        """Scores of documents (UTF-8), of which it reads the first 512 tokens; float32 `[documents]`."""
        import torch

        scores = np.empty(len(texts), np.float32)
        # By length, so that a batch is not padded to one long document.
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = [texts[row].decode()[: 20 * self.limit] for row in rows]
            padding = self.batch_size > 1
            inputs = self.tokenizer(
                batch, truncation=True, max_length=self.limit, padding=padding, return_tensors="pt"
            ).to(self.device)
            with torch.inference_mode():
                logits = self.model(**inputs).logits.float()
            scores[rows] = self._scores(logits).cpu().numpy()
        return scores

    def _scores(self, logits: Any) -> Any:
        several = self.model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
        if self.values is None:
            return logits[:, 0].clamp(*self.range)
        return ((logits.sigmoid() if several else logits.softmax(-1)) * self.values).sum(-1)


def label_values(scorer: Scorer) -> list[float] | None:
    """What each output of a classifier counts for, by its configuration alone; None: the one output is the score.

    Raises:
        UserError: if that is not said by the recipe, or not possible.
    """
    from transformers import AutoConfig

    what = f"quality.scorer: {scorer.name}"
    name = resolve(scorer.name, "quality.scorer").folder or scorer.name
    with user_errors(f"{what} cannot be loaded as a text classifier"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=scorer.revision)
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    listed = ", ".join(names)
    problem = getattr(config, "problem_type", None)
    if len(names) == 1:
        if scorer.label not in (None, names[0]):
            raise UserError(f"{what} has no label '{scorer.label}'; it has one output, {listed}")
        if problem not in (None, "regression"):
            return [1.0]
        if scorer.scale is None:
            raise UserError(
                f"{what} has one output (regression); say from which number to which it goes, for example "
                "quality.scale: [0, 5]"
            )
        return None
    if problem == "regression":
        raise UserError(f"{what} has {len(names)} outputs of a regression, of which none is a quality score")
    if scorer.label is not None:
        if scorer.label not in names:
            raise UserError(f"{what} has no label '{scorer.label}'; it has {listed}")
        if scorer.range != (0.0, 1.0):
            raise UserError(f"{what}: the score of a label is a probability; leave out quality.scale or quality.label")
        return [float(entry == scorer.label) for entry in names]
    numbers = [re.search(r"\d+(\.\d+)?$", entry) for entry in names]
    ordered = all(numbers) and problem != "multi_label_classification"
    values = [float(found.group()) for found in numbers if found]
    if scorer.scale is None or not ordered:
        hint = f", or quality.scale: [{min(values):g}, {max(values):g}] for their expected value" if ordered else ""
        raise UserError(f"{what} has the labels {listed}; set quality.label to the one that means good text{hint}")
    low, high = scorer.scale
    if min(values) < low or max(values) > high:
        raise UserError(f"{what}: its labels go from {min(values):g} to {max(values):g}, outside quality.scale")
    return values
