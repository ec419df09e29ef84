"""Recipes: one YAML file describes a whole run, and every key is checked.

A recipe may start from another one with `extends: other.yaml` (in the same folder, or built in): its own keys replace
the other's, mapping by mapping. An unknown key, a wrong type or an impossible combination raises `UserError` naming it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from nanophi.core import dial
from nanophi.core.bases import inherit
from nanophi.core.errors import UserError, suggest
from nanophi.core.licenses import card_problems, stated_license
from nanophi.core.recipe_file import find_recipe, override, own, read
from nanophi.core.registry import OPTIMIZERS, SCORERS, choose, find

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig


class UnknownKeyError(ValueError):
    """A key that a section does not have, and a hint; what the section is called is known above it."""


class Section(pydantic.BaseModel):
    """A mapping of the recipe. Unknown keys are refused; values are checked, not coerced beyond int -> float."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def known_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise UnknownKeyError(str(key), suggest(str(key), cls.model_fields))
        return values


class Source(Section):
    """Where documents come from: exactly one of `embedded` (the installed documentation), `hub` or `files`."""

    embedded: Literal["documentation", "questions"] | None = None
    """`questions`, which the documentation answers, are conversations."""
    hub: str | None = None
    """Dataset id on the Hub, or a local folder in Hub-dataset layout or written by `save_to_disk`."""
    files: str | None = None
    """A file, a folder (all files below it) or a glob: .parquet, .arrow, .jsonl, .json, .csv, .tsv, .txt or .md, the
    last six also compressed as .gz, .bz2, .xz or .zst."""
    name: str | None = None
    """Name in reports; defaults to the id, path or glob."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    text_column: str = "text"
    """Column, or a path in it: `meta.text`, `messages[].content` (the texts of a list, joined by an empty line)."""
    separator: str | None = None
    """Splits text files into documents, for example `<|endoftext|>`; null or "": a file is one document."""
    source_column: str | None = None
    """Column that says a document's own source, if the dataset mixes several."""
    weight: float = pydantic.Field(default=1.0, gt=0)
    """Repeat factor: how often, on average, each kept document enters the token stream."""
    max_documents: int | None = pydantic.Field(default=None, gt=0)
    license: Annotated[str, pydantic.AfterValidator(stated_license)] | None = None
    """The licence of its text, an identifier of the Hub; None: not stated, and the text is not published."""
    heldout: bool = False
    """Its documents are never trained on: they are the held-out text, in place of `data.heldout_fraction`."""

    @pydantic.model_validator(mode="after")
    def one_origin(self) -> Source:
        if sum(bool(origin) for origin in (self.embedded, self.hub, self.files)) != 1:
            raise ValueError("a source names exactly one of 'embedded', 'hub' or 'files'")
        for key in () if self.hub else ("config", "split", "revision", "streaming"):
            if getattr(self, key) != Source.model_fields[key].default:
                raise ValueError(f"'{key}' is for 'hub'")
        return self


class Deduplication(Section):
    """Removal of repeated documents before anything else looks at them."""

    exact: bool = True
    near: bool = True
    """MinHash over word 5-grams."""
    similarity: float = pydantic.Field(default=0.5, gt=0, lt=1)
    """Jaccard similarity from which the later of two documents is dropped; 5 % of words changed leave about 0.63."""


class Decontamination(Section):
    """Removal of documents that share a long n-gram with evaluation items."""

    ngram: int = pydantic.Field(default=13, ge=5)
    benchmarks: str | None = None
    """Folder with the benchmarks in Hub-dataset layout; None: not checked."""


