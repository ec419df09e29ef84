"""Recipes: one YAML file describes a whole run, and every key is checked.

An unknown key, a wrong type or an impossible combination raises `UserError` naming it. How files are found, and how one
`extends` another, is in `recipe_file.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

import pydantic
import typer
from pydantic import Field
from typer import Option

from nanophi.core import dial
from nanophi.core.bases import inherit
from nanophi.core.errors import UserError, suggest
from nanophi.core.licenses import card_problems, unlisted
from nanophi.core.names import RUN
from nanophi.core.options import OneRecipe, Overrides
from nanophi.core.recipe_file import RECIPES, dump, find_recipe, override, own, read
from nanophi.core.registry import OPTIMIZERS, SCORERS, choose, find
from nanophi.core.run import differences

if TYPE_CHECKING:
    from nanophi.configuration_nanophi import NanoPhiConfig


SCHEMA = RECIPES / "schema.json"
"""For editors: `tests/recipe_schema.py` makes it from the classes below and the comments beside their fields."""
Rules = Iterator[tuple[object, str]]
"""What must not be true, and what is wrong then."""


def check_keys(keys: Iterable[Any], known: Iterable[str]) -> None:
    """Raise ValueError for the first key that is not known, with the nearest that is."""
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown key '{key}'; {suggest(str(key), known)}")


class Section(pydantic.BaseModel):
    """A mapping of the recipe. Unknown keys are refused; values are checked, not coerced beyond int -> float.

    `1e9`, which a recipe file holds as text because it may be a commit, is a number where one belongs.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, strict=True
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def known_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        check_keys(values, cls.model_fields)
        kinds = {key: cls.model_fields[key].annotation for key in values}
        numbers = [key for key, kind in kinds.items() if float in (kind, *get_args(kind))]
        powers = [key for key in numbers if re.fullmatch(r"[-+]?\d+[eE]\d+", str(values[key]), re.ASCII)]
        return {**values, **{key: float(values[key]) for key in powers}}

    @pydantic.model_validator(mode="after")
    def obeys(self) -> Self:
        for broken, words in self.rules():
            if broken:
                raise ValueError(words)
        return self

    def rules(self) -> Rules:
        """What a type does not say of the section's values."""
        yield from ()

    def given(self, *keys: str) -> str | None:
        """The first of the keys whose value is not its default."""
        return next((key for key in keys if getattr(self, key) != type(self).model_fields[key].default), None)


class Source(Section):
    """Where documents come from: exactly one of `embedded` (the installed documentation), `hub` or `files`."""

    embedded: Literal["documentation", "questions"] | None = None  # `questions`: conversations
    hub: str | None = None  # dataset on the Hub, or a folder in Hub-dataset layout or by `save_to_disk`
    files: str | None = None  # a file, a folder (all files below it) or a glob, of the formats in `data/formats.py`
    name: str | None = None  # name in reports; defaults to the id, path or glob
    config: str | None = None  # the configuration of a dataset on the Hub that has several
    split: str = "train"  # the split of a dataset on the Hub
    revision: str | None = None  # branch, tag or commit of a dataset on the Hub; null: main
    streaming: bool = False  # read from the Hub while it is being used, without a download first
    text_column: str = "text"  # or a path: `meta.text`, `messages[].content` (texts joined by an empty line)
    separator: str | None = None  # text between two documents in a text file; null: a file is one document
    source_column: str | None = None  # column that says a document's own source, if the dataset mixes several
    weight: float = Field(default=1.0, gt=0)  # how often, on average, a kept document enters the stream
    max_documents: int | None = Field(default=None, gt=0)  # the first so many; null: all
    license: str | None = None  # of its text, as the Hub names it; null: not stated, the text is not published
    heldout: bool = False  # never trained on: the held-out text, in place of `data.heldout_fraction`
    phase: Literal["all", "stable", "decay", "none"] = "all"  # `stable`: read before the learning rate decays

    def reads(self, phase: str) -> bool:
        """Whether the phase `stable` or `decay` of a training reads this source."""
        return not self.heldout and self.phase in ("all", phase)

    def rules(self) -> Rules:
        origins = [origin for origin in (self.embedded, self.hub, self.files) if origin]
        yield len(origins) != 1, "a source names exactly one of 'embedded', 'hub' or 'files'"
        of_hub = self.given("config", "split", "revision", "streaming")
        yield of_hub and not self.hub, f"'{of_hub}' is for 'hub'"
        yield self.heldout and self.given("phase"), "a held-out source is read in no phase; leave out 'phase'"
        if self.license is not None:
            yield self.license == "unknown", "license 'unknown' states no licence; leave it out"
            yield (problem := unlisted(self.license)), problem


