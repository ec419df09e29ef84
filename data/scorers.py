"""Scorers: what gives a document its quality score. A kind is one class here and one line in `core/registry.py`.

A recipe's check imports this module, so numpy, torch and transformers are imported where they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import write_json
from nanophi.core.names import local, resolve, split_revision
from nanophi.core.registry import SCORERS, choose

if TYPE_CHECKING:
    import numpy as np

    from nanophi.core.recipe import Data, Quality


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A scorer as a recipe or command chooses it, and as it is handed to the processes that score."""

    form: ClassVar[str]  # how `quality.scorer` spells it: a kind alone, or a kind, a colon and a `name`
    keys: ClassVar[tuple[str, ...]] = ()  # of `label` and `scale` those that mean something to it
    parallel: ClassVar[bool] = True  # whether several processes score at once
    weights: ClassVar[str | None] = None  # file of a run's `data/scores` that can be published as a scorer of its own
    name: str = ""
    label: str | None = None  # of a classifier, the name of the label whose probability is the score
    scale: tuple[float, float] | None = None  # lowest and highest score; None: 0 to 1
    revision: str | None = None  # of a repository on the Hub

    @property
    def range(self) -> tuple[float, float]:
        return self.scale or (0.0, 1.0)

    @property
    def column(self) -> str | None:
        """The column of the sources that holds the scores, if they come with the data."""
        return None

    @classmethod
    def check_section(cls, quality: Quality, data: Data) -> None:
        """Raise ValueError for a recipe whose other keys it cannot work with."""

    def identity(self, model: Callable[..., dict[str, str]]) -> dict[str, Any]:
        """What the scores depend on besides the recipe's section; `model` is `Inputs.model`."""
        return {}

    def check(self) -> None:
        """Raise `UserError` if it is known, before anything is read, that it cannot be used as it was chosen."""

    def resolved(self) -> Scorer:
        """The scorer that a name stands for, which may be of another kind."""
        return self

    def prepare(self, documents: Path, quality: Quality, data: Data, seed: int, output: Path) -> Scorer:
        """The scorer ready to score a run's documents; `output/scorer.json` describes it."""
        if not (output / "scorer.json").exists():
            scale = {"scale": list(self.scale)} if self.scale else {}
            write_json(output / "scorer.json", {"scorer": quality.scorer, "label": self.label, **scale})
        return self.resolved()

    def score(self, texts: Sequence[bytes], values: Sequence[float] | None = None) -> np.ndarray:
        """Scores of documents (UTF-8), float32 `[documents]`; `values` are those of `column`."""
        raise NotImplementedError

    def check_scores(self, scores: np.ndarray, ids: Sequence[str]) -> None:
        """Raise `UserError` naming the first document whose score is not a number within the scale."""
        low, high = self.range
        bad = ~((scores >= low) & (scores <= high))
        if bad.any():
            first = int(bad.argmax())
            scale = f"scores must be numbers from {low:g} to {high:g} (quality.scale)"
            raise UserError(f"document {ids[first]} has quality score {scores[first]:g}; {scale}")


def of_section(quality: Quality, revision: str | None = None) -> Scorer:
    """The scorer of a recipe; `revision` is the commit of one on the Hub."""
    kind, name = choose(SCORERS, quality.scorer)
    return kind(name, quality.label, quality.scale, revision)


def find_scorer(name: str, label: str | None = None, scale: tuple[float, float] | None = None) -> Scorer:
    """The scorer that a command's `column:NAME`, `model:FOLDER_OR_ID`, or folder or id alone stands for."""
    if name == LinearScorer.form:
        raise UserError("a linear scorer is fitted first: `nanophi quality fit`; then name its folder, model:FOLDER")
    try:
        kind, name = choose(SCORERS, name if name.partition(":")[0] in SCORERS else f"model:{name}")
    except ValueError as error:
        raise UserError(f"scorer {name}: {error}") from None
    return kind(name, label, scale).resolved()