class Data(Section):
    """Documents: sources, held-out share, deduplication, decontamination."""

    sources: list[Source] = pydantic.Field(min_length=1)
    heldout_fraction: float = pydantic.Field(default=0.02, gt=0, lt=0.5)
    heldout_max_documents: int = pydantic.Field(default=2000, gt=0)
    max_tokens: int | None = pydantic.Field(default=None, gt=0)
    """Maximum number of training tokens, in documents drawn by the seed from those that the filter keeps."""
    max_dropped: float = pydantic.Field(default=0.2, ge=0, le=1)
    """Stop if a larger share of a source's documents cannot be used (no text, not UTF-8, too large); empty documents
    and repeats do not count."""
    max_lost: float = pydantic.Field(default=0.01, ge=0, le=1)
    """Stop if the tokenizer has no token for a larger share of a source's bytes, by a sample."""
    deduplication: Deduplication = Deduplication()
    decontamination: Decontamination = Decontamination()
    engine: Literal["local", "ray", "slurm"] = "local"
    """What processes the parts of the corpus: processes on this machine, a Ray cluster, or a Slurm job array."""
    workers: int | None = pydantic.Field(default=None, gt=0)
    """Processes; None: one per core (of the Ray cluster), 16 under Slurm."""

    @pydantic.model_validator(mode="after")
    def something_to_train_on(self) -> Data:
        if any(source.embedded == "questions" for source in self.sources):
            raise ValueError("'embedded: questions' are conversations, not documents")
        if all(source.heldout for source in self.sources):
            raise ValueError("every source is held out; at least one must be left to train on")
        return self