class Deduplication(Section):
    """Removal of repeated documents before anything else looks at them."""

    exact: bool = True  # a document that repeats another one, byte for byte
    near: bool = True  # MinHash over word 5-grams
    similarity: float = Field(default=0.5, gt=0, lt=1)  # Jaccard; with 5 % of the words changed it is about 0.63


class Decontamination(Section):
    """Removal of documents that share a long n-gram with evaluation items."""

    ngram: int = Field(default=13, ge=5)  # length of what is shared, in words
    benchmarks: str | None = None  # folder with the benchmarks in Hub-dataset layout; null: not checked


class Data(Section):
    """Documents: sources, held-out share, deduplication, decontamination."""

    sources: list[Source] = Field(min_length=1)  # where the documents come from
    heldout_fraction: float = Field(default=0.02, gt=0, lt=0.5)  # share of the documents that is never trained on
    heldout_max_documents: int = Field(default=2000, gt=0)  # held out at most
    max_tokens: int | None = Field(default=None, gt=0)  # of training, in documents drawn from those kept; null: all
    max_decay_tokens: int | None = Field(default=None, gt=0)  # of the text of the decay; null: `max_tokens`
    max_dropped: float = Field(
        default=0.2, ge=0, le=1
    )  # stop if more of a source has no text, is not UTF-8, or too large
    max_lost: float = Field(default=0.01, ge=0, le=1)  # stop if a larger share of a source's bytes has no token
    deduplication: Deduplication = Deduplication()  # repeated documents
    decontamination: Decontamination = Decontamination()  # text of benchmarks
    engine: Literal["local", "ray", "slurm"] = "local"  # processes on this machine, a Ray cluster, or a Slurm job array
    workers: int | None = Field(default=None, gt=0)  # null: one per core (of the Ray cluster), 16 under Slurm

    @property
    def two_phases(self) -> bool:
        """Whether its keys state another text for the decay."""
        return self.max_decay_tokens is not None or any(one.phase in ("stable", "decay") for one in self.sources)

    def rules(self) -> Rules:
        questions = any(source.embedded == "questions" for source in self.sources)
        yield questions, "'embedded: questions' are conversations, not documents"
        yield all(source.heldout for source in self.sources), "every source is held out; leave one to train on"
        for phase, when in (("stable", "before"), ("decay", "while")):
            unread = not any(source.reads(phase) for source in self.sources)
            yield unread, f"no source is read {when} the learning rate decays; change a 'phase'"