class ColumnScorer(Scorer):
    """A number that came with the data."""

    form = "column:<name>"
    keys = ("scale",)

    @property
    def column(self) -> str | None:
        return self.name

    def score(self, texts: Sequence[bytes], values: Sequence[float] | None = None) -> np.ndarray:
        import numpy as np

        return np.array(values, np.float32)


class LinearScorer(Scorer):
    """Logistic regression on hashed words, fitted on the run's own documents; `name` is the folder with its weights."""

    form = "linear"
    weights = "scorer.safetensors"

    @classmethod
    def load(cls, folder: Path) -> LinearScorer:
        """The scorer in a folder. Raises `UserError` if there is none."""
        scorer = cls(str(folder))
        assert scorer.model
        return scorer

    @classmethod
    def check_section(cls, quality: Quality, data: Data) -> None:
        if not all(source.embedded for source in data.sources) and not (quality.high and quality.low):
            raise ValueError("quality.scorer 'linear' needs quality.high and quality.low (names of sources)")

    def prepare(self, documents: Path, quality: Quality, data: Data, seed: int, output: Path) -> Scorer:
        if not (output / "scorer.json").exists():
            from nanophi.data.linear import fit_on_documents

            fit_on_documents(documents, quality, data, seed, output)
        return LinearScorer(str(output))

    def score(self, texts: Sequence[bytes], values: Sequence[float] | None = None) -> np.ndarray:
        scores: np.ndarray = self.model.score(texts)
        return scores

    @functools.cached_property
    def model(self) -> Any:
        from nanophi.data.linear import LinearModel

        return LinearModel.load(Path(self.name))


class NoScorer(Scorer):
    """Nothing is scored: every document counts the same, and all of them are kept."""

    form = "none"

    @classmethod
    def check_section(cls, quality: Quality, data: Data) -> None:
        if quality.threshold is not None or (quality.share is not None and quality.select != "random"):
            raise ValueError("quality.scorer 'none' scores nothing: threshold must be null, and a share 'random'")

    def score(self, texts: Sequence[bytes], values: Sequence[float] | None = None) -> np.ndarray:
        import numpy as np

        return np.zeros(len(texts), np.float32)


@dataclasses.dataclass(frozen=True)  # again, for __post_init__
class ModelScorer(Scorer):
    """A transformers text classifier, or a linear scorer that was fitted before, in a folder or on the Hub."""

    form = "model:<hub id or folder>"
    keys = ("label", "scale")
    parallel = False  # a classifier uses the whole device, or all cores, in one process

    def __post_init__(self) -> None:
        name, revision = split_revision(self.name)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "revision", self.revision or revision)

    def identity(self, model: Callable[..., dict[str, str]]) -> dict[str, Any]:
        return {"scorer": model(self.name, revision=self.revision)}

    def check(self) -> None:
        if self.resolved() is self:
            output_values(self)

    def resolved(self) -> Scorer:
        """The linear scorer, if that is what the folder or repository holds."""
        folder = local(self.name) if local(self.name).exists() else self._published()
        if folder is None or not (folder / str(LinearScorer.weights)).exists():
            return self
        if self.label is not None or self.scale is not None:
            raise UserError(f"{self.name} is a linear scorer, whose score is a probability; leave out label and scale")
        return LinearScorer(str(folder))

    def _published(self) -> Path | None:
        """Where the linear scorer that a repository on the Hub holds was downloaded to; None if it holds none."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        resolve(self.name, "quality.scorer")
        # Where the Hub does not answer, loading a classifier reports it.
        with contextlib.suppress(HfHubHTTPError, OSError):
            return Path(hf_hub_download(self.name, str(LinearScorer.weights), revision=self.revision)).parent
        return None

    def score(self, texts: Sequence[bytes], values: Sequence[float] | None = None) -> np.ndarray:
        """Scores by the first 512 tokens, float32 `[documents]`."""
        import numpy as np

        classify, counts, limit = self.classifier
        scores = np.empty(len(texts), np.float32)
        # By length, so that a batch is not padded to one long document.
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        cut = [texts[row].decode()[: 20 * limit] for row in order]
        for row, found in zip(order, classify(cut, truncation=True, max_length=limit), strict=True):
            if counts is None:
                scores[row] = np.clip(found[0]["score"], *self.range)
            else:
                scores[row] = sum(counts[output["label"]] * output["score"] for output in found)
        return scores

    @functools.cached_property
    def classifier(self) -> tuple[Any, dict[str, float] | None, int]:
        """The pipeline of transformers, what each label counts for, and the number of tokens that it reads."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, TextClassificationPipeline

        counts = output_values(self)
        name = local(self.name) if local(self.name).exists() else self.name
        options: dict[str, Any] = {"trust_remote_code": False, "revision": self.revision}
        with user_errors(f"quality.scorer: {self.name} cannot be loaded as a text classifier"):
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model, info = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **options)
        if info["missing_keys"]:
            missing = f"has no weights for {min(info['missing_keys'])}: its scores would be random"
            raise UserError(f"quality.scorer: {self.name} {missing}")
        # RoBERTa and its like count positions from the padding's id on.
        embeddings = [module for module in model.modules() if hasattr(module, "position_embeddings")]
        first = max((module.padding_idx + 1 for module in embeddings if hasattr(module, "padding_idx")), default=0)
        positions = getattr(model.config, "max_position_embeddings", 512) - first
        tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        # Decoders find a text's last token by it, whatever the configuration says that they were padded with.
        model.config.pad_token_id = tokenizer.pad_token_id
        use: Any = {"top_k": None, "batch_size": 32, "function_to_apply": "none" if counts is None else None}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        classify = TextClassificationPipeline(model=model, tokenizer=tokenizer, device=device, **use)
        return classify, counts, min(tokenizer.model_max_length, positions, 512)