class Quality(Section):
    """The filter: a threshold or a share. `threshold: null` without a share keeps everything (a control)."""

    scorer: str = "linear"
    """`linear` (trained here), `column:<name>`, `model:<hub id or folder>`, or `none`: nothing is scored, which is also
    what a recipe of one's own sources without a filter gets."""
    high: list[str] = []
    """For `linear`: sources whose documents are examples of high-quality text; empty: the installed documentation's."""
    low: list[str] = []
    """For `linear`: sources whose documents are examples of low-quality text."""
    label: str | None = None
    """For `model:`: name of the classifier's label that means high-quality text; the score is its probability."""
    scale: tuple[float, float] | None = None
    """For `column:` and `model:`: lowest and highest score; null: 0 to 1. With it, the score of a classifier without
    `label` is the expected value of the numbers that its labels' names end in, or its one output (regression)."""
    threshold: float | None = 0.5
    """Documents that score above it are kept, in the units of `scale`."""
    share: float | None = pydantic.Field(default=None, gt=0, le=1)
    """In place of a threshold: the share of the training bytes that is kept."""
    select: Literal["best", "random", "worst"] = "best"
    """Which documents `share` keeps: those with the highest scores, any, or those with the lowest."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def share_replaces_default_threshold(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "threshold" in values:
            return values
        scores_count = values.get("share") is None and values.get("scorer") != "none"
        return values if scores_count else {**values, "threshold": None}

    @pydantic.model_validator(mode="after")
    def one_rule(self) -> Quality:
        if self.share is not None and self.threshold is not None:
            raise ValueError("'share' and 'threshold' exclude each other; set quality.threshold to null")
        if self.share is None and self.select != "best":
            raise ValueError(f"select '{self.select}' needs 'share', such as 0.42")
        if both := sorted({*self.high} & {*self.low}):
            raise ValueError(f"'high' and 'low' both name '{both[0]}'; it can be an example of one")
        return self

    @pydantic.field_validator("scorer")
    @classmethod
    def known_scorer(cls, value: str) -> str:
        choose(SCORERS, value)
        return value

    @pydantic.model_validator(mode="after")
    def threshold_on_the_scale(self) -> Quality:
        low, high = self.scale or (0.0, 1.0)
        if not low < high:
            raise ValueError(f"scale [{low:g}, {high:g}] must go from a smaller to a larger number")
        for key in ("label", "scale"):
            if getattr(self, key) is not None and key not in choose(SCORERS, self.scorer)[0].keys:
                takers = [kind for kind in (find(SCORERS, name, "scorer") for name in SCORERS) if key in kind.keys]
                raise ValueError(f"{key} is for a scorer {' or '.join(repr(kind.form) for kind in takers)}")
        if self.scale is not None and "threshold" not in self.model_fields_set:
            raise ValueError(f"with a scale, state the threshold between {low:g} and {high:g} (or null)")
        if self.threshold is not None and not low <= self.threshold <= high:
            hint = "" if self.scale else "; if they have another range, state it, for example scale: [0, 5]"
            raise ValueError(
                f"threshold {self.threshold:g} is outside the scale of the scores, {low:g} to {high:g}{hint}"
            )
        return self


class Tokenizer(Section):
    """An existing tokenizer (`path`), or a byte-level BPE trained on the documents before the filter."""

    path: str | None = None
    """Hub id or folder; None: train one."""
    vocab_size: int = pydantic.Field(default=4096, ge=300)


class Training(Section):
    """Training. `batch_size` and `steps` are global: what the optimizer sees, whatever the number of devices."""

    steps: int = pydantic.Field(gt=0)
    batch_size: int = pydantic.Field(gt=0)
    """Rows of `max_position_embeddings` tokens per optimizer step."""
    micro_batch_size: int | None = pydantic.Field(default=None, gt=0)
    """Rows per device and forward pass; None: the whole batch, divided among the devices."""
    optimizer: str = "adamw"
    """A name of `registry.OPTIMIZERS`."""
    learning_rate: float = pydantic.Field(gt=0)
    """Peak learning rate of AdamW's parameters."""
    muon_learning_rate: float = pydantic.Field(default=0.02, gt=0)
    weight_decay: float = pydantic.Field(default=0.1, ge=0)
    adam_beta1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = pydantic.Field(default=0.95, ge=0, lt=1)
    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: float = pydantic.Field(default=0.2, gt=0, le=1)
    """Share of the steps at the end in which `wsd` decays to zero."""
    stretch_cosine: bool = False
    """Let a `cosine` run continue with more `steps`: the learning rate jumps to the value of the longer curve."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the hardware supports it."""
    compile: bool = False
    isolate_documents: bool = True
    """Documents packed in one row do not attend to each other."""
    save_steps: int = pydantic.Field(default=500, gt=0)
    keep_steps: list[int] = []
    """Steps whose checkpoints are kept, in addition to the last one, and released as branches."""
    keep_states: int = pydantic.Field(default=2, gt=0)
    """How many of the last saved states a run can resume from; if the last is damaged, the one before is used."""
    eval_steps: int = pydantic.Field(default=500, gt=0)
    logging_steps: int = pydantic.Field(default=10, gt=0)
    spike_threshold: float | None = pydantic.Field(default=10.0, gt=0)
    """Stop if the logged loss jumps by this many robust standard deviations (`spike_limit`); None: never."""
    dollars_per_hour: float | None = pydantic.Field(default=None, gt=0)
    """Price of one device, for the progress line and the card; None: not shown."""
    track_energy: bool = False
    """Measure energy and emissions with codecarbon (`pip install 'nanophi[energy]'`), offline."""
    country_iso_code: str | None = pydantic.Field(default=None, pattern=r"^[A-Z]{3}$")
    """Where the electricity comes from, for the emissions: three letters, such as FRA."""
    report_to: list[str] = []
    seed: int | None = pydantic.Field(default=None, ge=0, lt=2**32)
    """Of initialisation, of the order of the documents and of what is drawn from them; None: the recipe's seed. Runs
    that differ in it alone share documents, scores and tokenizer."""
    arguments: dict[str, Any] = {}
    """Other fields of `transformers.TrainingArguments`: those that were tried (`training.arguments.ALLOWED`)."""

    @pydantic.field_validator("optimizer")
    @classmethod
    def registered(cls, optimizer: str) -> str:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"it should be {' or '.join(map(repr, OPTIMIZERS))}")
        return optimizer

    @pydantic.model_validator(mode="after")
    def possible(self) -> Training:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        late = [step for step in self.keep_steps if step > self.steps]
        if late:
            raise ValueError(f"keep_steps {late} are beyond the last step ({self.steps})")
        if min(self.keep_steps, default=1) < 1:
            raise ValueError(
                f"keep_steps {self.keep_steps}: the first step is 1; the initial weights follow from the seed"
            )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        if self.track_energy and self.country_iso_code is None:
            raise ValueError("track_energy needs country_iso_code, three letters such as FRA")
        return self