class Quality(Section):
    """The filter: a threshold or a share. `threshold: null` without a share keeps everything (a control)."""

    scorer: str = "linear"
    """Scores documents: `linear` (trained here), `column:<name>`, `model:<hub id or folder>`; `none`: no scores."""
    high: list[str] = []  # for `linear`: sources of high-quality text; empty: the installed documentation
    low: list[str] = []  # for `linear`: sources whose documents are examples of low-quality text
    label: str | None = None  # for `model:`, the label of high-quality text; the score is its probability
    scale: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """For `column:` and `model:`: lowest and highest score; null: 0 to 1. With it, the score of a classifier without
    `label` is the expected value of the numbers that its labels' names end in, or its one output (regression)."""
    threshold: float | None = 0.5  # documents that score above it are kept, in the units of `scale`
    share: float | None = Field(default=None, gt=0, le=1)  # of the training bytes, in place of a threshold
    select: Literal["best", "random", "worst"] = "best"  # which documents `share` keeps, by score
    phase: Literal["all", "decay"] = "all"  # `decay`: until the learning rate of `wsd` decays, nothing is filtered

    @pydantic.model_validator(mode="before")
    @classmethod
    def share_replaces_default_threshold(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("share") is not None or values.get("scorer") == "none"):
            return {"threshold": None, **values}
        return values

    def rules(self) -> Rules:
        scorer, _ = choose(SCORERS, self.scorer)
        yield self.share and self.threshold is not None, "'share' and 'threshold' exclude each other; set one to null"
        yield self.share is None and self.select != "best", f"select '{self.select}' needs 'share', such as 0.42"
        both = ", ".join(map(repr, {*self.high} & {*self.low}))
        yield both, f"'high' and 'low' both name {both}; it can be an example of one"
        low, high = self.scale or (0.0, 1.0)
        yield not low < high, f"scale [{low:g}, {high:g}] must go from a smaller to a larger number"
        if unused := self.given(*({"label", "scale"} - {*scorer.keys})):
            kinds = [find(SCORERS, name, "scorer") for name in SCORERS]
            users = " or ".join(repr(kind.form) for kind in kinds if unused in kind.keys)
            yield True, f"{unused} is for a scorer {users}"
        unstated = self.scale is not None and "threshold" not in self.model_fields_set
        yield unstated, f"with a scale, state the threshold between {low:g} and {high:g} (or null)"
        if self.threshold is not None and not low <= self.threshold <= high:
            hint = "if they have another range, state it, for example scale: [0, 5]"
            yield True, f"threshold {self.threshold:g} is outside the scale of the scores, {low:g} to {high:g}; {hint}"


class Tokenizer(Section):
    """An existing tokenizer (`path`), or a byte-level BPE trained on the documents before the filter."""

    path: str | None = None  # Hub id or folder; null: train one
    vocab_size: int = Field(default=4096, ge=300)  # tokens of one that is trained