def output_values(scorer: ModelScorer) -> dict[str, float] | None:
    """What each label of a classifier counts for, by its configuration alone; None: the one output is the score.

    One output without a `problem_type`, or with `regression`, is a number on `scale`; another single output is a logit.
    Of several labels the score is the probability of `label` or, with `scale`, the expected value of the numbers that
    their names end in (`0` to `5`, `LABEL_0` to `LABEL_5`).
    """
    from transformers import AutoConfig

    what, label, scale = f"quality.scorer: {scorer.name}", scorer.label, scorer.scale
    name = resolve(scorer.name, "quality.scorer").folder or scorer.name
    with user_errors(f"{what} cannot be loaded as a text classifier"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=scorer.revision)
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    problem, one, listed = getattr(config, "problem_type", None), len(names) == 1, ", ".join(names)
    if problem == "regression" and not one:
        raise UserError(f"{what} has {len(names)} outputs of a regression, none of which is a quality score")
    if label is not None and label not in names:
        raise UserError(f"{what} has no label '{label}'; it has {listed}")
    if one and problem in (None, "regression"):
        if scale is None:
            raise UserError(f"{what} has one output (regression); state its range, for example quality.scale: [0, 5]")
        return None
    if one:
        return {names[0]: 1.0}
    if label is not None:
        if scorer.range != (0.0, 1.0):
            raise UserError(f"{what}: the score of a label is a probability; leave out quality.scale or quality.label")
        return {entry: float(entry == label) for entry in names}
    found = [re.search(r"\d+(\.\d+)?$", entry) for entry in names]
    values = [float(number.group()) for number in found if number]
    ordered = len(values) == len(names) and problem != "multi_label_classification"
    if not ordered or scale is None:
        hint = f", or quality.scale: [{min(values):g}, {max(values):g}] for their expected value" if ordered else ""
        raise UserError(f"{what} has the labels {listed}; set quality.label to the one that means good text{hint}")
    if not scale[0] <= min(values) <= max(values) <= scale[1]:
        raise UserError(f"{what}: its labels go from {min(values):g} to {max(values):g}, outside quality.scale")
    return dict(zip(names, values, strict=True))