class Evaluation(Section):
    """The suites that every finished run is evaluated on."""

    suites: list[str] = ["heldout"]
    data: str | None = None
    """Folder with the benchmarks in Hub-dataset layout; None: the Hub."""
    limit: int | None = pydantic.Field(default=None, gt=0)
    batch_size: int = pydantic.Field(default=16, gt=0)


class Card(Section):
    """What only a person can know; everything else in the card comes from records."""

    title: str | None = None
    developers: str = "the user who ran this recipe"
    license: str = "apache-2.0"
    """An identifier of the Hub (`publishing.HUB_LICENSES`); `other` needs the two keys below."""
    license_name: str | None = None
    license_link: str | None = None
    """Where the text of the licence is: a URL."""
    repo_id: str | None = None
    """`ORG/NAME` on the Hub, for the snippets; None: not published yet, the snippets name the release folder."""
    version: str = pydantic.Field(default="v0.1", pattern=r"^v[0-9A-Za-z._-]+$")
    """The tag that `nanophi push` sets."""
    notes: str = ""
    """Markdown for the card's introduction."""
    prompt: str = "The "
    """The beginning of the sample text."""

    @pydantic.model_validator(mode="after")
    def publishable(self) -> Card:
        wrong = card_problems(self.model_dump())
        if wrong:
            raise ValueError(wrong[0])
        return self


class Release(Section):
    """How the release folder is written."""

    dtype: Literal["float32", "bfloat16"] = "float32"


class Lora(Section):
    """Low-rank adapters of every linear layer but the output's, merged into the weights of each checkpoint."""

    rank: int = pydantic.Field(default=16, gt=0)
    alpha: int = pydantic.Field(default=32, gt=0)