class Training(Section):
    """Training. `batch_size` and `steps` are global: what the optimizer sees, whatever the number of devices."""

    steps: int = Field(gt=0)  # optimizer steps
    batch_size: int = Field(gt=0)  # rows of `max_position_embeddings` tokens per optimizer step
    micro_batch_size: int | None = Field(default=None, gt=0)  # rows per device; null: the batch, divided among them
    optimizer: str = "adamw"  # or `muon`, for the hidden matrices
    learning_rate: float = Field(gt=0)  # peak learning rate of AdamW's parameters
    muon_learning_rate: float = Field(default=0.02, gt=0)  # peak learning rate of Muon's parameters
    weight_decay: float = Field(default=0.1, ge=0)  # of the matrices, decoupled, times the learning rate
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)  # decay of AdamW's first moment
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)  # decay of AdamW's second moment
    max_grad_norm: float = Field(default=1.0, gt=0)  # gradients are scaled down to this norm
    warmup_steps: int = Field(default=0, ge=0)  # steps in which the learning rate rises from zero
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # of the rate after that; `wsd`: constant, then decay
    decay_fraction: float = Field(default=0.2, gt=0, le=1)  # last share of the steps, in which `wsd` decays to zero
    stretch_cosine: bool = False  # let `cosine` continue with more steps: the rate jumps to the longer curve
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # `auto`: bf16 where the hardware supports it
    compile: bool = False  # the model with `torch.compile`
    isolate_documents: bool = True  # documents packed in one row do not attend to each other
    save_steps: int = Field(default=500, gt=0)  # steps between saved states, from which a killed run resumes
    keep_steps: list[int] = []  # steps whose checkpoints are kept beside the last, and released as branches
    keep_states: int = Field(default=2, gt=0)  # saved states; if the last is damaged, the one before is used
    eval_steps: int = Field(default=500, gt=0)  # steps between measurements on held-out text
    logging_steps: int = Field(default=10, gt=0)  # steps between entries of the log
    spike_threshold: float | None = Field(
        default=10.0, gt=0
    )  # stop if the loss jumps by so many robust standard deviations
    dollars_per_hour: float | None = Field(default=None, gt=0)  # of one device; null: not shown
    track_energy: bool = False  # energy and emissions by codecarbon, offline (`pip install 'nanophi[energy]'`)
    country_iso_code: str | None = Field(default=None, pattern=r"^[A-Z]{3}$")  # for the emissions, such as FRA
    report_to: list[str] = []  # trackio (a dashboard on this machine), wandb, tensorboard
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Of initial weights and the documents' order; null: the recipe's. Runs that differ in it alone share the rest."""
    arguments: dict[str, Any] = {}  # other fields of `TrainingArguments`, as `training.arguments.ALLOWED` lists them

    def rules(self) -> Rules:
        steps, batch, micro_batch = self.steps, self.batch_size, self.micro_batch_size or self.batch_size
        beyond = [step for step in self.keep_steps if not 1 <= step <= steps]
        yield self.warmup_steps >= steps, f"warmup_steps ({self.warmup_steps}) must be below steps ({steps})"
        yield beyond, f"keep_steps {beyond} are not among the steps, 1 to {steps}"
        yield batch % micro_batch, f"batch_size ({batch}) must be a multiple of micro_batch_size ({micro_batch})"
        yield self.optimizer not in OPTIMIZERS, f"optimizer '{self.optimizer}': use {' or '.join(OPTIMIZERS)}"
        untold = self.track_energy and self.country_iso_code is None
        yield untold, "track_energy needs country_iso_code, three letters such as FRA"

    @property
    def decay_start(self) -> int:
        """The step after which the learning rate of `wsd` begins to fall; of other schedules the last one."""
        decay = min(round(self.steps * self.decay_fraction), self.steps - self.warmup_steps)
        return self.steps - decay if self.schedule == "wsd" else self.steps


MAY_CHANGE = {
    *("arguments", "compile", "country_iso_code", "dollars_per_hour", "eval_steps", "keep_states", "keep_steps"),
    *("logging_steps", "micro_batch_size", "report_to", "save_steps", "spike_threshold", "stretch_cosine"),
    "track_energy",
}
"""Keys of `training` that do not change what has been learned so far."""


class Evaluation(Section):
    """The suites that every finished run is evaluated on."""

    suites: list[str] = ["heldout"]  # names in `eval/tasks.yaml`, or lm-eval's tasks: `arc_easy,winogrande:5`
    data: str | None = None  # folder with the benchmarks in Hub-dataset layout; null: the Hub
    limit: int | None = Field(default=None, gt=0)  # items per task at most; null: all
    batch_size: int = Field(default=16, gt=0)  # sequences per forward pass


class Card(Section):
    """What only a person can know; everything else in the card comes from records."""

    title: str | None = None  # of the card; null: the recipe's name
    developers: str = "the user who ran this recipe"  # who made the model
    license: str = "apache-2.0"  # an identifier of the Hub; `other` needs the two keys below
    license_name: str | None = None  # what a licence is called that is none of the Hub's
    license_link: str | None = None  # where the text of the licence is: a URL
    repo_id: str | None = None  # `ORG/NAME`, for the snippets; null: they name the release folder
    version: str = Field(default="v0.1", pattern=r"^v[0-9A-Za-z._-]+$")  # the tag that `nanophi push` sets
    notes: str = ""  # Markdown for the card's introduction
    prompt: str = "The "  # the beginning of the sample text

    def rules(self) -> Rules:
        return card_problems(self.model_dump())


class Release(Section):
    """How the release folder is written."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the released weights


