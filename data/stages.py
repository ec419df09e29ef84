"""The stages from sources to packed tokens: what each one depends on and writes, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from nanophi.core.errors import UserError, user_errors
from nanophi.core.files import read_json, sha256_of_tree
from nanophi.core.inputs import WEIGHTS, Inputs
from nanophi.core.names import step_folders
from nanophi.core.recipe import Recipe, Source
from nanophi.core.run import RunDirectory, differences
from nanophi.data import scorers
from nanophi.data.scorers import Scorer

PREPARE = ("documents", "scores", "quality", "tokenizer", "tokens", "conversations")

LATER: Any = {
    **dict.fromkeys(("engine", "workers", "max_tokens", "max_dropped"), True),
    "sources": {"__all__": {"license", "streaming", "weight"}},
}
"""Keys of `data` that say nothing about which documents there are."""

Build = Callable[[Path], dict[str, Any]]


def token_hashes(tokens: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of what a training reads, from the contents of a run's `tokens.json`."""
    hashes = {f"{split}_sha256": tokens[split]["sha256"] for split in ("train", "heldout")}
    return hashes | {f"chat_{split}_sha256": value for split, value in tokens.get("conversations", {}).items()}


class DataStages:
    """What `nanophi prepare` does. A method is a stage: it runs those before it, then itself unless it is up to date.

    Args:
        recipe: the resolved recipe.
        run: its directory.
        build: stages that may run; the others must be up to date already.
        write: whether this process is the one that writes to the directory.
        restart: weights that the recipe cannot continue from may be removed.
    """

    def __init__(
        self, recipe: Recipe, run: RunDirectory, build: Collection[str], write: bool, restart: bool = False
    ) -> None:
        self.recipe = recipe
        self.run = run
        self.path = run.path
        self.report = run.report
        self.build = frozenset(build)
        self.restart = restart
        self.inputs = Inputs(run, write=write)
        self._done: dict[str, dict[str, Any]] = {}

    def _stage(
        self,
        name: str,
        inputs: dict[str, Any],
        outputs: Sequence[str],
        build: Build,
        kind: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Each stage once per process, so that no two callers check the same thing twice."""
        if name not in self._done:
            self.inputs.save()
            allowed = build if (kind or name) in self.build else None
            self._done[name] = self.run.stage(name, inputs, outputs, allowed, kind=kind, **kwargs)
        return self._done[name]

    def pinned(self, sources: Sequence[Source]) -> list[Source]:
        """Sources with the commit of each dataset on the Hub as its revision."""
        from nanophi.data.sources import is_on_hub

        pinned = []
        for source in sources:
            if source.hub and is_on_hub(source):
                commit = self.inputs.commit_of(source.hub, source.revision, "dataset")
                source = source.model_copy(update={"revision": commit})
            pinned.append(source)
        return pinned

    def _check_what_comes_later(self) -> None:
        """What would stop the run only after the documents are read is looked at first: the scorer, the tokenizer."""
        recipe = self.recipe
        if "documents" in self._done or "documents" not in self.build:
            return
        inputs = {**self._scorer().identity(self.inputs.model), "quality": self._scoring()}
        known = self.run.inputs_of("scores") or {}
        if any(known.get(key) != value for key, value in inputs.items()):
            self._scorer(inputs).check()
        if recipe.tokenizer.path is not None:
            files = self.inputs.model(recipe.tokenizer.path, ignore=WEIGHTS)
            if (self.run.inputs_of("tokenizer") or {}).get("files") != files:
                from nanophi.data import tokenizer

                tokenizer.load(recipe.tokenizer.path, files.get("commit"))

    def _scorer(self, inputs: dict[str, Any] | None = None) -> Scorer:
        """The recipe's scorer, at the commit that its `identity` names."""
        return scorers.of_section(self.recipe.quality, (inputs or {}).get("scorer", {}).get("commit"))

    def _scoring(self) -> dict[str, Any]:
        """The part of `quality` that scores depend on."""
        return self.recipe.quality.model_dump(mode="json", exclude={"threshold", "share", "select"})

    @user_errors("documents cannot be gathered; --debug shows where it stopped")
    def documents(self) -> dict[str, Any]:
        """Sources to clean, deduplicated documents, split into train and held-out."""
        from nanophi.data import gather, sources

        self._check_what_comes_later()
        data = self.recipe.data.model_copy(update={"sources": self.pinned(self.recipe.data.sources)})
        score = self._scorer().column
        benchmarks = data.decontamination.benchmarks
        inputs = {
            "data": data.model_dump(mode="json", exclude=LATER),
            "sources": [sources.fingerprint(source, self.inputs.contents) for source in data.sources],
            "benchmarks": self.inputs.contents.of(benchmarks) if benchmarks else None,
            "score": score,
        }
        return self._stage(
            "documents",
            inputs,
            ["data/documents"],
            lambda work: gather.gather(data, work / "data/documents", score, self.report),
        )

    @user_errors("documents cannot be scored; --debug shows where it stopped")
    def scores(self) -> dict[str, Any]:
        """A quality score for every document."""
        from nanophi.data import scoring

        self.documents()
        recipe = self.recipe
        inputs: dict[str, Any] = {
            "documents": self.run.stage_key("documents"),
            "quality": self._scoring(),
            "seed": recipe.seed,
            **self._scorer().identity(self.inputs.model),
        }
        return self._stage(
            "scores",
            inputs,
            ["data/scores"],
            lambda work: scoring.score(
                self.path / "data/documents",
                recipe.quality,
                recipe.data,
                recipe.seed,
                work / "data/scores",
                revision=inputs.get("scorer", {}).get("commit"),
            ),
        )

    @user_errors("documents cannot be selected; --debug shows where it stopped")
    def quality(self) -> dict[str, Any]:
        """The documents that the filter keeps, and the report on it."""
        from nanophi.data import scoring

        self.scores()
        recipe = self.recipe
        section, seed = recipe.quality, recipe.training_seed
        inputs: dict[str, Any] = {"scores": self.run.stage_key("scores"), "threshold": section.threshold}
        if section.share is not None:
            inputs |= {"share": section.share, "select": section.select, "seed": seed}
        return self._stage(
            "quality",
            inputs,
            ["data/quality"],
            lambda work: scoring.select(
                self.path / "data/documents", self.path / "data/scores", section, work / "data/quality", seed
            ),
            accept=self._keep_data_of_weights,
        )

    @user_errors("the tokenizer cannot be made; --debug shows where it stopped")
    def tokenizer(self) -> dict[str, Any]:
        """An existing tokenizer, or one trained on all documents, so that a filtered run and its control share it."""
        from nanophi.data import tokenizer

        self.documents()
        recipe = self.recipe
        inputs: dict[str, Any] = {"tokenizer": recipe.tokenizer.model_dump(mode="json"), "seed": recipe.seed}
        inputs["documents"] = self.run.stage_key("documents")
        if recipe.tokenizer.path is not None:
            # A tokenizer's folder may hold a model's weights too, which are large and play no part.
            inputs["files"] = self.inputs.model(recipe.tokenizer.path, ignore=WEIGHTS)
        return self._stage(
            "tokenizer",
            inputs,
            ["data/tokenizer"],
            lambda work: tokenizer.build(
                self.path / "data/documents",
                recipe.tokenizer,
                recipe.seed,
                work / "data/tokenizer",
                revision=inputs.get("files", {}).get("commit"),
                report=self.report,
            ),
            accept=self._keep_data_of_weights,
        )

    @user_errors("documents cannot be tokenized; --debug shows where it stopped")
    def tokens(self) -> dict[str, Any]:
        """Kept documents as packed rows of tokens."""
        from nanophi.data import packing

        self.quality()
        self.tokenizer()
        recipe = self.recipe
        context_length = recipe.model_config_for().max_position_embeddings
        inputs = {
            "quality": self.run.stage_key("quality"),
            "tokenizer": self.run.stage_key("tokenizer"),
            "context_length": context_length,
            "max_tokens": recipe.data.max_tokens,
            "weights": [source.weight for source in recipe.data.sources],
            "seed": recipe.training_seed,
        }
        return self._stage(
            "tokens",
            inputs,
            ["data/tokens"],
            lambda work: packing.pack(
                self.path / "data/documents",
                self.path / "data/quality",
                self.path / "data/tokenizer",
                context_length,
                recipe.data,
                recipe.training_seed,
                work / "data/tokens",
            ),
            accept=self._keep_data_of_weights,
        )

    def _keep_data_of_weights(self, work: Path) -> None:
        """Refuse to replace the tokens or the tokenizer that weights of this run were trained on by others."""
        trained = self.run.inputs_of("training")
        weights = [
            path.name for folder in ("checkpoints", "training_state") for path in step_folders(self.path / folder)
        ]
        if trained is None or not weights or self.restart:
            return
        changed = []
        if (work / "data/tokens").exists():
            new = token_hashes(read_json(work / "data/tokens/tokens.json"))
            changed += [name.removesuffix("_sha256") for name in new if new[name] != trained["data"].get(name)]
        if (work / "data/quality").exists() and self._selects_otherwise(work):
            changed.append("train")
        if (work / "data/tokenizer").exists():
            changed += ["tokenizer"] * (sha256_of_tree(work / "data/tokenizer") != trained["data"]["tokenizer_sha256"])
        if changed:
            names = {"train": "training tokens", "heldout": "held-out tokens", "tokenizer": "tokenizer"}
            names |= {"chat_train": "conversations", "chat_heldout": "held-out conversations"}
            raise UserError(
                f"{self.path}: the recipe gives other data ({', '.join(names[name] for name in changed)}) than "
                f"the weights ({max(weights)}) were trained on, which are kept with their data: put the sources and "
                "the recipe's data, quality and tokenizer back, use another name, or start over with --restart"
            )

    def _selects_otherwise(self, work: Path) -> bool:
        """Whether a new selection keeps other documents than the one that this run's tokens were made of."""
        import pyarrow.parquet as pq

        tokens, quality = self.run.inputs_of("tokens"), self.run.record["stages"].get("quality")
        before = self.path / "data/quality/kept.parquet"
        if tokens is None or quality is None or tokens["quality"] != quality["key"] or not before.exists():
            return False
        ids = [
            sorted(pq.read_table(file, columns=["id"])["id"].to_pylist())
            for file in (before, work / "data/quality/kept.parquet")
        ]
        return ids[0] != ids[1]

    def require_tokens(self) -> None:
        """Check that the tokens are there and belong to the recipe, without looking at what they were made from.

        Raises:
            UserError: if something is missing, or was prepared with other values of the recipe.
        """
        for part in ("data/tokens/tokens.json", "data/tokenizer"):
            if not (self.path / part).exists():
                raise UserError(f"{self.path / part} is missing; run `nanophi prepare` on the recipe")
        recipe = self.recipe
        quality, tokenizer = recipe.quality.model_dump(mode="json"), recipe.tokenizer.model_dump(mode="json")
        now = {
            "tokenizer": {"tokenizer": {key: value for key, value in tokenizer.items() if key != "path"}},
            "quality": {"threshold": quality["threshold"]},
            "tokens": {
                "context_length": recipe.model_config_for().max_position_embeddings,
                "max_tokens": recipe.data.max_tokens,
                "seed": recipe.training_seed,
            },
        }
        if recipe.quality.share is not None:
            now["quality"] |= {"share": quality["share"], "select": quality["select"]}
        for stage, values in now.items():
            then = self.run.inputs_of(stage)
            if then is None:
                continue  # copied without its record; the rows' length is checked when they are read
            for line in differences({key: then.get(key) for key in values}, values):
                if not line.startswith("tokenizer.path "):
                    held = step_folders(self.path / "checkpoints") or step_folders(self.path / "training_state")
                    remedy = "give it another name, or start over with --restart" if held else "run `nanophi prepare`"
                    weights = ", and the run holds weights that were trained on it" if held else ""
                    raise UserError(
                        f"{self.path / 'data'} was prepared with another recipe ({stage}: {line}){weights}; {remedy}"
                    )