class Recipe(Section):
    """A whole run."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32)
    data: Data
    quality: Quality = Quality()
    tokenizer: Tokenizer = Tokenizer()
    model: dict[str, Any]
    """Fields of `NanoPhiConfig`; the token ids and, for a trained tokenizer, `vocab_size` come from the tokenizer."""
    base: str | None = None
    """Run, folder or Hub id (`ORG/NAME@revision`) of a model whose weights training starts from; None: random weights.
    Of `conversations`: a run, a release folder, or a release on the Hub."""
    conversations: list[Source] = []
    """For a chat model: rows with `messages`, `prompt` and `completion`, or (dpo) `chosen` and `rejected`."""
    method: Literal["sft", "dpo"] = "sft"
    """Supervised fine-tuning, or direct preference optimization (Rafailov et al., 2023)."""
    beta: float = pydantic.Field(default=0.1, gt=0)
    """Of `dpo`: how strongly the model is held to its base."""
    lora: Lora | None = None
    training: Training
    evaluation: Evaluation = Evaluation()
    card: Card = Card()
    release: Release = Release()

    @pydantic.model_validator(mode="after")
    def chat(self) -> Recipe:
        if not self.conversations and (self.method != "sft" or self.lora):
            raise ValueError("'method' and 'lora' need 'conversations' to train on")
        unused = ("text_column", "separator", "source_column", "weight", "streaming")
        for source in self.conversations:
            if source.embedded == "documentation":
                raise ValueError("'conversations': 'embedded' must be 'questions'")
            for key in unused:
                if getattr(source, key) != Source.model_fields[key].default:
                    raise ValueError(f"'conversations': '{key}' is for documents")
            if source.embedded and self.method == "dpo":
                raise ValueError("'embedded: questions' has no rejected answers, which method 'dpo' needs")
        return self

    @pydantic.model_validator(mode="after")
    def has_labels(self) -> Recipe:
        choose(SCORERS, self.quality.scorer)[0].check_section(self.quality, self.data)
        sources = self.data.sources
        if not any(source.embedded or source.source_column for source in sources):
            # Otherwise the documents say what their sources are called.
            known = [source.name or source.hub or source.files for source in sources]
            for name in (*self.quality.high, *self.quality.low):
                if name not in known:
                    raise ValueError(
                        f"quality.high or quality.low names source '{name}'; there is {', '.join(map(str, known))}"
                    )
        return self

    @pydantic.model_validator(mode="after")
    def model_can_be_built(self) -> Recipe:
        # Last, because it imports transformers: every other mistake is answered at once.
        from nanophi.configuration_nanophi import NanoPhiConfig

        allowed = set(NanoPhiConfig.__dataclass_fields__) - {"model_type", "transformers_version"}
        for key in self.model:
            if key not in allowed:
                raise ValueError(f"'model': unknown key '{key}'; {suggest(key, allowed)}")
        try:
            context = self.model_config_for().max_position_embeddings
        except ValueError as error:
            raise ValueError(f"'model': {error}") from None
        if self.data.max_tokens is not None and self.data.max_tokens < context:
            raise ValueError(f"'data': max_tokens ({self.data.max_tokens}) is less than one row of {context} tokens")
        return self

    @property
    def training_seed(self) -> int:
        """Seed of everything that may differ between two runs on the same corpus."""
        return self.seed if self.training.seed is None else self.training.seed

    def model_config_for(self, **fields: Any) -> NanoPhiConfig:
        """The model's configuration, with fields that only the tokenizer knows; one to be trained has its full size."""
        from nanophi.configuration_nanophi import NanoPhiConfig

        trained = {} if self.tokenizer.path else {"vocab_size": self.tokenizer.vocab_size}
        return NanoPhiConfig(**{**trained, **self.model, **fields})

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain data, every default written out."""
        return self.model_dump(mode="json")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the name of a built-in recipe (`demo`).
        overrides: `section.key=value` strings, values in YAML, applied last.

    Raises:
        UserError: for anything wrong with the file, naming the key.
    """
    path = find_recipe(path)
    values, said = read(path), own(path)
    for assignment in overrides:
        override(values, assignment)
        override(said, assignment)
    try:
        dial.resolve(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if values.get("conversations"):
        values = inherit(values, said)
    elif said.get("quality") in (None, {}, {"threshold": None}) and _has_no_examples(values):
        values["quality"] = {"scorer": "none", "threshold": None}
    try:
        return Recipe(**values)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None


def _has_no_examples(values: dict[str, Any]) -> bool:
    """Whether sources are the user's own, and the filter is the one that is fitted on examples, of which none is named.

    Of a recipe that asks for no filter: what it extends may.
    """
    quality, data = values.get("quality") or {}, values.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    own_files = isinstance(sources, list) and any(
        isinstance(entry, dict) and not entry.get("embedded") for entry in sources
    )
    labelled = not isinstance(quality, dict) or quality.get("high") or quality.get("low") or quality.get("share")
    return own_files and not labelled and quality.get("scorer", "linear") == "linear"


def _explain(error: pydantic.ValidationError) -> str:
    """The first problem in one line, with the key's full name."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UnknownKeyError):
        return f"unknown key '{'.'.join([*location, cause.args[0]])}'; {cause.args[1]}"
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = " ".join(problem["msg"].removeprefix("Value error, ").split())
    shown = "" if isinstance(problem["input"], dict) or not key else f", got {problem['input']!r}"
    return f"'{key}': {message}{shown}" if key else message