class Lora(Section):
    """Low-rank adapters of every linear layer but the output's, merged into the weights of each checkpoint."""

    rank: int = Field(default=16, gt=0)  # of each adapter's two matrices
    alpha: int = Field(default=32, gt=0)  # an adapter's output is scaled by alpha / rank


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=RUN)  # of the run, and of its directory
    seed: int = Field(default=0, ge=0, lt=2**32)  # of everything that is drawn
    data: Data
    quality: Quality = Quality()
    tokenizer: Tokenizer = Tokenizer()
    model: dict[str, Any]
    """Fields of `NanoPhiConfig`; the token ids and, for a trained tokenizer, `vocab_size` come from the tokenizer."""
    base: str | None = None  # run, folder or ORG/NAME@REVISION whose weights training starts from; null: random weights
    conversations: list[Source] = []  # for a chat model: rows in the formats of TRL for `method`
    method: Literal["sft", "dpo"] = "sft"  # fine-tuning, or direct preference optimization
    beta: float = Field(default=0.1, gt=0)  # of `dpo`: how strongly the model is held to its base
    lora: Lora | None = None  # low-rank adapters in place of full fine-tuning
    training: Training
    evaluation: Evaluation = Evaluation()
    card: Card = Card()
    release: Release = Release()

    def rules(self) -> Rules:
        alone = not self.conversations and self.given("method", "lora")
        yield alone, f"'{alone}' needs 'conversations' to train on"
        for source in self.conversations:
            yield source.embedded == "documentation", "'conversations': 'embedded' must be 'questions'"
            unused = source.given("text_column", "separator", "source_column", "weight", "streaming", "phase")
            yield unused, f"'conversations': '{unused}' is for documents"
            yield source.embedded and self.method == "dpo", "'embedded: questions' has no rejected answers for dpo"
        choose(SCORERS, self.quality.scorer)[0].check_section(self.quality, self.data)
        sources, start, steps = self.data.sources, self.training.decay_start, self.training.steps
        lacking = self.two_phases and not self.conversations and not 0 < start < steps
        remedy = f"training.schedule=wsd, and a decay_fraction with steps on both sides (now: {start} of {steps})"
        yield lacking, f"'phase' needs a learning rate that is first stable and then decays; set {remedy}"
        if not any(source.embedded or source.source_column for source in sources):
            # Otherwise the documents say what their sources are called.
            known = {source.name or source.hub or source.files for source in sources}
            lost = ", ".join(map(repr, {*self.quality.high, *self.quality.low} - known))
            yield lost, f"quality.high or quality.low names source {lost}; there is {', '.join(map(str, known))}"
        # Last, because it imports transformers: every other mistake is answered at once.
        from nanophi.configuration_nanophi import NanoPhiConfig

        try:
            check_keys(self.model, set(NanoPhiConfig.__dataclass_fields__) - {"model_type", "transformers_version"})
            context = self.model_config_for().max_position_embeddings
        except ValueError as error:
            raise ValueError(f"'model': {error}") from None
        for key in ("max_tokens", "max_decay_tokens"):
            tokens = getattr(self.data, key) or context
            yield tokens < context, f"'data': {key} ({tokens}) is less than one row of {context} tokens"

    @property
    def two_phases(self) -> bool:
        """Whether the text may be another one while the learning rate decays."""
        return self.quality.phase == "decay" or self.data.two_phases

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
    """Read and check a recipe: a YAML file or a built-in one's name, changed by `section.key=value` strings.

    Raises `UserError` for anything wrong, naming the key.
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
    return checked(values, path)


def checked(values: Any, where: str | Path) -> Recipe:
    """The recipe of a mapping with every default stated or left out. Raises `UserError` that names `where` it is."""
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def check_distinct(recipes: Sequence[Recipe]) -> None:
    """Refuse two recipes of one name."""
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise UserError(f"two recipes have the same name ({', '.join(names)}); each run needs its own directory")


def print_recipe(
    name: OneRecipe,
    overrides: Overrides = [],
    diff: Annotated[Path | None, Option(metavar="RECIPE", help="Print what differs in this one.")] = None,
) -> None:
    """Print a recipe with every default, or what two differ in.

    Example: nanophi recipe demo --diff demo-control
    """
    values = load_recipe(name, overrides).dump()
    if diff is not None:
        typer.echo("\n".join(differences(values, load_recipe(diff).dump()) or ["no difference"]))
        return
    text = dump(values, width=100)
    typer.echo(f"# yaml-language-server: $schema={SCHEMA.as_uri()}\n{text}", nl=False)


def _has_no_examples(values: dict[str, Any]) -> bool:
    """Whether sources are the user's own, and the filter needs examples, of which what a recipe extends names none."""
    try:
        quality, sources = values.get("quality") or {}, values["data"]["sources"]
        labelled = any(quality.get(key) for key in ("high", "low", "share"))
        own_files = any(not source.get("embedded") for source in sources)
    except (AttributeError, KeyError, TypeError):
        return False  # no sections or sources: refused by the recipe's own check
    return own_files and not labelled and quality.get("scorer", "linear") == "linear"


def _explain(error: pydantic.ValidationError) -> str:
    """The first problem in one line, with the key's full name."""
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = " ".join(problem["msg"].removeprefix("Value error, ").split())
    shown = "" if isinstance(problem["input"], dict) or not key else f", got {problem['input']!r}"
    return f"'{key}': {message}{shown}" if key else message
